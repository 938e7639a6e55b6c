"""Schema ids that others give to other columns: waiting writes keep the columns that they were accepted with (R24)."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.errors import DataCorruption
from arka.records import FIELD_ID_KEY
from arka.testing.simnode import NAME, SimNode
from tests.tiers.test_adoption import PEOPLE, Change, change, make, stream, with_new, without

SHORT = {"requested_durability": "object_storage"}
AGED = PEOPLE.append(pa.field("age", pa.int64()))
PLACED = PEOPLE.append(pa.field("town", pa.string()))


def both(*changes: Change) -> Change:
    """Make several changes one, with one schema id."""

    def made(schema: pa.Schema, new_id: Callable[[], int]) -> pa.Schema:
        for one in changes:
            schema = one(schema, new_id)
        return schema

    return made


def reuse(node: SimNode, *changes: Change) -> None:
    """Let others change the columns under the schema id that the table has now."""
    node.catalog._tables[NAME].last_schema_id -= 1
    change(node, both(*changes))


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
async def test_waiting_writes_of_one_schema_id_with_two_sets_of_columns(
    autojump_clock: MockClock, keyed: bool, restarted: bool
) -> None:
    """Rows that were accepted before and after are committed with their own values, each in its own column."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=keyed)
        change(node, with_new("age", pa.int64()))
        await trio.sleep(1.1)
        async with stream(pipeline, AGED, **SHORT) as old, stream(pipeline, PEOPLE, **SHORT):
            node.weather.away = True
            await old.write((1, "F", "L", 7))
            await old.settle()
        node.weather.away = False
        reuse(node, without("age"), with_new("town", pa.string()))
        found = await pipeline.tables.find_fresh(NAME, max_age_s=0)
        assert found.info.schema.names == [*PEOPLE.names, "town"]
        node.weather.away = True
        async with stream(pipeline, PLACED, **SHORT) as new:
            await new.write((2, "F", "L", "here"))
            await new.settle()
        assert len({info.schema_id for info, _ in table.bindings(0, table.last_lsn)}) > 1
        if not restarted:
            node.weather.away = False
            await trio.sleep(30)
    node.weather.away = False
    async with node.run() as pipeline:
        await trio.sleep(30)
        table = await pipeline.tables.find_fresh(NAME, max_age_s=0)
        # What is adopted again is the same: no record is made of it each time.
        before = table.info
        await pipeline.tables.find_fresh(NAME, max_age_s=0)
        assert table.info is before
        async with stream(pipeline, PLACED) as new:
            await new.write((3, "F", "L", "there"))
            await new.settle()
    rows = sorted(node.catalog.rows(NAME).select(["id", "town"]).to_pylist(), key=lambda row: row["id"])
    assert rows == [{"id": 1, "town": None}, {"id": 2, "town": "here"}, {"id": 3, "town": "there"}]


async def test_frames_that_come_back_with_other_columns_of_the_same_id(autojump_clock: MockClock) -> None:
    """What cannot be told apart is damage of the table, never a guess."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline)
        other = PEOPLE.append(pa.field("x", pa.int64(), metadata={FIELD_ID_KEY: b"9"}))
        table.learn_schema(table.info.schema_id, table.info.schema)
        with pytest.raises(DataCorruption, match="schema 0"):
            table.learn_schema(table.info.schema_id, other)
