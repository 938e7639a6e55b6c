"""The log's clock: for how long processes of this log have been up, all together (R3, R21).

Owns: the time by which keys and lost ranges are kept. Does not own where it is recorded (``arka.tiers.release``).

A wall clock may jump by hours, and then everything that is kept for a day would be forgotten at once. This one
goes on from what the newest checkpoint recorded by the time that really passes, and stands still while nobody runs:
it is never fast, so nothing is forgotten early. Late is no harm: retention is a least time.
"""

from __future__ import annotations

import trio


class LogClock:
    """Microseconds of uptime since the log began, as far as checkpoints remember. Used from trio's thread only."""

    def __init__(self, recorded_us: int) -> None:
        """Go on.

        Args:
            recorded_us: the highest value that any checkpoint has recorded; 0 for none.
        """
        self._recorded_us = recorded_us
        self._started_s = trio.current_time()

    def now_us(self) -> int:
        """Return the time; it never falls."""
        return self._recorded_us + int((trio.current_time() - self._started_s) * 1e6)


__all__ = ["LogClock"]
