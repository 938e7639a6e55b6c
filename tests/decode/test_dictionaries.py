"""Dictionary-encoded streams: with the same result as plain ones, under a limit."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pyarrow as pa
import pytest

from arka._core import ipc
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.canonical import canonical_type
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.options import Limits
from arka.testing.ipcstreams import StreamMessage, make_table, write_stream

WORDS = pa.schema([("word", pa.string())])
ENCODED = pa.schema([("word", pa.dictionary(pa.int32(), pa.string()))])

Feed = Callable[[BatchDecoder, list[StreamMessage]], list[DecodedBatch]]


def batch(words: list[str | None], indices: list[int | None]) -> pa.RecordBatch:
    array = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(words, pa.string()))
    return pa.record_batch([array], schema=ENCODED)


def decoder(limits: Limits | None = None) -> BatchDecoder:
    return BatchDecoder(make_table(WORDS), limits or Limits())


def values(decoded: list[DecodedBatch]) -> list[list[str | None]]:
    return [one.batch.column(0).to_pylist() for one in decoded]


def test_batches_are_decoded_against_the_dictionary_of_their_time(feed: Feed) -> None:
    """A replaced dictionary holds for the batches after it."""
    stream = write_stream(ENCODED, [batch(["a", "b"], [0, 1, None]), batch(["c"], [0, 0])])
    assert values(feed(decoder(), stream)) == [["a", "b", None], ["c", "c"]]


def test_deltas_add_to_a_dictionary(feed: Feed) -> None:
    """A delta's values come behind those that are there."""
    stream = write_stream(ENCODED, [batch(["a"], [0]), batch(["a", "b"], [1, 0]), batch(["a", "b", "c"], [2, 0])],
                          deltas=True)  # fmt: skip
    kinds = [ipc.message_type(message.header) for message in stream]
    assert kinds.count(ipc.DICTIONARY_BATCH) == 3
    flags = [ipc.dictionary_batch(m.header)[1] for m in stream if ipc.message_type(m.header) == 2]
    assert flags == [False, True, True]
    one = decoder()
    assert values(feed(one, stream)) == [["a"], ["b", "a"], ["c", "a"]]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_nested_and_shared_dictionaries(feed: Feed, compression: str | None) -> None:
    """Dictionaries may stand anywhere, of any plain type, compressed or not."""
    encoded = pa.dictionary(pa.int8(), pa.large_string())
    rows = [{"w": ["x", None], "n": 5, "m": [("k", "v")]}, {"w": None, "n": None, "m": None}]
    fields = [("w", pa.list_(encoded)), ("n", pa.dictionary(pa.uint16(), pa.int16())), ("m", pa.map_(encoded, encoded))]
    stream_schema = pa.schema(fields)
    table_schema = pa.schema(
        [("w", pa.list_(pa.string())), ("n", pa.int64()), ("m", pa.map_(pa.string(), pa.string()))]
    )
    sent = pa.record_batch([pa.array([r[n] for r in rows], t) for n, t in fields], schema=stream_schema)
    one = BatchDecoder(make_table(table_schema), Limits())
    (decoded,) = feed(one, write_stream(stream_schema, [sent], compression=compression))
    assert decoded.batch.to_pylist() == rows
    assert not decoded.fast


def test_a_batch_without_its_dictionary_is_invalid() -> None:
    """Unless it has no value at all, which needs none."""
    schema, _, message = write_stream(ENCODED, [batch(["a"], [0])])
    one = decoder()
    one.set_schema(schema.header)
    with pytest.raises(InvalidRequest, match="its dictionary has not been sent") as caught:
        one.decode(message)
    assert caught.value.code is ErrorCode.INVALID_BATCH
    nulls = write_stream(ENCODED, [batch(["a"], [None, None])])[-1]
    assert values([one.decode(nulls)]) == [[None, None]]


@pytest.mark.parametrize("index", [1, -1, 2**31 - 1])
def test_an_index_outside_the_dictionary_is_invalid(feed: Feed, index: int) -> None:
    """Indices are the client's word until they are checked."""
    schema, dictionary, message = write_stream(ENCODED, [batch(["a"], [0, 0, 0, 0])])
    at, _ = ipc.BatchLayout(message.header).buffers[1]
    body = bytearray(message.body)
    struct.pack_into("<i", body, at + 4, index)
    with pytest.raises(InvalidRequest, match="column 'word'") as caught:
        feed(decoder(), [schema, dictionary, StreamMessage.build(message.header, bytes(body))])
    assert caught.value.code is ErrorCode.INVALID_BATCH


def test_a_dictionary_of_no_column_is_refused() -> None:
    """An id that the schema does not have would only take memory."""
    _, dictionary, _ = write_stream(ENCODED, [batch(["a"], [0])])
    one = decoder()
    one.set_schema(write_stream(WORDS, [])[0].header)
    with pytest.raises(InvalidRequest, match="belongs to no column"):
        one.add_dictionary(dictionary)


def test_a_malformed_dictionary_is_refused_and_changes_nothing(feed: Feed) -> None:
    """Cut, padded or with bytes that are not UTF-8: what was there before still stands."""
    schema, dictionary, message = write_stream(ENCODED, [batch(["abc"], [0])])
    one = decoder()
    feed(one, [schema, dictionary])
    broken = dictionary.body.replace(b"abc", b"\xff\xff\xff")
    for header, body in (
        (dictionary.header, dictionary.body[:-8]),
        (dictionary.header, dictionary.body + bytes(8)),
        (dictionary.header[:40], dictionary.body),
        (dictionary.header, broken),
        (message.header, message.body),
    ):
        with pytest.raises(InvalidRequest, match="ictionary"):
            one.add_dictionary(StreamMessage.build(header, body))
    assert values([one.decode(message)]) == [["abc"]]


def test_dictionaries_are_limited_per_stream(feed: Feed) -> None:
    """What a stream may hold is counted before it is decoded; replacing frees, adding does not (T14)."""
    limits = Limits(dictionary_bytes=64 * 1024)
    text = "x" * 40_000
    one = decoder(limits)
    feed(one, write_stream(ENCODED, [batch([text], [0])]))
    held = one.dictionary_bytes
    assert 40_000 <= held <= 64 * 1024
    feed(one, write_stream(ENCODED, [batch([text + "y"], [0])])[1:])
    assert one.dictionary_bytes - held < 128
    stream = write_stream(ENCODED, [batch([text], [0]), batch([text, text], [1])], deltas=True)
    with pytest.raises(InvalidRequest, match=r"limits\.dictionary_bytes") as caught:
        feed(decoder(limits), stream)
    assert caught.value.code is ErrorCode.TOO_LARGE
    one.close()
    assert one.dictionary_bytes == 0


def test_one_dictionary_for_two_types_is_refused() -> None:
    """Two columns may share an id only if it means the same values."""
    schema = pa.schema([("a", pa.dictionary(pa.int8(), pa.string())), ("b", pa.dictionary(pa.int8(), pa.int64()))])
    header = write_stream(schema, [])[0].header
    table = make_table(pa.schema([("a", pa.string()), ("b", pa.int64())]))
    for at in range(len(header) - 8):
        changed = header[:at] + bytes(8) + header[at + 8 :] if header[at] == 1 else header
        if changed == header:
            continue
        try:
            ids = ipc.schema_dictionary_ids(changed)
        except ValueError:
            continue
        if ids == [0, 0]:
            with pytest.raises(InvalidRequest, match=r"types for id 0|is used for"):
                BatchDecoder(table, Limits()).set_schema(changed)
            return
    raise AssertionError("found no place for the id")


_NUMBERS = pa.DictionaryArray.from_arrays(pa.array([2, 0, None, 1], pa.int32()), pa.array([50, 60, 70], pa.int32()))


@pytest.mark.parametrize(
    "column",
    [
        pa.ListArray.from_arrays([0, 2, 4], _NUMBERS),
        pa.LargeListArray.from_arrays([0, 2, 4], _NUMBERS),
        pa.FixedSizeListArray.from_arrays(_NUMBERS, 2),
        pa.ListViewArray.from_arrays(pa.array([1, 0], pa.int32()), pa.array([3, 2], pa.int32()), _NUMBERS),
        pa.StructArray.from_arrays([_NUMBERS], ["n"]),
        pa.MapArray.from_arrays([0, 2, 4], pa.array(["a", "b", "c", "d"]), _NUMBERS),
        pa.ListArray.from_arrays([0, 1, 4], pa.StructArray.from_arrays([_NUMBERS], ["n"])),
        pa.RunEndEncodedArray.from_arrays([1, 2], pa.StructArray.from_arrays([_NUMBERS.slice(0, 2)], ["n"])),
    ],
    ids=lambda column: str(column.type)[:40],
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_indices_below_are_never_taken_for_values(feed: Feed, column: pa.Array, compression: str | None) -> None:
    """A nested dictionary whose indices would fit the table as they are is decoded."""
    sent = pa.record_batch([column], names=["c"])
    table = make_table(pa.schema([("c", canonical_type(column.type))]))
    (decoded,) = feed(BatchDecoder(table, Limits()), write_stream(sent.schema, [sent], compression=compression))
    assert decoded.batch.column(0).to_pylist() == column.to_pylist()
