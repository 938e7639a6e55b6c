"""Servers as processes: one for each module, and others for tests that need settings or an end of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess
from tests.readers import open_duckdb

from .clients import connect


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of this module's own; in the end it must drain and exit with 0."""
    settings = {"server.drain_s": 5, "iceberg.commit_interval_s": 0.1}
    with ServerProcess(tmp_path_factory.mktemp("server") / "data", settings) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[flight.FlightClient]:
    with connect(server.location) as opened:
        yield opened


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers with settings of their own; what a test leaves running is killed.

    Two with the same ``data`` share a data directory.
    """
    made: list[ServerProcess] = []

    def make(*flags: str, data: str = "data", **settings: Any) -> ServerProcess:
        keys = {key.replace("__", "."): value for key, value in settings.items()}
        made.append(ServerProcess(tmp_path / data, keys, *flags))
        return made[-1]

    yield make
    for process in made:
        process.kill()


@pytest.fixture
def table() -> str:
    """A table name that no other test of the module uses."""
    return f"t{next(_numbers)}"


_numbers = count(1)


@pytest.fixture(scope="module")
def duck() -> Iterator[Any]:
    connection = open_duckdb()
    yield connection
    connection.close()
