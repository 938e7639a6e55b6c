"""How often a peer may do what costs us more than it costs the peer (T9).

Owns: the kinds, their rates, and the tokens of one connection. Does not own what happens to a flooder: the
connection ends with ENHANCE_YOUR_CALM, or is read more slowly (``arka.flight.connection``), nor the work of one turn
(``arka.flight.turns``).

Source: CVE-2023-44487 (resets received), CVE-2025-8671 (resets caused), CVE-2019-9512, -9515 and -9518
(PING, SETTINGS and empty frames).
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from arka.rates import Rate


class Flood(Enum):
    """What is counted."""

    RESETS_RECEIVED = "resets"
    RESETS_CAUSED = "errors on streams"
    SETTINGS = "SETTINGS frames"
    PING = "PING frames"
    EMPTY_DATA = "DATA frames without payload"
    STRAY_DATA = "DATA frames on streams that are over"
    STRAY_WINDOW = "WINDOW_UPDATE frames on streams that are over"
    OTHER = "PRIORITY, GOAWAY or unknown frames"
    #: Those that begin an RPC and others; a client above its rate waits (T22).
    REQUESTS = "HEADERS frames"


#: How much an honest client may need: gRPC clients cancel calls with RST_STREAM and probe the path with PING;
#: none sends SETTINGS more than a few times, or DATA frames without payload in numbers.
RATES: Final = {
    Flood.RESETS_RECEIVED: Rate(1_000, 100.0),
    Flood.RESETS_CAUSED: Rate(200, 20.0),
    Flood.SETTINGS: Rate(100, 10.0),
    Flood.PING: Rate(1_000, 100.0),
    Flood.EMPTY_DATA: Rate(1_000, 100.0),
    Flood.STRAY_DATA: Rate(10_000, 1_000.0),
    # A client that reads at once may owe one for each of thousands of streams that ended meanwhile.
    Flood.STRAY_WINDOW: Rate(10_000, 5_000.0),
    Flood.OTHER: Rate(5_000, 500.0),
    # As many RPCs as one core can start in a second. The burst is what the stream limit advertises, if that is more.
    Flood.REQUESTS: Rate(1_000, 1_000.0),
}


class FloodGuard:
    """Counts one connection's doings against their rates. Times are trio's, in seconds."""

    def __init__(self, now: float, *, requests: int = 0) -> None:
        """Begin with full buckets.

        Args:
            now: the time.
            requests: how many streams the client was told that it may open: that many may come at once.
        """
        self._rates = {**RATES, Flood.REQUESTS: _at_least(RATES[Flood.REQUESTS], requests)}
        # Invariant: tokens <= burst, and >= 0 but for those of ``take``; tokens as of the paired time.
        self._tokens: Final = {kind: (float(rate.burst), now) for kind, rate in self._rates.items()}

    def allow(self, kind: Flood, now: float) -> bool:
        """Count one; returns whether it was still within its rate."""
        tokens, since = self._tokens[kind]
        tokens = self._rates[kind].tokens(tokens, now - since) - 1
        if tokens < 0:
            return False
        self._tokens[kind] = (tokens, now)
        return True

    def take(self, kind: Flood, now: float) -> None:
        """Count one of a kind that is slowed down and never refused; ``pause`` says by how much."""
        tokens, since = self._tokens[kind]
        self._tokens[kind] = (self._rates[kind].tokens(tokens, now - since) - 1, now)

    def pause(self, kind: Flood, now: float) -> float:
        """Return the seconds to wait until ``kind`` is within its rate; 0 when it is."""
        tokens, since = self._tokens[kind]
        rate = self._rates[kind]
        return max(0.0, -rate.tokens(tokens, now - since) / rate.per_s)


def _at_least(rate: Rate, burst: int) -> Rate:
    """Return ``rate`` with a burst of ``burst`` or more."""
    return Rate(max(rate.burst, burst), rate.per_s)


__all__ = ["RATES", "Flood", "FloodGuard"]
