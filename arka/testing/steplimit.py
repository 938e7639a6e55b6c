"""A limit on how many steps a simulated history may take: an engine that runs in circles is caught, not waited for.

Owns: counting the steps of all tasks of a trio run, and ending the run above the limit.
"""

from __future__ import annotations

from typing import Final

import trio

#: Steps that no history of a sound engine takes: they take some thousands.
MOST_STEPS: Final = 100_000


class StepLimit(trio.abc.Instrument):
    """Counts the steps of all tasks; above the limit it cancels what it watches, once."""

    def __init__(self, most: int = MOST_STEPS) -> None:
        self.steps = 0
        self.scope = trio.CancelScope()
        self._most = most
        self._token: trio.lowlevel.TrioToken | None = None

    @property
    def passed(self) -> bool:
        """Whether the run took more steps than it may."""
        return self.steps > self._most

    def before_run(self) -> None:
        """Remember the run."""
        self._token = trio.lowlevel.current_trio_token()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count a step."""
        del task
        self.steps += 1
        if self.steps == self._most + 1 and self._token is not None:
            self._token.run_sync_soon(self.scope.cancel)


__all__ = ["MOST_STEPS", "StepLimit"]
