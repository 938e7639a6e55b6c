"""The catalog of a worker process: opened once, by URI.

Owns: which pyiceberg catalog a URI means and with which properties. Does not own what is done with it.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Final

from pyiceberg.catalog import Catalog
from pyiceberg.io import FileIO
from pyiceberg.table.metadata import TableMetadata
from sqlalchemy import event, make_url

from arka.errors import ConfigurationError
from arka.iceberg.catalogtables import make_catalog_tables
from arka.iceberg.config import CATALOG_NAME, CatalogConfig
from arka.iceberg.fileio import FILE_IO_CLASS
from arka.iceberg.sight import catalog_file, database_closed, database_opened, look, on_change
from arka.iceberg.sqlcatalog import LeanSqlCatalog, ServerSqlCatalog
from arka.privacy import FILE_MODE, make_folders, share_file, share_folder
from arka.storage.ports import WarehouseChanged

#: How long SQLite waits for another process's transaction, in milliseconds.
_SQLITE_BUSY_MS: Final = 30_000

_opened: dict[CatalogConfig, Catalog] = {}


def _keep_old_metadata(io: FileIO, base: TableMetadata, metadata: TableMetadata) -> None:
    """Stand in for pyiceberg's deletion at once: superseded metadata files have a grace (``garbage``)."""
    del io, base, metadata


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout={_SQLITE_BUSY_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        # The swap of a metadata location is the commit: it must survive power loss.
        cursor.execute("PRAGMA synchronous=FULL")
        # SQLite opens its log files with the first read.
        cursor.execute("SELECT count(*) FROM sqlite_master")
        cursor.fetchall()
    finally:
        cursor.close()


def connect(config: CatalogConfig) -> Catalog:
    """Open a catalog; a SQL catalog's tables are made if they are missing.

    Raises:
        WarehouseChanged: the file of a catalog that this node has used before is gone.
        ConfigurationError: an SQLite database that is not a file.
        OSError: the directory of an SQLite file cannot be made.
        Exception: what SQLAlchemy or the REST client raise when the catalog does not answer.
    """
    properties = {
        **dict(config.properties),
        "uri": config.uri,
        "warehouse": config.warehouse,
        "py-io-impl": FILE_IO_CLASS,
    }
    if config.is_rest:
        # Only here: the REST client's imports cost a worker 100 ms that most never need.
        from arka.iceberg.restcatalog import ServerRestCatalog

        rest = ServerRestCatalog(CATALOG_NAME, **properties)
        rest._delete_old_metadata = _keep_old_metadata  # type: ignore[method-assign]
        return rest
    url = make_url(config.uri)
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise ConfigurationError(f"iceberg.catalog_uri {config.uri!r}: workers cannot share a database in memory")
        folder = os.path.dirname(os.path.abspath(url.database))
        if not os.path.isdir(folder):
            make_folders(folder)
            share_folder(folder, passage=True)
    else:
        # A connection that broke while nobody used it is replaced instead of failing the next request.
        properties.setdefault("pool_pre_ping", "true")
    file = catalog_file(config.uri)
    if config.is_joined():
        # Its tables are there, or the database is not the one that it was: making them would hide that (R28).
        properties["init_catalog_tables"] = "false"
        if file is not None and not os.path.exists(file):
            raise WarehouseChanged(f"the catalog file {file} is gone")
    kind = ServerSqlCatalog if config.stock_commit else LeanSqlCatalog
    if properties.get("init_catalog_tables", "true").lower() not in ("false", "0", "no", "off"):
        if file is not None:
            _make_file(file)
        make_catalog_tables(config.uri, busy_s=_SQLITE_BUSY_MS / 1000)
    made = kind(CATALOG_NAME, **properties)
    made._delete_old_metadata = _keep_old_metadata  # type: ignore[method-assign]
    if made.engine.dialect.name == "sqlite":
        event.listen(made.engine, "connect", _set_pragmas)
        if file is not None:
            # After the pragmas, when its log files are open.
            event.listen(made.engine, "connect", lambda *_, path=file: database_opened(path))
            event.listen(made.engine, "close", lambda *_, path=file: database_closed(path))
        # Connections from before the listener are not used again.
        made.engine.dispose()
    return made


def _make_file(path: str) -> None:
    """Make an SQLite catalog's empty file unless it is there; SQLite gives its log files the same mode and group."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            share_file(descriptor)
        finally:
            os.close(descriptor)


def catalog(config: CatalogConfig) -> Catalog:
    """Return this process's catalog for ``config``, opening it at the first call.

    Raises:
        WarehouseChanged: the catalog's file is gone or another one; the next call opens what is there then.
        Exception: as ``connect``; a later call tries again.
    """
    known = _opened.get(config)
    if known is None:
        known = _opened[config] = connect(config)
    look(config)
    return known


@on_change
def _close_all() -> None:
    """Close what is open: an open database is its file, whatever lies under the name now."""
    for opened in _opened.values():
        opened.close()
    _opened.clear()


__all__ = ["catalog", "connect"]
