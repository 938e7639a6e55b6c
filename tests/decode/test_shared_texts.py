"""Flatbuffers that name one text many times: counted as often as it is named, before Arrow copies it (T23)."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from arka._core import ipc
from arka._core.buffers import FRAME_HEADER_BYTES
from arka.errors import InvalidRequest
from arka.flight.decode import BatchDecoder, read_schema
from arka.options import Limits
from arka.testing.ipcstreams import StreamMessage, make_table, split_stream, write_stream

MIB = 1024 * 1024
NUMBERS = pa.schema([("a", pa.int64())])


def string(text: bytes) -> bytes:
    padded = text + bytes(-len(text) % 4 or 4)
    return struct.pack("<I", len(text)) + padded


def point(data: bytearray, place: int, target: int) -> None:
    struct.pack_into("<I", data, place, target - place)


def shared_entries(data: bytearray, place: int, entries: int, text: bytes) -> None:
    """Let a vector of KeyValue consist of one entry, many times."""
    data += bytes(-len(data) % 8)
    point(data, place, len(data))
    vector = len(data)
    data += struct.pack("<I", entries) + bytes(4 * entries)
    # vtable of 8 bytes, then the table: back offset, key, value.
    data += bytes(-len(data) % 8) + struct.pack("<HHHH", 8, 12, 4, 8)
    table = len(data)
    data += struct.pack("<iII", 8, 0, 0)
    for field in (4, 8):
        point(data, table + field, len(data))
        data += string(text)
    for number in range(entries):
        point(data, vector + 4 + 4 * number, table)


def fields_of(oracle: ModuleType, data: bytearray) -> list[Any]:
    schema = oracle.read_message(bytes(data)).table(2)
    place = schema.place(1)
    start = place + struct.unpack_from("<I", data, place)[0]
    count = struct.unpack_from("<I", data, start)[0]
    places = [start + 4 + 4 * number for number in range(count)]
    return [oracle.Table(bytes(data), place + struct.unpack_from("<I", data, place)[0]) for place in places]


def grown_by(function: Callable[[], object]) -> tuple[str, int]:
    """Call what refuses; return what it says, and by how many MiB the process grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest) as caught:
        function()
    return caught.value.detail, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def test_one_name_of_many_fields(oracle: ModuleType) -> None:
    """1,000 fields share a name of 1 MiB: 1 GiB of names."""
    schema = pa.schema([pa.field(f"c{number}", pa.int8()) for number in range(1000)])
    data = bytearray(write_stream(schema, [])[0].header)
    fields = fields_of(oracle, data)
    target = len(data)
    data += string(b"n" * MIB)
    for field in fields:
        point(data, field.place(0), target)
    detail, grown = grown_by(lambda: read_schema(bytes(data)))
    assert "names are too long" in detail
    assert grown < 64


def test_one_time_zone_of_many_fields(oracle: ModuleType) -> None:
    """The same for the time zones of timestamps."""
    schema = pa.schema([pa.field(f"c{number}", pa.timestamp("us", "UTC")) for number in range(1000)])
    data = bytearray(write_stream(schema, [])[0].header)
    fields = fields_of(oracle, data)
    target = len(data)
    data += string(b"z" * MIB)
    for field in fields:
        point(data, field.table(3).place(1), target)
    detail, grown = grown_by(lambda: read_schema(bytes(data)))
    assert "time zones are too long" in detail
    assert grown < 64


@pytest.mark.parametrize("place", ["schema", "field", "message"])
def test_one_entry_of_a_schemas_metadata_many_times(oracle: ModuleType, place: str) -> None:
    """100 kB of text, 10,000 times: 2 GB."""
    field = pa.field("a", pa.int64(), metadata={"k": "v"})
    data = bytearray(write_stream(pa.schema([field], metadata={"k": "v"}), [])[0].header)
    message = oracle.read_message(bytes(data))
    if place == "message":
        data = with_message_metadata(oracle, bytes(data), 10_000, b"m" * 100_000)
    else:
        table = message.table(2) if place == "schema" else fields_of(oracle, data)[0]
        shared_entries(data, table.place(2 if place == "schema" else 6), 10_000, b"m" * 100_000)
    detail, grown = grown_by(lambda: read_schema(bytes(data)))
    assert "metadata are too long" in detail
    assert grown < 64


def with_message_metadata(oracle: ModuleType, header: bytes, entries: int, text: bytes) -> bytearray:
    """Put a new root before a message that has metadata of its own."""
    message = oracle.read_message(header)
    # [0] root, [4] vtable of 14 bytes, [24] the table: back offset, header, metadata, version, type, bodyLength.
    prefix = bytearray(48)
    struct.pack_into("<I", prefix, 0, 24)
    struct.pack_into("<HHHHHHH", prefix, 4, 14, 24, 12, 14, 4, 16, 8)
    struct.pack_into("<i", prefix, 24, 20)
    struct.pack_into("<HBx", prefix, 36, message.scalar(0, "<h"), message.scalar(1, "<B"))
    struct.pack_into("<q", prefix, 40, message.scalar(3, "<q"))
    data = prefix + header
    point(data, 28, len(prefix) + message.table(2).at)
    shared_entries(data, 32, entries, text)
    return data


def test_metadata_of_messages_is_read_as_arrow_reads_it(oracle: ModuleType) -> None:
    """What the tests below write is what Arrow takes for metadata."""
    stream = write_stream(NUMBERS, [pa.record_batch([[1, 2]], schema=NUMBERS)])
    made = bytes(with_message_metadata(oracle, stream[1].header, 3, b"text"))
    message = pa.ipc.read_message(
        pa.py_buffer(StreamMessage.build(made, stream[1].body).buffer).slice(FRAME_HEADER_BYTES)
    )
    assert message.type == "record batch"
    assert ipc.BatchLayout(made).rows == 2


@pytest.mark.parametrize("kind", [ipc.RECORD_BATCH, ipc.DICTIONARY_BATCH])
def test_one_entry_of_a_batchs_metadata_many_times(oracle: ModuleType, kind: int) -> None:
    """A record batch or dictionary of 150 kB cannot make Arrow copy 2 GB."""
    if kind == ipc.RECORD_BATCH:
        schema, batch = NUMBERS, pa.record_batch([[1, 2]], schema=NUMBERS)
    else:
        batch = pa.record_batch([pa.array(["a"]).dictionary_encode()], names=["a"])
        schema = batch.schema
    stream = write_stream(schema, [batch])
    table = NUMBERS if kind == ipc.RECORD_BATCH else pa.schema([("a", pa.string())])
    decoder = BatchDecoder(make_table(table), Limits())
    decoder.set_schema(stream[0].header)
    header = bytes(with_message_metadata(oracle, stream[1].header, 10_000, b"m" * 100_000))
    message = StreamMessage.build(header, stream[1].body)

    def take() -> None:
        if kind == ipc.RECORD_BATCH:
            assert decoder.needs_thread(message) is False
            decoder.decode(message)
        else:
            assert decoder.dictionary_work(message) == 0
            decoder.add_dictionary(message)

    detail, grown = grown_by(take)
    assert "metadata are too long" in detail
    assert grown < 64


def test_ordinary_metadata_passes() -> None:
    """A batch may carry some kilobytes of metadata, and each of 10,000 fields a few."""
    fields = [pa.field(f"column_{number}", pa.int64(), metadata={"comment": "x" * 200}) for number in range(10_000)]
    stream, ids = read_schema(write_stream(pa.schema(fields), [])[0].header)
    assert (len(stream), ids) == (10_000, ())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, NUMBERS) as writer:
        writer.write_batch(pa.record_batch([[1]], schema=NUMBERS), custom_metadata={"trace": "y" * 100_000})
    schema, batch = split_stream(sink.getvalue())
    decoder = BatchDecoder(make_table(NUMBERS), Limits())
    decoder.set_schema(schema.header)
    assert decoder.decode(batch).rows == 1


def test_more_fields_than_any_table_has() -> None:
    """Refused before Arrow makes them: each of them costs the planning of the stream."""
    schema = pa.schema([pa.field(f"c{number}", pa.int8()) for number in range(ipc.MAX_FIELDS + 1)])
    detail, _ = grown_by(lambda: read_schema(write_stream(schema, [])[0].header))
    assert f"more than {ipc.MAX_FIELDS} fields" in detail


def test_a_header_of_megabytes() -> None:
    """A batch's header is bounded before its buffers are looked at."""
    header = write_stream(NUMBERS, [pa.record_batch([[1]], schema=NUMBERS)])[1].header
    with pytest.raises(ValueError, match="at most 8388608 are legal"):
        ipc.BatchLayout(header + bytes(8 * MIB))
