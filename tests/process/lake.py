"""What plain pyiceberg finds in the data directory of a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Table


@contextmanager
def open_catalog(folder: Path, warehouse: str = "warehouse") -> Iterator[SqlCatalog]:
    """Open the catalog in a folder, as any pyiceberg user would."""
    catalog = SqlCatalog("arka", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}/{warehouse}")
    try:
        yield catalog
    finally:
        catalog.close()


def load(data: Path, name: str) -> Table:
    """Load a table of the default namespace."""
    with open_catalog(data) as catalog:
        return catalog.load_table(("default", name))


def rows(data: Path, name: str) -> pa.Table:
    """Read a table with plain pyiceberg."""
    return load(data, name).scan().to_arrow()


def column(data: Path, name: str, wanted: str) -> list[Any]:
    """Read one column of a table with plain pyiceberg."""
    return load(data, name).scan(selected_fields=(wanted,)).to_arrow()[wanted].to_pylist()
