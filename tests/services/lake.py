"""What plain pyiceberg finds in a backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.table import Table

from arka.testing.backends import Backend


@contextmanager
def open_catalog(backend: Backend) -> Iterator[Catalog]:
    """Open the catalog as any pyiceberg user would."""
    catalog = load_catalog("arka", **backend.catalog)
    try:
        yield catalog
    finally:
        catalog.close()


def load(backend: Backend, name: str) -> Table:
    """Load a table, fresh."""
    with open_catalog(backend) as catalog:
        return catalog.load_table(name)


def rows(backend: Backend, name: str) -> pa.Table:
    """Read a table's current snapshot."""
    return load(backend, name).scan().to_arrow()


def numbers_in(backend: Backend, name: str) -> list[int]:
    """Read the column ``n``, sorted."""
    found: list[int] = sorted(rows(backend, name)["n"].to_pylist())
    return found


def append(backend: Backend, name: str, batch: pa.RecordBatch, *, expire: bool = False) -> None:
    """Append rows as another writer would; ``expire``: and remove every snapshot but that of these rows."""
    with open_catalog(backend) as catalog:
        table = catalog.load_table(name)
        table.append(pa.Table.from_batches([batch]))
        if expire:
            current = table.metadata.current_snapshot_id
            for snapshot in table.metadata.snapshots:
                if snapshot.snapshot_id != current:
                    table.maintenance.expire_snapshots().by_id(snapshot.snapshot_id).commit()
