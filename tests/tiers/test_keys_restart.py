"""Keys through the whole pipeline: their limit, and what a restart finds when the segments are gone."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.errors import AdmissionRejected, ErrorCode
from arka.options import KIB, IdempotencyOptions, Limits, Settings, WalOptions
from arka.records import Operation, TableDefinition, TableName, Tier
from arka.testing.simcatalog import SimCatalog
from arka.testing.simdisk import SimDisk
from arka.testing.simstore import SimStore
from arka.testing.simworld import compute_inline
from arka.testing.simwriters import SCHEMA, frame_buffer
from arka.tiers.keys import KeyIndex
from arka.tiers.memory import Appended
from arka.tiers.pipeline import Pipeline
from arka.tiers.release import load_checkpoints
from arka.tiers.startup import open_pipeline
from arka.tiers.table import Table

NAME = TableName("default", "t")
BATCH = pa.record_batch([pa.array([1]), pa.array([0], pa.int32()), pa.array(["x"])], schema=SCHEMA)
LIMIT = 1000
RETENTION_S = 500.0


class World:
    def __init__(self) -> None:
        self.disk, self.store = SimDisk(random.Random(0)), SimStore()
        self.catalog = SimCatalog(lambda piece, log_uuid: ())

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Pipeline]:
        async def read_range(path: Path, start: int, end: int) -> bytes:
            return self.disk.read(path)[start:end]

        opened = await open_pipeline(
            Settings(
                limits=Limits(disk_free_bytes=0),
                wal=WalOptions(segment_bytes=32 * KIB, group_bytes=KIB),
                idempotency=IdempotencyOptions(keys=LIMIT, retention_s=RETENTION_S),
            ),
            Path("/data"),
            disk=self.disk,
            store=self.store,
            catalog=self.catalog,
            disk_uuid=UUID(int=1),
            read_range=read_range,
            read_free=lambda: 1 << 40,
            survival={},
            rng=random.Random(0),
            compute=compute_inline,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(opened.pipeline.run)
            yield opened.pipeline
            await opened.pipeline.close()
            nursery.cancel_scope.cancel()


def append(pipeline: Pipeline, table: Table, key: bytes) -> Appended:
    _, buffer = frame_buffer(BATCH)
    return pipeline.append(table, buffer, rows=1, operation=Operation.UPSERT, key=key, charge=None)


async def test_a_full_index_refuses_new_keys_until_old_ones_expire(autojump_clock: MockClock) -> None:
    """At the limit a new key is ``overloaded``, nothing of it is remembered; known keys and keyless writes go on."""
    world = World()
    async with world.run() as pipeline:
        table, _ = await pipeline.create_table(TableDefinition(NAME, SCHEMA))
        lsns = [append(pipeline, table, b"%d" % number).lsn for number in range(LIMIT)]
        with pytest.raises(AdmissionRejected, match=r"idempotency\.keys") as caught:
            append(pipeline, table, b"new")
        assert caught.value.code is ErrorCode.OVERLOADED
        assert caught.value.retryable
        assert append(pipeline, table, b"7") == Appended(lsns[7], duplicate=True)
        assert append(pipeline, table, b"").lsn == lsns[-1] + 1
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    async with world.run() as pipeline:
        table = await pipeline.find_table(NAME)
        with pytest.raises(AdmissionRejected):
            append(pipeline, table, b"new")
        assert append(pipeline, table, b"7") == Appended(lsns[7], duplicate=True)
        # No commit comes any more: the keys go all the same.
        await trio.sleep(RETENTION_S + 5)
        assert not append(pipeline, table, b"new").duplicate
        assert not append(pipeline, table, b"7").duplicate


async def test_released_keys_and_tables_come_back_from_checkpoints(autojump_clock: MockClock) -> None:
    """When the segments are gone, checkpoints give the keys and say which tables there are (R12, R21, R5)."""
    world = World()
    async with world.run() as pipeline:
        table, _ = await pipeline.create_table(TableDefinition(NAME, SCHEMA))
        other, _ = await pipeline.create_table(TableDefinition(TableName("default", "other"), SCHEMA))
        lsns = []
        for number in range(200):
            lsns.append(append(pipeline, table, b"%d" % number).lsn)
            await pipeline.flush(table, Tier.DISK)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        infos, log_uuid = pipeline.table_infos(), pipeline.identity.log_uuid
        assert {info.uuid for info in infos} == {table.info.uuid, other.info.uuid}
    assert len([name for name in world.disk.list_names(Path("/data/wal")) if name.endswith(".wal")]) == 1
    keys = KeyIndex(RETENTION_S, limit=LIMIT)
    loaded = await load_checkpoints(world.store, "arka-0", log_uuid, RETENTION_S, keys)
    assert list(loaded.tables) == infos
    assert loaded.clock_us > 0
    assert 0 < len(keys) < 200
    async with world.run() as pipeline:
        table = await pipeline.find_table(NAME)
        for number, lsn in enumerate(lsns):
            assert append(pipeline, table, b"%d" % number) == Appended(lsn, duplicate=True)
