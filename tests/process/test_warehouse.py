"""Catalog or warehouse that become others under a running server: no false ``iceberg_committed`` (R28)."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess
from arka.testing.services import wait_for
from tests.process import lake
from tests.process.clients import NUMBERS, Stream, action, connect, create, numbers, write_all
from tests.services.reader import Reader

pytestmark = [pytest.mark.process, pytest.mark.slow]

KINDS: dict[str, dict[str, Any]] = {
    "append-only": {},
    "primary-key": {"table_type": "primary_key", "primary_key": "n"},
}


class Fault:
    """Something that is taken away, and how it comes back."""

    def __init__(self, data: Path, what: str) -> None:
        warehouse = data / "warehouse"
        table = next((warehouse / "default").iterdir()) if what == "table folder" else warehouse
        self._places = {
            "warehouse": [warehouse],
            "warehouse, replaced by an empty folder": [warehouse],
            "contents of the warehouse": sorted(warehouse.iterdir()),
            "namespace folder": [warehouse / "default"],
            "table folder": [table],
            "catalog": sorted(data.glob("catalog.db*")),
        }[what]
        self._empty = "empty" in what
        self._away = data.parent / "away"

    def happen(self) -> None:
        self._away.mkdir()
        for place in self._places:
            place.rename(self._away / place.name)
            if self._empty:
                place.mkdir()

    def end(self) -> None:
        for place in self._places:
            if place.is_dir():
                # Nothing was written into an empty mount point.
                assert list(place.iterdir()) == []
                place.rmdir()
            (self._away / place.name).rename(place)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("warehouse", "append-only"),
        ("warehouse, replaced by an empty folder", "append-only"),
        ("warehouse, replaced by an empty folder", "primary-key"),
        ("contents of the warehouse", "append-only"),
        ("namespace folder", "append-only"),
        ("table folder", "primary-key"),
        ("catalog", "append-only"),
        ("catalog", "primary-key"),
    ],
)
def test_what_is_taken_away_and_comes_back(make_server: Callable[..., ServerProcess], what: str, kind: str) -> None:
    """While it is away nothing is acknowledged that a reader cannot see; back again, each write is committed once."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")], **KINDS[kind])
        write_all(client, "t", [numbers([n]) for n in range(3)])
        fault = Fault(server.data, what)
        fault.happen()
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        reader = Reader(stream)
        for n in range(3, 8):
            stream.write(numbers([n]))
        reader.wait("object_storage", 5)
        wait_for(lambda: _reason(client), "DescribeTable says that the tier stalls")
        assert "warehouse.stalled" in server.log_tail(500)
        assert reader.count("iceberg_committed") == 0
        fault.end()
        stream.writer.done_writing()
        acks = [ack for ack in reader.finish() if ack["durability_level"] == "iceberg_committed"]
        assert [ack["error"] for ack in acks] == [None] * 5
        assert sorted(lake.column(server.data, "t", "n")) == list(range(8))
        wait_for(lambda: _reason(client) is None, "the stall is over")
        write_all(client, "t", [numbers([8])])
    server.stop()
    assert sorted(lake.column(server.data, "t", "n")) == list(range(9))


def _reason(client: flight.FlightClient) -> str | None:
    found: str | None = action(client, "DescribeTable", name="t")["reason"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_catalog_replaced_by_an_older_copy(make_server: Callable[..., ServerProcess], kind: str) -> None:
    """A table that an older catalog rolls back is stopped with both numbers, and no later write is called committed."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")], **KINDS[kind])
        write_all(client, "t", [numbers([0])])
        copy = server.data.parent / "copy.db"
        with sqlite3.connect(server.data / "catalog.db") as source, sqlite3.connect(copy) as target:
            source.backup(target)
        write_all(client, "t", [numbers([n]) for n in range(1, 4)])
        for beside in ("-wal", "-shm"):
            (server.data / f"catalog.db{beside}").unlink(missing_ok=True)
        os.replace(copy, server.data / "catalog.db")
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        stream.write(numbers([4]))
        (error,) = [ack for ack in stream.finish() if ack["error"]]
        assert error["code"] == "outcome_unknown"
        assert "R20" in (_reason(client) or "")
    server.stop()
    # The copy's metadata file is younger than the grace: what the old catalog names can be read.
    assert lake.column(server.data, "t", "n") == [0]


@pytest.mark.parametrize("instead", ["nothing", "an empty folder"])
def test_object_store_that_went_away(make_server: Callable[..., ServerProcess], tmp_path: Path, instead: str) -> None:
    """Writes go on at memory and disk, nothing is made in the folder's place, and with it back all acks come."""
    objects = tmp_path / "mnt" / "objects"
    server = make_server("--object-store", f"file://{objects}", iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")])
        write_all(client, "t", [numbers([0])])
        objects.rename(tmp_path / "away")
        if instead != "nothing":
            objects.mkdir()
        stream = Stream(client, "t", requested_durability="object_storage")
        reader = Reader(stream)
        stream.write(numbers([1]))
        reader.wait("disk", 1)
        wait_for(
            lambda: (
                "something is mounted there" in server.log.read_text()
                or "is gone: it was moved" in server.log.read_text()
            ),
            "the outage is said",
        )
        wait_for(lambda: _reason(client) is not None, "the stall is said")
        assert reader.count("object_storage") == 0
        assert not objects.exists() or list(objects.iterdir()) == []
        if objects.exists():
            objects.rmdir()
        (tmp_path / "away").rename(objects)
        reader.wait("object_storage", 1)
        stream.writer.done_writing()
        reader.finish()
        action(client, "Flush", name="t")
    server.stop()
    assert sorted(lake.column(server.data, "t", "n")) == [0, 1]


def test_start_without_the_warehouse(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A start whose warehouse is not mounted takes writes, makes nothing in the mount point, and goes on later."""
    warehouse = tmp_path / "mnt" / "wh"
    server = make_server("--warehouse", f"file://{warehouse}", iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")])
        write_all(client, "t", [numbers([0])])
    server.stop()
    warehouse.rename(tmp_path / "away")
    warehouse.mkdir()
    server.start()
    with connect(server.location) as client:
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        reader = Reader(stream)
        stream.write(numbers([1]))
        reader.wait("object_storage", 1)
        wait_for(lambda: "no marker" in (_reason(client) or ""), "the stall is said")
        with pytest.raises(flight.FlightUnavailableError, match="no marker"):
            create(client, "other", [("n", "int64!")])
        assert list(warehouse.iterdir()) == []
        warehouse.rmdir()
        (tmp_path / "away").rename(warehouse)
        stream.writer.done_writing()
        assert all(ack["error"] is None for ack in reader.finish())
        create(client, "other", [("n", "int64!")])
    server.stop()
    assert sorted(lake.column(server.data, "t", "n")) == [0, 1]


def test_another_warehouse_in_its_place(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A warehouse with another marker is not taken for the own one, though it is whole."""
    others = make_server(data="others").start()
    wait_for((others.data / "warehouse" / "arka-warehouse.json").exists, "it is marked")
    others.stop()
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")])
        write_all(client, "t", [numbers([0])])
        own = server.data / "warehouse"
        own.rename(tmp_path / "away")
        shutil.copytree(others.data / "warehouse", own)
        with pytest.raises(flight.FlightUnavailableError, match="expected"):
            create(client, "other", [("n", "int64!")])
        assert [path.name for path in own.iterdir()] == ["arka-warehouse.json"]
        shutil.rmtree(own)
        (tmp_path / "away").rename(own)
        create(client, "other", [("n", "int64!")])
    server.stop()


def test_manifest_that_is_gone(make_server: Callable[..., ServerProcess]) -> None:
    """A table one of whose manifests is gone gets no further ack: it is stopped, and the file is named."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")])
        create(client, "sound", [("n", "int64!")])
        write_all(client, "t", [numbers([0])])
        manifest = next((server.data / "warehouse" / "default").glob("t-*/metadata/*-m0.avro"))
        manifest.unlink()
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        stream.write(numbers([1]))
        assert [ack["code"] for ack in stream.finish() if ack["error"]] == ["outcome_unknown"]
        assert manifest.name in (_reason(client) or "")
        write_all(client, "sound", [numbers([1])])
    server.stop()


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("file", "append-only"),
        ("folder", "primary-key"),
        ("*-m0.avro", "append-only"),
        pytest.param("*-m0.avro", "primary-key", marks=pytest.mark.long),
        pytest.param("snap-*.avro", "append-only", marks=pytest.mark.long),
    ],
)
def test_start_without_a_tables_metadata(make_server: Callable[..., ServerProcess], what: str, kind: str) -> None:
    """That table alone takes no writes and names the file. It goes on when the file is back (R33)."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")], **KINDS[kind])
        create(client, "sound", [("n", "int64!")])
        write_all(client, "t", [numbers([0])])
    server.stop()
    (folder,) = (server.data / "warehouse" / "default").glob("t-*")
    newest = max((folder / "metadata").glob(what if what.endswith(".avro") else "*.metadata.json"))
    gone = folder if what == "folder" else newest
    away = server.data.parent / "away"
    gone.rename(away)
    server.start()
    with connect(server.location) as client:
        wait_for(lambda: newest.name in (_reason(client) or ""), "the file is named")
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        stream.write(numbers([1]))
        with contextlib.suppress(flight.FlightError):
            assert [ack["code"] for ack in stream.finish() if ack["error"]] == ["table_stopped"]
        write_all(client, "sound", [numbers([1])])
        away.rename(gone)
        wait_for(lambda: _reason(client) is None, "the table is read again")
        write_all(client, "t", [numbers([2])])
    server.stop()
    assert sorted(lake.column(server.data, "t", "n")) == [0, 2]


def test_each_table_names_its_own_file(make_server: Callable[..., ServerProcess]) -> None:
    """Of two tables that lack a file at the start, each takes no write from the first on, and names its own (R33)."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        for name in ("t", "u"):
            create(client, name, [("n", "int64!")])
            write_all(client, name, [numbers([0])])
    server.stop()
    metadata = {name: next((server.data / "warehouse" / "default").glob(f"{name}-*/metadata")) for name in "tu"}
    gone = {"t": next(metadata["t"].glob("snap-*.avro")), "u": max(metadata["u"].glob("*.metadata.json"))}
    for path in gone.values():
        path.rename(path.with_suffix(".away"))
    server.start()
    with connect(server.location) as client:
        for name, other in ("tu", "ut"):
            stream = Stream(client, name, NUMBERS, requested_durability="disk")
            stream.write(numbers([1]))
            assert {ack["code"] for ack in stream.finish()} == {"table_stopped"}
            for _ in range(2):
                reason = action(client, "DescribeTable", name=name)["reason"]
                assert gone[name].name in reason
                assert gone[other].name not in reason
                # Past the time after which the watch has a word of its own.
                wait_for(lambda: "[warning  ] stall" in server.log.read_text(), "the watch has looked")
        for path in gone.values():
            path.with_suffix(".away").rename(path)
        for name in "tu":
            wait_for(lambda name=name: not action(client, "DescribeTable", name=name)["reason"], "read again")  # type: ignore[misc]
            write_all(client, name, [numbers([2])])
    server.stop()
    assert [sorted(lake.column(server.data, name, "n")) for name in "tu"] == [[0, 2]] * 2


def test_unmarked_directory_is_marked_at_its_start(make_server: Callable[..., ServerProcess]) -> None:
    """A data directory from before there were markers starts without a flag and has one afterwards."""
    server = make_server().start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")])
        write_all(client, "t", [numbers([0])])
    server.stop()
    marker = server.data / "warehouse" / "arka-warehouse.json"
    marker.unlink()
    (server.data / "warehouse.json").unlink()
    server.start()
    with connect(server.location) as client:
        write_all(client, "t", [numbers([1])])
    server.stop()
    assert marker.exists()
    assert sorted(lake.column(server.data, "t", "n")) == [0, 1]
