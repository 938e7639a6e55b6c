"""The node's tables: which there are, by UUID and by name, and how they come and go.

Owns: the list of tables, the order "log first, catalog second" of creating and dropping (R5), the comparison with
the catalog at start, and the lives of the tables' committers. Does not own a table's progress
(``arka.tiers.table``), the records' form (``arka.tiers.ddl``) nor parked frames (``arka.tiers.parking``).

A start knows its tables from the log alone; the catalog is asked as soon as it answers. Until then a table takes
writes and nothing of it is committed. A catalog may answer while the warehouse does not: a table that it names and
whose metadata cannot be read is there, and is asked for on and on.

Longer than most modules: all of it changes the same list.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final
from uuid import UUID

import structlog
import trio

from arka import failpoints
from arka.errors import ArkaError, DataCorruption, ErrorCode, Fenced, Unavailable
from arka.lineage import Lineage, other_copy_detail
from arka.records import HeldObject, KnownTable, TableDefinition, TableInfo, TableName, owner_property
from arka.slices import slices_of
from arka.storage.ports import (
    Catalog,
    CatalogListing,
    CatalogTable,
    CatalogUnavailable,
    FilesMissing,
    StoreUnavailable,
    TableMissing,
    Warehouse,
)
from arka.tiers import ddl
from arka.tiers.adoption import Adoption
from arka.tiers.apart import Apart
from arka.tiers.backlog import BacklogTotal
from arka.tiers.committer import TableCommitter
from arka.tiers.creates import OpenCreates, PendingCreate
from arka.tiers.held import first_damage, stop_damaged
from arka.tiers.keys import KeyIndex
from arka.tiers.logclock import LogClock
from arka.tiers.memory import MemoryTier
from arka.tiers.names import FreshList, Misnamed, check_own_name, misname, own_entries, own_entry, stop_missing
from arka.tiers.parking import Parking
from arka.tiers.release import Elsewhere
from arka.tiers.room import Room
from arka.tiers.table import Ending, Table, TableState
from arka.tiers.warehouse import WarehouseWatch
from arka.tiers.watch import Effort
from arka.tiers.watermarks import Watermark
from arka.wal.committed import CommittedMarks, Unrecorded

log = structlog.get_logger(__name__)

#: Pause between two questions to a catalog that is away, in seconds.
_CATALOG_RETRY_S: Final = 1.0
#: Pause between two attempts at a drop that could not be done at the start: each lists the catalog.
_DROP_RETRY_S: Final = 10.0
#: Pause between two looks for a table to which others gave a name that Arka cannot spell, in seconds.
_MISNAMED_RETRY_S: Final = 3.0
#: How long a start removes what is left of tables that are gone, in seconds.
_FORGET_S: Final = 10.0


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


class _Tender:
    """The task that commits or parks one table, and how to end it."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def run(self, tend: Callable[[Table], Awaitable[None]], table: Table) -> None:
        try:
            with self._scope:
                await tend(table)
        finally:
            self._ended.set()

    async def end(self) -> None:
        self._scope.cancel()
        await self._ended.wait()


class Tables:
    """The tables of one log. Used from trio's thread only."""

    def __init__(
        self,
        catalog: Catalog,
        memory: MemoryTier,
        disk: Watermark,
        keys: KeyIndex,
        clock: LogClock,
        parking: Parking,
        *,
        log_uuid: UUID,
        node_id: str,
        make_committer: Callable[[Table], TableCommitter],
        room: Room,
        adopt_s: float = 1.0,
        apart: Apart,
        warehouse: Warehouse | None = None,
        epoch: Callable[[], int],
        lineage: Callable[[], Lineage],
        verify: Callable[[], Awaitable[None]],
        wait_verified: Callable[[Effort], Awaitable[None]],
        marks: CommittedMarks,
    ) -> None:
        """Join the list to what it is about.

        Args:
            catalog: the Iceberg catalog.
            memory: takes create and drop records into the log's order.
            disk: the ``disk`` mark.
            keys: forgets a dropped table's keys, and hears what is committed.
            clock: the time by which keys are kept.
            parking: keeps the frames of tables that cannot be committed.
            log_uuid: the log.
            node_id: whose log it is, for people.
            make_committer: makes the task that commits a table.
            room: the log's room for new writes.
            adopt_s: see ``Adoption``.
            apart: knows the tables that are far behind.
            warehouse: its marker; None where it cannot have one.
            epoch: returns the last epoch of the log that the disk knows.
            lineage: returns the log's starts that the disk knows of (R15).
            verify: asks the object store whether this process has the newest epoch (R10).
            wait_verified: waits until the object store says so.
            marks: what the disk knows of how far tables are (R20).
        """
        self._marks = marks
        self._epoch = epoch
        self.lineage = lineage
        self._verify = verify
        self._wait_verified = wait_verified
        #: Tables that are set apart.
        self.apart = apart
        self._room = room
        self.catalog = catalog
        #: What others own of the tables.
        self.adoption = Adoption(catalog, memory, log_uuid=log_uuid, adopt_s=adopt_s, look_for=self._look_for)
        self._fresh_list = FreshList(
            catalog, self, log_uuid=log_uuid, refresh=partial(self.adoption.refresh, max_age_s=0)
        )
        self._memory = memory
        self._disk = disk
        self._keys = keys
        self._clock = clock
        self._parking = parking
        self._log_uuid = log_uuid
        self._owner = owner_property(node_id, log_uuid)
        self._make_committer = make_committer
        #: Whether catalog and warehouse are the ones that this log was joined to (R28, R33).
        self.watch = WarehouseWatch(warehouse, catalog, self._known, lambda: self._creates.pending())
        self._by_uuid: dict[UUID, Table] = {}
        #: Frame bytes of all tables' backlogs.
        self.waiting = BacklogTotal()
        self._by_name: dict[TableName, Table] = {}
        # Creates whose outcome is not in the log: those of an earlier process are finished here (R41).
        self._creates = OpenCreates(memory)
        #: No record that says of a drop that it is done has a higher LSN than this.
        self.dropped_lsn = 0
        # Tables that this process dropped: whoever loaded one meanwhile must not bring it back.
        self._dropped: set[UUID] = set()
        # Drops that an earlier process wrote into the log, and the catalog may not have done.
        self._pending_drops: dict[UUID, ddl.PendingDrop] = {}
        # Tables that an earlier process dropped: what is parked for them is nobody's.
        self._orphans: set[UUID] = set()
        # The task that commits or parks a table, by its UUID.
        self._tenders: dict[UUID, _Tender] = {}
        #: By table and LSN, what an earlier process set aside; given once, before ``restore`` (R32).
        self.asides: Mapping[UUID, Mapping[int, str]] = {}
        #: By table, why its set-aside writes are not all known; given with ``asides`` (R33).
        self.broken: Mapping[UUID, DataCorruption] = {}
        #: What the newest checkpoint says of ``elsewhere``; given with ``asides``.
        self.carried: Elsewhere | None = None
        # Tables that were in the catalog at the start and could not be read.
        self._unread: set[UUID] = set()
        # The first LSN that each read under way needs.
        self._pinned: list[int] = []
        self._ddl_lock = trio.Lock()
        self._draining = False
        self._nursery: trio.Nursery | None = None
        self._reconciled = False

    def _known(self) -> list[TableInfo]:
        return [table.info for table in self._by_uuid.values() if table.state is not TableState.DROPPED]

    # -- the list ---------------------------------------------------------------------------------

    def get(self, uuid: UUID) -> Table | None:
        """The table with this UUID, in whatever state; None when it is not known."""
        return self._by_uuid.get(uuid)

    def all(self) -> tuple[Table, ...]:
        """Every table, in whatever state."""
        return tuple(self._by_uuid.values())

    def elsewhere(self) -> Elsewhere | None:
        """The objects with frames that may be in the object store only, by table (R33, R38); None if nobody can say."""
        if not self._parking.loaded or not self.apart.loaded:
            # Nothing is moved before that.
            return self.carried
        found: dict[UUID, list[HeldObject]] = {}
        for held in (self._parking.held(), self.apart.held()):
            for uuid in held.keys() & self._by_uuid.keys():
                found.setdefault(uuid, []).extend(held[uuid])
        return found

    def set_aside(self) -> dict[UUID, list[int]]:
        """The LSNs that are set aside, by table (R32)."""
        return {table.info.uuid: list(table.asides) for table in self.all() if table.asides}

    async def needed_from(self, uploaded_lsn: int) -> int | None:
        """The least LSN whose frame some table or some drop or some read still needs from the log; None for none.

        The tables are looked at in slices, and what they need only rises meanwhile: frames that come lie above
        ``uploaded_lsn``, as does the record of a drop. What a read pins was in its table's backlog before, so the pins
        are looked at last.

        Args:
            uploaded_lsn: the object store has the log up to here.
        """
        needed: list[int] = []
        for tables in slices_of(self._by_uuid.values()):
            # Also those of a table that is to be dropped: until the catalog has done it, a crash may undo that.
            found = [lsn for table in tables for lsn in (table.backlog.first_lsn, table.drop_lsn) if lsn is not None]
            needed += [min(found)] if found else []
            await trio.lowlevel.checkpoint()
        # A drop that the store does not have is undone by the loss of this disk: its table's frames must be there then.
        needed += [drop.lsn if drop.lsn <= uploaded_lsn else 0 for drop in self._pending_drops.values()]
        needed += self._pinned
        needed += self._creates.lsns
        return min(needed, default=None)

    @contextmanager
    def pin(self, table: Table) -> Iterator[None]:
        """Keep the frames that a table has in the log now, although they may be committed meanwhile (R25)."""
        first_lsn = table.backlog.first_lsn
        if first_lsn is None:
            yield
            return
        self._pinned.append(first_lsn)
        try:
            yield
        finally:
            self._pinned.remove(first_lsn)

    def parked_bytes(self, table: Table) -> int:
        """Bytes of a stopped table that wait in the object store."""
        return self._parking.parked_bytes(table.info.uuid)

    def held_through(self, table: Table) -> int:
        """The last LSN of a table that is parked or set apart; 0 for none."""
        return max(self._parking.parked_through(table.info.uuid), self.apart.through_lsn(table))

    def remembered(self) -> Iterable[KnownTable]:
        """What a checkpoint remembers of the tables, so that a start knows them without the catalog (R5)."""
        tables = [table for table in self._by_uuid.values() if table.state is not TableState.DROPPED]
        return [
            KnownTable(table.info, max(table.committed.lsn, table.recorded_lsn), table.known_from_lsn)
            for table in tables
        ]

    def log_something(self) -> None:
        """Put a record that changes nothing into the log: one of its tables, once more as it is."""
        for table in self._by_uuid.values():
            if table.is_committing:
                ddl.log_created(self._memory, table.info, table.info.location[-8:])
                return

    def note_committed(self, table: Table) -> None:
        """Start the retention of the keys that a table holds (R21)."""
        self._keys.note_committed(table.info.uuid, table.committed.lsn, self._clock.now_us())
        self.apart.judge_room(table)

    def listed(self) -> list[Table]:
        """The tables that are not dropped, by full name."""
        names = sorted(self._by_name, key=str)
        return [self._by_name[name] for name in names if self._by_name[name].state is not TableState.DROPPED]

    async def find(self, name: TableName) -> Table:
        """Find a table by name; one that others have created since the start is loaded.

        Raises:
            ArkaError: ``table_not_found``; or ``table_stopped``: it is not known here, and not one that Arka can write.
            Unavailable: it is not known here and the catalog does not answer.
        """
        table = self._by_name.get(name)
        if table is not None and table.state is not TableState.STOPPED and not table.misnamed:
            return table
        try:
            found = await ddl.load_table(self.catalog, name)
        except ArkaError:
            if table is None:
                raise
            return table
        if found is None or (table is not None and found.info.uuid == table.info.uuid):
            if table is None:
                raise ArkaError(f"Table not found: {_spoken(name)}", code=ErrorCode.TABLE_NOT_FOUND)
            if found is not None and table.misnamed:
                # Others gave it its name back.
                await self._take_in(table, found)
            return table
        known = self._by_uuid.get(found.info.uuid)
        if known is not None and known.state is TableState.ACTIVE and known.info.name != name:
            await check_own_name(self.catalog, known, name)
        # Others gave the name to another table.
        return await self.register(found)

    async def refresh_list(self) -> None:
        """Wait until the tables are known as the catalog has them now, 1 s at most (R27)."""
        await self._fresh_list.take(self._nursery if self._reconciled else None)

    async def find_fresh(self, name: TableName, *, max_age_s: float | None = None) -> Table:
        """Find a table by name, as the catalog has it now or had it not long ago (R27).

        Args:
            name: its name.
            max_age_s: see ``Adoption.refresh``.

        Raises:
            ArkaError: see ``find``.
            Unavailable: see ``find``; of a table that is known here, the last that was adopted serves instead.
        """
        table = await self.find(name)
        await self.adoption.refresh(table, max_age_s=max_age_s)
        if table.info.name != name or table.state is not TableState.ACTIVE:
            # Others renamed it, or gave its name to another table.
            table = await self.find(name)
        return table

    # -- life -------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compare the tables with the catalog as soon as it answers, then commit them, until cancelled.

        Raises:
            Fenced: a newer epoch of the log has committed to a table.

        Cancellation: see ``TableCommitter.run``.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.adoption.start(nursery)
            task_status.started()
            try:
                nursery.start_soon(self.watch.run)
                await self.wait_catalog(self.reconcile)
                for uuid in self._pending_drops:
                    retry = partial(self._retry_drop, uuid)
                    nursery.start_soon(partial(self.wait_catalog, retry, retry_s=_DROP_RETRY_S))
                for pending in self._creates.pending():
                    retry = partial(self._retry_create, pending)
                    nursery.start_soon(partial(self.wait_catalog, retry, retry_s=_DROP_RETRY_S))
                # What is set apart comes before what is parked: a table is taken up once parked frames are known.
                await self.apart.load()
                await self._parking.load()
                for uuid in self._orphans:
                    await self._parking.forget(uuid)
                    await self.apart.forget(uuid)
                nursery.start_soon(self.apart.run, self._tended)
                for table in self.all():
                    self._take_up(table)
                # Tables come and go; the nursery stays open for them.
                await trio.sleep_forever()
            finally:
                # A request may outlive this task: what it registers is the next start's to commit.
                self._nursery = None
                self.adoption.stop()

    def start_drain(self) -> None:
        """Create no table any more, and commit what there is without waiting for company."""
        self._draining = True
        for table in self.all():
            table.hurry()

    async def wait_catalog(
        self,
        request: Callable[[], Awaitable[None]],
        *,
        retry_s: float = _CATALOG_RETRY_S,
        table: Table | None = None,
    ) -> None:
        """Repeat a request until catalog and log take it. Cancellation: the last request may have happened.

        Args:
            request: what is asked.
            retry_s: the pause after a failure, in seconds.
            table: the one that waits for it; None: all tables do that nobody commits yet.
        """
        said = ""
        while True:
            try:
                await request()
            except Misnamed:
                # It was logged; each look lists the catalog.
                await trio.sleep(_MISNAMED_RETRY_S)
            except (CatalogUnavailable, Unavailable) as error:
                # Also where no LSN can be given to its record (R31).
                self._tell_waiting(str(error), self.all() if table is None else (table,))
                # That it lasts is told by the stall, once a minute (R35).
                if str(error) != said:
                    said = str(error)
                    log.warning("catalog.unavailable", reason=said, retry_s=retry_s)
                await trio.sleep(retry_s)
            else:
                return

    def _tell_waiting(self, reason: str, tables: Iterable[Table]) -> None:
        """Tell the watch why tables that nobody commits yet wait (R35)."""
        for table in tables:
            if not table.taken_up:
                table.effort.fail(reason)

    def restore(
        self,
        known: Iterable[KnownTable],
        drops: Mapping[UUID, ddl.PendingDrop],
        dropped: Iterable[UUID],
        creates: Iterable[PendingCreate],
    ) -> None:
        """Take in what the log knows; to be called once, before ``run``.

        Args:
            known: the tables that the log and its checkpoints name, each as they knew it last.
            drops: tables that the catalog may not have dropped yet.
            dropped: all tables whose drop is in the log.
            creates: tables that the log asks for, without an outcome.
        """
        self._creates.restore(creates)
        self._pending_drops = dict(drops)
        for info, recorded_lsn, known_from_lsn in known:
            if info.uuid not in drops:
                table = Table(info, 0, None, recorded_lsn=recorded_lsn, known_from_lsn=known_from_lsn)
                table.recorded = self._marks.mark_of(info.uuid)
                self._add(table)
                self._by_name[info.name] = self._by_uuid[info.uuid]
        self._orphans = {uuid for uuid in dropped if uuid not in self._by_uuid}
        if self._orphans:
            # Where their records stand in the log is not known: no further than it was recovered.
            self.dropped_lsn = self._disk.lsn
        self._marks.keep(self._by_uuid)

    async def reconcile(self) -> None:
        """Compare the tables with the catalog's, once: finish drops, take in what is new, stop what is gone.

        Raises:
            CatalogUnavailable: ask again.
        """
        if self._reconciled:
            return
        async with self._ddl_lock:
            # One that a client's request finds while the catalog is listed is in no older listing.
            known_before = self.all()
            listing = await self.catalog.list_tables()
            known_names = {known.info.uuid: known.info.name for known in known_before}
            found = own_entries(listing, known_names, self._log_uuid)
            for uuid in tuple(self._pending_drops):
                try:
                    await self._finish_drop(uuid, listing)
                except CatalogUnavailable as error:
                    # One table is no reason to keep the others waiting: it has a task of its own.
                    log.warning("table.drop_waits", table=str(self._pending_drops[uuid].name), reason=str(error))
                found.pop(uuid, None)
            for loaded in found.values():
                known = self._by_uuid.get(loaded.info.uuid)
                if known is None:
                    await self.register(loaded)
                elif known.state is TableState.ACTIVE:
                    await self._adopt_seen(known, loaded)
            strangers = listing.unread - {known.info.name for known in known_before}
            for table in known_before:
                if table.info.uuid in found or table.state is not TableState.ACTIVE:
                    continue
                unusable = listing.unusable.get(table.info.uuid)
                if unusable is not None and not unusable.spelled:
                    misname(table, unusable)
                    self._unread.add(table.info.uuid)
                elif table.info.name in listing.unread or (strangers and table.info.uuid not in listing.unusable):
                    # Perhaps it was renamed to a name whose metadata nobody can read now.
                    log.warning("table.unread", table=str(table.info.name), hint="it takes writes; commits wait")
                    self._unread.add(table.info.uuid)
                else:
                    stop_missing(table, listing)
            if not listing.unread:
                await self._forget_others(listing)
            self._reconciled = True
        await self._judge_unread()
        for pending in self._creates.pending():
            try:
                await self._finish_create(pending, listing)
            except CatalogUnavailable as error:
                # Like a drop that waits: `run` tries again.
                log.warning("table.create_waits", table=str(pending.definition.name), reason=str(error))

    async def _forget_others(self, listing: CatalogListing) -> None:
        """Remove what this node's disk keeps of tables that will not be committed to; a later start does the rest."""
        kept = {table.info.uuid for table in self.all() if table.state is TableState.ACTIVE}
        with trio.move_on_after(_FORGET_S):
            try:
                await self.catalog.forget_others(frozenset(kept | listing.unusable.keys()))
            except (CatalogUnavailable, ArkaError) as error:
                log.warning("catalog.leftovers", reason=str(error))

    async def register(self, found: CatalogTable) -> Table:
        """Take a table of the catalog in; one that is known by its UUID follows its name.

        Raises:
            ArkaError: this process dropped it.
            Unavailable: it is being dropped.
        """
        known = self._by_uuid.get(found.info.uuid)
        if known is not None:
            if known.info.name != found.info.name and known.state is TableState.ACTIVE:
                await self._take_in(known, found)
            return known
        if found.info.uuid in self._pending_drops:
            raise Unavailable(f"{found.info.name} is being dropped and the catalog has not done it yet: try again")
        if found.info.uuid in self._dropped:
            raise ArkaError(
                f"Table was dropped: {found.info.name} (what stands under the name now is the same table, registered "
                "again: restart the server to take it in)",
                code=ErrorCode.TABLE_DROPPED,
            )
        objection = self.lineage().objection(found.info.name, found.info.uuid, found.mark_of(self._log_uuid))
        committed_lsn = 0 if objection else found.committed_lsn(self._log_uuid)
        known_from_lsn = 0 if committed_lsn else self._memory.last_lsn
        table = Table(found.info, committed_lsn, found.snapshot_id, known_from_lsn=known_from_lsn)
        self.adoption.adopt(table, found.info)
        self._add(table)
        if objection:
            table.stop(objection)
        if self._parking.loaded:
            self._take_up(table)
        return table

    def _add(self, table: Table) -> None:
        self._by_uuid[table.info.uuid] = table
        table.backlog.count_in(self.waiting)
        table.asides.update(self.asides.get(table.info.uuid, {}))
        table.room.put_below(self._room)
        self.note_committed(table)
        named = self._by_name.get(table.info.name)
        if named is None or named.state is not TableState.ACTIVE or named.misnamed:
            self._by_name[table.info.name] = table
        table.listen_end(lambda ending: self._note_ending(table, ending))
        if table.info.uuid in self.broken:
            stop_damaged(table, self.broken[table.info.uuid])

    async def _take_in(self, table: Table, found: CatalogTable) -> None:
        """Adopt a table for a client, who need not wait for the disk to record how far it is: a commit does (R31)."""
        try:
            await self._adopt(table, found)
        except Unrecorded as error:
            log.info("table.not_recorded", table=str(found.info.name), reason=str(error))

    async def _adopt(self, table: Table, found: CatalogTable) -> None:
        """Learn from the catalog what the log could not say.

        Raises:
            Unrecorded: the disk did not take how far the table is: ask again. Name and columns are adopted.
        """
        old_name = table.info.name
        # Name and columns do not wait for the disk: while it lacks something, streams would open with old ones (R27).
        self.adoption.adopt(table, found.info)
        self._note_name(table, old_name)
        mark = found.mark_of(self._log_uuid)
        is_newer = mark.epoch > self._epoch()
        if not is_newer and mark.committed_lsn > table.committed.lsn and not table.objection(mark, self.lineage()):
            # What is adopted is acknowledged, and others may undo it in the catalog (R20).
            await self._marks.record(table.info.uuid, mark)
        if is_newer:
            # A newer process has moved the mark. What it has set aside is not known here, so that its mark says nothing
            # of the writes that wait here (R10, R32); the next look at the store ends this process.
            log.warning(
                "table.mark_of_another", table=str(table.info.name), mark_lsn=found.committed_lsn(self._log_uuid)
            )
        else:
            table.adopt_mark(found, self._log_uuid, self.lineage())
        self.note_committed(table)

    async def _adopt_seen(self, table: Table, found: CatalogTable) -> None:
        """Adopt a table that stands where the log says, or whose files were seen.

        What is adopted is acknowledged, and the process that committed it may have died before it looked (R28). A
        table whose files nobody sees takes writes, and its mark is read later.
        """
        if await self._is_of_another_copy(found):
            problem = f"it was committed to in epoch {found.mark_of(self._log_uuid).epoch}, which is above this log's"
            table.stop(other_copy_detail(found.info.name, problem))
            return
        try:
            if found.committed_lsn(self._log_uuid) > table.committed.lsn:
                await self.watch.confirm(found.info)
            await self._adopt(table, found)
        except CatalogUnavailable as error:
            log.warning("table.unread", table=str(table.info.name), hint=str(error))
            self._unread.add(table.info.uuid)

    async def _is_of_another_copy(self, found: CatalogTable) -> bool:
        """Whether a table's mark has an epoch that only another copy of this log can have taken (R29).

        While the object store does not answer nobody can say: then its first commit finds it out.
        """
        if found.mark_of(self._log_uuid).epoch <= self._epoch():
            return False
        try:
            await self._verify()
        except (StoreUnavailable, Fenced):
            # What follows from a lost epoch is the uplink's to say.
            return False
        return True

    def _note_name(self, table: Table, old_name: TableName) -> None:
        """Follow a table that others renamed: it is its UUID (R5)."""
        if table.info.name == old_name:
            return
        log.info("table.renamed", table=str(table.info.name), before=str(old_name))
        if self._by_name.get(old_name) is table:
            del self._by_name[old_name]
        named = self._by_name.get(table.info.name)
        if named is None or named.state is not TableState.ACTIVE or named.misnamed:
            self._by_name[table.info.name] = table

    def _tended(self) -> list[Table]:
        """The tables that may be set apart: what was parked of a table comes before what the log has of it."""
        active = [table for table in self.all() if table.state is TableState.ACTIVE and table.coming is None]
        return [table for table in active if table.taken_up or not self.parked_bytes(table)]

    def _take_up(self, table: Table) -> None:
        """Begin to commit a table, or to park it; what was parked earlier comes first (R18)."""
        if table.coming is not None or self._nursery is None:
            return
        tender = self._tenders[table.info.uuid] = _Tender()
        self._nursery.start_soon(tender.run, self._tend, table)

    async def _tend(self, table: Table) -> None:
        """Commit a table for as long as that goes, then park what it has.

        A file or an object that is damaged or gone is the trouble of the table whose frames it holds (R33), while this
        process has the newest epoch: one that took the log over deletes what it has committed (R10).

        Raises:
            Fenced: another process has it.
        """
        damage: DataCorruption | None = None
        try:
            await self._commit(table)
        except* DataCorruption as group:
            damage = first_damage(group)
        if damage is not None:
            await self._wait_verified(table.effort)
            stop_damaged(table, damage)
        if table.state is TableState.STOPPED:
            try:
                await self._parking.park(table)
            except DataCorruption as error:
                log.warning(
                    "table.not_parked", table=str(table.info.name), reason=error.detail, hint="the log keeps it"
                )

    async def _commit(self, table: Table) -> None:
        """Commit a table for as long as that goes.

        Raises:
            DataCorruption: something that holds frames of it is damaged or gone; alone or in a group.
        """
        while table.info.uuid in self._unread:
            with self.apart.committing(table):
                await self.wait_catalog(partial(self._read_at_last, table), table=table)
            await self.apart.move_if_wanted(table)
        if table.ending is not None:
            return
        self.apart.check(table)
        self._parking.check(table)
        if not self.apart.take_over(table):
            return
        parked_lsn = await self._parking.bring_back(table)
        if parked_lsn and self._nursery is not None:
            self._nursery.start_soon(self._forget_parked, table, parked_lsn)
        self.apart.take_up(table)
        table.taken_up = table.state is TableState.ACTIVE
        table.wake()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.apart.feed, table)
            while table.state is TableState.ACTIVE:
                with self.apart.committing(table):
                    if await self._make_committer(table).run():
                        await self.wait_catalog(partial(self._look_for, table), table=table)
                await self.apart.move_if_wanted(table)
            nursery.cancel_scope.cancel()

    async def _end_tending(self, uuid: UUID) -> None:
        """End the task of a table that is to be dropped: nobody commits or parks it any more."""
        tender = self._tenders.pop(uuid, None)
        if tender is not None:
            await tender.end()

    async def _forget_parked(self, table: Table, last_lsn: int) -> None:
        await table.committed.wait_reached(last_lsn)
        # Reads may have begun with them; polled, since both are rare.
        while any(lsn <= last_lsn for lsn in self._pinned):  # noqa: ASYNC110
            await trio.sleep(1.0)
        await self._parking.forget(table.info.uuid)

    async def _look_for(self, table: Table) -> None:
        """Find out what became of a table that is not under its name any more.

        Raises:
            CatalogUnavailable: ask again.
        """
        adoptions = table.adoptions
        listing = await self.catalog.list_tables()
        if table.adoptions != adoptions:
            # Another answer came meanwhile, and nobody can say which one is newer.
            return
        found = own_entry(listing, table.info, self._log_uuid)
        unusable = listing.unusable.get(table.info.uuid)
        strangers = listing.unread - {known.info.name for known in self.all() if known is not table}
        if found is not None:
            # What is adopted is acknowledged: a reader has to find it (R28).
            await self.watch.confirm(found.info)
            if table.adoptions != adoptions:
                # Another answer came while files were looked for.
                return
            table.gone = ""
            await self._adopt(table, found)
        elif unusable is not None and not unusable.spelled:
            raise misname(table, unusable)
        elif strangers and unusable is None:
            raise CatalogUnavailable(
                f"{table.info.name} may be one of {sorted(map(str, strangers))}, which cannot be read"
            )
        elif table.state is TableState.ACTIVE:
            stop_missing(table, listing)

    async def _judge_unread(self) -> None:
        """Find out of which tables a file is gone, so that they take no writes from the start on (R33)."""
        for uuid in tuple(self._unread):
            table = self._by_uuid[uuid]
            try:
                await self._read_at_last(table)
            except CatalogUnavailable:
                if not table.gone:
                    # Not this table's own trouble. The tasks of the tables ask again.
                    return

    async def _read_at_last(self, table: Table) -> None:
        """Learn how far a table is that could not be read at the start.

        Raises:
            CatalogUnavailable: ask again.
        """
        if table.state is TableState.ACTIVE:
            try:
                found = await ddl.reload_table(self.catalog, table.info.name)
                if found is not None and found.info.uuid != table.info.uuid:
                    # Others gave its name to another table.
                    found = None
                if found is not None:
                    await self.watch.confirm(found.info)
            except FilesMissing as error:
                if await self.watch.is_ours():
                    # Its own trouble (R33): it takes no writes until the file is back.
                    self.adoption.miss_file(table, error)
                raise
            if found is None:
                await self._look_for(table)
            else:
                table.gone = ""
                await self._adopt(table, found)
        self._unread.discard(table.info.uuid)

    def _note_ending(self, table: Table, ending: Ending) -> None:
        if ending.state is TableState.STOPPED:
            log.error("table.stopped", table=str(table.info.name), reason=ending.detail)

    # -- create and drop --------------------------------------------------------------------------

    async def create(self, definition: TableDefinition) -> tuple[Table, bool]:
        """Create a table, or find the identical one (protocol 5).

        Returns:
            The table, and whether it was created.

        Raises:
            ArkaError: ``table_exists`` or ``invalid_request``.
            Unavailable: the catalog does not answer.

        Durability: the request is in the log before the catalog is called (R5). A start finishes one whose outcome the
            log does not tell (R41).

        Cancellation: as a crash: the next start finishes it. ``arka.tiers.effects`` keeps clients from causing that.
        """
        async with self._ddl_lock:
            try:
                existing = await self.find_fresh(definition.name, max_age_s=0)
            except ArkaError as error:
                if error.code is not ErrorCode.TABLE_NOT_FOUND:
                    raise
            else:
                if existing.state is TableState.DROPPED or existing.coming is not None:
                    raise Unavailable(
                        f"{definition.name} is being dropped and the catalog has not done it yet: ask for DropTable "
                        "again, then create it"
                    )
                if existing.state is TableState.STOPPED:
                    raise ArkaError(
                        f"{existing.ending_detail}. DropTable gives them up and frees the name",
                        code=ErrorCode.TABLE_STOPPED,
                    )
                if existing.misnamed:
                    raise ArkaError(existing.refusal, code=ErrorCode.TABLE_STOPPED)
                ddl.check_identical(definition, existing.info)
                return existing, False
            if self._draining:
                raise Unavailable("The server is draining")
            suffix = ddl.new_location_suffix()
            lsn = self._creates.begin(definition, suffix)
            await self._disk.wait_reached(lsn)
            await failpoints.reach("create.recorded")
            try:
                return await self._carry_out_create(definition, suffix)
            except ArkaError:
                self._creates.failed(definition.name, suffix)
                raise

    async def _carry_out_create(self, definition: TableDefinition, suffix: str) -> tuple[Table, bool]:
        """Make a table whose intent is in the log, and log what was made.

        Raises:
            ArkaError: see ``create``.

        Cancellation: the intent stays open: the next start finishes it (R41).
        """
        try:
            # Folders are made below a marker that was just read, and nowhere else (R28).
            await self.watch.check()
        except CatalogUnavailable as error:
            raise Unavailable(f"{definition.name} was not created: {error}") from error
        found, created = await ddl.create_table(self.catalog, definition, suffix, owner=self._owner)
        await failpoints.reach("create.done")
        self._creates.made(found.info, suffix)
        table = await self.register(found)
        if created:
            table.created_lsn = self._memory.last_lsn
        return table, created

    async def _finish_create(self, pending: PendingCreate, listing: CatalogListing) -> None:
        """Do a create that an earlier process wrote into the log, whose client was told nothing.

        Raises:
            CatalogUnavailable: ask again.
        """
        name, suffix = pending.definition.name, pending.suffix
        async with self._ddl_lock:
            made = next((t for t in listing.tables if t.info.location.endswith(f"-{suffix}")), None)
            if made is not None:
                self._creates.made(made.info, suffix)
                return
            if listing.unread:
                raise CatalogUnavailable(f"it may be one of {sorted(map(str, listing.unread))}, which cannot be read")
            try:
                await self._carry_out_create(pending.definition, suffix)
            except Unavailable as error:
                raise CatalogUnavailable(error.detail) from error
            except ArkaError as error:
                self._creates.failed(name, suffix)
                log.warning("table.create_given_up", table=str(name), reason=error.detail)
            else:
                log.info("table.create_finished", table=str(name))

    async def _retry_create(self, pending: PendingCreate) -> None:
        """Finish a create that could not be at the start.

        Raises:
            CatalogUnavailable: ask again.
        """
        await self._finish_create(pending, await self.catalog.list_tables())

    async def drop(self, name: TableName, *, purge: bool, uuid: UUID | None = None) -> TableName:
        """Drop a table; its writes in flight end with ``table_dropped``.

        Args:
            name: the table's.
            purge: whether its files are deleted too.
            uuid: the one that is meant; needed for one that is gone while another table has its name (R18).

        Raises:
            ArkaError: ``table_not_found``.
            Unavailable: the catalog does not answer; the drop is in the log and may be asked for again. Or the server
                is stopping, and nothing was done.
        """
        async with self._ddl_lock:
            table = await self._find_meant(name, uuid)
            if table.misnamed:
                raise ArkaError(f"Table not found: {_spoken(name)}. {table.refusal}", code=ErrorCode.TABLE_NOT_FOUND)
            if table.drop_lsn is None:
                await self._check_named(table, name)
        # The client may go away, the drop may not: once its record is in the log it is carried out.
        done = _Outcome()
        if self._nursery is None:
            raise Unavailable("The server is stopping")
        self._nursery.start_soon(self._drop, table, purge, done)
        await done.wait()
        return name

    async def _find_meant(self, name: TableName, uuid: UUID | None) -> Table:
        """Find the table that is to be dropped: one that is stopped keeps writes although its name is another table's.

        Raises:
            ArkaError: see ``find``; ``table_not_found``: another table has the name.
            Unavailable: see ``find``.
        """
        known = None if uuid is None else self._by_uuid.get(uuid)
        if known is not None:
            await self.adoption.refresh(known, max_age_s=0)
            if known.state is TableState.STOPPED and known.info.name == name:
                return known
        table = await self.find_fresh(name, max_age_s=0)
        if uuid not in (None, table.info.uuid):
            raise ArkaError(
                f"Table not found: {_spoken(name)} with the UUID {uuid} (the name is table {table.info.uuid}'s)",
                code=ErrorCode.TABLE_NOT_FOUND,
            )
        return table

    async def _check_named(self, table: Table, name: TableName) -> None:
        """Check that the catalog means the same table by a name that is about to be dropped (R5).

        Raises:
            ArkaError: ``table_not_found``: others renamed it, or the name is another table's.
            Unavailable: the catalog does not answer.
        """
        try:
            found = await ddl.load_table(self.catalog, name)
        except ArkaError as error:
            if error.code is not ErrorCode.TABLE_STOPPED:
                raise
            # Some table that cannot be written: the catalog drops it by its UUID, or finds that it is another.
            return
        if found is not None and found.info.uuid == table.info.uuid:
            return
        try:
            await self._look_for(table)
        except CatalogUnavailable as error:
            raise Unavailable(f"The catalog does not answer, so {name} may be another table now: {error}") from error
        if table.info.name != name:
            raise ArkaError(
                f"Table not found: {_spoken(name)} (it was renamed to {table.info.name})",
                code=ErrorCode.TABLE_NOT_FOUND,
            )

    async def _drop(self, table: Table, purge: bool, done: _Outcome) -> None:
        """Carry a drop out, whatever its client does; the client hears of the first attempt."""
        info = table.info
        async with self._ddl_lock:
            if info.uuid in self._dropped:
                done.set(None)
                return
            if table.drop_lsn is None:
                # The record stays in the log until the catalog has done it: a restart finishes it.
                try:
                    table.drop_lsn = ddl.log_drop(self._memory, info, purge=purge)
                except Unavailable as error:
                    # No LSN can be given now (R31): nothing was done.
                    done.set(error)
                    return
                table.coming = ddl.dropped(info)
            await self._disk.wait_reached(table.drop_lsn)
            await failpoints.reach("drop.recorded")
            await self._end_tending(info.uuid)
            try:
                await self._drop_in_catalog(info, purge=purge)
            except CatalogUnavailable as error:
                done.set(Unavailable(f"The catalog does not answer, so {info.name} may still be there: {error}"))
                return
            except ArkaError as error:
                done.set(error)
                return
            await failpoints.reach("drop.done")
            # Only now is it true whatever happens: until the catalog has done it, the loss of this disk undoes it.
            table.end(ddl.dropped(info))
            noted_lsn = self.dropped_lsn = ddl.log_drop_done(self._memory, info.uuid)
            await self._disk.wait_reached(noted_lsn)
            await failpoints.reach("drop.noted")
            self._dropped.add(info.uuid)
            if self._by_name.get(info.name) is table:
                del self._by_name[info.name]
            self._by_uuid.pop(info.uuid, None)
            table.backlog.count_in(None)
            self._marks.forget(info.uuid)
            self._keys.drop_table(info.uuid)
        done.set(None)
        if self._parking.loaded:
            await self._parking.forget(info.uuid)
            await self.apart.forget(info.uuid)
        else:
            self._orphans.add(info.uuid)

    async def _drop_in_catalog(self, info: TableInfo, *, purge: bool) -> None:
        """Drop a table that may have got another name since it was looked up; one that is gone is no error (R5).

        Raises:
            CatalogUnavailable: ask again.
        """
        try:
            await self.catalog.drop_table(info.name, info.uuid, purge=purge)
        except TableMissing:
            name = self._name_of(info.uuid, await self.catalog.list_tables())
            if name is not None:
                await ddl.drop_table(self.catalog, name, info.uuid, purge=purge)

    def _name_of(self, uuid: UUID, listing: CatalogListing) -> TableName | None:
        """Find a table by its UUID, also one that Arka cannot write; None when it is gone.

        Raises:
            CatalogUnavailable: it may be one that cannot be read.
        """
        pending = self._pending_drops.get(uuid)
        names = {uuid: pending.name} if pending is not None else {}
        loaded = own_entries(listing, names, self._log_uuid).get(uuid)
        unusable = listing.unusable.get(uuid)
        name = loaded.info.name if loaded is not None else None if unusable is None else unusable.name
        if name is None and (strangers := listing.unread - {known.info.name for known in self.all()}):
            raise CatalogUnavailable(f"it may be one of {sorted(map(str, strangers))}, which cannot be read")
        return name

    async def _finish_drop(self, uuid: UUID, listing: CatalogListing) -> None:
        """Do a drop that an earlier process wrote into the log.

        Raises:
            CatalogUnavailable: ask again.
        """
        name = self._name_of(uuid, listing)
        if name is not None:
            await ddl.drop_table(self.catalog, name, uuid, purge=self._pending_drops[uuid].purge)
            log.info("table.drop_finished", table=str(name))
        # Also of one that was gone: whoever registers it again does not mean it to be dropped again.
        self.dropped_lsn = ddl.log_drop_done(self._memory, uuid)
        self._dropped.add(uuid)
        del self._pending_drops[uuid]

    async def _retry_drop(self, uuid: UUID) -> None:
        """Finish a drop that could not be at the start.

        Raises:
            CatalogUnavailable: ask again.
        """
        async with self._ddl_lock:
            await self._finish_drop(uuid, await self.catalog.list_tables())


def _spoken(name: TableName) -> str:
    """A table's name as its client most likely wrote it: without the default namespace."""
    return name.name if name.namespace == "default" else str(name)


__all__ = ["Tables"]
