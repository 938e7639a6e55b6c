"""Frames of the log as batches of a table.

Owns: reading frames back and bringing them to the table's current schema. Does not own their format
(``arka.wal.segment``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from arka.errors import InternalError
from arka.iceberg.align import align_batch
from arka.records import Operation, TableInfo, TableType
from arka.storage.ports import SchemaMisfit, TableFrames
from arka.wal.segment import read_slice


class FrameRows(NamedTuple):
    """A frame as it was read.

    Attributes:
        batch: in the table's current schema; of a delete, the key's columns alone, in the key's order. A view of the
            mapped segment.
        size: bytes of its message in the log.
        operation: what it does with its rows.
        lsn: its LSN.
        table: the table as the frame is written; None: as the job has it.
    """

    batch: pa.RecordBatch
    size: int
    operation: Operation
    lsn: int
    table: TableInfo | None = None


def read_frames(job: TableFrames) -> Iterator[FrameRows]:
    """Yield frames in LSN order.

    Raises:
        DataCorruption: a segment is gone, a frame's CRC does not hold, or its bytes are no batch (R9).
        SchemaMisfit: a write does not fit what others made of the table's columns; it says which and why.
    """
    schemas = {number: pa.ipc.read_schema(pa.py_buffer(data)) for number, data in job.schemas.items()}
    last = job.after_lsn
    for piece in job.slices:
        for header, message in read_slice(piece, job.log_uuid):
            # Invariant: LSNs rise through the slices of a job and stay inside its range.
            if not last < header.lsn <= job.through_lsn:
                raise InternalError(
                    f"{piece.path}: LSN {header.lsn} of table {job.table.name} is not in ({last}, {job.through_lsn}]"
                )
            last = header.lsn
            schema = schemas.get(header.schema_id)
            if schema is None:
                raise InternalError(f"{piece.path}: LSN {header.lsn} uses unknown schema {header.schema_id}")
            target = job.table.schema
            operation = Operation(header.operation)
            if operation is Operation.DELETE:
                if job.table.table_type is not TableType.PRIMARY_KEY:
                    raise InternalError(f"{piece.path}: LSN {header.lsn} deletes rows of a table without a key")
                schema, target = job.table.key_schema(schema), job.table.key_schema()
            batch = pa.ipc.read_record_batch(message, schema)
            try:
                batch = align_batch(batch, target)
            except SchemaMisfit as error:
                raise SchemaMisfit(f"LSN {header.lsn}: {error}") from error
            yield FrameRows(batch, header.payload_bytes, operation, header.lsn)


__all__ = ["FrameRows", "read_frames"]
