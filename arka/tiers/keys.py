"""Idempotency keys: which write a key belongs to, for as long as it is kept (protocol 3.2, R21).

Owns: the index from (table, key) to the first write. Does not own durability: a key is as durable as
the frame that carries it; recovery fills the index again from the frames, and for frames whose segment
is gone from checkpoints (``arka.tiers.release``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID


class KeyedWrite(NamedTuple):
    """The first write of a key: its LSN and a checksum of its payload."""

    lsn: int
    digest: int


class CheckpointKey(NamedTuple):
    """A key as a checkpoint carries it."""

    table: UUID
    key: bytes
    lsn: int
    digest: int


@dataclass(slots=True)
class _TableKeys:
    # Invariant: in LSN order, because a key is inserted in the step that gives the LSN.
    writes: dict[bytes, KeyedWrite]
    # (committed LSN, monotonic seconds): from when on the keys up to that LSN have been committed.
    commits: deque[tuple[int, float]]
    # Keys that no checkpoint covers, with their writes' LSNs, in LSN order. A key whose retention ended, and that
    # was used again since, is in it twice: the LSN tells the two apart.
    uncovered: deque[tuple[bytes, int]]


class KeyIndex:
    """All keys of the node's log that may still be asked for. Used from trio's thread only."""

    def __init__(self, retention_s: float) -> None:
        self._retention_s = retention_s
        self._tables: dict[UUID, _TableKeys] = {}

    def find(self, table: UUID, key: bytes) -> KeyedWrite | None:
        """Return the first write of ``key``, or None."""
        keys = self._tables.get(table)
        return keys.writes.get(key) if keys is not None else None

    def insert(self, table: UUID, key: bytes, lsn: int, digest: int, *, covered: bool = False) -> None:
        """Remember a key; the caller has just looked it up, in the same step.

        Args:
            table: the table's UUID.
            key: the key.
            lsn: its write's LSN, above those of all keys of the table that are known.
            digest: a checksum of the write's payload.
            covered: a checkpoint has it already.
        """
        keys = self._tables.get(table)
        if keys is None:
            keys = self._tables[table] = _TableKeys({}, deque(), deque())
        if key not in keys.writes:
            keys.writes[key] = KeyedWrite(lsn, digest)
            if not covered:
                keys.uncovered.append((key, lsn))

    def uncovered(self, through_lsn: int) -> Iterator[CheckpointKey]:
        """Yield the keys up to ``through_lsn`` that no checkpoint covers."""
        for table, keys in self._tables.items():
            for key, lsn in keys.uncovered:
                if lsn > through_lsn:
                    break
                write = keys.writes.get(key)
                if write is not None and write.lsn == lsn:
                    yield CheckpointKey(table, key, lsn, write.digest)

    def forget_uncovered(self, through_lsn: int) -> None:
        """Note that a checkpoint covers the keys up to ``through_lsn``."""
        for keys in self._tables.values():
            while keys.uncovered and keys.uncovered[0][1] <= through_lsn:
                keys.uncovered.popleft()

    def note_committed(self, table: UUID, lsn: int, now_s: float) -> None:
        """Start the retention of the keys up to ``lsn`` and forget those whose retention is over.

        Args:
            table: the table's UUID.
            lsn: its ``iceberg_committed`` watermark.
            now_s: a monotonic clock in seconds.
        """
        keys = self._tables.get(table)
        if keys is None:
            return
        keys.commits.append((lsn, now_s))
        expired = 0
        while keys.commits and keys.commits[0][1] + self._retention_s <= now_s:
            expired = keys.commits.popleft()[0]
        while keys.writes:
            key, write = next(iter(keys.writes.items()))
            if write.lsn > expired:
                break
            del keys.writes[key]

    def drop_table(self, table: UUID) -> None:
        """Forget a dropped table's keys: keys belong to the table's UUID."""
        self._tables.pop(table, None)

    def __len__(self) -> int:
        return sum(len(keys.writes) for keys in self._tables.values())


__all__ = ["CheckpointKey", "KeyIndex", "KeyedWrite"]
