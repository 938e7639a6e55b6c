"""The pipeline: one log, its tiers and its tables, as the RPCs see them.

Owns: who may write now, and the lives of the tiers' tasks. Does not own any tier's progress: each watermark has
one tier that raises it; nor which tables there are (``arka.tiers.tables``). Data goes down: memory, disk,
objects, table; only watermarks come back up. A tier that fails with what it cannot outlive ends the pipeline; a
table's failure stays in the table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

import structlog
import trio

from arka._core.buffers import FrameBuffer
from arka._core.framing import KIND_BATCH, crc32c, run_end
from arka.errors import AdmissionRejected, ArkaError, Closed, ErrorCode, Fenced, OutcomeUnknown, Unavailable
from arka.options import Settings
from arka.records import LsnRange, Operation, Releasable, Tier
from arka.slices import slices_of
from arka.tiers.activity import TableActivity
from arka.tiers.crowd import Crowd
from arka.tiers.disk import DiskTier
from arka.tiers.keys import KeyIndex
from arka.tiers.memory import Appended, MemoryTier
from arka.tiers.objects import ObjectTier
from arka.tiers.readturns import ReadTurns
from arka.tiers.release import LogRelease
from arka.tiers.room import Room
from arka.tiers.space import POLL_S, DiskSpace, SharedRoom
from arka.tiers.table import Table, TableState
from arka.tiers.tables import Tables
from arka.tiers.tailroom import TailRoom
from arka.tiers.uplink import Taken, Uplink
from arka.tiers.watch import Effort, State, Watch, Watched
from arka.tiers.watermarks import Bracket, Watermark
from arka.wal.logstate import LogStateFile
from arka.wal.writer import AppendedRange, WalPoisoned, WalWriter

log = structlog.get_logger(__name__)

#: How long streams have to send their last acks after the log is poisoned or fenced, in seconds (R6).
_LAST_WORDS_S: Final = 1.0

FailureListener = Callable[[ErrorCode, str], None]


@dataclass(slots=True)
class Marks:
    """The watermarks of the log that all tables share."""

    disk: Watermark
    objects: Watermark


@dataclass(frozen=True, slots=True)
class Parts:
    """The components of one log, which its pipeline runs.

    Attributes:
        memory: gives LSNs.
        writer: the WAL's writer.
        state: the log's state on disk.
        objects: the object tier; raises ``marks.objects``.
        uplink: the tie to the object store.
        tables: the tables.
        marks: the shared watermarks as recovery found them.
        keys: idempotency keys as recovery found them.
        space: whether the disk has room for new writes.
        release: deletes what the log no longer needs; remembers the LSNs that crashes lost (R3).
    """

    memory: MemoryTier
    writer: WalWriter
    state: LogStateFile
    objects: ObjectTier
    uplink: Uplink
    tables: Tables
    marks: Marks
    keys: KeyIndex
    space: DiskSpace
    release: LogRelease


class Pipeline:
    """What a write goes through. Used from trio's thread only."""

    def __init__(
        self,
        log_uuid: UUID,
        parts: Parts,
        settings: Settings,
        *,
        survival: dict[str, bool],
        unused: LsnRange,
    ) -> None:
        """Join the tiers.

        Args:
            log_uuid: the log.
            parts: its components.
            settings: of the log.
            survival: what each tier's promise survives with these settings (R14), for people.
            unused: the LSNs between the last recovered one and this process's first: no write has one of them.
        """
        self.log_uuid = log_uuid
        self._unused = unused
        self.survival = survival
        self.memory = parts.memory
        # The last LSN that this process had when it began; below it, some were given to nobody.
        self._began_lsn = self.memory.last_lsn
        self.tables = parts.tables
        self.uplink = parts.uplink
        self._writer = parts.writer
        self._state = parts.state
        self._objects = parts.objects
        self._marks = parts.marks
        self._keys = parts.keys
        self._space = parts.space
        #: How long a read may keep frames in the log.
        self.read_pin_s = settings.limits.read_pin_s
        #: How long a read may wait for an LSN.
        self.read_wait_s = settings.limits.read_wait_s
        #: Who waits for a Flush.
        self.flushes = Crowd(settings.limits.flushes, "Flush calls", "limits.flushes")
        #: Which reads run (T27).
        self.read_turns = ReadTurns(settings.limits.reads, settings.limits.reads_waiting)
        #: Room for what they copy of the log.
        self.tail_room = TailRoom(settings.limits.read_disk_bytes, parts.space, self.read_turns)
        self._release = parts.release
        self._key_room = Room("keys", settings.limits.stall_s)
        self._commit_interval_s = settings.iceberg.commit_interval_s
        self._disk_tier = DiskTier(
            parts.memory,
            parts.writer,
            parts.marks.disk,
            group_bytes=settings.wal.group_bytes,
            linger_s=settings.wal.group_linger_s,
            on_durable=self._note_durable,
        )
        #: Which tables are quiet (R37).
        self.activity = TableActivity(parts.memory, parts.marks.disk, lambda: parts.state.state.birth, parts.tables.all)
        self._disk_effort = Effort("the disk to take a group")
        disk, stored = Tier.DISK.word, Tier.OBJECT_STORAGE.word
        self._watch = Watch(
            [
                Watched(disk, self._disk_effort, self._disk_state, settings.wal.group_linger_s),
                Watched(stored, parts.objects.effort, self._objects_state, settings.object_store.linger_s),
            ],
            self._watched_tables,
        )
        # Where the log ended on this disk when the process began.
        self._recovered_lsn = parts.marks.disk.lsn
        self._draining = False
        #: Set when the log takes no more writes: what waits for one that is still to come waits in vain.
        self.stopping = trio.Event()
        self._failure: OutcomeUnknown | None = None
        self._failure_listeners: dict[FailureListener, None] = {}
        self._disk_ended = trio.Event()

    # -- life -------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the tiers until cancelled.

        Raises:
            WalPoisoned: a disk write failed; the streams were told ``outcome_unknown`` (R6).
            Fenced: a newer epoch owns the log; the streams were told.

        Cancellation: what is accepted stays in the log as far as it is on disk; nothing is promised beyond
        what was acked.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_disk)
            nursery.start_soon(self._writer.keep_spare)
            nursery.start_soon(self._watch_rooms)
            nursery.start_soon(self.activity.run)
            nursery.start_soon(self._watch.run)
            link = partial(self.uplink.run, self._state, self._objects, self._recovered_lsn)
            nursery.start_soon(self.guard_log, link)
            nursery.start_soon(self.guard_log, self._objects.run)
            nursery.start_soon(self.guard_log, self._run_release)
            await nursery.start(self._run_tables)
            task_status.started()

    async def connect(self, taken: Taken) -> None:
        """Let the log go to the object store; see ``Uplink.connect``."""
        await self.uplink.connect(taken, self._state, self._objects, self._recovered_lsn)

    async def _run_disk(self) -> None:
        await self.guard_log(self._disk_tier.run)
        self._disk_ended.set()

    async def _run_release(self) -> None:
        await self.uplink.wait_connected()
        tables = self.tables
        await self._release.run(
            self.needed_from,
            tables.remembered,
            self._quiet_tables,
            tables.elsewhere,
            tables.set_aside,
            self._wait_stored,
        )

    async def _wait_stored(self) -> None:
        """Wait until the store has the record of each drop that is done; nothing else holds a release back."""
        await self._marks.objects.wait_reached(self.tables.dropped_lsn)

    def _quiet_tables(self) -> tuple[int, list[UUID]]:
        quiet = [table.info.uuid for table in self.tables.all() if table.quiet]
        return self._state.state.birth, quiet

    async def _run_tables(self, task_status: trio.TaskStatus[None]) -> None:
        await self.guard_log(partial(self.tables.run, task_status))

    async def guard_log(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task of the log; what ends the log ends the process, after its streams were told (R6, protocol 3.4)."""
        try:
            await task()
        except* Exception as group:
            error = _first_leaf(group)
            if isinstance(error, WalPoisoned):
                self._failure = error
                log.critical("disk.poisoned", reason=error.detail)
                self._tell(ErrorCode.OUTCOME_UNKNOWN, error.detail)
            else:
                self._begin_drain()
                log.critical("log.fenced" if isinstance(error, Fenced) else "log.failed", reason=str(error))
                self._tell(
                    ErrorCode.UNAVAILABLE, str(error) if isinstance(error, ArkaError) else "The server has failed"
                )
            await trio.sleep(_LAST_WORDS_S)
            raise error from None

    def _tell(self, code: ErrorCode, detail: str) -> None:
        for listener in tuple(self._failure_listeners):
            listener(code, detail)

    def start_drain(self) -> None:
        """Refuse new writes from now on, and bring what is accepted down without waiting for company."""
        self._begin_drain()
        self._objects.hurry(from_now_on=True)
        self.tables.start_drain()

    def _begin_drain(self) -> None:
        self._draining = True
        self.stopping.set()
        self.read_turns.close("The server is draining: read again after its restart")

    async def wait_drained(self) -> None:
        """Wait until every accepted write is committed, as far as its table can be.

        Cancellation: nothing changes; what is on disk is brought down after the next start.
        """
        if self.memory.last_lsn > self._began_lsn:
            await self._marks.disk.wait_reached(self.memory.last_lsn)
        for table in self.tables.all():
            while table.is_committing and table.committed.lsn < table.last_lsn:
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
        self.activity.close()
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
        requested: Tier = Tier.DISK,
    ) -> Appended:
        """Accept one write: on return its memory ack is due.

        Args:
            table: where it goes.
            payload: the batch in canonical form.
            rows: its row count.
            operation: upsert or delete.
            key: its idempotency key; empty for none.
            charge: the ledger's charge for it; taken over when this returns.
            requested: the tier whose ack its writer waits for.

        Raises:
            NoRoom: there is no room now: wait for it and try again; the charge stays with the caller.
            ArkaError: ``table_dropped``, ``table_stopped``, ``overloaded`` or ``unavailable``; the charge
                stays with the caller.
        """
        known = self._keys.find(table.info.uuid, key) if key else None
        if known is None:
            self._check_open(table)
            if key:
                self._check_key_room(table)
        else:
            # A resend is answered whatever the gates say: refusing it would say that it is not in the table.
            self._check_known(table, known.lsn)
        if table.quiet and known is None:
            # In the log before the write; a stream, whose acks matter, has waited until it is on disk.
            self.activity.note_writing(table)
        digest = crc32c(payload.ipc) if key else 0
        appended = self.memory.append(
            table.info,
            payload,
            rows=rows,
            operation=operation,
            key=key,
            digest=digest,
            charge=charge,
            urgent=requested > Tier.MEMORY,
        )
        if not appended.duplicate:
            assert not table.quiet, "a write of a table that the log calls quiet"
            table.last_lsn = appended.lsn
            self._space.note_accepted(payload.size)
            table.room_left -= payload.size
            if table.room_left < 0:
                self.tables.apart.judge_room(table)
        return appended

    def knows(self, table: Table, key: bytes) -> bool:
        """Whether a write with this key was accepted: sent again, it is answered and adds nothing."""
        return bool(key) and self._keys.find(table.info.uuid, key) is not None

    def _check_open(self, table: Table) -> None:
        """Refuse a new write where none is taken."""
        if self._failure is not None:
            raise Closed("The log's disk has failed; nothing is accepted any more")
        if self._draining:
            raise Unavailable("The server is draining: reconnect to the same node and resume")
        table.check_active()
        table.info.check_owner(self.log_uuid)
        if table.room.shut:
            table.room.check()

    def _check_key_room(self, table: Table | None = None) -> None:
        """Let a write with a new key in where another key can be remembered; of tables with few keys before others."""
        if table is not None and self._keys.full and self._keys.spares(table.info.uuid):
            return
        try:
            self._keys.check_room()
        except AdmissionRejected as error:
            self._key_room.close(error.detail)
            self._key_room.check()
        else:
            self._key_room.open()

    async def _watch_rooms(self) -> None:
        """Look once a second whether what holds writes back has passed, until cancelled."""
        while True:
            await trio.sleep(POLL_S)
            self._space.look()
            if self._key_room.shut:
                with suppress(AdmissionRejected):
                    self._check_key_room()
                self._key_room.tick()
            if self._space.log_full and self._release.last_holds_all(await self.needed_from()):
                # Only a segment that is followed by another one may go.
                self._writer.roll()
                with suppress(Unavailable):
                    self.tables.log_something()

    def _check_known(self, table: Table, lsn: int) -> None:
        """Refuse to answer for a known write whose own outcome nobody can say now."""
        if self._failure is not None and lsn > self._marks.disk.lsn:
            raise self._failure
        if lsn in table.asides:
            raise ArkaError(table.asides[lsn], code=ErrorCode.SET_ASIDE)
        if table.ending is not None and lsn > table.committed.lsn:
            raise ArkaError(table.ending.detail, code=table.ending.code)

    def _note_durable(self, appended: AppendedRange) -> None:
        """Hand a fsynced range down: to the object tier and to the tables' backlogs."""
        self._space.note_written(appended.end - appended.start)
        self._objects.submit(appended)
        segment = appended.segment
        self._release.note(segment, appended.last_lsn, appended.end - appended.start)
        path = str(segment.path)
        number, epoch = segment.number, segment.epoch
        touched: dict[Table, None] = {}
        frames, start = appended.frames, 0
        while start < len(frames):
            # Frames of one table mostly come in a row.
            first, end = frames[start], run_end(frames, start)
            table = None if first.kind != KIND_BATCH or first.table is None else self.tables.get(first.table.uuid)
            if table is not None:
                if not table.backlog:
                    touched[table] = None
                table.note_durable(path, number, epoch, frames, start, end)
            start = end
        for table in touched:
            table.wake()

    async def needed_from(self) -> int:
        """The least LSN that some tier below the disk still needs; what lies below may be let go of (R12)."""
        # The mark comes first: what reaches the disk while the tables are looked at lies above it.
        uploaded_lsn = self._marks.objects.lsn
        above = uploaded_lsn + 1
        needed = await self.tables.needed_from(uploaded_lsn)
        return above if needed is None else min(above, needed)

    def unwritten_bytes(self) -> int:
        """How many bytes of the log were accepted and are not on the disk yet."""
        return self.memory.queued_bytes + self._disk_tier.writing_bytes

    def owed_bytes(self, shared: SharedRoom) -> int:
        """How many bytes accepted writes will still take on the log's file system (R23).

        Args:
            shared: which tiers write there too.
        """
        queued = self.unwritten_bytes()
        owed = queued
        if shared.checkpoints:
            owed += self._release.owed_bytes
        if shared.store:
            owed += queued + self._objects.unstored_bytes + self._release.owed_bytes
        if shared.warehouse:
            owed += queued + self.tables.waiting.frame_bytes
        return owed

    def copy_room(self) -> int:
        """Bytes that a copy for a read may take; see ``DiskSpace.copy_room``."""
        return self._space.copy_room()

    def note_held(self, kind: str, delta: int) -> None:
        """Count bytes beside the log that ``limits.disk_bytes`` is for; see ``DiskSpace.note_held``."""
        self._space.note_held(kind, delta)

    # -- what stands still (R35) ------------------------------------------------------------------

    def _disk_state(self) -> State:
        reached = self._marks.disk.lsn
        held_back = self._writer.held_back
        if held_back is None:
            self._disk_effort.succeed()
        else:
            self._disk_effort.fail(f"no new segment of the log can be made: {held_back}")
        waits = self.memory.queued_bytes > 0 or self._disk_tier.writing_bytes > 0
        return State(reached, max(self.memory.last_lsn, reached + 1) if waits else reached)

    def _objects_state(self) -> State:
        reached = self._marks.objects.lsn
        found = self._objects.statistics()
        waits = self._objects.unstored_bytes > 0 or found.uploading > 0
        return State(reached, max(self._marks.disk.lsn, reached + 1) if waits else reached)

    def _watched_tables(self) -> Iterator[list[Watched]]:
        for tables in slices_of(self.tables.all()):
            yield [self._watched(table) for table in tables if table.state is TableState.ACTIVE]

    def _watched(self, table: Table) -> Watched:
        if table.watched is None:

            def look() -> State:
                # What is not in the store yet waits for that tier.
                first_lsn, stored_lsn = table.backlog.first_lsn, self._marks.objects.lsn
                waits = first_lsn is not None and first_lsn <= stored_lsn
                in_log = min(table.backlog.last_lsn, stored_lsn) if waits else 0
                return State(table.committed.lsn, max(in_log, self.tables.held_through(table)))

            word = Tier.ICEBERG_COMMITTED.word
            table.watched = Watched(word, table.effort, look, self._commit_interval_s, lambda: str(table.info.name))
        return table.watched

    def stalled(self, table: Table) -> str | None:
        """Why a table's writes make no progress, for people; None: they do, or there are none."""
        last_lsn = max(table.last_lsn, self.tables.held_through(table))
        if table.state is not TableState.ACTIVE or last_lsn <= table.committed.lsn:
            return None
        return self._watch.stalled_above() or self._watched(table).stalled

    # -- what streams listen to -------------------------------------------------------------------

    def marks_of(self, table: Table) -> tuple[Watermark, Watermark, Watermark]:
        """The watermarks below memory that a write to ``table`` goes through."""
        return (self._marks.disk, self._marks.objects, table.committed)

    def tell_in(self, bracket: Bracket) -> None:
        """Call ``bracket`` before and after streams are told of what all may wait for: disk and object storage."""
        self._marks.disk.tell_in(bracket)
        self._marks.objects.tell_in(bracket)

    def listen_failure(self, listener: FailureListener) -> None:
        """Call ``listener`` if the log fails; it must not raise or wait."""
        self._failure_listeners[listener] = None

    def unlisten_failure(self, listener: FailureListener) -> None:
        """Undo ``listen_failure``."""
        self._failure_listeners.pop(listener, None)

    @property
    def last_given_lsn(self) -> int:
        """The last LSN that a write or a record of this log has."""
        last_lsn = self.memory.last_lsn
        return last_lsn if last_lsn > self._unused.through else self._unused.after

    def is_skipped(self, lsn: int) -> bool:
        """Say whether no write can be read under an LSN: a restart skipped it, or a crash lost it (R2, R3)."""
        ranges = (self._unused, *(lost.range for lost in self._release.remembered_lost()))
        return any(skipped.after < lsn <= skipped.through for skipped in ranges)

    def table_marks(self, table: Table) -> dict[Tier, int]:
        """How far each tier is, seen from one table."""
        return {
            Tier.MEMORY: self.last_given_lsn,
            Tier.DISK: self._marks.disk.lsn,
            Tier.OBJECT_STORAGE: self._marks.objects.lsn,
            Tier.ICEBERG_COMMITTED: table.committed.lsn,
        }

    async def hold(self, table: Table) -> None:
        """Hold a table open for a stream's writes (R37); see ``TableActivity.hold``. Undone by ``activity.let_go``."""
        if self._failure is not None or self._draining:
            # Nothing new is accepted any more.
            table.streams += 1
            return
        await self.activity.hold(table)

    def resume_marks(self, table: Table, lsn: int, settled_lsn: int = 0) -> dict[Tier, int]:
        """Answer a handshake: per tier the largest W such that nothing up to min(W, ``lsn``) is missing (3.3).

        Args:
            table: the stream's table: only what it can have lost counts (R37).
            lsn: the highest LSN that the client was ever given.
            settled_lsn: lost ranges up to here are the client's past. It counts for nothing where the client was given
                LSNs that this log has not come to: they are of another past of it (R38).
        """
        if max(lsn, settled_lsn) > self.memory.last_lsn:
            settled_lsn = 0
        marks = self.table_marks(table)
        idle = not table.backlog and table.last_lsn <= table.committed.lsn
        if table.taken_up and idle and lsn > table.known_from_lsn:
            # Nothing of this table is on its way: it holds all there is. What was given before it was known here was
            # another table's.
            marks[Tier.ICEBERG_COMMITTED] = marks[Tier.OBJECT_STORAGE]
        if asides := [aside for aside in table.asides if aside > settled_lsn]:
            # They are in no snapshot and never will be (R32).
            marks[Tier.ICEBERG_COMMITTED] = min(marks[Tier.ICEBERG_COMMITTED], min(asides) - 1)
        lost = (found.range for found in self._release.remembered_lost() if found.counts_against(table.info.uuid))
        hurt = (found for found in lost if found.through > max(table.created_lsn, settled_lsn))
        cap = min([lsn, *(found.after for found in hurt)])
        return {tier: min(mark, cap) for tier, mark in marks.items()}

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
            while table.is_committing and not table.taken_up:
                await table.changed.wait()
            # Also what an earlier process parked or set apart.
            lsn = max(lsn, self.tables.apart.through_lsn(table))
            while table.committed.lsn < lsn:
                table.check_active()
                with trio.move_on_after(self._commit_interval_s):
                    await table.committed.wait_risen()
        return lsn


async def _first_of(wait: Callable[[], object], scope: trio.CancelScope) -> None:
    await wait()  # type: ignore[misc]
    scope.cancel()


def _first_leaf(group: ExceptionGroup[Exception]) -> Exception:
    """The first error of a group; a failed disk before all else, since it concerns every write."""
    poisoned, others = group.split(WalPoisoned)
    error: Exception = poisoned or others or group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


__all__ = ["Marks", "Parts", "Pipeline"]
