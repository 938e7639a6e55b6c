"""A batch is split by partition values: every row once, in its order, whatever else is in the batch."""

from __future__ import annotations

import io
import math
import random
from decimal import Decimal
from uuid import UUID

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyiceberg.avro.decoder import new_decoder
from pyiceberg.avro.encoder import BinaryEncoder
from pyiceberg.avro.resolver import construct_reader, construct_writer
from pyiceberg.io.pyarrow import pyarrow_to_schema
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.table.name_mapping import MappedField, NameMapping
from pyiceberg.transforms import parse_transform as iceberg_transform
from pyiceberg.typedef import Record

from arka._core.transforms import Partition, parse_transform, split_batch
from tests.core.oracle_transforms import internal_values, make_array, partition_key, split

TS = pa.timestamp("us")
NAN, OTHER_NAN = float("nan"), -float("nan")

#: Few distinct values for each type, so that rows meet in partitions, and transforms to try on them.
COLUMNS: list[tuple[pa.DataType, list[object], list[str]]] = [
    (pa.bool_(), [True, False], ["identity"]),
    (pa.int32(), [0, 1, -1, 99, -(2**31) + 48], ["identity", "bucket[3]", "truncate[100]"]),
    (pa.int64(), [0, 1, 2**32, 2**62, -5], ["identity", "bucket[2]", "truncate[10]"]),
    (pa.float32(), [0.0, -0.0, 1.5, NAN, OTHER_NAN, math.inf], ["identity"]),
    (pa.float64(), [0.0, -0.0, 1.5, NAN, OTHER_NAN, -math.inf], ["identity"]),
    (
        pa.decimal128(38, 2),
        [Decimal(n).scaleb(-2) for n in (0, 7, -7, 2**64, 2**65)],
        ["identity", "truncate[9]"],
    ),
    (pa.date32(), [0, -1, 17_000, 17_031, 2_932_896], ["identity", "year", "month", "day", "bucket[4]"]),
    (pa.time64("us"), [0, 1, 86_399_999_999], ["identity", "bucket[2]"]),
    (TS, [0, -1, 10**15, 10**15 + 1], ["identity", "year", "month", "day", "hour", "bucket[3]"]),
    (pa.timestamp("us", tz="UTC"), [0, -1, 3 * 10**9], ["identity", "day", "hour"]),
    (pa.timestamp("ns"), [0, -1, 999, 10**18], ["identity", "month", "bucket[5]"]),
    (
        pa.string(),
        ["", "a", "aé", "aé€", "same first 8 bytes", "same first 9 bytes"],
        ["identity", "truncate[2]"],
    ),
    (pa.large_string(), ["", "x", "😀😀", "😀"], ["identity", "truncate[1]", "bucket[3]"]),
    (pa.binary(), [b"", b"\0", b"\0\0", bytes(8), bytes(9)], ["identity", "truncate[1]"]),
    (pa.large_binary(), [b"", b"\0", bytes(16)], ["identity", "truncate[8]"]),
    (pa.binary(3), [b"abc", b"abd"], ["identity", "bucket[3]"]),
    (pa.uuid(), [bytes(16), bytes(15) + b"\1", b"\1" + bytes(15)], ["identity", "bucket[3]"]),
]


def payload(rows: int) -> list[pa.Array]:
    """Return columns that no partition uses: a row number and nested, dictionary and extension types."""
    numbers = list(range(rows))
    return [
        pa.array(numbers, pa.int64()),
        pa.array([[n, None] if n % 3 else None for n in numbers], pa.list_(pa.int32())),
        pa.array([{"a": n, "b": str(n)} if n % 4 else None for n in numbers]).cast(
            pa.struct([("a", pa.int64()), ("b", pa.string())])
        )
        if rows
        else pa.array([], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        pa.array([[(str(n), n)] for n in numbers], pa.map_(pa.string(), pa.int64())),
        pa.array([str(n % 3) for n in numbers], pa.string()).dictionary_encode(),
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([n.to_bytes(16) for n in numbers], pa.binary(16))),
    ]


def batch_of(*arrays: pa.Array) -> pa.RecordBatch:
    """Build a batch of partition columns and payload, with metadata on schema and fields."""
    columns = [*arrays, *payload(len(arrays[0]))]
    fields = [pa.field(f"c{i}", a.type, metadata={"PARQUET:field_id": str(i)}) for i, a in enumerate(columns)]
    return pa.record_batch(columns, pa.schema(fields, metadata={"of": "batch"}))


def keys(values: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(map(partition_key, values))


def check(batch: pa.RecordBatch, fields: list[tuple[int, str]]) -> list[Partition]:
    """Split, and compare with the dict-based oracle, row for row."""
    parts = split_batch(batch, [(column, parse_transform(text)) for column, text in fields])
    columns = [(batch.column(i).type, internal_values(batch.column(i))) for i, _ in fields]
    wanted = split(columns, [text for _, text in fields])
    assert [keys(part.values) for part in parts] == [keys(values) for values, _ in wanted]
    for part, (values, rows) in zip(parts, wanted, strict=True):
        assert [type(value) for value in part.values] == [type(value) for value in values]
        assert part.batch.schema.equals(batch.schema, check_metadata=True)
        part.batch.validate(full=True)
        taken = batch.take(pa.array(rows, pa.int64()))
        assert repr(part.batch.to_pylist()) == repr(taken.to_pylist())
    return parts


@given(st.data())
def test_split_equals_the_oracle(data):
    """Any fields on any columns, nulls, slices: the same partitions, values and rows as a dict would give."""
    rows = data.draw(st.integers(1, 60))
    chosen = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3))
    arrays, fields = [], []
    for index, (kind, values, texts) in enumerate(chosen):
        element = st.sampled_from(values)
        if data.draw(st.booleans()):
            element |= st.none()
        arrays.append(make_array(kind, data.draw(st.lists(element, min_size=rows, max_size=rows))))
        fields.append((index, data.draw(st.sampled_from(texts))))
        if data.draw(st.booleans()):
            fields.append((index, data.draw(st.sampled_from(texts))))
    before = data.draw(st.integers(0, rows - 1))
    check(batch_of(*arrays).slice(before, data.draw(st.integers(1, rows - before))), fields)


@pytest.mark.parametrize(("kind", "values", "texts"), COLUMNS)
def test_each_type_over_many_blocks(kind, values, texts):
    """Groups hold across the blocks that rows are handled in, with nulls anywhere."""
    rng = random.Random(7)
    array = make_array(kind, rng.choices([*values, None], k=3_000)).slice(3)
    for text in texts:
        check(batch_of(array), [(0, text)])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1023, 1024, 1025, 5_000])
@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.binary(16), pa.uuid()])
def test_as_many_partitions_as_rows(count, kind):
    """The table grows as it has to; each row may be a partition of its own."""
    rng = random.Random(count)
    numbers = rng.sample(range(10**9), count)
    if kind == pa.int64():
        values: list[object] = [number << 32 for number in numbers]
    elif kind == pa.string():
        values = [f"{number}" for number in numbers]
    else:
        values = [number.to_bytes(16) for number in numbers]
    array = make_array(kind, values * 2)
    numbered = pa.array(range(2 * count))
    parts = split_batch(pa.record_batch([array, numbered], ["a", "b"]), [(0, parse_transform("identity"))])
    assert [part.values for part in parts] == [(value,) for value in values]
    assert [part.batch.column(1).to_pylist() for part in parts] == [[row, row + count] for row in range(count)]


def test_one_partition_is_the_batch_itself():
    """Nothing is copied when all rows share a partition."""
    batch = batch_of(pa.array([5, 5, 5]))
    [part] = split_batch(batch, [(0, parse_transform("identity"))])
    assert part.batch is batch
    assert part == Partition((5,), batch)
    assert split_batch(batch, []) == [Partition((), batch)]
    assert split_batch(batch, [])[0].batch is batch


def test_runs_are_slices():
    """Rows that lie together already, as rows in time do, are not copied."""
    batch = batch_of(pa.array([1, 1, 3, 3, 3, 2]))
    parts = check(batch, [(0, "identity")])
    assert [part.values for part in parts] == [(1,), (3,), (2,)]
    address = batch.column(0).buffers()[1].address
    assert {part.batch.column(0).buffers()[1].address for part in parts} == {address}
    assert [part.batch.column(0).offset for part in parts] == [0, 2, 5]


def test_no_rows():
    """An empty batch has no partitions."""
    batch = batch_of(pa.array([], pa.int64()))
    assert split_batch(batch, [(0, parse_transform("identity"))]) == []
    assert split_batch(batch, []) == []


def test_null_zero_and_empty_are_three():
    """Null is a partition of its own, apart from zero, false and the empty string."""
    for kind, zero in ((pa.int32(), 0), (pa.bool_(), False), (pa.string(), ""), (pa.uuid(), bytes(16))):
        parts = check(batch_of(make_array(kind, [None, zero, None, zero])), [(0, "identity")])
        assert [part.values for part in parts] == [(None,), (zero,)]
    both = make_array(pa.int32(), [None, 0, None, 0]), make_array(pa.int32(), [0, None, None, 0])
    assert len(check(batch_of(*both), [(0, "identity"), (1, "identity")])) == 4


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_floats(kind):
    """All NaN are one partition, -0.0 and 0.0 are two, and NaN finds its like in a dict."""
    array = pa.array([0.0, NAN, -0.0, OTHER_NAN, 0.0, None], kind)
    parts = check(batch_of(array), [(0, "identity")])
    assert [repr(part.values[0]) for part in parts] == ["0.0", "nan", "-0.0", "None"]
    again = split_batch(batch_of(array), [(0, parse_transform("identity"))])
    assert {parts[1].values: 1}[again[1].values] == 1


def test_equal_numbers_of_two_fields_do_not_mix():
    """A tuple is more than its parts: (1, 2) is not (2, 1)."""
    left, right = pa.array([1, 2, 1, 2, 3]), pa.array([2, 1, 2, 2, 3])
    parts = check(batch_of(left, right), [(0, "identity"), (1, "identity")])
    assert [part.values for part in parts] == [(1, 2), (2, 1), (2, 2), (3, 3)]


def test_fields_in_any_order_on_one_column():
    """Values stand in the fields' order, and one column may serve several fields."""
    array = make_array(TS, [0, 3_600_000_000, 86_400_000_000])
    parts = check(batch_of(array), [(0, "hour"), (0, "day"), (0, "year")])
    assert [part.values for part in parts] == [(0, 0, 0), (1, 0, 0), (24, 1, 0)]


def test_refusals():
    """What cannot be split says why; nothing is half done."""
    batch = batch_of(pa.array([1.5, 2.5]), make_array(TS, [0, 2**63 - 1]), pa.array([0, -(2**31)], pa.int32()))
    with pytest.raises(ValueError, match=r"bucket\[3\] does not take double"):
        split_batch(batch, [(0, parse_transform("bucket[3]"))])
    with pytest.raises(ValueError, match=r"hour has no result for the timestamp\[us\] in row 1"):
        split_batch(batch, [(1, parse_transform("day")), (1, parse_transform("hour"))])
    with pytest.raises(ValueError, match=r"truncate\[10\] has no result for the int32 in row 1"):
        split_batch(batch, [(2, parse_transform("truncate[10]"))])
    with pytest.raises(IndexError):
        split_batch(batch, [(99, parse_transform("identity"))])
    with pytest.raises(TypeError):
        split_batch(batch, [(0, "identity")])
    # A null whose bytes are out of range is still a null.
    bitmap = pa.py_buffer(b"\x01")
    nulled = pa.Array.from_buffers(pa.int32(), 2, [bitmap, batch.column(2).buffers()[1]])
    assert [part.values for part in check(batch_of(nulled), [(0, "truncate[10]")])] == [(0,), (None,)]


@pytest.mark.parametrize(("kind", "values", "texts"), COLUMNS)
def test_values_are_what_manifests_hold(kind, values, texts):
    """Pyiceberg's manifest encoder takes each value and reads the same one back."""
    if kind == pa.timestamp("ns"):
        kind = TS
    elif kind == pa.binary(3):
        values = [b"abc", b"xyz"]
    schema = pyarrow_to_schema(pa.schema([pa.field("a", kind)]), NameMapping([MappedField(field_id=1, names=["a"])]))
    for text in texts:
        spec = PartitionSpec(PartitionField(1, 1000, iceberg_transform(text), "p"))
        record_type = spec.partition_type(schema)
        writer, reader = construct_writer(record_type), construct_reader(record_type)
        for part in split_batch(batch_of(make_array(kind, [*values, None])), [(0, parse_transform(text))]):
            stream = io.BytesIO()
            writer.write(BinaryEncoder(stream), Record(*part.values))
            found = reader.read(new_decoder(stream.getvalue()))
            back = tuple(value.bytes if isinstance(value, UUID) else value for value in found._data)
            assert keys(back) == keys(part.values)
