"""Making whole sealed segments out of frames that exist: a tail's at recovery (R6), the store's after node loss.

Owns: how such a segment is written, whole or not there at all. Does not own which frames are intact (``scan``,
``objectfile``), which go in, nor when an original may go (``recovery``).
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Final
from uuid import UUID

from arka import failpoints
from arka._core.framing import KIND_FOOTER, KIND_GROUP, FrameHeader, Group, parse_header, reseal_header
from arka.options import MIB
from arka.storage.ports import Buffer, Disk
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

#: Groups are cut at about this size, and at this many frames: both bound the memory used.
_GROUP_BYTES: Final = 8 * MIB
_GROUP_FRAMES: Final = 4096


class SegmentBuilder:
    """Writes verified frames into a new segment: new groups, new CRCs, the same bytes else. Blocking."""

    def __init__(
        self,
        disk: Disk,
        path: Path,
        *,
        log_uuid: UUID,
        epoch: int,
        number: int,
        base_lsn: int,
        first_lsn: int,
        capacity: int = HEADER_BYTES,
        replaces: int = 0,
    ) -> None:
        """Begin a segment under another name.

        Args:
            disk: the file system.
            path: of the segment; a crash leaves it whole or not there.
            log_uuid: the log.
            epoch: the segment's epoch.
            number: the segment's number.
            base_lsn: the last LSN of the log before it.
            first_lsn: the first LSN that will be added.
            capacity: what its header says of its size; for people.
            replaces: the segment whose frames these are; 0 for none.

        Raises:
            OSError: the disk failed.
        """
        self._disk = disk
        self._path = path
        self._header = SegmentHeader(
            log_uuid=log_uuid,
            epoch=epoch,
            number=number,
            base_lsn=base_lsn,
            first_lsn=first_lsn,
            capacity=capacity,
            replaces=replaces,
            created_us=time.time_ns() // 1000,
            nonce=secrets.token_bytes(16),
        )
        self._seed = self._header.seed
        self._file = disk.create(path.with_name(path.name + UNFINISHED_SUFFIX), HEADER_BYTES)
        self._offset = HEADER_BYTES
        self._frames = 0
        self._last_lsn = base_lsn
        self._parts: list[Buffer] = []
        self._group_bytes = self._group_frames = 0

    @property
    def size(self) -> int:
        """Bytes of the segment so far."""
        return self._offset + self._group_bytes

    @property
    def last_lsn(self) -> int:
        """The last LSN in the segment so far, or the last before it."""
        return self._last_lsn

    def add(self, data: Buffer, offset: int, header: FrameHeader) -> None:
        """Add one verified frame.

        Args:
            data: the bytes that it is in; kept until the next flush.
            offset: where it begins in them.
            header: its header; no GROUP or FOOTER frame.

        Raises:
            OSError: the disk failed.
        """
        self._parts.append(reseal_header(data, offset, self._seed))
        self._parts.append(memoryview(data)[offset + FRAME_HEADER_BYTES : offset + header.frame_bytes])
        self._group_bytes += header.frame_bytes
        self._group_frames += 1
        self._last_lsn = header.lsn or self._last_lsn
        if self._group_bytes >= _GROUP_BYTES or self._group_frames >= _GROUP_FRAMES:
            self.flush()

    def flush(self) -> None:
        """Write what was added, so that its bytes may be let go of. Not yet durable.

        Raises:
            OSError: the disk failed.
        """
        if self._group_frames:
            size = MARK_BYTES + self._group_bytes
            mark = GroupMark(self._header.nonce, HEADER_BYTES, self._offset, size, self._group_frames)
            self._file.write(self._offset, [self._mark_bytes(mark), *self._parts])
            self._offset += size
            self._frames += 1 + self._group_frames
        self._parts = []
        self._group_bytes = self._group_frames = 0

    def finish(self) -> None:
        """Seal the segment and give it its name.

        Raises:
            OSError: the segment is not there.

        Durability: on return it is fsynced, under its name.
        """
        try:
            self.flush()
            header = self._header
            footer = Footer(header.nonce, HEADER_BYTES, self._offset, header.first_lsn, self._last_lsn, self._frames)
            self._file.write(0, [header.to_bytes()])
            self._file.write(self._offset, [self._mark_bytes(footer)])
            failpoints.hit("recovery.copy_written")
            self._file.sync()
            failpoints.hit("recovery.copy_synced")
        finally:
            self.close()
        self._disk.rename(self._file.path, self._path)
        failpoints.hit("recovery.copy_renamed")
        self._disk.sync_directory(self._path.parent)
        failpoints.hit("recovery.copy_named")

    def close(self) -> None:
        """Let go of the file, finished or not; a file without a segment's name is removed by the next recovery."""
        self._file.close()

    def _mark_bytes(self, mark: GroupMark | Footer) -> bytes:
        return Group([mark.to_frame(self._header.created_us)], self._offset, self._seed).to_bytes()


def copy_segment(disk: Disk, path: Path, scan: SegmentScan, data: memoryview, *, number: int, epoch: int) -> None:
    """Write the frames that ``scan`` found into a segment of their own (R6). Blocking.

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
    copy = SegmentBuilder(
        disk,
        path,
        log_uuid=scan.header.log_uuid,
        epoch=epoch,
        number=number,
        base_lsn=scan.header.base_lsn,
        first_lsn=scan.first_lsn,
        capacity=scan.header.capacity,
        replaces=scan.header.number,
    )
    try:
        offset = HEADER_BYTES
        while offset < scan.end:
            header = parse_header(data, offset)
            if header.kind not in (KIND_GROUP, KIND_FOOTER):
                copy.add(data, offset, header)
            offset += header.frame_bytes
        copy.finish()
    finally:
        copy.close()


__all__ = ["SegmentBuilder", "copy_segment"]
