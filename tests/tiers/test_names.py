"""What others do to names: tables that they rename, replace, drop or name twice (R5, R20, R27)."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pyarrow as pa
import pytest
from trio.testing import MockClock

from arka.errors import ArkaError, ErrorCode
from arka.records import TableDefinition, TableName, TableType, Tier, owner_property
from arka.tableproperties import OWNER
from arka.testing.simnode import NAME, SimNode, write_all
from arka.testing.simwriters import SCHEMA
from arka.tiers.table import TableState

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


def rename(node: SimNode, name: TableName, new: TableName) -> None:
    """Let others rename a table."""
    found = node.catalog._tables.pop(name)
    found.info = replace(found.info, name=new)
    node.catalog._tables[new] = found


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
        rename(node, NAME, OTHER)
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
        rename(node, NAME, OTHER)
        await make_other(node, pipeline.log_uuid)
        await pipeline.tables.drop(NAME, purge=True)
        assert list(node.catalog._tables) == [OTHER]
        assert before.state is TableState.ACTIVE
        await write_all(pipeline, before, range(3, 5), Tier.ICEBERG_COMMITTED)
    assert node.ids(OTHER) == list(range(5))
