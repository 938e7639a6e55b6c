"""Rounds: many streams are told of one thing, and each connection writes once, when the last of them was told.

Owns: which connections have something due meanwhile. Does not own what they write (``arka.flight.connection``).

A tier that rises may have acks for a hundred streams of one connection. Woken by the first of them, the connection's
writer would run a turn of the loop later; at the end of the round it need not run at all. The tier goes on behind that,
so only some connections write at once.
"""

from __future__ import annotations

from typing import Final, Protocol

#: Connections that write before the tier goes on; the others' writers do it later.
AT_ONCE: Final = 16


class Member(Protocol):
    """A connection."""

    def write_due(self, *, at_once: bool) -> None:
        """Write what is due as far as it goes without waiting, or leave all of it to the writer; must not raise."""
        ...


class Round:
    """``begin``, everybody is told, ``end``. Used from trio's thread only."""

    def __init__(self) -> None:
        # In the order in which they joined; None while no round is on.
        self._members: dict[Member, None] | None = None

    def begin(self) -> None:
        """From here on whoever has something due may join; within a round nothing changes."""
        if self._members is None:
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
        for number, member in enumerate(members or ()):
            member.write_due(at_once=number < AT_ONCE)


__all__ = ["AT_ONCE", "Member", "Round"]
