"""What the simulation found, each as the shortest history that shows it."""

from __future__ import annotations

import contextlib
import errno

import pytest
import trio
from trio.testing import MockClock

from arka.records import Tier
from arka.testing.simdisk import PowerCut
from arka.testing.simnode import NAME, SimNode, create_table, write


async def test_handshake_after_a_life_that_wrote_nothing(autojump_clock: MockClock) -> None:
    """A clean stop speaks for its own process only: what a later one gave and lost is below no handshake (R3)."""
    world = SimNode()
    async with world.run(closes=True) as pipeline:
        await create_table(pipeline)
    opened = await world.open()
    lost = write(opened.pipeline, await opened.pipeline.tables.find(NAME), 1).lsn
    world.disk.crash()
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        kept = write(pipeline, table, 1).lsn
        await pipeline.flush(table, Tier.DISK)
        assert kept > lost
        assert pipeline.resume_marks(table, kept)[Tier.DISK] < lost


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("after", range(5))
async def test_failed_fsync_of_the_state_then_power_cut(after: int, steps: int, autojump_clock: MockClock) -> None:
    """A state that only the page cache has is never told to the store: the disk is not called stale later (R6, R13)."""
    world = SimNode()
    await world.open()
    world.disk.kill()
    world.disk.fail_next("sync", errno.EIO, after=after)
    with contextlib.suppress(OSError):
        await world.open()
    world.disk.kill()
    world.disk.cut_power_after(steps)
    with contextlib.suppress(PowerCut):
        await world.open()
    world.disk.crash()
    await world.open()


@pytest.mark.parametrize("steps", range(8))
async def test_drain_hears_every_rise(steps: int, autojump_clock: MockClock) -> None:
    """The drain ends when the last commit lands, in whichever step of its own waiting that is."""
    world = SimNode()
    opened = await world.open()
    async with trio.open_nursery() as nursery:
        pipeline = opened.pipeline
        await nursery.start(pipeline.run)
        table = await create_table(pipeline)
        await pipeline.flush(table, Tier.DISK)
        table.last_lsn = pipeline.memory.last_lsn
        with trio.fail_after(1000):
            async with trio.open_nursery() as waiting:
                waiting.start_soon(pipeline.wait_drained)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                table.committed.advance(table.last_lsn)
        nursery.cancel_scope.cancel()


async def test_drain_of_a_life_without_a_write(autojump_clock: MockClock) -> None:
    """A server that got no write after a stop in order drains at once: its first LSNs were given to nobody."""
    world = SimNode()
    async with world.run(closes=True) as pipeline:
        table = await create_table(pipeline)
        write(pipeline, table, 1)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        # Its tables are quiet, so that the next life has nothing to record.
        await trio.sleep(3)
    async with world.run(closes=True) as pipeline:
        with trio.fail_after(100):
            await pipeline.wait_drained()
