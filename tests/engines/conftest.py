"""A server whose embedded catalog Spark opens too, and a Spark session for each.

``ENGINES_REQUIRED=1`` makes a missing Java, pyspark or registry a failure instead of a skip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess
from tests.process.clients import connect

from .spark import EngineMissing, Spark


@pytest.fixture
def make_spark(tmp_path: Path) -> Iterator[Callable[..., Spark]]:
    """Start Spark sessions; all are ended."""
    made: list[Spark] = []

    def make(data: Path | None = None) -> Spark:
        settings = {}
        if data is not None:
            settings = {
                "catalog-impl": "org.apache.iceberg.jdbc.JdbcCatalog",
                "uri": f"jdbc:sqlite:{data}/catalog.db",
                "warehouse": f"file://{data}/warehouse",
                "jdbc.init-catalog-tables": "false",
            }
        try:
            spark = Spark(tmp_path / f"spark-{len(made)}", settings)
        except EngineMissing as error:
            if os.environ.get("ENGINES_REQUIRED"):
                pytest.fail(f"ENGINES_REQUIRED is set, but {error}", pytrace=False)
            pytest.skip(str(error))
        made.append(spark)
        return spark

    yield make
    for spark in made:
        spark.__exit__(None, None, None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server with the default commit interval: what others meet."""
    with ServerProcess(tmp_path / "data") as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[flight.FlightClient]:
    with connect(server.location) as opened:
        yield opened


@pytest.fixture
def spark(server: ServerProcess, make_spark: Callable[..., Spark]) -> Any:
    return make_spark(server.data)
