"""Log lines that clients cause, at a bounded rate.

Owns: how many lines of one event are written, and how many were left out since. Does not own what they say.

A connection may cost its client nothing, and a line costs the server disk and time: ten thousand refused connections
are a few lines with a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from arka.rates import Rate

#: Lines of each event: enough to see every connection of a usual day.
LINES: Final = Rate(100, 5.0)


class Lines:
    """Counts the lines of each event. Times are trio's, in seconds."""

    def __init__(self, rate: Rate = LINES) -> None:
        self._rate = rate
        # Tokens as of a time, and lines left out since the last one that was written.
        self._state: dict[str, tuple[float, float, int]] = {}

    def write(self, write: Callable[..., Any], event: str, now: float, **facts: object) -> None:
        """Write a line by ``write(event, **facts)``, or count it as left out; the next one says how many were."""
        tokens, since, left_out = self._state.get(event, (float(self._rate.burst), now, 0))
        tokens = self._rate.tokens(tokens, now - since)
        if tokens < 1:
            self._state[event] = (tokens, now, left_out + 1)
            return
        self._state[event] = (tokens - 1, now, 0)
        if left_out:
            facts["left_out"] = left_out
        write(event, **facts)


__all__ = ["LINES", "Lines"]
