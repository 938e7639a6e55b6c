"""The acks of one stream: derived from its writes and the watermarks, encoded when the wire has room (T6).

Owns: which ack is due next and its bytes. Does not own when a tier is reached (``arka.tiers``) nor how
much may be sent (the transport asks with a budget). Acks that are not sent yet are state, not bytes:
per write one LSN, its row count and the tier it asked for; per tier a cursor and the rises it has not used up.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from typing import Final

import pyarrow as pa

from arka.errors import ErrorCode
from arka.flight.messages import varint
from arka.records import Tier
from arka.tiers.watermarks import Advance, now_us

_TIERS: Final = tuple(Tier)
#: Acked writes are dropped from the arrays in steps of this many, so that the cost of it stays small.
_TRIM_WRITES: Final = 4096


class AckForm(Enum):
    """How an ack travels."""

    #: FlightData with nothing but app_metadata.
    METADATA = "metadata"
    #: FlightData that carries a zero-row batch beside the app_metadata; a schema goes first.
    BATCH = "batch"
    #: PutResult of DoPut.
    PUT_RESULT = "put_result"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a write is not in the table (or, with ``outcome_unknown``, why nobody can say)."""

    code: ErrorCode
    detail: str


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A write whose key was seen before; ``code`` is ``key_reused`` when its payload differs."""

    code: ErrorCode | None = None


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + varint(len(value)) + value


_EMPTY_SCHEMA: Final = pa.schema([])
# FlightData: data_header is field 2, app_metadata field 3; PutResult: app_metadata is field 1.
_SCHEMA_HEADER: Final = _field(b"\x12", pa.ipc.read_message(_EMPTY_SCHEMA.serialize()).metadata.to_pybytes())
_BATCH_HEADER: Final = _field(
    b"\x12",
    pa.ipc.read_message(pa.RecordBatch.from_arrays([], schema=_EMPTY_SCHEMA).serialize()).metadata.to_pybytes(),
)


def _message(payload: bytes) -> bytes:
    """Prefix a gRPC message with its flag byte and length."""
    return b"\0" + len(payload).to_bytes(4, "big") + payload


class AckQueue:
    """What a stream's client has still to be told.

    Writes get sequences 0, 1, 2 … in the order of ``accept``, ``duplicate`` and ``reject``. For each
    tier acks come out in sequence order; for each write in tier order, up to the tier it asked for; an
    error ends a write's acks (protocol 3).
    """

    def __init__(self) -> None:
        """Start empty, and without knowing how far any tier is: ``advance`` says so."""
        self.form = AckForm.METADATA
        self.coalesce = False
        # Invariant: _lsns[i] belongs to sequence _base + i; 0 marks a rejection.
        self._base = 0
        self._lsns = array("q")
        self._rows = array("q")
        self._requested = bytearray()
        self._special: dict[int, Rejection | Duplicate] = {}
        # Invariant: _cursor[t] is the first sequence whose ack for tier t is not out; never rises with t.
        self._cursor = [0, 0, 0, 0]
        # Rises that some unsent ack may still need for its timestamp, oldest first; never empty.
        self._rises: list[deque[Advance]] = [deque([Advance(tier, 0, 0)]) for tier in _TIERS]
        self._failure: Rejection | None = None
        self._failed_through = 0
        self._preamble: deque[bytes] = deque()
        self._schema_sent = False
        self._accepted_us = now_us()

    @property
    def writes(self) -> int:
        """How many writes the stream has had: the next sequence."""
        return self._base + len(self._lsns)

    @property
    def unsent(self) -> int:
        """How many writes still have an ack to come or to go out."""
        return self.writes - self._first_open()

    @property
    def unread(self) -> int:
        """How many writes have a memory ack that is due and that the client makes no room for."""
        return self.writes - self._cursor[Tier.MEMORY]

    @property
    def due(self) -> bool:
        """Whether an ack could go out now: what is held back is the client's doing, not a tier's."""
        if self._preamble or self._failure is not None or self.unread:
            return True
        for tier in _TIERS[1:]:
            risen = self._rises[tier][-1].lsn
            for sequence in range(self._cursor[tier], self._cursor[tier - 1]):
                if self._requested[sequence - self._base] >= tier:
                    if self._lsns[sequence - self._base] <= risen:
                        return True
                    break
        return False

    @property
    def settled(self) -> bool:
        """Whether every write has had its last ack."""
        return not self._preamble and self._first_open() == self.writes

    def accept(self, lsn: int, rows: int, requested: Tier) -> int:
        """Note a write that was accepted; returns its sequence."""
        self._accepted_us = now_us()
        return self._append(lsn, rows, requested)

    def duplicate(self, lsn: int, rows: int, requested: Tier, code: ErrorCode | None) -> int:
        """Note a write whose key had been seen; ``lsn`` is the first write's."""
        self._special[self.writes] = Duplicate(code)
        return self._append(lsn, rows, requested)

    def reject(self, code: ErrorCode, detail: str) -> int:
        """Note a write that is not in the table and never will be; returns its sequence."""
        self._special[self.writes] = Rejection(code, detail)
        return self._append(0, 0, Tier.MEMORY)

    def handshake(self, marks: dict[Tier, int]) -> None:
        """Answer ``resume_after_lsn``: one ack per tier with sequence -1 (protocol 3.3)."""
        for tier, lsn in marks.items():
            self._preamble.append(self._encode(tier, lsn, now_us(), -1, None, None, None))

    def advance(self, advance: Advance) -> None:
        """Note that a tier has risen."""
        rises = self._rises[advance.tier]
        if advance.lsn <= rises[-1].lsn:
            return
        if self._cursor[advance.tier] == self.writes:
            # Nothing waits for this tier: only the newest rise can matter to what comes.
            rises.clear()
        rises.append(advance)

    def fail(self, code: ErrorCode, detail: str) -> None:
        """End every write that has not had its last ack, in order, with this error.

        Acks that are already due go out before it; writes that come later are not touched.
        """
        self._failure = Rejection(code, detail)
        self._failed_through = self.writes

    def take(self, budget: int) -> bytes:
        """Encode acks that are due.

        Args:
            budget: about how many bytes to give; at least one ack is given if any is due.

        Returns:
            Whole gRPC messages; empty when nothing is due now.
        """
        out: list[bytes] = []
        left = budget
        while self._preamble and left > 0:
            left -= self._emit(out, self._preamble.popleft())
        for tier in _TIERS:
            if left <= 0:
                break
            left = self._take_tier(tier, left, out)
        if self._failure is not None and left > 0:
            self._take_failed(left, out)
        self._trim()
        if self.form is AckForm.BATCH and out and not self._schema_sent:
            self._schema_sent = True
            out.insert(0, _message(_SCHEMA_HEADER))
        return b"".join(out)

    def _append(self, lsn: int, rows: int, requested: Tier) -> int:
        sequence = self.writes
        self._lsns.append(lsn)
        self._rows.append(rows)
        self._requested.append(requested)
        return sequence

    def _first_open(self) -> int:
        """The first sequence that may still have an ack to come: behind the slowest tier's cursor."""
        cursor = self._cursor[Tier.ICEBERG_COMMITTED]
        if cursor == self.writes:
            return cursor
        # A tier's cursor stops at the first write that waits for it, also when nobody behind that asked for it.
        for sequence in range(cursor, self.writes):
            if not self._closed(sequence):
                return sequence
        return self.writes

    def _closed(self, sequence: int) -> bool:
        return sequence < self._cursor[self._requested[sequence - self._base]]

    def _take_tier(self, tier: Tier, left: int, out: list[bytes]) -> int:
        """Encode what is due for one tier; returns what is left of the budget."""
        sequence = self._cursor[tier]
        limit = self.writes if tier is Tier.MEMORY else self._cursor[tier - 1]
        rises = self._rises[tier]
        pending: tuple[int, int, int, int, int | None] | None = None  # a coalesced ack that is not out yet
        while sequence < limit and left > 0:
            index = sequence - self._base
            if self._requested[index] < tier:
                sequence += 1
                continue
            lsn = self._lsns[index]
            special = self._special.get(sequence)
            if isinstance(special, Rejection):
                if pending is not None:
                    left -= self._emit_pending(tier, pending, out)
                    pending = None
                left -= self._emit(out, self._encode(tier, lsn, now_us(), sequence, None, special.code, special.detail))
                del self._special[sequence]
                sequence += 1
                continue
            if tier is Tier.MEMORY:
                timestamp_us, snapshot_id = self._accepted_us, None
            else:
                while rises[0].lsn < lsn and len(rises) > 1:
                    rises.popleft()
                if rises[0].lsn < lsn:
                    break
                timestamp_us, snapshot_id = rises[0].timestamp_us, rises[0].snapshot_id
            rows = self._rows[index]
            if self.coalesce and special is None:
                pending = (lsn, timestamp_us, sequence, rows, snapshot_id)
            else:
                if pending is not None:
                    left -= self._emit_pending(tier, pending, out)
                    pending = None
                code = special.code if special is not None else None
                left -= self._emit(
                    out,
                    self._encode(
                        tier,
                        lsn,
                        timestamp_us,
                        sequence,
                        rows,
                        code,
                        None,
                        snapshot_id,
                        duplicate=special is not None,
                    ),
                )
            sequence += 1
        if pending is not None:
            left -= self._emit_pending(tier, pending, out)
        self._cursor[tier] = sequence
        return left

    def _emit_pending(self, tier: Tier, pending: tuple[int, int, int, int, int | None], out: list[bytes]) -> int:
        lsn, timestamp_us, sequence, rows, snapshot_id = pending
        return self._emit(out, self._encode(tier, lsn, timestamp_us, sequence, rows, None, None, snapshot_id))

    def _take_failed(self, left: int, out: list[bytes]) -> None:
        """Give the failure to each write that is still open, in order."""
        failure = self._failure
        assert failure is not None
        sequence = self._cursor[Tier.ICEBERG_COMMITTED]
        while sequence < self._failed_through and left > 0:
            if not self._closed(sequence):
                index = sequence - self._base
                level = next(tier for tier in _TIERS if self._cursor[tier] <= sequence)
                left -= self._emit(
                    out,
                    self._encode(level, self._lsns[index], now_us(), sequence, None, failure.code, failure.detail),
                )
            sequence += 1
            for tier in _TIERS:
                self._cursor[tier] = max(self._cursor[tier], sequence)
        if sequence >= self._failed_through:
            self._failure = None

    def _trim(self) -> None:
        """Drop writes that every tier's cursor has passed."""
        done = self._cursor[Tier.ICEBERG_COMMITTED] - self._base
        if done < _TRIM_WRITES and done < len(self._lsns):
            return
        for sequence in list(takewhile(lambda s: s < self._base + done, self._special)):
            del self._special[sequence]
        del self._lsns[:done], self._rows[:done], self._requested[:done]
        self._base += done

    def _emit(self, out: list[bytes], message: bytes) -> int:
        out.append(message)
        return len(message)

    def _encode(
        self,
        tier: Tier,
        lsn: int,
        timestamp_us: int,
        sequence: int,
        rows: int | None,
        code: ErrorCode | None,
        error: str | None,
        snapshot_id: int | None = None,
        *,
        duplicate: bool = False,
    ) -> bytes:
        text = (
            f'{{"lsn":{lsn},"durability_level":"{tier.word}","timestamp_us":{timestamp_us},'
            f'"error":{"null" if error is None else json.dumps(error)},"sequence":{sequence}'
        )
        if rows is not None:
            text += f',"rows":{rows}'
        if code is not None:
            text += f',"code":"{code}"'
        if duplicate:
            text += ',"duplicate":true'
        if snapshot_id is not None:
            text += f',"snapshot_id":"{snapshot_id}"'
        body = (text + "}").encode()
        match self.form:
            case AckForm.METADATA:
                return _message(_field(b"\x1a", body))
            case AckForm.BATCH:
                return _message(_BATCH_HEADER + _field(b"\x1a", body))
            case AckForm.PUT_RESULT:
                return _message(_field(b"\x0a", body))


__all__ = ["AckForm", "AckQueue", "Duplicate", "Rejection"]
