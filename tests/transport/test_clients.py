"""Real clients on real sockets: grpcio, and pyarrow's Flight client."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import ClassVar

import pyarrow as pa
import pyarrow.flight as fl
import pytest
import trio

from arka.flight.grpc import Call, Health, Route
from arka.flight.http2 import ConnectionFactory
from arka.options import MIB, Limits
from arka.tiers.admission import Ledger
from tests.transport.peer import echo, grpc_message, proto_field

grpc = pytest.importorskip("grpc", reason="grpcio is not installed: pip install grpcio")

EXCHANGE = "/arrow.flight.protocol.FlightService/DoExchange"
#: Ends a client that hangs, seconds.
HANG_S = 100


class Acks:
    """Unsent acks as state: how many are due, and the next one's number."""

    def __init__(self) -> None:
        self.due = 0
        self.next = 0

    def take(self, budget: int) -> bytes:
        out = bytearray()
        while self.due and (not out or len(out) < budget):
            out += grpc_message(proto_field(3, b"%d" % self.next))
            self.due -= 1
            self.next += 1
        return bytes(out)


async def exchange(call: Call) -> None:
    """Acknowledge each batch, as DoExchange does."""
    acks = Acks()
    call.attach_outbox(acks)
    while (message := await call.receive()) is not None:
        message.charge.release()
        if message.body_bytes:
            acks.due += 1
            call.wake()
    await call.wait_outbox_drained()


@asynccontextmanager
async def listening(routes: dict[str, Route], limits: Limits | None = None) -> AsyncIterator[tuple[int, Ledger]]:
    """Serve on a free port."""
    limits = limits or Limits(memory_bytes=256 * MIB)
    ledger = Ledger(limits.memory_bytes)
    factory = ConnectionFactory(routes, ledger, limits)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, factory.serve, listeners)
        with trio.fail_after(HANG_S):
            yield listeners[0].socket.getsockname()[1], ledger
        nursery.cancel_scope.cancel()
    assert ledger.statistics().charged_bytes == 0


async def in_thread(function, *args, **kwargs):
    return await trio.to_thread.run_sync(partial(function, *args, **kwargs), abandon_on_cancel=True)


def batch_of(rows: int) -> pa.RecordBatch:
    return pa.record_batch({"id": pa.array(range(rows), pa.int64()), "v": pa.array([0.5] * rows)})


class TestGrpcio:
    """grpc's C core, by way of its Python binding."""

    ROUTES: ClassVar = {"/t.T/Echo": Route(echo, request_bytes=8 * MIB), **Health(["t.T"]).routes()}

    async def test_unary_and_streaming(self):
        """Calls of all four kinds work, with messages from nothing to 5 MB both ways."""
        messages = [b"", b"x", bytes(70_000), bytes(range(256)) * 20_000]

        def client(port: int):
            options = [("grpc.max_receive_message_length", -1)]
            with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
                unary = channel.unary_unary("/t.T/Echo")
                assert [unary(message, timeout=HANG_S) for message in messages] == messages
                stream = channel.stream_stream("/t.T/Echo")
                assert list(stream(iter(messages * 3), timeout=HANG_S)) == messages * 3
                assert list(channel.unary_stream("/t.T/Echo")(b"a", timeout=HANG_S)) == [b"a"]
                assert channel.stream_unary("/t.T/Echo")(iter([b"a"]), timeout=HANG_S) == b"a"

        async with listening(self.ROUTES) as (port, _):
            await in_thread(client, port)

    async def test_statuses(self):
        """Statuses, messages beyond ASCII, deadlines and cancellation arrive as the client's own."""
        cancelled = trio.Event()

        async def fail(call: Call) -> None:
            raise ValueError

        async def wait(call: Call) -> None:
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        def client(port: int):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                codes = []
                for path, timeout in [("/t.T/Grüße", HANG_S), ("/t.T/Fail", HANG_S), ("/t.T/Wait", 0.2)]:
                    with pytest.raises(grpc.RpcError) as caught:
                        channel.unary_unary(path)(b"", timeout=timeout)
                    codes.append(caught.value.code().name)
                call = channel.unary_unary("/t.T/Wait").future(b"")
                call.cancel()
                return codes

        async with listening({"/t.T/Fail": Route(fail), "/t.T/Wait": Route(wait)}) as (port, _):
            codes = await in_thread(client, port)
            await cancelled.wait()
        assert codes == ["UNIMPLEMENTED", "INTERNAL", "DEADLINE_EXCEEDED"]

    async def test_overload_does_not_hang(self):
        """T10: calls above the limit fail with UNAVAILABLE [overloaded] instead of waiting in silence."""

        async def wait(call: Call) -> None:
            assert await call.receive() is not None
            assert await call.receive() is None

        def client(port: int):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                done = threading.Event()

                def requests():
                    yield b"x"
                    done.wait(HANG_S)

                call = channel.stream_stream("/t.T/Wait")
                held = [call(requests(), timeout=HANG_S) for _ in range(3)]
                while True:
                    failed = [one for one in held if not one.is_active()]
                    if failed:
                        break
                    done.wait(0.01)
                assert [one.code().name for one in failed] == ["UNAVAILABLE"]
                assert failed[0].details().startswith("[overloaded]")
                done.set()
                assert sorted(one.code().name for one in held) == ["OK", "OK", "UNAVAILABLE"]

        limits = Limits(memory_bytes=64 * MIB, streams_per_connection=2)
        async with listening({"/t.T/Wait": Route(wait)}, limits) as (port, _):
            await in_thread(client, port)

    async def test_compressed_messages(self):
        """T12: a client that compresses is told UNIMPLEMENTED."""

        def client(port: int):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_unary("/t.T/Echo")
                with pytest.raises(grpc.RpcError) as caught:
                    call(bytes(10_000), timeout=HANG_S, compression=grpc.Compression.Gzip)
                return caught.value.code().name

        async with listening(self.ROUTES) as (port, _):
            assert await in_thread(client, port) == "UNIMPLEMENTED"


class TestFlight:
    """pyarrow's Flight client, as users have it."""

    ROUTES: ClassVar = {EXCHANGE: Route(exchange, flight_data=True)}

    @staticmethod
    def open(port: int, batch: pa.RecordBatch):
        client = fl.FlightClient(f"grpc://127.0.0.1:{port}")
        writer, reader = client.do_exchange(fl.FlightDescriptor.for_path("t"))
        writer.begin(batch.schema)
        return client, writer, reader

    @pytest.mark.slow
    async def test_writes_everything_before_it_reads(self):
        """T6: 100,000 batches written before the first ack is read: no deadlock, no ack lost, all in order."""
        total = 100_000

        def client(port: int):
            batch = batch_of(1)
            connection, writer, reader = self.open(port, batch)
            for _ in range(total):
                writer.write_batch(batch)
            writer.done_writing()
            got = [int(reader.read_chunk().app_metadata.to_pybytes()) for _ in range(total)]
            with pytest.raises(StopIteration):
                reader.read_chunk()
            connection.close()
            return got

        async with listening(self.ROUTES) as (port, _):
            assert await in_thread(client, port) == list(range(total))

    @pytest.mark.slow
    @pytest.mark.parametrize("memory_bytes", [16 * MIB, 256 * MIB])
    async def test_eight_streams_of_large_batches(self, memory_bytes):
        """R22: eight streams of 3 MB batches at once, in little memory and in much: all are acknowledged."""

        def client(port: int, acked: list[int]):
            batch = batch_of(190_000)
            connection, writer, reader = self.open(port, batch)

            def read():
                for _ in range(20):
                    acked.append(int(reader.read_chunk().app_metadata.to_pybytes()))

            thread = threading.Thread(target=read)
            thread.start()
            for _ in range(20):
                writer.write_batch(batch)
            writer.done_writing()
            thread.join()
            connection.close()

        acks: list[list[int]] = [[] for _ in range(8)]
        limits = Limits(memory_bytes=memory_bytes)
        async with listening(self.ROUTES, limits) as (port, _), trio.open_nursery() as nursery:
            for acked in acks:
                nursery.start_soon(in_thread, client, port, acked)
        assert acks == [list(range(20))] * 8

    async def test_one_that_stops_reading_disturbs_nobody(self):
        """A client that writes and never reads holds up neither itself nor another on the server."""

        def write_only(port: int):
            batch = batch_of(1)
            connection, writer, _ = self.open(port, batch)
            for _ in range(20_000):
                writer.write_batch(batch)
            return connection, writer

        def round_trip(port: int):
            batch = batch_of(10)
            connection, writer, reader = self.open(port, batch)
            writer.write_batch(batch)
            assert reader.read_chunk().app_metadata.to_pybytes() == b"0"
            writer.done_writing()
            with pytest.raises(StopIteration):
                reader.read_chunk()
            connection.close()

        async with listening(self.ROUTES) as (port, _):
            connection, _ = await in_thread(write_only, port)
            await in_thread(round_trip, port)
            await in_thread(connection.close)
