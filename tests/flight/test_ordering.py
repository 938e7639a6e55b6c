"""An ordered stream refuses everything behind a retryable refusal until its client resumes (R36)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka._core.wire import FlightMessage
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.acks import AckForm
from arka.flight.exchange import Exchange
from arka.options import Limits
from arka.records import AckMessage, TableName
from arka.testing.simnode import NAME, SimNode
from arka.testing.simwriters import SCHEMA, definition_of, flight_messages, frame_buffer, parse_acks
from arka.tiers.admission import Ledger
from arka.tiers.pipeline import Pipeline

KEYED = TableName("default", "k")
#: More than any disk has.
NO_ROOM = 1 << 60


class Stream:
    """A write stream whose acks are read at once."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._ledger = Ledger(1 << 20)

    async def request(self, **fields: object) -> None:
        await self._send(FlightMessage(app_metadata=msgspec.json.encode(fields)))

    async def write(self, number: int, **fields: object) -> None:
        await self._send(self.message(number, **fields))

    def message(self, number: int, **fields: object) -> FlightMessage:
        batch = pa.record_batch(
            [pa.array(column, field.type) for column, field in zip([[number], [0], ["x"]], SCHEMA, strict=True)],
            schema=SCHEMA,
        )
        header, buffer = frame_buffer(batch)
        metadata = msgspec.json.encode(fields) if fields else None
        return FlightMessage(header=header, app_metadata=metadata, buffer=buffer, body_bytes=buffer.body_bytes)

    async def _send(self, message: FlightMessage) -> None:
        message.charge = self._ledger.request(1)
        await self.exchange.handle(message)

    def codes(self) -> list[str]:
        """What the writes since the last call were told first: ``ok``, ``duplicate`` or an error's code."""
        told: dict[int, str] = {}
        for ack in self.acks():
            if ack.sequence >= 0:
                told.setdefault(ack.sequence, ack.code or ("duplicate" if ack.duplicate else "ok"))
        return [told[sequence] for sequence in sorted(told)]

    def acks(self) -> list[AckMessage]:
        out = []
        while data := self.exchange.take(1 << 20):
            out += parse_acks(data)
        return out


class _Nobody:
    def wake(self) -> None:
        """See ``Outbound``."""


@asynccontextmanager
async def stream(pipeline: Pipeline, name: TableName, **fields: object) -> AsyncIterator[Stream]:
    await pipeline.tables.create(definition_of(name, keyed=name == KEYED))
    exchange = Exchange(pipeline, Limits(), _Nobody(), find=pipeline.tables.find, form=AckForm.METADATA)
    try:
        made = Stream(exchange)
        await made.request(table_name=str(name), requested_durability="memory", **fields)
        await made._send(FlightMessage(header=flight_messages(SCHEMA)))
        yield made
    finally:
        exchange.close()


@pytest.mark.parametrize(
    ("name", "fields", "ordered"),
    [
        (NAME, {}, False),
        (NAME, {"ordered": False}, False),
        (NAME, {"ordered": True}, True),
        (KEYED, {}, True),
        (KEYED, {"ordered": True}, True),
        (KEYED, {"ordered": False}, False),
    ],
)
async def test_writes_behind_a_refusal(
    name: TableName, fields: dict[str, bool], ordered: bool, autojump_clock: MockClock
) -> None:
    """On an ordered stream they are refused with the same code, though there is room again."""
    node = SimNode()
    async with node.run() as pipeline, stream(pipeline, name, **fields) as writes:
        await writes.write(0)
        pipeline.note_held("test", NO_ROOM)
        await writes.write(1)
        pipeline.note_held("test", -NO_ROOM)
        await trio.sleep(1)
        acks = writes.acks()
        assert [ack.code for ack in acks] == [None, "overloaded"]
        assert ("resume_after_lsn" in str(acks[1].error)) is ordered
        await writes.write(2)
        assert writes.codes()[0] == ("overloaded" if ordered else "ok")
        await writes.request(resume_after_lsn=0)
        await writes.write(1)
        await writes.write(2)
        assert set(writes.codes()) == {"ok"}


async def test_keys_count_what_was_refused(autojump_clock: MockClock) -> None:
    """KEY#n counts each batch; behind a refusal the client says with which number it goes on."""
    node = SimNode()
    async with node.run() as pipeline, stream(pipeline, KEYED, idempotency_key="k", key_start=5) as writes:
        await writes.write(0)
        pipeline.note_held("test", NO_ROOM)
        await writes.write(1)
        pipeline.note_held("test", -NO_ROOM)
        await trio.sleep(1)
        await writes.write(2)
        assert writes.codes() == ["ok", "overloaded", "overloaded"]
        with pytest.raises(InvalidRequest, match="key_start"):
            await writes.request(resume_after_lsn=1)
        await writes.request(resume_after_lsn=1, key_start=6)
        for number in (1, 2):
            await writes.write(number)
        assert writes.codes() == ["ok", "ok"]
        table = await pipeline.tables.find(KEYED)
        assert [pipeline.knows(table, b"k#%d" % number) for number in (5, 6, 7, 8)] == [True, True, True, False]


async def test_a_known_key_is_answered_behind_a_refusal(autojump_clock: MockClock) -> None:
    """A write that is in the log is never called refused: sent again it is a duplicate."""
    node = SimNode()
    async with node.run() as pipeline, stream(pipeline, KEYED) as writes:
        await writes.write(0, idempotency_key="a")
        pipeline.note_held("test", NO_ROOM)
        await writes.write(1, idempotency_key="b")
        await writes.write(0, idempotency_key="a")
        assert writes.codes() == ["ok", "overloaded", "duplicate"]


async def test_a_batch_may_bring_the_resumption(autojump_clock: MockClock) -> None:
    """resume_after_lsn with a batch holds from that batch on, in both ways a message is taken."""
    node = SimNode()
    async with node.run() as pipeline, stream(pipeline, NAME, ordered=True) as writes:
        pipeline.note_held("test", NO_ROOM)
        await writes.write(0)
        pipeline.note_held("test", -NO_ROOM)
        await trio.sleep(1)
        assert not writes.exchange.handle_at_once(writes.message(0, resume_after_lsn=0))
        await writes.write(0, resume_after_lsn=0)
        await writes.write(1)
        assert writes.codes() == ["overloaded", "ok", "ok"]


async def test_an_error_of_the_data_refuses_nothing_else(autojump_clock: MockClock) -> None:
    """Only refusals that may be sent again hold for later writes."""
    node = SimNode()
    async with node.run() as pipeline, stream(pipeline, KEYED) as writes:
        await writes.write(0)
        await writes.write(1, idempotency_key="")
        await writes.write(2)
        assert writes.codes() == ["ok", ErrorCode.INVALID_REQUEST.value, "ok"]


async def test_ordered_belongs_to_the_stream(autojump_clock: MockClock) -> None:
    """It cannot change after the first batch; saying it again is no change."""
    node = SimNode()
    async with node.run() as pipeline, stream(pipeline, KEYED) as writes:
        await writes.write(0, ordered=True)
        await writes.request(ordered=True)
        with pytest.raises(InvalidRequest, match="ordered belongs"):
            await writes.request(ordered=False)


async def test_writes_wait_for_room_in_their_order(autojump_clock: MockClock) -> None:
    """A write that finds no room waits, and those behind it behind it; none is told anything before there is room."""
    node = SimNode()
    async with node.run() as pipeline, stream(pipeline, NAME) as writes:
        await writes.write(0)
        pipeline.note_held("test", NO_ROOM)

        async def write_more() -> None:
            for number in range(1, 4):
                await writes.write(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_more)
            await trio.sleep(20)
            assert not writes.exchange.handle_at_once(writes.message(9)), "it would overtake"
            assert [ack.sequence for ack in writes.acks()] == [0]
            pipeline.note_held("test", -NO_ROOM)
        assert [(ack.sequence, ack.code) for ack in writes.acks()] == [(1, None), (2, None), (3, None)]
