"""Turn frames of the log into Parquet files of a table.

Owns: reading frames back as batches, bringing them to the table's schema, sorting rows into partitions
and files. Does not own the frames' format (``arka.wal.segment``) nor the Parquet files' (``parquet``).

A batch of an unpartitioned table is a view of the mapped segment file until Parquet's encoder reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain

import pyarrow as pa

from arka import failpoints
from arka._core.transforms import split_batch
from arka.iceberg.config import CatalogConfig
from arka.iceberg.frames import read_frames
from arka.iceberg.parquet import FileWriter, file_writer
from arka.iceberg.partition import split_fields
from arka.iceberg.stagedkeys import StagedKeys
from arka.records import TableInfo, TableType
from arka.storage.ports import StagedFile, StagedFiles, TableFrames


@dataclass(slots=True)
class _Pending:
    """Rows of one partition that wait for their file: views, in LSN order, and roughly their bytes."""

    values: tuple[object, ...]
    batches: list[pa.RecordBatch] = field(default_factory=list)
    size: float = 0.0


def encode(config: CatalogConfig, job: TableFrames) -> StagedFiles:
    """Write a job's rows into the warehouse.

    Args:
        config: the warehouse and the size of files.
        job: which frames of which table.

    Returns:
        The files: one per partition, more where a partition has more than ``target_file_bytes`` of Arrow
        bytes; the rows of a partition stand in LSN order, from file to file and in each. Of a primary-key table, the
        row that stands for each key, and the run of keys.

    Raises:
        DataCorruption: a frame's CRC does not hold, or its bytes are no batch (R9).
        OSError: the warehouse or the segment file failed.

    Durability: each file is durable on return.
    """
    table = job.table
    writer = file_writer(table, config.properties)
    stem = f"{job.after_lsn + 1}-{job.through_lsn}"
    keys = StagedKeys(config, job) if table.table_type is TableType.PRIMARY_KEY else None
    sorter = _Sorter(table, writer, stem, config.target_file_bytes, keys)
    rows = 0
    with writer.io.batch():
        frames = read_frames(job)
        first = next(frames, None)
        if first is not None:
            frames = chain((first,), frames)
        for batch, size, *_ in frames if keys is None else keys.settle(frames):
            if batch.num_rows:
                rows += batch.num_rows
                sorter.add(batch, size)
        files = sorter.finish()
        failpoints.hit("encode.written")
    failpoints.hit("encode.synced")
    first_lsn = 0 if first is None else first.lsn
    made = StagedFiles(job.after_lsn, job.through_lsn, tuple(files), rows, notes=writer.notes, first_lsn=first_lsn)
    return made if keys is None else replace(made, keys=keys.write(stem), key_check=keys.check)


class _Sorter:
    """Gathers rows per partition and writes a partition out when it has enough for a file.

    One file is open at a time, however many partitions there are.
    """

    def __init__(
        self, table: TableInfo, writer: FileWriter, stem: str, target_bytes: int, keys: StagedKeys | None
    ) -> None:
        self._fields = split_fields(table)
        self._writer = writer
        self._stem = stem
        self._target_bytes = target_bytes
        self._keys = keys
        # By key, not by value: -0.0 equals 0.0, and NaN not even itself.
        self._pending: dict[tuple[object, ...], _Pending] = {}
        self._files: list[StagedFile] = []

    def add(self, batch: pa.RecordBatch, size: float) -> None:
        """Take one batch of about ``size`` Arrow bytes."""
        for values, rows in split_batch(batch, self._fields):
            self._append(values, rows, size * rows.num_rows / batch.num_rows)

    def finish(self) -> list[StagedFile]:
        """Write what is left; return all files."""
        for pending in self._pending.values():
            self._write(pending)
        self._pending.clear()
        return self._files

    def _append(self, values: tuple[object, ...], rows: pa.RecordBatch, size: float) -> None:
        key = tuple(value.hex() if isinstance(value, float) else value for value in values)
        pending = self._pending.setdefault(key, _Pending(values))
        pending.batches.append(rows)
        pending.size += size
        if pending.size >= self._target_bytes:
            del self._pending[key]
            self._write(pending)

    def _write(self, pending: _Pending) -> None:
        stem = f"{self._stem}-{len(self._files):05d}"
        batches = pending.batches
        if self._keys is not None:
            batches = self._keys.take(batches, len(self._files))
        self._files.append(self._writer.write(batches, pending.values, stem))


__all__ = ["encode"]
