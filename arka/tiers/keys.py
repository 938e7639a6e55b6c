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
import trio

from arka._core.keys import ENTRY_BYTES, HASH_BYTES, KeyTable
from arka.errors import AdmissionRejected
from arka.slices import slices_of
from arka.storage.ports import Buffer

log = structlog.get_logger(__name__)

#: Most entries that one call forgets, and tables that it looks at: about a millisecond of trio's thread each.
_EXPIRE_KEYS: Final = 4_000
_EXPIRE_TABLES: Final = 500
#: Entries packed or loaded at a time.
_PIECE_KEYS: Final = 16_384
#: Tables that hold few keys may use so much more than the limit while others have filled it: this part of it.
_RESERVE_PART: Final = 8
#: A refusal is over, for the log, at this share of the limit: at the limit itself keys come and go.
_LOW_SHARE: Final = 0.95
#: Retention is counted in this many steps: a table keeps at most so many times of commits, and one more.
_RETENTION_STEPS: Final = 256
#: Above every LSN.
_MAX_LSN: Final = 2**63
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
        # Entries up to here are a dropped table's: they count no more, and go in steps.
        self.dropped_lsn = 0
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
            limit: with so many keys no new one is let in (``idempotency.keys``), but for tables that hold few.
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
        # Entries of tables that were dropped whole: forgotten in steps, found by nobody.
        self._graves: list[KeyTable] = []
        # Tables that this round of ``expire`` has not looked at yet.
        self._round: list[UUID] = []
        # Tables with entries that no checkpoint covers, and about how many these are.
        self._fresh: dict[UUID, None] = {}
        self._fresh_count = 0
        # The most keys of one table, since the last round of ``expire``.
        self._largest = 0
        self._refusing = False

    def find(self, table: UUID, key: bytes) -> KeyedWrite | None:
        """Return the first write of ``key``, or None."""
        keys = self._tables.get(table)
        if keys is None:
            return None
        found = keys.writes.find(keys.hash(key))
        return KeyedWrite(*found) if found is not None and found[0] > keys.dropped_lsn else None

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
        self._note_fresh(table, keys, 1)

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
        keys = self._keys_of(table)
        before = len(keys.writes)
        added = keys.writes.load(packed)
        self._count += len(keys.writes) - before
        self._note_fresh(table, keys, added)

    async def load_steps(self, table: UUID, packed: Buffer) -> None:
        """As ``load``, a piece at a time, with a checkpoint after each.

        Raises:
            ValueError: they are no entries in LSN order; some may have been taken.

        Cancellation: some entries have been taken; the call may be repeated.
        """
        entries, last_lsn = memoryview(packed), 0
        for start in range(0, len(entries), _PIECE_KEYS * ENTRY_BYTES):
            piece = entries[start : start + _PIECE_KEYS * ENTRY_BYTES]
            # What an earlier piece has is left out in silence otherwise.
            if len(piece) >= ENTRY_BYTES and _ENTRY.unpack_from(piece)[1] <= last_lsn:
                raise ValueError(f"LSNs must rise: {_ENTRY.unpack_from(piece)[1]} came after {last_lsn}")
            self.load(table, piece)
            last_lsn = _ENTRY.unpack_from(piece, len(piece) - ENTRY_BYTES)[1]
            await trio.lowlevel.checkpoint()

    @property
    def full(self) -> bool:
        """Whether as many keys are remembered as the limit says."""
        return self._count >= self._limit

    def spares(self, table: UUID) -> bool:
        """Say whether a table may use the reserve for tables that hold few keys, now that the limit is reached.

        Invariant: at most ``limit`` and an eighth of it are remembered, and a table that holds less than its share (the
        limit divided by the tables with keys, or half of what the largest holds) is refused only when both are full.
        """
        keys = self._tables.get(table)
        held = 0 if keys is None else len(keys.writes)
        share = max(self._limit // max(len(self._tables), 1), self._largest // 2)
        return held < share and self._count < self._limit + self._limit // _RESERVE_PART

    def check_room(self) -> None:
        """Let a write with a new key in or refuse it; of a table that ``spares`` does not let in anyway.

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
        """Yield the entries up to ``through_lsn`` that no checkpoint covers, packed, by table, in pieces in LSN order.

        Between two steps of the iterator, keys may be inserted, expired and dropped. The last piece of a table is
        empty, so that no step looks at more than one.
        """
        for table in list(self._fresh):
            after_lsn = self._covered_lsn
            packed = b""
            while (keys := self._tables.get(table)) is not None:
                packed = keys.writes.pack(max(after_lsn, keys.dropped_lsn), through_lsn, _PIECE_KEYS)
                yield table, packed
                if not packed:
                    break
                after_lsn = _ENTRY.unpack_from(packed, len(packed) - ENTRY_BYTES)[1]

    async def uncovered_bytes(self, through_lsn: int, enough: int = -1) -> int:
        """How many bytes ``uncovered`` would yield, looked at in slices.

        Args:
            through_lsn: below every LSN that is still to be inserted, so that what is counted can only become less.
            enough: if there are surely no more, no table is looked at, and the answer may be too high; bytes.
        """
        if self.fresh_bytes <= enough:
            return self.fresh_bytes
        counted = 0
        for tables in slices_of(self._fresh):
            counted += sum(self._count_uncovered(table, through_lsn) for table in tables)
            await trio.lowlevel.checkpoint()
        return counted * ENTRY_BYTES

    def _count_uncovered(self, table: UUID, through_lsn: int) -> int:
        """How many entries of a table no checkpoint covers."""
        keys = self._tables.get(table)
        return 0 if keys is None else keys.writes.count(max(self._covered_lsn, keys.dropped_lsn), through_lsn)

    @property
    def fresh_bytes(self) -> int:
        """About what ``uncovered_bytes`` of all is, without a look at each table."""
        return min(self._fresh_count, self._count) * ENTRY_BYTES

    async def forget_uncovered(self, through_lsn: int) -> None:
        """Note that a checkpoint covers the entries up to ``through_lsn``; tables are looked at in slices.

        Cancellation: it is noted; ``fresh_bytes`` may stay higher than it is.
        """
        self._covered_lsn = max(self._covered_lsn, through_lsn)
        before, counted = self._fresh_count, 0
        for tables in slices_of(self._fresh):
            for table in tables:
                keys = self._tables.get(table)
                if keys is None or keys.writes.last_lsn <= self._covered_lsn:
                    # A key that comes later puts it there again.
                    self._fresh.pop(table, None)
                else:
                    counted += self._count_uncovered(table, _MAX_LSN)
            await trio.lowlevel.checkpoint()
        # Exact again but for what came meanwhile, some of which counts twice: never too few.
        self._fresh_count += counted - before

    async def first_lsn(self) -> int | None:
        """The least LSN that some key may still be answered with; None when there is no key.

        The tables are looked at in slices. A key that comes meanwhile may be missed: its LSN is above all before it.
        """
        least: list[int] = []
        for tables in slices_of(self._tables.values()):
            found = [lsn for keys in tables if (lsn := keys.writes.first_lsn) is not None]
            least += [min(found)] if found else []
            await trio.lowlevel.checkpoint()
        return min(least, default=None)

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
        self._expire(keys, now_us, _EXPIRE_KEYS)

    def expire(self, now_us: int) -> bool:
        """Forget some keys whose retention is over, of some tables: those that come next in the round of all.

        Args:
            now_us: the log's clock.

        Returns:
            Whether there may be more of them, or tables that were not looked at: call again.
        """
        if not self._round:
            self._round, self._largest = list(self._tables), 0
        budget = _EXPIRE_KEYS
        for _ in range(_EXPIRE_TABLES):
            if self._graves:
                budget -= self._graves[-1].expire_through(_MAX_LSN, budget)
                if self._graves[-1].first_lsn is None:
                    self._graves.pop()
            elif self._round:
                table = self._round.pop()
                keys = self._tables.get(table)
                if keys is None:
                    continue
                budget -= self._expire(keys, now_us, budget)
                self._largest = max(self._largest, len(keys.writes))
                if budget <= 0:
                    # There may be more of it.
                    self._round.append(table)
            if budget <= 0 or not (self._graves or self._round):
                break
        return bool(self._graves or self._round)

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
        through_lsn = keys.writes.last_lsn if through_lsn is None else through_lsn
        if through_lsn >= keys.writes.last_lsn:
            self._graves.append(keys.writes)
            self._count -= len(keys.writes)
            del self._tables[table]
        else:
            keys.dropped_lsn = max(keys.dropped_lsn, through_lsn)
            keys.expired_lsn = max(keys.expired_lsn, through_lsn)
            self._expire(keys, 0, _EXPIRE_KEYS)
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
        held = sum(keys.writes.memory_bytes for keys in self._tables.values())
        return held + sum(writes.memory_bytes for writes in self._graves)

    def __len__(self) -> int:
        return self._count

    def _keys_of(self, table: UUID) -> _TableKeys:
        keys = self._tables.get(table)
        if keys is None:
            keys = self._tables[table] = _TableKeys(table)
        return keys

    def _note_fresh(self, table: UUID, keys: _TableKeys, added: int) -> None:
        self._fresh_count += added
        self._fresh[table] = None
        if len(keys.writes) > self._largest:
            self._largest = len(keys.writes)

    def _expire(self, keys: _TableKeys, now_us: int, most: int) -> int:
        """Forget some keys of one table; returns how many."""
        while keys.commits and keys.commits[0].at_us + self._retention_us <= now_us:
            keys.expired_lsn = max(keys.expired_lsn, keys.commits.popleft().lsn)
        before = len(keys.writes)
        dropped = keys.writes.expire_through(keys.expired_lsn, most)
        self._count -= before - len(keys.writes)
        return dropped


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
