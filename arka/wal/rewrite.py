"""Copying an unsealed segment's intact frames into a sealed one (R6).

Owns: that copy, whole or not there at all. Does not own what is intact (``scan``) nor when the original
may go (``recovery``).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from arka import failpoints
from arka._core.framing import KIND_FOOTER, KIND_GROUP, FrameHeader, Group, parse_header, reseal_header
from arka.options import MIB
from arka.storage.ports import Buffer, Disk, DiskFile
from arka.wal.scan import SegmentScan
from arka.wal.segment import (
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    MARK_BYTES,
    UNFINISHED_SUFFIX,
    Footer,
    GroupMark,
    SegmentHeader,
)

#: Groups of the copy are cut at about this size, and at this many frames: both bound the memory used.
_GROUP_BYTES: Final = 8 * MIB
_GROUP_FRAMES: Final = 4096


def copy_segment(disk: Disk, path: Path, scan: SegmentScan, data: memoryview, *, number: int, epoch: int) -> None:
    """Write the frames that ``scan`` found into a segment of their own. Blocking.

    Args:
        disk: the file system.
        path: of the copy; a crash leaves it whole or not there.
        scan: of the original, iterated to its end; at least one LSN was found.
        data: the original's bytes.
        number: the copy's segment number.
        epoch: the copy's epoch.

    Raises:
        OSError: the copy is not there.

    Durability: on return the copy is fsynced, under its name.
    """
    header = SegmentHeader(
        log_uuid=scan.header.log_uuid,
        epoch=epoch,
        number=number,
        base_lsn=scan.header.base_lsn,
        first_lsn=scan.first_lsn,
        capacity=scan.header.capacity,
        replaces=scan.header.number,
        created_us=time.time_ns() // 1000,
        nonce=secrets.token_bytes(16),
    )
    unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
    file = disk.create(unfinished, HEADER_BYTES)
    try:
        file.write(0, [header.to_bytes()])
        _SegmentCopy(file, header, data, scan.last_lsn).write(scan.end)
        failpoints.hit("recovery.copy_written")
        file.sync()
        failpoints.hit("recovery.copy_synced")
    finally:
        file.close()
    disk.rename(unfinished, path)
    failpoints.hit("recovery.copy_renamed")
    disk.sync_directory(path.parent)
    failpoints.hit("recovery.copy_named")


class _SegmentCopy:
    """Writes verified frames of one segment into another: new groups, new CRCs, the same bytes else."""

    def __init__(self, file: DiskFile, header: SegmentHeader, data: memoryview, last_lsn: int) -> None:
        self._file = file
        self._header = header
        self._seed = header.seed
        self._data = data
        self._last_lsn = last_lsn
        self._offset = HEADER_BYTES
        self._frames = 0

    def write(self, end: int) -> None:
        """Write the frames in ``[HEADER_BYTES, end)`` of the old segment, and the footer."""
        parts: list[Buffer] = []
        size = count = 0
        for offset, header in self._old_frames(end):
            parts.append(reseal_header(self._data, offset, self._seed))
            parts.append(self._data[offset + FRAME_HEADER_BYTES : offset + header.frame_bytes])
            size += header.frame_bytes
            count += 1
            if size >= _GROUP_BYTES or count >= _GROUP_FRAMES:
                self._write_group(parts, size, count)
                parts = []
                size = count = 0
        if count:
            self._write_group(parts, size, count)
        footer = Footer(
            self._header.nonce,
            HEADER_BYTES,
            self._offset,
            self._header.first_lsn,
            self._last_lsn,
            self._frames,
        )
        self._file.write(self._offset, [self._mark_bytes(footer)])

    def _old_frames(self, end: int) -> Iterator[tuple[int, FrameHeader]]:
        offset = HEADER_BYTES
        while offset < end:
            header = parse_header(self._data, offset)
            if header.kind not in (KIND_GROUP, KIND_FOOTER):
                yield offset, header
            offset += header.frame_bytes

    def _write_group(self, parts: Sequence[Buffer], size: int, count: int) -> None:
        mark = GroupMark(self._header.nonce, HEADER_BYTES, self._offset, MARK_BYTES + size, count)
        self._file.write(self._offset, [self._mark_bytes(mark), *parts])
        self._offset += MARK_BYTES + size
        self._frames += 1 + count

    def _mark_bytes(self, mark: GroupMark | Footer) -> bytes:
        return Group([mark.to_frame(self._header.created_us)], self._offset, self._seed).to_bytes()


__all__ = ["copy_segment"]
