"""One stream's decoder: what it accepts, what it refuses, and which bytes go to the log."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pyarrow as pa
import pytest

from arka._core import ipc
from arka._core.buffers import FrameBuffer
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.decode import SMALL_ROOM_BYTES, THREAD_BYTES, BatchDecoder, DecodedBatch, NeedsRoom
from arka.options import Limits
from arka.records import Operation
from arka.testing.ipcstreams import StreamMessage, make_table, write_stream

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), ("name", pa.string())])
BATCH = pa.record_batch([pa.array([1, 2, 3]), pa.array(["a", None, "c"])], schema=SCHEMA)
TABLE = make_table(SCHEMA, name="users")

Feed = Callable[[BatchDecoder, list[StreamMessage]], list[DecodedBatch]]
Decode = Callable[..., DecodedBatch]


def ready(limits: Limits | None = None) -> BatchDecoder:
    decoder = BatchDecoder(TABLE, limits or Limits())
    decoder.set_schema(write_stream(SCHEMA, [])[0].header)
    return decoder


def one_batch(batch: pa.RecordBatch = BATCH, compression: str | None = None) -> StreamMessage:
    return write_stream(batch.schema, [batch], compression=compression)[-1]


def refused(decoder: BatchDecoder, message: StreamMessage, code: ErrorCode = ErrorCode.INVALID_BATCH) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decoder.decode(message)
    assert caught.value.code is code
    return caught.value.detail


def test_the_wires_bytes_are_the_logs_bytes() -> None:
    """A batch in the table's own layout keeps its frame: nothing is copied, and the frame reads back."""
    message = one_batch()
    decoded = ready().decode(message)
    assert decoded.fast
    assert decoded.buffer is message.buffer
    assert decoded.rows == 3
    assert decoded.batch.schema.equals(TABLE.schema, check_metadata=True)
    assert decoded.batch.to_pylist() == BATCH.to_pylist()
    start = pa.py_buffer(message.buffer).address
    assert all(
        start <= buffer.address < start + message.buffer.size
        for column in decoded.batch.columns
        for buffer in column.buffers()
        if buffer is not None and buffer.size
    )


def test_a_batch_outlives_its_message() -> None:
    """The batch keeps its frame alive."""
    decoded = ready().decode(one_batch())
    batch = decoded.batch
    del decoded
    assert batch.to_pylist() == BATCH.to_pylist()


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_batches_are_rewritten_plain(compression: str) -> None:
    """The log holds uncompressed record batches only."""
    decoded = ready().decode(one_batch(compression=compression))
    assert not decoded.fast
    assert decoded.batch.to_pylist() == BATCH.to_pylist()
    again = pa.ipc.read_record_batch(pa.py_buffer(decoded.buffer).slice(128), TABLE.schema)
    assert again.equals(decoded.batch)


def test_a_zero_row_batch_is_a_batch() -> None:
    """A write without rows has an LSN and its acks like any other (T12)."""
    decoded = ready().decode(one_batch(BATCH.slice(0, 0)))
    assert decoded.fast
    assert decoded.rows == 0


def test_a_batch_before_the_schema_is_a_protocol_error() -> None:
    """It ends the stream: no batch after it can be read either."""
    decoder = BatchDecoder(TABLE, Limits())
    assert "before the stream's schema" in refused(decoder, one_batch(), ErrorCode.INVALID_REQUEST)
    with pytest.raises(InvalidRequest, match="before the stream's schema"):
        decoder.add_dictionary(one_batch())
    assert not decoder.needs_thread(one_batch())


def test_the_same_schema_may_come_again_a_different_one_may_not() -> None:
    """A second schema would change what the batches mean (T12)."""
    decoder = ready()
    decoder.set_schema(write_stream(SCHEMA, [])[0].header)
    decoder.set_schema(write_stream(SCHEMA.with_metadata({"a": "b"}), [])[0].header)
    with pytest.raises(InvalidRequest, match="second, different schema") as caught:
        decoder.set_schema(write_stream(SCHEMA.remove(1), [])[0].header)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert decoder.decode(one_batch()).fast


def test_a_refused_schema_leaves_the_decoder_without_one() -> None:
    """After a mismatch the stream has no schema, and no batch is accepted by accident."""
    decoder = BatchDecoder(TABLE, Limits())
    with pytest.raises(InvalidRequest, match="Schema mismatch for default"):
        decoder.set_schema(write_stream(pa.schema([("x", pa.int64())]), [])[0].header)
    refused(decoder, one_batch(), ErrorCode.INVALID_REQUEST)


def test_only_a_schema_message_reaches_arrows_schema_reader() -> None:
    """An unknown header type would skip Arrow's verifier and kill the process (T13)."""
    schema = write_stream(SCHEMA, [])[0].header
    for header in (one_batch().header, b"", b"\x00" * 64, schema[:50]):
        with pytest.raises(InvalidRequest):
            BatchDecoder(TABLE, Limits()).set_schema(header)
    at = _type_offset(schema)
    for kind in [*range(1), *range(2, 256)]:
        with pytest.raises(InvalidRequest):
            BatchDecoder(TABLE, Limits()).set_schema(schema[:at] + bytes([kind]) + schema[at + 1 :])


def _type_offset(header: bytes) -> int:
    """Where Message.header_type lies."""
    for at in range(len(header)):
        changed = header[:at] + b"\x07" + header[at + 1 :]
        try:
            if ipc.message_type(header) != 7 and ipc.message_type(changed) == 7:
                return at
        except ValueError:
            continue
    raise AssertionError("no header type")


def test_big_endian_streams_are_refused() -> None:
    """Pyarrow would store them as garbage that validates (T15)."""
    header = write_stream(SCHEMA, [])[0].header
    for at in range(len(header) - 1):
        changed = header[:at] + b"\x01" + header[at + 1 :]
        try:
            swapped = ipc.schema_endianness(changed) == 1 and ipc.message_type(changed) == ipc.SCHEMA
        except ValueError:
            continue
        if swapped:
            with pytest.raises(InvalidRequest, match="big-endian"):
                BatchDecoder(TABLE, Limits()).set_schema(changed)
            return
    # pyarrow leaves the default, little, out of the table: give the Schema's vtable a place for it.
    with pytest.raises(InvalidRequest, match="big-endian"):
        BatchDecoder(TABLE, Limits()).set_schema(_big_endian_schema())


def _big_endian_schema() -> bytes:
    """Build a Schema message without fields, by hand."""
    message = struct.pack("<I", 16) + struct.pack("<HHHHHH", 12, 16, 8, 10, 4, 0)
    message += struct.pack("<iIhBx4x", 12, 28 - 4, 4, ipc.SCHEMA)[:16]
    schema_vtable = struct.pack("<HHHH", 8, 8, 4, 0)
    table_at = len(message) + len(schema_vtable)
    message = message[:20] + struct.pack("<I", table_at - 20) + message[24:]
    return message + schema_vtable + struct.pack("<ihxx", 8, 1)


def test_a_schema_message_has_a_limit() -> None:
    """A schema cannot be as long as a batch."""
    with pytest.raises(InvalidRequest, match="at most"):
        BatchDecoder(TABLE, Limits()).set_schema(bytes(17 * 1024 * 1024))


@pytest.mark.parametrize("change", [-8, -1, 1, 64])
def test_a_body_that_is_not_as_long_as_it_says_is_invalid(change: int) -> None:
    """Shorter and longer both: neither can be what the client meant (T12)."""
    message = one_batch()
    body = message.body[:change] if change < 0 else message.body + bytes(change)
    detail = refused(ready(), StreamMessage.build(message.header, body))
    assert f"a body of {len(body)} bytes" in detail


def test_null_in_a_required_column_is_invalid(decode: Decode) -> None:
    """It names the column and how many; on both paths."""
    nullable = pa.schema([("id", pa.int64()), ("name", pa.string())])
    batch = pa.record_batch([pa.array([1, None]), pa.array(["a", "b"])], schema=nullable)
    for compression in (None, "zstd"):
        with pytest.raises(InvalidRequest, match="column 'id': is required but 1 of its values are null") as caught:
            decode(SCHEMA, batch, compression=compression)
        assert caught.value.code is ErrorCode.INVALID_BATCH


def test_text_that_is_not_utf8_is_invalid() -> None:
    """Statistics could not be written for it; the column is named."""
    text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    batch = pa.record_batch([pa.array([1, 2, 3]), text], schema=SCHEMA)
    detail = refused(ready(), one_batch(batch))
    assert "column 'name'" in detail
    assert "UTF8" in detail


def test_offsets_that_leave_the_data_are_invalid() -> None:
    """Offsets are the client's word until they are checked."""
    message = one_batch()
    layout = ipc.BatchLayout(message.header)
    at, length = layout.buffers[3]
    body = bytearray(message.body)
    for value in (-1, 2**31 - 1, 1000):
        struct.pack_into("<i", body, at + length // 4 * 4 - 4, value)
        struct.pack_into("<i", body, at + 4, value)
        assert "column 'name'" in refused(ready(), StreamMessage.build(message.header, bytes(body)))


def test_a_null_count_that_lies_is_invalid() -> None:
    """Arrow takes a count of 0 as leave not to look at the bitmap."""
    message = one_batch()
    (id_node, name_node) = ipc.BatchLayout(message.header).nodes
    at = message.header.index(struct.pack("<qqqq", *id_node, *name_node)) + 24
    for lie in (0, 2, 3):
        header = message.header[:at] + struct.pack("<q", lie) + message.header[at + 8 :]
        detail = refused(ready(), StreamMessage.build(header, message.body))
        assert f"column 'name': its null count is {lie}, its validity bitmap says 1" in detail


def test_overlapping_buffers_are_invalid() -> None:
    """Bytes that count twice would let a small body become large columns."""
    message = one_batch()
    buffers = ipc.BatchLayout(message.header).buffers
    encoded = b"".join(struct.pack("<qq", *pair) for pair in buffers)
    twice = b"".join(struct.pack("<qq", 0, len(message.body)) for _ in buffers)
    header = message.header.replace(encoded, twice)
    assert "overlap" in refused(ready(), StreamMessage.build(header, message.body))


def test_a_batch_of_another_schema_is_invalid() -> None:
    """Nodes and buffers are counted against the stream's schema."""
    other = pa.record_batch({"id": pa.array([1]), "name": pa.array(["a"]), "x": pa.array([1])})
    assert "field nodes" in refused(ready(), one_batch(other))


def test_keys_alone_are_decoded_for_deletes() -> None:
    """The frame then has the key's columns, as they came where that can be."""
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("x", pa.string(), nullable=False)])
    table = make_table(schema, key_columns=["id"])
    keys = pa.record_batch({"id": pa.array([7, 8])})
    wide = pa.record_batch({"x": ["a", None], "id": pa.array([7, 8], pa.int8())})
    for batch, fast in ((keys, True), (wide, False)):
        decoder = BatchDecoder(table, Limits())
        header, message = write_stream(batch.schema, [batch])[:2]
        decoder.set_schema(header.header)
        decoded = decoder.decode(message, Operation.DELETE)
        assert decoded.fast is fast
        assert decoded.batch.schema == table.key_schema()
        assert decoded.batch.to_pylist() == [{"id": 7}, {"id": 8}]
        with pytest.raises(InvalidRequest, match="required column 'x'" if fast else "'x': is required but 1"):
            decoder.decode(one_batch(batch))
        nulls = batch.set_column(batch.schema.get_field_index("id"), "id", pa.array([7, None], batch["id"].type))
        with pytest.raises(InvalidRequest, match="'id': is required but 1") as caught:
            decoder.decode(one_batch(nulls), Operation.DELETE)
        assert caught.value.code is ErrorCode.INVALID_BATCH


def test_custom_metadata_and_extensions_are_no_obstacle(decode: Decode) -> None:
    """Metadata on schema and fields is ignored, an unknown extension type is its storage."""
    field = pa.field("id", pa.int64(), metadata={"ARROW:extension:name": "acme.id", "ARROW:extension:metadata": ""})
    schema = pa.schema([field, ("name", pa.string())], metadata={"pandas": "{}"})
    assert decode(SCHEMA, pa.record_batch([[1], ["a"]], schema=schema)).fast


def test_uuids_and_zones_need_no_rewrite(decode: Decode) -> None:
    """A type that differs in name alone has the same bytes."""
    schema = pa.schema([("u", pa.uuid()), ("t", pa.timestamp("us", "UTC"))])
    batch = pa.record_batch({"u": pa.array([b"x" * 16], pa.binary(16)), "t": pa.array([1], pa.timestamp("us", "CET"))})
    decoded = decode(schema, batch)
    assert decoded.fast
    assert decoded.batch.schema.types == schema.types


def test_a_thread_is_asked_for_by_size_of_text() -> None:
    """Fixed-width data costs nothing to validate, text does: above 1 MiB it goes to a thread (T16)."""
    rows = THREAD_BYTES // 8
    numbers = pa.array(range(rows), pa.int64())
    decoder = ready()
    for text, slow in (("", False), ("x" * 16, True)):
        batch = pa.record_batch([numbers, pa.array([text] * rows)], schema=SCHEMA)
        assert decoder.needs_thread(one_batch(batch)) is slow
        assert decoder.decode(one_batch(batch)).fast
    assert decoder.needs_thread(one_batch(pa.record_batch([numbers, pa.nulls(rows, pa.string())], schema=SCHEMA),
                                          compression="lz4"))  # fmt: skip
    assert not decoder.needs_thread(one_batch(compression="lz4"))
    message = one_batch()
    assert not decoder.needs_thread(StreamMessage.build(message.header[:20], message.body))


def test_a_message_without_a_header_is_invalid() -> None:
    """The transport hands over what came; the decoder says what is missing."""

    class Bare:
        header: bytes | None = None
        buffer: FrameBuffer | None = None

    with pytest.raises(InvalidRequest, match="no data header"):
        ready().decode(Bare())
    with pytest.raises(InvalidRequest, match="no data header"):
        ready().add_dictionary(Bare())
    assert not ready().needs_thread(Bare())


def test_closing_twice_is_nothing() -> None:
    """A stream may end in more ways than one."""
    decoder = ready()
    decoder.close()
    decoder.close()
    assert decoder.dictionary_bytes == 0
    BatchDecoder(TABLE, Limits()).close()


class TestSameHeader:
    """Batches with one header: Arrow reads the first of them, what may still be wrong with the others is found."""

    SCHEMA = pa.schema([("id", pa.int64()), ("ok", pa.bool_()), ("at", pa.timestamp("us"))])

    def decoder(self, schema: pa.Schema) -> BatchDecoder:
        decoder = BatchDecoder(make_table(schema), Limits())
        decoder.set_schema(write_stream(schema, [])[0].header)
        return decoder

    def batch(self, number: int, at: int = 0) -> pa.RecordBatch:
        columns = [pa.array([number, None, 3]), pa.array([True, False, None]), pa.array([at, 1, 2], pa.timestamp("us"))]
        return pa.record_batch(columns, schema=self.SCHEMA)

    def test_accepted(self) -> None:
        """Each has its own values."""
        decoder = self.decoder(self.SCHEMA)
        for number in range(3):
            decoded = decoder.decode(one_batch(self.batch(number)))
            decoded.batch.validate(full=True)
            assert decoded.batch.to_pydict() == self.batch(number).to_pydict()

    def test_nulls_that_the_header_denies(self) -> None:
        """The null count stands in the header, the bitmap in the body."""
        decoder, message = self.decoder(self.SCHEMA), one_batch(self.batch(1))
        decoder.decode(message)
        again = StreamMessage.build(message.header, b"\xff" + message.body[1:])
        assert "null count" in refused(decoder, again)
        decoder.decode(message)

    def test_values_out_of_range(self) -> None:
        """A timestamp that no calendar knows is refused behind one that is fine."""
        decoder = self.decoder(self.SCHEMA)
        decoder.decode(one_batch(self.batch(1)))
        assert "expected a time" in refused(decoder, one_batch(self.batch(1, at=2**62)))
        decoder.decode(one_batch(self.batch(1)))

    def test_another_body(self) -> None:
        """A body of another length does not go with the header."""
        decoder, message = self.decoder(self.SCHEMA), one_batch(self.batch(1))
        decoder.decode(message)
        refused(decoder, StreamMessage.build(message.header, message.body[:-8]))
        refused(decoder, StreamMessage.build(message.header, message.body + bytes(8)))

    @pytest.mark.parametrize(
        ("type_", "good", "bad"),
        [
            (pa.string(), b"abc", b"a\xffc"),
            (pa.decimal128(3, 0), (999).to_bytes(16, "little"), (1000).to_bytes(16, "little")),
            (pa.time64("us"), (1).to_bytes(8, "little"), (2**40).to_bytes(8, "little")),
        ],
    )
    def test_what_only_arrow_sees(self, type_: pa.DataType, good: bytes, bad: bytes) -> None:
        """With types of which not all bits are a value, Arrow reads every batch."""
        schema = pa.schema([("a", type_)])
        value = {pa.string(): "abc", pa.decimal128(3, 0): 999, pa.time64("us"): 1}[type_]
        decoder, message = self.decoder(schema), one_batch(pa.record_batch([pa.array([value], type_)], schema=schema))
        decoder.decode(message)
        assert message.body.count(good) == 1
        refused(decoder, StreamMessage.build(message.header, message.body.replace(good, bad)))

    def test_another_operation(self) -> None:
        """What was found for one operation's columns says nothing about another's."""
        schema = pa.schema([pa.field("id", pa.int64(), nullable=False), ("n", pa.int32())])
        table = make_table(schema, name="users", key_columns=("id",))
        decoder = BatchDecoder(table, Limits())
        decoder.set_schema(write_stream(schema, [])[0].header)
        message = one_batch(pa.record_batch([pa.array([1]), pa.array([2], pa.int32())], schema=schema))
        for operation in (Operation.UPSERT, Operation.DELETE, Operation.UPSERT):
            decoded = decoder.decode(StreamMessage.build(message.header, message.body), operation)
            assert decoded.batch.num_columns == (1 if operation is Operation.DELETE else 2)


def test_what_decodes_to_more_than_its_room_asks_for_more() -> None:
    """Nothing is made before: a value of a dictionary is named a hundred times. A batch over the limit is refused."""
    decoder = BatchDecoder(TABLE, Limits())
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), ["x" * 1024 * 1024])
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), ("name", values.type)])
    batch = pa.record_batch([pa.array(range(100)), values], schema=schema)
    begin, dictionary, message = write_stream(schema, [batch])
    decoder.set_schema(begin.header)
    decoder.add_dictionary(dictionary)
    room = decoder.room(message)
    assert room == SMALL_ROOM_BYTES
    before = pa.total_allocated_bytes()
    with pytest.raises(NeedsRoom):
        decoder.decode(message, room_bytes=room)
    assert pa.total_allocated_bytes() - before < 4 * 1024 * 1024
    assert decoder.decode(message).batch.column(1)[99].as_py() == "x" * 1024 * 1024
    small = BatchDecoder(TABLE, Limits(batch_bytes=1024 * 1024))
    small.set_schema(begin.header)
    small.add_dictionary(dictionary)
    with pytest.raises(InvalidRequest, match="decodes to more than 1048576 bytes"):
        small.decode(message)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_is_taken_as_it_came_needs_no_room(compression: str | None) -> None:
    """Of a compressed batch it is known how much it becomes."""
    decoder, message = ready(), one_batch(compression=compression)
    assert decoder.room(message) == (0 if compression is None else SMALL_ROOM_BYTES)
    assert decoder.decode(message, room_bytes=decoder.room(message)).rows == 3
