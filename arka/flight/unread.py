"""What clients have not read: acks, error texts, handshakes, counted against a share of their own (T26).

Owns: how many such bytes each stream holds, the total of all, and whether a stream holds too many. Does not own the
acks (``arka.flight.acks``) nor what follows when there are too many (``arka.flight.exchange``, T6).

Admission never waits for this share. A stream may hold up to ``STREAM_TIMES`` what all streams leave free, a peer the
same. So one stream alone may have most of it, many streams get equal parts, and what one peer leaves unread is never
all of it. A stream that holds next to nothing is never held back.
"""

from __future__ import annotations

from typing import Final

from arka.options import KIB
from arka.tiers.accounts import Account

#: What an unread ack is charged, in bytes.
ACK_BYTES: Final = 64
#: What each error or handshake costs beside its text, in bytes: objects and a place in a table.
TEXT_OVERHEAD: Final = 192
#: A stream or peer may hold so many times what is free.
STREAM_TIMES: Final = 16
#: What any stream may hold however little is free, in bytes: the acks of 256 writes.
LEAST_BYTES: Final = 16 * KIB
#: Charges are brought up to date in steps of this many bytes: 256 writes.
STEP_BYTES: Final = 16 * KIB


class UnreadShare:
    """The share of all streams of a server. Used from trio's thread only.

    Invariant: ``held_bytes`` is the sum of what the open ``Unread`` are charged.

    Attributes:
        limit_bytes: ``limits.unread_bytes``.
        held_bytes: what is charged now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def exceeds(self, held: int) -> bool:
        """Whether somebody with ``held`` bytes holds more than its part."""
        return held > STREAM_TIMES * (self.limit_bytes - self.held_bytes)


class Unread:
    """What one stream's client has not read.

    Attributes:
        charged: bytes that are charged for it.
        checked: bytes held up to which nothing needs to be looked at again.
    """

    __slots__ = ("_account", "_share", "charged", "checked")

    def __init__(self, share: UnreadShare, account: Account | None) -> None:
        self._share = share
        self._account = None if account is None else account.peer
        self.charged = 0
        self.checked = STEP_BYTES

    def charge(self, held: int) -> None:
        """Bring the charge to ``held`` bytes."""
        more = held - self.charged
        self.charged = held
        self._share.held_bytes += more
        if self._account is not None:
            self._account.unread += more

    @property
    def too_many(self) -> bool:
        """Whether the stream, or its peer, holds more than its part."""
        held, share = self.charged, self._share
        if held <= LEAST_BYTES:
            return False
        return share.exceeds(held) or (self._account is not None and share.exceeds(self._account.unread))

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self.charge(0)


__all__ = ["ACK_BYTES", "LEAST_BYTES", "STEP_BYTES", "TEXT_OVERHEAD", "Unread", "UnreadShare"]
