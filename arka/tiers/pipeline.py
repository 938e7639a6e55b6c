"""The pipeline: one log, its tiers and its tables, as the RPCs see them.

Owns: which tables there are, who may write now, and the lives of the tiers' tasks. Does not own any
tier's progress: each watermark has one tier that raises it. Data goes down: memory, disk, objects,
table; only watermarks come back up. A tier that fails with what it cannot outlive ends the pipeline; a
table's failure stays in the table.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

import structlog
import trio

from arka import failpoints
from arka._core.buffers import FrameBuffer
from arka._core.framing import KIND_BATCH, crc32c
from arka.errors import ArkaError, Closed, ErrorCode, OutcomeUnknown, Unavailable
from arka.options import IcebergOptions, Limits
from arka.records import Operation, TableDefinition, TableName, Tier
from arka.storage.ports import Catalog, CatalogTable
from arka.tiers import ddl
from arka.tiers.disk import DiskTier
from arka.tiers.keys import KeyIndex
from arka.tiers.memory import Appended, MemoryTier, Releasable
from arka.tiers.objects import ObjectTier
from arka.tiers.release import KEY_ENTRY_BYTES, LogRelease, LostRange
from arka.tiers.space import DiskSpace, SharedRoom
from arka.tiers.table import Table, TableCommitter, TableState
from arka.tiers.watermarks import Watermark, now_us
from arka.wal.writer import AppendedRange, WalPoisoned, WalWriter

log = structlog.get_logger(__name__)

#: How long streams have to send ``outcome_unknown`` after the log is poisoned, in seconds (R6).
_POISON_GRACE_S: Final = 1.0

FailureListener = Callable[[ErrorCode, str], None]


@dataclass(frozen=True, slots=True)
class LogIdentity:
    """Whose log this is: its UUID and the epoch in which this process writes it (R1, R10)."""

    log_uuid: UUID
    epoch: int


@dataclass(slots=True)
class Marks:
    """The watermarks of the log that all tables share."""

    disk: Watermark
    objects: Watermark


class _Outcome:
    """How a task ended, for whoever still waits for it."""

    def __init__(self) -> None:
        self._ended = trio.Event()
        self._error: ArkaError | None = None

    def set(self, error: ArkaError | None) -> None:
        self._error = error
        self._ended.set()

    async def wait(self) -> None:
        await self._ended.wait()
        if self._error is not None:
            raise self._error


class Pipeline:
    """What a write goes through. Used from trio's thread only."""

    def __init__(
        self,
        identity: LogIdentity,
        memory: MemoryTier,
        writer: WalWriter,
        objects: ObjectTier,
        catalog: Catalog,
        *,
        marks: Marks,
        keys: KeyIndex,
        space: DiskSpace,
        release: LogRelease,
        lost: Sequence[LostRange],
        retention_s: float,
        limits: Limits,
        group_bytes: int,
        iceberg: IcebergOptions,
        survival: dict[str, bool],
        rng: random.Random,
    ) -> None:
        """Join the tiers.

        Args:
            identity: the log.
            memory: gives LSNs.
            writer: the WAL's writer.
            objects: the object tier; raises ``marks.objects``.
            catalog: the Iceberg catalog and its workers.
            marks: the shared watermarks as recovery found them.
            keys: idempotency keys as recovery found them.
            space: whether the disk has room for new writes.
            release: deletes what the log no longer needs.
            lost: LSNs that crashes lost (R3).
            retention_s: for how long they are remembered.
            limits: what clients may use.
            group_bytes: most bytes of one group commit.
            iceberg: cadence and sizes of commits.
            survival: what each tier's promise survives with these settings (R14), for people.
            rng: for the jitter of retries.
        """
        self.identity = identity
        self.catalog = catalog
        self.survival = survival
        self.memory = memory
        self._writer = writer
        self._objects = objects
        self._marks = marks
        self._keys = keys
        self._space = space
        self._release = release
        self._lost = tuple(lost)
        self._retention_s = retention_s
        self._limits = limits
        self._iceberg = iceberg
        self._rng = rng
        self._disk_tier = DiskTier(memory, writer, marks.disk, group_bytes=group_bytes, on_durable=self._note_durable)
        self._by_uuid: dict[UUID, Table] = {}
        self._by_name: dict[TableName, Table] = {}
        # Tables that this process dropped: whoever loaded one meanwhile must not bring it back.
        self._dropped: set[UUID] = set()
        self._ddl_lock = trio.Lock()
        self._draining = False
        self._failure: OutcomeUnknown | None = None
        self._failure_listeners: dict[FailureListener, None] = {}
        self._nursery: trio.Nursery | None = None
        self._disk_ended = trio.Event()

    # -- life -------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the tiers until cancelled.

        Raises:
            WalPoisoned: a disk write failed; the streams were told ``outcome_unknown`` (R6).
            Fenced: a newer epoch owns the log.

        Cancellation: what is accepted stays in the log as far as it is on disk; nothing is promised beyond
        what was acked.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._run_disk)
            nursery.start_soon(self._writer.keep_spare)
            nursery.start_soon(self._objects.run)
            nursery.start_soon(self._space.run)
            nursery.start_soon(self._release.run, self.needed_from)
            for table in self._by_uuid.values():
                self._start_committer(table)
            task_status.started()

    async def _run_disk(self) -> None:
        await self.guard_log(self._disk_tier.run)
        self._disk_ended.set()

    async def guard_log(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task that writes to the log's disk; if that fails, tell the streams before it ends everything (R6)."""
        try:
            await task()
        except WalPoisoned as error:
            self._failure = error
            log.critical("disk.poisoned", reason=error.detail)
            for listener in tuple(self._failure_listeners):
                listener(ErrorCode.OUTCOME_UNKNOWN, error.detail)
            await trio.sleep(_POISON_GRACE_S)
            raise

    def start_drain(self) -> None:
        """Refuse new writes from now on, and bring what is accepted down without waiting for company."""
        self._draining = True
        self._objects.hurry(from_now_on=True)
        for table in self._by_uuid.values():
            table.hurry()

    async def wait_drained(self) -> None:
        """Wait until every accepted write is committed, as far as its table can be.

        Cancellation: nothing changes; what is on disk is brought down after the next start.
        """
        await self._marks.disk.wait_reached(self.memory.last_lsn)
        for table in tuple(self._by_uuid.values()):
            while table.state is TableState.ACTIVE and table.committed.lsn < table.last_lsn:
                changed = table.changed
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_first_of, changed.wait, nursery.cancel_scope)
                    # Not wait_risen: the mark may rise before that task runs for the first time.
                    reached = partial(table.committed.wait_reached, table.last_lsn)
                    nursery.start_soon(_first_of, reached, nursery.cancel_scope)

    async def close(self) -> None:
        """Write what waits to disk and seal the log. To be called while ``run`` runs.

        Durability: on return everything that was accepted is fsynced.

        Cancellation: as a crash at that moment.
        """
        self.memory.close()
        await self._disk_ended.wait()
        await self._writer.close()

    # -- writes -----------------------------------------------------------------------------------

    def append(
        self,
        table: Table,
        payload: FrameBuffer,
        *,
        rows: int,
        operation: Operation,
        key: bytes,
        charge: Releasable | None,
    ) -> Appended:
        """Accept one write: on return its memory ack is due.

        Args:
            table: where it goes.
            payload: the batch in canonical form.
            rows: its row count.
            operation: upsert or delete.
            key: its idempotency key; empty for none.
            charge: the ledger's charge for it; taken over when this returns.

        Raises:
            ArkaError: ``table_dropped``, ``table_stopped``, ``overloaded`` or ``unavailable``; the charge
                stays with the caller.
        """
        known = self._keys.find(table.info.uuid, key) if key else None
        if known is None:
            self._check_open(table)
        else:
            # A resend is answered whatever the gates say: refusing it would say that it is not in the table.
            self._check_known(table, known.lsn)
        digest = crc32c(payload.ipc) if key else 0
        appended = self.memory.append(
            table.info, payload, rows=rows, operation=operation, key=key, digest=digest, charge=charge
        )
        if not appended.duplicate:
            table.last_lsn = appended.lsn
            self._space.note_accepted(payload.size)
        return appended

    def _check_open(self, table: Table) -> None:
        """Refuse a new write where none is taken."""
        if self._failure is not None:
            raise Closed("The log's disk has failed; nothing is accepted any more")
        if self._draining:
            raise Unavailable("The server is draining: reconnect to the same node and resume")
        table.check_active()
        self._space.check()

    def _check_known(self, table: Table, lsn: int) -> None:
        """Refuse to answer for a known write whose own outcome nobody can say now."""
        if self._failure is not None and lsn > self._marks.disk.lsn:
            raise self._failure
        if table.ending is not None and lsn > table.committed.lsn:
            raise ArkaError(table.ending.detail, code=table.ending.code)

    def _note_durable(self, appended: AppendedRange) -> None:
        """Hand a fsynced range down: to the object tier and to the tables' backlogs."""
        self._space.note_written(appended.end - appended.start)
        self._objects.submit(appended)
        segment = appended.segment
        keys = sum(len(frame.key) + KEY_ENTRY_BYTES for frame in appended.frames if frame.key)
        self._release.note(segment, appended.last_lsn, appended.end - appended.start, keys)
        path = str(segment.path)
        touched: dict[Table, None] = {}
        for frame in appended.frames:
            if frame.kind == KIND_BATCH and frame.table is not None:
                table = self._by_uuid.get(frame.table.uuid)
                if table is not None:
                    if not table.backlog:
                        touched[table] = None
                    table.note_durable(path, segment.number, segment.epoch, frame.lsn, frame.offset, frame.frame_bytes)
        for table in touched:
            table.wake()

    def needed_from(self) -> int:
        """The least LSN that some tier below the disk still needs; what lies below may be let go of (R12)."""
        needed = self._marks.objects.lsn + 1
        for table in self._by_uuid.values():
            first = table.backlog.first_lsn if table.drop_lsn is None else table.drop_lsn
            if first is not None:
                needed = min(needed, first)
        return needed

    def owed_bytes(self, shared: SharedRoom) -> int:
        """How many bytes accepted writes will still take on the log's file system (R23).

        Args:
            shared: which tiers write there too.
        """
        queued = self.memory.queued_bytes + self._disk_tier.writing_bytes
        owed = queued
        if shared.store:
            owed += queued + self._objects.unstored_bytes + self._release.owed_bytes
        if shared.warehouse:
            owed += queued + sum(table.backlog.frame_bytes for table in self._by_uuid.values())
        return owed

    def note_held(self, kind: str, delta: int) -> None:
        """Count bytes beside the log that ``limits.disk_bytes`` is for; see ``DiskSpace.note_held``."""
        self._space.note_held(kind, delta)

    # -- what streams listen to -------------------------------------------------------------------

    def marks_of(self, table: Table) -> tuple[Watermark, Watermark, Watermark]:
        """The watermarks below memory that a write to ``table`` goes through."""
        return (self._marks.disk, self._marks.objects, table.committed)

    def listen_failure(self, listener: FailureListener) -> None:
        """Call ``listener`` if the log fails; it must not raise or wait."""
        self._failure_listeners[listener] = None

    def unlisten_failure(self, listener: FailureListener) -> None:
        """Undo ``listen_failure``."""
        self._failure_listeners.pop(listener, None)

    def table_marks(self, table: Table) -> dict[Tier, int]:
        """How far each tier is, seen from one table."""
        return {
            Tier.MEMORY: self.memory.last_lsn,
            Tier.DISK: self._marks.disk.lsn,
            Tier.OBJECT_STORAGE: self._marks.objects.lsn,
            Tier.ICEBERG_COMMITTED: table.committed.lsn,
        }

    def resume_marks(self, table: Table, lsn: int) -> dict[Tier, int]:
        """Answer a handshake: per tier the largest W such that nothing up to min(W, ``lsn``) is missing (3.3)."""
        marks = self.table_marks(table)
        if not table.backlog and table.last_lsn <= table.committed.lsn:
            # Nothing of this table is on its way: it holds all there is.
            marks[Tier.ICEBERG_COMMITTED] = marks[Tier.OBJECT_STORAGE]
        oldest_us = now_us() - int(self._retention_s * 1e6)
        remembered = [lost.range.after for lost in self._lost if lost.recorded_us >= oldest_us]
        cap = min([lsn, *remembered])
        return {tier: min(mark, cap) for tier, mark in marks.items()}

    # -- tables -----------------------------------------------------------------------------------

    def register(self, found: CatalogTable) -> Table:
        """Take a table of the catalog in; one that is known by its UUID stays as it is."""
        known = self._by_uuid.get(found.info.uuid)
        if known is not None:
            return known
        if found.info.uuid in self._dropped:
            raise ArkaError(
                f"Table was dropped: {found.info.name} (what stands under the name now is the same table, registered "
                "again: restart the server to take it in)",
                code=ErrorCode.TABLE_DROPPED,
            )
        table = Table(found.info, found.committed_lsn(self.identity.log_uuid), found.snapshot_id)
        self._by_uuid[found.info.uuid] = table
        named = self._by_name.get(found.info.name)
        if named is None or named.state is not TableState.ACTIVE:
            self._by_name[found.info.name] = table
        if self._nursery is not None:
            self._start_committer(table)
        return table

    def tables(self) -> Iterable[Table]:
        """All tables that are not dropped, by full name."""
        names = sorted(self._by_name, key=str)
        return [self._by_name[name] for name in names if self._by_name[name].state is not TableState.DROPPED]

    async def find_table(self, name: TableName) -> Table:
        """Find a table by name; one that others have created since the start is loaded.

        Raises:
            ArkaError: ``table_not_found``.
            Unavailable: it is not known here and the catalog does not answer.
        """
        table = self._by_name.get(name)
        if table is not None:
            return table
        found = await ddl.load_table(self.catalog, name)
        if found is None:
            raise ArkaError(f"Table not found: {_spoken(name)}", code=ErrorCode.TABLE_NOT_FOUND)
        return self.register(found)

    async def create_table(self, definition: TableDefinition) -> tuple[Table, bool]:
        """Create a table, or find the identical one (protocol 5).

        Returns:
            The table, and whether it was created.

        Raises:
            ArkaError: ``table_exists``, ``unimplemented`` or ``invalid_request``.
            Unavailable: the catalog does not answer.

        Durability: the request is in the log before the catalog is called (R5).
        """
        ddl.check_supported(definition)
        async with self._ddl_lock:
            try:
                existing = await self.find_table(definition.name)
            except ArkaError as error:
                if error.code is not ErrorCode.TABLE_NOT_FOUND:
                    raise
            else:
                if existing.state is TableState.DROPPED:
                    raise Unavailable(
                        f"{definition.name} is being dropped and the catalog has not done it yet: ask for DropTable "
                        "again, then create it"
                    )
                ddl.check_identical(definition, existing.info)
                return existing, False
            if self._draining:
                raise Unavailable("The server is draining")
            suffix = ddl.new_location_suffix()
            lsn = ddl.log_create(self.memory, definition, suffix)
            await self._marks.disk.wait_reached(lsn)
            await failpoints.reach("create.recorded")
            found, created = await ddl.create_table(self.catalog, definition, suffix)
            await failpoints.reach("create.done")
            return self.register(found), created

    async def drop_table(self, name: TableName, *, purge: bool) -> TableName:
        """Drop a table; its writes in flight end with ``table_dropped``.

        Raises:
            ArkaError: ``table_not_found``.
            Unavailable: the catalog does not answer; the drop is in the log and may be asked for again.
        """
        async with self._ddl_lock:
            table = await self.find_table(name)
        # The client may go away, the drop may not: once its record is in the log it is carried out.
        done = _Outcome()
        assert self._nursery is not None
        self._nursery.start_soon(self._drop, table, purge, done)
        await done.wait()
        return name

    async def _drop(self, table: Table, purge: bool, done: _Outcome) -> None:
        info = table.info
        async with self._ddl_lock:
            if info.uuid in self._dropped:
                done.set(None)
                return
            if table.drop_lsn is None:
                # The record stays in the log until the catalog has done it: a restart finishes it.
                table.drop_lsn = ddl.log_drop(self.memory, info, purge=purge)
                table.end(ddl.dropped(info))
            await self._marks.disk.wait_reached(table.drop_lsn)
            await failpoints.reach("drop.recorded")
            try:
                await ddl.drop_table(self.catalog, info, purge=purge)
            except ArkaError as error:
                done.set(error)
                return
            await failpoints.reach("drop.done")
            ddl.log_drop(self.memory, info, purge=purge, done=True)
            await failpoints.reach("drop.noted")
            self._dropped.add(info.uuid)
            if self._by_name.get(info.name) is table:
                del self._by_name[info.name]
            self._by_uuid.pop(info.uuid, None)
            self._keys.drop_table(info.uuid)
        done.set(None)

    async def flush(self, table: Table, tier: Tier) -> int:
        """Wait until everything that was accepted for the table has reached ``tier``.

        Returns:
            The last LSN that it waited for.

        Raises:
            ArkaError: the table was dropped or stopped meanwhile.

        Cancellation: the writes go down all the same.
        """
        lsn = table.last_lsn
        if tier >= Tier.DISK:
            await self._marks.disk.wait_reached(lsn)
        if tier >= Tier.OBJECT_STORAGE:
            self._objects.hurry()
            await self._marks.objects.wait_reached(lsn)
        if tier >= Tier.ICEBERG_COMMITTED:
            table.hurry()
            while table.committed.lsn < lsn:
                table.check_active()
                with trio.move_on_after(self._iceberg.commit_interval_s):
                    await table.committed.wait_risen()
        return lsn

    def _start_committer(self, table: Table) -> None:
        assert self._nursery is not None
        committer = TableCommitter(
            table,
            self.catalog,
            self._marks.objects,
            log_uuid=self.identity.log_uuid,
            epoch=self.identity.epoch,
            options=self._iceberg,
            rng=self._rng,
            on_committed=self._note_committed,
        )
        self._nursery.start_soon(committer.run)

    def _note_committed(self, table: Table) -> None:
        self._keys.note_committed(table.info.uuid, table.committed.lsn, trio.current_time())


async def _first_of(wait: Callable[[], object], scope: trio.CancelScope) -> None:
    await wait()  # type: ignore[misc]
    scope.cancel()


def _spoken(name: TableName) -> str:
    """A table's name as its client most likely wrote it: without the default namespace."""
    return name.name if name.namespace == "default" else str(name)


__all__ = ["LogIdentity", "Marks", "Pipeline"]
