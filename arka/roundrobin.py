"""Things that wait, by peer; the peers are served in turn.

Owns: the order. Does not own what waits, nor when the next may go (``arka.storage.threads``, ``arka.tiers.readturns``,
``arka.flight.turns``).

Within a peer the first to come is the first to go. A peer that was served is the last of the peers from then on, so a
thousand things of one peer delay another peer by one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class RoundRobin(Generic[T]):
    """A queue for each peer. Used from one thread."""

    __slots__ = ("_queues",)

    def __init__(self) -> None:
        # Invariant: no queue is empty. The peer whose turn is next comes first.
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __contains__(self, peer: str) -> bool:
        return peer in self._queues

    @property
    def peers(self) -> Iterator[str]:
        """The peers that wait, in the order of their turns."""
        return iter(self._queues)

    def add(self, peer: str, item: T) -> None:
        """Let something wait behind what waits of its peer."""
        self._queues.setdefault(peer, deque()).append(item)

    def remove(self, peer: str, item: T) -> None:
        """Let something that waits do so no longer."""
        queue = self._queues[peer]
        queue.remove(item)
        if not queue:
            del self._queues[peer]

    def first(self, peer: str) -> T:
        """The first of a peer that waits; it stays."""
        return self._queues[peer][0]

    def take(self, peer: str | None = None) -> T:
        """Take the first of a peer, which is the last of the peers from then on.

        Args:
            peer: one that waits; None for the one whose turn it is.
        """
        if peer is None:
            peer = next(iter(self._queues))
        queue = self._queues[peer]
        item = queue.popleft()
        if queue:
            self._queues.move_to_end(peer)
        else:
            del self._queues[peer]
        return item

    def put_last(self, peer: str) -> None:
        """Count a peer as served just now; one that does not wait has no turn to lose."""
        if peer in self._queues:
            self._queues.move_to_end(peer)

    def take_all(self) -> list[T]:
        """Take everything."""
        queues, self._queues = self._queues, OrderedDict()
        return [item for queue in queues.values() for item in queue]


__all__ = ["RoundRobin"]
