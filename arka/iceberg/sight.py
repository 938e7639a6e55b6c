"""Whether catalog, warehouse and table are still the ones that a commit began with (R28).

Owns: what is looked at. Local places are told apart by device and inode: the catalog's file, the warehouse's folder
and the table's own. Files of metadata are looked for by name. An SQLite database is its file and, while a connection
is open, the two log files beside it: a connection whose log was removed or replaced reads and writes what nobody else
sees. Does not own what follows from a difference: the server stalls, and reads the warehouse's marker
(``arka.tiers.warehouse``).

A worker remembers the places that it has seen. When one of them is another, everything that the worker knows of
files is void, so it says so once and begins again with what is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from pyiceberg.io import FileIO
from sqlalchemy import make_url

from arka.iceberg.config import CatalogConfig
from arka.iceberg.fileio import list_folder, local_path
from arka.storage.ports import CatalogRestored, FilesMissing, Places, WarehouseChanged

#: Most files of one table that are looked for at each commit; the server looks for all of them now and then.
_FILES_PER_COMMIT: Final = 1_024
#: So many files of one folder are asked for one by one; more are found by one LIST.
_HEADS: Final = 8

# By path: device and inode when this process saw the place for the first time.
_seen: dict[str, tuple[int, int]] = {}
_listeners: list[Callable[[], None]] = []

#: What SQLite keeps beside a database while connections are open.
_LOG_FILES: Final = ("-wal", "-shm")


@dataclass(slots=True)
class _OpenDatabase:
    """The connections of this process to an SQLite database, and the log files that they opened."""

    connections: int = 0
    logs: dict[str, tuple[int, int]] = field(default_factory=dict)


_databases: dict[str, _OpenDatabase] = {}


def database_opened(path: str) -> None:
    """Record that this process opened a connection to an SQLite database, whose log files are open with it.

    Args:
        path: of the database.
    """
    database = _databases.setdefault(path, _OpenDatabase())
    database.connections += 1
    for name in (path + suffix for suffix in _LOG_FILES):
        identity = _identity(name)
        if identity is not None:
            database.logs.setdefault(name, identity)


def database_closed(path: str) -> None:
    """Record that a connection was closed; with the last one SQLite may remove the log files."""
    database = _databases.get(path)
    if database is not None:
        database.connections -= 1
        if database.connections == 0:
            del _databases[path]


def check_database(path: str) -> None:
    """Check that the log files of an SQLite database are those that this process has open (R28).

    Raises:
        CatalogRestored: one is gone or another one. Nothing is forgotten and nothing closed: the process has to end.
    """
    database = _databases.get(path)
    if database is None:
        return
    for name, identity in database.logs.items():
        if _identity(name) != identity:
            raise CatalogRestored(
                f"{name} was removed or replaced while the catalog was open: {path} was restored or copied over"
            )


def on_change(listener: Callable[[], None]) -> Callable[[], None]:
    """Have a function called when nothing that this worker knows of catalog and warehouse holds any more."""
    _listeners.append(listener)
    return listener


def forget() -> None:
    """Forget the places, and let all who remember something of them forget it too."""
    _seen.clear()
    for listener in _listeners:
        listener()


@lru_cache(maxsize=8)
def catalog_file(uri: str) -> str | None:
    """Return the path of an SQLite catalog's file; None for any other catalog."""
    if not uri.startswith("sqlite"):
        return None
    database = make_url(uri).database
    return os.path.abspath(database) if database and database != ":memory:" else None


def look(config: CatalogConfig, location: str = "") -> Places:
    """Look at the local places of a catalog and, with ``location``, of its warehouse and of a table.

    Args:
        config: the catalog.
        location: the table's URL; empty for the catalog alone.

    Raises:
        WarehouseChanged: a place is gone, or another one than this process saw before. What this process knew of the
            old one is forgotten: the next call begins with what is there.
        CatalogRestored: an SQLite catalog was restored in place; the process has to end.
    """
    named = {"catalog file": catalog_file(config.uri)}
    if location:
        table = local_path(location)
        root = local_path(config.warehouse)
        if root is not None and table is not None and table.startswith(root + "/"):
            named["warehouse"] = root
        named["table folder"] = table
    file = named["catalog file"]
    found = []
    for what, path in named.items():
        if path is None:
            continue
        identity = _identity(path)
        if identity is None:
            forget()
            raise WarehouseChanged(f"the {what} {path} is gone")
        if _seen.setdefault(path, identity) != identity:
            forget()
            raise WarehouseChanged(f"the {what} {path} is another one than before")
        found.append((path, *identity))
    if file is not None:
        check_database(file)
    return tuple(found)


def check_same(places: Places) -> None:
    """Check that places are what they were.

    Raises:
        WarehouseChanged: one is gone or another one.
    """
    for path, *identity in places:
        if _identity(path) != tuple(identity):
            forget()
            raise WarehouseChanged(f"{path} is another one than when the commit began, or is gone")
    for path, *_ in places:
        check_database(path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def check_files_here(locations: Sequence[str]) -> bool:
    """Look for files of a table's metadata where that costs no request.

    Args:
        locations: the current metadata file first, then its manifest list, then manifests.

    Returns:
        Whether all of them were looked for and are there.

    Raises:
        FilesMissing: one is not there.
    """
    for location in locations[:_FILES_PER_COMMIT]:
        path = local_path(location)
        if path is None:
            return False
        if not os.path.exists(path):
            raise FilesMissing(location)
    return len(locations) <= _FILES_PER_COMMIT


def check_files(locations: Sequence[str], io: FileIO) -> None:
    """Look for all files of a table's metadata, by one LIST of each folder or a request for each file.

    Args:
        locations: as for ``check_files_here``.
        io: the warehouse.

    Raises:
        FilesMissing: one is not there.
        OSError: the warehouse did not answer.
    """
    folders: dict[str, list[str]] = {}
    for location in locations:
        folder, _, name = location.rpartition("/")
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        if len(names) <= _HEADS:
            missing = [name for name in names if not io.new_input(f"{folder}/{name}").exists()]
        else:
            listed = list_folder(io, folder)
            missing = [name for name in names if name not in listed]
        if missing:
            raise FilesMissing(f"{folder}/{missing[0]}")


__all__ = [
    "catalog_file",
    "check_database",
    "check_files",
    "check_files_here",
    "check_same",
    "database_closed",
    "database_opened",
    "forget",
    "look",
    "on_change",
]
