"""The object store or the catalog goes away: the node's own tiers go on acking, also after a restart; the rest comes.

A table's trouble stays its own: whose catalog entry is broken, or hangs, delays no other (R19).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import obstore
import obstore.store
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from pyiceberg.table import Table

from arka.testing.backends import Backend, Components
from arka.testing.proxy import Cut, CuttingProxy, Rule, http_answer
from arka.testing.serverprocess import ServerProcess
from arka.testing.services import wait_for
from arka.wal.segment import segment_name
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
from tests.services.reader import Reader

pytestmark = [pytest.mark.process, pytest.mark.slow]

BATCHES = 40
#: How long a worker may wait for a catalog that says nothing; a busy machine needs seconds to start one.
DEADLINE_S = 6
PADDED = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("pad", pa.binary())])
#: Two rows and what is beside them fill the smallest segment.
PAD_BYTES = 600_000
SMALL_SEGMENTS = {"wal__segment_bytes": 1 << 20, "wal__release_grace_s": 0}


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


def padded(n: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array([n]), pa.array([bytes(PAD_BYTES)])], schema=PADDED)


def write_padded(client: flight.FlightClient, table: str, values: range, durability: str) -> dict[int, int]:
    """Write one value a batch, each with its key, to a table of numbers and padding; returns the LSNs."""
    stream = Stream(client, table, PADDED, requested_durability=durability)
    for n in values:
        stream.write(padded(n), idempotency_key=f"k{n}")
    acks = stream.finish()
    assert [ack for ack in acks if ack["error"] is not None] == []
    return {values[ack["sequence"]]: ack["lsn"] for ack in acks if ack["durability_level"] == durability}


def wait_released(server: ServerProcess) -> None:
    """Wait until the log has let go of its first segment."""
    first = server.data / "wal" / segment_name(1)
    wait_for(lambda: not first.exists(), "the first segment is released")


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


@pytest.mark.parametrize("site", [postgres_away, rest_away], ids=["postgres-stopped", "rest-refuses"])
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


@pytest.mark.parametrize(
    ("kind", "harm", "at_start"), [("local-sqlite", "removed", True), ("s3-postgres", "garbage", False)]
)
def test_one_broken_table_delays_no_other(
    components: Components, make_server: Callable[..., ServerProcess], kind: str, harm: str, at_start: bool
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
    found = lake.load(backend, broken)
    before = found.io.new_input(found.metadata_location).open().read()
    damage = partial(_replace, found, None if harm == "removed" else b"\xff no metadata at all")
    if at_start:
        damage()
    server.start()
    with connect(server.location) as client:
        if not at_start:
            damage()
        stream = Stream(client, broken, requested_durability="iceberg_committed")
        reader = Reader(stream)
        stream.write(numbers([1]))
        for n in range(1, 4):
            check_order(write_all(client, sound, [numbers([n])]), "iceberg_committed", 1)
        reader.wait("object_storage", 1)
        assert reader.count("iceberg_committed") == 0
        _replace(found, before)
        stream.writer.done_writing()
        check_order(reader.finish(), "iceberg_committed", 1)
    server.stop()
    assert lake.numbers_in(backend, broken) == [0, 1]
    assert lake.numbers_in(backend, sound) == [0, 1, 2, 3]


def _replace(found: Table, contents: bytes | None) -> None:
    """Replace a table's current metadata file; None: remove it."""
    if contents is None:
        found.io.delete(found.metadata_location)
        return
    with found.io.new_output(found.metadata_location).create(overwrite=True) as file:
        file.write(contents)


def parked_keys(backend: Backend) -> list[str]:
    """The keys of parked objects: what the node's store has below ``parked/``."""
    config = {
        key.removeprefix("object_store.config."): value
        for key, value in backend.settings.items()
        if key.startswith("object_store.config.")
    }
    url = backend.settings["object_store.url"]
    store = obstore.store.from_url(url, config=config, client_options={"allow_http": True})
    return [meta["path"] for metas in obstore.list(store, "arka-0/parked") for meta in metas]


def test_table_dropped_by_others(components: Components, make_server: Callable[..., ServerProcess]) -> None:
    """What waits for a table that others drop gets outcome_unknown and is parked; registered again, it is committed.

    Another table goes on and the log is released meanwhile; the parked writes come once, in order, behind the rows
    that the table had (R18).
    """
    backend = components.backend("s3-postgres")
    gone, other = (f"{backend.namespace}.{name}" for name in ("gone", "other"))
    fields = [("n", "int64!"), ("pad", "binary")]
    server = make_server(backend, **SMALL_SEGMENTS).start()
    with connect(server.location) as client:
        for table in (gone, other):
            create(client, table, fields)
        lsns = write_padded(client, gone, range(2), "iceberg_committed")
        with lake.open_catalog(backend) as catalog:
            last = catalog.load_table(gone)
            catalog.drop_table(gone)
        stream = Stream(client, gone, PADDED, requested_durability="iceberg_committed")
        for n in range(2, 5):
            stream.write(padded(n), idempotency_key=f"k{n}")
        acks = stream.finish()
        errors = [ack for ack in acks if ack["error"] is not None]
        assert [(ack["sequence"], ack["code"]) for ack in errors] == [(n, "outcome_unknown") for n in range(3)]
        assert "others dropped it" in errors[0]["error"]
        assert "iceberg_committed" not in {ack["durability_level"] for ack in acks if ack["error"] is None}
        lsns |= {2 + ack["sequence"]: ack["lsn"] for ack in errors}
        stream = Stream(client, gone, PADDED)
        stream.write(padded(5), idempotency_key="k5")
        assert [(ack["code"], ack["lsn"]) for ack in stream.finish()] == [("table_stopped", 0)]
        write_padded(client, other, range(5), "iceberg_committed")
        wait_for(lambda: f"arka-0/parked/{last.metadata.table_uuid}/" in "\n".join(parked_keys(backend)), "parked")
        wait_released(server)
    server.stop()
    with lake.open_catalog(backend) as catalog:
        catalog.register_table(gone, last.metadata_location)
    server.start()
    with connect(server.location) as client:
        # Resends; and the next write, behind what was parked.
        assert write_padded(client, gone, range(5), "iceberg_committed") == lsns
        assert write_padded(client, gone, range(5, 6), "iceberg_committed")[5] > max(lsns.values())
    wait_for(lambda: not parked_keys(backend), "what is committed is not kept")
    server.stop()
    assert lake.numbers_in(backend, gone) == list(range(6))
    notes = [snapshot.summary.additional_properties for snapshot in lake.load(backend, gone).metadata.snapshots]
    spans = [(int(note["arka.lsn-first"]), int(note["arka.lsn-last"])) for note in notes]
    assert all(before[1] + 1 == after[0] for before, after in pairwise(spans)), spans
    assert lake.numbers_in(backend, other) == list(range(5))


def test_catalog_that_hangs_for_one_table(components: Components, make_server: Callable[..., ServerProcess]) -> None:
    """A table whose catalog requests are never answered costs others one job deadline, then commits elsewhere (R19).

    A worker that waits for the catalog does nothing else. So the others' commits go through another one, if they are
    acked while one and the same request of the table is still without its answer.
    """
    backend = components.backend("s3-rest")
    port = components.seaweedfs.iceberg_port
    stuck, *others = (f"{backend.namespace}.{name}" for name in ("stuck", "one", "two"))
    many, passed, last = 1_000_000, 0, 0
    with CuttingProxy(port) as proxy:
        server = make_server(backend.behind(port, proxy.port), iceberg__job_deadline_s=DEADLINE_S).start()
        with connect(server.location) as client:
            for table in (stuck, *others):
                create(client, table)
                write_all(client, table, [numbers([-1])])
            rule = proxy.break_next(f"/tables/{stuck.partition('.')[2]}".encode(), Cut.SWALLOW, times=many)
            stream = Stream(client, stuck, requested_durability="iceberg_committed")
            reader = Reader(stream)
            stream.write(numbers([0]))
            wait_for(lambda: rule.held > 0, "a request without an answer")
            for table in others:
                write_all(client, table, [numbers([0])])
            assert "catalog.deadline_missed" in server.log_tail()
            while passed < 4:
                wait_for(lambda: rule.held > 0, "another request without an answer")
                request, last = rule.times, last + 1
                write_all(client, others[last % 2], [numbers([last])])
                passed += rule.held == 1 and rule.times == request
                assert last < 12, f"{passed} of {last} commits of others passed a table that is stuck"
            assert reader.count("iceberg_committed") == 0
            rule.times = 0
            proxy.cut_all()
            stream.writer.done_writing()
            check_order(reader.finish(), "iceberg_committed", 1)
        server.stop()
    assert lake.numbers_in(backend, stuck) == [-1, 0]
    assert sorted(n for table in others for n in lake.numbers_in(backend, table)) == [-1, -1, 0, *range(last + 1)]


def test_short_outage_under_load(tmp_path: Path, own_components: Components) -> None:
    """10 s without the store under 20 MB/s: memory stays under its limit, every ack comes, rows are exact."""
    figures = run_outage(tmp_path, own_components, outage_s=10, mb_per_s=20)
    print(figures.line())
    assert figures.disk_acks_during_outage > 0
    check_memory(figures)
