"""Admission by bytes: one ledger that every byte held for a client is charged to (R22, T4, T25, T26).

Owns: how many bytes are out and for what, and when a request is granted. Does not own the order of those that wait
(``arka.tiers.accounts``), windows, buffers or streams: a grant is a callback.

What is charged, and who waits for it:

- messages wait, in the order of ``accounts``, and hold nothing of a message meanwhile;
- messages up to 64 KiB may also draw on a part of their own, one of each stream at a time, first come first served;
- initial windows and what is kept for as long as a stream lasts (schemas, dictionaries, answers) are taken or refused
  at once, since who waits for those would wait while holding others;
- what batches decode to has a part of its own, which is left free here (``arka.tiers.decoderoom``);
- what clients have not read has a share beside all this, which admission never waits for (``arka.flight.unread``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from arka.errors import AdmissionRejected, InternalError
from arka.options import KIB, Limits
from arka.tiers.accounts import NO_SHARE, Account, Turns

#: Messages up to this size may draw on the part of the ledger for small ones (T25).
SMALL_BYTES: Final = 64 * KIB
#: Parts of a server's ledger: for small messages; what windows have for certain; the most that they may have; and the
#: most that is kept. A quarter of the ledger is left for messages at least; one that is larger goes alone.
_SMALL_PART: Final = 8
_FLOOR_PART: Final = 8
_WINDOW_PART: Final = 4
_KEPT_PART: Final = 8
#: One peer may have so many times what it leaves of what is refused at once: three quarters if it is alone.
_PEER_TIMES: Final = 3


class Kind(Enum):
    """What bytes are charged for."""

    MESSAGE = "message"
    SMALL = "small"
    AHEAD = "ahead"
    WINDOW = "window"
    KEPT = "kept"


_MESSAGE: Final = Kind.MESSAGE


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """A ledger at one moment, in bytes, with the number of waiting requests; ``charged_bytes`` sums up all kinds."""

    limit_bytes: int
    charged_bytes: int
    waiting_bytes: int
    waiting: int
    message_bytes: int = 0
    small_bytes: int = 0
    ahead_bytes: int = 0
    window_bytes: int = 0
    kept_bytes: int = 0
    peers: int = 0


class Charge:
    """Bytes asked from a ledger: waiting, then granted, then released.

    Whoever holds it calls ``release`` exactly once when the bytes are gone; a second call does nothing.
    """

    __slots__ = ("_ledger", "_on_grant", "account", "amount", "granted", "kind")

    def __init__(
        self, ledger: Ledger, account: Account, amount: int, on_grant: Callable[[], object] | None, kind: Kind
    ) -> None:
        self._ledger: Ledger | None = ledger
        self._on_grant = on_grant
        self.account = account
        self.amount = amount
        self.kind = kind
        self.granted = False

    @property
    def withdrawn(self) -> bool:
        """Whether it was released while it waited: its stream's queue forgets it later."""
        return self._ledger is None

    def release(self) -> None:
        """Give the bytes back; withdraws the request if it still waits."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger._release(self)

    def split(self, amount: int) -> Charge:
        """Carve a granted charge in two.

        Args:
            amount: bytes for the new charge, at most this one's; this one keeps the rest.

        Returns:
            The new charge: granted, and released on its own. Of window ahead it is the message that it was for.

        Raises:
            InternalError: this charge is not granted, is released already, or is smaller than ``amount``.
        """
        ledger = self._ledger
        if ledger is None or not self.granted or not 0 <= amount <= self.amount:
            raise InternalError(f"cannot split {amount} bytes off a charge of {self.amount}")
        part = Charge(ledger, self.account, amount, None, self.kind)
        part.granted = True
        self.amount -= amount
        if self.kind is Kind.AHEAD:
            ledger._use_ahead(part)
        return part


class Ledger:
    """A limit on bytes, granted all or nothing, in a fair order of peers, connections and streams.

    Not thread-safe: used from trio's thread only. A request larger than the whole limit is granted when no message is
    charged, so that no stream waits for ever.

    Invariant: what is charged of each kind is the sum of the granted, unreleased charges of that kind.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        small_bytes: int = 0,
        floor_bytes: int = 0,
        decoded_bytes: int = 0,
        shares: tuple[float, float, float] = (NO_SHARE, NO_SHARE, NO_SHARE),
    ) -> None:
        """Begin with nothing charged.

        Args:
            limit_bytes: of all kinds together.
            small_bytes: the part for small messages.
            floor_bytes: what is left free for initial windows. With 0 the limit alone bounds windows, and
                nothing is left free for what is kept.
            decoded_bytes: what is left free for decoded batches (``arka.tiers.decoderoom``).
            shares: most bytes of messages that a stream, a connection and a peer may hold while others wait.
        """
        self._limit = limit_bytes
        self._kept_limit = limit_bytes // _KEPT_PART
        # What messages, windows and what is ahead have together.
        self._room = limit_bytes - small_bytes - decoded_bytes - (self._kept_limit if floor_bytes else 0)
        self._small_limit = small_bytes
        self._floor = floor_bytes
        self._window_limit = limit_bytes // _WINDOW_PART if floor_bytes else limit_bytes
        self._stream_share, self._connection_share, self._peer_share = shares
        self._messages = self._small = self._ahead = self._windows = self._kept = 0
        self._waiting_bytes = 0
        self._root = Account(None)
        self._turns = Turns(self._root)
        self._peers: dict[str, Account] = {}
        # Who asks without a stream's account.
        self._anonymous = Account(Account(Account(self._root)), leaf=True)
        # Streams whose first request is small and may draw on the part for small ones, first come first served.
        self._offered: deque[Account] = deque()

    @classmethod
    def of(cls, limits: Limits, decoded_bytes: int = 0) -> Ledger:
        """Make a server's ledger, which leaves ``decoded_bytes`` free for decoded batches."""
        total = limits.memory_bytes
        shares = (limits.stream_share, limits.connection_share, limits.peer_share)
        return cls(
            total,
            small_bytes=total // _SMALL_PART,
            floor_bytes=total // _FLOOR_PART,
            decoded_bytes=decoded_bytes,
            shares=(total * shares[0], total * shares[1], total * shares[2]),
        )

    # -- accounts ---------------------------------------------------------------------------------

    def open_connection(self, peer: str) -> Account:
        """Open an account for a connection of ``peer``, which is an address without its port."""
        above = self._peers.get(peer)
        if above is None:
            above = self._peers[peer] = Account(self._root, self._peer_share, name=peer)
        above.members += 1
        return Account(above, self._connection_share)

    def close_connection(self, connection: Account) -> None:
        """Forget a connection. Its peer is remembered for as long as anything is charged to it."""
        connection.peer.members -= 1
        self._forget(connection.peer)

    def open_stream(self, connection: Account) -> Account:
        """Open an account for a stream; it needs no closing."""
        return Account(connection, self._stream_share, leaf=True)

    def others_wait(self, stream: Account | None) -> bool:
        """Whether a request of another stream than this one waits."""
        waiting = self._root.waiting
        return waiting > 0 and (stream is None or waiting > stream.waiting)

    # -- messages ---------------------------------------------------------------------------------

    def request(
        self, amount: int, on_grant: Callable[[], object] | None = None, account: Account | None = None
    ) -> Charge:
        """Ask for the ``amount`` bytes of a message.

        Args:
            amount: bytes, >= 0.
            on_grant: called once when the bytes are granted: before this returns if there is room and
                nobody waits, else from some other holder's ``release``. Must not raise.
            account: the stream's.

        Returns:
            The charge; its ``granted`` says which of the two it was.
        """
        account = account or self._anonymous
        charge = Charge(self, account, amount, on_grant, Kind.MESSAGE)
        if not self._grant_now(charge):
            self._turns.push(account, charge)
            self._waiting_bytes += amount
            self._offer(account)
            # It may be within its share while those that wait are not.
            self._serve()
        return charge

    def try_request(self, amount: int, account: Account | None = None) -> Charge | None:
        """Ask for the bytes of a message now or not at all; never overtakes a waiter."""
        charge = Charge(self, account or self._anonymous, amount, None, _MESSAGE)
        return charge if self._grant_now(charge) else None

    def try_ahead(self, amount: int, account: Account | None = None) -> Charge | None:
        """Take bytes for messages that have not begun, if that makes nobody wait."""
        account = account or self._anonymous
        if self._root.waiting or not self._fits(amount):
            return None
        charge = Charge(self, account, amount, None, Kind.AHEAD)
        charge.granted = True
        self._ahead += amount
        account.peer.ahead += amount
        return charge

    # -- what never waits -------------------------------------------------------------------------

    def take_window(self, amount: int, account: Account | None = None) -> Charge:
        """Take a stream's initial window.

        Raises:
            AdmissionRejected: ``overloaded``: windows have their part of the ledger, or the peer its part of that.
        """
        account = account or self._anonymous
        peer, windows = account.peer, self._windows + amount
        most = _PEER_TIMES * (self._window_limit - windows) if self._floor else self._window_limit
        over = windows > self._window_limit or peer.windows + amount > most
        if over or (0 < self._floor < windows and not self._fits(amount)):
            raise AdmissionRejected(
                f"The streams that are open have windows of {self._windows} bytes, {peer.windows} of them this "
                f"client's, and limits.memory_bytes has no room for more: close some, or retry later"
            )
        self._windows = windows
        peer.windows += amount
        return self._taken(Charge(self, account, amount, None, Kind.WINDOW))

    def keep(self, amount: int, account: Account | None = None, what: str = "bytes") -> Charge:
        """Take bytes that are held for as long as a stream wants: a schema, a dictionary, an answer.

        Raises:
            AdmissionRejected: ``overloaded``: what is kept has its part of the ledger, or the peer its part of that.
        """
        account = account or self._anonymous
        peer, kept = account.peer, self._kept + amount
        if kept > self._kept_limit or peer.kept + amount > _PEER_TIMES * (self._kept_limit - kept):
            raise AdmissionRejected(
                f"No room to keep {amount} bytes of {what}: {self._kept} of {self._kept_limit} are taken, "
                f"{peer.kept} by this client (limits.memory_bytes): retry later"
            )
        self._kept = kept
        peer.kept += amount
        return self._taken(Charge(self, account, amount, None, Kind.KEPT))

    def statistics(self) -> LedgerStatistics:
        """Where the ledger stands."""
        return LedgerStatistics(
            self._limit,
            self._messages + self._small + self._ahead + self._windows + self._kept,
            self._waiting_bytes,
            self._root.waiting,
            self._messages,
            self._small,
            self._ahead,
            self._windows,
            self._kept,
            len(self._peers),
        )

    # -- granting ---------------------------------------------------------------------------------

    def _fits(self, amount: int) -> bool:
        windows = self._windows
        if windows < self._floor:
            windows = self._floor
        return self._messages + self._ahead + windows + amount <= self._room

    def _fits_small(self, charge: Charge) -> bool:
        return charge.amount <= SMALL_BYTES and self._small + charge.amount <= self._small_limit

    def _grant_now(self, charge: Charge) -> bool:
        """Grant a request that need not wait; returns whether it did."""
        account = charge.account
        # Every message comes by here: the levels are written out, and no call is made for one that need not wait.
        if not self._root.waiting and (self._messages == 0 or self._fits(charge.amount)):
            amount = charge.amount
            self._messages += amount
            account.charged += amount
            connection = account.parent
            connection.charged += amount  # type: ignore[union-attr]
            connection.parent.charged += amount  # type: ignore[union-attr]
            if charge._on_grant is None:
                charge.granted = True
                return True
        elif not (account.waiting or account.small or self._offered) and self._fits_small(charge):
            self._grant_small(charge)
        else:
            return False
        self._grant(charge)
        return True

    def _grant_small(self, charge: Charge) -> None:
        charge.kind = Kind.SMALL
        charge.account.small = True
        self._small += charge.amount

    def _taken(self, charge: Charge) -> Charge:
        charge.granted = True
        return charge

    def _grant(self, charge: Charge) -> None:
        charge.granted = True
        on_grant, charge._on_grant = charge._on_grant, None
        if on_grant is not None:
            on_grant()

    def _use_ahead(self, part: Charge) -> None:
        """Count a part of what was taken ahead as the message that has come."""
        part.kind = Kind.MESSAGE
        self._ahead -= part.amount
        part.account.peer.ahead -= part.amount
        self._messages += part.amount
        self._turns.charge(part.account, part.amount)

    def _release(self, charge: Charge) -> None:
        account, amount = charge.account, charge.amount
        if not charge.granted:
            self._waiting_bytes -= amount
            self._turns.withdraw(account)
            self._offer(account)
        elif charge.kind is _MESSAGE:
            if self._messages < amount:
                raise InternalError(f"the ledger released {amount - self._messages} bytes more than were charged")
            self._messages -= amount
            if not self._root.waiting:
                # As in `_grant_now`: nobody is beyond its share while nobody waits.
                account.charged -= amount
                connection = account.parent
                connection.charged -= amount  # type: ignore[union-attr]
                peer = connection.parent  # type: ignore[union-attr]
                peer.charged -= amount  # type: ignore[union-attr]
                if not peer.members:  # type: ignore[union-attr]
                    self._forget(peer)  # type: ignore[arg-type]
                return
            self._turns.discharge(account, amount)
        elif charge.kind is Kind.SMALL:
            self._small = self._less(self._small, amount)
            account.small = False
            self._offer(account)
        elif charge.kind is Kind.AHEAD:
            self._ahead = self._less(self._ahead, amount)
            account.peer.ahead -= amount
        elif charge.kind is Kind.WINDOW:
            self._windows = self._less(self._windows, amount)
            account.peer.windows -= amount
        else:
            self._kept = self._less(self._kept, amount)
            account.peer.kept -= amount
        if self._root.waiting:
            self._serve()
        peer = account.peer
        if not peer.members:
            self._forget(peer)

    def _less(self, held: int, amount: int) -> int:
        if held < amount:
            raise InternalError(f"the ledger released {amount - held} bytes more than were charged")
        return held - amount

    def _offer(self, account: Account) -> None:
        """Let a stream whose first request is small stand in the queue for the small ones' part."""
        if account.offered or account.small or not account.waiting or not self._small_limit:
            return
        first = self._turns.head(account)
        if first is not None and first.amount <= SMALL_BYTES:
            account.offered = True
            self._offered.append(account)

    def _serve(self) -> None:
        """Grant what there is room for, in order."""
        turns = self._turns
        while self._offered:
            stream = self._offered[0]
            first = turns.head(stream)
            if first is not None and first.amount <= SMALL_BYTES and not stream.small:
                assert isinstance(first, Charge)
                if not self._fits_small(first):
                    break
                self._offered.popleft()
                stream.offered = False
                turns.take(stream, served=False)
                self._waiting_bytes -= first.amount
                self._grant_small(first)
                self._grant(first)
            else:
                self._offered.popleft()
                stream.offered = False
        while (chosen := turns.next()) is not None:
            first = turns.head(chosen)
            assert isinstance(first, Charge)
            if self._messages and not self._fits(first.amount):
                return
            turns.take(chosen, served=True)
            self._waiting_bytes -= first.amount
            self._messages += first.amount
            self._offer(chosen)
            self._grant(first)

    def _forget(self, peer: Account) -> None:
        """Forget a peer without connections that holds nothing: who comes back while it does finds its account."""
        if self._peers.get(peer.name) is peer and not (
            peer.members or peer.charged or peer.waiting or peer.ahead or peer.windows or peer.kept or peer.unread
        ):
            del self._peers[peer.name]


__all__ = ["SMALL_BYTES", "Charge", "Kind", "Ledger", "LedgerStatistics"]
