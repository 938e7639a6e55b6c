"""Taking an epoch: which process may write a node's log, and from which disk (R1, R2, R10, R13).

Owns: the rules by which the next epoch is taken or refused. Does not own the records
(``arka.tiers.epochrecords``) nor what is done under an epoch (``arka.tiers.lease``).
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID, uuid4

import structlog
import trio

from arka import failpoints
from arka.errors import ConfigurationError
from arka.storage.ports import ObjectExists, ObjectStore, StoreUnavailable
from arka.tiers.epochrecords import (
    EpochRecord,
    StartRecord,
    epoch_key,
    heartbeat_prefix,
    read_record,
)
from arka.tiers.lease import STORE_BLOCK, EpochLease
from arka.tiers.listing import list_own
from arka.tiers.watermarks import now_us

log = structlog.get_logger(__name__)

#: How often the next epoch is tried for while others take it, before that is an error.
_RACES: Final = 16
#: A heartbeat that stands still for so many of its intervals has stopped.
_STILL_INTERVALS: Final = 2.5
#: A heartbeat that changes in so many such waits, one after another, belongs to a living process. One change is not
#: enough: the last beat of a process that died or lost its network may still be on its way to the store.
_LIVING_WAITS: Final = 2


@dataclass(frozen=True, slots=True)
class LocalLog:
    """What the disk knows of the log.

    Attributes:
        log_uuid: the log.
        epoch: the last epoch that wrote to this disk.
        lsn_ceiling: no LSN at or above it was given by this disk.
    """

    log_uuid: UUID
    epoch: int
    lsn_ceiling: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Who asks for a node's next epoch.

    Attributes:
        node_id: the node's name in the store.
        local: what the disk knows; None for a disk without a log.
        disk_uuid: the identity of the data directory.
        take_over: take the epoch although another process shows that it lives.
        heartbeat_s: how often this process will show that it lives, in seconds.
        new_store: the store is empty, and the disk's log goes on in it (R38).
    """

    node_id: str
    local: LocalLog | None
    disk_uuid: UUID
    take_over: bool = False
    heartbeat_s: float = 2.0
    new_store: bool = False

    def of(self, local: LocalLog | None) -> Claim:
        """The same claim with what the disk knows now."""
        return replace(self, local=local)


async def take_epoch(store: ObjectStore, claim: Claim) -> EpochLease:
    """Take the node's next epoch; whoever had the last one is fenced from then on.

    A disk without a log may take over a log that the store has: everything acked ``object_storage`` is there.
    A disk with one may only where no other disk has gone on with the log since.

    Args:
        store: the object store.
        claim: who asks.

    Returns:
        The lease. With ``claim.local`` None and ``lease.epoch`` above 1, the log has to be restored first.

    Raises:
        ConfigurationError: the disk belongs to another log or is stale (R13), the store lacks what the disk
            knows of, or another disk's process is alive and ``claim.take_over`` is not set.
        DataCorruption: a record cannot be read.
        StoreUnavailable: the store does not answer; ask again.

    Cancellation: an epoch may have been taken; the next start takes a higher one.
    """
    waited_for = 0
    for _ in range(_RACES):
        newest = await _newest_epoch(store, claim.node_id)
        await _check_disk(store, claim, newest)
        if newest is not None and newest.disk_uuid != claim.disk_uuid and newest.epoch > waited_for:
            await _check_still(store, claim, newest)
            # Others may have taken an epoch meanwhile: look again.
            waited_for = newest.epoch
            continue
        if newest is not None:
            log_uuid, epoch = newest.log_uuid, newest.epoch + 1
        elif claim.local is not None:
            log_uuid, epoch = claim.local.log_uuid, claim.local.epoch + 1
        else:
            log_uuid, epoch = uuid4(), 1
        record = _new_record(claim, log_uuid, epoch)
        await failpoints.reach("epoch.begin")
        try:
            await store.put_new(epoch_key(claim.node_id, epoch), [record.to_bytes()])
        except ObjectExists:
            # Somebody else took it, or our own response was lost: the record says which, and the next one is free.
            continue
        await failpoints.reach("epoch.taken")
        if claim.local is not None:
            # Whoever had an epoch between may have recorded its start since we looked; from here on it cannot.
            await _check_no_later_start(store, claim, claim.local)
        reserved = await _reserved(store, claim.node_id)
        known = max(reserved, claim.local.lsn_ceiling if claim.local is not None else 1)
        # Above both: a store that was emptied, or exchanged, knows less than the disk.
        lease = EpochLease(store, claim.node_id, record, first_lsn=known, lsn_ceiling=known)
        await lease.reserve_block()
        await _remove_old_beats(store, claim.node_id, epoch)
        return lease
    raise ConfigurationError(
        f"Other processes keep taking the epochs of node {claim.node_id} in {store.url}: is it running twice?"
    )


async def newest_start(store: ObjectStore, node_id: str) -> StartRecord | None:
    """Read the start record of the newest epoch that has one; None for none.

    Raises:
        DataCorruption: it cannot be read.
        StoreUnavailable: the store does not answer.
    """
    keys = await list_own(store, node_id, "started/")
    return await read_record(store, keys[-1].key, StartRecord) if keys else None


async def skip_epochs(store: ObjectStore, claim: Claim, log_uuid: UUID, through_epoch: int) -> None:
    """Record an epoch as taken and never started, so that the next start takes a higher one.

    Args:
        store: the object store.
        claim: whose epochs they are.
        log_uuid: the log.
        through_epoch: the epoch; above all that the node has in the store.

    Raises:
        StoreUnavailable: the store does not answer; ask again.

    Durability: recorded on return.
    """
    with suppress(ObjectExists):
        record = _new_record(claim, log_uuid, through_epoch)
        await store.put_new(epoch_key(claim.node_id, through_epoch), [record.to_bytes()])


def _new_record(claim: Claim, log_uuid: UUID, epoch: int) -> EpochRecord:
    local = claim.local
    return EpochRecord(
        log_uuid=log_uuid,
        epoch=epoch,
        node_id=claim.node_id,
        disk_uuid=claim.disk_uuid,
        started_us=now_us(),
        host=socket.gethostname(),
        pid=os.getpid(),
        disk_epoch=0 if local is None else local.epoch,
        disk_ceiling=0 if local is None else local.lsn_ceiling,
        heartbeat_s=claim.heartbeat_s,
    )


async def _check_disk(store: ObjectStore, claim: Claim, newest: EpochRecord | None) -> None:
    """Refuse a disk that has nothing to do with what the store holds, or that is stale."""
    local = claim.local
    if local is None:
        return
    if newest is None and claim.new_store:
        return
    if newest is None:
        # Whether the disk is stale only the epochs can say (R13), and a mistyped URL looks like this.
        raise ConfigurationError(
            f"This data directory holds log {local.log_uuid}, written up to epoch {local.epoch}, but {store.url} "
            f"holds no epoch of node {claim.node_id}: check --node-id and --object-store. If that store is lost for "
            "good, start with --new-store: the log goes on in the empty place. Or set the log aside with "
            "`arka wal salvage DATA_DIR --discard`, start, and send again what is not in Iceberg yet with "
            "`arka wal salvage DATA_DIR/wal.discarded-TIME --resubmit URL`. Catalog and warehouse stay"
        )
    if local.log_uuid != newest.log_uuid:
        raise ConfigurationError(
            f"The data directory holds log {local.log_uuid}, {store.url} holds log {newest.log_uuid} for node "
            f"{claim.node_id}: one of them belongs to another node; check --node-id and --object-store"
        )
    if newest.epoch < local.epoch:
        raise ConfigurationError(
            f"The data directory was written in epoch {local.epoch}, the newest of node {claim.node_id} in {store.url} "
            f"is {newest.epoch}: that store has lost objects, or is another one; check --object-store"
        )
    await _check_not_stale(store, claim, local, newest)


async def _check_not_stale(store: ObjectStore, claim: Claim, local: LocalLog, newest: EpochRecord) -> None:
    """Refuse a disk after whose last epoch the log went on elsewhere (R13).

    A later epoch that has a start record gave LSNs from a disk that knew of it. One without died before: its own
    record must then name no later state of this disk than the one that is here, since a data directory that was
    restored from a snapshot, or cloned, has the same UUID and an older state.
    """
    await _check_no_later_start(store, claim, local)
    for epoch in range(newest.epoch, local.epoch, -1):
        record = newest
        if epoch < newest.epoch:
            record = await read_record(store, epoch_key(claim.node_id, epoch), EpochRecord)
        if record.disk_uuid == claim.disk_uuid and (
            record.disk_epoch > local.epoch or record.disk_ceiling > local.lsn_ceiling
        ):
            raise _stale(
                store,
                claim,
                local,
                record,
                f"found its disk at epoch {record.disk_epoch} and LSN {record.disk_ceiling - 1}",
            )


async def _check_no_later_start(store: ObjectStore, claim: Claim, local: LocalLog) -> None:
    started = await newest_start(store, claim.node_id)
    if started is not None and started.epoch > local.epoch:
        record = await read_record(store, epoch_key(claim.node_id, started.epoch), EpochRecord)
        raise _stale(store, claim, local, record, "went on from another disk, or another state of this one")


def _stale(store: ObjectStore, claim: Claim, local: LocalLog, record: EpochRecord, how: str) -> ConfigurationError:
    return ConfigurationError(
        f"This data directory is stale: it ends in epoch {local.epoch}, at LSN {local.lsn_ceiling - 1} at most, and "
        f"epoch {record.epoch} of node {claim.node_id} in {store.url}, taken by {record.host} (pid {record.pid}), "
        f"{how}. It is not replayed by itself. Start with the newest data directory, or set this log aside with "
        "`arka wal salvage DATA_DIR --discard`: the start brings back what the store has. What only this one holds is "
        "then sent again by `arka wal salvage DATA_DIR/wal.discarded-TIME --resubmit URL`"
    )


async def _check_still(store: ObjectStore, claim: Claim, newest: EpochRecord) -> None:
    """Refuse to take the log from another disk's process that shows that it lives (R10).

    Nobody's clock is compared with anybody's: a heartbeat that changes while we look is one.
    """
    if claim.take_over:
        return
    beats = f"heartbeat/{newest.epoch:010d}/"
    before = await list_own(store, claim.node_id, beats)
    if not before:
        # It stopped in an orderly way, or died before its first beat.
        return
    for _ in range(_LIVING_WAITS):
        log.info("epoch.waiting", epoch=newest.epoch, host=newest.host, seconds=newest.heartbeat_s * _STILL_INTERVALS)
        await trio.sleep(newest.heartbeat_s * _STILL_INTERVALS)
        after = await list_own(store, claim.node_id, beats)
        if not after or after[-1].key == before[-1].key:
            return
        before = after
    raise ConfigurationError(
        f"Node {claim.node_id} in {store.url} is running on {newest.host} (pid {newest.pid}, epoch {newest.epoch}) "
        "with another data directory. Stop it first, or take the log from it with --take-over: what it "
        "acknowledged on its own disk only stays there"
    )


async def _newest_epoch(store: ObjectStore, node_id: str) -> EpochRecord | None:
    keys = await list_own(store, node_id, "epoch/")
    return await read_record(store, keys[-1].key, EpochRecord) if keys else None


async def _reserved(store: ObjectStore, node_id: str) -> int:
    """The highest ceiling in the store; 1 where none was ever reserved."""
    keys = await list_own(store, node_id, "lsn/")
    return int(keys[-1].key.rpartition("/")[2]) if keys else 1


async def _remove_old_beats(store: ObjectStore, node_id: str, epoch: int) -> None:
    """Remove what the heartbeats of earlier epochs left; a failure leaves it to the next start."""
    try:
        beats = [meta.key for meta in await list_own(store, node_id, "heartbeat/")]
        ours = heartbeat_prefix(node_id, epoch)
        await store.delete([key for key in beats if key < ours])
    except StoreUnavailable as error:
        log.debug("epoch.beats_left", reason=str(error))


__all__ = ["STORE_BLOCK", "Claim", "EpochLease", "LocalLog", "newest_start", "take_epoch"]
