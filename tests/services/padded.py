"""Rows that fill a log: a few of them are a segment, so that segments are released while a test looks on."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.flight as flight

from arka.testing.serverprocess import ServerProcess
from arka.testing.services import wait_for
from arka.wal.segment import segment_name
from tests.process.clients import Stream

PADDED = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("pad", pa.binary())])
#: Two rows and what is beside them fill the smallest segment.
PAD_BYTES = 600_000
SMALL_SEGMENTS = {"wal__segment_bytes": 1 << 20, "wal__release_grace_s": 0}


def padded(n: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array([n]), pa.array([bytes(PAD_BYTES)])], schema=PADDED)


def write_padded(client: flight.FlightClient, table: str, values: range, durability: str) -> dict[int, int]:
    """Write one value a batch, each with its key, to a table of numbers and padding; returns the LSNs."""
    stream = Stream(client, table, PADDED, requested_durability=durability)
    for n in values:
        stream.write(padded(n), idempotency_key=f"k{n}")
    acks = stream.finish()
    assert [ack for ack in acks if ack["error"] is not None] == []
    return {values[ack["sequence"]]: ack["lsn"] for ack in acks if ack["durability_level"] == durability}


def wait_released(server: ServerProcess) -> None:
    """Wait until the log has let go of its first segment."""
    first = server.data / "wal" / segment_name(1)
    wait_for(lambda: not first.exists(), "the first segment is released")
