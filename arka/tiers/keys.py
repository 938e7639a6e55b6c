"""Idempotency keys: which write a key belongs to, for as long as it is kept (protocol 3.2, R21).

Owns: the index from (table, key) to the first write, when its entries go, and how many there may be. Does not own
durability: a key is as durable as the frame that carries it; recovery fills the index again from the frames, and
for frames whose segment is gone from checkpoints (``arka.tiers.release``).

The index holds no keys but their 128-bit BLAKE2b, personalised with the table's UUID, and takes equal hashes for
equal keys; a false match would refuse a new write as a duplicate and so lose it. Among ten million keys two share
a hash by chance with a probability of 10**-25, far below that of a memory error in between. Chosen keys do not
help either: finding two keys with one hash takes some 2**64 hashes, and they would cost their finder one of two
writes of its own; matching a key that somebody else has used takes some 2**104.

Memory is about 40 bytes a key (``arka._core.keys``), in one table or in many.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol
from uuid import UUID

import structlog

from arka._core.keys import ENTRY_BYTES, HASH_BYTES, KeyTable
from arka.errors import AdmissionRejected
from arka.storage.ports import Buffer

log = structlog.get_logger(__name__)

#: Most entries of one table that one call forgets: some 10 ms of trio's thread.
_EXPIRE_KEYS: Final = 20_000
#: A refusal is over, for the log, at this share of the limit: at the limit itself keys come and go.
_LOW_SHARE: Final = 0.95
#: Retention is counted in this many steps: a table keeps at most so many times of commits, and one more.
_RETENTION_STEPS: Final = 256
#: As ``arka._core.keys`` packs an entry: hash, LSN, digest.
_ENTRY: Final = struct.Struct("<16sQI")


class KeyedWrite(NamedTuple):
    """The first write of a key: its LSN and a checksum of its payload."""

    lsn: int
    digest: int


class _Hasher(Protocol):
    """What ``hashlib.blake2b`` returns."""

    def copy(self) -> _Hasher: ...
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


@dataclass(slots=True)
class _Commits:
    """The keys up to ``lsn`` have been committed at ``at_us`` at the latest."""

    lsn: int
    at_us: int
    # When the first commit was put into this step.
    since_us: int


class _TableKeys:
    """One table's keys."""

    def __init__(self, table: UUID) -> None:
        self.writes = KeyTable()
        self.commits: deque[_Commits] = deque()
        # Entries up to here may go.
        self.expired_lsn = 0
        self._hasher = _hasher(table)

    def hash(self, key: bytes) -> bytes:
        hasher = self._hasher.copy()
        hasher.update(key)
        return hasher.digest()


class KeyIndex:
    """All keys of the node's log that may still be asked for. Used from trio's thread only."""

    def __init__(self, retention_s: float, *, limit: int) -> None:
        """Begin with no keys.

        Args:
            retention_s: how long a key is kept after its write was committed.
            limit: with so many keys no new one is let in (``idempotency.keys``).
        """
        self._retention_us = int(retention_s * 1e6)
        self._limit = limit
        self._tables: dict[UUID, _TableKeys] = {}
        # Invariant: the sum over the tables.
        self._count = 0
        # Entries up to here are in a checkpoint.
        self._covered_lsn = 0
        # By dropped table: checkpoints may still hold keys of it up to this LSN, which count no more.
        self._dropped: dict[UUID, int] = {}
        self._refusing = False

    def find(self, table: UUID, key: bytes) -> KeyedWrite | None:
        """Return the first write of ``key``, or None."""
        keys = self._tables.get(table)
        if keys is None:
            return None
        found = keys.writes.find(keys.hash(key))
        return KeyedWrite(*found) if found is not None else None

    def insert(self, table: UUID, key: bytes, lsn: int, digest: int) -> None:
        """Remember a key; the caller has just looked it up, in the same step.

        Args:
            table: the table's UUID.
            key: the key.
            lsn: its write's LSN, above those of all keys of the table that are known.
            digest: a CRC-32C of the write's payload.
        """
        keys = self._keys_of(table)
        before = len(keys.writes)
        keys.writes.insert(keys.hash(key), lsn, digest)
        self._count += len(keys.writes) - before

    def load(self, table: UUID, packed: Buffer) -> None:
        """Remember entries that recovery found; what is known already is left out.

        A key that is in it with a higher LSN than the index has was used again after its retention had ended: it
        belongs to the later write.

        Args:
            table: the table's UUID.
            packed: entries in LSN order, from ``uncovered`` or ``pack_entry``.

        Raises:
            ValueError: they are no entries in LSN order.
        """
        writes = self._keys_of(table).writes
        before = len(writes)
        writes.load(packed)
        self._count += len(writes) - before

    def check_room(self) -> None:
        """Let a write with a new key in or refuse it.

        Raises:
            AdmissionRejected: ``overloaded``: as many keys are remembered as may be.
        """
        if self._count < self._limit:
            if self._refusing and self._count < self._limit * _LOW_SHARE:
                self._refusing = False
                log.info("keys.accepting", keys=self._count)
            return
        if not self._refusing:
            self._refusing = True
            log.warning("keys.refusing", keys=self._count, limit=self._limit)
        raise AdmissionRejected(
            f"{self._count} idempotency keys are remembered, the limit is {self._limit} (idempotency.keys): retry "
            "later, or write without a key"
        )

    def uncovered(self, through_lsn: int) -> Iterator[tuple[UUID, bytes]]:
        """Yield the entries up to ``through_lsn`` that no checkpoint covers, packed, by table."""
        for table, keys in self._tables.items():
            packed = keys.writes.pack(self._covered_lsn, through_lsn)
            if packed:
                yield table, packed

    def uncovered_bytes(self, through_lsn: int) -> int:
        """How many bytes ``uncovered`` would yield."""
        counts = [keys.writes.count(self._covered_lsn, through_lsn) for keys in self._tables.values()]
        return sum(counts) * ENTRY_BYTES

    def forget_uncovered(self, through_lsn: int) -> None:
        """Note that a checkpoint covers the entries up to ``through_lsn``."""
        self._covered_lsn = max(self._covered_lsn, through_lsn)

    def first_lsn(self) -> int | None:
        """The least LSN that some key may still be answered with; None when there is no key."""
        held = [keys.writes.first_lsn for keys in self._tables.values()]
        return min((lsn for lsn in held if lsn is not None), default=None)

    def note_committed(self, table: UUID, lsn: int, now_us: int) -> None:
        """Start the retention of the keys up to ``lsn`` and forget some whose retention is over.

        Args:
            table: the table's UUID.
            lsn: its ``iceberg_committed`` watermark; one that is not above an earlier call's changes nothing.
            now_us: when it stood there at the latest, on the log's clock.
        """
        keys = self._tables.get(table)
        if keys is None:
            return
        commits = keys.commits
        if not commits or lsn > commits[-1].lsn:
            # Commits of one step are taken for as late as the last of them: keys may stay longer, never shorter.
            if commits and now_us < commits[-1].since_us + self._retention_us // _RETENTION_STEPS:
                commits[-1].lsn, commits[-1].at_us = lsn, max(commits[-1].at_us, now_us)
            else:
                commits.append(_Commits(lsn, now_us, now_us))
        self._expire(keys, now_us)

    def expire(self, now_us: int) -> bool:
        """Forget some keys whose retention is over, of every table.

        Args:
            now_us: the log's clock.

        Returns:
            Whether there may be more of them: call again.
        """
        more = False
        for keys in self._tables.values():
            more |= self._expire(keys, now_us)
        return more

    def drop_table(self, table: UUID, through_lsn: int | None = None) -> None:
        """Forget a dropped table's keys: keys belong to the table's UUID.

        Args:
            table: the table's UUID.
            through_lsn: only those up to here; what comes behind the drop, in a table that was registered again,
                stays. None for all.
        """
        keys = self._tables.get(table)
        if keys is None:
            return
        before = len(keys.writes)
        through_lsn = keys.writes.last_lsn if through_lsn is None else through_lsn
        keys.writes.expire_through(through_lsn)
        self._count -= before - len(keys.writes)
        if not len(keys.writes):
            del self._tables[table]
        self._dropped[table] = through_lsn

    def dropped(self) -> list[tuple[UUID, int]]:
        """The dropped tables of which older checkpoints may hold keys, each with the last LSN that counts no more."""
        return list(self._dropped.items())

    def forget_dropped(self, through_lsn: int) -> None:
        """Note that no checkpoint with LSNs up to ``through_lsn`` is left."""
        self._dropped = {table: lsn for table, lsn in self._dropped.items() if lsn > through_lsn}

    @property
    def memory_bytes(self) -> int:
        """Bytes that the entries and their index take."""
        return sum(keys.writes.memory_bytes for keys in self._tables.values())

    def __len__(self) -> int:
        return self._count

    def _keys_of(self, table: UUID) -> _TableKeys:
        keys = self._tables.get(table)
        if keys is None:
            keys = self._tables[table] = _TableKeys(table)
        return keys

    def _expire(self, keys: _TableKeys, now_us: int) -> bool:
        while keys.commits and keys.commits[0].at_us + self._retention_us <= now_us:
            keys.expired_lsn = keys.commits.popleft().lsn
        before = len(keys.writes)
        dropped = keys.writes.expire_through(keys.expired_lsn, _EXPIRE_KEYS)
        self._count -= before - len(keys.writes)
        return dropped == _EXPIRE_KEYS


def pack_entry(table: UUID, key: bytes, lsn: int, digest: int) -> bytes:
    """Pack one key for ``KeyIndex.load``.

    Args:
        table: the table's UUID.
        key: the key.
        lsn: its write's LSN.
        digest: a CRC-32C of the write's payload.
    """
    hasher = _hasher(table)
    hasher.update(key)
    return _ENTRY.pack(hasher.digest(), lsn, digest)


def _hasher(table: UUID) -> _Hasher:
    return hashlib.blake2b(digest_size=HASH_BYTES, person=table.bytes)


__all__ = ["KeyIndex", "KeyedWrite", "pack_entry"]
