"""The bytes of one WAL object: frames of one segment, on their way to or in the object store.

Owns: header, sections and footer, and their checks. Does not own keys, uploads or the chain's order
(``arka.tiers.objects``). OBJECT_FORMAT.md beside this file is normative. No I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from arka._core.framing import (
    KIND_TABLE,
    Frame,
    FrameError,
    FrameHeader,
    Group,
    crc32c,
    crc_seed,
    parse_header,
    verify_frame,
)
from arka.errors import DataCorruption
from arka.records import TableInfo
from arka.storage.ports import Buffer
from arka.wal.blocks import magic
from arka.wal.segment import FRAME_HEADER_BYTES

FORMAT_VERSION: Final = 1
HEADER_BYTES: Final = 192
FOOTER_BYTES: Final = 64

_HEADER_MAGIC: Final = magic(b"ARKO")
_FOOTER_MAGIC: Final = magic(b"ARKE")
# magic, crc, version, reserved, log uuid, epoch, segment, segment epoch, first lsn, last lsn, table bytes,
# frame bytes, predecessor's epoch, first lsn, last lsn, checksum, reserved, stored through
_HEADER: Final = struct.Struct("<IIII16sQQQQQQQQQQIIQ")
# magic, crc of all before the footer, size of the object, crc of the footer's first 16 bytes
_FOOTER: Final = struct.Struct("<IIQI")


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """A WAL object as its successor names it.

    Attributes:
        epoch: the epoch whose folder it is in.
        first_lsn: with the epoch, its key.
        last_lsn: the last LSN in it.
        checksum: its footer's CRC over everything before.
    """

    epoch: int
    first_lsn: int
    last_lsn: int
    checksum: int

    def key(self, node_id: str) -> str:
        """Its key in the store."""
        return object_key(node_id, self.epoch, self.first_lsn)


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """What a WAL object says of itself.

    Attributes:
        log_uuid: the log.
        epoch: the epoch that uploaded it.
        segment: the segment its frames were in, whose number seeds their CRCs (R8).
        segment_epoch: that segment's epoch, the other part of the seed.
        first_lsn: the first LSN in it.
        last_lsn: the last LSN in it.
        table_bytes: length of the TABLE frames behind the header.
        frame_bytes: length of the frames behind those.
        predecessor: the object before it in the chain; None for the chain's first.
        stored_through: the chain was acknowledged up to this LSN when the object was made: a break below it is
            damage, one above it the end of what was acked (R11).
    """

    log_uuid: UUID
    epoch: int
    segment: int
    segment_epoch: int
    first_lsn: int
    last_lsn: int
    table_bytes: int
    frame_bytes: int
    predecessor: ObjectRef | None
    stored_through: int = 0

    def to_bytes(self) -> bytes:
        """Encode with its CRC."""
        before = self.predecessor or ObjectRef(0, 0, 0, 0)
        fields = _HEADER.pack(
            _HEADER_MAGIC,
            0,
            FORMAT_VERSION,
            0,
            self.log_uuid.bytes,
            self.epoch,
            self.segment,
            self.segment_epoch,
            self.first_lsn,
            self.last_lsn,
            self.table_bytes,
            self.frame_bytes,
            before.epoch,
            before.first_lsn,
            before.last_lsn,
            before.checksum,
            0,
            self.stored_through,
        ).ljust(HEADER_BYTES, b"\0")
        return fields[:4] + crc32c(fields[8:]).to_bytes(4, "little") + fields[8:]

    @classmethod
    def from_bytes(cls, path: str, data: memoryview) -> ObjectHeader:
        """Decode and check.

        Raises:
            DataCorruption: it is no intact header of this version.
        """
        if len(data) < HEADER_BYTES:
            raise DataCorruption(path, len(data), f"a header of {HEADER_BYTES} bytes", f"{len(data)} bytes")
        fields = _HEADER.unpack_from(data)
        crc = crc32c(data[8:HEADER_BYTES])
        if fields[0] != _HEADER_MAGIC or fields[1] != crc:
            raise DataCorruption(path, 0, f"header magic and crc {crc:08x}", f"{fields[0]:08x} {fields[1]:08x}")
        if fields[2] != FORMAT_VERSION:
            raise DataCorruption(path, 8, f"format version {FORMAT_VERSION}", f"{fields[2]}")
        before = ObjectRef(*fields[12:16]) if fields[12] else None
        return cls(
            log_uuid=UUID(bytes=fields[4]),
            epoch=fields[5],
            segment=fields[6],
            segment_epoch=fields[7],
            first_lsn=fields[8],
            last_lsn=fields[9],
            table_bytes=fields[10],
            frame_bytes=fields[11],
            predecessor=before,
            stored_through=fields[17],
        )


@dataclass(frozen=True, slots=True)
class EncodedObject:
    """A WAL object's bytes in parts, and how its successor names it."""

    parts: tuple[Buffer, ...]
    ref: ObjectRef
    size: int


def object_key(node_id: str, epoch: int, first_lsn: int) -> str:
    """The key of a WAL object."""
    return f"{node_id}/wal/{epoch:010d}/{first_lsn:016d}.wal"


def encode_object(
    log_uuid: UUID,
    epoch: int,
    segment: int,
    segment_epoch: int,
    *,
    first_lsn: int,
    last_lsn: int,
    tables: tuple[TableInfo, ...],
    frames: Buffer,
    predecessor: ObjectRef | None,
    stored_through: int = 0,
) -> EncodedObject:
    """Put an object together.

    Args:
        log_uuid: the log.
        epoch: the uploading epoch.
        segment: the frames' segment number.
        segment_epoch: the frames' segment epoch.
        first_lsn: the first LSN in ``frames``.
        last_lsn: the last.
        tables: the tables of the batch frames, each at each schema used (R24).
        frames: whole frames, as they stand in the segment.
        predecessor: the object before it.
        stored_through: the last LSN that is acknowledged.
    """
    seed = crc_seed(log_uuid, segment_epoch, segment)
    records = [
        Frame(KIND_TABLE, 0, table=info, schema_id=info.schema_id, payload=info.to_bytes(), accepted_us=0)
        for info in tables
    ]
    table_bytes = Group(records, 0, seed).to_bytes() if records else b""
    header = ObjectHeader(
        log_uuid,
        epoch,
        segment,
        segment_epoch,
        first_lsn,
        last_lsn,
        len(table_bytes),
        len(frames),
        predecessor,
        stored_through,
    ).to_bytes()
    checksum = crc32c(frames, crc32c(table_bytes, crc32c(header)))
    size = len(header) + len(table_bytes) + len(frames) + FOOTER_BYTES
    footer = _FOOTER.pack(_FOOTER_MAGIC, checksum, size, 0)
    footer = footer[:16] + crc32c(footer[:16]).to_bytes(4, "little")
    parts = (header, table_bytes, frames, footer.ljust(FOOTER_BYTES, b"\0"))
    return EncodedObject(parts, ObjectRef(epoch, first_lsn, last_lsn, checksum), size)


def first_frame_above(frames: Buffer, lsn: int) -> tuple[int, int]:
    """Find the first frame with an LSN above ``lsn`` in frames that stand one behind the other.

    Returns:
        Its offset and its LSN.

    Raises:
        ValueError: there is none.
    """
    data = memoryview(frames)
    offset = 0
    while offset < len(data):
        header = parse_header(data, offset)
        if header.lsn > lsn:
            return offset, header.lsn
        offset += header.frame_bytes
    raise ValueError(f"no frame above LSN {lsn}")


@dataclass(frozen=True, slots=True)
class WalObject:
    """An object that was read and found whole."""

    path: str
    header: ObjectHeader
    ref: ObjectRef
    data: memoryview

    def frames(self) -> Iterator[tuple[int, FrameHeader]]:
        """Yield offset and header of each frame, TABLE frames first, each checked against its CRC.

        Raises:
            DataCorruption: a frame is damaged, or the sections do not end where they should.
        """
        header = self.header
        seed = crc_seed(header.log_uuid, header.segment_epoch, header.segment)
        offset = HEADER_BYTES
        end = offset + header.table_bytes + header.frame_bytes
        while offset < end:
            try:
                frame = verify_frame(self.data[:end], offset, seed)
            except FrameError as error:
                raise DataCorruption(self.path, offset, error.expected, error.found) from error
            yield offset, frame
            offset += frame.frame_bytes

    def tables(self) -> list[TableInfo]:
        """The tables of its batch frames, each at each schema that they use (R24).

        Raises:
            DataCorruption: a TABLE frame is damaged.
        """
        found = []
        for offset, frame in self.frames():
            if offset >= HEADER_BYTES + self.header.table_bytes:
                break
            if frame.kind == KIND_TABLE:
                start = offset + FRAME_HEADER_BYTES
                try:
                    found.append(TableInfo.from_bytes(bytes(self.data[start : start + frame.payload_bytes])))
                except ValueError as error:
                    raise DataCorruption(self.path, offset, "a readable table", str(error)) from error
        return found


def parse_object(path: str, data: memoryview, log_uuid: UUID) -> WalObject:
    """Check an object as a whole: header, sizes, and the CRC over all of it.

    Args:
        path: for errors.
        data: all of its bytes.
        log_uuid: the log that it must belong to.

    Raises:
        DataCorruption: it is not whole, or another log's.
    """
    header = ObjectHeader.from_bytes(path, data)
    if header.log_uuid != log_uuid:
        raise DataCorruption(path, 16, f"log {log_uuid}", f"log {header.log_uuid}")
    size = HEADER_BYTES + header.table_bytes + header.frame_bytes + FOOTER_BYTES
    if len(data) != size:
        raise DataCorruption(path, min(len(data), size), f"{size} bytes", f"{len(data)} bytes")
    footer = data[-FOOTER_BYTES:]
    kind, checksum, footer_size, footer_crc = _FOOTER.unpack_from(footer)
    at = size - FOOTER_BYTES
    if kind != _FOOTER_MAGIC or footer_crc != crc32c(footer[:16]) or footer_size != size or any(footer[20:]):
        raise DataCorruption(path, at, f"a footer for {size} bytes", bytes(footer[:20]).hex())
    found = crc32c(data[:at])
    if found != checksum:
        raise DataCorruption(path, HEADER_BYTES, f"crc {checksum:08x}", f"{found:08x}")
    return WalObject(path, header, ObjectRef(header.epoch, header.first_lsn, header.last_lsn, checksum), data)


__all__ = [
    "FOOTER_BYTES",
    "FORMAT_VERSION",
    "HEADER_BYTES",
    "EncodedObject",
    "ObjectHeader",
    "ObjectRef",
    "WalObject",
    "encode_object",
    "first_frame_above",
    "object_key",
    "parse_object",
]
