"""R31: who gets a connection while there are few, how the others are told, and what a lack of descriptors costs."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import ExitStack

import pytest
import structlog.testing
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from arka.flight import http2
from arka.flight.accepting import accept_connections
from arka.flight.connections import ENDING_MOST, OpenConnections
from arka.flight.grpc import Route
from arka.flight.http2 import ConnectionFactory
from arka.flight.lines import LINES, Lines
from arka.flight.status import Status
from arka.options import MIB, Limits
from arka.tiers.admission import Ledger
from tests.transport.peer import ECHO, ENHANCE_YOUR_CALM, NO_ERROR, connected, data, echo, grpc_message, settings


class Connection:
    """A member that ends when it is told to, or is left ending."""

    def __init__(self, places: OpenConnections, address: str, *, slow: bool = False) -> None:
        self.places = places
        self.address = address
        self.slow = slow
        self.ended = False
        places.add(self, address)

    def end_idle(self) -> None:
        assert not self.ended
        self.ended = True


class TestPlaces:
    """Who gets a place."""

    def make(self, places: OpenConnections, address: str, count: int, *, busy: bool = False) -> list[Connection]:
        made = []
        for _ in range(count):
            assert places.make_room(address)
            made.append(Connection(places, address))
            places.set_busy(made[-1], busy)
        return made

    def test_one_address_may_have_all_but_what_is_kept(self):
        """Where nobody else wants one, an address gets seven eighths of all connections; others get the rest."""
        places = OpenConnections(80, 0.25)
        self.make(places, "a", 70, busy=True)
        assert not places.make_room("a")
        self.make(places, "b", 10, busy=True)
        assert not places.make_room("b")
        assert not places.make_room("c")

    def test_the_longest_idle_ends(self):
        """An idle connection makes room; one with RPCs never does."""
        places = OpenConnections(8, 1.0)
        busy = self.make(places, "a", 3, busy=True)
        idle = self.make(places, "a", 5)
        places.set_busy(idle[0], True)
        places.set_busy(idle[0], False)
        for victim in [*idle[1:], idle[0]]:
            assert places.make_room("b")
            assert victim.ended
            Connection(places, "b")
            places.set_busy(list(places._members)[-1], True)
            places.remove(victim)
        assert not places.make_room("b")
        assert not any(connection.ended for connection in busy)

    def test_an_address_over_its_share_makes_room_itself(self):
        """A storm of one address ends its own idle connections, and those of others stay."""
        places = OpenConnections(80, 0.25)
        others = self.make(places, "b", 20)
        self.make(places, "a", 50)
        for _ in range(500):
            assert places.make_room("a")
            Connection(places, "a")
            for ended in list(places._ending):
                places.remove(ended)
        assert not any(connection.ended for connection in others)
        # And whoever has few gets one at the expense of whoever has many.
        assert places.make_room("c")
        assert not any(connection.ended for connection in others)

    def test_few_end_at_a_time(self):
        """Each that ends has a descriptor until it is closed: there are only so many of them."""
        places = OpenConnections(200, 1.0)
        self.make(places, "a", 200)
        for _ in range(ENDING_MOST):
            assert places.make_room("a")
            Connection(places, "a")
        assert not places.make_room("a")
        assert len(places) == 200 + ENDING_MOST
        places.remove(next(iter(places._ending)))
        assert places.make_room("a")

    @given(
        st.integers(1, 20),
        st.sampled_from([0.1, 0.25, 1.0]),
        st.lists(st.tuples(st.sampled_from(["open", "close", "busy", "idle"]), st.integers(0, 40)), max_size=80),
    )
    def test_counts(self, limit, share, steps):
        """Whatever happens, there are never more than the limit and those that end, and nothing is left behind."""
        places = OpenConnections(limit, share)
        live: list[Connection] = []
        for step, number in steps:
            if step == "open":
                address = "abc"[number % 3]
                if places.make_room(address):
                    live.append(Connection(places, address))
            elif live:
                connection = live[number % len(live)]
                if step == "close":
                    live.remove(connection)
                    places.remove(connection)
                else:
                    places.set_busy(connection, step == "busy")
            assert len(places) == len(live)
            assert sum(not connection.ended for connection in live) <= limit
        for connection in live:
            places.remove(connection)
        for table in (places._members, places._idle, places._idle_of, places._ending, places._count, places._over):
            assert not table


class TestServed:
    """The same over HTTP/2."""

    def factory(self, connections: int) -> ConnectionFactory:
        limits = Limits(memory_bytes=64 * MIB, connections=connections)
        return ConnectionFactory({ECHO: Route(echo)}, Ledger(64 * MIB), limits)

    async def test_refused_with_a_reason(self):
        """A connection too many hears SETTINGS and GOAWAY with a reason, and is logged."""
        factory = self.factory(1)
        with structlog.testing.capture_logs() as logs:
            async with connected(factory) as (first, _):
                await first.send(first.request(1))
                await first.settle()
                async with connected(factory, shake_hands=False) as (second, _):
                    code, detail = await second.wait_closed()
                    assert code == ENHANCE_YOUR_CALM
                    assert detail.startswith(b"[overloaded] 1 connections are open")
                    assert second.frames[0].kind == settings()[3]
                await first.send(data(1, grpc_message(b"still here"), end=True))
                assert (await first.response(1)).messages == [b"still here"]
        assert [entry["event"] for entry in logs].count("connection.refused") == 1

    async def test_an_idle_one_ends_for_another(self):
        """A connection without RPCs is told to go, with NO_ERROR, so that its client opens another when it needs it."""
        factory = self.factory(1)
        async with connected(factory) as (first, _):
            await first.send(first.request(1, end=True))
            assert (await first.response(1)).status == Status.OK
            async with connected(factory) as (second, _):
                assert await first.wait_closed() == (NO_ERROR, b"idle, and others need the connection")
                await second.send(second.request(1, end=True))
                assert (await second.response(1)).status == Status.OK

    async def test_a_storm_is_a_few_lines(self):
        """Ten thousand refused connections are a bounded number of lines, with a count."""
        factory = self.factory(1)
        with structlog.testing.capture_logs() as logs:
            async with connected(factory) as (first, _):
                await first.send(first.request(1))
                await first.settle()
                async with trio.open_nursery() as nursery:
                    for _ in range(2_000):
                        client, server = trio.testing.memory_stream_pair()
                        await client.aclose()
                        nursery.start_soon(factory.serve, server)
        refused = [entry for entry in logs if entry["event"] == "connection.refused"]
        assert LINES.burst <= len(refused) < 2 * LINES.burst

    async def test_few_are_refused_at_leisure(self):
        """Clients that do not go once they are refused hold few descriptors, and those for a second."""
        factory = self.factory(1)
        closed = 0

        async def serve(stream: trio.abc.Stream) -> None:
            nonlocal closed
            await factory.serve(stream)
            closed += 1

        async with connected(factory) as (first, _):
            await first.send(first.request(1))
            await first.settle()
            clients = []
            async with trio.open_nursery() as nursery:
                for _ in range(3 * http2.REFUSING_MOST):
                    client, server = trio.testing.memory_stream_pair()
                    clients.append(client)
                    nursery.start_soon(serve, server)
                await trio.testing.wait_all_tasks_blocked()
                assert closed == 2 * http2.REFUSING_MOST


def test_lines_count_what_they_leave_out():
    """The next line that is written says how many were not."""
    lines, written = Lines(), []

    def write(event, **facts):
        written.append((event, facts))

    for _ in range(LINES.burst + 7):
        lines.write(write, "a", 0.0, x=1)
    lines.write(write, "b", 0.0)
    assert len(written) == LINES.burst + 1
    lines.write(write, "a", 1.0, x=2)
    assert written[-1] == ("a", {"x": 2, "left_out": 7})
    lines.write(write, "a", 1.0, x=3)
    assert written[-1] == ("a", {"x": 3})


class TestAccepting:
    """Accepting with no descriptor left."""

    @pytest.mark.parametrize("clients", [1, 12])
    async def test_without_descriptors(self, clients):
        """Clients that cannot be accepted are closed one by one, nothing spins or leaks, and then it goes on."""
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listener.socket.getsockname()
        served = []
        attempts = 0
        accept = listener.accept

        async def counted() -> trio.SocketStream:
            nonlocal attempts
            attempts += 1
            return await accept()

        listener.accept = counted  # type: ignore[method-assign]

        async def serve(stream: trio.SocketStream) -> None:
            served.append(stream.socket.fileno())
            await stream.send_all(b"served")

        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(clients + 1)]
            for each in sockets:
                each.setblocking(False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept_connections, listener, serve, nursery)
                await trio.testing.wait_all_tasks_blocked()
                before = len(os.listdir("/proc/self/fd"))
                free = os.dup(0)
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
                try:
                    with structlog.testing.capture_logs() as logs, trio.fail_after(60):
                        for each in sockets[:-1]:
                            assert each.connect_ex(address) in (0, errno.EINPROGRESS)
                        for each in sockets[:-1]:
                            await trio.lowlevel.wait_readable(each)
                            assert each.recv(10) == b""
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                assert not served
                assert "connection.not_accepted" in [entry["event"] for entry in logs]
                # One that fails, and one in place of the spare, for each client; and what waits.
                assert attempts <= 3 * clients + 3
                sockets[-1].connect_ex(address)
                with trio.fail_after(60):
                    await trio.lowlevel.wait_readable(sockets[-1])
                assert sockets[-1].recv(10) == b"served"
                while len(os.listdir("/proc/self/fd")) > before:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        await listener.aclose()

    async def test_other_errors_are_raised(self):
        """A listener that is broken is not asked again and again."""
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await listener.aclose()

        async def serve(stream: trio.SocketStream) -> None:
            raise AssertionError

        async with trio.open_nursery() as nursery:
            with pytest.raises((OSError, trio.ClosedResourceError)):
                await accept_connections(listener, serve, nursery)
