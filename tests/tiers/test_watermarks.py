"""Watermarks only rise, and everybody who waits or listens hears of it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from arka.errors import InternalError
from arka.records import Tier
from arka.tiers.watermarks import Advance, Watermark


async def test_advance_wakes_waiters_and_listeners() -> None:
    """One rise reaches each listener once and each waiter whose LSN it covers."""
    mark = Watermark(Tier.DISK)
    heard: list[int] = []

    def listener(advance: Advance) -> None:
        heard.append(advance.lsn)

    mark.listen(listener)
    reached: list[int] = []

    async def wait(lsn: int) -> None:
        await mark.wait_reached(lsn)
        reached.append(lsn)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, 3)
        nursery.start_soon(wait, 5)
        await trio.testing.wait_all_tasks_blocked()
        mark.advance(4)
        mark.advance(4)
        await trio.testing.wait_all_tasks_blocked()
        assert reached == [3]
        mark.advance(5)
    assert reached == [3, 5]
    mark.unlisten(listener)
    mark.advance(6)
    assert heard == [4, 5]


async def test_never_falls() -> None:
    """A fall would take a promise back: it is an internal error."""
    mark = Watermark(Tier.DISK, 10)
    with pytest.raises(InternalError):
        mark.advance(9)
