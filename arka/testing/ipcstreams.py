"""Arrow IPC messages as a transport would hand them over, and tables for them to go to.

Owns: taking a pyarrow stream apart into messages with frames. For tests, fuzzing and benchmarks of what
decodes streams; nothing here reads a socket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from uuid import UUID

import pyarrow as pa

from arka._core.buffers import FrameBuffer
from arka.records import FIELD_ID_KEY, PartitionField, TableInfo, TableName, TableType


@dataclass(frozen=True, slots=True)
class StreamMessage:
    """One message of a stream: its flatbuffer, and the frame with flatbuffer and body."""

    header: bytes
    buffer: FrameBuffer

    @classmethod
    def build(cls, header: bytes, body: bytes | memoryview = b"") -> StreamMessage:
        """Lay out a message as the transport does.

        Args:
            header: the Message flatbuffer.
            body: its body, of whatever length.
        """
        frame = FrameBuffer(header, len(body))
        frame.body[:] = body
        return cls(header, frame)

    @property
    def body(self) -> bytes:
        """A copy of the body."""
        return bytes(self.buffer.body)


def split_stream(stream: pa.Buffer | bytes) -> Iterator[StreamMessage]:
    """Take an encapsulated IPC stream apart: schema, dictionaries, batches, in order."""
    reader = pa.BufferReader(stream)
    while True:
        try:
            message = pa.ipc.read_message(reader)
        except EOFError:
            return
        body = b"" if message.body is None else message.body.to_pybytes()
        yield StreamMessage.build(message.metadata.to_pybytes(), body)


def write_stream(
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    *,
    compression: str | None = None,
    deltas: bool = False,
) -> list[StreamMessage]:
    """Write batches with pyarrow's stream writer, as messages.

    Args:
        schema: of all batches.
        batches: in order.
        compression: ``lz4``, ``zstd`` or none.
        deltas: whether growing dictionaries are sent as deltas.
    """
    options = pa.ipc.IpcWriteOptions(compression=compression, emit_dictionary_deltas=deltas)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return list(split_stream(sink.getvalue()))


def with_field_ids(schema: pa.Schema) -> pa.Schema:
    """Number every field, nested ones included, as a catalog would."""
    numbers = count(1)

    def number(field: pa.Field) -> pa.Field:
        own = str(next(numbers)).encode()
        type_ = field.type
        if pa.types.is_struct(type_):
            type_ = pa.struct([number(child) for child in type_])
        elif pa.types.is_map(type_):
            type_ = pa.map_(number(type_.key_field), number(type_.item_field))
        elif pa.types.is_list(type_):
            type_ = pa.list_(number(type_.value_field))
        metadata = {**(field.metadata or {}), FIELD_ID_KEY: own}
        return pa.field(field.name, type_, field.nullable, metadata)

    return pa.schema([number(field) for field in schema])


def make_table(
    schema: pa.Schema,
    *,
    name: str = "events",
    key_columns: Sequence[str] = (),
    partition: Sequence[tuple[str, str]] = (),
    properties: Mapping[str, str] | None = None,
) -> TableInfo:
    """Make a table as a catalog would describe it.

    Args:
        schema: canonical types.
        name: bare or full name.
        key_columns: makes it a primary-key table.
        partition: column and transform of each partition field.
        properties: table properties.
    """
    numbered = with_field_ids(schema)
    ids = {field.name: int(field.metadata[FIELD_ID_KEY]) for field in numbered}
    return TableInfo(
        uuid=UUID(int=1),
        name=TableName.parse(name),
        schema=numbered,
        schema_id=0,
        table_type=TableType.PRIMARY_KEY if key_columns else TableType.APPEND_ONLY,
        key_columns=tuple(key_columns),
        spec_id=0,
        partition=tuple(
            PartitionField(ids[column], 1000 + index, f"{column}_{index}", transform)
            for index, (column, transform) in enumerate(partition)
        ),
        location=f"file:///warehouse/{name}-00000001",
        properties=properties or {},
    )


__all__ = ["StreamMessage", "make_table", "split_stream", "with_field_ids", "write_stream"]
