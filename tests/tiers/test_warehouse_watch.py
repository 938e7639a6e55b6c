"""The last tier's look at where it writes, on a virtual clock (R28)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast
from uuid import UUID, uuid4

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.records import TableInfo, TableName, TableType
from arka.storage.ports import CatalogListing, CatalogTable, CatalogUnavailable, FilesMissing, WarehouseChanged
from arka.testing.simwriters import definition_of
from arka.tiers.creates import PendingCreate
from arka.tiers.warehouse import SEEN_S, WarehouseWatch

INFO = TableInfo(
    uuid4(), TableName("default", "t"), pa.schema([]), 0, TableType.APPEND_ONLY, (), 0, (), "file:///t-00000000", {}
)


class World:
    """A warehouse that can be emptied or exchanged, and a catalog that remembers what it has read."""

    url = "file:///warehouse"

    def __init__(self, *, tables: bool) -> None:
        self.tables = tables
        self.marker: UUID | None = None
        self.joined: UUID | None = None
        self.answers = True
        self.whole = True
        self.writable = True
        self.made: list[UUID] = []
        self.unread: set[TableName] = set()
        self.listed = tables
        self.looks = 0
        # The first answer of the catalog comes as late as this.
        self.first_answer: trio.Event | None = None

    async def read_marker(self) -> UUID | None:
        await trio.lowlevel.checkpoint()
        if not self.answers:
            raise CatalogUnavailable("no answer")
        return self.marker

    async def make_marker(self, uuid: UUID) -> UUID | None:
        await trio.lowlevel.checkpoint()
        if not self.writable:
            return None
        self.made.append(uuid)
        self.marker = self.marker or uuid
        return self.marker

    async def known(self) -> UUID | None:
        return self.joined

    async def know(self, uuid: UUID) -> None:
        self.joined = uuid

    async def list_tables(self) -> CatalogListing:
        await trio.lowlevel.checkpoint()
        found = CatalogListing((CatalogTable(INFO, (), None),) if self.listed else (), frozenset(self.unread))
        late, self.first_answer = self.first_answer, None
        if late is not None:
            await late.wait()
        return found

    async def look_at(self, table: TableInfo) -> None:
        await trio.lowlevel.checkpoint()
        self.looks += 1
        if not self.whole:
            raise FilesMissing(f"{table.location}/metadata/00001.metadata.json")


def _watch(world: World) -> WarehouseWatch:
    catalog: Any = world
    return WarehouseWatch(world, catalog, lambda: [INFO] if world.tables else [])


@pytest.fixture
def world() -> World:
    return World(tables=True)


async def test_unmarked_warehouse_that_is_whole_is_marked(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """A warehouse of an older data directory, and a new one, are marked at the first start."""
    for tables in (True, False):
        world = World(tables=tables)
        watch = _watch(world)
        nursery.start_soon(watch.run)
        await watch.wait_ours()
        assert world.made == [world.joined]
        assert watch.trouble is None


async def test_no_marker_is_made_in_an_empty_warehouse(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """An empty mount point gets no marker, though the catalog's answer is remembered and looks whole."""
    watch = _watch(world)
    nursery.start_soon(watch.run)
    await watch.wait_ours()
    kept, world.marker, world.whole = world.marker, None, False
    assert not await watch.report(WarehouseChanged("the warehouse is another one than before"))
    with trio.move_on_after(30):
        await watch.wait_ours()
    assert "no marker" in (watch.trouble or "")
    assert world.made == [kept]
    with pytest.raises(WarehouseChanged):
        await watch.check()
    world.marker, world.whole = kept, True
    await watch.wait_ours()
    assert watch.trouble is None


@pytest.mark.parametrize(("name", "marks"), [("t", False), ("renamed", False), (None, True)])
async def test_a_table_that_cannot_be_read_may_be_ours(
    name: str | None, marks: bool, world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A table of ours that others renamed is not missed in an empty warehouse: the catalog tells its new name alone."""
    world.listed = False
    world.unread = set() if name is None else {TableName("default", name)}
    watch = _watch(world)
    nursery.start_soon(watch.run)
    with trio.move_on_after(30):
        await watch.wait_ours()
    assert bool(world.made) == marks
    assert (watch.trouble is None) == marks
    world.unread, world.listed = set(), True
    await watch.wait_ours()
    assert len(world.made) == 1


async def test_tables_of_others_that_cannot_be_read_are_no_hindrance(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """While the catalog shows all of our tables, what else cannot be read is not ours."""
    world.unread = {TableName("default", "theirs")}
    watch = _watch(world)
    nursery.start_soon(watch.run)
    await watch.wait_ours()
    assert len(world.made) == 1


async def test_a_late_answer_makes_no_marker_in_a_warehouse_that_was_emptied_since(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Of two looks at a new warehouse the later one counts: a table was created since, and its files are gone (R28)."""
    world = World(tables=False)
    world.first_answer = answer = trio.Event()
    watch = _watch(world)

    async def create_table_then_empty() -> None:
        await watch.check()
        world.tables = world.listed = True
        world.marker, world.whole = None, False

    nursery.start_soon(watch.run)
    await trio.sleep(1)
    nursery.start_soon(create_table_then_empty)
    await trio.sleep(1)
    answer.set()
    await trio.sleep(30)
    assert world.tables
    assert world.made == [world.joined]


async def test_another_marker_is_not_ours(world: World, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """A warehouse with another UUID is refused until the own one is back; the disk's memory decides after a restart."""
    world.joined = uuid4()
    world.marker = uuid4()
    watch = _watch(world)
    nursery.start_soon(watch.run)
    with trio.move_on_after(30):
        await watch.wait_ours()
    assert str(world.joined) in (watch.trouble or "")
    assert not await watch.is_ours()
    world.marker = world.joined
    await watch.wait_ours()
    assert await watch.is_ours()


async def test_a_disk_that_knows_no_warehouse_joins_none_without_its_tables(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """After the loss of the disk another warehouse in the place is not taken for the catalog's, marked or not."""
    own, world.marker, world.whole = uuid4(), uuid4(), False
    watch = _watch(world)
    nursery.start_soon(watch.run)
    with trio.move_on_after(30):
        await watch.wait_ours()
    assert str(INFO.name) in (watch.trouble or "")
    assert world.joined is None
    world.marker, world.whole = own, True
    await watch.wait_ours()
    assert world.joined == own


async def test_a_file_that_is_gone_is_the_tables_trouble_while_the_marker_is_ours(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """With the marker readable a missing file stops its table alone; without it everything stalls (R33)."""
    watch = _watch(world)
    nursery.start_soon(watch.run)
    await watch.wait_ours()
    gone = FilesMissing("file:///t-00000000/metadata/m0.avro")
    assert await watch.report(gone)
    assert watch.trouble is None
    world.answers = False
    assert not await watch.report(gone)
    assert watch.trouble is not None
    world.answers = True
    await watch.wait_ours()


async def test_files_are_seen_within_a_minute_of_an_ack(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A table's files are looked for once a minute, and again after catalog or warehouse were others."""
    watch = _watch(world)
    nursery.start_soon(watch.run)
    await watch.wait_ours()
    before = world.looks
    await watch.confirm(INFO)
    await watch.confirm(INFO)
    assert world.looks == before + 1
    await trio.sleep(SEEN_S)
    await watch.confirm(INFO)
    assert world.looks == before + 2
    await watch.report(WarehouseChanged("gone"))
    await watch.wait_ours()
    world.whole = False
    with pytest.raises(FilesMissing):
        await watch.confirm(INFO)


async def test_warehouse_that_cannot_be_marked(world: World, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Where nothing may be written at the top, the check is one of each table's files."""
    world.writable = False
    watch = _watch(world)
    nursery.start_soon(watch.run)
    await watch.wait_ours()
    assert world.joined is None
    assert await watch.is_ours()


@pytest.mark.parametrize("moved", ["", "name", "place"])
async def test_no_marker_without_the_table_of_a_create_whose_answer_was_lost(
    moved: str, world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """The catalog has the table, the log only that it was asked for; it is found by its name or by its place."""
    name = TableName("default", "another") if moved == "name" else INFO.name
    suffix = "another1" if moved == "place" else INFO.location[-8:]
    create = PendingCreate(3, suffix, replace(definition_of(INFO.name, keyed=False), name=name))
    world.whole, catalog = False, cast(Any, world)
    watch = WarehouseWatch(cast(Any, world), catalog, tuple, lambda: [create])
    nursery.start_soon(watch.run)
    await trio.sleep(5)
    assert world.made == []
    assert "no marker" in (watch.trouble or "")
    world.whole = True
    await watch.wait_ours()
    assert world.made == [world.joined]


async def test_no_second_marker_while_a_table_cannot_be_read(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A warehouse that lost the marker which this log knew: a table that the log does not know may be ours."""
    world.joined, world.whole = uuid4(), False
    watch = WarehouseWatch(cast(Any, world), cast(Any, world), tuple)
    nursery.start_soon(watch.run)
    await trio.sleep(5)
    assert world.made == []
    world.whole = True
    await watch.wait_ours()
    assert world.made == [world.joined]
