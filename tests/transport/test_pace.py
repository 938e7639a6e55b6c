"""The least rate of granted messages (T25), with real intakes over one ledger and a time that is only a number."""

from __future__ import annotations

import pytest

from arka._core.wire import INITIAL_WINDOW, FlightMessage, MessageAssembler
from arka.errors import AdmissionRejected
from arka.flight.flow import ReadAhead, StreamIntake
from arka.flight.pace import LOOK_S, PACE_S, Pace
from arka.options import MIB, Limits
from arka.tiers.accounts import Account
from arka.tiers.admission import Ledger


class Server:
    """What all streams share, without connections."""

    def __init__(self, **limits: int) -> None:
        self.limits = Limits(**limits)
        self.ledger = Ledger.of(self.limits)
        self.ahead = ReadAhead(self.ledger)
        self.pace = Pace(self.ledger, self.limits)
        self.now = 0.0

    def open(self, connection: Account) -> StreamIntake:
        assembler = MessageAssembler(True, 256 * MIB, 128 * MIB)
        account = self.ledger.open_stream(connection)
        return StreamIntake(assembler, self.ledger, self.ahead, lambda _: None, account=account, pace=self.pace)

    def wait(self, seconds: float) -> None:
        """Let time pass, with the looks that are due."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, max(self.pace.look(self.now), self.now + 0.001))


def begin(intake: StreamIntake, size: int = MIB) -> None:
    intake.begin(size, size - INITIAL_WINDOW)


def ended(intake: StreamIntake) -> bool:
    return isinstance(intake._error, AdmissionRejected)


def test_a_thousand_tiny_hogs() -> None:
    """4 peers with 250 streams hold all memory with messages that do not come: a fifth waits for one look at rates."""
    server = Server()
    hogs = []
    for peer in range(4):
        connection = server.ledger.open_connection(f"10.0.0.{peer}")
        hogs += [server.open(connection) for _ in range(250)]
    for hog in hogs:
        begin(hog)
    assert server.ledger.statistics().waiting > 0
    polite = server.open(server.ledger.open_connection("10.0.0.9"))
    begin(polite)
    assert not polite.is_granted
    small = server.open(server.ledger.open_connection("10.0.0.10"))
    small.complete(FlightMessage(header=b"h"), 1_000)
    assert len(small._inbox) == 1
    server.wait(PACE_S + 2 * LOOK_S)
    assert polite.is_granted
    assert not ended(polite)
    assert any(map(ended, hogs))
    assert all(not hog.is_granted for hog in hogs if ended(hog))
    # No more end than have to: once nobody waits the rest may go on.
    assert server.ledger.statistics().waiting == 0
    assert sum(map(ended, hogs)) < 640


def test_nothing_is_gained_by_another_message() -> None:
    """A stream that ends one slow message and begins another is judged by both together."""
    server = Server(memory_bytes=16 * MIB)
    hog = server.open(server.ledger.open_connection("hog"))
    server.ledger.request(9 * MIB, None, server.ledger.open_stream(server.ledger.open_connection("full")))
    other = server.open(server.ledger.open_connection("other"))
    begin(hog, 100_000)
    begin(other, 2 * MIB)
    assert hog.is_granted
    assert not other.is_granted
    size = 100_000
    for _ in range(5):
        server.wait(3)
        if ended(hog):
            break
        hog.complete(FlightMessage(header=b"h"), size)
        hog._inbox.pop()[0].charge.release()
        # What was reserved ahead pays for smaller ones.
        size = 50_000
        begin(hog, size)
        assert hog.is_granted
    assert ended(hog)


@pytest.mark.parametrize("waits", [True, False])
def test_a_look_costs_nothing_while_nobody_waits(waits: bool) -> None:
    """Streams are looked at, and ended, only while somebody waits; one that is over is forgotten at once."""
    server = Server(memory_bytes=16 * MIB)
    connection = server.ledger.open_connection("one")
    streams = [server.open(connection) for _ in range(8)]
    for stream in streams:
        begin(stream)
    if waits:
        begin(server.open(server.ledger.open_connection("two")), 8 * MIB)
    assert len(server.pace) == 8
    server.wait(PACE_S + 2 * LOOK_S)
    assert any(map(ended, streams)) == waits
    for stream in streams:
        stream.abandon()
    assert len(server.pace) == (1 if waits else 0)
    assert server.ledger.statistics().message_bytes == (8 * MIB if waits else 0)


def test_a_look_is_bounded() -> None:
    """With thousands of streams each look takes a part of them, and all have had their turn soon after."""
    server = Server(memory_bytes=4096 * MIB)
    streams = []
    for peer in range(4):
        connection = server.ledger.open_connection(f"10.0.0.{peer}")
        streams += [server.open(connection) for _ in range(1_000)]
    for stream in streams:
        begin(stream, 100_000)
    looked = []
    take = server.pace._stays
    server.pace._stays = lambda sample, now: looked.append(1) or take(sample, now)
    server.pace.look(0.0)
    assert len(looked) == 1_000
    server.now = 0.0
    server.wait(0.5)
    assert len(looked) == 4_000
