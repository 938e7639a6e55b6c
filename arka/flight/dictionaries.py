"""The dictionaries that one stream has sent: decoded once, held under a limit (T14).

Owns: dictionary batches, deltas and replacements. Does not own the columns that use them (``convert``).

Arrow's own reader wants a whole stream: schema, every dictionary, batch. Here a dictionary's values are
read as the one-column record batch that they are, when they come, so that a batch costs its indices alone:
beside a dictionary of 60,000 words a 1-row batch takes 15 us, through Arrow's reader 230 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from arka._core import ipc
from arka._core.buffers import FRAME_HEADER_BYTES, FrameBuffer
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.convert import DictionaryValues
from arka.flight.layout import Layout, describe_finding, plan_layout, wire_type
from arka.flight.plain import is_plain, plain_array, referred_bytes
from arka.options import Limits

#: What Arrow raises for bytes that it does not take: ArrowInvalid is a ValueError, flatbuffers that do
#: not verify are OSErrors, absent features NotImplementedErrors; names that are not UTF-8 surface late.
REFUSALS: Final = (
    pa.ArrowException,
    ValueError,
    OSError,
    IndexError,
    KeyError,
    TypeError,
    NotImplementedError,
)


@dataclass(slots=True)
class _Dictionary:
    """One dictionary as sent so far: chunks that came as deltas, joined when they are needed."""

    chunks: list[pa.Array]
    size: int
    values: DictionaryValues | None = None

    def joined(self) -> DictionaryValues:
        if len(self.chunks) > 1:
            self.chunks = [pa.concat_arrays(self.chunks)]
        if self.values is None:
            self.values = DictionaryValues(self.chunks[0])
        return self.values


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the batches of one dictionary look like."""

    wire: pa.Schema
    layout: Layout


class StreamDictionaries:
    """The dictionaries of one stream.

    Args:
        ids: the dictionary's id of each dictionary-encoded field, depth first.
        value_types: the same fields' value types, as sent, none of them nested; None where nothing looks at them.
        limits: ``dictionary_bytes`` and ``batch_rows`` are used.

    Raises:
        InvalidRequest: one id is used for two types.
    """

    def __init__(self, ids: Sequence[int], value_types: Sequence[pa.DataType | None], limits: Limits) -> None:
        self._ids = tuple(ids)
        self._limits = limits
        self._held: dict[int, _Dictionary] = {}
        self._kinds: dict[int, _Kind] = {}
        if len(ids) != len(value_types):
            raise InvalidRequest(f"The schema has {len(value_types)} dictionaries but {len(ids)} ids for them")
        types: dict[int, pa.DataType] = {}
        self._ignored = {identity for identity, type_ in zip(ids, value_types, strict=True) if type_ is None}
        for identity, type_ in zip(ids, value_types, strict=True):
            if type_ is None:
                continue
            self._ignored.discard(identity)
            if types.setdefault(identity, type_) != type_:
                raise InvalidRequest(f"Dictionary {identity} is used for {types[identity]} and for {type_}")
            wire = pa.schema([pa.field("values", wire_type(type_))])
            self._kinds[identity] = _Kind(wire, plan_layout(wire))

    @property
    def held_bytes(self) -> int:
        """Bytes held now, as sent; never over ``limits.dictionary_bytes``.

        Where a dictionary's type is not the table's, a converted copy takes about as much again.
        """
        return sum(dictionary.size for dictionary in self._held.values())

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()

    def values(self, slot: int) -> DictionaryValues | None:
        """Return the values for a dictionary-encoded field, or None when none were sent.

        Args:
            slot: the field's number among the dictionary-encoded ones, depth first.
        """
        held = self._held.get(self._ids[slot])
        return None if held is None else held.joined()

    def add(self, header: bytes, frame: FrameBuffer) -> None:
        """Take a dictionary batch.

        Args:
            header: a DictionaryBatch message.
            frame: its frame; the values are copied out of it.

        Raises:
            InvalidRequest: malformed, or of an id that the schema does not have; ``too_large`` when all
                dictionaries together would be over the limit. What was held stays.
        """
        try:
            self._add(header, frame)
        except REFUSALS as error:
            raise InvalidRequest(f"Malformed dictionary: {error}") from error

    def _add(self, header: bytes, frame: FrameBuffer) -> None:
        identity, is_delta, batch_header = ipc.dictionary_batch(header)
        if identity in self._ignored:
            return
        kind = self._kinds.get(identity)
        if kind is None:
            raise InvalidRequest(f"Dictionary {identity} belongs to no column of the stream's schema")
        layout = ipc.BatchLayout(batch_header)
        if layout.body_bytes != frame.body_bytes:
            raise InvalidRequest(
                f"Dictionary {identity}: a body of {frame.body_bytes} bytes, expected {layout.body_bytes}"
            )
        held = self._held.get(identity)
        # A delta without a dictionary before it is one itself.
        others = self.held_bytes - (0 if held is None or is_delta else held.size)
        self._check_size(identity, others + layout.uncompressed_bytes(frame))
        if layout.rows > self._limits.batch_rows:
            raise InvalidRequest(
                f"Dictionary {identity} has {layout.rows} values, the limit is {self._limits.batch_rows} "
                "(limits.batch_rows)",
                code=ErrorCode.TOO_LARGE,
            )
        finding = layout.check(kind.layout.plan, frame, layout.rows)
        if finding is not None:
            raise InvalidRequest(f"Dictionary {identity}: {describe_finding(finding)}")
        own = FrameBuffer(batch_header, frame.body_bytes)
        own.body[:] = frame.body
        batch = pa.ipc.read_record_batch(pa.py_buffer(own).slice(FRAME_HEADER_BYTES), kind.wire)
        values = batch.column(0)
        if not is_plain(values.type):
            values.validate()
            self._check_size(identity, others + referred_bytes(values, self._limits.batch_rows))
        values.validate(full=True)
        values = plain_array(values)
        # Uncompressed values are views of the whole frame, which they keep alive.
        size = max(own.size if layout.codec == ipc.CODEC_NONE else 0, values.nbytes)
        self._check_size(identity, others + size)
        if is_delta and held is not None:
            held.chunks.append(values)
            held.size += size
            held.values = None
        else:
            self._held[identity] = _Dictionary([values], size)

    def _check_size(self, identity: int, size: int) -> None:
        if size > self._limits.dictionary_bytes:
            raise InvalidRequest(
                f"With dictionary {identity} the stream's dictionaries have {size} bytes, the limit is "
                f"{self._limits.dictionary_bytes} (limits.dictionary_bytes)",
                code=ErrorCode.TOO_LARGE,
            )


__all__ = ["REFUSALS", "StreamDictionaries"]
