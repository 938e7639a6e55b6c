"""The neighbour: a well-behaved client beside an attack, which says what it felt and whether its rows are all there.

A writer sends a row every 10 ms and waits for its disk ack, another waits for each row's iceberg_committed, a reader
reads the second table every second. All are stock pyarrow, each on a connection of its own, from 127.0.0.1.

It obeys lines on its standard input: ``window NAME`` ends the last window of samples and begins one, ``stop`` ends it.
It answers with one JSON line for each: what the window that ended has seen.

Owns: latencies as a client sees them, and the rows that were acknowledged. Does not own the server.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from bench.harness import quantile
from tests.process.clients import Stream, action, connect

PERIOD_S = 0.01
SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False), ("s", pa.string())])
#: Ends what hangs: a call that takes longer counts as never answered.
HANG_S = 120.0


def rows(first: int, count: int = 1) -> pa.RecordBatch:
    """Rows whose second column follows from the first: a mixed-up row shows."""
    numbers = range(first, first + count)
    return pa.record_batch([pa.array(numbers, pa.int64()), pa.array([f"v{n}" for n in numbers])], schema=SCHEMA)


class Samples:
    """Latencies of one kind of call, in windows; a call that has not ended counts with its age."""

    def __init__(self) -> None:
        self._locked = threading.Lock()
        self._taken: list[float] = []
        self._begun: float | None = None
        self.errors: Counter[str] = Counter()

    def begin(self) -> None:
        """A call begins."""
        with self._locked:
            self._begun = time.monotonic()

    def end(self) -> None:
        """It has ended."""
        with self._locked:
            assert self._begun is not None
            self._taken.append(time.monotonic() - self._begun)
            self._begun = None

    def fail(self, error: str) -> None:
        """It has failed."""
        with self._locked:
            self.errors[error[:100]] += 1
            self._begun = None

    def take(self, since: float) -> dict[str, Any]:
        """End a window that began at ``since``; gives milliseconds."""
        with self._locked:
            taken, self._taken = self._taken, []
            if self._begun is not None:
                taken = [*taken, time.monotonic() - max(self._begun, since)]
            errors, self.errors = dict(self.errors), Counter()
        milliseconds = [value * 1000 for value in taken]
        return {
            "n": len(taken),
            "p50": quantile(milliseconds, 0.5) if taken else None,
            "p99": quantile(milliseconds, 0.99) if taken else None,
            "max": max(milliseconds, default=None),
            "errors": errors,
        }


class Writer:
    """Writes a row, waits for its ack, writes the next; opens a new stream when the old one ends."""

    def __init__(self, location: str, table: str, durability: str, period_s: float) -> None:
        self.samples = Samples()
        self.table = table
        # Acknowledged rows, and those that were sent and got no ack: they may be in the table or not.
        self.acked: list[int] = []
        self.unsure: list[int] = []
        self._location = location
        self._durability = durability
        self._period_s = period_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stopped.is_set():
            try:
                with connect(self._location) as client:
                    stream = Stream(client, self.table, SCHEMA, 3600.0, requested_durability=self._durability)
                    while not self._stopped.is_set():
                        started = time.monotonic()
                        number += 1
                        self.unsure.append(number)
                        self.samples.begin()
                        stream.write(rows(number))
                        while (ack := stream.ack())["durability_level"] != self._durability and not ack["error"]:
                            pass
                        if ack["error"]:
                            if ack.get("code") != "outcome_unknown":
                                self.unsure.pop()
                            self.samples.fail(ack["error"])
                        else:
                            self.samples.end()
                            self.acked.append(self.unsure.pop())
                        self._stopped.wait(max(0.0, self._period_s - (time.monotonic() - started)))
                    stream.finish()
            except (flight.FlightError, pa.ArrowException, StopIteration) as error:
                self.samples.fail(f"{type(error).__name__}: {error}")
                self._stopped.wait(0.2)

    def stop(self) -> None:
        """Stop after the write that is on its way."""
        self._stopped.set()
        self._thread.join(HANG_S)

    def account(self, client: flight.FlightClient) -> dict[str, Any]:
        """Read the table: what is missing, what is there twice, what nobody sent."""
        found = client.do_get(flight.Ticket(self.table.encode())).read_all()
        seen = Counter(zip(found["n"].to_pylist(), found["s"].to_pylist(), strict=True))
        mine = {(n, f"v{n}") for n in self.acked}
        known = mine | {(n, f"v{n}") for n in self.unsure}
        return {
            "acked": len(mine),
            "missing": sorted(n for n, _ in mine - seen.keys())[:5],
            "twice": sorted(n for (n, _), times in seen.items() if times > 1)[:5],
            "strange": len(seen.keys() - known),
        }


class Reader:
    """Reads a table every second."""

    def __init__(self, location: str, table: str) -> None:
        self.samples = Samples()
        self._location = location
        self._table = table
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with connect(self._location) as client:
                    while not self._stopped.is_set():
                        self.samples.begin()
                        options = flight.FlightCallOptions(timeout=HANG_S)
                        client.do_get(flight.Ticket(self._table.encode()), options).read_all()
                        self.samples.end()
                        self._stopped.wait(1.0)
            except (flight.FlightError, pa.ArrowException) as error:
                self.samples.fail(f"{type(error).__name__}: {error}")
                self._stopped.wait(1.0)

    def stop(self) -> None:
        """Stop after the read that is on its way."""
        self._stopped.set()
        self._thread.join(HANG_S)


def create(client: flight.FlightClient, name: str) -> None:
    """Create a table of the neighbour's."""
    fields = [{"name": "n", "type": "int64", "nullable": False}, {"name": "s", "type": "utf8"}]
    action(client, "CreateTable", name=name, schema_json={"fields": fields})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("location")
    location = parser.parse_args().location
    with connect(location) as client:
        create(client, "neighbour_disk")
        create(client, "neighbour_iceberg")
    disk = Writer(location, "neighbour_disk", "disk", PERIOD_S)
    iceberg = Writer(location, "neighbour_iceberg", "iceberg_committed", 0.05)
    reader = Reader(location, "neighbour_iceberg")
    parts = {"disk": disk.samples, "iceberg": iceberg.samples, "read": reader.samples}

    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
        lines.put("abandon")

    threading.Thread(target=listen, daemon=True).start()
    _say({"ready": True})
    since = time.monotonic()
    while True:
        word, _, rest = lines.get().partition(" ")
        if word == "window":
            _say({name: samples.take(since) for name, samples in parts.items()})
            since = time.monotonic()
        elif word == "stop":
            # Of the server that runs now, which may be another one on the same data.
            for each in (disk, iceberg, reader):
                each.stop()
            with connect(rest or location) as client:
                _say({"disk": disk.account(client), "iceberg": iceberg.account(client)})
            return 0
        else:
            return 1


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
