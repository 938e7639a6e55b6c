"""A node whose disk is gone: its log is written anew from what the object store has.

Owns: the way from WAL objects back to sealed segments on an empty disk. Does not own which objects are the log
(``arka.tiers.chain``) nor what comes after: the ordinary recovery reads the segments as if they had always been
there. A crash on the way leaves segments without a log state, and the next start begins again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import structlog
import trio

from arka._core.framing import KIND_BATCH, KIND_FOOTER, KIND_GROUP, KIND_TABLE, FrameHeader
from arka.storage.ports import Disk
from arka.tiers.chain import Chain
from arka.wal.logstate import STATE_NAME
from arka.wal.named import RESTORING_NAME
from arka.wal.objectfile import ObjectRef, WalObject
from arka.wal.rewrite import SegmentBuilder
from arka.wal.seal import Kept, SealMark, write_seal
from arka.wal.segment import segment_name

log = structlog.get_logger(__name__)

#: How often a long restore says how far it is, in seconds.
_PROGRESS_S: Final = 1.0


async def restore_log(
    chain: Chain,
    head: ObjectRef | None,
    directory: Path,
    disk: Disk,
    *,
    log_uuid: UUID,
    epoch: int,
    released_lsn: int,
    segment_bytes: int,
) -> None:
    """Write the segments of a log that only the object store has: every frame up to the head that it still has.

    Args:
        chain: its objects.
        head: the last of them; None for none.
        directory: of the log. What an earlier attempt left there is removed, a log state that never started too.
        disk: its file system.
        log_uuid: the log.
        epoch: the epoch of this start.
        released_lsn: what checkpoints cover: the log's end where the store has no object above it.
        segment_bytes: about how large a segment becomes.

    Raises:
        DataCorruption: an object is damaged or missing.
        StoreUnavailable: the store does not answer, or another process deleted objects meanwhile; begin again.
        OSError: the disk failed.

    Durability: the segments are fsynced and sealed on return; the log state is the caller's to write.

    Cancellation: as a crash.
    """
    restore = _Restore(directory, disk, log_uuid, epoch, released_lsn, segment_bytes)
    started = said = trio.current_time()
    await disk.run(restore.begin)
    try:
        for ref in await chain.list_objects(head):
            await disk.run(partial(restore.add, await chain.read(ref)))
            now = trio.current_time()
            if now - said >= _PROGRESS_S and head is not None:
                said = now
                log.info("log.restoring", percent=restore.percent(head.last_lsn), last_lsn=restore.last_lsn)
        await disk.run(restore.finish)
    finally:
        restore.close()
    if head is None and not released_lsn:
        return
    log.info(
        "log.restored",
        last_lsn=restore.last_lsn,
        segments=restore.segments,
        bytes=restore.bytes,
        seconds=round(trio.current_time() - started, 3),
    )


class _Restore:
    """One run. Its methods block; they run in the disk's thread, one at a time."""

    def __init__(
        self, directory: Path, disk: Disk, log_uuid: UUID, epoch: int, released_lsn: int, segment_bytes: int
    ) -> None:
        self._directory = directory
        self._disk = disk
        self._log_uuid = log_uuid
        self._epoch = epoch
        self._segment_bytes = segment_bytes
        self._builder: SegmentBuilder | None = None
        # By table and schema: its TABLE frame; and which of them the segment that is being built has.
        self._tables: dict[tuple[bytes, int], tuple[bytes, FrameHeader]] = {}
        self._written: set[tuple[bytes, int]] = set()
        self._first_lsn = 0
        # The last LSN before the first segment.
        self._base_lsn = 0
        self.last_lsn = released_lsn
        self.segments = 0
        self.bytes = 0

    def percent(self, head_lsn: int) -> int:
        """How far it is, by LSN."""
        return 100 * (self.last_lsn - self._first_lsn) // max(head_lsn - self._first_lsn, 1)

    def begin(self) -> None:
        """Make the directory, and remove what an earlier attempt left."""
        self._disk.make_directory(self._directory)
        names = self._disk.list_names(self._directory)
        if RESTORING_NAME not in names:
            # Until the log has a state, this says that segments without one are no damage (R39).
            self._disk.create(self._directory / RESTORING_NAME, 0).close()
            self._disk.sync_directory(self._directory)
        for name in sorted(names, key=lambda name: name != STATE_NAME):
            # The log state first: without it the rest is nothing.
            if name != RESTORING_NAME:
                self._disk.remove(self._directory / name)
        self._disk.sync_directory(self._directory)

    def add(self, found: WalObject) -> None:
        """Write one object's frames; what an earlier object had too is left out."""
        before = found.header.predecessor
        if not self.segments:
            # The chain's first object: what the log had before it is released.
            self.last_lsn = 0 if before is None else before.last_lsn
            self._first_lsn = self.last_lsn
        for offset, header in found.frames():
            key = (header.table_uuid, header.schema_id)
            if header.kind == KIND_TABLE:
                if key not in self._tables:
                    self._tables[key] = (bytes(found.data[offset : offset + header.frame_bytes]), header)
            elif header.kind not in (KIND_GROUP, KIND_FOOTER) and header.lsn > self.last_lsn:
                builder = self._builder or self._begin_segment(header.lsn)
                if header.kind == KIND_BATCH and key not in self._written:
                    self._written.add(key)
                    frame, table_header = self._tables[key]
                    builder.add(frame, 0, table_header)
                builder.add(found.data, offset, header)
                self.last_lsn = header.lsn
        if self._builder is not None:
            # The object's bytes go; and a segment ends where an object ends, so that both are released together.
            self._builder.flush()
            if self._builder.size >= self._segment_bytes:
                self._end_segment()

    def finish(self) -> None:
        """Seal what is there, and say that nothing comes after."""
        self._end_segment()
        kept = Kept(1, self.segments, self._base_lsn) if self.segments else Kept(0, 0, self.last_lsn)
        mark = SealMark(self._log_uuid, self._epoch, self.segments, self.last_lsn, closed=False, kept=kept)
        write_seal(self._disk, self._directory, mark)

    def close(self) -> None:
        """Let go of an unfinished segment's file."""
        if self._builder is not None:
            self._builder.close()

    def _begin_segment(self, first_lsn: int) -> SegmentBuilder:
        self.segments += 1
        if self.segments == 1:
            self._base_lsn = self.last_lsn
        self._written.clear()
        self._builder = SegmentBuilder(
            self._disk,
            self._directory / segment_name(self.segments),
            log_uuid=self._log_uuid,
            epoch=self._epoch,
            number=self.segments,
            base_lsn=self.last_lsn,
            first_lsn=first_lsn,
        )
        return self._builder

    def _end_segment(self) -> None:
        builder, self._builder = self._builder, None
        if builder is not None:
            builder.finish()
            self.bytes += builder.size


__all__ = ["restore_log"]
