"""Frames of a primary-key table, and which of their rows stand.

Owns: hashing the keys of frames and settling them among each other (``arka._core.rowkeys``). Does not own what the
table held before (``rowdelta`` for a commit, ``tail`` for a read).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from arka._core.rowkeys import DROPPED, IF_ABSENT, REMOVES, REPLACES, hash_keys, settle
from arka.iceberg.frames import FrameRows
from arka.iceberg.runfiles import hashes_of
from arka.records import Operation, TableInfo
from arka.tableproperties import MERGE, MERGE_FIRST


class StandingRows(NamedTuple):
    """The rows of one frame that stand.

    Attributes:
        batch: the rows.
        hashes: of their keys.
        if_absent: per row, whether it stands only where the table had no row with its key before.
        share: of the frame's bytes.
        table: see ``FrameRows``.
    """

    batch: pa.RecordBatch
    hashes: pa.FixedSizeBinaryArray
    if_absent: pa.BooleanArray
    share: float
    table: TableInfo | None


class SettledFrames:
    """What frames come to, the last write of a key standing, or the first, as the table says.

    Args:
        frames: in LSN order; their batches are kept.
        table: a primary-key table.
        secret: what hashes are made with.
    """

    def __init__(self, frames: Iterable[FrameRows], table: TableInfo, secret: bytes) -> None:
        self._frames: list[FrameRows] = []
        hashes = bytearray()
        deletes = bytearray()
        names = table.key_schema().names
        for frame in frames:
            hashes += hash_keys([frame.batch.column(name) for name in names], secret)
            deletes += (b"\1" if frame.operation is Operation.DELETE else b"\0") * frame.batch.num_rows
            self._frames.append(frame)
        verdicts = settle(hashes, deletes, first=table.properties.get(MERGE) == MERGE_FIRST)
        self._hashes = hashes_of(hashes)
        self._verdicts = pa.Array.from_buffers(pa.uint8(), len(verdicts), [None, pa.py_buffer(verdicts)])

    def removed(self) -> pa.FixedSizeBinaryArray:
        """The hashes of keys that are deleted, each once."""
        return self._hashes.filter(pc.equal(self._verdicts, REMOVES))

    def overwritten(self) -> pa.FixedSizeBinaryArray:
        """The hashes of keys whose earlier row goes whatever it was: deleted ones, and those with another row."""
        return self._hashes.filter(pc.is_in(self._verdicts, pa.array([REMOVES, REPLACES], pa.uint8())))

    def conditional(self) -> pa.FixedSizeBinaryArray:
        """The hashes of keys whose new row stands only if there was none."""
        return self._hashes.filter(pc.equal(self._verdicts, IF_ABSENT))

    def standing(self) -> Iterator[StandingRows]:
        """Yield the rows that stand, frame by frame."""
        start = 0
        for frame in self._frames:
            rows = frame.batch.num_rows
            if frame.operation is not Operation.DELETE and rows:
                verdicts = self._verdicts.slice(start, rows)
                stands = pc.not_equal(verdicts, DROPPED)
                batch = frame.batch.filter(stands)
                yield StandingRows(
                    batch,
                    self._hashes.slice(start, rows).filter(stands),
                    pc.equal(verdicts, IF_ABSENT).filter(stands),
                    frame.size * batch.num_rows / rows,
                    frame.table,
                )
            start += rows


__all__ = ["SettledFrames", "StandingRows"]
