"""The keys that a table holds, read from its data files: what its index is made from when there is none.

Owns: reading the key's columns and leaving out dead rows. Does not own which files are live (``rowdelta``) nor what
becomes of the keys (``keybuild``).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.table import Table

from arka._core.rowkeys import hash_keys
from arka.errors import ArkaError, ErrorCode
from arka.iceberg.deletes import DeadRows, live_rows
from arka.iceberg.runfiles import hashes_of
from arka.records import FIELD_ID_KEY, TableInfo


class KeyScan:
    """Reads a table's keys.

    Args:
        table: at the snapshot whose files are read.
        info: says which columns are the key.
        secret: what hashes are made with.
        dead: reads delete files.
    """

    def __init__(self, table: Table, info: TableInfo, secret: bytes, dead: DeadRows) -> None:
        self._io = table.io
        self._ids = [field.metadata[FIELD_ID_KEY] for field in info.key_schema()]
        self._types = [field.type for field in info.key_schema()]
        self._secret = secret
        self._dead = dead

    def read(self, path: str, deletes: Sequence[str]) -> tuple[pa.FixedSizeBinaryArray, pa.UInt32Array]:
        """Hash the keys of a file's live rows.

        Args:
            path: the data file.
            deletes: its delete files.

        Returns:
            The hashes, and the rows' numbers.

        Raises:
            ArkaError: the file does not have the key's columns by field id and in types that fit.
            OSError: the warehouse failed.
        """
        with self._io.new_input(path).open() as source:
            reader = pq.ParquetFile(source)
            names = {(f.metadata or {}).get(FIELD_ID_KEY): f.name for f in reader.schema_arrow}
            if not names.keys() >= set(self._ids):
                raise ArkaError(
                    f"{path}: a file that others wrote, without the key's columns by field id: rewrite it first",
                    code=ErrorCode.TABLE_STOPPED,
                )
            columns = [names[number] for number in self._ids]
            keys = reader.read(columns=columns)
        try:
            # Equal values have equal hashes in the key's own types alone.
            casts = [keys.column(name).cast(kind) for name, kind in zip(columns, self._types, strict=True)]
        except pa.ArrowException as error:
            raise ArkaError(
                f"{path}: a file that others wrote, whose key columns are not of the table's types: {error}",
                code=ErrorCode.TABLE_STOPPED,
            ) from error
        hashes = hashes_of(hash_keys([column.combine_chunks() for column in casts], self._secret))
        rows = pa.array(range(len(hashes)), pa.uint32())
        if not deletes:
            return hashes, rows
        dead = pa.concat_arrays([self._dead.read(delete, self._io) for delete in deletes])
        live = live_rows(0, len(rows), dead)
        return hashes.filter(live), rows.filter(live)


__all__ = ["KeyScan"]
