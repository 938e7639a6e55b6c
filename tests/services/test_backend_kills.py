"""SIGKILL in the middle of streams, on every kind of object store, warehouse and catalog."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest

from arka.testing.backends import Backend
from arka.testing.serverprocess import ServerProcess, wait_gone
from tests.process.clients import connect, create, numbers
from tests.process.test_crash import BATCH_ROWS, KeyedWriter
from tests.services import lake

pytestmark = [pytest.mark.process, pytest.mark.slow]

ROUNDS = 3
BUCKETS = {"spec_id": 0, "fields": [{"source_id": 0, "name": "n_bucket", "transform": "bucket[3]"}]}


def test_kills_and_resends_are_exact(backend: Backend, make_server: Callable[..., ServerProcess]) -> None:
    """Two writers that resend by key after each of three SIGKILLs have each row in Iceberg exactly once."""
    pick = random.Random(backend.name)
    server = make_server(backend)
    writers = [KeyedWriter(f"{backend.namespace}.{name}") for name in ("plain", "parts")]
    for number in range(ROUNDS):
        server.start()
        if number == 0:
            with connect(server.location) as client:
                create(client, writers[0].table)
                create(client, writers[1].table, partition_spec=BUCKETS)
        gone, progress = threading.Event(), threading.Event()
        threads = [threading.Thread(target=writer.run, args=(server.location, gone, progress)) for writer in writers]
        for thread in threads:
            thread.start()
        assert progress.wait(60), server.log_tail()
        gone.wait(pick.uniform(0.1, 1.0))
        workers = server.descendants()
        server.kill()
        gone.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert [writer.failures for writer in writers] == [[], []], server.log_tail()
        assert wait_gone(workers) == set()
    server.start()
    with connect(server.location) as client:
        for writer in writers:
            stream, first = writer.open(client)
            stream.acks(4)
            for number in range(first, writer.sent):
                stream.write(numbers(range(number * BATCH_ROWS, (number + 1) * BATCH_ROWS)))
            for ack in stream.finish():
                writer.take(ack, first + ack["sequence"])
            assert writer.on_disk == set(range(writer.sent))
    server.stop()
    for writer in writers:
        assert writer.sent > ROUNDS
        assert Counter(lake.numbers_in(backend, writer.table)) == Counter(range(writer.sent * BATCH_ROWS))
