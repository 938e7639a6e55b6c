"""The ledger's fairness (T25): shares, turns by bytes, small messages, and what never waits."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from arka.errors import AdmissionRejected
from arka.options import KIB, MIB, Limits
from arka.tiers.accounts import Account
from arka.tiers.admission import SMALL_BYTES, Charge, Kind, Ledger

TOTAL = 16 * MIB
#: Of that, what messages have while few streams are open.
ROOM = TOTAL * 5 // 8


def ledger_of(**limits: float) -> Ledger:
    return Ledger.of(Limits(memory_bytes=TOTAL, **limits))


def stream_of(ledger: Ledger, peer: str) -> Account:
    return ledger.open_stream(ledger.open_connection(peer))


class Sender:
    """A stream that always wants memory: it asks again as soon as it was granted some."""

    def __init__(self, ledger: Ledger, account: Account, size: int, granted: deque[Charge]) -> None:
        self.ledger, self.account, self.size, self.granted = ledger, account, size, granted
        self.admitted = 0
        self.waiting: Charge | None = None

    def ask(self) -> None:
        """Ask, and go on for as long as there is room."""
        while self.waiting is None:
            charge = self.ledger.request(self.size, None, self.account)
            if charge.granted:
                self._take(charge)
            else:
                self.waiting = charge

    def look(self) -> None:
        """See whether what waited was granted; if so ask again."""
        if self.waiting is not None and self.waiting.granted:
            charge, self.waiting = self.waiting, None
            self._take(charge)
            self.ask()

    def _take(self, charge: Charge) -> None:
        self.admitted += charge.amount
        self.granted.append(charge)


def run(senders: list[Sender], granted: deque[Charge], releases: int) -> None:
    """Release what was granted first, as the disk does, while all senders go on."""
    for sender in senders:
        sender.ask()
    for sender in senders:
        sender.admitted = 0
    for _ in range(releases):
        granted.popleft().release()
        for sender in senders:
            sender.look()


def jain(values: list[int]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


@pytest.mark.parametrize("level", ["peers", "connections", "streams"])
@pytest.mark.parametrize("hog_bytes", [128 * KIB, MIB, 4 * MIB])
def test_one_hog_and_a_hundred_polite_streams(level: str, hog_bytes: int) -> None:
    """Each polite one gets at least half of its even part whatever size the hog's messages have; equals get equal."""
    ledger, granted = ledger_of(), deque[Charge]()
    connections = [ledger.open_connection(f"peer {i if level == 'peers' else 0}") for i in range(101)]
    accounts = [ledger.open_stream(connections[0 if level == "streams" else i]) for i in range(101)]
    hog = Sender(ledger, accounts[0], hog_bytes, granted)
    polite = [Sender(ledger, account, 100 * KIB, granted) for account in accounts[1:]]
    run([hog, *polite], granted, 5_000)
    even = (hog.admitted + sum(sender.admitted for sender in polite)) / 101
    assert min(sender.admitted for sender in polite) >= even / 2
    assert jain([sender.admitted for sender in polite]) >= 0.95
    # Turns go by bytes: large messages win nothing.
    assert hog.admitted <= 1.1 * max(sender.admitted for sender in polite) + 2 * hog_bytes


def test_a_peer_gains_nothing_by_more_streams() -> None:
    """A peer with 1,000 streams on 4 connections gets no more than one with a single stream."""
    ledger, granted = ledger_of(), deque[Charge]()
    connections = [ledger.open_connection("many") for _ in range(4)]
    many = [Sender(ledger, ledger.open_stream(connections[i % 4]), 100 * KIB, granted) for i in range(1000)]
    one = Sender(ledger, stream_of(ledger, "one"), 100 * KIB, granted)
    run([*many, one], granted, 2_000)
    assert one.admitted >= sum(sender.admitted for sender in many) * 0.9


def test_shares_bind_only_while_others_wait() -> None:
    """Alone a stream may have all the room; once another waits, it gets nothing more until it is within its share."""
    ledger = ledger_of()
    hog, other = stream_of(ledger, "hog"), stream_of(ledger, "other")
    held = []
    while (charge := ledger.try_request(MIB, hog)) is not None:
        held.append(charge)
    assert sum(charge.amount for charge in held) == ROOM
    more = ledger.request(MIB, None, hog)
    waits = [ledger.request(MIB, None, other) for _ in range(4)]
    for charge in held[:4]:
        charge.release()
    # The hog asked first.
    assert [charge.granted for charge in waits] == [True] * 4
    assert not more.granted
    held[4].release()
    # Nobody else waits any more.
    assert more.granted


def test_a_hog_that_waits_for_room_does_not_hold_up_who_is_within_its_share() -> None:
    """A request beyond its stream's share waits for room; one within, made later, does not wait behind it."""
    ledger = ledger_of()
    hog, other = stream_of(ledger, "hog"), stream_of(ledger, "other")
    ledger.request(ROOM - MIB, None, hog)
    assert not ledger.request(2 * MIB, None, hog).granted
    assert ledger.request(MIB, None, other).granted


def test_one_message_is_always_admissible_alone() -> None:
    """Half of the memory in one message is granted once its stream, connection and peer hold nothing else."""
    ledger = ledger_of()
    large, other = stream_of(ledger, "large"), [stream_of(ledger, f"other {i}") for i in range(8)]
    granted = deque[Charge]()
    senders = [Sender(ledger, account, MIB, granted) for account in other]
    for sender in senders:
        sender.ask()
    waits = ledger.request(TOTAL // 2, None, large)
    for _ in range(100):
        if waits.granted:
            break
        granted.popleft().release()
        for sender in senders:
            sender.look()
    assert waits.granted


def test_small_messages_are_never_behind_large_ones() -> None:
    """With all room taken and large requests waiting, each stream has one small message at a time; an eighth in all."""
    ledger = ledger_of()
    hog = stream_of(ledger, "hog")
    ledger.request(TOTAL, None, hog)
    assert not ledger.request(MIB, None, hog).granted
    streams = [stream_of(ledger, f"peer {i}") for i in range(40)]
    first = [ledger.request(SMALL_BYTES, None, stream) for stream in streams]
    fit = TOTAL // 8 // SMALL_BYTES
    assert [charge.granted for charge in first] == [i < fit for i in range(40)]
    second = ledger.request(1, None, streams[0])
    assert not second.granted
    order = []
    for charge in first[:fit]:
        charge.release()
        order.append([i for i, waiting in enumerate(first) if waiting.granted])
    # First come first served among those that wait.
    assert order[0] == list(range(fit + 1))
    assert all(charge.granted for charge in first)
    assert second.granted
    assert second.kind is Kind.SMALL


def test_a_small_message_stays_behind_its_streams_large_one() -> None:
    """Grants keep their order within a stream."""
    ledger = ledger_of()
    hog = ledger.request(TOTAL, None, stream_of(ledger, "hog"))
    stream = stream_of(ledger, "stream")
    large, small = ledger.request(MIB, None, stream), ledger.request(10, None, stream)
    assert not small.granted
    large.release()
    assert small.granted
    hog.release()


def test_who_reconnects_finds_its_debts() -> None:
    """A peer's account lasts as long as anything is charged to it, and not longer."""
    ledger = ledger_of()
    connection = ledger.open_connection("10.0.0.1")
    held = ledger.request(MIB, None, ledger.open_stream(connection))
    ledger.close_connection(connection)
    again = ledger.open_connection("10.0.0.1")
    assert again.peer is connection.peer
    assert again.peer.charged == MIB
    ledger.close_connection(again)
    assert ledger.statistics().peers == 1
    held.release()
    assert ledger.statistics().peers == 0


def test_windows_and_what_is_kept_are_refused_never_waited_for() -> None:
    """Each has its part, one peer three quarters of it; others still get some; messages do not reach into it."""
    ledger = ledger_of()
    ledger.request(ROOM, None, stream_of(ledger, "hog"))
    one, two = stream_of(ledger, "one"), stream_of(ledger, "two")
    kept = [ledger.keep(256 * KIB, one) for _ in range(6)]
    with pytest.raises(AdmissionRejected, match="by this client"):
        ledger.keep(256 * KIB, one)
    ledger.keep(256 * KIB, two)
    for charge in kept:
        charge.release()
    ledger.keep(MIB, one)
    for _ in range(32):
        ledger.take_window(64 * KIB, one)
    # What is guaranteed is used up, and messages have the rest.
    with pytest.raises(AdmissionRejected, match="windows"):
        ledger.take_window(64 * KIB, two)
    assert ledger.statistics().charged_bytes <= TOTAL


def test_cost_does_not_grow_with_the_waiters() -> None:
    """A release with 10,000 waiters looks at a few of them: the steps of the heaps are counted."""
    from arka.tiers import accounts

    ledger = ledger_of()
    held = [ledger.request(MIB, None, stream_of(ledger, "hog")) for _ in range(10)]
    waiters = [ledger.request(MIB, None, stream_of(ledger, f"peer {i % 100}")) for i in range(10_000)]
    looks = 0
    first = accounts._first

    def counted(heap: list) -> Account | None:
        nonlocal looks
        looks += 1
        before = len(heap)
        found = first(heap)
        looks += before - len(heap)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "_first", counted)
        for charge in held:
            charge.release()
        for charge in waiters[5_000:]:
            charge.release()
    assert looks <= 30 * (len(held) + 5_000)


class Shares(RuleBasedStateMachine):
    """Some peers with connections and streams; requests, releases and withdrawals in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = ledger_of()
        connections = [self.ledger.open_connection(f"peer {i // 2}") for i in range(6)]
        self.streams = [self.ledger.open_stream(connections[i // 2]) for i in range(12)]
        self.charges: list[tuple[int, Charge]] = []
        self.asked: list[list[Charge]] = [[] for _ in self.streams]
        self.orders: list[list[Charge]] = [[] for _ in self.streams]

    numbers = st.integers(0, 11)
    sizes = st.sampled_from([0, 1, 10 * KIB, SMALL_BYTES, SMALL_BYTES + 1, 300 * KIB, MIB, 5 * MIB, TOTAL // 2])

    @rule(number=numbers, size=sizes)
    def ask(self, number: int, size: int) -> None:
        made: list[Charge] = []
        early: list[bool] = []

        def granted() -> None:
            if made:
                self.orders[number].append(made[0])
            else:
                early.append(True)

        charge = self.ledger.request(size, granted, self.streams[number])
        made.append(charge)
        if early:
            self.orders[number].append(charge)
        self.asked[number].append(charge)
        self.charges.append((number, charge))

    @rule(number=numbers, size=sizes)
    def ask_now(self, number: int, size: int) -> None:
        if (charge := self.ledger.try_request(size, self.streams[number])) is not None:
            assert not any(not made.granted for made in self.asked[number]), "it overtook its own stream"
            self.charges.append((number, charge))

    @rule(which=st.integers(0, 10**6))
    def release(self, which: int) -> None:
        """Give back what was granted, or withdraw what waits."""
        if self.charges:
            number, charge = self.charges.pop(which % len(self.charges))
            if not charge.granted:
                self.asked[number].remove(charge)
            charge.release()

    @rule()
    def progress(self) -> None:
        """With all that is granted given back again and again, everything that waits is granted."""
        for _ in range(10_000):
            granted = [item for item in self.charges if item[1].granted]
            if not granted:
                break
            for item in granted:
                self.charges.remove(item)
                item[1].release()
        assert not self.charges
        assert self.ledger.statistics().waiting == 0

    @invariant()
    def sums_agree(self) -> None:
        """What is charged is the sum of granted charges, of each kind and at each level."""
        granted = [(number, charge) for number, charge in self.charges if charge.granted]
        statistics = self.ledger.statistics()
        by_kind = {kind: sum(c.amount for _, c in granted if c.kind is kind) for kind in Kind}
        assert statistics.message_bytes == by_kind[Kind.MESSAGE]
        assert statistics.small_bytes == by_kind[Kind.SMALL] <= TOTAL // 8
        assert statistics.charged_bytes == sum(by_kind.values())
        assert statistics.waiting == len(self.charges) - len(granted)
        assert statistics.waiting_bytes == sum(c.amount for _, c in self.charges if not c.granted)
        for level in range(3):
            below: dict[Account, int] = {}
            for number, charge in granted:
                node = self.streams[number]
                for _ in range(level):
                    node = node.parent
                if charge.kind is Kind.MESSAGE:
                    below[node] = below.get(node, 0) + charge.amount
            assert all(node.charged == amount for node, amount in below.items())

    @invariant()
    def nothing_waits_beside_room(self) -> None:
        """If something waits, messages are charged, and not more than fit unless one is alone."""
        statistics = self.ledger.statistics()
        if statistics.waiting:
            assert statistics.message_bytes > 0
        large = [c for _, c in self.charges if c.granted and c.kind is Kind.MESSAGE and c.amount]
        assert statistics.message_bytes <= ROOM or len(large) == 1

    @invariant()
    def order_within_a_stream(self) -> None:
        """Grants come in the order in which a stream asked."""
        for asked, order in zip(self.asked, self.orders, strict=True):
            places = {charge: place for place, charge in enumerate(asked)}
            granted = [places[charge] for charge in order if charge in places]
            assert granted == sorted(granted)


TestShares = Shares.TestCase
TestShares.settings = hypothesis_settings(max_examples=100, stateful_step_count=60, deadline=None)
