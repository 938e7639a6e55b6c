"""The rows of an SQLite catalog, read without a server and without pyiceberg.

Owns: how its file is opened, and which rows name a table. Does not own what a server does with them
(``arka.iceberg.sqlcatalog``).
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

#: How long another program's transaction is waited for, in seconds.
_TIMEOUT_S: Final = 30.0


def open_catalog_file(path: Path) -> sqlite3.Connection:
    """Open a catalog that is there.

    Raises:
        sqlite3.OperationalError: it is not there, or cannot be opened.
    """
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_TIMEOUT_S)


def read_pointers(path: Path) -> list[tuple[str, str]]:
    """Return a catalog's tables and views, by namespace and name, and their metadata files. Blocking.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    with closing(open_catalog_file(path)) as catalog:
        if not catalog.execute("SELECT 1 FROM sqlite_master WHERE name = 'iceberg_tables'").fetchall():
            # It has no table yet.
            return []
        rows = catalog.execute("SELECT table_namespace, table_name, metadata_location FROM iceberg_tables").fetchall()
        return [(f"{namespace}.{name}", str(location)) for namespace, name, location in rows if location]


__all__ = ["open_catalog_file", "read_pointers"]
