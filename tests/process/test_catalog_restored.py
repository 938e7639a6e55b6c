"""An SQLite catalog that is restored in place, or loses what waits for a commit, under a running server (R28).

The file keeps its inode, so that only its logs and its content tell that it is another. Whatever was done to it: what
is acknowledged ``iceberg_committed`` is what a reader who comes now finds.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from arka.testing.serverprocess import ServerProcess
from arka.testing.services import wait_for
from tests.process import lake
from tests.process.clients import Stream, action, connect, create, numbers, write_all
from tests.services.reader import Reader

pytestmark = [pytest.mark.process, pytest.mark.slow]

KINDS: dict[str, dict[str, Any]] = {
    "append-only": {},
    "primary-key": {"table_type": "primary_key", "primary_key": "n"},
}


def _logs_of(catalog: Path) -> list[Path]:
    return [catalog.with_name(catalog.name + suffix) for suffix in ("-wal", "-shm")]


def _copy_over(catalog: Path, backup: Path) -> None:
    shutil.copyfile(backup, catalog)


def _copy_over_and_remove_logs(catalog: Path, backup: Path) -> None:
    shutil.copyfile(backup, catalog)
    for path in _logs_of(catalog):
        path.unlink()


def _restore(catalog: Path, backup: Path) -> None:
    with closing(sqlite3.connect(backup)) as source, closing(sqlite3.connect(catalog)) as target:
        source.backup(target)


def _move_over(catalog: Path, backup: Path) -> None:
    made = backup.with_name("vacuumed.db")
    with closing(sqlite3.connect(backup)) as source:
        source.execute(f"VACUUM INTO '{made}'")
    for path in _logs_of(catalog):
        path.unlink()
    made.replace(catalog)


def _remove_wal(catalog: Path, backup: Path) -> None:
    del backup
    _logs_of(catalog)[0].unlink()


def _remove_shm(catalog: Path, backup: Path) -> None:
    del backup
    _logs_of(catalog)[1].unlink()


def _truncate(catalog: Path, backup: Path) -> None:
    del backup
    with catalog.open("r+b") as file:
        file.truncate(0)


WAYS = [_copy_over, _copy_over_and_remove_logs, _restore, _move_over, _remove_wal, _remove_shm, _truncate]


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        *((way, "append-only") for way in WAYS),
        (_copy_over_and_remove_logs, "primary-key"),
        (_remove_wal, "primary-key"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.strip("_"),
)
def test_restored_under_a_running_server(
    make_server: Callable[..., ServerProcess], way: Callable[[Path, Path], None], kind: str
) -> None:
    """Either a reader finds the write, or the write is not called committed and the table says why."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")], **KINDS[kind])
        write_all(client, "t", [numbers([0])])
        catalog, backup = server.data / "catalog.db", server.data.parent / "backup.db"
        with closing(sqlite3.connect(catalog)) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target)
        write_all(client, "t", [numbers([n]) for n in range(1, 4)])
        way(catalog, backup)
        for n in (4, 5):
            stream = Stream(client, "t", requested_durability="iceberg_committed")
            reader = Reader(stream)
            stream.write(numbers([n]))

            def committed(reader: Reader = reader) -> bool:
                acks = [ack for ack in reader.acks if ack["durability_level"] == "iceberg_committed"]
                return bool(acks) and acks[0]["error"] is None

            wait_for(
                lambda committed=committed: committed() or action(client, "DescribeTable", name="t")["reason"],
                "an ack, or a word about why there is none",
            )
            if committed():
                assert n in lake.column(server.data, "t", "n")
    server.kill()


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_cleared_away_while_the_catalog_is_locked(
    make_server: Callable[..., ServerProcess], kind: str
) -> None:
    """Rows whose files are gone when the catalog answers again are written again before they are committed."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "t", [("n", "int64!")], **KINDS[kind])
        write_all(client, "t", [numbers([0])])
        (folder,) = (server.data / "warehouse" / "default").glob("t-*")
        before = set(folder.rglob("*.parquet"))
        with closing(sqlite3.connect(server.data / "catalog.db", isolation_level=None)) as lock:
            lock.execute("BEGIN IMMEDIATE")
            stream = Stream(client, "t", requested_durability="iceberg_committed")
            stream.write(numbers([1]))
            wait_for(lambda: set(folder.rglob("*.metadata.json")) and set(folder.rglob("*.parquet")) - before, "a file")
            wait_for(lambda: len(list(folder.rglob("snap-*.avro"))) > 1, "the commit waits for the lock")
            for path in set(folder.rglob("*.parquet")) - before:
                path.unlink()
            lock.execute("ROLLBACK")
        acks = [ack for ack in stream.finish() if ack["durability_level"] == "iceberg_committed"]
        assert [ack["error"] for ack in acks] == [None]
    server.stop()
    assert sorted(lake.column(server.data, "t", "n")) == [0, 1]
    assert "iceberg.staged_missing" in server.log_tail(500)
