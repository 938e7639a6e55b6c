"""Room on the disk: new writes are refused before the disk is full, never after (R23).

Owns: whether new writes are let in. Does not own what is already accepted: that always goes on, and the
room below the marks is what it needs for it. Where object store or warehouse share the log's file system,
what is not uploaded or not committed yet will be written there once more: that much is *owed*, and kept
free beside ``limits.disk_free_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from arka.errors import AdmissionRejected

log = structlog.get_logger(__name__)

#: How often the file system's free space is asked for, in seconds; one statvfs is a few microseconds.
_POLL_S: Final = 1.0
#: Writes are let in again below this share of the limit, so that the gate does not flap.
_LOW_SHARE: Final = 0.9


#: How many bytes may come to be owed for each byte that is accepted: its frame in the log, its object, its data file.
_MAX_OWED: Final = 3


@dataclass(frozen=True, slots=True)
class SharedRoom:
    """Which of the later tiers write to the log's own file system."""

    store: bool
    warehouse: bool


NOT_SHARED: Final = SharedRoom(store=False, warehouse=False)


class DiskSpace:
    """The gate in front of the log. Used from trio's thread only."""

    def __init__(self, *, limit_bytes: int, free_bytes: int, used_bytes: int, read_free: Callable[[], int]) -> None:
        """Set the marks.

        Args:
            limit_bytes: most bytes of WAL, and of what else is held on its disk.
            free_bytes: least free bytes of the file system, beside what is owed.
            used_bytes: bytes of WAL now.
            read_free: returns the file system's free bytes; must not block for long.
        """
        self._limit_bytes = limit_bytes
        self._free_bytes = free_bytes
        self._used_bytes = used_bytes
        self._read_free = read_free
        self._owed_bytes: Callable[[], int] = int
        # What else takes room of the limit, by kind: spill files, parked writes.
        self._held: dict[str, int] = {}
        # Room of files that are being written.
        self._spilling = 0
        self._free = read_free()
        # What had to stay free at the last look, and the bytes that were accepted since.
        self._kept = 0
        self._accepted = 0
        self._refusing: str | None = None
        self._judge()

    @property
    def used_bytes(self) -> int:
        """Bytes of WAL on disk, and of what else counts against the limit."""
        return self._used_bytes + sum(self._held.values())

    def count_owed(self, owed_bytes: Callable[[], int]) -> None:
        """Keep room for what accepted writes will still write to this file system.

        Args:
            owed_bytes: returns how much that is now; asked about once a second, and more often near the mark.
        """
        self._owed_bytes = owed_bytes
        self._judge()

    def check(self) -> None:
        """Let a write in or refuse it.

        Raises:
            AdmissionRejected: ``overloaded``, with the figures.
        """
        if self._refusing is not None:
            raise AdmissionRejected(self._refusing)

    def note_accepted(self, size: int) -> None:
        """Count bytes that were let in: between two looks, they are all that can fill the disk."""
        self._accepted += size
        if self._free - self._accepted * _MAX_OWED < self._kept:
            self._look()

    def note_written(self, size: int) -> None:
        """Count bytes that were written to the log."""
        self._used_bytes += size
        if self.used_bytes > self._limit_bytes:
            self._judge()

    def note_released(self, size: int) -> None:
        """Count bytes of the log that were deleted."""
        self._used_bytes -= size
        self._look()

    def note_held(self, kind: str, delta: int) -> None:
        """Count bytes that are held beside the log and are within ``limits.disk_bytes``.

        Args:
            kind: a word for people: ``spill``, ``parked``.
            delta: bytes more; negative for less.
        """
        self._held[kind] = self._held.get(kind, 0) + delta
        self._judge()

    @contextmanager
    def spill_room(self) -> Iterator[int]:
        """Give half of the room that is left to a file that is about to be written, and keep it for that.

        Yields:
            Bytes that the file may have; what it has in the end is for ``note_held``.

        Raises:
            AdmissionRejected: ``overloaded``: there is no room.
        """
        self._look()
        room = min(self._limit_bytes - self.used_bytes - self._spilling, self._free - self._kept) // 2
        if room <= 0:
            raise AdmissionRejected(
                f"The disk has no room for an answer: {self._free} bytes are free, {self._kept} are kept "
                f"(limits.disk_free_bytes), and {self.used_bytes} of {self._limit_bytes} (limits.disk_bytes) are used"
            )
        self._spilling += room
        try:
            yield room
        finally:
            self._spilling -= room
            self._look()

    async def run(self) -> None:
        """Watch the file system until cancelled."""
        while True:
            await trio.sleep(_POLL_S)
            self._look()

    def _look(self) -> None:
        self._free = self._read_free()
        self._accepted = 0
        self._judge()

    def _judge(self) -> None:
        slack = _LOW_SHARE if self._refusing is not None else 1.0
        owed = self._owed_bytes()
        self._kept = self._free_bytes + owed + self._spilling
        used = self.used_bytes
        reason = None
        if used > self._limit_bytes * slack:
            held = "".join(f", {size} of them {kind}" for kind, size in self._held.items() if size)
            reason = (
                f"The log holds {used} bytes that later tiers still need{held}; the limit is "
                f"{self._limit_bytes} (limits.disk_bytes): retry later"
            )
        elif self._free < self._kept / slack:
            reason = (
                f"The disk is nearly full: the log's file system has {self._free} bytes free, at least "
                f"{self._kept} are kept: {self._free_bytes} (limits.disk_free_bytes) and the rest for what accepted "
                "writes and reads still need: retry later"
            )
        if (reason is None) != (self._refusing is None):
            if reason is not None:
                log.warning("disk.refusing", reason=reason)
            else:
                log.info("disk.accepting", used_bytes=used, free_bytes=self._free, owed_bytes=owed)
        self._refusing = reason


__all__ = ["NOT_SHARED", "DiskSpace", "SharedRoom"]
