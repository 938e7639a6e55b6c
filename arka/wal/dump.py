"""Looking at a log without changing it: every frame, and whether a start would accept it.

Owns: what ``arka wal dump`` and ``arka wal verify`` show. Prints nothing and repairs nothing. Blocking:
for a command, not for the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from arka._core.framing import (
    KIND_BATCH,
    KIND_CREATE,
    KIND_DROP,
    KIND_FOOTER,
    KIND_GROUP,
    KIND_LOST,
    KIND_TABLE,
    FrameHeader,
)
from arka.errors import ArkaError, DataCorruption
from arka.records import TableInfo
from arka.storage.ports import Disk
from arka.wal.committed import read_committed
from arka.wal.logstate import LogState, newest_slot, read_slots
from arka.wal.named import find_unnamed
from arka.wal.scan import SegmentScan, TornBytes, may_have_tail
from arka.wal.seal import SEAL_NAME, SealMark, read_seal
from arka.wal.segment import FRAME_HEADER_BYTES, HEADER_BYTES, KIND_ACTIVITY, SegmentHeader, parse_mark
from arka.wal.walk import DamagedStretch, list_segments, walk_frames

_KIND_WORDS: Final = {
    KIND_BATCH: "batch",
    KIND_TABLE: "table",
    KIND_CREATE: "create",
    KIND_DROP: "drop",
    KIND_LOST: "lost",
    KIND_ACTIVITY: "activity",
    KIND_GROUP: "group",
    KIND_FOOTER: "footer",
}


@dataclass(frozen=True, slots=True)
class DumpedFrame:
    """One frame, or one stretch of bytes that is none.

    Attributes:
        file: the segment's file name.
        offset: where it begins.
        kind: ``batch``, ``table``, ``create``, ``drop``, ``lost``, ``group``, ``footer``, ``header`` for a
            segment's header block, ``damaged``, or for damage to those files ``state`` and ``seal``.
        lsn: its LSN; 0 for kinds without.
        table: the table's name as of the segment's TABLE frame, else its UUID; empty for none.
        rows: row count.
        size: bytes in the file, padding included.
        crc_ok: whether its CRC holds.
        note: what else there is to say: the key, or why it is damaged.
    """

    file: str
    offset: int
    kind: str
    lsn: int
    table: str
    rows: int
    size: int
    crc_ok: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment as a start would judge it.

    Attributes:
        file: its file name.
        number: its number.
        epoch: its epoch; 0 if the header cannot be read.
        state: ``sealed``, ``tail`` (to be rewritten at the next start) or ``replaced`` (to be removed then).
        first_lsn: 0 for none.
        last_lsn: 0 for none.
        frames: intact frames of all kinds, the footer excepted.
        torn: what the next start would copy aside and drop; None for nothing.
        problem: why a start would refuse; None if it would not.
    """

    file: str
    number: int
    epoch: int
    state: str
    first_lsn: int
    last_lsn: int
    frames: int
    torn: TornBytes | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class LogReport:
    """A log as a start would judge it.

    Attributes:
        log_uuid: the log; None for an empty directory or when no header can be read.
        state: the log's state, if there is one that can be read.
        seal: the seal mark, if there is one.
        segments: by number.
        problems: everything for which a start would refuse; empty means that it would not.
        notes: damage that a start mends by itself: one of the two copies of the log's state.
    """

    log_uuid: UUID | None
    state: LogState | None
    seal: SealMark | None
    segments: tuple[SegmentReport, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether a start would accept the log."""
        return not self.problems


def dump_log(directory: Path, disk: Disk) -> Iterator[DumpedFrame]:
    """Yield every frame of every segment, in order; read on behind damage.

    The log's state and its seal mark get a line only where they are damaged, and so does a segment that does
    not follow upon the one before, or that lacks its footer.

    Args:
        directory: the log's directory.
        disk: its file system.

    Raises:
        ConfigurationError: another version of Arka wrote the log.
        OSError: it cannot be read.
    """
    for slot in read_slots(directory, disk) or []:
        if isinstance(slot, DataCorruption):
            yield _damaged_file(slot, "state")
    sealed_through = 0
    seal, sealed = None, True
    try:
        seal = read_seal(disk, directory)
        sealed_through = seal.segment if seal is not None else 0
    except DataCorruption as error:
        sealed = False
        yield _damaged_file(error, "seal")
    segments = list_segments(directory, disk)
    replaced = {header.replaces for _, path in segments if (header := _header_of(path, disk)) is not None}
    base: int | None = None
    if sealed:
        for gone in find_unnamed(directory, seal, {number for number, _ in segments} | replaced):
            yield _damaged_file(gone, "segment")
    for number, path in segments:
        may_be_tail = number in replaced or (number == segments[-1][0] and number > sealed_through)
        dump = _SegmentDump(path, disk.map(path), number)
        yield from dump.frames(base, may_be_tail=may_be_tail)
        if number not in replaced:
            base = dump.last_lsn


def _header_of(path: Path, disk: Disk) -> SegmentHeader | None:
    try:
        return SegmentHeader.from_bytes(str(path), disk.map(path))
    except ArkaError:
        return None


def _damaged_file(error: DataCorruption, kind: str) -> DumpedFrame:
    return DumpedFrame(Path(error.path).name, error.offset, kind, 0, "", 0, 0, False, error.detail)


class _SegmentDump:
    """One segment's lines.

    Attributes:
        last_lsn: the last LSN in it; None when that cannot be told.
    """

    def __init__(self, path: Path, data: memoryview, number: int) -> None:
        self._path = path
        self._data = data
        self._number = number
        self._names: dict[bytes, str] = {}
        self.last_lsn: int | None = None

    def frames(self, base: int | None, *, may_be_tail: bool) -> Iterator[DumpedFrame]:
        """Yield the lines; ``base`` is the last LSN before this segment, None when that is not known."""
        path, data = self._path, self._data
        try:
            segment = SegmentHeader.from_bytes(str(path), data)
        except ArkaError as error:
            yield self._header(min(HEADER_BYTES, len(data)), 0, error.detail, crc_ok=False)
            return
        note = f"log {segment.log_uuid} epoch {segment.epoch} segment {segment.number}"
        if segment.replaces:
            note += f" replaces {segment.replaces}"
        problem = ""
        if segment.number != self._number:
            problem = f"; the file's name says segment {self._number}"
        elif base is not None and segment.base_lsn != base:
            problem = f"; last LSN before it expected {base}, found {segment.base_lsn}"
        yield self._header(HEADER_BYTES, segment.first_lsn, note + problem, crc_ok=not problem)
        last_lsn, end, whole, sealed = segment.base_lsn, HEADER_BYTES, True, False
        for found in walk_frames(data, segment):
            if isinstance(found, DamagedStretch):
                yield self._damaged(found.start, found.end, str(found.error))
                whole = False
                end = found.end
                continue
            yield _dump_frame(path.name, data, *found, self._names)
            last_lsn = max(last_lsn, found.header.lsn)
            sealed = found.header.kind == KIND_FOOTER
            end = found.offset + found.header.frame_bytes
        if whole and not sealed and not may_be_tail and not segment.replaces:
            whole = False
            yield self._damaged(end, len(data), "a footer is missing at the segment's end")
        self.last_lsn = last_lsn if whole else None

    def _header(self, size: int, first_lsn: int, note: str, *, crc_ok: bool) -> DumpedFrame:
        return DumpedFrame(self._path.name, 0, "header", first_lsn, "", 0, size, crc_ok, note)

    def _damaged(self, start: int, end: int, note: str) -> DumpedFrame:
        return DumpedFrame(self._path.name, start, "damaged", 0, "", 0, end - start, False, note)


def _dump_frame(file: str, data: memoryview, offset: int, header: FrameHeader, names: dict[bytes, str]) -> DumpedFrame:
    payload = data[offset + FRAME_HEADER_BYTES :][: header.payload_bytes]
    note = ""
    if header.kind == KIND_TABLE:
        try:
            names[header.table_uuid] = str(TableInfo.from_bytes(bytes(payload)).name)
        except ValueError as error:
            note = str(error)
    elif header.kind in (KIND_GROUP, KIND_FOOTER):
        mark = parse_mark(data, offset, header)
        note = f"synced through {mark.synced_through}" if mark is not None else "an unknown payload"
    elif header.key_bytes:
        key = data[offset + FRAME_HEADER_BYTES + header.payload_bytes :][: header.key_bytes]
        note = f"key {bytes(key).decode(errors='backslashreplace')}"
    table = ""
    if any(header.table_uuid):
        table = names.get(header.table_uuid) or str(UUID(bytes=header.table_uuid))
    kind = _KIND_WORDS.get(header.kind, f"kind {header.kind}")
    return DumpedFrame(file, offset, kind, header.lsn, table, header.rows, header.frame_bytes, True, note)


def verify_log(directory: Path, disk: Disk) -> LogReport:
    """Judge a log as the next start would, reading all of it and changing nothing.

    Args:
        directory: the log's directory; nothing should write to it meanwhile.
        disk: its file system.

    Raises:
        OSError: it cannot be read.
    """
    problems: list[str] = []
    seal = state = None
    notes: tuple[str, ...] = ()
    try:
        slots = read_slots(directory, disk) or []
        state = newest_slot(slots)
        damaged = [slot.detail for slot in slots if isinstance(slot, DataCorruption)]
        if state is None:
            problems.extend(damaged[-1:])
        else:
            # The other slot says the same or is a write behind: a start goes on and writes both.
            notes = tuple(damaged)
    except ArkaError as error:
        problems.append(error.detail)
    sealed = True
    try:
        seal = read_seal(disk, directory)
    except ArkaError as error:
        sealed = False
        problems.append(error.detail)
    headers: dict[int, SegmentHeader] = {}
    unreadable: dict[int, SegmentReport] = {}
    log_uuid = state.log_uuid if state is not None else None
    if seal is not None:
        log_uuid = log_uuid or seal.log_uuid
        if seal.log_uuid != log_uuid:
            problems.append(_seal_problem(directory, 16, f"log {log_uuid}", f"log {seal.log_uuid}"))
    if log_uuid is not None:
        try:
            read_committed(directory, disk, log_uuid)
        except ArkaError as error:
            problems.append(error.detail)
    paths = dict(list_segments(directory, disk))
    for number, path in paths.items():
        try:
            header = SegmentHeader.from_bytes(str(path), disk.map(path))
            log_uuid = log_uuid or header.log_uuid
            header.check_is(str(path), log_uuid, number)
        except ArkaError as error:
            unreadable[number] = SegmentReport(path.name, number, 0, "sealed", 0, 0, 0, None, error.detail)
            continue
        headers[number] = header
    replaced = {header.replaces for header in headers.values()}
    # The next start finishes the removal of what is forgotten.
    forgotten = {number for number in paths if seal is not None and seal.forgets(number)} - replaced
    headers = {number: header for number, header in headers.items() if number not in forgotten}
    reports = _judge_segments(paths, disk, headers, unreadable, seal)
    problems.extend(report.problem for report in reports if report.problem is not None)
    if sealed:
        present = paths.keys() | replaced
        problems.extend(error.detail for error in find_unnamed(directory, seal, present))
    if seal is not None and not unreadable and seal.segment >= max(headers, default=0):
        last_lsn = max((report.last_lsn for report in reports), default=0)
        if last_lsn not in (0, seal.last_lsn):
            problems.append(_seal_problem(directory, 48, f"last LSN {last_lsn}", f"{seal.last_lsn}"))
    return LogReport(log_uuid, state, seal, tuple(reports), tuple(problems), notes)


def _seal_problem(directory: Path, offset: int, expected: str, found: str) -> str:
    return DataCorruption(str(directory / SEAL_NAME), offset, expected, found).detail


def _judge_segments(
    paths: dict[int, Path],
    disk: Disk,
    headers: dict[int, SegmentHeader],
    unreadable: dict[int, SegmentReport],
    seal: SealMark | None,
) -> list[SegmentReport]:
    replaced = {header.replaces for header in headers.values()}
    last = max(headers, default=0)
    tail = may_have_tail(headers.get(last), seal.segment if seal is not None else 0)
    reports = []
    base: int | None = None
    for number in sorted(headers.keys() | unreadable.keys()):
        if number in unreadable:
            reports.append(unreadable[number])
            base = None
            continue
        header, path = headers[number], paths[number]
        if number in replaced:
            reports.append(SegmentReport(path.name, number, header.epoch, "replaced", 0, 0, 0, None, None))
            continue
        report, end_lsn = _judge(path, disk.map(path), header, base, is_tail=tail and number == last)
        reports.append(report)
        base = end_lsn
    return reports


def _judge(
    path: Path, data: memoryview, header: SegmentHeader, base: int | None, *, is_tail: bool
) -> tuple[SegmentReport, int | None]:
    """Judge one segment; returns the last LSN behind it too, None if it cannot be told."""
    scan = SegmentScan(str(path), data, header.log_uuid, header.number)
    torn = problem = None
    frames = 0
    try:
        scan.check_follows(base)
        for _ in scan.frames():
            frames += 1
        if is_tail:
            torn = scan.find_torn()
        else:
            scan.check_sealed()
    except DataCorruption as error:
        problem = error.detail
    last_lsn = scan.last_lsn if scan.first_lsn else 0
    report = SegmentReport(
        path.name,
        header.number,
        header.epoch,
        "tail" if is_tail else "sealed",
        scan.first_lsn,
        last_lsn,
        frames,
        torn,
        problem,
    )
    return report, None if problem else scan.last_lsn


__all__ = ["DumpedFrame", "LogReport", "SegmentReport", "dump_log", "verify_log"]
