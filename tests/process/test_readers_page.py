"""What docs/readers.md says of other engines: it holds of the releases that are installed."""

from __future__ import annotations

import datetime
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import create, write_all

pytestmark = pytest.mark.process

PAGE = (Path(__file__).parents[2] / "docs" / "readers.md").read_text()
BEFORE = datetime.datetime(1969, 12, 31, 23, 30)
AFTER = datetime.datetime(2024, 2, 29, 12, 30)


def test_the_page_names_the_installed_releases() -> None:
    """A new release is measured again before the page speaks of it."""
    for package in ("pyiceberg", "duckdb", "polars", "polars-iceberg", "daft", "chdb", "pysail"):
        assert version(package) in PAGE, f"{package} is {version(package)}: measure docs/readers.md again"


def make(
    server: ServerProcess, client: flight.FlightClient, name: str, kind: str, values: pa.Array, transform: str
) -> Any:
    """A table of (id, v), a row a write, so that each row is a file of its own."""
    spec = {"fields": [{"source_id": 1, "name": "v_part", "transform": transform}]}
    create(client, name, [("id", "int64"), ("v", kind)], partition_spec=spec)
    batches = [
        pa.record_batch({"id": pa.array([row], pa.int64()), "v": values.slice(row, 1)}) for row in range(len(values))
    ]
    write_all(client, name, batches)
    return lake.load(server.data, name)


def by_duckdb(duck: Any, made: Any, condition: str) -> list[int]:
    query = f"SELECT id FROM iceberg_scan('{made.metadata_location}') WHERE {condition}"
    return sorted(row[0] for row in duck.execute(query).fetchall())


@pytest.mark.parametrize("transform", ["Month", "Day"])
def test_duckdb_leaves_out_times_before_1970(
    server: ServerProcess, client: flight.FlightClient, table: str, duck: Any, transform: str
) -> None:
    """The rows are there: DuckDB finds them where the filter cannot be used on partitions."""
    made = make(server, client, table, "timestamp[us]", pa.array([BEFORE, AFTER], pa.timestamp("us")), transform)
    assert by_duckdb(duck, made, f"v = TIMESTAMP '{BEFORE}'") == []
    assert by_duckdb(duck, made, f"v + INTERVAL 0 DAY = TIMESTAMP '{BEFORE}'") == [0]
    assert by_duckdb(duck, made, f"v = TIMESTAMP '{AFTER}'") == [1]
    assert made.scan(f"v == '{BEFORE.isoformat()}'").to_arrow()["id"].to_pylist() == [0]


def test_duckdb_leaves_out_uuids_of_buckets(
    server: ServerProcess, client: flight.FlightClient, table: str, duck: Any
) -> None:
    """It looks in the bucket of another hash."""
    uuids = [UUID(int=number * 0x1234567890ABCDEF1234) for number in (1, 2, 3, 4)]
    made = make(server, client, table, "uuid", pa.array([it.bytes for it in uuids], pa.uuid()), "Bucket(4)")
    assert by_duckdb(duck, made, f"v = '{uuids[2]}'") == []
    assert by_duckdb(duck, made, f"v::VARCHAR = '{uuids[2]}'") == [2]


def test_pyiceberg_keeps_nulls_in_not_in(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """SQL's NOT IN is not true of a null; pyiceberg's is."""
    made = make(server, client, table, "utf8", pa.array(["a", "b", None, "c"]), "Identity")
    assert sorted(made.scan("v NOT IN ('a', 'b')").to_arrow()["id"].to_pylist()) == [2, 3]
    assert made.scan("v NOT IN ('a', 'b') AND v IS NOT NULL").to_arrow()["id"].to_pylist() == [3]


def test_pyiceberg_rounds_doubles(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A process with pyiceberg alone skips the file that has the row; with the page's lines it does not."""
    made = make(server, client, table, "float64", pa.array([0.1, 0.5, 1e300], pa.float64()), "Identity")
    remedy = next(block for block in PAGE.split("```python\n") if "DoubleReader" in block).partition("```")[0]
    for lines, expected in (("", [[], [1], []]), (remedy, [[0], [1], [2]])):
        program = (
            f"{lines}\n"
            "from pyiceberg.expressions import EqualTo\n"
            "from pyiceberg.table import StaticTable\n"
            f"table = StaticTable.from_metadata({made.metadata_location!r})\n"
            "found = [table.scan(EqualTo('v', v)).to_arrow()['id'].to_pylist() for v in (0.1, 0.5, 1e300)]\n"
            f"assert found == {expected}, found\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
