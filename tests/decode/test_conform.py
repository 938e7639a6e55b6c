"""Which streams a table takes, and that every difference is told at once."""

from __future__ import annotations

import datetime
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arka.errors import ErrorCode, InvalidRequest
from arka.flight.conform import Conformance, plan_conformance, same_bytes
from arka.records import Operation, TableInfo
from arka.testing.ipcstreams import make_table

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        ("age", pa.int64()),
        ("name", pa.string()),
        ("at", pa.timestamp("us")),
    ]
)
USERS = make_table(SCHEMA, name="users")
KEYED = make_table(SCHEMA, name="users", key_columns=["id"])
PARTIAL = make_table(SCHEMA, name="users", key_columns=["id"], properties={"arka.partial": "null"})


def rows_of(stream: pa.Schema, table: TableInfo = USERS) -> Conformance:
    """The way of whole rows."""
    return plan_conformance(stream, table).conformance(Operation.UPSERT)


def mismatch(stream: pa.Schema, table: TableInfo = USERS) -> str:
    with pytest.raises(InvalidRequest) as caught:
        plan_conformance(stream, table)
    assert caught.value.code is ErrorCode.SCHEMA_MISMATCH
    return caught.value.detail


def for_deletes_alone(stream: pa.Schema, table: TableInfo = KEYED) -> str:
    """Check that a stream may delete and not upsert; return what the latter is told."""
    plan = plan_conformance(stream, table)
    assert plan.conformance(Operation.DELETE).schema == table.key_schema()
    with pytest.raises(InvalidRequest) as caught:
        plan.conformance(Operation.UPSERT)
    assert caught.value.code is ErrorCode.SCHEMA_MISMATCH
    assert caught.value.detail.endswith("the stream fits deletes alone")
    return caught.value.detail


def test_the_contracts_message() -> None:
    """One wrong type reads as protocol 6 says."""
    stream = SCHEMA.set(1, pa.field("age", pa.string()))
    assert mismatch(stream) == "Schema mismatch for default.users: column 'age' is utf8, expected int64"


def test_every_difference_is_told() -> None:
    """Unknown, misspelled, doubled, missing and mistyped columns come in one message."""
    stream = pa.schema([("ID", pa.int64()), ("age", pa.string()), ("x", pa.int8()), ("age", pa.int64())])
    detail = mismatch(stream)
    for part in (
        "column 'ID' is not in the table (names are case-sensitive: expected 'id')",
        "column 'age' is utf8, expected int64",
        "column 'x' is not in the table",
        "column 'age' appears twice",
        "required column 'id' (int64) is missing",
    ):
        assert part in detail


def test_a_stream_without_columns_is_refused() -> None:
    """Even where every column is nullable: a batch without columns may claim any number of rows (T14)."""
    nullable = make_table(pa.schema([("a", pa.int64())]))
    assert "no columns" in mismatch(pa.schema([]), nullable)


def test_the_tables_own_schema_is_identical() -> None:
    """Same columns, order and physical types: the wire's bytes can be the log's."""
    assert rows_of(SCHEMA).identical
    assert rows_of(USERS.schema).identical


@pytest.mark.parametrize(
    "stream",
    [
        pa.schema([*SCHEMA][::-1]),
        SCHEMA.remove(1),
        SCHEMA.set(1, pa.field("age", pa.int8())),
        SCHEMA.set(2, pa.field("name", pa.large_string())),
        SCHEMA.set(2, pa.field("name", pa.dictionary(pa.int32(), pa.string()))),
        SCHEMA.set(3, pa.field("at", pa.timestamp("ms"))),
    ],
)
def test_what_needs_a_conversion_is_taken_but_not_identical(stream: pa.Schema) -> None:
    """Order, fewer nullable columns and lossless widening are accepted on the slow path."""
    assert not rows_of(stream).identical


def test_nullability_of_the_stream_does_not_matter() -> None:
    """Values decide: a nullable column without nulls may go into a required one, and the other way round."""
    stream = pa.schema([field.with_nullable(not field.nullable) for field in SCHEMA])
    assert rows_of(stream).identical


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (pa.int32(), pa.int64()),
        (pa.uint32(), pa.int64()),
        (pa.uint64(), pa.decimal128(20, 0)),
        (pa.float16(), pa.float64()),
        (pa.float32(), pa.float64()),
        (pa.decimal128(5, 2), pa.decimal128(9, 4)),
        (pa.decimal256(5, 2), pa.decimal128(9, 2)),
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.dictionary(pa.int8(), pa.large_string()), pa.string()),
        (pa.dictionary(pa.int8(), pa.int16()), pa.int64()),
        (pa.binary(16), pa.uuid()),
        (pa.uuid(), pa.binary(16)),
        (pa.timestamp("s"), pa.timestamp("us")),
        (pa.timestamp("ns", "Asia/Tokyo"), pa.timestamp("us", "UTC")),
        (pa.date64(), pa.date32()),
        (pa.time32("ms"), pa.time64("us")),
        (pa.null(), pa.list_(pa.int64())),
        (pa.large_list(pa.int8()), pa.list_(pa.int64())),
        (pa.list_view(pa.int8()), pa.list_(pa.int64())),
        (pa.large_list_view(pa.string_view()), pa.list_(pa.string())),
        (pa.run_end_encoded(pa.int16(), pa.string_view()), pa.string()),
        (pa.run_end_encoded(pa.int64(), pa.list_view(pa.int8())), pa.list_(pa.int64())),
        (pa.int64(), pa.float64()),
        (pa.int32(), pa.float64()),
        (pa.uint32(), pa.float64()),
        (pa.int16(), pa.float32()),
        (pa.float64(), pa.int64()),
        (pa.float32(), pa.int64()),
        (pa.float16(), pa.int64()),
        (pa.dictionary(pa.int8(), pa.float64()), pa.int64()),
        (pa.list_(pa.string_view(), 2), pa.list_(pa.string())),
        (pa.struct([("b", pa.int8())]), pa.struct([("a", pa.string()), ("b", pa.int64())])),
        (pa.map_(pa.large_string(), pa.int8()), pa.map_(pa.string(), pa.int64())),
    ],
)
def test_what_widens_is_taken(source: pa.DataType, target: pa.DataType) -> None:
    """Each type whose canonical form fits the table's is accepted, nested or not."""
    table = make_table(pa.schema([("c", target)]))
    assert not rows_of(pa.schema([("c", source)]), table).identical or same_bytes(source, target)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (pa.int64(), pa.int32(), "column 'c' is int64, expected int32"),
        (pa.float64(), pa.float32(), "column 'c' is float64, expected float32"),
        (pa.timestamp("us"), pa.timestamp("us", "UTC"), "is timestamp[us], expected timestamp[us, tz=UTC]"),
        (pa.timestamp("us", "UTC"), pa.timestamp("us"), "is timestamp[us, tz=UTC], expected timestamp[us]"),
        (pa.int64(), pa.string(), "is int64, expected utf8"),
        (pa.duration("s"), pa.int64(), "is duration[s], expected int64"),
        (pa.list_view(pa.string()), pa.list_(pa.int64()), "column 'c.element' is utf8, expected int64"),
        (pa.run_end_encoded(pa.int32(), pa.string()), pa.int64(), "column 'c' is utf8, expected int64"),
        (pa.uint64(), pa.float64(), "column 'c' is uint64, expected float64"),
        (pa.int64(), pa.float32(), "column 'c' is int64, expected float32"),
        (pa.int32(), pa.float32(), "column 'c' is int32, expected float32"),
        (pa.float64(), pa.int32(), "column 'c' is float64, expected int32"),
        (pa.float64(), pa.decimal128(20, 0), "column 'c' is float64, expected decimal128(20, 0)"),
        (pa.timestamp("us", "Mars/Base"), pa.timestamp("us", "UTC"), "unknown time zone 'Mars/Base'"),
        (pa.dictionary(pa.int8(), pa.string()), pa.int64(), "column 'c' is dictionary<values=utf8"),
        (pa.dictionary(pa.int8(), pa.list_(pa.int64())), pa.list_(pa.int64()), "expected list<int64>"),
        (pa.list_(pa.string()), pa.list_(pa.int64()), "column 'c.element' is utf8, expected int64"),
        (pa.list_(pa.int64()), pa.int64(), "is list<int64>, expected int64"),
        (pa.int64(), pa.list_(pa.int64()), "is int64, expected list<int64>"),
        (pa.map_(pa.int64(), pa.int64()), pa.map_(pa.string(), pa.int64()), "'c.key' is int64, expected utf8"),
        (pa.struct([("b", pa.int64())]), pa.struct([("a", pa.int64())]), "column 'c.b' is not in the table"),
        (
            pa.struct([("b", pa.int64())]),
            pa.struct([pa.field("a", pa.int64(), nullable=False), ("b", pa.int64())]),
            "required column 'c.a' (int64) is missing",
        ),
        (pa.struct([("a", pa.int8()), ("a", pa.int8())]), pa.struct([("a", pa.int64())]), "'c.a' appears twice"),
    ],
)  # fmt: skip
def test_what_does_not_widen_is_a_mismatch(source: pa.DataType, target: pa.DataType, message: str) -> None:
    """A type that could lose a value is refused, naming the path and both types."""
    table = make_table(pa.schema([("c", target)]))
    assert message in mismatch(pa.schema([("c", source)]), table)


def test_a_null_column_goes_into_nullable_columns_only() -> None:
    """Arrow's null type holds nothing but nulls."""
    stream = SCHEMA.set(0, pa.field("id", pa.null()))
    assert "column 'id' is null, expected int64" in mismatch(stream)


def test_an_upsert_needs_every_column_unless_the_table_says_otherwise() -> None:
    """An upsert replaces the whole row: what is missing would silently become null (protocol 6)."""
    assert "'arka.partial': 'null'" in for_deletes_alone(SCHEMA.remove(1))
    assert not rows_of(SCHEMA.remove(1), PARTIAL).identical


def test_a_stream_of_keys_alone_is_for_deletes() -> None:
    """Exactly the key columns are a legal schema; only deletes may then be sent (protocol 3)."""
    keys = pa.schema([SCHEMA.field(0)])
    assert plan_conformance(keys, KEYED).conformance(Operation.DELETE).identical
    assert "'age' (int64) is missing" in for_deletes_alone(keys)
    assert not rows_of(keys, PARTIAL).identical
    assert "'name'" in for_deletes_alone(pa.schema([SCHEMA.field(0), SCHEMA.field(1)]))


ODD = pa.dense_union([pa.field("a", pa.int8()), pa.field("b", pa.string())])


@pytest.mark.parametrize(
    "others",
    [
        [("age", pa.string())],
        [("unknown", pa.int8()), ("AGE", pa.int64())],
        [("age", pa.int64()), ("age", pa.int64())],
        [("name", pa.duration("s")), ("at", ODD), ("x", pa.sparse_union([pa.field("a", pa.int8())]))],
        [("x", pa.month_day_nano_interval()), ("name", pa.dictionary(pa.int8(), pa.list_(pa.int8())))],
        [("x", pa.decimal256(70, 2)), ("y", pa.null()), ("", pa.struct([])), ("at", pa.timestamp("us", "Mars/Base"))],
    ],
)
def test_a_delete_does_not_look_at_other_columns(others: list[tuple[str, pa.DataType]]) -> None:
    """Whatever their names and types, and wherever they stand: the stream is one for deletes alone (protocol 3)."""
    for stream in (pa.schema([("id", pa.int32()), *others]), pa.schema([*others, ("id", pa.int32())])):
        for_deletes_alone(stream)
        assert "id" not in mismatch(stream, USERS) or "required" in mismatch(stream, USERS)


@pytest.mark.parametrize("key", [("id", pa.string()), ("ID", pa.int64()), ("id", pa.duration("s"))])
def test_a_stream_whose_keys_do_not_fit_is_for_nothing(key: tuple[str, pa.DataType]) -> None:
    """Also where its other columns fit."""
    mismatch(pa.schema([key, *list(SCHEMA)[1:]]), KEYED)


def test_a_key_that_appears_twice_is_for_nothing() -> None:
    """Nobody can say which of the two is meant."""
    assert "column 'id' appears twice" in mismatch(pa.schema([SCHEMA.field(0), *SCHEMA]), KEYED)


def test_a_delete_keeps_the_keys_in_their_order() -> None:
    """Whatever a stream has beside them: the log holds nothing of a delete that is not its key."""
    schema = pa.schema([pa.field("a", pa.int64(), nullable=False), ("x", pa.string()), ("b", pa.string())])
    table = make_table(schema, key_columns=["b", "a"])
    batch = pa.record_batch({"a": pa.array([1], pa.int32()), "x": ["gone"], "b": ["k"]})
    for columns in (["a", "x", "b"], ["a", "b"], ["b", "a"]):
        sent = batch.select(columns)
        made = plan_conformance(sent.schema, table).conformance(Operation.DELETE).apply(sent)
        assert made.schema == table.key_schema()
        assert made.to_pylist() == [{"b": "k", "a": 1}]


def test_a_table_without_keys_takes_no_deletes() -> None:
    """Nothing could be found again."""
    with pytest.raises(InvalidRequest, match="append-only"):
        plan_conformance(SCHEMA, USERS).conformance(Operation.DELETE)


DAY = datetime.date(2024, 2, 29)
NOW = datetime.datetime(2024, 2, 29, 12, 30)


@pytest.mark.parametrize(
    ("array", "target"),
    [
        (pa.array([1, None], pa.int8()), pa.int64()),
        (pa.array([2**64 - 1, None], pa.uint64()), pa.decimal128(20, 0)),
        (pa.array([1.5, None], pa.float16()), pa.float64()),
        (pa.array([Decimal("1.25"), None], pa.decimal64(9, 2)), pa.decimal128(12, 4)),
        (pa.array(["a", None], pa.string_view()), pa.string()),
        (pa.array([b"a", None], pa.binary_view()), pa.binary()),
        (pa.array(["a", None, "a"]).dictionary_encode(), pa.string()),
        (pa.array([NOW, None], pa.timestamp("s", "Asia/Tokyo")), pa.timestamp("us", "UTC")),
        (pa.array([DAY, None], pa.date64()), pa.date32()),
        (pa.array([datetime.time(1, 2), None], pa.time32("s")), pa.time64("us")),
        (pa.array([[1], None, []], pa.large_list(pa.int8())), pa.list_(pa.int64())),
        (pa.array([[1, 2], None, [3, None]], pa.list_(pa.int8(), 2)), pa.list_(pa.int64())),
        (pa.array([[("k", 1)], None, []], pa.map_(pa.string_view(), pa.int8())), pa.map_(pa.string(), pa.int32())),
        (
            pa.array([[{"a": 1}, None], None], pa.list_(pa.struct([("a", pa.int8())]))),
            pa.list_(pa.struct([("a", pa.int64())])),
        ),
        (pa.nulls(2), pa.map_(pa.string(), pa.int64())),
    ],
)  # fmt: skip
def test_conversion_keeps_every_value(array: pa.Array, target: pa.DataType) -> None:
    """What was sent is what is stored, in whole and in slices."""
    table = make_table(pa.schema([("c", target)]))
    stream = pa.schema([("c", array.type)])
    conformance = rows_of(stream, table)
    for part in (array, array.slice(1), array.slice(0, 1), array.slice(0, 0)):
        made = conformance.apply(pa.record_batch([part], schema=stream))
        made.validate(full=True)
        assert made.schema == table.schema
        expected = part.to_pylist()
        found = made.column(0).to_pylist()
        if pa.types.is_timestamp(target):
            assert [it and it.timestamp() for it in found] == [it and it.timestamp() for it in expected]
        else:
            assert found == expected


def test_struct_fields_are_matched_by_name() -> None:
    """Order and absent nullable fields inside a struct do not matter either."""
    target = pa.struct([("a", pa.string()), ("b", pa.int64()), ("c", pa.date32())])
    array = pa.array([{"c": DAY, "a": "x"}, None], pa.struct([("c", pa.date64()), ("a", pa.large_string())]))
    conformance = rows_of(pa.schema([("s", array.type)]), make_table(pa.schema([("s", target)])))
    made = conformance.apply(pa.record_batch([array], names=["s"]))
    assert made.column(0).to_pylist() == [{"a": "x", "b": None, "c": DAY}, None]


@pytest.mark.parametrize(
    ("array", "target", "message"),
    [
        (pa.array([2**62]).view(pa.timestamp("s")), pa.timestamp("us"), "out of bounds"),
        (pa.array([1001]).view(pa.timestamp("ns")), pa.timestamp("us"), "would lose data"),
        (pa.array([86_400_001]).view(pa.date64()), pa.date32(), "would lose data"),
        (pa.array([[1001]], pa.list_(pa.timestamp("ns"))), pa.list_(pa.timestamp("us")), "would lose data"),
    ],
)
def test_a_value_that_does_not_fit_is_named(array: pa.Array, target: pa.DataType, message: str) -> None:
    """Casts are safe: a value that would change makes the batch invalid, and says in which column."""
    table = make_table(pa.schema([("c", target)]))
    conformance = rows_of(pa.schema([("c", array.type)]), table)
    with pytest.raises(InvalidRequest, match="column 'c'") as caught:
        conformance.apply(pa.record_batch([array], names=["c"]))
    assert caught.value.code is ErrorCode.INVALID_BATCH
    assert message in caught.value.detail


def test_garbage_under_a_null_parent_is_no_value() -> None:
    """A field below a null struct is not cast: what stands there may be anything."""
    wild = pa.array([5000, 2**62 + 1]).view(pa.timestamp("ns"))
    array = pa.StructArray.from_arrays([wild], names=["t"], mask=pa.array([False, True]))
    target = pa.struct([("t", pa.timestamp("us"))])
    conformance = rows_of(pa.schema([("s", array.type)]), make_table(pa.schema([("s", target)])))
    made = conformance.apply(pa.record_batch([array], names=["s"]))
    assert made.column(0).to_pylist()[1] is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (pa.int64(), pa.int64(), True),
        (pa.int32(), pa.date32(), False),
        (pa.timestamp("us", "UTC"), pa.timestamp("us", "Asia/Tokyo"), True),
        (pa.timestamp("us", "UTC"), pa.timestamp("us"), False),
        (pa.binary(16), pa.uuid(), True),
        (pa.list_(pa.field("item", pa.uuid())), pa.list_(pa.field("x", pa.binary(16), nullable=False)), True),
        (pa.list_(pa.int64()), pa.large_list(pa.int64()), False),
        (pa.map_(pa.string(), pa.uuid()), pa.map_(pa.string(), pa.binary(16)), True),
        (pa.struct([("a", pa.uuid())]), pa.struct([("a", pa.binary(16))]), True),
        (pa.struct([("a", pa.uuid())]), pa.struct([("b", pa.binary(16))]), False),
    ],
)
def test_same_bytes(one: pa.DataType, other: pa.DataType, same: bool) -> None:
    """Only types with the same buffers for the same values may skip the conversion."""
    assert same_bytes(one, other) is same
    assert same_bytes(other, one) is same


WHOLE = 2**53
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-WHOLE - 2, -WHOLE + 2),
    st.integers(WHOLE - 2, WHOLE + 2),
    st.integers(-3, 3),
)
FLOATS = st.one_of(st.floats(), NUMBERS.map(float), st.sampled_from([-0.0, 0.5, float("nan"), float("inf"), 2.0**63]))


def exact(value: float | None) -> bool:
    """The contract's words, in Python (protocol 6)."""
    return value is None or (abs(value) <= WHOLE and value == int(value))


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([(pa.int64(), pa.float64()), (pa.float64(), pa.int64())]), st.booleans())
def test_whole_numbers_go_both_ways(data: st.DataObject, types: tuple[pa.DataType, pa.DataType], nested: bool) -> None:
    """Where every value is exact the batch is what Arrow's own cast makes of it; else the first other row is named."""
    source, target = types
    values = data.draw(st.lists(st.none() | (NUMBERS if source == pa.int64() else FLOATS), max_size=6))
    array, wanted = pa.array(values, source), target
    if nested:
        array = pa.ListArray.from_arrays(range(len(values) + 1), array)
        wanted = pa.list_(target)
    conformance = rows_of(pa.schema([("c", array.type)]), make_table(pa.schema([("c", wanted)])))
    batch = pa.record_batch([array], names=["c"])
    first = next((row for row, value in enumerate(values) if not exact(value)), None)
    if first is None:
        assert conformance.apply(batch).column(0).to_pylist() == array.cast(wanted).to_pylist()
        return
    with pytest.raises(InvalidRequest, match=rf"column 'c': row {first} holds ") as caught:
        conformance.apply(batch)
    assert caught.value.code is ErrorCode.INVALID_BATCH
    assert "expected a whole number from -2^53 to 2^53" in caught.value.detail


@pytest.mark.parametrize(
    ("array", "target", "row"),
    [
        (pa.array([1.0, None, 2.5], pa.float32()), pa.int64(), 2),
        (pa.array([1.0, float("nan")], pa.float16()), pa.int64(), 1),
        (pa.array([[1.0], [], None, [2.0, 3.0, 0.5]]), pa.list_(pa.int64()), 3),
        (pa.array([[[1.0]], [[], [2.0, 1e300]]]), pa.list_(pa.list_(pa.int64())), 1),
        (pa.array([{"x": 1.0}, None, {"x": 1.5}]), pa.struct([("x", pa.int64())]), 2),
        (pa.array([[("k", 2**53)], [("k", 2**53 + 1)]], pa.map_(pa.string(), pa.int64())),
         pa.map_(pa.string(), pa.float64()), 1),
        (pa.array([1.0, 1.5, 1.0]).dictionary_encode(), pa.int64(), 1),
        (pa.array([0, 0, 0, 1001]).view(pa.timestamp("ns")), pa.timestamp("us"), 3),
        (pa.array([0, 5000, 1]).view(pa.time64("ns")), pa.time64("us"), 2),
        (pa.array([0, 999]).view(pa.timestamp("ns", "Asia/Tokyo")), pa.timestamp("us", "UTC"), 1),
        (pa.array([[0], [0, 1]], pa.list_(pa.timestamp("ns"))), pa.list_(pa.timestamp("us")), 1),
    ],
)  # fmt: skip
def test_the_first_row_that_does_not_fit_is_named(array: pa.Array, target: pa.DataType, row: int) -> None:
    """Nested or not, and never cut to what would fit."""
    conformance = rows_of(pa.schema([("c", array.type)]), make_table(pa.schema([("c", target)])))
    with pytest.raises(InvalidRequest, match=rf"column 'c': row {row} holds "):
        conformance.apply(pa.record_batch([array], names=["c"]))


def test_what_no_row_names_need_not_fit() -> None:
    """A dictionary may hold values that the table cannot, and a null parent may hide some."""
    for values, target in (
        (pa.array([1.0, 1.5, 2.0]), pa.int64()),
        (pa.array([1000, 1, 2000]).view(pa.timestamp("ns")), pa.timestamp("us")),
    ):
        array = pa.DictionaryArray.from_arrays(pa.array([2, None, 0]), values)
        conformance = rows_of(pa.schema([("c", array.type)]), make_table(pa.schema([("c", target)])))
        made = conformance.apply(pa.record_batch([array], names=["c"]))
        assert made.column(0).to_pylist() == values.take(pa.array([2, None, 0])).cast(target).to_pylist()
    hidden = pa.StructArray.from_arrays([pa.array([1.5, 2.0])], names=["x"], mask=pa.array([True, False]))
    table = make_table(pa.schema([("c", pa.struct([("x", pa.int64())]))]))
    made = rows_of(pa.schema([("c", hidden.type)]), table).apply(pa.record_batch([hidden], names=["c"]))
    assert made.column(0).to_pylist() == [None, {"x": 2}]


def test_nanoseconds_that_are_whole_microseconds_are_taken() -> None:
    """A table of microseconds takes a stream of nanoseconds where nothing is cut off."""
    for source, target in ((pa.timestamp("ns"), pa.timestamp("us")), (pa.time64("ns"), pa.time64("us"))):
        conformance = rows_of(pa.schema([("c", source)]), make_table(pa.schema([("c", target)])))
        made = conformance.apply(pa.record_batch([pa.array([1000, None, 0]).view(source)], names=["c"]))
        assert made.column(0).view(pa.int64()).to_pylist() == [1, None, 0]
