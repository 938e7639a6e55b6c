"""Which connections are open, whose they are, and which one ends to make room (R31).

Owns: the count of all connections and of each address, the order in which they became idle, and who gets a place while
there are few. Does not own connections (``arka.flight.connection``), how one is refused (``arka.flight.http2``) nor
descriptors (``arka.storage.descriptors``).

A connection without RPCs is idle, whether it has shaken hands or not. gRPC clients open another when they need it, so
an idle one ends where there is no place. An address with more than its share makes room by its own idle connections.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Protocol

#: Idle connections that are told to end and still have a descriptor; more than these and newcomers are refused.
ENDING_MOST: Final = 64
#: The part of all places that only addresses within their share get.
_KEPT_PART: Final = 8


class Member(Protocol):
    """A connection."""

    def end_idle(self) -> None:
        """End, since another connection needs the place; must not raise or wait."""
        ...


class OpenConnections:
    """The open connections of a server. Used from trio's thread only."""

    def __init__(self, limit: int, share: float) -> None:
        """Begin without connections.

        Args:
            limit: most connections.
            share: the part of them that one address may have while there are few places.
        """
        self._limit = limit
        self._share = max(1, int(limit * share))
        self._kept = limit // _KEPT_PART
        # Invariant: each member is in here from ``add`` to ``remove``, with its address.
        self._members: dict[Member, str] = {}
        # Invariant: of those, the ones without RPCs that were not told to end; the longest idle first.
        self._idle: OrderedDict[Member, None] = OrderedDict()
        self._idle_of: dict[str, OrderedDict[Member, None]] = {}
        # Members that were told to end.
        self._ending: set[Member] = set()
        # Invariant: members of each address that were not told to end; addresses with more than the share.
        self._count: dict[str, int] = {}
        self._over: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._members)

    def make_room(self, address: str) -> bool:
        """Say whether one more connection of ``address`` may be served, and end an idle one for it if it takes that."""
        free = self._limit - len(self._members) + len(self._ending)
        within = self._count.get(address, 0) < self._share
        if free > 0 and (within or free > self._kept):
            return True
        if len(self._ending) >= ENDING_MOST:
            return False
        victim = self._longest_idle(address, within=within)
        if victim is None:
            return False
        self._ending.add(victim)
        self._set_idle(victim, False)
        self._change(self._members[victim], -1)
        victim.end_idle()
        return True

    def add(self, member: Member, address: str) -> None:
        """Count a connection; it is idle."""
        self._members[member] = address
        self._change(address, 1)
        self._set_idle(member, True)

    def set_busy(self, member: Member, busy: bool) -> None:
        """Take note of a connection's first RPC, or of the end of its last one."""
        if member in self._members and member not in self._ending:
            self._set_idle(member, not busy)

    def remove(self, member: Member) -> None:
        """Count a connection no more; its descriptor is about to be closed."""
        self._set_idle(member, False)
        address = self._members.pop(member)
        if member in self._ending:
            self._ending.remove(member)
        else:
            self._change(address, -1)
        assert len(self._idle) <= len(self._members)

    def _longest_idle(self, address: str, *, within: bool) -> Member | None:
        """Choose which connection ends for one of ``address``."""
        # At most 1 / share addresses have more than their share.
        for whose in self._over if within else (address,):
            for member in self._idle_of.get(whose, ()):
                return member
        return next(iter(self._idle), None) if within else None

    def _set_idle(self, member: Member, idle: bool) -> None:
        address = self._members[member]
        if idle:
            self._idle[member] = None
            self._idle_of.setdefault(address, OrderedDict())[member] = None
        elif member in self._idle:
            del self._idle[member]
            idle_of = self._idle_of[address]
            del idle_of[member]
            if not idle_of:
                del self._idle_of[address]

    def _change(self, address: str, by: int) -> None:
        count = self._count.get(address, 0) + by
        if count:
            self._count[address] = count
        else:
            del self._count[address]
        if count > self._share:
            self._over[address] = None
        else:
            self._over.pop(address, None)


__all__ = ["ENDING_MOST", "OpenConnections"]
