"""Letting go of the log: segments and WAL objects that nothing needs any more (R12).

Owns: when a segment or an object may go, and the checkpoint that has to be durable in the object store
before. Does not own the files (``arka.wal.writer``) nor the keys (``arka.tiers.keys``).

A segment may go when the object store has all of it, every table has committed its frames in it, a
checkpoint with its keys and the lost ranges is in the store, and a grace period has passed since.
Checkpoints are incremental: each covers the LSNs since the one before, and goes when its keys have expired.

Layout, below the node's id: ``checkpoint/<epoch, 10 digits>/<through LSN, 16 digits>``, create-only: a
MessagePack record behind its CRC-32C.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import msgspec
import structlog
import trio

from arka import failpoints
from arka._core.framing import crc32c
from arka.errors import DataCorruption
from arka.records import LsnRange
from arka.storage.ports import ObjectExists, ObjectStore, StoreUnavailable
from arka.tiers.keys import CheckpointKey, KeyIndex
from arka.tiers.space import DiskSpace
from arka.tiers.watermarks import now_us
from arka.wal.segment import SegmentRef
from arka.wal.writer import WalWriter

log = structlog.get_logger(__name__)

#: How often the log is looked at, in seconds; a segment takes longer to fill.
_POLL_S: Final = 1.0
#: Bytes of a key's entry in a checkpoint beside the key: table UUID, LSN, digest, and MessagePack's own.
KEY_ENTRY_BYTES: Final = 48
#: In front of a checkpoint's record.
_CRC_BYTES: Final = 4


class _Checkpoint(msgspec.Struct, frozen=True, array_like=True):
    """The stored form; fields are only ever added, with a default."""

    log_uuid: str
    epoch: int
    after_lsn: int
    through_lsn: int
    written_us: int
    #: (after, through, recorded at, microseconds)
    lost: list[tuple[int, int, int]]
    #: (table UUID, key, LSN, digest)
    keys: list[tuple[bytes, bytes, int, int]]


@dataclass(frozen=True, slots=True)
class LostRange:
    """LSNs that a crash lost, and when that was found (R3)."""

    range: LsnRange
    recorded_us: int


@dataclass(frozen=True, slots=True)
class LoadedCheckpoints:
    """What the checkpoints in the store remember: keys in LSN order, and lost ranges."""

    keys: tuple[CheckpointKey, ...]
    lost: tuple[LostRange, ...]
    through_lsn: int


@dataclass(slots=True)
class _HeldSegment:
    """A segment that is on disk: its last LSN so far, its size so far, and what a checkpoint needs for its keys."""

    ref: SegmentRef
    last_lsn: int
    size: int
    checkpoint_bytes: int


class LogRelease:
    """Deletes what the log no longer needs. Used from trio's thread."""

    def __init__(
        self,
        store: ObjectStore,
        writer: WalWriter,
        keys: KeyIndex,
        space: DiskSpace,
        *,
        node_id: str,
        log_uuid: UUID,
        epoch: int,
        lost: Iterable[LostRange],
        after_lsn: int,
        retention_s: float,
        grace_s: float,
    ) -> None:
        """Join the log with what decides over it.

        Args:
            store: holds checkpoints and WAL objects.
            writer: unlinks segments.
            keys: gives the keys that a checkpoint must carry.
            space: told of the room.
            node_id: the node's name in the store.
            log_uuid: the log.
            epoch: this process's epoch.
            lost: lost ranges that are remembered.
            after_lsn: checkpoints cover everything up to here already.
            retention_s: how long keys and lost ranges are kept.
            grace_s: how long a segment stays after its checkpoint.
        """
        self._store = store
        self._writer = writer
        self._keys = keys
        self._space = space
        self._node_id = node_id
        self._log_uuid = log_uuid
        self._epoch = epoch
        self._lost = list(lost)
        self._covered_lsn = after_lsn
        self._retention_s = retention_s
        self._grace_s = grace_s
        # Oldest first; the last one may be active.
        self._held: deque[_HeldSegment] = deque()
        # Segments whose checkpoint is durable, with the time from which on they may go.
        self._doomed: deque[tuple[_HeldSegment, float]] = deque()

    @property
    def owed_bytes(self) -> int:
        """About how many bytes the checkpoints will take that segments on disk still wait for."""
        return sum(held.checkpoint_bytes for held in self._held)

    def note(self, ref: SegmentRef, last_lsn: int, size: int, checkpoint_bytes: int = 0) -> None:
        """Note bytes of a segment that are on disk, and those that their keys take in a checkpoint; log order."""
        if self._held and self._held[-1].ref == ref:
            held = self._held[-1]
            held.last_lsn = last_lsn
            held.size += size
            held.checkpoint_bytes += checkpoint_bytes
        else:
            self._held.append(_HeldSegment(ref, last_lsn, size, checkpoint_bytes))

    async def run(self, needed_from: Callable[[], int]) -> None:
        """Look for what may go, until cancelled. Outages are waited for.

        Args:
            needed_from: returns the least LSN that a later tier still needs.

        Raises:
            OSError: the disk does not unlink.

        Cancellation: what was not deleted yet is deleted after the next start.
        """
        while True:
            await trio.sleep(_POLL_S)
            try:
                await self._checkpoint(needed_from())
                await self._delete()
            except StoreUnavailable as error:
                log.debug("log.release_stalled", reason=str(error))

    async def _checkpoint(self, needed: int) -> None:
        """Cover the segments that no tier needs any more by a checkpoint."""
        free: list[_HeldSegment] = []
        # The last one is active or may still become so: it stays.
        while len(self._held) > len(free) + 1 and self._held[len(free)].last_lsn < needed:
            free.append(self._held[len(free)])
        if not free:
            return
        through_lsn = free[-1].last_lsn
        if through_lsn > self._covered_lsn:
            await self._write_checkpoint(through_lsn)
            self._covered_lsn = through_lsn
            self._keys.forget_uncovered(through_lsn)
        due = trio.current_time() + self._grace_s
        for held in free:
            self._held.popleft()
            self._doomed.append((held, due))

    async def _write_checkpoint(self, through_lsn: int) -> None:
        oldest_us = now_us() - int(self._retention_s * 1e6)
        self._lost = [lost for lost in self._lost if lost.recorded_us >= oldest_us]
        record = _Checkpoint(
            log_uuid=str(self._log_uuid),
            epoch=self._epoch,
            after_lsn=self._covered_lsn,
            through_lsn=through_lsn,
            written_us=now_us(),
            lost=[(lost.range.after, lost.range.through, lost.recorded_us) for lost in self._lost],
            keys=[(key.table.bytes, key.key, key.lsn, key.digest) for key in self._keys.uncovered(through_lsn)],
        )
        body = msgspec.msgpack.encode(record)
        key = f"{self._node_id}/checkpoint/{self._epoch:010d}/{through_lsn:016d}"
        await failpoints.reach("release.begin")
        try:
            await self._store.put_new(key, [crc32c(body).to_bytes(_CRC_BYTES, "little"), body])
        except ObjectExists:
            # Our own attempt whose response was lost: the epoch is ours and the range is the same.
            log.debug("log.checkpoint_exists", key=key)
        await failpoints.reach("release.checkpoint")
        log.info("log.checkpoint", through_lsn=through_lsn, keys=len(record.keys), bytes=len(body))

    async def _delete(self) -> None:
        """Delete the segments, WAL objects and checkpoints whose time has come."""
        now = trio.current_time()
        gone: list[_HeldSegment] = []
        while self._doomed and self._doomed[0][1] <= now:
            gone.append(self._doomed.popleft()[0])
        if not gone:
            return
        await self._writer.retire([held.ref for held in gone])
        await failpoints.reach("release.retired")
        size = sum(held.size for held in gone)
        self._space.note_released(size)
        await self._delete_objects(gone[-1].last_lsn)
        log.info("log.released", segments=len(gone), bytes=size, through_lsn=gone[-1].last_lsn)

    async def _delete_objects(self, through_lsn: int) -> None:
        """Delete WAL objects that lie wholly below ``through_lsn``, and checkpoints that have expired.

        An object's key gives its first LSN only; it ends below its successor's first.
        """
        metas = await self._store.list_keys(f"{self._node_id}/wal/")
        firsts = [int(meta.key.rpartition("/")[2].removesuffix(".wal")) for meta in metas]
        dead = [meta.key for meta, following in zip(metas, firsts[1:], strict=False) if following <= through_lsn + 1]
        expired_us = now_us() - int(self._retention_s * 1e6)
        # The newest one stays: it says how far the log was let go of.
        for meta in (await self._store.list_keys(f"{self._node_id}/checkpoint/"))[:-1]:
            record = _parse(self._store.url, meta.key, await self._store.get(meta.key), self._log_uuid)
            if record.written_us >= expired_us:
                break
            dead.append(meta.key)
        await self._store.delete(dead)
        await failpoints.reach("release.deleted")


async def load_checkpoints(store: ObjectStore, node_id: str, log_uuid: UUID, retention_s: float) -> LoadedCheckpoints:
    """Read the checkpoints of a log, oldest first.

    Args:
        store: the object store.
        node_id: the node's name in it.
        log_uuid: the log.
        retention_s: lost ranges older than this are forgotten.

    Raises:
        DataCorruption: one is damaged or another log's.
        StoreUnavailable: the store does not answer.
    """
    keys: list[CheckpointKey] = []
    lost: dict[LsnRange, LostRange] = {}
    through_lsn = 0
    oldest_us = time.time_ns() // 1000 - int(retention_s * 1e6)
    for meta in await store.list_keys(f"{node_id}/checkpoint/"):
        record = _parse(store.url, meta.key, await store.get(meta.key), log_uuid)
        keys.extend(CheckpointKey(UUID(bytes=table), key, lsn, digest) for table, key, lsn, digest in record.keys)
        for after, through, recorded_us in record.lost:
            if recorded_us >= oldest_us:
                lost[LsnRange(after, through)] = LostRange(LsnRange(after, through), recorded_us)
        through_lsn = max(through_lsn, record.through_lsn)
    return LoadedCheckpoints(tuple(keys), tuple(lost.values()), through_lsn)


def _parse(url: str, key: str, data: bytes, log_uuid: UUID) -> _Checkpoint:
    path = f"{url}/{key}"
    body = data[_CRC_BYTES:]
    found, expected = int.from_bytes(data[:_CRC_BYTES], "little"), crc32c(body)
    if len(data) < _CRC_BYTES or found != expected:
        raise DataCorruption(path, 0, f"crc {expected:08x}", f"{found:08x}")
    try:
        record = msgspec.msgpack.decode(body, type=_Checkpoint)
    except msgspec.MsgspecError as error:
        raise DataCorruption(path, _CRC_BYTES, "a checkpoint", str(error)) from error
    if record.log_uuid != str(log_uuid):
        raise DataCorruption(path, _CRC_BYTES, f"log {log_uuid}", f"log {record.log_uuid}")
    return record


def merge_lost(groups: Sequence[Iterable[LostRange]]) -> list[LostRange]:
    """Join lost ranges from several places, each range once, by LSN."""
    merged = {lost.range: lost for group in groups for lost in group}
    return [merged[key] for key in sorted(merged)]


__all__ = ["KEY_ENTRY_BYTES", "LoadedCheckpoints", "LogRelease", "LostRange", "load_checkpoints", "merge_lost"]
