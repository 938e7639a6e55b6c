"""The disk gate refuses before the disk is full and opens again by itself (R23)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from arka.errors import AdmissionRejected
from arka.tiers.space import DiskSpace


def test_log_limit_has_hysteresis() -> None:
    """Above the limit writes are refused with the figures; below nine tenths of it they are let in again."""
    space = DiskSpace(limit_bytes=100, free_bytes=0, used_bytes=50, read_free=lambda: 1000)
    space.check()
    space.note_written(51)
    with pytest.raises(AdmissionRejected, match="101 bytes"):
        space.check()
    space.note_released(5)
    with pytest.raises(AdmissionRejected):
        space.check()
    space.note_released(10)
    space.check()


async def test_free_space_is_watched(autojump_clock: MockClock) -> None:
    """A file system that fills up closes the gate, one that empties opens it."""
    free = 100
    space = DiskSpace(limit_bytes=1 << 40, free_bytes=50, used_bytes=0, read_free=lambda: free)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(space.run)
        await trio.sleep(3)
        space.check()
        free = 49
        await trio.sleep(3)
        with pytest.raises(AdmissionRejected, match="disk_free_bytes"):
            space.check()
        free = 60
        await trio.sleep(3)
        space.check()
        nursery.cancel_scope.cancel()
