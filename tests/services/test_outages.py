"""The object store or the catalog goes away: the node's own tiers go on acking, after a restart too; the rest comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arka.testing.backends import Backend, Components
from arka.testing.proxy import Cut, CuttingProxy, Rule, http_answer
from arka.testing.serverprocess import ServerProcess
from arka.testing.services import wait_for
from tests.process.clients import (
    TIERS,
    Ack,
    Stream,
    check_order,
    connect,
    create,
    failure_of,
    numbers,
    write_all,
)
from tests.services import lake
from tests.services.outage import check_memory, run_outage
from tests.services.padded import PADDED, SMALL_SEGMENTS, padded, wait_released, write_padded
from tests.services.reader import Reader

pytestmark = [pytest.mark.process, pytest.mark.slow]

BATCHES = 40


@pytest.fixture(scope="module")
def own_components(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Components]:
    """Components that tests of this module may kill."""
    with Components(tmp_path_factory.mktemp("killed")) as made:
        yield made


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
            reader.wait("disk", BATCHES)
            assert reader.count("object_storage") == 0
        finally:
            if how == "killed":
                weed.start()
            else:
                weed.thaw()
        stream.writer.done_writing()
        check_order(reader.finish(), "iceberg_committed", BATCHES)
    server.stop()
    assert lake.numbers_in(backend, table) == list(range(-1, BATCHES))


@pytest.mark.long
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


def test_restart_while_the_store_is_away(own_components: Components, make_server: Callable[..., ServerProcess]) -> None:
    """A restart without its object store serves: memory and disk acks, keys of released segments; the rest follows.

    Of two servers, one has a catalog that answers while no table's metadata can be read; the other's is away too.
    """
    weed = own_components.seaweedfs
    away = [Away(own_components.backend(name), make_server) for name in ("s3-sqlite", "s3-rest")]
    weed.kill()
    try:
        for site in away:
            site.restart()
        for site in away:
            site.write_without_the_store()
    finally:
        weed.start()
    for site in away:
        site.check()


class Away:
    """A server that is killed and started again while its object store is away, and one stream of its second life."""

    def __init__(self, backend: Backend, make_server: Callable[..., ServerProcess]) -> None:
        """Commit rows, and wait until the log has let go of the segment that held the first ones."""
        self.backend = backend
        self.table = f"{backend.namespace}.t"
        self.server = make_server(backend, data=backend.name, **SMALL_SEGMENTS).start()
        with connect(self.server.location) as client:
            create(client, self.table, [("n", "int64!"), ("pad", "binary")])
            self.lsns = write_padded(client, self.table, range(6), "iceberg_committed")
        wait_released(self.server)

    def restart(self) -> None:
        """Write what only the disk has, and begin the second life."""
        with connect(self.server.location) as client:
            self.lsns |= write_padded(client, self.table, range(6, 9), "disk")
        self.server.kill()
        self.server.spawn()

    def write_without_the_store(self) -> None:
        """Send all of it again, and more; the acks of memory and disk come, and no others."""
        self.server.wait_ready()
        self.client = connect(self.server.location)
        self.stream = Stream(self.client, self.table, PADDED, requested_durability="iceberg_committed")
        self.reader = Reader(self.stream)
        for n in range(12):
            self.stream.write(padded(n), idempotency_key=f"k{n}")
        self.stream.writer.done_writing()
        self.reader.wait("disk", 12)
        assert {ack["durability_level"] for ack in self.reader.acks} == {"memory", "disk"}, self.server.log_tail()

    def check(self) -> None:
        """The store is back: every ack comes, and every row is there once."""
        acks = self.reader.finish()
        self.client.close()
        check_tiers(acks, 12)
        given = {ack["sequence"]: ack["lsn"] for ack in acks}
        assert {n: given[n] for n in self.lsns} == self.lsns, "a key of the first life has another LSN"
        assert {ack["sequence"] for ack in acks if ack.get("duplicate")} == set(self.lsns)
        assert min(given[n] for n in range(9, 12)) > max(self.lsns.values())
        self.server.stop()
        assert lake.numbers_in(self.backend, self.table) == list(range(12))


@contextmanager
def rest_away(components: Components) -> Iterator[tuple[Backend, Callable[[], None], Callable[[], None]]]:
    """A REST catalog whose requests can be refused with 503 while the store answers."""
    backend = components.backend("s3-rest")
    port = components.seaweedfs.iceberg_port
    with CuttingProxy(port) as proxy:
        rules: list[Rule] = []

        def leave() -> None:
            proxy.cut_all()
            refusal = http_answer("503 Service Unavailable")
            rules.append(proxy.break_next(b"HTTP/1.1", Cut.ANSWER, times=1_000_000, answer=refusal))

        def come_back() -> None:
            for rule in rules:
                rule.times = 0

        yield backend.behind(port, proxy.port), leave, come_back


@contextmanager
def postgres_away(components: Components) -> Iterator[tuple[Backend, Callable[[], None], Callable[[], None]]]:
    """A PostgreSQL that can be stopped."""
    backend = components.backend("s3-postgres")
    database = components.postgresql

    def come_back() -> None:
        if not database.running:
            database.start()

    yield backend, database.stop, come_back


@pytest.mark.parametrize(
    "site", [pytest.param(postgres_away, marks=pytest.mark.long), rest_away], ids=["postgres-stopped", "rest-refuses"]
)
def test_restart_while_the_catalog_is_away(
    own_components: Components, make_server: Callable[..., ServerProcess], site: Any
) -> None:
    """A restart without its catalog: tables that the log knows take writes up to object_storage; commits follow."""
    with site(own_components) as (backend, leave, come_back):
        table = f"{backend.namespace}.t"
        server = make_server(backend).start()
        with connect(server.location) as client:
            create(client, table)
            lsns = check_order(write_all(client, table, [numbers([n]) for n in range(3)]), "iceberg_committed", 3)
        server.kill()
        leave()
        try:
            server.start()
            with connect(server.location) as client:
                stream = Stream(client, table, requested_durability="iceberg_committed")
                reader = Reader(stream)
                for n in range(3, 3 + BATCHES):
                    stream.write(numbers([n]))
                reader.wait("object_storage", BATCHES)
                assert reader.count("iceberg_committed") == 0
                assert "unavailable" in failure_of(create, client, f"{backend.namespace}.other")
                come_back()
                stream.writer.done_writing()
                acks = reader.finish()
        finally:
            come_back()
        assert check_order(acks, "iceberg_committed", BATCHES)[0] > lsns[-1]
        server.stop()
        assert lake.numbers_in(backend, table) == list(range(3 + BATCHES))


def check_tiers(acks: list[Ack], count: int) -> None:
    """Check that each write got its four acks, in order, none of them an error."""
    assert [ack for ack in acks if ack["error"] is not None] == []
    for tier in TIERS:
        assert [ack["sequence"] for ack in acks if ack["durability_level"] == tier] == list(range(count))
    for sequence in range(count):
        assert [ack["durability_level"] for ack in acks if ack["sequence"] == sequence] == list(TIERS)


@pytest.mark.long
def test_short_outage_under_load(tmp_path: Path, own_components: Components) -> None:
    """10 s without the store under 20 MB/s: memory stays under its limit, every ack comes, rows are exact."""
    figures = run_outage(tmp_path, own_components, outage_s=10, mb_per_s=20)
    print(figures.line())
    assert figures.disk_acks_during_outage > 0
    check_memory(figures)
