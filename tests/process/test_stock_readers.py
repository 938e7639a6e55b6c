"""What stock readers need of a server: acks and messages in a form that they take, and plain refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.flight import messages
from arka.testing.ipcstreams import write_stream
from arka.testing.serverprocess import ServerProcess

from .clients import NUMBERS, Stream, action, create, failure_of, flight_data, numbers, write_all

pytestmark = pytest.mark.process

MIB = 1 << 20


@pytest.fixture
def dial(server: ServerProcess) -> Iterator[Callable[..., grpc.Channel]]:
    """Open channels of stock grpcio, with a user-agent before its own."""
    made: list[grpc.Channel] = []

    def open_channel(user_agent: str | None = None) -> grpc.Channel:
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if user_agent is not None:
            options.append(("grpc.primary_user_agent", user_agent))
        made.append(grpc.insecure_channel(server.flight, options=options))
        return made[-1]

    yield open_channel
    for channel in made:
        channel.close()


def exchange(channel: grpc.Channel, table: str, request: dict[str, Any] | None) -> list[str]:
    """Write one batch; returns what each answer is: an empty schema, an ack in metadata, an ack on a batch."""
    schema, batch = write_stream(NUMBERS, [numbers([1])])
    sent = [flight_data(schema, path=[table], metadata=request), flight_data(batch)]
    kinds = []
    for data in channel.stream_stream(messages.SERVICE + "DoExchange")(iter(sent), timeout=60):
        head = data[:1]
        text = data[data.index(b'{"lsn"') :] if b'{"lsn"' in data else b""
        if text:
            assert json.loads(text)["error"] is None
        kinds.append({b"\x1a": "metadata", b"\x12": "batch" if text else "schema"}[head])
    return kinds


@pytest.mark.parametrize(
    ("user_agent", "ack_as", "kinds"),
    [
        (None, None, ["metadata", "metadata"]),
        ("grpc-go/1.71.0", None, ["schema", "batch", "batch"]),
        ("tonic/0.12.3", None, ["schema", "batch", "batch"]),
        ("loader/2 tonic/0.14", None, ["schema", "batch", "batch"]),
        ("grpc-go-like/1 not-tonic/2 tonic", None, ["metadata", "metadata"]),
        ("grpc-java-netty/1.71", None, ["metadata", "metadata"]),
        ("grpc-go/1.71.0", "auto", ["schema", "batch", "batch"]),
        ("grpc-go/1.71.0", "AUTO", ["schema", "batch", "batch"]),
        ("grpc-go/1.71.0", "metadata", ["schema", "metadata", "metadata"]),
        ("tonic/0.12.3", "batch", ["schema", "batch", "batch"]),
        (None, "auto", ["metadata", "metadata"]),
        (None, "batch", ["schema", "batch", "batch"]),
    ],
)
def test_form_of_acks(
    user_agent: str | None,
    ack_as: str | None,
    kinds: list[str],
    dial: Callable[..., grpc.Channel],
    client: flight.FlightClient,
    table: str,
) -> None:
    """Go's and Rust's stacks get acks as batches behind an empty schema unless the stream says otherwise."""
    create(client, table)
    assert exchange(dial(user_agent), table, None if ack_as is None else {"ack_as": ack_as}) == kinds


@pytest.mark.parametrize("user_agent", ["grpc-go/1.71.0", "tonic/0.12.3"])
def test_schema_comes_before_the_first_write(
    user_agent: str, dial: Callable[..., grpc.Channel], client: flight.FlightClient
) -> None:
    """The empty schema goes out when the call opens: a reader that wants it first does not wait for ever."""
    call = dial(user_agent).stream_stream(messages.SERVICE + "DoExchange")(_nothing_yet(), timeout=60)
    first = next(call)
    assert first[:1] == b"\x12"
    assert b"lsn" not in first
    call.cancel()
    del client


def _nothing_yet() -> Iterator[bytes]:
    """A request that sends nothing while its caller waits for the first answer."""
    import threading

    threading.Event().wait(30)
    yield b""


def test_form_is_refused(client: flight.FlightClient, table: str) -> None:
    """An unknown form names the legal ones, ``auto`` among them."""
    create(client, table)

    def write() -> None:
        stream = Stream(client, table, ack_as="trumpet")
        stream.write(numbers([1]))
        stream.finish()

    assert "auto, metadata or batch" in failure_of(write)


WIDE = pa.schema(
    [
        pa.field("n", pa.int64(), nullable=False),
        ("s", pa.string()),
        ("l", pa.list_(pa.field("element", pa.string()))),
        ("r", pa.struct([pa.field("a", pa.float64()), pa.field("b", pa.binary())])),
    ]
)
FIELDS = [("n", "int64!"), ("s", "utf8"), ("l", "list<utf8>"), ("r", "struct<a: float64, b: binary>")]
KEYED = {"table_type": "primary_key", "primary_key": "n"}


def wide(numbers_: range, text: str) -> pa.RecordBatch:
    rows = [{"n": n, "s": text if n % 3 else None, "l": [text, None], "r": {"a": n, "b": b"x" * 9}} for n in numbers_]
    return pa.RecordBatch.from_pylist(rows, schema=WIDE)


def answer(channel: grpc.Channel, ticket: dict[str, Any]) -> tuple[list[int], pa.Table]:
    """Read a table with stock grpcio at its default limits; returns the messages' sizes, and the rows."""
    request = messages.build("Ticket", ticket=json.dumps(ticket).encode())
    sizes, stream = [], []
    for data in channel.unary_stream(messages.SERVICE + "DoGet")(request, timeout=120):
        sizes.append(len(data))
        stream.append(encapsulated(data))
    return sizes, pa.ipc.open_stream(b"".join(stream)).read_all()


def encapsulated(data: bytes) -> bytes:
    """Turn one FlightData of an answer into a message of an IPC stream."""
    from arka._core.wire import read_fields

    fields = read_fields(data)
    header, body = fields[2], fields.get(1000, b"")
    assert isinstance(header, bytes)
    assert isinstance(body, bytes)
    padded = header + bytes(-len(header) % 8)
    return b"\xff\xff\xff\xff" + len(padded).to_bytes(4, "little") + padded + body


@pytest.mark.parametrize("more", [{}, KEYED], ids=["append_only", "primary_key"])
@pytest.mark.parametrize("compression", [None, "none", "lz4", "ZSTD"])
def test_messages_of_a_read(
    more: dict[str, Any],
    compression: str | None,
    dial: Callable[..., grpc.Channel],
    client: flight.FlightClient,
    table: str,
) -> None:
    """Messages of DoGet have at most 2 MiB, from the log and from the snapshot; a larger row goes alone."""
    create(client, table, FIELDS, **more)
    ticket = {"table_name": table} | ({} if compression is None else {"compression": compression})
    batches = [wide(range(20_000), "x" * 90), wide(range(20_000, 20_003), "y" * (MIB // 2))]
    write_all(client, table, batches, "disk")
    for flushed in (False, True):
        if flushed:
            action(client, "Flush", name=table)
        sizes, found = answer(dial(), ticket)
        assert max(sizes) <= 2 * MIB
        assert len(sizes) > 2
        assert found.sort_by("n").cast(WIDE).equals(pa.Table.from_batches(batches).cast(WIDE))
        _, found = answer(dial(), ticket | {"columns": ["s", "n"], "limit": 7})
        assert found.column_names == ["s", "n"]
        assert found.num_rows == 7


def test_one_row_above_the_size(dial: Callable[..., grpc.Channel], client: flight.FlightClient, table: str) -> None:
    """A row above 2 MiB is a message of its own, with smaller ones around it."""
    create(client, table, [("n", "int64!"), ("s", "utf8")])
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False), ("s", pa.string())])
    texts = ["a" * 1000] * 5 + ["b" * (3 * MIB)] + ["c" * 1000] * 5
    batch = pa.record_batch([pa.array(range(11), pa.int64()), pa.array(texts)], schema=schema)
    for tier in ("disk", "iceberg_committed"):
        write_all(client, table, [batch], tier)
        sizes, found = answer(dial(), {"table_name": table})
        assert all(size <= 2 * MIB or 3 * MIB <= size < 3 * MIB + 1000 for size in sizes)
        assert sorted(found["s"].to_pylist()) == sorted(texts * (1 if tier == "disk" else 2))


def test_unknown_compression(client: flight.FlightClient, table: str) -> None:
    """An unknown compression names the legal ones."""
    create(client, table)
    ticket = flight.Ticket(json.dumps({"table_name": table, "compression": "gzip"}).encode())
    message = failure_of(lambda: client.do_get(ticket).read_all())
    assert "[invalid_request]" in message
    assert "none, lz4, zstd" in message


def sql(name: str, value: bytes = b"") -> bytes:
    """A command of Flight SQL, as its clients pack it."""
    url = f"type.googleapis.com/arrow.flight.protocol.sql.{name}".encode()
    return b"\x0a" + messages.varint(len(url)) + url + b"\x12" + messages.varint(len(value)) + value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c.get_flight_info(flight.FlightDescriptor.for_command(sql("CommandStatementQuery"))), ["DoGet"]),
        (lambda c: c.get_flight_info(flight.FlightDescriptor.for_command(sql("CommandGetTables"))), ["ListTables"]),
        (
            lambda c: c.get_schema(flight.FlightDescriptor.for_command(sql("CommandStatementQuery", b"x"))),
            ["DoGet"],
        ),
        (lambda c: c.do_get(flight.Ticket(sql("TicketStatementQuery"))).read_all(), ["DoGet"]),
        (lambda c: c.do_get(flight.Ticket(sql("CommandGetCatalogs"))).read_all(), ["ListTables"]),
        (lambda c: list(c.do_action(flight.Action("CreatePreparedStatement", sql("X")))), ["CreateTable", "DoGet"]),
        (lambda c: list(c.do_action(flight.Action("BeginTransaction", b""))), ["atomic"]),
        (lambda c: list(c.do_action(flight.Action("CancelFlightInfo", b""))), ["cancel the call"]),
        (lambda c: list(c.do_action(flight.Action("SetSessionOptions", b""))), ["sessions"]),
        (lambda c: list(c.do_action(flight.Action("create_table", b"{}"))), ["CreateTable", "case-sensitive"]),
        (lambda c: list(c.do_action(flight.Action("Nonsense", b""))), ["ListTables", "Flush"]),
        (lambda c: list(c.do_action(flight.Action("", b""))), ["ListTables"]),
    ],
)
def test_what_is_not_offered(
    call: Callable[[flight.FlightClient], Any], words: list[str], client: flight.FlightClient
) -> None:
    """Flight SQL and unknown actions are UNIMPLEMENTED, with what to use in their place."""
    message = failure_of(call, client)
    assert message.startswith("ArrowNotImplementedError"), message
    assert "[unimplemented]" in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("method", ["do_put", "do_exchange"])
@pytest.mark.parametrize(
    "command", ["CommandStatementIngest", "CommandStatementUpdate", "CommandPreparedStatementQuery"]
)
def test_ingest_of_flight_sql(method: str, command: str, client: flight.FlightClient) -> None:
    """Flight SQL's way to write says which way there is."""
    descriptor = flight.FlightDescriptor.for_command(sql(command))

    def write() -> None:
        if method == "do_put":
            writer, reader = client.do_put(descriptor, NUMBERS)
        else:
            writer, reader = client.do_exchange(descriptor)
            writer.begin(NUMBERS)
        writer.write_batch(numbers([1]))
        writer.done_writing()
        while reader.read() if method == "do_put" else reader.read_chunk():
            pass
        writer.close()

    message = failure_of(write)
    assert "[unimplemented]" in message
    assert command in message


def test_other_calls(dial: Callable[..., grpc.Channel], client: flight.FlightClient, table: str) -> None:
    """PollFlightInfo says what to use; a table that there is none of is told first. Handshake asks for nothing."""
    create(client, table)
    poll = dial().unary_unary(messages.SERVICE + "PollFlightInfo")
    for name, status, words in ((table, "UNIMPLEMENTED", "GetFlightInfo"), ("nothing", "NOT_FOUND", "nothing")):
        with pytest.raises(grpc.RpcError) as caught:
            poll(messages.build("FlightDescriptor", type=messages.DESCRIPTOR_PATH, path=[name]), timeout=60)
        assert caught.value.code().name == status  # type: ignore[attr-defined]
        assert words in caught.value.details()  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as caught:
        dial().unary_unary(messages.SERVICE + "Nonsense")(b"", timeout=60)
    assert caught.value.code().name == "UNIMPLEMENTED"  # type: ignore[attr-defined]
    assert client.authenticate_basic_token("ada", "secret") is not None
    assert client.get_schema(flight.FlightDescriptor.for_path(table)).schema.names == ["n"]
