"""Values that Arrow, Iceberg and Parquet can hold must never fail the encoder after their ack (R17)."""

from __future__ import annotations

from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arka.iceberg.fileio import WarehouseFileIO
from arka.iceberg.parquet import FileWriter
from arka.records import PartitionField, TableInfo, TableName, TableType


def table(tmp_path, partition=()):
    schema = pa.schema([pa.field("s", pa.string(), metadata={"PARQUET:field_id": "1"})])
    folder = tmp_path / "t-00000000"
    folder.mkdir()
    location = f"file://{folder}"
    return TableInfo(
        uuid4(), TableName("default", "t"), schema, 0, TableType.APPEND_ONLY, (), 0, tuple(partition), location, {}
    )


def rows_of(path):
    return pq.read_table(path.removeprefix("file://"), partitioning=None).column("s").to_pylist()


def test_a_bound_cut_at_the_last_character_before_the_surrogates(tmp_path):
    """The file's largest string is cut at U+D7FF, behind which stands no character: the file is written with it."""
    info = table(tmp_path)
    # The largest: only its bound is cut and raised.
    value = "z" * 15 + "\ud7ff" + "x"
    batch = pa.record_batch([pa.array(["a", value])], schema=info.schema)
    file = FileWriter(info, WarehouseFileIO({})).write([batch], (), "f")
    assert rows_of(file.path) == ["a", value]
    assert file.rows == 2
    assert file.stats["upper_bounds"][1].decode() == "z" * 15 + "\ue000"


@pytest.mark.parametrize("value", ["x" * 300, "é" * 60, "/" * 120])
def test_long_partition_values_have_short_folders(tmp_path, value):
    """An identity partition on a long string is written under a folder that file systems take."""
    info = table(tmp_path, [PartitionField(1, 1000, "s", "identity")])
    batch = pa.record_batch([pa.array([value])], schema=info.schema)
    writer = FileWriter(info, WarehouseFileIO({}))
    file = writer.write([batch], (value,), "f")
    other = writer.write([batch], (value + "y",), "f")
    assert rows_of(file.path) == [value]
    assert file.path.rpartition("/")[0] != other.path.rpartition("/")[0]
    assert all(len(part) <= 200 for part in file.path.removeprefix("file://").split("/")[:-1])
