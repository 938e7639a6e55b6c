"""What each table was seen to have committed, kept beside the log (R15, R20).

Owns: the file ``committed`` in the log's directory, and when it is written. Does not own what follows from a table that
stands lower (``arka.tiers.table``).

A table's own mark says how far it is, and others can put it back: with an older metadata file in the catalog, or by
removing properties and snapshots. While a server runs it knows better. This file lets the next start know it too: it
is durable before anything that rests on it is acknowledged ``iceberg_committed``.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from arka.errors import DataCorruption
from arka.lineage import CommitMark
from arka.storage.ports import CatalogUnavailable, Disk
from arka.wal.blocks import FORMAT_VERSION, check_block, magic, seal_block
from arka.wal.seal import write_whole

COMMITTED_NAME: Final = "committed"

_MAGIC: Final = magic(b"ARKC")
# magic, crc, version, number of tables, log uuid
_LAYOUT: Final = struct.Struct("<IIII16s")
# table uuid, committed lsn, epoch, token
_ENTRY: Final = struct.Struct("<16sQQQ")


class Unrecorded(CatalogUnavailable):
    """The disk did not take what a table has committed: nothing is acknowledged for it, and it is tried again."""


class CommittedMarks:
    """The highest mark of each table that this directory has seen in the catalog. Used from trio's thread only.

    # Invariant: on the disk a table's mark is at least what was acknowledged for it; its LSN never falls.
    """

    def __init__(self, directory: Path, disk: Disk, log_uuid: UUID, marks: Mapping[UUID, CommitMark]) -> None:
        """Hold marks that were read; see ``read``."""
        self._directory = directory
        self._disk = disk
        self._log_uuid = log_uuid
        # What is on the disk, and what will be with the next write: of each table the same or more.
        self._durable = dict(marks)
        self._wanted = dict(marks)
        self._lock = trio.Lock()

    @classmethod
    async def read(cls, directory: Path, disk: Disk, log_uuid: UUID) -> CommittedMarks:
        """Read the file; without one no table has a mark: an older version of Arka wrote none.

        Raises:
            DataCorruption: it is damaged, or another log's.
            ConfigurationError: another version of Arka wrote it.
            OSError: it cannot be read.
        """
        marks = await disk.run(partial(read_committed, directory, disk, log_uuid))
        return cls(directory, disk, log_uuid, marks)

    def mark_of(self, table: UUID) -> CommitMark | None:
        """The highest mark that was seen of a table; None if none was."""
        return self._wanted.get(table)

    def lsn_of(self, table: UUID) -> int:
        """The LSN of that mark; 0 if there is none."""
        mark = self._wanted.get(table)
        return 0 if mark is None else mark.committed_lsn

    def keep(self, tables: Container[UUID]) -> None:
        """Forget all other tables; durable with the next mark that rises."""
        self._wanted = {table: mark for table, mark in self._wanted.items() if table in tables}

    def forget(self, table: UUID) -> None:
        """Forget a table that was dropped; durable with the next mark that rises."""
        self._wanted.pop(table, None)

    async def record(self, table: UUID, mark: CommitMark) -> None:
        """Remember a mark; one that is not above what is known already changes nothing.

        Marks of several tables that come while one is being written are written together.

        Raises:
            Unrecorded: the disk did not take it; ask again.

        Durability: it is on the disk on return.

        Cancellation: before it begins nothing is written; once begun it is finished.

        Source: R15, R20.
        """
        if mark.committed_lsn > self.lsn_of(table):
            self._wanted[table] = mark
        while not self._holds(table, mark.committed_lsn):
            async with self._lock:
                if self._holds(table, mark.committed_lsn):
                    return
                marks = dict(self._wanted)
                try:
                    await self._disk.run(partial(self._write, marks))
                except OSError as error:
                    # A write that failed is done again in a new file, and what is read is whole or not there. So
                    # nothing is taken for durable that is not, and the log itself is not concerned (R31).
                    raise Unrecorded(
                        f"what was committed cannot be recorded in {self._directory / COMMITTED_NAME}: {error}"
                    ) from error
                self._durable = marks

    def _holds(self, table: UUID, lsn: int) -> bool:
        """Whether the disk has a mark, or the table was forgotten meanwhile."""
        known = self._durable.get(table)
        return (known is not None and known.committed_lsn >= lsn) or self.lsn_of(table) < lsn

    def _write(self, marks: Mapping[UUID, CommitMark]) -> None:
        write_whole(self._disk, self._directory / COMMITTED_NAME, [to_bytes(self._log_uuid, marks)])


def to_bytes(log_uuid: UUID, marks: Mapping[UUID, CommitMark]) -> bytes:
    """Encode the file."""
    head = _LAYOUT.pack(_MAGIC, 0, FORMAT_VERSION, len(marks), log_uuid.bytes)
    entries = (
        _ENTRY.pack(table.bytes, mark.committed_lsn, mark.epoch, mark.token) for table, mark in sorted(marks.items())
    )
    return seal_block(head + b"".join(entries))


def read_committed(directory: Path, disk: Disk, log_uuid: UUID) -> dict[UUID, CommitMark]:
    """Read the marks, by table; empty where there is no file. Blocking.

    Raises:
        DataCorruption: the file is damaged, or another log's.
        ConfigurationError: another version of Arka wrote it.
        OSError: it cannot be read.
    """
    path = directory / COMMITTED_NAME
    try:
        data = disk.map(path)
    except FileNotFoundError:
        return {}
    check_block(str(path), data, 0, max(len(data), _LAYOUT.size), _MAGIC, "record of what was committed")
    _, _, _, number, uuid = _LAYOUT.unpack_from(data)
    if UUID(bytes=uuid) != log_uuid:
        raise DataCorruption(str(path), 16, f"log {log_uuid}", f"log {UUID(bytes=uuid)}")
    if len(data) != _LAYOUT.size + number * _ENTRY.size:
        raise DataCorruption(str(path), 12, f"{number} tables", f"{len(data)} bytes in all")
    found = (_ENTRY.unpack_from(data, _LAYOUT.size + place * _ENTRY.size) for place in range(number))
    return {UUID(bytes=table): CommitMark(log_uuid, lsn, epoch, token) for table, lsn, epoch, token in found}


__all__ = ["COMMITTED_NAME", "CommittedMarks", "Unrecorded", "read_committed"]
