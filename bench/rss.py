"""Memory over a long time: ``python -m bench.rss``, or ``make bench-rss``.

A stream writes at half of the rate that the server was just seen to bring to Iceberg, and the memory of the server and
its workers is read each second. Reported is the slope of a straight line through the last two thirds (least squares):
the first third may fill caches. What several processes share counts once.

Environment: ``BENCH_MINUTES`` is how long (30).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from arka.testing.serverprocess import ServerProcess
from bench import loads
from bench.harness import Result, record
from bench.servers import action, arka_server, connect, create_table
from bench.tiers import pump_rounds

MINUTES = float(os.environ.get("BENCH_MINUTES", 30))
#: How long the maximum rate is looked for.
MAXIMUM_S = min(15.0, MINUTES * 20)
ROWS = 10_000
#: The rows repeat, so that half an hour of them is small on the disk.
DIFFERENT_ROWS = 100


@dataclass
class Samples:
    """Memory of the server and its workers, one a second.

    Attributes:
        seconds: since the first.
        resident: bytes.
        anonymous: bytes, without mapped files.
        own: of those, the server's own, without its workers.
    """

    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)

    def slope(self, values: list[int]) -> float:
        """How fast values grow over the last two thirds: kB a minute."""
        start = len(values) // 3
        per_second, _ = np.polyfit(self.seconds[start:], values[start:], 1)
        return float(per_second) * 60 / 1e3


def maximum(client: flight.FlightClient, batch: pa.RecordBatch) -> float:
    """Write as fast as goes, to the last commit; returns batches a second."""
    started = time.perf_counter()
    sent = pump_rounds(client, [batch], lambda: time.perf_counter() < started + MAXIMUM_S)
    return float(sent / batch.nbytes / (time.perf_counter() - started))


def watch(server: ServerProcess, stop: threading.Event) -> Samples:
    """Sample until told to stop."""
    samples = Samples()
    started = time.perf_counter()
    while not stop.wait(max(0.0, started + len(samples.seconds) - time.perf_counter())):
        anonymous, resident = server.memory()
        samples.seconds.append(time.perf_counter() - started)
        samples.resident.append(resident)
        samples.anonymous.append(anonymous)
        samples.own.append(server.memory(workers=False)[0])
    return samples


def paced(client: flight.FlightClient, batch: pa.RecordBatch, rate: float, seconds: float) -> int:
    """Write at a rate for so long, and wait until all is committed; returns the number of batches."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(loads.TABLE))
    asked = {"requested_durability": "iceberg_committed", "acks": "watermark"}
    writer.write_metadata(json.dumps(asked).encode())
    writer.begin(batch.schema)
    failed = []

    def read() -> None:
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            ack = json.loads(chunk.app_metadata.to_pybytes())
            if ack["error"]:
                failed.append(ack)

    reading = threading.Thread(target=read)
    reading.start()
    started = time.perf_counter()
    count = 0
    while (now := time.perf_counter() - started) < seconds:
        if count / rate <= now:
            writer.write_batch(batch)
            count += 1
        else:
            time.sleep(count / rate - now)
    writer.done_writing()
    reading.join()
    writer.close()
    assert not failed, failed[0]
    return count


def main() -> None:
    """Measure, print the line, write the result."""
    batch = loads.repeating(ROWS, DIFFERENT_ROWS)
    with (
        # On the disk: half an hour of uncommitted writes would not fit into memory, should commits fall behind.
        tempfile.TemporaryDirectory(prefix="arka-bench-") as folder,
        arka_server(
            object_store__url=f"file://{folder}/objects", iceberg__warehouse=f"file://{folder}/warehouse"
        ) as server,
        connect(server.location) as client,
    ):
        create_table(client, loads.TABLE, batch.schema)
        most = maximum(client, batch)
        action(client, "Flush", name=loads.TABLE)
        sys.stdout.write(f"maximum {most * batch.nbytes / 1e6:,.0f} MB/s; {MINUTES:g} minutes at half of it\n")
        sys.stdout.flush()
        stop = threading.Event()
        found: list[Samples] = []
        watching = threading.Thread(target=lambda: found.append(watch(server, stop)))
        watching.start()
        count = paced(client, batch, most / 2, MINUTES * 60)
        stop.set()
        watching.join()
    (samples,) = found
    what = f"growth of the memory of server and workers in {MINUTES:g} minutes at half of the maximum rate"
    result = Result("rss-slope", what, "kB/min", values=[samples.slope(samples.resident)])
    third = len(samples.resident) // 3
    result.notes = {
        "anonymous, kB/min": round(samples.slope(samples.anonymous), 1),
        "anonymous of the server alone, kB/min": round(samples.slope(samples.own), 1),
        "MiB after a third": round(samples.resident[third] / 2**20, 1),
        "MiB at the end": round(samples.resident[-1] / 2**20, 1),
        "most MiB": round(max(samples.resident) / 2**20, 1),
        "MB/s": round(count * batch.nbytes / 1e6 / (MINUTES * 60), 1),
        "batches": count,
        "samples": len(samples.seconds),
    }
    record(result, "rss")


if __name__ == "__main__":
    main()
