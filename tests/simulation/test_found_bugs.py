"""What the simulation found, each as the shortest history that shows it."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.options import KIB, Limits, Settings, WalOptions
from arka.records import Operation, TableDefinition, TableName, Tier
from arka.testing.simcatalog import SimCatalog
from arka.testing.simdisk import PowerCut, SimDisk
from arka.testing.simstore import SimStore
from arka.testing.simworld import compute_inline
from arka.testing.simwriters import SCHEMA, frame_buffer
from arka.tiers.pipeline import Pipeline
from arka.tiers.startup import OpenLog, Surroundings, open_pipeline
from arka.tiers.table import Table

NAME = TableName("default", "t")
BATCH = pa.record_batch([pa.array([1]), pa.array([0], pa.int32()), pa.array(["x"])], schema=SCHEMA)


class World:
    def __init__(self) -> None:
        self.disk = SimDisk(random.Random(0))
        self.store = SimStore()
        self.checkpoints = SimStore()
        self.catalog = SimCatalog(lambda piece, log_uuid: ())

    async def open(self) -> OpenLog:
        async def read_range(path: Path, start: int, end: int) -> bytes:
            return self.disk.read(path)[start:end]

        surroundings = Surroundings(
            disk=self.disk,
            disk_uuid=UUID(int=1),
            store=self.store,
            checkpoints=self.checkpoints,
            catalog=self.catalog,
            read_range=read_range,
            read_free=lambda: 1 << 40,
            survival={},
            rng=random.Random(0),
            compute=compute_inline,
        )
        settings = Settings(limits=Limits(disk_free_bytes=0), wal=WalOptions(segment_bytes=32 * KIB))
        return await open_pipeline(settings, Path("/data"), surroundings)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Pipeline]:
        opened = await self.open()
        async with trio.open_nursery() as nursery:
            await nursery.start(opened.pipeline.run)
            yield opened.pipeline
            nursery.cancel_scope.cancel()


def append(pipeline: Pipeline, table: Table) -> int:
    _, buffer = frame_buffer(BATCH)
    return pipeline.append(table, buffer, rows=1, operation=Operation.UPSERT, key=b"", charge=None).lsn


async def test_handshake_after_a_life_that_wrote_nothing(autojump_clock: MockClock) -> None:
    """A clean stop speaks for its own process only: what a later one gave and lost is below no handshake (R3)."""
    world = World()
    async with world.run() as pipeline:
        await pipeline.tables.create(TableDefinition(NAME, SCHEMA))
        await pipeline.close()
    opened = await world.open()
    lost = append(opened.pipeline, await opened.pipeline.tables.find(NAME))
    world.disk.crash()
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        kept = append(pipeline, table)
        await pipeline.flush(table, Tier.DISK)
        assert kept > lost
        assert pipeline.resume_marks(table, kept)[Tier.DISK] < lost


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("after", range(5))
async def test_failed_fsync_of_the_state_then_power_cut(after: int, steps: int, autojump_clock: MockClock) -> None:
    """A state that only the page cache has is never told to the store: the disk is not called stale later (R6, R13)."""
    world = World()
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
    world = World()
    opened = await world.open()
    async with trio.open_nursery() as nursery:
        pipeline = opened.pipeline
        await nursery.start(pipeline.run)
        table, _ = await pipeline.tables.create(TableDefinition(NAME, SCHEMA))
        await pipeline.flush(table, Tier.DISK)
        table.last_lsn = pipeline.memory.last_lsn
        with trio.fail_after(1000):
            async with trio.open_nursery() as waiting:
                waiting.start_soon(pipeline.wait_drained)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                table.committed.advance(table.last_lsn)
        nursery.cancel_scope.cancel()
