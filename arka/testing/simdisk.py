"""A simulated disk: remembers what was synced, and loses, keeps or tears the rest in a crash.

Owns: the worst that POSIX allows a file system to do, from a seeded random generator. Everything happens
in the calling task, so that tests under trio's mock clock are exact; contents are plain bytes in memory.

What it does to unsynced data in a crash: each 512-byte sector of each write is kept or not, on its own,
and may be torn in the middle; each of a directory's unsynced creations, renames and removals is kept or
not, on its own. After a failed sync the page cache shows the data as before, later syncs succeed, and the data is
gone in the next crash: as on Linux.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from arka._core.framing import Group
from arka.storage.ports import Buffer, DiskFile

T = TypeVar("T")

_SECTOR_BYTES: Final = 512
#: How often, among the sectors that a crash keeps, one is torn.
_TORN_SHARE: Final = 0.1

#: The operations that ``SimDisk.fail_next`` knows.
OPERATIONS: Final = frozenset({"create", "open", "write", "sync", "rename", "remove", "sync_directory"})


class PowerCut(Exception):
    """The simulated machine went off in the middle of an operation; call ``SimDisk.crash`` next."""


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


class _Inode:
    """A file's bytes: as the page cache has them, as the platter has them, and the writes between."""

    def __init__(self) -> None:
        self.cached = bytearray()
        self.durable = bytearray()
        # Invariant: durable with pending applied in order is cached, but for writes that a failed sync lost.
        self.pending: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: bytes) -> None:
        _put(self.cached, offset, data)
        self.pending.append((offset, data))

    def sync(self) -> None:
        for offset, data in self.pending:
            _put(self.durable, offset, data)
        self.pending.clear()

    def crash(self, rng: random.Random) -> None:
        share = rng.choice((0.0, 0.5, 1.0))
        for offset, data in self.pending:
            at = offset
            while at < offset + len(data):
                end = min((at // _SECTOR_BYTES + 1) * _SECTOR_BYTES, offset + len(data))
                if rng.random() < share:
                    kept = rng.randrange(at, end) if rng.random() < _TORN_SHARE and share < 1.0 else end
                    _put(self.durable, at, data[at - offset : kept - offset])
                at = end
        self.pending.clear()
        self.cached = bytearray(self.durable)


class _Directory:
    """The names in a directory: as they are, as they are on the platter, and the changes between.

    A change is a set of names and what they stand for afterwards, None for nothing.
    """

    def __init__(self) -> None:
        self.cached: dict[str, _Inode] = {}
        self.durable: dict[str, _Inode] = {}
        self.pending: list[dict[str, _Inode | None]] = []

    def change(self, change: dict[str, _Inode | None]) -> None:
        self._apply(self.cached, change)
        self.pending.append(change)

    def sync(self) -> None:
        self.durable = dict(self.cached)
        self.pending.clear()

    def crash(self, rng: random.Random) -> None:
        share = rng.choice((0.0, 0.5, 1.0))
        for change in self.pending:
            if rng.random() < share:
                self._apply(self.durable, change)
        self.pending.clear()
        self.cached = dict(self.durable)

    def inodes(self) -> Iterator[_Inode]:
        yield from self.durable.values()
        yield from self.cached.values()
        for change in self.pending:
            yield from (inode for inode in change.values() if inode is not None)

    @staticmethod
    def _apply(names: dict[str, _Inode], change: dict[str, _Inode | None]) -> None:
        for name, inode in change.items():
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode


class SimFile:
    """An open file of a SimDisk; dead after a crash."""

    def __init__(self, disk: SimDisk, path: Path, inode: _Inode) -> None:
        self._disk = disk
        self._path = path
        self._inode = inode
        self._life = disk._life
        self._closed = False

    @property
    def path(self) -> Path:
        """Where it was opened."""
        return self._path

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write into the simulated page cache."""
        self._check_open()
        data = b"".join(bytes(part) for part in parts)
        fault = self._disk._step("write")
        if fault is not None:
            # Some of it may have got through before the error.
            self._inode.write(offset, data[: self._disk._rng.randrange(len(data) + 1)])
            raise fault
        grown = offset + len(data) - len(self._inode.cached)
        self._disk._check_room(max(grown, 0))
        self._inode.write(offset, data)

    def sync(self) -> None:
        """Make what was written durable, or lose it for good."""
        self._check_open()
        fault = self._disk._step("sync")
        if fault is not None:
            self._inode.pending.clear()
            raise fault
        self._inode.sync()

    def commit(self, group: Group) -> None:
        """Seal, write and sync a group."""
        self.write(group.offset, [group.to_bytes()])
        self.sync()

    def release_tail(self, offset: int) -> None:
        """Do nothing: it reads as zeros already, and space is counted by length."""
        self._check_open()

    def close(self) -> None:
        """Close it."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed or self._life != self._disk._life:
            raise OSError(errno.EBADF, "the file is closed or its machine crashed", str(self._path))


class SimDisk:
    """``Disk`` in memory.

    Args:
        rng: decides what crashes do; seed it.
        capacity_bytes: the sum of file lengths above which ENOSPC is raised.
        latency_s: how long each ``run`` takes on trio's clock.
    """

    def __init__(self, rng: random.Random, *, capacity_bytes: int = 2**40, latency_s: float = 0.0) -> None:
        self._rng = rng
        self.capacity_bytes = capacity_bytes
        self.latency_s = latency_s
        self._directories: dict[Path, _Directory] = {}
        self._life = 0
        self._faults: list[tuple[str, int, int]] = []
        self._steps_left: int | None = None
        self.steps = 0

    # -- faults -----------------------------------------------------------------------------------

    def fail_next(self, operation: str, error: int = errno.EIO, *, after: int = 0) -> None:
        """Let a later operation fail once.

        Args:
            operation: one of OPERATIONS.
            error: the errno.
            after: how many such operations succeed before.
        """
        if operation not in OPERATIONS:
            raise ValueError(f"unknown operation {operation!r}: expected one of {sorted(OPERATIONS)}")
        self._faults.append((operation, after, error))

    def clear_faults(self) -> None:
        """Forget the faults that have not struck yet."""
        self._faults.clear()
        self._steps_left = None

    def cut_power_after(self, steps: int) -> None:
        """Raise PowerCut from the operation after the next ``steps`` ones that change anything."""
        self._steps_left = steps

    def kill(self) -> None:
        """Kill the process: its open files are gone, the page cache stays."""
        self._life += 1
        self.clear_faults()

    def crash(self) -> None:
        """Cut the power: what was not synced is kept, lost or torn, as the generator says."""
        self.kill()
        inodes: dict[int, _Inode] = {}
        for directory in self._directories.values():
            inodes.update((id(inode), inode) for inode in directory.inodes())
        for inode in inodes.values():
            inode.crash(self._rng)
        for directory in self._directories.values():
            directory.crash(self._rng)

    def read(self, path: Path) -> bytes:
        """A file's bytes as a process would read them."""
        return bytes(self._inode(path).cached)

    def damage(self, path: Path, content: bytes) -> None:
        """Replace a file's bytes, on the platter too: bit rot, or someone's editor."""
        inode = self._inode(path)
        inode.cached = bytearray(content)
        inode.durable = bytearray(content)
        inode.pending.clear()

    # -- Disk -------------------------------------------------------------------------------------

    async def run(self, job: Callable[[], T]) -> T:
        """Run the job in this task."""
        await trio.lowlevel.checkpoint()
        result = job()
        if self.latency_s:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.latency_s)
        return result

    async def commit(self, file: DiskFile, group: Group) -> None:
        """Commit in this task."""
        await self.run(partial(file.commit, group))

    def make_directory(self, directory: Path) -> None:
        """Make a directory; durable at once."""
        self._directories.setdefault(directory, _Directory())

    def list_names(self, directory: Path) -> list[str]:
        """List files by name."""
        found = self._directories.get(directory)
        return sorted(found.cached) if found is not None else []

    def create(self, path: Path, size: int) -> DiskFile:
        """Create a file of zeros."""
        directory = self._directory(path)
        if path.name in directory.cached:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        fault = self._step("create")
        inode = _Inode()
        directory.change({path.name: inode})
        if fault is not None:
            raise fault
        self._check_room(size)
        if size:
            inode.write(0, bytes(size))
        return SimFile(self, path, inode)

    def open(self, path: Path) -> DiskFile:
        """Open a file that exists."""
        self._raise_if(self._fault("open"))
        return SimFile(self, path, self._inode(path))

    def map(self, path: Path) -> memoryview:
        """Copy the file's bytes as they are now."""
        return memoryview(self.read(path))

    def rename(self, old: Path, new: Path) -> None:
        """Rename, replacing."""
        directory = self._directory(old)
        inode = self._inode(old)
        self._raise_if(self._step("rename"))
        directory.change({old.name: None, new.name: inode})

    def remove(self, path: Path) -> None:
        """Unlink; open handles keep the bytes."""
        directory = self._directory(path)
        if path.name in directory.cached:
            self._raise_if(self._step("remove"))
            directory.change({path.name: None})

    def sync_directory(self, directory: Path) -> None:
        """Make the names durable."""
        self._raise_if(self._step("sync_directory"))
        self._directories[directory].sync()

    def free_bytes(self, directory: Path) -> int:
        """What the capacity leaves."""
        return max(0, self.capacity_bytes - self._used_bytes())

    # -- inside -----------------------------------------------------------------------------------

    def _step(self, operation: str) -> OSError | None:
        """Count an operation; returns the fault that it has to end with, if any."""
        self.steps += 1
        if self._steps_left is not None:
            if self._steps_left == 0:
                raise PowerCut(f"power cut before {operation}")
            self._steps_left -= 1
        return self._fault(operation)

    def _fault(self, operation: str) -> OSError | None:
        for index, (name, after, error) in enumerate(self._faults):
            if name == operation:
                if after:
                    self._faults[index] = (name, after - 1, error)
                    return None
                del self._faults[index]
                return OSError(error, os.strerror(error))
        return None

    def _raise_if(self, fault: OSError | None) -> None:
        if fault is not None:
            raise fault

    def _used_bytes(self) -> int:
        return sum(len(inode.cached) for directory in self._directories.values() for inode in directory.cached.values())

    def _check_room(self, grown: int) -> None:
        if grown and self._used_bytes() + grown > self.capacity_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _directory(self, path: Path) -> _Directory:
        directory = self._directories.get(path.parent)
        if directory is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        return directory

    def _inode(self, path: Path) -> _Inode:
        inode = self._directory(path).cached.get(path.name) if path.parent in self._directories else None
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return inode


__all__ = ["OPERATIONS", "PowerCut", "SimDisk", "SimFile"]
