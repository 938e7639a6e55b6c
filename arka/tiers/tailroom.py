"""Room on the disk for copies of frames that reads add to a snapshot (T27).

Owns: how many bytes such copies may have together. Does not own the copies (``arka.iceberg.tailcopy``) nor the disk's
room for writes (``arka.tiers.space``), which copies never take.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from arka.errors import AdmissionRejected, ArkaError, ErrorCode
from arka.tiers.readturns import ReadTurns
from arka.tiers.space import DiskSpace


class TailRoom:
    """The bytes of all copies. Used from trio's thread only."""

    def __init__(self, limit_bytes: int, space: DiskSpace, turns: ReadTurns) -> None:
        """Begin with none.

        Args:
            limit_bytes: of all copies together (``limits.read_disk_bytes``).
            space: of the file system that they are on.
            turns: told of reads that wait here although they have their turn.
        """
        self._limit_bytes = limit_bytes
        self._space = space
        self._turns = turns
        self._used_bytes = 0
        self._freed = trio.Event()

    @property
    def used_bytes(self) -> int:
        """Bytes of the copies that there are, or will be."""
        return self._used_bytes

    def check(self, table: str, size: int, committed_lsn: int) -> None:
        """Check that a copy could be made at all.

        Args:
            table: its name.
            size: bytes of the frames.
            committed_lsn: up to where the table is committed.

        Raises:
            ArkaError: ``too_large``.
        """
        if size > self._limit_bytes:
            raise ArkaError(
                f"{size} bytes of {table} are accepted and not committed yet, and a read copies at most "
                f"{self._limit_bytes} of them (limits.read_disk_bytes): read again once Flush has returned, or with "
                f"at_lsn {committed_lsn}, which is committed",
                code=ErrorCode.TOO_LARGE,
            )

    @asynccontextmanager
    async def copy(self, size: int) -> AsyncIterator[None]:
        """Keep room for a copy while the block runs; waits for others to give theirs back.

        Args:
            size: its bytes; at most the limit.

        Raises:
            AdmissionRejected: ``overloaded``: the disk has no room that writes do not need.
        """
        while self._used_bytes + size > self._limit_bytes:
            self._turns.starved += 1
            try:
                await self._freed.wait()
            finally:
                self._turns.starved -= 1
        if size and size > (room := self._space.copy_room()):
            raise AdmissionRejected(
                f"The disk has room for {room} bytes that writes do not need, and this read has to copy {size} bytes "
                "of the log: retry later"
            )
        self._count(size)
        try:
            yield
        finally:
            self._count(-size)

    @contextmanager
    def beside(self, size: int) -> Iterator[None]:
        """Count bytes that are on the disk for a read while the block runs, beside its copy."""
        self._space.note_copies(size)
        try:
            yield
        finally:
            self._space.note_copies(-size)

    def _count(self, size: int) -> None:
        self._used_bytes += size
        self._space.note_copies(size)
        freed, self._freed = self._freed, trio.Event()
        freed.set()


__all__ = ["TailRoom"]
