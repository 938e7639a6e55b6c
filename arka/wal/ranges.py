"""What recovery hands out: single frames, and ranges of them for the tiers below.

Owns: both shapes, and where a segment is cut into ranges. Does not own the reading (``recovery``).
"""

from __future__ import annotations

from typing import Final

from arka._core.framing import KIND_BATCH, FrameHeader
from arka.errors import DataCorruption
from arka.options import MIB
from arka.records import TableInfo
from arka.wal.segment import FRAME_HEADER_BYTES, HEADER_BYTES, AppendedRange, SegmentRef

#: Ranges of recovered segments are cut at about this size.
_RANGE_BYTES: Final = 8 * MIB


class RecoveredFrame:
    """A frame that recovery found, at the place where it stays.

    Attributes:
        header: its header.
        segment: the segment it is in.
        offset: its offset in that.
    """

    __slots__ = ("_data", "header", "offset", "segment")

    def __init__(self, header: FrameHeader, segment: SegmentRef, offset: int, data: memoryview) -> None:
        self.header = header
        self.segment = segment
        self.offset = offset
        self._data = data

    @property
    def key(self) -> bytes:
        """The idempotency key; empty for none."""
        start = self.offset + FRAME_HEADER_BYTES + self.header.payload_bytes
        return bytes(self._data[start : start + self.header.key_bytes])

    def payload(self) -> bytes:
        """A copy of the payload: for a batch frame its whole IPC message."""
        return bytes(self.payload_view())

    def payload_view(self) -> memoryview:
        """The payload without copying; it keeps the segment mapped while it lives."""
        start = self.offset + FRAME_HEADER_BYTES
        return self._data[start : start + self.header.payload_bytes]


class RangeCutter:
    """Cuts a segment's frames into AppendedRanges at GROUP frames."""

    def __init__(self, segment: SegmentRef) -> None:
        self._segment = segment
        self._known: dict[tuple[bytes, int], TableInfo] = {}
        self._ranges: list[AppendedRange] = []
        self._start = HEADER_BYTES
        self._first_lsn = self._last_lsn = 0
        self._tables: dict[tuple[bytes, int], TableInfo] = {}

    def begin_group(self, offset: int) -> None:
        """Note a GROUP frame."""
        if offset - self._start >= _RANGE_BYTES:
            self._cut(offset)

    def add(self, frame: RecoveredFrame, table: TableInfo | None) -> None:
        """Note any other frame; ``table`` is the payload of a TABLE frame."""
        header = frame.header
        key = (header.table_uuid, header.schema_id)
        if table is not None:
            self._known[key] = table
            return
        if header.kind == KIND_BATCH and key not in self._tables:
            if key not in self._known:
                raise DataCorruption(
                    str(frame.segment.path), frame.offset, "a TABLE frame before its first batch", "none"
                )
            self._tables[key] = self._known[key]
        self._first_lsn = self._first_lsn or header.lsn
        self._last_lsn = header.lsn

    def finish(self, end: int) -> tuple[AppendedRange, ...]:
        """All ranges, the last one ending at ``end``."""
        self._cut(end)
        return tuple(self._ranges)

    def _cut(self, end: int) -> None:
        if self._first_lsn:
            tables = tuple(self._tables.values())
            self._ranges.append(
                AppendedRange(self._segment, self._start, end, self._first_lsn, self._last_lsn, tables, [])
            )
        self._start = end
        self._first_lsn = 0
        self._tables = {}


__all__ = ["RangeCutter", "RecoveredFrame"]
