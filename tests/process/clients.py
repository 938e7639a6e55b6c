"""What the tests of this folder say to a server: stock pyarrow, stock grpcio, and a bare socket."""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as flight

from arka.flight import messages
from arka.testing.ipcstreams import StreamMessage, write_stream

#: Ends only what hangs.
CALL_TIMEOUT_S = 90.0
TIERS = ("memory", "disk", "object_storage", "iceberg_committed")

Ack = dict[str, Any]


def connect(location: str) -> flight.FlightClient:
    """Open a client with a connection of its own: gRPC shares one among clients of the same arguments."""
    return flight.FlightClient(location, generic_options=[("grpc.use_local_subchannel_pool", 1)])


def action(client: flight.FlightClient, kind: str, **request: Any) -> Any:
    """Run an action whose result is one JSON value."""
    body = json.dumps(request).encode() if request else b""
    options = flight.FlightCallOptions(timeout=CALL_TIMEOUT_S)
    (result,) = client.do_action(flight.Action(kind, body), options)
    return json.loads(result.body.to_pybytes())


def create(client: flight.FlightClient, name: str, fields: Sequence[tuple[str, str]] | None = None, **more: Any) -> Any:
    """Create a table; a type that ends in ``!`` is of a required column."""
    columns = [
        {"name": column, "type": kind.removesuffix("!"), "nullable": not kind.endswith("!")}
        for column, kind in fields or [("n", "int64!")]
    ]
    return action(client, "CreateTable", name=name, schema_json=json.dumps({"fields": columns}), **more)


NUMBERS = pa.schema([pa.field("n", pa.int64(), nullable=False)])


def numbers(values: Iterable[int]) -> pa.RecordBatch:
    """Make a batch for the table that ``create`` makes by default."""
    return pa.record_batch([pa.array(list(values), pa.int64())], schema=NUMBERS)


def tiers_to(tier: str) -> tuple[str, ...]:
    """The tiers whose acks a write gets that asks for this one."""
    return TIERS[: TIERS.index(tier) + 1]


class Stream:
    """A DoExchange write stream in the hands of pyarrow."""

    def __init__(
        self,
        client: flight.FlightClient,
        table: str | Sequence[str],
        schema: pa.Schema | None = NUMBERS,
        timeout_s: float = CALL_TIMEOUT_S,
        **request: Any,
    ) -> None:
        """Open it.

        Args:
            client: a connected client.
            table: the descriptor's path.
            schema: sent at once; None for not yet.
            timeout_s: the call's deadline.
            request: the WriteRequest of a metadata-only message before the schema; none for no message.
        """
        path = (table,) if isinstance(table, str) else table
        options = flight.FlightCallOptions(timeout=timeout_s)
        self.writer, self.reader = client.do_exchange(flight.FlightDescriptor.for_path(*path), options)
        if request:
            self.request(**request)
        if schema is not None:
            # The server may have ended the stream already. The next read raises its error.
            with contextlib.suppress(flight.FlightError, pa.ArrowException):
                self.writer.begin(schema)

    def request(self, **request: Any) -> None:
        """Send a WriteRequest alone."""
        self.writer.write_metadata(json.dumps(request).encode())

    def write(self, batch: pa.RecordBatch, **request: Any) -> None:
        """Send a batch, with a WriteRequest if there is one."""
        if request:
            self.writer.write_with_metadata(batch, json.dumps(request).encode())
        else:
            self.writer.write_batch(batch)

    def ack(self) -> Ack:
        """Read the next ack.

        Raises:
            StopIteration: the server ended the stream with OK.
        """
        chunk = self.reader.read_chunk()
        assert chunk.app_metadata is not None
        found: Ack = json.loads(chunk.app_metadata.to_pybytes())
        return found

    def acks(self, count: int) -> list[Ack]:
        """Read this many acks."""
        return [self.ack() for _ in range(count)]

    def rest(self) -> Iterator[Ack]:
        """Read acks until the server ends the stream with OK."""
        while True:
            try:
                yield self.ack()
            except StopIteration:
                return

    def finish(self) -> list[Ack]:
        """Half-close, read what is left, close."""
        self.writer.done_writing()
        left = list(self.rest())
        self.writer.close()
        return left

    def failure(self) -> str:
        """Read until the server ends the stream with an error; returns it, its class's name first."""
        try:
            while True:
                self.ack()
        except StopIteration:
            raise AssertionError("the stream ended with OK") from None
        except (flight.FlightError, pa.ArrowException) as error:
            text = f"{type(error).__name__}: {error}"
        with contextlib.suppress(flight.FlightError, pa.ArrowException):
            self.writer.close()
        return text


def write_all(
    client: flight.FlightClient, table: str, batches: Sequence[pa.RecordBatch], durability: str = "iceberg_committed"
) -> list[Ack]:
    """Write batches on a stream of their own and return all acks; none may be an error."""
    stream = Stream(client, table, batches[0].schema, requested_durability=durability)
    for batch in batches:
        stream.write(batch)
    found = stream.finish()
    errors = [ack for ack in found if ack["error"] is not None]
    assert errors == [], errors
    return found


def check_order(acks: Sequence[Ack], requested: str, count: int) -> list[int]:
    """Check that each of ``count`` writes had each ack once, in order; returns the LSNs by sequence.

    Holds for streams without duplicates, rejections and watermark mode (protocol 3).
    """
    assert [ack for ack in acks if ack["error"] is not None] == []
    lsns: dict[int, int] = {}
    last_tier = [-1] * count
    next_of = dict.fromkeys(tiers_to(requested), 0)
    for ack in acks:
        tier, sequence = ack["durability_level"], ack["sequence"]
        assert next_of[tier] == sequence, f"{ack} came when {next_of[tier]} was next of its tier"
        next_of[tier] += 1
        assert last_tier[sequence] == TIERS.index(tier) - 1, f"{ack} came after tier {last_tier[sequence]}"
        last_tier[sequence] += 1
        assert lsns.setdefault(sequence, ack["lsn"]) == ack["lsn"]
    assert next_of == dict.fromkeys(tiers_to(requested), count)
    found = [lsns[sequence] for sequence in range(count)]
    assert found == sorted(set(found)), "LSNs do not increase with the sequence"
    return found


def failure_of(run: Any, *arguments: Any, **options: Any) -> str:
    """Run what must fail in the eyes of a Flight client; returns the error, its class's name first."""
    try:
        run(*arguments, **options)
    except (flight.FlightError, pa.ArrowException, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the call succeeded")


def flight_data(
    message: StreamMessage | None = None, *, path: Sequence[str] = (), metadata: dict[str, Any] | bytes | None = None
) -> bytes:
    """Encode a FlightData message with exactly the fields that are given."""
    out = b""
    if path:
        descriptor = messages.build("FlightDescriptor", type=messages.DESCRIPTOR_PATH, path=list(path))
        out += b"\x0a" + messages.varint(len(descriptor)) + descriptor
    if message is not None:
        out += b"\x12" + messages.varint(len(message.header)) + message.header
    if metadata is not None:
        body = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        out += b"\x1a" + messages.varint(len(body)) + body
    if message is not None and message.buffer.body_bytes:
        out += b"\xc2\x3e" + messages.varint(message.buffer.body_bytes) + message.body
    return out


class RawStream:
    """A DoExchange in the hands of stock grpcio: any bytes as messages, whether or not they are Flight's."""

    def __init__(self, address: str, path: Sequence[str] = (), schema: pa.Schema | None = None) -> None:
        """Open it on a connection of its own.

        Args:
            address: ``host:port``.
            path: a descriptor to send with the schema.
            schema: sent at once; None for nothing.
        """
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        call = self._channel.stream_stream(messages.SERVICE + "DoExchange")
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = call(iter(self._outgoing.get, None), timeout=CALL_TIMEOUT_S)
        if schema is not None:
            self.send(flight_data(write_stream(schema, [])[0], path=path))

    def send(self, message: bytes) -> None:
        """Send one gRPC message."""
        self._outgoing.put(message)

    def ack(self) -> Ack:
        """Read the next ack, which stands alone in its message."""
        data: bytes = next(self._call)
        assert data[:1] == b"\x1a"
        found: Ack = json.loads(data[data.index(b"{") :])
        return found

    def finish(self) -> list[Ack]:
        """Half-close, read what is left, close."""
        self._outgoing.put(None)
        left = []
        try:
            while True:
                left.append(self.ack())
        except StopIteration:
            return left
        finally:
            self.close()

    def outcome(self) -> tuple[list[Ack], str]:
        """Half-close and read until the server ends the stream; returns the acks and the status's name."""
        self._outgoing.put(None)
        acks = []
        try:
            while True:
                acks.append(self.ack())
        except StopIteration:
            return acks, "OK"
        except grpc.RpcError as error:
            return acks, error.code().name  # type: ignore[attr-defined]
        finally:
            self.close()

    def failure(self) -> tuple[str, str]:
        """Read until the server ends the stream with an error; returns the status's name and the message."""
        try:
            while True:
                self.ack()
        except StopIteration:
            raise AssertionError("the stream ended with OK") from None
        except grpc.RpcError as error:
            return error.code().name, error.details()  # type: ignore[attr-defined]
        finally:
            self.close()

    def close(self) -> None:
        """Cancel what is left of the call, and close the connection."""
        self._outgoing.put(None)
        self._channel.close()
