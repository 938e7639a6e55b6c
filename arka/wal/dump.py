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
    FrameError,
    FrameHeader,
    find_mark,
    first_nonzero,
    parse_header,
    verify_frame,
)
from arka.errors import ArkaError, DataCorruption
from arka.records import TableInfo
from arka.storage.ports import Disk
from arka.wal.scan import SegmentScan, TornBytes, may_have_tail
from arka.wal.seal import SealMark, read_seal
from arka.wal.segment import FRAME_HEADER_BYTES, HEADER_BYTES, SegmentHeader, parse_mark, parse_segment_name

_KIND_WORDS: Final = {
    KIND_BATCH: "batch",
    KIND_TABLE: "table",
    KIND_CREATE: "create",
    KIND_DROP: "drop",
    KIND_LOST: "lost",
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
            segment's header block, or ``damaged``.
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
        seal: the seal mark, if there is one.
        segments: by number.
        problems: everything for which a start would refuse; empty means that it would not.
    """

    log_uuid: UUID | None
    seal: SealMark | None
    segments: tuple[SegmentReport, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether a start would accept the log."""
        return not self.problems


def _numbers(directory: Path, disk: Disk) -> list[tuple[int, Path]]:
    named = ((parse_segment_name(name), directory / name) for name in disk.list_names(directory))
    return sorted((number, path) for number, path in named if number is not None)


def dump_log(directory: Path, disk: Disk) -> Iterator[DumpedFrame]:
    """Yield every frame of every segment, in order; read on behind damage where a group begins again.

    Args:
        directory: the log's directory.
        disk: its file system.

    Raises:
        OSError: it cannot be read.
    """
    for _, path in _numbers(directory, disk):
        yield from _dump_segment(path, disk.map(path))


def _dump_segment(path: Path, data: memoryview) -> Iterator[DumpedFrame]:
    try:
        segment = SegmentHeader.from_bytes(str(path), data)
    except ArkaError as error:
        yield DumpedFrame(path.name, 0, "header", 0, "", 0, min(HEADER_BYTES, len(data)), False, error.detail)
        return
    note = f"log {segment.log_uuid} epoch {segment.epoch} segment {segment.number}"
    if segment.replaces:
        note += f" replaces {segment.replaces}"
    yield DumpedFrame(path.name, 0, "header", segment.first_lsn, "", 0, HEADER_BYTES, True, note)
    names: dict[bytes, str] = {}
    offset = HEADER_BYTES
    while True:
        try:
            header = verify_frame(data, offset, segment.seed)
        except FrameError as error:
            if first_nonzero(data, offset) < 0:
                return
            resume = _next_group(data, offset + 64, segment)
            end = resume if resume is not None else len(data)
            yield DumpedFrame(path.name, offset, "damaged", 0, "", 0, end - offset, False, str(error))
            if resume is None:
                return
            offset = resume
            continue
        yield _dump_frame(path.name, data, offset, header, names)
        offset += header.frame_bytes
        if header.kind == KIND_FOOTER:
            return


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


def _next_group(data: memoryview, start: int, segment: SegmentHeader) -> int | None:
    offset = find_mark(data, start, segment.seed)
    while offset >= 0:
        mark = parse_mark(data, offset, parse_header(data, offset))
        if mark is not None and mark.nonce == segment.nonce:
            return offset
        offset = find_mark(data, offset + 64, segment.seed)
    return None


def verify_log(directory: Path, disk: Disk) -> LogReport:
    """Judge a log as the next start would, reading all of it and changing nothing.

    Args:
        directory: the log's directory; nothing should write to it meanwhile.
        disk: its file system.

    Raises:
        OSError: it cannot be read.
    """
    problems: list[str] = []
    seal = None
    try:
        seal = read_seal(disk, directory)
    except ArkaError as error:
        problems.append(error.detail)
    headers: dict[int, SegmentHeader] = {}
    unreadable: dict[int, SegmentReport] = {}
    log_uuid = seal.log_uuid if seal is not None else None
    for number, path in _numbers(directory, disk):
        try:
            header = SegmentHeader.from_bytes(str(path), disk.map(path))
            log_uuid = log_uuid or header.log_uuid
            header.check_is(str(path), log_uuid, number)
        except ArkaError as error:
            unreadable[number] = SegmentReport(path.name, number, 0, "sealed", 0, 0, 0, None, error.detail)
            continue
        headers[number] = header
    reports = _judge_segments(directory, disk, headers, unreadable, seal)
    problems.extend(report.problem for report in reports if report.problem is not None)
    if seal is not None and not unreadable and seal.segment >= max(headers, default=0):
        last_lsn = max((report.last_lsn for report in reports), default=0)
        if last_lsn not in (0, seal.last_lsn):
            problems.append(f"the seal mark says last LSN {seal.last_lsn}, the segments end at {last_lsn}")
    return LogReport(log_uuid, seal, tuple(reports), tuple(problems))


def _judge_segments(
    directory: Path,
    disk: Disk,
    headers: dict[int, SegmentHeader],
    unreadable: dict[int, SegmentReport],
    seal: SealMark | None,
) -> list[SegmentReport]:
    paths = dict(_numbers(directory, disk))
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
