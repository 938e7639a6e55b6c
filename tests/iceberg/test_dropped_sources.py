"""Files outlive the source columns of their partition spec: they are read, rewritten and moved all the same (R27)."""

from __future__ import annotations

import datetime as dt
import decimal
import shutil
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table.update import RemoveSchemasUpdate
from pyiceberg.transforms import IdentityTransform
from pyiceberg.types import LongType, NestedField

from arka.errors import ConfigurationError
from arka.iceberg import adopt, manifests
from arka.iceberg.config import CATALOG_NAME, CatalogConfig
from arka.iceberg.specschema import UnknownSourceColumn, spec_schema
from arka.options import IcebergOptions
from arka.storage.ports import CommitOutcome

DAY = dt.datetime(2026, 11, 30, 7, 5, tzinfo=dt.UTC)
CASES = [
    (pa.string(), "identity", "a"),
    (pa.int32(), "identity", 7),
    (pa.decimal128(9, 2), "identity", decimal.Decimal("1.25")),
    (pa.date32(), "identity", DAY.date()),
    (pa.bool_(), "identity", True),
    (pa.string(), "bucket[4]", "a"),
    (pa.string(), "truncate[1]", "abc"),
    (pa.timestamp("us", "UTC"), "hour", DAY),
    (pa.timestamp("us", "UTC"), "day", DAY),
    (pa.timestamp("us", "UTC"), "month", DAY),
    (pa.timestamp("us", "UTC"), "year", DAY),
]


def _schema(source: pa.DataType | None) -> pa.Schema:
    fields = [pa.field("n", pa.int64(), nullable=False)]
    return pa.schema(fields if source is None else [*fields, pa.field("v", source)])


def _rows(numbers: list[int], source: pa.DataType | None = None, value: Any = None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"n": n} | ({"v": value} if source else {}) for n in numbers], _schema(source))


def _drop_sources(lake: Any, info: Any, *, again: bool, forget: bool) -> None:
    """Remove the partition fields, then their columns; give a name to another column; remove the old schemas."""
    catalog = lake.foreign()
    table = catalog.load_table(tuple(info.name))
    with table.update_spec() as spec:
        for field in table.spec().fields:
            spec.remove_field(field.name)
    with table.update_schema(allow_incompatible_changes=True) as schema:
        schema.delete_column("v")
    if again:
        with table.update_schema() as schema:
            schema.add_column("v", LongType())
        with table.update_schema(allow_incompatible_changes=True) as schema:
            schema.delete_column("v")
    if forget:
        old = [s.schema_id for s in table.metadata.schemas if s.schema_id != table.metadata.current_schema_id]
        catalog.commit_table(table, (), (RemoveSchemasUpdate(schema_ids=old),))
    catalog.close()


def _numbers(lake: Any, info: Any) -> list[int]:
    return sorted(lake.table(info).scan().to_arrow()["n"].to_pylist())


@pytest.mark.parametrize("forget", [False, True], ids=["schemas", "no-schemas"])
@pytest.mark.parametrize(("source", "transform", "value"), CASES, ids=[f"{s}-{t}" for s, t, _ in CASES])
def test_old_keys_are_replaced(lake: Any, source: Any, transform: str, value: Any, forget: bool, duck: Any) -> None:
    """Upserts replace rows in files of the old spec, again and again: manifests of both kinds are rewritten."""
    info = lake.create(_schema(source), (1, transform), key=("n",))
    assert lake.append(info, [_rows([1, 2, 3, 4, 5], source, value)], 0).outcome is CommitOutcome.COMMITTED
    assert lake.append(info, [_rows([1], source, None)], 1).outcome is CommitOutcome.COMMITTED
    _drop_sources(lake, info, again=False, forget=forget)
    now = lake.reload(info)
    for lsn, numbers in enumerate(([1, 2], [3, 9], [4, 5], [1, 2, 3]), 2):
        assert lake.append(now, [_rows(numbers)], lsn).outcome is CommitOutcome.COMMITTED
        assert _numbers(lake, now) == [1, 2, 3, 4, 5, *([9] if lsn > 2 else [])]
    location = lake.table(now).metadata_location
    assert duck.sql(f"SELECT count(*) FROM iceberg_scan('{location}')").fetchall() == [(6,)]


@pytest.mark.parametrize("forget", [False, True], ids=["schemas", "no-schemas"])
@pytest.mark.parametrize(("source", "transform", "value"), CASES[::3], ids=[f"{s}-{t}" for s, t, _ in CASES[::3]])
def test_manifests_are_merged(lake: Any, source: Any, transform: str, value: Any, forget: bool) -> None:
    """Manifests of the old spec are merged under the type that their partition values have, and hold these still."""
    info = lake.create(_schema(source), (1, transform))
    for lsn in range(manifests.MERGE_AT):
        assert lake.append(info, [_rows([lsn], source, value)], lsn).outcome is CommitOutcome.COMMITTED
    (before,) = {tuple(task.file.partition) for task in lake.table(info).scan().plan_files()}
    _drop_sources(lake, info, again=True, forget=forget)
    now = lake.reload(info)
    for lsn in range(manifests.MERGE_AT, manifests.MERGE_AT + 3):
        assert lake.append(now, [_rows([lsn])], lsn).outcome is CommitOutcome.COMMITTED
    table = lake.table(now)
    old = [m for m in table.current_snapshot().manifests(table.io) if m.partition_spec_id == 0]
    assert len(old) == 1
    assert {tuple(e.data_file.partition) for e in old[0].fetch_manifest_entry(table.io)} == {before}
    assert _numbers(lake, now) == list(range(manifests.MERGE_AT + 3))


@pytest.mark.parametrize("key", [(), ("n",)], ids=["append-only", "primary-key"])
@pytest.mark.parametrize("forget", [False, True], ids=["schemas", "no-schemas"])
def test_it_is_adopted(lake: Any, tmp_path_factory: Any, key: tuple[str, ...], forget: bool) -> None:
    """A directory with such a table moves: every snapshot is there at the new place."""
    info = lake.create(_schema(pa.string()), (1, "identity"), key=key)
    for lsn in range(3):
        lake.append(info, [_rows([lsn, lsn + 1], pa.string(), f"v{lsn}")], lsn)
    _drop_sources(lake, info, again=False, forget=forget)
    expected = _numbers(lake, info)
    config = _moved(lake, tmp_path_factory)
    assert adopt.adopt(config, adopt.Move(lake.config.warehouse, config.warehouse)) == ["default.t"]
    catalog = SqlCatalog(CATALOG_NAME, uri=config.uri, warehouse=config.warehouse)
    assert sorted(catalog.load_table("default.t").scan().to_arrow()["n"].to_pylist()) == expected
    catalog.close()


def test_what_cannot_be_adopted_is_named(lake: Any, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while files are written again is about a table, whose name it says; nothing is changed."""
    info = lake.create(_schema(None))
    lake.append(info, [_rows([1])], 0)
    config = _moved(lake, tmp_path_factory)
    (manifest,) = lake.table(info).current_snapshot().manifests(lake.table(info).io)
    torn = manifest.manifest_path.replace(lake.config.warehouse, config.warehouse).removeprefix("file://")
    with open(torn, "r+b") as file:
        file.truncate(100)
    with pytest.raises(ConfigurationError, match=r"default\.t cannot be written again"):
        adopt.adopt(config, adopt.Move(lake.config.warehouse, config.warehouse))


def _moved(lake: Any, tmp_path_factory: Any) -> CatalogConfig:
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(lake.directory, copy)
    return CatalogConfig.from_options(IcebergOptions(), copy, {})


def test_columns_that_never_were_together(lake: Any) -> None:
    """Sources that no one schema has are put together of several, the newest that has each; an unknown one is named."""
    info = lake.create(_schema(pa.int32()))
    metadata = lake.table(info).metadata
    ids = [field.field_id for field in metadata.schema().fields]
    b = NestedField(9, "b", LongType(), required=False)
    older = [Schema(*metadata.schema().fields, schema_id=0), Schema(b, schema_id=1)]
    widened = Schema(NestedField(ids[1], "v", LongType(), required=False), schema_id=2)
    now = Schema(metadata.schema().fields[0], NestedField(10, "b", LongType(), required=False), schema_id=3)
    metadata = metadata.model_copy(update={"schemas": [*older, widened, now], "current_schema_id": 3})
    sources = (ids[1], 9)
    spec = PartitionSpec(*(PartitionField(s, 1000 + s, IdentityTransform(), f"p{s}") for s in sources), spec_id=4)
    assert [f.field_type for f in spec.partition_type(spec_schema(metadata, spec)).fields] == [LongType(), LongType()]
    gone = PartitionSpec(PartitionField(77, 1000, IdentityTransform(), "p"), spec_id=5)
    with pytest.raises(UnknownSourceColumn, match=r"column 77.*spec 5"):
        spec_schema(metadata, gone)
