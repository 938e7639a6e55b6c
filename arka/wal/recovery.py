"""Recovery: read the whole log once at start, and leave it sealed and fsynced.

Owns: what is found, what is dropped, and the copy of an unsealed tail into a sealed segment (R6). Does
not own what the frames mean. Works on mapped files, segment by segment, so that memory stays bounded.

It may be killed at any moment and run again: a segment comes into being whole (written under another
name, fsynced, renamed), and its copy names the segment that it replaces before that is removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from arka import failpoints
from arka._core.framing import (
    KIND_GROUP,
    KIND_LOST,
    KIND_TABLE,
)
from arka.errors import DataCorruption, Fenced
from arka.records import LsnRange, TableInfo
from arka.storage.ports import Disk
from arka.wal.named import find_gone
from arka.wal.ranges import RangeCutter, RecoveredFrame
from arka.wal.rewrite import copy_segment
from arka.wal.scan import SegmentScan, may_have_tail
from arka.wal.seal import SEAL_NAME, SealMark, kept_of, read_seal, write_seal, write_whole
from arka.wal.segment import (
    UNFINISHED_SUFFIX,
    AppendedRange,
    SegmentHeader,
    SegmentRef,
    parse_lost,
    parse_segment_name,
    segment_name,
)
from arka.wal.walk import list_segments


@dataclass(frozen=True, slots=True)
class RecoveredSegment:
    """A sealed segment with all of its frames.

    Attributes:
        ref: which.
        ranges: its frames in pieces of some MiB, in order, each beginning with a GROUP frame.
        end_bytes: bytes up to the end of the footer.
    """

    ref: SegmentRef
    ranges: tuple[AppendedRange, ...]
    end_bytes: int

    @property
    def first_lsn(self) -> int:
        """The first LSN in it."""
        return self.ranges[0].first_lsn

    @property
    def last_lsn(self) -> int:
        """The last LSN in it."""
        return self.ranges[-1].last_lsn


@dataclass(frozen=True, slots=True)
class TornTail:
    """Bytes at the log's end that were no whole frames: never acked as durable, as far as the log can tell.

    Attributes:
        segment: where they were; the file is gone.
        offset: where they began.
        size: how many, up to the last that was not zero.
        after_lsn: the last LSN before them.
        expected: what should have stood there.
        found: what stood there.
        copied_to: the file that keeps them.
    """

    segment: SegmentRef
    offset: int
    size: int
    after_lsn: int
    expected: str
    found: str
    copied_to: Path


@dataclass(frozen=True, slots=True)
class RecoveredLog:
    """What recovery found, and left sealed and fsynced.

    Attributes:
        segments: oldest first; each has at least one LSN.
        last_lsn: the last LSN in the log, retired segments included; 0 for none.
        next_segment: the number for ``WalWriter.open``.
        base_lsn: the last LSN that is no longer in ``segments``, since it was released; 0 for none.
        lost: the lost ranges that the log's LOST frames record (R3), in log order.
        torn: what was dropped from the tail, if anything.
        closed: the last writer that was opened had closed the log: no LSN that was given is missing.
    """

    segments: tuple[RecoveredSegment, ...]
    last_lsn: int
    next_segment: int
    base_lsn: int
    lost: tuple[LsnRange, ...]
    torn: TornTail | None
    closed: bool


async def recover(
    directory: Path,
    disk: Disk,
    *,
    log_uuid: UUID,
    new_epoch: int,
    on_frame: Callable[[RecoveredFrame], None],
    on_progress: Callable[[int, int], None],
) -> RecoveredLog:
    """Read all of the log, and make its tail durable under the new epoch.

    Args:
        directory: where the segments are; made if it does not exist.
        disk: the file system.
        log_uuid: the log that the segments must belong to.
        new_epoch: the epoch of this start, at least that of everything in the log.
        on_frame: called with every frame but GROUP and FOOTER, in log order, where it stays: TABLE frames
            come before the batches that need them. Called in the disk's thread: it must not use trio.
        on_progress: called in that thread with the bytes read so far and the bytes of all segments.

    Returns:
        What was found; open the writer with its ``next_segment``.

    Raises:
        DataCorruption: bytes that were fsynced are damaged or missing; the log is as it was.
        ConfigurationError: another version of Arka wrote the log.
        Fenced: an epoch above ``new_epoch`` has written here.
        OSError: the disk failed; nothing that was durable is lost.

    Durability: on return, every frame that was handed out and everything they stand in is fsynced.

    Cancellation: before it begins, nothing is changed; once begun it is finished first. It may be killed
    at any moment, also by an exception from a callback, and run again.

    Source: R6, R7, R8; FORMAT.md "Recovery".
    """
    recovery = _Recovery(directory, disk, log_uuid, new_epoch, on_frame, on_progress)
    return await disk.run(recovery.run)


class _Recovery:
    """One run. Blocking; runs in the disk's thread."""

    def __init__(
        self,
        directory: Path,
        disk: Disk,
        log_uuid: UUID,
        new_epoch: int,
        on_frame: Callable[[RecoveredFrame], None],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._directory = directory
        self._disk = disk
        self._log_uuid = log_uuid
        self._epoch = new_epoch
        self._on_frame = on_frame
        self._on_progress = on_progress
        self._segments: list[RecoveredSegment] = []
        self._tables: dict[bytes, TableInfo] = {}
        self._lost: list[LsnRange] = []
        self._torn: TornTail | None = None
        self._last_lsn = 0
        self._read_bytes = 0
        self._all_bytes = 0

    def run(self) -> RecoveredLog:
        """Recover."""
        self._disk.make_directory(self._directory)
        self._remove_unfinished()
        failpoints.hit("recovery.cleaned")
        seal = read_seal(self._disk, self._directory)
        headers = self._read_headers()
        for error in find_gone(self._directory, seal, headers):
            raise error
        headers = self._drop_forgotten(seal, self._drop_replaced(headers))
        self._check_identity(seal, headers)
        numbers = sorted(headers)
        sealed_through = seal.segment if seal is not None else 0
        newest = max([sealed_through, *numbers])
        has_tail = may_have_tail(headers[numbers[-1]] if numbers else None, sealed_through)
        closed = seal.closed if seal is not None and sealed_through == newest else newest == 0
        base_lsn = self._last_lsn = headers[numbers[0]].base_lsn if numbers else 0
        for number in numbers[:-1] if has_tail else numbers:
            self._read_sealed(number)
        if has_tail:
            newest = max(newest, self._recover_tail(numbers[-1], newest + 1))
        if seal is not None and sealed_through == newest:
            self._check_seal(seal, bool(numbers))
        elif numbers:
            self._write_mark(newest)
            failpoints.hit("recovery.marked")
        return RecoveredLog(
            segments=tuple(self._segments),
            last_lsn=self._last_lsn,
            next_segment=newest + 1,
            base_lsn=base_lsn if self._segments else self._last_lsn,
            lost=tuple(self._lost),
            torn=self._torn,
            closed=closed,
        )

    # -- what there is ----------------------------------------------------------------------------

    def _remove_unfinished(self) -> None:
        """Remove spares and files that never got their name: nothing in them was ever promised."""
        for name in self._disk.list_names(self._directory):
            if name.endswith(UNFINISHED_SUFFIX):
                self._disk.remove(self._directory / name)

    def _path(self, number: int) -> Path:
        return self._directory / segment_name(number)

    def _read_headers(self) -> dict[int, SegmentHeader]:
        headers = {}
        for name in self._disk.list_names(self._directory):
            number = parse_segment_name(name)
            if number is not None:
                path = str(self._directory / name)
                data = self._disk.map(self._directory / name)
                headers[number] = SegmentHeader.from_bytes(path, data)
                headers[number].check_is(path, self._log_uuid, number)
                self._all_bytes += len(data)
        return headers

    def _drop_forgotten(self, seal: SealMark | None, headers: dict[int, SegmentHeader]) -> dict[int, SegmentHeader]:
        """Finish the removal of segments that the log no longer names (R39)."""
        forgotten = [number for number in sorted(headers) if seal is not None and seal.forgets(number)]
        for number in forgotten:
            self._disk.remove(self._path(number))
            self._disk.sync_directory(self._directory)
        return {number: header for number, header in headers.items() if number not in forgotten}

    def _write_mark(self, segment: int, *, without: int = 0) -> None:
        """Say that the log ends here, and name its segments but for one that is about to be removed."""
        listed = [found for found in list_segments(self._directory, self._disk) if found[0] != without]
        kept = kept_of(self._disk, listed, self._last_lsn)
        mark = SealMark(self._log_uuid, self._epoch, segment, self._last_lsn, closed=False, kept=kept)
        write_seal(self._disk, self._directory, mark)

    def _drop_replaced(self, headers: dict[int, SegmentHeader]) -> dict[int, SegmentHeader]:
        """Finish an earlier recovery that was killed between a copy's rename and the original's removal."""
        copies = {header.replaces: number for number, header in headers.items()}
        replaced = copies.keys() & headers.keys()
        for number in replaced:
            # It is whole by construction; the original goes only where that still holds.
            path = self._path(copies[number])
            scan = SegmentScan(str(path), self._disk.map(path), self._log_uuid, copies[number])
            for _ in scan.frames():
                pass
            scan.check_sealed()
            self._disk.remove(self._path(number))
            self._disk.sync_directory(self._directory)
            failpoints.hit("recovery.replaced_removed")
        return {number: header for number, header in headers.items() if number not in replaced}

    def _check_identity(self, seal: SealMark | None, headers: dict[int, SegmentHeader]) -> None:
        epoch = 0
        for number in sorted(headers):
            if headers[number].epoch < epoch:
                raise DataCorruption(
                    str(self._path(number)), 32, f"an epoch of at least {epoch}", f"{headers[number].epoch}"
                )
            epoch = headers[number].epoch
        if seal is not None:
            if seal.log_uuid != self._log_uuid:
                path = str(self._directory / SEAL_NAME)
                raise DataCorruption(path, 16, f"log {self._log_uuid}", f"log {seal.log_uuid}")
            epoch = max(epoch, seal.epoch)
        if epoch > self._epoch:
            raise Fenced(f"{self._directory} was written in epoch {epoch}: epoch {self._epoch} is over")

    def _check_seal(self, seal: SealMark, has_segments: bool) -> None:
        """Check that nothing is missing up to a mark that nothing was written after."""
        if not has_segments:
            self._last_lsn = seal.last_lsn
        elif self._last_lsn != seal.last_lsn:
            raise DataCorruption(str(self._directory / SEAL_NAME), 48, f"last LSN {self._last_lsn}", f"{seal.last_lsn}")

    # -- sealed segments --------------------------------------------------------------------------

    def _open_scan(self, number: int) -> tuple[SegmentScan, SegmentRef, memoryview]:
        path = self._path(number)
        data = self._disk.map(path)
        scan = SegmentScan(str(path), data, self._log_uuid, number)
        scan.check_follows(self._last_lsn)
        return scan, SegmentRef(path, number, scan.header.epoch), data

    def _read_sealed(self, number: int) -> None:
        scan, ref, data = self._open_scan(number)
        cutter = RangeCutter(ref)
        for offset, header in scan.frames():
            if header.kind == KIND_GROUP:
                cutter.begin_group(offset)
                continue
            frame = RecoveredFrame(header, ref, offset, data)
            cutter.add(frame, self._note(frame))
            self._on_frame(frame)
        scan.check_sealed()
        assert scan.footer is not None
        ranges = cutter.finish(scan.footer.offset)
        if ranges:
            self._segments.append(RecoveredSegment(ref, ranges, scan.end))
        self._last_lsn = scan.last_lsn
        self._read_bytes += len(data)
        self._on_progress(min(self._read_bytes, self._all_bytes), self._all_bytes)

    def _note(self, frame: RecoveredFrame) -> TableInfo | None:
        """Remember what the log itself needs of a frame; returns the table of a TABLE frame."""
        try:
            if frame.header.kind == KIND_TABLE:
                payload = frame.payload()
                table = self._tables.get(payload)
                if table is None:
                    table = self._tables[payload] = TableInfo.from_bytes(payload)
                return table
            if frame.header.kind == KIND_LOST:
                self._lost.append(parse_lost(frame.payload()))
        except ValueError as error:
            path = str(frame.segment.path)
            raise DataCorruption(path, frame.offset, "a readable payload", str(error)) from error
        return None

    # -- the tail ---------------------------------------------------------------------------------

    def _recover_tail(self, number: int, copy_number: int) -> int:
        """Copy the tail's intact frames into a sealed segment, remove the tail, read the copy.

        Returns:
            The highest number that is used up now.
        """
        scan, ref, data = self._open_scan(number)
        for _ in scan.frames():
            pass
        torn = scan.find_torn()
        if torn is not None:
            assert scan.stop is not None
            copied_to = ref.path.with_name(f"{ref.path.name}.torn-{torn.start}")
            write_whole(self._disk, copied_to, [data[torn.start : torn.end]])
            failpoints.hit("recovery.torn_kept")
            self._torn = TornTail(
                ref,
                torn.start,
                torn.end - torn.start,
                scan.last_lsn,
                scan.stop.expected,
                scan.stop.found,
                copied_to,
            )
        if scan.first_lsn:
            copy_segment(self._disk, self._path(copy_number), scan, data, number=copy_number, epoch=self._epoch)
        else:
            self._write_mark(copy_number - 1, without=number)
        del data
        self._disk.remove(ref.path)
        failpoints.hit("recovery.original_unlinked")
        self._disk.sync_directory(self._directory)
        failpoints.hit("recovery.original_removed")
        if not scan.first_lsn:
            return number
        self._read_sealed(copy_number)
        return copy_number


__all__ = ["RecoveredFrame", "RecoveredLog", "RecoveredSegment", "TornTail", "recover"]
