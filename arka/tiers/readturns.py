"""Whose turn it is to read: few reads run at a time, and peers take turns (T27).

Owns: how many reads run, how many wait, and in which order they get their turn. Does not own what a read does
(``arka.tiers.reads``) nor how fast its client must be (``arka.flight.answers``).

A read that waits holds a place in a queue and nothing else: no frames of the log, no disk, no buffer, no process.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio

from arka.errors import AdmissionRejected, Unavailable

#: The part of all waiting reads that one peer may have.
_PEER_PART: Final = 2


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
            most_waiting: reads that wait, of all peers together; a peer that has none waiting may always have one.
        """
        self._most = most
        self._most_of_peer = max(1, most - 1)
        self._most_waiting = most_waiting
        self._most_waiting_of_peer = max(1, most_waiting // _PEER_PART)
        self._running: Counter[str] = Counter()
        # Reads that were asked for and have no turn yet, those that wait for an LSN among them.
        self._pending: Counter[str] = Counter()
        # Invariant: no queue is empty. The peer that had a turn last comes last.
        self._queues: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        self._closed = ""
        #: How many reads hold a turn and wait for what another one holds.
        self.starved = 0

    @property
    def running(self) -> int:
        """How many reads run."""
        return self._running.total()

    @property
    def pending(self) -> int:
        """How many reads were asked for and have no turn yet."""
        return self._pending.total()

    @property
    def contended(self) -> bool:
        """Whether a read waits for what one that runs holds."""
        return bool(self._queues) or self.starved > 0

    def close(self, reason: str) -> None:
        """Give no turn any more, since the server drains; those that wait for one end."""
        self._closed = reason
        for queue in self._queues.values():
            for waiting in queue:
                waiting.told.set()
        self._queues.clear()

    @contextmanager
    def admit(self, peer: str) -> Iterator[Place]:
        """Let a read wait, until it has its turn or the block ends.

        Args:
            peer: whose it is.

        Raises:
            AdmissionRejected: ``overloaded``: the peer, or all together, have too many waiting.
        """
        mine, all_of_them = self._pending[peer], self._pending.total()
        if mine >= self._most_waiting_of_peer:
            raise AdmissionRejected(
                f"{mine} reads of this client's address wait already, allowed are {self._most_waiting_of_peer} "
                "(half of limits.reads_waiting): retry later"
            )
        if mine and all_of_them >= self._most_waiting:
            raise AdmissionRejected(
                f"{all_of_them} reads wait already, allowed are {self._most_waiting} (limits.reads_waiting): "
                "retry later"
            )
        place = Place(self, peer)
        self._count(self._pending, peer, 1)
        try:
            yield place
        finally:
            place.leave()

    async def take(self, peer: str) -> None:
        """Wait for a turn. Cancellation: there is none.

        Raises:
            Unavailable: the server drains.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._closed and not self._queues.get(peer) and self._may_run(peer):
            self._count(self._running, peer, 1)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        waiting = _Waiting()
        if not self._closed:
            self._queues.setdefault(peer, deque()).append(waiting)
            try:
                await waiting.told.wait()
            except trio.Cancelled:
                if waiting.has_turn:
                    # Given in the same turn of the loop, to a task that was already cancelled.
                    self.give_back(peer)
                else:
                    self._unqueue(peer, waiting)
                raise
        if not waiting.has_turn:
            raise Unavailable(self._closed)

    def give_back(self, peer: str) -> None:
        """End a turn: others that wait get theirs."""
        self._count(self._running, peer, -1)
        if peer in self._queues:
            self._queues.move_to_end(peer)
        while not self._closed and (next_peer := self._next_peer()) is not None:
            queue = self._queues[next_peer]
            waiting = queue.popleft()
            if queue:
                self._queues.move_to_end(next_peer)
            else:
                del self._queues[next_peer]
            self._count(self._running, next_peer, 1)
            waiting.has_turn = True
            waiting.told.set()

    def forget_pending(self, peer: str) -> None:
        """Count a read that has its turn, or gave up, no longer among those that wait."""
        self._count(self._pending, peer, -1)

    def _may_run(self, peer: str) -> bool:
        return self._running.total() < self._most and self._running[peer] < self._most_of_peer

    def _next_peer(self) -> str | None:
        """The peer with the fewest running reads; among equals, the one that has waited longest for a turn."""
        allowed = [peer for peer in self._queues if self._may_run(peer)]
        return min(allowed, key=lambda peer: self._running[peer], default=None)

    def _unqueue(self, peer: str, waiting: _Waiting) -> None:
        queue = self._queues.get(peer)
        if queue is not None and waiting in queue:
            queue.remove(waiting)
            if not queue:
                del self._queues[peer]

    @staticmethod
    def _count(counts: Counter[str], peer: str, change: int) -> None:
        counts[peer] += change
        assert counts[peer] >= 0
        if not counts[peer]:
            # Peers come and go: none is remembered without a read.
            del counts[peer]


class Place:
    """One read's place among those that wait."""

    def __init__(self, turns: ReadTurns, peer: str) -> None:
        self._turns = turns
        self._peer = peer
        self._pending = True

    def leave(self) -> None:
        """Wait no longer; nothing happens at the second call."""
        if self._pending:
            self._pending = False
            self._turns.forget_pending(self._peer)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn and have it for the block.

        Raises:
            Unavailable: the server drains.

        Cancellation: the turn is given back.
        """
        await self._turns.take(self._peer)
        try:
            self.leave()
            yield
        finally:
            self._turns.give_back(self._peer)


__all__ = ["Place", "ReadTurns"]
