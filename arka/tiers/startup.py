"""From a data directory and an object store to a running pipeline: identity, recovery, replay.

Owns: the order of a start. The epoch comes before anything else in the store is looked at (R10), recovered frames
are disk-safe before anything calls them so (R6), tables come before their frames are handed to them. A store or
a catalog that is away delays only what needs it: with a log on the disk the start goes on without (R5, R13).
"""

from __future__ import annotations

import secrets
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import structlog
import trio

from arka import failpoints
from arka._core.lsn import LsnAllocator
from arka.lineage import NO_STARTS
from arka.options import Settings
from arka.storage.ports import CatalogUnavailable, StoreUnavailable
from arka.tiers.aside import load_asides
from arka.tiers.assembly import WAL_FOLDER, Found, OpenLog, Surroundings, assemble
from arka.tiers.epochs import Claim, EpochLease, newest_start
from arka.tiers.keys import KeyIndex
from arka.tiers.mirror import CheckpointStore
from arka.tiers.newstore import prepare_store
from arka.tiers.release import LoadedCheckpoints, load_checkpoints
from arka.tiers.replay import ProgressLog, Replay
from arka.tiers.reservation import DISK_BLOCK
from arka.tiers.restore import restore_log
from arka.tiers.tables import Tables
from arka.tiers.uplink import Patience, Taken, Uplink, ask_store
from arka.wal.committed import CommittedMarks
from arka.wal.logstate import LogState, LogStateFile
from arka.wal.named import find_headless
from arka.wal.recovery import RecoveredLog, recover

log = structlog.get_logger(__name__)

#: How long a start that could go on without asks a store, and then a catalog, that fail, in seconds.
_PATIENCE_S: Final = 5.0
#: How long it waits for a store that answers slowly, all steps together, in seconds.
_SLOW_S: Final = 30.0
#: The pause between two questions to the catalog.
_RETRY_S: Final = 1.0
#: How long it waits for the catalog's first answer, in seconds: on a busy machine a worker takes many to begin.
_ANSWER_S: Final = 60.0


async def open_pipeline(settings: Settings, data_dir: Path, world: Surroundings) -> OpenLog:
    """Take the log over and bring up everything that a crash left.

    Args:
        settings: all options; paths and URLs are already absolute.
        data_dir: holds ``wal/``.
        world: what is outside of the log.

    Raises:
        ConfigurationError: disk and store belong to different logs, the disk is stale (R13), or another disk's
            process owns the log and lives.
        DataCorruption: the log is damaged (R7).
        Fenced: another process took a higher epoch meanwhile.

    Cancellation: as a crash: the next start does it again.
    """
    return await _Start(settings, data_dir, world).run()


class _Start:
    """One start: the steps of ``open_pipeline``, and what they hand to each other."""

    def __init__(self, settings: Settings, data_dir: Path, world: Surroundings) -> None:
        self._settings = settings
        self._world = world
        self._data_dir = data_dir
        self._wal_dir = data_dir / WAL_FOLDER
        self._node_id = settings.server.node_id
        claim = Claim(
            self._node_id,
            None,
            world.disk_uuid,
            take_over=settings.server.take_over,
            new_store=settings.server.new_store,
            heartbeat_s=settings.object_store.heartbeat_s,
        )
        self._checkpoint_store = CheckpointStore(world.store, world.checkpoints, self._node_id)
        self._uplink = Uplink(world.store, self._checkpoint_store, claim)
        self._keys = KeyIndex(settings.idempotency.retention_s, limit=settings.idempotency.keys)
        self._replay = Replay()
        # Of all steps together: a slow store must not hold each of them up.
        self._patience = Patience(_PATIENCE_S, _SLOW_S)

    async def run(self) -> OpenLog:
        """Do all of it."""
        state = await LogState.read(self._wal_dir, self._world.disk)
        gone = await self._world.disk.run(partial(find_headless, self._wal_dir, self._world.disk))
        if gone is not None:
            raise gone
        if state is not None and not state.started_epoch:
            # A disk that was being made or restored, and never served: another one may have been since. Anew.
            state = None
        if state is not None:
            # What a failed fsync left in the page cache is not on the disk: make it so before the store hears of it.
            state = await state.write(self._wal_dir, self._world.disk)
            if self._settings.server.new_store:
                state = await self._prepare_store(state)
        taken = await self._take(state, patience=None if state is None else self._patience)
        is_new = state is None
        if state is None:
            assert taken is not None
            taken, state = await self._new_disk(taken)
        state_file = LogStateFile(self._wal_dir, self._world.disk, state)
        if not state.birth:
            await state_file.raise_to(birth=secrets.randbits(63) | 1)
        self._replay.birth = state_file.state.birth
        # A higher epoch, before a segment carries it; a higher ceiling, before a write does.
        await self._note_epoch(state_file, taken)
        recovered = await self._recover(state_file.state)
        if taken is None and not await self._may_start_alone(state, recovered):
            taken = await self._take(state, patience=None)
            await self._note_epoch(state_file, taken)
        first_lsn = max(state.lsn_ceiling, recovered.last_lsn + 1)
        ceiling = min(first_lsn + DISK_BLOCK, state_file.state.store_ceiling)
        await state_file.raise_to(lsn_ceiling=ceiling)
        self._uplink.begin_at(first_lsn)
        await failpoints.reach("start.recovered")
        checkpoints = await self._load_checkpoints(state.log_uuid)
        find_asides = partial(load_asides, self._world.checkpoints, self._node_id, state.log_uuid, checkpoints.asides)
        found = Found(
            data_dir=self._data_dir,
            state=state_file,
            recovered=recovered,
            replay=self._replay,
            checkpoints=checkpoints,
            keys=self._keys,
            allocator=LsnAllocator(first_lsn, ceiling),
            first_lsn=first_lsn,
            asides=await ask_store(find_asides),
            marks=await CommittedMarks.read(self._wal_dir, self._world.disk, state.log_uuid),
        )
        opened = await assemble(self._settings, self._world, found, self._uplink, self._checkpoint_store)
        if taken is not None:
            # Nothing is served from a new disk before its start is recorded: an older one could be let in beside it.
            await self._connect(taken, opened, patience=None if is_new else self._patience)
        await self._know_tables(opened.pipeline.tables)
        return opened

    # -- the store --------------------------------------------------------------------------------

    async def _prepare_store(self, state: LogState) -> LogState:
        """Bring what the disk has of a lost store to the new one (R38)."""
        world = self._world
        prepare = partial(
            prepare_store, world.store, world.checkpoints, self._node_id, state, self._wal_dir, world.disk
        )
        return await ask_store(prepare)

    # -- taking it --------------------------------------------------------------------------------

    async def _take(self, state: LogState | None, *, patience: Patience | None) -> Taken | None:
        """Take the epoch; None when the store is away and patience is over."""
        try:
            return await ask_store(partial(self._uplink.take, state), patience=patience)
        except StoreUnavailable:
            return None

    async def _may_start_alone(self, state: LogState, recovered: RecoveredLog) -> bool:
        """Whether the disk knows all that a start needs: reserved LSNs, and the keys of what was released (R13)."""
        if await self._checkpoint_store.covered_here() < recovered.base_lsn:
            log.warning("objects.needed", reason="the disk lacks checkpoints of released segments")
            return False
        if await self._checkpoint_store.has_gap():
            log.warning("objects.needed", reason="a copy of a checkpoint on the disk is gone")
            return False
        if max(state.lsn_ceiling, recovered.last_lsn + 1) >= state.store_ceiling:
            log.warning("objects.needed", reason="every LSN that was reserved in the object store is used up")
            return False
        return True

    async def _load_checkpoints(self, log_uuid: UUID) -> LoadedCheckpoints:
        """Read the checkpoints that the disk has: all there are, since the store was last reached."""
        retention_s = self._settings.idempotency.retention_s
        here = self._world.checkpoints
        load = partial(load_checkpoints, here, self._node_id, log_uuid, retention_s, self._keys)
        return await ask_store(load)

    async def _new_disk(self, taken: Taken) -> tuple[Taken, LogState]:
        """Begin a log on an empty disk, or bring one back that the store has."""
        lease = taken.lease
        taken = await self._restore(lease)
        # Read behind our own epoch: a process with an earlier one records no start that counts any more.
        started = await ask_store(partial(newest_start, self._world.store, self._node_id))
        state = await LogState.create(
            self._wal_dir,
            self._world.disk,
            log_uuid=lease.log_uuid,
            epoch=lease.epoch,
            lsn_ceiling=lease.first_lsn,
            store_ceiling=lease.lsn_ceiling,
            lineage=NO_STARTS if started is None else started.lineage,
        )
        return taken, state

    async def _restore(self, lease: EpochLease) -> Taken:
        """Write the log anew from the store; returns what it was written from."""
        if lease.epoch > 1:
            log.warning("log.restoring", epoch=lease.epoch, store=self._world.store.url)

        async def attempt() -> Taken:
            # Read anew at each attempt: what was released meanwhile is in a newer checkpoint.
            again = await self._uplink.take(None)
            await restore_log(
                again.chain,
                again.head,
                self._wal_dir,
                self._world.disk,
                log_uuid=lease.log_uuid,
                epoch=lease.epoch,
                released_lsn=again.released_lsn,
                segment_bytes=self._settings.wal.segment_bytes,
            )
            return again

        return await ask_store(attempt)

    async def _connect(self, taken: Taken, opened: OpenLog, *, patience: Patience | None) -> None:
        """Let the log go to the store; if that goes away just now, the pipeline does it later."""
        try:
            await ask_store(partial(opened.pipeline.connect, taken), patience=patience)
        except StoreUnavailable as error:
            log.warning("objects.unavailable", reason=str(error))

    # -- the disk ---------------------------------------------------------------------------------

    async def _note_epoch(self, state_file: LogStateFile, taken: Taken | None) -> None:
        """Let the disk know of the epoch, and of what is reserved under it."""
        if taken is not None:
            await state_file.raise_to(epoch=taken.lease.epoch, store_ceiling=taken.lease.lsn_ceiling)

    async def _recover(self, state: LogState) -> RecoveredLog:
        recovered = await recover(
            self._wal_dir,
            self._world.disk,
            log_uuid=state.log_uuid,
            new_epoch=state.epoch,
            on_frame=self._replay.take,
            on_progress=ProgressLog(),
        )
        if recovered.torn is not None:
            log.warning("wal.torn_tail_dropped", **asdict(recovered.torn))
        return recovered

    # -- the catalog ------------------------------------------------------------------------------

    async def _know_tables(self, tables: Tables) -> None:
        """Ask the catalog before the first client does; one that is away is asked on and on, later."""
        deadline = trio.current_time() + _PATIENCE_S
        with trio.move_on_after(_ANSWER_S):
            while True:
                try:
                    await tables.reconcile()
                except CatalogUnavailable as error:
                    log.warning("catalog.unavailable", reason=str(error))
                    if trio.current_time() >= deadline:
                        break
                    await trio.sleep(_RETRY_S)
                else:
                    return
        log.warning("catalog.offline", hint="tables that the log knows take writes; commits wait")


__all__ = ["OpenLog", "Surroundings", "open_pipeline"]
