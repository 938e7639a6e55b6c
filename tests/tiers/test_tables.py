"""Tables come, go, are renamed and parked; the log alone is enough to know them (R5, R16, R18, R20)."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from uuid import UUID

import pytest
import trio
from trio.testing import MockClock

from arka.errors import ArkaError, ErrorCode, Fenced, InternalError, Unavailable
from arka.options import KIB
from arka.records import TableDefinition, TableName, Tier
from arka.storage.ports import CatalogUnavailable, CommitMark
from arka.testing.simcatalog import SimCatalog
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write, write_all
from arka.testing.simstore import Fault, Outcome
from arka.testing.simworld import ProcessCatalog
from arka.testing.simwriters import SCHEMA
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState

OTHER = TableName("default", "other")


async def begin_drop(node: SimNode, pipeline: Pipeline, table: Table) -> None:
    """Ask for a drop; return when its record is on disk and the catalog, which is away then, has not done it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(pipeline.tables.drop, table.info.name, purge=False))
        while table.drop_lsn is None:
            await trio.lowlevel.checkpoint()
        await pipeline.marks_of(table)[0].wait_reached(table.drop_lsn)
        node.weather.away = True
        nursery.cancel_scope.cancel()
    assert table.info.name in node.catalog._tables


async def test_start_while_the_catalog_is_away(autojump_clock: MockClock) -> None:
    """A restart during a catalog outage knows its tables from the log, takes writes, and commits later (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(5))
    node.weather.away = True
    async with node.run() as pipeline:
        assert [table.info.name for table in pipeline.tables.listed()] == [OTHER, NAME]
        for name in (NAME, OTHER):
            await write_all(pipeline, await pipeline.tables.find(name), range(5, 8))
        with pytest.raises(Unavailable):
            await create_table(pipeline, TableName("default", "third"))
        await trio.sleep(100)
        node.weather.away = False
        for name in (NAME, OTHER):
            await pipeline.flush(await pipeline.tables.find(name), Tier.ICEBERG_COMMITTED)
        assert node.ids() == list(range(8))
        assert node.ids(OTHER) == [5, 6, 7]


async def test_start_while_the_warehouse_is_away(autojump_clock: MockClock) -> None:
    """A start whose catalog names a table that nobody can read keeps it, takes its writes, and commits them later (R5).

    Others go on meanwhile; one that is renamed before it can be read is followed; a drop is finished then.
    """
    third = TableName("default", "third")
    node = SimNode()
    async with node.run() as pipeline:
        for name in (NAME, OTHER, third):
            await write_all(pipeline, await create_table(pipeline, name), range(5), Tier.ICEBERG_COMMITTED)
        await begin_drop(node, pipeline, await pipeline.tables.find(third))
        node.weather.away = False
        node.catalog.unreadable |= {NAME, third}
    async with node.run() as pipeline:
        await trio.sleep(100)
        table, other = [await pipeline.tables.find(name) for name in (NAME, OTHER)]
        await write_all(pipeline, table, range(5, 8))
        await write_all(pipeline, other, range(5, 60), Tier.ICEBERG_COMMITTED)
        assert table.state is TableState.ACTIVE
        assert node.ids() == list(range(5))
        assert third in node.catalog._tables
        found = node.catalog._tables.pop(NAME)
        found.info = replace(found.info, name=TableName("default", "renamed"))
        node.catalog._tables[found.info.name] = found
        node.catalog.unreadable.clear()
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert node.ids(found.info.name) == list(range(8))
        await trio.sleep(100)
        assert third not in node.catalog._tables
        await write_all(pipeline, await create_table(pipeline, third), range(3), Tier.ICEBERG_COMMITTED)
    assert node.ids(third) == [0, 1, 2]


@pytest.mark.parametrize("restarted", [False, True])
async def test_table_that_others_made_unusable(autojump_clock: MockClock, restarted: bool) -> None:
    """A table that Arka cannot write any more says why and keeps its writes; mended, it goes on; it can be dropped."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(5), Tier.ICEBERG_COMMITTED)
        if not restarted:
            node.catalog.unusable[NAME] = "it has format version 3"
            await write_all(pipeline, table, range(5, 8))
            await trio.sleep(1000)
            assert "format version 3" in table.ending_detail
            with pytest.raises(ArkaError, match="format version 3"):
                await create_table(pipeline)
            with pytest.raises(ArkaError) as caught:
                await pipeline.tables.find(TableName("default", "nobody"))
            assert caught.value.code is ErrorCode.TABLE_NOT_FOUND
        else:
            await write_all(pipeline, table, range(5, 8), Tier.ICEBERG_COMMITTED)
    node.catalog.unusable[NAME] = "it has format version 3"
    async with node.run() as pipeline:
        await trio.sleep(100)
        table = await pipeline.tables.find(NAME)
        assert table.state is TableState.STOPPED
        assert "format version 3" in table.ending_detail
    node.catalog.unusable.clear()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await write_all(pipeline, table, range(8, 10), Tier.ICEBERG_COMMITTED)
        assert node.ids() == list(range(10))
        node.catalog.unusable[NAME] = "a column has a type beyond Arka"
        await pipeline.tables.drop(NAME, purge=False)
        assert NAME not in node.catalog._tables


@pytest.mark.parametrize("unread_first", [False, True])
async def test_drop_of_a_table_that_others_made_unusable_is_finished(
    autojump_clock: MockClock, unread_first: bool
) -> None:
    """A drop in the log is done by the next start also where others made of the table what Arka cannot write (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(5), Tier.ICEBERG_COMMITTED)
        await begin_drop(node, pipeline, table)
    node.weather.away = False
    node.catalog.unusable[NAME] = "it has format version 3"
    if unread_first:
        node.catalog.unreadable.add(NAME)
    async with node.run() as pipeline:
        await trio.sleep(100)
        if unread_first:
            assert NAME in node.catalog._tables
            node.catalog.unreadable.clear()
            await trio.sleep(100)
        assert NAME not in node.catalog._tables
        node.catalog.unusable.clear()
        await write_all(pipeline, await create_table(pipeline), range(3), Tier.ICEBERG_COMMITTED)
    assert node.ids() == [0, 1, 2]


@pytest.mark.parametrize("became", ["unusable", "unreadable"])
async def test_drop_of_a_table_that_others_renamed_is_finished(autojump_clock: MockClock, became: str) -> None:
    """A table whose drop is in the log does not come back under another name (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(5), Tier.ICEBERG_COMMITTED)
        await begin_drop(node, pipeline, table)
    node.weather.away = False
    found = node.catalog._tables.pop(NAME)
    found.info = replace(found.info, name=OTHER)
    node.catalog._tables[OTHER] = found
    if became == "unusable":
        node.catalog.unusable[OTHER] = "it has format version 3"
    else:
        node.catalog.unreadable.add(OTHER)
    async with node.run() as pipeline:
        await trio.sleep(100)
    node.catalog.unusable.clear()
    node.catalog.unreadable.clear()
    async with node.run() as pipeline:
        await trio.sleep(100)
        assert pipeline.tables.listed() == []
        assert OTHER not in node.catalog._tables


@pytest.mark.parametrize("became", ["renamed", "unusable", "renamed again", "unreadable", "gone"])
async def test_drop_of_a_table_that_others_rename_meanwhile(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, became: str
) -> None:
    """A table that gets another name between the look at it and the catalog's drop is dropped under that name (R5)."""
    node = SimNode()
    forward, names = SimCatalog._drop, iter((OTHER, TableName("default", "third")))

    def rename_before(self: SimCatalog, name: TableName, uuid: UUID) -> None:
        if name == NAME or became == "renamed again":
            found = self._tables.pop(name, None)
            new = next(names, None)
            if found is not None and new is not None and became != "gone":
                found.info = replace(found.info, name=new)
                self._tables[new] = found
                if became == "unusable":
                    self.unusable[new] = "it has format version 3"
                elif became == "unreadable":
                    self.unreadable.add(new)
            elif found is not None and became != "gone":
                self._tables[name] = found
        forward(self, name, uuid)

    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(5), Tier.ICEBERG_COMMITTED)
        monkeypatch.setattr(SimCatalog, "_drop", rename_before)
        if became in ("unreadable", "renamed again"):
            with pytest.raises(Unavailable, match="may still be there"):
                await pipeline.tables.drop(NAME, purge=False)
            assert table.state is TableState.ACTIVE
            node.catalog.unreadable.clear()
        await pipeline.tables.drop(NAME, purge=False)
        assert table.state is TableState.DROPPED
        assert node.catalog._tables == {}


@pytest.mark.parametrize("what", ["drop_table", "forget_others"])
@pytest.mark.parametrize("error", [InternalError("TypeError: a bug"), CatalogUnavailable("ForbiddenError: 403")])
@pytest.mark.parametrize("state", ["usable", "unusable", "unreadable"])
async def test_one_table_of_which_nothing_can_be_made(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception, state: str
) -> None:
    """A drop that the catalog never does, or leftovers that cannot be removed, keep no other table waiting."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, await create_table(pipeline, OTHER), range(5), Tier.ICEBERG_COMMITTED)
        await begin_drop(node, pipeline, table)
    node.weather.away = False
    if state == "unusable":
        node.catalog.unusable[NAME] = "it has format version 3"
    elif state == "unreadable":
        node.catalog.unreadable.add(NAME)

    async def fail(*_: object, **__: object) -> None:
        await trio.sleep(0.1)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(ProcessCatalog, what, fail)
        async with node.run() as pipeline:
            other = await pipeline.tables.find(OTHER)
            with trio.fail_after(100):
                await write_all(pipeline, other, range(5, 8), Tier.ICEBERG_COMMITTED)
            if what == "drop_table":
                with pytest.raises(ArkaError, match=r"dropped|format version|cannot be"):
                    await create_table(pipeline)
    node.catalog.unreadable.clear()
    async with node.run():
        await trio.sleep(100)
        assert NAME not in node.catalog._tables


async def test_leftovers_of_tables_that_others_dropped(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disk keeps of a table goes once a start does not find it; of the others it stays."""
    node = SimNode()
    async with node.run() as pipeline:
        gone = await create_table(pipeline)
        other = await create_table(pipeline, OTHER)
        await write_all(pipeline, gone, range(5), Tier.ICEBERG_COMMITTED)
    node.catalog.remove(NAME)
    kept: list[frozenset[UUID]] = []

    async def forget(_: object, tables: frozenset[UUID]) -> None:
        await trio.sleep(0.1)
        kept.append(tables)

    monkeypatch.setattr(ProcessCatalog, "forget_others", forget)
    async with node.run():
        await trio.sleep(100)
    assert kept == [frozenset([other.info.uuid])]


async def test_unusable_table_that_arka_never_knew(autojump_clock: MockClock) -> None:
    """A request for a table of others that Arka cannot write is told so."""
    node = SimNode()
    async with node.run() as pipeline:
        await create_table(pipeline)
        node.catalog._tables[OTHER] = node.catalog._tables.pop(NAME)
        node.catalog.unusable[OTHER] = "a column has a type beyond Arka"
        with pytest.raises(ArkaError, match="beyond Arka") as caught:
            await pipeline.tables.find(OTHER)
        assert caught.value.code is ErrorCode.TABLE_STOPPED


async def test_start_while_the_store_is_away(autojump_clock: MockClock) -> None:
    """A restart during a store outage gives memory and disk acks, knows its keys, and uploads later (R13)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert [key for key in node.store.objects if "/checkpoint/" in key], "segments were released"
    node.store.away = True
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        before = pipeline.memory.last_lsn
        assert write(pipeline, table, 0, b"k0").lsn < before, "a key whose segment is gone is known"
        await write_all(pipeline, table, range(60, 70), Tier.DISK)
        assert pipeline.table_marks(table)[Tier.OBJECT_STORAGE] == 0
        await trio.sleep(100)
        node.store.away = False
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    assert node.ids() == list(range(70))


async def test_start_alone_needs_its_keys(autojump_clock: MockClock) -> None:
    """A disk that lacks the checkpoints of what was released does not start alone: it would double resends (R21)."""
    node = SimNode()
    async with node.run() as pipeline:
        await write_all(pipeline, await create_table(pipeline), range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
    node.disk.checkpoints.objects.clear()
    node.store.away = True
    with trio.move_on_after(1000) as scope:
        await node.open()
    assert scope.cancelled_caught
    node.disk.kill()
    node.store.away = False
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert write(pipeline, table, 0, b"k0").lsn < pipeline.memory.last_lsn


async def test_renamed_table_is_followed(autojump_clock: MockClock) -> None:
    """A table that others rename while it is written to goes on under its new name (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(5), Tier.ICEBERG_COMMITTED)
        found = node.catalog._tables.pop(NAME)
        found.info = replace(found.info, name=OTHER)
        node.catalog._tables[OTHER] = found
        await write_all(pipeline, table, range(5, 10), Tier.ICEBERG_COMMITTED)
        assert node.ids(OTHER) == list(range(10))
        assert await pipeline.tables.find(OTHER) is table
        with pytest.raises(ArkaError, match="not found"):
            await pipeline.tables.find(NAME)


async def test_gone_table_is_parked_and_frees_the_log(autojump_clock: MockClock) -> None:
    """A table that others dropped keeps its writes in the store, and not the log that all tables share (R18)."""
    node = SimNode()
    async with node.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.remove(NAME)
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(10)
        assert table.state is TableState.STOPPED
        with pytest.raises(ArkaError, match="others dropped it") as refused:
            write(pipeline, table, 99)
        assert refused.value.code is ErrorCode.TABLE_STOPPED
        with pytest.raises(ArkaError) as unknown:
            write(pipeline, table, 5, b"k5")
        assert unknown.value.code is ErrorCode.OUTCOME_UNKNOWN
        assert node.keys_of("parked")
        assert pipeline.tables.parked_bytes(table) > 0
        await write_all(pipeline, other, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        lsns = [int(key.rpartition("/")[2][:16]) for key in node.store.objects if "/wal/" in key]
        assert min(lsns) > table.last_lsn, "the log was let go of"


@pytest.mark.parametrize("crash_after_s", [None, 0.0, 0.05, 0.5, 3.0])
async def test_parked_frames_come_back(crash_after_s: float | None, autojump_clock: MockClock) -> None:
    """Once the table is in the catalog again its parked writes are committed, in LSN order, before new ones (R18)."""
    node = SimNode()
    async with node.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        gone = node.catalog._tables.pop(NAME)
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(5)
        await write_all(pipeline, other, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert table.state is TableState.STOPPED
    async with node.run() as pipeline:
        assert (await pipeline.tables.find(NAME)).state is TableState.STOPPED
        await trio.sleep(5)
    node.catalog._tables[NAME] = gone
    if crash_after_s is not None:
        async with node.run() as pipeline:
            await trio.sleep(crash_after_s)
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert table.state is TableState.ACTIVE
        assert write(pipeline, table, 5, b"k5").lsn < pipeline.memory.last_lsn, "keys of parked writes are kept"
        await write_all(pipeline, table, range(40, 45), Tier.ICEBERG_COMMITTED)
        await trio.sleep(5)
    assert node.ids() == list(range(45))
    assert node.keys_of("parked") == []


async def test_parking_interrupted_at_every_request(autojump_clock: MockClock) -> None:
    """Wherever parking is cut short, nothing is lost or doubled: what is not in the store yet is in the log (R18)."""
    for step in range(12):
        node = SimNode()
        async with node.run() as pipeline:
            table = await create_table(pipeline)
            await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
            gone = node.catalog._tables.pop(NAME)
            node.store.plan("put_new", *[Fault()] * step, *[Fault(gate=trio.Event())] * 100, key="/parked/")
            await write_all(pipeline, table, range(3, 60))
            await trio.sleep(60)
            assert len(node.keys_of("parked")) <= step
        node.store.calm()
        node.catalog._tables[NAME] = gone
        async with node.run() as pipeline:
            table = await pipeline.tables.find(NAME)
            await write_all(pipeline, table, range(60, 62), Tier.ICEBERG_COMMITTED)
            await trio.sleep(5)
        assert node.ids() == list(range(62)), step
        assert node.keys_of("parked") == []


async def test_rolled_back_table_stays_parked(autojump_clock: MockClock) -> None:
    """A table that stands below what was committed gets nothing replayed, also after a restart (R20)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(5), Tier.ICEBERG_COMMITTED)
        mark = next(iter(node.catalog._tables[NAME].marks.values()))
        await write_all(pipeline, table, range(5, 8), Tier.ICEBERG_COMMITTED)
        node.catalog.set_mark(NAME, mark)
        await write_all(pipeline, table, range(8, 12))
        await trio.sleep(10)
        assert table.state is TableState.STOPPED
        assert str(mark.committed_lsn) in table.ending_detail
    before = node.ids()
    async with node.run() as pipeline:
        await trio.sleep(30)
        table = await pipeline.tables.find(NAME)
        assert table.state is TableState.STOPPED
        assert "nothing is replayed" in table.ending_detail.lower()
        await trio.sleep(30)
    assert node.ids() == before


async def test_drop_of_a_parked_table(autojump_clock: MockClock) -> None:
    """DropTable gives parked writes up, frees the name, and leaves nothing in the store."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.remove(NAME)
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(10)
        with pytest.raises(ArkaError, match="DropTable"):
            await create_table(pipeline)
        await pipeline.tables.drop(NAME, purge=False)
        await trio.sleep(1)
        assert node.keys_of("parked") == []
        await write_all(pipeline, await create_table(pipeline), range(2), Tier.ICEBERG_COMMITTED)
    assert node.ids() == [0, 1]


async def test_name_given_to_another_table(autojump_clock: MockClock) -> None:
    """A name whose table was dropped by others means what the catalog says it means (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.remove(NAME)
        await write_all(pipeline, table, range(3, 6))
        await trio.sleep(10)
        await node.catalog.create_table(TableDefinition(NAME, SCHEMA), "0badcafe")
        other = await pipeline.tables.find(NAME)
        assert other.info.uuid != table.info.uuid
        await write_all(pipeline, other, range(10, 12), Tier.ICEBERG_COMMITTED)
    assert node.ids() == [10, 11]


async def test_drop_waits_in_the_log_for_the_catalog(autojump_clock: MockClock) -> None:
    """A drop that the catalog has not done holds the log, and is done by whichever start finds the catalog (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        await begin_drop(node, pipeline, table)
    assert NAME in node.catalog._tables
    node.weather.away = True
    async with node.run() as pipeline:
        await trio.sleep(100)
        with pytest.raises(Unavailable):
            await pipeline.tables.find(NAME)
        other = await pipeline.tables.find(OTHER)
        await write_all(pipeline, other, range(60))
        node.weather.away = False
        await pipeline.flush(other, Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert NAME not in node.catalog._tables
        with pytest.raises(ArkaError, match="not found"):
            await pipeline.tables.find(NAME)
        # Registered again behind our back and restarted: the finished drop is not done again.
        await write_all(pipeline, await create_table(pipeline), range(7, 9), Tier.ICEBERG_COMMITTED)
    async with node.run() as pipeline:
        await trio.sleep(10)
    assert node.ids() == [7, 8]


async def test_parked_bytes_count(autojump_clock: MockClock) -> None:
    """Parked bytes count against limits.disk_bytes (R18, R23)."""
    node = SimNode(with_options(limits__disk_bytes=64 * KIB))
    async with node.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        node.catalog.remove(NAME)
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
    node = SimNode()
    told: list[ErrorCode] = []
    try:
        async with node.run() as pipeline:
            table = await create_table(pipeline)
            pipeline.listen_failure(lambda code, detail: told.append(code))
            # The first of these alone would be another copy's (R29).
            node.catalog.set_mark(NAME, CommitMark(pipeline.log_uuid, 0, 99))
            node.store.objects["n/epoch/0000000099"] = b""
            await write_all(pipeline, table, range(1))
            await trio.sleep(100)
            pytest.fail("it goes on")
    except* Fenced:
        pass
    assert told == [ErrorCode.UNAVAILABLE]


async def test_checkpoint_that_only_the_disk_has(autojump_clock: MockClock) -> None:
    """A checkpoint that never reached the store covers nothing: its segments are not let go of by its word (R12)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        node.store.plan("put_new", *[Fault(Outcome.REFUSED)] * 1000, key="/checkpoint/")
        await write_all(pipeline, table, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert node.keys_of("checkpoint") == []
    node.store.calm()
    node.store.away = True
    async with node.run() as pipeline:
        await trio.sleep(60)
        node.store.away = False
        await write_all(pipeline, await pipeline.tables.find(NAME), range(60, 120), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert node.keys_of("checkpoint")
    node.lose_disk()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        for number in range(120):
            assert write(pipeline, table, number, b"k%d" % number).duplicate
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    assert node.ids() == list(range(120))
