"""A stream hears of a tier while one of its writes waits for it, and of no other (T22)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from arka.records import Tier
from arka.testing.simnode import SimNode, create_table, with_options
from arka.testing.simwriters import SCHEMA
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table
from tests.tiers.test_adoption import Stream


def _listening(pipeline: Pipeline, table: Table, stream: Stream) -> list[str]:
    heard = stream._exchange._on_advance
    return [mark.tier.word for mark in pipeline.marks_of(table) if heard in mark._listeners]


@pytest.mark.parametrize("durability", ["memory", "disk", "object_storage", "iceberg_committed"])
async def test_a_stream_hears_of_a_tier_while_a_write_waits_for_it(durability: str, autojump_clock: MockClock) -> None:
    """Each group commit tells the streams that wait for it: of thousands that wait for Iceberg it tells none."""
    node = SimNode(with_options(iceberg__commit_interval_s=5.0))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        stream = await Stream(pipeline, SCHEMA, requested_durability=durability).open()
        assert _listening(pipeline, table, stream) == []
        for number in range(3):
            await stream.write((number, 0, "x"))
            assert _listening(pipeline, table, stream) == ["disk", "object_storage", "iceberg_committed"]
            await pipeline.flush(table, Tier.DISK)
            assert "disk" not in _listening(pipeline, table, stream)
            await pipeline.flush(table, Tier.OBJECT_STORAGE)
            assert _listening(pipeline, table, stream) == ["iceberg_committed"]
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert _listening(pipeline, table, stream) == []
        # It was told all that it asked for, though it stopped listening.
        acks = stream._exchange.take(1 << 20)
        told = acks.count(b'"durability_level":"%s"' % durability.encode())
        assert told == 3, acks
        assert stream._exchange.acks.settled
        stream.close()


async def test_a_write_that_comes_while_a_tier_rises_is_heard_of(autojump_clock: MockClock) -> None:
    """A stream that stopped listening hears of its next write, also when others' writes raise the tier meanwhile."""
    async with SimNode().run() as pipeline:
        table = await create_table(pipeline)
        first, second = [await Stream(pipeline, SCHEMA, requested_durability="disk").open() for _ in range(2)]
        for number in range(20):
            await first.write((number, 0, "x"))
            if number % 3:
                await pipeline.flush(table, Tier.DISK)
            await second.write((number, 0, "x"))
            await trio.lowlevel.checkpoint()
        await pipeline.flush(table, Tier.DISK)
        for stream in (first, second):
            stream._exchange.take(1 << 20)
            assert stream._exchange.acks.settled
            stream.close()
