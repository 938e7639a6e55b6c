"""A limit on how many steps a simulated history may take: an engine that runs in circles or stands is not waited for.

Owns: counting the steps of all tasks of a trio run, and ending the run above the limit, or where no task will ever
take one again.
"""

from __future__ import annotations

from typing import Final

import trio

#: Steps that no history of a sound engine takes: most take some thousands, one that restores
#: from a slow store many times 110,000.
MOST_STEPS: Final = 500_000
#: Waits one after the other without a step between them, after which none will come: virtual time jumps at each.
_MOST_WAITS: Final = 1000


class StepLimit(trio.abc.Instrument):
    """Counts the steps of all tasks; where they do not end, or all tasks wait for nothing, it cancels what it watches.

    Attributes:
        scope: what it cancels, once.
        broken: what it found; None: nothing.
    """

    def __init__(self, most: int = MOST_STEPS) -> None:
        self.scope = trio.CancelScope()
        self.broken: str | None = None
        self._steps = 0
        self._waits = 0
        self._most = most
        self._token: trio.lowlevel.TrioToken | None = None

    def before_run(self) -> None:
        """Remember the run."""
        self._token = trio.lowlevel.current_trio_token()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count a step."""
        del task
        self._waits = 0
        self._steps += 1
        if self._steps > self._most:
            self._end(f"the engine runs in circles: {self._steps:,} steps and no end")

    def before_io_wait(self, timeout: float) -> None:
        """Count a wait."""
        del timeout
        self._waits += 1
        if self._waits > _MOST_WAITS:
            self._end("the engine stands: every task waits for another one, and none for a time")

    def _end(self, broken: str) -> None:
        if self.broken is None and self._token is not None:
            self.broken = broken
            self._token.run_sync_soon(self.scope.cancel)


__all__ = ["MOST_STEPS", "StepLimit"]
