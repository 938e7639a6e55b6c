"""Drop a table's entry and delete its files, and no other table's (R5, R29).

Owns: that the entry which is removed is the one that was loaded, and which files and folders a purge may delete. Does
not own when a table is dropped (``arka.tiers.tables``) nor what its key index leaves (``runfiles``).

Names move: between the look at an entry and its removal others may rename the table and give its name to another one.
A SQL catalog removes the entry on condition that it is unchanged. A REST catalog has no such request: the entry is
looked at, removed, and then looked for under every name. Files are always those of the table that was loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import BadRequestError, NoSuchNamespaceError, NoSuchTableError, ServerError
from pyiceberg.io import FileIO
from pyiceberg.serializers import FromInputFile
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.typedef import Identifier

from arka.iceberg.config import CatalogConfig
from arka.iceberg.fileio import local_path
from arka.iceberg.sqlcatalog import ServerSqlCatalog
from arka.iceberg.tableoptions import expires_files

#: Locations that Arka made end in eight hex digits that no other table's has (R5).
_OWN_LOCATION: Final = re.compile(r"/[^/]+/[^/]+-[0-9a-f]{8}\Z")
_SCHEME: Final = re.compile(r"(?:s3a|s3n)://")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Another table of the catalog.

    Attributes:
        name: for people.
        places: where its files are known to lie, in the form of ``_place``.
        metadata: None where it could not be read, or lies far from what is purged.
    """

    name: str
    places: tuple[str, ...]
    metadata: TableMetadata | None


class _Unread(Exception):
    """What else is in the catalog is not known."""


def drop_entry(opened: Catalog, table: Table) -> None:
    """Remove a table's entry from the catalog, if it still is the one that was loaded.

    Args:
        opened: the catalog.
        table: as it was just loaded under its name.

    Raises:
        NoSuchTableError: the name is nobody's, or the table was renamed while a REST catalog removed the entry.
        CommitFailedException: the entry is not as it was loaded: load it again. Nothing happened.
        Exception: the catalog did not answer; the entry may be gone.
    """
    if isinstance(opened, ServerSqlCatalog):
        opened.drop_loaded(table)
        return
    opened.drop_table(table.name())
    left = next((name for name, found in _every_table(opened) if found.table_uuid == table.metadata.table_uuid), None)
    if left is not None:
        _log.error(
            "catalog.other_entry_dropped table=%s hint=%s was renamed to %s meanwhile, so that the entry which was "
            "removed may have been another table's; none of its files is deleted: register it again",
            ".".join(table.name()),
            table.metadata.table_uuid,
            ".".join(left),
        )
        raise NoSuchTableError(f"{'.'.join(table.name())} was renamed to {'.'.join(left)} meanwhile")


def purge(config: CatalogConfig, opened: Catalog, table: Table) -> None:
    """Delete the files of a table whose entry is gone; what may be another table's is left, and logged.

    Args:
        config: the catalog and the warehouse.
        opened: the catalog.
        table: as it was loaded before its entry was removed.
    """
    try:
        near = _others_near(opened, table)
        kept = {path for entry in near for path in _files_of_other(table.io, entry)}
    except _Unread as error:
        _log.warning("catalog.purge_kept table=%s reason=%s", ".".join(table.name()), error)
        return
    except Exception as error:
        _log.warning(
            "catalog.purge_kept table=%s reason=what else is in the catalog cannot be read: %s",
            ".".join(table.name()),
            error,
        )
        return
    twin = next((e for e in near if e.metadata and e.metadata.table_uuid == table.metadata.table_uuid), None)
    if twin is not None:
        _log.warning(
            "catalog.purge_kept table=%s reason=the same table is registered as %s", ".".join(table.name()), twin.name
        )
        return
    below = _place(table.metadata.location) + "/"
    data = expires_files(table.metadata.properties)
    named = _files_of(table.io, table.metadata, data=data, skip=_skip_with_a_word)
    for path in chain(named, (table.metadata_location,)):
        if not _place(path).startswith(below) or _place(path) in kept:
            _log.info("catalog.file_kept table=%s path=%s", ".".join(table.name()), path)
            continue
        try:
            table.io.delete(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            _log.warning("catalog.file_kept table=%s path=%s reason=%s", ".".join(table.name()), path, error)
    if near:
        _log.warning(
            "catalog.folder_kept table=%s location=%s reason=%s lies there too",
            ".".join(table.name()),
            table.metadata.location,
            ", ".join(sorted(entry.name for entry in near)),
        )
        return
    _remove_folder(config, table.metadata)


def _remove_folder(config: CatalogConfig, metadata: TableMetadata) -> None:
    """Remove what is left of a local table: files that no commit named, if Arka made the folder, and empty folders."""
    path = local_path(metadata.location)
    if path is None:
        return
    real = os.path.realpath(path)
    own = _OWN_LOCATION.fullmatch(metadata.location.removeprefix(config.warehouse))
    if own and expires_files(metadata.properties):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(real)
        return
    for folder, _, _ in os.walk(real, topdown=False):
        # Only an empty one goes.
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _files_of(
    io: FileIO, metadata: TableMetadata, *, data: bool, skip: Callable[[str, OSError], None]
) -> Iterator[str]:
    """Yield what a table's metadata names: data first, so that a purge that breaks off can still be read.

    Args:
        io: reads manifest lists and manifests.
        metadata: the table's.
        data: also data and delete files.
        skip: told a file of metadata that cannot be read, and why; what it names is left out if this returns.
    """
    lists: list[str] = []
    manifests: dict[str, None] = {}
    seen: set[str] = set()
    for snapshot in metadata.snapshots:
        lists.append(snapshot.manifest_list)
        try:
            found = snapshot.manifests(io)
        except OSError as error:
            skip(snapshot.manifest_list, error)
            continue
        for manifest in found:
            if manifest.manifest_path in manifests:
                continue
            manifests[manifest.manifest_path] = None
            if data:
                try:
                    entries = manifest.fetch_manifest_entry(io, discard_deleted=False)
                except OSError as error:
                    skip(manifest.manifest_path, error)
                    continue
                paths = {entry.data_file.file_path for entry in entries} - seen
                seen |= paths
                yield from sorted(paths)
    yield from manifests
    yield from lists
    yield from (statistics.statistics_path for statistics in metadata.statistics)
    yield from (statistics.statistics_path for statistics in metadata.partition_statistics)
    yield from (entry.metadata_file for entry in metadata.metadata_log)


def _skip_with_a_word(path: str, error: OSError) -> None:
    _log.warning("catalog.purge_incomplete path=%s reason=%s", path, error)


def _files_of_other(io: FileIO, entry: _Entry) -> set[str]:
    """The files of a table that lies near the one that is purged.

    Raises:
        _Unread: they are not known.
    """
    if entry.metadata is None:
        raise _Unread(f"{entry.name} lies there too and cannot be read")

    def give_up(path: str, error: OSError) -> None:
        raise _Unread(f"{entry.name} lies there too and {path} cannot be read: {error}") from error

    return {_place(path) for path in _files_of(io, entry.metadata, data=True, skip=give_up)} | set(entry.places)


def _others_near(opened: Catalog, table: Table) -> list[_Entry]:
    """Find the tables that lie at, below or above the place of one whose entry is gone, or are the same table."""
    here = _place(table.metadata.location)
    near = []
    if isinstance(opened, ServerSqlCatalog):
        # Whatever name they gave their catalog: the database and the warehouse are the same.
        for name, location in opened.all_pointers():
            # ``<location>/metadata/<file>``
            place = _place(location)
            folder = place.rpartition("/")[0].removesuffix("/metadata")
            if _is_near(folder, here):
                near.append(_Entry(name, (place,), _read(table.io, location)))
        return near
    for identifier, metadata in _every_table(opened):
        same = metadata.table_uuid == table.metadata.table_uuid
        if same or _is_near(_place(metadata.location), here):
            near.append(_Entry(".".join(identifier), (), metadata))
    return near


def _read(io: FileIO, location: str) -> TableMetadata | None:
    try:
        return FromInputFile.table_metadata(io.new_input(location))
    except (OSError, ValueError):
        return None


def all_identifiers(opened: Catalog, namespace: Identifier = ()) -> Iterator[Identifier]:
    """Yield the name of every table, also of those in namespaces inside of others."""
    try:
        inner = opened.list_namespaces(namespace)
    except (BadRequestError, ServerError):
        if not namespace:
            raise
        # A catalog that has no namespaces inside of others.
        return
    for found in inner:
        # Of a catalog that does not know the question, the answer is about others.
        if len(found) == len(namespace) + 1 and found[: len(namespace)] == namespace:
            yield from opened.list_tables(found)
            yield from all_identifiers(opened, found)


def _every_table(opened: Catalog) -> Iterator[tuple[Identifier, TableMetadata]]:
    """Yield every table of a REST catalog; raises where one cannot be read."""
    for identifier in all_identifiers(opened):
        with contextlib.suppress(NoSuchTableError, NoSuchNamespaceError):
            yield identifier, opened.load_table(identifier).metadata


def _place(url: str) -> str:
    """Spell a place in one way, so that places can be compared."""
    path = local_path(url)
    return os.path.realpath(path) if path is not None else _SCHEME.sub("s3://", url).rstrip("/")


def _is_near(one: str, other: str) -> bool:
    return one == other or one.startswith(other + "/") or other.startswith(one + "/")


__all__ = ["all_identifiers", "drop_entry", "purge"]
