"""Parquet files as Iceberg wants them: field ids, no Arrow schema, statistics from the writer's own footer.

Owns: how batches become one durable data file and the record that a commit needs. Does not own which rows
go into which file (``encode``).

Source: Iceberg table spec, "Parquet" (appendix A) and "Manifests: Data File Fields".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.partitioning import PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table.locations import LocationProvider

from arka.iceberg.bounds import ColumnMetrics
from arka.iceberg.fileio import WarehouseFileIO, write_file
from arka.iceberg.locations import table_locations
from arka.iceberg.partition import PartitionFolder, partition_spec
from arka.iceberg.schema import iceberg_schema
from arka.iceberg.tableoptions import SAFE_PARQUET, file_options
from arka.records import TableInfo
from arka.storage.ports import StagedFile

#: Mean rows per batch below which copying batches together is cheaper than a column chunk for each.
_SMALL_BATCH_ROWS: Final = 4_096
#: Rows of a file by which its columns' encodings are chosen.
_SAMPLE_ROWS: Final = 16_384
#: A column of which a sample has fewer values gets a dictionary: there is little to tell, or to lose.
_SAMPLE_LEAST: Final = 1_024
#: Parquet's limit for a dictionary; the encoder gives one up in the middle of a column when it becomes larger.
_DICTIONARY_BYTES: Final = 1 << 20
#: Writers that one worker keeps, each with its statistics plan (about 1 ms to make).
_REMEMBERED_WRITERS: Final = 256
#: What holds for every file. With the Arrow schema embedded, readers give back Arrow's types instead of the table's.
_ALWAYS: Final[Mapping[str, Any]] = {"store_schema": False, "store_decimal_as_integer": True}


class EncodedFile(NamedTuple):
    """A file that is not written yet: what it will be, and its bytes."""

    file: StagedFile
    data: pa.Buffer


class FileWriter:
    """Writes data files of one table at one schema and spec.

    Args:
        info: the table; its schema is the files' schema.
        io: the warehouse.

    Attributes:
        io: the warehouse; a batch of it makes the files written inside durable together.
        notes: which of the table's properties could not be used, and what is used instead.
        partition: the fields of its partition spec.
    """

    def __init__(self, info: TableInfo, io: WarehouseFileIO) -> None:
        properties = dict(info.properties)
        self.io = io
        io.confine(info.location)
        self._info = info
        self._schema: Schema = iceberg_schema(info.schema, info.schema_id)
        self.partition = info.partition
        self._spec: PartitionSpec = partition_spec(info.partition, info.spec_id)
        options = file_options(properties)
        self._metrics = ColumnMetrics(self._schema, options.metrics)
        self._locations: LocationProvider = table_locations(info.location)
        self._parquet = options.parquet
        self._row_group_rows = options.row_group_rows
        self.notes = options.notes

    def write(self, batches: Sequence[pa.RecordBatch], partition: tuple[object, ...], stem: str) -> StagedFile:
        """Encode and store one file; see both.

        Durability: the file is durable on return, or at the end of the batch that is open.
        """
        return self.store(self.encode(batches, partition, stem))

    def encode(self, batches: Sequence[pa.RecordBatch], partition: tuple[object, ...], stem: str) -> EncodedFile:
        """Turn rows into the bytes of one file; nothing is written.

        Args:
            batches: in row order, all in the table's schema, at least one row together; only read.
            partition: one value per partition field, in Iceberg's internal representation.
            stem: the file's name without its ending; unique in the table.

        Raises:
            MemoryError: there is too little.
            Exception: the rows cannot be written as Parquet.
        """
        table = pa.Table.from_batches(batches, schema=self._info.schema)
        if len(batches) > 1 and table.num_rows < len(batches) * _SMALL_BATCH_ROWS:
            table = table.combine_chunks()
        data, footer = self._encode_safely(table)
        folder = PartitionFolder(self._spec, self._schema, partition) if partition else None
        # The provider only asks a partition key for its path.
        location = self._locations.new_data_location(f"{stem}.parquet", folder)  # type: ignore[arg-type]
        file = StagedFile(
            path=location,
            partition=partition,
            spec_id=self._info.spec_id,
            rows=table.num_rows,
            size=data.size,
            stats=self._metrics.of(footer),
        )
        return EncodedFile(file, data)

    def store(self, encoded: EncodedFile) -> StagedFile:
        """Write an encoded file into the warehouse.

        Raises:
            OSError: the warehouse refused; nothing refers to what may be left of the file.

        Durability: the file is durable on return, or at the end of the batch that is open.
        """
        write_file(self.io, encoded.file.path, encoded.data)
        return encoded.file

    def _encode_safely(self, table: pa.Table) -> tuple[pa.Buffer, pq.FileMetaData]:
        """Encode rows; where the table's own options fail, with safe ones (R17)."""
        dictionaries = _dictionary_columns(table, self._metrics.paths)
        try:
            return self._encode_with(table, dictionaries, self._parquet)
        except MemoryError:
            raise
        except Exception as error:
            if self._parquet is SAFE_PARQUET:
                raise
            made = self._encode_with(table, True, SAFE_PARQUET)
            self._parquet = SAFE_PARQUET
            self.notes += (f"the table's Parquet options cannot be used: {error}; zstd and defaults are used instead",)
            return made

    def _encode_with(
        self, table: pa.Table, dictionaries: list[str] | bool, options: Mapping[str, Any]
    ) -> tuple[pa.Buffer, pq.FileMetaData]:
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self._info.schema, use_dictionary=dictionaries, **_ALWAYS, **options) as writer:
            writer.write_table(table, row_group_size=self._row_group_rows)
        return sink.getvalue(), writer.writer.metadata


def _dictionary_columns(table: pa.Table, paths: Iterable[str]) -> list[str]:
    """Choose the columns that get a dictionary: those whose values repeat enough for one of its largest size.

    One for values that hardly repeat is given up on the way: that takes the encoder two thirds longer, and more bytes.

    Args:
        table: the file's rows.
        paths: all of its leaf columns, as Parquet names them.
    """
    sample = table.slice(0, _SAMPLE_ROWS)
    plain = {
        field.name
        for field, column in zip(table.schema, sample.columns, strict=True)
        if _is_countable(field.type) and not _repeats(column, table.num_rows)
    }
    return [path for path in paths if path not in plain]


def _is_countable(kind: pa.DataType) -> bool:
    return bool(pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_binary(kind))


def _repeats(sample: pa.ChunkedArray, rows: int) -> bool:
    """Whether a column's different values would fit a dictionary, as far as a sample of it can tell."""
    count = len(sample) - sample.null_count
    if count < _SAMPLE_LEAST:
        return True
    distinct: float = pc.count_distinct(sample).as_py()
    if len(sample) < rows:
        # As many values as make so many equal pairs likely.
        distinct = max(distinct, count * count / (2 * (count - distinct)) if distinct < count else rows)
    fits: bool = distinct * sample.nbytes <= _DICTIONARY_BYTES * len(sample)
    return fits and 2 * distinct <= rows


_writers: OrderedDict[tuple[object, ...], FileWriter] = OrderedDict()


def file_writer(info: TableInfo, properties: tuple[tuple[str, str], ...]) -> FileWriter:
    """Return this process's writer for a table, made at its first use at this schema, spec and properties.

    Args:
        info: the table.
        properties: catalog properties for the warehouse's file access.
    """
    # Ids alone do not tell: a spec may get the id of one that was removed.
    shape = (info.schema_id, info.spec_id, info.partition)
    key = (info.uuid, *shape, info.location, tuple(sorted(info.properties.items())))
    writer = _writers.pop(key, None) or FileWriter(info, WarehouseFileIO(dict(properties)))
    _writers[key] = writer
    if len(_writers) > _REMEMBERED_WRITERS:
        _writers.popitem(last=False)
    return writer


__all__ = ["FileWriter", "file_writer"]
