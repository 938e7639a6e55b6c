"""Read a table's current snapshot into an Arrow IPC stream file.

Owns: the file that DoGet streams from. Does not own the rows above the snapshot (R25).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.manifest import FileFormat
from pyiceberg.table import FileScanTask, Table
from pyiceberg.transforms import IdentityTransform

from arka.errors import InternalError, InvalidRequest
from arka.iceberg.align import align_batch
from arka.iceberg.catalogs import catalog
from arka.iceberg.config import CatalogConfig
from arka.iceberg.deletes import live_rows
from arka.iceberg.marks import committed_lsn_property, marks_of
from arka.iceberg.schema import arrow_schema, field_id
from arka.records import FIELD_ID_KEY, TableInfo, TableName
from arka.storage.ports import CommitMark, TableMissing

#: Schema metadata of the file: the snapshot it holds, absent for a table without one.
SNAPSHOT_KEY = "arka.snapshot-id"


def scan(config: CatalogConfig, info: TableInfo, columns: Sequence[str] | None, limit: int | None, path: str) -> int:
    """Write rows of the current snapshot to a local file.

    Args:
        config: the catalog.
        info: the table; its schema at the catalog, not this one, decides the columns' types.
        columns: names of top-level columns, in the order wanted; None for all.
        limit: most rows; None for all.
        path: the file; replaced.

    Returns:
        The number of rows. The stream's schema is the table's canonical one, with field ids; its metadata
        holds ``arka.snapshot-id`` and each log's ``arka.<log-uuid>.committed-lsn``, taken from the same
        metadata file as the rows (R25).

    Raises:
        TableMissing: no table with that UUID under that name.
        InvalidRequest: a column that the table does not have.
        OSError: the warehouse or the local disk failed.
    """
    try:
        table = catalog(config).load_table(tuple(info.name))
    except (NoSuchTableError, NoSuchNamespaceError) as error:
        raise TableMissing(f"Table not found: {info.name}") from error
    if table.metadata.table_uuid != info.uuid:
        raise TableMissing(f"Table not found: {info.name} with UUID {info.uuid}")
    notes = scan_notes(marks_of(table.metadata.properties), table.metadata.current_snapshot_id)
    schema = check_columns(info.name, arrow_schema(table.schema()), columns).with_metadata(notes)
    rows = 0
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in _batches(table, schema):
            wanted = batch if limit is None else batch.slice(0, limit - rows)
            if wanted.num_rows:
                stream.write_batch(wanted)
                rows += wanted.num_rows
            if limit is not None and rows >= limit:
                break
    return rows


def _batches(table: Table, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the live rows of the current snapshot."""
    wanted = {field_id(field) for field in schema}
    identities = {
        field.source_id
        for spec in table.specs().values()
        for field in spec.fields
        if isinstance(field.transform, IdentityTransform)
    }
    for task in table.scan().plan_files():
        with table.io.new_input(task.file.file_path).open() as source:
            file = pq.ParquetFile(source)
            ids = {int((f.metadata or {}).get(FIELD_ID_KEY, -1)): f.name for f in file.schema_arrow}
            missing = wanted - ids.keys()
            if -1 in ids or missing & identities:
                # Files that were added as they are, by others: names instead of ids, or columns that
                # exist only as partition values.
                yield from _batches_by_name(table, task, schema)
                continue
            dead = _deleted_rows(table, task)
            names = [ids[number] for number in wanted if number in ids]
            first = 0
            for batch in file.iter_batches(columns=names or [file.schema_arrow.names[0]]):
                live = batch if dead is None else batch.filter(live_rows(first, batch.num_rows, dead))
                first += batch.num_rows
                yield align_batch(live, schema)


def _batches_by_name(table: Table, task: FileScanTask, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Let pyiceberg read a file; it turns null lists of structs into empty ones."""
    reader = ArrowScan(table.metadata, table.io, table.schema().select(*schema.names), AlwaysTrue())
    for batch in reader.to_record_batches([task]):
        yield batch.select(schema.names).cast(schema)


def _deleted_rows(table: Table, task: FileScanTask) -> pa.Array | None:
    """Return the positions in a file that position deletes name, None if there are none."""
    found = []
    for delete in task.delete_files:
        if delete.file_format != FileFormat.PARQUET:
            raise InternalError(f"{delete.file_path}: {delete.file_format} delete files are not supported")
        with table.io.new_input(delete.file_path).open() as source:
            rows = pq.read_table(source, columns=["file_path", "pos"])
        found.append(rows.filter(pc.field("file_path") == task.file.file_path).column("pos").combine_chunks())
    return pa.concat_arrays([positions.cast(pa.int64()) for positions in found]) if found else None


def check_columns(name: TableName, schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    """Return the schema of a projection: ``columns`` in the order asked for, or all.

    Raises:
        InvalidRequest: naming each column that the table does not have, or saying that none was asked for.
    """
    if columns is None:
        return schema
    missing = [column for column in columns if schema.get_field_index(column) < 0]
    if missing:
        raise InvalidRequest(f"No such column in {name}: {', '.join(missing)}")
    if not columns or len(set(columns)) < len(columns):
        raise InvalidRequest(f"Columns of {name} must be at least one, each once: found {list(columns)}")
    return pa.schema([schema.field(column) for column in columns])


def scan_notes(marks: Sequence[CommitMark], snapshot_id: int | None) -> dict[str, str]:
    """Return what the file's schema says of the snapshot and of where each log stands in it."""
    notes = {committed_lsn_property(mark.log_uuid): str(mark.committed_lsn) for mark in marks}
    if snapshot_id is not None:
        notes[SNAPSHOT_KEY] = str(snapshot_id)
    return notes


__all__ = ["SNAPSHOT_KEY", "check_columns", "scan", "scan_notes"]
