"""SIGKILL in the middle of streams, on every kind of object store, warehouse and catalog."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest

from arka.testing.backends import Backend
from arka.testing.serverprocess import ServerProcess, wait_gone
from tests.process.clients import connect, create
from tests.process.keyed import KeyedWriter, Node, check_broken
from tests.services import lake

pytestmark = [pytest.mark.process, pytest.mark.slow]

ROUNDS = 3
BUCKETS = {"spec_id": 0, "fields": [{"source_id": 0, "name": "n_bucket", "transform": "bucket[3]"}]}
COLUMNS = [("n", "int64!"), ("pad", "utf8")]
JOIN_TIMEOUT_S = 90.0


@pytest.mark.parametrize(
    "backend",
    ["s3-rest", *(pytest.param(name, marks=pytest.mark.long) for name in ("local-sqlite", "s3-sqlite", "s3-postgres"))],
    indirect=True,
)
def test_kills_and_resends_are_exact(backend: Backend, make_server: Callable[..., ServerProcess]) -> None:
    """Two writers that resend by key after each of three SIGKILLs have each row in Iceberg exactly once."""
    pick = random.Random(backend.name)
    server = make_server(backend)
    node = Node()
    writers = [
        KeyedWriter(node, number, f"{backend.namespace}.{name}", durability, pad=str, window=50, pace_s=0.005)
        for number, (name, durability) in enumerate((("plain", "disk"), ("parts", "object_storage")))
    ]
    for number in range(ROUNDS):
        node.begin_life()
        server.start()
        if number == 0:
            with connect(server.location) as client:
                create(client, writers[0].table, COLUMNS)
                create(client, writers[1].table, COLUMNS, partition_spec=BUCKETS)
        before = [writer.sent for writer in writers]
        gone = threading.Event()
        threads = _write(server, writers, None, gone)
        while [writer.sent for writer in writers] == before and server.exit_code is None:
            gone.wait(0.01)
        gone.wait(pick.uniform(0.1, 1.0))
        workers = server.descendants()
        server.kill()
        gone.set()
        _join(threads)
        assert wait_gone(workers) == set()
    node.begin_life()
    server.start()
    _join(_write(server, writers, 0, threading.Event()))
    server.stop()
    check_broken(writers)
    for writer in writers:
        assert writer.sent > ROUNDS
        assert Counter(lake.numbers_in(backend, writer.table)) == Counter(writer.rows())


def _write(
    server: ServerProcess, writers: list[KeyedWriter], count: int | None, gone: threading.Event
) -> list[threading.Thread]:
    threads = [threading.Thread(target=writer.run, args=(server.location, count, gone)) for writer in writers]
    for thread in threads:
        thread.start()
    return threads


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(JOIN_TIMEOUT_S)
        assert not thread.is_alive()
