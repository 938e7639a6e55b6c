"""The local disk: files, fsync, and a thread to wait for them in.

Owns: how the log's blocking calls leave trio's thread, and the POSIX calls below ``Disk``. Does not own
any file's format (``arka.wal``).
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from arka import failpoints
from arka._core.framing import Group, punch_hole
from arka._core.logthread import LogThread
from arka.errors import DataCorruption
from arka.privacy import FILE_MODE, make_folder
from arka.storage.ports import Buffer, DiskFile

T = TypeVar("T")

#: Blocking jobs at a time: more than there are callers (writer, spare segments, log state, removal), so
#: that a group commit never waits for a thread behind one of the others.
_JOBS: Final = 8

#: Buffers that one pwritev takes; the least that POSIX systems of our time allow is 1024.
_IOV_MAX: Final = 1024


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of a call that knows its descriptor only: a person has to find the disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class PosixFile:
    """A file descriptor as ``DiskFile``."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @property
    def path(self) -> Path:
        """Where it was opened."""
        return self._path

    def fileno(self) -> int:
        """The descriptor; -1 when it is closed."""
        return self._fd

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write ``parts`` joined at ``offset``."""
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        while left:
            with _naming(self._path):
                written = os.pwritev(self._fd, left[:_IOV_MAX], offset)
            offset += written
            taken = 0
            while taken < len(left) and written >= len(left[taken]):
                written -= len(left[taken])
                taken += 1
            del left[:taken]
            if written:
                left[0] = left[0][written:]

    def sync(self) -> None:
        """Make bytes and size durable."""
        with _naming(self._path):
            os.fdatasync(self._fd)

    def commit(self, group: Group) -> None:
        """Seal, write and fsync a group without the GIL."""
        if failpoints.armed():
            # The same bytes in two steps, with a place between them.
            self.write(group.offset, [group.to_bytes()])
            failpoints.hit("wal.group_written")
            self.sync()
        else:
            with _naming(self._path):
                group.commit(self._fd)

    def release_tail(self, offset: int) -> None:
        """Punch a hole from ``offset`` to the end."""
        # Block-aligned: a block that holds the last frame's end stays.
        offset = (offset + 4095) & ~4095
        punch_hole(self._fd, offset, os.fstat(self._fd).st_size - offset)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class PosixDisk:
    """``Disk`` on a POSIX file system that keeps its promises about fsync."""

    def __init__(self) -> None:
        self._limiter: trio.CapacityLimiter | None = None
        # Made by the first commit, and ended with this object.
        self._thread: LogThread | None = None

    async def run(self, job: Callable[[], T]) -> T:
        """Run a blocking job in a thread.

        Cancellation: before the job begins it does not run; once it runs it is finished first.
        """
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(_JOBS)
        return await trio.to_thread.run_sync(job, abandon_on_cancel=False, limiter=self._limiter)

    async def commit(self, file: DiskFile, group: Group) -> None:
        """Have the log's own thread do it, which never takes the GIL; without one, a thread of Python's.

        Cancellation: before it begins nothing is written; once begun it is finished, and this returns normally.
        """
        thread = self._log_thread()
        if thread is None or not isinstance(file, PosixFile):
            await self.run(partial(file.commit, group))
            return
        await trio.lowlevel.checkpoint_if_cancelled()
        thread.begin(group, file.fileno())
        with trio.CancelScope(shield=True), _naming(file.path):
            try:
                await trio.lowlevel.wait_readable(thread.event_fd)
            finally:
                # Also where trio itself has failed: nobody may close the file under the thread.
                thread.finish()

    def _log_thread(self) -> LogThread | None:
        """Return the log's thread; None where failpoints are armed, or nothing can be had to make it of."""
        if failpoints.armed():
            # They pause and fail: that is for a thread of Python's.
            return None
        if self._thread is None:
            try:
                self._thread = LogThread()
            except OSError:
                # No descriptor or thread is left now. Nothing was written, and another commit may be luckier.
                return None
        return self._thread

    def make_directory(self, directory: Path) -> None:
        """Make a directory and its missing parents, each one's name fsynced in its parent."""
        if directory.is_dir():
            return
        self.make_directory(directory.parent)
        make_folder(directory)
        self.sync_directory(directory.parent)

    def list_names(self, directory: Path) -> list[str]:
        """List files by name."""
        try:
            with os.scandir(directory) as entries:
                # A link to a file is one: segments may be moved to another file system that way (R39).
                return sorted(entry.name for entry in entries if entry.is_file())
        except FileNotFoundError:
            return []

    def create(self, path: Path, size: int) -> DiskFile:
        """Create a preallocated file."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            if size:
                with _naming(path):
                    os.posix_fallocate(fd, 0, size)
        except BaseException:
            os.close(fd)
            raise
        return PosixFile(path, fd)

    def open(self, path: Path) -> DiskFile:
        """Open a file that exists."""
        return PosixFile(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def map(self, path: Path) -> memoryview:
        """Map a whole file."""
        # Without blocking: opening a fifo would wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise DataCorruption(str(path), 0, "a regular file or a link to one", "something else")
            if found.st_size == 0:
                return memoryview(b"")
            mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        return memoryview(mapped)

    def rename(self, old: Path, new: Path) -> None:
        """Rename, replacing."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Unlink."""
        path.unlink(missing_ok=True)

    def sync_directory(self, directory: Path) -> None:
        """Fsync the directory itself."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, directory: Path) -> int:
        """Free bytes for unprivileged users."""
        found = os.statvfs(directory)
        return found.f_bavail * found.f_frsize


__all__ = ["PosixDisk", "PosixFile"]
