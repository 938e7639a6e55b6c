"""Reading a segment that may be damaged: each intact frame, and each stretch of bytes that is none.

Owns: where reading goes on behind a bad spot. Does not own the verdict on it (``scan``): nothing here refuses
anything. Used by what shows a log and by what copies it; recovery stops at the first bad spot.

Behind a bad spot a frame is looked for only where bytes of a client cannot lie: at the next GROUP or FOOTER
frame with the segment's nonce; at the place that a group's own frame lengths lead to, if they lead to the
group's end in as many steps as its GROUP frame counts; behind a GROUP frame whose place is known.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID

from arka._core.framing import (
    KIND_FOOTER,
    KIND_GROUP,
    FrameError,
    FrameHeader,
    crc_seed,
    first_nonzero,
    verify_frame,
)
from arka.storage.ports import Disk
from arka.wal.scan import marks_behind
from arka.wal.segment import (
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    MARK_BYTES,
    GroupMark,
    SegmentHeader,
    parse_mark,
    parse_segment_name,
)

#: Every frame begins at a multiple of this.
_ALIGNMENT: Final = 64
# Of a frame's header: frame bytes, payload bytes, key bytes.
_LENGTHS: Final = struct.Struct("<8xQ16xQ10xH")


class FoundFrame(NamedTuple):
    """An intact frame."""

    offset: int
    header: FrameHeader


class DamagedStretch(NamedTuple):
    """Bytes ``[start, end)`` that are no intact frames, and why the first is none."""

    start: int
    end: int
    error: FrameError


def list_segments(directory: Path, disk: Disk) -> list[tuple[int, Path]]:
    """List a log's segment files by the number in their name.

    Raises:
        OSError: the directory cannot be read.
    """
    named = ((parse_segment_name(name), directory / name) for name in disk.list_names(directory))
    return sorted((number, path) for number, path in named if number is not None)


def walk_frames(data: memoryview, segment: SegmentHeader) -> Iterator[FoundFrame | DamagedStretch]:
    """Yield a segment's frames and damaged stretches in order; together they cover it but for zeros at its end.

    Args:
        data: all of the file's bytes.
        segment: its header.
    """
    offset = HEADER_BYTES
    # Of the group that ``offset`` is in: its end and the frames still to come; none at its end.
    group_end, left = offset, 0
    while True:
        try:
            header = verify_frame(data, offset, segment.seed)
        except FrameError as error:
            if first_nonzero(data, min(offset, len(data))) < 0:
                return
            resume, left = _resume(data, offset, segment, group_end, left)
            yield DamagedStretch(offset, resume, error)
            if resume >= len(data):
                return
            offset = resume
            continue
        yield FoundFrame(offset, header)
        if header.kind == KIND_GROUP:
            mark = parse_mark(data, offset, header)
            if isinstance(mark, GroupMark) and (mark.nonce, mark.offset) == (segment.nonce, offset):
                group_end, left = offset + mark.group_bytes, mark.frames
        else:
            left -= 1
        offset += header.frame_bytes
        if header.kind == KIND_FOOTER:
            break
    behind = first_nonzero(data, offset)
    if behind >= 0:
        left_over = FrameError(behind, "zeros behind the footer", f"{data[behind]:#04x}")
        yield DamagedStretch(behind, len(data), left_over)


def _resume(data: memoryview, offset: int, segment: SegmentHeader, group_end: int, left: int) -> tuple[int, int]:
    """Find where to read on behind a bad spot; returns that and how many frames of its group are left there."""
    if left > 0:
        step = _first_step(data, offset, group_end, left)
        if step is not None:
            return offset + step, left - 1
    elif offset == group_end and _holds_first_frame(data, offset + MARK_BYTES, segment):
        # A group began here: its GROUP frame is the bad spot, and the next frame's place does not hang on it.
        return offset + MARK_BYTES, 0
    for place, _ in marks_behind(data, offset + _ALIGNMENT, segment):
        return place, 0
    return len(data), 0


def _first_step(data: memoryview, offset: int, group_end: int, left: int) -> int | None:
    """The length of the bad frame at ``offset``: the one from which the lengths lead exactly to the group's end.

    A header says it twice: as such, and as the lengths of payload and key.
    """
    if group_end > len(data) or offset + FRAME_HEADER_BYTES > group_end:
        return None
    frame_bytes, payload_bytes, key_bytes = _LENGTHS.unpack_from(data, offset)
    together = -(-(FRAME_HEADER_BYTES + payload_bytes + key_bytes) // _ALIGNMENT) * _ALIGNMENT
    for size in (frame_bytes, together):
        if _leads_to(data, offset, size, group_end, left):
            return int(size)
    return None


def _leads_to(data: memoryview, at: int, size: int, group_end: int, left: int) -> bool:
    """Whether a frame of ``size`` bytes and ``left - 1`` more by their own lengths end exactly at ``group_end``."""
    while True:
        if size % _ALIGNMENT or not FRAME_HEADER_BYTES <= size <= group_end - at:
            return False
        at += size
        left -= 1
        if left == 0 or at == group_end:
            return left == 0 and at == group_end
        if at + FRAME_HEADER_BYTES > group_end:
            return False
        size = _LENGTHS.unpack_from(data, at)[0]


def _holds_first_frame(data: memoryview, offset: int, segment: SegmentHeader) -> bool:
    try:
        return verify_frame(data, offset, segment.seed).kind not in (KIND_GROUP, KIND_FOOTER)
    except FrameError:
        return False


def guess_header(data: memoryview, log_uuid: UUID, number: int, epochs: range) -> SegmentHeader | None:
    """Find out what a damaged header block must have said, from the GROUP frame that stands behind it.

    Its CRC proves log, number and epoch, and it repeats the nonce; no client's bytes can lie in its place.

    Args:
        data: all of the file's bytes.
        log_uuid: the log that it must belong to.
        number: the number in the file's name.
        epochs: the epochs that it may have been written in.

    Returns:
        A header without the LSNs before and in it; None if nothing fits.
    """
    for epoch in reversed(epochs):
        try:
            found = verify_frame(data, HEADER_BYTES, crc_seed(log_uuid, epoch, number))
        except FrameError:
            continue
        mark = parse_mark(data, HEADER_BYTES, found)
        if isinstance(mark, GroupMark) and mark.offset == HEADER_BYTES:
            return SegmentHeader(log_uuid, epoch, number, 0, 0, len(data), 0, 0, mark.nonce)
    return None


__all__ = ["DamagedStretch", "FoundFrame", "guess_header", "list_segments", "walk_frames"]
