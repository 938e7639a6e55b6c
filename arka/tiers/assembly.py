"""A log's components, made and joined, with what a start found handed to each.

Owns: which component gets which. Does not own the order of a start (``arka.tiers.startup``) nor what any of the
components does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from arka._core.framing import KIND_LOST
from arka._core.lsn import LsnAllocator
from arka.options import MIB, Settings
from arka.records import KnownTable, LsnRange, Tier
from arka.storage.ports import Catalog, Disk, ObjectStore, Warehouse
from arka.storage.threads import run_compute
from arka.tiers.apart import Apart
from arka.tiers.aside import Aside, FoundAsides
from arka.tiers.committer import TableCommitter
from arka.tiers.held import HeldObjects
from arka.tiers.keys import KeyIndex
from arka.tiers.lease import wait_verified
from arka.tiers.logclock import LogClock
from arka.tiers.memory import MemoryTier
from arka.tiers.mirror import CheckpointStore
from arka.tiers.objects import Compute, ObjectTier, ReadRange
from arka.tiers.parking import Parking
from arka.tiers.pipeline import Marks, Parts, Pipeline
from arka.tiers.release import LoadedCheckpoints, LogRelease, LostRange, merge_lost
from arka.tiers.replay import Replay
from arka.tiers.reservation import LsnReservation
from arka.tiers.space import NOT_SHARED, DiskSpace, SharedRoom
from arka.tiers.table import Table
from arka.tiers.tables import Tables
from arka.tiers.uplink import Uplink
from arka.tiers.watermarks import Watermark
from arka.wal.committed import CommittedMarks
from arka.wal.logstate import LogStateFile
from arka.wal.recovery import RecoveredLog
from arka.wal.segment import encode_lost
from arka.wal.writer import WalWriter

#: The log's folder in the data directory, and that of what is brought back from parking.
WAL_FOLDER: Final = "wal"
_PARKED_FOLDER: Final = "parked"
_BEHIND_FOLDER: Final = "behind"
#: At least so many segments fit into ``limits.disk_bytes``.
_SEGMENTS: Final = 8


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a log needs of the world.

    Attributes:
        disk: where the WAL lies.
        disk_uuid: the identity of the data directory (R13).
        store: the object store.
        checkpoints: a folder on the log's disk, for the checkpoints that the store has.
        catalog: the Iceberg catalog.
        read_range: reads ``(path, start, end)`` of a segment for the object tier.
        read_free: returns the free bytes of the log's file system.
        read_spill_free: the same of the file system of spill files; None: it is the log's.
        warehouse: the warehouse's marker; None where it cannot have one (R28).
        shared: which later tiers write to the log's own file system (R23).
        survival: what each tier survives with these settings (R14).
        rng: for the jitter of retries.
        backup_runs: returns whether a backup of the data directory is being made (R38).
        compute: runs what would hold trio's thread up; simulations have no threads.
    """

    disk: Disk
    disk_uuid: UUID
    store: ObjectStore
    checkpoints: ObjectStore
    catalog: Catalog
    read_range: ReadRange
    read_free: Callable[[], int]
    survival: dict[str, bool]
    rng: random.Random
    compute: Compute = run_compute
    shared: SharedRoom = NOT_SHARED
    read_spill_free: Callable[[], int] | None = None
    warehouse: Warehouse | None = None
    backup_runs: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class OpenLog:
    """What ``open_pipeline`` gives: the pipeline, and what its start found, for the log and the status."""

    pipeline: Pipeline
    reservation: LsnReservation
    log_uuid: UUID
    epoch: int
    recovered_lsn: int
    next_lsn: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a start found.

    Attributes:
        data_dir: holds the log's folder.
        state: the log's state on disk.
        recovered: the log's segments, sealed.
        replay: what is in them.
        checkpoints: what they remember beside keys.
        keys: the checkpoints' keys.
        allocator: gives the LSNs that are reserved.
        first_lsn: the first of them.
        asides: the writes that are set aside.
        marks: what the disk knows of how far tables are (R20).
    """

    data_dir: Path
    state: LogStateFile
    recovered: RecoveredLog
    replay: Replay
    checkpoints: LoadedCheckpoints
    keys: KeyIndex
    allocator: LsnAllocator
    first_lsn: int
    asides: FoundAsides
    marks: CommittedMarks


async def assemble(
    settings: Settings, world: Surroundings, found: Found, uplink: Uplink, checkpoint_store: CheckpointStore
) -> OpenLog:
    """Make the components of a log and give them what its start found.

    Args:
        settings: all options.
        world: what is outside of the log.
        found: what is there.
        uplink: the tie to the object store; may not be connected yet.
        checkpoint_store: where checkpoints are, here and there.

    Raises:
        OSError: the disk failed.
    """
    node_id, log_uuid, epoch = settings.server.node_id, found.state.state.log_uuid, found.state.state.epoch
    # A segment goes as a whole: of a small limit it must be a small part, else the log stops and goes in turns.
    part = max(settings.limits.disk_bytes // _SEGMENTS, MIB)
    wal_options = replace(settings.wal, segment_bytes=min(settings.wal.segment_bytes, part))
    recovered, keys, clock = found.recovered, found.keys, LogClock(found.checkpoints.clock_us)
    writer = await WalWriter.open(
        found.data_dir / WAL_FOLDER,
        world.disk,
        log_uuid=log_uuid,
        epoch=epoch,
        first_segment=recovered.next_segment,
        options=wal_options,
    )
    memory = MemoryTier(found.allocator, keys)
    found_lost = [*found.replay.lost, *_note_lost(memory, found)]
    lost = merge_lost([found.checkpoints.lost, (LostRange(gap, clock.now_us(), tables) for gap, tables in found_lost)])
    marks = Marks(Watermark(Tier.DISK, recovered.last_lsn), Watermark(Tier.OBJECT_STORAGE))
    objects = ObjectTier(
        world.store,
        node_id=node_id,
        log_uuid=log_uuid,
        options=settings.object_store,
        on_advance=marks.objects.advance,
        read_range=world.read_range,
        rng=world.rng,
        compute=world.compute,
    )
    space = DiskSpace(
        limit_bytes=settings.limits.disk_bytes,
        free_bytes=settings.limits.disk_free_bytes,
        used_bytes=sum(segment.end_bytes for segment in recovered.segments),
        read_free=world.read_free,
        stall_s=settings.limits.stall_s,
        read_spill_free=world.read_spill_free,
    )
    carried = {} if found.checkpoints.held is None else dict(found.checkpoints.held)
    for uuid in found.replay.dropped:
        carried.pop(uuid, None)
    held = HeldObjects(carried, recovered.base_lsn)

    def frames_in(folder: str) -> Parking:
        return Parking(
            world.store,
            world.disk,
            found.data_dir / folder,
            space,
            node_id=node_id,
            log_uuid=log_uuid,
            objects=marks.objects,
            wait_connected=uplink.wait_connected,
            retry_s=settings.object_store.retry_s,
            rng=world.rng,
            folder=folder,
            held=held,
        )

    parking, behind = frames_in(_PARKED_FOLDER), frames_in(_BEHIND_FOLDER)
    apart = Apart(
        behind,
        marks.objects,
        limit_bytes=settings.limits.disk_bytes,
        share=settings.limits.table_disk_share,
        log_bytes=lambda lsn: release.held_bytes(lsn),
    )

    aside = Aside(
        world.store,
        world.checkpoints,
        world.disk,
        node_id=node_id,
        log_uuid=log_uuid,
        epoch=lambda: uplink.epoch,
        retry_s=settings.object_store.retry_s,
        rng=world.rng,
    )

    verified = partial(wait_verified, uplink.verify, retry_s=settings.iceberg.retry_s, rng=world.rng)

    def make_committer(table: Table) -> TableCommitter:
        return TableCommitter(
            table,
            world.catalog,
            marks.objects,
            log_uuid=log_uuid,
            epoch=lambda: uplink.epoch,
            lineage=lambda: found.state.state.lineage,
            wait_verified=verified,
            options=settings.iceberg,
            rng=world.rng,
            watch=tables.watch,
            on_committed=tables.note_committed,
            adoption=tables.adoption,
            set_aside=aside.keep,
            marks=found.marks,
        )

    tables = Tables(
        world.catalog,
        memory,
        marks.disk,
        keys,
        clock,
        parking,
        log_uuid=log_uuid,
        node_id=node_id,
        make_committer=make_committer,
        room=space.room,
        adopt_s=settings.iceberg.adopt_s,
        apart=apart,
        warehouse=world.warehouse,
        epoch=lambda: found.state.state.epoch,
        lineage=lambda: found.state.state.lineage,
        verify=uplink.verify,
        wait_verified=verified,
        marks=found.marks,
    )
    release = LogRelease(
        checkpoint_store,
        writer,
        keys,
        space,
        clock,
        verify=uplink.verify,
        node_id=node_id,
        log_uuid=log_uuid,
        epoch=lambda: uplink.epoch,
        lost=lost,
        after_lsn=found.checkpoints.through_lsn,
        retention_s=settings.idempotency.retention_s,
        grace_s=settings.wal.release_grace_s,
        backup_runs=world.backup_runs,
    )
    tables.carried = None if found.checkpoints.held is None else carried
    await _give_found(found, tables, objects, release)
    parts = Parts(memory, writer, found.state, objects, uplink, tables, marks, keys, space, release)
    unused = LsnRange(recovered.last_lsn, max(recovered.last_lsn, found.first_lsn - 1))
    pipeline = Pipeline(log_uuid, parts, settings, survival=world.survival, unused=unused)
    # A segment more than is owed: the next one is allocated whole before the active one is full.
    apart.count_unwritten(pipeline.unwritten_bytes)
    space.count_owed(lambda: wal_options.segment_bytes + pipeline.owed_bytes(world.shared), pipeline.unwritten_bytes)
    reservation = LsnReservation(found.allocator, found.state, reserve_store_block=uplink.reserve_block)
    return OpenLog(pipeline, reservation, log_uuid, epoch, recovered.last_lsn, found.first_lsn)


async def _give_found(found: Found, tables: Tables, objects: ObjectTier, release: LogRelease) -> None:
    """Give each component what recovery found for it, in slices: there may be millions of frames and keys (T22)."""
    replay, keys = found.replay, found.keys
    for uuid, lsn in replay.dropped.items():
        keys.drop_table(uuid, lsn)
    tables.asides, tables.broken = found.asides.known, found.asides.broken
    known_tables = [_recorded(table, found) for table in replay.known(found.checkpoints.tables)]
    tables.restore(known_tables, replay.drops, replay.dropped, replay.creates.open.values())
    for known in tables.all():
        known.quiet = replay.is_quiet(known.info.uuid, found.checkpoints)
        known.created_lsn = replay.made_lsn(known.info.uuid)
    for uuid, frames in replay.tables.items():
        table = tables.get(uuid)
        if table is not None:
            await frames.give(table, keys)
            await trio.lowlevel.checkpoint()
    for segment in found.recovered.segments:
        release.note(segment.ref, segment.last_lsn, segment.end_bytes)
        for appended in segment.ranges:
            objects.submit_recovered(appended)
        await trio.lowlevel.checkpoint()


def _recorded(known: KnownTable, found: Found) -> KnownTable:
    """A table with the highest LSN that a checkpoint or the disk's own record says it has committed (R20)."""
    lsn = found.marks.lsn_of(known.info.uuid)
    if lsn <= found.replay.dropped.get(known.info.uuid, 0):
        # It was dropped since, and registered again as others have it.
        found.marks.forget(known.info.uuid)
        return known
    return known._replace(committed_lsn=max(known.committed_lsn, lsn))


def _note_lost(memory: MemoryTier, found: Found) -> list[tuple[LsnRange, frozenset[UUID] | None]]:
    """Record the LSNs that may have been given and are gone (R3), and which tables' they may be (R37).

    None are from a log that was closed.
    """
    last_lsn = found.recovered.last_lsn
    if found.first_lsn == last_lsn + 1 or found.recovered.closed:
        return []
    lost = LsnRange(last_lsn, found.first_lsn - 1)
    hurt = found.replay.writing(found.replay.known(found.checkpoints.tables), found.checkpoints)
    memory.append_control(KIND_LOST, encode_lost(lost, hurt), outcome=True)
    return [(lost, hurt)]


__all__ = ["WAL_FOLDER", "Found", "OpenLog", "Surroundings", "assemble"]
