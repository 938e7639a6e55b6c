"""Segment files for tests of what reads them: batch frames as the writer would leave them.

Owns: a whole segment, written at once, unsealed. Does not own the log: there is no log state and no fsync.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from pathlib import Path
from uuid import UUID

import pyarrow as pa

from arka._core.buffers import FrameBuffer
from arka._core.framing import KIND_BATCH, Frame, Group
from arka.records import Operation, TableInfo
from arka.storage.ports import SegmentSlice
from arka.wal.segment import HEADER_BYTES, SegmentHeader, segment_name

#: When the frames of a test were accepted, microseconds since the Unix epoch: 2024-01-01.
ACCEPTED_US = 1_704_067_200_000_000


def frame_buffer(batch: pa.RecordBatch) -> FrameBuffer:
    """Lay a batch out as it would have been received."""
    message = pa.ipc.read_message(batch.serialize())
    buffer = FrameBuffer(message.metadata, len(message.body))
    buffer.body[:] = memoryview(message.body).cast("B")
    return buffer


def write_segment_file(
    directory: Path,
    number: int,
    info: TableInfo,
    frames: Sequence[tuple[int, pa.RecordBatch]],
    *,
    log_uuid: UUID,
    epoch: int = 1,
    deletes: Container[int] = (),
) -> SegmentSlice:
    """Write a segment that holds batches of one table.

    Args:
        directory: where; the file gets the segment's name.
        number: the segment's number.
        info: the table; its schema id goes into the frames.
        frames: LSN and batch of each, in LSN order, at least one.
        log_uuid: the log.
        epoch: goes into the header.
        deletes: the LSNs that delete; their batches have the key's columns.

    Returns:
        The slice that names all of them.
    """
    header = SegmentHeader(
        log_uuid=log_uuid,
        epoch=epoch,
        number=number,
        base_lsn=frames[0][0] - 1,
        first_lsn=frames[0][0],
        capacity=0,
        replaces=0,
        created_us=ACCEPTED_US,
        nonce=bytes(16),
    )
    made = [
        Frame(
            KIND_BATCH,
            lsn,
            table=info,
            schema_id=info.schema_id,
            rows=batch.num_rows,
            payload=frame_buffer(batch),
            accepted_us=ACCEPTED_US,
            operation=Operation.DELETE if lsn in deletes else Operation.UPSERT,
        )
        for lsn, batch in frames
    ]
    group = Group(made, HEADER_BYTES, header.seed)
    group.seal()
    path = directory / segment_name(number)
    path.write_bytes(header.to_bytes() + group.to_bytes())
    offsets = array("Q", [frame.offset for frame in made])
    return SegmentSlice(str(path), number, epoch, offsets.tobytes())


__all__ = ["ACCEPTED_US", "frame_buffer", "write_segment_file"]
