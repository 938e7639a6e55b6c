"""The object store goes away while writers go on: its node's own tiers go on acking, the rest comes later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arka.testing.backends import Backend, Components
from arka.testing.serverprocess import ServerProcess
from arka.testing.services import wait_for
from tests.process.clients import Ack, Stream, check_order, connect, create, numbers, write_all
from tests.services import lake
from tests.services.outage import check_memory, run_outage

pytestmark = [pytest.mark.process, pytest.mark.slow]

BATCHES = 40


@pytest.fixture(scope="module")
def own_components(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Components]:
    """Components that tests of this module may kill."""
    with Components(tmp_path_factory.mktemp("killed")) as made:
        yield made


class Reader(threading.Thread):
    """Reads a stream's acks as they come."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self.acks: list[Ack] = []
        self._stream = stream
        self.start()

    def run(self) -> None:
        self.acks.extend(self._stream.rest())

    def count(self, tier: str) -> int:
        return sum(ack["durability_level"] == tier for ack in tuple(self.acks))


@pytest.mark.parametrize(("name", "how"), [("s3-sqlite", "killed"), ("s3-rest", "frozen")])
def test_store_away(own_components: Components, make_server: Callable[..., ServerProcess], name: str, how: str) -> None:
    """While the store is killed or frozen, writes are acked in memory and on disk; later acks follow its return."""
    backend = own_components.backend(name)
    weed = own_components.seaweedfs
    table = f"{backend.namespace}.t"
    server = make_server(backend, iceberg__job_deadline_s=15).start()
    with connect(server.location) as client:
        create(client, table)
        write_all(client, table, [numbers([-1])])
        stream = Stream(client, table, requested_durability="iceberg_committed")
        reader = Reader(stream)
        if how == "killed":
            weed.kill()
        else:
            weed.freeze()
        try:
            for n in range(BATCHES):
                stream.write(numbers([n]))
            wait_for(lambda: reader.count("disk") == BATCHES, "disk acks while the store is away")
            assert reader.count("object_storage") == 0
        finally:
            if how == "killed":
                weed.start()
            else:
                weed.thaw()
        stream.writer.done_writing()
        reader.join(90)
        assert not reader.is_alive(), server.log_tail()
        check_order(reader.acks, "iceberg_committed", BATCHES)
        stream.writer.close()
    server.stop()
    assert lake.numbers_in(backend, table) == list(range(-1, BATCHES))


def test_start_while_the_store_is_away(own_components: Components, make_server: Callable[..., ServerProcess]) -> None:
    """SIGTERM ends a server whose start waits for its store and catalog, with exit code 0, and it starts later on."""
    backend = own_components.backend("s3-rest")
    table = f"{backend.namespace}.t"
    server = make_server(backend).start()
    with connect(server.location) as client:
        create(client, table)
        write_all(client, table, [numbers([1])])
    server.stop()
    own_components.seaweedfs.kill()
    try:
        server.spawn()
        wait_for(lambda: "unavailable" in server.log_tail(1), "the start waits")
        server.stop()
    finally:
        own_components.seaweedfs.start()
    server.start()
    with connect(server.location) as client:
        write_all(client, table, [numbers([2])])
    server.stop()
    assert lake.numbers_in(backend, table) == [1, 2]


@pytest.mark.parametrize(("kind", "harm"), [("local-sqlite", "removed"), ("s3-postgres", "garbage")])
def test_one_broken_table_delays_no_other(
    components: Components, make_server: Callable[..., ServerProcess], kind: str, harm: str
) -> None:
    """A table whose metadata file is gone or garbage waits alone; mended, its acks come and no row is lost."""
    backend = components.backend(kind)
    broken, sound = (f"{backend.namespace}.{name}" for name in ("broken", "sound"))
    server = make_server(backend).start()
    with connect(server.location) as client:
        for table in (broken, sound):
            create(client, table)
            write_all(client, table, [numbers([0])])
        # The worker that commits to it has the metadata in memory; another process's would read the file.
        server.stop()
        server.start()
    with connect(server.location) as client:
        found = lake.load(backend, broken)
        before = found.io.new_input(found.metadata_location).open().read()
        _replace(backend, found, None if harm == "removed" else b"no metadata at all")
        stream = Stream(client, broken, requested_durability="iceberg_committed")
        reader = Reader(stream)
        stream.write(numbers([1]))
        for n in range(1, 4):
            check_order(write_all(client, sound, [numbers([n])]), "iceberg_committed", 1)
        wait_for(lambda: reader.count("object_storage") == 1, "the broken table's writes are safe in the store")
        assert reader.count("iceberg_committed") == 0
        _replace(backend, found, before)
        stream.writer.done_writing()
        reader.join(60)
        assert not reader.is_alive(), server.log_tail()
        check_order(reader.acks, "iceberg_committed", 1)
        stream.writer.close()
    server.stop()
    assert lake.numbers_in(backend, broken) == [0, 1]
    assert lake.numbers_in(backend, sound) == [0, 1, 2, 3]


def _replace(backend: Backend, found, contents: bytes | None) -> None:
    """Replace a table's current metadata file; None: remove it."""
    if contents is None:
        found.io.delete(found.metadata_location)
        return
    with found.io.new_output(found.metadata_location).create(overwrite=True) as file:
        file.write(contents)


def test_short_outage_under_load(tmp_path: Path, own_components: Components) -> None:
    """10 s without the store under 20 MB/s: memory stays under its limit, every ack comes, rows are exact."""
    figures = run_outage(tmp_path, own_components, outage_s=10, mb_per_s=20)
    print(figures.line())
    assert figures.disk_acks_during_outage > 0
    check_memory(figures)
