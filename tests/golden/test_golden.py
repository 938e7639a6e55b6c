"""A server of today starts on the data directories of older commits and loses nothing of them.

Each directory was left by a server that was killed with rows in every tier. ``python -m tests.golden.build COMMIT``
made it, and makes it again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from arka.testing.serverprocess import ServerProcess
from tests.process import lake
from tests.process.clients import Stream, action, connect

from .build import EVENTS, USERS, place, unpack

HERE = Path(__file__).parent
COMMITS = sorted(path.stem for path in HERE.glob("*.hex"))

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture(params=COMMITS)
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A golden directory at the place where it was built, and what it must hold."""
    commit = request.param
    folder = place(commit)
    lock = Path(tempfile.gettempdir()) / f"arka-golden-{commit}.lock"
    with lock.open("w") as held:
        # Another test run on this machine may be at the same place.
        fcntl.flock(held, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)
        data = folder / "data"
        data.mkdir(parents=True)
        unpack((HERE / f"{commit}.hex").read_text(), data)
        try:
            yield data, json.loads((HERE / f"{commit}.json").read_text())
        finally:
            shutil.rmtree(folder)


def _rows(data: Path) -> tuple[list[int], dict[str, str]]:
    """The numbers in ``events`` and the users, as plain pyiceberg finds them."""
    events = sorted(lake.column(data, "events", "n"))
    users = {str(row["id"]): row["name"] for row in lake.rows(data, "users").to_pylist()}
    assert len(users) == lake.rows(data, "users").num_rows, "a key has several rows"
    return events, users


def _check_rows(data: Path, expected: dict[str, Any]) -> None:
    events, users = _rows(data)
    assert events[: len(expected["events"])] == expected["events"]
    # What had a memory ack alone may be lost, all of it or nothing.
    assert events[len(expected["events"]) :] in ([], expected["events_perhaps"])
    assert users == expected["users"]


def test_an_older_data_directory_is_taken_over_whole(golden: tuple[Path, dict[str, Any]]) -> None:
    """Without a flag, every write with a disk ack is committed once; keys and LSNs go on (R2, R21, R28)."""
    data, expected = golden
    assert not (data / "warehouse" / "arka-warehouse.json").exists()
    with ServerProcess(data) as server, connect(server.location) as client:
        for table in ("events", "users"):
            action(client, "Flush", name=table)
        _check_rows(data, expected)
        assert (data / "warehouse" / "arka-warehouse.json").exists()
        _send_again(client, expected)
        stream = Stream(client, "events", EVENTS, requested_durability="iceberg_committed")
        stream.write(pa.record_batch([[10_000], pa.array([0], EVENTS.field("at").type), ["new"]], schema=EVENTS))
        lsns = {ack["lsn"] for ack in stream.finish()}
        assert min(lsns) > expected["last_lsn"], "an LSN was given twice"
    events, users = _rows(data)
    assert events[-1] == 10_000
    assert users == expected["users"]


def test_an_older_data_directory_serves_reads_before_its_commits(golden: tuple[Path, dict[str, Any]]) -> None:
    """DoGet shows what is committed and what is not, each row once (R25)."""
    import pyarrow.flight as flight

    data, expected = golden
    with ServerProcess(data) as server, connect(server.location) as client:
        found = sorted(client.do_get(flight.Ticket("events")).read_all()["n"].to_pylist())
        assert found[: len(expected["events"])] == expected["events"]
        users = client.do_get(flight.Ticket("users")).read_all().to_pylist()
        assert {str(row["id"]): row["name"] for row in users} == expected["users"]


def _send_again(client: Any, expected: dict[str, Any]) -> None:
    """Every key is known: its write is a duplicate with the first one's LSN."""
    streams: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for key, write in expected["keys"].items():
        name, _, number = key.rpartition("#")
        streams.setdefault(name, []).append((int(number), write))
    for name, writes in streams.items():
        table = writes[0][1]["table"]
        schema = EVENTS if table == "events" else USERS
        more = {"operation": "delete"} if "operation" in writes[0][1] else {}
        stream = Stream(client, table, schema, requested_durability="disk", idempotency_key=name, **more)
        for _ in writes:
            stream.write(_any_row(schema))
        acks = [ack for ack in stream.finish() if ack["durability_level"] == "disk"]
        assert [ack["lsn"] for ack in acks] == [write["lsn"] for _, write in sorted(writes, key=lambda item: item[0])]
        assert all(ack["duplicate"] for ack in acks)


def _any_row(schema: pa.Schema) -> pa.RecordBatch:
    if schema.names == EVENTS.names:
        return pa.record_batch([[-1], pa.array([0], schema.field("at").type), ["again"]], schema=schema)
    return pa.record_batch([[-1], ["again"]], schema=schema)
