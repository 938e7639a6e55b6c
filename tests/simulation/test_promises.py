"""Every promise holds in every simulated history, and the checkers catch an engine that breaks one."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.iceberg import timestamps
from arka.records import AckMessage, Tier
from arka.storage.ports import (
    CatalogUnavailable,
    CommitJob,
    CommitMark,
    CommitOutcome,
    CommitResult,
    FilesMissing,
    StagedFilesMissing,
    UnwritableRows,
)
from arka.testing import simcatalog, simworld
from arka.testing.simcatalog import SimCatalog
from arka.testing.simpromises import PromiseBroken, Promises, StreamAcks, Write
from arka.testing.simulation import Outcome, simulate
from arka.testing.simwarehouse import SimWarehouse
from arka.testing.simworld import Trace
from arka.testing.steplimit import StepLimit
from arka.tiers.adoption import Adoption
from arka.tiers.aside import Aside
from arka.tiers.committer import TableCommitter
from arka.tiers.cutsize import CutSize
from arka.tiers.disk import DiskTier
from arka.tiers.effects import Effects
from arka.tiers.epochs import EpochLease
from arka.tiers.keys import KeyIndex
from arka.tiers.logclock import LogClock
from arka.tiers.pipeline import Pipeline
from arka.tiers.replay import TableFrames
from arka.tiers.room import Room
from arka.tiers.table import Table
from arka.tiers.uplink import Patience
from arka.tiers.warehouse import WarehouseWatch
from arka.tiers.watermarks import now_us
from arka.wal import logstate, seal, writer
from arka.wal.committed import CommittedMarks

#: Within so many seeds a broken engine has to be caught.
CATCH_SEEDS = 150

# Fifty histories, or 150 of a broken engine, take minutes of two cores, which other tests use as well.
pytestmark = pytest.mark.timeout(1200)


def test_promises_hold(seeds: range) -> None:
    """Nothing acked is lost, doubled or reordered, whatever befalls disk, store, catalog and process."""
    counts: Counter[str] = Counter()
    failed: list[Outcome] = []
    for outcome in map(simulate, seeds):
        counts.update(outcome.counts)
        if outcome.broken is not None:
            failed.append(outcome)
    print(f"{len(seeds)} seeds: " + ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items())))
    assert not failed, "\n\n".join(outcome.describe() for outcome in failed[:3])


@pytest.mark.parametrize("seed", [1, 8, 68])
def test_same_seed_same_trace(seed: int) -> None:
    """A seed is a whole history: run again, event by event the same, also beside another hash seed."""
    here = simulate(seed)
    assert here.trace == simulate(seed).trace
    assert here.trace


def test_running_in_circles_ends() -> None:
    """A history that takes more steps than any may is ended, and known for it."""

    async def circle(scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await trio.lowlevel.checkpoint()

    limit = StepLimit(1000)
    trio.run(circle, limit.scope, instruments=[limit])
    assert limit.broken is not None
    assert "circles" in limit.broken


def test_standing_still_ends() -> None:
    """A history in which every task waits for another one is ended, and known for it."""

    async def stand(scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(1000)
            await trio.sleep_forever()

    limit = StepLimit()
    trio.run(stand, limit.scope, clock=MockClock(autojump_threshold=0), instruments=[limit])
    assert limit.broken is not None
    assert "waits for another" in limit.broken


def catch(*faults: str, says: str = "") -> str:
    """Run seeds until a promise breaks; says which.

    Args:
        faults: of ``FAULTS``, those that show the mutant soon; none given: the seeds choose.
        says: a pattern of what is to be found; what other promises the mutant breaks is passed over.
    """
    others = []
    for seed in range(CATCH_SEEDS):
        outcome = simulate(seed, faults)
        if outcome.broken is not None and re.search(says, outcome.broken):
            return outcome.broken
        if outcome.broken is not None:
            others.append(outcome.broken)
    pytest.fail(f"{CATCH_SEEDS} seeds found nothing of the kind wrong with a broken engine, but {others}")


def test_catches_shortage_as_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that takes a lack of descriptors or memory for a failed write is caught (R31)."""
    for module in (writer, logstate, seal):
        monkeypatch.setattr(module, "short_of", lambda *_: nullcontext())
    assert "for lack of something" in catch("shortage")


@pytest.mark.long
def test_catches_silent_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that watches its tiers and not its tables is caught (R35)."""
    monkeypatch.setattr(Pipeline, "_watched_tables", lambda self: iter(()))
    assert "nobody says so" in catch()


def test_catches_times_that_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots dated by the wall clock alone are caught by a clock that jumps (R34)."""
    monkeypatch.setattr(simcatalog, "time_after", lambda newest: timestamps.now_ms())
    assert "go back" in catch()


def test_catches_ack_before_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that raises the disk mark before the group is fsynced is caught."""

    async def run(self: Any) -> None:
        while await self._memory.wait_pending():
            group = self._memory.take_group(self._group_bytes)
            last_lsn = group.last_lsn
            self._watermark.advance(last_lsn)
            for appended in await self._writer.append(group.frames):
                self._on_durable(appended)
            for charge in group.charges:
                charge.release()

    monkeypatch.setattr(DiskTier, "run", run)
    assert "acked disk" in catch()


def test_catches_key_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that forgets keys at a restart is caught: a resend gets an LSN of its own, or doubles its rows."""
    take = TableFrames.take

    def forget(self: Any, frame: Any) -> None:
        take(self, frame)
        self._keys.clear()

    monkeypatch.setattr(TableFrames, "take", forget)
    broken = catch()
    assert "and got" in broken or "twice" in broken


def test_catches_key_missing_in_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose checkpoints carry no keys is caught once segments are deleted (R12, R21)."""

    def nothing(self: KeyIndex, through_lsn: int) -> Iterator[tuple[UUID, bytes]]:
        return iter(())

    monkeypatch.setattr(KeyIndex, "uncovered", nothing)
    broken = catch()
    assert "and got" in broken or "twice" in broken


def test_catches_blind_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that is repeated without a look at the table's own mark is caught (R15, R16)."""
    snapshot_ids = count(500_000)

    def commit(self: Any, job: CommitJob) -> CommitResult:
        table = self._tables.get(job.table.name)
        if table is None or table.info.uuid != job.table.uuid:
            return CommitResult(CommitOutcome.TABLE_GONE, 0, None)
        for file in job.staged.files:
            table.changes += self._staged[file.path]
        table.snapshots.append(next(snapshot_ids))
        token = job.lineage.token_for(job.table.uuid, job.epoch, job.staged.through_lsn)
        table.marks[job.log_uuid] = CommitMark(job.log_uuid, job.staged.through_lsn, job.epoch, token)
        return CommitResult(CommitOutcome.COMMITTED, job.staged.through_lsn, table.snapshots[-1])

    monkeypatch.setattr(SimCatalog, "_commit", commit)
    # A commit that doubled rows, or a read that found them.
    assert catch(says="twice|rows of write")


def test_catches_epoch_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not look for a newer epoch before it acks is caught once it has been frozen (R10)."""

    async def verify(self: EpochLease) -> None:
        return None

    monkeypatch.setattr(EpochLease, "verify", verify)
    # An ack for what the new owner has not, an LSN that it has given to another write, or an epoch that is behind.
    says = r"(acked|had LSN \d+ at) (object_storage|iceberg_committed)|was taken after"
    assert catch("freeze", "cut off", says=says)


def test_catches_retention_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that keeps keys by the wall clock is caught where that jumps between two lives (R3, R21)."""
    ahead_us = 0

    def start(self: LogClock, recorded_us: int) -> None:
        nonlocal ahead_us
        ahead_us += 3_600_000_000

    monkeypatch.setattr(LogClock, "__init__", start)
    monkeypatch.setattr(LogClock, "now_us", lambda self: now_us() + ahead_us)
    assert catch()


def test_catches_action_cancelled_with_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose actions end with the client that asked for them is caught (R41)."""

    async def do(self: Any, action: str, subject: str, effect: Any) -> Any:
        return await effect()

    monkeypatch.setattr(Effects, "do", do)
    assert "has no outcome" in catch()


def test_catches_refusal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that refuses as soon as there is no room, and holds nothing back, is caught (R23, R36)."""
    close = Room.close

    def refuse(self: Room, reason: str) -> None:
        close(self, reason)
        self._own_refusing = True
        self._settle()

    monkeypatch.setattr(Room, "close", refuse)
    assert "after there was room" in catch()


@pytest.mark.parametrize("ordered", [False, True])
async def test_what_follows_a_refusal_of_an_ordered_stream_is_refused(autojump_clock: MockClock, ordered: bool) -> None:
    """The checker asks of no write behind a refusal whether there is room for it again, if its stream keeps order."""
    promises, table = Promises(Trace(), {}), uuid4()
    promises.stall_s = 3.0
    node: Any = SimpleNamespace(name="life", superseded=False)
    stream = StreamAcks(coalesced=False, ordered=ordered)
    for number in range(2):
        stream.add(Write(number, 1, table, f"w{number}", Tier.DISK, sends=1, sent_s=trio.current_time()))
        await trio.sleep(1)
        promises.note_room(node.name, table)
        await trio.sleep(0.1)
    refused = nullcontext() if ordered else pytest.raises(PromiseBroken, match="after there was room")
    with refused:
        for number in range(2):
            ack = AckMessage(0, Tier.MEMORY.word, 0, error="no room", sequence=number, code="overloaded")
            promises.take_ack(node, stream, ack)


def test_no_marker_is_made_where_another_one_is() -> None:
    """The checker hears of markers that are made in another warehouse, and not of one that was there."""
    made: list[None] = []
    warehouse, other = SimWarehouse(), uuid4()
    warehouse.on_marker = lambda: made.append(None)
    warehouse.exchange(other)
    assert warehouse.make_marker(uuid4()) == other
    assert not made
    warehouse.exchange(None)
    assert warehouse.make_marker(other) == other
    assert len(made) == 1


def test_catches_streams_bound_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose open streams follow names instead of field ids is caught once others swap two names (R27)."""

    def by_name(stream: Sequence[pa.Field], bound: object, table: object) -> list[pa.Field]:
        return list(stream)

    monkeypatch.setattr("arka.flight.decode.rename_fields", by_name)
    # Or its table cannot go on: a value does not fit the column that it was written to.
    broken = catch("foreign commit")
    assert "it was meant for" in broken or "is lost" in broken


def test_catches_a_schema_that_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that goes on with the columns that it loaded first is caught (R27)."""
    adopt = Adoption.adopt

    def keep(self: Adoption, table: Any, info: Any, question: Any = None) -> None:
        adopt(self, table, replace(info, schema=table.info.schema, schema_id=table.info.schema_id), question)

    monkeypatch.setattr(Adoption, "adopt", keep)
    assert "which the table no longer had" in catch("foreign commit")


def test_catches_answers_that_are_not_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that asks the catalog and goes on with what it knew is caught (R27)."""
    monkeypatch.setattr(Adoption, "take", lambda *_: True)
    assert "which the table no longer had" in catch("foreign commit")


def test_catches_streams_that_open_on_old_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that learns of others' changes from its own commits alone is caught (R27)."""

    async def refresh(self: Adoption, table: Any, *, max_age_s: float | None = None) -> None:
        return None

    monkeypatch.setattr(Adoption, "refresh", refresh)
    assert "which the table no longer had" in catch("foreign commit")


@pytest.mark.long
def test_catches_cuts_that_never_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that cuts what failed the same way again is caught: its table never gets on (R32)."""
    monkeypatch.setattr(CutSize, "shrink", lambda self, failed: failed > 1)
    assert catch()


def test_catches_a_part_taken_for_the_whole_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that acknowledges a cut of which an encode job has written the first frames alone is caught (R19)."""
    monkeypatch.setattr(CutSize, "part_of", lambda self, cut, staged: cut)
    assert catch()


@pytest.mark.long
def test_catches_set_aside_for_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that sets a write aside because the catalog or the disk failed is caught (R32)."""

    async def persist(self: Any, doing: str, request: Any, cut: Any) -> Any:
        try:
            return await request()
        except CatalogUnavailable as error:
            raise UnwritableRows(str(error)) from error

    monkeypatch.setattr(TableCommitter, "_persist", persist)
    assert catch(says="its data can be written|is lost|was stopped|lacks write")


def test_catches_a_write_set_aside_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that passes a set-aside write before it is durable in the store is caught (R32)."""

    async def keep(self: Any, table: Any, cut: Any, reason: str) -> None:
        table.set_aside(cut.through_lsn, reason)

    monkeypatch.setattr(Aside, "keep", keep)
    # Where nobody has it, it is lost.
    assert catch(says="was not set aside|acked iceberg_committed|is lost")


def test_catches_a_commit_that_waits_for_files_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """R28: files that were cleared away before their commit do not come back; the rows are written again."""
    persist = TableCommitter._persist

    async def repeat(self: Any, doing: str, request: Any, cut: Any) -> Any:
        async def attempt() -> Any:
            try:
                return await request()
            except StagedFilesMissing as error:
                raise CatalogUnavailable(str(error)) from error

        return await persist(self, doing, attempt, cut)

    monkeypatch.setattr(TableCommitter, "_persist", repeat)
    assert "did not drain" in catch()


def test_catches_no_look_after_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that acknowledges a commit without a look at what a reader would find is caught (R28)."""
    commit = simworld.ProcessCatalog.commit

    async def blind(self: Any, job: CommitJob) -> CommitResult:
        # What the adapter finds at the end of a commit is not told either.
        with contextlib.suppress(FilesMissing):
            return await commit(self, job)
        return await SimCatalog.commit(self, job)

    async def look(self: Any, result: CommitResult, cut: Any) -> None:
        return None

    monkeypatch.setattr(simworld.ProcessCatalog, "commit", blind)
    monkeypatch.setattr(TableCommitter, "_look", look)
    assert "no reader ever found it" in catch()


@pytest.mark.long
def test_catches_a_marker_made_again_in_an_empty_warehouse(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that marks whatever warehouse has no marker is caught (R28)."""

    async def make(self: WarehouseWatch, warehouse: Any) -> UUID | None:
        return await warehouse.make_marker(self._known or uuid4())

    monkeypatch.setattr(WarehouseWatch, "_make", make)
    assert "a marker was made in a warehouse that lacks our tables" in catch()


def test_catches_a_rolled_back_table_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that goes on below what it had committed is caught by a catalog restored from a backup (R20)."""
    stop = Table.stop

    def go_on(self: Table, detail: str) -> None:
        if "stands at LSN" not in detail:
            stop(self, detail)

    monkeypatch.setattr(Table, "stop", go_on)
    assert catch("catalog restored", says="is lost|lacks write|went on below what was acknowledged")


@pytest.mark.long
@pytest.mark.parametrize("fault", ["catalog restored", "marks removed"])
@pytest.mark.parametrize("forgets", ["written", "read"])
def test_catches_commits_that_nobody_records(forgets: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose next start learns from checkpoints alone what was committed is caught (R15, R20)."""
    if forgets == "written":
        monkeypatch.setattr(CommittedMarks, "_write", lambda self, marks: None)
    else:
        monkeypatch.setattr("arka.wal.committed.read_committed", lambda directory, disk, log_uuid: {})
    broken = catch(fault)
    # Rows that are doubled or put back, or a write that was set aside and comes back with them.
    assert any(words in broken for words in ("twice", "went on below what was acknowledged", "which was refused")), (
        broken
    )


def test_catches_a_start_that_waits_for_a_slow_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that waits for the store's answers however long they take is caught by a slow store (R35)."""

    @contextlib.contextmanager
    def spend(self: Patience) -> Iterator[tuple[float, float]]:
        yield trio.current_time() + self._failing_s, math.inf

    monkeypatch.setattr(Patience, "spend", spend)
    assert "the start of life" in catch("slow store")
