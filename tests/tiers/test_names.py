"""What others do to names: tables that they rename, replace, drop or name twice (R5, R20, R27)."""

from __future__ import annotations

import re
from contextlib import suppress
from uuid import UUID, uuid4

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.errors import AdmissionRejected, ArkaError, ErrorCode
from arka.options import KIB
from arka.records import TableDefinition, TableName, TableType, Tier, owner_property
from arka.tableproperties import OWNER
from arka.testing.simnode import NAME, SimNode, with_options, write, write_all
from arka.testing.simwriters import SCHEMA
from arka.tiers.pipeline import Pipeline
from arka.tiers.room import NoRoom
from arka.tiers.table import Table, TableState

OTHER = TableName("default", "other")
KEYED = pa.schema([SCHEMA.field(0).with_nullable(False), *list(SCHEMA)[1:]])


def definition(keyed: bool = False, name: TableName = NAME) -> TableDefinition:
    if keyed:
        return TableDefinition(name, KEYED, TableType.PRIMARY_KEY, (KEYED.names[0],))
    return TableDefinition(name, SCHEMA)


async def make_other(node: SimNode, log_uuid: UUID, keyed: bool = False) -> UUID:
    """Let others make a table of the name that the tests use, for this node; returns its UUID."""
    made = await node.catalog.create_table(definition(keyed), "cafebabe")
    if keyed:
        node.catalog.foreign_properties(NAME, {OWNER: owner_property("node", log_uuid)})
    return made.info.uuid


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
async def test_create_after_others_renamed_the_table_a_moment_ago(
    autojump_clock: MockClock, keyed: bool, replaced: bool
) -> None:
    """CreateTable answers as the catalog is now: the name is free, or another table has it (R27)."""
    node = SimNode()
    async with node.run() as pipeline:
        before = (await pipeline.tables.create(definition(keyed)))[0]
        await write_all(pipeline, before, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.rename(NAME, OTHER)
        if replaced:
            uuid = await make_other(node, pipeline.log_uuid, keyed)
            found, created = await pipeline.tables.create(definition(keyed))
            assert (found.info.uuid, created) == (uuid, False)
        else:
            found, created = await pipeline.tables.create(definition(keyed))
            assert created
            assert found is not before
        assert before.info.name == OTHER
        await write_all(pipeline, found, range(5), Tier.ICEBERG_COMMITTED)
        await write_all(pipeline, before, range(3, 5), Tier.ICEBERG_COMMITTED)
    assert node.ids() == node.ids(OTHER) == list(range(5))


async def test_create_after_others_dropped_the_table_a_moment_ago(autojump_clock: MockClock) -> None:
    """CreateTable does not answer with a table that is gone: it says that others dropped it (R18, R27)."""
    node = SimNode()
    async with node.run() as pipeline:
        await write_all(pipeline, (await pipeline.tables.create(definition()))[0], range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.remove(NAME)
        with pytest.raises(ArkaError, match="others dropped it") as caught:
            await pipeline.tables.create(definition())
        assert caught.value.code is ErrorCode.TABLE_STOPPED
        await pipeline.tables.drop(NAME, purge=False)
        _, created = await pipeline.tables.create(definition())
        assert created


async def test_drop_after_others_gave_the_name_away_a_moment_ago(autojump_clock: MockClock) -> None:
    """DropTable means the table that has the name now (R5, R27)."""
    node = SimNode()
    async with node.run() as pipeline:
        before = (await pipeline.tables.create(definition()))[0]
        await write_all(pipeline, before, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.rename(NAME, OTHER)
        await make_other(node, pipeline.log_uuid)
        await pipeline.tables.drop(NAME, purge=True)
        assert list(node.catalog._tables) == [OTHER]
        assert before.state is TableState.ACTIVE
        await write_all(pipeline, before, range(3, 5), Tier.ICEBERG_COMMITTED)
    assert node.ids(OTHER) == list(range(5))


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_table_that_others_replaced_is_given_up_by_its_uuid(
    autojump_clock: MockClock, keyed: bool, restarted: bool
) -> None:
    """What is parked of a table keeps writes out, and its name is another table's: the reason says how to drop it."""
    limit = 64 * KIB
    node = SimNode(with_options(limits__disk_bytes=limit, limits__stall_s=3.0))
    async with node.run() as pipeline:
        gone = (await pipeline.tables.create(definition(keyed)))[0]
        await write_all(pipeline, gone, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.remove(NAME)
        with suppress(NoRoom):
            for number in range(3, 1000):
                write(pipeline, gone, number)
        uuid = await make_other(node, pipeline.log_uuid, keyed)
        await trio.sleep(20)
        assert gone.state is TableState.STOPPED
        assert pipeline.tables.parked_bytes(gone) > limit
        if not restarted:
            await check_given_up(node, pipeline, gone, uuid)
    if restarted:
        async with node.run() as pipeline:
            await trio.sleep(20)
            gone = next(table for table in pipeline.tables.all() if table.info.uuid != uuid)
            await check_given_up(node, pipeline, gone, uuid)
    async with node.run() as pipeline:
        await write_all(pipeline, await pipeline.tables.find(NAME), range(3, 5), Tier.ICEBERG_COMMITTED)
        assert [table.info.uuid for table in pipeline.tables.all()] == [uuid]
    assert node.ids() == list(range(5))


async def check_given_up(node: SimNode, pipeline: Pipeline, gone: Table, uuid: UUID) -> None:
    """Drop a table as its reason says; the one that has its name now, ``uuid``, stays and takes writes."""
    table = await pipeline.tables.find(NAME)
    assert table.info.uuid == uuid
    with pytest.raises(AdmissionRejected, match="of them parked"):
        write(pipeline, table, 0)
    assert "DropTable, with its table_uuid if another table has the name" in gone.ending_detail
    (meant,) = re.findall(r"\((\w+-[\w-]+)\) is not in the catalog", gone.ending_detail)
    with pytest.raises(ArkaError, match=str(uuid)) as refused:
        await pipeline.tables.drop(NAME, purge=True, uuid=uuid4())
    assert refused.value.code is ErrorCode.TABLE_NOT_FOUND
    await pipeline.tables.drop(NAME, purge=True, uuid=UUID(meant))
    await trio.sleep(1)
    assert node.keys_of("parked") == []
    assert list(node.catalog._tables) == [NAME]
    assert table.state is TableState.ACTIVE
    await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)


async def test_drop_by_uuid_means_the_table_of_the_name_alone(autojump_clock: MockClock) -> None:
    """With its UUID a table is dropped under the name that it has now, and not one that has its name since (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = (await pipeline.tables.create(definition()))[0]
        node.catalog.rename(NAME, OTHER)
        uuid = await make_other(node, pipeline.log_uuid)
        with pytest.raises(ArkaError, match=str(uuid)) as refused:
            await pipeline.tables.drop(NAME, purge=True, uuid=table.info.uuid)
        assert refused.value.code is ErrorCode.TABLE_NOT_FOUND
        assert set(node.catalog._tables) == {NAME, OTHER}
        await pipeline.tables.drop(OTHER, purge=True, uuid=table.info.uuid)
        assert list(node.catalog._tables) == [NAME]
        await pipeline.tables.drop(NAME, purge=True, uuid=uuid)
        assert not node.catalog._tables


SECOND = TableName("default", "a_second")
STRANGE = TableName("default", "my-table")


@pytest.mark.parametrize("keyed", [False, True])
async def test_one_table_under_two_names(autojump_clock: MockClock, keyed: bool) -> None:
    """The name that Arka knows stays the table's: a second one is refused with the name to use, also after restarts."""
    node = SimNode()
    async with node.run() as pipeline:
        table, _ = await pipeline.tables.create(definition(keyed))
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.register(NAME, SECOND)
        for ask in (pipeline.tables.find, pipeline.tables.find_fresh):
            with pytest.raises(ArkaError, match=r"second name of table default\.t") as caught:
                await ask(SECOND)
            assert caught.value.code is ErrorCode.INVALID_REQUEST
        with pytest.raises(ArkaError, match="second name"):
            await pipeline.tables.create(definition(keyed, SECOND))
        with pytest.raises(ArkaError, match="second name"):
            await pipeline.tables.drop(SECOND, purge=True)
        await pipeline.tables.refresh_list()
        assert [known.info.name for known in pipeline.tables.listed()] == [NAME]
        await write_all(pipeline, table, range(3, 5), Tier.ICEBERG_COMMITTED)
    for first in (5, 7):
        async with node.run() as pipeline:
            table = await pipeline.tables.find_fresh(NAME)
            await write_all(pipeline, table, range(first, first + 2), Tier.ICEBERG_COMMITTED)
            assert (table.state, table.reason) == (TableState.ACTIVE, None)
    assert node.ids() == list(range(9))
    assert node.ids(SECOND) == [0, 1, 2]


@pytest.mark.parametrize("restarted", [False, True])
async def test_the_entry_that_holds_most_of_the_log_follows_a_name_that_is_gone(
    autojump_clock: MockClock, restarted: bool
) -> None:
    """Others rename a table of which an older state is registered too: the table is not the older state (R20)."""
    node = SimNode()
    async with node.run() as pipeline:
        table, _ = await pipeline.tables.create(definition())
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.register(NAME, SECOND)
        await write_all(pipeline, table, range(3, 5), Tier.ICEBERG_COMMITTED)
        node.catalog.rename(NAME, OTHER)
        if not restarted:
            await write_all(pipeline, table, range(5, 7), Tier.ICEBERG_COMMITTED)
    async with node.run() as pipeline:
        table = await pipeline.tables.find_fresh(OTHER)
        await write_all(pipeline, table, range(5 if restarted else 7, 9), Tier.ICEBERG_COMMITTED)
        assert table.info.name == OTHER
    assert node.ids(OTHER) == list(range(9))


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
async def test_name_that_arka_cannot_spell(autojump_clock: MockClock, keyed: bool, restarted: bool) -> None:
    """A table that others give such a name is there: it says so, its writes wait, and its own name brings it back."""
    node = SimNode()
    async with node.run() as pipeline:
        table, _ = await pipeline.tables.create(definition(keyed))
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.rename(NAME, STRANGE)
        await write_all(pipeline, table, range(3, 6))
        await trio.sleep(60)
        assert table.state is TableState.ACTIVE
        if not restarted:
            await check_misnamed(pipeline, table)
    if restarted:
        async with node.run() as pipeline:
            await trio.sleep(60)
            await check_misnamed(pipeline, await pipeline.tables.find_fresh(NAME))
            node.catalog.rename(STRANGE, NAME)
            await trio.sleep(60)
            await check_back(node, pipeline)
    else:
        node.catalog.rename(STRANGE, NAME)
        async with node.run() as pipeline:
            await check_back(node, pipeline)


async def check_misnamed(pipeline: Pipeline, table: Table) -> None:
    assert str(table.info.uuid) in (table.reason or "")
    assert "default.my-table" in (table.reason or "")
    assert "others dropped" not in (table.reason or "")
    with pytest.raises(ArkaError, match="my-table"):
        table.check_active()
    with pytest.raises(ArkaError, match="my-table") as caught:
        await pipeline.tables.drop(NAME, purge=True)
    assert caught.value.code is ErrorCode.TABLE_NOT_FOUND
    with pytest.raises(ArkaError, match="my-table"):
        await pipeline.tables.create(definition())


async def check_back(node: SimNode, pipeline: Pipeline) -> None:
    table = await pipeline.tables.find_fresh(NAME, max_age_s=0)
    await write_all(pipeline, table, range(6, 8), Tier.ICEBERG_COMMITTED)
    assert (table.state, table.reason) == (TableState.ACTIVE, None)
    assert node.ids() == list(range(8))


async def test_name_of_a_table_that_others_renamed_to_what_arka_cannot_spell(autojump_clock: MockClock) -> None:
    """Its old name may be given to another table, which is served; renamed to a third name, it is followed."""
    node = SimNode()
    async with node.run() as pipeline:
        table, _ = await pipeline.tables.create(definition())
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.rename(NAME, STRANGE)
        await write_all(pipeline, table, range(3, 6))
        await trio.sleep(60)
        uuid = await make_other(node, pipeline.log_uuid)
        other = await pipeline.tables.find_fresh(NAME, max_age_s=0)
        assert other.info.uuid == uuid
        await write_all(pipeline, other, range(2), Tier.ICEBERG_COMMITTED)
        node.catalog.rename(STRANGE, OTHER)
        await trio.sleep(60)
        assert await pipeline.tables.find_fresh(OTHER) is table
    assert node.ids(OTHER) == list(range(6))
    assert node.ids() == [0, 1]


async def test_list_of_tables_is_fresh(autojump_clock: MockClock) -> None:
    """Tables that others made, renamed and dropped a moment ago are in the list as they are now (R27)."""
    node = SimNode()
    async with node.run() as pipeline:
        for name in ("kept", "moved", "gone"):
            await pipeline.tables.create(definition(name=TableName("default", name)))
        await trio.sleep(5)
        await node.catalog.create_table(definition(name=TableName("default", "made")), "cafebabe")
        node.catalog.rename(TableName("default", "moved"), OTHER)
        node.catalog.remove(TableName("default", "gone"))
        await pipeline.tables.refresh_list()
        listed = {table.info.name.name: table.state for table in pipeline.tables.listed()}
        assert listed.pop("gone") is TableState.STOPPED
        assert set(listed) == {"kept", "other", "made"}
        # While the catalog does not answer, the last list serves, after 1 s.
        node.weather.away = True
        node.weather.max_delay_s = 1000.0
        began = trio.current_time()
        await pipeline.tables.refresh_list()
        assert trio.current_time() - began <= 1.0
