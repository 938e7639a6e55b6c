"""Actions and reads through stock pyarrow: what protocol 2, 4 and 5 say of tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from pyiceberg.types import LongType

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import NUMBERS, TIERS, Stream, action, connect, create, failure_of, numbers, write_all

pytestmark = pytest.mark.process

#: The CreateTable of the seed's examples, append-only.
SEED = {
    "schema_json": json.dumps(
        {
            "fields": [
                {"name": "id", "data_type": "Int64", "nullable": False},
                {"name": "name", "data_type": "Utf8", "nullable": True},
                {"name": "score", "type": "float64"},
                {"name": "signup", "data_type": {"Timestamp": ["Microsecond", None]}},
            ]
        }
    ),
    "table_type": "AppendOnly",
    "partition_spec": {
        "spec_id": 1,
        "fields": [{"source_id": 3, "field_id": 1000, "name": "signup_day", "transform": "Day"}],
    },
}
SEED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        ("name", pa.string()),
        ("score", pa.float64()),
        ("signup", pa.timestamp("us")),
    ]
)

PAIRS = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("other", pa.int64(), nullable=False)])


def test_create_as_the_seed_does(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """The seed's CreateTable works as written and makes the table that plain pyiceberg finds."""
    made = action(client, "CreateTable", name=table, **SEED)
    assert made["name"] == f"default.{table}"
    assert made["created"] is True
    found = lake.load(server.data, table)
    assert str(found.metadata.table_uuid) == made["table_uuid"]
    assert [field.required for field in found.schema().fields] == [True, False, False, False]
    (field,) = found.spec().fields
    assert (field.source_id, field.field_id, field.name, str(field.transform)) == (4, 1000, "signup_day", "day")


def test_create_again(client: flight.FlightClient, table: str) -> None:
    """The same table again is ``created: false`` with the same UUID, however the name and the types are spelled."""
    first = action(client, "CreateTable", name=table, **SEED)
    again = action(client, "CreateTable", name=f"default.{table}", **SEED | {"table_type": "append_only"})
    assert again == first | {"created": False}
    nested = action(client, "CreateTable", name=table, **SEED | {"schema_json": json.loads(str(SEED["schema_json"]))})
    assert nested == first | {"created": False}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"partition_spec": None}, "partition"),
        ({"schema_json": {"fields": [{"name": "id", "type": "int64"}]}}, "schema"),
        ({"properties": {"comment": "me"}}, "comment"),
    ],
)
def test_create_a_different_one(
    client: flight.FlightClient, table: str, change: dict[str, Any], difference: str
) -> None:
    """Another table under a name that is taken is ALREADY_EXISTS, and the message says what differs."""
    action(client, "CreateTable", name=table, **SEED)
    request = {key: value for key, value in (SEED | change).items() if value is not None}
    if difference == "schema":
        del request["partition_spec"]
    message = failure_of(action, client, "CreateTable", name=table, **request)
    assert f"[table_exists] Table already exists: default.{table}" in message
    assert difference in message


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"name": "t"}, ["schema_json"]),
        ({"schema_json": '{"fields": []}'}, ["name"]),
        ({"name": "a.b.c", "schema_json": '{"fields": [{"name": "n", "type": "int64"}]}'}, ["a.b.c"]),
        ({"name": "1a", "schema_json": '{"fields": [{"name": "n", "type": "int64"}]}'}, ["1a"]),
        ({"name": "t", "schema_json": '{"fields": [{"name": "n", "type": "int65"}]}'}, ["int65", "'n'"]),
        ({"name": "t", "schema_json": "{"}, ["schema_json"]),
        ({"name": "t", "schema_json": '{"fields": [{"name": "n"}]}'}, ["'n'"]),
        ({"name": "t", **SEED, "partition_spec": {"fields": [{"source_id": 9, "transform": "Day"}]}}, ["9"]),
        ({"name": "t", **SEED, "partition_spec": {"fields": [{"source_id": 0, "transform": "Day"}]}}, ["day", "'id'"]),
        ({"name": "t", **SEED, "partition_spec": {"fields": [{"source_id": 0, "transform": "Week"}]}}, ["Week"]),
        ({"name": "t", **SEED, "partition_spec": {"fields": [{"source_id": 0, "transform": "Bucket(0)"}]}}, ["bucket"]),
    ],
)
def test_create_what_makes_no_sense(client: flight.FlightClient, request_: dict[str, Any], words: list[str]) -> None:
    """A CreateTable that cannot be meant is INVALID_ARGUMENT, naming the offending thing, and makes nothing."""
    before = action(client, "ListTables")
    message = failure_of(action, client, "CreateTable", **request_)
    assert message.startswith("ArrowInvalid"), message
    assert "[invalid_request]" in message
    assert [word for word in words if word not in message] == [], message
    assert action(client, "ListTables") == before


def test_list_tables_is_sorted(client: flight.FlightClient, table: str) -> None:
    """ListTables gives full names, sorted, over all namespaces."""
    for name in (f"{table}_z", f"{table}_a", f"a.{table}", f"z.{table}"):
        create(client, name)
    found = action(client, "ListTables")
    assert found == sorted(found)
    assert {f"default.{table}_z", f"default.{table}_a", f"a.{table}", f"z.{table}"} <= set(found)
    assert all("." in name for name in found)


def test_namespaces_are_apart(client: flight.FlightClient, table: str) -> None:
    """One bare name in two namespaces is two tables."""
    create(client, f"a.{table}")
    create(client, table)
    write_all(client, f"a.{table}", [numbers([1])])
    write_all(client, table, [numbers([2])])
    assert client.do_get(flight.Ticket(f"a.{table}".encode())).read_all()["n"].to_pylist() == [1]
    assert client.do_get(flight.Ticket(f"default.{table}".encode())).read_all()["n"].to_pylist() == [2]


def test_describe_table(client: flight.FlightClient, table: str) -> None:
    """DescribeTable says what the table is, where it lies, and how far each tier has come."""
    made = action(client, "CreateTable", name=table, **SEED | {"properties": {"comment": "me"}})
    empty = action(client, "DescribeTable", name=table)
    assert empty["name"] == f"default.{table}"
    assert empty["table_uuid"] == made["table_uuid"]
    assert empty["table_type"] == "append_only"
    assert empty["primary_key"] == []
    assert empty["snapshot_id"] is None
    assert empty["properties"]["comment"] == "me"
    assert [(f["name"], f["type"], f["nullable"]) for f in empty["schema"]["fields"]] == [
        ("id", "int64", False),
        ("name", "utf8", True),
        ("score", "float64", True),
        ("signup", "timestamp[us]", True),
    ]
    assert empty["partition_spec"]["fields"] == [
        {"source_id": 3, "field_id": 1000, "name": "signup_day", "transform": "day"}
    ]
    assert Path(empty["location"].removeprefix("file://")).is_dir()
    batch = pa.RecordBatch.from_pylist([{"id": 1, "name": None, "score": 0.5, "signup": None}], schema=SEED_SCHEMA)
    acks = write_all(client, table, [batch])
    full = action(client, "DescribeTable", name=f"default.{table}")
    assert set(full["watermarks"]) == set(TIERS)
    assert min(full["watermarks"].values()) >= acks[0]["lsn"]
    assert full["snapshot_id"] == acks[-1]["snapshot_id"]
    assert full["lag"]["frame_bytes"] == 0
    # What it says of schema and spec makes the same table again.
    again = action(client, "CreateTable", name=table, schema_json=full["schema"], partition_spec=full["partition_spec"])
    assert again["created"] is False


def test_unknown_tables(client: flight.FlightClient) -> None:
    """Every call that names a table that is not there is NOT_FOUND, named as the client wrote it."""
    path = flight.FlightDescriptor.for_path("nowhere")
    calls: list[Callable[[], Any]] = [
        lambda: action(client, "DescribeTable", name="nowhere"),
        lambda: action(client, "DropTable", name="nowhere"),
        lambda: action(client, "Flush", name="nowhere"),
        lambda: client.get_schema(path),
        lambda: client.get_flight_info(path),
        lambda: client.do_get(flight.Ticket(b"nowhere")).read_all(),
    ]
    for call in calls:
        assert "[table_not_found] Table not found: nowhere" in (message := failure_of(call))
        assert message.startswith("ArrowKeyError"), message


def test_drop_table(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A dropped table is gone from every list and call; its Iceberg data stays unless it is purged."""
    create(client, table)
    create(client, f"{table}_purged")
    for name in (table, f"{table}_purged"):
        write_all(client, name, [numbers([1])])
    folders = [
        Path(action(client, "DescribeTable", name=name)["location"].removeprefix("file://"))
        for name in (table, f"{table}_purged")
    ]
    assert action(client, "DropTable", name=table) == {"name": f"default.{table}", "dropped": True}
    assert action(client, "DropTable", name=f"{table}_purged", purge=True)["dropped"] is True
    assert [name for name in action(client, "ListTables") if table in name] == []
    assert "[table_not_found]" in failure_of(action, client, "DropTable", name=table)
    assert "[table_not_found]" in Stream(client, table).failure()
    assert len(list(folders[0].rglob("*.parquet"))) == 1
    assert list(folders[1].rglob("*.parquet")) == []
    with lake.open_catalog(server.data) as catalog:
        assert not catalog.table_exists(("default", table))


def test_drop_with_writes_in_flight(make_server: Callable[..., ServerProcess]) -> None:
    """Writes that wait for their commit when the table goes end with ``table_dropped``; so do later ones."""
    server = make_server(iceberg__commit_interval_s=600, server__drain_s=5).start()
    with connect(server.location) as client:
        create(client, "t")
        create(client, "bystander")
        other = Stream(client, "bystander", requested_durability="disk")
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        stream.write(numbers([0]))
        # The first commit need not wait; what comes after it has to.
        assert [ack["durability_level"] for ack in stream.acks(4)] == list(TIERS)
        for number in (1, 2, 3):
            stream.write(numbers([number]))
        before = stream.acks(9)
        assert {ack["error"] for ack in before} == {None}
        assert action(client, "DropTable", name="t")["dropped"] is True
        dropped = stream.acks(3)
        assert [(ack["sequence"], ack["code"]) for ack in dropped] == [(n, "table_dropped") for n in (1, 2, 3)]
        assert [ack["lsn"] for ack in dropped] == [
            ack["lsn"] for ack in before if ack["durability_level"] == "object_storage"
        ]
        stream.write(numbers([4]))
        rejected = stream.ack()
        assert (rejected["sequence"], rejected["code"], rejected["lsn"]) == (4, "table_dropped", 0)
        assert stream.finish() == []
        other.write(numbers([1]))
        assert [ack["error"] for ack in other.finish()] == [None, None]
    server.stop()


def test_create_again_after_a_drop(client: flight.FlightClient, table: str) -> None:
    """The same name again is another table: empty, with another UUID and another location; old keys are free."""
    first = create(client, table)
    old = Stream(client, table, requested_durability="iceberg_committed")
    old.write(numbers([1]), idempotency_key="k")
    old.acks(4)
    location = action(client, "DescribeTable", name=table)["location"]
    action(client, "DropTable", name=table)
    second = create(client, table)
    assert second["created"] is True
    assert second["table_uuid"] != first["table_uuid"]
    assert action(client, "DescribeTable", name=table)["location"] != location
    assert client.do_get(flight.Ticket(table.encode())).read_all().num_rows == 0
    old.write(numbers([2]))
    assert old.ack()["code"] == "table_dropped"
    old.finish()
    new = Stream(client, table, requested_durability="iceberg_committed")
    new.write(numbers([3]), idempotency_key="k")
    assert [ack.get("duplicate") for ack in new.finish()] == [None] * 4
    assert client.do_get(flight.Ticket(table.encode())).read_all()["n"].to_pylist() == [3]


def test_drop_survives_a_restart(make_server: Callable[..., ServerProcess]) -> None:
    """A dropped table does not come back with its log, also when the server is killed; a re-created one stays."""
    server = make_server(server__drain_s=5).start()
    with connect(server.location) as client:
        for name in ("gone", "again"):
            create(client, name)
            write_all(client, name, [numbers([1])], "disk")
            action(client, "DropTable", name=name)
        create(client, "again")
        write_all(client, "again", [numbers([2])], "disk")
        server.kill()
    server.start()
    with connect(server.location) as client:
        assert action(client, "ListTables") == ["default.again"]
        action(client, "Flush", name="again")
        assert client.do_get(flight.Ticket(b"again")).read_all()["n"].to_pylist() == [2]
    server.stop()


@pytest.mark.parametrize("tier", TIERS)
def test_flush(server: ServerProcess, client: flight.FlightClient, table: str, tier: str) -> None:
    """Flush returns once everything accepted before it has reached the tier."""
    create(client, table)
    stream = Stream(client, table, requested_durability="memory")
    for number in range(50):
        stream.write(numbers([number]))
    lsn = stream.acks(50)[-1]["lsn"]
    flushed = action(client, "Flush", name=table, durability=tier)
    assert (flushed["name"], flushed["durability"]) == (f"default.{table}", tier)
    assert action(client, "DescribeTable", name=table)["watermarks"][tier] >= lsn
    if tier == "iceberg_committed":
        assert lake.rows(server.data, table).num_rows == 50
    stream.finish()


def test_flush_does_not_wait_for_the_interval(make_server: Callable[..., ServerProcess]) -> None:
    """Flush hurries a commit that would otherwise wait; without ``durability`` it goes down to Iceberg."""
    server = make_server(iceberg__commit_interval_s=600, server__drain_s=5).start()
    with connect(server.location) as client:
        create(client, "t")
        for number in range(3):
            write_all(client, "t", [numbers([number])], "disk")
            assert action(client, "Flush", name="t")["durability"] == "iceberg_committed"
            assert lake.rows(server.data, "t").num_rows == number + 1
    server.stop()


def test_flush_to_an_unknown_tier(client: flight.FlightClient, table: str) -> None:
    """An unknown tier is INVALID_ARGUMENT and lists the legal ones."""
    create(client, table)
    message = failure_of(action, client, "Flush", name=table, durability="tape")
    assert "[invalid_request]" in message
    assert ", ".join(TIERS) in message


def test_schema_and_flight_info(client: flight.FlightClient, table: str) -> None:
    """GetSchema, GetFlightInfo and ListFlights give the table's schema and a ticket that DoGet takes."""
    action(client, "CreateTable", name=table, **SEED)
    batch = pa.RecordBatch.from_pylist([{"id": 1, "name": "x", "score": 0.5, "signup": None}], schema=SEED_SCHEMA)
    write_all(client, table, [batch])
    for path in ((table,), ("default", table), (f"default.{table}",)):
        descriptor = flight.FlightDescriptor.for_path(*path)
        assert client.get_schema(descriptor).schema.equals(SEED_SCHEMA)
        info = client.get_flight_info(descriptor)
        assert info.schema.equals(SEED_SCHEMA)
        assert client.do_get(info.endpoints[0].ticket).read_all().to_pylist() == batch.to_pylist()
    listed = {tuple(info.descriptor.path): info for info in client.list_flights()}
    assert listed[(b"default", table.encode())].schema.equals(SEED_SCHEMA)
    assert [info.descriptor.path for info in client.list_flights(f"default.{table}".encode())] == [
        [b"default", table.encode()]
    ]


def test_descriptor_that_is_no_path(client: flight.FlightClient, table: str) -> None:
    """A command descriptor, or a path of three parts, names no table: INVALID_ARGUMENT."""
    for descriptor in (flight.FlightDescriptor.for_command(b"x"), flight.FlightDescriptor.for_path("a", "b", "c")):
        assert "[invalid_request]" in failure_of(client.get_schema, descriptor)
        assert "[invalid_request]" in failure_of(client.get_flight_info, descriptor)


def test_do_get(client: flight.FlightClient, table: str) -> None:
    """DoGet gives the columns and as many rows as its ticket asks for, for either spelling of the name."""
    create(client, table, [("n", "int64!"), ("word", "utf8")])
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("word", pa.string())])
    batch = pa.RecordBatch.from_pylist([{"n": n, "word": f"w{n}"} for n in range(100)], schema=schema)
    write_all(client, table, [batch])

    def get(**ticket: Any) -> pa.Table:
        return client.do_get(flight.Ticket(json.dumps({"table_name": table, **ticket}).encode())).read_all()

    assert get().equals(pa.Table.from_batches([batch]))
    assert get(columns=["word"]).column_names == ["word"]
    assert get(columns=["word", "n"]).num_rows == 100
    assert get(limit=7).num_rows == 7
    assert get(limit=0).schema.equals(schema)
    assert get(limit=10**6).num_rows == 100
    for name in (table, f"default.{table}"):
        assert client.do_get(flight.Ticket(name.encode())).read_all().num_rows == 100


def test_do_get_of_an_empty_table(client: flight.FlightClient, table: str) -> None:
    """A table without a snapshot has its schema and no rows."""
    create(client, table)
    found = client.do_get(flight.Ticket(table.encode())).read_all()
    assert found.num_rows == 0
    assert found.schema.equals(NUMBERS)


def test_do_get_waits_for_an_lsn(client: flight.FlightClient, table: str) -> None:
    """``wait_for_lsn`` makes a read see that write."""
    create(client, table)
    for number in range(5):
        lsn = write_all(client, table, [numbers([number])], "disk")[0]["lsn"]
        ticket = flight.Ticket(json.dumps({"table_name": table, "wait_for_lsn": lsn}).encode())
        assert client.do_get(ticket).read_all().num_rows == number + 1


def test_large_do_get(client: flight.FlightClient, table: str) -> None:
    """A result of many megabytes comes whole, under flow control."""
    create(client, table)
    write_all(client, table, [numbers(range(start, start + 250_000)) for start in range(0, 2_000_000, 250_000)])
    found = client.do_get(flight.Ticket(table.encode())).read_all()
    assert sorted(found["n"].to_pylist()) == list(range(2_000_000))


@pytest.mark.parametrize(
    ("ticket", "words"),
    [
        (b"{", ["ticket"]),
        (b"{}", ["table_name"]),
        (b"\xff\xfe", ["ticket"]),
        (b"", ["name"]),
        (b'{"table_name": "TABLE", "columns": ["n", "m", "o"]}', ["'m', 'o'"]),
        (b'{"table_name": "TABLE", "limit": -1}', ["limit"]),
        (b'{"table_name": "\xff"}', ["ticket"]),
        (b'{"table_name": "TABLE", "limit": "x"}', ["limit"]),
        (b'{"table_name": "TABLE", "columns": "n"}', ["columns"]),
    ],
)
def test_bad_tickets(client: flight.FlightClient, table: str, ticket: bytes, words: list[str]) -> None:
    """A ticket that cannot be meant is INVALID_ARGUMENT and says why."""
    create(client, table)
    call = client.do_get
    message = failure_of(lambda: call(flight.Ticket(ticket.replace(b"TABLE", table.encode()))).read_all())
    assert message.startswith("ArrowInvalid"), message
    assert "[invalid_request]" in message
    assert [word for word in words if word not in message] == [], message


def test_do_get_of_a_past_that_is_not_kept(client: flight.FlightClient, table: str) -> None:
    """``at_lsn`` below what the newest snapshot holds is OUT_OF_RANGE where no snapshot ends there."""
    create(client, table)
    first = write_all(client, table, [numbers([1]), numbers([2])])[0]["lsn"]
    ticket = flight.Ticket(json.dumps({"table_name": table, "at_lsn": first - 1}).encode())
    message = failure_of(lambda: client.do_get(ticket).read_all())
    assert "[out_of_range]" in message


def test_list_actions(client: flight.FlightClient) -> None:
    """ListActions names the five actions; another one is UNIMPLEMENTED and says which there are."""
    assert [item.type for item in client.list_actions()] == [
        "CreateTable",
        "ListTables",
        "DropTable",
        "DescribeTable",
        "Flush",
    ]
    message = failure_of(action, client, "Explode", name="t")
    assert "Explode" in message
    assert "CreateTable, ListTables" in message


@pytest.mark.parametrize("kind", ["DropTable", "DescribeTable", "Flush"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"name": 1}', b'{"name": "a b"}', b"\xff", b'{"name": "\xff"}']
)
def test_bad_action_bodies(client: flight.FlightClient, kind: str, body: bytes) -> None:
    """A body that is not the action's JSON is INVALID_ARGUMENT."""
    message = failure_of(lambda: list(client.do_action(flight.Action(kind, body))))
    assert message.startswith("ArrowInvalid"), message
    assert "[invalid_request]" in message


def test_table_made_by_others(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A table that another Iceberg client has made in the catalog is there for writers and readers."""
    with lake.open_catalog(server.data) as catalog:
        catalog.create_table_if_not_exists(("default", table), pa.schema([pa.field("n", pa.int64(), nullable=False)]))
    write_all(client, table, [numbers([1])])
    assert client.do_get(flight.Ticket(table.encode())).read_all()["n"].to_pylist() == [1]
    assert f"default.{table}" in action(client, "ListTables")


def test_read_after_others_renamed_a_table(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A table is its UUID: under its new name it is read and described, without a write in between."""
    create(client, table)
    write_all(client, table, [numbers([1, 2])])
    with lake.open_catalog(server.data) as catalog:
        catalog.rename_table(("default", table), ("default", f"{table}_new"))
    assert client.do_get(flight.Ticket(f"{table}_new".encode())).read_all()["n"].to_pylist() == [1, 2]
    assert action(client, "DescribeTable", name=f"{table}_new")["name"] == f"default.{table}_new"
    write_all(client, f"{table}_new", [numbers([3])])
    assert sorted(lake.column(server.data, f"{table}_new", "n")) == [1, 2, 3]


def test_columns_that_others_changed_can_be_read(
    server: ServerProcess, client: flight.FlightClient, table: str
) -> None:
    """What columns there are is the catalog's to say, at each read."""
    create(client, table, [("n", "int64!"), ("a", "utf8")])
    batch = pa.record_batch({"n": pa.array([1]), "a": ["x"]})
    write_all(client, table, [batch.cast(pa.schema([NUMBERS.field("n"), ("a", pa.string())]))])
    with lake.load(server.data, table).update_schema() as update:
        update.rename_column("a", "b")
        update.add_column("c", LongType())

    def read(*columns: str) -> list[dict[str, Any]]:
        ticket = json.dumps({"table_name": table, "columns": columns}).encode()
        found: list[dict[str, Any]] = client.do_get(flight.Ticket(ticket)).read_all().to_pylist()
        return found

    assert read("c", "b") == [{"c": None, "b": "x"}]
    assert "No such column" in failure_of(read, "a")


def test_an_answer_that_is_not_read(make_server: Callable[..., ServerProcess]) -> None:
    """A client that does not read its answer loses it, with the reason, and holds nothing any more (T27)."""
    with make_server(limits__message_stall_s=1) as server, connect(server.location) as client:
        create(client, "t")
        write_all(client, "t", [numbers(range(4_000_000))])
        reader = client.do_get(flight.Ticket(b"t"))
        # More than the answer may stand still; a client that reads earlier gets all of it.
        time.sleep(4)
        assert "[overloaded] Nothing of the answer was read in 1 s" in failure_of(reader.read_all)
        assert list((server.data / "spill").iterdir()) == []


def test_one_table_under_two_names(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A second name that others registered is refused with the name to use; the table goes on under its own (R20)."""
    create(client, table)
    write_all(client, table, [numbers([1])])
    second = f"a_{table}"
    with lake.open_catalog(server.data) as catalog:
        catalog.register_table(f"default.{second}", catalog.load_table(f"default.{table}").metadata_location)
    stream = Stream(client, table, requested_durability="iceberg_committed")
    stream.write(numbers([2]))
    for name in ("DescribeTable", "DropTable", "Flush"):
        assert f"second name of table default.{table}" in failure_of(action, client, name, name=second)
    assert "second name" in failure_of(client.do_get, flight.Ticket(second.encode()))
    assert f"default.{second}" not in action(client, "ListTables")
    stream.finish()
    write_all(client, table, [numbers([3])])
    assert sorted(lake.column(server.data, table, "n")) == [1, 2, 3]
    assert lake.column(server.data, second, "n") == [1]


def test_drop_by_uuid(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A table that others replaced is given up by its UUID; the one that has the name now stays (R18)."""
    gone = create(client, table)["table_uuid"]
    write_all(client, table, [numbers([1])])
    with lake.open_catalog(server.data) as catalog:
        schema = catalog.load_table(f"default.{table}").schema()
        catalog.drop_table(f"default.{table}")
        now = str(catalog.create_table(f"default.{table}", schema).metadata.table_uuid)
    assert action(client, "DescribeTable", name=table)["table_uuid"] == now
    unknown = "00000000-0000-4000-8000-000000000000"
    assert f"the name is table {now}'s" in failure_of(action, client, "DropTable", name=table, table_uuid=unknown)
    assert "Malformed action body" in failure_of(action, client, "DropTable", name=table, table_uuid="no UUID")
    assert action(client, "DropTable", name=table, table_uuid=gone, purge=True)["dropped"] is True
    assert action(client, "DescribeTable", name=table)["table_uuid"] == now
    write_all(client, table, [numbers([2])])
    assert lake.column(server.data, table, "n") == [2]
    assert action(client, "DropTable", name=table, table_uuid=now)["dropped"] is True
    assert f"default.{table}" not in action(client, "ListTables")


def test_name_that_others_gave_and_arka_cannot_spell(
    server: ServerProcess, client: flight.FlightClient, table: str
) -> None:
    """The table refuses writes with the true reason and is not dropped; under its old name it goes on, without loss."""
    create(client, table)
    write_all(client, table, [numbers([1])])
    with lake.open_catalog(server.data) as catalog:
        catalog.rename_table(f"default.{table}", "default.my-table")
        uuid = str(catalog.load_table("default.my-table").metadata.table_uuid)
    described = action(client, "DescribeTable", name=table)
    assert (described["state"], described["table_uuid"]) == ("stopped", uuid)
    assert "'default.my-table'" in described["reason"]
    for name in ("DropTable", "CreateTable"):
        body = {"schema_json": {"fields": [{"name": "n", "type": "int64", "nullable": False}]}}
        assert "my-table" in failure_of(action, client, name, name=table, **(body if name == "CreateTable" else {}))
    refused = Stream(client, table, requested_durability="memory")
    refused.write(numbers([9]))
    assert [(ack["code"], "my-table" in ack["error"]) for ack in refused.finish()] == [("table_stopped", True)]
    with lake.open_catalog(server.data) as catalog:
        catalog.rename_table("default.my-table", f"default.{table}")
    assert action(client, "DescribeTable", name=table)["state"] == "active"
    write_all(client, table, [numbers([2])])
    assert sorted(lake.column(server.data, table, "n")) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "state", "word"),
    [
        ({"arka.primary-key": '["other"]'}, "active", "the key stays ['n']"),
        ({"arka.primary-key": None}, "stopped", "primary key"),
        ({"arka.owner": "somebody else"}, "stopped", "somebody else"),
        ({"arka.owner": None}, "stopped", "no node"),
        ({"arka.table-type": None}, "active", "is gone"),
        ({"arka.merge": "sometimes"}, "active", "last or first"),
        ({"arka.unheard-of": "1"}, "active", "not known"),
    ],
    ids=str,
)
def test_state_reason_and_properties_agree(
    server: ServerProcess,
    client: flight.FlightClient,
    table: str,
    changes: dict[str, str | None],
    state: str,
    word: str,
) -> None:
    """What others do to ``arka.*`` properties is shown as it is; a table that refuses writes is not active (R27)."""
    create(client, table, [("n", "int64!"), ("other", "int64!")], table_type="primary_key", primary_key=["n"])
    before = action(client, "DescribeTable", name=table)
    assert (before["state"], before["reason"]) == ("active", None)

    def change(properties: dict[str, str | None]) -> None:
        with lake.load(server.data, table).transaction() as transaction:
            transaction.set_properties({name: text for name, text in properties.items() if text is not None})
            transaction.remove_properties(*(name for name, text in properties.items() if text is None))

    change(changes)
    found = action(client, "DescribeTable", name=table)
    assert found["state"] == state
    assert word in found["reason"]
    for name, text in changes.items():
        assert found["properties"].get(name) == text
    stream = Stream(client, table, PAIRS, requested_durability="memory")
    stream.write(pa.record_batch([[1], [2]], schema=PAIRS))
    codes = [ack["code"] for ack in stream.finish() if ack["error"]]
    assert codes == (["table_stopped"] if state == "stopped" else [])
    change({name: before["properties"].get(name) for name in changes})
    found = action(client, "DescribeTable", name=table)
    assert (found["state"], found["reason"], found["properties"]) == ("active", None, before["properties"])
