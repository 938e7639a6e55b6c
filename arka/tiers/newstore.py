"""Going on in an empty object store after the old one was lost: ``--new-store`` (R38).

Owns: when a disk may do that, and what it puts there first. Does not own how an epoch is taken (``arka.tiers.epochs``).

A disk may if it is known what was in the old store only. Its segments hold what no table has committed, but for frames
that were parked or set apart: the newest checkpoint names those, they are listed by LSN, and their tables stop
(``arka.tiers.held``). Its copies of checkpoints hold the keys of what the segments hold no more. Copies of set-aside
writes lie on the disk too.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from arka.errors import ConfigurationError
from arka.storage.ports import Disk, ObjectExists, ObjectStore
from arka.tiers.epochrecords import EpochRecord, read_record
from arka.tiers.listing import list_own
from arka.tiers.mirror import CheckpointStore
from arka.tiers.release import frames_elsewhere, held_elsewhere
from arka.wal.logstate import LogState
from arka.wal.seal import kept_of
from arka.wal.walk import list_segments

log = structlog.get_logger(__name__)


async def prepare_store(
    store: ObjectStore, local: ObjectStore, node_id: str, state: LogState, wal_dir: Path, disk: Disk
) -> LogState:
    """Check that a log may go on in an empty store, and bring what the disk has of the old one there; one attempt.

    A store that has an epoch of this log is left to the ordinary rules: an earlier start went on there, or nothing is
    lost.

    Args:
        store: the new store.
        local: the folder of copies on the log's disk.
        node_id: the node's name in both.
        state: the disk's log.
        wal_dir: the log's folder.
        disk: its file system.

    Returns:
        The log's state. What was left of its reserved LSNs is given up (R2).

    Raises:
        ConfigurationError: the place is not empty, or nobody can say what was in the old store only.
        DataCorruption: a copy or a segment is damaged.
        StoreUnavailable: ask again.

    Durability: the copies are in the store, and the state on the disk, on return.
    """
    there = [meta.key for meta in await list_own(store, node_id)]
    epochs = [key for key in there if key.startswith(f"{node_id}/epoch/")]
    if epochs:
        record = await read_record(store, epochs[-1], EpochRecord)
        if record.log_uuid == state.log_uuid:
            return state
    ours = [meta.key for meta in await list_own(local, node_id)]
    strange = sorted(set(there) - set(ours))
    if strange:
        raise ConfigurationError(
            f"{store.url} is not empty: it holds {strange[0]} and {len(strange) - 1} more objects of node {node_id}. "
            "--new-store needs a place where this node never was"
        )
    base_lsn = await disk.run(partial(_base_lsn, disk, wal_dir))
    if base_lsn:
        await _check_copies(CheckpointStore(store, local, node_id), local, node_id, base_lsn)
    for key in ours:
        data = await local.get(key)
        with suppress(ObjectExists):
            await store.put_new(key, [data])
    log.warning("objects.new_store", store=store.url, epoch=state.epoch + 1, copies=len(ours), base_lsn=base_lsn)
    return await replace(state, lsn_ceiling=state.store_ceiling).write(wal_dir, disk)


def _base_lsn(disk: Disk, wal_dir: Path) -> int:
    """The last LSN that the disk's segments do not hold. Blocking."""
    return kept_of(disk, list_segments(wal_dir, disk), 0).base_lsn


async def _check_copies(copies: CheckpointStore, local: ObjectStore, node_id: str, base_lsn: int) -> None:
    """Check that the disk's checkpoints cover what its segments hold no more, and say which frames were elsewhere."""
    if await copies.covered_here() < base_lsn or await copies.has_gap():
        raise ConfigurationError(
            f"The disk holds the log from LSN {base_lsn + 1} on, and lacks copies of checkpoints for what came before: "
            "their keys were in the lost store only. Set the log aside with `arka wal salvage DATA_DIR --discard`"
        )
    key = (await list_own(local, node_id, "checkpoint/"))[-1].key
    data = await local.get(key)
    elsewhere = frames_elsewhere(f"{local.url}/{key}", data)
    if elsewhere is None or elsewhere:
        spans = [f"{table.info.name}: LSNs in ({table.committed_lsn}, {base_lsn}]" for table in elsewhere or ()]
        raise ConfigurationError(
            "Writes that were parked or set apart were in the lost store only"
            + (f" ({'; '.join(spans)})" if spans else ", or may have been: the newest checkpoint does not say")
            + ". Set the log aside with `arka wal salvage DATA_DIR --discard`, start, and send again what the disk has"
        )
    for name, held in held_elsewhere(f"{local.url}/{key}", data):
        # In no segment and, unless its table has committed it since, in no table: there it stops (R33).
        log.warning(
            "objects.lost_with_store",
            table=str(name),
            key=f"{node_id}/{held.key}",
            after_lsn=held.first_lsn - 1,
            through_lsn=min(held.last_lsn, base_lsn),
        )


__all__ = ["prepare_store"]
