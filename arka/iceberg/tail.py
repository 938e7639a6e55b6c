"""What a read adds to a snapshot: the frames above it (R25).

Owns: which rows of the snapshot they hide, and which rows they add. Does not own reading the snapshot (``scan``) nor
frames (``frames``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from arka._core.rowkeys import hash_keys
from arka.iceberg.frames import FrameRows, read_frames
from arka.iceberg.runfiles import hashes_of
from arka.iceberg.settled import SettledFrames
from arka.records import TableInfo, TableType
from arka.storage.ports import TableFrames

_SECRET_BYTES: Final = 16
#: Rows of the batches that a snapshot is read in.
_BATCH_ROWS: Final = 1 << 16
_MOST_BATCH_ROWS: Final = 1 << 20


class Tail(Protocol):
    """Frames above a snapshot."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that ``hide`` looks at."""
        ...

    @property
    def batch_rows(self) -> int:
        """Rows of the batches that ``hide`` likes best."""
        ...

    def hide(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Leave out the rows of the snapshot that the frames replace or delete."""
        ...

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield what the frames add, once all of the snapshot went through ``hide``."""
        ...


class _NoTail:
    """A snapshot as it is."""

    needs = ()
    batch_rows = _BATCH_ROWS

    def hide(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch

    def rows(self) -> Iterator[pa.RecordBatch]:
        return iter(())


class _AppendedTail(_NoTail):
    """Of an append-only table: everything that the frames hold comes on top."""

    def __init__(self, frames: Iterator[FrameRows]) -> None:
        self._frames = frames

    def rows(self) -> Iterator[pa.RecordBatch]:
        return (frame.batch for frame in self._frames)


class _KeyedTail:
    """Of a primary-key table: the last write of a key hides older rows."""

    def __init__(self, frames: Iterator[FrameRows], table: TableInfo) -> None:
        self.needs = tuple(table.key_schema().names)
        # Hashes that go nowhere: any secret will do that nobody can foresee.
        self._secret = os.urandom(_SECRET_BYTES)
        self._settled = SettledFrames(frames, table, self._secret)
        self._overwritten = self._settled.overwritten()
        self._conditional = self._settled.conditional()
        self._present: list[pa.FixedSizeBinaryArray] = []
        # Each look makes a table of the tail's hashes: it is to be worth it.
        known = len(self._overwritten) + len(self._conditional)
        self.batch_rows = min(max(_BATCH_ROWS, known // 2), _MOST_BATCH_ROWS)

    def hide(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        hashes = hashes_of(hash_keys([batch.column(name) for name in self.needs], self._secret))
        if len(self._conditional):
            self._present.append(hashes.filter(pc.is_in(hashes, value_set=self._conditional)))
        return batch.filter(pc.invert(pc.is_in(hashes, value_set=self._overwritten)))

    def rows(self) -> Iterator[pa.RecordBatch]:
        present = pa.chunked_array(self._present, self._conditional.type)
        for standing in self._settled.standing():
            if pc.any(standing.if_absent).as_py():
                stillborn = pc.and_(standing.if_absent, pc.is_in(standing.hashes, value_set=present))
                yield standing.batch.filter(pc.invert(stillborn))
            else:
                yield standing.batch


def open_tail(frames: TableFrames | None, above_lsn: int) -> Tail:
    """Read what lies above a snapshot.

    Args:
        frames: at the schema that rows are to have; None for none.
        above_lsn: the snapshot holds frames up to this LSN.

    Raises:
        DataCorruption: a frame's CRC does not hold (R9); of append-only tables, when its rows are asked for.
    """
    if frames is None or frames.through_lsn <= above_lsn:
        return _NoTail()
    found = (frame for frame in read_frames(frames) if frame.lsn > above_lsn and frame.lsn not in frames.without)
    if frames.table.table_type is TableType.PRIMARY_KEY:
        return _KeyedTail(found, frames.table)
    return _AppendedTail(found)


__all__ = ["Tail", "open_tail"]
