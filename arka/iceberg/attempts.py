"""Attempts at a job: which files each one may have made, and how far it is (R32).

Owns: the journal of an attempt, a file on the local disk whose name the server fixes before the attempt starts. The
worker adds a data file's location before it makes the file, and a mark once the file is finished. So the server knows
what an attempt left, however its process ended, and whether it makes progress. Does not own when files are deleted
(``arka.storage.catalog``).

Lines: ``# TABLE`` with its UUID first, ``+ LOCATION`` before a file is made, ``=`` when it is finished, ``! COMMIT``
before the files are given to a commit. A worker that dies in the midst of a line leaves no file of that name: the file
is made after its line.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from arka.privacy import FILE_MODE, make_folders


class Journal:
    """The worker's side: written by the threads of one attempt. An empty path writes nothing."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[Journal]:
        """Keep it open for the attempt.

        Raises:
            OSError: the disk failed; nothing was made yet.
        """
        if self._path:
            make_folders(os.path.dirname(self._path))
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
        try:
            yield self
        finally:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def begin(self, location: str) -> None:
        """Name a file that is about to be made.

        Raises:
            OSError: the disk failed; the file must not be made.
        """
        self._write(f"+ {location}\n")

    def finished(self) -> None:
        """Say that a file is finished."""
        self._write("=\n")

    def _write(self, line: str) -> None:
        if self._descriptor >= 0:
            with self._lock:
                os.write(self._descriptor, line.encode())


class Record(NamedTuple):
    """What a journal says.

    Attributes:
        table: the table's UUID; None where the journal was cut off before it.
        files: the locations of all files that the attempt may have made.
        commits: the commits that they were given to.
    """

    table: UUID | None
    files: tuple[str, ...]
    commits: tuple[str, ...]


def start(directory: str, attempt: UUID, table: UUID) -> str:
    """Make the journal of an attempt; returns its path. Blocking.

    Raises:
        OSError: the disk failed.
    """
    path = os.path.join(directory, f"{attempt.hex}.files")
    make_folders(directory)
    _append(path, f"# {table}\n")
    return path


def give(path: str, commit: UUID) -> None:
    """Say which commit an attempt's files are given to; before it is asked for. Blocking.

    Raises:
        OSError: the disk failed.
    """
    _append(path, f"! {commit}\n")


def _append(path: str, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(path: str) -> Record:
    """Read a journal; one that is gone says nothing. Blocking."""
    try:
        # What stands behind the last line end is the line of a file that was not made.
        lines = Path(path).read_text().split("\n")[:-1]
    except OSError:
        lines = []
    table = next((UUID(line[2:]) for line in lines if line.startswith("# ")), None)
    files, commits = (tuple(line[2:] for line in lines if line.startswith(mark)) for mark in ("+ ", "! "))
    return Record(table, files, commits)


def finished_files(path: str) -> int:
    """Return how many files an attempt has finished so far; 0 for one that has not begun."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return 0
    return data.split(b"\n").count(b"=")


def forget(path: str) -> None:
    """Remove an attempt's journal: its files are named by a commit, or gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def left_over(directory: str) -> list[str]:
    """Return the journals of attempts that an earlier process left."""
    try:
        return sorted(entry.path for entry in os.scandir(directory) if entry.name.endswith(".files"))
    except FileNotFoundError:
        return []


__all__ = ["Journal", "Record", "finished_files", "forget", "give", "left_over", "read", "start"]
