"""The chain of WAL objects in the store: where it ends, and all of it in order (R11).

Owns: which objects are the log and which are leftovers. Does not own uploads (``arka.tiers.objects``), bytes
(``arka.wal.objectfile``) nor what follows from a frame.

An epoch's objects are in a folder of their own. Only the newest epoch that has a start record can have added to
the chain; the record says where the chain ended when it began, so that what an older epoch's process uploads
late is no part of it.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final
from uuid import UUID

import structlog

from arka.errors import DataCorruption
from arka.storage.ports import ObjectStore, StoreUnavailable
from arka.tiers.epochs import newest_start
from arka.tiers.listing import list_own
from arka.wal.objectfile import HEADER_BYTES, ObjectHeader, ObjectRef, WalObject, parse_object

log = structlog.get_logger(__name__)

#: The largest ``object_store.uploads``: objects under way beyond the last acknowledged one, of any process.
MAX_UPLOADS: Final = 64


class Chain:
    """The WAL objects of one node's log, read only."""

    def __init__(self, store: ObjectStore, node_id: str, log_uuid: UUID, *, released_lsn: int) -> None:
        """Say which chain.

        Args:
            store: where the objects are.
            node_id: the node's name in it.
            log_uuid: the log.
            released_lsn: objects up to here may have been deleted, since a checkpoint covers them (R12): a
                predecessor that ends there is no break although it is not found.
        """
        self._store = store
        self._node_id = node_id
        self._log_uuid = log_uuid
        self._released_lsn = released_lsn

    async def find_head(self) -> ObjectRef | None:
        """Find the last object; None for an empty chain. What lies behind a break was never acked and is reported.

        Raises:
            DataCorruption: an object that the chain reaches is damaged, or one that was acknowledged is gone.
            StoreUnavailable: the store does not answer, or a fenced process has deleted what was to be read: ask
                again, with the newest checkpoint.

        Cancellation: nothing changes.
        """
        start = await newest_start(self._store, self._node_id)
        if start is None:
            return None
        below = f"wal/{start.epoch:010d}/"
        keys = [meta.key for meta in await list_own(self._store, self._node_id, below)]
        key, lost = await self._last_linked(keys, start.head_ref)
        if key is None and start.head_ref is not None and start.head_ref.last_lsn > self._released_lsn:
            key = start.head_ref.key(self._node_id)
        head = start.head_ref
        if key is not None:
            head = (await self._read(key)).ref
            if key not in keys and head != start.head_ref:
                raise DataCorruption(self._path(key), 0, f"the head of the chain, {start.head_ref}", f"{head}")
        reached = 0 if head is None else head.last_lsn
        if lost is not None and lost.stored_through > max(reached, self._released_lsn):
            raise DataCorruption(
                self._path(f"{self._node_id}/{below}"),
                0,
                f"a chain up to LSN {lost.stored_through}, which was acknowledged",
                f"a break behind LSN {reached}",
            )
        return head

    async def list_objects(self, head: ObjectRef | None) -> list[ObjectRef]:
        """List the objects that the store still has, oldest first.

        Args:
            head: the chain's last object, as ``find_head`` returned it.

        Raises:
            DataCorruption: a header is damaged, or an object above ``released_lsn`` is missing.
            StoreUnavailable: the store does not answer, or one went away while this ran: see ``read``.
        """
        refs: list[ObjectRef] = []
        listed = {meta.key for meta in await list_own(self._store, self._node_id, "wal/")}
        before = head
        # Backwards over the headers alone: an object names its predecessor.
        while before is not None:
            key = before.key(self._node_id)
            if key not in listed:
                if before.last_lsn > self._released_lsn:
                    raise DataCorruption(self._path(key), 0, f"an object up to LSN {before.last_lsn}", "no object")
                break
            refs.append(before)
            before = (await self._read_header(key)).predecessor
        return refs[::-1]

    async def read(self, ref: ObjectRef) -> WalObject:
        """Read an object, checked as a whole and against what its successor says of it.

        Raises:
            DataCorruption: it is damaged, or another one.
            StoreUnavailable: the store does not answer, or it is gone: another process released it; look for the
                newest checkpoint and begin anew.
        """
        found = await self._read(ref.key(self._node_id))
        if found.ref != ref:
            raise DataCorruption(found.path, 0, f"the object that its successor names, {ref}", f"{found.ref}")
        return found

    async def _last_linked(self, keys: list[str], head: ObjectRef | None) -> tuple[str | None, ObjectHeader | None]:
        """Find the last object of an epoch that the chain reaches; None if it reaches none of them.

        Beside it, the last object behind a break, if there is one: it knows best what had been acknowledged.

        At most ``MAX_UPLOADS`` objects of an epoch can lie behind a break: only so many are ever under way
        beyond the last acknowledged one. So only the folder's end has to be looked at.
        """
        tail = keys[-(MAX_UPLOADS + 1) :]
        before: ObjectHeader | None = None
        linked: str | None = None
        for index, key in enumerate(tail):
            header = await self._read_header(key)
            named = header.predecessor
            if before is not None:
                follows = named is not None and (named.epoch, named.first_lsn, named.last_lsn) == (
                    before.epoch,
                    before.first_lsn,
                    before.last_lsn,
                )
            else:
                # The first one that is left names the epoch's beginning, or a released one; where older ones were
                # cut off, it is acknowledged.
                follows = (
                    len(tail) < len(keys)
                    or named == head
                    or (named is not None and named.last_lsn <= self._released_lsn)
                )
            if not follows:
                log.warning("objects.behind_a_break", keys=tail[index:][:10], count=len(tail) - index)
                return linked, header if key == tail[-1] else await self._read_header(tail[-1])
            before, linked = header, key
        return linked, None

    async def _read(self, key: str) -> WalObject:
        data = memoryview(await self._get(key, self._store.get(key)))
        return parse_object(self._path(key), data, self._log_uuid)

    async def _read_header(self, key: str) -> ObjectHeader:
        head = await self._get(key, self._store.get_range(key, 0, HEADER_BYTES))
        return ObjectHeader.from_bytes(self._path(key), memoryview(head))

    async def _get(self, key: str, request: Awaitable[bytes]) -> bytes:
        try:
            return await request
        except KeyError as error:
            raise StoreUnavailable(f"{key} was deleted while it was to be read: another process released it") from error

    def _path(self, key: str) -> str:
        return f"{self._store.url}/{key}"


__all__ = ["MAX_UPLOADS", "Chain"]
