"""What a snapshot says about itself is true: LSNs, operation, counts; and pyiceberg's inspection works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from arka.records import TableInfo

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("s", pa.string())])
KEYS = SCHEMA.remove(1)


def _rows(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"n": pa.array(numbers, pa.int64()), "s": [str(n) for n in numbers]}, schema=SCHEMA)


def _keys(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"n": pa.array(numbers, pa.int64())}, schema=KEYS)


def _summary(lake: Any, info: TableInfo) -> Any:
    return lake.table(info).current_snapshot().summary


def _write(lake: Any, info: TableInfo, batch: pa.RecordBatch, lsn: int, *, delete: bool = False) -> Any:
    lake.commit(info, lake.encode(info, [batch], lsn - 1, deletes={lsn} if delete else ()))
    return _summary(lake, info)


@pytest.mark.parametrize("kind", ["lean", "stock", "keyed"])
def test_the_lsns_are_those_of_the_tables_writes(make_lake: Any, kind: str) -> None:
    """The log's LSNs between two commits of a table may be other tables': they are not in the range."""
    lake = make_lake(stock_commit=kind == "stock")
    info = lake.create(SCHEMA, key=["n"] if kind == "keyed" else ())
    job = lake.frames(info, [_rows(1), _rows(2)], 40)
    staged = lake.encode_job(replace(job, after_lsn=0))
    lake.commit(info, staged)
    notes = _summary(lake, info).additional_properties
    assert (notes["arka.lsn-first"], notes["arka.lsn-last"]) == ("41", "42")
    # Nothing to write, only the mark moves: there is no first LSN.
    lake.commit(info, lake.encode(info, [], 42, through=50))
    assert "arka.lsn-first" not in _summary(lake, info).additional_properties


def test_the_operation_says_what_happened_to_rows(lake: Any) -> None:
    """New keys append, replaced ones overwrite, and what only removes rows is a delete."""
    info = lake.create(SCHEMA, key=["n"])
    assert _write(lake, info, _rows(1, 2, 3), 1).operation.value == "append"
    assert _write(lake, info, _rows(2), 2).operation.value == "overwrite"
    assert _write(lake, info, _keys(1), 3, delete=True).operation.value == "delete"
    assert _write(lake, info, _keys(99), 4, delete=True).operation.value == "append"
    # The last row of a file: it goes without a delete file.
    assert _write(lake, info, _keys(2), 5, delete=True).operation.value == "delete"
    assert lake.table(info).scan().to_arrow()["n"].to_pylist() == [3]


def test_the_totals_are_those_of_the_live_files(lake: Any) -> None:
    """After upserts and deletes the totals are what the manifests hold."""
    info = lake.create(SCHEMA, key=["n"])
    _write(lake, info, _rows(1, 2, 3, 4), 1)
    _write(lake, info, _rows(2, 5), 2)
    _write(lake, info, _keys(1, 5), 3, delete=True)
    _write(lake, info, _rows(3), 4)
    table = lake.table(info)
    entries = [e for m in table.current_snapshot().manifests(table.io) for e in m.fetch_manifest_entry(table.io)]
    data = [e.data_file for e in entries if e.data_file.content.value == 0]
    deletes = [e.data_file for e in entries if e.data_file.content.value == 1]
    notes = _summary(lake, info).additional_properties
    assert int(notes["total-records"]) == sum(file.record_count for file in data)
    assert int(notes["total-data-files"]) == len(data)
    assert int(notes["total-delete-files"]) == len(deletes)
    assert int(notes["total-position-deletes"]) == sum(file.record_count for file in deletes)
    assert int(notes["total-files-size"]) == sum(file.file_size_in_bytes for file in data + deletes)
    assert sorted(table.scan().to_arrow()["n"].to_pylist()) == [2, 3, 4]


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("key", [(), ("n",)], ids=["append_only", "primary_key"])
def test_inspection_works(lake: Any, partitioned: bool, key: tuple[str, ...]) -> None:
    """Entries, files and partitions of a table can be listed, delete files among them; no map is null."""
    info = lake.create(SCHEMA, *([(1, "truncate[1]")] if partitioned else []), key=key)
    lake.append(info, [_rows(1, 2, 11)], 0)
    lake.append(info, [_rows(1)], 1)
    table = lake.table(info)
    entries = table.inspect.entries().to_pylist()
    assert len(entries) >= (3 if key else 2)
    maps = ("column_sizes", "value_counts", "null_value_counts", "nan_value_counts", "lower_bounds", "upper_bounds")
    for manifest in table.current_snapshot().manifests(table.io):
        for entry in manifest.fetch_manifest_entry(table.io):
            assert all(getattr(entry.data_file, name) is not None for name in maps)
            assert all(size > 0 for size in entry.data_file.column_sizes.values())
    inspect = table.inspect
    for look in (inspect.files, inspect.data_files, inspect.delete_files, inspect.partitions, inspect.manifests):
        assert look().num_rows >= 0
    assert inspect.history().num_rows == inspect.snapshots().num_rows == 2
