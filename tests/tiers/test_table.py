"""The committer: cuts go into Iceberg in order and once, whatever the catalog answers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka._core.framing import KIND_CREATE, KIND_DROP
from arka._core.lsn import LsnAllocator, LsnExhausted
from arka.errors import ErrorCode, Fenced, InternalError
from arka.lineage import NO_STARTS
from arka.options import IcebergOptions
from arka.records import TableInfo, TableName, TableType, Tier
from arka.storage.ports import (
    CatalogUnavailable,
    CommitJob,
    CommitOutcome,
    CommitResult,
    StagedFiles,
    TableFrames,
)
from arka.testing.simdisk import SimDisk
from arka.tiers.adoption import Adoption
from arka.tiers.backlog import Cut
from arka.tiers.committer import TableCommitter
from arka.tiers.keys import KeyIndex
from arka.tiers.memory import LEFT_FOR_OUTCOMES, MemoryTier
from arka.tiers.table import Table, TableState
from arka.tiers.warehouse import WarehouseWatch
from arka.tiers.watch import Effort
from arka.tiers.watermarks import Watermark
from arka.wal.committed import CommittedMarks

LOG = UUID(int=7)
SCHEMA = pa.schema([pa.field("id", pa.int64(), metadata={"PARQUET:field_id": "1"})])


class ScriptedCatalog:
    """Answers encode and commit from a script; without one, everything commits."""

    def __init__(self) -> None:
        self.encoded: list[tuple[int, int]] = []
        self.commits: list[CommitJob] = []
        self.answers: list[CommitResult | Exception] = []
        self.encode_errors: list[Exception] = []

    async def encode(self, job: TableFrames, *, fresh: bool = False) -> StagedFiles:
        await trio.sleep(0.01)
        self.encoded.append((job.after_lsn, job.through_lsn))
        if self.encode_errors:
            raise self.encode_errors.pop(0)
        return StagedFiles(job.after_lsn, job.through_lsn, (), 0)

    async def look_at(self, table: TableInfo) -> None:
        await trio.sleep(0.01)

    async def commit(self, job: CommitJob) -> CommitResult:
        await trio.sleep(0.01)
        self.commits.append(job)
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer or CommitResult(CommitOutcome.COMMITTED, job.staged.through_lsn, len(self.commits))


class Bench:
    def __init__(self, options: IcebergOptions | None = None) -> None:
        info = TableInfo(
            uuid4(), TableName("default", "t"), SCHEMA, 0, TableType.APPEND_ONLY, (), 0, (), "file:///t-00000000", {}
        )
        self.table = Table(info, 0, None)
        self.catalog = ScriptedCatalog()
        self.objects = Watermark(Tier.OBJECT_STORAGE)
        self.lsn = 0
        self.superseded = False
        self.disk = SimDisk(random.Random(1))
        self.disk.make_directory(Path("/wal"))
        memory = MemoryTier(LsnAllocator(1, 1000), KeyIndex(60.0, limit=1000))
        self.committer = TableCommitter(
            self.table,
            self.catalog,
            self.objects,
            log_uuid=LOG,
            epoch=lambda: 3,
            lineage=lambda: NO_STARTS,
            wait_verified=self.wait_verified,
            options=options or IcebergOptions(),
            rng=random.Random(1),
            watch=WarehouseWatch(None, self.catalog, lambda: ()),
            on_committed=lambda table: None,
            adoption=Adoption(self.catalog, memory, log_uuid=LOG, adopt_s=1.0, look_for=self.look_for),
            set_aside=self.keep_aside,
            marks=CommittedMarks(Path("/wal"), self.disk, LOG, {}),
        )

    async def wait_verified(self, effort: Effort) -> None:
        if self.superseded:
            raise Fenced("epoch 4 was taken")

    async def look_for(self, table: Table) -> None:
        raise AssertionError(f"{table.info.name} is under its name")

    async def keep_aside(self, table: Table, cut: Cut, reason: str) -> None:
        table.set_aside(cut.through_lsn, reason)

    def write(self, count: int = 1, frame_bytes: int = 64) -> None:
        for _ in range(count):
            self.lsn += 1
            self.table.last_lsn = self.lsn
            self.table.note_recovered("segment", 1, 3, self.lsn, self.lsn * 64, frame_bytes)
        self.table.wake()


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    bench = Bench()
    nursery.start_soon(bench.committer.run)
    return bench


async def test_commits_only_what_the_object_store_has(autojump_clock: MockClock, bench: Bench) -> None:
    """A commit never holds an LSN above the object_storage watermark (R4)."""
    bench.write(5)
    await trio.sleep(5)
    assert bench.catalog.encoded == []
    bench.objects.advance(3)
    await bench.table.committed.wait_reached(3)
    assert bench.catalog.encoded == [(0, 3)]
    bench.objects.advance(9)
    await bench.table.committed.wait_reached(5)
    assert bench.catalog.encoded == [(0, 3), (3, 5)]


async def test_nothing_new_makes_no_commit(autojump_clock: MockClock, bench: Bench) -> None:
    """An idle table makes no snapshots."""
    bench.write()
    bench.objects.advance(1)
    await trio.sleep(60)
    assert len(bench.catalog.commits) == 1


async def test_unknown_outcome_is_asked_again_with_the_same_files(autojump_clock: MockClock, bench: Bench) -> None:
    """After a lost response the very same commit is tried again: nothing is encoded twice (R16)."""
    bench.catalog.answers = [CatalogUnavailable("timeout"), CatalogUnavailable("timeout")]
    bench.write()
    bench.objects.advance(1)
    await bench.table.committed.wait_reached(1)
    assert len(bench.catalog.encoded) == 1
    assert len(bench.catalog.commits) == 3
    assert len({job.commit_id for job in bench.catalog.commits}) == 1


async def test_recut_after_a_commit_that_had_landed(autojump_clock: MockClock, bench: Bench) -> None:
    """A table that stands further than we knew moves the mark; only the rest is committed again."""
    bench.catalog.answers = [CommitResult(CommitOutcome.RECUT, 2, 77)]
    bench.write(4)
    bench.objects.advance(4)
    await bench.table.committed.wait_reached(4)
    assert bench.catalog.encoded == [(0, 4), (2, 4)]


async def test_rollback_stops_the_table(autojump_clock: MockClock, bench: Bench) -> None:
    """A table below what was committed is stopped with both numbers; nothing is replayed (R20)."""
    endings = []
    bench.table.listen_end(endings.append)
    bench.write()
    bench.objects.advance(1)
    await bench.table.committed.wait_reached(1)
    bench.catalog.answers = [CommitResult(CommitOutcome.RECUT, 0, 5)]
    bench.write()
    bench.objects.advance(2)
    while bench.table.state is TableState.ACTIVE:
        await trio.sleep(0.1)
    (ending,) = endings
    assert ending.code is ErrorCode.OUTCOME_UNKNOWN
    assert "LSN 0" in ending.detail
    assert "1 was committed" in ending.detail
    with pytest.raises(Exception, match="stands at LSN 0") as refused:
        bench.table.check_active()
    assert refused.value.code is ErrorCode.TABLE_STOPPED


async def test_a_gone_table_keeps_its_frames(autojump_clock: MockClock) -> None:
    """A committer whose table is not under its name any more says so, and leaves the backlog as it is (R18)."""
    bench = Bench()
    bench.catalog.answers = [CommitResult(CommitOutcome.TABLE_GONE, 0, None)]
    bench.write()
    bench.objects.advance(1)
    assert await bench.committer.run()
    assert bench.table.state is TableState.ACTIVE
    assert bench.table.backlog.first_lsn == 1


async def test_failures_that_do_not_pass_stop_the_table(autojump_clock: MockClock, bench: Bench) -> None:
    """A definite failure is tried a few times, then the table is stopped instead of looping for ever."""
    bench.catalog.encode_errors = [InternalError("broken")] * 50
    bench.write()
    bench.objects.advance(1)
    await trio.sleep(120)
    assert bench.table.state is TableState.STOPPED
    assert len(bench.catalog.encoded) == 5


async def test_epoch_of_another_copy_stops_the_table(autojump_clock: MockClock) -> None:
    """A higher epoch in the table than in the log's own store is another copy's: the table stops (R29)."""
    bench = Bench()
    bench.catalog.answers = [CommitResult(CommitOutcome.FENCED, 7, None)]
    bench.write()
    bench.objects.advance(1)
    await bench.committer.run()
    assert bench.table.state is TableState.STOPPED
    assert "Another copy of this data directory" in bench.table.ending_detail
    assert bench.table.committed.lsn == 0


async def test_fenced_ends_the_committer(autojump_clock: MockClock) -> None:
    """A higher epoch's commit ends this process: the error leaves the committer."""
    bench = Bench()
    bench.superseded = True
    bench.catalog.answers = [CommitResult(CommitOutcome.FENCED, 0, None)]
    bench.write()
    bench.objects.advance(1)
    with pytest.raises(Fenced):
        await bench.committer.run()


async def test_dropped_while_the_catalog_is_away(autojump_clock: MockClock, bench: Bench) -> None:
    """A dropped table's committer ends although the catalog never answers."""
    from arka.tiers.ddl import dropped

    bench.catalog.answers = [CatalogUnavailable("away")] * 1000
    bench.write()
    bench.objects.advance(1)
    await trio.sleep(2)
    bench.table.end(dropped(bench.table.info))
    await trio.sleep(60)
    tried = len(bench.catalog.commits)
    await trio.sleep(600)
    assert len(bench.catalog.commits) == tried


async def test_full_commits_follow_each_other(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """With as much waiting as a commit may take, none is paused for; a small rest comes with the interval."""
    bench = Bench(IcebergOptions(commit_bytes=1 << 20, commit_interval_s=5.0))
    for _ in range(8):
        bench.write(frame_bytes=(1 << 19) - 64)
    bench.write(frame_bytes=4096)
    nursery.start_soon(bench.committer.run)
    started = trio.current_time()
    bench.objects.advance(bench.lsn)
    await bench.table.committed.wait_reached(8)
    assert trio.current_time() - started < 0.2
    await bench.table.committed.wait_reached(9)
    assert trio.current_time() - started > 4.0
    assert [through - after for after, through in bench.catalog.encoded] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("slow_s", [0.0, 30.0])
async def test_an_outage_slows_nothing_down(autojump_clock: MockClock, bench: Bench, slow_s: float) -> None:
    """After an outage commits follow each other as before: its time is no cost, and a long attempt has a cap (R35)."""
    bench.objects.advance(1_000)
    bench.catalog.answers = [CatalogUnavailable("away") for _ in range(20)]
    real = bench.catalog.commit

    async def commit(job: CommitJob) -> CommitResult:
        if len(bench.catalog.answers) == 1:
            # The last attempt waits for the catalog and is then answered.
            bench.catalog.answers.clear()
            await trio.sleep(slow_s)
        return await real(job)

    bench.catalog.commit = commit  # type: ignore[method-assign]
    started = trio.current_time()
    bench.write()
    await bench.table.committed.wait_reached(1)
    recovered = trio.current_time()
    assert recovered - started > 30
    for lsn in range(2, 6):
        bench.write()
        await bench.table.committed.wait_reached(lsn)
    assert trio.current_time() - recovered < 4 * 4 * IcebergOptions().commit_interval_s + 1
    bench.write()
    waited = trio.current_time()
    await bench.table.committed.wait_reached(6)
    assert trio.current_time() - waited < 1


def test_nothing_was_accepted_between_two_changes_without_a_write() -> None:
    """Of schemas that came one after another without a write, the last one alone is what writes are bound to (R24)."""
    table = Bench().table
    first = table.info
    for schema_id in (1, 2, 3):
        table.bind(replace(first, schema_id=schema_id), 5)
    found = [(info.schema_id, last_lsn) for info, last_lsn in table.bindings(0, 9)]
    assert found == [(0, 4), (3, 9)]


def test_what_is_owed_comes_first() -> None:
    """Records that had no LSN precede what comes once there are some, drops too; one for each table (R5, R31)."""
    allocator = LsnAllocator(1, 1)
    memory = MemoryTier(allocator, KeyIndex(60.0, limit=1000))
    one, other = uuid4(), uuid4()
    for table, payload in ((one, b"old"), (other, b"other"), (one, b"new")):
        memory.owe(table, KIND_CREATE, payload)
    for ceiling in (1, 2, 3):
        allocator.raise_ceiling(LEFT_FOR_OUTCOMES + ceiling)
        with pytest.raises(LsnExhausted):
            memory.append_control(KIND_DROP, b"drop")
    allocator.raise_ceiling(LEFT_FOR_OUTCOMES + 4)
    assert memory.append_control(KIND_DROP, b"drop") == 3
    frames = memory.take_group(1 << 20).frames
    assert [(frame.lsn, frame.kind) for frame in frames] == [(1, KIND_CREATE), (2, KIND_CREATE), (3, KIND_DROP)]
    assert [frame.payload for frame in frames] == [b"new", b"other", b"drop"]
