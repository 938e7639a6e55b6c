"""Getting a log's intact writes out, wherever it is damaged (R7, R13).

Owns: what ``arka wal salvage`` copies, and its files. Does not own what is intact and what is missing
(``survey``), nor sending writes to a server (``arka.client``). Writes nothing into the log's directory.
Blocking: for a command, not for the server. A write is held at a time, mapped, not read.

Each table gets an Arrow IPC stream for each schema its writes were bound to, and one for its deletes, which hold
the key's columns alone: ``arka.lsn`` says how they go together. Each batch carries ``arka.lsn``,
``arka.operation``, ``arka.accepted_us`` and, if there is one, ``arka.key`` as custom metadata:
``pyarrow.ipc.open_stream(path).read_next_batch_with_custom_metadata()``. ``salvage.json`` is written last.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pyarrow as pa

from arka._core.framing import KIND_BATCH, KIND_CREATE, KIND_DROP, KIND_LOST, FrameHeader
from arka.errors import ConfigurationError, DataCorruption
from arka.privacy import make_file, make_folders
from arka.records import Operation, TableInfo
from arka.storage.ports import Disk
from arka.wal.segment import FRAME_HEADER_BYTES, KIND_ACTIVITY, Activity, parse_lost
from arka.wal.spans import LsnSpan, subtract_spans
from arka.wal.survey import IntactSegment, LogSurvey, TableKey
from arka.wal.walk import FoundFrame, walk_frames

REPORT_NAME: Final = "salvage.json"

#: Of ``salvage.json``.
_REPORT_VERSION: Final = 1

_RECORD_WORDS: Final = {KIND_CREATE: "create", KIND_DROP: "drop", KIND_LOST: "lost", KIND_ACTIVITY: "activity"}


@dataclass(frozen=True, slots=True)
class SalvagedWrite:
    """A client's write that is intact.

    Attributes:
        lsn: its LSN in the log.
        table: its table, at the schema that the batch has.
        operation: upsert or delete.
        key: its idempotency key; empty for none.
        accepted_us: when it was accepted, microseconds since the Unix epoch.
        batch: its rows: a view of the mapped segment, which it keeps mapped.
    """

    lsn: int
    table: TableInfo
    operation: Operation
    key: bytes
    accepted_us: int
    batch: pa.RecordBatch


@dataclass(slots=True)
class SalvagedTable:
    """What was copied of one table at one schema: its rows, or its deletes.

    Attributes:
        table: which.
        file: the file's name.
        writes: how many.
        rows: in all of them.
        keyed: writes with an idempotency key.
        deletes: writes that delete.
        first_lsn: of the first one.
        last_lsn: of the last one.
    """

    table: TableInfo
    file: str
    writes: int = 0
    rows: int = 0
    keyed: int = 0
    deletes: int = 0
    first_lsn: int = 0
    last_lsn: int = 0

    def add(self, write: SalvagedWrite) -> None:
        """Count a write."""
        self.writes += 1
        self.rows += write.batch.num_rows
        self.keyed += bool(write.key)
        self.deletes += write.operation is Operation.DELETE
        self.first_lsn = self.first_lsn or write.lsn
        self.last_lsn = write.lsn


@dataclass(slots=True)
class Salvage:
    """What came out of a log.

    Attributes:
        survey: what the log holds and what it lacks.
        tables: in the order of their first write.
        unreadable: frames whose CRC holds and that are no batch of their table's schema all the same.
    """

    survey: LogSurvey
    tables: list[SalvagedTable] = field(default_factory=list)
    unreadable: list[tuple[int, DataCorruption]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every LSN that the log is known to have held came out."""
        return not self.survey.missing and not self.unreadable


class _Place(NamedTuple):
    """Where an intact frame with an LSN is."""

    lsn: int
    offset: int
    header: FrameHeader
    data: memoryview
    path: Path


class LogReader:
    """Reads the intact writes of a surveyed log, in LSN order.

    Attributes:
        unreadable: LSN and place of frames that the last ``writes`` could not turn into batches.
    """

    def __init__(self, survey: LogSurvey, disk: Disk) -> None:
        """Read from ``disk`` what ``survey`` found."""
        self._survey = survey
        self._disk = disk
        self.unreadable: list[tuple[int, DataCorruption]] = []

    def writes(self) -> Iterator[SalvagedWrite]:
        """Yield every intact write once, in LSN order.

        Raises:
            OSError: the log cannot be read.
        """
        self.unreadable.clear()
        for place in self._places():
            header = place.header
            table = self._survey.tables.get((header.table_uuid, header.schema_id))
            if header.kind != KIND_BATCH or table is None:
                continue
            start = place.offset + FRAME_HEADER_BYTES
            message = place.data[start : start + header.payload_bytes]
            key = place.data[start + header.payload_bytes :][: header.key_bytes]
            try:
                operation = Operation(header.operation)
                batch = pa.ipc.read_record_batch(pa.py_buffer(message), table.frame_schema(operation))
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                found = DataCorruption(str(place.path), place.offset, f"a batch of {table.name}", str(error))
                self.unreadable.append((header.lsn, found))
                continue
            yield SalvagedWrite(header.lsn, table, operation, bytes(key), header.accepted_us, batch)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the log's own records with an LSN: tables created and dropped, ranges lost."""
        for place in self._places():
            word = _RECORD_WORDS.get(place.header.kind)
            if word is not None:
                payload = bytes(place.data[place.offset + FRAME_HEADER_BYTES :][: place.header.payload_bytes])
                yield {"lsn": place.lsn, "kind": word, "payload": _record_payload(place.header.kind, payload)}

    def _places(self) -> Iterator[_Place]:
        """Yield every intact frame with an LSN once, in LSN order."""
        last_lsn = 0
        for group in _overlapping(self._survey.segments):
            for place in heapq.merge(*map(self._segment, group), key=lambda found: found.lsn):
                if place.lsn > last_lsn:
                    last_lsn = place.lsn
                    yield place

    def _segment(self, segment: IntactSegment) -> Iterator[_Place]:
        data = self._disk.map(segment.path)[: segment.end]
        last_lsn = 0
        for found in walk_frames(data, segment.header):
            if isinstance(found, FoundFrame) and found.header.lsn > last_lsn:
                last_lsn = found.header.lsn
                yield _Place(last_lsn, found.offset, found.header, data, segment.path)


def _overlapping(segments: list[IntactSegment]) -> Iterator[list[IntactSegment]]:
    """Group segments that hold the same LSNs: one that recovery had copied already, one that lies there twice."""
    group: list[IntactSegment] = []
    for segment in sorted((found for found in segments if found.first_lsn), key=lambda found: found.first_lsn):
        if group and segment.first_lsn > max(member.last_lsn for member in group):
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _record_payload(kind: int, payload: bytes) -> Any:
    """Show a record's payload; those of tables are MessagePack maps of plain values."""
    try:
        if kind == KIND_LOST:
            return parse_lost(payload)._asdict()
        if kind == KIND_ACTIVITY:
            return msgspec.to_builtins(Activity.from_bytes(payload)._asdict())
        return msgspec.json.decode(msgspec.json.encode(msgspec.msgpack.decode(payload)))
    except (msgspec.MsgspecError, ValueError, TypeError):
        return payload.hex()


def copy_log(survey: LogSurvey, disk: Disk, out: Path) -> Salvage:
    """Copy everything intact into a folder.

    Args:
        survey: the log.
        disk: its file system.
        out: made if it does not exist; not in the log's directory.

    Returns:
        What was copied; also in ``salvage.json``, but for the batches.

    Raises:
        ConfigurationError: ``out`` is not empty, or lies in the log's directory.
        OSError: the log cannot be read, or ``out`` not be written.

    Durability: the files are fsynced on return; without ``salvage.json`` a copy is not complete.
    """
    if out.resolve().is_relative_to(survey.directory.resolve()):
        raise ConfigurationError(f"{out} lies in the log's own directory: choose a folder elsewhere")
    make_folders(out)
    if any(out.iterdir()):
        raise ConfigurationError(f"{out} is not empty: choose a new folder")
    salvage = Salvage(survey)
    reader = LogReader(survey, disk)
    streams: dict[tuple[TableKey, Operation], tuple[SalvagedTable, Any]] = {}
    with ExitStack() as files:
        for write in reader.writes():
            key = ((write.table.uuid.bytes, write.table.schema_id), write.operation)
            if key not in streams:
                entry = SalvagedTable(write.table, _file_name(write, {table.file for table in salvage.tables}))
                salvage.tables.append(entry)
                make_file(out / entry.file)
                sink = files.enter_context(pa.OSFile(str(out / entry.file), "wb"))
                streams[key] = entry, files.enter_context(pa.ipc.new_stream(sink, write.batch.schema))
            entry, stream = streams[key]
            stream.write_batch(write.batch, custom_metadata=_metadata(write))
            entry.add(write)
    salvage.unreadable = list(reader.unreadable)
    make_file(out / REPORT_NAME)
    (out / REPORT_NAME).write_text(json.dumps(_report(salvage, list(reader.records())), indent=2) + "\n")
    for name in [*(table.file for table in salvage.tables), REPORT_NAME]:
        descriptor = os.open(out / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    disk.sync_directory(out)
    return salvage


def _file_name(write: SalvagedWrite, taken: set[str]) -> str:
    """``namespace.name-<first 8 hex digits of the UUID>.arrows``, or ``…-deletes.arrows``.

    The schema's id comes in for a second schema.
    """
    table = write.table
    stem = f"{table.name}-{table.uuid.hex[:8]}"
    if write.operation is Operation.DELETE:
        stem += "-deletes"
    if f"{stem}.arrows" in taken:
        stem += f"-schema{table.schema_id}"
    name, number = f"{stem}.arrows", 2
    while name in taken:
        name, number = f"{stem}-{number}.arrows", number + 1
    return name


def _metadata(write: SalvagedWrite) -> dict[str, str | bytes]:
    found: dict[str, str | bytes] = {
        "arka.lsn": str(write.lsn),
        "arka.operation": write.operation.name.lower(),
        "arka.accepted_us": str(write.accepted_us),
    }
    if write.key:
        found["arka.key"] = write.key
    return found


def _report(salvage: Salvage, records: list[dict[str, Any]]) -> dict[str, Any]:
    survey = salvage.survey
    missing = [{**_span(found.span), "reason": found.reason} for found in survey.missing]
    missing += [{"first": lsn, "last": lsn, "reason": error.detail} for lsn, error in salvage.unreadable]
    unreadable = [LsnSpan(lsn, lsn) for lsn, _ in salvage.unreadable]
    damaged = [*survey.damaged, *(error for _, error in salvage.unreadable)]
    state, seal = survey.state, survey.seal
    return {
        "version": _REPORT_VERSION,
        "source": str(survey.directory.resolve()),
        "complete": salvage.complete,
        "log_uuid": str(survey.log_uuid) if survey.log_uuid is not None else None,
        "epochs": survey.epochs,
        "state": {"epoch": state.epoch, "lsn_ceiling": state.lsn_ceiling} if state is not None else None,
        "seal": {"epoch": seal.epoch, "segment": seal.segment, "last_lsn": seal.last_lsn, "closed": seal.closed}
        if seal is not None
        else None,
        "intact": [_span(span) for span in subtract_spans(survey.intact, unreadable)],
        "missing": missing,
        "damaged": [
            {"file": Path(error.path).name, "offset": error.offset, "expected": error.expected, "found": error.found}
            for error in damaged
        ],
        "torn": [
            {"file": torn.file, "offset": torn.offset, "bytes": torn.size, "after_lsn": torn.after_lsn}
            for torn in survey.torn
        ],
        "tables": [_table(table) for table in salvage.tables],
        "records": records,
    }


def _span(span: LsnSpan) -> dict[str, int | None]:
    return {"first": span.first, "last": span.last}


def _table(copied: SalvagedTable) -> dict[str, Any]:
    table = copied.table
    return {
        "file": copied.file,
        "name": str(table.name),
        "table_uuid": str(table.uuid),
        "schema_id": table.schema_id,
        "table_type": table.table_type.value,
        "primary_key": list(table.key_columns),
        "location": table.location,
        "writes": copied.writes,
        "rows": copied.rows,
        "keyed": copied.keyed,
        "deletes": copied.deletes,
        "first_lsn": copied.first_lsn,
        "last_lsn": copied.last_lsn,
    }


__all__ = ["REPORT_NAME", "LogReader", "Salvage", "SalvagedTable", "SalvagedWrite", "copy_log"]
