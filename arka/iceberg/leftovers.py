"""Files that an attempt made and that no commit names (R32).

Owns: the look at the table's metadata, and the deletion. Does not own which attempts are over
(``arka.storage.attempts``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence

from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
from pyiceberg.io import FileIO
from pyiceberg.table.metadata import TableMetadata

from arka.iceberg.catalogs import catalog
from arka.iceberg.config import CatalogConfig
from arka.records import TableInfo
from arka.storage.ports import CatalogUnavailable, TableMissing
from arka.tableproperties import SUMMARY_COMMIT_ID


def discard_attempt(config: CatalogConfig, table: TableInfo, commit_ids: Collection[str], paths: Sequence[str]) -> bool:
    """Delete what an attempt made, unless a commit names it.

    To be called once the attempt's process is gone, and if its files were ever given to a commit, once a later commit
    of the same log has moved the table: then that one can no longer land.

    Files are looked for below the table's own location and nowhere else: a journal that was copied or moved with its
    data directory names those of the original (R29).

    Args:
        config: the catalog.
        table: the attempt's table.
        commit_ids: the commits that its files were given to.
        paths: the files that it may have made.

    Returns:
        Whether they are gone; False: a snapshot names them.

    Raises:
        TableMissing: no such table under its name; nothing was deleted.
        CatalogUnavailable: the metadata cannot be read.
        OSError: the warehouse failed; some may be gone.
    """
    try:
        loaded = catalog(config).load_table(tuple(table.name))
    except (NoSuchTableError, NoSuchNamespaceError) as error:
        raise TableMissing(f"Table not found: {table.name}") from error
    except ValueError as error:
        raise CatalogUnavailable(f"table {table.name}: its metadata cannot be read: {error}") from error
    metadata = loaded.metadata
    if metadata.table_uuid != table.uuid:
        raise TableMissing(f"Table not found: {table.name} with UUID {table.uuid}")
    ours = own_paths(metadata.location, paths)
    for snapshot in metadata.snapshots:
        if snapshot.summary is not None and snapshot.summary.get(SUMMARY_COMMIT_ID) in commit_ids:
            return False
    # Others may have expired the commit's snapshot: its files live on in those that follow. A journal that was copied,
    # or that lost its last line with the power, does not name the commit at all.
    if ours and _names_any(metadata, loaded.io, set(ours)):
        return False
    for path in ours:
        with contextlib.suppress(FileNotFoundError):
            loaded.io.delete(path)
    return True


def own_paths(location: str, paths: Sequence[str]) -> list[str]:
    """Say where files that an attempt named lie in the table as it is now; those of another table are left out.

    A table's folder has eight hex digits of its own in its name (R5). So what is below a folder of that name was below
    this table's location, before it was moved or copied.

    Args:
        location: the table's.
        paths: what the journal names.
    """
    root = location.rstrip("/")
    folder = f"/{root.rpartition('/')[2]}/"
    found = []
    for path in paths:
        below, _, name = path.partition(folder)
        if path.startswith(f"{root}/"):
            found.append(path)
        elif below and name and ".." not in name.split("/"):
            found.append(f"{root}/{name}")
    return found


def _names_any(metadata: TableMetadata, io: FileIO, paths: Collection[str]) -> bool:
    """Whether a retained snapshot names one of some files."""
    seen: set[str] = set()
    for snapshot in metadata.snapshots:
        for manifest in snapshot.manifests(io):
            if manifest.manifest_path not in seen:
                seen.add(manifest.manifest_path)
                entries = manifest.fetch_manifest_entry(io, discard_deleted=False)
                if any(entry.data_file.file_path in paths for entry in entries):
                    return True
    return False


__all__ = ["discard_attempt", "own_paths"]
