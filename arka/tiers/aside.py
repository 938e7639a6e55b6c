"""Setting writes aside whose own data cannot be written to their table (R32).

Owns: that such a write is durable in the object store, and on the log's disk, before a commit passes it, and which
writes they are at a start. Does not own the decision (``arka.tiers.committer``), the acks (``arka.flight.acks``) nor
the objects' form (``arka.wal.asidefile``). Nothing here is ever deleted.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple
from uuid import UUID

import structlog

from arka.errors import DataCorruption
from arka.storage.ports import Disk, ObjectExists, ObjectStore, StoreUnavailable
from arka.tiers.backlog import Cut
from arka.tiers.listing import list_own
from arka.tiers.parking import encode_slice
from arka.tiers.retry import persist
from arka.tiers.table import Table
from arka.tiers.watermarks import now_us
from arka.wal.asidefile import aside_key, encode_aside, parse_aside

log = structlog.get_logger(__name__)

#: By table and LSN, what the writers of set-aside writes are told.
Asides = dict[UUID, dict[int, str]]


class FoundAsides(NamedTuple):
    """What a start finds set aside.

    Attributes:
        known: the writes.
        broken: the tables of which a copy is damaged or gone: which writes they are cannot be said, or not be proved.
    """

    known: Asides
    broken: dict[UUID, DataCorruption]


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


async def load_asides(
    local: ObjectStore, node_id: str, log_uuid: UUID, remembered: Mapping[UUID, Iterable[int]]
) -> FoundAsides:
    """Find which writes of a log are set aside. Those of a log that was discarded stay; their LSNs mean nothing here.

    Args:
        local: the folder on the log's disk; it has all that the store has once the epoch was taken.
        node_id: the node's name.
        log_uuid: the log.
        remembered: by table, the LSNs that the newest checkpoint names.

    Raises:
        StoreUnavailable: the disk does not answer.
    """
    found: defaultdict[UUID, dict[int, str]] = defaultdict(dict)
    broken: dict[UUID, DataCorruption] = {}
    for meta in await list_own(local, node_id, "aside/"):
        path = f"{local.url}/{meta.key}"
        try:
            write = parse_aside(path, meta.key, await local.get(meta.key))
        except DataCorruption as error:
            broken.setdefault(UUID(meta.key.split("/")[-2]), error)
            continue
        if write.object.header.log_uuid != log_uuid:
            continue
        names = [str(info.name) for info in write.object.tables()]
        name = names[0] if names else str(write.table)
        found[write.table][write.lsn] = aside_detail(name, write.lsn, write.reason)
    for table, lsns in remembered.items():
        for lsn in sorted(set(lsns) - found[table].keys()):
            path = f"{local.url}/{aside_key(node_id, table, lsn)}"
            broken.setdefault(table, DataCorruption(path, 0, "a write that is set aside", "no object"))
            found[table][lsn] = f"Write {lsn} was set aside, and its copy {path} is gone or damaged"
    return FoundAsides(dict(found), broken)


async def mirror_asides(store: ObjectStore, local: ObjectStore, node_id: str) -> None:
    """Bring each copy that one of the two lacks, or has damaged, there from the other one; nothing else is removed.

    Raises:
        StoreUnavailable: one of the two does not answer; ask again.
    """
    theirs = {meta.key for meta in await list_own(store, node_id, "aside/")}
    ours = {meta.key for meta in await list_own(local, node_id, "aside/")}
    for key in sorted(theirs | ours):
        here = await _intact(local, key) if key in ours else None
        there = await _intact(store, key) if key in theirs else None
        if here is None and there is not None:
            await _replace(local, key, there)
        elif there is None and here is not None:
            await _replace(store, key, here)


async def _intact(store: ObjectStore, key: str) -> bytes | None:
    """A copy's bytes; None if it is gone or damaged."""
    try:
        data = await store.get(key)
        parse_aside(f"{store.url}/{key}", key, data)
    except (KeyError, DataCorruption):
        return None
    return data


async def _replace(store: ObjectStore, key: str, data: bytes) -> None:
    """Put an intact copy where there is none; a damaged one is worth nothing."""
    await store.delete([key])
    with suppress(ObjectExists):
        await store.put_new(key, [data])


__all__ = ["Aside", "Asides", "FoundAsides", "aside_detail", "load_asides", "mirror_asides"]
