"""The seal mark: the file that says that a log was closed, and where.

Owns: the file ``sealed`` in the log's directory, and whether a log may be gone on with. Does not own segments' footers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from arka import failpoints
from arka.errors import ConfigurationError, DataCorruption, Fenced
from arka.storage.ports import Buffer, Disk
from arka.wal.blocks import FORMAT_VERSION, check_block, magic, seal_block
from arka.wal.walk import list_segments

SEAL_NAME: Final = "sealed"

_MAGIC: Final = magic(b"ARKM")
# magic, crc, version, flags, log uuid, epoch, segment, last lsn
_LAYOUT: Final = struct.Struct("<IIII16sQQQ")
_CLOSED: Final = 1


@dataclass(frozen=True, slots=True)
class SealMark:
    """Everything up to here was fsynced, and nothing was written after it.

    It is replaced as a whole when a log is closed and when recovery is done. Once a higher segment exists
    it says only which numbers are used up.

    Attributes:
        log_uuid: the log.
        epoch: in which it was written.
        segment: numbers up to this one are never used again.
        last_lsn: the last LSN of the log.
        closed: the writer closed the log; False when recovery wrote the mark.
    """

    log_uuid: UUID
    epoch: int
    segment: int
    last_lsn: int
    closed: bool

    def to_bytes(self) -> bytes:
        """Encode it."""
        flags = _CLOSED if self.closed else 0
        return seal_block(
            _LAYOUT.pack(_MAGIC, 0, FORMAT_VERSION, flags, self.log_uuid.bytes, self.epoch, self.segment, self.last_lsn)
        )

    @classmethod
    def from_bytes(cls, path: str, data: memoryview) -> SealMark:
        """Decode and check it.

        Raises:
            DataCorruption: it is damaged.
            ConfigurationError: another version of Arka wrote it.
        """
        check_block(path, data, 0, _LAYOUT.size, _MAGIC, "seal mark")
        _, _, _, flags, uuid, epoch, segment, last_lsn = _LAYOUT.unpack_from(data)
        return cls(UUID(bytes=uuid), epoch, segment, last_lsn, bool(flags & _CLOSED))


def read_seal(disk: Disk, directory: Path) -> SealMark | None:
    """Read the mark; None where there is none. Blocking.

    Raises:
        DataCorruption: it is damaged.
        OSError: it cannot be read.
    """
    path = directory / SEAL_NAME
    try:
        return SealMark.from_bytes(str(path), disk.map(path))
    except FileNotFoundError:
        return None


def write_seal(disk: Disk, directory: Path, mark: SealMark) -> None:
    """Replace the mark. Blocking.

    Raises:
        OSError: the old mark or the new one is there.

    Durability: the mark is on disk on return.
    """
    write_whole(disk, directory / SEAL_NAME, [mark.to_bytes()])


def write_whole(disk: Disk, path: Path, parts: Sequence[Buffer]) -> None:
    """Put a file in place as a whole: a crash leaves the old one or the new one. Blocking."""
    unfinished = path.with_name(path.name + ".new")
    disk.remove(unfinished)
    file = disk.create(unfinished, 0)
    try:
        file.write(0, parts)
        failpoints.hit("whole.written")
        file.sync()
        failpoints.hit("whole.synced")
    finally:
        file.close()
    disk.rename(unfinished, path)
    failpoints.hit("whole.renamed")
    disk.sync_directory(path.parent)


def check_sealed(disk: Disk, directory: Path, log_uuid: UUID, epoch: int, first_segment: int) -> SealMark:
    """Check that a log may be gone on with: it was recovered, closed, or is empty. Blocking.

    Args:
        disk: the file system.
        directory: where the segments are.
        log_uuid: the log.
        epoch: in which it is to go on.
        first_segment: number of the next segment.

    Returns:
        The mark of the open log.

    Raises:
        ConfigurationError: the log has to be recovered first, or ``first_segment`` is used up.
        DataCorruption: the directory belongs to another log, or its seal mark is damaged.
        Fenced: a higher epoch has written here.
        OSError: the directory or the mark cannot be read.
    """
    seal = read_seal(disk, directory)
    last_segment = max((number for number, _ in list_segments(directory, disk)), default=0)
    if seal is None:
        if last_segment:
            raise ConfigurationError(f"{directory} holds segments but no seal: recover the log first")
        return SealMark(log_uuid, epoch, max(first_segment - 1, 0), 0, closed=False)
    if seal.log_uuid != log_uuid:
        raise DataCorruption(str(directory / SEAL_NAME), 16, f"log {log_uuid}", f"log {seal.log_uuid}")
    if seal.segment < last_segment:
        raise ConfigurationError(
            f"{directory} was sealed at segment {seal.segment}, goes on to {last_segment}: recover it first"
        )
    if seal.epoch > epoch:
        raise Fenced(f"{directory} was written in epoch {seal.epoch}: epoch {epoch} is over")
    if first_segment <= seal.segment:
        raise ConfigurationError(f"segment {first_segment} is used up in {directory}: the next is {seal.segment + 1}")
    return SealMark(log_uuid, epoch, first_segment - 1, seal.last_lsn, closed=False)


__all__ = ["SEAL_NAME", "SealMark", "check_sealed", "read_seal", "write_seal", "write_whole"]
