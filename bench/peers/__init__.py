"""Arka beside what one would take in its place: the same messages, acked when they are on the same disk.

Owns: what a message is, and Arka's side. Does not own the peers' servers and clients, a module each.

A message is one write of its own, in Arka one record batch; a client sends on while acks come, as programs do that
want throughput. Both sides listen on loopback, and their logs lie in the same folder for temporary files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from bench import loads
from bench.servers import action, arka_server, connect, create_table

SMALL_BYTES = 300
LARGE_ROWS = 10_000
LARGE_BYTES = 320_000


def writers(count: int) -> str:
    """How many there are, and what Arka's are."""
    return f"{count} writer{'s' if count > 1 else ''}, stock pyarrow client"


def small(rows: int = 1) -> pa.RecordBatch:
    """Messages of 300 bytes: one a row."""
    return pa.record_batch({"payload": pa.array([os.urandom(SMALL_BYTES) for _ in range(rows)], pa.binary())})


def large() -> pa.RecordBatch:
    """One message of 320 kB."""
    batch = loads.numbers(LARGE_ROWS)
    assert batch.nbytes == LARGE_BYTES
    return batch


@contextmanager
def arka(batch: pa.RecordBatch) -> Iterator[str]:
    """Run Arka with a table for such batches; gives its location."""
    with arka_server() as server:
        with connect(server.location) as client:
            create_table(client, loads.TABLE, batch.schema)
        yield server.location


def write(location: str, batch: pa.RecordBatch, streams: int, count: int, acks: str = "each") -> float:
    """Write a batch ``count`` times on each of some streams to the disk; returns seconds.

    What is left to bring to Iceberg is brought there afterwards, beside nobody's measurement.
    """
    seconds, _ = loads.pump_all(location, batch, streams, count, "disk", acks)
    with connect(location) as client:
        action(client, "Flush", name=loads.TABLE)
    return seconds
