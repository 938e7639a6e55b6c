"""Rounds: what many streams are told of leaves in one write for each connection, before anything else runs."""

from __future__ import annotations

import socket

import pytest
import structlog.testing
import trio

from arka.flight.grpc import Call, Route
from arka.flight.http2 import ConnectionFactory
from arka.flight.rounds import AT_ONCE, Round
from arka.options import MIB, Limits
from arka.records import Tier
from arka.tiers.admission import Ledger
from arka.tiers.watermarks import Watermark
from tests.transport.peer import WRITES, Peer, data, grpc_message


class Box:
    """An outbox that says a thing once."""

    def __init__(self) -> None:
        self.due = b""
        self.broken = False

    def take(self, budget: int) -> bytes:
        if self.broken:
            raise ValueError("broken outbox")
        due, self.due = self.due, b""
        return due


class Told:
    """A member that writes down when it was asked."""

    def __init__(self, name: str, heard: list[str]) -> None:
        self.name, self.heard = name, heard

    def write_due(self, *, at_once: bool) -> None:
        self.heard.append(self.name if at_once else f"{self.name} later")


def test_members_write_once_in_the_order_in_which_they_joined() -> None:
    """However often they join; outside of a round nobody can."""
    heard: list[str] = []
    first, second = Told("first", heard), Told("second", heard)
    told = Round()
    assert not told.join(first)
    for _ in range(2):
        told.begin()
        assert told.join(second)
        assert told.join(first)
        assert told.join(second)
        assert heard == []
        told.end()
        assert heard == ["second", "first"]
        heard.clear()
        assert not told.join(first)


def test_only_some_write_before_the_tier_goes_on() -> None:
    """The others are left to their writers, and all of them in the end of one round."""
    heard: list[str] = []
    told = Round()
    told.begin()
    for number in range(AT_ONCE + 2):
        told.join(Told(f"{number}", heard))
    told.begin()
    told.end()
    assert heard == [*map(str, range(AT_ONCE)), f"{AT_ONCE} later", f"{AT_ONCE + 1} later"]


def test_a_listener_that_fails_ends_the_round() -> None:
    """Else nobody would ever write again what is due: the last acks of a log that has failed, say (R6)."""
    heard: list[str] = []
    told = Round()
    mark = Watermark(Tier.DISK)
    mark.tell_in(told)

    def join_and_fail(_: object) -> None:
        told.join(Told("member", heard))
        raise ValueError("a bug")

    mark.listen(join_and_fail)
    with pytest.raises(ValueError, match="a bug"):
        mark.advance(1)
    assert heard == ["member"]
    assert not told.join(Told("late", heard))


def test_a_mark_tells_its_listeners_in_a_round() -> None:
    """Begun before the first, ended after the last; not where nothing rises."""
    heard: list[str] = []

    class Around:
        def begin(self) -> None:
            heard.append("begin")

        def end(self) -> None:
            heard.append("end")

    mark = Watermark(Tier.DISK)
    mark.tell_in(Around())
    for _ in range(2):
        mark.listen(lambda rise: heard.append(f"told {rise.lsn}"))
    mark.advance(0)
    assert heard == []
    mark.advance(7)
    assert heard == ["begin", "told 7", "told 7", "end"]


async def test_acks_of_a_round_leave_in_one_write() -> None:
    """Two streams' messages are in the socket when the round ends, without a turn of the loop."""
    calls: list[tuple[Call, Box]] = []

    async def serve(call: Call) -> None:
        box = Box()
        calls.append((call, box))
        call.attach_outbox(box)
        while await call.receive() is not None:
            pass

    factory = ConnectionFactory({WRITES: Route(serve)}, Ledger(64 * MIB), Limits())
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    peer = Peer(theirs)
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(factory.serve, ours)
        nursery.start_soon(peer.listen)
        await peer.shake_hands()
        for stream_id in (1, 3):
            await peer.send(peer.request(stream_id, WRITES))
            await peer.settle()
        assert len(calls) == 2

        factory.round.begin()
        for number, (call, box) in enumerate(calls):
            box.due = grpc_message(b"ack %d" % number)
            call.wake()
        probe = socket.socket(fileno=socket.dup(theirs.socket.fileno()))
        try:
            probe.setblocking(False)
            assert not readable(probe)
            factory.round.end()
            assert readable(probe)
        finally:
            probe.close()
        await peer.wait(lambda: peer.responses[1].messages == [b"ack 0"] and peer.responses[3].messages == [b"ack 1"])

        # A stream whose outbox fails is the only one to end, and nobody who told it hears of that.
        calls[0][1].broken = True
        calls[1][1].due = grpc_message(b"later")
        with structlog.testing.capture_logs() as logs:
            factory.round.begin()
            for call, _ in calls:
                call.wake()
            factory.round.end()
        assert [entry["event"] for entry in logs] == ["rpc.failed"]
        response = await peer.response(1)
        assert response.status == 13
        await peer.send(data(3, end=True))
        assert (await peer.response(3)).messages == [b"ack 1", b"later"]
        nursery.cancel_scope.cancel()


def readable(end: socket.socket) -> bool:
    """Whether bytes wait in a socket."""
    try:
        return bool(end.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
