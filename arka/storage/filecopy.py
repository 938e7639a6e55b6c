"""Copies of files of a data directory, durable, and whether the original has changed since (R38).

Owns: how bytes reach a copy, and by what a copied file is known to be as the original is. Does not own which files are
copied, nor in which order (``arka.storage.backup``).

A copy gets the time stamp that its original had before it was read. As long as size and time stamp of both are the
same, the original was not written to since. So a file that changes in its place is copied again, whatever its size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from arka.privacy import make_file, make_folders, private_opener

_COPY_BYTES: Final = 16 * 1024 * 1024
#: Of a file system that keeps time stamps less exactly than in nanoseconds, none is less exact than this.
_COARSE_NS: Final = 2_000_000_000
#: A time stamp that only an exact file system gives back.
_PROBE_NS: Final = 1_700_000_001_123_456_789


class FileCopies:
    """Copies that keep the time stamp of their original. Blocking.

    Args:
        folder: where all copies lie; it exists.
    """

    def __init__(self, folder: Path) -> None:
        probe = folder / ".probe"
        make_file(probe)
        os.utime(probe, ns=(_PROBE_NS, _PROBE_NS))
        self._slack_ns = 0 if probe.stat().st_mtime_ns == _PROBE_NS else _COARSE_NS
        probe.unlink()

    def is_current(self, source: os.stat_result, target: os.stat_result) -> bool:
        """Whether a copy still is as its original is, by size and time stamp."""
        apart_ns = abs(source.st_mtime_ns - target.st_mtime_ns)
        return source.st_size == target.st_size and apart_ns <= self._slack_ns

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file, unless its copy still is as it is; one that is not there is left out.

        Raises:
            OSError: the disk failed.
        """
        with suppress(FileNotFoundError):
            before = source.stat()
            with suppress(FileNotFoundError):
                if self.is_current(before, target.stat()):
                    return
            make_folders(target.parent)
            copy_file(source, target, before.st_size)
            os.utime(target, ns=(before.st_mtime_ns, before.st_mtime_ns))


def files_below(folder: Path, without: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the files below a folder by their path in it, but for those in folders of certain names."""
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in without)
        inside = os.path.relpath(path, folder)
        for name in sorted(names):
            yield name if inside == "." else f"{inside}/{name}"


def copy_file(path: Path, target: Path, size: int) -> None:
    """Copy ``size`` bytes of a file to a new one that becomes as long as it; holes stay holes."""
    with path.open("rb") as source, open(target, "wb", opener=private_opener) as copy:
        fd, end = source.fileno(), os.fstat(source.fileno()).st_size
        at = 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                # Nothing but a hole is left.
                break
            until = min(os.lseek(fd, at, os.SEEK_HOLE), size)
            while at < until:
                chunk = os.pread(fd, min(_COPY_BYTES, until - at), at)
                if not chunk:
                    break
                copy.seek(at)
                copy.write(chunk)
                at += len(chunk)
            else:
                continue
            break
        copy.truncate(end)
        copy.flush()
        os.fsync(copy.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file and make its contents durable."""
    with open(path, "wb", opener=private_opener) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Make a file's contents durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


__all__ = ["FileCopies", "copy_file", "files_below", "sync_file", "write_whole"]
