"""What is committed is what two foreign engines read: every canonical type, every transform."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import random
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arka.errors import InternalError
from arka.iceberg import encode
from arka.storage.ports import CommitOutcome, ReadJob, TableFrames

UTC = dt.UTC

EVERYTHING = pa.schema(
    [
        pa.field("i32", pa.int32(), nullable=False),
        ("i64", pa.int64()),
        ("f32", pa.float32()),
        ("f64", pa.float64()),
        ("flag", pa.bool_()),
        ("text", pa.string()),
        ("raw", pa.binary()),
        ("fixed", pa.binary(4)),
        ("id", pa.uuid()),
        ("small", pa.decimal128(9, 2)),
        ("middle", pa.decimal128(18, 4)),
        ("large", pa.decimal128(38, 10)),
        ("day", pa.date32()),
        ("clock", pa.time64("us")),
        ("local", pa.timestamp("us")),
        ("utc", pa.timestamp("us", tz="UTC")),
        ("items", pa.list_(pa.int64())),
        ("point", pa.struct([pa.field("x", pa.int32(), nullable=False), ("label", pa.string())])),
        ("counts", pa.map_(pa.string(), pa.int64())),
        ("deep", pa.list_(pa.struct([("m", pa.map_(pa.string(), pa.list_(pa.decimal128(10, 3))))]))),
    ]
)

ROWS: list[dict[str, Any]] = [
    {
        "i32": -(2**31),
        "i64": -(2**63),
        "f32": -1.5,
        "f64": -0.0,
        "flag": False,
        "text": "",
        "raw": b"",
        "fixed": b"\x00\x00\x00\x00",
        "id": UUID(int=0),
        "small": Decimal("-9999999.99"),
        "middle": Decimal("-99999999999999.9999"),
        "large": Decimal("-9999999999999999999999999999.9999999999"),
        "day": dt.date(1969, 12, 31),
        "clock": dt.time(0, 0),
        "local": dt.datetime(1969, 12, 31, 23, 59, 59, 999999),
        "utc": dt.datetime(1900, 1, 1, tzinfo=UTC),
        "items": [],
        "point": {"x": -1, "label": None},
        "counts": [],
        "deep": [{"m": [("k", [Decimal("-1.500"), None])]}, None],
    },
    {
        "i32": 2**31 - 1,
        "i64": 2**63 - 1,
        "f32": 3.25,
        "f64": 1e308,
        "flag": True,
        "text": "Grüße, 世界 🎈" * 20,
        "raw": bytes(range(256)),
        "fixed": b"\xff\xff\xff\xff",
        "id": UUID(int=2**128 - 1),
        "small": Decimal("0.01"),
        "middle": Decimal("0.0001"),
        "large": Decimal("9999999999999999999999999999.9999999999"),
        "day": dt.date(9999, 12, 31),
        "clock": dt.time(23, 59, 59, 999999),
        "local": dt.datetime(2262, 4, 12),
        "utc": dt.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
        "items": [1, None, -1],
        "point": {"x": 7, "label": "seven"},
        "counts": [("a", 1), ("b", None)],
        "deep": [{"m": []}, {"m": None}],
    },
    dict.fromkeys(EVERYTHING.names) | {"i32": 0},
]


def _batch(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=schema)


def _by_i32(row: dict[str, Any]) -> int:
    number: int = row["i32"]
    return number


def _plain(value: Any) -> Any:
    """Bring an engine's spelling of a value to one that can be compared."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    return value


def _read_with_pyiceberg(lake: Any, info: Any) -> list[dict[str, Any]]:
    found = lake.table(info).scan().to_arrow().to_pylist()
    uuids = [field.name for field in info.schema if field.type == pa.uuid()]
    for row in found:
        row |= {name: UUID(bytes=row[name]) for name in uuids if isinstance(row[name], bytes)}
    return [_plain(row) for row in found]


def _read_with_duckdb(duck: Any, lake: Any, info: Any) -> list[dict[str, Any]]:
    location = lake.table(info).metadata_location
    cursor = duck.execute("SELECT * FROM iceberg_scan(?)", [location])
    names = [column[0] for column in cursor.description]
    found = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    for row in found:
        for name, value in row.items():
            row[name] = _maps_as_pairs(value, info.schema.field(name).type)
    return [_plain(row) for row in found]


def _maps_as_pairs(value: Any, kind: pa.DataType) -> Any:
    """Turn DuckDB's dictionaries into Arrow's pairs where the type is a map."""
    if value is None:
        return None
    if pa.types.is_map(kind):
        return [[key, _maps_as_pairs(item, kind.item_type)] for key, item in value.items()]
    if pa.types.is_list(kind):
        return [_maps_as_pairs(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _maps_as_pairs(value[field.name], field.type) for field in kind}
    return value


def test_every_canonical_type_survives_both_engines(lake: Any, duck: Any) -> None:
    """Each canonical type comes back with its value: extremes, negatives, nulls and nesting included."""
    info = lake.create(EVERYTHING)
    staged = lake.encode(info, [_batch(ROWS[:1], info.schema), _batch(ROWS[1:], info.schema)], 0)
    assert lake.commit(info, staged).outcome is CommitOutcome.COMMITTED
    expected = sorted((_plain(row) for row in ROWS), key=_by_i32)
    by_duckdb = sorted(_read_with_duckdb(duck, lake, info), key=_by_i32)
    assert by_duckdb == expected
    # pyiceberg reads a null list of structs as an empty one.
    expected_of_pyiceberg = [{**row, "deep": row["deep"] or []} for row in expected]
    assert sorted(_read_with_pyiceberg(lake, info), key=_by_i32) == expected_of_pyiceberg
    by_us = lake.read(ReadJob(info, lake.log_uuid))
    assert by_us.schema.equals(EVERYTHING)
    assert sorted((_plain(row) for row in by_us.to_pylist()), key=_by_i32) == expected


def test_paths_mean_what_they_spell(tmp_path: Path, make_lake: Any, duck: Any) -> None:
    """A data directory with blanks and percent signs works, for us and for both engines."""
    lake = make_lake(directory=tmp_path / "a b%41 ü")
    lake.directory.mkdir()
    info = lake.create(POINTS, (1, "identity"))
    lake.append(info, [_points(10, 3)], 0)
    assert (lake.directory / "catalog.db").exists()
    assert len(_read_with_pyiceberg(lake, info)) == len(_read_with_duckdb(duck, lake, info)) == 10


def test_parquet_files_carry_ids_and_no_arrow_schema(lake: Any) -> None:
    """A data file has a field id on every leaf, decimals as integers, and nothing of Arrow's own."""
    info = lake.create(EVERYTHING)
    staged = lake.encode(info, [_batch(ROWS, info.schema)], 0)
    file = pq.ParquetFile(staged.files[0].path.removeprefix("file://"))
    assert b"ARROW:schema" not in (file.metadata.metadata or {})
    assert file.schema_arrow.field("small").metadata[b"PARQUET:field_id"] == b"10"
    kinds = {column.path: column for column in (file.schema.column(i) for i in range(len(file.schema)))}
    assert kinds["small"].physical_type == "INT32"
    assert kinds["middle"].physical_type == "INT64"
    assert kinds["i32"].max_definition_level == 0
    stats = staged.files[0].stats
    assert stats["record_count"] == staged.rows == staged.files[0].rows == 3
    assert stats["null_value_counts"][2] == 1
    assert stats["lower_bounds"][1] == (-(2**31)).to_bytes(4, "little", signed=True)


POINTS = pa.schema(
    [
        pa.field("n", pa.int64(), nullable=False),
        ("text", pa.string()),
        ("day", pa.date32()),
        ("at", pa.timestamp("us")),
        ("amount", pa.decimal128(12, 2)),
        ("key", pa.uuid()),
        ("flag", pa.bool_()),
    ]
)


def _points(rows: int, seed: int) -> pa.RecordBatch:
    pick = random.Random(seed)
    made: list[dict[str, Any]] = []
    for number in range(rows):
        day = dt.date(1969, 11, 1) + dt.timedelta(days=pick.randrange(0, 90))
        made.append(
            {
                "n": pick.randrange(-50, 50),
                "text": pick.choice(["", "ä" * 6, "Kreuz & quer/100%", "plain", None, f"t{number}"]),
                "day": pick.choice([day, None]),
                "at": pick.choice([dt.datetime.combine(day, dt.time(pick.randrange(24), 59, 59, 999999)), None]),
                "amount": pick.choice([Decimal(pick.randrange(-999, 999)) / 100, None]),
                "key": pick.choice([UUID(int=pick.randrange(2**128)), None]),
                "flag": pick.choice([True, False, None]),
            }
        )
    return _batch(made, POINTS)


@pytest.mark.parametrize(
    "transforms",
    [
        pytest.param((), id="unpartitioned"),
        pytest.param(((1, "identity"),), id="identity"),
        pytest.param(((4, "identity"),), id="identity-decimal"),
        pytest.param(((6, "identity"),), id="identity-bool"),
        pytest.param(((2, "identity"),), id="identity-date"),
        pytest.param(((3, "year"),), id="year"),
        pytest.param(((2, "month"),), id="month"),
        pytest.param(((3, "day"),), id="day"),
        pytest.param(((3, "hour"),), id="hour"),
        pytest.param(((5, "bucket[7]"),), id="bucket"),
        pytest.param(((4, "bucket[4]"),), id="bucket-decimal"),
        pytest.param(((1, "truncate[3]"),), id="truncate"),
        pytest.param(((3, "day"), (0, "bucket[3]")), id="day-and-bucket"),
        pytest.param(((3, "month"), (3, "hour")), id="month-and-hour-of-one-column"),
    ],
)
def test_partitions_agree_with_both_engines(lake: Any, duck: Any, transforms: Any) -> None:
    """Rows land in the partitions that Iceberg's own transforms name, and both engines find all of them."""
    info = lake.create(POINTS, *transforms)
    batches = [_points(60, seed) for seed in (1, 2)]
    result = lake.append(info, batches, 0)
    assert result.outcome is CommitOutcome.COMMITTED
    expected = sorted((_plain(row) for batch in batches for row in batch.to_pylist()), key=repr)
    assert sorted(_read_with_pyiceberg(lake, info), key=repr) == expected
    assert sorted(_read_with_duckdb(duck, lake, info), key=repr) == expected
    table = lake.table(info)
    if transforms:
        by_filter = table.scan(row_filter="n >= 0 and day < '1969-12-15'").to_arrow().num_rows
        wanted = [row for row in expected if row["n"] >= 0 and row["day"] and row["day"] < dt.date(1969, 12, 15)]
        assert by_filter == len(wanted)
    spec = table.spec()
    for task in table.scan().plan_files():
        rows = pq.read_table(task.file.file_path.removeprefix("file://"))
        for position, field in enumerate(spec.fields):
            source = table.schema().find_field(field.source_id)
            column = rows.column(source.name).combine_chunks()
            values = set(field.transform.pyarrow_transform(source.field_type)(column).to_pylist())
            found = task.file.partition[position]
            if isinstance(found, int) and values and isinstance(next(iter(values)), dt.date):
                found = dt.date(1970, 1, 1) + dt.timedelta(days=found)
            assert values == {found}


def test_one_file_per_partition_and_rows_in_log_order(lake: Any) -> None:
    """A commit makes one file per partition, in which rows stand as they were accepted."""
    schema = pa.schema([pa.field("p", pa.int32()), pa.field("n", pa.int64())])
    info = lake.create(schema, (0, "identity"))
    batches = [
        pa.record_batch([pa.array([n % 3 for n in range(k, k + 10)], pa.int32()), range(k, k + 10)], schema=schema)
        for k in (0, 10, 20)
    ]
    staged = lake.encode(info, batches, 0)
    assert sorted(file.partition for file in staged.files) == [(0,), (1,), (2,)]
    for file in staged.files:
        rows = pq.read_table(file.path.removeprefix("file://")).to_pydict()
        assert rows["n"] == sorted(rows["n"])
        assert {number % 3 for number in rows["n"]} == set(file.partition)
    assert sum(file.rows for file in staged.files) == staged.rows == 30


def test_target_size_splits_a_partition_in_log_order(make_lake: Any) -> None:
    """A partition with more than the target's bytes gets several files, one after another in LSN order."""
    lake = make_lake(target_file_bytes=2**20)
    schema = pa.schema([pa.field("n", pa.int64()), pa.field("pad", pa.string())])
    info = lake.create(schema)
    batches = [pa.record_batch([range(k * 1000, k * 1000 + 1000), ["x" * 600] * 1000], schema=schema) for k in range(6)]
    staged = lake.encode(info, batches, 0)
    assert len(staged.files) == 3
    found = [n for f in staged.files for n in pq.read_table(f.path.removeprefix("file://"))["n"].to_pylist()]
    assert found == list(range(6000))


def test_every_file_of_many_is_durable(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many partitions a commit has, each of its files and folders is fsynced when encode returns."""
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    schema = pa.schema([("n", pa.int64())])
    info = lake.create(schema, (0, "identity"))
    staged = lake.encode(info, [pa.RecordBatch.from_pylist([{"n": n} for n in range(300)], schema=schema)], 0)
    files = {Path(file.path.removeprefix("file://")) for file in staged.files}
    assert len(files) == 300
    assert {str(file) for file in files} | {str(file.parent) for file in files} <= synced


@pytest.mark.parametrize("value", [-0.0, 0.0, float("nan")], ids=str)
def test_odd_floats_share_a_partition_over_batches(lake: Any, value: float) -> None:
    """Zero of either sign and NaN each make one partition, from whichever batch their rows come."""
    schema = pa.schema([("x", pa.float64())])
    info = lake.create(schema, (0, "identity"))
    batch = pa.RecordBatch.from_pylist([{"x": value}, {"x": 1.0}], schema=schema)
    staged = lake.encode(info, [batch, batch], 0)
    assert sorted(file.rows for file in staged.files) == [2, 2]


def _edited(job: TableFrames, **changes: Any) -> TableFrames:
    return dataclasses.replace(job, **changes)


def test_frames_that_do_not_belong_to_a_job_are_refused(lake: Any) -> None:
    """A frame outside the job's range, of an unknown schema, or out of order is never written (R15, R24)."""
    schema = pa.schema([("n", pa.int64())])
    info = lake.create(schema)
    batch = pa.RecordBatch.from_pylist([{"n": 1}], schema=schema)
    piece = lake.write(info, [(5, batch), (6, batch)])
    job = TableFrames(info, {0: info.schema.serialize().to_pybytes()}, lake.log_uuid, 4, 6, (piece,))
    assert encode.encode(lake.config, job).rows == 2
    files = lake.files(info, ".parquet")
    for wrong in (
        _edited(job, after_lsn=5),
        _edited(job, through_lsn=5),
        _edited(job, schemas={}),
        _edited(job, slices=(piece, piece)),
    ):
        with pytest.raises(InternalError, match="LSN"):
            encode.encode(lake.config, wrong)
    assert lake.files(info, ".parquet") == files
