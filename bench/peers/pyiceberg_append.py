"""pyiceberg alone: what a program does that appends each batch to the table itself, without a server."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyiceberg.catalog.sql import SqlCatalog

from bench import loads, peers
from bench.harness import Result, measurement, pairs
from bench.servers import MEMORY

ROWS = 10_000
#: Of both sides: an append costs more with every snapshot that is there already.
COUNT = 100
PAIRS = 3


def _append(batch: pa.RecordBatch, count: int) -> float:
    """Append a batch again and again to a new table, whose catalog and files lie where Arka's do; returns seconds."""
    log = Path(tempfile.mkdtemp(prefix="arka-bench-"))
    warehouse = Path(tempfile.mkdtemp(prefix="arka-bench-", dir=MEMORY))
    rows = pa.Table.from_batches([batch])
    try:
        catalog = SqlCatalog("bench", uri=f"sqlite:///{log}/catalog.db", warehouse=f"file://{warehouse}")
        catalog.create_namespace("default")
        table = catalog.create_table("default.load", batch.schema)
        started = time.perf_counter()
        for _ in range(count):
            table.append(rows)
        seconds = time.perf_counter() - started
        catalog.close()
    finally:
        shutil.rmtree(log, ignore_errors=True)
        shutil.rmtree(warehouse, ignore_errors=True)
    return seconds


@measurement("pyiceberg-append")
def pyiceberg_append() -> Iterator[Result]:
    """Batches that are committed."""
    batch = loads.numbers(ROWS)
    result = Result(
        "pyiceberg-append",
        f"batches of {ROWS:,} rows, to iceberg_committed: {COUNT} on 1 stream",
        "batches/s",
        "pyiceberg's Table.append for each, to a new table",
    )
    with peers.arka(batch) as ours:

        def committed() -> float:
            seconds, _ = loads.pump_all(ours, batch, 1, COUNT, "iceberg_committed")
            return COUNT / seconds

        yield pairs(result, committed, lambda: COUNT / _append(batch, COUNT), count=PAIRS)
