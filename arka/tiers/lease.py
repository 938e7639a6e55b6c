"""An epoch that this process holds: whether it still does, and what is reserved under it (R2, R10).

Owns: the LSN blocks, the heartbeat and the start record of one epoch. Does not own how an epoch is taken
(``arka.tiers.epochs``) nor what is promised under it (``arka.tiers.objects`` asks before each ack).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

import structlog
import trio

from arka import failpoints
from arka.errors import Fenced
from arka.lineage import Lineage
from arka.records import MAX_LSN
from arka.storage.ports import ObjectExists, ObjectStore, StoreUnavailable
from arka.tiers.epochrecords import (
    EpochRecord,
    StartRecord,
    epoch_key,
    heartbeat_prefix,
    lsn_key,
    read_record,
    start_key,
)
from arka.tiers.listing import list_own
from arka.tiers.retry import persist
from arka.tiers.watch import Effort
from arka.tiers.watermarks import now_us
from arka.wal.objectfile import ObjectRef

log = structlog.get_logger(__name__)

#: LSNs reserved in the store at a time (R2).
STORE_BLOCK: Final = 1 << 32


class EpochLease:
    """An epoch that this process took.

    Attributes:
        log_uuid: the log.
        epoch: the epoch.
        first_lsn: the first LSN that a disk without a log may give.
    """

    def __init__(
        self, store: ObjectStore, node_id: str, record: EpochRecord, *, first_lsn: int, lsn_ceiling: int
    ) -> None:
        """Use ``take_epoch`` instead.

        Args:
            store: the object store.
            node_id: the node's name in it.
            record: what was put there.
            first_lsn: see the attribute.
            lsn_ceiling: LSNs below it are reserved already.
        """
        self._store = store
        self._node_id = node_id
        self._record = record
        self.first_lsn = first_lsn
        self._lsn_ceiling = lsn_ceiling

    @property
    def log_uuid(self) -> UUID:
        """The log."""
        return self._record.log_uuid

    @property
    def epoch(self) -> int:
        """The epoch."""
        return self._record.epoch

    @property
    def lsn_ceiling(self) -> int:
        """LSNs below it are reserved for this log in the store."""
        return self._lsn_ceiling

    async def verify(self) -> None:
        """Read the newest epoch; it is still this one if this returns (R10).

        Raises:
            Fenced: another process has taken a higher one, or ours is gone from the store.
            StoreUnavailable: the store does not say.

        Cancellation: nothing changes.
        """
        ours = epoch_key(self._node_id, self.epoch)
        before = epoch_key(self._node_id, self.epoch - 1)
        found = await list_own(self._store, self._node_id, "epoch/", start_after=before)
        if not found:
            raise Fenced(f"{self._store.url} has lost {ours}: nothing more is promised from there")
        if found[-1].key != ours:
            raise Fenced(
                f"Epoch {found[-1].key.rpartition('/')[2]} of node {self._node_id} has been taken by another "
                f"process: epoch {self.epoch} is over"
            )

    async def reserve_block(self) -> int:
        """Reserve the next block of LSNs.

        Returns:
            The new ceiling.

        Raises:
            Fenced: another process has taken a higher epoch; it may have reserved the same block.
            StoreUnavailable: it may or may not be reserved; ask again.

        Durability: the ceiling is in the store on return.
        """
        ceiling = min(self._lsn_ceiling + STORE_BLOCK, MAX_LSN + 1)
        try:
            await self._store.put_new(lsn_key(self._node_id, ceiling), [b""])
        except ObjectExists:
            # An earlier attempt of ours whose response was lost, or that of an owner who was fenced between our
            # listing and it.
            log.debug("lsn.block_exists", ceiling=ceiling)
        await failpoints.reach("epoch.block_put")
        # Whoever takes an epoch lists the blocks afterwards. So either the next owner has seen this one and starts
        # above it, or this read shows the next owner; one of two that reserved the same block never uses it.
        await self.verify()
        await failpoints.reach("epoch.block_reserved")
        self._lsn_ceiling = ceiling
        return ceiling

    async def record_start(self, head: ObjectRef | None, lineage: Lineage) -> ObjectRef | None:
        """Say in the store that this epoch's disk holds all of the log, and where the chain ends that it goes on from.

        From here on a disk that does not know of this epoch is stale (R13), and what other epochs' processes
        upload late is no part of the chain (R11).

        Args:
            head: the last object of the chain; None for none.
            lineage: the starts that the disk knows of, this one included: another disk may go on with the log.

        Returns:
            The head that is recorded: an earlier attempt's, if that one landed. What came to the chain's folder since
            is no part of it.

        Raises:
            DataCorruption: the record is damaged.
            Fenced: another process has taken a higher epoch.
            StoreUnavailable: it may or may not be recorded; ask again.

        Durability: recorded on return. The epoch must be durable on the disk before this is called.
        """
        record = StartRecord(
            log_uuid=self.log_uuid,
            epoch=self.epoch,
            disk_uuid=self._record.disk_uuid,
            started_us=now_us(),
            head=None if head is None else (head.epoch, head.first_lsn, head.last_lsn, head.checksum),
            starts=lineage.starts,
        )
        key = start_key(self._node_id, self.epoch)
        try:
            await self._store.put_new(key, [record.to_bytes()])
        except ObjectExists:
            # Ours, with its response lost: nobody else has this epoch.
            record = await read_record(self._store, key, StartRecord)
        await failpoints.reach("epoch.start_recorded")
        await self.verify()
        return record.head_ref

    async def beat(self, interval_s: float) -> None:
        """Show, until cancelled, that this process lives, and look whether the epoch is still its own.

        A heartbeat is an object with the next number; whoever sees the number change knows, without comparing
        clocks. Outages are waited for.

        Args:
            interval_s: seconds from one beat to the next.

        Raises:
            Fenced: another process has taken a higher epoch.

        Cancellation: the last beat stays, until somebody takes the next epoch.
        """
        prefix = heartbeat_prefix(self._node_id, self.epoch)
        number = 1
        left: list[str] = []
        while True:
            key = f"{prefix}{number:010d}"
            try:
                try:
                    await self._store.put_new(key, [b""])
                except ObjectExists:
                    log.debug("epoch.beat_exists", key=key)
                await self.verify()
                await self._store.delete(left)
                left = [key]
                number += 1
            except StoreUnavailable as error:
                log.debug("epoch.beat_missed", reason=str(error))
            await trio.sleep(interval_s)

    async def leave(self) -> None:
        """Take the heartbeat away: the next owner need not wait for it to stop.

        Raises:
            StoreUnavailable: the next owner waits.
        """
        beats = await list_own(self._store, self._node_id, f"heartbeat/{self.epoch:010d}/")
        await self._store.delete([beat.key for beat in beats])


async def wait_verified(
    verify: Callable[[], Awaitable[None]], effort: Effort, *, retry_s: float, rng: random.Random
) -> None:
    """Wait until the object store says that this process has the newest epoch.

    Args:
        verify: asks it; see ``EpochLease.verify``.
        effort: of whoever waits: it says what for (R35).
        retry_s: the first pause while the store is unavailable.
        rng: for the jitter of pauses.

    Raises:
        Fenced: another process has it.

    Cancellation: nothing changes.
    """
    effort.begin("the object store to say who has the newest epoch")
    await persist(verify, StoreUnavailable, lambda error: effort.fail(str(error)), retry_s=retry_s, rng=rng)


__all__ = ["STORE_BLOCK", "EpochLease", "wait_verified"]
