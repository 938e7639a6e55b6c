"""Writes that were set aside, as they are kept: one object for each (R32).

Owns: the object's key and bytes. Does not own when a write is set aside (``arka.tiers.aside``) nor its frame
(``arka.wal.objectfile``).

Layout, below the node's id: ``aside/<table UUID>/<LSN, 16 digits>``, create-only: a MessagePack record behind its
CRC-32C. The record holds the reason and a WAL object with the write's frame alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID

import msgspec
import pyarrow as pa

from arka._core.framing import KIND_BATCH, crc32c
from arka.errors import DataCorruption
from arka.privacy import make_file, make_folders
from arka.records import Operation
from arka.storage.ports import Buffer
from arka.wal.objectfile import WalObject, parse_object
from arka.wal.salvage import SalvagedWrite
from arka.wal.segment import FRAME_HEADER_BYTES

_CRC_BYTES: Final = 4


class _Record(msgspec.Struct, frozen=True, array_like=True):
    """The stored form; fields are only ever added, with a default."""

    log_uuid: str
    reason: str
    #: The wall clock, for people: microseconds since the Unix epoch.
    noted_us: int
    #: A WAL object.
    object: bytes


class AsideWrite(NamedTuple):
    """A write that was set aside.

    Attributes:
        table: its table's UUID.
        lsn: its LSN.
        reason: why it cannot be written to the table.
        noted_us: when it was set aside, microseconds since the Unix epoch.
        object: its frame, and its table at the schema that the frame has.
    """

    table: UUID
    lsn: int
    reason: str
    noted_us: int
    object: WalObject


def aside_key(node_id: str, table: UUID, lsn: int) -> str:
    """The key of one write."""
    return f"{node_id}/aside/{table}/{lsn:016d}"


def encode_aside(log_uuid: UUID, reason: str, noted_us: int, parts: Sequence[Buffer]) -> list[bytes]:
    """Put an object together.

    Args:
        log_uuid: the log.
        reason: why it cannot be written to the table.
        noted_us: now, microseconds since the Unix epoch.
        parts: a WAL object with the write's frame.
    """
    body = msgspec.msgpack.encode(_Record(str(log_uuid), reason, noted_us, b"".join(bytes(part) for part in parts)))
    return [crc32c(body).to_bytes(_CRC_BYTES, "little"), body]


def parse_aside(path: str, key: str, data: bytes) -> AsideWrite:
    """Read an object.

    Args:
        path: for messages.
        key: its key; table and LSN are in it.
        data: its bytes.

    Raises:
        DataCorruption: it is damaged.
    """
    body = data[_CRC_BYTES:]
    found, expected = int.from_bytes(data[:_CRC_BYTES], "little"), crc32c(body)
    if len(data) < _CRC_BYTES or found != expected:
        raise DataCorruption(path, 0, f"crc {expected:08x}", f"{found:08x}")
    *_, table, lsn = key.split("/")
    try:
        record = msgspec.msgpack.decode(body, type=_Record)
        log_uuid, uuid, number = UUID(record.log_uuid), UUID(table), int(lsn)
    except (msgspec.MsgspecError, ValueError) as error:
        raise DataCorruption(path, _CRC_BYTES, "a set-aside write", str(error)) from error
    held = parse_object(path, memoryview(record.object), log_uuid)
    if held.header.first_lsn != number:
        raise DataCorruption(path, _CRC_BYTES, f"LSN {number}", f"LSN {held.header.first_lsn}")
    return AsideWrite(uuid, number, record.reason, record.noted_us, held)


def read_aside(write: AsideWrite) -> SalvagedWrite:
    """Read a set-aside write's rows, as salvage has them.

    Raises:
        DataCorruption: its frame is damaged or no batch of its table.
    """
    path = str(write.lsn)
    tables = {(info.uuid.bytes, info.schema_id): info for info in write.object.tables()}
    data = memoryview(write.object.data)
    for offset, header in write.object.frames():
        table = tables.get((header.table_uuid, header.schema_id))
        if header.kind != KIND_BATCH or table is None:
            continue
        start = offset + FRAME_HEADER_BYTES
        message = bytes(data[start : start + header.payload_bytes])
        key = bytes(data[start + header.payload_bytes :][: header.key_bytes])
        operation = Operation(header.operation)
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(message), table.frame_schema(operation))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DataCorruption(path, offset, f"a batch of {table.name}", str(error)) from error
        return SalvagedWrite(header.lsn, table, operation, key, header.accepted_us, batch)
    raise DataCorruption(path, 0, "a batch frame", "none")


def find_asides(data_dir: Path) -> list[Path]:
    """The copies of set-aside writes that a data directory has, as the server lays them beside the log.

    Files whose names are not those that ``aside_key`` gives are left out.
    """
    return sorted((data_dir / "checkpoints").glob("*/aside/*/" + "[0-9]" * 16))


def asides_of(data_dir: Path, log_uuid: UUID) -> frozenset[tuple[UUID, int]]:
    """Table and LSN of a log's set-aside writes, by the copies in its data directory.

    Raises:
        DataCorruption: one is damaged.
        OSError: one cannot be read.
    """
    found = (parse_aside(str(path), "/".join(path.parts[-4:]), path.read_bytes()) for path in find_asides(data_dir))
    return frozenset((write.table, write.lsn) for write in found if write.object.header.log_uuid == log_uuid)


def copy_aside(write: AsideWrite, rows: SalvagedWrite, out: Path) -> Path:
    """Write a set-aside write as an Arrow IPC stream; returns the file.

    Raises:
        OSError: the folder cannot be written.
    """
    make_folders(out)
    path = out / f"{rows.table.name}-{write.lsn}.arrows"
    notes = {
        "arka.lsn": str(write.lsn),
        "arka.key": rows.key,
        "arka.operation": rows.operation.name.lower(),
        "arka.reason": write.reason,
    }
    make_file(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.batch.schema) as stream:
        stream.write_batch(rows.batch, custom_metadata=notes)
    return path


__all__ = [
    "AsideWrite",
    "aside_key",
    "asides_of",
    "copy_aside",
    "encode_aside",
    "find_asides",
    "parse_aside",
    "read_aside",
]
