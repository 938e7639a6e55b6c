"""The keys that a table holds, read from its data files: what its index is made from when there is none.

Owns: reading the key's columns and leaving out dead rows. Does not own which files are live (``rowdelta``) nor the
index (``keyindex``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.io import FileIO
from pyiceberg.table import Table

from arka._core.rowkeys import DROPPED, hash_keys, settle
from arka._core.runs import write_run
from arka.errors import ArkaError, ErrorCode
from arka.iceberg.deletes import LiveFile, live_rows
from arka.iceberg.runfiles import hashes_of, new_run, packed
from arka.records import FIELD_ID_KEY, TableInfo

#: Entries of one run; 48 bytes each while they are sorted.
_RUN_ENTRIES: Final = 4_000_000

#: Hashes of keys, the number of the file that their rows are in, and the rows.
_Part = tuple[pa.FixedSizeBinaryArray, int, pa.UInt32Array]


class KeyScan:
    """Reads a table's keys.

    Args:
        table: at the snapshot whose files are read.
        info: says which columns are the key.
        secret: what hashes are made with.
        dead_of: the positions of a file's dead rows, by its path; None for none.
    """

    def __init__(
        self, table: Table, info: TableInfo, secret: bytes, dead_of: Callable[[str, FileIO], pa.Array | None]
    ) -> None:
        self._io = table.io
        self._ids = [field.metadata[FIELD_ID_KEY] for field in info.key_schema()]
        self._secret = secret
        self._dead_of = dead_of

    def write_runs(self, files: Sequence[LiveFile], directory: str) -> list[str]:
        """Write runs of the live rows' keys.

        Args:
            files: the oldest first; entries name them by their number. Where others have added a row with a key that
                was there, the newest file's counts.
            directory: where.

        Returns:
            The runs' names, the newest first.

        Raises:
            ArkaError: a file does not have the key's columns by field id.
            OSError: the warehouse or the local disk failed.
        """
        runs: list[str] = []
        parts: list[_Part] = []
        for number, file in enumerate(files):
            hashes, rows = self._read(file)
            parts.append((hashes, number, rows))
            if file is files[-1] or sum(len(part[0]) for part in parts) >= _RUN_ENTRIES:
                runs.insert(0, new_run(directory, partial(_write, parts)))
                parts = []
        return runs

    def _read(self, file: LiveFile) -> tuple[pa.FixedSizeBinaryArray, pa.UInt32Array]:
        """Hash the keys of a file's live rows; returns the hashes and the rows' numbers."""
        with self._io.new_input(file.path).open() as source:
            reader = pq.ParquetFile(source)
            names = {(f.metadata or {}).get(FIELD_ID_KEY): f.name for f in reader.schema_arrow}
            if not names.keys() >= set(self._ids):
                raise ArkaError(
                    f"{file.path}: a file that others wrote, without the key's columns by field id: rewrite it first",
                    code=ErrorCode.TABLE_STOPPED,
                )
            columns = [names[number] for number in self._ids]
            keys = reader.read(columns=columns)
        hashes = hashes_of(hash_keys([keys.column(name).combine_chunks() for name in columns], self._secret))
        rows = pa.array(range(len(hashes)), pa.uint32())
        dead = self._dead_of(file.path, self._io)
        if dead is None:
            return hashes, rows
        live = live_rows(0, len(rows), dead)
        return hashes.filter(live), rows.filter(live)


def _write(parts: list[_Part], descriptor: int) -> None:
    """Write a run with the last entry of each key."""
    joined = b"".join(packed(hashes) for hashes, _, _ in parts)
    verdicts = pa.array(settle(joined, bytes(sum(len(part[0]) for part in parts)), first=False), pa.uint8())
    stands = pc.not_equal(verdicts, DROPPED)
    chosen = []
    start = 0
    for hashes, number, rows in parts:
        mine = stands.slice(start, len(hashes))
        chosen.append((packed(hashes.filter(mine)), number, packed(rows.filter(mine))))
        start += len(hashes)
    write_run(descriptor, chosen)


__all__ = ["KeyScan"]
