"""How large the next cut of a table may be (R32).

Owns: that a cut that fails gets smaller and one that lands lets the next be larger. Does not own which frames are cut
(``arka.tiers.backlog``) nor what counts as a failure (``arka.tiers.committer``).
"""

from __future__ import annotations


class CutSize:
    """The most frames of one table's next cut. Used from trio's thread only.

    Attributes:
        frames: the limit; None for any number.
    """

    def __init__(self) -> None:
        self.frames: int | None = None

    def shrink(self, failed: int) -> bool:
        """Halve the cut.

        Args:
            failed: how many frames the failed one had, from 1.

        Returns:
            Whether it can be smaller; a cut of one frame cannot.
        """
        if failed <= 1:
            return False
        self.frames = failed // 2
        return True

    def grow(self, landed: int, waiting: int) -> None:
        """Double the limit after a cut that landed.

        Args:
            landed: how many frames it had.
            waiting: how many frames the table has left to commit.
        """
        if self.frames is not None:
            self.frames = max(self.frames, landed) * 2
            if self.frames >= waiting:
                # All there is fits: it is no limit any more.
                self.frames = None


__all__ = ["CutSize"]
