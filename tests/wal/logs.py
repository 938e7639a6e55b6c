"""Logs for the tests of this folder: tables, batches, frames, and a log opened and recovered."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pyarrow as pa

from arka._core.buffers import FrameBuffer
from arka._core.framing import KIND_BATCH, KIND_TABLE, Frame
from arka.options import WalOptions
from arka.records import TableInfo, TableName, TableType
from arka.storage.ports import Disk, SegmentSlice
from arka.testing.simdisk import SimDisk
from arka.wal.recovery import RecoveredFrame, RecoveredLog, recover
from arka.wal.segment import AppendedRange
from arka.wal.writer import WalWriter

LOG = UUID("5b7f7f1e-30f0-4bd1-8a9b-0d3a4c7a2f01")
DIRECTORY = Path("/log")
SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("word", pa.utf8())])


def make_table(number: int = 1, schema_id: int = 0) -> TableInfo:
    return TableInfo(
        uuid=UUID(int=number),
        name=TableName("default", f"table_{number}"),
        schema=SCHEMA,
        schema_id=schema_id,
        table_type=TableType.APPEND_ONLY,
        key_columns=(),
        spec_id=0,
        partition=(),
        location=f"file:///warehouse/table_{number}-00000000",
        properties={},
    )


TABLE = make_table()


def make_batch(first: int, rows: int) -> pa.RecordBatch:
    ids = range(first, first + rows)
    return pa.record_batch([pa.array(ids, pa.int64()), pa.array([f"w{i}" for i in ids])], schema=SCHEMA)


def to_buffer(batch: pa.RecordBatch) -> FrameBuffer:
    message = batch.serialize().to_pybytes()
    metadata_bytes = int.from_bytes(message[4:8], "little")
    body = message[8 + metadata_bytes :]
    buffer = FrameBuffer(message[8 : 8 + metadata_bytes], len(body))
    buffer.body[:] = body
    return buffer


def batch_frame(lsn: int, rows: int = 1, *, table: TableInfo = TABLE, key: bytes | None = None) -> Frame:
    return Frame(
        KIND_BATCH,
        lsn,
        table=table,
        schema_id=table.schema_id,
        rows=rows,
        key=b"key-%d" % lsn if key is None else key,
        payload=to_buffer(make_batch(lsn, rows)),
        accepted_us=1_000_000 + lsn,
    )


def batch_frames(lsns: Iterable[int], rows: int = 1) -> list[Frame]:
    return [batch_frame(lsn, rows) for lsn in lsns]


def small_options(segment_bytes: int) -> WalOptions:
    return WalOptions(segment_bytes=segment_bytes)


def make_disk(seed: int = 0, **options: object) -> SimDisk:
    return SimDisk(random.Random(seed), **options)


async def open_log(
    disk: Disk,
    *,
    epoch: int = 1,
    first_segment: int = 1,
    segment_bytes: int = 64 * 1024,
    directory: Path = DIRECTORY,
    log_uuid: UUID = LOG,
) -> WalWriter:
    return await WalWriter.open(
        directory,
        disk,
        log_uuid=log_uuid,
        epoch=epoch,
        first_segment=first_segment,
        options=small_options(segment_bytes),
    )


@dataclass
class Recovered:
    """What a recovery returned and handed out."""

    log: RecoveredLog
    frames: list[RecoveredFrame] = field(default_factory=list)

    @property
    def lsns(self) -> list[int]:
        return [frame.header.lsn for frame in self.frames if frame.header.kind != KIND_TABLE]

    def check_batches(self) -> None:
        """Each batch frame holds the batch and the key that its LSN says."""
        for frame in self.frames:
            if frame.header.kind == KIND_BATCH:
                lsn, rows = frame.header.lsn, frame.header.rows
                found = pa.ipc.read_record_batch(pa.py_buffer(frame.payload()), SCHEMA)
                assert found.equals(make_batch(lsn, rows))
                assert frame.key in (b"key-%d" % lsn, b"")

    def check_ranges(self) -> None:
        """The ranges of all segments cover exactly the frames handed out, at their places."""
        batches = [frame for frame in self.frames if frame.header.kind != KIND_TABLE]
        ranges = [found for segment in self.log.segments for found in segment.ranges]
        for found in ranges:
            inside = [
                frame for frame in batches if frame.segment == found.segment and found.start <= frame.offset < found.end
            ]
            assert (inside[0].header.lsn, inside[-1].header.lsn) == (found.first_lsn, found.last_lsn)
            del batches[: len(inside)]
            uuids = {frame.header.table_uuid for frame in inside if frame.header.kind == KIND_BATCH}
            assert {table.uuid.bytes for table in found.tables} == uuids
        assert not batches


async def recover_log(disk: Disk, *, epoch: int = 9, directory: Path = DIRECTORY, log_uuid: UUID = LOG) -> Recovered:
    frames: list[RecoveredFrame] = []
    progress: list[tuple[int, int]] = []
    log = await recover(
        directory,
        disk,
        log_uuid=log_uuid,
        new_epoch=epoch,
        on_frame=frames.append,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == sorted(progress)
    found = Recovered(log, frames)
    found.check_batches()
    found.check_ranges()
    assert found.lsns == sorted(set(found.lsns))
    return found


def slice_of(ranges: Sequence[AppendedRange], lsns: Iterable[int] | None = None) -> SegmentSlice:
    """The batch frames of ranges of one segment."""
    wanted = None if lsns is None else set(lsns)
    offsets = [
        frame.offset
        for found in ranges
        for frame in found.frames
        if frame.kind == KIND_BATCH and (wanted is None or frame.lsn in wanted)
    ]
    ref = ranges[0].segment
    return SegmentSlice(str(ref.path), ref.number, ref.epoch, array("Q", offsets).tobytes())
