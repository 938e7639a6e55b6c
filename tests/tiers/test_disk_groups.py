"""When a group goes to disk: at once if somebody waits for it, in company if nobody does."""

from __future__ import annotations

import pyarrow as pa
import trio
from trio.testing import MockClock

from arka.records import Operation, Tier
from arka.testing.simnode import SimNode, create_table, with_options
from arka.testing.simwriters import SCHEMA, frame_buffer
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table

LINGER_S = 0.25


def write(pipeline: Pipeline, table: Table, requested: Tier, size: int = 10) -> int:
    batch = pa.record_batch([[1], pa.array([0], pa.int32()), ["x" * size]], schema=SCHEMA)
    _, buffer = frame_buffer(batch)
    appended = pipeline.append(
        table, buffer, rows=1, operation=Operation.UPSERT, key=b"", charge=None, requested=requested
    )
    return appended.lsn


async def seconds_to_disk(pipeline: Pipeline, table: Table, lsn: int) -> float:
    started = trio.current_time()
    await pipeline.marks_of(table)[0].wait_reached(lsn)
    return trio.current_time() - started


async def test_writes_that_nobody_waits_for_go_in_company(autojump_clock: MockClock) -> None:
    """A memory ack asks for no fsync: such writes linger, until one comes that does, or enough of them."""
    node = SimNode(with_options(wal__group_linger_s=LINGER_S, wal__group_bytes=64 << 10))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        # Its own record does not linger, nor does the one that says that it is written to (R37).
        await trio.sleep(1)
        assert await seconds_to_disk(pipeline, table, write(pipeline, table, Tier.MEMORY)) == 0
        assert await seconds_to_disk(pipeline, table, write(pipeline, table, Tier.MEMORY)) == LINGER_S
        assert await seconds_to_disk(pipeline, table, write(pipeline, table, Tier.DISK)) == 0
        first = write(pipeline, table, Tier.MEMORY)
        await trio.sleep(LINGER_S / 2)
        write(pipeline, table, Tier.ICEBERG_COMMITTED)
        assert await seconds_to_disk(pipeline, table, first) == 0
        last = [write(pipeline, table, Tier.MEMORY, size=20_000) for _ in range(4)][-1]
        assert await seconds_to_disk(pipeline, table, last) == 0


async def test_a_stop_does_not_linger(autojump_clock: MockClock) -> None:
    """What waits for company is written at once when the log is closed."""
    node = SimNode(with_options(wal__group_linger_s=1.0))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        lsn = write(pipeline, table, Tier.MEMORY)
        started = trio.current_time()
        await trio.sleep(0.01)
        await pipeline.close()
        assert trio.current_time() - started < 1.0
        assert pipeline.marks_of(table)[0].lsn == lsn
