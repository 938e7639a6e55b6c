"""Copies of the frames that a read adds to a snapshot, so that the log need not keep them while it is sent (T27).

Owns: the copies' files. Does not own which frames they are (``arka.tiers.reads``) nor how large they may be
(``arka.tiers.tailroom``).

A copy is a segment with one table's frames: its header is the segment's, so frames are checked as in the log (R9).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID

import pyarrow as pa

from arka._core.framing import FrameError, crc_seed, verify_frame
from arka.errors import DataCorruption
from arka.privacy import private_opener
from arka.storage.ports import SegmentSlice, TableFrames
from arka.wal.segment import HEADER_BYTES, SegmentHeader, corruption

#: The suffix of a copy's file.
SUFFIX: Final = ".tail"
#: Bytes that are written before the answer is asked for again.
_STEP_BYTES: Final = 16 * 1024 * 1024


@contextmanager
def copied(frames: TableFrames, folder: str, check_wanted: Callable[[], None]) -> Iterator[TableFrames]:
    """Copy frames to files that go with the block.

    Args:
        frames: what is copied; in the log until this yields.
        folder: of the copies, on the local disk.
        check_wanted: called now and then; raises to give up.

    Yields:
        The same frames, in the copies.

    Raises:
        DataCorruption: a segment is gone, or a frame's CRC does not hold.
        OSError: the disk has no room, or failed.
    """
    paths = [str(Path(folder) / f"{number}{SUFFIX}") for number in range(len(frames.slices))]
    try:
        made = tuple(
            _copy(piece, frames.log_uuid, path, check_wanted)
            for piece, path in zip(frames.slices, paths, strict=True)
            if piece.offsets
        )
        yield replace(frames, slices=made)
    finally:
        for path in paths:
            Path(path).unlink(missing_ok=True)


def _copy(piece: SegmentSlice, log_uuid: UUID, path: str, check_wanted: Callable[[], None]) -> SegmentSlice:
    try:
        source = pa.memory_map(piece.path)
    except FileNotFoundError as error:
        raise DataCorruption(piece.path, 0, "a file with frames", "no file") from error
    with source:
        mapped = memoryview(source.read_buffer(source.size()))
    # Damage is the segment's, so that the error names it, and not a copy that is gone by then.
    SegmentHeader.from_bytes(piece.path, mapped).check_is(piece.path, log_uuid, piece.segment, piece.epoch)
    seed = crc_seed(log_uuid, piece.epoch, piece.segment)
    places = bytearray()
    at = HEADER_BYTES
    with open(path, "wb", opener=private_opener) as copy:
        copy.write(mapped[:HEADER_BYTES])
        for start, end, offsets in _runs(piece, mapped, seed):
            for offset in offsets:
                places += (at + offset - start).to_bytes(8, sys.byteorder)
            for step in range(start, end, _STEP_BYTES):
                check_wanted()
                copy.write(mapped[step : min(step + _STEP_BYTES, end)])
            at += end - start
    return replace(piece, path=path, offsets=bytes(places))


def _runs(piece: SegmentSlice, mapped: memoryview, seed: int) -> Iterator[tuple[int, int, list[int]]]:
    """Yield where frames lie one behind the other: start, end, and their offsets."""
    start = end = -1
    offsets: list[int] = []
    for offset in memoryview(piece.offsets).cast("Q"):
        try:
            size = verify_frame(mapped, offset, seed).frame_bytes
        except FrameError as error:
            raise corruption(piece.path, error) from error
        if offset != end:
            if offsets:
                yield start, end, offsets
            start, offsets = offset, []
        offsets.append(offset)
        end = offset + size
    if offsets:
        yield start, end, offsets


__all__ = ["SUFFIX", "copied"]
