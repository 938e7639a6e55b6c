"""What is accepted can be stored: the Parquet writer, statistics and partitions have nothing to refuse (R17)."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka._core.transforms import parse_transform
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.iceberg.bounds import ColumnMetrics
from arka.iceberg.schema import iceberg_schema
from arka.options import Limits
from arka.records import TableInfo
from arka.testing.ipcstreams import make_table, write_stream

#: Columns of ``COLUMNS`` whose values always have a lower bound.
_BOUNDED = ("i", "l", "b", "s", "x")

Decode = Callable[..., DecodedBatch]
DAY_US = 86_400_000_000
FIRST_DAY, LAST_DAY = -719_162, 2_932_896


def store(table: TableInfo, batch: pa.RecordBatch) -> None:
    """Do what an encoder and a commit do with a batch's values."""
    schema = iceberg_schema(table.schema)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, store_schema=False, store_decimal_as_integer=True) as writer:
        writer.write_batch(batch)
    made = writer.writer.metadata
    if made.num_rows:
        found = ColumnMetrics(schema, {}).of(made)
        # A bound is left out where it cannot be told: of a value that was accepted it can.
        for column, count in found["value_counts"].items():
            if found["null_value_counts"][column] < count and schema.find_column_name(column) in _BOUNDED:
                assert column in found["lower_bounds"]
    for field in table.partition:
        column = batch.column(field.source_id - 1)
        parse_transform(field.transform).apply(column)


def integers(values: list[int | None], type_: pa.DataType) -> pa.Array:
    return pa.array(values, pa.int32() if type_.bit_width == 32 else pa.int64()).view(type_)


def refused(decode: Decode, schema: pa.Schema, array: pa.Array, **table: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode(schema, pa.record_batch([array], names=schema.names), **table)
    assert caught.value.code is ErrorCode.INVALID_BATCH
    return caught.value.detail


@pytest.mark.parametrize(
    ("type_", "least", "greatest"),
    [
        (pa.date32(), FIRST_DAY, LAST_DAY),
        (pa.timestamp("us"), FIRST_DAY * DAY_US, (LAST_DAY + 1) * DAY_US - 1),
        (pa.timestamp("us", "UTC"), FIRST_DAY * DAY_US, (LAST_DAY + 1) * DAY_US - 1),
        (pa.time64("us"), 0, DAY_US - 1),
    ],
)
def test_times_end_where_calendars_do(decode: Decode, type_: pa.DataType, least: int, greatest: int) -> None:
    """Both ends are taken and can be stored; one step further is refused, wherever the value stands."""
    schema = pa.schema([("c", type_)])
    table = make_table(schema)
    for value in (least, greatest, None):
        store(table, decode(schema, pa.record_batch([integers([value, 0], type_)], schema=schema)).batch)
    for value in (least - 1, greatest + 1, -(2 ** (type_.bit_width - 1)), 2 ** (type_.bit_width - 1) - 1):
        assert "column 'c'" in refused(decode, schema, integers([0, None, value], type_))
        assert "column 'c" in refused(
            decode,
            pa.schema([("c", pa.list_(pa.struct([("t", type_)])))]),
            pa.ListArray.from_arrays([0, 1], pa.StructArray.from_arrays([integers([value], type_)], names=["t"])),
        )


def test_times_in_map_keys_are_looked_at(decode: Decode) -> None:
    """A map's keys and values are leaves like any other."""
    far = integers([LAST_DAY + 1], pa.date32())
    for keys, items in ((far, pa.array([1])), (pa.array(["k"]), far)):
        array = pa.MapArray.from_arrays([0, 1], keys, items)
        assert "0001-01-01 to 9999-12-31" in refused(decode, pa.schema([("c", array.type)]), array)


def test_times_that_nobody_sees_do_not_matter(decode: Decode) -> None:
    """What a null parent hides is not written, so it may be anything; the frame stays as it is."""
    far = integers([LAST_DAY + 1, 0], pa.date32())
    array = pa.StructArray.from_arrays([far], names=["d"], mask=pa.array([True, False]))
    schema = pa.schema([("s", array.type)])
    decoded = decode(schema, pa.record_batch([array], schema=schema))
    assert decoded.fast
    store(make_table(schema), decoded.batch)


PERSON = pa.struct([pa.field("x", pa.int64(), nullable=False), ("y", pa.string())])


def test_a_null_struct_hides_its_required_fields(decode: Decode) -> None:
    """A required field under a null struct is no error, and what the Parquet writer sees has a value there."""
    array = pa.StructArray.from_arrays(
        [pa.array([1, None, 3]), pa.array(["a", None, "c"])], fields=list(PERSON), mask=pa.array([False, True, False])
    )
    schema = pa.schema([("s", PERSON)])
    with pytest.raises(pa.ArrowInvalid, match="non-nullable but contains nulls"):
        store(make_table(schema), pa.record_batch([array], schema=make_table(schema).schema))
    decoded = decode(schema, pa.record_batch([array], schema=schema))
    assert not decoded.fast
    assert decoded.batch.to_pydict() == {"s": [{"x": 1, "y": "a"}, None, {"x": 3, "y": "c"}]}
    store(make_table(schema), decoded.batch)


REQUIRED_BELOW = pa.struct(
    [
        pa.field("s", pa.struct([pa.field("u", pa.uuid(), nullable=False)]), nullable=False),
        pa.field("l", pa.list_(pa.int64()), nullable=False),
        pa.field("m", pa.map_(pa.string(), pa.int64()), nullable=False),
        pa.field("t", pa.string(), nullable=False),
        pa.field("b", pa.bool_(), nullable=False),
    ]
)


def test_every_kind_of_required_field_can_be_hidden(decode: Decode) -> None:
    """Structs, lists, maps, text, booleans and uuids below a null struct all get some value."""
    row = {"s": {"u": b"u" * 16}, "l": [1, 2], "m": [("k", 1)], "t": "x", "b": True}
    loose = pa.struct([("s", pa.struct([("u", pa.binary(16))])), *[f.with_nullable(True) for f in REQUIRED_BELOW][1:]])
    array = pa.array([row, None, row, None], loose)
    schema = pa.schema([("outer", REQUIRED_BELOW)])
    decoded = decode(schema, pa.record_batch([array], names=["outer"]))
    assert [it is None for it in decoded.batch.column(0).to_pylist()] == [False, True, False, True]
    assert decoded.batch.column(0)[2].as_py()["m"] == [("k", 1)]
    store(make_table(schema), decoded.batch)


def test_a_seen_null_in_a_nested_required_field_is_refused(decode: Decode) -> None:
    """With its path, in structs, lists and maps."""
    schema = pa.schema([("s", PERSON)])
    array = pa.StructArray.from_arrays([pa.array([None, 1]), pa.array(["a", "b"])], fields=list(PERSON))
    assert "column 's.x': is required but 1" in refused(decode, schema, array)
    element = pa.list_(pa.field("element", pa.int64(), nullable=False))
    assert "column 'l.element'" in refused(decode, pa.schema([("l", element)]), pa.array([[1, None]]))
    value = pa.map_(pa.string(), pa.field("value", pa.int64(), nullable=False))
    sent = pa.array([[("k", None)]], pa.map_(pa.string(), pa.int64()))
    assert "column 'm.value'" in refused(decode, pa.schema([("m", value)]), sent)


def test_null_map_keys_are_refused_before_arrow_sees_them(decode: Decode) -> None:
    """Arrow raises in a constructor for them; here they are an invalid batch like any other."""
    entries = pa.struct([("key", pa.string()), ("value", pa.int64())])
    lists = pa.array([[{"key": None, "value": 1}]], pa.list_(entries))
    batch = pa.record_batch([lists], names=["m"])
    schema = pa.schema([("m", pa.map_(pa.string(), pa.int64()))])
    header = write_stream(schema, [])[0].header
    decoder = BatchDecoder(make_table(schema), Limits())
    decoder.set_schema(header)
    with pytest.raises(InvalidRequest, match="map keys or entries are null"):
        decoder.decode(write_stream(batch.schema, [batch])[1])


@pytest.mark.parametrize("type_", [pa.int32(), pa.int64()])
@pytest.mark.parametrize("width", [1, 3, 10, 2**31 - 1])
def test_truncate_has_a_result_for_each_accepted_integer(decode: Decode, type_: pa.DataType, width: int) -> None:
    """Near the type's least value truncate would leave the type: such rows are refused, the next are not."""
    limit = 2 ** (type_.bit_width - 1)
    least = -(limit // width) * width
    schema = pa.schema([("c", type_)])
    partition = [("c", f"truncate[{width}]")]
    table = make_table(schema, partition=partition)
    values = pa.array([least, limit - 1, None, 0], type_)
    store(table, decode(schema, pa.record_batch([values], schema=schema), partition=partition).batch)
    if least > -limit:
        detail = refused(decode, schema, pa.array([least - 1], type_), partition=partition)
        assert "column 'c'" in detail
        assert "truncate" in detail


def test_truncate_has_a_result_for_each_accepted_decimal(decode: Decode) -> None:
    """The same for decimals."""
    type_ = pa.decimal128(38, 0)
    schema = pa.schema([("c", type_)])
    partition = [("c", "truncate[7]")]
    table = make_table(schema, partition=partition)
    outcomes = set()
    for value in (-(10**38) + 1, -(10**38) + 6, -(10**38) + 20, 0, 10**38 - 1):
        array = pa.Array.from_buffers(type_, 1, [None, pa.py_buffer(value.to_bytes(16, "little", signed=True))])
        try:
            decoded = decode(schema, pa.record_batch([array], schema=schema), partition=partition)
        except InvalidRequest as error:
            outcomes.add(error.code)
        else:
            store(table, decoded.batch)
    assert outcomes <= {ErrorCode.INVALID_BATCH}


def test_a_decimal_over_its_precision_is_refused(decode: Decode) -> None:
    """Arrow's bytes can hold more digits than the type says."""
    type_ = pa.decimal128(5, 2)
    array = pa.Array.from_buffers(type_, 1, [None, pa.py_buffer((10**5).to_bytes(16, "little"))])
    assert "does not fit in precision" in refused(decode, pa.schema([("c", type_)]), array)


COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "i": (pa.int32(), st.integers(-(2**31), 2**31 - 1)),
    "l": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "f": (pa.float32(), st.floats(width=32)),
    "d": (pa.float64(), st.floats()),
    "b": (pa.bool_(), st.booleans()),
    "s": (pa.string(), st.text(st.characters(exclude_categories=("Cs",)), max_size=40)),
    "x": (pa.binary(), st.binary(max_size=40)),
    "f4": (pa.binary(4), st.binary(min_size=4, max_size=4)),
    "u": (pa.uuid(), st.uuids().map(lambda it: it.bytes)),
    "m": (pa.decimal128(9, 2), st.decimals(-9_999_999, 9_999_999, places=2)),
    "w": (pa.decimal128(38, 10), st.decimals(-(10**27), 10**27, places=10)),
    "day": (pa.date32(), st.dates()),
    "time": (pa.time64("us"), st.times()),
    "ts": (pa.timestamp("us"), st.datetimes()),
    "tz": (pa.timestamp("us", "UTC"), st.datetimes(timezones=st.just(datetime.UTC))),
    "list": (pa.list_(pa.int64()), st.lists(st.none() | st.integers(-5, 5), max_size=3)),
    "map": (pa.map_(pa.string(), pa.date32()), st.lists(st.tuples(st.text("ab", max_size=2), st.dates()), max_size=3)),
    "st": (
        pa.struct([("a", pa.timestamp("us")), ("b", pa.string())]),
        st.fixed_dictionaries({"a": st.none() | st.datetimes(), "b": st.text("ab", max_size=3)}),
    ),
}  # fmt: skip


@st.composite
def sent_batches(draw: st.DrawFn) -> pa.RecordBatch:
    names = draw(st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, max_size=5, unique=True))
    rows = draw(st.integers(0, 6))
    columns, fields = [], []
    for name in names:
        type_, values = COLUMNS[name]
        drawn = [draw(st.none() | values) for _ in range(rows)]
        nullable = any(value is None for value in drawn) or draw(st.booleans())
        columns.append(pa.array(drawn, type_))
        fields.append(pa.field(name, type_, nullable=nullable))
    return pa.record_batch(columns, schema=pa.schema(fields))


@given(sent_batches(), st.sampled_from([None, "lz4", "zstd"]))
def test_what_is_sent_is_what_is_stored(batch: pa.RecordBatch, compression: str | None) -> None:
    """Any batch of legal values is accepted, equal to what was sent, and can be stored."""
    table = make_table(batch.schema)
    decoder = BatchDecoder(table, Limits())
    schema, message = write_stream(batch.schema, [batch], compression=compression)
    decoder.set_schema(schema.header)
    decoded = decoder.decode(message)
    assert decoded.fast is (compression is None)
    assert decoded.batch.cast(batch.schema).serialize().equals(batch.serialize())
    store(table, decoded.batch)


NARROWER = {
    pa.int32(): [pa.int8(), pa.uint16(), pa.dictionary(pa.int8(), pa.int32())],
    pa.int64(): [pa.int32(), pa.uint32()],
    pa.float64(): [pa.float32()],
    pa.string(): [pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string())],
    pa.binary(): [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.uint8(), pa.large_binary())],
    pa.timestamp("us"): [pa.timestamp("ms"), pa.timestamp("s"), pa.timestamp("ns")],
    pa.date32(): [pa.date64()],
    pa.time64("us"): [pa.time32("ms"), pa.time64("ns")],
    pa.decimal128(9, 2): [pa.decimal32(9, 2), pa.decimal256(8, 2), pa.decimal128(4, 1)],
}


@given(sent_batches(), st.data())
def test_a_stream_of_other_types_means_the_same(batch: pa.RecordBatch, data: st.DataObject) -> None:
    """Columns in another order, of narrower or encoded types, arrive as the same rows."""
    table = make_table(batch.schema)
    columns: dict[str, pa.Array] = {}
    for name in data.draw(st.permutations(batch.schema.names)):
        column = batch.column(batch.schema.get_field_index(name))
        for other in NARROWER.get(column.type, []):
            try:
                narrow = column.cast(other)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                continue
            if narrow.cast(column.type).equals(column) and data.draw(st.booleans()):
                column = narrow
                break
        columns[name] = column
    sent = pa.record_batch(columns)
    decoder = BatchDecoder(table, Limits())
    for message in write_stream(sent.schema, [sent]):
        match pa.ipc.read_message(pa.py_buffer(message.buffer).slice(128)).type:
            case "schema":
                decoder.set_schema(message.header)
            case "dictionary":
                decoder.add_dictionary(message)
            case _:
                decoded = decoder.decode(message)
    assert decoded.batch.cast(batch.schema).serialize().equals(batch.serialize())
    store(table, decoded.batch)
