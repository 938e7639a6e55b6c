"""What is left of a log: which frames are intact, what is damaged, and which LSNs are missing for it.

Owns: the judgement of a log that a start refuses, without refusing anything. Changes nothing; copies nothing
(``salvage``). Blocking: for a command, not for the server. Reads mapped files segment by segment, and keeps
ranges of LSNs, not LSNs, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from arka._core.framing import KIND_BATCH, KIND_FOOTER, KIND_TABLE, FrameHeader, last_nonzero
from arka.errors import DataCorruption
from arka.records import TableInfo
from arka.storage.ports import Disk
from arka.wal.logstate import LogState, newest_slot, read_slots
from arka.wal.named import find_unnamed
from arka.wal.scan import marks_behind, may_have_tail
from arka.wal.seal import SEAL_NAME, SealMark, read_seal
from arka.wal.segment import (
    FRAME_HEADER_BYTES,
    Footer,
    SegmentHeader,
    corruption,
    parse_mark,
    parse_segment_name,
    segment_name,
)
from arka.wal.spans import LsnSpan, append_lsn, merge_spans, subtract_spans
from arka.wal.walk import DamagedStretch, FoundFrame, guess_header, list_segments, walk_frames

#: A table at one of its schemas, as frames name it.
TableKey = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class MissingLsns:
    """LSNs that were written, or may have been, and that nothing intact holds.

    Attributes:
        span: which; some of them may never have been given.
        reason: what is damaged or gone.
    """

    span: LsnSpan
    reason: str


@dataclass(frozen=True, slots=True)
class TornEnd:
    """Bytes at the end of an unsealed segment that are no whole frames: never acked, as far as the log can tell."""

    file: str
    offset: int
    size: int
    after_lsn: int


@dataclass(slots=True)
class IntactSegment:
    """A segment with frames that can be read.

    Attributes:
        path: its file.
        header: what its header says, or must have said.
        end: nothing behind it is taken.
        first_lsn: the lowest LSN that is intact; 0 for none.
        last_lsn: the highest.
    """

    path: Path
    header: SegmentHeader
    end: int
    first_lsn: int = 0
    last_lsn: int = 0


@dataclass(slots=True)
class LogSurvey:
    """What was found.

    Attributes:
        directory: the log's directory.
        log_uuid: the log; None if nothing says.
        state: its state, if it can be read.
        seal: its seal mark, if there is one that can be read.
        segments: those with a header that can be read or be told, by number.
        tables: by UUID and schema id, from all TABLE frames of the log.
        intact: the LSNs of intact frames, rising; spans that touch are one.
        missing: rising.
        damaged: every place that is not what it should be.
        torn: what a start would drop.
        epochs: in which segments were written, rising.
    """

    directory: Path
    log_uuid: UUID | None = None
    state: LogState | None = None
    seal: SealMark | None = None
    segments: list[IntactSegment] = field(default_factory=list)
    tables: dict[TableKey, TableInfo] = field(default_factory=dict)
    intact: list[LsnSpan] = field(default_factory=list)
    missing: list[MissingLsns] = field(default_factory=list)
    damaged: list[DataCorruption] = field(default_factory=list)
    torn: list[TornEnd] = field(default_factory=list)

    @property
    def epochs(self) -> list[int]:
        """The epochs in which segments were written, rising."""
        return sorted({segment.header.epoch for segment in self.segments})


def survey_log(directory: Path, disk: Disk) -> LogSurvey:
    """Read all of a log, changing nothing, and say what is intact and what is missing.

    Args:
        directory: the log's directory; nothing should write to it meanwhile.
        disk: its file system.

    Raises:
        ConfigurationError: another version of Arka wrote the log.
        OSError: it cannot be read.
    """
    return _Surveyor(directory, disk).run()


class _Surveyor:
    """One run."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._disk = disk
        self._survey = LogSurvey(directory)
        self._suspects: list[MissingLsns] = []
        # The last LSN that was intact or is accounted for; None while nothing says where the log begins.
        self._last_lsn: int | None = None
        # Why LSNs above _last_lsn may be missing; None when nothing speaks for it.
        self._suspicion: str | None = None
        self._seal_unreadable = False
        # Why LSNs may be missing at the log's end, whatever is intact before; empty for no reason.
        self._newest_gone = ""
        # LSNs of writes whose table no frame has described so far.
        self._undescribed: dict[TableKey, list[LsnSpan]] = {}

    def run(self) -> LogSurvey:
        survey = self._survey
        self._read_state()
        found = self._find_segments()
        self._note_gone(found)
        replaced = {segment.header.replaces for _, segment in found if segment is not None}
        ordinary = [segment for _, segment in found if segment is None or segment.header.number not in replaced]
        last = ordinary[-1] if ordinary else None
        sealed_through = survey.seal.segment if survey.seal is not None else 0
        has_tail = may_have_tail(last.header if last is not None else None, sealed_through)
        for path, segment in found:
            if segment is None:
                self._suspect(f"nothing in {path.name} can be read")
            elif segment.header.number in replaced:
                # A start removes it once it has seen that the copy is whole: its frames count, its damage does not.
                for _ in self._frames(segment, self._disk.map(path), is_tail=True):
                    pass
            else:
                self._read(segment, is_tail=has_tail and segment is last)
        self._read_end(last.header.number if last is not None else 0, has_segments=bool(found))
        for key, spans in self._undescribed.items():
            reason = f"no TABLE frame of table {UUID(bytes=key[0])} with schema {key[1]} is intact"
            self._suspects.extend(MissingLsns(span, reason) for span in spans)
            survey.intact = subtract_spans(survey.intact, spans)
        survey.segments = [segment for _, segment in found if segment is not None]
        survey.intact = merge_spans(survey.intact)
        survey.missing = _find_missing(self._suspects, survey.intact)
        return survey

    # -- what there is ----------------------------------------------------------------------------

    def _read_state(self) -> None:
        survey = self._survey
        slots = self._read_slots()
        survey.damaged.extend(slot for slot in slots if isinstance(slot, DataCorruption))
        survey.state = newest_slot(slots)
        try:
            survey.seal = read_seal(self._disk, survey.directory)
        except DataCorruption as error:
            survey.damaged.append(error)
            self._seal_unreadable = True
        if survey.state is not None:
            survey.log_uuid = survey.state.log_uuid
        elif survey.seal is not None:
            survey.log_uuid = survey.seal.log_uuid

    def _read_slots(self) -> list[LogState | DataCorruption]:
        directory = self._survey.directory
        try:
            slots = read_slots(directory, self._disk)
        except DataCorruption as error:
            return [error]
        return slots or []

    def _note_gone(self, found: list[tuple[Path, IntactSegment | None]]) -> None:
        """Note what the seal mark names and is not there, and from where on the log must hold its LSNs (R39)."""
        seal = self._survey.seal
        present = {segment.header.replaces for _, segment in found if segment is not None}
        present |= {number for path, _ in found if (number := parse_segment_name(path.name)) is not None}
        if not self._seal_unreadable:
            self._survey.damaged.extend(find_unnamed(self._survey.directory, seal, present))
        if seal is None or seal.kept is None:
            return
        # Segments before that one are released.
        self._last_lsn = seal.kept.base_lsn
        if seal.kept.newest and seal.kept.newest not in present and seal.kept.newest > seal.segment:
            self._newest_gone = f"{segment_name(seal.kept.newest)} is gone"

    def _find_segments(self) -> list[tuple[Path, IntactSegment | None]]:
        """Read the headers, or tell what they must have said; by number, None for what nothing tells."""
        survey = self._survey
        found: dict[tuple[int, int], tuple[Path, IntactSegment | None]] = {}
        unreadable: list[tuple[int, Path]] = []
        listed = list_segments(survey.directory, self._disk)
        for number, path in listed:
            data = self._disk.map(path)
            try:
                header = SegmentHeader.from_bytes(str(path), data)
            except DataCorruption as error:
                survey.damaged.append(error)
                unreadable.append((number, path))
                continue
            survey.log_uuid = survey.log_uuid or header.log_uuid
            try:
                header.check_is(str(path), survey.log_uuid, number)
            except DataCorruption as error:
                survey.damaged.append(error)
                if header.log_uuid != survey.log_uuid:
                    found[number, number] = path, None
                    continue
            # Under another name than its own, it still says which segment it is.
            found[header.number, number] = path, IntactSegment(path, header, len(data))
        for number, path in unreadable:
            # Its name says which it is, unless another one has that number and lies under another name.
            free = sorted({known for known, _ in listed} - {known for known, _ in found})
            numbers = [number, *free] if number in free else free or [number]
            segment = self._guess(path, numbers, found)
            found[segment.header.number if segment is not None else numbers[0], number] = path, segment
        replaced = {segment.header.replaces for _, segment in found.values() if segment is not None}
        # The next start finishes the removal of what is forgotten.
        seal = survey.seal
        forgotten = {number for number, _ in listed if seal is not None and seal.forgets(number)} - replaced
        return [found[key] for key in sorted(found) if key[0] not in forgotten]

    def _guess(
        self, path: Path, numbers: list[int], found: dict[tuple[int, int], tuple[Path, IntactSegment | None]]
    ) -> IntactSegment | None:
        """Tell what a header that cannot be read must have said."""
        survey = self._survey
        if survey.log_uuid is None:
            return None
        epochs = {number: segment.header.epoch for (number, _), (_, segment) in found.items() if segment is not None}
        marks = [mark.epoch for mark in (survey.state, survey.seal) if mark is not None]
        data = self._disk.map(path)
        for number in numbers:
            lowest = max((epoch for known, epoch in epochs.items() if known < number), default=1)
            highest = min((epoch for known, epoch in epochs.items() if known > number), default=max([lowest, *marks]))
            header = guess_header(data, survey.log_uuid, number, range(lowest, highest + 1))
            if header is not None:
                return IntactSegment(path, header, len(data))
        return None

    # -- segments ---------------------------------------------------------------------------------

    def _read(self, segment: IntactSegment, *, is_tail: bool) -> None:
        path, header, data = segment.path, segment.header, self._disk.map(segment.path)
        self._check_follows(segment)
        footer = None
        damaged = False
        for found in self._frames(segment, data, is_tail=is_tail):
            if isinstance(found, DamagedStretch):
                damaged = True
                self._survey.damaged.append(corruption(str(path), found.error))
                if footer is None:
                    self._suspect(f"{path.name} is damaged at byte {found.start}")
                continue
            if found.header.lsn:
                self._pass(found.header.lsn)
            elif found.header.kind == KIND_FOOTER:
                footer = parse_mark(data, *found)
                if isinstance(footer, Footer) and (footer.nonce, footer.offset) == (header.nonce, found.offset):
                    self._account(footer.last_lsn, f"{path.name} holds less than its footer says")
        if segment.end < len(data):
            self._note_torn(segment, data)
        if footer is None and is_tail and self._seal_unreadable:
            # It may have said that this segment is sealed: then its end is damaged, not torn.
            self._suspect(f"{path.name} ends without its footer, and the seal mark cannot be read")
        if footer is None and not is_tail:
            if not damaged:
                error = DataCorruption(str(path), segment.end, "a footer at the segment's end", "none")
                self._survey.damaged.append(error)
            self._suspect(f"{path.name} ends without its footer")

    def _frames(
        self, segment: IntactSegment, data: memoryview, *, is_tail: bool
    ) -> Iterator[FoundFrame | DamagedStretch]:
        """Walk a segment, noting its frames; the walk of a tail ends where it is torn."""
        for found in walk_frames(data, segment.header):
            if isinstance(found, FoundFrame):
                self._note_frame(segment, found.offset, found.header, data)
            elif is_tail and not any(
                mark.synced_through > found.start for _, mark in marks_behind(data, found.start, segment.header)
            ):
                segment.end = found.start
                return
            yield found

    def _note_torn(self, segment: IntactSegment, data: memoryview) -> None:
        size = last_nonzero(data, segment.end) + 1 - segment.end
        self._survey.torn.append(TornEnd(segment.path.name, segment.end, size, self._last_lsn or 0))

    def _note_frame(self, segment: IntactSegment, offset: int, header: FrameHeader, data: memoryview) -> None:
        key = (header.table_uuid, header.schema_id)
        if header.kind == KIND_TABLE and key not in self._survey.tables:
            payload = bytes(data[offset + FRAME_HEADER_BYTES :][: header.payload_bytes])
            try:
                self._survey.tables[key] = TableInfo.from_bytes(payload)
            except ValueError as error:
                self._survey.damaged.append(DataCorruption(str(segment.path), offset, "a table record", str(error)))
            else:
                self._undescribed.pop(key, None)
        if not header.lsn:
            return
        if header.lsn <= segment.last_lsn:
            expected = f"an LSN above {segment.last_lsn}"
            self._survey.damaged.append(DataCorruption(str(segment.path), offset, expected, f"LSN {header.lsn}"))
            return
        segment.first_lsn = segment.first_lsn or header.lsn
        segment.last_lsn = header.lsn
        append_lsn(self._survey.intact, header.lsn)
        if header.kind == KIND_BATCH and key not in self._survey.tables:
            append_lsn(self._undescribed.setdefault(key, []), header.lsn)

    # -- the chain of LSNs ------------------------------------------------------------------------

    def _suspect(self, reason: str) -> None:
        """Note that LSNs may be missing from here on."""
        self._suspicion = self._suspicion or reason
        # Where nothing says with which LSN the log began, it may have been the first.
        self._last_lsn = self._last_lsn or 0

    def _check_follows(self, segment: IntactSegment) -> None:
        """Account for what lies between the segment before and this one."""
        header, last_lsn = segment.header, self._last_lsn
        if not header.first_lsn:
            # Its header is damaged, and with it the LSN that it follows upon.
            if last_lsn is not None:
                self._suspect(f"the header of {segment.path.name} is damaged")
        elif last_lsn is None:
            # Older segments were retired.
            self._last_lsn = header.base_lsn
        else:
            if self._suspicion is None and header.base_lsn != last_lsn:
                expected = f"last LSN before it {last_lsn}"
                error = DataCorruption(str(segment.path), 48, expected, f"{header.base_lsn}")
                self._survey.damaged.append(error)
            self._account(header.base_lsn, f"what stood before {segment.path.name} is gone")

    def _pass(self, lsn: int) -> None:
        """Note an intact LSN: what was suspected to be missing lies below it."""
        if self._suspicion is not None:
            self._account(lsn - 1, self._suspicion)
        self._last_lsn = max(self._last_lsn or 0, lsn)

    def _account(self, through_lsn: int, reason: str) -> None:
        """Note that the log had LSNs up to ``through_lsn`` by here; those not seen are missing."""
        last_lsn = self._last_lsn or 0
        if through_lsn > last_lsn:
            self._suspects.append(MissingLsns(LsnSpan(last_lsn + 1, through_lsn), self._suspicion or reason))
            self._last_lsn = through_lsn
        self._suspicion = None

    def _read_end(self, last_number: int, *, has_segments: bool) -> None:
        """Account for what should stand behind the last segment."""
        seal, state = self._survey.seal, self._survey.state
        named = seal is not None and seal.kept is not None
        if seal is not None and seal.segment >= last_number and (has_segments or named):
            if seal.last_lsn != self._last_lsn and self._suspicion is None:
                path = str(self._survey.directory / SEAL_NAME)
                self._survey.damaged.append(DataCorruption(path, 48, f"last LSN {self._last_lsn}", f"{seal.last_lsn}"))
            self._account(seal.last_lsn, "the newest segments are gone")
        if self._newest_gone:
            self._suspect(self._newest_gone)
        if self._suspicion is not None:
            last = state.lsn_ceiling - 1 if state is not None else None
            first = (self._last_lsn or 0) + 1
            if last is None or last >= first:
                self._suspects.append(MissingLsns(LsnSpan(first, last), self._suspicion))


def _find_missing(suspects: list[MissingLsns], intact: list[LsnSpan]) -> list[MissingLsns]:
    """What of the suspected LSNs no segment holds, each once, under the first reason that was found for it."""
    missing: list[MissingLsns] = []
    seen = list(intact)
    for suspect in suspects:
        spans = subtract_spans([suspect.span], seen)
        missing.extend(MissingLsns(span, suspect.reason) for span in spans)
        seen.extend(spans)
    return sorted(missing, key=lambda found: found.span.first)


__all__ = ["IntactSegment", "LogSurvey", "MissingLsns", "TableKey", "TornEnd", "survey_log"]
