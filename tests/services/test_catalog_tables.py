"""A SQL catalog's own tables: made by whoever comes first, also when several come at once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from arka.testing.backends import Components
from arka.testing.serverprocess import ServerProcess
from tests.process.clients import connect, create, numbers, write_all
from tests.services import lake

pytestmark = pytest.mark.process

OPEN = """
import sys, time
from arka.iceberg.catalogs import connect
from arka.iceberg.config import CatalogConfig
uris, begin = sys.argv[2:], float(sys.argv[1])
time.sleep(max(0, begin - time.time()))
for uri in uris:
    connect(CatalogConfig(uri, "file:///nowhere")).close()
"""
PROCESSES = 3
DATABASES = 8
#: Time for the imports of all processes; one that needs longer only meets fewer others.
IMPORT_S = 6


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_processes_that_open_an_empty_database_at_once(components: Components, tmp_path: Path, kind: str) -> None:
    """Servers that start together on an empty database all open it, whoever makes the tables."""
    if kind == "sqlite":
        uris = [f"sqlite:///{tmp_path / f'{n}.db'}" for n in range(DATABASES)]
    else:
        for n in range(DATABASES):
            components.postgresql.create_database(f"race_{n}")
        uris = [components.postgresql.uri(f"race_{n}") for n in range(DATABASES)]
    begin = str(time.time() + IMPORT_S)
    running = [
        subprocess.Popen([sys.executable, "-c", OPEN, begin, *uris], stderr=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [(process.returncode, error) for process, error in zip(running, errors, strict=True)] == [
        (0, "") for _ in range(PROCESSES)
    ]


def test_database_that_was_away(tmp_path: Path, make_server: Callable[..., ServerProcess]) -> None:
    """After a restart of PostgreSQL the next CreateTable and commit succeed: broken connections are replaced."""
    with Components(tmp_path / "own") as components:
        backend = components.backend("s3-postgres")
        with make_server(backend) as server, connect(server.location) as client:
            create(client, f"{backend.namespace}.before")
            write_all(client, f"{backend.namespace}.before", [numbers([1])])
            components.postgresql.kill()
            components.postgresql.start()
            create(client, f"{backend.namespace}.after")
            for name in ("before", "after"):
                write_all(client, f"{backend.namespace}.{name}", [numbers([2])])
        assert lake.numbers_in(backend, f"{backend.namespace}.before") == [1, 2]
        assert lake.numbers_in(backend, f"{backend.namespace}.after") == [2]


def test_credentials_from_the_environment(
    components: Components, make_server: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The AWS variables alone lead obstore and pyiceberg to S3; no setting names a credential."""
    backend = components.backend("s3-sqlite")
    weed = components.seaweedfs
    for name, value in {
        "AWS_ACCESS_KEY_ID": weed.access_key,
        "AWS_SECRET_ACCESS_KEY": weed.secret_key,
        "AWS_ENDPOINT_URL": weed.s3_endpoint,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    settings = {key: value for key, value in backend.settings.items() if not key.startswith("object_store.config.")}
    table = f"{backend.namespace}.t"
    with make_server(backend, settings=settings) as server, connect(server.location) as client:
        create(client, table)
        write_all(client, table, [numbers([1])])
    assert lake.numbers_in(backend, table) == [1]
