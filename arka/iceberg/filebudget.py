"""How many files one encode job makes, and under which partition spec each of its frames is written.

Owns: where a job ends before its last frame, so that a commit of many partitions goes in steps (R19), and which writes
keep the spec that they were accepted with (R27). Does not own the files (``arka.iceberg.encode``).

Partitions are what is counted: a partition has one file, and more only where it has more rows than one file takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

import pyarrow as pa

from arka._core.transforms import Transform, count_partitions, split_batch
from arka.iceberg.frames import FrameRows
from arka.iceberg.partition import split_fields
from arka.records import Operation, TableInfo
from arka.storage.ports import AcceptedSpec, TableFrames

#: Most partitions of one job; a single frame may have more (``limits.partitions``). So many files and their manifest
#: entries take seconds.
MOST_PARTITIONS: Final = 4_096

#: One of the partitions of a table: the spec's id, and its values by what tells them apart.
PartitionKey = tuple[int, tuple[object, ...]]


def partition_key(spec_id: int, values: tuple[object, ...]) -> PartitionKey:
    """Return what tells a partition from others: -0.0 equals 0.0, and NaN not even itself."""
    return spec_id, tuple(value.hex() if isinstance(value, float) else value for value in values)


class _Spec(NamedTuple):
    """A table under one of its specs, and what splits its batches."""

    table: TableInfo
    fields: list[tuple[int, Transform]]


class FileBudget:
    """The frames of one job that are written now, each with its spec.

    Args:
        job: all of its frames.
        limit: most partitions of a write (``limits.partitions``): one that has more under the table's spec, which is
            newer than the write, keeps its own.
        most: most partitions of the job.

    Attributes:
        through_lsn: the last LSN that the job covers: its own, or that of the last frame before the budget's end.
        frames: how many frames it covers so far.
    """

    def __init__(self, job: TableFrames, limit: int, most: int) -> None:
        self.through_lsn = job.through_lsn
        self.frames = 0
        self._limit = limit
        self._most = most
        self._now = _Spec(job.table, split_fields(job.table))
        self._accepted = [(spec.from_lsn, self._spec_of(job.table, spec)) for spec in job.accepted]
        self._counts = bool(job.table.partition) or any(spec and spec.fields for _, spec in self._accepted)
        self._partitions: set[PartitionKey] = set()

    def _spec_of(self, table: TableInfo, accepted: AcceptedSpec) -> _Spec | None:
        """Return the table under an earlier spec; None if that needs a column which the table no longer has."""
        if accepted.spec_id == table.spec_id:
            return None
        earlier = replace(table, spec_id=accepted.spec_id, partition=accepted.fields)
        try:
            return _Spec(earlier, split_fields(earlier))
        except ValueError:
            return None

    def take(self, frames: Iterator[FrameRows]) -> Iterator[FrameRows]:
        """Yield frames until the next one would have the job make too many files; the first one always.

        Args:
            frames: in LSN order.

        Raises:
            ValueError: a value has no partition.
        """
        last = 0
        for frame in frames:
            spec = self._choose(frame)
            if self._counts and frame.operation is not Operation.DELETE and frame.batch.num_rows:
                found = self._partitions_of(frame.batch, spec)
                if last and len(self._partitions) + len(found - self._partitions) > self._most:
                    self.through_lsn = last
                    return
                self._partitions |= found
            last = frame.lsn
            self.frames += 1
            yield frame if spec is self._now else frame._replace(table=spec.table)

    def _choose(self, frame: FrameRows) -> _Spec:
        """Say under which spec a frame is written (R27)."""
        own = next((spec for from_lsn, spec in reversed(self._accepted) if from_lsn <= frame.lsn), None)
        if own is None or frame.operation is Operation.DELETE or frame.batch.num_rows <= self._limit:
            return self._now
        return own if count_partitions(frame.batch, self._now.fields) > self._limit else self._now

    @staticmethod
    def _partitions_of(batch: pa.RecordBatch, spec: _Spec) -> set[PartitionKey]:
        # The source columns alone: rows are not moved here.
        sources = sorted({column for column, _ in spec.fields})
        fields = [(sources.index(column), transform) for column, transform in spec.fields]
        parts = split_batch(batch.select(sources), fields)
        return {partition_key(spec.table.spec_id, values) for values, _ in parts}


__all__ = ["MOST_PARTITIONS", "FileBudget", "PartitionKey", "partition_key"]
