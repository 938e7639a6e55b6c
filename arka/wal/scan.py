"""Scanning a segment: its frames in order, where they end, and whether that end is torn or damaged (R7).

Owns: that judgement, over bytes. Knows nothing of disks; recovery and the dump both use it, so that what
``arka wal verify`` says is what a start would say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from uuid import UUID

from arka._core.framing import (
    KIND_BATCH,
    KIND_CREATE,
    KIND_DROP,
    KIND_FOOTER,
    KIND_GROUP,
    KIND_LOST,
    KIND_TABLE,
    FrameError,
    FrameHeader,
    find_mark,
    first_nonzero,
    last_nonzero,
    parse_header,
    verify_frame,
)
from arka.errors import DataCorruption
from arka.wal.segment import HEADER_BYTES, KIND_ACTIVITY, Footer, GroupMark, SegmentHeader, corruption, parse_mark

_LSN_KINDS = frozenset({KIND_BATCH, KIND_CREATE, KIND_DROP, KIND_LOST, KIND_ACTIVITY})


class TornBytes(NamedTuple):
    """Bytes ``[start, end)`` of an unsealed segment that are no whole frames and were never acked."""

    start: int
    end: int


def may_have_tail(last: SegmentHeader | None, sealed_through: int) -> bool:
    """Say whether a log's last segment may hold bytes that were never fsynced.

    A footer that can be read is no proof: perhaps it is in the page cache only (R6). Proof is a successor,
    a seal mark, or that recovery made the segment: it gets its name when it is fsynced.

    Args:
        last: the header of the segment with the highest number; None for none.
        sealed_through: the segment number in the seal mark; 0 for none.
    """
    return last is not None and last.number > sealed_through and not last.replaces


def marks_behind(data: memoryview, start: int, segment: SegmentHeader) -> Iterator[tuple[int, GroupMark | Footer]]:
    """Yield offset and payload of the intact GROUP and FOOTER frames of a segment anywhere from ``start`` on.

    Args:
        data: all of the segment's bytes.
        start: a multiple of 64.
        segment: the segment's header.
    """
    seed = segment.seed
    offset = find_mark(data, start, seed)
    while offset >= 0:
        mark = parse_mark(data, offset, parse_header(data, offset))
        # The nonce keeps a payload from passing for a mark.
        if mark is not None and mark.nonce == segment.nonce and mark.offset == offset:
            yield offset, mark
        offset = find_mark(data, offset + 64, seed)


class SegmentScan:
    """One pass over a segment's bytes.

    Iterate ``frames`` to its end first; then the other attributes say what was found.

    Attributes:
        header: the segment's header.
        end: the offset behind the last intact frame, the footer included.
        footer: the footer, or None if the frames end without one.
        stop: why no frame begins at ``end``; None behind a footer.
        first_lsn: the first LSN found; 0 for none.
        last_lsn: the last LSN found, or the header's ``base_lsn``.
    """

    def __init__(self, path: str, data: memoryview, log_uuid: UUID, number: int) -> None:
        """Read the header block.

        Args:
            path: the file, for errors.
            data: all of its bytes.
            log_uuid: the log it must belong to.
            number: the segment number it must have.

        Raises:
            DataCorruption: the header is damaged or another segment's.
            ConfigurationError: another version of Arka wrote it.
        """
        self._path = path
        self._data = data
        self.header = SegmentHeader.from_bytes(path, data)
        self.header.check_is(path, log_uuid, number)
        self._seed = self.header.seed
        self.end = HEADER_BYTES
        self.footer: Footer | None = None
        self.stop: FrameError | None = None
        self.first_lsn = 0
        self.last_lsn = self.header.base_lsn
        self._count = 0

    def check_follows(self, last_lsn: int | None) -> None:
        """Check the chain of LSNs: a segment in the middle that was wiped or removed shows here.

        Args:
            last_lsn: the last LSN before this segment; None when that is not known.

        Raises:
            DataCorruption: the segment follows upon another one.
        """
        if last_lsn is not None and self.header.base_lsn != last_lsn:
            raise self._contradiction(48, f"last LSN before it {last_lsn}", f"{self.header.base_lsn}")

    def frames(self) -> Iterator[tuple[int, FrameHeader]]:
        """Yield offset and header of each intact frame in order, the footer excepted, up to where they end.

        Raises:
            DataCorruption: an intact frame contradicts the segment: that is no tear.
        """
        data, seed = self._data, self._seed
        offset = HEADER_BYTES
        while self.footer is None:
            try:
                header = verify_frame(data, offset, seed)
            except FrameError as error:
                self.stop = error
                return
            self._check(offset, header)
            offset += header.frame_bytes
            self.end = offset
            if self.footer is None:
                self._count += 1
                yield offset - header.frame_bytes, header

    def check_sealed(self) -> None:
        """Check that the segment ends as a sealed one does.

        Raises:
            DataCorruption: it has no footer, or something stands behind it.
        """
        if self.stop is not None:
            raise corruption(self._path, self.stop)
        self._check_nothing_behind()

    def find_torn(self) -> TornBytes | None:
        """Judge how a segment ends whose footer was perhaps never fsynced.

        Returns:
            What is torn; None if the frames end cleanly.

        Raises:
            DataCorruption: the frames end below an offset that was fsynced, so bytes were damaged.
        """
        if self.stop is None:
            self._check_nothing_behind()
            return None
        for _, mark in marks_behind(self._data, self.end, self.header):
            if mark.synced_through > self.end:
                raise corruption(self._path, self.stop)
        last = last_nonzero(self._data, self.end)
        return TornBytes(self.end, last + 1) if last >= 0 else None

    def _check_nothing_behind(self) -> None:
        found = first_nonzero(self._data, self.end)
        if found >= 0:
            raise DataCorruption(self._path, found, "zeros behind the footer", f"{self._data[found]:#04x}")

    def _check(self, offset: int, header: FrameHeader) -> None:
        if header.kind in _LSN_KINDS:
            if self.first_lsn == 0:
                if header.lsn != self.header.first_lsn:
                    raise self._contradiction(offset, f"first LSN {self.header.first_lsn}", f"LSN {header.lsn}")
                self.first_lsn = header.lsn
            if header.lsn <= self.last_lsn:
                raise self._contradiction(offset, f"an LSN above {self.last_lsn}", f"LSN {header.lsn}")
            self.last_lsn = header.lsn
        elif header.kind in (KIND_GROUP, KIND_FOOTER):
            self._check_mark(offset, parse_mark(self._data, offset, header))
        elif header.kind != KIND_TABLE:
            raise self._contradiction(offset, "a known kind of frame", f"kind {header.kind}")
        if self._count == 0 and header.kind != KIND_GROUP:
            raise self._contradiction(offset, "a GROUP frame first", f"kind {header.kind}")

    def _check_mark(self, offset: int, mark: GroupMark | Footer | None) -> None:
        if mark is None or mark.nonce != self.header.nonce or mark.offset != offset:
            raise self._contradiction(offset, "this segment's mark at its own offset", f"{mark}")
        if isinstance(mark, Footer):
            expected = (self.first_lsn, self.last_lsn, self._count)
            found = (mark.first_lsn, mark.last_lsn, mark.frames)
            if found != expected:
                raise self._contradiction(offset, f"first LSN, last LSN, frames {expected}", f"{found}")
            self.footer = mark

    def _contradiction(self, offset: int, expected: str, found: str) -> DataCorruption:
        return DataCorruption(self._path, offset, expected, found)


__all__ = ["SegmentScan", "TornBytes", "marks_behind", "may_have_tail"]
