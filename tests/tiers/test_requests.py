"""Large requests are read in a thread, and hold back what their peer asks for behind them (T24)."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import trio

from arka.errors import InvalidRequest
from arka.flight.requests import THREAD_BYTES, Requests

LARGE = bytes(THREAD_BYTES + 1)


async def test_a_large_request_holds_back_its_peers_later_ones_alone() -> None:
    """Later ones of the peer come behind it, large or small; another peer's do not wait."""
    requests, order = Requests(), []
    release = threading.Event()
    threads: list[bool] = []

    def parse(data: bytes, *, slow: bool = False) -> int:
        threads.append(threading.current_thread() is threading.main_thread())
        if slow:
            assert release.wait(30)
        return len(data)

    async def ask(peer: str, name: str, data: bytes, slow: bool = False) -> None:
        assert await requests.read(peer, data, partial(parse, slow=slow)) == len(data)
        order.append(name)

    async with trio.open_nursery() as nursery:
        for peer, name, data, slow in (
            ("a", "first", LARGE, True),
            ("a", "second", LARGE, False),
            ("a", "third", b"small", False),
            ("b", "other", b"small", False),
        ):
            nursery.start_soon(ask, peer, name, data, slow)
            await trio.testing.wait_all_tasks_blocked(0.02)
        assert order == ["other"]
        release.set()
    assert order[:2] == ["other", "first"]
    assert sorted(order[2:]) == ["second", "third"]
    assert sorted(threads) == [False, False, True, True]
    # Nothing is left of them.
    await requests.wait_for("a")


async def test_a_request_that_cannot_be_read_holds_nobody_back() -> None:
    """Its peer goes on; so it does when the client leaves."""
    requests = Requests()

    def parse(_data: bytes) -> None:
        raise InvalidRequest("malformed")

    with pytest.raises(InvalidRequest, match="malformed"):
        await requests.read("a", LARGE, parse)
    release = threading.Event()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(requests.read, "a", LARGE, lambda _: release.wait(30))
            await trio.testing.wait_all_tasks_blocked(0.02)
            scope.cancel()
    assert await requests.read("a", b"small", len) == 5
    release.set()
