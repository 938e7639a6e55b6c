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
from arka.errors import ErrorCode, InvalidRequest, cut
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


_concat: Final = pa.concat_arrays

#: What a piece of a dictionary takes beside its values, in bytes: arrays, buffers and their owners.
_PIECE_BYTES: Final = 1024


class _Dictionary:
    """One dictionary as sent so far: pieces that came as deltas, joined when they are needed.

    Of two neighbours the older one has more than twice as many bytes: each value is copied a few times at most, however
    small the deltas are, and the pieces are few.
    """

    __slots__ = ("pieces", "size", "values")

    def __init__(self, values: pa.Array, size: int) -> None:
        self.pieces = [(values, size + _PIECE_BYTES)]
        self.size = size + _PIECE_BYTES
        self.values: DictionaryValues | None = None

    def add(self, values: pa.Array, size: int) -> None:
        """Add what a delta brought."""
        self.values = None
        pieces = self.pieces
        pieces.append((values, size + _PIECE_BYTES))
        count, total = 1, pieces[-1][1]
        while count < len(pieces) and pieces[-count - 1][1] <= 2 * total:
            count += 1
            total += pieces[-count][1]
        if count > 1:
            self._join(count)
        self.size = sum(size for _, size in pieces)

    def _join(self, count: int) -> None:
        """Make the newest ``count`` pieces one."""
        joined = _concat([values for values, _ in self.pieces[-count:]])
        self.pieces[-count:] = [(joined, joined.nbytes + _PIECE_BYTES)]

    @property
    def unjoined_bytes(self) -> int:
        """Bytes that the next batch has to copy and look at first."""
        return 0 if self.values is not None else self.size

    def joined(self) -> DictionaryValues:
        """All its values."""
        if len(self.pieces) > 1:
            self._join(len(self.pieces))
            self.size = self.pieces[0][1]
        if self.values is None:
            self.values = DictionaryValues(self.pieces[0][0])
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
        # Invariant: the sum of the sizes of what is held. A stream may have thousands of dictionaries.
        self._held_bytes = 0
        self._unjoined_bytes = 0
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
        return self._held_bytes

    @property
    def unjoined_bytes(self) -> int:
        """Bytes that the next batch has to copy and look at before its own, if it uses all that is new."""
        return self._unjoined_bytes

    def clear(self) -> None:
        """Forget everything."""
        self._held = {}
        self._held_bytes = self._unjoined_bytes = 0

    def values(self, slot: int) -> DictionaryValues | None:
        """Return the values for a dictionary-encoded field, or None when none were sent.

        Args:
            slot: the field's number among the dictionary-encoded ones, depth first.
        """
        held = self._held.get(self._ids[slot])
        if held is None:
            return None
        self._forget(held)
        values = held.joined()
        self._count(held)
        return values

    def _forget(self, dictionary: _Dictionary) -> None:
        self._held_bytes -= dictionary.size
        self._unjoined_bytes -= dictionary.unjoined_bytes

    def _count(self, dictionary: _Dictionary) -> None:
        self._held_bytes += dictionary.size
        self._unjoined_bytes += dictionary.unjoined_bytes

    def work(self, header: bytes, frame: FrameBuffer) -> int:
        """Tell how much there is to look at in a dictionary batch, in bytes; 0 if it is malformed.

        Args:
            header: a DictionaryBatch message.
            frame: its frame.
        """
        try:
            identity, is_delta, batch_header = ipc.dictionary_batch(header)
            kind = self._kinds.get(identity)
            if identity in self._ignored or kind is None:
                return 0
            layout = ipc.BatchLayout(batch_header)
            size = layout.uncompressed_bytes(frame) + len(header)
        except ValueError:
            return 0
        if not is_plain(kind.wire.field(0).type):
            # Each value may name all of the message.
            size *= max(1, layout.rows)
        held = self._held.get(identity)
        return size + (held.size if is_delta and held is not None else 0)

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
            raise InvalidRequest(f"Malformed dictionary: {cut(str(error))}") from error

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
        others = self.held_bytes + _PIECE_BYTES - (0 if held is None or is_delta else held.size)
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
        if held is not None:
            self._forget(held)
        if is_delta and held is not None:
            held.add(values, size)
        else:
            held = self._held[identity] = _Dictionary(values, size)
        self._count(held)

    def _check_size(self, identity: int, size: int) -> None:
        if size > self._limits.dictionary_bytes:
            raise InvalidRequest(
                f"With dictionary {identity} the stream's dictionaries have {size} bytes, the limit is "
                f"{self._limits.dictionary_bytes} (limits.dictionary_bytes)",
                code=ErrorCode.TOO_LARGE,
            )


__all__ = ["REFUSALS", "StreamDictionaries"]
