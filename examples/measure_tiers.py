"""Measure how long a write takes to each tier on this machine, and write the README's table.

    python examples/measure_tiers.py [--write README.md]

One stream sends batches at a steady pace to a server of its own on embedded defaults, everything on the
local disk. Latency is from just before ``write_batch`` until the client has the ack. It is no load test:
``bench/`` is for those.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median, quantiles

import pyarrow as pa
import pyarrow.flight as flight
from local_server import LocalServer

PROMISES = {
    "memory": "ordered and accepted, in the write buffer; lost if the process dies",
    "disk": "fsynced; survives SIGKILL, and power loss as far as the disk does",
    "object_storage": "readable in the object store; survives loss of the node and its disk",
    "iceberg_committed": "visible to every Iceberg reader in the snapshot that the ack names",
}
BEGIN = "<!-- tiers: written by examples/measure_tiers.py -->"
END = "<!-- tiers: end -->"


def make_batch(rows: int) -> pa.RecordBatch:
    """Make a batch of four plain columns."""
    return pa.record_batch(
        {
            "id": pa.array(range(rows), pa.int64()),
            "value": pa.array([n / 7 for n in range(rows)], pa.float64()),
            "kind": pa.array([f"kind-{n % 16}" for n in range(rows)]),
            "at": pa.array([1_700_000_000_000_000 + n for n in range(rows)], pa.timestamp("us")),
        }
    )


def create_table(client: flight.FlightClient, schema: pa.Schema) -> None:
    """Create the table that the batches go to."""
    spelled = {pa.string(): "utf8", pa.float64(): "float64"}
    fields = [{"name": f.name, "type": spelled.get(f.type, str(f.type))} for f in schema]
    request = {"name": "measured", "schema_json": json.dumps({"fields": fields})}
    list(client.do_action(flight.Action("CreateTable", json.dumps(request).encode())))


def measure(location: str, *, writes: int, rows: int, per_second: float) -> dict[str, list[float]]:
    """Write at a steady pace and return seconds from write to ack, by tier.

    Raises:
        RuntimeError: a write was refused or acks are missing.
    """
    batch = make_batch(rows)
    latencies_s: dict[str, list[float]] = {tier: [] for tier in PROMISES}
    sent_at: list[float] = []
    with flight.FlightClient(location) as client:
        create_table(client, batch.schema)
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_path("measured"))

        def read_acks() -> None:
            for chunk in reader:
                now = time.monotonic()
                ack = json.loads(chunk.app_metadata.to_pybytes())
                if ack["error"] is None:
                    latencies_s[ack["durability_level"]].append(now - sent_at[ack["sequence"]])

        reading = threading.Thread(target=read_acks)
        with writer:
            writer.write_metadata(b'{"requested_durability": "iceberg_committed"}')
            writer.begin(batch.schema)
            reading.start()
            started = time.monotonic()
            for number in range(writes):
                time.sleep(max(started + number / per_second - time.monotonic(), 0))
                sent_at.append(time.monotonic())
                writer.write_batch(batch)
            writer.done_writing()
            reading.join()
    counts = {tier: len(values) for tier, values in latencies_s.items()}
    if set(counts.values()) != {writes}:
        raise RuntimeError(f"{writes} writes, but acks: {counts}")
    return latencies_s


def format_latency(seconds: float) -> str:
    """Write milliseconds with as many digits as mean anything."""
    amount = 1000 * seconds
    return f"{amount:.2f} ms" if amount < 1 else f"{amount:.1f} ms" if amount < 10 else f"{amount:.0f} ms"


def make_table(latencies_s: dict[str, list[float]], conditions: str) -> str:
    """Write the tiers, their promises and what was measured as Markdown."""
    lines = ["| Tier | Its ack promises | p50 | p99 |", "|---|---|--:|--:|"]
    for tier, promise in PROMISES.items():
        high = quantiles(latencies_s[tier], n=100, method="inclusive")[98]
        lines.append(f"| `{tier}` | {promise} | {format_latency(median(latencies_s[tier]))} | {format_latency(high)} |")
    return "\n".join([*lines, "", f"Measured: {conditions}"])


def replace_block(page: str, block: str) -> str:
    """Put ``block`` between the page's two markers.

    Raises:
        ValueError: the page does not have them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no block between {BEGIN} and {END}")
    return f"{before}{begin}\n{block}\n{end}{after}"


def main() -> int:
    """Run on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--writes", type=int, default=400)
    parser.add_argument("--rows", type=int, default=1000, help="rows of each write")
    parser.add_argument("--per-second", type=float, default=20, help="writes per second")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="replace the block in this page")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="arka-tiers-") as folder,
        LocalServer(Path(folder) / "data") as server,
    ):
        latencies_s = measure(
            server.location, writes=arguments.writes, rows=arguments.rows, per_second=arguments.per_second
        )
        server.stop()
    conditions = (
        f"{arguments.writes:,} writes of {arguments.rows:,} rows, {arguments.per_second:g} a second, on one "
        f"stream; embedded defaults on a local disk; {os.cpu_count()} CPUs, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, pyarrow {pa.__version__}."
    )
    block = make_table(latencies_s, conditions)
    print(block)
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(replace_block(page, block), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
