"""When a connection has been silent, idle or unfinished for too long. A clock without a clock: times go in.

Owns: the handshake, keepalive and idle deadlines of one connection. Does not own what is done about them
(``arka.flight.connection``) nor deadlines of RPCs.
"""

from __future__ import annotations

from enum import Enum

from arka.options import Limits


class Due(Enum):
    """What a connection's time has come for."""

    NOTHING = "nothing"
    #: the preface and SETTINGS did not come in ``limits.handshake_s``
    HANDSHAKE = "handshake"
    #: nothing came for ``limits.keepalive_s``: ask with a PING
    PING = "ping"
    #: the PING was not answered, nor anything else sent, for ``limits.keepalive_timeout_s``
    SILENT = "silent"
    #: no RPC for ``limits.idle_s``
    IDLE = "idle"


class Deadlines:
    """The deadlines of one connection. All times are trio's, in seconds."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._handshake_at: float | None = now + limits.handshake_s
        self._heard_at = now
        self._pinged_at: float | None = None
        self._idle_since: float | None = now

    def heard(self, now: float) -> None:
        """Note that bytes have come."""
        self._heard_at = now
        self._pinged_at = None

    def shook_hands(self) -> None:
        """Note that the peer's SETTINGS have come."""
        self._handshake_at = None

    def set_busy(self, busy: bool, now: float) -> None:
        """Note that there are RPCs, or none any more."""
        self._idle_since = None if busy else now

    def next_at(self, now: float) -> float:
        """The earliest time at which ``due`` can say anything new, whatever happens until then."""
        idle_since = now if self._idle_since is None else self._idle_since
        at = min(idle_since + self._limits.idle_s, self._silent_at())
        return at if self._handshake_at is None else min(at, self._handshake_at)

    def due(self, now: float) -> Due:
        """Say what it is time for; a PING is said once."""
        if self._handshake_at is not None and now >= self._handshake_at:
            return Due.HANDSHAKE
        if now >= self._silent_at():
            if self._pinged_at is not None:
                return Due.SILENT
            self._pinged_at = now
            return Due.PING
        if self._idle_since is not None and now >= self._idle_since + self._limits.idle_s:
            return Due.IDLE
        return Due.NOTHING

    def _silent_at(self) -> float:
        if self._pinged_at is None:
            return self._heard_at + self._limits.keepalive_s
        return self._pinged_at + self._limits.keepalive_timeout_s


__all__ = ["Deadlines", "Due"]
