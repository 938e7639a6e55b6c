"""A catalog without processes or files: for simulations on a virtual clock.

Owns: tables in memory that behave as ``ports.Catalog`` promises, and the faults that a test can plan. Passes
the same conformance suite as the real adapter (``arka.testing.conformance_catalog``).

Everything runs in the caller's task, so that ``trio.testing.MockClock`` sees every pause.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count
from typing import Protocol, TypeVar
from uuid import UUID, uuid4

import pyarrow as pa
import trio

from arka.errors import ArkaError, ErrorCode, InternalError, InvalidRequest
from arka.iceberg.align import align_batch, misfit
from arka.iceberg.control import new_properties
from arka.iceberg.frames import FrameRows
from arka.iceberg.partition import new_partition_spec, partition_fields
from arka.iceberg.scan import check_columns, scan_notes
from arka.iceberg.schema import arrow_schema, field_id, new_iceberg_schema
from arka.iceberg.timestamps import time_after
from arka.lineage import CommitMark
from arka.records import Operation, TableDefinition, TableInfo, TableName, TableType
from arka.storage.ports import (
    Answer,
    CatalogConflict,
    CatalogListing,
    CatalogTable,
    CatalogUnavailable,
    CommitJob,
    CommitOutcome,
    CommitResult,
    ReadJob,
    SchemaMisfit,
    SegmentSlice,
    StagedFile,
    StagedFiles,
    StagedFilesMissing,
    TableExists,
    TableFrames,
    TableMissing,
    Unusable,
    UnwritableRows,
)
from arka.tableproperties import MERGE, MERGE_FIRST
from arka.testing.answers import send_table


class BatchFrame(Protocol):
    """What the catalog needs of a frame's header."""

    @property
    def lsn(self) -> int:
        """The frame's LSN."""
        ...

    @property
    def schema_id(self) -> int:
        """The schema that the frame was accepted under."""
        ...

    @property
    def operation(self) -> int:
        """What it does with its rows."""
        ...


T = TypeVar("T")

#: Reads the frames of a slice of one log's segment.
ReadFrames = Callable[[SegmentSlice, UUID], Iterable[tuple[BatchFrame, pa.Buffer]]]


class FaultKind(Enum):
    """What befalls one call."""

    #: CatalogUnavailable, and nothing happened.
    REFUSED = "refused"
    #: it happened, and then CatalogUnavailable.
    LOST_RESPONSE = "lost_response"
    #: it takes ``delay_s`` longer.
    SLOW = "slow"


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault.

    Attributes:
        call: the method's name: ``commit``, ``encode``, ``create_table``, …
        kind: what happens.
        delay_s: for ``SLOW``.
    """

    call: str
    kind: FaultKind
    delay_s: float = 0.0


@dataclass(slots=True)
class _SimTable:
    info: TableInfo
    marks: dict[UUID, CommitMark] = field(default_factory=dict)
    snapshots: list[int] = field(default_factory=list)
    #: When each snapshot was made, as its metadata says, in milliseconds.
    times: list[int] = field(default_factory=list)
    commits: dict[UUID, int] = field(default_factory=dict)
    #: Everything that was ever committed, in order, foreign rows included.
    changes: list[FrameRows] = field(default_factory=list)
    #: By log and LSN of a commit, how many of the changes it ends, and the table at its snapshot.
    ends: dict[tuple[UUID, int], tuple[int, TableInfo]] = field(default_factory=dict)
    #: The last schema id and field id that were given.
    last_schema_id: int = 0
    last_field_id: int = 0

    def describe(self) -> CatalogTable:
        marks = tuple(self.marks[log] for log in sorted(self.marks))
        return CatalogTable(self.info, marks, self.snapshots[-1] if self.snapshots else None)


class SimCatalog:
    """``ports.Catalog`` in memory.

    Args:
        read_frames: reads the frames of a slice, as ``arka.wal.segment.read_slice`` does; raises
            DataCorruption where it would.
        latency_s: what each call takes; half of it before it takes effect, half after, so that a call
            cancelled on its way may or may not have happened.

    Attributes:
        calls: the name of each call so far.
        unreadable: tables whose metadata nobody can read for now.
        unusable: tables that others made something of that Arka cannot write, and what.
    """

    def __init__(self, read_frames: ReadFrames, *, latency_s: float = 0.0) -> None:
        self._read_frames = read_frames
        self._latency_s = latency_s
        self._tables: dict[TableName, _SimTable] = {}
        self._staged: dict[str, list[FrameRows]] = {}
        self._faults: deque[Fault] = deque()
        self._snapshot_ids = count(1_000)
        self.calls: list[str] = []
        self.unreadable: set[TableName] = set()
        self.unusable: dict[TableName, str] = {}
        #: Values of a column ``id`` whose rows cannot be written (R32).
        self.poison: set[int] = set()
        #: Most frames that one encode job writes; 0 for any number.
        self.most_written = 0

    # What a test does to the world.

    def plan(self, *faults: Fault) -> None:
        """Let faults befall the next calls of their names, each once, in this order."""
        self._faults.extend(faults)

    def set_mark(self, name: TableName, mark: CommitMark) -> None:
        """Move a table's mark, as another process of the same log would."""
        self._tables[name].marks[mark.log_uuid] = mark

    def foreign_append(self, name: TableName, batch: pa.RecordBatch) -> None:
        """Add a snapshot of another writer."""
        table = self._tables[name]
        table.changes.append(FrameRows(align_batch(batch, table.info.schema), batch.nbytes, Operation.UPSERT, 0))
        table.snapshots.append(next(self._snapshot_ids))
        table.times.append(time_after(table.times[-1] if table.times else 0))

    def foreign_schema(self, name: TableName, change: Callable[[pa.Schema, Callable[[], int]], pa.Schema]) -> None:
        """Let another writer give a table another schema.

        Args:
            name: the table's.
            change: makes the schema of the one that is; a field is the same one while its id is. The second argument
                gives ids for new ones.
        """
        table = self._tables[name]

        def new_id() -> int:
            table.last_field_id += 1
            return table.last_field_id

        schema = change(table.info.schema, new_id)
        names = {field_id(column): column.name for column in schema}
        keys = {column.name: field_id(column) for column in table.info.schema}
        table.last_schema_id += 1
        table.info = replace(
            table.info,
            schema=schema,
            schema_id=table.last_schema_id,
            key_columns=tuple(names[keys[key]] for key in table.info.key_columns),
        )

    def foreign_properties(self, name: TableName, properties: Mapping[str, str]) -> None:
        """Let another client set properties of a table."""
        table = self._tables[name]
        table.info = replace(table.info, properties={**table.info.properties, **properties})

    def rename(self, name: TableName, new: TableName) -> None:
        """Let others rename a table, also to a name that is none for Arka."""
        table = self._tables.pop(name)
        table.info = replace(table.info, name=new)
        self._tables[new] = table

    def register(self, name: TableName, second: TableName) -> None:
        """Let others register a table's current metadata under a second name; from then on each goes its own way."""
        table = self._tables[name]
        self._tables[second] = replace(
            table,
            info=replace(table.info, name=second),
            marks=dict(table.marks),
            snapshots=list(table.snapshots),
            times=list(table.times),
            commits=dict(table.commits),
            changes=list(table.changes),
            ends=dict(table.ends),
        )

    def remove(self, name: TableName) -> None:
        """Drop a table behind everybody's back."""
        del self._tables[name]

    def rows(self, name: TableName) -> pa.Table:
        """Return the rows that any reader would find, in the order in which they were committed."""
        table = self._tables[name]
        return _fold(table.info, table.changes)

    # ports.Catalog.

    async def create_table(self, definition: TableDefinition, location_suffix: str) -> CatalogTable:
        """See ``ports.Catalog.create_table``."""
        return await self._call("create_table", lambda: self._create(definition, location_suffix))

    async def drop_table(self, name: TableName, uuid: UUID, *, purge: bool) -> None:
        """See ``ports.Catalog.drop_table``; there are no files, so ``purge`` changes nothing."""
        del purge
        await self._call("drop_table", lambda: self._drop(name, uuid))

    async def forget_others(self, tables: frozenset[UUID]) -> None:
        """See ``ports.Catalog.forget_others``; nothing is kept."""
        del tables
        await self._call("forget_others", lambda: None)

    async def load_table(self, name: TableName) -> CatalogTable:
        """See ``ports.Catalog.load_table``."""
        return await self._call("load_table", lambda: self._find(name, usable=True).describe())

    async def list_tables(self) -> CatalogListing:
        """See ``ports.Catalog.list_tables``."""
        return await self._call("list_tables", self._list)

    async def encode(self, job: TableFrames, *, fresh: bool = False) -> StagedFiles:
        """See ``ports.Catalog.encode``; there are no processes, so ``fresh`` changes nothing."""
        del fresh
        return await self._call("encode", lambda: self._encode(job))

    async def commit(self, job: CommitJob) -> CommitResult:
        """See ``ports.Catalog.commit``."""
        return await self._call("commit", lambda: self._commit(job))

    async def look_at(self, table: TableInfo) -> None:
        """See ``ports.Catalog.look_at``."""
        await self._call("look_at", lambda: self._look_at(table))

    async def scan(self, job: ReadJob, answer: Answer) -> int:
        """See ``ports.Catalog.scan``; there are no files of a snapshot, so nothing can go while it is sent."""
        # A matter of the local disk: the catalog is not asked.
        tail = [] if job.tail is None else list(self._frames(job.tail))
        await answer.tail_copied()
        found = await self._call("scan", lambda: self._scan(job, tail))
        await send_table(found, answer)
        return int(found.num_rows)

    def clear_staged(self) -> int:
        """Delete, as others do, every file that no snapshot names; returns how many files there were."""
        cleared = len(self._staged)
        self._staged.clear()
        return cleared

    async def _call(self, name: str, effect: Callable[[], T]) -> T:
        self.calls.append(name)
        fault = next((planned for planned in self._faults if planned.call == name), None)
        if fault is not None:
            self._faults.remove(fault)
        kind = fault.kind if fault else None
        slower_s = fault.delay_s if fault else 0.0
        await trio.sleep(self._latency_s / 2 + slower_s)
        if kind is FaultKind.REFUSED:
            raise CatalogUnavailable(f"{name}: planned fault: refused")
        result = effect()
        await trio.sleep(self._latency_s / 2)
        if kind is FaultKind.LOST_RESPONSE:
            raise CatalogUnavailable(f"{name}: planned fault: the response is lost")
        return result

    def _list(self) -> CatalogListing:
        unusable = {
            self._tables[name].info.uuid: Unusable(name, reason)
            for name, reason in self.unusable.items()
            if name in self._tables
        }
        found = []
        for name in sorted(self._tables.keys() - self.unreadable - self.unusable.keys()):
            try:
                TableName.from_parts(list(name))
                found.append(self._tables[name].describe())
            except InvalidRequest as error:
                unusable[self._tables[name].info.uuid] = Unusable(name, error.detail, spelled=False)
        return CatalogListing(tuple(found), frozenset(self._tables.keys() & self.unreadable), unusable)

    def _check_readable(self, name: TableName) -> None:
        if name in self.unreadable:
            raise CatalogUnavailable(f"{name}: its metadata cannot be read")

    def _check_usable(self, name: TableName) -> None:
        if name in self.unusable:
            raise CatalogConflict(self.unusable[name])

    def _find(self, name: TableName, *, usable: bool = False) -> _SimTable:
        table = self._tables.get(name)
        if table is None:
            raise TableMissing(f"Table not found: {name}")
        self._check_readable(name)
        if usable:
            self._check_usable(name)
        return table

    def _find_same(self, name: TableName, uuid: UUID) -> _SimTable:
        table = self._find(name)
        if table.info.uuid != uuid:
            raise TableMissing(f"Table not found: {name} with UUID {uuid}")
        return table

    def _look_at(self, table: TableInfo) -> None:
        self._find_same(table.name, table.uuid)

    def _create(self, definition: TableDefinition, location_suffix: str) -> CatalogTable:
        schema = new_iceberg_schema(definition.schema, definition.key_columns)
        spec = new_partition_spec(schema, definition.partition)
        properties = new_properties(definition)
        if definition.name in self._tables:
            raise TableExists(f"Table already exists: {definition.name}")
        info = TableInfo(
            uuid=uuid4(),
            name=definition.name,
            schema=arrow_schema(schema),
            schema_id=0,
            table_type=definition.table_type,
            key_columns=definition.key_columns,
            spec_id=0,
            partition=partition_fields(spec),
            location=f"sim:///{definition.name.namespace}/{definition.name.name}-{location_suffix}",
            properties=properties,
        )
        self._tables[definition.name] = _SimTable(info, last_field_id=schema.highest_field_id)
        return self._tables[definition.name].describe()

    def _drop(self, name: TableName, uuid: UUID) -> None:
        self._find_same(name, uuid)
        del self._tables[name]

    def _encode(self, job: TableFrames) -> StagedFiles:
        frames = list(self._frames(job))
        through_lsn = job.through_lsn
        if 0 < self.most_written < len(frames):
            # As an encode job whose frames have very many partitions: it ends before its last frame.
            frames = frames[: self.most_written]
            through_lsn = frames[-1].lsn
        for frame in frames:
            # Of append-only tables: a delete names others' rows.
            if (
                self.poison
                and job.table.table_type is TableType.APPEND_ONLY
                and not self.poison.isdisjoint(frame.batch.column("id").to_pylist())
            ):
                raise UnwritableRows(f"the rows of LSN {frame.lsn} cannot be written")
        rows = sum(frame.batch.num_rows for frame in frames)
        if rows == 0:
            return StagedFiles(job.after_lsn, through_lsn, (), 0, frames=len(frames))
        path = f"{job.table.location}/data/{uuid4()}.parquet"
        self._staged[path] = frames
        file = StagedFile(path, (), job.table.spec_id, rows, sum(frame.size for frame in frames), {})
        return StagedFiles(job.after_lsn, through_lsn, (file,), rows, frames=len(frames))

    def _frames(self, job: TableFrames) -> Iterator[FrameRows]:
        schemas = {number: pa.ipc.read_schema(pa.py_buffer(data)) for number, data in job.schemas.items()}
        last = job.after_lsn
        for piece in job.slices:
            for header, message in self._read_frames(piece, job.log_uuid):
                if not last < header.lsn <= job.through_lsn:
                    raise InternalError(f"LSN {header.lsn} is not in ({last}, {job.through_lsn}]")
                last = header.lsn
                operation = Operation(header.operation)
                schema = job.table.frame_schema(operation, schemas[header.schema_id])
                batch = align_batch(pa.ipc.read_record_batch(message, schema), job.table.frame_schema(operation))
                yield FrameRows(batch, batch.nbytes, operation, header.lsn)

    def _commit(self, job: CommitJob) -> CommitResult:
        table = self._tables.get(job.table.name)
        if table is None or table.info.uuid != job.table.uuid:
            return CommitResult(CommitOutcome.TABLE_GONE, 0, None)
        self._check_readable(job.table.name)
        self._check_usable(job.table.name)
        current = table.snapshots[-1] if table.snapshots else None
        mark = table.marks.get(job.log_uuid, CommitMark(job.log_uuid, 0, 0))
        if mark.epoch > job.epoch:
            return CommitResult(CommitOutcome.FENCED, mark.committed_lsn, current, table.describe())
        objection = job.lineage.objection(job.table.name, job.table.uuid, mark)
        if objection:
            return CommitResult(CommitOutcome.NOT_OURS, mark.committed_lsn, current, table.describe(), detail=objection)
        if mark.committed_lsn >= job.staged.through_lsn:
            snapshot = table.commits.get(job.commit_id, current)
            return CommitResult(CommitOutcome.COMMITTED, mark.committed_lsn, snapshot, table.describe())
        if mark.committed_lsn != job.staged.after_lsn:
            return CommitResult(CommitOutcome.RECUT, mark.committed_lsn, current, table.describe())
        if job.staged.files and (reason := misfit(job.table.schema, table.info.schema)):
            raise SchemaMisfit(reason)
        for file in job.staged.files:
            if file.path not in self._staged:
                raise StagedFilesMissing(file.path)
        for file in job.staged.files:
            table.changes += self._staged[file.path]
        table.ends[job.log_uuid, job.staged.through_lsn] = len(table.changes), table.info
        token = job.lineage.token_for(job.table.uuid, job.epoch, job.staged.through_lsn)
        table.marks[job.log_uuid] = CommitMark(job.log_uuid, job.staged.through_lsn, job.epoch, token)
        table.snapshots.append(next(self._snapshot_ids))
        table.times.append(time_after(table.times[-1] if table.times else 0))
        table.commits[job.commit_id] = table.snapshots[-1]
        return CommitResult(CommitOutcome.COMMITTED, job.staged.through_lsn, table.snapshots[-1], table.describe())

    def _scan(self, job: ReadJob, tail: Sequence[FrameRows]) -> pa.Table:
        table = self._find_same(job.table.name, job.table.uuid)
        described = table.describe()
        lsn = described.committed_lsn(job.log_uuid)
        objection = job.objection(described.mark_of(job.log_uuid))
        if objection and job.needs_mark:
            raise ArkaError(objection, code=ErrorCode.TABLE_STOPPED)
        marks = [mark for mark in described.marks if not objection or mark.log_uuid != job.log_uuid]
        info, changes = table.info, table.changes
        if job.at_lsn is not None and job.at_lsn <= lsn:
            end, then = table.ends.get((job.log_uuid, job.at_lsn), (len(changes), info))
            if job.at_lsn < lsn and (job.log_uuid, job.at_lsn) not in table.ends:
                raise ArkaError(f"no retained snapshot ends at {job.at_lsn}", code=ErrorCode.OUT_OF_RANGE)
            changes, info = changes[:end] if job.at_lsn < lsn else changes, then
        elif job.tail is not None:
            added = (frame for frame in tail if frame.lsn not in job.tail.without)
            changes = changes + [frame for frame in added if frame.lsn > lsn]
        schema = check_columns(job.table.name, info.schema, job.columns)
        schema = schema.with_metadata(scan_notes(marks, described.snapshot_id))
        return _fold(info, changes).select(schema.names).slice(0, job.limit).cast(schema)


def _fold(info: TableInfo, changes: Sequence[FrameRows]) -> pa.Table:
    """What a table holds after some changes, as a dictionary has it; each column is found by its field id."""
    if info.table_type is TableType.APPEND_ONLY:
        return pa.Table.from_batches(
            [align_batch(change.batch, info.schema, strict=False) for change in changes], schema=info.schema
        )
    first = info.properties.get(MERGE) == MERGE_FIRST
    rows: dict[tuple[object, ...], dict[str, object]] = {}
    for change in changes:
        for row in align_batch(change.batch, info.frame_schema(change.operation), strict=False).to_pylist():
            key = tuple(row[name] for name in info.key_columns)
            if change.operation is Operation.DELETE:
                rows.pop(key, None)
            elif not (first and key in rows):
                rows[key] = row
    return pa.Table.from_pylist(list(rows.values()), schema=info.schema)


__all__ = ["BatchFrame", "Fault", "FaultKind", "ReadFrames", "SimCatalog"]
