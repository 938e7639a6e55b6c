"""What attacks send: Flight messages around Arrow batches that are made once.

Owns: encoding. Does not own what of it is an attack.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from arka.flight import messages
from arka.testing.ipcstreams import StreamMessage, write_stream
from tests.transport.peer import flight_data, grpc_message

NUMBERS = pa.schema([pa.field("n", pa.int64(), nullable=False)])


def descriptor(path: Sequence[str]) -> bytes:
    """A path descriptor."""
    return messages.build("FlightDescriptor", type=messages.DESCRIPTOR_PATH, path=list(path))


def write_message(
    message: StreamMessage | None = None,
    *,
    path: Sequence[str] = (),
    metadata: dict[str, Any] | bytes | None = None,
) -> bytes:
    """A FlightData with exactly these fields and its gRPC prefix."""
    encoded = json.dumps(metadata).encode() if isinstance(metadata, dict) else metadata
    return grpc_message(
        flight_data(
            descriptor=descriptor(path) if path else None,
            header=message.header if message is not None else None,
            app_metadata=encoded,
            body=message.body if message is not None and message.buffer.body_bytes else None,
        )
    )


def numbers_stream(rows: int) -> tuple[StreamMessage, StreamMessage]:
    """Schema and batch of a table with one required int64."""
    return stream_of(pa.record_batch([pa.array(range(rows), pa.int64())], schema=NUMBERS))


def stream_of(batch: pa.RecordBatch, compression: str | None = None) -> tuple[StreamMessage, StreamMessage]:
    """Schema and batch, for a batch without dictionaries."""
    schema, made = write_stream(batch.schema, [batch], compression=compression)
    return schema, made
