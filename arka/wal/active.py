"""The active segment: what is in it, what still fits, and its group commits.

Owns: one segment file from its header to its footer. Does not own which segment comes next (``writer``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from arka import failpoints
from arka._core.framing import KIND_BATCH, KIND_TABLE, MARK_BYTES, Frame, Group, drop_payloads, fit, run_end
from arka.records import TableInfo
from arka.storage.ports import Disk, DiskFile
from arka.wal.segment import HEADER_BYTES, AppendedRange, Footer, GroupMark, SegmentHeader, SegmentRef

#: What a segment's last group must leave free: its own GROUP frame and the footer.
MARKS_BYTES: Final = 2 * MARK_BYTES


def now_us() -> int:
    """The time, in microseconds since the Unix epoch."""
    return time.time_ns() // 1000


def table_frame(frame: Frame) -> Frame:
    """Make the TABLE frame that a batch frame needs before it (R24)."""
    table = frame.table
    assert table is not None
    return Frame(
        KIND_TABLE,
        0,
        table=table,
        schema_id=frame.schema_id,
        payload=table.to_bytes(),
        accepted_us=frame.accepted_us,
    )


@dataclass(slots=True)
class Cut:
    """The part of a group that goes to one segment: TABLE frames included, GROUP frame not.

    Attributes:
        frames: as they are written.
        taken: those of them that were asked for.
        tables: all that batches in it are of, also those that the segment knows already.
        size: of ``frames``, in bytes.
    """

    frames: list[Frame] = field(default_factory=list)
    taken: list[Frame] = field(default_factory=list)
    tables: dict[tuple[UUID, int], TableInfo] = field(default_factory=dict)
    size: int = 0


class ActiveSegment:
    """The segment that is written to, by one caller at a time. Blocking but for ``commit_in``."""

    def __init__(self, ref: SegmentRef, header: SegmentHeader, file: DiskFile) -> None:
        self.ref = ref
        self._header = header
        self._file = file
        self._seed = header.seed
        # Invariant: everything below _offset is fsynced; nothing was written at or above it.
        self._offset = HEADER_BYTES
        self._frames = 0
        self._last_lsn = 0
        self._known_tables: set[tuple[UUID, int]] = set()

    def cut(self, frames: list[Frame], start: int) -> Cut:
        """Take as many frames from ``start`` on as fit, with the TABLE frames that they need."""
        cut = Cut()
        room = self._header.capacity - self._offset - MARKS_BYTES
        while start < len(frames):
            first = frames[start]
            table = first.table if first.kind == KIND_BATCH else None
            record = None
            if table is not None:
                key = (table.uuid, first.schema_id)
                if key not in self._known_tables and key not in cut.tables:
                    record = table_frame(first)
            need = 0 if record is None else record.frame_bytes
            run = run_end(frames, start)
            end, size = fit(frames, start, run, room - cut.size - need)
            if end == start:
                break
            if table is not None:
                cut.tables[key] = table
            if record is not None:
                cut.frames.append(record)
            cut.frames += frames[start:end]
            cut.taken += frames[start:end]
            cut.size += need + size
            if end < run:
                break
            start = end
        return cut

    def commit(self, cut: Cut, *, then_seal: bool) -> AppendedRange:
        """Write and fsync a cut as one group, followed by the footer if the segment is full."""
        group = self._begin(cut, then_seal=then_seal)
        failpoints.hit("wal.group_begin")
        self._file.commit(group)
        failpoints.hit("wal.group_synced")
        return self._finish(cut, then_seal=then_seal)

    async def commit_in(self, disk: Disk, cut: Cut) -> AppendedRange:
        """Write and fsync a cut as one group, without holding trio's thread up; the segment goes on.

        Cancellation: before the write begins, nothing has changed; once begun it is finished.
        """
        await disk.commit(self._file, self._begin(cut, then_seal=False))
        return self._finish(cut, then_seal=False)

    def _begin(self, cut: Cut, *, then_seal: bool) -> Group:
        start = self._offset
        end = start + MARK_BYTES + cut.size
        mark = GroupMark(self._header.nonce, start, start, end - start, len(cut.frames))
        frames = [mark.to_frame(now_us()), *cut.frames]
        if then_seal:
            count = self._frames + len(frames)
            frames.append(self._footer(synced_through=start, offset=end, last_lsn=cut.taken[-1].lsn, frames=count))
        return Group(frames, start, self._seed)

    def _finish(self, cut: Cut, *, then_seal: bool) -> AppendedRange:
        start = self._offset
        end = self._offset = start + MARK_BYTES + cut.size
        self._frames += 1 + len(cut.frames)
        self._last_lsn = cut.taken[-1].lsn
        self._known_tables.update(cut.tables)
        if then_seal:
            self._release(end + MARK_BYTES)
        drop_payloads(cut.taken)
        return AppendedRange(
            self.ref, start, end, cut.taken[0].lsn, self._last_lsn, tuple(cut.tables.values()), cut.taken
        )

    def seal(self) -> None:
        """Write and fsync the footer."""
        footer = self._footer(
            synced_through=self._offset, offset=self._offset, last_lsn=self._last_lsn, frames=self._frames
        )
        self._file.commit(Group([footer], self._offset, self._seed))
        self._release(self._offset + MARK_BYTES)

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _footer(self, *, synced_through: int, offset: int, last_lsn: int, frames: int) -> Frame:
        footer = Footer(self._header.nonce, synced_through, offset, self._header.first_lsn, last_lsn, frames)
        return footer.to_frame(now_us())

    def _release(self, end: int) -> None:
        failpoints.hit("wal.footer_synced")
        self._file.release_tail(end)
        self._file.close()


__all__ = ["MARKS_BYTES", "ActiveSegment", "Cut", "now_us", "table_frame"]
