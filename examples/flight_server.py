"""Embed an Arka server in a program of your own, with two tables registered.

    python examples/flight_server.py [DATA_DIR]

The server runs as a task of the program's own nursery; setting the ``stop`` event drains it. ``arka-server``
does the same from the command line.
"""

from __future__ import annotations

import argparse
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import trio

from arka.logs import configure_logging
from arka.server import serve
from arka.settings import Given, load_settings

#: One row for each user: a write replaces the older row with the same id.
USERS = {
    "name": "users",
    "table_type": "primary_key",
    "primary_key": "id",
    "schema_json": json.dumps(
        {
            "fields": [
                {"name": "id", "type": "int64", "nullable": False},
                {"name": "name", "type": "utf8"},
                {"name": "email", "type": "utf8"},
                {"name": "signed_up_at", "type": "timestamp[us]"},
            ]
        }
    ),
    "partition_spec": {
        "spec_id": 1,
        "fields": [{"source_id": 3, "field_id": 1000, "name": "signup_day", "transform": "Day"}],
    },
}

#: What happened: rows are only ever added. The same table as that of ``arka-server --demo-tables``.
EVENTS = {
    "name": "events",
    "table_type": "append_only",
    "schema_json": json.dumps(
        {
            "fields": [
                {"name": "event_id", "type": "int64", "nullable": False},
                {"name": "user_id", "type": "int64"},
                {"name": "timestamp", "type": "timestamp[us]", "nullable": False},
                {"name": "kind", "type": "utf8"},
                {"name": "value", "type": "float64"},
            ]
        }
    ),
    "partition_spec": {
        "spec_id": 1,
        "fields": [{"source_id": 2, "field_id": 1000, "name": "event_day", "transform": "Day"}],
    },
}


def register_tables(location: str) -> None:
    """Create the two tables; tables that are there from an earlier run are left as they are."""
    with flight.FlightClient(location) as client:
        for table in (USERS, EVENTS):
            try:
                print("CreateTable:", create_table(client, table))
            except pa.ArrowNotImplementedError:
                print(f"CreateTable: {table['name']} left out: this version has no primary-key tables")


def create_table(client: flight.FlightClient, request: dict[str, Any]) -> dict[str, Any]:
    """Ask for a table and return the answer."""
    (result,) = client.do_action(flight.Action("CreateTable", json.dumps(request).encode()))
    answer: dict[str, Any] = json.loads(result.body.to_pybytes())
    return answer


async def stop_at_signal(stop: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    """Set ``stop`` at SIGTERM or Ctrl-C."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            stop.set()
            return


async def run(data_dir: Path, port: int) -> None:
    """Serve until a signal comes."""
    flags = {
        "server.data_dir": str(data_dir),
        "server.port": port,
        "server.http_port": 0 if port == 0 else 8816,
    }
    loaded = load_settings(flags=[Given(key, value, "flight_server.py") for key, value in flags.items()])
    configure_logging(loaded.settings.log)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(stop_at_signal, stop)
        await nursery.start(partial(serve, loaded.settings, stop=stop))
        address = json.loads((data_dir / "server.json").read_text())["flight"]
        location = address if "://" in address else f"grpc://{address}"
        # A stock Flight client blocks: it gets a thread, and the server goes on in this one.
        await trio.to_thread.run_sync(register_tables, location)
        print(f"Arka listens on {location}, data in {data_dir}; Ctrl-C stops it", flush=True)


def main() -> None:
    """Run on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", nargs="?", type=Path, default=Path("/tmp/arka_data"))
    parser.add_argument("--port", type=int, default=8815, help="Flight port; 0 takes a free one")
    arguments = parser.parse_args()
    trio.run(run, arguments.data_dir, arguments.port)


if __name__ == "__main__":
    main()
