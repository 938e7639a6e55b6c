"""A SQL catalog's own tables when another process makes them at the same moment."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from pyiceberg.catalog.sql import IcebergNamespaceProperties, IcebergTables
from sqlalchemy import event
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateTable

from arka.iceberg.catalogs import connect
from arka.iceberg.config import CatalogConfig

TABLES = (IcebergTables.__table__, IcebergNamespaceProperties.__table__)


def _ddl(table: Any) -> str:
    return str(CreateTable(table, if_not_exists=True).compile(dialect=sqlite.dialect()))


def _open(path: Path) -> None:
    connect(CatalogConfig(f"sqlite:///{path}", "file:///nowhere")).close()


def test_rival_that_is_faster_with_each_table(tmp_path: Path) -> None:
    """A process that loses the race for each of the two tables in turn opens the catalog all the same."""
    path = tmp_path / "catalog.db"

    def make_it_first(target: Any, connection: Any, **_: Any) -> None:
        with sqlite3.connect(path, timeout=0) as rival:
            rival.execute(_ddl(target))

    for table in TABLES:
        event.listen(table, "before_create", make_it_first)
    try:
        _open(path)
    finally:
        for table in TABLES:
            event.remove(table, "before_create", make_it_first)
    _open(path)


@pytest.mark.parametrize("finishes", [True, False])
def test_rival_that_holds_the_database(tmp_path: Path, finishes: bool) -> None:
    """A database that another process has locked is waited for, whether that one makes the tables or gives up."""
    path = tmp_path / "catalog.db"
    rival = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    rival.execute("BEGIN EXCLUSIVE")
    for table in TABLES:
        rival.execute(_ddl(table))
    timer = threading.Timer(0.5, rival.execute, ["COMMIT" if finishes else "ROLLBACK"])
    timer.start()
    try:
        _open(path)
    finally:
        timer.join()
        rival.close()


def test_tables_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    """A catalog of an older pyiceberg, whose table lacks a column, is opened as it is."""
    path = tmp_path / "catalog.db"
    with sqlite3.connect(path) as old:
        for table in TABLES:
            old.execute(_ddl(table))
        old.execute("ALTER TABLE iceberg_tables DROP COLUMN iceberg_type")
    _open(path)
    with sqlite3.connect(path) as old:
        assert "iceberg_type" not in [row[1] for row in old.execute("PRAGMA table_info(iceberg_tables)")]
