"""A write that alone cannot be written is set aside; every other one is committed (R32)."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
import trio
from trio.testing import MockClock

from arka.errors import ArkaError, DataCorruption, ErrorCode
from arka.flight.acks import AckForm, AckQueue
from arka.records import AckMessage, Tier
from arka.storage.ports import (
    CatalogUnavailable,
    CommitJob,
    CommitResult,
    StagedFiles,
    TableFrames,
    UnwritableRows,
    WarehouseChanged,
)
from arka.testing.answers import CollectedAnswer
from arka.testing.simnode import NAME, SimNode, create_table, write, write_all
from arka.testing.simworld import ProcessCatalog
from arka.testing.simwriters import parse_acks
from arka.tiers.aside import load_asides
from arka.tiers.reads import ReadRequest, read_table
from arka.tiers.watermarks import Advance
from arka.wal.asidefile import parse_aside


@pytest.fixture
def world() -> SimNode:
    world = SimNode()
    world.catalog.poison.add(7)
    return world


async def test_the_others_are_committed_and_it_is_kept(autojump_clock: MockClock, world: SimNode) -> None:
    """One write of twenty cannot be written: the others are in the table once, and it is in the store, whole."""
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        with trio.fail_after(600):
            await write_all(pipeline, table, range(20), Tier.ICEBERG_COMMITTED)
        assert world.ids() == [n for n in range(20) if n != 7]
        (key,) = world.keys_of("aside")
        found = parse_aside(key, key, world.store.objects[key])
        assert {found.lsn} == set(table.asides)
        assert "cannot be written" in found.reason
        frames = [frame for _, frame in found.object.frames() if frame.lsn]
        assert [frame.lsn for frame in frames] == [found.lsn]
        assert frames[0].key_bytes == len(b"k7")
        marks = pipeline.resume_marks(table, pipeline.memory.last_lsn)
        assert marks[Tier.ICEBERG_COMMITTED] < found.lsn <= marks[Tier.OBJECT_STORAGE]


@pytest.mark.parametrize("lost", [False, True])
async def test_its_key_is_answered_after_a_restart(autojump_clock: MockClock, world: SimNode, lost: bool) -> None:
    """A resend is told ``set_aside``, by the same process, after a restart and after the loss of the node."""

    async def resend(pipeline: object, table: object) -> str:
        with pytest.raises(ArkaError) as caught:
            write(pipeline, table, 7, b"k7")  # type: ignore[arg-type]
        assert caught.value.code is ErrorCode.SET_ASIDE
        return caught.value.detail

    async with world.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(20), Tier.ICEBERG_COMMITTED)
        told = await resend(pipeline, table)
    if lost:
        world.lose_disk()
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert await resend(pipeline, table) == told
        await write_all(pipeline, table, range(20, 25), Tier.ICEBERG_COMMITTED)
        assert await resend(pipeline, table) == told
        assert world.ids() == [n for n in range(25) if n != 7]


async def test_those_of_a_discarded_log_say_nothing(autojump_clock: MockClock, world: SimNode) -> None:
    """LSNs belong to a log (R1): another one on the same disk does not take its own writes for set aside."""
    async with world.run() as pipeline:
        await write_all(pipeline, await create_table(pipeline), range(10), Tier.ICEBERG_COMMITTED)
        log_uuid = pipeline.log_uuid
    assert (await load_asides(world.disk.checkpoints, "n", log_uuid, {})).known
    assert (await load_asides(world.disk.checkpoints, "n", UUID(int=9), {})) == ({}, {})


async def test_a_death_before_the_commit_passes_it(autojump_clock: MockClock, world: SimNode) -> None:
    """A process that dies between setting it aside and the commit leaves it to the next one, which does not try it."""
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        world.weather.fault_share = 0.0
        for number in range(10):
            write(pipeline, table, number, b"k%d" % number)
        with trio.fail_after(600):
            while not world.keys_of("aside"):
                await trio.lowlevel.checkpoint()
                await trio.sleep(0.001)
    # It could be written now: its client may have been told that it never will be.
    world.catalog.poison.clear()
    async with world.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert world.ids() == [n for n in range(10) if n != 7]


async def test_reads_leave_it_out_at_once(
    autojump_clock: MockClock, world: SimNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its writer is told that it is not in the table: no read finds it, also before a commit has passed it (R25)."""
    commit = ProcessCatalog.commit

    async def stuck(self: ProcessCatalog, job: CommitJob) -> CommitResult:
        if not job.staged.files:
            await trio.sleep_forever()
        return await commit(self, job)

    monkeypatch.setattr(ProcessCatalog, "commit", stuck)
    for life in range(2):
        async with world.run() as pipeline:
            table = await create_table(pipeline)
            if life == 0:
                await write_all(pipeline, table, range(20), Tier.OBJECT_STORAGE)
            with trio.fail_after(600):
                while not table.asides:
                    await trio.sleep(0.1)
            assert max(world.ids()) < 7
            answer = CollectedAnswer()
            await read_table(pipeline, table, ReadRequest(("id",)), answer)
            assert sorted(row["id"] for row in answer.rows()) == [n for n in range(20) if n != 7]


async def test_it_waits_for_the_store(autojump_clock: MockClock, world: SimNode) -> None:
    """No commit passes it before it is in the store."""
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        put = world.store.put_new

        async def refuse(key: str, parts: object) -> None:
            if "/aside/" in key:
                await trio.sleep_forever()
            await put(key, parts)  # type: ignore[arg-type]

        world.store.put_new = refuse  # type: ignore[method-assign]
        for number in range(10):
            write(pipeline, table, number, b"k%d" % number)
        await trio.sleep(300)
        assert world.ids() == list(range(7))
        assert not table.asides


@pytest.mark.parametrize("error", [CatalogUnavailable("OSError: [Errno 28] no space"), CatalogUnavailable("killed")])
async def test_nothing_else_sets_a_write_aside(
    autojump_clock: MockClock, world: SimNode, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write whose error in a fresh worker is an outage is tried again, however often that happens."""
    world.catalog.poison.clear()

    async def encode(self: object, job: object, *, fresh: bool = False) -> object:
        await trio.sleep(0.01)
        if fresh:
            counts.append(1)
            raise error
        raise UnwritableRows("at first sight")

    counts: list[int] = []
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        monkeypatch.setattr(type(pipeline.tables.catalog), "encode", encode)
        write(pipeline, table, 1, b"k1")
        await trio.sleep(300)
        assert len(counts) > 10
        assert not table.asides
        assert not world.keys_of("aside")


def acks_of(queue: AckQueue) -> list[AckMessage]:
    return parse_acks(queue.take(1 << 20))


@pytest.fixture
def queue() -> AckQueue:
    made = AckQueue()
    made.form = AckForm.METADATA
    return made


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("coalesce", [False, True])
def test_its_last_ack_is_the_error(queue: AckQueue, read_before: bool, coalesce: bool) -> None:
    """It has its acks of the earlier tiers, then the error in its place; the writes beside it are acked as ever."""
    queue.coalesce = coalesce
    for lsn in (1, 2, 3):
        queue.accept(lsn, 1, Tier.ICEBERG_COMMITTED)
    for tier in (Tier.DISK, Tier.OBJECT_STORAGE):
        queue.advance(Advance(tier, 3, 10))
    seen = acks_of(queue) if read_before else []
    queue.set_aside(2, "no such value")
    queue.advance(Advance(Tier.ICEBERG_COMMITTED, 1, 20, 77))
    seen += acks_of(queue)
    assert not any(ack.error for ack in seen)
    queue.advance(Advance(Tier.ICEBERG_COMMITTED, 3, 30, 78))
    seen += acks_of(queue)
    last = [(ack.sequence, ack.lsn, ack.code) for ack in seen if ack.durability_level == "iceberg_committed"]
    assert last == [(0, 1, None), (1, 2, "set_aside"), (2, 3, None)]
    assert queue.settled
    if not coalesce:
        levels = [ack.durability_level for ack in seen if ack.sequence == 1]
        assert levels == ["memory", "disk", "object_storage", "iceberg_committed"]


def test_a_write_that_asked_for_less_is_not_told(queue: AckQueue) -> None:
    """A write that asked for a disk ack has had its last ack."""
    queue.accept(1, 1, Tier.DISK)
    queue.advance(Advance(Tier.DISK, 1, 10))
    assert [ack.durability_level for ack in acks_of(queue)] == ["memory", "disk"]
    queue.set_aside(1, "no such value")
    queue.advance(Advance(Tier.OBJECT_STORAGE, 1, 10))
    queue.advance(Advance(Tier.ICEBERG_COMMITTED, 1, 10))
    assert acks_of(queue) == []
    assert queue.settled


def test_a_damaged_one_is_found() -> None:
    """A byte that changed is told, with the object."""
    with pytest.raises(DataCorruption, match="n/aside"):
        parse_aside("n/aside/x/1", "n/aside/x/1", b"\0\0\0\0nonsense")


async def test_warehouse_that_becomes_another_meanwhile(
    autojump_clock: MockClock, world: SimNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the warehouse that the try in a fresh worker meets is waited for, and ends nothing (R28)."""
    encode = ProcessCatalog.encode
    met = []

    async def changed(self: ProcessCatalog, job: TableFrames, *, fresh: bool = False) -> StagedFiles:
        if fresh and not met:
            met.append(job)
            raise WarehouseChanged("the warehouse is another one than before")
        return await encode(self, job, fresh=fresh)

    monkeypatch.setattr(ProcessCatalog, "encode", changed)
    async with world.run() as pipeline:
        table = await create_table(pipeline)
        with trio.fail_after(600):
            await write_all(pipeline, table, range(20), Tier.ICEBERG_COMMITTED)
    assert met
    assert world.ids() == [n for n in range(20) if n != 7]
