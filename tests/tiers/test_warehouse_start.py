"""A start finds a commit of which no reader can see the rows (R28)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from arka.records import Tier
from arka.testing.simnode import NAME, SimNode, create_table, write
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState


async def _committed(pipeline: Pipeline, table: Table, seconds: float) -> bool:
    with trio.move_on_after(seconds):
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        return True
    return False


@pytest.mark.parametrize("local", [True, False])
async def test_commit_of_a_process_that_died_before_it_looked(local: bool, autojump_clock: MockClock) -> None:
    """What the catalog says at a start is acknowledged once the table's files were seen, and not before."""
    world = SimNode()
    warehouse = world.weather.warehouse
    warehouse.local = local
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        await pipeline.flush(table, Tier.DISK)
        write(pipeline, table, 1)
        warehouse.lose_file(table.info.uuid)
        with trio.fail_after(100):
            while table.state is TableState.ACTIVE and not world.ids():
                await trio.sleep(0.001)
    assert world.ids() == [1]
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert not await _committed(pipeline, table, 30)
        assert table.committed.lsn < table.last_lsn
        warehouse.gone.clear()
        assert await _committed(pipeline, table, 30)
        write(pipeline, table, 2)
        assert await _committed(pipeline, table, 30)
    assert world.ids() == [1, 2]


async def test_emptied_warehouse_without_a_restart(autojump_clock: MockClock) -> None:
    """While the warehouse is an empty one nothing is acknowledged; back again, each row is there once."""
    world = SimNode()
    warehouse = world.weather.warehouse
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        write(pipeline, table, 1)
        assert await _committed(pipeline, table, 30)
        warehouse.exchange(None)
        write(pipeline, table, 2)
        assert not await _committed(pipeline, table, 30)
        assert pipeline.stalled(table)
        warehouse.bring_back()
        assert await _committed(pipeline, table, 30)
    assert world.ids() == [1, 2]


async def test_catalog_that_is_an_older_copy(autojump_clock: MockClock) -> None:
    """A table that the catalog rolls back is stopped: no later write of it is called committed (R20)."""
    world = SimNode()
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        write(pipeline, table, 1)
        assert await _committed(pipeline, table, 30)
        found = world.catalog._tables[NAME]
        older = (dict(found.marks), list(found.snapshots), list(found.changes))
        write(pipeline, table, 2)
        assert await _committed(pipeline, table, 30)
        found.marks, found.snapshots, found.changes = older
        before = table.committed.lsn
        write(pipeline, table, 3)
        with trio.fail_after(100):
            while table.state is TableState.ACTIVE:
                await trio.sleep(0.1)
        assert table.state is TableState.STOPPED
        assert table.committed.lsn == before
    assert world.ids() == [1]


async def test_table_renamed_while_a_start_cannot_read_the_warehouse(autojump_clock: MockClock) -> None:
    """It is not taken for dropped: some name that nobody can read now may be its own (R18, R28)."""
    world = SimNode()
    warehouse = world.weather.warehouse
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        write(pipeline, table, 1)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    warehouse.exchange(None)
    world.weather.rename(NAME)
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        write(pipeline, table, 2)
        assert not await _committed(pipeline, table, 30)
        assert table.state is TableState.ACTIVE
        warehouse.bring_back()
        assert await _committed(pipeline, table, 60)
        assert world.ids(table.info.name) == [1, 2]
