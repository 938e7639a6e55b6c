"""The ledger: all or nothing, first come first served, never over its limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arka.tiers.admission import Charge, Ledger


def test_grants_at_once_when_there_is_room() -> None:
    """With room, the callback runs before ``request`` returns."""
    ledger = Ledger(100)
    granted: list[str] = []
    charge = ledger.request(60, lambda: granted.append("a"))
    assert charge.granted
    assert granted == ["a"]
    assert ledger.statistics().charged_bytes == 60


def test_first_come_first_served() -> None:
    """A small request never overtakes a large one that waits: nobody starves."""
    ledger = Ledger(100)
    granted: list[str] = []
    first = ledger.request(60, lambda: granted.append("first"))
    ledger.request(70, lambda: granted.append("large"))
    ledger.request(10, lambda: granted.append("small"))
    assert ledger.try_request(1) is None
    assert granted == ["first"]
    first.release()
    assert granted == ["first", "large", "small"]


def test_larger_than_the_limit_is_granted_alone() -> None:
    """A message above the whole limit waits for an empty ledger and then goes: no deadlock."""
    ledger = Ledger(100)
    small = ledger.request(1)
    large = ledger.request(1_000)
    assert not large.granted
    small.release()
    assert large.granted
    large.release()
    assert ledger.statistics().charged_bytes == 0


def test_release_twice_and_withdraw() -> None:
    """A second release does nothing; releasing a waiting charge withdraws it and lets the next one in."""
    ledger = Ledger(10)
    first = ledger.request(10)
    waiting = ledger.request(10)
    last = ledger.request(5)
    waiting.release()
    waiting.release()
    assert not waiting.granted
    first.release()
    first.release()
    assert last.granted
    assert ledger.statistics().charged_bytes == 5


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=80))
def test_never_over_the_limit_and_in_order(steps: list[tuple[bool, int]]) -> None:
    """For any sequence of requests and releases: within the limit, in order of arrival, nothing leaks."""
    ledger = Ledger(50)
    order: list[int] = []
    charges: list[Charge] = []
    for number, (ask, amount) in enumerate(steps):
        if ask:
            charges.append(ledger.request(amount, lambda number=number: order.append(number)))
        elif charges:
            charges.pop(amount % len(charges)).release()
        assert ledger.statistics().charged_bytes <= 50
        assert order == sorted(order)
    for charge in charges:
        charge.release()
    statistics = ledger.statistics()
    assert (statistics.charged_bytes, statistics.waiting, statistics.waiting_bytes) == (0, 0, 0)
