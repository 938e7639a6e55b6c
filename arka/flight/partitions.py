"""How many partitions one batch may touch (R32).

Owns: counting them before the memory ack, and the refusal. Does not own the transforms (``arka._core.transforms``) nor
what becomes of the rows (``arka.iceberg.encode``).

Each partition of a commit is a file. A batch with a value of its own in each row of an identity partition would make
as many files as it has rows, in each attempt to commit it.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from arka._core.transforms import Transform, count_partitions, parse_transform
from arka.errors import ErrorCode, InvalidRequest
from arka.records import FIELD_ID_KEY, TableInfo

#: Rows whose partitions are counted on trio's own thread: some 2 ms.
COUNT_ROWS: Final = 1 << 15


class PartitionLimit:
    """The limit for one kind of frame.

    Args:
        schema: the frame's; fields carry their ids.
        table: its partition fields name columns by their ids.
        limit: most partitions of one batch (``limits.partitions``).
    """

    def __init__(self, schema: pa.Schema, table: TableInfo, limit: int) -> None:
        columns = {(field.metadata or {}).get(FIELD_ID_KEY): index for index, field in enumerate(schema)}
        self._limit = limit
        self._fields: list[tuple[int, Transform]] = []
        for field in table.partition:
            column = columns.get(str(field.source_id).encode())
            if column is not None:
                self._fields.append((column, parse_transform(field.transform)))

    def concerns(self, rows: int) -> bool:
        """Whether a batch of so many rows can be over the limit: it has no more partitions than rows."""
        return bool(self._fields) and rows > self._limit

    def check(self, batch: pa.RecordBatch) -> None:
        """Count a batch's partitions; call it where ``concerns`` says so.

        Raises:
            InvalidRequest: ``invalid_batch``, naming the number and the limit.
        """
        count = count_partitions(batch, self._fields)
        if count > self._limit:
            raise InvalidRequest(
                f"Invalid batch: its {batch.num_rows} rows are in {count} partitions, the limit is {self._limit} "
                "(limits.partitions); sort rows by partition and send smaller batches, or partition by a coarser "
                "transform",
                code=ErrorCode.INVALID_BATCH,
            )


__all__ = ["COUNT_ROWS", "PartitionLimit"]
