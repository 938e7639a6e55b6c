"""What clients do not read is counted, bounded for each stream and peer, and ends their stream (T6, T26)."""

from __future__ import annotations

import sys
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from arka._core.wire import FlightMessage, MessageAssembler
from arka.errors import AdmissionRejected, ArkaError, ErrorCode
from arka.flight.acks import AckForm, AckQueue
from arka.flight.exchange import Exchange
from arka.flight.flow import ReadAhead, StreamIntake
from arka.flight.pace import PACE_S, Pace
from arka.flight.unread import ACK_BYTES, LEAST_BYTES, STEP_BYTES, TEXT_OVERHEAD, Unread, UnreadShare
from arka.options import KIB, MIB, Limits
from arka.records import Tier
from arka.testing.simnode import NAME, SimNode
from arka.tiers.admission import Ledger
from arka.tiers.watermarks import Advance
from tests.flight.test_ordering import SCHEMA, Stream, _Nobody, definition_of, flight_messages

STEPS = st.sampled_from(["accept", "duplicate", "reused", "reject", "aside", "handshake", "fail", "take", "rise"])


@given(st.lists(st.tuples(STEPS, st.integers(0, 3), st.text(max_size=40)), max_size=60))
def test_texts_are_counted_until_they_are_read(steps: list[tuple[str, int, str]]) -> None:
    """Whatever happens, what is counted for texts is what the queue holds, and nothing once all is read."""
    queue = AckQueue()
    for step, tier, text in steps:
        lsn = queue.writes + 1
        match step:
            case "accept":
                queue.accept(lsn, 1, Tier(tier))
            case "duplicate" | "reused":
                queue.duplicate(lsn, 1, Tier(tier), ErrorCode.KEY_REUSED if step == "reused" else None)
            case "reject":
                queue.reject(ErrorCode.INVALID_REQUEST, text)
            case "aside":
                queue.set_aside(max(1, queue.writes - tier), text)
            case "handshake":
                queue.handshake(dict.fromkeys(Tier, lsn))
            case "fail":
                queue.fail(ErrorCode.TABLE_DROPPED, text)
            case "rise":
                queue.advance(Advance(Tier(tier), queue.writes, 1))
            case _:
                queue.take(300)
        held = sum(sys.getsizeof(message) for message in queue._preamble)
        specials = [*queue._special.values(), *([queue._failure] if queue._failure else [])]
        held += sum(sys.getsizeof(getattr(special, "detail", "")) for special in specials)
        assert queue._texts_bytes >= held * 3 // 4
        assert queue._texts_bytes >= TEXT_OVERHEAD * (len(queue._preamble) + len(specials))
    for tier in Tier:
        queue.advance(Advance(tier, 1 << 40, 1))
    while queue.take(1 << 20):
        pass
    assert queue.settled
    assert queue.unread_bytes == 0
    assert queue.most_bytes == 0


def test_a_table_of_rejections_shrinks_once_they_are_read() -> None:
    """The places of 100,000 rejections that were read are given back: Python's own tables never shrink."""
    queue = AckQueue()
    for _ in range(100_000):
        queue.reject(ErrorCode.INVALID_REQUEST, "no")
    full = sys.getsizeof(queue._special)
    while queue.take(1 << 20):
        pass
    assert sys.getsizeof(queue._special) < full / 100


def test_one_stream_may_have_most_and_many_have_equal_parts() -> None:
    """Alone a stream may leave nearly all of the share unread; a thousand get parts that differ by little."""
    share = UnreadShare(64 * MIB)
    alone = Unread(share, None)
    while not alone.too_many:
        alone.charge(alone.charged + KIB)
    assert 60 * MIB <= alone.charged <= 64 * MIB
    alone.close()
    assert share.held_bytes == 0
    many = [Unread(share, None) for _ in range(1_000)]
    for _ in range(200):
        for unread in many:
            if not unread.too_many:
                unread.charge(unread.charged + KIB)
    assert share.held_bytes <= 64 * MIB
    assert max(u.charged for u in many) <= min(u.charged for u in many) + KIB
    assert min(u.charged for u in many) > LEAST_BYTES


def test_what_one_peer_does_not_read_is_not_all() -> None:
    """A peer with a thousand streams leaves room for another, and what is next to nothing is always allowed."""
    ledger, share = Ledger.of(Limits()), UnreadShare(64 * MIB)
    hog = ledger.open_connection("hog")
    many = [Unread(share, ledger.open_stream(hog)) for _ in range(1_000)]
    for _ in range(200):
        for unread in many:
            if not unread.too_many:
                unread.charge(unread.charged + KIB)
    other = Unread(share, ledger.open_stream(ledger.open_connection("other")))
    while not other.too_many:
        other.charge(other.charged + KIB)
    assert other.charged >= MIB
    last = Unread(share, ledger.open_stream(hog))
    last.charge(LEAST_BYTES)
    assert not last.too_many


class Reader:
    """A write stream over an engine, whose client reads when it is told to."""

    def __init__(self, pipeline, **limits) -> None:
        self.limits = Limits(unread_bytes=MIB, unread_acks_timeout_s=60, **limits)
        self.share = UnreadShare(self.limits.unread_bytes)
        self.held: list[object] = []
        self.exchange = Exchange(
            pipeline,
            self.limits,
            _Nobody(),
            find=pipeline.tables.find,
            form=AckForm.METADATA,
            unread=Unread(self.share, None),
            hold=self.held.append,
        )
        self.stream = Stream(self.exchange)

    async def open(self, pipeline) -> None:
        await pipeline.tables.create(definition_of(NAME, keyed=False))
        await self.stream.request(table_name=str(NAME), requested_durability="memory")
        await self.stream._send(FlightMessage(header=flight_messages(SCHEMA)))


@pytest.mark.parametrize("kind", ["rejections", "handshakes", "writes", "rejections at once"])
async def test_unread_answers_end_their_stream(kind: str, autojump_clock: MockClock) -> None:
    """T26: texts, handshakes and acks count alike; past the share the stream is not read, then it ends (T6)."""
    async with SimNode().run() as pipeline:
        reader = Reader(pipeline)
        await reader.open(pipeline)
        sent = 0

        async def send_all() -> None:
            nonlocal sent
            while sent < 100_000:
                if kind == "rejections at once":
                    message = reader.stream.message(sent, requested_durability="x" * 500)
                    message.charge = reader.stream._ledger.request(1)
                    if not reader.exchange.handle_at_once(message):
                        await reader.exchange.wait_readable()
                        await reader.exchange.handle(message)
                    sent += 1
                    continue
                await reader.exchange.wait_readable()
                sent += 1
                if kind == "rejections":
                    await reader.stream.write(sent, requested_durability="x" * 500)
                elif kind == "handshakes":
                    await reader.stream.request(resume_after_lsn=0)
                else:
                    reader.exchange.acks.accept(sent, 1, Tier.MEMORY)

        with pytest.raises(ArkaError, match="read acks while writing") as raised:
            await send_all()
        assert raised.value.code is ErrorCode.TOO_LARGE
        cost = {"writes": ACK_BYTES, "handshakes": 4 * TEXT_OVERHEAD}.get(kind, 500 + TEXT_OVERHEAD)
        assert reader.share.held_bytes <= MIB + STEP_BYTES
        assert sent <= (MIB + STEP_BYTES) // cost + 1
        assert len(reader.held) == 2
        assert reader.held[1] is None
        reader.exchange.close()
        assert reader.share.held_bytes == 0


async def test_who_reads_goes_on(autojump_clock: MockClock) -> None:
    """A client that reads what is due is never held back, however much it was told."""
    async with SimNode().run() as pipeline:
        reader = Reader(pipeline)
        await reader.open(pipeline)
        for number in range(5_000):
            await reader.exchange.wait_readable()
            await reader.stream.write(number, requested_durability="x" * 500)
            if number % 100 == 99:
                assert len(reader.stream.codes()) == 100
        assert reader.held == []
        reader.exchange.close()


async def test_what_is_not_taken_for_unread_acks_is_no_refuge(autojump_clock: MockClock) -> None:
    """T25: a stream that holds complete messages and does not read its acks ends while others wait for memory."""
    limits = Limits(memory_bytes=16 * MIB)
    ledger = Ledger.of(limits)
    pace = Pace(ledger, limits)
    stream = ledger.open_stream(ledger.open_connection("hog"))
    assembler = MessageAssembler(True, 8 * MIB, 8 * MIB)
    intake = StreamIntake(assembler, ledger, ReadAhead(ledger), lambda _: None, account=stream, pace=pace)
    intake.begin(8 * MIB, 8 * MIB - 65_536)
    intake.complete(FlightMessage(header=b"h"), 8 * MIB)
    async with SimNode().run() as pipeline:
        exchange = Exchange(
            pipeline,
            Limits(unread_bytes=MIB, unread_acks_timeout_s=10_000),
            _Nobody(),
            find=pipeline.tables.find,
            form=AckForm.METADATA,
            hold=intake.hold,
        )
        for _ in range(20_000):
            exchange.acks.reject(ErrorCode.INVALID_REQUEST, "no")
        other = ledger.open_stream(ledger.open_connection("other"))
        waits = None

        async def look() -> None:
            for _ in range(40):
                await trio.sleep_until(pace.look(trio.current_time()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            with trio.move_on_after(3 * PACE_S) as unhurried:
                await exchange.wait_readable()
            # Nobody waited so far.
            assert unhurried.cancelled_caught
            waits = ledger.request(8 * MIB, None, other)
            assert not waits.granted
            nursery.start_soon(look)
            with trio.fail_after(3 * PACE_S), pytest.raises(AdmissionRejected, match="others waited"):
                await exchange.wait_readable()
            nursery.cancel_scope.cancel()
        exchange.close()
        intake.abandon()
        assert waits.granted


async def test_dictionaries_and_schemas_are_kept_at_a_charge(autojump_clock: MockClock) -> None:
    """T26: what a stream keeps is charged while it lasts, and refused with ``overloaded`` where there is no room."""
    ledger = Ledger.of(Limits(memory_bytes=16 * MIB))
    account = ledger.open_stream(ledger.open_connection("one"))
    async with SimNode().run() as pipeline:
        await pipeline.tables.create(definition_of(NAME, keyed=False))

        def keep(amount: int, what: str) -> object:
            return ledger.keep(amount, account, what)

        exchange = Exchange(pipeline, Limits(), _Nobody(), find=pipeline.tables.find, form=AckForm.METADATA, keep=keep)
        stream = Stream(exchange)
        await stream.request(table_name=str(NAME))
        header = flight_messages(SCHEMA)
        await stream._send(FlightMessage(header=header))
        await stream._send(FlightMessage(header=header))
        assert ledger.statistics().kept_bytes == len(header)
        exchange.close()
        assert ledger.statistics().kept_bytes == 0
        full = ledger.keep(MIB + 300 * KIB, account)
        with suppress(AdmissionRejected):
            while True:
                ledger.keep(len(header), account)
        other = Stream(
            Exchange(pipeline, Limits(), _Nobody(), find=pipeline.tables.find, form=AckForm.METADATA, keep=keep)
        )
        await other.request(table_name=str(NAME))
        with pytest.raises(AdmissionRejected, match="schema"):
            await other._send(FlightMessage(header=header))
        other.exchange.close()
        full.release()
