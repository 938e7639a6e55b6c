"""No stall without a word: what makes no progress for too long is said, in the log and in DescribeTable (R35).

Owns: how long a tier or a table may stand still, and when that is said. Does not own what they do, nor the reasons:
those who try tell them. Whether something moves is read off its watermark alone, so that the cause does not matter: an
error, an answer that does not come, or one that takes too long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import structlog
import trio

log = structlog.get_logger(__name__)

#: The least time without progress that counts as a stall, in seconds.
PATIENCE_S: Final = 5.0
#: Or so many intervals, if that is longer.
_INTERVALS: Final = 3
#: How often a stall that goes on is said again, in seconds.
_AGAIN_S: Final = 60.0
#: How often it is looked, in seconds.
_POLL_S: Final = 0.5


class Effort:
    """What somebody tries, in words; told by who tries, read by the watch. A few attributes, set seldom."""

    __slots__ = ("doing", "reason", "since")

    def __init__(self, doing: str = "") -> None:
        """Begin with nothing tried.

        Args:
            doing: what progress waits for as long as nothing else is told.
        """
        self.doing = doing
        self.reason = ""
        self.since: float | None = None

    def begin(self, doing: str) -> None:
        """Tell that an attempt begins: what is waited for from now on."""
        self.doing = doing
        self.since = trio.current_time()

    def fail(self, reason: str) -> None:
        """Tell why the attempt failed; it stands until something moves."""
        self.reason = reason

    def succeed(self) -> None:
        """Forget the reason."""
        self.reason = ""


@dataclass(frozen=True, slots=True)
class State:
    """Where something stands.

    Attributes:
        reached_lsn: how far it is.
        wanted_lsn: how far it could be; not above ``reached_lsn``: there is nothing to do.
    """

    reached_lsn: int
    wanted_lsn: int


class Watched:
    """One tier, or one table in Iceberg."""

    def __init__(
        self,
        tier: str,
        effort: Effort,
        look: Callable[[], State],
        interval_s: float,
        table: Callable[[], str] | None = None,
    ) -> None:
        """Begin to watch.

        Args:
            tier: its word.
            effort: what is tried for it.
            look: says where it stands.
            interval_s: how often it moves when all is well.
            table: returns the table's name; None for a tier.
        """
        self._tier = tier
        self._table = table
        self._effort = effort
        self._look = look
        self._patience_s = max(PATIENCE_S, _INTERVALS * interval_s)
        self._reached_lsn = -1
        self._since: float | None = None
        self._said_at: float | None = None

    @property
    def stalled(self) -> str | None:
        """Why it stands still, for people; None: it moves, or has nothing to do."""
        if self._said_at is None or self._since is None:
            return None
        return f"no progress for {trio.current_time() - self._since:.0f} s: {self.reason}"

    @property
    def reason(self) -> str:
        """The newest reason."""
        effort = self._effort
        if effort.reason:
            return effort.reason
        waited = "" if effort.since is None else f" for {trio.current_time() - effort.since:.0f} s"
        return f"waiting{waited} for {effort.doing}"

    def look(self) -> None:
        """Look at it, and say what is to be said."""
        now = trio.current_time()
        state = self._look()
        if state.reached_lsn != self._reached_lsn or state.wanted_lsn <= state.reached_lsn:
            if self._said_at is not None and self._since is not None:
                log.info("stall.over", **self._name(), stalled_s=round(now - self._since, 1))
            self._reached_lsn = state.reached_lsn
            self._said_at = None
            self._since = now if state.wanted_lsn > state.reached_lsn else None
            return
        if self._since is None:
            self._since = now
        if now - self._since >= self._patience_s and (self._said_at is None or now - self._said_at >= _AGAIN_S):
            self._said_at = now
            log.warning(
                "stall",
                **self._name(),
                stalled_s=round(now - self._since, 1),
                reached_lsn=state.reached_lsn,
                waiting_lsn=state.wanted_lsn,
                reason=self.reason,
            )

    def _name(self) -> dict[str, str]:
        return {"tier": self._tier} if self._table is None else {"tier": self._tier, "table": self._table()}


class Watch:
    """Everything that is watched."""

    def __init__(self, tiers: Iterable[Watched], tables: Callable[[], Iterable[Iterable[Watched]]]) -> None:
        """Join what is watched.

        Args:
            tiers: the tiers that all tables share, uppermost first.
            tables: returns what the tables there are now are watched by, in slices: others run after each (T22).
        """
        self._tiers = tuple(tiers)
        self._tables = tables

    def stalled_above(self) -> str | None:
        """Why a tier that all tables share stands still; None: all move."""
        return next((reason for tier in self._tiers if (reason := tier.stalled) is not None), None)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            for watched in self._tiers:
                watched.look()
            for tables in self._tables():
                for watched in tables:
                    watched.look()
                await trio.lowlevel.checkpoint()
            await trio.sleep(_POLL_S)


__all__ = ["PATIENCE_S", "Effort", "State", "Watch", "Watched"]
