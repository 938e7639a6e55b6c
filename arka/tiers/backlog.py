"""A table's backlog: where its frames lie in the log, from the disk watermark until Iceberg has them.

Owns: which frames of one table are not committed yet. Does not own the files. Per write it keeps two
integers, so that hours of an outage cost disk and not memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

from arka._core.framing import Frame, places
from arka.errors import InternalError
from arka.storage.ports import SegmentSlice


@dataclass(slots=True)
class _Chunk:
    """Frames of the table in one segment, LSN order."""

    path: str
    segment: int
    epoch: int
    lsns: array[int]
    offsets: array[int]
    # Invariant: ends[i] is the number of frame bytes of frames 0..i.
    ends: array[int]


@dataclass(frozen=True, slots=True)
class Cut:
    """Frames chosen for one commit or read: everything of the table up to ``through_lsn``."""

    through_lsn: int
    slices: tuple[SegmentSlice, ...]
    frames: int
    frame_bytes: int


@dataclass(slots=True)
class BacklogTotal:
    """What several backlogs hold together, kept by them: thousands are not added up each time somebody asks.

    Attributes:
        frame_bytes: the sum of theirs.
    """

    frame_bytes: int = 0


class Backlog:
    """The uncommitted frames of one table. Used from trio's thread only."""

    def __init__(self) -> None:
        self._chunks: deque[_Chunk] = deque()
        # Invariant: the sum over the chunks, and a part of the total.
        self._frame_bytes = 0
        self._total = BacklogTotal()
        # Invariant: LSNs in the backlog rise strictly and all lie above the table's committed LSN.
        self._last_lsn = 0

    def __bool__(self) -> bool:
        return bool(self._chunks)

    @property
    def first_lsn(self) -> int | None:
        """The least LSN that the table still needs; None when it needs none."""
        return self._chunks[0].lsns[0] if self._chunks else None

    @property
    def last_lsn(self) -> int:
        """The last LSN that was ever added; 0 for none."""
        return self._last_lsn

    @property
    def frames(self) -> int:
        """How many frames are uncommitted."""
        return sum(len(chunk.lsns) for chunk in self._chunks)

    @property
    def frame_bytes(self) -> int:
        """Bytes of all uncommitted frames."""
        return self._frame_bytes

    def count_in(self, total: BacklogTotal | None) -> None:
        """Count what is here now and later in ``total``, and no longer where it counted before; None: nowhere."""
        self._total.frame_bytes -= self._frame_bytes
        self._total = BacklogTotal() if total is None else total
        self._total.frame_bytes += self._frame_bytes

    def _count(self, frame_bytes: int) -> None:
        self._frame_bytes += frame_bytes
        self._total.frame_bytes += frame_bytes

    def add(self, path: str, segment: int, epoch: int, lsn: int, offset: int, frame_bytes: int) -> None:
        """Note one frame at ``offset`` of a segment; LSN order."""
        if lsn <= self._last_lsn:
            raise InternalError(f"frame {lsn} came to the backlog after {self._last_lsn}")
        self._last_lsn = lsn
        chunk = self._chunk(path, segment, epoch)
        chunk.lsns.append(lsn)
        chunk.offsets.append(offset)
        chunk.ends.append((chunk.ends[-1] if chunk.ends else 0) + frame_bytes)
        self._count(frame_bytes)

    def add_frames(self, path: str, segment: int, epoch: int, frames: list[Frame], start: int, end: int) -> None:
        """Note ``frames[start:end]``, which are in a segment; LSN order, at least one."""
        if frames[start].lsn <= self._last_lsn:
            raise InternalError(f"frame {frames[start].lsn} came to the backlog after {self._last_lsn}")
        self._last_lsn = frames[end - 1].lsn
        chunk = self._chunk(path, segment, epoch)
        before = chunk.ends[-1] if chunk.ends else 0
        lsns, offsets, ends = places(frames, start, end, before)
        chunk.lsns.frombytes(lsns)
        chunk.offsets.frombytes(offsets)
        chunk.ends.frombytes(ends)
        self._count(chunk.ends[-1] - before)

    def _chunk(self, path: str, segment: int, epoch: int) -> _Chunk:
        """Return the chunk of a segment, which is the last one there is or a new one."""
        if not self._chunks or self._chunks[-1].path != path:
            self._chunks.append(_Chunk(path, segment, epoch, array("q"), array("Q"), array("Q")))
        return self._chunks[-1]

    def put_before(self, earlier: Backlog) -> None:
        """Take in frames that lie before all of this backlog's, and leave ``earlier`` empty.

        Raises:
            InternalError: they do not.
        """
        first = self.first_lsn
        if first is not None and first <= earlier._last_lsn:
            raise InternalError(f"frames up to LSN {earlier._last_lsn} were to go before LSN {first}")
        self._last_lsn = max(self._last_lsn, earlier._last_lsn)
        self._chunks.extendleft(reversed(earlier._chunks))
        self._count(earlier._frame_bytes)
        earlier._chunks.clear()
        earlier._count(-earlier._frame_bytes)

    def cut(self, through_lsn: int, limit_bytes: int = 2**62, most_frames: int | None = None) -> Cut | None:
        """Choose the frames of the next commit, or of a read, oldest first.

        Args:
            through_lsn: nothing above it may be taken (R4).
            limit_bytes: about how many frame bytes; at least one frame is taken if any may be.
            most_frames: how many frames at most, from 1; None for any number.

        Returns:
            The cut, or None when nothing may be taken.
        """
        slices: list[SegmentSlice] = []
        frames = taken = last = 0
        for chunk in self._chunks:
            count = bisect_right(chunk.lsns, through_lsn)
            within = bisect_right(chunk.ends, max(limit_bytes - taken, 0))
            if not slices:
                within = max(within, 1)
            count = min(count, within)
            if most_frames is not None:
                count = min(count, most_frames - frames)
            if count == 0:
                break
            slices.append(SegmentSlice(chunk.path, chunk.segment, chunk.epoch, chunk.offsets[:count].tobytes()))
            frames += count
            taken += chunk.ends[count - 1]
            last = chunk.lsns[count - 1]
            if count < len(chunk.lsns):
                break
        return Cut(last, tuple(slices), frames, taken) if slices else None

    def discard_through(self, lsn: int) -> None:
        """Forget the frames up to ``lsn``: the table holds them."""
        while self._chunks and self._chunks[0].lsns[-1] <= lsn:
            self._count(-self._chunks.popleft().ends[-1])
        if self._chunks:
            chunk = self._chunks[0]
            count = bisect_right(chunk.lsns, lsn)
            if count:
                del chunk.lsns[:count], chunk.offsets[:count]
                base = chunk.ends[count - 1]
                chunk.ends = array("Q", (end - base for end in chunk.ends[count:]))
                self._count(-base)


__all__ = ["Backlog", "BacklogTotal", "Cut"]
