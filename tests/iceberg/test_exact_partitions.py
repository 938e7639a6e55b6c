"""Partition values of type double stay what they are, however often manifests are written again."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.avro import file as avro_file
from pyiceberg.avro.decoder import StreamingBinaryDecoder
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.conversions import to_bytes
from pyiceberg.expressions import EqualTo
from pyiceberg.manifest import DataFileContent, ManifestContent
from pyiceberg.types import DoubleType

from arka.iceberg import adopt, catalogs, commit, manifests
from arka.iceberg.config import CATALOG_NAME, CatalogConfig
from arka.iceberg.manifests import ManifestMemory
from arka.iceberg.rowdelta import KeyedTables
from arka.options import IcebergOptions
from arka.storage.ports import CommitOutcome

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("x", pa.float64())])
VALUES = [0.1, 1e300, 5e-324, 16777217.0, -0.0, math.inf]


def _rows(numbers: list[int], values: list[float | None]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(numbers, pa.int64()), pa.array(values, pa.float64())], schema=SCHEMA)


@contextmanager
def _exact() -> Iterator[None]:
    """Read Avro with pyiceberg's decoder in Python, which is exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avro_file, "new_decoder", StreamingBinaryDecoder)
        yield


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next commit read what it needs, as after a restart."""
    monkeypatch.setattr(catalogs, "_opened", {})
    monkeypatch.setattr(commit, "_memory", ManifestMemory())
    monkeypatch.setattr(commit, "_keyed", KeyedTables())


def _bits(value: float | None) -> str | None:
    return None if value is None else struct.pack(">d", value).hex()


def _files(table: Any) -> list[tuple[DataFileContent, str | None]]:
    """Each live file's kind and partition value; the bounds in the manifest list are checked on the way."""
    found = []
    with _exact():
        for manifest in table.current_snapshot().manifests(table.io):
            entries = manifest.fetch_manifest_entry(table.io, discard_deleted=False)
            values = [entry.data_file.partition[0] for entry in entries]
            bounded = [value for value in values if value is not None]
            if bounded:
                (summary,) = manifest.partitions
                assert summary.lower_bound == to_bytes(DoubleType(), min(bounded))
                assert summary.upper_bound == to_bytes(DoubleType(), max(bounded))
            found += [
                (entry.data_file.content, _bits(value))
                for entry, value in zip(entries, values, strict=True)
                if entry.status != 2
            ]
    return found


def _found_by(table: Any, value: float) -> list[int]:
    with _exact():
        return sorted(table.scan(row_filter=EqualTo("x", value)).to_arrow()["n"].to_pylist())


def test_manifests_are_merged(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged manifests hold the values that the merged ones held."""
    info = lake.create(SCHEMA, (1, "identity"))
    given = [VALUES[lsn % len(VALUES)] for lsn in range(manifests.MERGE_AT + 2)]
    for lsn, value in enumerate(given):
        if lsn % 10 == 0:
            _forget(monkeypatch)
        assert lake.append(info, [_rows([lsn], [value])], lsn).outcome is CommitOutcome.COMMITTED
    table = lake.table(info)
    with _exact():
        assert any(m.existing_files_count == manifests.MERGE_AT for m in table.current_snapshot().manifests(table.io))
    assert sorted(_files(table)) == sorted((DataFileContent.DATA, _bits(value)) for value in given)
    for value in VALUES:
        assert _found_by(table, value) == [lsn for lsn, each in enumerate(given) if each == value]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_keys_are_replaced(lake: Any, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Position deletes have the partition of their data file; what an upsert leaves of a manifest keeps its own."""
    info = lake.create(SCHEMA, (1, "identity"), key=("n",))
    first = [_rows([1, 2, 3], [value] * 3), _rows([4, 5], [0.7, None])]
    assert lake.append(info, first, 0).outcome is CommitOutcome.COMMITTED
    for lsn, (number, new) in enumerate([(1, 0.25), (2, 0.25), (4, value)], 2):
        _forget(monkeypatch)
        assert lake.append(info, [_rows([number], [new])], lsn).outcome is CommitOutcome.COMMITTED
        found = _files(lake.table(info))
        assert {bits for kind, bits in found if kind == DataFileContent.POSITION_DELETES} == {_bits(value)}
        assert {bits for _, bits in found} <= {_bits(v) for v in (value, 0.7, 0.25, None)}
    table = lake.table(info)
    with _exact():
        kinds = {m.content for m in table.current_snapshot().manifests(table.io)}
    assert kinds == {ManifestContent.DATA, ManifestContent.DELETES}
    assert _found_by(table, value) == [3, 4]
    assert _found_by(table, 0.25) == [1, 2]


@pytest.mark.parametrize("key", [(), ("n",)], ids=["append-only", "primary-key"])
def test_it_is_adopted(lake: Any, tmp_path_factory: Any, key: tuple[str, ...]) -> None:
    """A directory that moves keeps the values, of position deletes too."""
    info = lake.create(SCHEMA, (1, "identity"), key=key)
    numbers = list(range(len(VALUES)))
    lake.append(info, [_rows(numbers * 2, VALUES * 2)], 0)
    if key:
        lake.append(info, [_rows([*numbers, *(n + 10 for n in numbers)], VALUES * 2)], 1)
        lake.append(info, [_rows([n + 10 for n in numbers], [None] * len(numbers))], 2)
    expected = sorted(_files(lake.table(info)), key=str)
    assert {bits for _, bits in expected} >= {_bits(value) for value in VALUES}
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(lake.directory, copy)
    config = CatalogConfig.from_options(IcebergOptions(), copy, {})
    assert adopt.adopt(config, adopt.Move(lake.config.warehouse, config.warehouse)) == ["default.t"]
    catalog = SqlCatalog(CATALOG_NAME, uri=config.uri, warehouse=config.warehouse)
    table = catalog.load_table("default.t")
    assert sorted(_files(table), key=str) == expected
    for number, value in enumerate(VALUES):
        assert _found_by(table, value) == [number] * (1 if key else 2)
    catalog.close()
