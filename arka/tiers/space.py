"""Room on the disk: new writes are refused before the disk is full, never after (R23).

Owns: whether new writes are let in. Does not own what is already accepted: that always goes on, and the
room below the marks is what it needs for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import trio

from arka.errors import AdmissionRejected

log = structlog.get_logger(__name__)

#: How often the file system's free space is asked for, in seconds; one statvfs is a few microseconds.
_POLL_S: Final = 1.0
#: Writes are let in again below this share of the limit, so that the gate does not flap.
_LOW_SHARE: Final = 0.9


class DiskSpace:
    """The gate in front of the log."""

    def __init__(self, *, limit_bytes: int, free_bytes: int, used_bytes: int, read_free: Callable[[], int]) -> None:
        """Set the marks.

        Args:
            limit_bytes: most bytes of WAL.
            free_bytes: least free bytes of the file system.
            used_bytes: bytes of WAL now.
            read_free: returns the file system's free bytes; must not block for long.
        """
        self._limit_bytes = limit_bytes
        self._free_bytes = free_bytes
        self._used_bytes = used_bytes
        self._read_free = read_free
        self._free = read_free()
        self._refusing: str | None = None
        self._judge()

    @property
    def used_bytes(self) -> int:
        """Bytes of WAL on disk."""
        return self._used_bytes

    def check(self) -> None:
        """Let a write in or refuse it.

        Raises:
            AdmissionRejected: ``overloaded``, with the figures.
        """
        if self._refusing is not None:
            raise AdmissionRejected(self._refusing)

    def note_written(self, size: int) -> None:
        """Count bytes that were written to the log."""
        self._used_bytes += size
        if self._used_bytes > self._limit_bytes:
            self._judge()

    def note_released(self, size: int) -> None:
        """Count bytes of the log that were deleted."""
        self._used_bytes -= size
        self._judge()

    def note_held(self, size: int) -> None:
        """Count bytes outside the log that wait for a table to take them: parked ones; negative for gone."""
        self._used_bytes += size
        self._judge()

    async def run(self) -> None:
        """Watch the file system until cancelled."""
        while True:
            await trio.sleep(_POLL_S)
            self._free = self._read_free()
            self._judge()

    def _judge(self) -> None:
        slack = _LOW_SHARE if self._refusing is not None else 1.0
        reason = None
        if self._used_bytes > self._limit_bytes * slack:
            reason = (
                f"The log holds {self._used_bytes} bytes that later tiers still need, the limit is "
                f"{self._limit_bytes} (limits.disk_bytes): retry later"
            )
        elif self._free < self._free_bytes / slack:
            reason = (
                f"The log's file system has {self._free} bytes free, at least {self._free_bytes} are kept "
                "(limits.disk_free_bytes): retry later"
            )
        if (reason is None) != (self._refusing is None):
            if reason is not None:
                log.warning("disk.refusing", reason=reason)
            else:
                log.info("disk.accepting", used_bytes=self._used_bytes, free_bytes=self._free)
        self._refusing = reason


__all__ = ["DiskSpace"]
