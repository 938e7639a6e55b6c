"""Which files the retained snapshots of a table need, and how long metadata says that each is (R38).

Owns: the walk from a metadata file to what it names. Does not own where the files are looked for, nor what happens if
one is not there (``arka.storage.backuptables``), nor which files of a table may be deleted (``purge``).

Superseded metadata files, which the metadata log names, are not among them: nobody needs them to read a snapshot, and
Iceberg's libraries delete them while the log still names them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyiceberg.manifest import ManifestFile, read_manifest_list

from arka.iceberg.fileio import LocalFile, WarehouseFileIO

_T = TypeVar("_T")


class NeededFile(NamedTuple):
    """A file that a table needs.

    Attributes:
        location: as metadata names it.
        size: in bytes, as metadata states it; None where it does not.
    """

    location: str
    size: int | None


class Unreadable(Exception):
    """A file of metadata is there, and cannot be read.

    Args:
        location: as metadata names it.
        reason: for people.
    """

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(f"{location} cannot be read: {reason}")
        self.location = location


def needed_files(metadata_location: str, place_of: Callable[[str], str | None]) -> Iterator[NeededFile]:
    """Yield each file that a table or view needs, once; a file of metadata before it is opened.

    Args:
        metadata_location: the current metadata file.
        place_of: the local path at which a file of metadata is read; None where that is not wanted: then what only it
            names is left out.

    Raises:
        Unreadable: a file of metadata is not what it should be.
        FileNotFoundError: it was not there after it was yielded.
        OSError: the disk failed.
    """
    yield NeededFile(metadata_location, None)
    path = place_of(metadata_location)
    if path is None:
        return
    walk = _Walk(place_of)
    lists, statistics = _read(metadata_location, lambda: _named_in(Path(path).read_bytes()))
    for location in lists:
        yield from walk.of_list(location)
    yield from statistics


class _Walk:
    """The files below manifest lists; snapshots share most of them."""

    def __init__(self, place_of: Callable[[str], str | None]) -> None:
        self._io = _PlacedFileIO(place_of)
        self._place_of = place_of
        self._seen: set[str] = set()

    def of_list(self, location: str) -> Iterator[NeededFile]:
        """Yield a manifest list, its manifests, and the files that are live in them."""
        if not self._is_new(location):
            return
        yield NeededFile(location, None)
        if self._place_of(location) is None:
            return
        for manifest in _read(location, lambda: list(read_manifest_list(self._io.new_input(location)))):
            if self._is_new(manifest.manifest_path):
                yield from self._of_manifest(manifest)

    def _of_manifest(self, manifest: ManifestFile) -> Iterator[NeededFile]:
        path = manifest.manifest_path
        yield NeededFile(path, manifest.manifest_length)
        if self._place_of(path) is None:
            return
        for entry in _read(path, lambda: manifest.fetch_manifest_entry(self._io, discard_deleted=True)):
            if self._is_new(entry.data_file.file_path):
                yield NeededFile(entry.data_file.file_path, entry.data_file.file_size_in_bytes)

    def _is_new(self, location: str) -> bool:
        if location in self._seen:
            return False
        self._seen.add(location)
        return True


class _PlacedFileIO(WarehouseFileIO):
    """Reads files at other places than metadata says."""

    def __init__(self, place_of: Callable[[str], str | None]) -> None:
        super().__init__()
        self._place_of = place_of

    def new_input(self, location: str) -> LocalFile:
        """Return the file that stands for ``location``."""
        path = self._place_of(location)
        assert path is not None
        return LocalFile(location, path)


def _read(location: str, read: Callable[[], _T]) -> _T:
    """Read a file of metadata; whatever is wrong with its bytes is said of the file."""
    try:
        return read()
    except FileNotFoundError:
        raise
    except Exception as error:
        # Readers of Avro and of JSON raise errors of many kinds, OSError among them.
        raise Unreadable(location, f"{type(error).__name__}: {error}") from error


def _named_in(data: bytes) -> tuple[list[str], list[NeededFile]]:
    """What a metadata file names: manifest lists, and statistics files. A view names none of both."""
    fields = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    lists = [str(snapshot["manifest-list"]) for snapshot in fields.get("snapshots") or ()]
    statistics = [
        NeededFile(str(named["statistics-path"]), int(named["file-size-in-bytes"]))
        for key in ("statistics", "partition-statistics")
        for named in fields.get(key) or ()
    ]
    return lists, statistics


__all__ = ["NeededFile", "Unreadable", "needed_files"]
