"""Where a catalog points for a table, as one reads it who was not connected before (R28).

Owns: that reading. A connection that was open for long may be to a database that nobody else sees any more: the file
was restored under it, or another server took the database over. Does not own what follows from the answer (``commit``).
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import lru_cache
from typing import Final

from pyiceberg.catalog import Catalog
from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
from pyiceberg.serializers import FromInputFile
from pyiceberg.table import Table
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.pool import NullPool

from arka.iceberg.marks import mark_of
from arka.iceberg.sight import catalog_file
from arka.storage.ports import CatalogUnavailable, CommitJob, WarehouseChanged

#: How long SQLite waits for another process's lock, in seconds.
_BUSY_S: Final = 30.0
_QUERY: Final = (
    "SELECT metadata_location FROM iceberg_tables WHERE catalog_name = ? AND table_namespace = ? AND table_name = ?"
)


def read_pointer(opened: Catalog, identifier: tuple[str, ...]) -> str | None:
    """Read a table's current metadata location over a connection made for this question.

    A REST catalog is asked again: whether it makes a connection is its client's affair.

    Args:
        opened: the catalog.
        identifier: of the table.

    Returns:
        The location; None if no such table is there.

    Raises:
        Exception: the catalog does not answer.
    """
    if not isinstance(opened, SqlCatalog):
        try:
            return opened.load_table(identifier).metadata_location
        except (NoSuchTableError, NoSuchNamespaceError):
            return None
    key = (opened.name, Catalog.namespace_to_string(identifier[:-1]), identifier[-1])
    uri = opened.properties["uri"]
    path = catalog_file(uri)
    if path is not None:
        with closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
            row = connection.execute(_QUERY, key).fetchone()
        return None if row is None else str(row[0])
    question = select(IcebergTables.metadata_location).where(
        IcebergTables.catalog_name == key[0],
        IcebergTables.table_namespace == key[1],
        IcebergTables.table_name == key[2],
    )
    with _engine(uri).connect() as asked:
        return asked.execute(question).scalar()


def is_seen(opened: Catalog, table: Table, job: CommitJob, through_lsn: int) -> bool:
    """Look whether others see a table as far as it is about to be acknowledged.

    Args:
        opened: the catalog.
        table: as this process knows it.
        job: the commit's.
        through_lsn: what the table holds of the job's log.

    Returns:
        Whether the table is there at all.

    Raises:
        WarehouseChanged: others see an earlier state of it.
        CatalogUnavailable: the catalog does not answer.
    """
    try:
        location = read_pointer(opened, tuple(job.table.name))
        if location == table.metadata_location:
            return True
        # Others may have committed since: their metadata keeps our mark.
        now = None if location is None else FromInputFile.table_metadata(table.io.new_input(location))
    except Exception as error:
        raise CatalogUnavailable(
            f"table {job.table.name}: a commit was made, and the catalog does not say whether it is there: "
            f"{type(error).__name__}: {error}"
        ) from error
    if now is None or now.table_uuid != job.table.uuid:
        return False
    seen_lsn = mark_of(now.properties, job.log_uuid).committed_lsn
    if seen_lsn < through_lsn:
        raise WarehouseChanged(
            f"table {job.table.name}: a commit through LSN {through_lsn} was made, and the catalog shows the table at "
            f"LSN {seen_lsn}: the catalog was restored or replaced"
        )
    return True


@lru_cache(maxsize=8)
def _engine(uri: str) -> Engine:
    return create_engine(uri, poolclass=NullPool)


__all__ = ["is_seen", "read_pointer"]
