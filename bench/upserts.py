"""Primary-key tables: what upserts cost beside appends, what an index of ten million keys takes, and small commits.

Environment: ``BENCH_KEYS`` makes the large table smaller than ten million rows, for a quick look.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from arka._core.rowkeys import HASH_BYTES
from arka._core.runs import write_run
from arka.iceberg.keyindex import KeyIndex
from arka.iceberg.runfiles import map_run, new_run
from bench.harness import Result, measurement, pairs, quantile
from bench.servers import action, arka_server, connect, create_table

MANY = int(os.environ.get("BENCH_KEYS", 10_000_000))
FEW = 10_000
BATCH = 10_000

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        ("name", pa.string()),
        ("city", pa.string()),
        ("score", pa.float64()),
        ("seen", pa.timestamp("us")),
    ]
)


def rows(ids: np.ndarray, version: int) -> pa.RecordBatch:
    """Rows of some 60 bytes with these keys."""
    names = pa.array(np.char.add("customer-", (ids % 1_000_003).astype("U7")))
    cities = pa.DictionaryArray.from_arrays(pa.array(ids % 50, pa.int32()), [f"city {n}" for n in range(50)])
    return pa.record_batch(
        [
            pa.array(ids, pa.int64()),
            names,
            cities.dictionary_decode(),
            pa.array(ids * 0.5 + version),
            pa.array(ids + version, pa.timestamp("us")),
        ],
        schema=SCHEMA,
    )


def write(client: flight.FlightClient, table: str, batches: list[pa.RecordBatch]) -> tuple[float, dict[str, float]]:
    """Write batches and wait for the last ``iceberg_committed``; returns seconds, and the p99 of each tier's acks."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(table))
    writer.write_metadata(json.dumps({"requested_durability": "iceberg_committed"}).encode())
    writer.begin(SCHEMA)
    sent: list[float] = []
    taken: dict[str, list[float]] = {}

    def read() -> None:
        for _ in range(4 * len(batches)):
            ack = json.loads(reader.read_chunk().app_metadata.to_pybytes())
            assert ack["error"] is None, ack
            taken.setdefault(ack["durability_level"], []).append(time.perf_counter() - sent[ack["sequence"]])

    reading = threading.Thread(target=read)
    started = time.perf_counter()
    reading.start()
    for batch in batches:
        sent.append(time.perf_counter())
        writer.write_batch(batch)
    reading.join()
    seconds = time.perf_counter() - started
    writer.done_writing()
    writer.close()
    return seconds, {tier: quantile(times, 0.99) * 1e3 for tier, times in taken.items()}


def make_tables(client: flight.FlightClient, **tables: bool) -> None:
    """Create tables, those that are true with a primary key."""
    for name, keyed in tables.items():
        more = {"table_type": "primary_key", "primary_key": "id"} if keyed else {}
        create_table(client, name, SCHEMA, **more)


def fill(client: flight.FlightClient, table: str, count: int) -> float:
    """Write this many keys, in random order; returns rows a second to ``iceberg_committed``."""
    rng = np.random.default_rng(1)
    ids = rng.permutation(count)
    seconds = 0.0
    for start in range(0, count, 100 * BATCH):
        part = ids[start : start + 100 * BATCH]
        batches = [rows(part[at : at + BATCH], 0) for at in range(0, len(part), BATCH)]
        seconds += write(client, table, batches)[0]
    return count / seconds


@measurement("upserts")
def upserts() -> Iterator[Result]:
    """A million upserts over a million keys that are there, beside a million appended rows."""
    count = min(MANY, 1_000_000)
    rng = np.random.default_rng(2)
    acks: dict[str, list[float]] = {}
    result = Result(
        "upserts",
        f"{count:,} upserts over {count:,} existing keys, from the first batch to the last iceberg_committed",
        "s",
        "the same rows appended to an append-only table of the same server",
    )

    def side(client: flight.FlightClient, table: str) -> float:
        ids = rng.permutation(count)
        batches = [rows(ids[at : at + BATCH], 1) for at in range(0, count, BATCH)]
        seconds, late = write(client, table, batches)
        for tier in ("memory", "disk"):
            acks.setdefault(f"{table}_{tier}_ack_p99_ms", []).append(late[tier])
        return seconds

    with arka_server() as server, connect(server.location) as client:
        make_tables(client, keyed=True, appended=False)
        fill(client, "keyed", count)
        pairs(result, lambda: side(client, "keyed"), lambda: side(client, "appended"))
    result.notes = {name: statistics.median(values) for name, values in acks.items()}
    result.notes["rows_per_s"] = count / statistics.median(result.values)
    yield result
    yield Result("upserts-limit", "the same: the slowest run", "s", "", "<= 10.0", [max(result.values)])


def _memory_kib(word: str) -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{word}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {word} in smaps_rollup")


def _write_all(hashes: bytes, descriptor: int) -> None:
    write_run(descriptor, [(hashes, 0, None)])


def _look_up(directory: str, pipe: multiprocessing.connection.Connection) -> None:
    """Open the index that lies in a directory, and look batches of keys up; runs in a process of its own."""
    rng = np.random.default_rng(3)
    hashes = np.memmap(Path(directory, "hashes"), np.uint8, "r").reshape(-1, HASH_BYTES)
    before = {word: _memory_kib(word) for word in ("Rss", "Anonymous")}
    index = KeyIndex(str(Path(directory, "index")), UUID(int=1), b"s" * 16)
    index.open()
    taken = []
    for _ in range(40):
        chosen = hashes[rng.choice(len(hashes), BATCH, replace=False)].tobytes()
        name = new_run(directory, partial(_write_all, chosen))
        run = map_run(str(Path(directory, name)))
        started = time.perf_counter()
        places = index.find(run)
        taken.append((time.perf_counter() - started) * 1e3)
        assert places.files.null_count == 0
    after = {word: _memory_kib(word) - kib for word, kib in before.items()}
    pipe.send((taken, after))


@measurement("key-index")
def key_index() -> Iterator[Result]:
    """Ten million keys: what their index takes, and how long a batch's keys take to be found."""
    directory = tempfile.mkdtemp(prefix="arka-bench-")
    try:
        rng = np.random.default_rng(4)
        hashes = rng.integers(0, 256, (MANY, HASH_BYTES), np.uint8)
        hashes.tofile(Path(directory, "hashes"))
        folder = str(Path(directory, "index"))
        started = time.perf_counter()
        name = new_run(folder, partial(_write_all, hashes.tobytes()))
        KeyIndex(folder, UUID(int=1), b"s" * 16).begin(1, ["file:///t/data/one.parquet"], name, "")
        built_s = time.perf_counter() - started
        del hashes
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_look_up, args=(directory, theirs))
        process.start()
        taken, memory = ours.recv()
        process.join()
    finally:
        shutil.rmtree(directory)
    notes = {"disk_bytes_per_key": size / MANY, "built_s": built_s, "first_ms": taken[0]}
    notes |= {f"{word.lower()}_growth_mib": kib / 1024 for word, kib in memory.items()}
    what = f"{BATCH:,} keys of {MANY:,} looked up in the index, once warm"
    yield Result("key-lookup", what, "ms", "", "<= 20.0", taken[1:], notes=notes)
    yield Result("key-lookup-first", "the same, the first time: each block is checked", "ms", "", "<= 20.0", taken[:1])
    rss = [memory["Rss"] / 1024]
    yield Result("key-index-rss", f"resident memory of that index of {MANY:,} keys", "MiB", "", "<= 500.0", rss)


def _small(client: flight.FlightClient, table: str, keys: int, number: int, *, spread: bool) -> float:
    """Upsert ten rows; returns milliseconds until they are committed."""
    step = keys // 10 if spread else 1
    ids = (np.arange(10) * step + number * 7919) % keys
    return write(client, table, [rows(ids, number)])[0] * 1e3


@measurement("small-commits")
def small_commits() -> Iterator[Result]:
    """Ten upserts on a table of ten million rows beside ten on one of ten thousand."""
    with arka_server(iceberg__commit_interval_s=0.01) as server, connect(server.location) as client:
        make_tables(client, large=True, small=True)
        rate = fill(client, "large", MANY)
        fill(client, "small", FEW)
        numbers = iter(range(1_000_000))
        for word, spread in (("spread", True), ("beside", False)):
            result = Result(
                f"small-commits-{word}",
                f"10 upserts, keys {'spread over the table' if spread else 'beside each other'}, {MANY:,} rows: to "
                "iceberg_committed",
                "ms",
                f"the same on {FEW:,} rows",
                "<= 2.0",
            )
            # More than enough that delete files grow and manifests are merged.
            pairs(
                result,
                lambda spread=spread: _small(client, "large", MANY, next(numbers), spread=spread),  # type: ignore[misc]
                lambda spread=spread: _small(client, "small", FEW, next(numbers), spread=spread),  # type: ignore[misc]
                count=150,
            )
            first, last = (statistics.median(result.values[part]) for part in (slice(0, 20), slice(-20, None)))
            result.notes = {"filled_rows_per_s": rate, "first_20_ms": first, "last_20_ms": last}
            yield result
        action(client, "Flush", name="large")
