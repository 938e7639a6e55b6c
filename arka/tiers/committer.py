"""The committer of one table: from its backlog to the ``iceberg_committed`` watermark.

Owns: when a commit is cut, how large it is, and what a definite outcome does to the table. Does not own the
compare-and-swap (``arka.iceberg.commit``, in a worker) nor the table's state (``arka.tiers.table``). A table's
trouble stays in the table: outages are waited for, a table that cannot be committed for good is stopped (R18).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import TypeVar
from uuid import UUID, uuid4

import structlog
import trio

from arka import failpoints
from arka.errors import ArkaError, DataCorruption, Fenced
from arka.lineage import CommitMark, Lineage, other_copy_detail, rollback_detail
from arka.options import IcebergOptions
from arka.records import TableType
from arka.storage.ports import (
    Catalog,
    CatalogConflict,
    CatalogUnavailable,
    CommitJob,
    CommitOutcome,
    CommitResult,
    DeadlineMissed,
    SchemaMisfit,
    StagedFiles,
    StagedFilesMissing,
    UnwritableRows,
    WarehouseChanged,
)
from arka.tiers.adoption import Adoption
from arka.tiers.backlog import Cut
from arka.tiers.cutsize import CutSize
from arka.tiers.foreign import dropped_columns
from arka.tiers.retry import MAX_RETRY_S, persist
from arka.tiers.table import Table, TableState
from arka.tiers.warehouse import WarehouseWatch
from arka.tiers.watch import Effort
from arka.tiers.watermarks import Watermark
from arka.wal.committed import CommittedMarks

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: A commit may cost at most this share of the interval before commits are spread out.
_COST_SHARE = 0.5
#: Longest pause for what a commit cost, in commit intervals: an attempt that an outage made long is no measure.
_MAX_PAUSE_INTERVALS = 4
#: A commit of so much of iceberg.commit_bytes is full: frames are not cut in pieces.
_FULL_SHARE = 0.9
#: Consecutive definite failures (not outages) after which a table is stopped.
_MAX_FAILURES = 5
#: How often a single write that cannot be written is tried in a fresh worker before it is set aside (R32).
_FRESH_TRIES = 2


class TableCommitter:
    """Brings one table's frames into Iceberg, in LSN order, one commit at a time."""

    def __init__(
        self,
        table: Table,
        catalog: Catalog,
        objects: Watermark,
        *,
        log_uuid: UUID,
        epoch: Callable[[], int],
        lineage: Callable[[], Lineage],
        wait_verified: Callable[[Effort], Awaitable[None]],
        options: IcebergOptions,
        rng: random.Random,
        watch: WarehouseWatch,
        on_committed: Callable[[Table], None],
        adoption: Adoption,
        set_aside: Callable[[Table, Cut, str], Awaitable[None]],
        marks: CommittedMarks,
    ) -> None:
        """Join a table to the catalog.

        Args:
            table: the table; this committer alone raises its ``committed`` mark.
            catalog: encodes and commits in worker processes.
            objects: the ``object_storage`` mark; a commit holds nothing above it (R4).
            log_uuid: the log whose mark the table keeps (R15).
            epoch: returns this process's epoch of it; asked when there is something to commit, since nothing is in
                the object store before there is an epoch.
            lineage: returns the log's starts, this process's last (R15).
            wait_verified: waits until the object store says that this process has the newest epoch (R10).
            options: cadence and sizes.
            rng: for the jitter of retries.
            watch: knows whether catalog and warehouse are ours (R28).
            on_committed: told after the mark rose.
            adoption: takes what each commit has loaded (R27).
            set_aside: keeps a write that cannot be written, durably, and tells its streams (R32).
            marks: lets the next start know how far the table is, before that is acknowledged (R20).
        """
        self._table = table
        self._catalog = catalog
        self._objects = objects
        self._log_uuid = log_uuid
        self._epoch = epoch
        self._lineage = lineage
        self._wait_verified = wait_verified
        self._options = options
        self._rng = rng
        self._watch = watch
        self._on_committed = on_committed
        self._adoption = adoption
        self._set_aside = set_aside
        self._marks = marks
        self._failures = 0
        # Attempts in a row that others' changes to the table's columns kept from a commit.
        self._holds = 0
        self._size = CutSize()
        # Seconds of the last attempts at what the commit under way needs.
        self._cost_s = 0.0

    async def run(self) -> bool:
        """Commit until the table is dropped or stopped, or it has to be looked for in the catalog.

        Returns:
            Whether that is so: it is not under its name any more and may have been renamed, or catalog and warehouse
            were others for a while and the table's own mark has to say how far it is (R28).

        Raises:
            Fenced: a newer epoch of the log has committed to the table.

        Cancellation: a commit that is under way may or may not land; the table's own mark says which (R16).
        """
        table = self._table
        earliest = trio.current_time()
        while table.state is TableState.ACTIVE:
            if not await self._wait_work(earliest):
                continue
            await self._watch.wait_ours()
            cut = self._next_cut()
            if cut is None:
                continue
            started = trio.current_time()
            self._cost_s = 0.0
            try:
                job = await self._encode(cut) if cut.through_lsn not in table.asides else self._pass(cut)
                cut = self._size.part_of(cut, job.staged)
                result = await self._commit(job, cut)
                await self._look(result, cut)
                await self._record(result, cut)
            except Fenced:
                raise
            except WarehouseChanged as error:
                return await self._meet_change(error)
            except StagedFilesMissing as error:
                log.warning("iceberg.staged_missing", table=str(table.info.name), reason=str(error))
                earliest = trio.current_time() + self._options.retry_s
                continue
            except DeadlineMissed as error:
                # Of a commit that missed it nobody knows whether it lands: the next one's look at the mark says (R15).
                self._shrink(cut, str(error))
                continue
            except SchemaMisfit as error:
                if not self._shrink(cut, str(error)):
                    earliest = trio.current_time() + self._hold_back(str(error))
                # What others made of the table may fit by now: the next attempt begins with that.
                await self._adoption.refresh(table, max_age_s=0)
                continue
            except UnwritableRows as error:
                if cut.through_lsn in table.asides:
                    # The commit held no rows, so that it cannot be theirs: a failure as any other.
                    earliest = trio.current_time() + self._note_failure(str(error))
                elif not self._shrink(cut, str(error)):
                    try:
                        pause_s = await self._settle_unwritable(cut, str(error))
                    except WarehouseChanged as changed:
                        return await self._meet_change(changed)
                    earliest = trio.current_time() + pause_s
                continue
            except (ArkaError, CatalogConflict) as error:
                if isinstance(error, DataCorruption):
                    # Perhaps in the local copy of what is set apart, which can be brought again.
                    table.fetch_again()
                earliest = trio.current_time() + self._note_failure(str(error))
                # It may be what others made of the table that does not fit: the next attempt begins with that.
                await self._adoption.refresh(table, max_age_s=0)
                continue
            self._failures = self._holds = 0
            table.held_back = ""
            if not self._size.settle(cut, job.staged, table.commitable.frames, self._options.job_deadline_s):
                self._shrink(cut, f"its files took {job.staged.took_s:.0f} s, longer than iceberg.job_deadline_s")
            await failpoints.reach("commit.answered")
            if result.outcome is CommitOutcome.TABLE_GONE:
                return table.state is TableState.ACTIVE
            if result.outcome is CommitOutcome.FENCED:
                await self._settle_fenced()
                continue
            self._apply(cut, result)
            await failpoints.reach("commit.advanced")
            earliest = max(started + self._options.commit_interval_s, trio.current_time() + self._pause_s())
        return False

    async def _meet_change(self, error: WarehouseChanged) -> bool:
        """Stop a table that lacks a file, else wait until catalog and warehouse are ours. Returns as ``run``."""
        table = self._table
        if await self._watch.report(error):
            table.stop(f"Table {table.info.name} cannot be read: {error}. Restore it, and restart the server")
            return False
        await self._watch.wait_ours()
        return table.state is TableState.ACTIVE

    def _pause_s(self) -> float:
        """How long commits of the table pause for what the last one cost: its last attempts, not an outage before."""
        pause_s = self._cost_s * (1 / _COST_SHARE - 1) / 2
        return min(pause_s, _MAX_PAUSE_INTERVALS * self._options.commit_interval_s)

    async def _wait_work(self, earliest: float) -> bool:
        """Wait until there is something to commit and it is time; False: look at the state again."""
        table = self._table
        changed = table.changed
        first = table.commitable.first_lsn
        if first is None:
            await changed.wait()
            return False
        if first > self._objects.lsn:
            with trio.move_on_after(self._options.commit_interval_s):
                await self._objects.wait_reached(first)
            return False
        untroubled = self._failures == 0 and self._holds == 0
        if table.hurried_lsn >= first and untroubled:
            return True
        if trio.current_time() < earliest and untroubled and self._has_full_commit():
            # Spreading commits out is for their number; these are as large as they may be.
            return True
        if trio.current_time() < earliest:
            with trio.move_on_at(earliest):
                await changed.wait()
            return False
        return True

    def _next_cut(self) -> Cut | None:
        """Choose what to commit next; a write that is set aside is a cut of its own."""
        table = self._table
        through_lsn, most = self._objects.lsn, self._size.frames
        aside = table.next_aside()
        if aside is not None and aside == table.commitable.first_lsn:
            most = 1
        elif aside is not None:
            through_lsn = min(through_lsn, aside - 1)
        return table.commitable.cut(through_lsn, self._options.commit_bytes, most)

    def _pass(self, cut: Cut) -> CommitJob:
        """Make a commit that moves the table's mark past a write that is set aside, and adds nothing (R32)."""
        table = self._table
        # Invariant: it is durable elsewhere before the mark passes it; ``asides`` holds nothing else.
        staged = StagedFiles(table.committed.lsn, cut.through_lsn, (), 0)
        return self._job(staged)

    def _job(self, staged: StagedFiles) -> CommitJob:
        return CommitJob(
            table=self._table.info,
            log_uuid=self._log_uuid,
            epoch=self._epoch(),
            commit_id=uuid4(),
            staged=staged,
            lineage=self._lineage(),
        )

    def _has_full_commit(self) -> bool:
        """Whether there is as much to commit as one commit may take."""
        limit = self._options.commit_bytes
        if self._size.frames is not None:
            return self._table.commitable.frames >= self._size.frames
        if self._table.commitable.frame_bytes < limit:
            return False
        cut = self._table.commitable.cut(self._objects.lsn, limit)
        return cut is not None and cut.frame_bytes >= limit * _FULL_SHARE

    async def _encode(self, cut: Cut) -> CommitJob:
        """Have a cut's rows written as Parquet, for as long as it takes."""
        table = self._table
        job = table.frames(self._log_uuid, cut)
        staged = await self._persist("the warehouse to take data files", partial(self._catalog.encode, job), cut)
        return self._job(staged)

    async def _commit(self, job: CommitJob, cut: Cut) -> CommitResult:
        """Commit staged files, for as long as it takes.

        The same job again after an unknown outcome: the table's own mark says whether it had landed (R16), and
        no file is written twice.
        """
        attempts = iter(chain((job,), repeat(replace(job, repeated=True))))
        return await self._persist("the catalog to commit", lambda: self._attempt(next(attempts)), cut)

    async def _attempt(self, job: CommitJob) -> CommitResult:
        """Commit once, and adopt what was loaded for it (R27)."""
        question = self._adoption.ask(self._table)
        result = await self._catalog.commit(job)
        if result.table is not None:
            self._adoption.take(self._table, result.table, question)
        elif result.unusable:
            self._adoption.refuse(self._table, result.unusable, question)
        return result

    async def _look(self, result: CommitResult, cut: Cut) -> None:
        """Let nothing be acknowledged that a reader does not find (R28).

        Raises:
            WarehouseChanged: what the commit wrote to is not what it was, or a file of the table is gone.
        """
        if self._watch.trouble is not None:
            raise WarehouseChanged(self._watch.trouble)
        if result.outcome is CommitOutcome.COMMITTED:
            if result.seen:
                self._watch.note_seen(self._table.info.uuid)
            else:
                confirm = partial(self._watch.confirm, self._table.info)
                await self._persist("looking for the table's files", confirm, cut)

    async def _record(self, result: CommitResult, cut: Cut) -> None:
        """Let the disk know how far the table is, before anybody is told: others may undo it in the catalog (R20)."""
        table = self._table
        if result.outcome is CommitOutcome.COMMITTED:
            lsn = max(result.committed_lsn, cut.through_lsn)
        elif result.outcome is CommitOutcome.RECUT and result.committed_lsn > table.committed.lsn:
            lsn = result.committed_lsn
        else:
            return
        epoch = self._epoch()
        mark = CommitMark(self._log_uuid, lsn, epoch, self._lineage().token_for(table.info.uuid, epoch, lsn))
        loaded = None if result.table is None else result.table.mark_of(self._log_uuid)
        if loaded is not None and loaded.committed_lsn == lsn:
            # Perhaps that of an earlier process.
            mark = loaded
        record = partial(self._marks.record, table.info.uuid, mark)
        await self._persist("the disk to record what was committed", record, cut)
        await failpoints.reach("commit.recorded")

    async def _persist(self, doing: str, request: Callable[[], Awaitable[T]], cut: Cut) -> T:
        """Repeat a request until the catalog answers it or the table ends; ``doing`` says what is waited for.

        Raises:
            WarehouseChanged: catalog or warehouse are others: the same again would be about files of another one.
            StagedFilesMissing: the rows have to be written again.
            DeadlineMissed: it took too long, and a smaller cut may not (R32). A single write's request is repeated: it
                has a process of its own by then (R19).
        """
        table = self._table
        started = 0.0

        async def attempt() -> T:
            nonlocal started
            started = trio.current_time()
            table.effort.begin(doing)
            return await request()

        stalled = False

        def note_stalled(error: Exception) -> None:
            nonlocal stalled
            table.effort.fail(str(error))
            if isinstance(error, (WarehouseChanged, StagedFilesMissing)) or (
                isinstance(error, DeadlineMissed) and cut.frames > 1
            ):
                raise error
            if not stalled:
                stalled = True
                log.warning("iceberg.stalled", table=str(table.info.name), reason=str(error))
            if table.state is not TableState.ACTIVE:
                raise ArkaError(f"{table.info.name} ended while it waited for {doing}") from error

        result = await persist(attempt, CatalogUnavailable, note_stalled, retry_s=self._options.retry_s, rng=self._rng)
        self._cost_s += trio.current_time() - started
        table.effort.succeed()
        if stalled:
            log.info("iceberg.recovered", table=str(table.info.name))
        return result

    def _apply(self, cut: Cut, result: CommitResult) -> None:
        """Act on a definite outcome."""
        table = self._table
        match result.outcome:
            case CommitOutcome.COMMITTED:
                self._advance(max(result.committed_lsn, cut.through_lsn), result)
                log.info(
                    "iceberg.committed",
                    table=str(table.info.name),
                    through_lsn=cut.through_lsn,
                    frames=cut.frames,
                    frame_bytes=cut.frame_bytes,
                    snapshot_id=result.snapshot_id,
                )
            case CommitOutcome.RECUT if result.committed_lsn > table.committed.lsn:
                # An attempt whose response was lost has landed: the table itself says how far it is (R16).
                self._advance(result.committed_lsn, result)
            case CommitOutcome.RECUT:
                table.stop(rollback_detail(table.info.name, result.committed_lsn, table.known_lsn))
            case CommitOutcome.NOT_OURS:
                table.stop(result.detail)

    async def _settle_fenced(self) -> None:
        """Act on a newer epoch in the table: the store says whose it is (R10, R29).

        Raises:
            Fenced: another process has taken the log over.

        Cancellation: nothing changes.
        """
        table = self._table
        await self._wait_verified(table.effort)
        problem = f"it was committed to in a newer epoch than {self._epoch()}, which is the newest of this log's store"
        table.stop(other_copy_detail(table.info.name, problem))

    def _advance(self, lsn: int, result: CommitResult) -> None:
        """Raise the mark; where others have dropped columns, in steps that say which writes have lost them (R24)."""
        table = self._table
        table.discard_through(lsn)
        if result.table is not None:
            now = result.table.info.schema
            accepted = table.bindings(table.committed.lsn, lsn)
            dropped = [(last_lsn, dropped_columns(info.schema, now)) for info, last_lsn in accepted]
            if any(names for _, names in dropped):
                for last_lsn, names in dropped:
                    table.committed.advance(last_lsn, snapshot_id=result.snapshot_id, dropped=names)
        table.committed.advance(lsn, snapshot_id=result.snapshot_id)
        self._on_committed(self._table)

    def _shrink(self, cut: Cut, reason: str) -> bool:
        """Make the next cut half as large; False where this one has a single write (R32)."""
        if not self._size.shrink(cut.frames):
            return False
        log.warning(
            "iceberg.cut_halved",
            table=str(self._table.info.name),
            frames=cut.frames,
            next_frames=self._size.frames,
            reason=reason,
        )
        return True

    async def _settle_unwritable(self, cut: Cut, reason: str) -> float:
        """Decide about a single write whose own data cannot be written; returns the pause in seconds.

        It is tried twice more, each time in a worker that has done nothing else: only an error in its own data, both
        times, sets it aside. A primary-key table stops before it: later writes of its keys may rest on it.

        Raises:
            WarehouseChanged: catalog or warehouse became others meanwhile.
        """
        table = self._table
        job = table.frames(self._log_uuid, cut)
        for _ in range(_FRESH_TRIES):
            try:
                await self._persist(
                    "a fresh worker to take a single write", partial(self._catalog.encode, job, fresh=True), cut
                )
            except UnwritableRows as error:
                reason = str(error)
            except SchemaMisfit as error:
                return self._hold_back(str(error))
            except Fenced:
                raise
            except (ArkaError, CatalogConflict) as error:
                return self._note_failure(str(error))
            else:
                # It was something else than its data: the next cut tries again.
                return self._options.retry_s
        if table.info.table_type is TableType.PRIMARY_KEY:
            table.stop(
                f"Table {table.info.name} stops before LSN {cut.through_lsn}, whose data cannot be written: {reason}"
            )
        else:
            await self._set_aside(table, cut, reason)
        return 0.0

    def _hold_back(self, reason: str) -> float:
        """Let the writes wait until others mend the table's columns (R24, R27); returns the pause in seconds."""
        table = self._table
        self._holds += 1
        table.effort.fail(reason)
        detail = f"Waiting writes of {table.info.name} are held back from {reason}"
        if table.held_back != detail:
            log.warning("table.held_back", table=str(table.info.name), reason=reason, hint="its writes wait")
        table.held_back = detail
        return min(self._options.retry_s * float(2 ** min(self._holds, _MAX_FAILURES)), MAX_RETRY_S)

    def _note_failure(self, reason: str) -> float:
        """Count a definite failure; stops the table when it does not pass. Returns the pause in seconds."""
        self._failures += 1
        self._table.effort.fail(reason)
        log.error("iceberg.failed", table=str(self._table.info.name), failures=self._failures, reason=reason)
        if self._failures >= _MAX_FAILURES:
            self._table.stop(
                f"Table {self._table.info.name} cannot be committed: {reason}. Its waiting writes are kept: mend the "
                "table and restart the server, or drop it"
            )
        return min(self._options.retry_s * float(2**self._failures), MAX_RETRY_S)


__all__ = ["TableCommitter"]
