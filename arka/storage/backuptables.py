"""Whether a backup has every file that the tables of its catalog need (R38).

Owns: the check that goes before a backup's success, where a file of a table lies in the copy, and the copying of tables
that lie in the data directory beside its warehouse. Does not own the order of the copy (``arka.storage.backup``), nor
which files a table needs (``arka.iceberg.tablefiles``).

Others may compact a table, expire its snapshots and delete files between the copy of the catalog and that of the
warehouse. So each table of the copied catalog is read from the copy: a metadata file, manifest list, manifest, data
file, delete file or statistics file counts if it is there, with the size that metadata states, and was not changed
since it was copied. The contents of data files are not read. Files in a warehouse are created once: one that others
replace by another of the same size, time stamp included, is not noticed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from arka.errors import ConfigurationError
from arka.iceberg.fileio import local_path
from arka.iceberg.tablefiles import NeededFile, Unreadable, needed_files
from arka.storage.filecopy import FileCopies

#: Folders of a data directory that are not for tables.
_OWN: Final = frozenset({"wal", "objects", "checkpoints", "spill", "parked", "behind", "keyindex", "attempts"})


class FileLacking(Exception):
    """A file that a table needs is not in the copy as it should be.

    Args:
        table: by namespace and name.
        location: of the file, as metadata names it.
        problem: what is wrong with it.
    """

    def __init__(self, table: str, location: str, problem: str) -> None:
        super().__init__(f"table {table} needs {location}, which {problem}")
        self.location = location


class CopiedTables:
    """The tables of a copied catalog. Blocking.

    Args:
        source: the data directory.
        target: its copy.
        copies: what it was copied with.
    """

    def __init__(self, source: Path, target: Path, copies: FileCopies) -> None:
        self._source = Path(os.path.abspath(source))
        self._target = target
        self._copies = copies
        real = os.path.realpath(source)
        #: How paths in the data directory begin, and where that is in it; the warehouse may be a link to elsewhere.
        self._roots = (
            (self._source, Path()),
            (Path(real), Path()),
            (Path(os.path.realpath(self._source / "warehouse")), Path("warehouse")),
        )

    def check(self, pointers: list[tuple[str, str]]) -> tuple[str, ...]:
        """Check that each file of each table is in the copy; those beside the warehouse are copied now.

        Args:
            pointers: the tables and views of the copied catalog, each with its metadata file.

        Returns:
            The tables of which files lie outside of the data directory: those are not in the copy.

        Raises:
            FileLacking: a file is not in the copy as the copied catalog needs it.
            ConfigurationError: a table lies in a folder of the server's own.
            OSError: the disk failed.
        """
        outside = set()
        for table, location in sorted(pointers):
            try:
                for file in needed_files(location, self._place_of):
                    if not self._has(table, file):
                        outside.add(table)
            except Unreadable as error:
                raise FileLacking(table, error.location, f"is damaged ({error})") from error
        return tuple(sorted(outside))

    def _place_of(self, location: str) -> str | None:
        inside = self._inside(location)
        return None if inside is None else str(self._target / inside)

    def _inside(self, location: str) -> Path | None:
        """The path in the data directory of a file; None if it lies elsewhere."""
        path = local_path(location)
        if path is None:
            return None
        named = Path(os.path.normpath(path))
        # As it is spelled first: a link in the warehouse is copied as what it leads to. Links are not looked for where
        # the spelling tells: a table may have many files.
        inside = self._below_a_root(named)
        return self._below_a_root(Path(os.path.realpath(named.parent), named.name)) if inside is None else inside

    def _below_a_root(self, path: Path) -> Path | None:
        for root, inside in self._roots:
            if path.is_relative_to(root):
                return inside / path.relative_to(root)
        return None

    def _has(self, table: str, file: NeededFile) -> bool:
        """Check one file.

        Returns:
            Whether it lies in the data directory.
        """
        inside = self._inside(file.location)
        if inside is None or not inside.parts:
            return False
        target, source = self._target / inside, self._source / inside
        if inside.parts[0] != "warehouse":
            if inside.parts[0] in _OWN:
                raise ConfigurationError(
                    f"Table {table} needs {file.location}, which lies in a folder of the server's own: a backup does "
                    f"not take tables for what belongs there. Move the table out of {self._source / inside.parts[0]}"
                )
            self._copies.copy(source, target)
        try:
            found = target.stat()
        except FileNotFoundError as error:
            raise FileLacking(table, file.location, "is gone") from error
        if file.size is not None and found.st_size != file.size:
            raise FileLacking(table, file.location, f"has {found.st_size} bytes where {file.size} are expected")
        try:
            original = source.stat()
        except FileNotFoundError:
            # Deleted since; the copy has it.
            return True
        if not self._copies.is_current(original, found):
            raise FileLacking(table, file.location, "was changed while it was copied")
        return True


__all__ = ["CopiedTables", "FileLacking"]
