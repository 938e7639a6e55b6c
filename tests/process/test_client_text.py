"""Texts of 100 kB in every field that a client can fill: the answers are short, and say what is wrong (T24)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.flight import messages
from arka.testing.ipcstreams import write_stream
from arka.testing.serverprocess import ServerProcess

from .clients import CALL_TIMEOUT_S, NUMBERS, RawStream, action, connect, create, flight_data, numbers

pytestmark = pytest.mark.process

#: Longest answer, in bytes.
SHORT = 5000
MIB = 1024 * 1024
#: 50 kB as JSON: escapes, characters of several bytes, what cannot be printed.
TEXTS = {
    "escapes": '\0\\"\n' * 3_000,
    "wide": "\u00e9\U0001f600" * 3_000,
    "unprintable": "\U000e0001\u202e" * 2_500,
    "dots": "." * 50_000,
    "braces": "{}%s" * 12_000,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server; no client of this module may make it log a traceback, or log much."""
    with ServerProcess(tmp_path_factory.mktemp("server") / "data", {"server.drain_s": 5}) as process:
        with connect(process.location) as client:
            create(client, "t")
        yield process
        log = process.log.read_text()
        assert "Traceback" not in log, log[-20_000:]
        assert max(map(len, log.splitlines())) < 2 * SHORT


def target(server: ServerProcess) -> str:
    return server.location.partition("://")[2]


def call(server: ServerProcess, method: str, request: bytes) -> tuple[str, str, int]:
    """Call a method; returns the status's name, its message, and the bytes of the answers."""
    with grpc.insecure_channel(target(server), options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answers = channel.unary_stream(messages.SERVICE + method)(request, timeout=CALL_TIMEOUT_S)
        try:
            return "OK", "", sum(map(len, answers))
        except grpc.RpcError as error:
            return error.code().name, error.details(), 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "field",
    ["table_name", "requested_durability", "idempotency_key", "operation", "ack_as", "acks", "ordered", "key_start"],
)
@pytest.mark.parametrize("with_batch", [True, False])
def test_write_requests(server: ServerProcess, field: str, text: str, with_batch: bool) -> None:
    """A WriteRequest's field: the error ack, or the status, is short."""
    schema, batch = write_stream(NUMBERS, [numbers([1])])
    stream = RawStream(target(server))
    stream.send(flight_data(schema, path=["t"]))
    metadata = {field: TEXTS[text]}
    if with_batch:
        stream.send(flight_data(batch, metadata=metadata))
        ack = stream.ack()
        assert ack["error"]
        assert len(json.dumps(ack, ensure_ascii=False).encode()) < SHORT
        stream.close()
    else:
        stream.send(flight_data(metadata=metadata))
        status, details = stream.failure()
        assert status == "INVALID_ARGUMENT"
        assert len(details.encode()) < SHORT


@pytest.mark.parametrize("text", TEXTS)
def test_paths_schemas_and_batches(server: ServerProcess, text: str) -> None:
    """A descriptor's parts, names of columns, and malformed JSON."""
    long = TEXTS[text]
    schema, batch = write_stream(NUMBERS, [numbers([1])])
    other = write_stream(pa.schema([(long, pa.int64()), ("n", pa.int64())]), [])[0]
    for first in (
        flight_data(schema, path=[long[:9_000]]),
        flight_data(schema, path=["x", *[long[:40]] * 200]),
        flight_data(schema, path=["t"], metadata=b"{" + long[:9_000].encode()),
        flight_data(other, path=["t"], metadata={}),
    ):
        stream = RawStream(target(server))
        stream.send(first)
        stream.send(flight_data(batch))
        status, details = stream.failure()
        assert status == "INVALID_ARGUMENT"
        assert len(details.encode()) < SHORT


@pytest.mark.parametrize("text", TEXTS)
def test_unary_requests(server: ServerProcess, text: str) -> None:
    """Tickets, descriptors, names of actions and their bodies."""
    long = TEXTS[text]
    name = json.dumps({"name": long}).encode()
    ticket = {"table_name": "t"}
    flush = json.dumps({"name": "t", "durability": long}).encode()
    requests: list[tuple[str, bytes]] = [
        ("DoGet", messages.build("Ticket", ticket=long.encode())),
        ("DoGet", messages.build("Ticket", ticket=json.dumps({"table_name": long}).encode())),
        ("DoGet", messages.build("Ticket", ticket=json.dumps({**ticket, "columns": [long, long]}).encode())),
        ("DoGet", messages.build("Ticket", ticket=json.dumps({**ticket, "columns": ["n"] * 50_000}).encode())),
        ("DoGet", messages.build("Ticket", ticket=json.dumps({**ticket, "compression": long}).encode())),
        ("DoGet", messages.build("Ticket", ticket=json.dumps({**ticket, "at_lsn": long}).encode())),
        ("DoGet", messages.build("Ticket", ticket=b'{"table_name":"t","wait_for_lsn":' + b"9" * 4000 + b"}")),
        ("GetSchema", messages.build("FlightDescriptor", type=1, path=[long[:9_000]])),
        ("GetFlightInfo", messages.build("FlightDescriptor", type=1, path=["t"] * 20_000)),
        ("GetFlightInfo", messages.build("FlightDescriptor", type=2, cmd=long.encode())),
        ("PollFlightInfo", messages.build("FlightDescriptor", type=1, path=[long[:9_000]])),
        ("DoAction", messages.build("Action", type=long)),
        *(("DoAction", messages.build("Action", type=kind, body=name)) for kind in
          ("CreateTable", "DropTable", "DescribeTable", "Flush")),
        ("DoAction", messages.build("Action", type="Flush", body=flush)),
        ("DoAction", messages.build("Action", type="DropTable", body=b'{"name"' + long.encode())),
    ]  # fmt: skip
    for method, request in requests:
        status, details, _ = call(server, method, request)
        assert status in ("INVALID_ARGUMENT", "UNIMPLEMENTED", "OUT_OF_RANGE", "NOT_FOUND"), (method, request[:60])
        assert len(details.encode()) < SHORT


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("GetSchema", MIB),
        ("GetFlightInfo", MIB),
        ("PollFlightInfo", MIB),
        ("DoGet", MIB),
        ("ListFlights", MIB),
        ("ListActions", MIB),
        ("Handshake", MIB),
        ("DoAction", 16 * MIB + 64 * 1024),
    ],
)
def test_large_requests_are_refused_at_their_prefix(server: ServerProcess, method: str, most: int) -> None:
    """One byte too many: RESOURCE_EXHAUSTED, whatever is in it."""
    status, details, _ = call(server, method, bytes(most + 1))
    assert (status, details) == (
        "RESOURCE_EXHAUSTED",
        f"[too_large] message of {most + 1} bytes is over the limit of {most}",
    )


def test_actions_other_than_create_table_have_a_mebibyte(server: ServerProcess) -> None:
    """The type is read first; a CreateTable may be longer, and is refused for what it says."""
    body = json.dumps({"name": "t", "comment": "x" * 2 * MIB}).encode()
    for kind in ("DropTable", "DescribeTable", "Flush", "ListTables", "Nothing"):
        status, details, _ = call(server, "DoAction", messages.build("Action", type=kind, body=body))
        assert (status, "[too_large]" in details) == ("RESOURCE_EXHAUSTED", True)
    status, details, _ = call(server, "DoAction", messages.build("Action", type="CreateTable", body=body))
    assert (status, "schema_json" in details) == ("INVALID_ARGUMENT", True)


def test_descriptors_and_metadata_have_64_kib(server: ServerProcess) -> None:
    """On write streams and in unary requests."""
    long = messages.build("FlightDescriptor", type=1, path=["t"], cmd=bytes(64 * 1024))
    status, details, _ = call(server, "GetSchema", long)
    assert (status, "[too_large]" in details) == ("RESOURCE_EXHAUSTED", True)
    for message in (b"\x0a" + messages.varint(len(long)) + long, flight_data(metadata=b" " * (64 * 1024 + 1))):
        stream = RawStream(target(server))
        stream.send(message)
        status, details = stream.failure()
        assert (status, "over the limit of 65536" in details) == ("RESOURCE_EXHAUSTED", True)


def wide(count: int, *, doc: str = "") -> dict[str, Any]:
    fields = [{"name": f"c{n}", "type": "int64", "metadata": {"doc": doc}} for n in range(count)]
    return {"schema_json": json.dumps({"fields": fields})}


def test_a_large_create_table(server: ServerProcess) -> None:
    """A request that a thread reads, and answers that threads spell."""
    request = json.dumps({"name": "wide", **wide(1500, doc="x" * 100)}).encode()
    assert len(request) > 64 * 1024
    with connect(server.location) as client:
        status, _, _ = call(server, "DoAction", messages.build("Action", type="CreateTable", body=request))
        assert status == "OK"
        described = action(client, "DescribeTable", name="wide", field_ids=True)
        assert len(described["schema"]["fields"]) == 1500
        assert list(described)[-1] == "survives"
        names = [f"c{n}" for n in range(1500)]
        for _ in range(2):
            assert client.get_flight_info(flight.FlightDescriptor.for_path("wide")).schema.names == names
            assert client.get_schema(flight.FlightDescriptor.for_path("wide")).schema.names == names
            assert {len(info.schema) for info in client.list_flights()} == {1, 1500}
        action(client, "DropTable", name="wide")
        assert action(client, "ListTables") == ["default.t"]
