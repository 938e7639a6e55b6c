"""Small messages that would become large: refused before they do (T14)."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable

import pyarrow as pa
import pytest

from arka._core import ipc
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.options import Limits
from arka.testing.ipcstreams import StreamMessage, make_table, write_stream

MIB = 1024 * 1024
TEXT = pa.schema([("text", pa.string())])
Feed = Callable[[BatchDecoder, list[StreamMessage]], list[DecodedBatch]]


def refuse(feed: Feed, table: pa.Schema, stream: list[StreamMessage], limits: Limits | None = None) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest) as caught:
        feed(BatchDecoder(make_table(table), limits or Limits()), stream)
    assert caught.value.code in (ErrorCode.INVALID_BATCH, ErrorCode.TOO_LARGE)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # What is decoded piece by piece stops at limits.batch_bytes, 128 MiB; ru_maxrss counts KiB.
    assert grown < 160 * 1024, f"{grown} KiB were allocated before the refusal"
    return caught.value.detail


def test_16_kb_of_zstd_do_not_become_512_mib(feed: Feed) -> None:
    """The length prefixes of compressed buffers are summed before anything is decompressed."""
    schema = pa.schema([("a", pa.int64())])
    zeros = pa.Array.from_buffers(pa.int64(), 64 * MIB, [None, pa.py_buffer(bytes(512 * MIB))])
    stream = write_stream(schema, [pa.record_batch([zeros], schema=schema)], compression="zstd")
    assert len(stream[1].body) < 32 * 1024
    del zeros
    detail = refuse(feed, schema, stream, Limits(batch_rows=2**27))
    assert "decompresses to 536870912 bytes" in detail


def test_1_mb_of_dictionary_does_not_become_2_gib(feed: Feed) -> None:
    """The decoded size of indices is known before they are taken."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 1_000_000])
    batch = pa.record_batch([words], names=["text"])
    assert "decodes to more than" in refuse(feed, TEXT, write_stream(batch.schema, [batch]))


def test_a_nested_dictionary_is_no_way_around(feed: Feed) -> None:
    """Nor in a list of structs."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 1_000_000])
    entries = pa.StructArray.from_arrays([words], names=["w"])
    lists = pa.ListArray.from_arrays([0, 2000], entries)
    batch = pa.record_batch([lists], names=["l"])
    table = pa.schema([("l", pa.list_(pa.struct([("w", pa.string())])))])
    assert "column 'l.element.w'" in refuse(feed, table, write_stream(batch.schema, [batch]))


def test_views_of_one_string_do_not_become_2_gib(feed: Feed) -> None:
    """Views may name the same bytes over and over; what they come to is summed before the cast."""
    one = pa.array(["x" * 1_000_000], pa.string_view()).buffers()
    views = pa.py_buffer(one[1].to_pybytes()[:16] * 2000)
    batch = pa.record_batch([pa.Array.from_buffers(pa.string_view(), 2000, [None, views, *one[2:]])], names=["text"])
    assert "decodes to more than" in refuse(feed, TEXT, write_stream(batch.schema, [batch]))


def test_a_zero_column_batch_of_2_to_the_40_rows(feed: Feed) -> None:
    """A row count without columns stands for nothing: it is limited by itself, and a column is needed."""
    nullable = pa.schema([("a", pa.int64())])
    stream = write_stream(pa.schema([]), [])
    with pytest.raises(InvalidRequest, match="no columns"):
        feed(BatchDecoder(make_table(nullable), Limits()), stream)
    schema, message = write_stream(nullable, [pa.record_batch([pa.array([7, 7, 7])], schema=nullable)])
    at = message.header.index(struct.pack("<qq", 3, 0))
    rows_at = message.header.index(struct.pack("<q", 3))
    rows_at = message.header.index(struct.pack("<q", 3), at + 8) if rows_at == at else rows_at
    header = bytearray(message.header)
    for place in (at, rows_at):
        struct.pack_into("<q", header, place, 2**40)
    changed = StreamMessage.build(bytes(header), message.body)
    assert ipc.BatchLayout(changed.header).rows == 2**40
    assert "limits.batch_rows" in refuse(feed, nullable, [schema, changed])


def test_missing_columns_are_not_free(feed: Feed) -> None:
    """Filling hundreds of absent columns with nulls would make gigabytes of one narrow column."""
    table = pa.schema([("a", pa.int64()), *((f"c{i}", pa.decimal128(38, 0)) for i in range(500))])
    batch = pa.record_batch({"a": pa.array(range(1_000_000), pa.int64())})
    assert "decodes to more than" in refuse(feed, table, write_stream(batch.schema, [batch]))


def test_widening_has_a_limit(feed: Feed) -> None:
    """A batch that fits before it is widened may not fit after."""
    table = pa.schema([("a", pa.decimal128(38, 0))])
    batch = pa.record_batch({"a": pa.array(range(100_000), pa.int64())})
    limits = Limits(batch_bytes=MIB)
    assert "decodes to more than" in refuse(feed, table, write_stream(batch.schema, [batch]), limits)


def test_too_many_rows_are_refused(feed: Feed) -> None:
    """``limits.batch_rows`` holds on each path."""
    batch = pa.record_batch({"text": pa.nulls(1000, pa.string())})
    limits = Limits(batch_rows=999)
    for compression in (None, "lz4"):
        stream = write_stream(batch.schema, [batch], compression=compression)
        assert "1000 rows" in refuse(feed, TEXT, stream, limits)


def test_a_dictionary_bomb_in_a_dictionary_message(feed: Feed) -> None:
    """A compressed dictionary's size is summed as well, against the stream's limit."""
    words = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), ["x" * 100_000_000])
    batch = pa.record_batch([words], names=["text"])
    stream = write_stream(batch.schema, [batch], compression="zstd")
    assert len(stream[1].body) < 64 * 1024
    assert "limits.dictionary_bytes" in refuse(feed, TEXT, stream)
