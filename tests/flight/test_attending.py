"""A stream hears of a tier while one of its writes waits for it, and of no other (T22)."""

from __future__ import annotations

import msgspec
import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka._core.wire import FlightMessage
from arka.flight.acks import AckForm
from arka.flight.exchange import Exchange
from arka.options import Limits
from arka.records import Tier
from arka.testing.simnode import NAME, SimNode, create_table, with_options
from arka.testing.simwriters import SCHEMA, flight_messages, frame_buffer
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table


class _Wire:
    def wake(self) -> None:
        pass


class _Charge:
    def release(self) -> None:
        pass


def _batch(number: int) -> FlightMessage:
    rows = pa.record_batch([pa.array([number]), pa.array([0], pa.int32()), pa.array(["x"])], schema=SCHEMA)
    header, buffer = frame_buffer(rows)
    return FlightMessage(header=header, buffer=buffer, body_bytes=buffer.body_bytes, charge=_Charge())


async def _open(pipeline: Pipeline, durability: str) -> Exchange:
    exchange = Exchange(pipeline, Limits(), _Wire(), form=AckForm.METADATA, find=pipeline.tables.find)
    request = {"table_name": str(NAME), "requested_durability": durability}
    await exchange.handle(FlightMessage(app_metadata=msgspec.json.encode(request), charge=_Charge()))
    await exchange.handle(FlightMessage(header=flight_messages(SCHEMA), charge=_Charge()))
    return exchange


def _listening(pipeline: Pipeline, table: Table, exchange: Exchange) -> list[str]:
    return [mark.tier.word for mark in pipeline.marks_of(table) if mark.has_listener(exchange._on_advance)]


@pytest.mark.parametrize("durability", ["memory", "disk", "object_storage", "iceberg_committed"])
async def test_a_stream_hears_of_a_tier_while_a_write_waits_for_it(durability: str, autojump_clock: MockClock) -> None:
    """Each group commit tells the streams that wait for it: of thousands that wait for Iceberg it tells none."""
    node = SimNode(with_options(iceberg__commit_interval_s=5.0))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        exchange = await _open(pipeline, durability)
        assert _listening(pipeline, table, exchange) == []
        for number in range(3):
            await exchange.handle(_batch(number))
            assert _listening(pipeline, table, exchange) == ["disk", "object_storage", "iceberg_committed"]
            await pipeline.flush(table, Tier.DISK)
            assert "disk" not in _listening(pipeline, table, exchange)
            await pipeline.flush(table, Tier.OBJECT_STORAGE)
            assert _listening(pipeline, table, exchange) == ["iceberg_committed"]
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert _listening(pipeline, table, exchange) == []
        # It was told all that it asked for, though it stopped listening.
        acks = exchange.take(1 << 20)
        told = acks.count(b'"durability_level":"%s"' % durability.encode())
        assert told == 3, acks
        assert exchange.acks.settled
        exchange.close()


async def test_a_write_that_comes_while_a_tier_rises_is_heard_of(autojump_clock: MockClock) -> None:
    """A stream that stopped listening hears of its next write, also when others' writes raise the tier meanwhile."""
    async with SimNode().run() as pipeline:
        table = await create_table(pipeline)
        first, second = await _open(pipeline, "disk"), await _open(pipeline, "disk")
        for number in range(20):
            await first.handle(_batch(number))
            if number % 3:
                await pipeline.flush(table, Tier.DISK)
            await second.handle(_batch(number))
            await trio.lowlevel.checkpoint()
        await pipeline.flush(table, Tier.DISK)
        for exchange in (first, second):
            exchange.take(1 << 20)
            assert exchange.acks.settled
            exchange.close()
