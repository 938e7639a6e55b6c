"""Token buckets: how many at once, and how many each second after that.

Owns: the formula. Does not own what is counted, nor where a bucket's state is kept.
"""

from __future__ import annotations

from typing import NamedTuple


class Rate(NamedTuple):
    """A token bucket: how many at once, and how many each second after that."""

    burst: int
    per_s: float

    def tokens(self, left: float, passed_s: float) -> float:
        """What a bucket holds that had ``left`` tokens ``passed_s`` seconds ago."""
        return min(self.burst, left + passed_s * self.per_s)


__all__ = ["Rate"]
