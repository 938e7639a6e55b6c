"""Two copies of a data directory that write to the tables of one catalog: nothing is acknowledged that is not there.

Each copy holds its object store, so that the store does not tell them apart (R10): what a table remembers does (R15,
R29). Of an append-only and a primary-key table.
"""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
import trio
from trio.testing import MockClock

from arka.errors import ArkaError, ErrorCode
from arka.lineage import MAX_STARTS, NO_STARTS, CommitMark
from arka.records import TableDefinition, TableName, TableType, Tier
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write, write_all
from arka.testing.simworld import WAL
from arka.testing.simwriters import SCHEMA
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState
from arka.wal.logstate import LogState

KEYED = TableName("default", "k")
NAMES = (NAME, KEYED)


async def _make(pipeline: Pipeline) -> list[Table]:
    schema = SCHEMA.set(0, SCHEMA.field(0).with_nullable(False))
    keyed = TableDefinition(KEYED, schema, table_type=TableType.PRIMARY_KEY, key_columns=("id",))
    return [await create_table(pipeline), (await pipeline.tables.create(keyed))[0]]


async def _first_life(node: SimNode) -> None:
    async with node.run() as pipeline:
        for table in await _make(pipeline):
            await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)


async def _go_on(node: SimNode, numbers: range) -> None:
    """A life in which both tables take writes to the end."""
    async with node.run() as pipeline:
        for name in NAMES:
            await write_all(pipeline, await pipeline.tables.find(name), numbers, Tier.ICEBERG_COMMITTED)


async def _find_stopped(pipeline: Pipeline, name: TableName) -> Table:
    table = await pipeline.tables.find(name)
    assert table.state is TableState.STOPPED
    assert "copy of this data directory" in table.ending_detail
    with pytest.raises(ArkaError) as refused:
        write(pipeline, table, 999, b"k999")
    assert refused.value.code is ErrorCode.TABLE_STOPPED
    return table


def _check_ids(node: SimNode, numbers: set[int]) -> None:
    for name in NAMES:
        assert sorted(node.ids(name)) == sorted(numbers)


async def test_copy_that_starts_after_the_original_ran_on(autojump_clock: MockClock) -> None:
    """The copy stops both tables and takes no write for them; the original goes on."""
    node = SimNode()
    await _first_life(node)
    copy = node.fork()
    await _go_on(node, range(3, 9))
    async with copy.run() as pipeline:
        for name in NAMES:
            table = await _find_stopped(pipeline, name)
            # Nothing of the other log counts as this one's.
            assert table.committed.lsn < 1 << 24
    await _go_on(node, range(9, 12))
    _check_ids(node, set(range(12)))


@pytest.mark.parametrize("lives", range(1, 5))
async def test_copy_with_more_or_fewer_starts(autojump_clock: MockClock, lives: int) -> None:
    """Whichever epochs the two have taken, the one that comes second is stopped."""
    node = SimNode()
    await _first_life(node)
    copy = node.fork()
    for life in range(2):
        await _go_on(node, range(3 + life, 4 + life))
    for _ in range(lives):
        async with copy.run() as pipeline:
            for name in NAMES:
                await _find_stopped(pipeline, name)
    await _go_on(node, range(5, 6))
    _check_ids(node, set(range(6)))


async def test_both_at_once(autojump_clock: MockClock) -> None:
    """Of each table one copy's writes are acknowledged and there; the other's end with ``outcome_unknown``."""
    node = SimNode()
    await _first_life(node)
    copy = node.fork()
    acked: dict[TableName, set[int]] = {name: {0, 1, 2} for name in NAMES}
    async with node.run() as first, copy.run() as second:
        for number in range(10, 20):
            for base, pipeline in ((0, first), (100, second)):
                for name in NAMES:
                    table = await pipeline.tables.find(name)
                    try:
                        lsn = write(pipeline, table, base + number, b"k%d" % number).lsn
                    except ArkaError:
                        continue
                    with trio.move_on_after(5):
                        await table.committed.wait_reached(lsn)
                        acked[name].add(base + number)
        states = [[(await pipeline.tables.find(name)).state for name in NAMES] for pipeline in (first, second)]
    for name, ours, others in zip(NAMES, *states, strict=True):
        assert {ours, others} == {TableState.ACTIVE, TableState.STOPPED}
        assert acked[name] <= set(node.ids(name))
        assert len(node.ids(name)) == 13


async def test_directory_that_was_put_back(autojump_clock: MockClock) -> None:
    """An older state of the same directory is a copy too."""
    node = SimNode()
    await _first_life(node)
    older = node.fork()
    await _go_on(node, range(3, 6))
    for _ in range(3):
        async with older.run() as pipeline:
            for name in NAMES:
                await _find_stopped(pipeline, name)
    _check_ids(node, {0, 1, 2, 3, 4, 5})


async def test_copy_of_a_running_process(autojump_clock: MockClock) -> None:
    """A snapshot of a disk in use: what it holds of the log is common, and the copy whose epoch is higher goes on."""
    node = SimNode()
    async with node.run() as first:
        tables = await _make(first)
        for table in tables:
            await write_all(first, table, range(3), Tier.ICEBERG_COMMITTED)
        copy = node.fork()
        for table in tables:
            await write_all(first, table, range(3, 6), Tier.ICEBERG_COMMITTED)
        async with copy.run() as second:
            for name in NAMES:
                await write_all(second, await second.tables.find(name), range(6, 9), Tier.ICEBERG_COMMITTED)
            for table in tables:
                write(first, table, 100)
            await trio.sleep(10)
            assert [table.state for table in tables] == [TableState.STOPPED] * 2
    _check_ids(node, set(range(9)))


async def test_mark_above_all_that_was_given(autojump_clock: MockClock) -> None:
    """A mark of an earlier start that holds LSNs which only later ones gave is not this directory's."""
    node = SimNode()
    await _first_life(node)
    mark = (await node.catalog.load_table(NAME)).marks[0]
    node.catalog.set_mark(NAME, replace(mark, committed_lsn=1 << 30))
    async with node.run() as pipeline:
        await _find_stopped(pipeline, NAME)
        table = await pipeline.tables.find(KEYED)
        await write_all(pipeline, table, range(3, 5), Tier.ICEBERG_COMMITTED)


async def test_table_that_only_the_copy_made(autojump_clock: MockClock) -> None:
    """A table of the other copy's, with its mark, is not taken for one of this log's."""
    node = SimNode()
    await _first_life(node)
    copy = node.fork()
    async with copy.run() as pipeline:
        table = await create_table(pipeline, TableName("default", "new"))
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
    async with node.run() as pipeline:
        table = await _find_stopped(pipeline, TableName("default", "new"))
        assert table.committed.lsn == 0
    await _go_on(node, range(3, 5))


async def test_store_unavailable_at_the_start_of_a_copy(autojump_clock: MockClock) -> None:
    """A copy whose store comes later acknowledges nothing of what the other one committed."""
    node = SimNode()
    await _first_life(node)
    copy = node.fork()
    for life in range(3):
        await _go_on(node, range(3 + life, 4 + life))
    copy.store.away = True
    async with copy.run() as pipeline:
        tables = [await pipeline.tables.find(name) for name in NAMES]
        lsns = [write(pipeline, table, 100).lsn for table in tables]
        await trio.sleep(10)
        copy.store.away = False
        await trio.sleep(60)
        for table, lsn in zip(tables, lsns, strict=True):
            assert table.state is TableState.STOPPED
            assert table.committed.lsn < lsn
    _check_ids(node, {0, 1, 2, 3, 4, 5})


async def test_copy_under_another_node_id(autojump_clock: MockClock) -> None:
    """A copy that takes another node's place in the same store with ``--new-store`` is a copy all the same."""
    node = SimNode()
    await _first_life(node)
    copy = node.fork()
    copy.store = node.store
    copy.settings = with_options(server__node_id="m", server__new_store=True)
    await _go_on(node, range(3, 6))
    async with copy.run() as pipeline:
        for name in NAMES:
            await _find_stopped(pipeline, name)
    await _go_on(node, range(6, 8))
    _check_ids(node, set(range(8)))


async def test_restarts_are_no_copies(autojump_clock: MockClock) -> None:
    """Far more starts than a log remembers, with a table that is written to in the first and the last only."""
    node = SimNode()
    await _first_life(node)
    for _ in range(MAX_STARTS + 3):
        async with node.run():
            pass
    await _go_on(node, range(3, 5))
    _check_ids(node, set(range(5)))


async def test_lost_disk_is_no_copy(autojump_clock: MockClock) -> None:
    """A disk that is made from the store knows the starts of the lost one, whichever of them a mark is of."""
    node = SimNode(with_options(server__take_over=True))
    await _first_life(node)
    async with node.run() as pipeline:
        await write_all(pipeline, await pipeline.tables.find(NAME), range(3, 5), Tier.ICEBERG_COMMITTED)
    for number in range(5, 8):
        node.lose_disk()
        async with node.run() as pipeline:
            known = [start.epoch for start in pipeline._state.state.lineage.starts]
            assert known[:2] == [1, 2]
            await write_all(
                pipeline, await pipeline.tables.find(NAME), range(number, number + 1), Tier.ICEBERG_COMMITTED
            )
    async with node.run() as pipeline:
        await write_all(pipeline, await pipeline.tables.find(KEYED), range(3, 8), Tier.ICEBERG_COMMITTED)
    _check_ids(node, set(range(8)))


async def test_mark_of_an_older_version(autojump_clock: MockClock) -> None:
    """A mark without a token is an older version's where no start of its epoch is known."""
    node = SimNode()
    await _first_life(node)
    # As an older version leaves disk and table when it has run last.
    for name in NAMES:
        (mark,) = (await node.catalog.load_table(name)).marks
        node.catalog.set_mark(name, replace(mark, token=0))
    state = await LogState.read(WAL, node.disk)
    assert state is not None
    await replace(state, lineage=NO_STARTS).write(WAL, node.disk)
    await _go_on(node, range(3, 5))
    await _go_on(node, range(5, 7))
    _check_ids(node, set(range(7)))


async def test_mark_whose_token_was_taken_away(autojump_clock: MockClock) -> None:
    """In an epoch that this directory committed under, a mark without its token is not its own."""
    node = SimNode()
    await _first_life(node)
    mark = (await node.catalog.load_table(NAME)).marks[0]
    node.catalog.set_mark(NAME, replace(mark, token=0))
    async with node.run() as pipeline:
        await _find_stopped(pipeline, NAME)


async def test_marks_of_other_logs_are_nothing(autojump_clock: MockClock) -> None:
    """What another log remembers in a table is that log's (R26)."""
    node = SimNode()
    await _first_life(node)
    node.catalog.set_mark(NAME, CommitMark(UUID(int=7), 1 << 40, 99, token=5))
    await _go_on(node, range(3, 5))
    _check_ids(node, set(range(5)))


@pytest.mark.parametrize(("copied", "to"), [(KEYED, NAME), (NAME, KEYED)], ids=["append_only", "primary_key"])
async def test_mark_of_another_table(autojump_clock: MockClock, copied: TableName, to: TableName) -> None:
    """Others copy the mark of one table to another of the same log: no write that waits is taken for committed."""
    node = SimNode()
    await _first_life(node)
    async with node.run() as pipeline:
        table, other = await pipeline.tables.find(to), await pipeline.tables.find(copied)
        before = table.committed.lsn
        write(pipeline, table, 3, b"k3")
        lineage, epoch = pipeline._state.state.lineage, pipeline._state.state.epoch
        token = lineage.token_for(other.info.uuid, epoch, table.last_lsn)
        node.catalog.set_mark(to, CommitMark(pipeline.log_uuid, table.last_lsn, epoch, token))
        await trio.sleep(10)
        assert (table.state, table.committed.lsn) == (TableState.STOPPED, before)
        assert "another table's arka.* properties" in table.ending_detail
        await write_all(pipeline, other, range(3, 5), Tier.ICEBERG_COMMITTED)
    async with node.run() as pipeline:
        await _find_stopped(pipeline, to)


@pytest.mark.parametrize(("copied", "to"), [(KEYED, NAME), (NAME, KEYED)], ids=["append_only", "primary_key"])
async def test_mark_of_another_table_at_a_start(autojump_clock: MockClock, copied: TableName, to: TableName) -> None:
    """So it is where the mark was copied while the server was down; put back, the table goes on."""
    node = SimNode()
    await _first_life(node)
    async with node.run() as pipeline:
        await write_all(pipeline, await pipeline.tables.find(copied), range(3, 5), Tier.ICEBERG_COMMITTED)
    own, others = [(await node.catalog.load_table(name)).marks[0] for name in (to, copied)]
    node.catalog.set_mark(to, others)
    async with node.run() as pipeline:
        await _find_stopped(pipeline, to)
    node.catalog.set_mark(to, own)
    async with node.run() as pipeline:
        await write_all(pipeline, await pipeline.tables.find(to), range(3, 5), Tier.ICEBERG_COMMITTED)
    _check_ids(node, set(range(5)))
