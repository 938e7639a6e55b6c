"""A node's log goes on elsewhere: after the loss of its disk, and while its old process still runs (R2, R10, R13)."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import Ack, Stream, connect, create, numbers, write_all

EXIT_CONFIGURATION, EXIT_FENCED = 2, 4
HEARTBEAT_S = 0.5


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Where store, catalog and warehouse lie: outside of every data directory (R14)."""
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


@pytest.fixture
def node(make_server: Callable[..., ServerProcess], shared: Path) -> Callable[..., ServerProcess]:
    """Make servers of one node, each with a data directory of its own."""

    def make(data: str, *flags: str, **settings: Any) -> ServerProcess:
        return make_server(
            *flags,
            data=data,
            object_store__url=f"file://{shared}/objects",
            object_store__heartbeat_s=HEARTBEAT_S,
            iceberg__catalog_uri=f"sqlite:///{shared}/catalog.db",
            iceberg__warehouse=f"file://{shared}/warehouse",
            iceberg__commit_interval_s=0.1,
            server__drain_s=20,
            **settings,
        )

    return make


def found(shared: Path, name: str = "t") -> list[int]:
    return sorted(lake.rows(shared, name)["n"].to_pylist())


def write_keyed(client: flight.FlightClient, values: range, durability: str, table: str = "t") -> dict[int, int]:
    """Write one value a batch, each with its key; returns the LSNs of those whose last ack came."""
    stream = Stream(client, table, requested_durability=durability)
    for value in values:
        stream.write(numbers([value]), idempotency_key=f"k{value}")
    return {
        values[ack["sequence"]]: ack["lsn"]
        for ack in stream.finish()
        if ack["error"] is None and ack["durability_level"] == durability
    }


def refuses(server: ServerProcess, code: int) -> str:
    """Start a server that must not start; returns what it said."""
    server.spawn()
    assert server.wait(60) == code, server.log_tail()
    return server.log_tail(5)


def salvage(data: Path, *options: str) -> str:
    program = str(Path(sys.executable).with_name("arka"))
    done = subprocess.run([program, "wal", "salvage", str(data), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_node_loss(node: Callable[..., ServerProcess], shared: Path) -> None:
    """With the disk gone, everything acked object_storage is there exactly once on an empty one, keys included."""
    first = node("a").start()
    with connect(first.location) as client:
        create(client, "t")
        lsns = write_keyed(client, range(200), "object_storage")
        assert len(lsns) == 200
    first.kill()
    shutil.rmtree(first.data)
    second = node("b").start()
    with connect(second.location) as client:
        again = write_keyed(client, range(250), "iceberg_committed")
        assert {value: again[value] for value in lsns} == lsns, "duplicates have their first LSNs"
        assert min(again[value] for value in range(200, 250)) > max(lsns.values())
    second.stop()
    assert found(shared) == list(range(250))
    # Again, with nothing but what the second disk had released or uploaded.
    shutil.rmtree(second.data)
    third = node("c").start()
    with connect(third.location) as client:
        assert write_keyed(client, range(250), "iceberg_committed") == again
    third.stop()
    assert found(shared) == list(range(250))


def test_frozen_owner_is_fenced(node: Callable[..., ServerProcess], shared: Path) -> None:
    """A process that was frozen while another took its log over acks nothing that is lost, and exits as fenced."""
    first = node("a").start()
    with connect(first.location) as client:
        create(client, "t")
        acked = write_keyed(client, range(50), "object_storage")
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        first._running.send_signal(signal.SIGSTOP)
        for value in range(50, 60):
            stream.write(numbers([value]), idempotency_key=f"k{value}")
        second = node("b").start()
        with connect(second.location) as other:
            acked |= write_keyed(other, range(60, 100), "iceberg_committed")
        first._running.send_signal(signal.SIGCONT)
        late: list[Ack] = []
        with pytest.raises(flight.FlightUnavailableError):
            late.extend(stream.rest())
        assert {ack["durability_level"] for ack in late} <= {"memory", "disk"}
        assert first.wait() == EXIT_FENCED, first.log_tail()
    with connect(second.location) as client:
        # What the fenced process never acked far enough is sent again, by key.
        acked |= write_keyed(client, range(50, 60), "iceberg_committed")
    second.stop()
    assert found(shared) == list(range(100))
    assert len(set(acked.values())) == len(acked), "no LSN was given twice"


@pytest.mark.long
def test_living_owner_keeps_its_log(node: Callable[..., ServerProcess], shared: Path) -> None:
    """A second server with the same node id does not start beside the first, unless it is told to take over."""
    first = node("a").start()
    with connect(first.location) as client:
        create(client, "t")
        write_all(client, "t", [numbers([1])], "disk")
    assert "--take-over" in refuses(node("b"), EXIT_CONFIGURATION)
    with connect(first.location) as client:
        write_all(client, "t", [numbers([2])])
    second = node("b", "--take-over").start()
    assert first.wait() == EXIT_FENCED, first.log_tail()
    assert "has been taken by another process" in first.log_tail()
    with connect(second.location) as client:
        write_all(client, "t", [numbers([3])])
    second.stop()
    assert found(shared) == [1, 2, 3]


def test_stale_disk(node: Callable[..., ServerProcess], shared: Path) -> None:
    """A disk after which the log went on elsewhere is not replayed; what only it holds is sent again, by key (R13)."""
    first = node("a").start()
    with connect(first.location) as client:
        create(client, "t")
        write_all(client, "t", [numbers([0])])
        first._running.send_signal(signal.SIGSTOP)
    second = node("b").start()
    with connect(second.location) as client:
        write_keyed(client, range(1, 10), "iceberg_committed")
    first._running.send_signal(signal.SIGCONT)
    assert first.wait() == EXIT_FENCED, first.log_tail()
    said = refuses(node("a"), EXIT_CONFIGURATION)
    assert "stale" in said
    assert "salvage" in said
    # On its own disk it had more than it could bring away: here what a client wrote while it was cut off.
    assert "sent" in salvage(first.data, "--resubmit", second.location)
    salvage(first.data, "--discard", "--yes")
    second.stop()
    again = node("a").start()
    with connect(again.location) as client:
        write_keyed(client, range(5, 12), "iceberg_committed")
    again.stop()
    assert found(shared) == list(range(12))


@pytest.mark.long
def test_copied_data_directory(node: Callable[..., ServerProcess], shared: Path) -> None:
    """A data directory that was copied after a clean stop is refused once the original has run again (R13, R2)."""
    first = node("a").start()
    with connect(first.location) as client:
        create(client, "t")
        write_all(client, "t", [numbers([1])])
    first.stop()
    shutil.copytree(first.data, first.data.with_name("copy"))
    first.start()
    with connect(first.location) as client:
        write_all(client, "t", [numbers([2])])
    first.stop()
    assert "is a copy of" in refuses(node("copy"), EXIT_CONFIGURATION)
    # As on another machine, which does not see the original.
    first.data.rename(first.data.with_name("unseen"))
    assert "stale" in refuses(node("copy"), EXIT_CONFIGURATION)
    first.data.with_name("unseen").rename(first.data)
    first.start()
    first.stop()
    assert found(shared) == [1, 2]
