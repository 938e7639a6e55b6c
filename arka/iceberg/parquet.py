"""Parquet files as Iceberg wants them: field ids, no Arrow schema, statistics from the writer's own footer.

Owns: how batches become one durable data file and the record that a commit needs. Does not own which rows
go into which file (``encode``).

Source: Iceberg table spec, "Parquet" (appendix A) and "Manifests: Data File Fields".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.io.pyarrow import (
    DataFileStatistics,
    compute_statistics_plan,
    data_file_statistics_from_parquet_metadata,
    parquet_path_to_id_mapping,
)
from pyiceberg.partitioning import PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import TableProperties
from pyiceberg.table.locations import LocationProvider, load_location_provider

from arka.iceberg.fileio import WarehouseFileIO, write_file
from arka.iceberg.partition import PartitionFolder, partition_spec
from arka.iceberg.schema import iceberg_schema
from arka.records import TableInfo
from arka.storage.ports import StagedFile

#: Mean rows per batch below which copying batches together is cheaper than a column chunk for each.
_SMALL_BATCH_ROWS: Final = 4_096
#: Rows of a row group; pyiceberg's default.
_ROW_GROUP_ROWS: Final = 1_048_576
#: Rows of a file by which its columns' encodings are chosen.
_SAMPLE_ROWS: Final = 16_384
#: A column of which a sample has fewer values gets a dictionary: there is little to tell, or to lose.
_SAMPLE_LEAST: Final = 1_024
#: Parquet's limit for a dictionary; the encoder gives one up in the middle of a column when it becomes larger.
_DICTIONARY_BYTES: Final = 1 << 20
#: Writers that one worker keeps, each with its statistics plan (about 1 ms to make).
_REMEMBERED_WRITERS: Final = 256
#: Table properties that keep counts in manifests and leave bounds out.
_WITHOUT_BOUNDS: Final = {TableProperties.DEFAULT_WRITE_METRICS_MODE: "counts"}
#: Codecs that every reader of Iceberg tables has, by Iceberg's name and pyarrow's.
_CODECS: Final = {
    "zstd": "zstd",
    "gzip": "gzip",
    "snappy": "snappy",
    "lz4": "lz4",
    "brotli": "brotli",
    "uncompressed": "none",
}


class FileWriter:
    """Writes data files of one table at one schema and spec.

    Args:
        info: the table; its schema is the files' schema.
        io: the warehouse.

    Attributes:
        io: the warehouse; a batch of it makes the files written inside durable together.
    """

    def __init__(self, info: TableInfo, io: WarehouseFileIO) -> None:
        properties = dict(info.properties)
        self.io = io
        self._info = info
        self._schema: Schema = iceberg_schema(info.schema, info.schema_id)
        self._spec: PartitionSpec = partition_spec(info.partition, info.spec_id)
        self._plan = compute_statistics_plan(self._schema, properties)
        self._plan_without_bounds = compute_statistics_plan(self._schema, _WITHOUT_BOUNDS)
        self._ids = parquet_path_to_id_mapping(self._schema)
        self._locations: LocationProvider = load_location_provider(info.location, properties)
        self._options = _writer_options(properties)

    def write(self, batches: Sequence[pa.RecordBatch], partition: tuple[object, ...], stem: str) -> StagedFile:
        """Write one file.

        Args:
            batches: in row order, all in the table's schema, at least one row together; only read.
            partition: one value per partition field, in Iceberg's internal representation.
            stem: begins the file's name; a UUID makes it unique.

        Raises:
            OSError: the warehouse refused; nothing refers to what may be left of the file.

        Durability: the file is durable on return, or at the end of the batch that is open.
        """
        table = pa.Table.from_batches(batches, schema=self._info.schema)
        if len(batches) > 1 and table.num_rows < len(batches) * _SMALL_BATCH_ROWS:
            table = table.combine_chunks()
        sink = pa.BufferOutputStream()
        dictionaries = _dictionary_columns(table, self._ids)
        with pq.ParquetWriter(sink, self._info.schema, use_dictionary=dictionaries, **self._options) as writer:
            writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
        stats = self._statistics(writer.writer.metadata)
        folder = PartitionFolder(self._spec, self._schema, partition) if partition else None
        # The provider only asks a partition key for its path.
        location = self._locations.new_data_location(f"{stem}-{uuid4()}.parquet", folder)  # type: ignore[arg-type]
        size = write_file(self.io, location, sink.getvalue())
        return StagedFile(
            path=location,
            partition=partition,
            spec_id=self._info.spec_id,
            rows=table.num_rows,
            size=size,
            stats=stats.to_serialized_dict(),
        )

    def _statistics(self, footer: pq.FileMetaData) -> DataFileStatistics:
        try:
            return data_file_statistics_from_parquet_metadata(footer, self._plan, self._ids)
        except UnicodeEncodeError:
            # pyiceberg cuts an upper bound and adds one to its last character; behind U+D7FF comes what is no
            # character. The file is as good without bounds: readers open it more often, and find the same rows.
            return data_file_statistics_from_parquet_metadata(footer, self._plan_without_bounds, self._ids)


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


def _writer_options(properties: Mapping[str, str]) -> dict[str, Any]:
    name = properties.get(TableProperties.PARQUET_COMPRESSION, TableProperties.PARQUET_COMPRESSION_DEFAULT)
    # Rows were acknowledged before the codec was looked at: an unknown one must not stop them (R17).
    codec = _CODECS.get(name.lower(), "zstd")
    level = properties.get(TableProperties.PARQUET_COMPRESSION_LEVEL, "")
    return {
        "compression": codec,
        "compression_level": int(level) if level.isdigit() and codec in ("zstd", "gzip", "brotli") else None,
        # With the Arrow schema embedded, readers give back Arrow's types instead of the table's.
        "store_schema": False,
        "store_decimal_as_integer": True,
    }


_writers: OrderedDict[tuple[object, ...], FileWriter] = OrderedDict()


def file_writer(info: TableInfo, properties: tuple[tuple[str, str], ...]) -> FileWriter:
    """Return this process's writer for a table, made at its first use at this schema, spec and properties.

    Args:
        info: the table.
        properties: catalog properties for the warehouse's file access.
    """
    key = (info.uuid, info.schema_id, info.spec_id, info.location, tuple(sorted(info.properties.items())))
    writer = _writers.pop(key, None) or FileWriter(info, WarehouseFileIO(dict(properties)))
    _writers[key] = writer
    if len(_writers) > _REMEMBERED_WRITERS:
        _writers.popitem(last=False)
    return writer


__all__ = ["FileWriter", "file_writer"]
