"""The acks of one stream: derived from its writes and the watermarks, encoded when the wire has room (T6).

Owns: which ack is due next, and its bytes together with ``_core.acks``. Does not own when a tier is reached
(``arka.tiers``) nor how much may be sent (the transport asks with a budget). Acks that are not sent yet are state, not
bytes: per write one LSN, its row count and the tier it asked for; per tier a cursor and the rises it has not used up.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from sys import getsizeof
from typing import Final

import pyarrow as pa

from arka._core.acks import SPECIAL, encode_run
from arka.errors import ErrorCode
from arka.flight.messages import varint
from arka.flight.unread import ACK_BYTES, TEXT_OVERHEAD
from arka.records import Tier
from arka.tiers.watermarks import Advance, now_us

_TIERS: Final = tuple(Tier)
_LAST: Final = Tier.ICEBERG_COMMITTED
#: Above every LSN: what has reached the memory tier.
_ALL: Final = 2**63 - 1
#: Places that a table of special writes may have empty before it is made again: Python's never shrink.
_EMPTY_PLACES: Final = 4096
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


@dataclass(frozen=True, slots=True)
class SetAside:
    """A write that reaches each tier but the last: there it ends with an error (R32)."""

    detail: str
    duplicate: bool


def _cost(special: Rejection | Duplicate | SetAside) -> int:
    """What one special write takes in memory beside its ack, in bytes."""
    return TEXT_OVERHEAD if isinstance(special, Duplicate) else TEXT_OVERHEAD + getsizeof(special.detail)


#: One for all writes that share it.
_DUPLICATES: Final = {None: Duplicate(), ErrorCode.KEY_REUSED: Duplicate(ErrorCode.KEY_REUSED)}


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + varint(len(value)) + value


_EMPTY_SCHEMA: Final = pa.schema([])
# FlightData: data_header is field 2, app_metadata field 3; PutResult: app_metadata is field 1.
_SCHEMA_HEADER: Final = _field(b"\x12", pa.ipc.read_message(_EMPTY_SCHEMA.serialize()).metadata.to_pybytes())
_BATCH_HEADER: Final = _field(
    b"\x12",
    pa.ipc.read_message(pa.RecordBatch.from_arrays([], schema=_EMPTY_SCHEMA).serialize()).metadata.to_pybytes(),
)


#: What an ack's message begins with: the tag of its text is the last byte.
_HEADS: Final = {
    AckForm.METADATA: b"\x1a",
    AckForm.BATCH: _BATCH_HEADER + b"\x1a",
    AckForm.PUT_RESULT: b"\x0a",
}


#: gRPC stacks whose stock Flight readers choke on a message without data, as their user-agents begin (T20).
_CHOKING: Final = ("grpc-go/", "tonic/")


def chokes_on_metadata(user_agent: str) -> bool:
    """Whether a client's stock reader takes batches alone, by the tokens of its user-agent (protocol 3, ``ack_as``)."""
    return any(token.startswith(_CHOKING) for token in user_agent.split())


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
        self._form = AckForm.METADATA
        self.coalesce = False
        #: Of each write, tell the tier that it asked for alone.
        self.requested_only = False
        #: The highest LSN among the writes so far: a tier that has come there has nothing more to tell.
        self.highest_lsn = 0
        # Invariant: _lsns[i] belongs to sequence _base + i; 0 marks a rejection. A tier has the bit SPECIAL where the
        # sequence is, or was, in _special.
        self._base = 0
        self._lsns = array("q")
        self._rows = array("q")
        self._requested = bytearray()
        self._special: dict[int, Rejection | Duplicate | SetAside] = {}
        # The most entries that it has had since it was made.
        self._special_most = 0
        # Invariant: what _special, _preamble and _failure take in memory, in bytes.
        self._texts_bytes = 0
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
    def form(self) -> AckForm:
        """How acks travel; ``BATCH`` makes the empty schema due: its reader is made before the first write."""
        return self._form

    @form.setter
    def form(self, form: AckForm) -> None:
        self._form = form
        if form is AckForm.BATCH and not self._schema_sent:
            self._schema_sent = True
            self._promise(_message(_SCHEMA_HEADER))

    @property
    def writes(self) -> int:
        """How many writes the stream has had: the next sequence."""
        return self._base + len(self._lsns)

    @property
    def unsent(self) -> int:
        """How many writes still have an ack to come or to go out."""
        return self.writes - self._first_open()

    @property
    def most_bytes(self) -> int:
        """A bound of what is held for the client, whether it is due or not, in bytes."""
        return ACK_BYTES * (self.writes - self._cursor[Tier.ICEBERG_COMMITTED]) + self._texts_bytes

    @property
    def unread_bytes(self) -> int:
        """What is held because the client does not read (T26), in bytes: texts, and acks once any of them is due."""
        return self._texts_bytes + (ACK_BYTES * self.unsent if self.due else 0)

    def within(self, held: int, limit: int) -> bool:
        """Whether ``most_bytes`` is at most ``held`` and ``fewer_than(limit)`` holds; asked before each message."""
        left = self.writes - self._cursor[_LAST]
        return ACK_BYTES * left + self._texts_bytes <= held and (left < limit or self.unsent < limit)

    def fewer_than(self, limit: int) -> bool:
        """Whether fewer writes than this still have an ack to come or to go out."""
        return self.writes - self._cursor[Tier.ICEBERG_COMMITTED] < limit or self.unsent < limit

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
                if self._tells(sequence, tier):
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
        self._put_special(self.writes, _DUPLICATES[code])
        return self._append(lsn, rows, requested | SPECIAL)

    def reject(self, code: ErrorCode, detail: str) -> int:
        """Note a write that is not in the table and never will be; returns its sequence."""
        self._put_special(self.writes, Rejection(code, detail))
        return self._append(0, 0, Tier.MEMORY | SPECIAL)

    def set_aside(self, lsn: int, detail: str) -> None:
        """Let the writes with this LSN end with ``set_aside`` where they would be ``iceberg_committed``.

        Args:
            lsn: of a write that no commit will hold; the last tier has not come to it yet.
            detail: what its client is told.
        """
        for index, known in enumerate(self._lsns):
            sequence = self._base + index
            if known == lsn and sequence >= self._cursor[Tier.ICEBERG_COMMITTED]:
                self._put_special(sequence, SetAside(detail, isinstance(self._special.get(sequence), Duplicate)))
                self._requested[index] |= SPECIAL

    def handshake(self, marks: dict[Tier, int]) -> None:
        """Answer ``resume_after_lsn``: one ack per tier with sequence -1 (protocol 3.3)."""
        for tier, lsn in marks.items():
            self._promise(self._encode(tier, lsn, now_us(), -1, None, None, None))

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
        self._drop_failure()
        self._failure = Rejection(code, detail)
        self._texts_bytes += _cost(self._failure)
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
            message = self._preamble.popleft()
            self._texts_bytes -= TEXT_OVERHEAD + len(message)
            left -= self._emit(out, message)
        for tier in _TIERS:
            if left <= 0:
                break
            left = self._take_tier(tier, left, out)
        if self._failure is not None and left > 0:
            self._take_failed(left, out)
        self._trim()
        return b"".join(out)

    def _append(self, lsn: int, rows: int, requested: int) -> int:
        sequence = self.writes
        if lsn > self.highest_lsn:
            self.highest_lsn = lsn
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
        return sequence < self._cursor[self._tier_of(sequence)]

    def _tier_of(self, sequence: int) -> int:
        """The tier that a write asked for."""
        return self._requested[sequence - self._base] & ~SPECIAL

    def _tells(self, sequence: int, tier: Tier) -> bool:
        """Whether a write's client is told of this tier."""
        asked = self._tier_of(sequence)
        return asked == tier if self.requested_only else asked >= tier

    def _take_tier(self, tier: Tier, left: int, out: list[bytes]) -> int:
        """Encode what is due for one tier; returns what is left of the budget."""
        sequence = self._cursor[tier]
        limit = self.writes if tier is Tier.MEMORY else self._cursor[tier - 1]
        rises = self._rises[tier]
        pending = b""  # a coalesced ack that is not out yet
        while sequence < limit and left > 0:
            special = self._requested[sequence - self._base] & SPECIAL and self._tells(sequence, tier)
            rise = self._rise_for(tier, sequence) if special else rises[0]
            if rise is None:
                break
            if special:
                left -= self._emit(out, pending)
                pending = b""
                left -= self._emit(out, self._encode_special(tier, sequence, rise))
                sequence += 1
                continue
            data, index = self._encode_run(tier, sequence, limit, rise, left)
            if self.coalesce and not rise.dropped:
                pending = data or pending
            else:
                left -= self._emit(out, pending) + self._emit(out, data)
                pending = b""
            sequence = self._base + index
            if sequence < limit and left > 0 and not self._requested[index] & SPECIAL:
                # It waits for a later rise, if there is one.
                if len(rises) == 1 or tier is Tier.MEMORY:
                    break
                rises.popleft()
        self._emit(out, pending)
        self._cursor[tier] = sequence
        return left - len(pending)

    def _rise_for(self, tier: Tier, sequence: int) -> Advance | None:
        """The rise that a write's ack tells; None if the tier has not come to it."""
        rises = self._rises[tier]
        lsn = self._lsns[sequence - self._base]
        if tier is Tier.MEMORY:
            return rises[0]
        while rises[0].lsn < lsn and len(rises) > 1:
            rises.popleft()
        return None if rises[0].lsn < lsn else rises[0]

    def _encode_run(self, tier: Tier, sequence: int, limit: int, rise: Advance, budget: int) -> tuple[bytes, int]:
        """Encode the common acks from one write on, as far as a rise goes; returns them, and the index behind them."""
        in_memory = tier is Tier.MEMORY
        timestamp_us = self._accepted_us if in_memory else rise.timestamp_us
        tail = (
            "}" if in_memory or rise.snapshot_id is None else f',"snapshot_id":"{rise.snapshot_id}"{_dropped(rise)}}}'
        )
        return encode_run(
            self._lsns,
            self._rows,
            self._requested,
            sequence - self._base,
            limit - self._base,
            tier=tier,
            through_lsn=_ALL if in_memory else rise.lsn,
            first_sequence=self._base,
            head=_HEADS[self._form],
            middle=_middle(tier, timestamp_us, "null").encode(),
            tail=tail.encode(),
            last_only=self.coalesce,
            exact=self.requested_only,
            budget=budget,
        )

    def _encode_special(self, tier: Tier, sequence: int, rise: Advance) -> bytes:
        """Encode the ack of a write that was rejected, which ends it, or whose key was known."""
        special = self._special[sequence]
        index = sequence - self._base
        lsn = self._lsns[index]
        if isinstance(special, Rejection):
            self._drop_special(sequence)
            return self._encode(tier, lsn, now_us(), sequence, None, special.code, special.detail)
        if isinstance(special, SetAside) and tier is Tier.ICEBERG_COMMITTED:
            return self._encode(tier, lsn, now_us(), sequence, None, ErrorCode.SET_ASIDE, special.detail)
        if tier is Tier.MEMORY:
            timestamp_us, snapshot_id, more = self._accepted_us, None, ""
        else:
            timestamp_us, snapshot_id = rise.timestamp_us, rise.snapshot_id
            # What was committed earlier is not what this rise speaks of.
            more = _dropped(rise) if lsn > rise.after_lsn else ""
        rows = self._rows[index]
        if isinstance(special, SetAside):
            duplicate = special.duplicate
            return self._encode(tier, lsn, timestamp_us, sequence, rows, None, None, snapshot_id, duplicate=duplicate)
        return self._encode(
            tier, lsn, timestamp_us, sequence, rows, special.code, None, snapshot_id, duplicate=True, more=more
        )

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
            self._drop_failure()

    def _trim(self) -> None:
        """Drop writes that every tier's cursor has passed."""
        done = self._cursor[Tier.ICEBERG_COMMITTED] - self._base
        if done < _TRIM_WRITES and done < len(self._lsns):
            return
        for sequence in list(takewhile(lambda s: s < self._base + done, self._special)):
            self._drop_special(sequence)
        if self._special_most > len(self._special) + _EMPTY_PLACES:
            self._special = dict(self._special)
            self._special_most = len(self._special)
        del self._lsns[:done], self._rows[:done], self._requested[:done]
        self._base += done

    def _promise(self, message: bytes) -> None:
        """Let a message go out before all acks."""
        self._preamble.append(message)
        self._texts_bytes += TEXT_OVERHEAD + len(message)

    def _put_special(self, sequence: int, special: Rejection | Duplicate | SetAside) -> None:
        if sequence in self._special:
            self._drop_special(sequence)
        self._special[sequence] = special
        self._special_most = max(self._special_most, len(self._special))
        self._texts_bytes += _cost(special)

    def _drop_special(self, sequence: int) -> None:
        self._texts_bytes -= _cost(self._special.pop(sequence))

    def _drop_failure(self) -> None:
        if self._failure is not None:
            self._texts_bytes -= _cost(self._failure)
            self._failure = None

    def _emit(self, out: list[bytes], data: bytes) -> int:
        if data:
            out.append(data)
        return len(data)

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
        more: str = "",
    ) -> bytes:
        text = f'{{"lsn":{lsn}'
        text += _middle(tier, timestamp_us, "null" if error is None else json.dumps(error)) + str(sequence)
        if rows is not None:
            text += f',"rows":{rows}'
        if code is not None:
            text += f',"code":"{code}"'
        if duplicate:
            text += ',"duplicate":true'
        if snapshot_id is not None:
            text += f',"snapshot_id":"{snapshot_id}"'
        body = (text + more + "}").encode()
        return _message(_HEADS[self._form] + varint(len(body)) + body)


def _dropped(rise: Advance) -> str:
    """The JSON text that names the columns which writes have lost (R24); empty for none."""
    return f',"dropped_columns":{json.dumps(rise.dropped)}' if rise.dropped else ""


def _middle(tier: Tier, timestamp_us: int, error: str) -> str:
    """The JSON text of an ack between its LSN and its sequence."""
    return f',"durability_level":"{tier.word}","timestamp_us":{timestamp_us},"error":{error},"sequence":'


__all__ = ["AckForm", "AckQueue", "Duplicate", "Rejection", "chokes_on_metadata"]
