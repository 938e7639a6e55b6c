"""Dictionaries cost what their bytes say, however they are sent (T23)."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from arka._core import ipc
from arka.errors import ErrorCode, InvalidRequest, quote
from arka.flight import dictionaries
from arka.flight.convert import Converter, DictionaryValues, invalid_batch
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.options import Limits
from arka.testing.ipcstreams import StreamMessage, make_table, write_stream

Feed = Callable[[BatchDecoder, list[StreamMessage]], list[DecodedBatch]]
WORDS = pa.schema([("word", pa.string())])
ENCODED = pa.schema([("word", pa.dictionary(pa.int32(), pa.string()))])


def batch(words: list[str], indices: list[int], schema: pa.Schema = ENCODED) -> pa.RecordBatch:
    type_ = schema.field(0).type
    array = pa.DictionaryArray.from_arrays(pa.array(indices, type_.index_type), pa.array(words, type_.value_type))
    return pa.record_batch([array], schema=schema)


def one_word_deltas(count: int) -> list[StreamMessage]:
    """A stream whose dictionary grows by a word in each message, without batches between them."""
    words: list[str] = []
    batches = []
    for number in range(2):
        words.append(f"{number:04}")
        batches.append(batch(words, [number]))
    schema, first, one, delta, two = write_stream(ENCODED, batches, deltas=True)
    assert ipc.dictionary_batch(delta.header)[1]
    return [schema, first, *[delta] * count, one, two]


def test_small_deltas_are_joined_as_they_come(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of deltas become a few pieces, and each value is copied a few times on the way."""
    copied = 0

    def concat(arrays: list[pa.Array]) -> pa.Array:
        nonlocal copied
        copied += sum(map(len, arrays))
        return pa.concat_arrays(arrays)

    monkeypatch.setattr(dictionaries, "_concat", concat)
    work = []
    for count in (4000, 16_000):
        copied = 0
        stream = one_word_deltas(count)
        decoder = BatchDecoder(make_table(WORDS), Limits())
        feed(decoder, stream[: count + 2])
        assert decoder._dictionaries is not None
        (held,) = decoder._dictionaries._held.values()
        assert len(held.pieces) <= 16
        work.append(copied)
    # Quadratic work would be 16 times as much.
    assert work[1] <= 6 * work[0]
    assert [one.batch.column(0).to_pylist() for one in feed(decoder, stream[count + 2 :])] == [["0000"], ["0001"]]


def test_empty_pieces_are_counted(feed: Feed) -> None:
    """A dictionary without values takes memory too: 10,000 columns have 10,000 of them."""
    schema = pa.schema([(f"c{number}", pa.dictionary(pa.int8(), pa.string())) for number in range(2000)])
    arrays = [pa.DictionaryArray.from_arrays(pa.array([], pa.int8()), pa.array([], pa.string())) for _ in schema]
    stream = write_stream(schema, [pa.record_batch(arrays, schema=schema)])
    table = make_table(pa.schema([(field.name, pa.string()) for field in schema]))
    decoder = BatchDecoder(table, Limits())
    feed(decoder, stream[:-1])
    assert decoder.dictionary_bytes >= 2000 * 512
    decoder.close()
    assert decoder.dictionary_bytes == 0
    decoder = BatchDecoder(table, Limits(dictionary_bytes=64 * 1024))
    with pytest.raises(InvalidRequest) as caught:
        feed(decoder, stream[:-1])
    assert caught.value.code is ErrorCode.TOO_LARGE


def test_large_dictionaries_and_batches_behind_them_need_a_thread(feed: Feed) -> None:
    """Copying, validating and casting a dictionary of megabytes is no work for trio's thread, compressed or not."""
    words = [f"{number:0100}" for number in range(20_000)]
    for compression in (None, "zstd"):
        stream = write_stream(ENCODED, [batch(words, [0]), batch(words, [1])], compression=compression)
        decoder = BatchDecoder(make_table(WORDS), Limits())
        decoder.set_schema(stream[0].header)
        assert decoder.dictionary_work(stream[1]) > 2_000_000
        decoder.add_dictionary(stream[1])
        assert decoder.needs_thread(stream[2])
        decoder.decode(stream[2])
        assert not decoder.needs_thread(stream[3])
    small = write_stream(ENCODED, [batch(["a"], [0])])
    decoder = BatchDecoder(make_table(WORDS), Limits())
    decoder.set_schema(small[0].header)
    assert decoder.dictionary_work(small[1]) == 0


def test_a_dictionary_that_cannot_be_cast_is_cast_once(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each small batch that names it is refused without another look at all its values."""
    encoded = pa.schema([("word", pa.dictionary(pa.int32(), pa.large_string()))])
    words = ["x" * 100_000] * 5
    stream = write_stream(encoded, [batch(words, [0], encoded)] * 4)
    stream = [message for number, message in enumerate(stream) if number < 2 or number % 2 == 0]
    casts = 0
    convert = Converter._cast

    def count(self: Converter, array: pa.Array, step: object) -> pa.Array:
        nonlocal casts
        casts += 1
        return convert(self, array, step)

    monkeypatch.setattr(Converter, "_cast", count)
    decoder = BatchDecoder(make_table(WORDS), Limits(batch_bytes=300_000, dictionary_bytes=2_000_000))
    feed(decoder, stream[:2])
    for message in stream[2:]:
        with pytest.raises(InvalidRequest, match="decodes to more than"):
            decoder.decode(message)
    assert casts == 1


def test_thousands_of_dictionaries_are_counted_without_a_walk(feed: Feed) -> None:
    """The bytes held are a running sum: it is the same after deltas, replacements and joins."""
    encoded = pa.schema([(f"c{number}", pa.dictionary(pa.int8(), pa.string())) for number in range(5)])

    def of(words: list[str]) -> pa.RecordBatch:
        arrays = [pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), pa.array(words)) for _ in encoded]
        return pa.record_batch(arrays, schema=encoded)

    batches = [of(["a"]), of(["a", "b" * 500]), of(["c"]), of(["c", "d", "e" * 9000]), of(["f" * 7])]
    decoder = BatchDecoder(make_table(pa.schema([(field.name, pa.string()) for field in encoded])), Limits())
    for message in write_stream(encoded, batches, deltas=True):
        feed(decoder, [message])
        kept = decoder._dictionaries
        assert kept is not None
        assert kept.held_bytes == sum(held.size for held in kept._held.values())
        assert kept.unjoined_bytes == sum(held.unjoined_bytes for held in kept._held.values())


def test_a_batch_of_nulls_looks_at_no_dictionary() -> None:
    """What no row names is still to be looked at, and counts as the work of the batch that does."""
    words = [f"{number:0100}" for number in range(20_000)]
    indices = pa.DictionaryArray.from_arrays(pa.array([None], pa.int32()), pa.array(words))
    nulls = pa.record_batch([indices], schema=ENCODED)
    stream = write_stream(ENCODED, [nulls, batch(words, [1])])
    decoder = BatchDecoder(make_table(WORDS), Limits())
    decoder.set_schema(stream[0].header)
    decoder.add_dictionary(stream[1])
    decoder.decode(stream[2])
    assert decoder.needs_thread(stream[3])


def test_columns_that_share_a_dictionary_are_refused_by_one_look() -> None:
    """Each names itself."""
    held = DictionaryValues(pa.array([b"\xff"], pa.binary()))
    looks = 0

    def cast(_: pa.Array) -> pa.Array:
        nonlocal looks
        looks += 1
        raise invalid_batch("a", "is not UTF-8")

    for path in ("a", "b", "a"):
        with pytest.raises(InvalidRequest, match=f"column {quote(path)}"):
            held.as_type(pa.string(), path, cast)
    assert looks == 1
