"""Admission by bytes: one ledger that every received byte is charged to before it is invited (R22, T4).

Owns: how many bytes are out, and the order in which waiters are served. Does not own windows, buffers
or streams: a grant is a callback.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from arka.errors import InternalError


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """A ledger at one moment: bytes of the limit, bytes charged, bytes and number of waiting requests."""

    limit_bytes: int
    charged_bytes: int
    waiting_bytes: int
    waiting: int


class Charge:
    """Bytes asked from a ledger: waiting, then granted, then released.

    Whoever holds it calls ``release`` exactly once when the bytes are gone; a second call does nothing.
    """

    __slots__ = ("_ledger", "_on_grant", "amount", "granted")

    def __init__(self, ledger: Ledger, amount: int, on_grant: Callable[[], object] | None) -> None:
        self._ledger: Ledger | None = ledger
        self._on_grant = on_grant
        self.amount = amount
        self.granted = False

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
            The new charge: granted, and released on its own.

        Raises:
            InternalError: this charge is not granted, is released already, or is smaller than ``amount``.
        """
        if self._ledger is None or not self.granted or not 0 <= amount <= self.amount:
            raise InternalError(f"cannot split {amount} bytes off a charge of {self.amount}")
        part = Charge(self._ledger, amount, None)
        part.granted = True
        self.amount -= amount
        return part


class Ledger:
    """A limit on bytes, granted all or nothing, first come first served.

    Not thread-safe: used from trio's thread only. A request larger than the whole limit is granted
    when nothing else is charged, so that no stream waits for ever.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        # Invariant: _charged is the sum of the granted, unreleased charges.
        self._charged = 0
        self._waiting: deque[Charge] = deque()
        self._waiting_bytes = 0

    def request(self, amount: int, on_grant: Callable[[], object] | None = None) -> Charge:
        """Ask for ``amount`` bytes.

        Args:
            amount: bytes, >= 0.
            on_grant: called once when the bytes are granted: before this returns if there is room and
                nobody waits, else from some other holder's ``release``. Must not raise.

        Returns:
            The charge; its ``granted`` says which of the two it was.
        """
        charge = Charge(self, amount, on_grant)
        if not self._waiting and self._fits(amount):
            self._grant(charge)
        else:
            self._waiting.append(charge)
            self._waiting_bytes += amount
        return charge

    def try_request(self, amount: int) -> Charge | None:
        """Ask for ``amount`` bytes now or not at all; never overtakes a waiter."""
        if self._waiting or not self._fits(amount):
            return None
        charge = Charge(self, amount, None)
        self._grant(charge)
        return charge

    def statistics(self) -> LedgerStatistics:
        """Where the ledger stands."""
        return LedgerStatistics(self._limit, self._charged, self._waiting_bytes, len(self._waiting))

    def _fits(self, amount: int) -> bool:
        return self._charged + amount <= self._limit or self._charged == 0

    def _grant(self, charge: Charge) -> None:
        charge.granted = True
        self._charged += charge.amount
        on_grant, charge._on_grant = charge._on_grant, None
        if on_grant is not None:
            on_grant()

    def _release(self, charge: Charge) -> None:
        if charge.granted:
            self._charged -= charge.amount
            if self._charged < 0:
                raise InternalError(f"ledger released {-self._charged} bytes more than were charged")
        else:
            self._waiting.remove(charge)
            self._waiting_bytes -= charge.amount
        while self._waiting and self._fits(self._waiting[0].amount):
            first = self._waiting.popleft()
            self._waiting_bytes -= first.amount
            self._grant(first)


__all__ = ["Charge", "Ledger", "LedgerStatistics"]
