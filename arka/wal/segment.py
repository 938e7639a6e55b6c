"""Segments as bytes: names, header block, group and footer frames, and reading by offset.

Owns: the layout of segment files, but for the frames' own (``arka._core.framing``); FORMAT.md is
normative. Knows nothing of disks, except that ``read_slice`` maps the file it is told, since it runs in
worker processes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID

import pyarrow as pa

from arka._core.framing import (
    KIND_BATCH,
    KIND_FOOTER,
    KIND_GROUP,
    KIND_TABLE,
    MARK_BYTES,
    Frame,
    FrameError,
    FrameHeader,
    crc_seed,
    verify_frame,
)
from arka.errors import DataCorruption
from arka.records import LsnRange, TableInfo
from arka.storage.ports import SegmentSlice
from arka.wal.blocks import FORMAT_VERSION, check_block, magic, seal_block

#: The header block: one page, so that no later write touches the page that it was fsynced in.
HEADER_BYTES: Final = 4096
FRAME_HEADER_BYTES: Final = 128

#: Kind of a frame that says which tables are written to or quiet from here on (R37); it takes an LSN.
KIND_ACTIVITY: Final = 8

#: Kinds that take an LSN; the others are the log's own.
CONTROL_KINDS: Final = frozenset({KIND_TABLE, KIND_GROUP, KIND_FOOTER})

#: The suffix of files that are not in the log yet: recovery removes them.
UNFINISHED_SUFFIX: Final = ".new"

_SEGMENT_MAGIC: Final = magic(b"ARKS")
_SEGMENT_NAME: Final = re.compile(r"segment-([0-9]{16})\.wal\Z")

# magic, crc, version, header bytes, log uuid, epoch, number, base lsn, first lsn, capacity, replaces,
# created us, nonce
_HEADER: Final = struct.Struct("<IIII16sQQQQQQQ16s")
# nonce, synced through, own offset, group bytes, frames
_GROUP: Final = struct.Struct("<16sQQQQ")
# nonce, synced through, own offset, first lsn, last lsn, frames
_FOOTER: Final = struct.Struct("<16sQQQQQ")
_LOST: Final = struct.Struct("<QQ")
# number of tables, whose UUIDs follow
_COUNT: Final = struct.Struct("<Q")
# birth, 1 for quiet; UUIDs follow
_ACTIVITY: Final = struct.Struct("<QQ")
_UUID_BYTES: Final = 16


def segment_name(number: int) -> str:
    """The file name of a segment."""
    return f"segment-{number:016d}.wal"


def parse_segment_name(name: str) -> int | None:
    """The number in a segment's file name, or None if it is no segment."""
    match = _SEGMENT_NAME.match(name)
    return int(match[1]) if match else None


class SegmentRef(NamedTuple):
    """Which segment: its file, its number and the epoch in its header; the last two seed its CRCs."""

    path: Path
    number: int
    epoch: int


@dataclass(frozen=True, slots=True)
class AppendedRange:
    """Consecutive frames of one segment, all of them durable.

    Attributes:
        segment: where they are.
        start: file offset of the first; the range begins with a GROUP frame.
        end: file offset behind the last.
        first_lsn: the first LSN in it.
        last_lsn: the last LSN in it.
        tables: the tables that its batch frames are of, each at each schema used.
        frames: the frames with an LSN, each with its ``offset`` and without its payload; empty for a
            range that recovery found.
    """

    segment: SegmentRef
    start: int
    end: int
    first_lsn: int
    last_lsn: int
    tables: tuple[TableInfo, ...]
    frames: list[Frame]


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment's first block says.

    Attributes:
        log_uuid: the log (R1).
        epoch: the epoch in which it was written.
        number: the segment's number, from 1; later segments have higher ones.
        base_lsn: the last LSN of the log before this segment; 0 for none.
        first_lsn: the first LSN in it.
        capacity: bytes that were preallocated.
        replaces: the number of the segment whose frames recovery copied into this one (R6); 0 for none.
        created_us: when, microseconds since the Unix epoch; for people.
        nonce: 16 random bytes that the segment's GROUP and FOOTER frames repeat. Clients never learn
            them, so that no payload can pass for such a frame.
    """

    log_uuid: UUID
    epoch: int
    number: int
    base_lsn: int
    first_lsn: int
    capacity: int
    replaces: int
    created_us: int
    nonce: bytes

    @property
    def seed(self) -> int:
        """What the CRCs of its frames start from."""
        return crc_seed(self.log_uuid, self.epoch, self.number)

    def to_bytes(self) -> bytes:
        """Encode the header block, HEADER_BYTES long."""
        fields = _HEADER.pack(
            _SEGMENT_MAGIC,
            0,
            FORMAT_VERSION,
            HEADER_BYTES,
            self.log_uuid.bytes,
            self.epoch,
            self.number,
            self.base_lsn,
            self.first_lsn,
            self.capacity,
            self.replaces,
            self.created_us,
            self.nonce,
        )
        return seal_block(fields.ljust(HEADER_BYTES, b"\0"))

    @classmethod
    def from_bytes(cls, path: str, data: memoryview) -> SegmentHeader:
        """Decode and check a header block.

        Args:
            path: the file, for errors.
            data: the file's bytes, at least the first HEADER_BYTES.

        Raises:
            DataCorruption: it is damaged.
            ConfigurationError: a newer version of Arka wrote it.
        """
        check_block(path, data, 0, HEADER_BYTES, _SEGMENT_MAGIC, "segment header")
        found = _HEADER.unpack_from(data)
        return cls(UUID(bytes=found[4]), *found[5:])

    def check_is(self, path: str, log_uuid: UUID, number: int, epoch: int | None = None) -> None:
        """Check that this is the segment that was looked for.

        Raises:
            DataCorruption: it belongs to another log, number or epoch.
        """
        if self.log_uuid != log_uuid:
            raise DataCorruption(path, 16, f"log {log_uuid}", f"log {self.log_uuid}")
        if epoch is not None and self.epoch != epoch:
            raise DataCorruption(path, 32, f"epoch {epoch}", f"epoch {self.epoch}")
        if self.number != number:
            raise DataCorruption(path, 40, f"segment {number}", f"segment {self.number}")


@dataclass(frozen=True, slots=True)
class GroupMark:
    """The payload of a GROUP frame (R7).

    Attributes:
        nonce: the segment's.
        synced_through: the file was known fsynced up to this offset when the group was written.
        offset: of the GROUP frame itself.
        group_bytes: of the whole group, this frame included.
        frames: how many frames follow in the group.
    """

    nonce: bytes
    synced_through: int
    offset: int
    group_bytes: int
    frames: int

    def to_frame(self, written_us: int) -> Frame:
        """Make the frame."""
        payload = _GROUP.pack(self.nonce, self.synced_through, self.offset, self.group_bytes, self.frames)
        return Frame(KIND_GROUP, 0, payload=payload, accepted_us=written_us)


@dataclass(frozen=True, slots=True)
class Footer:
    """The payload of a FOOTER frame, the last of a sealed segment.

    Attributes:
        nonce: the segment's.
        synced_through: the file was known fsynced up to this offset when the footer was written.
        offset: of the FOOTER frame itself.
        first_lsn: the first LSN in the segment.
        last_lsn: the last LSN in the segment.
        frames: how many frames stand before it.
    """

    nonce: bytes
    synced_through: int
    offset: int
    first_lsn: int
    last_lsn: int
    frames: int

    def to_frame(self, written_us: int) -> Frame:
        """Make the frame."""
        payload = _FOOTER.pack(self.nonce, self.synced_through, self.offset, self.first_lsn, self.last_lsn, self.frames)
        return Frame(KIND_FOOTER, 0, payload=payload, accepted_us=written_us)


def parse_mark(data: memoryview, offset: int, header: FrameHeader) -> GroupMark | Footer | None:
    """Read a verified GROUP or FOOTER frame; None if its payload is of another size."""
    payload = data[offset + FRAME_HEADER_BYTES : offset + FRAME_HEADER_BYTES + header.payload_bytes]
    if header.kind == KIND_GROUP and len(payload) == _GROUP.size:
        return GroupMark(*_GROUP.unpack(payload))
    if header.kind == KIND_FOOTER and len(payload) == _FOOTER.size:
        return Footer(*_FOOTER.unpack(payload))
    return None


def encode_lost(lost: LsnRange, tables: Collection[UUID] | None = None) -> bytes:
    """Encode the payload of a LOST frame (R3).

    Args:
        lost: the range.
        tables: those that it counts against; None for all (R37).
    """
    payload = _LOST.pack(lost.after, lost.through)
    if tables is None:
        return payload
    return payload + _COUNT.pack(len(tables)) + b"".join(table.bytes for table in tables)


def parse_lost(payload: bytes) -> LsnRange:
    """Decode the payload of a LOST frame.

    Raises:
        ValueError: it is none.
    """
    parse_lost_tables(payload)
    return LsnRange(*_LOST.unpack_from(payload))


def parse_lost_tables(payload: bytes) -> frozenset[UUID] | None:
    """Decode which tables a LOST frame counts against; None for all, as in every frame of an older version.

    Raises:
        ValueError: it is none.
    """
    if len(payload) == _LOST.size:
        return None
    head = _LOST.size + _COUNT.size
    if len(payload) < head or len(payload) != head + _COUNT.unpack_from(payload, _LOST.size)[0] * _UUID_BYTES:
        raise ValueError(f"a lost range has {_LOST.size} bytes, or {head} and its tables; found {len(payload)}")
    return frozenset(_uuids(payload[head:]))


class Activity(NamedTuple):
    """The payload of an ACTIVITY frame: from here on, these tables are quiet, or are written to (R37).

    Attributes:
        birth: of the log on the disk that it was written to; means nothing on another.
        quiet: which of the two.
        tables: which tables.
    """

    birth: int
    quiet: bool
    tables: tuple[UUID, ...]

    def to_bytes(self) -> bytes:
        """Encode it."""
        return _ACTIVITY.pack(self.birth, self.quiet) + b"".join(table.bytes for table in self.tables)

    @classmethod
    def from_bytes(cls, payload: bytes) -> Activity:
        """Decode it.

        Raises:
            ValueError: it is none.
        """
        names = payload[_ACTIVITY.size :]
        if len(payload) < _ACTIVITY.size or len(names) % _UUID_BYTES:
            raise ValueError(f"an activity record has {_ACTIVITY.size} bytes and UUIDs, found {len(payload)}")
        birth, quiet = _ACTIVITY.unpack_from(payload)
        return cls(birth, bool(quiet), tuple(_uuids(names)))


def _uuids(data: bytes) -> list[UUID]:
    return [UUID(bytes=data[at : at + _UUID_BYTES]) for at in range(0, len(data), _UUID_BYTES)]


def corruption(path: str, error: FrameError) -> DataCorruption:
    """Say where in which file a frame is damaged."""
    return DataCorruption(path, error.offset, error.expected, error.found)


def read_slice(slice: SegmentSlice, log_uuid: UUID) -> Iterator[tuple[FrameHeader, pa.Buffer]]:  # noqa: A002
    """Read batch frames by their offsets, without copying.

    Args:
        slice: which frames of which segment.
        log_uuid: the log that the segment must belong to.

    Yields:
        Each frame's header and its encapsulated IPC message: a view of the mapped file, body 64-byte
        aligned. A view keeps the mapping alive; the file may be unlinked meanwhile (R9).

    Raises:
        DataCorruption: the segment is gone or another one, or a frame is damaged; frames before it were yielded.

    Source: R9, R39, FORMAT.md "Reading by offset".
    """
    try:
        source = pa.memory_map(slice.path)
    except FileNotFoundError as error:
        raise DataCorruption(slice.path, 0, "a file with frames", "no file") from error
    with source:
        mapped = source.read_buffer(source.size())
    SegmentHeader.from_bytes(slice.path, memoryview(mapped)).check_is(slice.path, log_uuid, slice.segment, slice.epoch)
    seed = crc_seed(log_uuid, slice.epoch, slice.segment)
    for offset in memoryview(slice.offsets).cast("Q"):
        if offset % 64 or offset < HEADER_BYTES:
            raise DataCorruption(slice.path, offset, "an offset of a frame", "one that no frame can have")
        try:
            header = verify_frame(mapped, offset, seed)
        except FrameError as error:
            raise corruption(slice.path, error) from error
        if header.kind != KIND_BATCH:
            raise DataCorruption(slice.path, offset, "a batch frame", f"a frame of kind {header.kind}")
        yield header, mapped.slice(offset + FRAME_HEADER_BYTES, header.payload_bytes)


__all__ = [
    "CONTROL_KINDS",
    "FRAME_HEADER_BYTES",
    "HEADER_BYTES",
    "KIND_ACTIVITY",
    "MARK_BYTES",
    "UNFINISHED_SUFFIX",
    "Activity",
    "AppendedRange",
    "Footer",
    "GroupMark",
    "SegmentHeader",
    "SegmentRef",
    "corruption",
    "encode_lost",
    "parse_lost",
    "parse_lost_tables",
    "parse_mark",
    "parse_segment_name",
    "read_slice",
    "segment_name",
]
