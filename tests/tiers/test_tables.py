"""Tables come, go, are renamed and parked; the log alone is enough to know them (R5, R16, R18, R20)."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from arka.errors import ArkaError, ErrorCode, Fenced, Unavailable
from arka.options import KIB
from arka.records import TableDefinition, TableName, Tier
from arka.storage.ports import CommitMark
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write, write_all
from arka.testing.simstore import Fault
from arka.testing.simwriters import SCHEMA
from arka.tiers.table import TableState

OTHER = TableName("default", "other")


async def test_start_while_the_catalog_is_away(autojump_clock: MockClock) -> None:
    """A restart during a catalog outage knows its tables from the log, takes writes, and commits later (R5)."""
    world = SimNode()
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(5))
    world.weather.away = True
    async with world.run() as pipeline:
        assert [table.info.name for table in pipeline.tables.listed()] == [OTHER, NAME]
        for name in (NAME, OTHER):
            await write_all(pipeline, await pipeline.tables.find(name), range(5, 8))
        with pytest.raises(Unavailable):
            await create_table(pipeline, TableName("default", "third"))
        await trio.sleep(100)
        world.weather.away = False
        for name in (NAME, OTHER):
            await pipeline.flush(await pipeline.tables.find(name), Tier.ICEBERG_COMMITTED)
        assert world.ids() == list(range(8))
        assert world.ids(OTHER) == [5, 6, 7]


async def test_start_while_the_warehouse_is_away(autojump_clock: MockClock) -> None:
    """A start whose catalog names a table that nobody can read keeps it, takes its writes, and commits them later (R5).

    Others go on meanwhile; one that is renamed before it can be read is followed; a drop is finished then.
    """
    third = TableName("default", "third")
    world = SimNode()
    async with world.run() as pipeline:
        for name in (NAME, OTHER, third):
            await write_all(pipeline, await create_table(pipeline, name), range(5), Tier.ICEBERG_COMMITTED)
        world.weather.away = True
        with contextlib.suppress(Unavailable):
            await pipeline.tables.drop(third, purge=False)
        world.weather.away = False
        world.catalog.unreadable |= {NAME, third}
    async with world.run() as pipeline:
        await trio.sleep(100)
        table, other = [await pipeline.tables.find(name) for name in (NAME, OTHER)]
        await write_all(pipeline, table, range(5, 8))
        await write_all(pipeline, other, range(5, 60), Tier.ICEBERG_COMMITTED)
        assert table.state is TableState.ACTIVE
        assert world.ids() == list(range(5))
        assert third in world.catalog._tables
        found = world.catalog._tables.pop(NAME)
        found.info = replace(found.info, name=TableName("default", "renamed"))
        world.catalog._tables[found.info.name] = found
        world.catalog.unreadable.clear()
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert world.ids(found.info.name) == list(range(8))
        await trio.sleep(100)
        assert third not in world.catalog._tables
        await write_all(pipeline, await create_table(pipeline, third), range(3), Tier.ICEBERG_COMMITTED)
    assert world.ids(third) == [0, 1, 2]


async def test_start_while_the_store_is_away(autojump_clock: MockClock) -> None:
    """A restart during a store outage gives memory and disk acks, knows its keys, and uploads later (R13)."""
    world = SimNode()
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert [key for key in world.store.objects if "/checkpoint/" in key], "segments were released"
    world.store.away = True
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        before = pipeline.memory.last_lsn
        assert write(pipeline, table, 0, b"k0").lsn < before, "a key whose segment is gone is known"
        await write_all(pipeline, table, range(60, 70), Tier.DISK)
        assert pipeline.table_marks(table)[Tier.OBJECT_STORAGE] == 0
        await trio.sleep(100)
        world.store.away = False
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    assert world.ids() == list(range(70))


async def test_start_alone_needs_its_keys(autojump_clock: MockClock) -> None:
    """A disk that lacks the checkpoints of what was released does not start alone: it would double resends (R21)."""
    world = SimNode()
    async with world.run() as pipeline:
        await write_all(pipeline, await create_table(pipeline), range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
    world.disk.checkpoints.objects.clear()
    world.store.away = True
    with trio.move_on_after(1000) as scope:
        await world.open()
    assert scope.cancelled_caught
    world.disk.kill()
    world.store.away = False
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert write(pipeline, table, 0, b"k0").lsn < pipeline.memory.last_lsn


async def test_renamed_table_is_followed(autojump_clock: MockClock) -> None:
    """A table that others rename while it is written to goes on under its new name (R5)."""
    world = SimNode()
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(5), Tier.ICEBERG_COMMITTED)
        found = world.catalog._tables.pop(NAME)
        found.info = replace(found.info, name=OTHER)
        world.catalog._tables[OTHER] = found
        await write_all(pipeline, table, range(5, 10), Tier.ICEBERG_COMMITTED)
        assert world.ids(OTHER) == list(range(10))
        assert await pipeline.tables.find(OTHER) is table
        with pytest.raises(ArkaError, match="not found"):
            await pipeline.tables.find(NAME)


async def test_gone_table_is_parked_and_frees_the_log(autojump_clock: MockClock) -> None:
    """A table that others dropped keeps its writes in the store, and not the log that all tables share (R18)."""
    world = SimNode()
    async with world.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        world.catalog.remove(NAME)
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(10)
        assert table.state is TableState.STOPPED
        with pytest.raises(ArkaError, match="others dropped it") as refused:
            write(pipeline, table, 99)
        assert refused.value.code is ErrorCode.TABLE_STOPPED
        with pytest.raises(ArkaError) as unknown:
            write(pipeline, table, 5, b"k5")
        assert unknown.value.code is ErrorCode.OUTCOME_UNKNOWN
        assert world.keys_of("parked")
        await write_all(pipeline, other, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        lsns = [int(key.rpartition("/")[2][:16]) for key in world.store.objects if "/wal/" in key]
        assert min(lsns) > table.last_lsn, "the log was let go of"


@pytest.mark.parametrize("crash_after_s", [None, 0.0, 0.05, 0.5, 3.0])
async def test_parked_frames_come_back(crash_after_s: float | None, autojump_clock: MockClock) -> None:
    """Once the table is in the catalog again its parked writes are committed, in LSN order, before new ones (R18)."""
    world = SimNode()
    async with world.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        gone = world.catalog._tables.pop(NAME)
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(5)
        await write_all(pipeline, other, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert table.state is TableState.STOPPED
    async with world.run() as pipeline:
        assert (await pipeline.tables.find(NAME)).state is TableState.STOPPED
        await trio.sleep(5)
    world.catalog._tables[NAME] = gone
    if crash_after_s is not None:
        async with world.run() as pipeline:
            await trio.sleep(crash_after_s)
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert table.state is TableState.ACTIVE
        assert write(pipeline, table, 5, b"k5").lsn < pipeline.memory.last_lsn, "keys of parked writes are kept"
        await write_all(pipeline, table, range(40, 45), Tier.ICEBERG_COMMITTED)
        await trio.sleep(5)
    assert world.ids() == list(range(45))
    assert world.keys_of("parked") == []


async def test_parking_interrupted_at_every_request(autojump_clock: MockClock) -> None:
    """Wherever parking is cut short, nothing is lost or doubled: what is not in the store yet is in the log (R18)."""
    for step in range(12):
        world = SimNode()
        async with world.run() as pipeline:
            table = await create_table(pipeline)
            await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
            gone = world.catalog._tables.pop(NAME)
            world.store.plan("put_new", *[Fault()] * step, *[Fault(gate=trio.Event())] * 100, key="/parked/")
            await write_all(pipeline, table, range(3, 60))
            await trio.sleep(60)
            assert len(world.keys_of("parked")) <= step
        world.store.calm()
        world.catalog._tables[NAME] = gone
        async with world.run() as pipeline:
            table = await pipeline.tables.find(NAME)
            await write_all(pipeline, table, range(60, 62), Tier.ICEBERG_COMMITTED)
            await trio.sleep(5)
        assert world.ids() == list(range(62)), step
        assert world.keys_of("parked") == []


async def test_rolled_back_table_stays_parked(autojump_clock: MockClock) -> None:
    """A table that stands below what was committed gets nothing replayed, also after a restart (R20)."""
    world = SimNode()
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(5), Tier.ICEBERG_COMMITTED)
        mark = next(iter(world.catalog._tables[NAME].marks.values()))
        await write_all(pipeline, table, range(5, 8), Tier.ICEBERG_COMMITTED)
        world.catalog.set_mark(NAME, mark)
        await write_all(pipeline, table, range(8, 12))
        await trio.sleep(10)
        assert table.state is TableState.STOPPED
        assert str(mark.committed_lsn) in table.ending_detail
    before = world.ids()
    async with world.run() as pipeline:
        await trio.sleep(30)
        table = await pipeline.tables.find(NAME)
        assert table.state is TableState.STOPPED
        assert "nothing is replayed" in table.ending_detail.lower()
        await trio.sleep(30)
    assert world.ids() == before


async def test_drop_of_a_parked_table(autojump_clock: MockClock) -> None:
    """DropTable gives parked writes up, frees the name, and leaves nothing in the store."""
    world = SimNode()
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        world.catalog.remove(NAME)
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(10)
        with pytest.raises(ArkaError, match="DropTable"):
            await create_table(pipeline)
        await pipeline.tables.drop(NAME, purge=False)
        await trio.sleep(1)
        assert world.keys_of("parked") == []
        await write_all(pipeline, await create_table(pipeline), range(2), Tier.ICEBERG_COMMITTED)
    assert world.ids() == [0, 1]


async def test_name_given_to_another_table(autojump_clock: MockClock) -> None:
    """A name whose table was dropped by others means what the catalog says it means (R5)."""
    world = SimNode()
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        world.catalog.remove(NAME)
        await write_all(pipeline, table, range(3, 6))
        await trio.sleep(10)
        await world.catalog.create_table(TableDefinition(NAME, SCHEMA), "0badcafe")
        other = await pipeline.tables.find(NAME)
        assert other.info.uuid != table.info.uuid
        await write_all(pipeline, other, range(10, 12), Tier.ICEBERG_COMMITTED)
    assert world.ids() == [10, 11]


async def test_drop_waits_in_the_log_for_the_catalog(autojump_clock: MockClock) -> None:
    """A drop that the catalog has not done holds the log, and is done by whichever start finds the catalog (R5)."""
    world = SimNode()
    async with world.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        world.weather.away = True
        with contextlib.suppress(Unavailable):
            await pipeline.tables.drop(NAME, purge=False)
        world.weather.away = False
    world.weather.away = True
    async with world.run() as pipeline:
        await trio.sleep(100)
        with pytest.raises(Unavailable):
            await pipeline.tables.find(NAME)
        other = await pipeline.tables.find(OTHER)
        await write_all(pipeline, other, range(60))
        world.weather.away = False
        await pipeline.flush(other, Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert NAME not in world.catalog._tables
        with pytest.raises(ArkaError, match="not found"):
            await pipeline.tables.find(NAME)
        # Registered again behind our back and restarted: the finished drop is not done again.
        await write_all(pipeline, await create_table(pipeline), range(7, 9), Tier.ICEBERG_COMMITTED)
    async with world.run() as pipeline:
        await trio.sleep(10)
    assert world.ids() == [7, 8]


async def test_parked_bytes_count(autojump_clock: MockClock) -> None:
    """Parked bytes count against limits.disk_bytes (R18, R23)."""
    world = SimNode(with_options(limits__disk_bytes=64 * KIB))
    async with world.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        world.catalog.remove(NAME)
        await write_all(pipeline, table, range(50))
        await trio.sleep(60)
        assert table.state is TableState.STOPPED
        number = 0
        with contextlib.suppress(ArkaError):
            while number < 100:
                write(pipeline, other, number)
                await pipeline.flush(other, Tier.ICEBERG_COMMITTED)
                await trio.sleep(5)
                number += 1
        assert number < 100
        with pytest.raises(ArkaError) as refused:
            write(pipeline, other, number)
        assert refused.value.code is ErrorCode.OVERLOADED


async def test_higher_epoch_in_the_table(autojump_clock: MockClock) -> None:
    """A table to which a newer epoch has committed ends the process, and its streams are told (R15)."""
    world = SimNode()
    told: list[ErrorCode] = []
    try:
        async with world.run() as pipeline:
            table = await create_table(pipeline)
            pipeline.listen_failure(lambda code, detail: told.append(code))
            world.catalog.set_mark(NAME, CommitMark(pipeline.log_uuid, 0, 99))
            await write_all(pipeline, table, range(1))
            await trio.sleep(100)
            pytest.fail("it goes on")
    except* Fenced:
        pass
    assert told == [ErrorCode.UNAVAILABLE]
