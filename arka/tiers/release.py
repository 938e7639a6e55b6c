"""Letting go of the log: segments and WAL objects that nothing needs any more (R12).

Owns: when a segment or an object may go, and the checkpoint that has to be durable in the object store
before. Does not own the files (``arka.wal.writer``) nor the keys (``arka.tiers.keys``).

A segment may go when the object store has all of it, every table has committed its frames in it, a
checkpoint with its keys and the lost ranges is in the store, and a grace period has passed since. Whoever deletes
looks first whether the log is still its own: what a successor may be reading stays.
Checkpoints are incremental: each covers the LSNs since the one before, and goes when its keys are forgotten.
Beside them it says which tables there are (R5) and what the log's clock shows.

Layout, below the node's id: ``checkpoint/<epoch, 10 digits>/<through LSN, 16 digits>``, create-only: a
MessagePack record behind its CRC-32C.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import msgspec
import structlog
import trio

from arka import failpoints
from arka._core.framing import crc32c
from arka._core.keys import ENTRY_BYTES
from arka.errors import DataCorruption
from arka.options import MIB
from arka.records import HeldObject, KnownTable, LsnRange, TableInfo, TableName
from arka.storage.ports import ObjectExists, ObjectStore, StoreUnavailable
from arka.tiers.keys import KeyIndex
from arka.tiers.listing import list_own
from arka.tiers.logclock import LogClock
from arka.tiers.space import DiskSpace
from arka.tiers.watermarks import now_us
from arka.wal.segment import SegmentRef
from arka.wal.shortage import is_shortage
from arka.wal.writer import WalWriter

log = structlog.get_logger(__name__)

#: How often the log is looked at, in seconds; a segment takes longer to fill.
_POLL_S: Final = 1.0
#: About the most bytes of keys in one checkpoint: it is held in memory when it is written and when it is read.
_CHECKPOINT_BYTES: Final = 4 * MIB
#: In front of a checkpoint's record.
_CRC_BYTES: Final = 4
#: Fields of schemas that one step spells, and what a table costs beside its own: about a millisecond.
_STEP_FIELDS: Final = 1_000
_TABLE_FIELDS: Final = 20


#: By table, the objects outside of the log that hold frames of it.
Elsewhere = Mapping[UUID, Sequence[HeldObject]]


class _Checkpoint(msgspec.Struct, frozen=True, array_like=True):
    """The stored form; fields are only ever added, with a default."""

    log_uuid: str
    epoch: int
    after_lsn: int
    through_lsn: int
    #: The wall clock, for people.
    written_us: int
    #: The log's clock: by then Iceberg held of each table what ``tables`` says.
    clock_us: int
    #: (after, through, noted at, by the log's clock)
    lost: list[tuple[int, int, int]]
    #: (table UUID, entries as ``KeyIndex.uncovered`` packs them)
    keys: list[tuple[bytes, bytes]]
    #: (UUID of a dropped table, last LSN of its keys that count no more)
    dropped: list[tuple[bytes, int]]
    #: Every table known: UUID, ``TableInfo.to_bytes``, the last LSN that Iceberg was seen to hold of it, and the LSN
    #: from which on it is known.
    tables: list[tuple[bytes, bytes, int, int]]
    #: Of the log on the disk that ``quiet`` speaks of (R37).
    birth: int = 0
    #: UUIDs of the tables that were quiet when this was written.
    quiet: list[bytes] = []
    #: (after, through, UUIDs): against whom a lost range counts; one that is not here counts against all.
    lost_tables: list[tuple[int, int, list[bytes]]] = []
    #: UUIDs of the tables that had frames parked or set apart, in the object store only (R38); None in older ones.
    elsewhere: list[bytes] | None = None
    #: Of those the objects with the frames: (UUID, [(key below the node's name, first LSN, last LSN)]) (R33). None in
    #: older ones.
    held: list[tuple[bytes, list[tuple[str, int, int]]]] | None = None
    #: The LSNs that are set aside: (UUID, LSNs) (R32).
    asides: list[tuple[bytes, list[int]]] = []


@dataclass(frozen=True, slots=True)
class LostRange:
    """LSNs that a crash lost, and when that was found (R3)."""

    range: LsnRange
    #: By the log's clock.
    noted_us: int
    #: Which tables may have lost writes in it; None for all (R37).
    tables: frozenset[UUID] | None = None

    def counts_against(self, table: UUID) -> bool:
        """Whether writes of this table may be among them."""
        return self.tables is None or table in self.tables


@dataclass(frozen=True, slots=True)
class LoadedCheckpoints:
    """What the checkpoints in the store remember beside keys.

    Attributes:
        lost: the lost ranges that are still to be remembered.
        tables: the tables that the newest one knows.
        through_lsn: everything up to here is covered.
        clock_us: the highest value of the log's clock.
        birth: of the log on the disk that ``quiet`` speaks of.
        quiet: the tables that were quiet when the newest one was written (R37).
        held: by table, the objects outside of the log that had frames of it then (R33); None if it does not say.
        asides: by table, the LSNs that were set aside by then (R32).
    """

    lost: tuple[LostRange, ...]
    tables: tuple[KnownTable, ...]
    through_lsn: int
    clock_us: int
    birth: int = 0
    quiet: frozenset[UUID] = frozenset()
    held: Elsewhere | None = None
    asides: Mapping[UUID, frozenset[int]] = field(default_factory=dict)


@dataclass(slots=True)
class _HeldSegment:
    """A segment that is on disk: its last LSN so far, its size so far, and the bytes of the log before it."""

    ref: SegmentRef
    last_lsn: int
    size: int
    begin: int


class LogRelease:
    """Deletes what the log no longer needs. Used from trio's thread."""

    def __init__(
        self,
        store: ObjectStore,
        writer: WalWriter,
        keys: KeyIndex,
        space: DiskSpace,
        clock: LogClock,
        *,
        verify: Callable[[], Awaitable[None]],
        node_id: str,
        log_uuid: UUID,
        epoch: Callable[[], int],
        lost: Iterable[LostRange],
        after_lsn: int,
        retention_s: float,
        grace_s: float,
        backup_runs: Callable[[], bool] = lambda: False,
    ) -> None:
        """Join the log with what decides over it.

        Args:
            store: holds checkpoints and WAL objects.
            writer: unlinks segments.
            keys: gives the keys that a checkpoint must carry.
            space: told of the room.
            clock: says how old keys and lost ranges are.
            verify: raises ``Fenced`` once the log is another process's; asked before anything is deleted.
            node_id: the node's name in the store.
            log_uuid: the log.
            epoch: returns this process's epoch; there is one when ``run`` is called.
            lost: lost ranges that are remembered.
            after_lsn: checkpoints cover everything up to here already.
            retention_s: how long keys and lost ranges are kept.
            grace_s: how long a segment stays after its checkpoint.
            backup_runs: returns whether a backup is being made: then nothing goes (R38).
        """
        self._backup_runs = backup_runs
        self._store = store
        self._writer = writer
        self._keys = keys
        self._space = space
        self._clock = clock
        self._verify = verify
        self._node_id = node_id
        self._log_uuid = log_uuid
        self._epoch = epoch
        self._lost = list(lost)
        self._covered_lsn = after_lsn
        self._quiet: Callable[[], tuple[int, Iterable[UUID]]] = lambda: (0, ())
        self._elsewhere: Callable[[], Elsewhere | None] = lambda: None
        self._asides: Callable[[], Mapping[UUID, Iterable[int]]] = dict
        self._wait_stored: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self._retention_us = int(retention_s * 1e6)
        self._grace_s = grace_s
        # Oldest first; the last one may be active.
        self._held: deque[_HeldSegment] = deque()
        # Bytes of all segments that were ever noted.
        self._noted_bytes = 0
        # Segments whose checkpoint is durable, with the time from which on they may go.
        self._doomed: deque[tuple[_HeldSegment, float]] = deque()
        # The segments up to here are gone; the objects too when the second one is as high.
        self._released_lsn = 0
        self._deleted_lsn = 0

    @property
    def owed_bytes(self) -> int:
        """About how many bytes the next checkpoints will take."""
        return self._keys.fresh_bytes

    def note(self, ref: SegmentRef, last_lsn: int, size: int) -> None:
        """Note bytes of a segment that are on disk; log order."""
        if self._held and self._held[-1].ref == ref:
            held = self._held[-1]
            held.last_lsn = last_lsn
            held.size += size
        else:
            self._held.append(_HeldSegment(ref, last_lsn, size, self._noted_bytes))
        self._noted_bytes += size

    def held_bytes(self, lsn: int) -> int:
        """Bytes of the segments that hold frames from ``lsn`` on."""
        at = bisect_left(self._held, lsn, key=lambda held: held.last_lsn)
        return self._noted_bytes - self._held[at].begin if at < len(self._held) else 0

    def last_holds_all(self, needed: int) -> bool:
        """Whether nothing of the log is needed any more, and the one segment that is left may still be active.

        Args:
            needed: the least LSN that a later tier still needs.
        """
        return len(self._held) == 1 and not self._doomed and self._held[0].last_lsn < needed

    def remembered_lost(self) -> list[LostRange]:
        """The lost ranges whose retention is not over (R3)."""
        oldest_us = self._clock.now_us() - self._retention_us
        self._lost = [lost for lost in self._lost if lost.noted_us >= oldest_us]
        return self._lost

    async def run(
        self,
        needed_from: Callable[[], Awaitable[int]],
        tables: Callable[[], Iterable[KnownTable]],
        quiet: Callable[[], tuple[int, Iterable[UUID]]] = lambda: (0, ()),
        elsewhere: Callable[[], Elsewhere | None] = lambda: None,
        asides: Callable[[], Mapping[UUID, Iterable[int]]] = dict,
        wait_stored: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    ) -> None:
        """Look for what may go, until cancelled. Outages are waited for.

        Args:
            needed_from: returns the least LSN that a later tier still needs.
            tables: returns every table that is known.
            quiet: returns the log's birth and the quiet tables (R37).
            elsewhere: returns the objects with frames that may be in the object store only, by table (R33, R38); None
                if nobody can say.
            asides: returns the LSNs that are set aside, by table (R32).
            wait_stored: waits until the object store has the record of each drop that is done.

        Raises:
            Fenced: another process owns the log.
            OSError: the disk does not unlink.

        Cancellation: what was not deleted yet is deleted after the next start.
        """
        self._quiet = quiet
        self._elsewhere = elsewhere
        self._asides = asides
        self._wait_stored = wait_stored
        while True:
            await trio.sleep(_POLL_S)
            # Also of tables that nobody commits to any more.
            while self._keys.expire(self._clock.now_us()):
                await trio.lowlevel.checkpoint()
            if self._backup_runs():
                continue
            try:
                while await self._checkpoint(await needed_from(), tables):
                    pass
                await self._delete()
            except StoreUnavailable as error:
                log.debug("log.release_stalled", reason=str(error))

    async def _checkpoint(self, needed: int, tables: Callable[[], Iterable[KnownTable]]) -> bool:
        """Cover some of the segments that no tier needs any more by a checkpoint; false when there are none."""
        free: list[_HeldSegment] = []
        # The last one is active or may still become so: it stays.
        while len(self._held) > len(free) + 1 and self._held[len(free)].last_lsn < needed:
            held = self._held[len(free)]
            if free and await self._keys.uncovered_bytes(held.last_lsn, _CHECKPOINT_BYTES) > _CHECKPOINT_BYTES:
                break
            free.append(held)
        if not free:
            return False
        through_lsn = free[-1].last_lsn
        if through_lsn > self._covered_lsn:
            await self._write_checkpoint(through_lsn, tables)
            self._covered_lsn = through_lsn
            await self._keys.forget_uncovered(through_lsn)
        due = trio.current_time() + self._grace_s
        for held in free:
            self._held.popleft()
            self._doomed.append((held, due))
        return True

    async def _pack_keys(self, through_lsn: int) -> list[tuple[bytes, bytes]]:
        """Pack the keys that no checkpoint covers, a piece at a time: there may be millions, of thousands of tables."""
        made = []
        for table, packed in self._keys.uncovered(through_lsn):
            if packed:
                made.append((table.bytes, packed))
            await trio.lowlevel.checkpoint()
        return made

    async def _write_checkpoint(self, through_lsn: int, tables: Callable[[], Iterable[KnownTable]]) -> None:
        keys = await self._pack_keys(through_lsn)
        # All else in one step: a table that was dropped meanwhile is among ``dropped`` now, behind its keys.
        birth, quiet = self._quiet()
        elsewhere = self._elsewhere()
        lost_tables = [
            (lost.range.after, lost.range.through, [table.bytes for table in sorted(lost.tables)])
            for lost in self.remembered_lost()
            if lost.tables is not None
        ]
        record = _Checkpoint(
            log_uuid=str(self._log_uuid),
            epoch=self._epoch(),
            after_lsn=self._covered_lsn,
            through_lsn=through_lsn,
            written_us=now_us(),
            clock_us=self._clock.now_us(),
            lost=[(lost.range.after, lost.range.through, lost.noted_us) for lost in self.remembered_lost()],
            keys=keys,
            dropped=[(table.bytes, lsn) for table, lsn in self._keys.dropped()],
            tables=[],
            birth=birth,
            quiet=[table.bytes for table in quiet],
            lost_tables=lost_tables,
            elsewhere=None if elsewhere is None else [table.bytes for table in elsewhere],
            held=None if elsewhere is None else [(table.bytes, list(objects)) for table, objects in elsewhere.items()],
            asides=[(table.bytes, sorted(lsns)) for table, lsns in self._asides().items()],
        )
        known = list(tables())
        fields = 0
        for table in known:
            # What they are was taken above; to spell a schema takes far longer.
            record.tables.append((table.info.uuid.bytes, table.info.to_bytes(), *table[1:]))
            fields += len(table.info.schema) + _TABLE_FIELDS
            if fields >= _STEP_FIELDS:
                fields = 0
                await trio.lowlevel.checkpoint()
        # A drop counts here once the catalog has done it, and its record is on the disk by then. If this disk were lost
        # with the record, the log would bring the table back, and its keys and frames would be gone.
        await self._wait_stored()
        body = msgspec.msgpack.encode(record)
        key = f"{self._node_id}/checkpoint/{self._epoch():010d}/{through_lsn:016d}"
        await failpoints.reach("release.begin")
        try:
            await self._store.put_new(key, [crc32c(body).to_bytes(_CRC_BYTES, "little"), body])
        except ObjectExists:
            # Our own attempt whose response was lost: the epoch is ours and the range is the same. The clock in it is
            # the earlier one, and all that it holds was committed by then.
            log.debug("log.checkpoint_exists", key=key)
        await failpoints.reach("release.checkpoint")
        count = sum(len(packed) for _, packed in record.keys) // ENTRY_BYTES
        log.info("log.checkpoint", through_lsn=through_lsn, keys=count, tables=len(record.tables), bytes=len(body))

    async def _delete(self) -> None:
        """Delete the segments, WAL objects and checkpoints whose time has come."""
        if self._doomed and self._doomed[0][1] <= trio.current_time():
            await self._verify()
            now = trio.current_time()
            gone: list[_HeldSegment] = []
            while self._doomed and self._doomed[0][1] <= now:
                gone.append(self._doomed.popleft()[0])
            try:
                await self._writer.retire([held.ref for held in gone])
            except OSError as error:
                if not is_shortage(error):
                    raise
                # Those that are gone already are passed over by the next attempt (R31).
                log.warning("log.release_stalled", segments=len(gone), reason=str(error))
                self._doomed.extendleft((held, now) for held in reversed(gone))
                return
            await failpoints.reach("release.retired")
            size = sum(held.size for held in gone)
            self._space.note_released(size)
            self._released_lsn = gone[-1].last_lsn
            log.info("log.released", segments=len(gone), bytes=size, through_lsn=self._released_lsn)
        if self._deleted_lsn < self._released_lsn:
            through_lsn = self._released_lsn
            await self._delete_objects(through_lsn)
            self._deleted_lsn = through_lsn
            await failpoints.reach("release.deleted")

    async def _delete_objects(self, through_lsn: int) -> None:
        """Delete WAL objects that lie wholly below ``through_lsn``, and checkpoints whose keys are all forgotten.

        An object's key gives its first LSN only; it ends below its successor's first. A checkpoint's key gives its
        last LSN; none of its keys is in the index any more when that begins above it.
        """
        metas = await list_own(self._store, self._node_id, "wal/")
        firsts = [int(meta.key.rpartition("/")[2].removesuffix(".wal")) for meta in metas]
        dead = [meta.key for meta, following in zip(metas, firsts[1:], strict=False) if following <= through_lsn + 1]
        # The newest one stays: it says how far the log was let go of.
        checkpoints = (await list_own(self._store, self._node_id, "checkpoint/"))[:-1]
        first_key_lsn = await self._keys.first_lsn()
        expired_lsn = 0
        for meta in checkpoints:
            last_lsn = covered_lsn(meta.key)
            if first_key_lsn is not None and last_lsn >= first_key_lsn:
                break
            expired_lsn = max(expired_lsn, last_lsn)
            dead.append(meta.key)
        await self._verify()
        await self._store.delete(dead)
        self._keys.forget_dropped(expired_lsn)


async def load_checkpoints(
    store: ObjectStore, node_id: str, log_uuid: UUID, retention_s: float, keys: KeyIndex
) -> LoadedCheckpoints:
    """Read the checkpoints of a log, oldest first, one at a time.

    Args:
        store: the object store.
        node_id: the node's name in it.
        log_uuid: the log.
        retention_s: lost ranges older than this are forgotten.
        keys: takes the keys as they come. After a failure the call may be repeated with the same one.

    Raises:
        DataCorruption: one is damaged or another log's.
        StoreUnavailable: the store does not answer.

    Cancellation: some keys may have been taken.
    """
    lost: list[LostRange] = []
    newest: _Checkpoint | None = None
    through_lsn = clock_us = 0
    metas = await list_own(store, node_id, "checkpoint/")
    for meta in metas:
        try:
            data = await store.get(meta.key)
        except KeyError:
            # A predecessor that has not noticed yet that it is fenced deletes what has expired, never the newest one.
            if meta is metas[-1]:
                raise DataCorruption(f"{store.url}/{meta.key}", 0, "a checkpoint", "no object") from None
            log.debug("log.checkpoint_gone", key=meta.key)
            continue
        newest = _parse(store.url, meta.key, data, log_uuid)
        # A fenced process's clock may be ahead of its successor's: nothing may look older than it was to its writer.
        clock_us = max(clock_us, newest.clock_us)
        behind_us = clock_us - newest.clock_us
        await _take_keys(f"{store.url}/{meta.key}", newest, keys, clock_us)
        against = {
            LsnRange(after, through): frozenset(UUID(bytes=table) for table in hurt)
            for after, through, hurt in newest.lost_tables
        }
        noted = [
            LostRange(found, noted_us + behind_us, against.get(found))
            for found, noted_us in ((LsnRange(after, through), noted_us) for after, through, noted_us in newest.lost)
        ]
        lost = merge_lost([lost, noted])
        through_lsn = max(through_lsn, newest.through_lsn)
    if newest is None:
        return LoadedCheckpoints((), (), 0, 0)
    await keys.forget_uncovered(through_lsn)
    for table, lsn in newest.dropped:
        keys.drop_table(UUID(bytes=table), lsn)
    remembered = (item for item in lost if item.noted_us >= clock_us - int(retention_s * 1e6))
    try:
        tables = tuple(KnownTable(TableInfo.from_bytes(data), *lsns) for _, data, *lsns in newest.tables)
    except ValueError as error:
        raise DataCorruption(f"{store.url}/{metas[-1].key}", _CRC_BYTES, "table records", str(error)) from error
    quiet = frozenset(UUID(bytes=table) for table in newest.quiet)
    asides = {UUID(bytes=table): frozenset(lsns) for table, lsns in newest.asides}
    held = _held_of(newest)
    return LoadedCheckpoints(tuple(remembered), tables, through_lsn, clock_us, newest.birth, quiet, held, asides)


def covered_lsn(key: str) -> int:
    """The last LSN that a checkpoint covers, by its key."""
    return int(key.rpartition("/")[2])


def covered_after(path: str, data: bytes) -> int:
    """The LSN above which a checkpoint covers.

    Raises:
        DataCorruption: it is damaged.
    """
    return _parse_any(path, data).after_lsn


def frames_elsewhere(path: str, data: bytes) -> list[KnownTable] | None:
    """The tables with frames in the object store only of which a checkpoint does not say where; None if it is silent.

    Raises:
        DataCorruption: it is damaged.
    """
    record = _parse_any(path, data)
    if record.elsewhere is None:
        return None
    if record.held is not None:
        return []
    try:
        tables = [KnownTable(TableInfo.from_bytes(data), *lsns) for _, data, *lsns in record.tables]
    except ValueError as error:
        raise DataCorruption(path, _CRC_BYTES, "table records", str(error)) from error
    return [table for table in tables if table.info.uuid.bytes in record.elsewhere]


def held_elsewhere(path: str, data: bytes) -> list[tuple[TableName, HeldObject]]:
    """The objects outside of the log that a checkpoint names, each with its table's name then.

    Raises:
        DataCorruption: it is damaged.
    """
    record = _parse_any(path, data)
    try:
        names = {uuid: TableInfo.from_bytes(data).name for uuid, data, *_ in record.tables}
    except ValueError as error:
        raise DataCorruption(path, _CRC_BYTES, "table records", str(error)) from error
    held = _held_of(record) or {}
    return [(names[uuid.bytes], each) for uuid, objects in held.items() if uuid.bytes in names for each in objects]


def _held_of(record: _Checkpoint) -> Elsewhere | None:
    """The objects outside of the log that a checkpoint names; None if it does not say."""
    if record.held is None:
        return {} if record.elsewhere == [] else None
    return {UUID(bytes=table): tuple(HeldObject(*each) for each in objects) for table, objects in record.held}


async def _take_keys(path: str, record: _Checkpoint, keys: KeyIndex, clock_us: int) -> None:
    """Take a checkpoint's keys, and what was committed when it was written: not those of parked writes (R18, R21)."""
    for table_bytes, packed in record.keys:
        try:
            table = UUID(bytes=table_bytes)
            await keys.load_steps(table, packed)
        except ValueError as error:
            raise DataCorruption(path, _CRC_BYTES, "keys in LSN order", str(error)) from error
    for table_bytes, _, committed_lsn, _ in record.tables:
        keys.note_committed(UUID(bytes=table_bytes), committed_lsn, clock_us)


def _parse(url: str, key: str, data: bytes, log_uuid: UUID) -> _Checkpoint:
    path = f"{url}/{key}"
    record = _parse_any(path, data)
    if record.log_uuid != str(log_uuid):
        raise DataCorruption(path, _CRC_BYTES, f"log {log_uuid}", f"log {record.log_uuid}")
    return record


def _parse_any(path: str, data: bytes) -> _Checkpoint:
    body = data[_CRC_BYTES:]
    found, expected = int.from_bytes(data[:_CRC_BYTES], "little"), crc32c(body)
    if len(data) < _CRC_BYTES or found != expected:
        raise DataCorruption(path, 0, f"crc {expected:08x}", f"{found:08x}")
    try:
        record = msgspec.msgpack.decode(body, type=_Checkpoint)
    except msgspec.MsgspecError as error:
        raise DataCorruption(path, _CRC_BYTES, "a checkpoint", str(error)) from error
    return record


def merge_lost(groups: Sequence[Iterable[LostRange]]) -> list[LostRange]:
    """Join lost ranges from several places, by LSN: each range once, from when it was first noted."""
    merged: dict[LsnRange, LostRange] = {}
    for group in groups:
        for lost in group:
            known = merged.get(lost.range)
            if known is not None:
                # Of two that disagree the one that counts against more.
                both = None if lost.tables is None or known.tables is None else lost.tables | known.tables
                lost = LostRange(lost.range, min(lost.noted_us, known.noted_us), both)
            merged[lost.range] = lost
    return [merged[key] for key in sorted(merged)]


__all__ = [
    "Elsewhere",
    "LoadedCheckpoints",
    "LogRelease",
    "LostRange",
    "covered_after",
    "covered_lsn",
    "frames_elsewhere",
    "held_elsewhere",
    "load_checkpoints",
    "merge_lost",
]
