"""A copied or moved data directory: each retained snapshot can be read at its new place, nothing else changes (R29)."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog

from arka.iceberg import adopt
from arka.iceberg.config import CATALOG_NAME, CatalogConfig
from arka.options import IcebergOptions

ROWS = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("name", pa.string())])


def _rows(*numbers: int, name: str = "") -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"n": n, "name": name or f"n{n}"} for n in numbers], schema=ROWS)


def _digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("catalog.db")]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _fill(lake: Any) -> dict[str, list[list[tuple[int, str]]]]:
    """Make tables of both kinds, partitioned and not, with deletes; return the rows of each snapshot."""
    plain = lake.create(ROWS, name="plain")
    parted = lake.create(ROWS, (0, "bucket[2]"), name="parted")
    keyed = lake.create(ROWS, name="keyed", key=("n",))
    lake.create(ROWS, name="empty")
    for lsn in range(34):
        lake.append(plain, [_rows(lsn)], lsn)
    for lsn in range(3):
        lake.append(parted, [_rows(lsn, lsn + 10)], lsn)
        lake.append(keyed, [_rows(*range(5), name=f"v{lsn}")], lsn)
    return {name: _snapshots(lake.config, name) for name in ("plain", "parted", "keyed", "empty")}


def _snapshots(config: CatalogConfig, name: str) -> list[list[tuple[int, str]]]:
    catalog = SqlCatalog(CATALOG_NAME, uri=config.uri, warehouse=config.warehouse)
    table = catalog.load_table(("default", name))
    catalog.close()
    found = []
    for snapshot in table.snapshots():
        rows = table.scan(snapshot_id=snapshot.snapshot_id).to_arrow().to_pylist()
        found.append(sorted((row["n"], row["name"]) for row in rows))
        for task in table.scan(snapshot_id=snapshot.snapshot_id).plan_files():
            for file in (task.file, *task.delete_files):
                assert file.file_path.startswith(config.warehouse + "/")
    assert table.metadata.location.startswith(config.warehouse + "/")
    return found


def _config(directory: Path) -> CatalogConfig:
    return CatalogConfig.from_options(IcebergOptions(), directory, {})


def test_copy_is_adopted_and_the_original_untouched(lake: Any, tmp_path_factory: Any, duck: Any) -> None:
    """Every retained snapshot of the copy reads its own files and the same rows; the original keeps each byte."""
    expected = _fill(lake)
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(lake.directory, copy)
    before = _digests(lake.directory)
    config = _config(copy)
    (copy / "keyindex").mkdir(exist_ok=True)
    assert sorted(adopt.adopt(config, adopt.Move(lake.config.warehouse, config.warehouse))) == [
        f"default.{name}" for name in ("empty", "keyed", "parted", "plain")
    ]
    assert _digests(lake.directory) == before
    assert {name: _snapshots(lake.config, name) for name in expected} == expected
    shutil.rmtree(lake.directory / "warehouse")
    assert {name: _snapshots(config, name) for name in expected} == expected
    assert not (copy / "keyindex").exists()
    catalog = SqlCatalog(CATALOG_NAME, uri=config.uri, warehouse=config.warehouse)
    location = catalog.load_table(("default", "keyed")).metadata_location
    catalog.close()
    found = duck.execute("SELECT n, name FROM iceberg_scan(?) ORDER BY n", [location]).fetchall()
    assert found == expected["keyed"][-1]
    # A second time there is nothing left to do.
    assert adopt.adopt(config, adopt.Move(lake.config.warehouse, config.warehouse)) == []


@pytest.mark.parametrize("table", [0, 3])
def test_crash_before_the_swap_changes_nothing(
    lake: Any, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch, table: int
) -> None:
    """Until the catalog's transaction is durable the pointers of all tables are what they were."""
    expected = _fill(lake)
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(lake.directory, copy)
    config = _config(copy)
    before = _digests(copy)
    calls = iter(range(10))
    real = adopt._swap

    def swap(*args: Any) -> None:
        real(*args)
        if next(calls) == table:
            raise KeyboardInterrupt

    monkeypatch.setattr(adopt, "_swap", swap)
    move = adopt.Move(lake.config.warehouse, config.warehouse)
    with pytest.raises(KeyboardInterrupt):
        adopt.adopt(config, move)
    after = _digests(copy)
    assert {name: after[name] for name in before} == before
    catalog = SqlCatalog(CATALOG_NAME, uri=config.uri, warehouse=config.warehouse)
    for name in expected:
        assert catalog.load_table(("default", name)).metadata_location.startswith(lake.config.warehouse)
    catalog.close()
    monkeypatch.setattr(adopt, "_swap", real)
    assert len(adopt.adopt(config, move)) == 4
    assert {name: _snapshots(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("path", "moved"),
    [
        ("file:///a/wh/t/x", "file:///b/t/x"),
        ("file:///a/wh", "file:///b"),
        ("file:///a/whole/t", "file:///a/whole/t"),
        ("s3://a/wh/t", "s3://a/wh/t"),
    ],
)
def test_only_paths_of_the_old_place_move(path: str, moved: str) -> None:
    """A path that only begins with the same letters lies elsewhere."""
    assert adopt.Move("file:///a/wh", "file:///b").of(path) == moved
