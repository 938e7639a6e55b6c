"""What a writer chooses, and what comes of it: rows in a batch, batches or one, streams, and a server with little room.

Figures without floors, for the guide to tuning. Each point is a result of its own; its notes have ``sweep`` and ``x``,
from which ``report`` makes the plots. The client is stock pyarrow on the same machine: it takes its share of the cores.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from bench import loads
from bench.harness import Result, measurement, quantile
from bench.servers import action, arka_server, connect, create_table

RUNS = 3


# -- rows in a batch ----------------------------------------------------------------------------


@measurement("batch-size")
def batch_size() -> Iterator[Result]:
    """From one row to a hundred thousand."""
    with arka_server() as server, connect(server.location) as client:
        create_table(client, loads.TABLE, loads.numbers(1).schema)
        loads.pump(client, loads.numbers(1_000), 200, "iceberg_committed")
        for rows in (1, 10, 100, 1_000, 10_000, 100_000):
            batch = loads.numbers(rows)
            count = max(min(15_000, 250_000_000 // batch.nbytes), 20)
            what = f"disk-acked, 1 stream, batches of {rows:,} rows ({batch.nbytes:,} bytes)"
            result = Result(f"batch-size-{rows}", what, "MB/s")
            for _ in range(RUNS):
                seconds = loads.pump(client, batch, count, "disk").seconds
                result.values.append(count * batch.nbytes / 1e6 / seconds)
                action(client, "Flush", name=loads.TABLE)
            memory, disk = _latencies(client, batch, 500 if rows < 100_000 else 100)
            action(client, "Flush", name=loads.TABLE)
            result.notes = {
                "sweep": "batch-size",
                "x": rows,
                "rows/s": round(statistics.median(result.values) * 1e6 / batch.nbytes * rows),
                **_milliseconds("memory ack", memory),
                **_milliseconds("disk ack", disk),
            }
            yield result


def _latencies(client: flight.FlightClient, batch: pa.RecordBatch, count: int) -> tuple[list[float], list[float]]:
    """Write one at a time; returns the seconds to the memory ack and to the disk ack of each."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(loads.TABLE))
    writer.write_metadata(json.dumps({"requested_durability": "disk"}).encode())
    writer.begin(batch.schema)
    memory, disk = [], []
    for _ in range(count):
        started = time.perf_counter()
        writer.write_batch(batch)
        reader.read_chunk()
        memory.append(time.perf_counter() - started)
        reader.read_chunk()
        disk.append(time.perf_counter() - started)
    writer.done_writing()
    writer.close()
    return memory, disk


def _milliseconds(name: str, seconds: list[float]) -> dict[str, float]:
    return {f"{name} p{share * 100:.0f} ms": round(quantile(seconds, share) * 1e3, 3) for share in (0.5, 0.99)}


# -- the same rows in one batch or in many ---------------------------------------------------------


@measurement("one-large-many-small")
def one_large_many_small() -> Iterator[Result]:
    """A million rows."""
    rows = 1_000_000
    whole = loads.numbers(rows)
    with arka_server() as server, connect(server.location) as client:
        create_table(client, loads.TABLE, whole.schema)
        loads.pump(client, loads.numbers(1_000), 200, "iceberg_committed")
        for pieces in (1, 10, 100, 1_000, 10_000):
            step = rows // pieces
            batches = [whole.slice(start, step) for start in range(0, rows, step)]
            what = f"{rows:,} rows (32 MB) as {pieces:,} batch{'es' if pieces > 1 else ''}, to the last disk ack"
            result = Result(f"one-large-many-small-{pieces}", what, "ms")
            first, blocked = [], []
            for number in range(RUNS + 1):
                stream = _write(client, batches)
                action(client, "Flush", name=loads.TABLE)
                if number:
                    result.values.append((stream.disk[-1] - stream.started) * 1e3)
                    first.append((stream.disk[0] - stream.started) * 1e3)
                    blocked.append(max(stream.writes) * 1e3)
            result.notes = {
                "sweep": "one-large-many-small",
                "x": pieces,
                "first disk ack ms": round(statistics.median(first), 2),
                "longest write_batch ms": round(statistics.median(blocked), 2),
            }
            yield result


@dataclass
class Stream:
    """How one stream went.

    Attributes:
        started: when.
        writes: seconds that each ``write_batch`` took.
        disk: when each disk ack came.
        backpressure: acks that speak of it.
        refused: writes that got an error ack, by code.
    """

    started: float = 0.0
    writes: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    backpressure: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def _write(client: flight.FlightClient, batches: Sequence[pa.RecordBatch], until_s: float = 0.0) -> Stream:
    """Write all batches on one stream, or in turn for so many seconds, while a thread reads the acks."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(loads.TABLE))
    writer.write_metadata(json.dumps({"requested_durability": "disk"}).encode())
    writer.begin(batches[0].schema)
    done = Stream()

    def read() -> None:
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            ack: dict[str, Any] = json.loads(chunk.app_metadata.to_pybytes())
            done.backpressure += ack.get("code") == "backpressure" or "backpressure" in ack
            if ack["error"]:
                done.refused[ack["code"]] += 1
            elif ack["durability_level"] == "disk":
                done.disk.append(time.perf_counter())

    reading = threading.Thread(target=read)
    done.started = time.perf_counter()
    reading.start()
    number = 0
    while number < len(batches) or time.perf_counter() < done.started + until_s:
        before = time.perf_counter()
        writer.write_batch(batches[number % len(batches)])
        done.writes.append(time.perf_counter() - before)
        number += 1
    writer.done_writing()
    reading.join()
    writer.close()
    answered = len(done.disk) + done.refused.total()
    assert answered == number, f"{answered} answers to {number} writes"
    return done


# -- streams ---------------------------------------------------------------------------------------


@measurement("concurrent-streams")
def concurrent_streams() -> Iterator[Result]:
    """One table, or one for each stream."""
    batch = loads.numbers(10_000)
    numbers = (1, 2, 4, 8, 16, 64)
    tables = [loads.TABLE, *(f"{loads.TABLE}_{number}" for number in range(1, max(numbers)))]
    with arka_server() as server, connect(server.location) as client:
        for table in tables:
            create_table(client, table, batch.schema)
        loads.pump(client, batch, 100, "iceberg_committed")
        for streams in numbers:
            for several in (False, True) if streams > 1 else (False,):
                where = "a table of its own each" if several else "one table"
                what = f"disk-acked sum of {streams} stream{'s' if streams > 1 else ''} of 320 kB batches, {where}"
                result = Result(f"concurrent-streams-{streams}{'-tables' if several else ''}", what, "MB/s")
                used = tables[:streams] if several else tables[:1]
                count = max(640 // streams, 1)
                slowest = []
                for _ in range(RUNS):
                    seconds, rates = loads.pump_all(server.location, batch, streams, count, "disk", tables=used)
                    for table in used:
                        action(client, "Flush", name=table)
                    result.values.append(streams * count * batch.nbytes / 1e6 / seconds)
                    slowest.append(min(rates) / (sum(rates) / len(rates)))
                result.notes = {
                    "sweep": "concurrent-streams",
                    "x": streams,
                    "series": where,
                    "slowest stream of the mean": round(statistics.median(slowest), 2),
                }
                yield result


# -- backpressure ----------------------------------------------------------------------------------

#: A server's limits: what the ledger holds until it is on disk, and what the log holds until it is committed.
LIMITS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default limits", {}),
    "memory": ("memory 16 MiB", {"limits__memory_bytes": "16MiB"}),
    "disk": (
        "memory 16 MiB, disk 256 MiB",
        {
            "limits__memory_bytes": "16MiB",
            "limits__disk_bytes": "256MiB",
            "wal__segment_bytes": "16MiB",
            "wal__release_grace_s": 0,
        },
    ),
}
BIN_S = 0.25


@measurement("backpressure")
def backpressure() -> Iterator[Result]:
    """A stream that writes as fast as it may for some seconds, to a server with much room and to one with little."""
    batch = loads.numbers(10_000)
    for name, (limits, settings) in LIMITS.items():
        with arka_server(**settings) as server, connect(server.location) as client:
            create_table(client, loads.TABLE, batch.schema)
            loads.pump(client, batch, 20, "iceberg_committed")
            stream = _write(client, [batch], 6.0)
        end = stream.disk[-1] - stream.started
        bins = [0] * (int(end / BIN_S) + 1)
        for at in stream.disk:
            bins[int((at - stream.started) / BIN_S)] += 1
        rates = [round(count * batch.nbytes / 1e6 / BIN_S, 1) for count in bins]
        what = f"disk-acked 320 kB batches, 1 stream for 6 s, {limits}: over all"
        result = Result(f"backpressure-{name}", what, "MB/s")
        result.values = [len(stream.disk) * batch.nbytes / 1e6 / end]
        result.notes = {
            "sweep": "backpressure",
            "x": limits,
            "MB/s in the first 0.5 s": round(statistics.mean(rates[:2]), 1),
            "MB/s in the second half": round(statistics.mean(rates[len(rates) // 2 : -1]), 1),
            **_milliseconds("write_batch", stream.writes),
            "write_batch max ms": round(max(stream.writes) * 1e3, 1),
            "share of the time in write_batch": round(sum(stream.writes) / 6.0, 2),
            "backpressure acks": stream.backpressure,
            "writes": len(stream.writes),
            "refused": dict(stream.refused),
            f"MB/s by {BIN_S} s": rates,
        }
        yield result
