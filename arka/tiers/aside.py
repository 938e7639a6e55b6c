"""Setting writes aside whose own data cannot be written to their table (R32).

Owns: that such a write is durable in the object store, and on the log's disk, before a commit passes it, and which
writes they are at a start. Does not own the decision (``arka.tiers.committer``), the acks (``arka.flight.acks``) nor
the objects' form (``arka.wal.asidefile``). Nothing here is ever deleted.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from uuid import UUID

import structlog

from arka.storage.ports import Disk, ObjectExists, ObjectStore, StoreUnavailable
from arka.tiers.backlog import Cut
from arka.tiers.parking import encode_slice
from arka.tiers.retry import persist
from arka.tiers.table import Table
from arka.tiers.watermarks import now_us
from arka.wal.asidefile import aside_key, aside_prefix, encode_aside, parse_aside

log = structlog.get_logger(__name__)

#: By table and LSN, what the writers of set-aside writes are told.
Asides = dict[UUID, dict[int, str]]


class Aside:
    """Sets writes of one log aside. Used from trio's thread only."""

    def __init__(
        self,
        store: ObjectStore,
        local: ObjectStore,
        disk: Disk,
        *,
        node_id: str,
        log_uuid: UUID,
        epoch: Callable[[], int],
        retry_s: float,
        rng: random.Random,
    ) -> None:
        """Join the store and the local disk.

        Args:
            store: keeps the writes.
            local: a folder on the log's disk, for a start while the store is unavailable.
            disk: holds the log's segments.
            node_id: the node's name in the store.
            log_uuid: the log.
            epoch: returns this process's epoch of it; there is one when a commit was tried.
            retry_s: the first pause after a failed request.
            rng: for the jitter of retries.
        """
        self._store = store
        self._local = local
        self._disk = disk
        self._node_id = node_id
        self._log_uuid = log_uuid
        self._epoch = epoch
        self._retry_s = retry_s
        self._rng = rng

    async def keep(self, table: Table, cut: Cut, reason: str) -> None:
        """Keep a write, then let its streams know. Outages are waited for.

        Args:
            table: its table.
            cut: the write alone.
            reason: why it cannot be written to the table.

        Raises:
            DataCorruption: its frame in the log is damaged.

        Cancellation: the next start tries the write again, and comes here again.

        Durability: on return its frame and key are in the store and on the disk.
        """
        (piece,) = cut.slices
        encoded = await self._disk.run(partial(encode_slice, self._disk, self._log_uuid, self._epoch(), table, piece))
        key = aside_key(self._node_id, table.info.uuid, cut.through_lsn)
        parts = encode_aside(self._log_uuid, reason, now_us(), encoded.parts)

        async def put() -> None:
            for store in (self._store, self._local):
                # One that is there is an earlier attempt's, of this process or of one before it: the same frame.
                with suppress(ObjectExists):
                    await store.put_new(key, parts)

        def note(error: Exception) -> None:
            log.warning("aside.stalled", table=str(table.info.name), lsn=cut.through_lsn, reason=str(error))

        await persist(put, StoreUnavailable, note, retry_s=self._retry_s, rng=self._rng)
        table.set_aside(cut.through_lsn, aside_detail(str(table.info.name), cut.through_lsn, reason))
        log.error("table.set_aside", table=str(table.info.name), lsn=cut.through_lsn, reason=reason, key=key)


def aside_detail(name: str, lsn: int, reason: str) -> str:
    """What the writer of a set-aside write is told."""
    return (
        f"Write {lsn} was set aside: its data cannot be written to {name} ({reason}). It is not in the table and will "
        "not be; 'arka wal aside' on the server's data directory has it"
    )


async def load_asides(local: ObjectStore, node_id: str, log_uuid: UUID) -> Asides:
    """Find which writes of a log are set aside. Those of a log that was discarded stay; their LSNs mean nothing here.

    Args:
        local: the folder on the log's disk; it has all that the store has once the epoch was taken.
        node_id: the node's name.
        log_uuid: the log.

    Raises:
        DataCorruption: one is damaged.
        StoreUnavailable: the disk does not answer.
    """
    found: Asides = defaultdict(dict)
    for meta in await local.list_keys(aside_prefix(node_id)):
        write = parse_aside(f"{local.url}/{meta.key}", meta.key, await local.get(meta.key))
        if write.object.header.log_uuid != log_uuid:
            continue
        names = [str(info.name) for info in write.object.tables()]
        name = names[0] if names else str(write.table)
        found[write.table][write.lsn] = aside_detail(name, write.lsn, write.reason)
    return dict(found)


async def mirror_asides(store: ObjectStore, local: ObjectStore, node_id: str) -> None:
    """Bring what the store has to the disk; nothing is ever removed.

    Raises:
        StoreUnavailable: one of the two does not answer; ask again.
    """
    here = {meta.key for meta in await local.list_keys(aside_prefix(node_id))}
    for meta in await store.list_keys(aside_prefix(node_id)):
        if meta.key not in here:
            with suppress(ObjectExists):
                await local.put_new(meta.key, [await store.get(meta.key)])


__all__ = ["Aside", "Asides", "aside_detail", "load_asides", "mirror_asides"]
