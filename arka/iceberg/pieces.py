"""Cut an answer's batches into messages that every stock client takes (T27).

Owns: how large a message of DoGet may be. Does not own what rows an answer has (``arka.iceberg.scan``) nor sending it.

grpcio, Go, JavaScript and tonic refuse a message above 4 MiB unless they are told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pyarrow as pa

#: Most bytes of a message, gRPC's and Flight's own included.
MESSAGE_BYTES: Final = 2 * 1024 * 1024
#: What Flight puts around a batch: tags and lengths, rounded up.
_AROUND_BYTES: Final = 256
#: What compression may add to each buffer: its length, and padding to the next multiple of 64.
_BUFFER_BYTES: Final = 72
#: Buffers of an array of the types that a table may have, and of each of its children: validity, offsets, values.
_BUFFERS: Final = 3


def pieces(batch: pa.RecordBatch, *, compressed: bool) -> Iterator[pa.RecordBatch]:
    """Yield a batch's rows in slices of at most ``MESSAGE_BYTES`` as messages; a single larger row goes alone.

    Args:
        batch: with at least one row.
        compressed: whether the messages will be compressed: one that does not get smaller gets larger.
    """
    spare = _AROUND_BYTES
    if compressed:
        spare += _BUFFER_BYTES * _BUFFERS * sum(_arrays(field.type) for field in batch.schema)
    yield from _cut(batch, max(MESSAGE_BYTES - spare, MESSAGE_BYTES // 2))


def _cut(batch: pa.RecordBatch, most: int) -> Iterator[pa.RecordBatch]:
    rows = batch.num_rows
    size = pa.ipc.get_record_batch_size(batch)
    if size <= most or rows <= 1:
        yield batch
        return
    # An even cut at first; slices of rows that are larger than others are cut again.
    step = min(max(rows * most // size, 1), (rows + 1) // 2)
    for start in range(0, rows, step):
        yield from _cut(batch.slice(start, step), most)


def _arrays(kind: pa.DataType) -> int:
    """How many arrays make up one of this type."""
    return 1 + sum(_arrays(kind.field(index).type) for index in range(kind.num_fields))


__all__ = ["MESSAGE_BYTES", "pieces"]
