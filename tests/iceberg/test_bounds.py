"""Bounds of columns: never an error, never a lie, whatever the values are (R17)."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyiceberg.conversions import from_bytes
from pyiceberg.table.update import SetPropertiesUpdate
from pyiceberg.types import StringType

from arka.iceberg import catalogs
from arka.iceberg.bounds import upper_bound
from arka.iceberg.fileio import WarehouseFileIO
from arka.iceberg.parquet import FileWriter
from arka.records import TableInfo, TableName, TableType
from arka.storage.ports import StagedFile

from .conftest import Lake

LAST = "\U0010ffff"


def write(tmp_path, column: pa.Array, properties: dict[str, str] | None = None) -> StagedFile:
    schema = pa.schema([pa.field("v", column.type, metadata={"PARQUET:field_id": "1"})])
    folder = tmp_path / "t-00000000"
    folder.mkdir(exist_ok=True)
    location = f"file://{folder}"
    name = TableName("default", "t")
    info = TableInfo(uuid4(), name, schema, 0, TableType.APPEND_ONLY, (), 0, (), location, properties or {})
    batch = pa.record_batch([column], schema=schema)
    file = FileWriter(info, WarehouseFileIO({})).write([batch], (), "f")
    read = pq.read_table(file.path.removeprefix("file://"), partitioning=None).column("v").combine_chunks()
    assert repr(read.to_pylist()) == repr(column.to_pylist())
    return file


def set_by_others(lake: Lake, info: TableInfo, properties: dict[str, str]) -> None:
    """Set properties with a library that does not look at their values, as pyiceberg does with some."""
    opened = catalogs.catalog(lake.config)
    opened.commit_table(opened.load_table(tuple(info.name)), (), (SetPropertiesUpdate(updates=properties),))


def text_bounds(file: StagedFile) -> tuple[Any, Any]:
    found: Any = file.stats
    return tuple(
        from_bytes(StringType(), bounds[1]) if 1 in bounds else None
        for bounds in (found["lower_bounds"], found["upper_bounds"])
    )


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        # The last of the file in order, and longer than the 16 characters that are kept: its bound is raised.
        ("z" * 15 + "\ud7ffx", "z" * 15 + "\ue000"),
        ("\ud7ff" + LAST * 16, "\ue000"),
        ("z" * 14 + "\ud7ff" + LAST + "x", "z" * 14 + "\ue000"),
        ("z" * 15 + LAST + "x", "z" * 14 + "{"),
        (LAST * 17, None),
        ("z" * 15 + "\ue000x", "z" * 15 + "\ue001"),
        ("z" * 15 + "\ud7ff", "z" * 15 + "\ud7ff"),
        ("z" * 15 + "\0x", "z" * 15 + "\x01"),
        ("", ""),
    ],
)
def test_a_text_bound_is_raised_past_what_is_no_character(tmp_path, value: str, bound: str | None) -> None:
    """The upper bound of a text that is cut is the next text, wherever it is cut; the file is written."""
    file = write(tmp_path, pa.array(["", value]))
    _, upper = text_bounds(file)
    assert upper == bound


@given(st.text(max_size=24), st.integers(1, 20))
def test_a_text_bound_holds(value: str, length: int) -> None:
    """A text's bound is as short as it is to be, is a text, and is not below it."""
    found = upper_bound(value, length)
    if found is None:
        assert value[:length] == LAST * length
    else:
        assert len(found) <= length
        assert found.encode() >= value.encode()


@given(st.binary(max_size=24), st.integers(1, 20))
def test_a_bound_of_bytes_holds(value: bytes, length: int) -> None:
    """The bound of bytes is as short as it is to be and is not below them."""
    found = upper_bound(value, length)
    if found is None:
        assert value[:length] == b"\xff" * length
    else:
        assert len(found) <= length
        assert found >= value


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"\xff" * 40, b""]),
        pa.array([b"", None]),
        pa.array([float("nan"), None, float("nan")]),
        pa.array([float("nan"), float("-inf"), -0.0, 0.0, float("inf")], pa.float32()),
        pa.array([decimal.Decimal("9" * 38), decimal.Decimal("-" + "9" * 38)], pa.decimal128(38, 0)),
        pa.array([decimal.Decimal("0.01"), None], pa.decimal128(3, 2)),
        pa.array([dt.datetime.min, dt.datetime.max], pa.timestamp("us")),
        pa.array([dt.date.min, dt.date.max]),
        pa.array([0, 86_399_999_999], pa.time64("us")),
        pa.array([-(2**63), 2**63 - 1]),
        pa.array([b"\xff" * 16, b"\0" * 16], pa.binary(16)),
        pa.array([True, False, None]),
        pa.nulls(3, pa.string()),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("mode", ["none", "counts", "full", "truncate(1)", "truncate(999999999)"])
def test_every_type_has_bounds_or_none(tmp_path, column: pa.Array, mode: str) -> None:
    """A file is written whatever its values and its metrics mode are."""
    file = write(tmp_path, column, {"write.metadata.metrics.default": mode})
    found: Any = file.stats
    assert found["record_count"] == len(column)
    assert set(found["column_sizes"]) == {1}
    assert bool(found["value_counts"]) == (mode != "none")


@pytest.mark.parametrize(
    "properties",
    [
        {"write.metadata.metrics.default": "truncate(0)"},
        {"write.metadata.metrics.default": "everything"},
        {"write.metadata.metrics.column.v": "truncate"},
        {"write.parquet.compression-codec": "lzo"},
        {"write.parquet.compression-codec": "lz4_hadoop"},
        {"write.parquet.compression-codec": "gzip", "write.parquet.compression-level": "15"},
        {"write.parquet.compression-codec": "brotli", "write.parquet.compression-level": "12"},
        {"write.parquet.compression-level": "99"},
        {"write.parquet.compression-level": "fast"},
        {"write.parquet.page-size-bytes": "-1"},
        {"write.parquet.page-size-bytes": "99999999999999999"},
        {"write.parquet.page-row-limit": "0"},
        {"write.parquet.dict-size-bytes": "1e6"},
        {"write.parquet.row-group-limit": "0"},
        {"write.object-storage.enabled": "perhaps"},
        {"write.object-storage.enabled": "true", "write.object-storage.partitioned-paths": "perhaps"},
        {"write.py-location-provider.impl": "this.Provider"},
        {"write.avro.compression-codec": "zstd"},
        {"history.expire.min-snapshots-to-keep": "many"},
    ],
    ids=lambda properties: ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in properties.items()),
)
def test_a_property_of_others_falls_back_with_a_word(lake: Lake, duck: Any, properties: dict[str, str]) -> None:
    """A value that others set and nobody can use stops no row; what is used instead is said."""
    info = lake.create(pa.schema([("v", pa.string())]))
    set_by_others(lake, info, properties)
    info = TableInfo(
        info.uuid,
        info.name,
        info.schema,
        info.schema_id,
        info.table_type,
        (),
        info.spec_id,
        info.partition,
        info.location,
        dict(info.properties) | properties,
    )
    values = ["a", "b" * 40]
    staged = lake.encode(info, [pa.record_batch([pa.array(values)], schema=info.schema)], 0)
    assert any(name in note for name in properties for note in staged.notes)
    lake.commit(info, staged)
    table = lake.table(info)
    assert table.scan().to_arrow().column("v").to_pylist() == values
    seen = duck.execute(f"SELECT * FROM iceberg_scan('{table.metadata_location}')").fetchall()
    assert seen == [(value,) for value in values]


def test_the_length_of_the_metadata_log_is_no_number(lake: Lake) -> None:
    """A commit lands whatever others set as the length of the metadata log, and leaves it as they set it."""
    info = lake.create(pa.schema([("v", pa.int64())]))
    name = "write.metadata.previous-versions-max"
    set_by_others(lake, info, {name: "some"})
    lake.append(info, [pa.record_batch([pa.array([1])], schema=info.schema)], 0)
    table = lake.table(info)
    assert table.scan().to_arrow().num_rows == 1
    assert table.properties[name] == "some"


def test_bounds_cover_row_groups_without_any(tmp_path) -> None:
    """Values that are too long for a footer take their column's bounds away: those of other row groups would lie."""
    rows = ["b"] * 1_024 + ["z" * 5_000] * 2
    file = write(tmp_path, pa.array(rows), {"write.parquet.row-group-limit": "1024"})
    assert pq.ParquetFile(file.path.removeprefix("file://")).num_row_groups == 2
    found: Any = file.stats
    assert not found["upper_bounds"]
    assert not found["lower_bounds"]
    assert found["null_value_counts"] == {1: 0}


def test_names_with_dots_have_their_own_bounds(lake: Lake) -> None:
    """A column whose name is another's path in Parquet has statistics of its own."""
    schema = pa.schema([("x", pa.list_(pa.int64())), ("x.list.element", pa.int64()), ("n", pa.int64())])
    info = lake.create(schema)
    batch = pa.record_batch(
        [pa.array([[1, 2], [3]], schema[0].type), pa.array([7, 8]), pa.array([9, 9])], schema=schema
    )
    staged = lake.encode(info, [batch.cast(info.schema)], 0)
    found: Any = staged.files[0].stats
    assert sorted(found["value_counts"].values()) == [2, 2, 3]
    lake.commit(info, staged)
    assert lake.table(info).scan().to_arrow().num_rows == 2
