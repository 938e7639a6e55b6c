"""The same promises on every kind of object store, warehouse and catalog."""

from __future__ import annotations

from datetime import date

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from pyiceberg.exceptions import NoSuchTableError

from arka.testing.backends import Backend
from arka.testing.serverprocess import ServerProcess
from tests.process.clients import (
    TIERS,
    Stream,
    action,
    check_order,
    connect,
    create,
    failure_of,
    numbers,
    write_all,
)
from tests.services import lake

pytestmark = pytest.mark.process

EVENTS = pa.schema(
    [pa.field("id", pa.int64(), nullable=False), pa.field("day", pa.date32()), pa.field("who", pa.string())]
)
BY_DAY_AND_ID = [
    {"source_id": 1, "name": "by_day", "transform": "day"},
    {"source_id": 0, "name": "by_id", "transform": "bucket[4]"},
]


def _events(count: int) -> pa.RecordBatch:
    return pa.record_batch(
        [range(count), [date(2026, 1, 1 + number % 3) for number in range(count)], [f"w{n}" for n in range(count)]],
        schema=EVENTS,
    )


def test_every_tier_is_acked_in_order(backend: Backend, client: flight.FlightClient, table: str) -> None:
    """Each of 20 writes gets its four acks in order, and the snapshot of the last one holds all rows."""
    create(client, table)
    acks = write_all(client, table, [numbers([n]) for n in range(20)])
    check_order(acks, "iceberg_committed", 20)
    found = lake.load(backend, table)
    assert acks[-1]["snapshot_id"] == str(found.current_snapshot().snapshot_id)
    assert lake.numbers_in(backend, table) == list(range(20))


def test_partitioned_table(backend: Backend, client: flight.FlightClient, table: str) -> None:
    """Rows of several partitions in one batch land in files of their own, found by a partition filter."""
    fields = [("id", "int64!"), ("day", "date32"), ("who", "utf8")]
    create(client, table, fields, partition_spec={"spec_id": 0, "fields": BY_DAY_AND_ID})
    write_all(client, table, [_events(40)])
    found = lake.load(backend, table)
    assert lake.rows(backend, table).sort_by("id").to_pylist() == _events(40).to_pylist()
    second = found.scan(row_filter="day = '2026-01-02'")
    assert second.to_arrow().num_rows == 13
    assert {task.file.partition[0] for task in second.plan_files()} == {(date(2026, 1, 2) - date(1970, 1, 1)).days}


def test_duplicates_add_nothing(backend: Backend, client: flight.FlightClient, table: str) -> None:
    """A known key's second write adds no row and has the first one's LSN, before and after the commit (R21)."""
    create(client, table)
    stream = Stream(client, table, requested_durability="iceberg_committed")
    for n in (1, 2, 1):
        stream.write(numbers([n]), idempotency_key=f"key-{n}")
    acks = stream.finish()
    lsns = {ack["sequence"]: ack["lsn"] for ack in acks}
    assert lsns[2] == lsns[0] < lsns[1]
    later = Stream(client, table, requested_durability="iceberg_committed")
    later.write(numbers([2]), idempotency_key="key-2")
    assert [(ack["lsn"], ack["duplicate"], ack["durability_level"]) for ack in later.finish()] == [
        (lsns[1], True, tier) for tier in TIERS
    ]
    assert lake.numbers_in(backend, table) == [1, 2]


@pytest.mark.parametrize("purge", [False, True], ids=["keep", "purge"])
def test_drop_and_create_again(backend: Backend, client: flight.FlightClient, table: str, purge: bool) -> None:
    """A dropped name can be used again at once: the new table has none of the old rows, and a folder of its own."""
    create(client, table)
    write_all(client, table, [numbers([1])])
    old = lake.load(backend, table)
    action(client, "DropTable", name=table, purge=purge)
    with lake.open_catalog(backend) as catalog, pytest.raises(NoSuchTableError):
        catalog.load_table(table)
    assert "table_not_found" in failure_of(action, client, "DescribeTable", name=table)
    # SeaweedFS owns the files of its catalog's tables: they go with the table, whatever the request says.
    gone = purge or backend.name == "s3-rest"
    assert old.io.new_input(old.metadata_location).exists() is not gone
    if not gone:
        assert old.scan().to_arrow()["n"].to_pylist() == [1]
    create(client, table)
    write_all(client, table, [numbers([2])])
    assert lake.load(backend, table).location() != old.location()
    assert lake.numbers_in(backend, table) == [2]


def test_flush_and_do_get(backend: Backend, client: flight.FlightClient, table: str) -> None:
    """After Flush, pyiceberg and DoGet see everything accepted before it, each row once."""
    create(client, table)
    write_all(client, table, [numbers([n]) for n in range(5)], "memory")
    action(client, "Flush", name=table)
    assert lake.numbers_in(backend, table) == [0, 1, 2, 3, 4]
    got = client.do_get(flight.Ticket(table.encode())).read_all()
    assert sorted(got["n"].to_pylist()) == [0, 1, 2, 3, 4]


def test_handshake(client: flight.FlightClient, table: str, backend: Backend) -> None:
    """A client that comes back is told per tier up to where nothing is missing (protocol 3.3)."""
    create(client, table)
    lsns = check_order(write_all(client, table, [numbers([n]) for n in range(3)]), "iceberg_committed", 3)
    stream = Stream(client, table, None, resume_after_lsn=lsns[-1])
    handshake = stream.acks(4)
    assert [(ack["sequence"], ack["durability_level"]) for ack in handshake] == [(-1, tier) for tier in TIERS]
    assert min(ack["lsn"] for ack in handshake) >= lsns[-1]
    stream.writer.begin(numbers([]).schema)
    stream.finish()


def test_foreign_rows_stay(backend: Backend, client: flight.FlightClient, table: str) -> None:
    """Rows that plain pyiceberg appends between our commits stay, and so do ours."""
    create(client, table)
    write_all(client, table, [numbers([1])])
    lake.append(backend, table, numbers([100]))
    write_all(client, table, [numbers([2])])
    lake.append(backend, table, numbers([101]), expire=True)
    write_all(client, table, [numbers([3])])
    assert lake.numbers_in(backend, table) == [1, 2, 3, 100, 101]


def test_renamed_by_others(backend: Backend, client: flight.FlightClient, table: str) -> None:
    """A table that others rename in the midst of a stream is followed: the stream's acks come, the old name is free."""
    create(client, table)
    renamed = f"{table}_renamed"
    stream = Stream(client, table, requested_durability="iceberg_committed")
    stream.write(numbers([0]))
    acks = stream.acks(4)
    with lake.open_catalog(backend) as catalog:
        catalog.rename_table(table, renamed)
    for n in range(1, 4):
        stream.write(numbers([n]))
    check_order(acks + stream.finish(), "iceberg_committed", 4)
    write_all(client, renamed, [numbers([4])])
    assert "table_not_found" in failure_of(write_all, client, table, [numbers([5])])
    assert lake.numbers_in(backend, renamed) == [0, 1, 2, 3, 4]
    create(client, table)
    write_all(client, table, [numbers([6])])
    assert lake.numbers_in(backend, table) == [6]


def test_restart(backend: Backend, server: ServerProcess, table: str) -> None:
    """A stopped server goes on where it was: tables, keys and LSNs, with objects and catalog out of its hands."""
    with connect(server.location) as client:
        create(client, table)
        stream = Stream(client, table, requested_durability="iceberg_committed")
        stream.write(numbers([1]), idempotency_key="first")
        (lsn,) = {ack["lsn"] for ack in stream.finish()}
    server.stop()
    server.start()
    with connect(server.location) as client:
        stream = Stream(client, table, requested_durability="iceberg_committed")
        stream.write(numbers([1]), idempotency_key="first")
        stream.write(numbers([2]), idempotency_key="second")
        acks = stream.finish()
    assert {(ack["lsn"], ack["duplicate"]) for ack in acks if ack["sequence"] == 0} == {(lsn, True)}
    assert all(ack["lsn"] > lsn for ack in acks if ack["sequence"] == 1)
    assert lake.numbers_in(backend, table) == [1, 2]
