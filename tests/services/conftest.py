"""Servers on real components: each kind of object store, warehouse and catalog, all outside the data directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest

from arka.testing.backends import BACKENDS, Backend, Components
from arka.testing.serverprocess import ServerProcess
from tests.process.clients import connect

#: What every server of this folder gets: short pauses, and time to finish on a busy machine.
QUICK = {"server.drain_s": 30, "iceberg.commit_interval_s": 0.1, "limits.disk_free_bytes": 0}


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Components]:
    """One SeaweedFS and one PostgreSQL for all tests of a session that do them no harm."""
    with Components(tmp_path_factory.mktemp("components")) as made:
        yield made


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, components: Components) -> Backend:
    """An empty place of each kind for objects, warehouse and catalog."""
    return components.backend(request.param)


@pytest.fixture(scope="module")
def server(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on the module's backend; in the end it must drain and exit with 0."""
    with ServerProcess(tmp_path_factory.mktemp("server") / "data", QUICK | dict(backend.settings)) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[flight.FlightClient]:
    with connect(server.location) as opened:
        yield opened


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Make servers of a test's own; what it leaves running is killed.

    Two with the same ``data`` share a data directory; ``settings`` replaces the backend's.
    """
    made: list[ServerProcess] = []

    def make(
        where: Backend,
        *flags: str,
        data: str = "data",
        settings: Mapping[str, str] | None = None,
        **more: Any,
    ) -> ServerProcess:
        keys = {key.replace("__", "."): value for key, value in more.items()}
        chosen = where.settings if settings is None else settings
        made.append(ServerProcess(tmp_path / data, {**QUICK, **chosen, **keys}, *flags))
        return made[-1]

    yield make
    for process in made:
        process.kill()


@pytest.fixture
def table(backend: Backend) -> str:
    """A table name that no other test uses."""
    return f"{backend.namespace}.t{next(_numbers)}"


_numbers = count(1)
