"""Arrow schemas to Iceberg's and back; rows from older schemas to the current one."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyiceberg.schema import Schema
from pyiceberg.types import (
    FixedType,
    IntegerType,
    ListType,
    LongType,
    NestedField,
    StringType,
    TimestampNanoType,
    UnknownType,
)

from arka.iceberg import control, encode
from arka.iceberg.align import align_batch
from arka.iceberg.schema import UnsupportedType, arrow_schema, field_id, iceberg_schema, new_iceberg_schema
from arka.records import FIELD_ID_KEY
from arka.storage.ports import CatalogConflict, CommitOutcome, ReadJob, SchemaMisfit, TableFrames

_LEAVES = st.sampled_from(
    [
        pa.int32(),
        pa.int64(),
        pa.float32(),
        pa.float64(),
        pa.bool_(),
        pa.string(),
        pa.binary(),
        pa.binary(7),
        pa.uuid(),
        pa.decimal128(1, 0),
        pa.decimal128(38, 38),
        pa.date32(),
        pa.time64("us"),
        pa.timestamp("us"),
        pa.timestamp("us", tz="UTC"),
    ]
)


def _fields(types: st.SearchStrategy[pa.DataType]) -> st.SearchStrategy[list[pa.Field]]:
    return st.lists(st.tuples(types, st.booleans()), min_size=1, max_size=3).map(
        lambda members: [pa.field(f"f{i}", kind, nullable) for i, (kind, nullable) in enumerate(members)]
    )


_TYPES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        _fields(inner).map(pa.struct),
        st.tuples(inner, st.booleans()).map(lambda t: pa.list_(pa.field("element", t[0], t[1]))),
        st.tuples(_LEAVES, inner, st.booleans()).map(
            lambda t: pa.map_(pa.field("key", t[0], False), pa.field("value", t[1], t[2]))
        ),
    ),
    max_leaves=6,
)


def _ids(field: pa.Field) -> list[int]:
    kind = field.type
    children: list[pa.Field] = []
    if pa.types.is_map(kind):
        children = [kind.key_field, kind.item_field]
    elif pa.types.is_list(kind):
        children = [kind.value_field]
    elif pa.types.is_struct(kind):
        children = list(kind)
    return [field_id(field), *(number for child in children for number in _ids(child))]


@given(_fields(_TYPES))
def test_every_canonical_schema_survives_the_round_trip(fields: list[pa.Field]) -> None:
    """Arrow to Iceberg to Arrow keeps types, names and nullability, and gives each field one id."""
    schema = pa.schema(fields)
    made = new_iceberg_schema(schema)
    back = arrow_schema(made)
    assert back.equals(schema)
    ids = [number for field in back for number in _ids(field)]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    assert [field_id(field) for field in back] == list(range(1, len(fields) + 1))
    assert iceberg_schema(back).as_struct() == made.as_struct()


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.uint32(),
        pa.uint64(),
        pa.float16(),
        pa.large_string(),
        pa.string_view(),
        pa.large_binary(),
        pa.decimal256(10, 2),
        pa.decimal128(5, -2),
        pa.decimal128(3, 4),
        pa.date64(),
        pa.time32("ms"),
        pa.time64("ns"),
        pa.timestamp("ns"),
        pa.timestamp("ms"),
        pa.timestamp("us", tz="Europe/Berlin"),
        pa.duration("us"),
        pa.null(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.large_list(pa.int32()),
        pa.list_(pa.int32(), 3),
        pa.struct([]),
        pa.binary(0),
    ],
    ids=str,
)
def test_other_types_are_refused_by_path(kind: pa.DataType) -> None:
    """A type that is not canonical is refused, wherever it stands, naming its column."""
    for wrapped, path in (
        (kind, "'c'"),
        (pa.struct([("inner", kind)]), "'c.inner'"),
        (pa.list_(kind), "'c.element'"),
        (pa.map_(pa.string(), kind), "'c.value'"),
    ):
        with pytest.raises(CatalogConflict, match=path):
            new_iceberg_schema(pa.schema([("fine", pa.int32()), ("c", wrapped)]))


@pytest.mark.parametrize("kind", [TimestampNanoType(), UnknownType()], ids=str)
def test_foreign_types_are_named(kind: Any) -> None:
    """An Iceberg type beyond Arka's is an error that names its column."""
    with pytest.raises(UnsupportedType, match=r"'a\.element'"):
        arrow_schema(Schema(NestedField(1, "a", ListType(2, kind))))


def test_docs_and_widths_are_kept() -> None:
    """A column's documentation and the width of fixed values cross both ways."""
    made = arrow_schema(
        Schema(
            NestedField(4, "a", FixedType(3), required=True, doc="three"),
            NestedField(9, "b", StringType()),
            NestedField(2, "c", IntegerType()),
        )
    )
    assert made.field("a").metadata == {FIELD_ID_KEY: b"4", b"doc": b"three"}
    assert made.field("a").type == pa.binary(3)
    assert not made.field("a").nullable
    assert iceberg_schema(made).find_field(4).doc == "three"


def test_a_schema_without_ids_is_refused() -> None:
    """Frames are bound to ids: a schema without them cannot be aligned (R24)."""
    with pytest.raises(UnsupportedType, match="no Iceberg field id"):
        iceberg_schema(pa.schema([("a", pa.int32())]))


def _with_ids(*fields: NestedField) -> pa.Schema:
    return arrow_schema(Schema(*fields))


def test_alignment_follows_ids(lake: Any) -> None:
    """Renamed, moved, widened, added and dropped columns, nested ones too, follow their ids (R24)."""
    old = pa.schema(
        [
            pa.field("kept", pa.int32()),
            pa.field("dropped", pa.string()),
            pa.field("nested", pa.list_(pa.struct([("x", pa.int32()), ("gone", pa.string()), ("y", pa.float32())]))),
            pa.field("pairs", pa.map_(pa.string(), pa.struct([("v", pa.int32())]))),
        ]
    )
    info = lake.create(old)
    rows = [
        {
            "kept": 1,
            "dropped": "x",
            "nested": [{"x": 1, "gone": "g", "y": 0.5}, None],
            "pairs": [("k", {"v": 1})],
        },
        {"kept": None, "dropped": None, "nested": None, "pairs": None},
        {"kept": -3, "dropped": "y", "nested": [], "pairs": [("a", None), ("b", {"v": None})]},
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=info.schema)
    piece = lake.write(info, [(1, batch.slice(1)), (2, batch)])
    catalog = lake.foreign()
    table = catalog.load_table(tuple(info.name))
    with table.update_schema() as update:
        update.delete_column("dropped")
        update.rename_column("kept", "renamed").update_column("kept", LongType())
        update.delete_column(("nested", "element", "gone"))
        update.rename_column(("nested", "element", "y"), "why")
        update.add_column(("nested", "element", "new"), IntegerType())
        update.update_column(("pairs", "value", "v"), LongType())
        update.add_column("dropped2", StringType())
        update.move_first("nested")
    with table.update_schema() as update:
        # The name comes back, the column does not.
        update.add_column("dropped", StringType())
    catalog.close()
    newer = control.load_table(lake.config, info.name).info
    assert newer.schema_id == 2
    schemas = {info.schema_id: info.schema.serialize().to_pybytes()}
    staged = encode.encode(lake.config, TableFrames(newer, schemas, lake.log_uuid, 0, 2, (piece,)))
    assert lake.commit(newer, staged).outcome is CommitOutcome.COMMITTED
    found = align_batch(batch.slice(1), newer.schema).to_pylist() + align_batch(batch, newer.schema).to_pylist()
    whole = [
        {
            "nested": [{"x": 1, "why": 0.5, "new": None}, None],
            "renamed": 1,
            "pairs": [("k", {"v": 1})],
            "dropped2": None,
            "dropped": None,
        },
        {"nested": None, "renamed": None, "pairs": None, "dropped2": None, "dropped": None},
        {
            "nested": [],
            "renamed": -3,
            "pairs": [("a", None), ("b", {"v": None})],
            "dropped2": None,
            "dropped": None,
        },
    ]
    assert found == whole[1:] + whole
    assert lake.read(ReadJob(newer, lake.log_uuid)).to_pylist() == found


def test_alignment_shares_what_is_the_same() -> None:
    """Columns whose type did not change are handed on, not copied."""
    schema = _with_ids(NestedField(1, "a", StringType()), NestedField(2, "b", IntegerType()))
    batch = pa.record_batch([["x", "y"], pa.array([1, 2], pa.int32())], schema=schema)
    assert align_batch(batch, schema) is batch
    renamed = _with_ids(NestedField(2, "b", IntegerType()), NestedField(1, "z", StringType()))
    made = align_batch(batch, renamed)
    assert made.column(1).buffers()[2].address == batch.column(0).buffers()[2].address


def test_alignment_never_invents_required_values() -> None:
    """A required column that the rows lack is an error, unless there are no rows."""
    schema = _with_ids(NestedField(1, "a", IntegerType()))
    needy = _with_ids(NestedField(1, "a", IntegerType()), NestedField(2, "day", StringType(), required=True))
    batch = pa.record_batch([pa.array([1], pa.int32())], schema=schema)
    with pytest.raises(SchemaMisfit, match="'day'"):
        align_batch(batch, needy)
    assert align_batch(batch.slice(0, 0), needy).num_rows == 0
