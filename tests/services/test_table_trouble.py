"""A table's trouble stays its own: broken, dropped by others or with a catalog that hangs, it delays no other (R19)."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import obstore
import obstore.store
import pyarrow as pa
import pytest
from pyiceberg.table import Table

from arka.testing.backends import Backend, Components
from arka.testing.proxy import Cut, CuttingProxy
from arka.testing.serverprocess import ServerProcess
from arka.testing.services import wait_for
from tests.process.clients import NUMBERS, Stream, action, check_order, connect, create, numbers, write_all
from tests.services import lake
from tests.services.padded import PADDED, SMALL_SEGMENTS, padded, wait_released, write_padded
from tests.services.reader import Reader

pytestmark = [pytest.mark.process, pytest.mark.slow]

#: How long a worker may wait for a catalog that says nothing. The job after one that was killed starts another worker
#: within its own deadline, which took a busy machine more than six seconds.
DEADLINE_S = 15


@pytest.mark.parametrize(
    ("kind", "harm", "at_start"),
    [
        ("local-sqlite", "garbage", True),
        pytest.param("s3-postgres", "removed", False, marks=pytest.mark.long),
        ("s3-postgres", "garbage", False),
    ],
)
def test_one_broken_table_delays_no_other(
    components: Components, make_server: Callable[..., ServerProcess], kind: str, harm: str, at_start: bool
) -> None:
    """A table whose metadata file is gone or garbage waits alone; mended, its acks come and no row is lost.

    A file that is gone at the start is not here: the table refuses writes then (tests/process/test_warehouse.py).
    """
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
    # The stream must not look at the catalog before its writes are accepted.
    server = make_server(backend, iceberg__adopt_s=3600, **SMALL_SEGMENTS).start()
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
    # A span is from a commit's first write to its last; other records and restarts take LSNs between two.
    assert all(before[1] < after[0] for before, after in pairwise(spans)), spans
    assert all(any(first <= lsn <= last for first, last in spans) for lsn in lsns.values()), (spans, lsns)
    assert lake.numbers_in(backend, other) == list(range(5))


@pytest.mark.parametrize("kind", ["s3-rest", pytest.param("s3-postgres", marks=pytest.mark.long)])
def test_table_renamed_by_others_while_it_is_dropped(
    components: Components, make_server: Callable[..., ServerProcess], kind: str
) -> None:
    """A drop whose table others rename at that moment deletes no file of the table that has the name then (R5, R29).

    A SQL catalog keeps that table's entry too. A REST catalog has no conditional drop: the entry may go, and the log
    says so; its files stay.
    """
    backend = components.backend(kind)
    name, kept = (f"{backend.namespace}.{part}" for part in ("moved", "kept"))
    server = make_server(backend)
    server.failpoints = "catalog.drop=pause:8"
    server.start()
    with connect(server.location) as client, lake.open_catalog(backend) as catalog:
        create(client, name)
        write_all(client, name, [numbers([1])])
        with ThreadPoolExecutor(1) as pool:
            dropping = pool.submit(action, client, "DropTable", name=name, purge=True)
            # The drop waits at its failpoint by then.
            time.sleep(3)
            old = catalog.load_table(name)
            catalog.rename_table(name, kept)
            other = catalog.create_table(name, NUMBERS)
            other.append(pa.Table.from_batches([numbers([77])]))
            assert dropping.result()["dropped"]
        assert not catalog.table_exists(kept)
        assert old.metadata.table_uuid != other.metadata.table_uuid
        if kind == "s3-postgres":
            assert lake.numbers_in(backend, name) == [77]
            assert not old.io.new_input(old.metadata_location).exists()
    server.stop()


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
            wait_for(lambda: "catalog.deadline_missed" in server.log_tail(), "a job that misses its deadline")
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
