"""The live rows of a snapshot, file by file, in batches of a bounded size (T27).

Owns: which files a read opens and when, and how much of one is in memory. Does not own which snapshot it is nor what
becomes of the rows (``arka.iceberg.scan``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.manifest import FileFormat, ManifestContent
from pyiceberg.schema import Schema
from pyiceberg.table import FileScanTask, Table
from pyiceberg.transforms import IdentityTransform

from arka.errors import InternalError
from arka.iceberg.align import align_batch
from arka.iceberg.deletes import live_rows
from arka.iceberg.schema import field_id
from arka.records import FIELD_ID_KEY
from arka.storage.ports import CatalogUnavailable

#: Decoded bytes of a batch, as far as a file says what they will be.
_BATCH_BYTES: Final = 32 * 1024 * 1024
#: Bytes of a row group above which its columns are not read whole. Arka's own have less.
_ROW_GROUP_BYTES: Final = 128 * 1024 * 1024
#: Bytes that are read of such a column at once.
_COLUMN_BYTES: Final = 1024 * 1024
#: Rows that a small limit is raised to, since some may be dead.
_LEAST_ROWS: Final = 1024


def live_batches(
    table: Table,
    snapshot_id: int | None,
    snapshot_schema: Schema,
    schema: pa.Schema,
    batch_rows: int,
    check_wanted: Callable[[], None],
) -> Iterator[pa.RecordBatch]:
    """Yield the live rows of a snapshot.

    Args:
        table: as it was loaded.
        snapshot_id: of the snapshot; None for a table without one.
        snapshot_schema: what it is read with.
        schema: the columns that are wanted, with field ids.
        batch_rows: most rows of a batch.
        check_wanted: called before each file; raises to give up.

    Raises:
        CatalogUnavailable: a file of the snapshot is gone.
        OSError: the warehouse does not answer.
    """
    identities = {
        field.source_id
        for spec in table.specs().values()
        for field in spec.fields
        if isinstance(field.transform, IdentityTransform)
    }
    for task in _plan(table, snapshot_id):
        check_wanted()
        try:
            yield from _file_batches(table, task, snapshot_schema, schema, identities, batch_rows)
        except FileNotFoundError as error:
            raise CatalogUnavailable(
                f"a file of the snapshot is gone ({error}): it was replaced and its time is over, or others "
                "deleted it. Read again"
            ) from error


def _plan(table: Table, snapshot_id: int | None) -> Iterator[FileScanTask]:
    """Yield the files of a snapshot; without delete files, one manifest is in memory at a time."""
    snapshot = None if snapshot_id is None else table.snapshot_by_id(snapshot_id)
    if snapshot is None:
        return
    manifests = snapshot.manifests(table.io)
    if any(manifest.content == ManifestContent.DELETES for manifest in manifests):
        yield from table.scan(snapshot_id=snapshot_id).plan_files()
        return
    for manifest in manifests:
        for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=True):
            yield FileScanTask(entry.data_file)


def _file_batches(
    table: Table,
    task: FileScanTask,
    snapshot_schema: Schema,
    schema: pa.Schema,
    identities: set[int],
    batch_rows: int,
) -> Iterator[pa.RecordBatch]:
    wanted = {field_id(field) for field in schema}
    with table.io.new_input(task.file.file_path).open() as source:
        file = pq.ParquetFile(source)
        ids = {int((f.metadata or {}).get(FIELD_ID_KEY, -1)): f.name for f in file.schema_arrow}
        missing = wanted - ids.keys()
        if -1 in ids or missing & identities:
            # Files that were added as they are, by others: names instead of ids, or columns that
            # exist only as partition values.
            yield from _batches_by_name(table, task, snapshot_schema.select(*schema.names), schema)
            return
        dead = _deleted_rows(table, task)
        names = [ids[number] for number in wanted if number in ids] or [file.schema_arrow.names[0]]
        group_bytes, rows = _largest_group(file.metadata, names)
        if group_bytes > _ROW_GROUP_BYTES:
            file = pq.ParquetFile(source, metadata=file.metadata, buffer_size=_COLUMN_BYTES)
        first = 0
        for batch in file.iter_batches(min(batch_rows, rows), columns=names):
            live = batch if dead is None else batch.filter(live_rows(first, batch.num_rows, dead))
            first += batch.num_rows
            yield align_batch(live, schema, strict=False)


def _largest_group(metadata: pq.FileMetaData, names: Sequence[str]) -> tuple[int, int]:
    """Return the bytes of the largest row group, and how many of its rows, of these columns, make a batch."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max(groups, key=lambda group: group.total_byte_size, default=None)
    if largest is None or not largest.num_rows:
        return 0, 1
    size = largest.total_byte_size
    wanted = set(names)
    if len(wanted) < metadata.num_columns:
        columns = (largest.column(index) for index in range(largest.num_columns))
        read = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in wanted) or size
    else:
        read = size
    return size, max(_BATCH_BYTES * largest.num_rows // max(read, 1), 1)


def _batches_by_name(table: Table, task: FileScanTask, wanted: Schema, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Let pyiceberg read a file; it turns null lists of structs into empty ones."""
    reader = ArrowScan(table.metadata, table.io, wanted, AlwaysTrue())
    for batch in reader.to_record_batches([task]):
        yield batch.select(schema.names).cast(schema)


def _deleted_rows(table: Table, task: FileScanTask) -> pa.Array | None:
    """Return the positions in a file that position deletes name, None if there are none."""
    found = []
    for delete in task.delete_files:
        if delete.file_format != FileFormat.PARQUET:
            raise InternalError(f"{delete.file_path}: {delete.file_format} delete files are not supported")
        with table.io.new_input(delete.file_path).open() as source:
            # One delete file may name very many data files: those of others are passed over while it is read.
            of_file = pc.field("file_path") == task.file.file_path
            rows = pq.read_table(source, columns=["pos"], filters=of_file)
        found.append(rows.column("pos").combine_chunks())
    return pa.concat_arrays([positions.cast(pa.int64()) for positions in found]) if found else None


def rows_for(limit: int | None, batch_rows: int) -> int:
    """Return how many rows a batch should have where a read needs no more than ``limit``."""
    return batch_rows if limit is None else min(batch_rows, max(limit, _LEAST_ROWS))


__all__ = ["live_batches", "rows_for"]
