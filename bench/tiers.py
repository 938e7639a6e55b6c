"""Disk, Iceberg and freshness: what the tiers below memory take, each beside what the machine itself can do.

Environment: ``BENCH_SECONDS`` is how long one run of the sustained measurements lasts (30; the table wants 60).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.flight as flight
import pyarrow.parquet as pq
from pyiceberg.catalog.sql import SqlCatalog

from arka.testing.processes import descendants, memory_of
from arka.testing.serverprocess import ServerProcess
from bench import loads
from bench.flights import flights
from bench.harness import PAIRS, ROOT, Result, measurement, pairs, quantile
from bench.servers import action, arka_server, bare_server, connect, create_table

SECONDS = float(os.environ.get("BENCH_SECONDS", 30))
#: Of runs that last ``SECONDS``: each is an average already.
LONG_PAIRS = 3
BLOCK = 4 << 20
FLIGHTS_BATCH = 10_000
RATE = 1_000
INTERVAL_S = 0.5


# -- disk ------------------------------------------------------------------------------------------


@measurement("disk-round-trip")
def disk_round_trip() -> Iterator[Result]:
    """Round trips of one row to the disk."""
    batch = loads.numbers(1)
    result = Result(
        "disk-round-trip",
        "round trip of 1 row, disk ack, p50",
        "us",
        "round trip to a bare pyarrow server + one 4 KiB fdatasync, p50 each",
        "<= 1.3",
    )
    with arka_server() as server, bare_server() as bare, tempfile.TemporaryDirectory(prefix="arka-bench-") as folder:
        with connect(server.location) as client:
            create_table(client, loads.TABLE, batch.schema)

        def ours() -> float:
            with connect(server.location) as client:
                return quantile(loads.round_trips(client, batch, 1_500, requested_durability="disk"), 0.5) * 1e6

        def floor() -> float:
            with connect(bare) as client:
                trip = quantile(loads.round_trips(client, batch, 1_500), 0.5)
            return (trip + quantile(syncs(Path(folder), 4096, count=500), 0.5)) * 1e6

        yield pairs(result, ours, floor)


def syncs(folder: Path, size: int, *, count: int = 0, seconds: float = 0.0) -> list[float]:
    """Write blocks to the end of a file, each with an fdatasync; returns seconds each."""
    path = folder / "floor"
    data = os.urandom(size)
    taken: list[float] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        until = time.perf_counter() + seconds
        while len(taken) < count or time.perf_counter() < until:
            started = time.perf_counter()
            os.write(descriptor, data)
            os.fdatasync(descriptor)
            taken.append(time.perf_counter() - started)
    finally:
        os.close(descriptor)
        path.unlink()
    return taken


@measurement("disk-throughput")
def disk_throughput() -> Iterator[Result]:
    """Four streams of large batches, as fast as the disk takes them."""
    # A minute of numbers that do not repeat would fill the memory that the warehouse is in.
    batch = loads.repeating(100_000, 1_000)
    result = Result(
        "disk-throughput",
        f"disk-acked MB/s, 4 streams of 3.2 MB batches, {SECONDS:.0f} s",
        "MB/s",
        f"sequential 4 MiB write + fdatasync, {SECONDS:.0f} s",
        ">= 0.9",
    )
    shares = []
    with tempfile.TemporaryDirectory(prefix="arka-bench-") as folder:

        def ours() -> float:
            # Each run on a server of its own: what the one before left to bring down is not this one's.
            with arka_server() as server:
                with connect(server.location) as client:
                    create_table(client, loads.TABLE, batch.schema)
                before = written_bytes(server.pid)
                count, seconds = pump_for(server.location, batch, 4, SECONDS, "disk")
                shares.append((written_bytes(server.pid) - before) / (count * batch.nbytes))
            return float(count * batch.nbytes / 1e6 / seconds)

        def floor() -> float:
            taken = syncs(Path(folder), BLOCK, seconds=SECONDS)
            return len(taken) * BLOCK / 1e6 / sum(taken)

        pairs(result, ours, floor, count=LONG_PAIRS)
    result.notes["bytes the server wrote to the disk for each Arrow byte"] = round(statistics.median(shares), 4)
    yield result


def written_bytes(pid: int) -> int:
    """What a process has sent to block devices; workers, whose files are in memory, are others."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "write_bytes":
            return int(value)
    raise ValueError("no write_bytes")


def pump_for(location: str, batch: pa.RecordBatch, streams: int, seconds: float, tier: str) -> tuple[int, float]:
    """Write for so long on some streams, and wait for the last ack of a tier.

    Returns:
        How many batches were written, and the seconds until the last ack.
    """
    until = time.perf_counter() + seconds
    counts = [0] * streams

    def run(number: int) -> None:
        with connect(location) as client:
            counts[number] = pump_until(client, lambda: time.perf_counter() < until, batch, tier)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(streams)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts), time.perf_counter() - started


def pump_until(client: flight.FlightClient, more: Callable[[], bool], batch: pa.RecordBatch, tier: str) -> int:
    """Write as long as there is more to write; returns the number of writes when all their acks have come."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(loads.TABLE))
    # One ack for all that a tier has reached meanwhile: the client's own work is part of no floor here.
    writer.write_metadata(json.dumps({"requested_durability": tier, "acks": "watermark"}).encode())
    writer.begin(batch.schema)
    failed: list[dict[str, Any]] = []

    def read() -> None:
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            ack = json.loads(chunk.app_metadata.to_pybytes())
            if ack["error"] is not None:
                failed.append(ack)

    reading = threading.Thread(target=read)
    reading.start()
    count = 0
    while more():
        writer.write_batch(batch)
        count += 1
    writer.done_writing()
    reading.join()
    writer.close()
    assert not failed, failed[0]
    return count


@measurement("server-cpu")
def server_cpu() -> Iterator[Result]:
    """What a batch costs the server's process, and its workers."""
    batch = loads.numbers(10_000)
    count = 2_000
    for tier in ("memory", "disk"):
        result = Result(f"server-cpu-{tier}", f"server CPU for each 320 kB batch, {tier} acks", "us")
        workers = []
        for _ in range(PAIRS):
            with arka_server() as server, connect(server.location) as client:
                create_table(client, loads.TABLE, batch.schema)
                loads.pump(client, batch, 100)
                action(client, "Flush", name=loads.TABLE)
                before, before_workers = cpu_of(server)
                loads.pump(client, batch, count, tier)
                now, _ = cpu_of(server)
                action(client, "Flush", name=loads.TABLE)
                result.values.append((now - before) / count * 1e6)
                workers.append((cpu_of(server)[1] - before_workers) / count * 1e6)
        result.notes["us of the workers, for encoding and committing it"] = round(statistics.median(workers))
        yield result


def cpu_of(server: ServerProcess) -> tuple[float, float]:
    """Seconds of CPU that the server's process and those below it have used."""

    def used(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    return used(server.pid), sum(used(pid) for pid in descendants(server.pid))


# -- Iceberg ---------------------------------------------------------------------------------------


@measurement("iceberg-throughput")
def iceberg_throughput() -> Iterator[Result]:
    """The flights again and again, to committed snapshots, beside one core that only writes Parquet."""
    table = flights()
    batches = table.combine_chunks().to_batches(max_chunksize=FLIGHTS_BATCH)
    result = Result(
        "iceberg-throughput",
        f"iceberg_committed MB/s over {SECONDS:.0f} s, flights data, Arrow bytes",
        "MB/s",
        "pyarrow.parquet.write_table of the same rows, zstd, one core",
        ">= 0.8",
    )
    source = Path(tempfile.mkdtemp(prefix="arka-bench-", dir="/dev/shm")) / "flights.arrow"
    with pa.OSFile(str(source), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)

    def ours() -> float:
        with arka_server() as server, connect(server.location) as client:
            create_table(client, loads.TABLE, table.schema)
            until = time.perf_counter() + SECONDS
            started = time.perf_counter()
            sent = 0

            def more() -> bool:
                return time.perf_counter() < until

            sent = pump_rounds(client, batches, more)
            return sent / 1e6 / (time.perf_counter() - started)

    def floor() -> float:
        command = [sys.executable, "-m", "bench.parquet_floor", str(source), str(SECONDS)]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return float(found.stdout) / 1e6

    try:
        yield pairs(result, ours, floor, count=LONG_PAIRS)
    finally:
        source.unlink()
        source.parent.rmdir()


def pump_rounds(client: flight.FlightClient, batches: list[pa.RecordBatch], more: Callable[[], bool]) -> int:
    """Write batches in turn as long as there is time, and wait until all are committed; returns Arrow bytes."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(loads.TABLE))
    asked = {"requested_durability": "iceberg_committed", "acks": "watermark"}
    writer.write_metadata(json.dumps(asked).encode())
    writer.begin(batches[0].schema)

    def read() -> None:
        while True:
            try:
                reader.read_chunk()
            except StopIteration:
                return

    reading = threading.Thread(target=read)
    reading.start()
    number = sent = 0
    while more():
        batch = batches[number % len(batches)]
        writer.write_batch(batch)
        number += 1
        sent += batch.nbytes
    writer.done_writing()
    reading.join()
    writer.close()
    return sent


@measurement("freshness")
def freshness() -> Iterator[Result]:
    """From a write to a row that plain pyiceberg finds."""
    middle = Result(
        "freshness-p50",
        f"sent to visible for a polling pyiceberg reader, {RATE:,} rows/s, interval {INTERVAL_S * 1e3:.0f} ms, p50",
        "ms",
        "the commit interval",
        "<= 1.2",
    )
    late = Result("freshness-p99", "the same, p99", "ms", "the commit interval", "<= 2.5")
    settings = {"iceberg__commit_interval_s": INTERVAL_S}
    for _ in range(PAIRS):
        with arka_server(**settings) as server:
            taken = fresh(server, 8.0)
        for result, share in ((middle, 0.5), (late, 0.99)):
            result.values.append(quantile(taken, share) * 1e3)
            result.floors.append(INTERVAL_S * 1e3)
    yield middle
    yield late


def fresh(server: ServerProcess, seconds: float) -> list[float]:
    """Write rows that say when they were sent; returns how long each took until the reader saw it."""
    schema = pa.schema([("id", pa.int64()), ("sent", pa.float64())])
    stop = threading.Event()
    taken: list[float] = []
    with connect(server.location) as client:
        create_table(client, loads.TABLE, schema)

        def poll() -> None:
            catalog = SqlCatalog("arka", uri=f"sqlite:///{server.data}/catalog.db", warehouse="file:///dev/shm")
            seen = -1
            snapshot = None
            while not stop.is_set():
                table = catalog.load_table(("default", loads.TABLE))
                current = table.current_snapshot()
                if current is None or current.snapshot_id == snapshot:
                    time.sleep(0.01)
                    continue
                # The files of new snapshots alone: to read all rows at each poll would measure the reader.
                now = time.time()
                files = [task.file.file_path for task in table.scan().plan_files()]
                for path in files[: 1 if snapshot is None else len(files)]:
                    rows = pq.read_table(path.removeprefix("file://"), columns=["id", "sent"])
                    new = rows.filter(pc.field("id") > seen) if path not in known else rows.slice(0, 0)
                    known.add(path)
                    taken.extend(now - sent for sent in new.column("sent").to_pylist())
                snapshot = current.snapshot_id
            catalog.close()

        known: set[str] = set()
        reader = threading.Thread(target=poll)
        reader.start()
        writer, acks = client.do_exchange(flight.FlightDescriptor.for_path(loads.TABLE))
        writer.write_metadata(json.dumps({"requested_durability": "iceberg_committed", "acks": "watermark"}).encode())
        writer.begin(schema)
        step = 0.01
        per = int(RATE * step)
        started = time.perf_counter()
        number = 0
        while time.perf_counter() - started < seconds:
            ids = range(number, number + per)
            writer.write_batch(pa.record_batch([pa.array(ids), pa.array([time.time()] * per)], schema=schema))
            number += per
            time.sleep(max(0.0, started + number / RATE - time.perf_counter()))
        writer.done_writing()
        while True:
            try:
                acks.read_chunk()
            except StopIteration:
                break
        time.sleep(0.5)
        stop.set()
        reader.join()
    # The first commit has the workers' start in it.
    return taken[RATE:]


# -- streams ----------------------------------------------------------------------------


@measurement("idle-streams")
def idle_streams() -> Iterator[Result]:
    """A thousand streams that have written once and say nothing."""
    count = 1_000
    batch = loads.numbers(1)
    result = Result("idle-streams", f"memory of each of {count:,} idle streams", "kB", target="<= 32")
    for _ in range(PAIRS):
        with arka_server() as server, connect(server.location) as client:
            create_table(client, loads.TABLE, batch.schema)
            loads.pump(client, batch, 100)
            action(client, "Flush", name=loads.TABLE)
            before, threads = resident(server.pid), thread_count(server.pid)
            open_streams = []
            for _ in range(count):
                writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(loads.TABLE))
                writer.begin(batch.schema)
                writer.write_batch(batch)
                reader.read_chunk()
                open_streams.append((writer, reader))
            result.values.append((resident(server.pid) - before) / count / 1e3)
            result.notes["threads more"] = thread_count(server.pid) - threads
            for writer, reader in open_streams:
                writer.done_writing()
                while True:
                    try:
                        reader.read_chunk()
                    except StopIteration:
                        break
                writer.close()
    yield result


def resident(pid: int) -> int:
    """Resident memory in bytes."""
    return memory_of({pid})[1]


def thread_count(pid: int) -> int:
    """Threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))
