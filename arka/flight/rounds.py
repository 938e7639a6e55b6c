"""Rounds: many streams are told of one thing, and each connection writes once, when the last of them was told.

Owns: which connections have something due meanwhile. Does not own what they write (``arka.flight.connection``).

A tier that rises may have acks for a hundred streams of one connection. Woken by the first of them, the connection's
writer would run a turn of the loop later; at the end of the round it need not run at all.
"""

from __future__ import annotations

from typing import Protocol


class Member(Protocol):
    """A connection."""

    def write_due(self) -> None:
        """Write what is due as far as it goes without waiting; must not raise."""
        ...


class Round:
    """``begin``, everybody is told, ``end``. Used from trio's thread only."""

    def __init__(self) -> None:
        # In the order in which they joined; None while no round is on.
        self._members: dict[Member, None] | None = None

    def begin(self) -> None:
        """From here on whoever has something due may join."""
        self._members = {}

    def join(self, member: Member) -> bool:
        """Be asked to write at the end of the round; returns whether there is one."""
        if self._members is None:
            return False
        self._members[member] = None
        return True

    def end(self) -> None:
        """Let all who joined write."""
        members, self._members = self._members, None
        for member in members or ():
            member.write_due()


__all__ = ["Member", "Round"]
