"""Order across refusals: what an ordered stream does with the writes behind one that was refused (R36).

Owns: whether a stream is ordered, and the refusal that holds for its later writes. Does not own why a write is
refused (``arka.tiers``) nor the acks (``arka.flight.acks``).
"""

from __future__ import annotations

from typing import Final

from arka.errors import ArkaError, ErrorCode
from arka.records import TableType

#: Codes of refusals after which the same write may be sent again.
_RETRYABLE: Final = frozenset({ErrorCode.OVERLOADED, ErrorCode.UNAVAILABLE})


class StreamOrder:
    """One stream's order. Used from trio's thread only.

    Invariant: while ``refusal`` is set, the stream is ordered and none of its new writes is accepted.

    Attributes:
        requested: what the stream asked for; None if it did not say.
        refusal: what every later write is refused with; None while writes are taken.
    """

    __slots__ = ("refusal", "requested")

    def __init__(self) -> None:
        self.requested: bool | None = None
        self.refusal: ArkaError | None = None

    def is_ordered(self, table_type: TableType) -> bool:
        """Whether a stream to a table of this type keeps its order across refusals."""
        return table_type is TableType.PRIMARY_KEY if self.requested is None else self.requested

    def note_refused(self, error: ArkaError, table_type: TableType) -> ArkaError:
        """Record that a write was refused; on an ordered stream, a retryable refusal holds for all later writes.

        Returns:
            What the write's client is to be told.
        """
        if error is self.refusal or error.code not in _RETRYABLE or not self.is_ordered(table_type):
            return error
        self.refusal = ArkaError(
            f"{error.detail}. This stream is ordered: every later write of it is refused too, until it says "
            "resume_after_lsn (0 if it was given no LSN) or a new stream is opened",
            code=error.code,
            retryable=True,
        )
        return self.refusal

    def resume(self) -> None:
        """Take writes again: the client has said from where on it sends."""
        self.refusal = None


__all__ = ["StreamOrder"]
