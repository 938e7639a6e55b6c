"""The keys of an encode job: which rows stand, and in which row of which new file each key ends up.

Owns: the two columns that go with the rows while they are sorted into files, and the staged run that comes of them.
Does not own what was there before (``arka.iceberg.rowdelta``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from arka import failpoints
from arka._core.rowkeys import HASH_BYTES
from arka._core.runs import REMOVED, UNLESS_THERE, write_run
from arka.iceberg.config import CatalogConfig
from arka.iceberg.fileio import make_directory
from arka.iceberg.frames import FrameRows
from arka.iceberg.runfiles import STAGED, check_of, new_name, new_run, packed, table_secret
from arka.iceberg.settled import SettledFrames
from arka.records import TableInfo
from arka.storage.ports import TableFrames

_HASH: Final = pa.field("arka.hash", pa.binary(HASH_BYTES), nullable=False)
_CONDITION: Final = pa.field("arka.unless-there", pa.bool_(), nullable=False)


class StagedKeys:
    """Follows the keys of one job from its frames into files.

    Args:
        config: where indexes lie.
        job: of a primary-key table.

    Attributes:
        check: tells how keys are hashed from other ways (``runfiles.check_of``).

    Raises:
        OSError: the local disk failed.
    """

    def __init__(self, config: CatalogConfig, job: TableFrames) -> None:
        self._table = job.table
        self._secret = table_secret(config.index_dir, job.table.uuid)
        self.check = check_of(self._secret, job.table.key_schema())
        self._directory = os.path.join(config.index_dir, STAGED)
        self._parts: list[tuple[pa.Buffer, int, pa.Buffer | None]] = []
        self._remove_old(job.after_lsn)

    def settle(self, frames: Iterable[FrameRows]) -> Iterator[tuple[pa.RecordBatch, float, TableInfo | None]]:
        """Yield the rows that stand, each batch with two columns more, its share of the size, and its frame's table.

        Args:
            frames: in LSN order.
        """
        settled = SettledFrames(frames, self._table, self._secret)
        removed = settled.removed()
        if len(removed):
            self._parts.append((packed(removed), REMOVED, None))
        for rows in settled.standing():
            schema = pa.schema([*rows.batch.schema, _HASH, _CONDITION])
            columns = [*rows.batch.columns, rows.hashes, rows.if_absent]
            yield pa.RecordBatch.from_arrays(columns, schema=schema), rows.share, rows.table

    def take(self, batches: list[pa.RecordBatch], number: int) -> list[pa.RecordBatch]:
        """Note the rows of a file before it is written; returns them as the file has them."""
        table = pa.Table.from_batches(batches)
        # By place: a column of the table may have any name.
        hashes, conditions = (table.column(table.num_columns - back).combine_chunks() for back in (2, 1))
        rows = None
        if pc.any(conditions).as_py():
            numbers = pa.array(range(len(hashes)), pa.uint32())
            flags = pc.if_else(conditions, pa.scalar(UNLESS_THERE, pa.uint32()), pa.scalar(0, pa.uint32()))
            rows = packed(pc.bit_wise_or(numbers, flags))
        self._parts.append((packed(hashes), number, rows))
        return [batch.select(range(batch.num_columns - 2)) for batch in batches]

    def write(self, stem: str) -> str:
        """Write the staged run; returns its path.

        Raises:
            OSError: the local disk failed.

        Durability: its bytes are durable on return.
        """
        # Under this name from the start: whatever becomes of it, ``_remove_old`` finds it.
        name = f"{self._table.uuid}-{stem}-{new_name()}"
        new_run(self._directory, lambda descriptor: write_run(descriptor, self._parts), name)
        failpoints.hit("encode.keys")
        return os.path.join(self._directory, name)

    def _remove_old(self, committed_lsn: int) -> None:
        """Remove staged runs of commits that have landed, or were given up."""
        make_directory(self._directory)
        prefix = f"{self._table.uuid}-"
        for name in os.listdir(self._directory):
            if name.startswith(prefix) and int(name.removeprefix(prefix).split("-")[1]) <= committed_lsn:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._directory, name))


__all__ = ["StagedKeys"]
