"""Names in manifests are ASCII names, whatever partition fields are called; readers find the same rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyiceberg.schema import Schema
from pyiceberg.types import NestedField, StringType

from arka.iceberg.avronames import avro_name, avro_schema

LEGAL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

NAMES = ["😎", "1st", "a key", "a.key", "x-y", "naïve", "日付", "größe", "٣rd", "-", "é", "_", "ok", "²", "\u0301"]


@given(st.text(min_size=1))
def test_every_name_is_escaped(name: str) -> None:
    """Whatever a name is made of, its escaped form is legal and a legal name stays."""
    assert LEGAL.match(avro_name(name))
    if LEGAL.match(name):
        assert avro_name(name) == name


@given(st.lists(st.text(alphabet="a _x20é-", max_size=6), min_size=1, max_size=6, unique=True))
def test_names_of_a_record_differ(names: list[str]) -> None:
    """Two names that are escaped to the same one stay apart, and each original name can be found."""
    fields = [NestedField(1000 + i, name or "empty", StringType(), required=False) for i, name in enumerate(names)]
    made = avro_schema(Schema(*fields), "r")
    written = [field["name"] for field in made["fields"]]
    assert len(set(written)) == len(written)
    assert all(LEGAL.match(name) for name in written)
    originals = [field.get("iceberg-field-name", field["name"]) for field in made["fields"]]
    assert originals == [field.name for field in fields]


def _avro_names(path: str) -> list[str]:
    data = Path(path).read_bytes()
    start = data.index(b'{"type": "record"')
    header, _ = json.JSONDecoder().raw_decode(data[start:].decode("utf-8", "replace"))
    found = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.extend([node["name"]] if "name" in node else [])
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(header)
    return found


@pytest.mark.parametrize("kind", ["lean", "stock", "keyed"])
def test_a_table_partitioned_by_awkward_names_is_read(make_lake: Any, duck: Any, kind: str) -> None:
    """Manifests of data and of deletes hold legal names alone; pyiceberg and DuckDB read the rows."""
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), *(pa.field(n, pa.string()) for n in NAMES)])
    lake = make_lake(stock_commit=kind == "stock")
    transforms = [(number, "identity") for number in range(1, len(NAMES) + 1)]
    info = lake.create(schema, *transforms, key=["id"] if kind == "keyed" else (), partition_names=NAMES)
    rows = pa.record_batch({"id": pa.array([1, 2], pa.int64())} | {n: [f"{n}-a", None] for n in NAMES}, schema=schema)
    lake.append(info, [rows], 0)
    lake.append(info, [rows], 1)
    expected = rows.to_pylist() if kind == "keyed" else rows.to_pylist() * 2
    table = lake.table(info)
    found = table.scan().to_arrow().to_pylist()
    assert sorted(map(str, found)) == sorted(map(str, expected))
    for path in lake.files(info, ".avro"):
        assert all(LEGAL.match(name) for name in _avro_names(str(path))), path
    (by_duckdb,) = duck.execute("SELECT count(*) FROM iceberg_scan(?)", [table.metadata_location]).fetchall()
    assert by_duckdb == (len(expected),)
