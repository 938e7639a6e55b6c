"""Epochs: which process may write a node's log (R1, R2, R10, R13).

Owns: the epoch objects and the LSN blocks of a node in the object store. Does not own what is promised
under an epoch (``arka.tiers.objects`` asks before each ack).

Layout, below the node's id; every object is create-only and never changed:
    ``epoch/<epoch, 10 digits>``    JSON and its CRC, see ``_EpochRecord``; the highest wins
    ``lsn/<ceiling, 16 digits>``    empty; LSNs below the highest ceiling may have been given
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Final
from uuid import UUID, uuid4

import msgspec
import structlog

from arka import failpoints
from arka._core.framing import crc32c
from arka.errors import ConfigurationError, DataCorruption, Fenced
from arka.records import MAX_LSN
from arka.storage.ports import ObjectExists, ObjectStore
from arka.tiers.watermarks import now_us

log = structlog.get_logger(__name__)

#: LSNs reserved in the store at a time (R2).
STORE_BLOCK: Final = 1 << 32
#: How often the next epoch is tried for while others take it, before that is an error.
_RACES: Final = 16


class _EpochRecord(msgspec.Struct, frozen=True):
    """Who took an epoch; fields are only ever added, with a default."""

    log_uuid: UUID
    epoch: int
    node_id: str
    #: The data directory that the epoch's process wrote to (R13).
    disk_uuid: UUID
    started_us: int
    host: str
    pid: int
    #: What that directory said of itself then: a start that died before it could write to the disk is told from
    #: one that went on by it. 0 for a directory without a log.
    disk_epoch: int = 0
    disk_ceiling: int = 0


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


class EpochLease:
    """An epoch that this process took.

    Attributes:
        log_uuid: the log.
        epoch: the epoch.
        first_lsn: the first LSN that a disk without a log may give.
    """

    def __init__(
        self, store: ObjectStore, node_id: str, log_uuid: UUID, epoch: int, *, first_lsn: int, lsn_ceiling: int
    ) -> None:
        self._store = store
        self._node_id = node_id
        self.log_uuid = log_uuid
        self.epoch = epoch
        self.first_lsn = first_lsn
        self._lsn_ceiling = lsn_ceiling

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
        prefix = f"{self._node_id}/epoch/"
        ours = _epoch_key(self._node_id, self.epoch)
        found = await self._store.list_keys(prefix, start_after=_epoch_key(self._node_id, self.epoch - 1))
        if not found:
            raise Fenced(f"{self._store.url} has lost {ours}: nothing more is promised from there")
        if found[-1].key != ours:
            raise Fenced(
                f"Epoch {found[-1].key.removeprefix(prefix)} of node {self._node_id} has been taken by another "
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
            await self._store.put_new(f"{self._node_id}/lsn/{ceiling:016d}", [b""])
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


async def take_epoch(store: ObjectStore, node_id: str, *, local: LocalLog | None, disk_uuid: UUID) -> EpochLease:
    """Take the node's next epoch; whoever had the last one is fenced from then on.

    Args:
        store: the object store.
        node_id: the node's name in it.
        local: what the disk knows; None for a disk without a log.
        disk_uuid: the identity of the data directory.

    Returns:
        The lease.

    Raises:
        ConfigurationError: the disk belongs to another log, is stale (R13), or has no log although the store
            has one, or the other way round.
        DataCorruption: an epoch object cannot be read.
        Fenced: another process took a higher epoch meanwhile.
        StoreUnavailable: the store does not answer; ask again.

    Cancellation: an epoch may have been taken; the next start takes a higher one.
    """
    for _ in range(_RACES):
        newest = await _newest(store, node_id)
        _check_disk(store, node_id, newest, local, disk_uuid)
        if newest is None:
            log_uuid, epoch = uuid4(), 1
        else:
            log_uuid, epoch = newest.log_uuid, newest.epoch + 1
            if local is not None:
                await _check_not_stale(store, node_id, newest, local, disk_uuid)
        record = _EpochRecord(
            log_uuid=log_uuid,
            epoch=epoch,
            node_id=node_id,
            disk_uuid=disk_uuid,
            started_us=now_us(),
            host=socket.gethostname(),
            pid=os.getpid(),
            disk_epoch=0 if local is None else local.epoch,
            disk_ceiling=0 if local is None else local.lsn_ceiling,
        )
        await failpoints.reach("epoch.begin")
        try:
            await store.put_new(_epoch_key(node_id, epoch), [_encode(record)])
        except ObjectExists:
            # Somebody else took it, or our own response was lost: the record says which, and the next one is free.
            continue
        await failpoints.reach("epoch.taken")
        reserved = await _reserved(store, node_id)
        known = max(reserved, local.lsn_ceiling if local is not None else 1)
        # Above both: a store that was emptied, or exchanged, knows less than the disk.
        lease = EpochLease(store, node_id, log_uuid, epoch, first_lsn=known, lsn_ceiling=known)
        await lease.reserve_block()
        return lease
    raise ConfigurationError(
        f"Other processes keep taking the epochs of node {node_id} in {store.url}: is it running twice?"
    )


def _check_disk(
    store: ObjectStore, node_id: str, newest: _EpochRecord | None, local: LocalLog | None, disk_uuid: UUID
) -> None:
    """Refuse a disk that has nothing to do with what the store holds."""
    if newest is None:
        if local is not None:
            # Whether the disk is stale only the epochs can say (R13), and a mistyped URL looks like this.
            raise ConfigurationError(
                f"This data directory holds log {local.log_uuid}, written up to epoch {local.epoch}, but {store.url} "
                f"holds no epoch of node {node_id}: check --node-id and --object-store. If that store is lost for "
                "good, start with an empty data directory; what is not in Iceberg yet has to be sent again"
            )
        return
    if local is None:
        if newest.disk_uuid == disk_uuid:
            # The very first start died between taking the epoch and writing the log's state.
            return
        raise ConfigurationError(
            f"{store.url} holds log {newest.log_uuid} of node {node_id}, and this data directory holds none: what "
            "that log acknowledged on its own disk would be given up. Start with that data directory, or with "
            "another --node-id"
        )
    if local.log_uuid != newest.log_uuid:
        raise ConfigurationError(
            f"The data directory holds log {local.log_uuid}, {store.url} holds log {newest.log_uuid} for node "
            f"{node_id}: one of them belongs to another node; check --node-id and --object-store"
        )
    if newest.disk_uuid != disk_uuid:
        raise ConfigurationError(
            f"Epoch {newest.epoch} of node {node_id} in {store.url} was taken by {newest.host} (pid {newest.pid}) with "
            f"another data directory; this one was last written in epoch {local.epoch}, up to LSN "
            f"{local.lsn_ceiling - 1} at most. It is stale and is not replayed by itself: start with the other "
            "directory"
        )


async def _check_not_stale(
    store: ObjectStore, node_id: str, newest: _EpochRecord, local: LocalLog, disk_uuid: UUID
) -> None:
    """Refuse a disk whose last epoch is not the store's newest (R13).

    Starts that died before they wrote their epoch to the disk do not count: their records name the disk as it is
    now. A data directory that was restored from a snapshot, or cloned, has the same UUID and an older state.
    """
    if newest.epoch < local.epoch:
        raise ConfigurationError(
            f"The data directory was written in epoch {local.epoch}, the newest of node {node_id} in {store.url} is "
            f"{newest.epoch}: that store has lost objects, or is another one; check --object-store"
        )
    for epoch in range(newest.epoch, local.epoch, -1):
        record = newest
        if epoch < newest.epoch:
            record = await _read_epoch(store, node_id, _epoch_key(node_id, epoch))
        seen = (record.disk_uuid, record.disk_epoch, record.disk_ceiling)
        if seen != (disk_uuid, local.epoch, local.lsn_ceiling):
            raise ConfigurationError(
                f"Epoch {epoch} of node {node_id} in {store.url} was taken by {record.host} (pid {record.pid}) when "
                f"its disk was at epoch {record.disk_epoch} and LSN {record.disk_ceiling - 1}; this data directory "
                f"is at epoch {local.epoch} and LSN {local.lsn_ceiling - 1}. It is stale, an old snapshot or a copy, "
                "and is not replayed by itself: start with the newest directory"
            )


async def _newest(store: ObjectStore, node_id: str) -> _EpochRecord | None:
    keys = await store.list_keys(f"{node_id}/epoch/")
    return await _read_epoch(store, node_id, keys[-1].key) if keys else None


def _encode(record: _EpochRecord) -> bytes:
    """One line of JSON, for people, and one with its CRC-32C in hex."""
    body = msgspec.json.encode(record)
    return body + b"\n" + _crc(body) + b"\n"


def _crc(body: bytes) -> bytes:
    return b"%08x" % crc32c(body)


async def _read_epoch(store: ObjectStore, node_id: str, key: str) -> _EpochRecord:
    try:
        data = await store.get(key)
    except KeyError:
        raise DataCorruption(f"{store.url}/{key}", 0, "an epoch record", "no object") from None
    body, _, crc = data.rstrip(b"\n").rpartition(b"\n")
    if crc != _crc(body):
        raise DataCorruption(f"{store.url}/{key}", len(body) + 1, f"crc {_crc(body)!r}", repr(crc[:16]))
    try:
        record = msgspec.json.decode(body, type=_EpochRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataCorruption(f"{store.url}/{key}", 0, "an epoch record", str(error)) from error
    if _epoch_key(node_id, record.epoch) != key:
        raise DataCorruption(f"{store.url}/{key}", 0, f"the record of {key}", f"that of epoch {record.epoch}")
    return record


async def _reserved(store: ObjectStore, node_id: str) -> int:
    """The highest ceiling in the store; 1 where none was ever reserved."""
    prefix = f"{node_id}/lsn/"
    keys = await store.list_keys(prefix)
    return int(keys[-1].key.removeprefix(prefix)) if keys else 1


def _epoch_key(node_id: str, epoch: int) -> str:
    return f"{node_id}/epoch/{epoch:010d}"


__all__ = ["STORE_BLOCK", "EpochLease", "LocalLog", "take_epoch"]
