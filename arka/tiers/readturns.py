"""Whose turn it is to read: few reads run at a time, and peers take turns (T27).

Owns: how many reads run, and in which order they get their turn. Does not own how many wait (``arka.tiers.crowd``),
what a read does (``arka.tiers.reads``) nor how fast its client must be (``arka.flight.answers``).

A read that waits holds a place in a queue and nothing else: no frames of the log, no disk, no buffer, no process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from arka.errors import Unavailable
from arka.roundrobin import RoundRobin
from arka.tiers.crowd import Crowd, Place


class _Waiting:
    """A read in a queue.

    Attributes:
        told: it has its turn, or will have none.
        has_turn: which of the two.
    """

    __slots__ = ("has_turn", "told")

    def __init__(self) -> None:
        self.told = trio.Event()
        self.has_turn = False


class ReadTurns:
    """The turns of all reads. Used from trio's thread only.

    Invariant: at most ``most`` reads run, and ``most - 1`` of one peer where ``most`` is above 1. A read waits only
    while its peer, or the server, has as many running as it may.
    """

    def __init__(self, most: int, most_waiting: int) -> None:
        """Begin with none.

        Args:
            most: reads that run at a time (``limits.reads``).
            most_waiting: see ``Crowd``.
        """
        self._most = most
        self._most_of_peer = max(1, most - 1)
        self._running: Counter[str] = Counter()
        self._waiting: RoundRobin[_Waiting] = RoundRobin()
        self._closed = ""
        #: Reads that were asked for and have no turn yet, those that wait for an LSN among them.
        self.pending = Crowd(most_waiting, "reads", "limits.reads_waiting")
        #: How many reads hold a turn and wait for what another one holds.
        self.starved = 0

    @property
    def running(self) -> int:
        """How many reads run."""
        return self._running.total()

    def is_contended(self, peer: str) -> bool:
        """Whether a read waits that could run if one of this peer's ended."""
        return self.starved > 0 or any(
            waiting == peer or self._running[waiting] < self._most_of_peer for waiting in self._waiting.peers
        )

    def close(self, reason: str) -> None:
        """Give no turn any more, since the server drains; those that wait for one end."""
        self._closed = reason
        for waiting in self._waiting.take_all():
            waiting.told.set()

    @asynccontextmanager
    async def turn(self, peer: str, place: Place) -> AsyncIterator[None]:
        """Wait for a turn and have it for the block.

        Args:
            peer: whose read it is.
            place: the read's among those that wait; it is left.

        Raises:
            Unavailable: the server drains.

        Cancellation: the turn is given back.
        """
        await self._take(peer)
        try:
            place.leave()
            yield
        finally:
            self._give_back(peer)

    async def _take(self, peer: str) -> None:
        """Wait for a turn. Cancellation: there is none.

        Raises:
            Unavailable: the server drains.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._closed and peer not in self._waiting and self._may_run(peer):
            self._count(self._running, peer, 1)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        waiting = _Waiting()
        if not self._closed:
            self._waiting.add(peer, waiting)
            try:
                await waiting.told.wait()
            except trio.Cancelled:
                if waiting.has_turn:
                    # Given in the same turn of the loop, to a task that was already cancelled.
                    self._give_back(peer)
                elif not self._closed:
                    self._waiting.remove(peer, waiting)
                raise
        if not waiting.has_turn:
            raise Unavailable(self._closed)

    def _give_back(self, peer: str) -> None:
        """End a turn: others that wait get theirs."""
        self._count(self._running, peer, -1)
        self._waiting.put_last(peer)
        while not self._closed and (next_peer := self._next_peer()) is not None:
            waiting = self._waiting.take(next_peer)
            self._count(self._running, next_peer, 1)
            waiting.has_turn = True
            waiting.told.set()

    def _may_run(self, peer: str) -> bool:
        return self._running.total() < self._most and self._running[peer] < self._most_of_peer

    def _next_peer(self) -> str | None:
        """The peer with the fewest running reads; among equals, the one that has waited longest for a turn."""
        allowed = [peer for peer in self._waiting.peers if self._may_run(peer)]
        return min(allowed, key=lambda peer: self._running[peer], default=None)

    @staticmethod
    def _count(counts: Counter[str], peer: str, change: int) -> None:
        counts[peer] += change
        assert counts[peer] >= 0
        if not counts[peer]:
            # Peers come and go: none is remembered without a read.
            del counts[peer]


__all__ = ["ReadTurns"]
