"""How large the next cut of a table may be (R32).

Owns: that a cut that fails gets smaller and one that lands lets the next be larger. Does not own which frames are cut
(``arka.tiers.backlog``) nor what counts as a failure (``arka.tiers.committer``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from arka.storage.ports import StagedFiles
from arka.tiers.backlog import Cut

#: A cut whose files took at most this part of the deadline lets the next one be larger.
_GROWTH_SHARE: Final = 4


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

    def part_of(self, cut: Cut, staged: StagedFiles) -> Cut:
        """Return the part of a cut that its encode job has written: all of it, or its first frames (R19).

        Then the next cut is no larger than that part.
        """
        if staged.through_lsn == cut.through_lsn:
            return cut
        # Invariant: an encode job covers a part of its cut from the front; so do the commit and what is acknowledged.
        assert staged.after_lsn < staged.through_lsn < cut.through_lsn
        assert 0 < staged.frames < cut.frames
        self.frames = staged.frames
        frame_bytes = cut.frame_bytes * staged.frames // cut.frames
        return replace(cut, through_lsn=staged.through_lsn, frames=staged.frames, frame_bytes=frame_bytes)

    def settle(self, cut: Cut, staged: StagedFiles, uncommitted: int, deadline_s: float) -> bool:
        """Let the next cut be larger after one that landed, if its files took little time.

        Args:
            cut: what landed.
            staged: its files.
            uncommitted: how many frames the table had before.
            deadline_s: of a job.

        Returns:
            Whether its files took no longer than the deadline: else the next cut has to be smaller (R19).
        """
        if staged.took_s <= deadline_s / _GROWTH_SHARE:
            self.grow(cut.frames, uncommitted - cut.frames)
        return staged.took_s <= deadline_s

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
