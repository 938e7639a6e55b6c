"""An outage of the object store under load: what it costs in memory, and how long the catching up takes.

    python -m tests.services.outage [--outage-s 60] [--mb-per-s 50]

A server on SeaweedFS (S3 and Iceberg REST) takes two streams of batches at a steady rate. SeaweedFS is killed, stays
away while the writers go on, and is started again on the same data. Checked at the end: each write had its four acks
in order and its row is in Iceberg exactly once; memory stayed under its limit plus a fixed allowance. Prints one line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight
from pyiceberg.catalog import load_catalog

from arka.options import MIB
from arka.testing.backends import Components
from arka.testing.serverprocess import ServerProcess
from tests.process.clients import TIERS, Stream, connect, create

STREAMS = 2
BATCH_BYTES = MIB
#: The ledger's limit during the run, and what a server may hold beyond it (interpreters, libraries, workers).
MEMORY_LIMIT_BYTES = 512 * MIB
ALLOWANCE_BYTES = 200 * MIB
SAMPLE_S = 0.5
#: Load before the outage, in seconds: the workers' caches are warm then.
WARM_S = 3.0
#: Ends only what hangs.
CATCH_UP_TIMEOUT_S = 900.0

_PAYLOAD_BYTES = 1000
_ROWS = BATCH_BYTES // (_PAYLOAD_BYTES + 8)
SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("payload", pa.binary())])


@dataclass
class Figures:
    """What a run measured; bytes and seconds."""

    outage_s: float
    written_bytes: int = 0
    rate_mb_per_s: float = 0.0
    warm_anonymous_bytes: int = 0
    peak_anonymous_bytes: int = 0
    peak_resident_bytes: int = 0
    peak_server_anonymous_bytes: int = 0
    catch_up_s: float = 0.0
    acks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    disk_acks_during_outage: int = 0

    def line(self) -> str:
        """All of it for people, on one line."""
        acks = " ".join(f"{tier}={count}" for tier, count in self.acks.items())
        return (
            f"outage {self.outage_s:g} s at {self.rate_mb_per_s:.0f} MB/s: wrote {self.written_bytes // MIB} MiB, "
            f"max anonymous {self.peak_anonymous_bytes // MIB} MiB (warm {self.warm_anonymous_bytes // MIB}, "
            f"server alone {self.peak_server_anonymous_bytes // MIB}), "
            f"max resident {self.peak_resident_bytes // MIB} MiB, acks {acks}, "
            f"disk acks during the outage {self.disk_acks_during_outage}, "
            f"caught up in {self.catch_up_s:.1f} s"
        )


class Load:
    """One stream that writes at a steady rate until it is told to stop, and checks its acks as they come.

    Attributes:
        sent: batches written so far.
        reached: how many writes have been acked at each tier, in order.
        failure: why the stream ended, if it did not end as asked.
    """

    def __init__(self, client: flight.FlightClient, table: str, number: int, bytes_per_s: float) -> None:
        self.sent = 0
        self.reached = dict.fromkeys(TIERS, 0)
        self.failure: BaseException | None = None
        self._pause_s = BATCH_BYTES / bytes_per_s
        self._payload = pa.array([bytes([number]) * _PAYLOAD_BYTES] * _ROWS, pa.binary())
        self._number = number
        self._stop = threading.Event()
        self._stream = Stream(client, table, SCHEMA, timeout_s=3600, requested_durability="iceberg_committed")
        self._threads = [threading.Thread(target=self._write), threading.Thread(target=self._read)]
        for thread in self._threads:
            thread.start()

    def rows_sent(self) -> set[int]:
        """The values of ``n`` that are written."""
        return {self._n(batch, row) for batch in range(self.sent) for row in range(_ROWS)}

    def stop(self) -> None:
        """Write no more."""
        self._stop.set()

    def finish(self) -> None:
        """Wait until every write has its last ack."""
        for thread in self._threads:
            thread.join(CATCH_UP_TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        assert self.reached == dict.fromkeys(TIERS, self.sent), f"{self.reached} of {self.sent}"

    def _n(self, batch: int, row: int) -> int:
        return (batch * _ROWS + row) * STREAMS + self._number

    def _write(self) -> None:
        due = time.monotonic()
        try:
            while not self._stop.is_set():
                values = pa.array([self._n(self.sent, row) for row in range(_ROWS)], pa.int64())
                self._stream.write(pa.record_batch([values, self._payload], schema=SCHEMA))
                self.sent += 1
                due = max(due + self._pause_s, time.monotonic() - 1)
                self._stop.wait(max(0.0, due - time.monotonic()))
            self._stream.writer.done_writing()
        except (flight.FlightError, pa.ArrowException) as error:
            self.failure = self.failure or error

    def _read(self) -> None:
        try:
            for ack in self._stream.rest():
                tier = ack["durability_level"]
                assert ack["error"] is None, ack
                assert ack["sequence"] == self.reached[tier], f"{ack}: {self.reached[tier]} was next of its tier"
                before = TIERS[max(0, TIERS.index(tier) - 1)]
                assert tier == before or self.reached[tier] < self.reached[before], f"{ack} came before its {before}"
                self.reached[tier] += 1
        except (flight.FlightError, pa.ArrowException, AssertionError) as error:
            self.failure = self.failure or error
            self._stop.set()


class Sampler:
    """Samples what server and workers hold, until it is stopped."""

    def __init__(self, server: ServerProcess, figures: Figures) -> None:
        self._server = server
        self._figures = figures
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        figures = self._figures
        while not self._stop.wait(SAMPLE_S):
            anonymous, resident = self._server.memory()
            figures.peak_anonymous_bytes = max(figures.peak_anonymous_bytes, anonymous)
            figures.peak_resident_bytes = max(figures.peak_resident_bytes, resident)
            figures.peak_server_anonymous_bytes = max(
                figures.peak_server_anonymous_bytes, self._server.memory(workers=False)[0]
            )


def run_outage(folder: Path, components: Components, *, outage_s: float, mb_per_s: float) -> Figures:
    """Run it once.

    Args:
        folder: for the data directory.
        components: their SeaweedFS is killed and started again.
        outage_s: how long it is away.
        mb_per_s: of both streams together, in 10^6 bytes.

    Raises:
        AssertionError: an ack is missing or out of order, or the rows in Iceberg are not those that were written.
    """
    backend = components.backend("s3-rest")
    table = f"{backend.namespace}.load"
    settings = {
        **backend.settings,
        "limits.memory_bytes": MEMORY_LIMIT_BYTES,
        "limits.disk_free_bytes": 0,
        "server.drain_s": 60,
    }
    figures = Figures(outage_s)
    with ServerProcess(folder / "data", settings) as server, connect(server.location) as client:
        create(client, table, [("n", "int64!"), ("payload", "binary")])
        sampler = Sampler(server, figures)
        began = time.monotonic()
        loads = [Load(client, table, number, mb_per_s * 1e6 / STREAMS) for number in range(STREAMS)]
        try:
            time.sleep(WARM_S)
            figures.warm_anonymous_bytes = server.memory()[0]
            components.seaweedfs.kill()
            on_disk = sum(load.reached["disk"] for load in loads)
            time.sleep(outage_s)
            figures.disk_acks_during_outage = sum(load.reached["disk"] for load in loads) - on_disk
            components.seaweedfs.start()
            returned = time.monotonic()
            figures.written_bytes = sum(load.sent for load in loads) * BATCH_BYTES
            figures.rate_mb_per_s = figures.written_bytes / (returned - began) / 1e6
        finally:
            for load in loads:
                load.stop()
            for load in loads:
                load.finish()
            sampler.stop()
        figures.catch_up_s = time.monotonic() - returned
    for tier in TIERS:
        figures.acks[tier] = sum(load.reached[tier] for load in loads)
    catalog = load_catalog("arka", **backend.catalog)
    found = catalog.load_table(table).scan(selected_fields=("n",)).to_arrow()["n"].to_pylist()
    catalog.close()
    expected = set[int]().union(*(load.rows_sent() for load in loads))
    assert len(found) == len(expected), f"{len(found)} rows in Iceberg, {len(expected)} written"
    assert set(found) == expected
    return figures


def check_memory(figures: Figures) -> None:
    """Hold a run to its memory limit.

    Raises:
        AssertionError: server and workers together held more.
    """
    limit = MEMORY_LIMIT_BYTES + ALLOWANCE_BYTES
    assert figures.peak_anonymous_bytes <= limit, f"over {limit}: {figures.line()}"


def main(arguments: Sequence[str]) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outage-s", type=float, default=60.0)
    parser.add_argument("--mb-per-s", type=float, default=50.0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="arka-outage-") as name, Components(Path(name)) as components:
        figures = run_outage(Path(name), components, outage_s=given.outage_s, mb_per_s=given.mb_per_s)
    print(json.dumps(vars(figures)) if given.json else figures.line())
    check_memory(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
