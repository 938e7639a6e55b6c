"""What batches decode to is found room for before they are decoded, and given back when it is on disk (T14, T26)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pyarrow as pa
import pytest
import trio

from arka._core.wire import FlightMessage
from arka.flight.acks import AckForm
from arka.flight.exchange import Exchange
from arka.options import KIB, MIB, Limits
from arka.records import Tier
from arka.testing.ipcstreams import write_stream
from arka.testing.simnode import NAME, SimNode
from arka.testing.simwriters import definition_of, parse_acks
from arka.tiers.admission import Ledger
from arka.tiers.decoderoom import DecodeRoom

LIMITS = Limits(memory_bytes=16 * MIB, message_bytes=4 * MIB, batch_bytes=2 * MIB, dictionary_bytes=2 * MIB)
TEXT = "x" * KIB
ROWS = 1_500
STREAMS = 24
#: How a batch of 1.5 MB is sent in few bytes, or in another form: its ``filler`` and the codec.
FORMS: dict[str, tuple[Callable[[], pa.Array], str | None]] = {
    "zstd": (lambda: pa.array([TEXT] * ROWS), "zstd"),
    "lz4": (lambda: pa.array([TEXT] * ROWS), "lz4"),
    "dictionary": (lambda: pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), [TEXT]), None),
    "runs": (lambda: pa.RunEndEncodedArray.from_arrays(pa.array([ROWS], pa.int32()), pa.array([TEXT])), None),
    "views": (lambda: _one_view(), None),
    "large": (lambda: pa.array([TEXT] * ROWS, pa.large_string()), "zstd"),
}


def _one_view() -> pa.Array:
    """All rows name the same kB."""
    one = pa.array([TEXT], pa.string_view())
    _, views, *data = one.buffers()
    return pa.Array.from_buffers(pa.string_view(), ROWS, [None, pa.py_buffer(views.to_pybytes()[:16] * ROWS), *data])


class _Nobody:
    def wake(self) -> None:
        """See ``Outbound``."""


def messages_of(form: str, numbers: Sequence[int]) -> list[FlightMessage]:
    make, codec = FORMS[form]
    filler = make()
    schema = pa.schema(
        [pa.field("id", pa.int64(), False), pa.field("part", pa.int32(), False), ("filler", filler.type)]
    )
    columns = [pa.array(numbers, pa.int64()), pa.array([0] * len(numbers), pa.int32()), filler]
    batch = pa.record_batch(columns, schema=schema)
    return [
        FlightMessage(
            header=each.header, buffer=each.buffer, body_bytes=0 if each.buffer is None else each.buffer.body_bytes
        )
        for each in write_stream(schema, [batch], compression=codec)
    ]


@pytest.mark.parametrize("form", FORMS)
async def test_a_disk_that_stands_still(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many streams sends a few kB that become 1.5 MB: what does not fit waits, and nothing is lost."""
    node, room, ledger = SimNode(), DecodeRoom(LIMITS.memory_bytes), Ledger.of(LIMITS)
    async with node.run() as pipeline:
        await pipeline.tables.create(definition_of(NAME, keyed=False))
        goes_on, append = trio.Event(), pipeline._writer.append

        async def append_late(frames):
            await goes_on.wait()
            return await append(frames)

        async def write(number: int) -> None:
            exchange = Exchange(
                pipeline,
                LIMITS,
                _Nobody(),
                find=pipeline.tables.find,
                form=AckForm.METADATA,
                room=room,
                peer=f"peer {number % 3}",
            )
            request = msgspec.json.encode({"table_name": str(NAME), "requested_durability": "disk"})
            rows = range(number * ROWS, (number + 1) * ROWS)
            for message in (FlightMessage(app_metadata=request), *messages_of(form, rows)):
                message.charge = ledger.request(100)
                await exchange.handle(message)
            exchanges.append(exchange)

        exchanges: list[Exchange] = []
        monkeypatch.setattr(pipeline._writer, "append", append_late)
        async with trio.open_nursery() as nursery:
            for number in range(STREAMS):
                nursery.start_soon(write, number)
            with trio.fail_after(60):
                while not room.waiting:
                    await trio.sleep(0.01)
            await trio.sleep(0.3)
            assert 0 < pipeline.memory.queued_bytes <= room.used_bytes + 4 * KIB
            assert room.used_bytes <= room.limit_bytes
            assert len(exchanges) < STREAMS
            goes_on.set()
        table = await pipeline.tables.find(NAME)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert sorted(node.ids()) == list(range(STREAMS * ROWS))
        for exchange in exchanges:
            acks = parse_acks(exchange.take(1 << 20))
            assert [(ack.durability_level, ack.code) for ack in acks if ack.sequence >= 0] == [
                ("memory", None),
                ("disk", None),
            ], acks
            exchange.close()
    assert (room.used_bytes, room.waiting) == (0, 0)
    assert ledger.statistics().charged_bytes == 0
