"""Keys through the whole pipeline: their limit, and what a restart finds when the segments are gone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.errors import AdmissionRejected, ErrorCode
from arka.options import KIB
from arka.records import Operation, TableName, Tier
from arka.testing.simnode import NAME, SimNode, create_table, with_options
from arka.testing.simwriters import SCHEMA, frame_buffer
from arka.tiers.keys import KeyIndex
from arka.tiers.memory import Appended
from arka.tiers.pipeline import Pipeline
from arka.tiers.release import load_checkpoints
from arka.tiers.table import Table

BATCH = pa.record_batch([pa.array([1]), pa.array([0], pa.int32()), pa.array(["x"])], schema=SCHEMA)
LIMIT = 1000
RETENTION_S = 500.0


def make_node() -> SimNode:
    return SimNode(
        with_options(
            wal__segment_bytes=32 * KIB,
            wal__group_bytes=KIB,
            idempotency__keys=LIMIT,
            idempotency__retention_s=RETENTION_S,
        )
    )


def append(pipeline: Pipeline, table: Table, key: bytes) -> Appended:
    """Write the same batch each time: what differs would be another payload of the key."""
    _, buffer = frame_buffer(BATCH)
    return pipeline.append(table, buffer, rows=1, operation=Operation.UPSERT, key=key, charge=None)


async def test_a_full_index_refuses_new_keys_until_old_ones_expire(autojump_clock: MockClock) -> None:
    """At the limit a new key is ``overloaded``, nothing of it is remembered; known keys and keyless writes go on."""
    world = make_node()
    async with world.run(closes=True) as pipeline:
        table = await create_table(pipeline)
        lsns = [append(pipeline, table, b"%d" % number).lsn for number in range(LIMIT)]
        with pytest.raises(AdmissionRejected, match=r"idempotency\.keys") as caught:
            append(pipeline, table, b"new")
        assert caught.value.code is ErrorCode.OVERLOADED
        assert caught.value.retryable
        assert append(pipeline, table, b"7") == Appended(lsns[7], duplicate=True)
        assert append(pipeline, table, b"").lsn == lsns[-1] + 1
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    async with world.run(closes=True) as pipeline:
        table = await pipeline.tables.find(NAME)
        with pytest.raises(AdmissionRejected):
            append(pipeline, table, b"new")
        assert append(pipeline, table, b"7") == Appended(lsns[7], duplicate=True)
        # No commit comes any more: the keys go all the same.
        await trio.sleep(RETENTION_S + 5)
        assert not append(pipeline, table, b"new").duplicate
        assert not append(pipeline, table, b"7").duplicate


async def test_a_table_that_filled_the_index_does_not_stop_others(autojump_clock: MockClock) -> None:
    """New keys of other tables are taken while one table holds all that the limit allows, and its own are refused."""
    world = make_node()
    async with world.run(closes=True) as pipeline:
        hog = await create_table(pipeline)
        other = await create_table(pipeline, TableName("default", "other"))
        for number in range(LIMIT):
            append(pipeline, hog, b"%d" % number)
        # The other one first: nothing has been refused so far.
        assert not append(pipeline, other, b"first").duplicate
        with pytest.raises(AdmissionRejected, match=r"idempotency\.keys"):
            append(pipeline, hog, b"new")
        for number in range(LIMIT // 8 - 1):
            assert not append(pipeline, other, b"%d" % number).duplicate
        with pytest.raises(AdmissionRejected, match=r"idempotency\.keys"):
            append(pipeline, other, b"beyond")


async def test_released_keys_and_tables_come_back_from_checkpoints(autojump_clock: MockClock) -> None:
    """When the segments are gone, checkpoints give the keys and say which tables there are (R12, R21, R5)."""
    world = make_node()
    async with world.run(closes=True) as pipeline:
        table = await create_table(pipeline)
        other = await create_table(pipeline, TableName("default", "other"))
        lsns = []
        for number in range(200):
            lsns.append(append(pipeline, table, b"%d" % number).lsn)
            await pipeline.flush(table, Tier.DISK)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        known, log_uuid = list(pipeline.tables.remembered()), pipeline.log_uuid
        assert {item.info.uuid for item in known} == {table.info.uuid, other.info.uuid}
    assert len([name for name in world.disk.list_names(Path("/data/wal")) if name.endswith(".wal")]) == 1
    keys = KeyIndex(RETENTION_S, limit=LIMIT)
    loaded = await load_checkpoints(world.store, "n", log_uuid, RETENTION_S, keys)
    assert list(loaded.tables) == known
    assert loaded.clock_us > 0
    assert 0 < len(keys) < 200
    async with world.run(closes=True) as pipeline:
        table = await pipeline.tables.find(NAME)
        for number, lsn in enumerate(lsns):
            assert append(pipeline, table, b"%d" % number) == Appended(lsn, duplicate=True)
