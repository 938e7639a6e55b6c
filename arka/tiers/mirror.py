"""Checkpoints on the local disk too, so that a start knows its keys while the object store is away (R13, R21).

Owns: that the folder beside the log and the object store hold the same checkpoints. Does not own what is in them
(``arka.tiers.release``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from arka.storage.ports import Buffer, ObjectExists, ObjectMeta, ObjectStore
from arka.tiers.listing import list_own
from arka.tiers.release import covered_after, covered_lsn


class CheckpointStore:
    """``ObjectStore`` for a node's checkpoints: the store first, then the disk's folder.

    # Invariant: whatever is in the folder was in the store before. What a start finds here it takes for covered, and
    # a segment that is covered may be let go of.
    """

    def __init__(self, store: ObjectStore, local: ObjectStore, node_id: str) -> None:
        """Join the two.

        Args:
            store: the object store; what it holds counts.
            local: the folder on the log's disk.
            node_id: the node's name in both.
        """
        self._store = store
        self.local = local
        self._node_id = node_id
        self._prefix = f"{node_id}/checkpoint/"

    @property
    def url(self) -> str:
        """Where the store is, for people."""
        return self._store.url

    async def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        """See ``ports.ObjectStore.put_new``; on return it is durable in both places."""
        exists: ObjectExists | None = None
        try:
            await self._store.put_new(key, parts)
        except ObjectExists as error:
            exists = error
        if key.startswith(self._prefix):
            with suppress(ObjectExists):
                await self.local.put_new(key, [await self._store.get(key)] if exists else parts)
        if exists is not None:
            raise exists

    async def get(self, key: str) -> bytes:
        """See ``ports.ObjectStore.get``."""
        return await self._store.get(key)

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ``ports.ObjectStore.get_range``."""
        return await self._store.get_range(key, start, length)

    async def list_keys(self, prefix: str, *, start_after: str | None = None) -> list[ObjectMeta]:
        """See ``ports.ObjectStore.list_keys``."""
        return await self._store.list_keys(prefix, start_after=start_after)

    async def delete(self, keys: Sequence[str]) -> None:
        """See ``ports.ObjectStore.delete``; a crash between the two leaves what the next start brings here again."""
        await self.local.delete([key for key in keys if key.startswith(self._prefix)])
        await self._store.delete(keys)

    async def covered_here(self) -> int:
        """The last LSN that a checkpoint on the disk covers; 0 for none.

        Raises:
            StoreUnavailable: the disk does not answer.
        """
        return max(
            (covered_lsn(meta.key) for meta in await list_own(self.local, self._node_id, "checkpoint/")), default=0
        )

    async def has_gap(self) -> bool:
        """Whether a copy between the oldest and the newest on the disk is gone: its keys are in the store only (R39).

        Raises:
            DataCorruption: a copy is damaged.
            StoreUnavailable: the disk does not answer.
        """
        through_lsn = -1
        for meta in await list_own(self.local, self._node_id, "checkpoint/"):
            after_lsn = covered_after(f"{self.local.url}/{meta.key}", await self.local.get(meta.key))
            if 0 <= through_lsn < after_lsn:
                return True
            through_lsn = max(through_lsn, covered_lsn(meta.key))
        return False

    async def mirror(self) -> int:
        """Make the local folder hold what the store holds.

        Returns:
            The last LSN that a checkpoint covers; 0 for none.

        Raises:
            StoreUnavailable: one of the two does not answer; ask again.
        """
        theirs = {meta.key: meta.size for meta in await list_own(self._store, self._node_id, "checkpoint/")}
        ours = {meta.key: meta.size for meta in await list_own(self.local, self._node_id, "checkpoint/")}
        # Of the same name and size is the same: a checkpoint's key has its epoch, and its bytes a CRC.
        await self.local.delete([key for key, size in ours.items() if theirs.get(key) != size])
        for key, size in theirs.items():
            if ours.get(key) != size:
                with suppress(KeyError):
                    await self.local.put_new(key, [await self._store.get(key)])
        return await self.covered_here()


__all__ = ["CheckpointStore"]
