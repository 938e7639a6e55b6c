"""The SQL catalog's own tables, made once although several processes open an empty database together.

Owns: that both tables are there before pyiceberg looks for them, and that a process that loses the race waits for
the winner instead of failing. Does not own what the catalog does with them (``arka.iceberg.sqlcatalog``).

pyiceberg looks and creates in separate transactions: of three processes one can lose twice, once for each table. Here
one transaction looks and makes both, behind a lock of the database.
"""

from __future__ import annotations

import time
from typing import Final

from pyiceberg.catalog.sql import SqlCatalogBaseTable
from sqlalchemy import Connection, Engine, create_engine, inspect, text
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

#: The advisory lock of PostgreSQL under which the tables are made: any number that nobody else takes.
_ADVISORY_LOCK: Final = 0x61726B61
#: The pause between two looks at a database that another process has locked, in seconds.
_PAUSE_S: Final = 0.05

_TABLES: Final = tuple(SqlCatalogBaseTable.metadata.sorted_tables)


def make_catalog_tables(uri: str, *, busy_s: float) -> None:
    """Make the catalog's own tables where they are missing; those of any version that are there stay as they are.

    Blocking. May be called by any number of processes at once.

    Args:
        uri: the SQL catalog, as SQLAlchemy reads it.
        busy_s: how long a database that others have locked is waited for, in seconds.

    Raises:
        sqlalchemy.exc.DatabaseError: the database does not answer, or refuses.

    Durability: the tables are committed on return.
    """
    engine = create_engine(uri, poolclass=NullPool)
    deadline = time.monotonic() + busy_s
    try:
        while True:
            try:
                with engine.connect() as connection:
                    if not _missing(connection):
                        return
                _make(engine, busy_s)
            except OperationalError as error:
                # SQLite does not always wait for its lock: not where a database changes its journal's mode.
                if not _is_locked(error) or time.monotonic() >= deadline:
                    raise
            except DatabaseError:
                # Another kind of database, without a lock that is known here: the winner's tables are there now.
                if _knows_lock(engine) or time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_S)
    finally:
        engine.dispose()


def _missing(connection: Connection) -> bool:
    names = inspect(connection).get_table_names()
    return any(table.name not in names for table in _TABLES)


def _make(engine: Engine, busy_s: float) -> None:
    """Make what is missing in one transaction, behind the database's own lock."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # The driver begins a transaction at the first change only; here it begins before the look.
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.isolation_level = None
            connection.exec_driver_sql(f"PRAGMA busy_timeout={int(busy_s * 1000)}")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        elif engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        names = inspect(connection).get_table_names()
        for table in _TABLES:
            if table.name not in names:
                connection.execute(CreateTable(table))
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("COMMIT")
        connection.commit()


def _is_locked(error: OperationalError) -> bool:
    return "locked" in str(error.orig)


def _knows_lock(engine: Engine) -> bool:
    return engine.dialect.name in ("sqlite", "postgresql")


__all__ = ["make_catalog_tables"]
