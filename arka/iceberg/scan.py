"""Read a table: a snapshot, and what lies above it in the log, as Arrow messages in a pipe.

Owns: the order of an answer, and which snapshot it begins with. Does not own what frames above it come to (``tail``),
their copies (``tailcopy``) nor the pipe (``outlet``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pyarrow as pa
from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Snapshot

from arka.errors import ArkaError, ErrorCode, InvalidRequest, listed, quote
from arka.iceberg.catalogs import catalog
from arka.iceberg.config import CatalogConfig
from arka.iceberg.control import key_columns
from arka.iceberg.marks import mark_in, marks_of
from arka.iceberg.outlet import PIPE_NAME, Outlet
from arka.iceberg.pieces import pieces
from arka.iceberg.schema import UnsupportedType, arrow_schema
from arka.iceberg.snapshotrows import live_batches, rows_for
from arka.iceberg.tail import open_tail
from arka.iceberg.tailcopy import copied
from arka.records import TableName
from arka.storage.ports import CatalogConflict, CommitMark, ReadJob, SchemaMisfit, TableMissing
from arka.tableproperties import SUMMARY_LAST_LSN, SUMMARY_LOG, committed_lsn_property

#: Schema metadata of the file: the snapshot it holds, absent for a table without one.
SNAPSHOT_KEY = "arka.snapshot-id"


def scan(config: CatalogConfig, job: ReadJob, folder: str) -> int:
    """Send a table's rows through the pipe of a read.

    Args:
        config: the catalog.
        job: what is wanted of which table; its frames must stay in the log until the pipe says that they are copied.
        folder: has the pipe, and gets the copies.

    Returns:
        The number of rows: those of the snapshot first, then those that frames add. The stream's schema is the table's
        canonical one, with field ids; its metadata holds ``arka.snapshot-id`` and each log's
        ``arka.<log-uuid>.committed-lsn``, taken from the same metadata file as the rows (R25).

    Raises:
        TableMissing: no table with that UUID under that name.
        InvalidRequest: a column that the table does not have.
        ArkaError: ``out_of_range``: no retained snapshot ends at ``job.at_lsn``; ``table_stopped``: others have made
            something of the table that Arka cannot work with, or its mark is not to be believed and the answer depends
            on it (``ReadJob.objection``).
        DataCorruption: a frame's CRC does not hold (R9).
        OSError: the warehouse or the local disk failed, or nobody reads the pipe any more.
    """
    try:
        with ExitStack() as held:
            outlet = held.enter_context(Outlet(str(Path(folder) / PIPE_NAME)))
            if job.tail is not None:
                # Before the catalog is asked, which may take long: the log keeps the frames until this is done.
                job = replace(job, tail=held.enter_context(copied(job.tail, folder, outlet.check_wanted)))
            outlet.say_copied()
            return _scan(config, job, outlet)
    except SchemaMisfit as error:
        what = f"{job.table.name} cannot be read now: {error}"
        raise ArkaError(what, code=ErrorCode.TABLE_STOPPED) from error


def _scan(config: CatalogConfig, job: ReadJob, outlet: Outlet) -> int:
    info = job.table
    try:
        table = catalog(config).load_table(tuple(info.name))
    except (NoSuchTableError, NoSuchNamespaceError) as error:
        raise TableMissing(f"Table not found: {info.name}") from error
    if table.metadata.table_uuid != info.uuid:
        raise TableMissing(f"Table not found: {info.name} with UUID {info.uuid}")
    base = _base_of(table, job)
    try:
        whole = arrow_schema(base.schema)
        now = replace(
            info,
            schema=whole,
            key_columns=key_columns(base.schema, table.properties),
            properties=table.properties,
        )
        now.key_schema()
    except (UnsupportedType, CatalogConflict, KeyError) as error:
        what = f"others have made something of {info.name} that cannot be read here: {error}"
        raise ArkaError(what, code=ErrorCode.TABLE_STOPPED) from error
    schema = check_columns(info.name, whole, job.columns)
    stream_schema = schema.with_metadata(scan_notes(base.marks, base.snapshot_id))
    frames = job.tail if base.takes_frames and job.limit != 0 else None
    tail = open_tail(None if frames is None else replace(frames, table=now), base.lsn)
    outlet.begin(stream_schema, job.compression)
    if job.limit == 0:
        return 0
    names = set(schema.names)
    wide = pa.schema([*schema, *(whole.field(name) for name in tail.needs if name not in names)])
    rows = 0
    batch_rows = rows_for(job.limit, tail.batch_rows)
    live = live_batches(table, base.snapshot_id, base.schema, wide, batch_rows, outlet.check_wanted)
    for batch in chain(map(tail.hide, live), tail.rows()):
        outlet.check_wanted()
        # Views of the log and of the snapshot's files alike: the metadata is this answer's.
        chosen = pa.RecordBatch.from_arrays([batch.column(name) for name in schema.names], schema=stream_schema)
        wanted = chosen if job.limit is None else chosen.slice(0, job.limit - rows)
        if wanted.num_rows:
            for piece in pieces(wanted, compressed=job.compression is not None):
                outlet.put(piece)
            rows += wanted.num_rows
        if job.limit is not None and rows >= job.limit:
            break
    return rows


@dataclass(frozen=True, slots=True)
class _Base:
    """The snapshot that an answer begins with.

    Attributes:
        snapshot_id: None for a table without one.
        lsn: it holds the log up to here.
        marks: of all logs, as it holds them.
        takes_frames: whether frames above ``lsn`` belong on top.
        schema: what the answer is read with: the table's, or for a past LSN that of its snapshot.
    """

    snapshot_id: int | None
    lsn: int
    marks: Sequence[CommitMark]
    takes_frames: bool
    schema: Schema


def _base_of(table: Table, job: ReadJob) -> _Base:
    """Choose the snapshot that a read begins with.

    Raises:
        ArkaError: see ``scan``.
    """
    metadata = table.metadata
    marks = marks_of(metadata.properties)
    mark = mark_in(metadata, job.log_uuid)
    objection = job.objection(mark)
    if objection:
        if job.needs_mark:
            # Which of the waiting rows the table holds is not known: rows would be left out, or be there twice.
            raise ArkaError(objection, code=ErrorCode.TABLE_STOPPED)
        # What it holds can be read; up to which LSN of this log that goes cannot be said.
        others = [each for each in marks if each.log_uuid != job.log_uuid]
        return _Base(metadata.current_snapshot_id, 0, others, takes_frames=False, schema=metadata.schema())
    lsn = mark.committed_lsn
    if job.at_lsn is None or job.at_lsn >= lsn:
        # Behind the newest snapshot the table's own schema holds, as for whoever asks without an LSN; at it, the answer
        # stays the same whatever others do to the schema later.
        past = metadata.current_snapshot() if job.at_lsn == lsn else None
        return _Base(metadata.current_snapshot_id, lsn, marks, takes_frames=True, schema=_schema_at(metadata, past))
    snapshot, found = metadata.current_snapshot(), None
    while snapshot is not None:
        notes = {} if snapshot.summary is None else snapshot.summary.additional_properties
        if (notes.get(SUMMARY_LOG), notes.get(SUMMARY_LAST_LSN)) == (str(job.log_uuid), str(job.at_lsn)):
            # The first one is the commit's; others may write its notes into a later snapshot of theirs.
            found = snapshot
        parent_id = snapshot.parent_snapshot_id
        snapshot = None if parent_id is None else metadata.snapshot_by_id(parent_id)
    if found is not None:
        then = [replace(each, committed_lsn=job.at_lsn) for each in marks if each.log_uuid == job.log_uuid]
        return _Base(found.snapshot_id, job.at_lsn, then, takes_frames=False, schema=_schema_at(metadata, found))
    raise ArkaError(
        f"{job.table.name} holds LSN {lsn} in Iceberg and no retained snapshot ends at at_lsn {job.at_lsn}",
        code=ErrorCode.OUT_OF_RANGE,
    )


def _schema_at(metadata: TableMetadata, snapshot: Snapshot | None) -> Schema:
    """The schema that a snapshot was written with; the table's for None, and for one that does not say."""
    if snapshot is not None and snapshot.schema_id is not None:
        written = next((schema for schema in metadata.schemas if schema.schema_id == snapshot.schema_id), None)
        if written is not None:
            return written
    return metadata.schema()


def check_columns(name: TableName, schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    """Return the schema of a projection: ``columns`` in the order asked for, or all.

    Raises:
        InvalidRequest: naming each column that the table does not have, or saying that none was asked for.
    """
    if columns is None:
        return schema
    missing = [column for column in columns if schema.get_field_index(column) < 0]
    if missing:
        raise InvalidRequest(f"No such column in {name}: {listed(map(quote, missing))}")
    if not columns or len(set(columns)) < len(columns):
        raise InvalidRequest(f"Columns of {name} must be at least one, each once: found {listed(map(quote, columns))}")
    return pa.schema([schema.field(column) for column in columns])


def scan_notes(marks: Sequence[CommitMark], snapshot_id: int | None) -> dict[str, str]:
    """Return what the file's schema says of the snapshot and of where each log stands in it."""
    notes = {committed_lsn_property(mark.log_uuid): str(mark.committed_lsn) for mark in marks}
    if snapshot_id is not None:
        notes[SNAPSHOT_KEY] = str(snapshot_id)
    return notes


__all__ = ["SNAPSHOT_KEY", "check_columns", "scan", "scan_notes"]
