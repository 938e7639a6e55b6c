"""From a data directory and an object store to a running pipeline: identity, recovery, replay.

Owns: the order of a start. The epoch comes before anything else in the store is looked at (R10), recovered frames
are disk-safe before anything calls them so (R6), tables come before their frames are handed to them.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

import structlog
import trio

from arka import failpoints
from arka._core.framing import KIND_BATCH, KIND_DROP, KIND_LOST, KIND_TABLE, crc32c
from arka._core.lsn import LsnAllocator
from arka.errors import ConfigurationError, DataCorruption, ErrorCode
from arka.options import Settings
from arka.records import LsnRange, TableInfo, Tier
from arka.storage.ports import (
    Catalog,
    CatalogTable,
    CatalogUnavailable,
    Disk,
    ObjectStore,
    StoreRefused,
    StoreUnavailable,
    TableMissing,
)
from arka.storage.threads import run_compute
from arka.tiers import ddl
from arka.tiers.epochs import LocalLog, take_epoch
from arka.tiers.keys import KeyIndex
from arka.tiers.memory import MemoryTier
from arka.tiers.objects import Compute, ObjectTier, ReadRange
from arka.tiers.pipeline import LogIdentity, Marks, Pipeline
from arka.tiers.release import KEY_ENTRY_BYTES, LogRelease, LostRange, load_checkpoints, merge_lost
from arka.tiers.reservation import DISK_BLOCK, LsnReservation
from arka.tiers.space import NOT_SHARED, DiskSpace, SharedRoom
from arka.tiers.table import Ending, Table, TableState
from arka.tiers.watermarks import Watermark, now_us
from arka.wal.logstate import LogState
from arka.wal.recovery import RecoveredFrame, RecoveredLog, recover
from arka.wal.segment import encode_lost, parse_lost
from arka.wal.writer import WalWriter

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: Pause between two questions to a catalog that is away at start, in seconds.
_CATALOG_RETRY_S: Final = 1.0
#: The same for an object store.
_STORE_RETRY_S: Final = 1.0
#: How often a long recovery says how far it is, in seconds.
_PROGRESS_S: Final = 1.0


@dataclass(slots=True)
class _TableFrames:
    """One table's recovered frames: where they lie, as the backlog wants them."""

    paths: list[tuple[str, int, int]] = field(default_factory=list)
    # Per frame: index into paths, LSN, offset, frame bytes.
    places: array[int] = field(default_factory=lambda: array("Q"))
    keys: list[tuple[bytes, int, int]] = field(default_factory=list)
    last_lsn: int = 0
    # By schema id; the last one met is the newest that this log knows.
    infos: dict[int, TableInfo] = field(default_factory=dict)


class _Replay:
    """What recovery finds, gathered by table with bounded memory: integers per write, bytes only per key."""

    def __init__(self) -> None:
        self.tables: dict[UUID, _TableFrames] = {}
        # Drops that the catalog may not have done yet.
        self.drops: dict[UUID, ddl.DropRecord] = {}
        self.lost: list[LostRange] = []
        #: What a checkpoint of all keys would take.
        self.key_bytes = 0

    def take(self, frame: RecoveredFrame) -> None:
        """Take one frame, in LSN order."""
        header = frame.header
        match header.kind:
            case kind if kind == KIND_BATCH:
                self._take_batch(frame)
            case kind if kind == KIND_TABLE:
                info = TableInfo.from_bytes(frame.payload())
                self._frames(info.uuid).infos[info.schema_id] = info
            case kind if kind == KIND_DROP:
                record = ddl.parse_drop(frame.payload())
                uuid = ddl.parse_table_uuid(record)
                # What was written before the drop went with the table; what comes behind it, in a table that was
                # registered again, does not.
                self.tables.pop(uuid, None)
                if record.done:
                    self.drops.pop(uuid, None)
                else:
                    self.drops[uuid] = record
            case kind if kind == KIND_LOST:
                self.lost.append(LostRange(parse_lost(frame.payload()), header.accepted_us))

    def _frames(self, uuid: UUID) -> _TableFrames:
        frames = self.tables.get(uuid)
        if frames is None:
            frames = self.tables[uuid] = _TableFrames()
        return frames

    def _take_batch(self, frame: RecoveredFrame) -> None:
        header, segment = frame.header, frame.segment
        frames = self._frames(UUID(bytes=header.table_uuid))
        place = (str(segment.path), segment.number, segment.epoch)
        if not frames.paths or frames.paths[-1] != place:
            frames.paths.append(place)
        frames.places.extend((len(frames.paths) - 1, header.lsn, frame.offset, header.frame_bytes))
        frames.last_lsn = header.lsn
        if header.key_bytes:
            frames.keys.append((frame.key, header.lsn, crc32c(frame.payload_view())))
            self.key_bytes += header.key_bytes + KEY_ENTRY_BYTES


class _ProgressLog:
    """Says how far recovery is, once a second when it takes longer than that. Called in the disk's thread."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _PROGRESS_S

    def __call__(self, read_bytes: int, all_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_S
            percent = 100 * read_bytes // max(all_bytes, 1)
            log.info("wal.recovering", percent=percent, read_bytes=read_bytes, all_bytes=all_bytes)


@dataclass(frozen=True, slots=True)
class OpenLog:
    """What ``open_pipeline`` gives: the pipeline, and what its start found, for the log and the status."""

    pipeline: Pipeline
    reservation: LsnReservation
    log_uuid: UUID
    epoch: int
    recovered_lsn: int
    next_lsn: int


async def open_pipeline(
    settings: Settings,
    data_dir: Path,
    *,
    disk: Disk,
    store: ObjectStore,
    catalog: Catalog,
    disk_uuid: UUID,
    read_range: ReadRange,
    read_free: Callable[[], int],
    survival: dict[str, bool],
    rng: random.Random,
    compute: Compute = run_compute,
    shared: SharedRoom = NOT_SHARED,
) -> OpenLog:
    """Take the log over and bring up everything that a crash left.

    Args:
        settings: all options; paths and URLs are already absolute.
        data_dir: holds ``wal/``.
        disk: where the WAL lies.
        store: the object store.
        catalog: the Iceberg catalog.
        disk_uuid: the identity of the data directory (R13).
        read_range: reads ``(path, start, end)`` of a segment for the object tier.
        read_free: returns the data directory's free bytes.
        survival: what each tier survives with these settings (R14).
        rng: for the jitter of retries.
        compute: runs what would hold trio's thread up; simulations have no threads.
        shared: which later tiers write to the log's own file system (R23).

    Raises:
        ConfigurationError: disk and store belong to different logs, or the disk is stale (R13).
        DataCorruption: the log is damaged (R7).
        Fenced: another process took a higher epoch meanwhile.

    Cancellation: as a crash: the next start does it again.
    """
    wal_dir = data_dir / "wal"
    state = await LogState.read(wal_dir, disk)
    if state is not None:
        # What a failed fsync left in the page cache is not on the disk: make it so before the store hears of it.
        state = await state.write(wal_dir, disk)
    local = None if state is None else LocalLog(state.log_uuid, state.epoch, state.lsn_ceiling)
    node_id = settings.server.node_id
    lease = await _ask_store(partial(take_epoch, store, node_id, local=local, disk_uuid=disk_uuid))
    first_lsn = lease.first_lsn if state is None else state.lsn_ceiling
    if state is None:
        state = await LogState.create(wal_dir, disk, log_uuid=lease.log_uuid, epoch=lease.epoch, lsn_ceiling=first_lsn)

    objects_mark = Watermark(Tier.OBJECT_STORAGE)
    objects = ObjectTier(
        store,
        lease,
        node_id=node_id,
        log_uuid=lease.log_uuid,
        options=settings.object_store,
        on_advance=objects_mark.advance,
        read_range=read_range,
        rng=rng,
        compute=compute,
    )
    retention_s = settings.idempotency.retention_s
    checkpoints = await _ask_store(partial(load_checkpoints, store, node_id, lease.log_uuid, retention_s))
    head_lsn = await _ask_store(partial(objects.resume, checkpoints.through_lsn))

    replay = _Replay()
    recovered = await recover(
        wal_dir,
        disk,
        log_uuid=lease.log_uuid,
        new_epoch=lease.epoch,
        on_frame=replay.take,
        on_progress=_ProgressLog(),
    )
    if recovered.torn is not None:
        log.warning("wal.torn_tail_dropped", **asdict(recovered.torn))
    last_lsn = recovered.last_lsn
    if head_lsn > last_lsn:
        # Only what is fsynced is uploaded (R4), so the disk has lost what it had promised (R7).
        raise DataCorruption(
            str(wal_dir), 0, f"LSN {head_lsn}, which {store.url} holds", f"a log that ends at LSN {last_lsn}"
        )
    first_lsn = max(first_lsn, last_lsn + 1)
    ceiling = min(first_lsn + DISK_BLOCK, lease.lsn_ceiling)
    # A higher epoch and a higher ceiling, before a segment carries the one or a write the other.
    await LogState(lease.log_uuid, lease.epoch, ceiling).write(wal_dir, disk)
    writer = await WalWriter.open(
        wal_dir,
        disk,
        log_uuid=lease.log_uuid,
        epoch=lease.epoch,
        first_segment=recovered.next_segment,
        options=settings.wal,
    )
    await failpoints.reach("start.recovered")

    allocator = LsnAllocator(first_lsn, ceiling)
    keys = KeyIndex(retention_s)
    for known in checkpoints.keys:
        keys.insert(known.table, known.key, known.lsn, known.digest, covered=True)
    memory = MemoryTier(allocator, keys)
    # Closed by the last process that gave LSNs, not by an earlier one: one that died before it wrote a segment
    # has left nothing else behind.
    complete = recovered.closed and (local is None or recovered.sealed_epoch == local.epoch)
    lost = merge_lost([checkpoints.lost, replay.lost, _note_lost(memory, complete, last_lsn, first_lsn)])
    space = _space(settings, recovered, read_free)
    release = LogRelease(
        store,
        writer,
        keys,
        space,
        node_id=node_id,
        log_uuid=lease.log_uuid,
        epoch=lease.epoch,
        lost=lost,
        after_lsn=checkpoints.through_lsn,
        retention_s=retention_s,
        grace_s=settings.wal.release_grace_s,
    )
    for segment in recovered.segments:
        # All keys with the last one: the next checkpoint takes what is free by then.
        keyed = replay.key_bytes if segment is recovered.segments[-1] else 0
        release.note(segment.ref, segment.last_lsn, segment.end_bytes, keyed)
    objects_mark.advance(head_lsn)
    pipeline = Pipeline(
        LogIdentity(lease.log_uuid, lease.epoch),
        memory,
        writer,
        objects,
        catalog,
        marks=Marks(Watermark(Tier.DISK, recovered.last_lsn), objects_mark),
        keys=keys,
        space=space,
        release=release,
        lost=lost,
        retention_s=retention_s,
        limits=settings.limits,
        group_bytes=settings.wal.group_bytes,
        iceberg=settings.iceberg,
        survival=survival,
        rng=rng,
    )
    await _restore_tables(pipeline, catalog, replay, keys)
    for segment in recovered.segments:
        for appended in segment.ranges:
            if appended.last_lsn > head_lsn:
                objects.submit(appended)

    # A segment more than is owed: the next one is allocated whole before the active one is full.
    space.count_owed(lambda: settings.wal.segment_bytes + pipeline.owed_bytes(shared))

    async def write_disk_ceiling(value: int) -> None:
        await LogState(lease.log_uuid, lease.epoch, value).write(wal_dir, disk)

    reservation = LsnReservation(
        allocator,
        store_ceiling=lease.lsn_ceiling,
        write_disk_ceiling=write_disk_ceiling,
        reserve_store_block=lease.reserve_block,
    )
    return OpenLog(pipeline, reservation, lease.log_uuid, lease.epoch, last_lsn, first_lsn)


def _note_lost(memory: MemoryTier, complete: bool, last_lsn: int, first_lsn: int) -> list[LostRange]:
    """Record the LSNs that may have been given and are gone (R3); none are from a log that was closed."""
    if first_lsn == last_lsn + 1 or complete:
        return []
    lost = LsnRange(last_lsn, first_lsn - 1)
    memory.append_control(KIND_LOST, encode_lost(lost))
    return [LostRange(lost, now_us())]


def _space(settings: Settings, recovered: RecoveredLog, read_free: Callable[[], int]) -> DiskSpace:
    return DiskSpace(
        limit_bytes=settings.limits.disk_bytes,
        free_bytes=settings.limits.disk_free_bytes,
        used_bytes=sum(segment.end_bytes for segment in recovered.segments),
        read_free=read_free,
    )


async def _restore_tables(pipeline: Pipeline, catalog: Catalog, replay: _Replay, keys: KeyIndex) -> None:
    """Load the tables, finish drops that a crash cut short, and give each table the frames it still needs."""
    found = {table.info.uuid: table for table in await _list_tables(catalog)}
    for uuid, record in replay.drops.items():
        replay.tables.pop(uuid, None)
        left = found.pop(uuid, None)
        if left is not None:
            log.info("table.drop_finished", table=str(left.info.name))
            await _finish_drop(catalog, left, purge=record.purge)
    for loaded in found.values():
        pipeline.register(loaded)
    for uuid, frames in replay.tables.items():
        loaded_table = found.get(uuid)
        table = pipeline.register(loaded_table) if loaded_table is not None else _restore_missing(pipeline, frames)
        if table is None:
            continue
        for schema_id, info in frames.infos.items():
            table.schemas.setdefault(schema_id, info.schema)
        committed = table.committed.lsn
        places = frames.places
        for at in range(0, len(places), 4):
            index, lsn, offset, frame_bytes = places[at : at + 4]
            if lsn > committed:
                path, number, epoch = frames.paths[index]
                table.note_durable(path, number, epoch, lsn, offset, frame_bytes)
        table.last_lsn = max(table.last_lsn, frames.last_lsn)
        for key, lsn, digest in frames.keys:
            keys.insert(uuid, key, lsn, digest)
        keys.note_committed(uuid, committed, trio.current_time())


def _restore_missing(pipeline: Pipeline, frames: _TableFrames) -> Table | None:
    """Keep the frames of a table that others renamed or dropped: stopped, never discarded (R5, R18)."""
    if not frames.infos:
        return None
    info = list(frames.infos.values())[-1]
    table = pipeline.register(CatalogTable(info, (), None))
    detail = (
        f"Table {info.name} ({info.uuid}) is not in the catalog and was not dropped here: it was renamed or dropped "
        "by others. Its writes are kept in the log"
    )
    log.error("table.stopped", table=str(info.name), reason=detail)
    table.end(Ending(TableState.STOPPED, ErrorCode.OUTCOME_UNKNOWN, detail))
    return table


async def _ask_store(request: Callable[[], Awaitable[T]]) -> T:
    """Ask the object store until it answers: an outage delays a start, it does not end it.

    Raises:
        ConfigurationError: it refuses our requests.
    """
    while True:
        try:
            return await request()
        except StoreRefused as error:
            raise ConfigurationError(f"The object store refuses our requests: {error}") from error
        except StoreUnavailable as error:
            log.warning("objects.unavailable", reason=str(error), retry_s=_STORE_RETRY_S)
            await trio.sleep(_STORE_RETRY_S)


async def _list_tables(catalog: Catalog) -> list[CatalogTable]:
    """Ask the catalog until it answers."""
    while True:
        try:
            return await catalog.list_tables()
        except CatalogUnavailable as error:
            log.warning("catalog.unavailable", reason=str(error), retry_s=_CATALOG_RETRY_S)
            await trio.sleep(_CATALOG_RETRY_S)


async def _finish_drop(catalog: Catalog, table: CatalogTable, *, purge: bool) -> None:
    while True:
        try:
            await catalog.drop_table(table.info, purge=purge)
        except TableMissing:
            return
        except CatalogUnavailable as error:
            log.warning("catalog.unavailable", reason=str(error), retry_s=_CATALOG_RETRY_S)
            await trio.sleep(_CATALOG_RETRY_S)
        else:
            return


__all__ = ["OpenLog", "open_pipeline"]
