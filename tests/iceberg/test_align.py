"""Rows and files that do not fit what others made of a table's columns: told apart, by name (R24, R27)."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from arka.iceberg.align import align_batch, misfit
from arka.iceberg.sqlcatalog import ServerSqlCatalog
from arka.records import FIELD_ID_KEY
from arka.storage.ports import SchemaMisfit


def field(name: str, kind: pa.DataType, number: int, *, required: bool = False) -> pa.Field:
    return pa.field(name, kind, not required, {FIELD_ID_KEY: b"%d" % number})


def struct_of(*, required: bool) -> pa.Schema:
    return pa.schema([field("s", pa.struct([field("x", pa.int64(), 2, required=required)]), 1)])


def list_of(*, required: bool) -> pa.Schema:
    return pa.schema([field("l", pa.list_(field("element", pa.int64(), 2, required=required)), 1)])


def map_of(*, required: bool) -> pa.Schema:
    kind = pa.map_(field("key", pa.string(), 2, required=True), field("value", pa.int64(), 3, required=required))
    return pa.schema([field("m", kind, 1)])


def column(*, required: bool) -> pa.Schema:
    return pa.schema([field("c", pa.int64(), 1, required=required)])


def list_of_structs(*, required: bool) -> pa.Schema:
    inner = pa.struct([field("x", pa.int64(), 3, required=required)])
    return pa.schema([field("l", pa.list_(field("element", inner, 2)), 1)])


def batch(schema: pa.Schema, *values: Any) -> pa.RecordBatch:
    return pa.record_batch([pa.array(values, schema.field(0).type)], schema=schema)


#: What became required, rows without a null there (but with nulls above it), and a row with one.
REQUIRED = [
    (column, [1, 2], None, "'c'"),
    (struct_of, [{"x": 1}, None], {"x": None}, "'s.x'"),
    (list_of, [[1], [], None], [1, None], "'l.element'"),
    (map_of, [[("a", 1)], None], [("a", None)], "'m.value'"),
    (list_of_structs, [[{"x": 1}, None], None], [{"x": None}], "x'"),
]


@pytest.mark.parametrize(("make", "good", "bad", "name"), REQUIRED, ids=[make.__name__ for make, *_ in REQUIRED])
def test_what_became_required(make: Any, good: list[Any], bad: Any, name: str) -> None:
    """Rows with values go through, also below nulls that may be; a null is named. Rows in the table stay readable."""
    old, new = make(required=False), make(required=True)
    assert align_batch(batch(old, *good), new).to_pylist() == batch(old, *good).to_pylist()
    # With an offset, and with values below a null that belong to no row.
    assert align_batch(batch(old, bad, *good).slice(1), new).to_pylist() == batch(old, *good).to_pylist()
    with pytest.raises(SchemaMisfit, match=name):
        align_batch(batch(old, *good, bad), new)
    read = align_batch(batch(old, *good, bad), new, strict=False)
    assert read.num_rows == len(good) + 1
    # Of what became optional nothing is asked.
    assert align_batch(batch(new, *good), old).to_pylist() == batch(old, *good).to_pylist()
    assert name in misfit(old, new)
    assert not misfit(new, old)


def test_new_required_columns() -> None:
    """There is no value for a new required column, or for one inside of a struct that is there."""
    old = pa.schema([field("c", pa.int64(), 1)])
    new = pa.schema([*old, field("r", pa.string(), 2, required=True)])
    with pytest.raises(SchemaMisfit, match="'r'"):
        align_batch(batch(old, 1), new)
    assert "'r'" in misfit(old, new)
    assert not misfit(new, old)
    narrow = pa.schema([field("s", pa.struct([field("x", pa.int64(), 2)]), 1)])
    inner = pa.struct([field("x", pa.int64(), 2), field("y", pa.int64(), 3, required=True)])
    wide = pa.schema([field("s", inner, 1)])
    with pytest.raises(SchemaMisfit, match=r"'s\.y'"):
        align_batch(batch(narrow, {"x": 1}), wide)
    assert align_batch(batch(narrow, None), wide).to_pylist() == [{"s": None}]
    assert "'s.y'" in misfit(narrow, wide)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        (pa.int32(), pa.int64(), 7),
        (pa.float32(), pa.float64(), 1.5),
        (pa.decimal128(9, 2), pa.decimal128(12, 2), Decimal("1.25")),
    ],
    ids=str,
)
def test_promotions(old: pa.DataType, new: pa.DataType, value: Any) -> None:
    """Rows are widened, and files of the narrower type are files of the table; the way back is not Iceberg's."""
    before, after = pa.schema([field("c", old, 1)]), pa.schema([field("c", new, 1)])
    assert align_batch(batch(before, value, None), after).to_pylist() == [{"c": value}, {"c": None}]
    assert not misfit(before, after)
    assert "'c'" in misfit(after, before)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        (pa.string(), pa.int64(), "seven"),
        (pa.int64(), pa.int32(), 2**40),
        (pa.int64(), pa.struct([field("x", pa.int64(), 2)]), 7),
        (pa.list_(field("element", pa.int64(), 2)), pa.string(), [1]),
    ],
    ids=str,
)
def test_types_that_values_do_not_fit(old: pa.DataType, new: pa.DataType, value: Any) -> None:
    """A type that others gave to the same column, against Iceberg's rules, is told as their change."""
    before, after = pa.schema([field("c", old, 1)]), pa.schema([field("c", new, 1)])
    with pytest.raises(SchemaMisfit, match="'c'"):
        align_batch(batch(before, value), after)
    assert "'c'" in misfit(before, after)


def test_a_column_that_was_dropped_and_added_again_is_another_one() -> None:
    """Under its old name it has another type and another id: its values are nulls, unless it is required."""
    before = pa.schema([field("k", pa.int64(), 1), field("c", pa.string(), 2)])
    rows = pa.record_batch([pa.array([1]), pa.array(["x"])], schema=before)
    after = pa.schema([field("k", pa.int64(), 1), field("c", pa.int32(), 3)])
    assert align_batch(rows, after).to_pylist() == [{"k": 1, "c": None}]
    assert not misfit(before, after)
    required = pa.schema([field("k", pa.int64(), 1), field("c", pa.int32(), 3, required=True)])
    with pytest.raises(SchemaMisfit, match="'c'"):
        align_batch(rows, required)


PEOPLE = pa.schema([pa.field("id", pa.int64(), nullable=False), ("name", pa.string())])


def people(*names: str | None) -> pa.RecordBatch:
    return pa.record_batch([pa.array(range(len(names))), pa.array(names, pa.string())], schema=PEOPLE)


def require(lake: Any) -> None:
    """Let others make a column required."""
    catalog = lake.foreign()
    with catalog.load_table("default.t").update_schema(allow_incompatible_changes=True) as update:
        update.update_column("name", required=True)
    catalog.close()


@pytest.mark.parametrize("between", [False, True], ids=["before", "at the swap"])
@pytest.mark.parametrize("key", [(), ("id",)], ids=["append_only", "primary_key"])
def test_files_of_older_columns_are_not_committed(
    lake: Any, key: tuple[str, ...], between: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader trusts a required column: files that may hold nulls in it never become the table's (R27)."""
    info = lake.create(PEOPLE, key=key)
    staged = lake.encode(info, [people("a", None)], 0)
    if between:
        real, left = ServerSqlCatalog.commit_table, ["once"]

        def commit_table(self: Any, *arguments: Any) -> Any:
            if left:
                left.pop()
                require(lake)
            return real(self, *arguments)

        monkeypatch.setattr(ServerSqlCatalog, "commit_table", commit_table)
        monkeypatch.setattr("arka.iceberg.sqlcatalog.LeanSqlCatalog.commit_table", commit_table)
    else:
        require(lake)
    with pytest.raises(SchemaMisfit, match="'name'"):
        lake.commit(info, staged)
    assert lake.table(info).metadata.current_snapshot_id is None
    # Written again under the table's columns, they say which write does not fit; others go through.
    newer = lake.reload(info)
    job = replace(lake.frames(info, [people("a", None)], 0), table=newer)
    with pytest.raises(SchemaMisfit, match=r"LSN 1: .*'name'"):
        lake.encode_job(job)
    lake.commit(newer, lake.encode_job(replace(lake.frames(info, [people("a", "b")], 0), table=newer)))
    assert lake.table(info).scan().to_arrow().num_rows == 2
