"""Memory for what batches decode to (T14, T26).

Owns: how many bytes decoded batches have together, and whose turn it is. Does not own messages as they came
(``arka.tiers.admission``) nor how much a batch needs (``arka.flight.decode``).

A message of 5 kB may decode to ``limits.batch_bytes``. It is charged with its wire bytes when it comes, so the rest is
found here before anything is decoded, and held until the frame is on disk. Who waits here holds a message's wire bytes;
what is held here is given back by threads and by the disk, which wait for neither. So nobody waits in a circle.

Peers take turns. Small batches have a part of their own, so that none waits behind another client's large one.
"""

from __future__ import annotations

from typing import Final

import trio

from arka.errors import InternalError
from arka.options import MIB
from arka.roundrobin import RoundRobin

#: The parts of ``limits.memory_bytes`` for large and for small batches.
_LARGE_PART: Final = 3 / 16
_SMALL_PART: Final = 1 / 16
#: Most bytes that decoding a small batch takes.
SMALL_BYTES: Final = MIB


class _Part:
    """So many bytes, and who waits for some of them."""

    __slots__ = ("limit", "used", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.waiting: RoundRobin[Held] = RoundRobin()

    def fits(self, size: int) -> bool:
        """Whether so many bytes are free; all that there is makes room for one batch, however large."""
        return self.used == 0 or self.used + size <= self.limit

    def free(self, size: int) -> None:
        """Take bytes back, and give them to those whose turn it is."""
        self.used -= size
        if self.used < 0:
            raise InternalError(f"{-self.used} bytes more of decoded batches were given back than were taken")
        while self.waiting:
            peer = next(self.waiting.peers)
            first = self.waiting.first(peer)
            if not self.fits(first.size):
                return
            self.waiting.take(peer)
            self.used += first.size
            first.granted.set()


class Held:
    """Room for one batch. Whoever has it calls ``release`` when the bytes are gone; a second call does nothing."""

    __slots__ = ("_part", "granted", "size")

    def __init__(self, part: _Part, size: int) -> None:
        self._part: _Part | None = part
        self.size = size
        self.granted = trio.Event()

    def shrink(self, size: int) -> None:
        """Keep ``size`` bytes at most, and give back the rest."""
        part = self._part
        if part is not None and size < self.size:
            rest, self.size = self.size - size, size
            part.free(rest)

    def release(self) -> None:
        """Give all of it back."""
        part, self._part = self._part, None
        if part is not None:
            part.free(self.size)


class DecodeRoom:
    """The memory for decoded batches of all clients. Used from trio's thread only."""

    def __init__(self, memory_bytes: int) -> None:
        """Begin with all of it free.

        Args:
            memory_bytes: ``limits.memory_bytes``, of which this is a part.
        """
        self._large = _Part(int(memory_bytes * _LARGE_PART))
        self._small = _Part(int(memory_bytes * _SMALL_PART))

    @property
    def limit_bytes(self) -> int:
        """Bytes of all batches together, which the ledger leaves free."""
        return self._large.limit + self._small.limit

    @property
    def used_bytes(self) -> int:
        """Bytes that are held now."""
        return self._large.used + self._small.used

    @property
    def waiting(self) -> int:
        """How many batches wait."""
        return len(self._large.waiting) + len(self._small.waiting)

    def try_take(self, size: int) -> Held | None:
        """Take room now or not at all; overtakes nobody."""
        part = self._part(size)
        if part.waiting or not part.fits(size):
            return None
        part.used += size
        return Held(part, size)

    async def take(self, peer: str, size: int) -> Held:
        """Wait for room.

        Args:
            peer: the client's address.
            size: bytes; more than there are is granted alone.

        Cancellation: nothing is held.
        """
        held = self.try_take(size)
        if held is not None:
            return held
        part = self._part(size)
        held = Held(part, size)
        part.waiting.add(peer, held)
        try:
            await held.granted.wait()
        except trio.Cancelled:
            if held.granted.is_set():
                held.release()
            else:
                part.waiting.remove(peer, held)
                part.free(0)
            raise
        return held

    def _part(self, size: int) -> _Part:
        return self._small if size <= SMALL_BYTES else self._large


__all__ = ["SMALL_BYTES", "DecodeRoom", "Held"]
