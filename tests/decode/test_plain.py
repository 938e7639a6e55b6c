"""Arrays that name one value many times: views, list views, runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arka.errors import ErrorCode, InvalidRequest
from arka.flight.canonical import canonical_type
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.flight.plain import plain_array, plain_type, referred_bytes
from arka.options import Limits
from arka.records import Operation
from arka.testing.ipcstreams import make_table, write_stream

Feed = Callable[..., list[DecodedBatch]]
MANY = 2**24


def list_view(offsets: list[int], sizes: list[int], values: pa.Array, *, large: bool = False) -> pa.Array:
    kind, number = (pa.LargeListViewArray, pa.int64()) if large else (pa.ListViewArray, pa.int32())
    return kind.from_arrays(pa.array(offsets, number), pa.array(sizes, number), values)


def runs(ends: list[int], values: pa.Array, type_: pa.DataType | None = None) -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array(ends, type_ or pa.int32()), values)


WORDS = pa.array(["a", None, "a string that no view holds in itself", ""], pa.string_view())
NESTED = pa.StructArray.from_arrays(
    [runs([2, 4], WORDS.slice(1, 2)), list_view([2, 0, 0, 3], [2, 2, 4, 0], WORDS)],
    names=["run", "words"],
    mask=pa.array([False, True, False, False]),
)


@pytest.mark.parametrize(
    "array",
    [
        WORDS,
        pa.array([b"a", None, b"x" * 40], pa.binary_view()),
        list_view([2, 0, 0], [2, 2, 4], pa.array([1, None, 3, 4])),
        list_view([3, 0, 1], [1, 2, 2], WORDS, large=True),
        pa.array([[1], None, []], pa.list_view(pa.int8())),
        runs([2, 5], pa.array([1, None])),
        runs([1, 3, 4], WORDS.slice(0, 3), pa.int16()),
        runs([3], pa.array([[1, 2]], pa.list_view(pa.int64())), pa.int64()),
        NESTED,
        list_view([1, 0, 2], [2, 1, 2], NESTED),
        runs([2, 4, 5], list_view([1, 0, 2], [2, 1, 2], NESTED)),
        pa.ListArray.from_arrays([0, 2, None, 5], runs([2, 5], WORDS.slice(0, 2))),
        pa.LargeListArray.from_arrays([0, 2, None, 4], WORDS),
        pa.FixedSizeListArray.from_arrays(WORDS, 2),
        pa.MapArray.from_arrays([0, 2, 3], pa.array(["a", "b", "c"], pa.string_view()), runs([1, 3], pa.array([1, 2]))),
        WORDS.slice(0, 0),
    ],
    ids=str,
)
def test_a_plain_array_has_the_same_values(array: pa.Array, feed: Feed) -> None:
    """In whole and in slices, as it stands and through a stream, compressed or not."""
    for part in (array, array.slice(1), array.slice(0, 1), array.slice(1, 1), array.slice(0, 0)):
        made = plain_array(part)
        made.validate(full=True)
        assert made.type == plain_type(array.type)
        assert made.to_pylist() == part.to_pylist()
        assert referred_bytes(part, MANY) >= sum(len(str(it)) for it in part.to_pylist() if isinstance(it, str))
    table = make_table(pa.schema([("c", canonical_type(array.type))]))
    for compression in (None, "zstd"):
        batches = [pa.record_batch([part], names=["c"]) for part in (array, array.slice(1), array.slice(0, 1))]
        found = feed(BatchDecoder(table, Limits()), write_stream(batches[0].schema, batches, compression=compression))
        assert [it.batch.column(0).to_pylist() for it in found] == [it.column(0).to_pylist() for it in batches]


def refused(feed: Feed, array: pa.Array, limits: Limits | None = None, *, compression: str | None = None) -> str:
    table = make_table(pa.schema([("c", canonical_type(array.type))]))
    batch = pa.record_batch([array], names=["c"])
    with pytest.raises(InvalidRequest) as caught:
        feed(BatchDecoder(table, limits or Limits()), write_stream(batch.schema, [batch], compression=compression))
    assert caught.value.code is ErrorCode.INVALID_BATCH
    return caught.value.detail


BIG = pa.array(["x" * 2_000_000], pa.string())


@pytest.mark.parametrize(
    "array",
    [
        list_view([0] * 100, [1] * 100, BIG),
        list_view([0] * 100, [1] * 100, BIG, large=True),
        list_view([0] * 10, [10] * 10, list_view([0] * 10, [1] * 10, BIG)),
        runs([100], BIG),
        runs([10], list_view([0], [10], runs([10], BIG))),
        pa.StructArray.from_arrays([runs([100], BIG)], names=["r"]),
        pa.ListArray.from_arrays([0, 100], runs([100], BIG)),
        # What no row names is written out with the rest.
        list_view([0], [0], runs([100], BIG)),
        list_view([0] * 100, [1] * 100, pa.StructArray.from_arrays([BIG], names=["s"])),
        list_view([0] * 100, [1] * 100, pa.array([[BIG[0].as_py()]])),
        list_view([0] * 100, [1] * 100, pa.array([[BIG[0].as_py()]], pa.list_(pa.string(), 1))),
        list_view([0] * 100, [1] * 100, pa.array([[("k", BIG[0].as_py())]], pa.map_(pa.string(), pa.string()))),
        runs([100], BIG.cast(pa.string_view())),
    ],
    ids=lambda it: str(it.type),
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_rows_refer_to_is_bounded(array: pa.Array, compression: str | None, feed: Feed) -> None:
    """A value counts as often as it is named, before anything is validated or written out (T23)."""
    limits = Limits(batch_bytes=50_000_000)
    assert "limits.batch_bytes" in refused(feed, array, limits, compression=compression)


def test_rows_without_bytes_are_bounded(feed: Feed) -> None:
    """Runs make rows of nothing: they count as rows at any depth (T14)."""
    child = runs([5_000_000], pa.nulls(1, pa.int8()))
    array = pa.ListArray.from_arrays([0, 5_000_000], child)
    assert "5000000 rows, at most 1000000 are legal" in refused(feed, array, Limits(batch_rows=1_000_000))


def raw(type_: pa.DataType, length: int, buffers: list[Any], children: list[pa.Array]) -> pa.Array:
    return pa.Array.from_buffers(type_, length, buffers, 0, children=children)


def words32(*numbers: int) -> pa.Buffer:
    return pa.array(numbers, pa.int32()).buffers()[1]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (raw(pa.list_view(pa.int8()), 1, [None, words32(2), words32(2)], [pa.array([1, 2, 3], pa.int8())]), "leaves"),
        (raw(pa.list_view(pa.int8()), 1, [None, words32(-1), words32(1)], [pa.array([1], pa.int8())]), "offset leaves"),
        (raw(pa.list_view(pa.int8()), 1, [None, words32(0), words32(-1)], [pa.array([1], pa.int8())]), "size leaves"),
        (
            raw(
                pa.run_end_encoded(pa.int32(), pa.int8()), 3, [None],
                [pa.array([2, 1, 3], pa.int32()), pa.array([1, 2, 3], pa.int8())],
            ),
            "do not rise",
        ),
        (
            raw(
                pa.run_end_encoded(pa.int32(), pa.int8()), 3, [None],
                [pa.array([2, 2, 3], pa.int32()), pa.array([1, 2, 3], pa.int8())],
            ),
            "do not rise",
        ),
    ],
)  # fmt: skip
def test_what_leads_nowhere_is_an_invalid_batch(array: pa.Array, message: str, feed: Feed) -> None:
    """Offsets, sizes and run ends as a client sent them are trusted in nothing, nested or not."""
    assert message in refused(feed, array)
    refused(feed, pa.StructArray.from_arrays([array], names=["s"]))
    refused(feed, pa.ListArray.from_arrays([0, len(array)], array))


TYPES = st.recursive(
    st.sampled_from([pa.int32(), pa.string(), pa.string_view(), pa.binary_view(), pa.bool_()]),
    lambda below: st.one_of(
        below.map(pa.list_view),
        below.map(pa.large_list_view),
        below.map(pa.list_),
        below.map(lambda it: pa.struct([("x", it)])),
        below.map(lambda it: pa.map_(pa.string_view(), it)),
    ),
    max_leaves=3,
)


def values_of(type_: pa.DataType) -> st.SearchStrategy[Any]:
    types = pa.types
    if types.is_struct(type_):
        made: st.SearchStrategy[Any] = st.fixed_dictionaries({"x": values_of(type_.field(0).type)})
    elif types.is_map(type_):
        made = st.lists(st.tuples(st.text(max_size=20), values_of(type_.item_type)), max_size=2)
    elif types.is_nested(type_):
        made = st.lists(values_of(type_.value_type), max_size=3)
    elif types.is_boolean(type_):
        made = st.booleans()
    elif types.is_int32(type_):
        made = st.integers(-(2**31), 2**31 - 1)
    elif types.is_binary_view(type_):
        made = st.binary(max_size=20)
    else:
        made = st.text(max_size=20)
    return st.none() | made


@settings(max_examples=60, deadline=None)
@given(st.data(), TYPES)
def test_any_nesting_keeps_its_values(data: st.DataObject, type_: pa.DataType) -> None:
    """Arrow's own reading of an array is the oracle, also of parts of it and of runs of it."""
    values = data.draw(st.lists(values_of(type_), min_size=1, max_size=5))
    array = pa.array(values, type_)
    ends = sorted(data.draw(st.sets(st.integers(1, 20), min_size=len(values), max_size=len(values))))
    for whole in (array, runs(ends, array), list_view([0, len(values) - 1], [len(values), 1], array)):
        start = data.draw(st.integers(0, len(whole)))
        part = whole.slice(start, data.draw(st.integers(0, len(whole) - start)))
        made = plain_array(part)
        made.validate(full=True)
        assert made.to_pylist() == part.to_pylist()
        assert referred_bytes(part, MANY) >= 0


def test_a_key_may_come_in_runs_and_views(feed: Feed) -> None:
    """Of an upsert and of a delete."""
    table = make_table(pa.schema([pa.field("k", pa.string(), nullable=False), ("v", pa.int64())]), key_columns=["k"])
    batch = pa.record_batch(
        {"k": runs([2, 3], pa.array(["one", "two"], pa.string_view())), "v": runs([3], pa.array([7.0]))}
    )
    for compression in (None, "lz4"):
        schema, message = write_stream(batch.schema, [batch], compression=compression)
        decoder = BatchDecoder(table, Limits())
        decoder.set_schema(schema.header)
        keys = ["one", "one", "two"]
        assert decoder.decode(message).batch.to_pydict() == {"k": keys, "v": [7, 7, 7]}
        assert decoder.decode(message, Operation.DELETE).batch.to_pydict() == {"k": keys}


def test_a_null_in_runs_is_a_null_key(feed: Feed) -> None:
    """Runs have no validity of their own."""
    table = make_table(pa.schema([pa.field("k", pa.string(), nullable=False)]), key_columns=["k"])
    batch = pa.record_batch({"k": runs([2, 3], pa.array(["one", None]))})
    with pytest.raises(InvalidRequest, match="'k': is required but 1 of its values are null"):
        feed(BatchDecoder(table, Limits()), write_stream(batch.schema, [batch]))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_dictionary_values_may_be_views(compression: str | None, feed: Feed) -> None:
    """And what they refer to is bounded before they are validated, by ``limits.dictionary_bytes``."""
    values = pa.array(["a", "b" * 30], pa.string_view())
    array = pa.DictionaryArray.from_arrays(pa.array([1, 0, None]), values)
    table = make_table(pa.schema([("c", pa.string())]))
    batch = pa.record_batch([array], names=["c"])
    (found,) = feed(BatchDecoder(table, Limits()), write_stream(batch.schema, [batch], compression=compression))
    assert found.batch.column(0).to_pylist() == ["b" * 30, "a", None]
    one = pa.array(["x" * 1_000_000], pa.string_view()).buffers()
    many = pa.Array.from_buffers(
        pa.string_view(), 2000, [None, pa.py_buffer(one[1].to_pybytes()[:16] * 2000), *one[2:]]
    )
    batch = pa.record_batch([pa.DictionaryArray.from_arrays(pa.array([0]), many)], names=["c"])
    with pytest.raises(InvalidRequest, match=r"limits\.dictionary_bytes"):
        feed(BatchDecoder(table, Limits()), write_stream(batch.schema, [batch], compression=compression))


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_string()])
def test_bytes_in_a_nulls_place_are_not_counted(kind: pa.DataType, feed: Feed) -> None:
    """A run of nulls means nothing, however many bytes stand below it (T23)."""
    words = pa.array(["word", "x" * 3_000], kind)
    validity = pa.py_buffer(b"\x01")
    values = pa.Array.from_buffers(kind, 2, [validity, *words.buffers()[1:]], 1)
    sent = pa.record_batch([runs([300, 1_000], values)], names=["c"])
    table = make_table(pa.schema([("c", canonical_type(kind))]))
    (decoded,) = feed(BatchDecoder(table, Limits(batch_bytes=64 * 1024)), write_stream(sent.schema, [sent]))
    assert decoded.batch.column(0).to_pylist() == [*sent.column(0).values.slice(0, 1).to_pylist() * 300, *[None] * 700]
