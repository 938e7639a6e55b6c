"""Primary-key tables through stock pyarrow: upserts, deletes, and what readers then find."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from pyiceberg.table.update.schema import UpdateSchema
from pyiceberg.types import FixedType

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import Ack, Stream, action, connect, create, failure_of, write_all

pytestmark = pytest.mark.process

FIELDS = [("part", "int32"), ("id", "int64!"), ("name", "utf8"), ("region", "utf8!")]
KEY = ["region", "id"]
SCHEMA = pa.schema(
    [
        ("part", pa.int32()),
        pa.field("id", pa.int64(), nullable=False),
        ("name", pa.string()),
        pa.field("region", pa.string(), nullable=False),
    ]
)
KEYS = pa.schema([SCHEMA.field("id"), SCHEMA.field("region")])
PARTITIONED = {"fields": [{"source_id": 0, "transform": "Identity"}, {"source_id": 1, "transform": "Bucket(2)"}]}

Row = tuple[int | None, int, str | None, str]


def make(client: flight.FlightClient, name: str, **more: Any) -> Any:
    """Create a table with the key (region, id)."""
    return create(client, name, FIELDS, table_type="primary_key", primary_key=KEY, **more)


def rows(*values: Row) -> pa.RecordBatch:
    columns = list(zip(*values, strict=True))
    return pa.record_batch([pa.array(columns[i], SCHEMA.field(i).type) for i in range(4)], schema=SCHEMA)


def keys(*values: tuple[int, str]) -> pa.RecordBatch:
    return pa.record_batch([pa.array([v[0] for v in values], pa.int64()), [v[1] for v in values]], schema=KEYS)


def found_by_all(server: ServerProcess, client: flight.FlightClient, duck: Any, name: str) -> list[Row]:
    """What pyiceberg, DuckDB and DoGet find; all the same."""
    table = lake.load(server.data, name)
    by_pyiceberg = sorted(tuple(row.values()) for row in table.scan().to_arrow().to_pylist())
    by_duckdb = sorted(duck.execute(f"SELECT * FROM iceberg_scan('{table.metadata_location}')").fetchall())
    by_doget = sorted(tuple(row.values()) for row in client.do_get(flight.Ticket(name)).read_all().to_pylist())
    assert by_pyiceberg == by_duckdb == by_doget
    return by_pyiceberg  # type: ignore[return-value]


def test_upserts_and_deletes(server: ServerProcess, client: flight.FlightClient, table: str, duck: Any) -> None:
    """The last write of a key stands, across batches and within one, and moves between partitions."""
    made = make(client, table, partition_spec=PARTITIONED)
    assert make(client, table, partition_spec=PARTITIONED) == made | {"created": False}
    write_all(client, table, [rows((1, 1, "a", "x"), (1, 2, "b", "x"), (1, 1, "c", "y"), (1, 1, "d", "x"))])
    assert found_by_all(server, client, duck, table) == [(1, 1, "c", "y"), (1, 1, "d", "x"), (1, 2, "b", "x")]
    # Another partition, a second time, and one that was not there.
    write_all(client, table, [rows((2, 1, "e", "x")), rows((3, 1, None, "x"), (3, 9, "f", "z"))])
    # A stream that deletes by rows, one by keys alone, and one that does both.
    stream = Stream(client, table, SCHEMA, requested_durability="disk", operation="delete")
    stream.write(rows((7, 2, "whatever", "x")))
    stream.finish()
    stream = Stream(client, table, KEYS, requested_durability="disk", operation="delete")
    stream.write(keys((9, "z"), (100, "was never there")))
    stream.finish()
    stream = Stream(client, table, SCHEMA, requested_durability="iceberg_committed")
    stream.write(rows((4, 4, "g", "x"), (4, 5, "h", "x")))
    stream.write(rows((4, 4, "-", "x")), operation="delete")
    stream.write(rows((4, 6, "i", "x")), operation="upsert")
    assert [ack for ack in stream.finish() if ack["error"]] == []
    assert found_by_all(server, client, duck, table) == [
        (1, 1, "c", "y"), (3, 1, None, "x"), (4, 5, "h", "x"), (4, 6, "i", "x"),
    ]  # fmt: skip
    described = action(client, "DescribeTable", name=table)
    assert (described["table_type"], described["primary_key"]) == ("primary_key", KEY)


def test_a_resent_upsert_does_not_come_again(
    server: ServerProcess, client: flight.FlightClient, table: str, duck: Any
) -> None:
    """A duplicate by key changes nothing, although rows have changed since."""
    make(client, table)
    stream = Stream(client, table, SCHEMA, requested_durability="memory")
    stream.write(rows((1, 1, "old", "x")), idempotency_key="first")
    stream.write(rows((1, 1, "new", "x")))
    stream.write(rows((1, 1, "old", "x")), idempotency_key="first")
    stream.write(rows((1, 2, "old", "x")), idempotency_key="first", operation="delete")
    acks = [ack for ack in stream.finish() if ack["durability_level"] == "memory"]
    assert [ack.get("duplicate", False) for ack in acks] == [False, False, True, True]
    action(client, "Flush", name=table)
    assert found_by_all(server, client, duck, table) == [(1, 1, "new", "x")]


def test_the_first_row_of_a_key_may_stand(
    server: ServerProcess, client: flight.FlightClient, table: str, duck: Any
) -> None:
    """``arka.merge: first`` keeps what was there; a delete makes room for another first one."""
    make(client, table, properties={"arka.merge": "first"})
    write_all(client, table, [rows((1, 1, "first", "x"), (1, 1, "second", "x"))])
    write_all(client, table, [rows((1, 1, "third", "x"), (1, 2, "first", "x"))])
    assert found_by_all(server, client, duck, table) == [(1, 1, "first", "x"), (1, 2, "first", "x")]
    write_all(client, table, [rows((1, 2, "second", "x"))])
    stream = Stream(client, table, KEYS, requested_durability="iceberg_committed", operation="delete")
    stream.write(keys((1, "x")))
    stream.finish()
    write_all(client, table, [rows((1, 1, "fourth", "x"), (1, 1, "fifth", "x"))])
    assert found_by_all(server, client, duck, table) == [(1, 1, "fourth", "x"), (1, 2, "first", "x")]


def test_reads_see_what_was_accepted(make_server: Callable[..., ServerProcess]) -> None:
    """DoGet shows writes from their memory ack on: long before a commit, and as the table was at an LSN."""
    with make_server(iceberg__commit_interval_s=3600) as server, connect(server.location) as client:
        make(client, "t")
        write_all(client, "t", [rows((1, 1, "a", "x"), (1, 2, "b", "x"))])
        stream = Stream(client, "t", SCHEMA, requested_durability="memory")
        stream.write(rows((2, 1, "c", "x"), (2, 3, "d", "x")))
        stream.write(rows((0, 2, "", "x")), operation="delete")
        first, second = stream.acks(2)

        def read(**ticket: Any) -> list[tuple[int, str]]:
            body = json.dumps({"table_name": "t", **ticket}).encode()
            found = client.do_get(flight.Ticket(body)).read_all().to_pylist()
            return sorted((row["id"], row["name"]) for row in found)

        assert read(columns=["name", "id"]) == [(1, "c"), (3, "d")]
        assert read(at_lsn=first["lsn"]) == [(1, "c"), (2, "b"), (3, "d")]
        assert read(at_lsn=second["lsn"]) == read(wait_for_lsn=second["lsn"]) == [(1, "c"), (3, "d")]
        assert read(at_lsn=first["lsn"] - 1) == [(1, "a"), (2, "b")]
        assert "[out_of_range]" in failure_of(read, at_lsn=second["lsn"] + 1)
        assert lake.load(server.data, "t").scan().to_arrow().num_rows == 2
        stream.finish()


def failing(acks: list[Ack]) -> list[tuple[int, str]]:
    return [(ack["sequence"], ack["code"]) for ack in acks if ack["error"] is not None]


def test_null_keys_cost_their_batch(client: flight.FlightClient, table: str) -> None:
    """A null in a key column is ``invalid_batch`` naming it, for upserts and deletes; the stream goes on."""
    make(client, table)
    nullable = pa.schema([field.with_nullable(True) for field in SCHEMA])
    bad = pa.record_batch([pa.array([1]), [None], ["a"], ["x"]], schema=nullable.set(0, pa.field("part", pa.int64())))
    bad = bad.set_column(0, "part", pa.array([1], pa.int32())).cast(nullable)
    stream = Stream(client, table, nullable, requested_durability="memory")
    stream.write(rows((1, 1, "a", "x")).cast(nullable))
    stream.write(bad)
    stream.write(bad, operation="delete")
    stream.write(rows((1, 2, "b", "x")).cast(nullable))
    acks = stream.finish()
    assert failing(acks) == [(1, "invalid_batch"), (2, "invalid_batch")]
    assert all("'id'" in ack["error"] for ack in acks if ack["error"] is not None)


def test_keys_alone_are_for_deletes(client: flight.FlightClient, table: str) -> None:
    """A stream of keys deletes; an upsert on it costs itself alone, first or not, and names what it lacks."""
    make(client, table)
    for default in ("upsert", "delete"):
        stream = Stream(client, table, KEYS, requested_durability="memory", operation=default)
        for operation in ("upsert", "delete", "upsert", "delete"):
            stream.write(keys((1, "x")), operation=operation)
        acks = stream.finish()
        assert failing(acks) == [(0, "schema_mismatch"), (2, "schema_mismatch")]
        assert all("'name'" in ack["error"] for ack in acks if ack["error"] is not None)


def test_deletes_with_any_other_columns(client: flight.FlightClient, table: str) -> None:
    """Some of the others, in other types, or unknown ones: a delete looks at its key alone."""
    make(client, table)
    write_all(client, table, [rows((1, 1, "a", "x"), (2, 2, "b", "x"), (3, 3, "c", "x"), (4, 4, "d", "x"))])
    key = keys((1, "x"))
    others: list[dict[str, Any]] = [
        {"name": pa.array([7], pa.int64())},
        {"unknown": pa.array([[1]], pa.list_view(pa.int8())), "name": pa.nulls(1)},
        {"name": pa.array(["a"]).dictionary_encode(), "gap": pa.array([datetime.timedelta(1)])},
    ]
    for number, other in enumerate(others, start=1):
        columns = {**other, **dict(zip(key.schema.names, keys((number, "x")).columns, strict=True))}
        batch = pa.record_batch(columns)
        stream = Stream(client, table, batch.schema, requested_durability="iceberg_committed", operation="delete")
        stream.write(batch)
        stream.write(batch, operation="upsert")
        acks = stream.finish()
        assert failing(acks) == [(1, "schema_mismatch")]
    ticket = flight.Ticket(json.dumps({"table_name": table, "columns": ["id"]}).encode())
    assert client.do_get(ticket).read_all().to_pydict() == {"id": [4]}


def test_operations_that_are_not(client: flight.FlightClient, table: str) -> None:
    """Unknown operations, and deletes from an append-only table, are refused by name."""
    make(client, table)
    stream = Stream(client, table, SCHEMA, requested_durability="memory")
    stream.write(rows((1, 1, "a", "x")), operation="merge")
    (ack,) = stream.finish()
    assert (ack["code"], "'merge'" in ack["error"]) == ("invalid_request", True)
    create(client, f"{table}_log", FIELDS)
    stream = Stream(client, f"{table}_log", SCHEMA, requested_durability="memory")
    stream.write(rows((1, 1, "a", "x")), operation="delete")
    (ack,) = stream.finish()
    assert (ack["code"], "append-only" in ack["error"]) == ("invalid_request", True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"primary_key": "score"}, ["'score'", "float64"]),
        ({"primary_key": "nobody"}, ["'nobody'"]),
        ({"primary_key": []}, ["primary_key is missing"]),
        ({"properties": {"arka.merge": "newest"}}, ["'arka.merge'", "last or first"]),
        ({"properties": {"arka.delete-mode": "equality"}}, ["'arka.delete-mode'", "position"]),
        ({"properties": {"arka.owner": "me"}}, ["'arka.owner'"]),
        ({"table_type": "append_only", "primary_key": None, "properties": {"arka.merge": "last"}}, ["primary_key"]),
    ],
)
def test_definitions_that_cannot_be(
    client: flight.FlightClient, table: str, change: dict[str, Any], words: list[str]
) -> None:
    """CreateTable says what is wrong with a key, and makes nothing."""
    fields = [{"name": "id", "type": "int64"}, {"name": "score", "type": "float64"}]
    request = {"schema_json": {"fields": fields}, "table_type": "primary_key", "primary_key": "id"} | change
    message = failure_of(action, client, "CreateTable", name=table, **request)
    assert "[invalid_request]" in message
    assert [word for word in words if word not in message] == []
    assert f"default.{table}" not in action(client, "ListTables")


def test_another_nodes_table_is_refused(make_server: Callable[..., ServerProcess], tmp_path: Any) -> None:
    """One log writes to a primary-key table: any other node refuses, naming the owner (R26)."""
    shared = {
        "iceberg__catalog_uri": f"sqlite:///{tmp_path}/catalog.db",
        "iceberg__warehouse": f"file://{tmp_path}/warehouse",
    }
    with make_server(data="one", server__node_id="first", **shared) as one, connect(one.location) as client:
        make(client, "t")
        write_all(client, "t", [rows((1, 1, "a", "x"))])
    with make_server(data="two", server__node_id="second", **shared) as two, connect(two.location) as client:
        stream = Stream(client, "t", SCHEMA, requested_durability="memory")
        stream.write(rows((1, 1, "b", "x")))
        (ack,) = stream.finish()
        assert ack["code"] == "table_stopped"
        assert "node first " in ack["error"]
        # It may be read anywhere.
        assert client.do_get(flight.Ticket("t")).read_all().num_rows == 1


def test_the_demo_tables(make_server: Callable[..., ServerProcess], duck: Any) -> None:
    """``--demo-tables`` registers the seed's two: ``users`` with a key, ``events`` without."""
    with make_server("--demo-tables") as server, connect(server.location) as client:
        assert action(client, "ListTables") == ["default.events", "default.users"]
        described = action(client, "DescribeTable", name="users")
        assert (described["table_type"], described["primary_key"]) == ("primary_key", ["id"])
        schema = client.get_schema(flight.FlightDescriptor.for_path("users")).schema
        batch = pa.RecordBatch.from_pylist([{"id": 1, "name": name} for name in ("a", "b")], schema=schema)
        write_all(client, "users", [batch])
        found = duck.execute(f"SELECT name FROM iceberg_scan('{lake.load(server.data, 'users').metadata_location}')")
        assert found.fetchall() == [("b",)]


def make_key_optional(update: UpdateSchema) -> None:
    update.set_identifier_fields()
    update.make_column_optional("id")


def test_changes_of_others_end_no_server(make_server: Callable[..., ServerProcess]) -> None:
    """What others make of one table's schema is that table's trouble, whatever it is."""
    with make_server(iceberg__commit_interval_s=0.1) as server, connect(server.location) as client:
        create(client, "other", FIELDS)
        for name, change in (
            ("optional", make_key_optional),
            ("fixed", lambda update: update.add_column("code", FixedType(7))),
        ):
            make(client, name)
            write_all(client, name, [rows((1, 1, "a", "x"))])
            with lake.load(server.data, name).update_schema(allow_incompatible_changes=True) as update:
                change(update)
            stream = Stream(client, name, SCHEMA, requested_durability="object_storage")
            stream.write(rows((1, 2, "b", "x")))
            # Refused, if the server has seen the change by then; else accepted as the table was.
            refused = {ack["code"] for ack in stream.finish() if ack["error"]}
            assert refused <= {"table_stopped"}
            # It may fail, and then says so to whoever asked.
            with contextlib.suppress(flight.FlightError, pa.ArrowException):
                client.do_get(flight.Ticket(name)).read_all()
            write_all(client, "other", [rows((1, 1, "a", "x"))])
            action(client, "Flush", name=name)
            assert sorted(lake.column(server.data, name, "id")) == ([1] if refused else [1, 2])


@pytest.mark.parametrize("killed", [False, True])
def test_key_column_that_others_rename(make_server: Callable[..., ServerProcess], killed: bool) -> None:
    """A column is its id: keys are found again under another name, also by frames that waited for a restart."""
    server = make_server(iceberg__commit_interval_s=3600).start()
    with connect(server.location) as client:
        make(client, "t")
        write_all(client, "t", [rows((1, 1, "a", "x"), (1, 2, "b", "x"), (1, 3, "c", "x"))])
        with lake.load(server.data, "t").update_schema() as change:
            change.rename_column("region", "area")
        stream = Stream(client, "t", SCHEMA, requested_durability="object_storage")
        stream.write(rows((2, 1, "d", "x")))
        stream.write(rows((2, 2, "", "x")), operation="delete")
        assert [ack for ack in stream.finish() if ack["error"] is not None] == []
    if killed:
        server.kill()
        server.start()
    with connect(server.location) as client:
        expected = [(1, "d", "x"), (3, "c", "x")]
        for _ in range(2):
            found = client.do_get(flight.Ticket("t")).read_all().to_pylist()
            assert sorted((row["id"], row["name"], row["area"]) for row in found) == expected
            action(client, "Flush", name="t")
    found = lake.rows(server.data, "t").to_pylist()
    assert sorted((row["id"], row["name"], row["area"]) for row in found) == expected
    server.stop()
