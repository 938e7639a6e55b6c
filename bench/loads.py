"""What clients do to a server: stock pyarrow, the same against every server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from bench.servers import connect

TABLE = "load"
TIERS = ("memory", "disk", "object_storage", "iceberg_committed")


def numbers(rows: int, seed: int = 0) -> pa.RecordBatch:
    """Four columns of eight bytes: 32 bytes a row."""
    rng = np.random.default_rng(seed)
    return pa.record_batch(
        {
            "id": pa.array(rng.integers(0, 1 << 40, rows)),
            "value": pa.array(rng.random(rows)),
            "at": pa.array(rng.integers(0, 1 << 50, rows)).cast(pa.timestamp("us")),
            "k": pa.array(rng.integers(0, 1 << 40, rows)),
        }
    )


def repeating(rows: int, different: int) -> pa.RecordBatch:
    """``numbers`` whose rows repeat, so that a long run of them is small in the warehouse."""
    few = numbers(different)
    (batch,) = pa.Table.from_batches([few] * (rows // different)).combine_chunks().to_batches()
    return batch


@dataclass
class Pumped:
    """How one stream went.

    Attributes:
        seconds: from the first batch until the last ack.
        acks: how many came.
    """

    seconds: float = 0.0
    acks: int = 0


def pump(
    client: flight.FlightClient,
    batch: pa.RecordBatch,
    count: int,
    tier: str = "memory",
    acks: str = "each",
    table: str = TABLE,
) -> Pumped:
    """Write a batch again and again on one stream while a thread reads the acks of each, up to a tier's."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(table))
    writer.write_metadata(json.dumps({"requested_durability": tier, "acks": acks}).encode())
    writer.begin(batch.schema)
    done = Pumped()
    expected = count * (TIERS.index(tier) + 1)

    def read() -> None:
        while True:
            try:
                reader.read_chunk()
            except StopIteration:
                return
            done.acks += 1

    # The bare server answers the metadata-only message too.
    reading = threading.Thread(target=read)
    started = time.perf_counter()
    reading.start()
    for _ in range(count):
        writer.write_batch(batch)
    writer.done_writing()
    reading.join()
    done.seconds = time.perf_counter() - started
    writer.close()
    assert acks == "watermark" or expected <= done.acks <= expected + 1, f"{done.acks} acks of {count} writes"
    return done


def pump_all(
    location: str,
    batch: pa.RecordBatch,
    streams: int,
    count: int,
    tier: str = "memory",
    acks: str = "each",
    tables: Sequence[str] = (TABLE,),
) -> tuple[float, list[float]]:
    """Pump several streams at once, each from a thread with the one client; they take turns with the tables.

    Returns:
        Seconds from the first start to the last end, and each stream's batches a second.
    """
    with connect(location) as client:
        results: list[Pumped] = [Pumped()] * streams
        barrier = threading.Barrier(streams + 1)

        def run(number: int) -> None:
            barrier.wait()
            results[number] = pump(client, batch, count, tier, acks, tables[number % len(tables)])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(streams)]
        for thread in threads:
            thread.start()
        barrier.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
    return seconds, [count / result.seconds for result in results]


def round_trips(client: flight.FlightClient, batch: pa.RecordBatch, count: int, **request: Any) -> list[float]:
    """Write, and wait for the last ack that was asked for, before writing again; returns seconds each."""
    asked = json.dumps({"requested_durability": "memory"} | request).encode()
    acks = TIERS.index(json.loads(asked)["requested_durability"]) + 1
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(TABLE))
    writer.begin(batch.schema)
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        writer.write_with_metadata(batch, asked)
        for _ in range(acks):
            reader.read_chunk()
        taken.append(time.perf_counter() - started)
    writer.done_writing()
    return taken
