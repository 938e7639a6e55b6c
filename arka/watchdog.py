"""The watchdog of trio's loop: how long its turns and task steps last, and what ran in one that was too long.

Owns: the measurement, the log lines of slow turns and their rate, the figures for metrics. Does not own what is slow,
and stops nothing.

One thread serves every client, so that a long step of one task is a pause for all (T22). A trio instrument takes the
time when a turn begins, at each task step and when the turn ends: three short calls. It is cheap because it looks at
nothing else. What the code was doing is found by a second thread, which wakes at half of the limit and reads the stack
of trio's thread if the turn that it sees is over the limit. C code that holds the interpreter delays that look, and a
stack that was not read in time is missing from the line; the task's name never is.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter_ns
from types import FrameType
from typing import Final

import structlog
import trio
import trio.lowlevel

log = structlog.get_logger(__name__)

#: A turn over this is counted apart, in nanoseconds: what no input may take (T22).
_LONG_NS: Final = 5_000_000
#: Slow turns are logged at most so often, in seconds; those between are counted in the next line.
_LOG_PAUSE_S: Final = 10.0
#: A turn that lasts so many times the limit is logged while it lasts: it may never end.
_STUCK_TIMES: Final = 100
#: Frames of a stack in a line, innermost last.
_FRAMES: Final = 8


@dataclass(frozen=True, slots=True)
class SlowTurn:
    """A turn over the limit.

    Attributes:
        seconds: how long it lasted.
        task: the task with the longest step of it.
        step_s: how long that step lasted.
        stack: the innermost frames of trio's thread when it was over the limit; empty if nobody could look in time.
    """

    seconds: float
    task: str
    step_s: float
    stack: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoopStatistics:
    """What the watchdog has seen since it began.

    Attributes:
        turns: turns of the loop.
        longest_turn_s: the longest of them.
        longest_step_s: the longest step of a task.
        longest_step_task: that task's name.
        turns_over_5_ms: turns that lasted longer than that.
        slow_turns: turns over the limit (``log.slow_turn_s``).
        last_slow: the last of these, or None.
        worst: the longest of these, or None.
    """

    turns: int
    longest_turn_s: float
    longest_step_s: float
    longest_step_task: str
    turns_over_5_ms: int
    slow_turns: int
    last_slow: SlowTurn | None
    worst: SlowTurn | None


class Watchdog(trio.abc.Instrument):
    """Measures the loop that it is an instrument of. Its hooks run on trio's thread, ``look`` on another one."""

    def __init__(self, limit_s: float) -> None:
        """Begin with no turn.

        Args:
            limit_s: turns over this are slow, in seconds.
        """
        self._limit_ns = int(limit_s * 1e9)
        self._thread = threading.get_ident()
        # Of the turn that runs; 0 between turns. Written by trio's thread, read by the other one.
        self._began_ns = 0
        self._step_ns = 0
        self._task: trio.lowlevel.Task | None = None
        # The longest step of the turn that runs, where it is worth remembering, and its task.
        self._turn_step_ns = 0
        self._turn_task: trio.lowlevel.Task | None = None
        # Written by the other thread: the turn that it saw over the limit, by its beginning, and its stack.
        self._seen: tuple[int, tuple[str, ...]] = (0, ())
        self._turns = self._over = self._slow = self._unsaid = 0
        self._longest_ns = self._longest_step_ns = 0
        self._longest_task = ""
        self._last: SlowTurn | None = None
        self._worst: SlowTurn | None = None
        self._said_ns = -int(_LOG_PAUSE_S * 1e9)

    # -- hooks, on trio's thread: no more than they need -----------------------------------------

    def after_io_wait(self, timeout: float) -> None:
        """A turn begins."""
        self._task = None
        self._turn_step_ns = 0
        self._step_ns = self._began_ns = perf_counter_ns()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """A step ends and the next one begins."""
        now = perf_counter_ns()
        if now - self._step_ns > self._turn_step_ns:
            self._turn_step_ns = now - self._step_ns
            self._turn_task = self._task
        self._step_ns = now
        self._task = task

    def before_io_wait(self, timeout: float) -> None:
        """A turn ends."""
        began, self._began_ns = self._began_ns, 0
        if not began:
            return
        now = perf_counter_ns()
        self._turns += 1
        if now - self._step_ns > self._turn_step_ns:
            self._turn_step_ns, self._turn_task = now - self._step_ns, self._task
        if self._turn_step_ns > self._longest_step_ns:
            self._longest_step_ns, self._longest_task = self._turn_step_ns, _name(self._turn_task)
        took = now - began
        if took > self._longest_ns:
            self._longest_ns = took
        if took > _LONG_NS:
            self._over += 1
            if took > self._limit_ns:
                self._note_slow(took, began, now)
        # Not kept alive by the watchdog.
        self._task = self._turn_task = None

    def _note_slow(self, took: int, began: int, now: int) -> None:
        self._slow += 1
        seen, stack = self._seen
        slow = SlowTurn(took / 1e9, _name(self._turn_task), self._turn_step_ns / 1e9, stack if seen == began else ())
        self._last = slow
        if self._worst is None or slow.seconds > self._worst.seconds:
            self._worst = slow
        if now - self._said_ns < _LOG_PAUSE_S * 1e9:
            self._unsaid += 1
            return
        self._said_ns, unsaid, self._unsaid = now, self._unsaid, 0
        log.warning(
            "loop.slow_turn",
            seconds=round(slow.seconds, 4),
            task=slow.task,
            step_s=round(slow.step_s, 4),
            stack=" < ".join(reversed(slow.stack)) or None,
            unsaid=unsaid,
        )

    # -- the other thread --------------------------------------------------------------------------

    def look(self) -> None:
        """Read the stack of trio's thread if its turn is over the limit; once per turn."""
        began = self._began_ns
        if not began or perf_counter_ns() - began < self._limit_ns:
            return
        if self._seen[0] != began:
            self._seen = (began, self._stack())
        elif perf_counter_ns() - began >= _STUCK_TIMES * self._limit_ns and self._began_ns == began:
            now = perf_counter_ns()
            if now - self._said_ns >= _LOG_PAUSE_S * 1e9:
                self._said_ns = now
                stack = " < ".join(reversed(self._stack()))
                log.error("loop.stuck", seconds=round((now - began) / 1e9, 1), task=_name(self._task), stack=stack)

    def _stack(self) -> tuple[str, ...]:
        frame: FrameType | None = sys._current_frames().get(self._thread)
        if frame is None:
            return ()
        found = traceback.extract_stack(frame, limit=_FRAMES)
        return tuple(f"{entry.filename.rpartition('/')[2]}:{entry.lineno} {entry.name}" for entry in found)

    def statistics(self) -> LoopStatistics:
        """Return the figures so far, for metrics."""
        return LoopStatistics(
            turns=self._turns,
            longest_turn_s=self._longest_ns / 1e9,
            longest_step_s=self._longest_step_ns / 1e9,
            longest_step_task=self._longest_task,
            turns_over_5_ms=self._over,
            slow_turns=self._slow,
            last_slow=self._last,
            worst=self._worst,
        )


def _name(task: trio.lowlevel.Task | None) -> str:
    # Between steps, and before the first, trio runs deadlines and callbacks of its own.
    return "trio" if task is None else task.name


@contextlib.contextmanager
def watch_loop(limit_s: float) -> Iterator[Watchdog]:
    """Watch the loop that this is called in for as long as the block runs; the figures are logged at its end.

    Args:
        limit_s: turns over this are slow, in seconds.
    """
    watchdog = Watchdog(limit_s)
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(limit_s / 2):
            watchdog.look()

    thread = threading.Thread(target=run, name="arka watchdog", daemon=True)
    trio.lowlevel.add_instrument(watchdog)
    thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        with contextlib.suppress(KeyError):
            # Trio removes an instrument that has failed by itself.
            trio.lowlevel.remove_instrument(watchdog)
        found = watchdog.statistics()
        log.info(
            "loop.watched",
            turns=found.turns,
            longest_turn_s=round(found.longest_turn_s, 4),
            longest_step_s=round(found.longest_step_s, 4),
            longest_step_task=found.longest_step_task,
            over_5_ms=found.turns_over_5_ms,
            slow=found.slow_turns,
        )


__all__ = ["LoopStatistics", "SlowTurn", "Watchdog", "watch_loop"]
