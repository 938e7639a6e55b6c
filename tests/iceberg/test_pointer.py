"""After each commit the catalog is asked over a new connection; waiting files are looked for before it (R28)."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from arka.iceberg import catalogs, commit, worker
from arka.iceberg.fileio import local_path
from arka.iceberg.sqlcatalog import ServerSqlCatalog
from arka.iceberg.waiting import LOOK_AFTER_S, WaitingFiles
from arka.storage.ports import CatalogRestored, CommitOutcome, StagedFilesMissing, WarehouseChanged
from tests.iceberg.swaps import SCHEMA, after_the_swap, rows

KEYS: list[tuple[str, ...]] = [(), ("n",)]


def _point_back(lake: Any) -> None:
    """Let the catalog point where it pointed before the last commit, as a restored one does."""
    with sqlite3.connect(lake.directory / "catalog.db") as database:
        database.execute("UPDATE iceberg_tables SET metadata_location = previous_metadata_location")


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_pointer_that_went_backafter_the_swap(
    make_lake: Any, monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...], stock: bool
) -> None:
    """A commit that the catalog does not show any more is not answered as done."""
    lake = make_lake(stock_commit=stock) if stock else make_lake()
    info = lake.create(SCHEMA, key=key)
    lake.append(info, [rows(0)], 0)
    staged = lake.encode(info, [rows(1)], 1)
    after_the_swap(monkeypatch, lake, lambda: _point_back(lake))
    with pytest.raises(WarehouseChanged, match="shows the table at LSN 1"):
        lake.commit(info, staged)


def test_table_that_wentafter_the_swap(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog from before the table was made does not show it: that is no ack either."""
    info = lake.create(SCHEMA)
    staged = lake.encode(info, [rows(1)], 0)

    def remove() -> None:
        with sqlite3.connect(lake.directory / "catalog.db") as database:
            database.execute("DELETE FROM iceberg_tables")

    after_the_swap(monkeypatch, lake, remove)
    assert lake.commit(info, staged).outcome is CommitOutcome.TABLE_GONE


def test_commit_of_othersafter_the_swap(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that others have built upon is there."""
    info = lake.create(SCHEMA)
    staged = lake.encode(info, [rows(1)], 0)
    after_the_swap(monkeypatch, lake, lambda: lake.table(info).append(pa.table({"n": [7]}, schema=SCHEMA)))
    assert lake.commit(info, staged).outcome is CommitOutcome.COMMITTED


@pytest.mark.parametrize("log", ["-wal", "-shm"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_log_of_the_database_is_removed(lake: Any, monkeypatch: pytest.MonkeyPatch, log: str, moment: str) -> None:
    """A connection whose log file is not the database's any more commits nothing and confirms nothing."""
    info = lake.create(SCHEMA)
    lake.append(info, [rows(0)], 0)
    staged = lake.encode(info, [rows(1)], 1)
    path = lake.directory / f"catalog.db{log}"
    if moment == "before":
        path.unlink()
        with pytest.raises(CatalogRestored, match=log):
            lake.commit(info, staged)
        return
    after_the_swap(monkeypatch, lake, path.unlink)
    with pytest.raises(CatalogRestored, match=log):
        lake.commit(info, staged)


def test_log_files_of_closed_connections_are_of_no_interest(lake: Any) -> None:
    """With the last connection SQLite removes the log files itself: the next connection makes others."""
    info = lake.create(SCHEMA)
    lake.append(info, [rows(0)], 0)
    catalogs.catalog(lake.config).engine.dispose()  # type: ignore[attr-defined]
    assert not (lake.directory / "catalog.db-wal").exists()
    assert lake.append(info, [rows(1)], 1).outcome is CommitOutcome.COMMITTED


def test_process_ends_without_closing_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that finds the catalog restored ends at once, with an exit code that says so."""
    codes = []

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit

    def fail(*_: object) -> None:
        raise CatalogRestored("restored")

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(commit, "commit", fail)
    with pytest.raises(SystemExit):
        worker.commit(None, None)  # type: ignore[arg-type]
    assert codes == [worker.RESTORED_EXIT]


def _during_the_swap(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something while the catalog is being asked: what a commit has written is there by then."""
    real = ServerSqlCatalog._update_and_stage_table

    def stage(*args: Any) -> Any:
        action()
        return real(*args)

    monkeypatch.setattr(ServerSqlCatalog, "_update_and_stage_table", stage)


@pytest.mark.parametrize("harm", ["removed", "emptied", "cut"])
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_files_of_rows_that_go_while_the_catalog_is_asked(
    make_lake: Any, monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...], stock: bool, harm: str
) -> None:
    """A commit whose files were cleared away meanwhile does not happen; written again, the rows are there once."""
    lake = make_lake(stock_commit=stock) if stock else make_lake()
    info = lake.create(SCHEMA, key=key)
    lake.append(info, [rows(0)], 0)
    staged = lake.encode(info, [rows(1)], 1)
    path = Path(local_path(staged.files[0].path) or "")

    def spoil() -> None:
        if harm == "removed":
            path.unlink(missing_ok=True)
        elif path.exists():
            path.write_bytes(path.read_bytes()[: 0 if harm == "emptied" else -1])

    with monkeypatch.context() as patch:
        _during_the_swap(patch, spoil)
        with pytest.raises(StagedFilesMissing, match=path.name):
            lake.commit(info, staged)
    assert lake.table(info).scan().to_arrow()["n"].to_pylist() == [0]
    assert lake.append(info, [rows(1)], 1).outcome is CommitOutcome.COMMITTED
    assert sorted(lake.table(info).scan().to_arrow()["n"].to_pylist()) == [0, 1]


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ((), "metadata/snap-*.avro"),
        ((), "metadata/*-m0.avro"),
        (("n",), "metadata/*-m0.avro"),
        (("n",), "data/*deletes*"),
    ],
)
def test_files_of_the_attempt_that_go_while_the_catalog_is_asked(
    lake: Any, monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...], pattern: str
) -> None:
    """Manifests and delete files that were cleared away are written again by the next attempt."""
    info = lake.create(SCHEMA, key=key)
    lake.append(info, [rows(0, 1)], 0)
    staged = lake.encode(info, [rows(1)], 1)
    folder = Path(local_path(info.location) or "")
    before = set(folder.glob(pattern))
    removed: list[Path] = []

    def remove() -> None:
        if not removed:
            removed.extend(set(folder.glob(pattern)) - before)
            assert removed
            for path in removed:
                path.unlink()

    _during_the_swap(monkeypatch, remove)
    assert lake.commit(info, staged).outcome is CommitOutcome.COMMITTED
    assert sorted(lake.table(info).scan().to_arrow()["n"].to_pylist()) == ([0, 1] if key else [0, 1, 1])


def test_metadata_file_that_goes_while_the_catalog_is_asked(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new metadata file itself is written again too."""
    info = lake.create(SCHEMA)
    real = ServerSqlCatalog._write_metadata
    removed: list[str] = []

    def write(metadata: Any, io: Any, metadata_path: str) -> None:
        real(metadata, io, metadata_path)
        if not removed:
            removed.append(metadata_path)
            Path(local_path(metadata_path) or "").unlink()

    monkeypatch.setattr(catalogs.LeanSqlCatalog, "_write_metadata", staticmethod(write))
    assert lake.append(info, [rows(0)], 0).outcome is CommitOutcome.COMMITTED
    assert len(removed) == 1
    assert lake.table(info).scan().to_arrow()["n"].to_pylist() == [0]


class _Store:
    """An object store's file access, as far as sizes go."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def new_input(self, location: str) -> Any:
        self.asked.append(location)
        raise FileNotFoundError(location)


@pytest.mark.parametrize(("age_s", "repeated", "looks"), [(0, False, 0), (0, True, 1), (LOOK_AFTER_S + 1, False, 1)])
def test_files_in_an_object_store_are_looked_for_when_they_have_waited(
    lake: Any, age_s: float, repeated: bool, looks: int
) -> None:
    """Each look is a request: there is none while a gap is no longer than the commit itself."""
    info = lake.create(SCHEMA)
    staged = lake.encode(info, [rows(1)], 0)
    file = replace(staged.files[0], path="s3://bucket/t/data/a.parquet")
    staged = replace(staged, files=(file,), made_s=time.monotonic() - age_s)
    job = replace(lake.job(info, staged), repeated=repeated)
    store = _Store()
    waiting = WaitingFiles(store, job, [commit.data_file(file)], ())  # type: ignore[arg-type]
    if looks:
        with pytest.raises(StagedFilesMissing, match=r"a\.parquet"):
            waiting.check()
    else:
        waiting.check()
    assert store.asked == [file.path] * looks


def test_copy_over_the_open_database(lake: Any) -> None:
    """A database that is copied over in place, its logs removed, takes no commit of a connection that was open."""
    info = lake.create(SCHEMA)
    lake.append(info, [rows(0)], 0)
    path, copy = lake.directory / "catalog.db", lake.directory / "copy.db"
    with sqlite3.connect(path) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    lake.append(info, [rows(1)], 1)
    staged = lake.encode(info, [rows(2)], 2)
    shutil.copyfile(copy, path)
    for log in ("-wal", "-shm"):
        path.with_name(path.name + log).unlink()
    with pytest.raises(CatalogRestored):
        lake.commit(info, staged)
