"""While no higher ceiling of LSNs can be reserved nothing new begins, and what is under way ends (R31)."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from arka._core.lsn import LsnExhausted
from arka.errors import Unavailable
from arka.records import TableName, Tier
from arka.testing.simnode import NAME, SimNode, create_table, drop_under_way, write
from arka.testing.simwriters import definition_of
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState

OTHER = TableName("default", "other")


@pytest.fixture(autouse=True)
def _few_lsns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reserves 512 LSNs, and nobody reserves more."""
    monkeypatch.setattr("arka.tiers.startup.DISK_BLOCK", 512)


def ease(pipeline: Pipeline) -> None:
    """Give LSNs again."""
    pipeline.memory._allocator.raise_ceiling(10_000)


def exhaust(pipeline: Pipeline, table: Table) -> list[int]:
    """Write until no LSN can be given; returns the numbers that were taken."""
    taken: list[int] = []
    with suppress(LsnExhausted):
        while len(taken) < 600:
            write(pipeline, table, len(taken), filler=1)
            taken.append(len(taken))
    assert len(taken) < 600
    return taken


async def test_nothing_new_begins(autojump_clock: MockClock) -> None:
    """Creates and drops are refused like writes, nothing of them happens, and all goes on afterwards."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        numbers = exhaust(pipeline, table)
        with pytest.raises(Unavailable, match="LSNs"):
            await pipeline.tables.drop(NAME, purge=False)
        with pytest.raises(Unavailable, match="LSNs"):
            await pipeline.tables.create(definition_of(OTHER, keyed=False))
        await trio.sleep(30)
        assert table.state is TableState.ACTIVE
        ease(pipeline)
        await create_table(pipeline, OTHER)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert node.ids() == numbers
        await pipeline.tables.drop(NAME, purge=False)
        assert table.state is TableState.DROPPED


async def test_what_is_under_way_ends(autojump_clock: MockClock) -> None:
    """A drop that has begun records what came of it, although no write is taken."""
    node = SimNode()
    async with node.run() as pipeline:
        table, kept = await create_table(pipeline), await create_table(pipeline, TableName("default", "kept"))
        async with drop_under_way(pipeline):
            numbers = exhaust(pipeline, kept)
        assert table.state is TableState.DROPPED
        ease(pipeline)
        await pipeline.flush(kept, Tier.ICEBERG_COMMITTED)
        assert node.ids(kept.info.name) == numbers
    async with node.run() as pipeline:
        assert [table.info.name for table in pipeline.tables.all()] == [kept.info.name]


async def test_writers_of_quiet_tables_take_nothing_of_what_is_left(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of their writes would record first that its table is not quiet: a drop that has begun ends all the same."""
    monkeypatch.setattr("arka.tiers.startup.DISK_BLOCK", 1024)
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        others = [await create_table(pipeline, TableName("default", f"o{number}")) for number in range(140)]
        await trio.sleep(10)
        assert all(other.quiet for other in others)
        async with drop_under_way(pipeline):
            with suppress(LsnExhausted):
                while True:
                    write(pipeline, others[0], 1, filler=1)
            for other in others:
                with pytest.raises(LsnExhausted):
                    write(pipeline, other, 0, filler=1)
        assert table.state is TableState.DROPPED
