"""The seal mark: the file that says where a log was closed, and which segments must be there.

Owns: the file ``sealed`` in the log's directory, whether a log may be gone on with, and which segments it names: a
segment that is named and is not there is damage (R39). Does not own segments' footers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from arka import failpoints
from arka.errors import ConfigurationError, DataCorruption, Fenced
from arka.storage.ports import Buffer, Disk
from arka.wal.blocks import FORMAT_VERSION, check_block, magic, seal_block
from arka.wal.segment import SegmentHeader
from arka.wal.shortage import short_of
from arka.wal.walk import list_segments

SEAL_NAME: Final = "sealed"

_MAGIC: Final = magic(b"ARKM")
# magic, crc, version, flags, log uuid, epoch, segment, last lsn: as it was before segments were named in it
_OLD_LAYOUT: Final = struct.Struct("<IIII16sQQQ")
# the same; then oldest and newest segment that must be there, and the last LSN before the oldest
_LAYOUT: Final = struct.Struct("<IIII16sQQQQQQ")
_CLOSED: Final = 1
#: The mark stands twice in its file, so far apart that no write of one touches the other's page.
_COPY_AT: Final = 4096


@dataclass(frozen=True, slots=True)
class Kept:
    """Which segments a log's own files name; what they name must be there (R39).

    Attributes:
        oldest: number of the oldest segment; 0 for none.
        newest: number of the newest; 0 for none.
        base_lsn: the last LSN before the oldest one; without segments, the log's last LSN.
    """

    oldest: int
    newest: int
    base_lsn: int

    def with_newest(self, number: int, base_lsn: int) -> Kept:
        """Name one more segment, before which the log's last LSN is ``base_lsn``."""
        return Kept(self.oldest, number, self.base_lsn) if self.oldest else Kept(number, number, base_lsn)


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
        kept: the segments that must be there; None in a mark of an older version, which says nothing of them.
    """

    log_uuid: UUID
    epoch: int
    segment: int
    last_lsn: int
    closed: bool
    kept: Kept | None = None

    def to_bytes(self) -> bytes:
        """Encode it."""
        flags = _CLOSED if self.closed else 0
        fields = (_MAGIC, 0, FORMAT_VERSION, flags, self.log_uuid.bytes, self.epoch, self.segment, self.last_lsn)
        if self.kept is None:
            return seal_block(_OLD_LAYOUT.pack(*fields))
        return seal_block(_LAYOUT.pack(*fields, self.kept.oldest, self.kept.newest, self.kept.base_lsn))

    def forgets(self, number: int) -> bool:
        """Whether a segment is no part of the log any more: its removal was under way (R39)."""
        kept = self.kept
        return kept is not None and (number < kept.oldest or kept.newest < number <= self.segment)

    @classmethod
    def from_bytes(cls, path: str, data: memoryview) -> SealMark:
        """Decode and check it.

        Raises:
            DataCorruption: it is damaged.
            ConfigurationError: another version of Arka wrote it.
        """
        # The length says which it is: a long one that was cut does not pass the short one's CRC.
        layout = _LAYOUT if len(data) >= _LAYOUT.size else _OLD_LAYOUT
        check_block(path, data, 0, layout.size, _MAGIC, "seal mark")
        _, _, _, flags, uuid, epoch, segment, last_lsn, *kept = layout.unpack_from(data)
        closed = bool(flags & _CLOSED)
        return cls(UUID(bytes=uuid), epoch, segment, last_lsn, closed, Kept(*kept) if kept else None)


def read_seal(disk: Disk, directory: Path) -> SealMark | None:
    """Read the mark; None where there is none. Blocking.

    Raises:
        DataCorruption: it is damaged.
        OSError: it cannot be read.
    """
    path = directory / SEAL_NAME
    try:
        data = disk.map(path)
    except FileNotFoundError:
        return None
    if len(data) > _COPY_AT:
        # The second copy is written first: where both are whole it is the newer one, or they are the same.
        with suppress(DataCorruption):
            return SealMark.from_bytes(str(path), data[_COPY_AT:])
    return SealMark.from_bytes(str(path), data)


def write_seal(disk: Disk, directory: Path, mark: SealMark) -> None:
    """Replace the mark. Blocking.

    Raises:
        OSError: the old mark or the new one is there.

    Durability: the mark is on disk on return.
    """
    block = mark.to_bytes()
    write_whole(disk, directory / SEAL_NAME, [block, bytes(_COPY_AT - len(block)), block])


def change_seal(disk: Disk, directory: Path, mark: SealMark) -> None:
    """Change a mark that ``write_seal`` wrote, in its place: that needs no room on the disk. Blocking.

    Raises:
        Shortage: the old mark is there: ask again (R31).
        OSError: the old mark or the new one is there.

    Durability: the mark is on disk on return.
    """
    with short_of():
        file = disk.open(directory / SEAL_NAME)
    try:
        for at in (_COPY_AT, 0):
            file.write(at, [mark.to_bytes()])
            failpoints.hit("seal.copy_written")
            file.sync()
            failpoints.hit("seal.copy_synced")
    finally:
        file.close()


def write_whole(disk: Disk, path: Path, parts: Sequence[Buffer]) -> None:
    """Put a file in place as a whole: a crash leaves the old one or the new one. Blocking.

    Raises:
        Shortage: the old one is there: ask again (R31).
        OSError: the old one or the new one is there.
    """
    unfinished = path.with_name(path.name + ".new")
    with short_of():
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
    listed = list_segments(directory, disk)
    last_segment = listed[-1][0] if listed else 0
    if seal is None:
        if last_segment:
            raise ConfigurationError(f"{directory} holds segments but no seal: recover the log first")
        return SealMark(log_uuid, epoch, max(first_segment - 1, 0), 0, closed=False, kept=Kept(0, 0, 0))
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
    kept = kept_of(disk, listed, seal.last_lsn)
    return SealMark(log_uuid, epoch, first_segment - 1, seal.last_lsn, closed=False, kept=kept)


def kept_of(disk: Disk, segments: Sequence[tuple[int, Path]], last_lsn: int) -> Kept:
    """Name segments. Blocking.

    Args:
        disk: the file system.
        segments: numbers and files, rising; headers that were checked.
        last_lsn: the log's last LSN, for a log without segments.

    Raises:
        DataCorruption: the oldest one's header is damaged.
        OSError: it cannot be read.
    """
    if not segments:
        return Kept(0, 0, last_lsn)
    oldest, path = segments[0]
    header = SegmentHeader.from_bytes(str(path), disk.map(path))
    return Kept(oldest, segments[-1][0], header.base_lsn)


__all__ = [
    "SEAL_NAME",
    "Kept",
    "SealMark",
    "change_seal",
    "check_sealed",
    "kept_of",
    "read_seal",
    "write_seal",
    "write_whole",
]
