"""Each example runs as it stands, against real servers on loopback."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.flight as flight
import pytest
from pyiceberg.catalog.sql import SqlCatalog

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.process


@contextmanager
def server_process(command: list[str], data: Path, output: Path) -> Iterator[str]:
    """Run a server until it is ready, give its location, then stop it with SIGTERM and expect exit code 0."""
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        ready = data / "server.json"
        deadline = time.monotonic() + 60
        while not (ready.exists() and json.loads(ready.read_text() or "{}").get("pid") == process.pid):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.02)
        address = json.loads(ready.read_text())["flight"]
        yield address if "://" in address else f"grpc://{address}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()


def run(command: list[str], timeout_s: float = 120, **options) -> str:
    """Run a program to its end, expect exit code 0 and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def describe(location: str, table: str) -> dict:
    """Run DescribeTable."""
    with flight.FlightClient(location) as client:
        (result,) = client.do_action(flight.Action("DescribeTable", json.dumps({"name": table}).encode()))
    return json.loads(result.body.to_pybytes())


@pytest.fixture
def embedded_server(run_example, tmp_path) -> Iterator[str]:
    """Run ``examples/flight_server.py`` on a free port."""
    data = tmp_path / "data"
    command = run_example("flight_server.py", data, "--port", 0)
    with server_process(command, data, tmp_path / "server.log") as location:
        yield location


def test_client_against_the_embedding_program(run_example, embedded_server):
    """The client example creates, writes, reads every ack and meets every error it shows."""
    output = run(run_example("flight_client.py", embedded_server))
    for sequence in range(3):
        for tier in ("memory", "disk", "object_storage", "iceberg_committed"):
            assert output.count(f"write {sequence}: LSN") >= 1
            assert re.search(rf"write {sequence}: LSN \d+ reached {tier}", output)
    assert re.search(r"reached iceberg_committed, Iceberg snapshot \d+", output)
    assert re.search(r"LSN \d+ reached disk, seen before", output)
    assert "unknown table: [table_not_found] Table not found" in output
    assert "wrong schema: [schema_mismatch] Schema mismatch for default.page_views" in output
    assert "unknown durability: [invalid_request]" in output
    assert "write 0 was refused: [invalid_batch]" in output
    assert re.search(r"write 1: LSN \d+ reached disk\n", output)
    assert "'dropped': True" in output


def test_client_without_a_server_says_so(run_example):
    """Connection refused is explained, with exit code 1."""
    done = subprocess.run(
        run_example("flight_client.py", "grpc://127.0.0.1:1"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "No server on grpc://127.0.0.1:1" in done.stderr


def test_change_stream_ends_equal_to_its_source(run_example, tmp_path):
    """The replay is cut off, goes on, and ends equal to the database; a second one changes nothing."""
    data = tmp_path / "data"
    server = run_example("flight_server.py", data, "--port", 0)
    files = ("--changes", tmp_path / "changes.jsonl", "--offsets", tmp_path / "offset")
    size = ("--transactions", 300)
    with server_process(server, data, tmp_path / "server.log") as location:
        output = run(run_example("cdc.py", location, *files, *size))
        assert re.search(r"cut off behind 120 writes: \d+ steps", output)
        assert re.search(r"changes: \d+ c, \d+ d, \d+ u\n", output)
        assert "in the source, equal" in output
        snapshot = describe(location, "customers")["snapshot_id"]
        # All writes again under their keys, and then none, since the offsets say that all are done.
        again = run(run_example("cdc.py", location, *files[:2], "--offsets", tmp_path / "none", *size))
        assert "in the source, equal" in again
        assert "writes: 0, of which 0" in run(run_example("cdc.py", location, *files, *size))
        assert describe(location, "customers")["snapshot_id"] == snapshot
    catalog = SqlCatalog("arka", uri=f"sqlite:///{data}/catalog.db", warehouse=f"file://{data}/warehouse")
    rows = catalog.load_table("default.customers").scan().to_arrow().sort_by("id").to_pylist()
    catalog.close()
    expected = {}
    for line in (tmp_path / "changes.jsonl").read_text().splitlines():
        change = json.loads(line)
        if change["before"] is not None:
            del expected[change["before"]["id"]]
        if change["after"] is not None:
            expected[change["after"]["id"]] = change["after"]
    assert rows == [expected[key] for key in sorted(expected)]
    assert len(rows) > 100


def test_embedding_program_keeps_its_tables(run_example, tmp_path):
    """A second run on the same directory finds the tables of the first."""
    data = tmp_path / "data"
    command = run_example("flight_server.py", data, "--port", 0)
    for number, created in enumerate(("True", "False")):
        log = tmp_path / f"{number}.log"
        with server_process(command, data, log):
            deadline = time.monotonic() + 60
            while "Arka listens on" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
        assert re.search(rf"'name': 'default.events'.*'created': {created}", log.read_text())


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_readme_snippet_works_as_printed(embedded_server):
    """The first Python snippet of the README runs unchanged but for the port."""
    code = snippets("README.md")[0].replace("grpc://localhost:8815", embedded_server)
    output = run([sys.executable, "-c", code])
    assert re.search(r"LSN \d+ reached memory\nLSN \d+ reached disk\n", output)


@pytest.mark.slow
def test_demo_ends_with_everything_equal(run_example):
    """``make demo`` streams the real flights and reads them back equal through pyiceberg and DuckDB."""
    output = run(run_example("demo.py"), timeout_s=240)
    assert "pyiceberg read all 336,776 rows back" in output
    assert re.search(r"duckdb +read all 336,776 rows back", output)
    assert "exit code 0" in output


def test_tier_measurement_fills_its_block(run_example, tmp_path):
    """The script behind the README's tier table measures every tier and replaces its block only."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tiers: written by examples/measure_tiers.py -->\nold\n<!-- tiers: end -->\nafter\n")
    run(run_example("measure_tiers.py", "--writes", 10, "--per-second", 50, "--write", page))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- tiers: end -->\nafter\n")
    assert "old" not in text
    assert len(re.findall(r"^\| `\w+` \|.*\d ms \| [\d.]+ ms \|$", text, re.MULTILINE)) == 4
