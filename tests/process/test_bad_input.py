"""What clients do wrong costs them, says why, and costs nobody else: a neighbour's stream goes on throughout."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import h2.config
import h2.connection
import h2.events
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.flight import messages
from arka.testing.ipcstreams import StreamMessage, write_stream
from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import (
    CALL_TIMEOUT_S,
    NUMBERS,
    TIERS,
    Ack,
    RawStream,
    Stream,
    action,
    check_order,
    connect,
    create,
    failure_of,
    flight_data,
    numbers,
    write_all,
)

pytestmark = pytest.mark.process

BATCH_BYTES = 256 * 1024
MESSAGE_BYTES = 1024 * 1024
UNREAD_ACKS = 1_000
SETTINGS = {
    "server.drain_s": 5,
    "iceberg.commit_interval_s": 0.1,
    "limits.batch_bytes": BATCH_BYTES,
    "limits.message_bytes": MESSAGE_BYTES,
    "limits.batch_rows": 10_000,
    "limits.handshake_s": 1,
    "limits.message_stall_s": 1,
    "limits.unread_acks": UNREAD_ACKS,
    "limits.unread_acks_timeout_s": 1,
}
#: A column of each layout that a crafted body can lie about.
FIELDS = [("n", "int64!"), ("word", "utf8"), ("raw", "binary"), ("items", "list<int64>"), ("flag", "bool")]
SCHEMA = pa.schema(
    [
        pa.field("n", pa.int64(), nullable=False),
        ("word", pa.string()),
        ("raw", pa.binary()),
        ("items", pa.list_(pa.int64())),
        ("flag", pa.bool_()),
    ]
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with small limits; no client of this module may make it log a traceback."""
    with ServerProcess(tmp_path_factory.mktemp("server") / "data", SETTINGS) as process:
        yield process
        log = process.log.read_text()
        assert "Traceback" not in log, log[-20_000:]


@pytest.fixture(autouse=True)
def neighbour(server: ServerProcess) -> Iterator[None]:
    """A second client that writes and reads in lock step from before the test until after it."""
    stop = threading.Event()
    acks: list[Ack] = []
    failures: list[str] = []

    def run() -> None:
        with connect(server.location) as client:
            create(client, "neighbour")
            stream = Stream(client, "neighbour", requested_durability="disk")
            try:
                while not stop.is_set():
                    stream.write(numbers([1]))
                    acks.extend(stream.acks(2))
                    time.sleep(0.002)
                assert stream.finish() == []
            except Exception as error:  # whatever it is, it is the failure of the test
                failures.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    _wait_for_more(acks, failures)
    yield
    try:
        _wait_for_more(acks, failures)
    finally:
        stop.set()
        thread.join(CALL_TIMEOUT_S)
    assert failures == []
    check_order(acks, "disk", len(acks) // 2)


def _wait_for_more(acks: list[Ack], failures: list[str]) -> None:
    wanted, deadline = len(acks) + 10, time.monotonic() + 30
    while len(acks) < wanted and not failures:
        assert time.monotonic() < deadline, "the neighbour's stream stands still"
        time.sleep(0.002)


# -- requests -------------------------------------------------------------------------------------


def test_unknown_table(client: flight.FlightClient) -> None:
    """A stream to a table that is not there ends with NOT_FOUND and names it, before any data."""
    assert "[table_not_found] Table not found: nowhere" in (message := Stream(client, "nowhere").failure())
    assert message.startswith("ArrowKeyError"), message
    full = Stream(client, ("sales", "nowhere")).failure()
    assert "[table_not_found] Table not found: sales.nowhere" in full


@pytest.mark.parametrize("path", [("a", "b", "c"), ("",), ("1x",), ("a b",), ("x" * 129,), ("default", "../x")])
def test_illegal_table_name(client: flight.FlightClient, path: tuple[str, ...]) -> None:
    """A name that no table can have is INVALID_ARGUMENT."""
    message = Stream(client, path).failure()
    assert message.startswith("ArrowInvalid"), message
    assert "[invalid_request]" in message


def test_no_table_is_named(server: ServerProcess) -> None:
    """A stream without a descriptor and without table_name is INVALID_ARGUMENT at its first batch."""
    stream = RawStream(server.flight, schema=NUMBERS)
    stream.send(flight_data(write_stream(NUMBERS, [numbers([1])])[1]))
    status, message = stream.failure()
    assert status == "INVALID_ARGUMENT"
    assert message.startswith("[invalid_request]")


@pytest.mark.parametrize("first", ["request", "batch"])
def test_wrong_schema_names_every_difference(client: flight.FlightClient, table: str, first: str) -> None:
    """A schema that does not fit ends the stream with every difference at once, before any data is accepted.

    It is checked when the first batch or WriteRequest comes (protocol 3).
    """
    create(client, table, FIELDS)
    wrong = pa.schema([("n", pa.string()), ("word", pa.int64()), ("extra", pa.int32()), ("flag", pa.bool_())])
    stream = Stream(client, table, wrong, **({"requested_durability": "memory"} if first == "request" else {}))
    if first == "batch":
        stream.write(pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in wrong], schema=wrong))
    message = stream.failure()
    assert message.startswith("ArrowInvalid"), message
    assert f"[schema_mismatch] Schema mismatch for default.{table}: " in message
    for difference in ("column 'n' is utf8, expected int64", "column 'word' is int64, expected utf8", "'extra'"):
        assert difference in message
    assert "'flag'" not in message
    assert client.do_get(flight.Ticket(table.encode())).read_all().num_rows == 0


def test_missing_required_column(client: flight.FlightClient, table: str) -> None:
    """A stream may leave nullable columns out, never a required one."""
    create(client, table, FIELDS)
    write_all(client, table, [numbers([1])])
    message = Stream(client, table, pa.schema([("word", pa.string())]), acks="each").failure()
    assert "[schema_mismatch]" in message
    assert "'n'" in message


def test_second_schema(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A second, different schema on a stream is INVALID_ARGUMENT."""
    create(client, table, FIELDS)
    stream = RawStream(server.flight, [table], NUMBERS)
    stream.send(flight_data(write_stream(SCHEMA, [])[0]))
    assert stream.failure()[0] == "INVALID_ARGUMENT"


BAD_REQUESTS: dict[str, tuple[bytes, list[str]]] = {
    "no JSON": (b"{", []),
    "not UTF-8": (b'{"table_name": "\xff"}', []),
    "no object": (b"[1]", []),
    "another type": (b'{"requested_durability": 3}', ["requested_durability"]),
    "unknown tier": (b'{"requested_durability": "tape"}', ["tape", ", ".join(TIERS)]),
    "unknown operation": (b'{"operation": "merge"}', ["merge"]),
    "delete on append-only": (b'{"operation": "delete"}', ["append-only"]),
    "empty key": (b'{"idempotency_key": ""}', ["idempotency_key"]),
    "long key": (b'{"idempotency_key": "%s"}' % (b"k" * 257), ["idempotency_key", "256"]),
    "deep JSON": (b"[" * 50_000, []),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_alone(client: flight.FlightClient, table: str, case: str) -> None:
    """A metadata-only WriteRequest that cannot be meant ends the stream with INVALID_ARGUMENT, saying why."""
    body, words = BAD_REQUESTS[case]
    create(client, table)
    stream = Stream(client, table)
    stream.writer.write_metadata(body)
    message = stream.failure()
    assert message.startswith("ArrowInvalid"), message
    assert "[invalid_request]" in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_with_a_batch(client: flight.FlightClient, table: str, case: str) -> None:
    """The same with a batch costs that batch alone: an error ack in its turn, and the stream goes on."""
    body, words = BAD_REQUESTS[case]
    create(client, table)
    stream = Stream(client, table)
    stream.write(numbers([1]))
    stream.writer.write_with_metadata(numbers([2]), body)
    stream.write(numbers([3]))
    acks = stream.finish()
    (error,) = [ack for ack in acks if ack["error"] is not None]
    assert (error["sequence"], error["code"], error["lsn"]) == (1, "invalid_request", 0)
    assert [word for word in words if word not in error["error"]] == [], error
    assert [ack["sequence"] for ack in acks if ack["durability_level"] == "disk"] == [0, 2]


@pytest.mark.parametrize("word", ["ack_as", "acks"])
def test_unknown_words_of_the_stream(client: flight.FlightClient, table: str, word: str) -> None:
    """Unknown ``ack_as`` and ``acks`` are INVALID_ARGUMENT."""
    create(client, table)
    assert "[invalid_request]" in Stream(client, table, **{word: "smoke"}).failure()


# -- batches --------------------------------------------------------------------------------------


def test_null_in_a_required_column(client: flight.FlightClient, table: str) -> None:
    """A null where none may be is an error ack that names the column."""
    create(client, table)
    schema = pa.schema([("n", pa.int64())])
    stream = Stream(client, table, schema)
    stream.write(pa.record_batch([pa.array([1, None, 3], pa.int64())], schema=schema))
    (ack,) = stream.finish()
    assert (ack["code"], ack["sequence"], ack["durability_level"], ack["lsn"]) == ("invalid_batch", 0, "memory", 0)
    assert "'n'" in ack["error"]


def _good_batch(rows: int = 8) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [{"n": n, "word": f"wörd {n}", "raw": b"x" * n, "items": [n, None], "flag": n % 2 == 0} for n in range(rows)],
        schema=SCHEMA,
    )


def _split(batch: pa.RecordBatch) -> tuple[StreamMessage, StreamMessage]:
    schema, message = write_stream(batch.schema, [batch])
    return schema, message


def _crafted() -> Iterator[tuple[str, StreamMessage]]:
    """Batches whose headers are sound and whose bodies lie."""
    batch = _good_batch()
    _, message = _split(batch)
    offsets = struct.pack("<9i", *(0, *(len(f"wörd {n}".encode()) * (n + 1) for n in range(8))))
    body = message.body
    at = body.index(offsets)
    for name, values in {
        "offsets beyond the data": (0, 7, 14, 21, 28, 35, 42, 49, 2**30),
        "negative offsets": (-7, 7, 14, 21, 28, 35, 42, 49, 56),
        "falling offsets": (0, 7, 14, 50, 28, 35, 42, 49, 56),
        "offsets at the end of the integers": (0, 2**31 - 1, -(2**31), 21, 28, 35, 42, 49, 56),
    }.items():
        yield name, StreamMessage.build(message.header, body[:at] + struct.pack("<9i", *values) + body[at + 36 :])
    text = body.index("wörd 3".encode())
    for name, raw in {
        "UTF-8 cut": b"w\xc3\xc3",
        "UTF-8 overlong": b"w\xc0\xaf",
        "a surrogate": b"\xed\xa0\x80",
    }.items():
        yield name, StreamMessage.build(message.header, body[:text] + raw + body[text + len(raw) :])
    yield "a shorter body", StreamMessage.build(message.header, body[:-8])
    yield "a longer body", StreamMessage.build(message.header, body + bytes(8))
    yield "no body", StreamMessage.build(message.header)


@pytest.mark.parametrize("case", [name for name, _ in _crafted()])
def test_crafted_body(server: ServerProcess, client: flight.FlightClient, table: str, case: str) -> None:
    """A body that lies about itself is ``invalid_batch`` and poisons nothing: the batches around it are committed."""
    crafted = dict(_crafted())[case]
    create(client, table, FIELDS)
    good = _split(_good_batch())[1]
    stream = RawStream(server.flight, [table], SCHEMA)
    for message in (good, crafted, good):
        stream.send(flight_data(message, metadata={"requested_durability": "iceberg_committed"}))
    acks = stream.finish()
    (error,) = [ack for ack in acks if ack["error"] is not None]
    assert (error["sequence"], error["code"], error["lsn"]) == (1, "invalid_batch", 0)
    assert [ack["sequence"] for ack in acks if ack["durability_level"] == "iceberg_committed"] == [0, 2]
    assert lake.rows(server.data, table).sort_by("n").num_rows == 16


def test_mutated_bodies_and_headers(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """Random damage to batches gets an ack each, or ends that stream; what is accepted can be committed and read."""
    create(client, table, FIELDS)
    pick = random.Random(3)
    good = _split(_good_batch())[1]
    acked = 0
    for number in range(60):
        header, body = bytearray(good.header), bytearray(good.body)
        for _ in range(pick.randrange(1, 4)):
            target = body if number % 2 else header
            target[pick.randrange(len(target))] = pick.randrange(256)
        stream = RawStream(server.flight, [table], SCHEMA)
        stream.send(flight_data(StreamMessage.build(bytes(header), bytes(body))))
        stream.send(flight_data(good))
        acks, status = stream.outcome()
        assert status in ("OK", "INVALID_ARGUMENT")
        acked += len({ack["sequence"] for ack in acks if ack["durability_level"] == "disk"})
        assert {ack["code"] for ack in acks if ack["error"] is not None} <= {"invalid_batch"}
    assert acked >= 30
    action(client, "Flush", name=table)
    found = lake.rows(server.data, table)
    found.validate(full=True)
    assert found.num_rows == 8 * acked


@pytest.mark.parametrize("kind", ["schema", "batch", "junk"])
def test_malformed_ipc_headers(server: ServerProcess, client: flight.FlightClient, table: str, kind: str) -> None:
    """A flatbuffer that is none ends its stream, or costs its batch; never the server."""
    create(client, table, FIELDS)
    schema, batch = _split(_good_batch())
    good = {"schema": schema, "batch": batch, "junk": StreamMessage.build(b"\0" * 64)}[kind]
    for length in (0, 1, 4, 7, 8, 16, len(good.header) // 2):
        stream = RawStream(server.flight, [table], None if kind == "schema" else SCHEMA)
        stream.send(flight_data(StreamMessage.build(good.header[:length], good.body), path=[table]))
        acks, status = stream.outcome()
        assert {ack["code"] for ack in acks} <= {"invalid_batch"}
        assert status in ("OK", "INVALID_ARGUMENT")


def test_big_endian_stream(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A big-endian stream is INVALID_ARGUMENT (T15)."""
    create(client, table)
    stream = RawStream(server.flight)
    stream.send(flight_data(StreamMessage.build(_big_endian_schema()), path=[table]))
    status, message = stream.failure()
    assert status == "INVALID_ARGUMENT"
    assert "endian" in message


def _big_endian_schema() -> bytes:
    """Lay out Message(V5, Schema(endianness=Big, fields=[])) by hand: no Arrow library writes one."""
    message_at, schema_at = 16, 36
    out = struct.pack("<I2x", message_at)
    # Where a Message of 12 bytes has its version, the type of its header, and its header.
    out += struct.pack("<5H", 10, 12, 6, 5, 8)
    out += struct.pack("<ixBHI", message_at - 6, 1, 4, schema_at - (message_at + 8))
    # Where a Schema of 12 bytes has its endianness and its fields.
    out += struct.pack("<4H", 8, 12, 4, 8)
    out += struct.pack("<iHHI", schema_at - 28, 1, 0, 4)
    return out + struct.pack("<I", 0) + bytes(4)


# -- sizes ----------------------------------------------------------------------------------------


def test_batch_over_the_limit(client: flight.FlightClient, table: str) -> None:
    """A batch over ``limits.batch_bytes`` in a legal message is an error ack; the stream goes on (T17)."""
    create(client, table)
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False)])
    stream = Stream(client, table, schema)
    stream.write(numbers([1]))
    stream.write(numbers(range(BATCH_BYTES // 8 + 1)))
    stream.write(numbers([2]))
    acks = stream.finish()
    (error,) = [ack for ack in acks if ack["error"] is not None]
    assert (error["sequence"], error["code"], error["lsn"]) == (1, "too_large", 0)
    assert str(BATCH_BYTES) in error["error"]
    assert [ack["sequence"] for ack in acks if ack["durability_level"] == "disk"] == [0, 2]


def test_too_many_rows(client: flight.FlightClient, table: str) -> None:
    """A batch with more rows than ``limits.batch_rows`` is an error ack."""
    create(client, table)
    stream = Stream(client, table)
    stream.write(numbers(range(10_001)))
    (ack,) = stream.finish()
    assert ack["code"] == "invalid_batch"
    assert "10000" in ack["error"]


def test_message_over_the_limit(client: flight.FlightClient, table: str) -> None:
    """A message over ``limits.message_bytes`` ends its stream with RESOURCE_EXHAUSTED (T17)."""
    create(client, table)
    stream = Stream(client, table)
    stream.write(numbers([1]))
    stream.acks(2)
    message = ""
    try:
        stream.write(numbers(range(MESSAGE_BYTES // 4)))
    except (flight.FlightError, pa.ArrowException) as error:
        message = str(error)
    message += stream.failure()
    assert "[too_large]" in message
    assert str(MESSAGE_BYTES) in message
    write_all(client, table, [numbers([2])])
    assert sorted(client.do_get(flight.Ticket(table.encode())).read_all()["n"].to_pylist()) == [1, 2]


# -- silence and noise ----------------------------------------------------------------------------


class Wire:
    """An HTTP/2 client on a bare socket, which sends what it is told to and no more."""

    def __init__(self, server: ServerProcess) -> None:
        self.socket = socket.create_connection(server.address, timeout=20)
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.connection.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.connection.data_to_send())

    def open(self, method: str = "DoExchange") -> int:
        stream = self.connection.get_next_available_stream_id()
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": messages.SERVICE + method,
            ":authority": "test",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        self.connection.send_headers(stream, list(headers.items()))
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send all of it, as the server gives window."""
        while True:
            room = min(self.connection.local_flow_control_window(stream), self.connection.max_outbound_frame_size)
            head, data = data[:room], data[room:]
            self.connection.send_data(stream, head, end_stream=end and not data)
            self.flush()
            if not data:
                return
            while self.connection.local_flow_control_window(stream) == 0:
                self.connection.receive_data(self.socket.recv(65_536))

    def trailers(self, stream: int) -> dict[str, str]:
        """Read until the stream ends; returns the last header block, or ``reset``."""
        last: dict[str, str] = {}
        while True:
            data = self.socket.recv(65_536)
            assert data, "the server closed the connection"
            for event in self.connection.receive_data(data):
                if getattr(event, "stream_id", None) != stream:
                    continue
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    last = dict(event.headers)
                if isinstance(event, h2.events.StreamReset):
                    return {"reset": str(event.error_code)}
                if isinstance(event, h2.events.StreamEnded):
                    return last
            self.flush()


@pytest.fixture
def open_wire(server: ServerProcess) -> Iterator[Callable[[], Wire]]:
    """Open bare connections, which are closed in the end."""
    with ExitStack() as opened:

        def make() -> Wire:
            wire = Wire(server)
            opened.enter_context(wire.socket)
            return wire

        yield make


def _read_to_the_end(opened: socket.socket) -> bytes:
    found = b""
    try:
        while data := opened.recv(65_536):
            found += data
    except ConnectionResetError:
        pass
    return found


def _framed(table: str, rows: int = 500) -> bytes:
    schema, batch = write_stream(NUMBERS, [numbers(range(rows))])
    out = b""
    for message in (flight_data(schema, path=[table]), flight_data(batch)):
        out += b"\0" + len(message).to_bytes(4, "big") + message
    return out


def test_client_that_sends_nothing(server: ServerProcess) -> None:
    """A connection without a preface is closed after ``limits.handshake_s``."""
    with socket.create_connection(server.address, timeout=20) as opened:
        _read_to_the_end(opened)


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"\0" * 1024,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nXXXXXXXXXXXXXXXXXXXXXXXX",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
        b"PRI * HTTP/2.0\r\n\r\nSM",
        random.Random(1).randbytes(100_000),
    ],
    ids=["HTTP/1.1", "TLS", "zeros", "a preface and text", "a preface and ones", "half a preface", "random"],
)
def test_garbage(server: ServerProcess, noise: bytes) -> None:
    """What is not HTTP/2 is closed, whatever it is."""
    with socket.create_connection(server.address, timeout=20) as opened:
        try:
            opened.sendall(noise)
        except (BrokenPipeError, ConnectionResetError):
            return
        _read_to_the_end(opened)


def test_half_a_message_then_silence(
    server: ServerProcess, open_wire: Callable[[], Wire], client: flight.FlightClient, table: str
) -> None:
    """A granted message without progress for ``limits.message_stall_s`` ends its stream, not the connection (T4)."""
    create(client, table)
    wire = open_wire()
    stream = wire.open()
    # More than the initial window: the server has granted the rest when it comes.
    data = _framed(table, 9_000)
    wire.send(stream, data[:-1000])
    trailers = wire.trailers(stream)
    assert trailers.get("grpc-status", "0") != "0", trailers
    again = wire.open()
    wire.send(again, data, end=True)
    assert wire.trailers(again)["grpc-status"] == "0"
    action(client, "Flush", name=table)
    assert lake.rows(server.data, table).num_rows == 9_000


def test_half_a_message_then_the_end(open_wire: Callable[[], Wire], client: flight.FlightClient, table: str) -> None:
    """A stream that half-closes inside a message ends with an error; the message never becomes a write."""
    create(client, table)
    wire = open_wire()
    for cut in (1, 3, 500, 4000):
        stream = wire.open()
        wire.send(stream, _framed(table)[:-cut], end=True)
        assert wire.trailers(stream).get("grpc-status", "0") != "0"
    assert client.do_get(flight.Ticket(table.encode())).read_all().num_rows == 0


@pytest.mark.parametrize("reset", [False, True])
def test_half_a_message_then_gone(
    open_wire: Callable[[], Wire], client: flight.FlightClient, table: str, reset: bool
) -> None:
    """A connection that breaks inside a frame leaves nothing behind, however it breaks."""
    create(client, table)
    for cut in (1, 9, 700, 4000):
        wire = open_wire()
        stream = wire.open()
        wire.connection.send_data(stream, _framed(table))
        wire.socket.sendall(wire.connection.data_to_send()[:-cut])
        if reset:
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.socket.close()
        action(client, "Flush", name=table)
    assert client.do_get(flight.Ticket(table.encode())).read_all().num_rows == 0


def test_client_that_stops_reading_acks(open_wire: Callable[[], Wire], client: flight.FlightClient, table: str) -> None:
    """Past ``limits.unread_acks`` for the timeout, the stream ends with RESOURCE_EXHAUSTED ``[too_large]`` (T6).

    The client sends writes for as long as the server gives it window, and no window for the acks.
    """
    create(client, table)
    wire = open_wire()
    stream = wire.open()
    schema, batch = write_stream(NUMBERS, [numbers([1])])
    wire.send(stream, _message(flight_data(schema, path=[table])))
    one = _message(flight_data(batch))
    trailers: dict[str, str] = {}
    while not trailers:
        if wire.connection.local_flow_control_window(stream) >= len(one):
            wire.send(stream, one)
            continue
        data = wire.socket.recv(65_536)
        assert data, "the server closed the connection"
        for event in wire.connection.receive_data(data):
            if isinstance(event, h2.events.TrailersReceived):
                trailers = dict(event.headers)
    assert trailers["grpc-status"] == "8", trailers
    assert trailers["grpc-message"].startswith("[too_large]")
    assert "read acks while writing" in trailers["grpc-message"]


def _message(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


def test_cancelled_streams(client: flight.FlightClient, table: str) -> None:
    """Streams that are cancelled at any moment leave whole writes or none."""
    create(client, table)
    for number in range(30):
        stream = Stream(client, table)
        for value in range(number):
            stream.write(numbers([value] * 3))
        stream.reader.cancel()
    action(client, "Flush", name=table)
    assert client.do_get(flight.Ticket(table.encode())).read_all().num_rows % 3 == 0


def test_unknown_rpc(open_wire: Callable[[], Wire]) -> None:
    """A method that the server does not have is UNIMPLEMENTED."""
    wire = open_wire()
    stream = wire.open("NoSuchMethod")
    wire.send(stream, _message(b""), end=True)
    assert wire.trailers(stream)["grpc-status"] == "12"


def test_garbage_as_messages(open_wire: Callable[[], Wire], client: flight.FlightClient, table: str) -> None:
    """Bytes that are no Flight message end their RPC with INVALID_ARGUMENT, for every RPC."""
    create(client, table)
    junk = b"\x0a\xff\xff\xff\xff\x0f"
    wire = open_wire()
    for method in ("DoExchange", "DoPut", "DoAction", "DoGet", "GetSchema", "GetFlightInfo", "ListFlights"):
        stream = wire.open(method)
        wire.send(stream, _message(junk), end=True)
        trailers = wire.trailers(stream)
        assert trailers["grpc-status"] == "3", (method, trailers)


def test_empty_requests(open_wire: Callable[[], Wire]) -> None:
    """A unary RPC without its message is INVALID_ARGUMENT; a write stream without one is an empty stream."""
    wire = open_wire()
    for method, status in (("DoAction", "3"), ("DoGet", "3"), ("GetSchema", "3"), ("DoExchange", "0"), ("DoPut", "0")):
        stream = wire.open(method)
        wire.send(stream, b"", end=True)
        assert wire.trailers(stream)["grpc-status"] == status, method


def test_deadline(client: flight.FlightClient, table: str) -> None:
    """A call past its deadline ends for the client; its accepted writes stay."""
    create(client, table)
    stream = Stream(client, table, timeout_s=0.5)
    stream.write(numbers([1]))
    stream.acks(2)
    assert stream.failure().startswith("FlightTimedOutError")
    action(client, "Flush", name=table)
    assert client.do_get(flight.Ticket(table.encode())).read_all().num_rows == 1


def test_messages_for_people(client: flight.FlightClient, table: str) -> None:
    """No error shows a traceback or a path of the server's code."""
    create(client, table)
    texts: list[str] = [
        Stream(client, "nowhere").failure(),
        Stream(client, table, pa.schema([("x", pa.int64())]), acks="each").failure(),
        failure_of(action, client, "CreateTable", name=table),
    ]
    stream: Any = Stream(client, table)
    stream.writer.write_metadata(b"{")
    texts.append(stream.failure())
    for text in texts:
        assert "Traceback" not in text
        assert ".py" not in text.partition(". gRPC client debug context")[0]
