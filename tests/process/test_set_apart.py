"""A table whose commits fail does not hold the log that another one writes to (R33)."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import NUMBERS, Stream, action, connect, create, numbers, write_all

pytestmark = pytest.mark.process

#: Of one write, in rows: a little more than half a MiB.
ROWS = 70_000


SLOW = "FROM iceberg_tables WHERE table_name = 'slow'"


def point_to(catalog: sqlite3.Connection, location: str) -> None:
    """Let the catalog name another metadata file of the table."""
    catalog.execute("UPDATE iceberg_tables SET metadata_location = ? WHERE table_name = 'slow'", (location,))
    catalog.commit()


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so; the timeout only ends what hangs."""
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.parametrize(
    "keyed", [pytest.param(False, marks=pytest.mark.long), True], ids=["append-only", "primary-key"]
)
def test_one_table_fails_while_another_writes_much(make_server: Callable[..., ServerProcess], keyed: bool) -> None:
    """It is set apart and stays active; the other writes several times the limit; then each row is there once."""
    server = make_server(
        limits__disk_bytes=64 << 20,
        limits__table_disk_share=0.1,
        limits__disk_free_bytes=0,
        wal__segment_bytes=1 << 20,
        wal__release_grace_s=0,
        iceberg__commit_interval_s=0.1,
    ).start()
    with connect(server.location) as client:
        create(client, "slow", **({"primary_key": "n", "table_type": "primary_key"} if keyed else {}))
        create(client, "well")
        write_all(client, "slow", [numbers([-1])])
        with closing(sqlite3.connect(server.data / "catalog.db", timeout=30)) as catalog:
            (intact,) = catalog.execute(f"SELECT metadata_location {SLOW}").fetchone()
            broken = f"{intact.removesuffix('.metadata.json')}-broken.metadata.json"
            Path(broken.removeprefix("file://")).write_bytes(b"no metadata")
            # It is there and cannot be read: nobody knows for how long.
            point_to(catalog, broken)
        stream = Stream(client, "slow", NUMBERS, requested_durability="disk")
        for start in range(16):
            stream.write(numbers(range(start * ROWS, (start + 1) * ROWS)))
        assert [ack for ack in stream.finish() if ack["error"]] == []
        for start in range(16):
            write_all(client, "well", [numbers(range(8 * start * ROWS, 8 * (start + 1) * ROWS))])
        table = action(client, "DescribeTable", name="slow")
        assert table["state"] == "active"
        assert table["lag"]["set_apart_bytes"] > 7 << 20
        assert list(server.data.glob("objects/*/behind/*/*.wal"))
        with closing(sqlite3.connect(server.data / "catalog.db", timeout=30)) as catalog:
            point_to(catalog, intact)
        action(client, "Flush", name="slow")
        wait_for(lambda: not list(server.data.glob("objects/*/behind/*/*.wal")), "objects of what is committed")
    found = lake.column(server.data, "slow", "n")
    assert len(found) == 16 * ROWS + 1
    assert sorted(found) == list(range(-1, 16 * ROWS))
    assert sorted(lake.column(server.data, "well", "n")) == list(range(128 * ROWS))
