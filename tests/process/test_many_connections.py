"""More connections than there are descriptors: those beyond the budget hear why, everything else goes on (R31)."""

from __future__ import annotations

import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hpack
import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess
from tests.transport.peer import END_HEADERS, GOAWAY, HEADERS, PING, PREFACE, frame, settings

from .clients import Stream, action, connect, create, numbers

pytestmark = [pytest.mark.process, pytest.mark.slow]

#: The server's hard limit of descriptors, and what is opened: some with an open stream, then many that do nothing.
DESCRIPTORS = 4_096
CONNECTIONS = 10_000
WITH_STREAM = 1_000
#: Descriptors that the test needs beside its connections.
_OWN = 300
_ROUND_S = 60
#: Ends only what hangs.
_HANG_S = 600


@contextmanager
def descriptors(wanted: int) -> Iterator[int]:
    """Raise the test's own limit to ``wanted``, or to what the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, found), hard))
    try:
        yield found
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limited(server: ServerProcess, folder: Path, limit: int) -> ServerProcess:
    """Let a server have ``limit`` descriptors and no more."""
    script = folder / "limited"
    script.write_text(f'#!/bin/sh\nulimit -Sn {limit}\nulimit -Hn {limit}\nexec "{server.program}" "$@"\n')
    script.chmod(0o755)
    server.program = script
    return server


def hello(path: str = "") -> bytes:
    """What a client says first: with a path, and a request whose stream stays open."""
    if not path:
        return PREFACE + settings()
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "a")]
    block = hpack.Encoder().encode([*fields, ("content-type", "application/grpc"), ("te", "trailers")])
    return PREFACE + settings() + frame(HEADERS, END_HEADERS, 1, block)


def frames_in(received: bytes) -> list[tuple[int, bytes]]:
    """Split what came into frames' types and payloads; what is cut off is left out."""
    found = []
    while len(received) >= 9 and len(received) >= 9 + (size := int.from_bytes(received[:3], "big")):
        found.append((received[3], received[9 : 9 + size]))
        received = received[9 + size :]
    return found


class Crowd:
    """Many bare connections, read whenever there is something."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._poll = select.epoll()
        self.open: dict[int, socket.socket] = {}
        self.received: dict[int, bytes] = {}
        self.closed: list[bytes] = []

    def join(self, said: bytes) -> int:
        made = socket.create_connection(self._address, timeout=_ROUND_S)
        made.sendall(said)
        made.setblocking(False)
        self._poll.register(made, select.EPOLLIN)
        self.open[made.fileno()] = made
        self.received[made.fileno()] = b""
        return made.fileno()

    def listen(self, wait_s: float = 0) -> bool:
        """Take in what came; returns whether there was anything."""
        events = self._poll.poll(wait_s)
        for descriptor, _ in events:
            try:
                data = self.open[descriptor].recv(65_536)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self.received[descriptor] += data
            if not data:
                self._poll.unregister(descriptor)
                self.open.pop(descriptor).close()
                self.closed.append(self.received.pop(descriptor))
        return bool(events)

    def close(self) -> None:
        for each in self.open.values():
            each.close()
        self._poll.close()


def test_more_connections_than_descriptors(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """10,000 idle connections at 4,096 descriptors: streams stay, the others hear why, and the server serves on."""
    with descriptors(CONNECTIONS + _OWN) as own:
        count = own - _OWN
        if count < 2 * WITH_STREAM:
            pytest.skip(f"the hard limit of descriptors, {own}, is too low for {2 * WITH_STREAM} connections")
        limit = min(DESCRIPTORS, count // 2)
        server = limited(make_server(limits__idle_s=3_600, limits__keepalive_s=3_600), tmp_path, limit).start()
        crowd = Crowd(server.address)
        try:
            with connect(server.location) as client:
                create(client, "before")
                stream = Stream(client, "before", requested_durability="disk")
                streams = [
                    crowd.join(hello("/arrow.flight.protocol.FlightService/DoExchange")) for _ in range(WITH_STREAM)
                ]
                most = 0
                for number in range(count - WITH_STREAM):
                    crowd.join(hello())
                    crowd.listen()
                    if number % 500 == 0:
                        most = max(most, len(os.listdir(f"/proc/{server.pid}/fd")))
                        stream.write(numbers([number]))
                        assert [ack["error"] for ack in stream.acks(2)] == [None, None]
                # Those that the server did not accept yet wait in the kernel: it gets to them.
                give_up = time.monotonic() + _HANG_S
                while len(crowd.open) >= limit:
                    crowd.listen(1)
                    assert time.monotonic() < give_up, f"{len(crowd.open)} connections are open"
                while crowd.listen(2):
                    pass
                assert server.exit_code is None
                assert most < limit < count

                # All beyond the budget heard a reason, unless the reset outran it; none of those with a stream did.
                told = sum(any(kind == GOAWAY for kind, _ in frames_in(received)) for received in crowd.closed)
                assert told >= len(crowd.closed) // 4
                assert all(descriptor in crowd.open for descriptor in streams)
                for descriptor in streams:
                    crowd.received[descriptor] = b""
                    crowd.open[descriptor].sendall(frame(PING, 0, 0, b"are you?"))
                while any((PING, b"are you?") not in frames_in(crowd.received[each]) for each in streams):
                    assert crowd.listen(_ROUND_S)

                # New clients get a connection of their own, and everything works.
                with connect(server.location) as newcomer:
                    create(newcomer, "after")
                    late = Stream(newcomer, "after", requested_durability="iceberg_committed")
                    late.write(numbers([1, 2, 3]))
                    assert [ack["error"] for ack in late.acks(4)] == [None] * 4
                    assert late.finish() == []
                    rows = newcomer.do_get(flight.Ticket(b'{"table_name": "after"}')).read_all()
                    assert sorted(rows["n"].to_pylist()) == [1, 2, 3]
                    assert action(newcomer, "Flush", name="before")
                assert stream.finish() == []
        finally:
            crowd.close()
        server.stop()
        lines = server.log.read_text().splitlines()
        for event in ("connection.refused", "connection.closed", "connection.not_accepted"):
            assert sum(event in line for line in lines) < 1_000, event
        assert any("server.budget" in line and f"descriptors={limit}" in line for line in lines)


def test_half_handshakes(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Connections that say nothing, opened in a loop and left, cost newcomers nothing."""
    server = limited(make_server(limits__handshake_s=3_600), tmp_path, 512).start()
    with descriptors(2_000 + _OWN) as own:
        crowd = Crowd(server.address)
        try:
            for _ in range(min(1_000, own - _OWN)):
                crowd.join(PREFACE[:10])
                crowd.listen()
            with connect(server.location) as client:
                create(client, "t")
                assert len(os.listdir(f"/proc/{server.pid}/fd")) < 512
        finally:
            crowd.close()
        for _ in range(2_000):
            socket.create_connection(server.address, timeout=_ROUND_S).close()
        with connect(server.location) as client:
            stream = Stream(client, "t")
            stream.write(numbers([1]))
            assert stream.ack()["error"] is None
            stream.finish()
    server.stop()
