"""Watermarks: how far a tier has come, as one LSN that only rises.

Owns: the value of each mark and who is told when it rises. Does not own acks: streams derive theirs
from these marks (``arka.flight.acks``), and nobody keeps a future per write.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from arka.errors import InternalError
from arka.records import Tier


@dataclass(frozen=True, slots=True)
class Advance:
    """One rise of a watermark.

    Attributes:
        tier: the tier that rose.
        lsn: everything up to here has reached it.
        timestamp_us: when, in microseconds since the Unix epoch.
        snapshot_id: the Iceberg snapshot that holds it (``iceberg_committed`` only).
        dropped: the columns that the writes in ``(after_lsn, lsn]`` were accepted with and their table no longer has.
        after_lsn: where the tier was before.
    """

    tier: Tier
    lsn: int
    timestamp_us: int
    snapshot_id: int | None = None
    dropped: tuple[str, ...] = ()
    after_lsn: int = 0


Listener = Callable[[Advance], None]


class Bracket(Protocol):
    """What is told before and after all listeners are told of one rise; it must not raise or wait."""

    def begin(self) -> None:
        """Listeners are about to be told."""
        ...

    def end(self) -> None:
        """All of them were told."""
        ...


def now_us() -> int:
    """Return the wall clock in microseconds since the Unix epoch."""
    return time.time_ns() // 1000


class Watermark:
    """One tier's progress. Used from trio's thread only.

    The tier that owns the mark is the only one that calls ``advance``; everybody else reads, waits or
    listens.
    """

    def __init__(self, tier: Tier, lsn: int = 0, snapshot_id: int | None = None) -> None:
        self.tier = tier
        # Invariant: only ever rises, and every promise of the tier holds for all LSNs up to it.
        self._latest = Advance(tier, lsn, now_us(), snapshot_id)
        # A dict, not a set: listeners are told in the order in which they came, the same in each run.
        self._listeners: dict[Listener, None] = {}
        self._risen = trio.Event()
        self._bracket: Bracket | None = None

    @property
    def lsn(self) -> int:
        """The last LSN that has reached the tier."""
        return self._latest.lsn

    @property
    def latest(self) -> Advance:
        """The latest rise."""
        return self._latest

    def advance(self, lsn: int, *, snapshot_id: int | None = None, dropped: tuple[str, ...] = ()) -> None:
        """Raise the mark to ``lsn`` and tell everybody; at the same LSN it does nothing.

        Raises:
            InternalError: ``lsn`` is below the mark; a promise would be taken back.
        """
        if lsn < self._latest.lsn:
            raise InternalError(f"the {self.tier.word} watermark cannot fall from {self._latest.lsn} to {lsn}")
        if lsn == self._latest.lsn:
            return
        self._latest = Advance(self.tier, lsn, now_us(), snapshot_id, dropped, self._latest.lsn)
        risen, self._risen = self._risen, trio.Event()
        risen.set()
        if self._bracket is None:
            self._tell()
            return
        self._bracket.begin()
        try:
            self._tell()
        finally:
            self._bracket.end()

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener(self._latest)

    def tell_in(self, bracket: Bracket) -> None:
        """Call ``bracket`` before and after listeners are told, from now on."""
        self._bracket = bracket

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` at each rise from now on; it must not raise or wait."""
        self._listeners[listener] = None

    def unlisten(self, listener: Listener) -> None:
        """Stop calling ``listener``."""
        self._listeners.pop(listener, None)

    async def wait_reached(self, lsn: int) -> None:
        """Wait until the mark is at ``lsn`` or above. Cancellation: nothing changes."""
        while self._latest.lsn < lsn:
            await self._risen.wait()

    async def wait_risen(self) -> None:
        """Wait for the next rise, whatever its size. Cancellation: nothing changes."""
        await self._risen.wait()


__all__ = ["Advance", "Bracket", "Listener", "Watermark", "now_us"]
