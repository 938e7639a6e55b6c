"""The two servers that measurements talk to: Arka, and the bare one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from arka.testing.serverprocess import ServerProcess
from bench.harness import ROOT

#: Object store and warehouse: what they cost is not what is measured.
MEMORY = Path("/dev/shm")


@contextmanager
def arka_server(**settings: Any) -> Iterator[ServerProcess]:
    """Run a server with its log on the disk and all tiers at work; object store and warehouse are in memory.

    Args:
        settings: by key, with ``__`` for the dot.
    """
    log = Path(tempfile.mkdtemp(prefix="arka-bench-"))
    rest = Path(tempfile.mkdtemp(prefix="arka-bench-", dir=MEMORY))
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    keys = {
        "object_store.url": f"file://{rest}/objects",
        "iceberg.warehouse": f"file://{rest}/warehouse",
    } | keys
    server = ServerProcess(log / "data", keys)
    try:
        server.start()
        yield server
    finally:
        # Not drained: what waits for Iceberg is nobody's.
        server.kill()
        shutil.rmtree(log, ignore_errors=True)
        shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def bare_server() -> Iterator[str]:
    """Run the bare server; gives its location."""
    command = [sys.executable, "-m", "bench.bare_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield f"grpc://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.stdin.close()
            process.wait(30)


def connect(location: str) -> flight.FlightClient:
    """Open a client with a connection of its own."""
    return flight.FlightClient(location, generic_options=[("grpc.use_local_subchannel_pool", 1)])


def action(client: flight.FlightClient, kind: str, **request: Any) -> Any:
    """Run an action whose result is one JSON value."""
    (result,) = client.do_action(flight.Action(kind, json.dumps(request).encode()))
    return json.loads(result.body.to_pybytes())


def create_table(client: flight.FlightClient, name: str, schema: pa.Schema, **more: Any) -> None:
    """Create a table with a schema of plain types."""
    spelled = {pa.string(): "utf8", pa.float64(): "float64"}
    fields = [{"name": f.name, "type": spelled.get(f.type, str(f.type)), "nullable": f.nullable} for f in schema]
    action(client, "CreateTable", name=name, schema_json=json.dumps({"fields": fields}), **more)
