"""Room on the disk: new writes are refused before the disk is full, never after (R23).

Owns: whether new writes are let in. Does not own what is already accepted: that always goes on, and the
room below the marks is what it needs for it. Where object store or warehouse share the log's file system,
what is not uploaded or not committed yet will be written there once more: that much is *owed*, and kept
free beside ``limits.disk_free_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from arka.tiers.room import Room

#: How often the file system's free space is asked for, in seconds; one statvfs is a few microseconds.
POLL_S: Final = 1.0
#: The part of the free bytes that reads may use while writes are held back.
_FREE_PART: Final = 4
#: The part of the free bytes by which copies of reads may lower the free space at which writes are held back.
_COPIES_PART: Final = 2
#: How many bytes may come to be owed for each byte that is accepted: its frame in the log, its object, its data file.
_MAX_OWED: Final = 3


@dataclass(frozen=True, slots=True)
class SharedRoom:
    """What else writes to the log's own file system: the later tiers, and the copies of checkpoints."""

    store: bool
    warehouse: bool
    checkpoints: bool = True


NOT_SHARED: Final = SharedRoom(store=False, warehouse=False)


class DiskSpace:
    """The gate in front of the log. Used from trio's thread only."""

    def __init__(
        self,
        *,
        limit_bytes: int,
        free_bytes: int,
        used_bytes: int,
        read_free: Callable[[], int],
        stall_s: float = 0.0,
        read_spill_free: Callable[[], int] | None = None,
    ) -> None:
        """Set the marks.

        Args:
            limit_bytes: most bytes of WAL, and of what else is held on its disk.
            free_bytes: least free bytes of the file system, beside what is owed.
            used_bytes: bytes of WAL now.
            read_free: returns the free bytes of the log's file system; must not block for long.
            read_spill_free: the same of that of the copies of reads; None: it is the log's.
            stall_s: how long writes wait for room, in seconds, before they are refused.
        """
        self.room = Room("disk", stall_s)
        self._limit_bytes = limit_bytes
        self._free_bytes = free_bytes
        self._used_bytes = used_bytes
        self._read_free = read_free
        self._read_spill_free = read_spill_free
        self._owed_bytes: Callable[[], int] = int
        self._unwritten_bytes: Callable[[], int] = int
        # What else takes room of the limit, by kind: parked writes.
        self._held: dict[str, int] = {}
        # Copies that reads have made.
        self._copied = 0
        self._free = read_free()
        # What had to stay free at the last look, and how many bytes may be accepted until the next one.
        self._kept = 0
        self._left = 0
        #: Whether the log has reached its limit: that passes when later tiers let go of it.
        self.log_full = False
        self._judge()

    @property
    def used_bytes(self) -> int:
        """Bytes of WAL on disk, and of what else counts against the limit."""
        return self._used_bytes + sum(self._held.values())

    def count_owed(self, owed_bytes: Callable[[], int], unwritten_bytes: Callable[[], int] = int) -> None:
        """Keep room for what accepted writes will still write to this file system.

        Args:
            owed_bytes: returns how much that is now; asked about once a second, and more often near the mark.
            unwritten_bytes: returns how much of the log was accepted and is not on the disk yet.
        """
        self._owed_bytes = owed_bytes
        self._unwritten_bytes = unwritten_bytes
        self._judge()

    def note_accepted(self, size: int) -> None:
        """Count bytes that were let in: between two looks, they are all that can fill the disk."""
        self._left -= size
        if self._left < 0:
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
            kind: a word for people: ``parked``.
            delta: bytes more; negative for less.
        """
        self._held[kind] = self._held.get(kind, 0) + delta
        self._judge()

    def copy_room(self) -> int:
        """Bytes that a copy for a read may take: half of what is left beside what writes need."""
        self._look()
        spare = self._free_bytes // _FREE_PART
        if self._read_spill_free is not None:
            return max(self._read_spill_free() - self._free_bytes + spare, 0) // 2
        return max(self._free - self._kept + spare, 0) // 2

    def note_copies(self, delta: int) -> None:
        """Count bytes of copies that reads have made, or are about to make: writes have that room all the same."""
        if self._read_spill_free is None:
            self._copied += delta
            self._judge()

    async def run(self) -> None:
        """Watch the file system, and how long writes have waited, until cancelled."""
        while True:
            await trio.sleep(POLL_S)
            self.look()

    def look(self) -> None:
        """Look at the file system, and at how long writes have waited; to be called every ``POLL_S``."""
        self._look()
        self.room.tick()

    def _look(self) -> None:
        self._free = self._read_free()
        self._judge()

    def _judge(self) -> None:
        self._kept = self._free_bytes + self._owed_bytes()
        used = self.used_bytes
        coming = self._unwritten_bytes()
        left = self._limit_bytes - used - coming
        # Readers never take the writers' room: their copies go soon, and are as good as free until then.
        free = self._free + min(self._copied, self._free_bytes // _COPIES_PART)
        free_left = (free - self._kept) // _MAX_OWED
        self._left = min(left, free_left)
        self.log_full = left <= 0
        if self.log_full:
            held = "".join(f", {size} of them {kind}" for kind, size in self._held.items() if size)
            self.room.close(
                f"The log holds {used + coming} bytes that later tiers still need{held}; the limit is "
                f"{self._limit_bytes} (limits.disk_bytes)"
            )
        elif free < self._kept:
            self.room.close(
                f"The disk is nearly full: the log's file system has {self._free} bytes free, at least "
                f"{self._kept} are kept: {self._free_bytes} (limits.disk_free_bytes) and the rest for what accepted "
                "writes still need"
            )
        else:
            self.room.open()


__all__ = ["NOT_SHARED", "POLL_S", "DiskSpace", "SharedRoom"]
