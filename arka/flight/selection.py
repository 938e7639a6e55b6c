"""A record batch message without the columns that nothing looks at (protocol 3: deletes).

Owns: copying chosen columns out of a message, whatever types the others have. Does not own which columns those are
(``conform``) nor whether what is in them is valid (``decode``).

Source: https://arrow.apache.org/docs/format/Columnar.html (Message.fbs), flatbuffers internals.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import Final

from arka._core import ipc
from arka._core.buffers import FrameBuffer
from arka.flight.layout import Layout

_ALIGNMENT: Final = 64
#: Root, vtable and table of a Message whose RecordBatch begins at 40, then that table's own vtable at 40.
_MESSAGE: Final = struct.Struct("<I HHHHHH iIqhBx4x")
_VTABLE: Final = struct.Struct("<HHHHHHHH")
_TABLE_AT: Final = 56
_COMPRESSION_AT: Final = 88
_VECTORS_AT: Final = 104


def _nodes(layout: Layout, batch: ipc.BatchLayout) -> Iterator[tuple[int, int, range, int | None]]:
    """Yield each node's number, its column, its buffers and its count of data buffers (views alone)."""
    buffer = views = 0
    counts = batch.variadic_counts
    for node, (column, (kind, of_kind)) in enumerate(zip(layout.columns, layout.buffers, strict=True)):
        count = None
        size = of_kind
        if kind == ipc.KIND_VIEW:
            count = counts[views]
            size += count
            views += 1
        yield node, column, range(buffer, buffer + size), count
        buffer += size


def select_columns(
    header: bytes, batch: ipc.BatchLayout, frame: FrameBuffer, layout: Layout, columns: Collection[int]
) -> tuple[bytes, FrameBuffer]:
    """Make a message of some of a message's columns.

    Args:
        header: the RecordBatch message.
        batch: what it says; it has the nodes and buffers of ``layout`` (``BatchLayout.fits``).
        frame: its body is as long as ``batch.body_bytes``.
        layout: of the stream's schema.
        columns: which columns stay, in their order.

    Returns:
        The new message's flatbuffer, and its frame: a copy of what stays, still compressed if it was.
    """
    nodes: list[tuple[int, int]] = []
    kept: list[tuple[int, int]] = []
    counts: list[int] = []
    every_node, every_buffer = batch.nodes, batch.buffers
    for node, column, buffers, count in _nodes(layout, batch):
        if column in columns:
            nodes.append(every_node[node])
            kept += [every_buffer[number] for number in buffers]
            if count is not None:
                counts.append(count)
    placed: list[tuple[int, int]] = []
    size = 0
    for _, length in kept:
        placed.append((size, length))
        size += -(-length // _ALIGNMENT) * _ALIGNMENT
    made = _record_batch(header, batch, size, nodes, placed, counts)
    copied = FrameBuffer(made, size)
    target, source = copied.body, frame.body
    for (start, length), (at, _) in zip(kept, placed, strict=True):
        target[at : at + length] = source[start : start + length]
        padding = -length % _ALIGNMENT
        target[at + length : at + length + padding] = bytes(padding)
    return made, copied


def _record_batch(
    header: bytes,
    batch: ipc.BatchLayout,
    body_bytes: int,
    nodes: list[tuple[int, int]],
    buffers: list[tuple[int, int]],
    counts: list[int],
) -> bytes:
    """Write a RecordBatch message's flatbuffer; every offset in it is a multiple of 8."""
    vectors = bytearray()

    def vector(items: list[tuple[int, ...]]) -> int:
        at = _VECTORS_AT + len(vectors) + 4
        vectors.extend(struct.pack("<4xI", len(items)))
        for item in items:
            vectors.extend(struct.pack(f"<{len(item)}q", *item))
        return at

    # A node is (length, null_count), a buffer (offset, length): structs of two int64.
    nodes_at, buffers_at = vector([*nodes]), vector([*buffers])
    counts_at = vector([(count,) for count in counts])
    compressed = batch.codec != ipc.CODEC_NONE
    version = ipc.metadata_version(header)
    message = _MESSAGE.pack(16, 12, 24, 16, 18, 4, 8, 12, _TABLE_AT - 20, body_bytes, version, ipc.RECORD_BATCH)
    table = struct.pack(
        "<iIqIII4x",
        _TABLE_AT - 40,
        nodes_at - (_TABLE_AT + 4),
        batch.rows,
        buffers_at - (_TABLE_AT + 16),
        _COMPRESSION_AT + 8 - (_TABLE_AT + 20),
        counts_at - (_TABLE_AT + 24),
    )
    vtable = _VTABLE.pack(14, 28, 8, 4, 16, 20 if compressed else 0, 24, 0)
    compression = struct.pack("<HHHHibbxx", 8, 6, 4, 5, 8, max(batch.codec, 0), 0)
    return b"".join((message, vtable, table, compression, bytes(vectors)))


__all__ = ["select_columns"]
