"""Connections over memory and lockstep streams: rules T1 to T11, T17 and T19 as a client sees them."""

from __future__ import annotations

import struct

import pytest
import structlog.testing
import trio
import trio.testing

from arka._core.wire import INITIAL_WINDOW
from arka.errors import InvalidRequest
from arka.flight.connection import MAX_FRAME_BYTES
from arka.flight.floods import RATES, Flood
from arka.flight.grpc import Call, Route
from arka.flight.http2 import ConnectionFactory
from arka.flight.status import Status
from arka.options import MIB, Limits
from arka.tiers.admission import Ledger
from tests.transport.peer import (
    ACK,
    DATA,
    ECHO,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    NO_ERROR,
    PING,
    PREFACE,
    PRIORITY,
    REFUSED_STREAM,
    RST_STREAM,
    S_INITIAL_WINDOW_SIZE,
    S_MAX_CONCURRENT_STREAMS,
    S_MAX_FRAME_SIZE,
    WRITES,
    Writes,
    connected,
    data,
    echo,
    flight_data,
    frame,
    goaway,
    grpc_message,
    rst_stream,
    served,
    settings,
    window_update,
)

LIMITS = Limits(memory_bytes=64 * MIB)


def write_routes(writes) -> dict[str, Route]:
    return {WRITES: Route(writes, flight_data=True), ECHO: Route(echo)}


def batch(size: int) -> bytes:
    """A FlightData message of exactly ``size`` wire bytes, prefix included."""
    for guess in range(size - 20, size):
        message = grpc_message(flight_data(header=b"H", body=bytes(guess)))
        if len(message) == size:
            return message
    raise AssertionError(size)


async def stop_after_one(call: Call) -> None:
    """Take one message and end the RPC."""
    await call.receive()


async def wait_for_ever(call: Call) -> None:
    await trio.sleep_forever()


class TestCalls:
    """An RPC from its HEADERS to its trailers."""

    @pytest.mark.parametrize("lockstep", [False, True])
    async def test_echo(self, lockstep):
        """Messages go both ways while the stream is open, and trailers follow the half-close."""
        async with served(lockstep=lockstep) as s:
            await s.peer.send(s.peer.request(1), data(1, grpc_message(b"one")))
            await s.peer.wait(lambda: 1 in s.peer.responses and s.peer.responses[1].messages == [b"one"])
            await s.peer.send(data(1, grpc_message(b"two") + grpc_message(b"three"), end=True))
            response = await s.peer.response(1)
            assert response.messages == [b"one", b"two", b"three"]
            assert dict(response.headers)[b"grpc-accept-encoding"] == b"identity"
            assert response.status == Status.OK
            assert response.reset is None

    async def test_many_at_once(self):
        """Streams of one connection are independent of each other."""
        async with served() as s:
            ids = range(1, 101, 2)
            await s.peer.send(*(s.peer.request(i) for i in ids))
            await s.peer.send(*(data(i, grpc_message(b"%d" % i), end=True) for i in reversed(ids)))
            for i in ids:
                assert (await s.peer.response(i)).messages == [b"%d" % i]

    async def test_unknown_method(self):
        """A method that is not routed is UNIMPLEMENTED, in trailers alone, and the client is told to stop sending."""
        async with served() as s:
            await s.peer.send(s.peer.request(1, "/no.Such/Method"))
            response = await s.peer.response(1)
            assert response.status == Status.UNIMPLEMENTED
            assert response.message == "[unimplemented] Unknown method /no.Such/Method"
            assert not response.trailers
            assert await s.peer.wait_reset(1) == NO_ERROR

    @pytest.mark.parametrize(
        ("options", "status"),
        [
            ({"content_type": "text/html"}, b"415"),
            ({"content_type": None}, b"415"),
            ({"content_type": "application/grpc-web"}, b"415"),
            ({"method": "GET"}, b"415"),
            ({"content_type": "application/grpc+proto"}, b"200"),
            ({"content_type": "application/grpc;charset=utf-8"}, b"200"),
        ],
    )
    async def test_not_grpc(self, options, status):
        """T11: what is not gRPC gets 415 with a small body."""
        async with served() as s:
            await s.peer.send(s.peer.request(1, end=True, **options))
            response = await s.peer.response(1)
            assert dict(response.headers)[b":status"] == status
            assert bool(response.body) == (status == b"415")

    async def test_foreign_request_that_does_not_end(self, autojump_clock):
        """T11: a request that is not gRPC and does not end is answered all the same, and told to stop."""
        async with served() as s:
            await s.peer.send(s.peer.request(1, content_type=None), data(1, bytes(60_000)))
            response = await s.peer.response(1)
            assert dict(response.headers)[b":status"] == b"415"
            assert await s.peer.wait_reset(1) == NO_ERROR
            assert s.ledger.statistics().charged_bytes == 0

    async def test_foreign_body_is_under_flow_control(self):
        """T11: the body of a 415 waits for the client's window like any other."""
        async with served(client_settings={S_INITIAL_WINDOW_SIZE: 5}) as s:
            await s.peer.send(s.peer.request(1, end=True, content_type=None))
            await s.peer.settle()
            assert len(s.peer.responses[1].body) == 5
            await s.peer.send(window_update(1, 1000))
            assert (await s.peer.response(1)).body == b"This endpoint speaks gRPC (Arrow Flight).\n"

    async def test_head_has_no_body(self):
        """A HEAD request is answered without a body."""
        async with served() as s:
            await s.peer.send(s.peer.request(1, end=True, method="HEAD"))
            response = await s.peer.response(1)
            assert dict(response.headers)[b":status"] == b"415"
            assert response.body == b""

    @pytest.mark.parametrize(
        ("raised", "status", "message"),
        [
            (InvalidRequest("bad\nthing"), Status.INVALID_ARGUMENT, "[invalid_request] bad%0Athing"),
            (ExceptionGroup("n", [InvalidRequest("in a nursery")]), 3, "[invalid_request] in a nursery"),
        ],
    )
    async def test_error(self, raised, status, message):
        """An ArkaError, also out of a nursery, is the RPC's status; the connection goes on."""

        async def fail(call: Call) -> None:
            raise raised

        async with served({"/x": Route(fail), ECHO: Route(echo)}) as s:
            await s.peer.send(s.peer.request(1, "/x", end=True), s.peer.request(3, end=True))
            response = await s.peer.response(1)
            assert (response.status, response.message) == (status, message)
            assert (await s.peer.response(3)).status == Status.OK

    @pytest.mark.parametrize("error", [ValueError("secret"), ExceptionGroup("n", [InvalidRequest("x"), KeyError("s")])])
    async def test_unexpected_error(self, error):
        """Any other error is INTERNAL with an incident id that is in the log, and ends that RPC only."""

        async def fail(call: Call) -> None:
            raise error

        with structlog.testing.capture_logs() as logs:
            async with served({"/x": Route(fail), ECHO: Route(echo)}) as s:
                await s.peer.send(s.peer.request(1, "/x", end=True), s.peer.request(3, end=True))
                response = await s.peer.response(1)
                assert (await s.peer.response(3)).status == Status.OK
        [failed] = [entry for entry in logs if entry["event"] == "rpc.failed"]
        assert response.status == Status.INTERNAL
        assert failed["incident"] in response.message
        assert "secret" not in response.message

    async def test_failing_outbox_ends_its_rpc_only(self):
        """What an outbox raises in the writer ends its RPC with INTERNAL, not the connection."""

        class Broken:
            def take(self, budget):
                raise RuntimeError("broken")

        async def attach(call: Call) -> None:
            call.attach_outbox(Broken())
            await trio.sleep_forever()

        with structlog.testing.capture_logs() as logs:
            async with served({"/x": Route(attach), ECHO: Route(echo)}) as s:
                await s.peer.send(s.peer.request(1, "/x"))
                assert (await s.peer.response(1)).status == Status.INTERNAL
                await s.peer.send(s.peer.request(3, end=True))
                assert (await s.peer.response(3)).status == Status.OK
        assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["rpc.failed"]

    async def test_bug_in_the_reader_ends_its_connection_only(self, monkeypatch):
        """T2: an unexpected error while frames are read is logged, told as INTERNAL_ERROR, and ends one connection."""
        factory = ConnectionFactory({ECHO: Route(echo)}, Ledger(64 * MIB), LIMITS)
        with structlog.testing.capture_logs() as logs:
            async with connected(factory) as (other, _), connected(factory) as (peer, _):
                with monkeypatch.context() as patch:
                    patch.setattr("arka.flight.streams.read_request", lambda fields: 1 // 0)
                    await peer.send(peer.request(1))
                    assert (await peer.wait_closed())[0] == 2
                await other.send(other.request(1, end=True))
                assert (await other.response(1)).status == Status.OK
        [failed] = [entry for entry in logs if entry["event"] == "connection.failed"]
        assert failed["incident"].encode() in peer.goaways[-1][2]

    async def test_bug_beside_the_reader_ends_its_connection_only(self, monkeypatch):
        """T2: an unexpected error in another of a connection's tasks does not reach other connections."""
        factory = ConnectionFactory({ECHO: Route(echo)}, Ledger(64 * MIB), LIMITS)
        with structlog.testing.capture_logs() as logs:
            async with connected(factory) as (other, _):
                with monkeypatch.context() as patch:
                    patch.setattr("arka.flight.connection.Connection._watch", lambda self: trio.sleep(1 // 0))
                    async with connected(factory, shake_hands=False) as (peer, _):
                        while not peer.closed:
                            await trio.testing.wait_all_tasks_blocked()
                await other.send(other.request(1, end=True))
                assert (await other.response(1)).status == Status.OK
        assert "connection.failed" in [entry["event"] for entry in logs]

    async def test_deadline(self, autojump_clock):
        """grpc-timeout cancels the handler and is DEADLINE_EXCEEDED."""
        async with served({"/x": Route(wait_for_ever)}) as s:
            await s.peer.send(s.peer.request(1, "/x", extra=(("grpc-timeout", "5S"),)))
            assert (await s.peer.response(1)).status == Status.DEADLINE_EXCEEDED
            assert trio.current_time() == 5

    async def test_malformed_timeout(self):
        """A grpc-timeout that cannot be read is INVALID_ARGUMENT, and nothing runs."""
        async with served({"/x": Route(wait_for_ever)}) as s:
            await s.peer.send(s.peer.request(1, "/x", extra=(("grpc-timeout", "soon"),)))
            assert (await s.peer.response(1)).status == Status.INVALID_ARGUMENT
            assert s.factory.calls == 0

    async def test_metadata_and_peer(self):
        """A handler sees custom metadata, decoded, and nothing of the protocol's own."""
        seen = []

        async def look(call: Call) -> None:
            seen.append((call.method, dict(call.metadata), call.deadline))

        async with served({"/x": Route(look)}) as s:
            extra = (("k", "v"), ("k", "w"), ("b-bin", "AAEC"), ("user-agent", "x"))
            await s.peer.send(s.peer.request(1, "/x", end=True, extra=extra))
            await s.peer.response(1)
        assert seen == [("/x", {"k": b"v,w", "b-bin": b"\0\1\2"}, None)]

    async def test_reset_cancels(self):
        """T7: RST_STREAM cancels the RPC; what comes after it on the stream is no connection error."""
        writes = Writes()
        async with served(write_routes(writes)) as s:
            await s.peer.send(s.peer.request(1, WRITES), data(1, batch(100)))
            await s.peer.settle()
            await s.peer.send(rst_stream(1))
            await s.peer.settle()
            assert writes.cancelled == 1
            assert s.factory.calls == 0
            assert s.ledger.statistics().charged_bytes == 0

    async def test_cut_off_message(self):
        """A half-close in the middle of a message is an error of the RPC."""
        async with served() as s:
            await s.peer.send(s.peer.request(1), data(1, grpc_message(b"abc")[:6], end=True))
            response = await s.peer.response(1)
            assert response.status == Status.INVALID_ARGUMENT
            assert "middle of a message" in response.message

    @pytest.mark.parametrize(
        ("bad", "status"),
        [
            (grpc_message(b"x", 1), Status.UNIMPLEMENTED),
            (grpc_message(b"x", 7), Status.INTERNAL),
            (grpc_message(b"\x12"), Status.INVALID_ARGUMENT),
        ],
    )
    async def test_bad_message(self, bad, status):
        """T12: messages before a bad one are delivered, then the RPC ends with the bad one's status."""
        writes = Writes()
        async with served(write_routes(writes)) as s:
            await s.peer.send(s.peer.request(1, WRITES), data(1, batch(200) + bad + batch(200)))
            response = await s.peer.response(1)
            assert response.status == status
            assert dict(response.headers)[b"grpc-accept-encoding"] == b"identity"
            assert len(writes.messages) == 1

    async def test_message_too_large(self):
        """T17: a prefix over limits.message_bytes ends the stream at once, RESOURCE_EXHAUSTED."""
        limits = Limits(memory_bytes=64 * MIB, message_bytes=MIB)
        async with served(limits=limits) as s:
            await s.peer.send(s.peer.request(1), data(1, b"\0" + struct.pack(">I", MIB + 1)))
            response = await s.peer.response(1)
            assert response.status == Status.RESOURCE_EXHAUSTED
            assert response.message.startswith("[too_large]")
            assert await s.peer.wait_reset(1) == NO_ERROR

    async def test_data_after_the_server_ended(self):
        """T7: DATA that was on its way when the server ended the stream is discarded without another reset."""
        async with served({"/x": Route(stop_after_one), ECHO: Route(echo)}) as s:
            await s.peer.send(s.peer.request(1, "/x"), data(1, grpc_message(b"x")))
            assert await s.peer.wait_reset(1) == NO_ERROR
            await s.peer.send(*(data(1, bytes(1000)) for _ in range(10)), data(1, end=True))
            await s.peer.send(s.peer.request(3, end=True))
            assert (await s.peer.response(3)).status == Status.OK
            assert len([f for f in s.peer.frames if f.kind == RST_STREAM]) == 1

    async def test_one_line_when_it_closes(self):
        """A connection leaves one log line that says why it ended and what it carried."""
        with structlog.testing.capture_logs() as logs:
            async with served() as s:
                await s.peer.send(s.peer.request(1), data(1, grpc_message(b"x"), end=True))
                await s.peer.response(1)
                await s.peer.stream.aclose()
                await trio.testing.wait_all_tasks_blocked()
        [line] = [entry for entry in logs if entry["event"] == "connection.closed"]
        assert line["rpcs"] == 1
        assert line["reason"] == "the peer closed it"
        assert line["bytes_in"] > 24


class TestGoaway:
    """T1, T19: GOAWAY means no new streams, in either direction."""

    async def test_from_the_peer(self):
        """The peer's GOAWAY leaves its open streams as they are."""
        async with served() as s:
            await s.peer.send(s.peer.request(1), goaway(0, NO_ERROR, b"bye"))
            await s.peer.send(data(1, grpc_message(b"still here"), end=True))
            response = await s.peer.response(1)
            assert response.messages == [b"still here"]
            assert response.status == Status.OK
            assert not s.peer.goaways

    async def test_drain(self):
        """Drain: GOAWAY(2**31-1) and PING, after its answer GOAWAY(last); open streams go on, then it closes."""
        async with served() as s:
            await s.peer.send(s.peer.request(1))
            await s.peer.settle()
            s.factory.start_drain()
            await s.peer.wait(lambda: s.peer.goaways)
            [asked] = [f for f in s.peer.frames if f.kind == PING and not f.flags & ACK]
            # A stream that was on its way is served.
            await s.peer.send(s.peer.request(3), data(3, grpc_message(b"late"), end=True))
            await s.peer.send(frame(PING, ACK, 0, asked.payload))
            assert (await s.peer.response(3)).messages == [b"late"]
            await s.peer.wait(lambda: len(s.peer.goaways) == 2)
            assert s.peer.goaways == [(2**31 - 1, NO_ERROR, b"draining"), (3, NO_ERROR, b"draining")]
            await s.peer.send(s.peer.request(5))
            assert await s.peer.wait_reset(5) == REFUSED_STREAM
            await s.peer.send(data(1, grpc_message(b"x"), end=True))
            assert (await s.peer.response(1)).messages == [b"x"]
            await s.peer.wait_closed()
            await s.factory.wait_idle()

    async def test_drain_of_a_peer_that_does_not_answer(self, autojump_clock):
        """A peer that ignores the PING gets the final GOAWAY all the same."""
        async with served() as s:
            s.factory.start_drain()
            assert await s.peer.wait_closed() == (NO_ERROR, b"draining")
            assert [last for last, _, _ in s.peer.goaways] == [2**31 - 1, 0]

    async def test_connection_that_comes_while_draining(self, autojump_clock):
        """A connection that is accepted during the drain is drained."""
        factory = ConnectionFactory({ECHO: Route(echo)}, Ledger(64 * MIB), LIMITS)
        factory.start_drain()
        async with connected(factory, shake_hands=False) as (peer, _):
            assert (await peer.wait_closed())[0] == NO_ERROR

    async def test_drain_gives_no_new_window(self):
        """T19: write streams get no more window once the server drains; others do."""
        writes = Writes()
        async with served(write_routes(writes)) as s:
            await s.peer.send(s.peer.request(1, WRITES), s.peer.request(3))
            await s.peer.settle()
            s.factory.start_drain()
            await s.peer.send(data(1, batch(40_000)), data(3, grpc_message(bytes(40_000))))
            await s.peer.settle()
            assert len(writes.messages) == 1
            assert 1 not in s.peer.granted
            assert 3 in s.peer.granted


class TestTasks:
    """T2: one reader, one writer, and RPC tasks that never touch the socket."""

    async def test_rpc_cancelled_in_the_middle_of_a_body(self):
        """An RPC that ends while its body is on the way leaves the connection in step."""
        async with served({"/x": Route(wait_for_ever), ECHO: Route(echo)}) as s:
            body = grpc_message(bytes(60_000))
            whole = data(1, body)
            await s.peer.send(s.peer.request(1, "/x", extra=(("grpc-timeout", "1n"),)), whole[:20_000])
            await s.peer.response(1)
            await s.peer.send(whole[20_000:], s.peer.request(3), data(3, grpc_message(b"ok"), end=True))
            assert (await s.peer.response(3)).messages == [b"ok"]

    async def test_trailers_queue_behind_messages(self):
        """Trailers follow all that was sent before, however small the client's window."""

        async def talk(call: Call) -> None:
            for i in range(100):
                await call.send(b"%03d" % i, b"x" * 100)

        async with served({"/x": Route(talk)}, client_settings={S_INITIAL_WINDOW_SIZE: 10}) as s:
            await s.peer.send(s.peer.request(1, "/x", end=True))
            await s.peer.settle()
            while not s.peer.responses[1].ended:
                await s.peer.send(window_update(1, 997))
                await s.peer.settle()
            assert [m[:3] for m in s.peer.responses[1].messages] == [b"%03d" % i for i in range(100)]

    async def test_writer_and_reader_do_not_wait_for_each_other(self):
        """On a stream whose sends block, a server with much to say still hears: no deadlock (T3)."""

        async def talk(call: Call) -> None:
            with trio.move_on_after(1):
                while True:
                    await call.send(bytes(10_000))
                    if await call.receive() is None:
                        return

        async with served({"/x": Route(talk)}, lockstep=True) as s:
            await s.peer.send(window_update(0, 10_000_000), s.peer.request(1, "/x"), window_update(1, 10_000_000))
            for _ in range(50):
                await s.peer.send(data(1, grpc_message(bytes(1000))))
            await s.peer.send(data(1, end=True))
            assert len((await s.peer.response(1)).messages) == 51

    async def test_peer_vanishes(self):
        """A connection that breaks cancels its RPCs and releases all they were charged."""
        writes = Writes(hold=False)
        async with served(write_routes(writes)) as s:
            await s.peer.send(s.peer.request(1, WRITES), data(1, batch(60_000)[:50_000]))
            await s.peer.settle()
            await s.peer.stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert writes.cancelled == 1
            assert s.factory.connections == 0
            assert s.ledger.statistics().charged_bytes == 0


async def send_within_window(
    peer, stream_id: int, message: bytes, sent: int, frame_bytes: int = 16_384, *, settle: bool = False
) -> int:
    """Send the rest of a message as its window allows; returns the most window that was told ahead of what was sent."""
    most = 0
    while sent < len(message):
        granted = peer.granted.get(stream_id, INITIAL_WINDOW)
        most = max(most, granted - sent)
        if granted <= sent or settle:
            await peer.settle()
            granted = peer.granted.get(stream_id, INITIAL_WINDOW)
            assert granted > sent, f"no window behind {sent} bytes of {len(message)}"
        size = min(granted - sent, frame_bytes, len(message) - sent)
        await peer.send(data(stream_id, message[sent : sent + size]))
        sent += size
    return most


class TestInboundFlow:
    """T4, T5: the stream window holds back, the connection's never does."""

    async def test_what_is_announced(self):
        """SETTINGS and the connection's window are as the rules say."""
        async with served() as s:
            assert s.peer.settings[S_INITIAL_WINDOW_SIZE] == INITIAL_WINDOW == 65536
            assert s.peer.settings[S_MAX_FRAME_SIZE] == MAX_FRAME_BYTES == 2**20
            assert s.peer.settings[S_MAX_CONCURRENT_STREAMS] == 4 * LIMITS.streams_per_connection
            assert s.peer.granted[0] == 2**31 - 1

    async def test_initial_window_is_charged(self):
        """A stream is charged its initial window from its first byte to its last."""
        async with served({"/x": Route(wait_for_ever)}) as s:
            await s.peer.send(s.peer.request(1, "/x"), s.peer.request(3, "/x"))
            await s.peer.settle()
            assert s.ledger.statistics().charged_bytes == 2 * INITIAL_WINDOW
            await s.peer.send(rst_stream(1), rst_stream(3))
            await s.peer.settle()
            assert s.ledger.statistics().charged_bytes == 0

    async def test_large_message_is_reserved_whole(self):
        """A prefix that the window does not cover reserves and grants the whole message, and two like it ahead."""
        writes = Writes(hold=True)
        async with served(write_routes(writes)) as s:
            message = batch(300_000)
            await s.peer.send(s.peer.request(1, WRITES), data(1, message[:5]))
            await s.peer.settle()
            assert s.peer.granted[1] == INITIAL_WINDOW + 3 * 300_000
            assert s.ledger.statistics().charged_bytes == INITIAL_WINDOW + 3 * 300_000
            await s.peer.send(data(1, message[5:]))
            await s.peer.settle()
            assert [m.body_bytes for m in writes.messages]
            assert writes.messages[0].charge.amount == 300_000

    async def test_waiting_stream_gets_no_window(self):
        """With the ledger full a message waits without window, first come first served, and its siblings go on."""
        writes = Writes(hold=True)
        limits = Limits(memory_bytes=16 * MIB)
        async with served(write_routes(writes), limits=limits) as s:
            hog = s.ledger.try_request(15 * MIB)
            message = batch(2 * MIB)
            await s.peer.send(s.peer.request(1, WRITES), data(1, message[:5]))
            await s.peer.send(s.peer.request(3), data(3, grpc_message(b"sibling"), end=True))
            assert (await s.peer.response(3)).messages == [b"sibling"]
            await s.peer.settle()
            assert 1 not in s.peer.granted
            assert s.ledger.statistics().waiting_bytes == 2 * MIB
            hog.release()
            await send_within_window(s.peer, 1, message, 5)
            await s.peer.settle()
            assert [m.charge.amount for m in writes.messages] == [2 * MIB]

    @pytest.mark.parametrize("frame_bytes", [1_000, 16_384, MIB])
    async def test_window_goes_a_step_ahead_of_receipt(self, frame_bytes):
        """T25: a message of 4 MiB is charged whole, its window is told a MiB ahead of what has come, at each moment."""
        writes = Writes(hold=True)
        async with served(write_routes(writes), limits=Limits(memory_bytes=64 * MIB)) as s:
            message = batch(4 * MIB)
            await s.peer.send(s.peer.request(1, WRITES), data(1, message[:5]))
            await s.peer.settle()
            assert s.ledger.statistics().message_bytes == 4 * MIB
            most = await send_within_window(s.peer, 1, message, 5, frame_bytes, settle=frame_bytes == MIB)
            assert most <= MIB
            await s.peer.settle()
            assert [m.charge.amount for m in writes.messages] == [4 * MIB]

    async def test_slow_hogs_end_while_others_wait(self, autojump_clock):
        """T25: streams that trickle a granted message end with [overloaded] and free it; who waits goes on."""
        writes, limits = Writes(), Limits(memory_bytes=16 * MIB, message_bytes=4 * MIB, message_stall_s=1000)
        ledger = Ledger.of(limits)
        async with served(write_routes(writes), limits=limits, ledger=ledger) as s:
            hogs = (1, 3)
            for stream_id in (*hogs, 5):
                await s.peer.send(s.peer.request(stream_id, WRITES), data(stream_id, batch(4 * MIB)[:5]))
            await s.peer.settle()
            assert s.ledger.statistics().message_bytes == 8 * MIB
            with trio.fail_after(60):
                sent = 5
                while not (ended := [i for i in hogs if self.ended(s.peer, i)]):
                    await trio.sleep(1)
                    for stream_id in hogs:
                        await s.peer.send(data(stream_id, batch(4 * MIB)[sent : sent + 1]))
                    sent += 1
            # The other one stays: nobody waits any more.
            assert len(ended) == 1
            response = await s.peer.response(ended[0])
            assert response.status == Status.UNAVAILABLE
            assert response.message.startswith("[overloaded]")
            await send_within_window(s.peer, 5, batch(4 * MIB), 5)
            await s.peer.settle()
            assert [m.charge.amount for m in writes.messages] == [4 * MIB]

    @staticmethod
    def ended(peer, stream_id):
        return stream_id in peer.responses and peer.responses[stream_id].ended

    async def test_slow_streams_stay_while_nobody_waits(self, autojump_clock):
        """A slow client is no hog by itself: with memory for all its message may take as long as it takes."""
        writes, limits = Writes(), Limits(memory_bytes=16 * MIB, message_stall_s=1000)
        async with served(write_routes(writes), limits=limits, ledger=Ledger.of(limits)) as s:
            message = batch(100_000)
            await s.peer.send(s.peer.request(1, WRITES), data(1, message[:5]))
            for at in range(5, len(message), 1_000):
                await trio.sleep(1)
                await s.peer.send(data(1, message[at : at + 1_000]))
            await s.peer.settle()
            assert [m.charge.amount for m in writes.messages] == [100_000]

    async def test_small_messages_pass_a_full_ledger(self):
        """T25: with all room for messages taken, each stream has one small message at a time admitted all the same."""
        writes, limits = Writes(hold=True), Limits(memory_bytes=16 * MIB)
        ledger = Ledger.of(limits)
        async with served(write_routes(writes), limits=limits, ledger=ledger) as s:
            hog = ledger.request(16 * MIB)
            for stream_id in (1, 3):
                await s.peer.send(s.peer.request(stream_id, WRITES), data(stream_id, batch(1_000) * 2))
            await s.peer.settle()
            assert len(writes.messages) == 2
            writes.messages[0].charge.release()
            await s.peer.settle()
            assert len(writes.messages) == 3
            hog.release()
            await s.peer.settle()
            assert len(writes.messages) == 4

    async def test_answers_and_metadata_are_kept_at_a_charge(self):
        """T26: answers that are not read and metadata of open RPCs are charged; without room an RPC is refused."""

        async def answer(call: Call) -> None:
            await call.send(bytes(199_995))
            await wait_for_ever(call)

        limits = Limits(memory_bytes=16 * MIB)
        routes = {"/answer": Route(answer), "/x": Route(wait_for_ever)}
        async with served(routes, limits=limits, ledger=Ledger.of(limits), client_settings={4: 0}) as s:
            extra = tuple((f"key-{i}", "v" * 1_000) for i in range(10))
            await s.peer.send(s.peer.request(1, "/x", extra=extra))
            await s.peer.settle()
            metadata = s.ledger.statistics().kept_bytes
            assert metadata >= 10_000
            fit = (2 * MIB * 3 // 4 - metadata) // 200_000
            for i in range(1, fit + 2):
                await s.peer.send(s.peer.request(2 * i + 1, "/answer"))
            await s.peer.settle()
            assert s.ledger.statistics().kept_bytes == metadata + fit * 200_000
            # Trailers need no window.
            response = await s.peer.response(2 * fit + 3)
            assert response.status == Status.UNAVAILABLE
            assert response.message.startswith("[overloaded] No room to keep 200000 bytes of an answer")
            await s.peer.send(rst_stream(1), window_update(0, 1 << 20), window_update(3, 1 << 20), rst_stream(5))
            await s.peer.settle()
            assert s.ledger.statistics().kept_bytes == (fit - 2) * 200_000

    async def test_streams_beyond_the_windows_part_are_refused(self):
        """T26: initial windows have a part of the ledger, one peer a part of that; beyond it streams are refused."""
        limits = Limits(memory_bytes=16 * MIB)
        async with served({"/x": Route(wait_for_ever)}, limits=limits, ledger=Ledger.of(limits)) as s:
            fit = 16 * MIB // 4 * 3 // 4 // INITIAL_WINDOW
            for i in range(fit + 1):
                await s.peer.send(s.peer.request(2 * i + 1, "/x"))
            response = await s.peer.response(2 * fit + 1)
            assert response.status == Status.UNAVAILABLE
            assert response.message.startswith("[overloaded]")
            assert s.ledger.statistics().window_bytes == fit * INITIAL_WINDOW
            await s.peer.send(rst_stream(1), s.peer.request(2 * fit + 3, "/x"))
            await s.peer.settle()
            assert not self.ended(s.peer, 2 * fit + 3)

    async def test_small_messages_wait_for_their_charge(self):
        """With the ledger full small messages are held, in order, and the window shrinks until it is granted."""
        writes = Writes(hold=True)
        async with served(write_routes(writes), limits=Limits(memory_bytes=16 * MIB)) as s:
            await s.peer.send(s.peer.request(1, WRITES))
            await s.peer.settle()
            hog = s.ledger.try_request(16 * MIB - INITIAL_WINDOW)
            for size in (20_000, 21_000, 22_000):
                await s.peer.send(data(1, batch(size)))
            await s.peer.settle()
            assert writes.messages == []
            assert 1 not in s.peer.granted
            hog.release()
            await s.peer.settle()
            assert [m.charge.amount for m in writes.messages] == [20_000, 21_000, 22_000]
            assert s.peer.granted[1] >= INITIAL_WINDOW + 32_000

    async def test_connection_window_is_given_back_whatever_happens(self):
        """T4: bytes of waiting, dead and refused streams are credited to the connection, padding included."""
        async with served({"/x": Route(wait_for_ever), **write_routes(Writes())}) as s:
            s.ledger.try_request(64 * MIB - INITIAL_WINDOW)
            sent = 0
            for i in range(1, 61, 2):
                path = ("/x", WRITES, "/no.Such/Method")[i % 3]
                await s.peer.send(s.peer.request(i, path), data(i, bytes(59_000), padding=200))
                sent += 59_201
            await s.peer.settle()
            assert s.peer.granted[0] >= 2**31 - 1 + sent - MIB

    async def test_stream_overrun(self):
        """T5: DATA beyond the stream's window is FLOW_CONTROL_ERROR, and the RPC is cancelled."""
        writes = Writes(hold=True)
        async with served({"/x": Route(wait_for_ever), ECHO: Route(echo)}) as s:
            await s.peer.send(s.peer.request(1, "/x"), data(1, bytes(INITIAL_WINDOW)), data(1, b"x"))
            assert await s.peer.wait_reset(1) == FLOW_CONTROL_ERROR
            await s.peer.send(s.peer.request(3, end=True))
            assert (await s.peer.response(3)).status == Status.OK
            assert not writes.messages

    async def test_handler_that_does_not_receive(self):
        """A handler that stops receiving stops its client, not the ledger: what is held for it is bounded."""
        async with served({"/x": Route(wait_for_ever, flight_data=True)}, limits=Limits(memory_bytes=256 * MIB)) as s:
            await s.peer.send(s.peer.request(1, "/x"))
            written, sent = batch(100_000) * 100, 0
            while room := s.peer.granted.get(1, 65536) - sent:
                await s.peer.send(data(1, written[sent : sent + min(room, 100_000)]))
                sent += min(room, 100_000)
                await s.peer.settle()
            assert 4 * MIB < sent < 5 * MIB
            assert s.ledger.statistics().charged_bytes < 6 * MIB

    async def test_stalled_message(self, autojump_clock):
        """T4: a granted message without progress for limits.message_stall_s ends its stream and frees its bytes."""
        writes = Writes()
        limits = Limits(memory_bytes=64 * MIB, message_stall_s=10, keepalive_s=1000)
        async with served(write_routes(writes), limits=limits) as s:
            message = batch(MIB)
            await s.peer.send(s.peer.request(1, WRITES), data(1, message[:100]))
            await trio.sleep(9)
            await s.peer.send(data(1, message[100:200]))
            await trio.sleep(9)
            assert not s.peer.responses[1].ended
            assert (await s.peer.response(1)).status == Status.UNAVAILABLE
            assert trio.current_time() <= 9 + 10 * 1.25 + 2.5
            assert s.ledger.statistics().charged_bytes == 0

    async def test_padding_does_not_eat_the_window(self):
        """T7: padding is given back to the stream, so that a padding client cannot stall itself."""
        async with served() as s:
            await s.peer.send(s.peer.request(1))
            for _ in range(400):
                await s.peer.send(data(1, grpc_message(b"x"), padding=255))
                await trio.testing.wait_all_tasks_blocked()
            await s.peer.send(data(1, end=True))
            assert len((await s.peer.response(1)).messages) == 400
            assert s.peer.granted[1] > 400 * 262

    @pytest.mark.parametrize("lockstep", [False, True])
    async def test_eight_streams_under_contention(self, lockstep):
        """R22: eight streams of 3 MB messages share a ledger that holds two, and all of them finish."""
        done = []

        async def slow(call: Call) -> None:
            while (message := await call.receive()) is not None:
                await trio.testing.wait_all_tasks_blocked()
                message.charge.release()
                done.append(call)

        async with served(
            {WRITES: Route(slow, flight_data=True)}, limits=Limits(memory_bytes=16 * MIB), lockstep=lockstep
        ) as s:
            s.ledger.try_request(8 * MIB)
            message = batch(3_000_000)

            async def write(stream_id: int) -> None:
                sent = 0
                for _ in range(4):
                    left = message
                    while left:
                        room = s.peer.granted.get(stream_id, 65536) - sent
                        if room <= 0:
                            await s.peer.wait(lambda: s.peer.granted.get(stream_id, 65536) - sent > 0)  # noqa: B023
                            continue
                        part, left = left[: min(room, 500_000)], left[min(room, 500_000) :]
                        await s.peer.send(data(stream_id, part))
                        sent += len(part)
                await s.peer.send(data(stream_id, end=True))
                assert (await s.peer.response(stream_id)).status == Status.OK

            await s.peer.send(*(s.peer.request(i, WRITES) for i in range(1, 17, 2)))
            async with trio.open_nursery() as nursery:
                for i in range(1, 17, 2):
                    nursery.start_soon(write, i)
            assert len(done) == 32


class TestOutboundFlow:
    """T6: nothing is dropped, nothing grows without bound, everybody has a turn."""

    class Counter:
        """An outbox of numbered messages."""

        def __init__(self, total: int) -> None:
            self.total = total
            self.next = 0
            self.budgets: list[int] = []

        def take(self, budget: int) -> bytes:
            self.budgets.append(budget)
            out = b""
            while self.next < self.total and (not out or len(out) < budget):
                out += grpc_message(b"%08d" % self.next)
                self.next += 1
            return out

    async def test_every_ack_arrives(self):
        """All of an outbox arrives, in order, through a window that opens by drips."""
        box = self.Counter(5_000)

        async def ack(call: Call) -> None:
            call.attach_outbox(box)
            assert await call.receive() is None
            await call.wait_outbox_drained()

        async with served({"/x": Route(ack)}, client_settings={S_INITIAL_WINDOW_SIZE: 0}) as s:
            await s.peer.send(s.peer.request(1, "/x", end=True))
            await s.peer.settle()
            assert box.next <= 1
            while not s.peer.responses[1].ended:
                await s.peer.send(window_update(1, 1_111))
                await s.peer.settle()
            assert s.peer.responses[1].messages == [b"%08d" % i for i in range(5_000)]
            assert s.peer.responses[1].status == Status.OK

    async def test_outbox_stays_state_while_the_window_is_closed(self):
        """Acks are taken from the outbox only as far as the windows reach."""
        box = self.Counter(1_000_000)

        async def ack(call: Call) -> None:
            call.attach_outbox(box)
            await trio.sleep_forever()

        async with served({"/x": Route(ack)}) as s:
            await s.peer.send(s.peer.request(1, "/x"))
            await s.peer.settle()
            assert box.next * 13 <= 65_535 + 64 * 1024

    async def test_send_waits_for_the_client(self):
        """A handler's send waits once the send buffer is full, and a reset wakes it."""
        sent = []

        async def talk(call: Call) -> None:
            while True:
                await call.send(bytes(50_000))
                sent.append(1)

        async with served({"/x": Route(talk)}) as s:
            await s.peer.send(s.peer.request(1, "/x"))
            await s.peer.settle()
            assert 5 <= len(sent) <= 8
            await s.peer.send(rst_stream(1))
            await s.peer.settle()
            assert s.factory.calls == 0

    @pytest.mark.parametrize("act", ["send", "wait_outbox_drained"])
    async def test_reset_is_cancellation_for_a_busy_sender(self, act):
        """A handler that goes on sending on a stream that was reset is cancelled, not failed."""
        cancelled = []

        async def talk(call: Call) -> None:
            try:
                await call.receive()
            except trio.Cancelled:
                with trio.CancelScope(shield=True), pytest.raises(trio.ClosedResourceError):
                    await getattr(call, act)()
                cancelled.append(1)
                await getattr(call, act)()

        with structlog.testing.capture_logs() as logs:
            async with served({"/x": Route(talk)}) as s:
                await s.peer.send(s.peer.request(1, "/x"), rst_stream(1))
                await s.peer.settle()
        assert cancelled == [1]
        assert [entry["event"] for entry in logs] == ["connection.closed"]

    async def test_turns(self):
        """A stream with little to say does not wait behind one with much."""

        async def talk(call: Call) -> None:
            size = int((await call.receive()).decode())
            for _ in range(10):
                await call.send(bytes(size))

        async with served({"/x": Route(talk)}, client_settings={S_INITIAL_WINDOW_SIZE: 2**30}) as s:
            await s.peer.send(window_update(0, 2**30))
            await s.peer.send(s.peer.request(1, "/x"), data(1, grpc_message(b"2000000"), end=True))
            await s.peer.send(s.peer.request(3, "/x"), data(3, grpc_message(b"10"), end=True))
            await s.peer.response(1)
            order = [f.stream_id for f in s.peer.frames if f.kind == DATA]
            last_small = len(order) - 1 - order[::-1].index(3)
            assert order[:last_small].count(1) < order.count(1) / 2

    async def test_shrinking_window(self):
        """A SETTINGS that makes the window negative stops a stream until it is positive again."""
        box = self.Counter(1_000)

        async def ack(call: Call) -> None:
            call.attach_outbox(box)
            assert await call.receive() is None
            await call.wait_outbox_drained()

        async with served({"/x": Route(ack)}, client_settings={S_INITIAL_WINDOW_SIZE: 1_000}) as s:
            await s.peer.send(s.peer.request(1, "/x", end=True))
            await s.peer.settle()
            assert len(s.peer.responses[1].body) == 1_000
            await s.peer.send(settings({S_INITIAL_WINDOW_SIZE: 0}), window_update(1, 500))
            await s.peer.settle()
            assert len(s.peer.responses[1].body) == 1_000
            await s.peer.send(settings({S_INITIAL_WINDOW_SIZE: 65_535}))
            assert len((await s.peer.response(1)).messages) == 1_000

    async def test_client_that_never_reads(self, autojump_clock):
        """An RPC that has ended does not wait for ever for a client that does not read."""

        async def talk(call: Call) -> None:
            await call.send(bytes(1000))

        limits = Limits(memory_bytes=64 * MIB, message_stall_s=10)
        async with served({"/x": Route(talk)}, limits=limits, client_settings={S_INITIAL_WINDOW_SIZE: 0}) as s:
            await s.peer.send(s.peer.request(1, "/x", end=True))
            response = await s.peer.response(1)
            assert response.status == Status.UNAVAILABLE
            assert response.body == b""


class TestLimits:
    """T9, T10: what a client may have and do."""

    async def test_streams_per_connection(self):
        """T10: the limit answers with trailers, UNAVAILABLE [overloaded]; it is free again when a stream ends."""
        limits = Limits(memory_bytes=64 * MIB, streams_per_connection=2)
        async with served({"/x": Route(wait_for_ever), ECHO: Route(echo)}, limits=limits) as s:
            await s.peer.send(s.peer.request(1, "/x"), s.peer.request(3, "/x"), s.peer.request(5, "/x", end=True))
            response = await s.peer.response(5)
            assert response.status == Status.UNAVAILABLE
            assert response.message.startswith("[overloaded] 2 RPCs are open on this connection, allowed are 2")
            await s.peer.send(rst_stream(1))
            await s.peer.settle()
            await s.peer.send(s.peer.request(7, end=True))
            assert (await s.peer.response(7)).status == Status.OK

    async def test_streams_of_the_server(self):
        """T10: the server's limit counts the RPCs of all connections."""
        limits = Limits(memory_bytes=64 * MIB, streams=1)
        factory = ConnectionFactory({"/x": Route(wait_for_ever)}, Ledger(64 * MIB), limits)
        async with connected(factory) as (first, _), connected(factory) as (second, _):
            await first.send(first.request(1, "/x"))
            await first.settle()
            await second.send(second.request(1, "/x", end=True))
            assert "on this server" in (await second.response(1)).message

    async def test_more_than_advertised(self):
        """T10, T22: a stream above MAX_CONCURRENT_STREAMS is answered like any other that is one too many."""
        limits = Limits(memory_bytes=64 * MIB, streams_per_connection=1)
        async with served({"/x": Route(wait_for_ever)}, limits=limits, client_settings={S_INITIAL_WINDOW_SIZE: 0}) as s:
            await s.peer.send(*(s.peer.request(i, "/x") for i in range(1, 40, 2)))
            for i in range(3, 40, 2):
                response = await s.peer.response(i)
                assert response.status == Status.UNAVAILABLE
                assert response.message.startswith("[overloaded]")
                assert await s.peer.wait_reset(i) == NO_ERROR
            await s.peer.settle()
            # What is discarded afterwards is no error.
            await s.peer.send(data(39, grpc_message(b"late")))
            await s.peer.settle()

    async def test_many_foreign_requests(self):
        """T11, T22: of requests that are not gRPC a few wait for their end; the others get their 415 at once."""
        limits = Limits(memory_bytes=64 * MIB)
        async with served({"/x": Route(wait_for_ever)}, limits=limits) as s:
            await s.peer.send(*(s.peer.request(i, content_type=None) for i in range(1, 200, 2)))
            answered = [i for i in range(1, 200, 2) if i > 16]
            for i in answered:
                response = await s.peer.response(i)
                assert dict(response.headers)[b":status"] == b"415"
                assert not response.body
            await s.peer.send(data(1, b"x", end=True))
            assert dict((await s.peer.response(1)).headers)[b":status"] == b"415"
            await s.peer.send(s.peer.request(201, content_type=None, end=True))
            assert (await s.peer.response(201)).body

    @pytest.mark.parametrize(
        ("flood", "kind"),
        [
            (frame(PING, 0, 0, bytes(8)), Flood.PING),
            (settings(), Flood.SETTINGS),
            (frame(PRIORITY, 0, 99, struct.pack(">IB", 0, 1)), Flood.OTHER),
            (frame(0xBE, 0, 0), Flood.OTHER),
            (data(1), Flood.EMPTY_DATA),
            (data(1, padding=0), Flood.EMPTY_DATA),
        ],
    )
    async def test_floods(self, autojump_clock, flood, kind):
        """T9: cheap frames are allowed in a burst, and a flood of them ends the connection."""
        async with served() as s:
            await s.peer.send(s.peer.request(1))
            burst = RATES[kind].burst - 5
            await s.peer.send(flood * burst)
            await s.peer.settle()
            await s.peer.send(flood * 100)
            assert (await s.peer.wait_closed())[0] == ENHANCE_YOUR_CALM

    async def test_windows_of_streams_that_are_over(self, autojump_clock):
        """T9: WINDOW_UPDATE on a stream that has ended is no error, and a flood of them ends the connection."""
        async with served() as s:
            await s.peer.send(s.peer.request(1, end=True))
            await s.peer.response(1)
            burst = RATES[Flood.STRAY_WINDOW].burst - 5
            await s.peer.send(window_update(1, 1) * burst)
            await s.peer.settle()
            await s.peer.send(window_update(1, 1) * 100)
            assert (await s.peer.wait_closed())[0] == ENHANCE_YOUR_CALM

    async def test_rapid_reset(self, autojump_clock):
        """T9: opening and resetting streams in masses ends the connection (CVE-2023-44487)."""
        async with served() as s:
            for i in range(1, 2 * RATES[Flood.RESETS_RECEIVED].burst + 9, 2):
                await s.peer.send(s.peer.request(i), rst_stream(i))
            assert (await s.peer.wait_closed())[0] == ENHANCE_YOUR_CALM
            assert s.factory.calls == 0

    @pytest.mark.parametrize(
        "provoke",
        [
            pytest.param(lambda i: window_update(i, 2**31 - 1), id="window overflow"),
            pytest.param(lambda i: data(i, bytes(65537)), id="overrun"),
        ],
    )
    async def test_made_you_reset(self, autojump_clock, provoke):
        """T9: errors that make the server reset streams are limited as well (CVE-2025-8671)."""
        async with served() as s:
            for i in range(1, 2 * RATES[Flood.RESETS_CAUSED].burst + 9, 2):
                await s.peer.send(s.peer.request(i), provoke(i))
            assert (await s.peer.wait_closed())[0] == ENHANCE_YOUR_CALM

    async def test_headers_on_reset_streams(self, autojump_clock):
        """T9: HEADERS on a stream that was reset causes resets, which are limited."""
        async with served() as s:
            await s.peer.send(s.peer.request(1), window_update(1, 2**31 - 1))
            assert await s.peer.wait_reset(1) == FLOW_CONTROL_ERROR
            for _ in range(RATES[Flood.RESETS_CAUSED].burst + 5):
                await s.peer.send(s.peer.request(1))
            assert (await s.peer.wait_closed())[0] == ENHANCE_YOUR_CALM

    async def test_answers_that_nobody_reads_are_bounded(self, autojump_clock):
        """T9: a client that asks and does not read is dropped before its answers fill the memory."""
        with structlog.testing.capture_logs() as logs:
            async with served(lockstep=True, listen=False) as s:
                await s.peer.send(PREFACE, settings())
                with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
                    for at in range(1, 20_000, 200):
                        ids = range(at, at + 200, 2)
                        await s.peer.send(*(s.peer.request(i, content_type=None, end=True) for i in ids))
                        await trio.testing.wait_all_tasks_blocked()
        [line] = [entry for entry in logs if entry["event"] == "connection.closed"]
        assert line["reason"].startswith("ENHANCE_YOUR_CALM")

    async def test_header_list_limit(self):
        """T9: a header list that unpacks to more than it may is refused, however small it was (HPACK bomb)."""
        async with served() as s:
            value = "x" * 4000
            bomb = tuple((f"k{i % 2}", value) for i in range(40))
            await s.peer.send(s.peer.request(1, extra=bomb))
            assert (await s.peer.wait_closed())[0] == ENHANCE_YOUR_CALM


class TestTime:
    """Handshake, keepalive and idle deadlines, on a clock that jumps."""

    @pytest.mark.parametrize("said", [b"", PREFACE, PREFACE[:10]])
    async def test_handshake(self, autojump_clock, said):
        """A client that does not finish its preface and SETTINGS in limits.handshake_s is dropped."""
        async with served(shake_hands=False, limits=Limits(memory_bytes=64 * MIB, handshake_s=7)) as s:
            await s.peer.send(said)
            while not s.peer.closed:
                await trio.sleep(0.5)
            assert 7 <= trio.current_time() <= 9

    async def test_idle(self, autojump_clock):
        """A connection without RPCs is closed after limits.idle_s, with GOAWAY; one with an RPC is not."""
        limits = Limits(memory_bytes=64 * MIB, idle_s=50, keepalive_s=1000)
        async with served({"/x": Route(wait_for_ever)}, limits=limits) as s:
            await s.peer.send(s.peer.request(1, "/x"))
            await trio.sleep(200)
            await s.peer.send(rst_stream(1))
            assert await s.peer.wait_closed() == (NO_ERROR, b"idle")
            assert 250 <= trio.current_time() <= 252

    async def test_keepalive(self, autojump_clock):
        """Silence is asked about with a PING; a peer that answers stays, one that does not is dropped."""
        limits = Limits(memory_bytes=64 * MIB, keepalive_s=10, keepalive_timeout_s=5)
        async with served({"/x": Route(wait_for_ever)}, limits=limits) as s:
            await s.peer.send(s.peer.request(1, "/x"))
            for n in range(3):
                asked = [f for f in s.peer.frames if f.kind == PING]
                await s.peer.wait(lambda: len([f for f in s.peer.frames if f.kind == PING]) > n)  # noqa: B023
                asked = [f for f in s.peer.frames if f.kind == PING]
                await s.peer.send(frame(PING, ACK, 0, asked[-1].payload))
            started = trio.current_time()
            while not s.peer.closed:
                await trio.sleep(0.5)
            assert 15 <= trio.current_time() - started <= 17

    async def test_deadlines_hold_while_the_peer_does_not_read(self, autojump_clock):
        """A peer that neither reads nor writes is dropped although the writer is stuck in a send."""
        limits = Limits(memory_bytes=64 * MIB, keepalive_s=10, keepalive_timeout_s=5)
        async with served(limits=limits, lockstep=True, listen=False) as s:
            with trio.move_on_after(100):
                await s.factory.wait_idle()
            assert trio.current_time() < 30


async def test_whole_or_split_at_each_byte():
    """A recorded client's bytes give the same answers whole and in single bytes."""

    async def talk(pieces: int) -> list:
        writes = Writes()
        async with served(write_routes(writes)) as s:
            raw = b"".join(
                [
                    s.peer.request(1, WRITES, extra=(("x-long", "y" * 300),)),
                    data(1, batch(2_000), padding=9),
                    frame(PING, 0, 0, b"pingping"),
                    s.peer.request(3),
                    data(3, grpc_message(b"three")),
                    goaway(0),
                    data(1, batch(3_000)[:1_000]),
                    data(3, grpc_message(b"four"), end=True),
                    data(1, batch(3_000)[1_000:], end=True),
                    s.peer.request(5, content_type=None, end=True),
                    rst_stream(5),
                ]
            )
            for at in range(0, len(raw), pieces):
                await s.peer.send(raw[at : at + pieces])
                if pieces > 1:
                    await trio.testing.wait_all_tasks_blocked()
            await s.peer.settle()
            messages = [(m.header, m.body_bytes, bytes(m.buffer.body)) for m in writes.messages]
            answers = {i: (r.headers, r.body, r.trailers, r.ended) for i, r in s.peer.responses.items() if i != 5}
            return [messages, answers, s.peer.pings[0], s.ledger.statistics().charged_bytes]

    whole = await talk(1 << 20)
    assert whole[1][3][1] == grpc_message(b"three") + grpc_message(b"four")
    assert len(whole[0]) == 2
    assert await talk(1) == whole
    assert await talk(7) == whole


@pytest.mark.parametrize("end", ["reset", "gone", "goaway_and_gone", "read"])
async def test_request_whose_client_leaves_at_once(end: str) -> None:
    """A complete request is taken once, by its handler or by ``adopt``, also when its client leaves at once (R41)."""
    taken: list[tuple[str, bytes]] = []

    async def act(call: Call) -> None:
        request = await call.receive()
        assert isinstance(request, bytes)
        taken.append(("handler", request))
        await trio.sleep_forever()

    def adopt(request: bytes) -> None:
        taken.append(("adopt", request))

    async with served({"/act": Route(act, adopt=adopt)}) as s:
        request = s.peer.request(1, "/act") + data(1, grpc_message(b"drop it"), end=True)
        if end == "reset":
            await s.peer.send(request + rst_stream(1))
        elif end == "gone":
            await s.peer.send(request)
            await s.peer.stream.aclose()
        elif end == "goaway_and_gone":
            await s.peer.send(request + goaway())
            await s.peer.stream.aclose()
        else:
            await s.peer.send(request)
            await trio.testing.wait_all_tasks_blocked()
            await s.peer.send(rst_stream(1))
        await trio.testing.wait_all_tasks_blocked()
    assert [request for _, request in taken] == [b"drop it"]


async def test_request_that_is_not_complete_is_not_adopted() -> None:
    """What came of a message that its client broke off means nothing."""
    taken: list[bytes] = []

    async def act(call: Call) -> None:
        await call.receive()

    async with served({"/act": Route(act, adopt=taken.append)}) as s:
        await s.peer.send(s.peer.request(1, "/act") + data(1, grpc_message(b"drop it")[:-1]) + rst_stream(1))
        await trio.testing.wait_all_tasks_blocked()
    assert taken == []
