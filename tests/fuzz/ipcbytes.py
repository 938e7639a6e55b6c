"""IPC messages written byte by byte: whatever a batch's buffers hold, and however they lie.

Owns: the flatbuffers of RecordBatch and DictionaryBatch messages, and laying buffers out in a body. Does not own what
the buffers hold (``sharedarrays``). Arrow's own writers cannot be used: they read offsets and views to trim buffers,
and a broken one would break the fuzzer instead of the server.

Source: Arrow's columnar format, "Serialization and Interprocess Communication"; the FlatBuffers binary format.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from arka.testing.ipcstreams import StreamMessage

_V5 = 4
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_CODECS = {"lz4": 0, "zstd": 1}


@dataclass
class Flat:
    """A batch as its message lists it: field nodes, buffers and counts of variadic buffers, depth first.

    Attributes:
        rows: the batch's length.
        nodes: length and null count of each field.
        buffers: in order; equal ones share their bytes where the body is laid out so.
        variadic: how many data buffers each view column has.
    """

    rows: int
    nodes: list[tuple[int, int]] = field(default_factory=list)
    buffers: list[bytes] = field(default_factory=list)
    variadic: list[int] = field(default_factory=list)


def write_message(
    flat: Flat, *, dictionary: int | None = None, codec: str | None = None, share: bool = False
) -> StreamMessage:
    """Write a batch, or a dictionary's values.

    Args:
        flat: the batch.
        dictionary: the id, of a DictionaryBatch.
        codec: ``lz4``, ``zstd`` or none.
        share: whether equal buffers lie at the same place of the body.
    """
    body = bytearray()
    places: list[tuple[int, int]] = []
    known: dict[bytes, int] = {}
    for buffer in flat.buffers:
        stored = _compressed(buffer, codec) if codec and buffer else buffer
        at = known.get(stored) if share and stored else None
        if at is None:
            at = len(body)
            known[stored] = at
            body += stored
            body += bytes(-len(body) % 8)
        places.append((at, len(stored)))
    return StreamMessage.build(_header(flat, places, len(body), dictionary, codec), bytes(body))


def _compressed(buffer: bytes, codec: str) -> bytes:
    return struct.pack("<q", len(buffer)) + pa.Codec(codec).compress(buffer, asbytes=True)


def _header(
    flat: Flat, places: Sequence[tuple[int, int]], body_bytes: int, dictionary: int | None, codec: str | None
) -> bytes:
    out = bytearray()

    def table(slots: Sequence[int], size: int) -> int:
        """Append a vtable and room for its table, 8-aligned; returns the table's place."""
        while (len(out) + 4 + 2 * len(slots)) % 8:
            out.append(0)
        vtable = len(out)
        out.extend(struct.pack(f"<{2 + len(slots)}H", 4 + 2 * len(slots), size, *slots))
        place = len(out)
        out.extend(bytes(size))
        struct.pack_into("<i", out, place, place - vtable)
        return place

    def point(at: int, to: int) -> None:
        struct.pack_into("<I", out, at, to - at)

    def vector(count: int, content: bytes) -> int:
        """Append a vector whose elements are 8-aligned; returns its place."""
        while len(out) % 8 != 4:
            out.append(0)
        place = len(out)
        out.extend(struct.pack("<I", count) + content)
        return place

    out.extend(bytes(4))
    message = table([4, 6, 8, 16], 24)
    point(0, message)
    struct.pack_into("<hB", out, message + 4, _V5, _RECORD_BATCH if dictionary is None else _DICTIONARY_BATCH)
    struct.pack_into("<q", out, message + 16, body_bytes)
    above = message + 8
    if dictionary is not None:
        # id, data, isDelta
        values = table([8, 4, 0], 16)
        struct.pack_into("<q", out, values + 8, dictionary)
        point(above, values)
        above = values + 4
    batch = table([8, 4, 16, 20 if codec else 0, 24 if flat.variadic else 0], 32)
    point(above, batch)
    struct.pack_into("<q", out, batch + 8, flat.rows)
    point(batch + 4, vector(len(flat.nodes), b"".join(struct.pack("<qq", *node) for node in flat.nodes)))
    point(batch + 16, vector(len(places), b"".join(struct.pack("<qq", *place) for place in places)))
    if codec:
        compression = table([4, 5], 8)
        out[compression + 4] = _CODECS[codec]
        point(batch + 20, compression)
    if flat.variadic:
        point(batch + 24, vector(len(flat.variadic), struct.pack(f"<{len(flat.variadic)}q", *flat.variadic)))
    out.extend(bytes(-len(out) % 8))
    return bytes(out)
