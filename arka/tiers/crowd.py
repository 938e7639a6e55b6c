"""How many calls wait for something at a time: of one client address, and of all together (T27).

Owns: the counts, and who is refused. Does not own what is waited for. A call that waits costs a task, a timer and what
wakes it, so there must not be as many of them as there may be streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from arka.errors import AdmissionRejected

#: The part of all places that one peer may have.
_PEER_PART: Final = 2


class Crowd:
    """The calls of one kind that wait. Used from trio's thread only."""

    def __init__(self, most: int, what: str, setting: str) -> None:
        """Begin with none.

        Args:
            most: calls that wait, of all peers together; a peer that has none waiting may always have one.
            what: a word for people: what waits.
            setting: where ``most`` comes from.
        """
        self._most = most
        self._most_of_peer = max(1, most // _PEER_PART)
        self._what = what
        self._setting = setting
        self._counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many wait."""
        return self._counts.total()

    @contextmanager
    def admit(self, peer: str) -> Iterator[Place]:
        """Let a call wait until it says otherwise, or the block ends.

        Args:
            peer: whose it is.

        Raises:
            AdmissionRejected: ``overloaded``: the peer, or all together, have too many waiting.
        """
        mine, every = self._counts[peer], self._counts.total()
        if mine >= self._most_of_peer:
            raise AdmissionRejected(
                f"{mine} {self._what} of this client's address wait already, allowed are {self._most_of_peer} (half of "
                f"{self._setting}): retry later"
            )
        if mine and every >= self._most:
            raise AdmissionRejected(
                f"{every} {self._what} wait already, allowed are {self._most} ({self._setting}): retry later"
            )
        place = Place(self._counts, peer)
        try:
            yield place
        finally:
            place.leave()


class Place:
    """One call's place among those that wait."""

    def __init__(self, counts: Counter[str], peer: str) -> None:
        self._counts = counts
        self._peer: str | None = peer
        counts[peer] += 1

    def leave(self) -> None:
        """Wait no longer; nothing happens at the second call."""
        peer, self._peer = self._peer, None
        if peer is not None:
            self._counts[peer] -= 1
            if not self._counts[peer]:
                # Peers come and go: none is remembered without a call.
                del self._counts[peer]


__all__ = ["Crowd", "Place"]
