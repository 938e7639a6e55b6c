"""Parquet files: which columns get a dictionary, whatever they are called and hold."""

from __future__ import annotations

import decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import Lake

ROWS = 60_000


def column_of(kind: str) -> pa.Array:
    pick = np.random.default_rng(1)
    match kind:
        case "unique":
            return pa.array(pick.permutation(ROWS))
        case "random":
            return pa.array(pick.random(ROWS))
        case "few":
            return pa.array(pick.integers(0, 50, ROWS))
        case "thousands":
            # A sample has 7,000 of them, and hardly one five times.
            return pa.array(pick.integers(0, 8_000, ROWS))
        case "names":
            return pa.array([f"user-{number}" for number in pick.permutation(ROWS)])
        case "words":
            return pa.array([f"word-{number}" for number in pick.integers(0, 300, ROWS)])
        case "long words":
            return pa.array(["x" * 2_000 + str(number) for number in pick.integers(0, 4_000, ROWS)])
        case "nulls":
            return pa.nulls(ROWS, pa.int64())
        case "mostly null":
            return pa.array([number if number % 50 == 0 else None for number in range(ROWS)])
        case "times":
            return pa.array(np.arange(ROWS)).cast(pa.timestamp("us"))
        case "flags":
            return pa.array(pick.integers(0, 2, ROWS).astype(bool))
        case "decimals":
            return pa.array(
                [decimal.Decimal(int(n)).scaleb(-2) for n in pick.integers(0, 90, ROWS)], pa.decimal128(12, 2)
            )
        case "lists":
            return pa.array([[int(number)] for number in pick.integers(0, 9, ROWS)])
        case _:
            return pa.array([{"x": int(number)} for number in pick.integers(0, 9, ROWS)])


@pytest.mark.parametrize(
    ("kind", "dictionary"),
    [
        ("unique", False),
        ("random", False),
        ("few", True),
        ("thousands", True),
        ("names", False),
        ("words", True),
        ("long words", False),
        ("nulls", True),
        ("times", False),
        ("decimals", True),
        ("lists", True),
        ("structs", True),
        ("mostly null", None),
        ("flags", None),
    ],
)
@pytest.mark.parametrize("name", ["c", "a.b", "list.element"])
def test_columns_whose_values_repeat_have_a_dictionary(
    lake: Lake, kind: str, dictionary: bool | None, name: str
) -> None:
    """A dictionary is for columns that have room in one; the rows are the same either way."""
    column = column_of(kind)
    other = column_of("unique")
    schema = pa.schema([pa.field(name, column.type), pa.field("other", other.type)])
    info = lake.create(schema)
    batch = pa.RecordBatch.from_arrays([column, other], schema=schema)
    staged = lake.encode(info, [batch.slice(0, ROWS // 2), batch.slice(ROWS // 2)], 0)
    (file,) = staged.files
    read = pq.ParquetFile(Path(file.path.removeprefix("file://")))
    first, last = (read.metadata.row_group(0).column(at) for at in (0, 1))
    assert not last.has_dictionary_page
    if dictionary is not None:
        assert ("RLE_DICTIONARY" in first.encodings) is dictionary
    lake.commit(info, staged)
    found = lake.table(info).scan().to_arrow()
    assert found.column(name).cast(column.type).to_pylist() == column.to_pylist()


def test_small_files_have_dictionaries(lake: Lake) -> None:
    """A few rows tell nothing, and cost nothing."""
    schema = pa.schema([pa.field("n", pa.int64())])
    info = lake.create(schema)
    staged = lake.encode(info, [pa.RecordBatch.from_arrays([pa.array(range(1_000))], schema=schema)], 0)
    read = pq.ParquetFile(Path(staged.files[0].path.removeprefix("file://")))
    assert read.metadata.row_group(0).column(0).has_dictionary_page
