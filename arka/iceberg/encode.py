"""Turn frames of the log into Parquet files of a table.

Owns: reading frames back as batches, bringing them to the table's schema, sorting rows into partitions
and files. Does not own the frames' format (``arka.wal.segment``) nor the Parquet files' (``parquet``).

A batch of an unpartitioned table is a view of the mapped segment file until Parquet's encoder reads it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Final, TypeVar
from uuid import uuid4

import pyarrow as pa

from arka import failpoints
from arka._core.transforms import split_batch
from arka.errors import ArkaError
from arka.iceberg.attempts import Journal
from arka.iceberg.config import CatalogConfig
from arka.iceberg.filebudget import MOST_PARTITIONS, FileBudget, PartitionKey, partition_key
from arka.iceberg.filepool import FilePool
from arka.iceberg.frames import read_frames
from arka.iceberg.parquet import FileWriter, file_writer
from arka.iceberg.partition import split_fields
from arka.iceberg.sight import look
from arka.iceberg.stagedkeys import StagedKeys
from arka.records import PartitionField, TableInfo, TableType
from arka.storage.ports import StagedFile, StagedFiles, TableFrames, UnwritableRows

T = TypeVar("T")

#: Rows, roughly their Arrow bytes, and the table as they are written (``FrameRows``).
_Sized = tuple[pa.RecordBatch, float, TableInfo | None]

#: What libraries raise for values that they cannot take. Others, such as AttributeError, are faults of the code.
_DATA_ERRORS: Final = (pa.ArrowException, ValueError, TypeError, ArithmeticError, LookupError, NotImplementedError)


@dataclass(slots=True)
class _Pending:
    """Rows of one partition that wait for their file: views, in LSN order, and roughly their bytes."""

    writer: FileWriter
    values: tuple[object, ...]
    batches: list[pa.RecordBatch] = field(default_factory=list)
    size: float = 0.0


def encode(config: CatalogConfig, job: TableFrames) -> StagedFiles:
    """Write a job's rows into the warehouse.

    Args:
        config: the warehouse and the size of files.
        job: which frames of which table.

    Returns:
        The files of the job's first frames, as a rule of all of them (``FileBudget``): one per partition, more where a
        partition has more than ``target_file_bytes`` of Arrow bytes; the rows of a partition stand in LSN order, from
        file to file and in each. Of a primary-key table, the row that stands for each key, and the run of keys.

    Raises:
        WarehouseChanged: catalog, warehouse or table folder are gone, or others than before (R28).
        DataCorruption: a frame's CRC does not hold (R9).
        UnwritableRows: the rows' own data cannot be written (R32).
        SchemaMisfit: rows do not fit what others made of the table's columns; not a fault of the rows (R24).
        OSError: the warehouse or the segment file failed.

    Durability: each file is durable on return.
    """
    table = job.table
    # Before the first file: nothing is written into the empty mount point of a warehouse that is not mounted.
    places = look(config, table.location)
    writer = file_writer(table, config.properties)
    started = time.monotonic()
    stem = f"{job.after_lsn + 1}-{job.through_lsn}"
    budget = FileBudget(job, config.partitions, MOST_PARTITIONS)
    keys = StagedKeys(config, job) if table.table_type is TableType.PRIMARY_KEY else None
    rows = 0
    # The batch last in, first out: no thread of the pool writes once it is over.
    with Journal(job.journal).open() as journal, writer.io.batch(), FilePool(config.target_file_bytes) as pool:
        name = f"{stem}-{{number:05d}}-{job.attempt or uuid4().hex}"
        sorter = _Sorter(table, writer, config, name, keys, pool, journal)
        frames = budget.take(read_frames(job))
        with own_data():
            first = next(frames, None)
        if first is not None:
            frames = chain((first,), frames)
        if keys is None:
            sized: Iterator[_Sized] = ((frame.batch, float(frame.size), frame.table) for frame in frames)
        else:
            sized = keys.settle(frames)
        for batch, size, under in _guarded(sized):
            if batch.num_rows:
                rows += batch.num_rows
                sorter.add(batch, size, under)
        sorter.finish()
        files = pool.finish()
        used = {file.spec_id for file in files}
        failpoints.hit("encode.written")
    failpoints.hit("encode.synced")
    made = StagedFiles(
        job.after_lsn,
        budget.through_lsn,
        tuple(files),
        rows,
        notes=writer.notes,
        first_lsn=0 if first is None else first.lsn,
        journals=(job.journal,) if job.journal else (),
        places=places,
        frames=budget.frames,
        specs={number: fields for number, fields in sorter.specs().items() if number in used},
    )
    if keys is not None:
        made = replace(made, keys=keys.write(f"{job.after_lsn + 1}-{budget.through_lsn}"), key_check=keys.check)
    ended = time.monotonic()
    return replace(made, took_s=ended - started, made_s=ended)


@contextmanager
def own_data() -> Iterator[None]:
    """Tell errors of rows from those of the machine: only the former may set a write aside (R32).

    To be put around steps that turn rows in memory into other bytes in memory, and around no other.

    Raises:
        UnwritableRows: the rows' own data cannot be written.
    """
    try:
        yield
    except (OSError, MemoryError, ArkaError):
        # A file, the network, too little memory, or one of our own checks.
        raise
    except _DATA_ERRORS as error:
        raise UnwritableRows(f"{type(error).__name__}: {error}") from error


def _guarded(items: Iterable[T]) -> Iterator[T]:
    """Yield what is read from frames; errors of their data become ``UnwritableRows``."""
    iterator = iter(items)
    while True:
        with own_data():
            item = next(iterator, None)
        if item is None:
            return
        yield item


class _Sorter:
    """Gathers rows per partition and has a partition written when it has enough for a file."""

    def __init__(
        self,
        table: TableInfo,
        writer: FileWriter,
        config: CatalogConfig,
        name: str,
        keys: StagedKeys | None,
        pool: FilePool,
        journal: Journal,
    ) -> None:
        self._table = table
        # One for all: its batch makes them durable together.
        self._io = writer.io
        # By spec; what splits a batch, and the writer.
        self._specs = {table.spec_id: (split_fields(table), writer)}
        self._name = name
        self._target_bytes = config.target_file_bytes
        self._keys = keys
        self._pool = pool
        self._journal = journal
        self._pending: dict[PartitionKey, _Pending] = {}

    def add(self, batch: pa.RecordBatch, size: float, under: TableInfo | None = None) -> None:
        """Take one batch of about ``size`` Arrow bytes; ``under``: the table at the spec it is written under."""
        table = under or self._table
        if table.spec_id not in self._specs:
            self._specs[table.spec_id] = split_fields(table), FileWriter(table, self._io)
        fields, writer = self._specs[table.spec_id]
        with own_data():
            parts = split_batch(batch, fields)
        for values, rows in parts:
            self._append(
                partition_key(table.spec_id, values),
                _Pending(writer, values),
                rows,
                size * rows.num_rows / batch.num_rows,
            )

    def specs(self) -> dict[int, tuple[PartitionField, ...]]:
        """The specs of the files, by id."""
        return {number: writer.partition for number, (_, writer) in self._specs.items()}

    def finish(self) -> None:
        """Have what is left written."""
        for pending in self._pending.values():
            self._write(pending)
        self._pending.clear()

    def _append(self, key: PartitionKey, new: _Pending, rows: pa.RecordBatch, size: float) -> None:
        pending = self._pending.setdefault(key, new)
        pending.batches.append(rows)
        pending.size += size
        if pending.size >= self._target_bytes:
            del self._pending[key]
            self._write(pending)

    def _write(self, pending: _Pending) -> None:
        number = self._pool.count
        batches = pending.batches
        if self._keys is not None:
            with own_data():
                batches = self._keys.take(batches, number)
        name = self._name.format(number=number)
        self._pool.submit(pending.size, partial(self._make, pending.writer, batches, pending.values, name))

    def _make(
        self, writer: FileWriter, batches: list[pa.RecordBatch], values: tuple[object, ...], name: str
    ) -> StagedFile:
        """Write one file, in a thread of the pool. Its name is in the journal before it is in the warehouse."""
        with own_data():
            encoded = writer.encode(batches, values, name)
        self._journal.begin(encoded.file.path)
        made = writer.store(encoded)
        self._journal.finished()
        return made


__all__ = ["encode", "own_data"]
