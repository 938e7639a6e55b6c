"""The watchdog: a task that blocks the loop is counted, named and logged, and a loop that does not is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import structlog.testing
import trio

from arka.watchdog import Watchdog, watch_loop

LIMIT_S = 0.05


@pytest.fixture
def said() -> Iterator[list]:
    with structlog.testing.capture_logs() as lines:
        yield lines


async def _blocking_task(looked: threading.Event) -> None:
    """Hold the loop until the watchdog has looked at it, whatever the machine's load: no length is assumed."""
    ends = time.monotonic() + 60
    while not looked.is_set() and time.monotonic() < ends:
        time.sleep(0.001)


def _looks(monkeypatch: pytest.MonkeyPatch, looked: threading.Event, times: int = 1) -> None:
    """Have ``looked`` set once the other thread has read a stack of the turn."""
    read = Watchdog._stack
    left = [times]

    def reads(self: Watchdog) -> tuple[str, ...]:
        stack = read(self)
        left[0] -= 1
        if left[0] == 0:
            looked.set()
        return stack

    monkeypatch.setattr(Watchdog, "_stack", reads)


async def _block(times: int, looked: threading.Event) -> None:
    for _ in range(times):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_blocking_task, looked, name="the culprit")


def test_a_task_that_blocks_is_named(monkeypatch: pytest.MonkeyPatch, said: list) -> None:
    """One line has the task's name, how long it ran and where it was; the figures say the same."""
    looked = threading.Event()
    _looks(monkeypatch, looked)

    async def main() -> None:
        with watch_loop(LIMIT_S) as watchdog:
            await _block(1, looked)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
        found = watchdog.statistics()
        assert found.slow_turns >= 1
        assert found.turns_over_5_ms >= found.slow_turns
        assert found.worst is not None
        assert found.longest_turn_s >= found.worst.seconds >= found.worst.step_s > LIMIT_S
        assert found.longest_step_task == "the culprit"
        assert found.turns > 1

    trio.run(main)
    (line,) = [line for line in said if line["event"] == "loop.slow_turn" and line["task"] == "the culprit"]
    assert line["log_level"] == "warning"
    assert "test_watchdog.py" in line["stack"]
    assert "_blocking_task" in line["stack"]
    (end,) = [line for line in said if line["event"] == "loop.watched"]
    assert end["slow"] >= 1
    assert end["longest_step_task"] == "the culprit"


def test_many_slow_turns_make_few_lines(said: list) -> None:
    """Lines are bounded in rate; what was not said is counted in the statistics."""
    dog = Watchdog(LIMIT_S)
    for _ in range(1_000):
        dog.after_io_wait(0)
        # As if it had begun a second earlier.
        dog._began_ns -= 10**9
        dog.before_io_wait(0)
    assert dog.statistics().slow_turns == dog.statistics().turns == 1_000
    assert len(said) < 100
    assert said[0]["event"] == "loop.slow_turn"
    # The pause over, the next line says how many there were.
    dog._said_ns -= 10**11
    dog.after_io_wait(0)
    dog._began_ns -= 10**9
    dog.before_io_wait(0)
    assert sum(line["unsaid"] for line in said) + len(said) == 1_001


def test_a_turn_that_does_not_end_is_logged_meanwhile(monkeypatch: pytest.MonkeyPatch, said: list) -> None:
    """The other thread speaks for a loop that hangs."""
    monkeypatch.setattr("arka.watchdog._STUCK_TIMES", 2)
    looked = threading.Event()
    _looks(monkeypatch, looked, times=2)

    async def main() -> None:
        with watch_loop(LIMIT_S):
            await _block(1, looked)
            while not any(line["event"] == "loop.stuck" for line in said):
                await trio.sleep(0.001)

    trio.run(main)
    (line,) = [line for line in said if line["event"] == "loop.stuck"]
    assert line["task"] == "the culprit"
    assert "_blocking_task" in line["stack"]


def test_what_is_fast_is_counted_alone(said: list) -> None:
    """Turns below the limit make no line and are in the figures."""
    dog = Watchdog(60)

    async def main() -> None:
        trio.lowlevel.add_instrument(dog)
        for _ in range(100):
            await trio.lowlevel.checkpoint()

    trio.run(main)
    found = dog.statistics()
    assert found.turns >= 99
    assert (found.slow_turns, found.last_slow, found.worst) == (0, None, None)
    assert said == []


def test_nothing_stays_behind() -> None:
    """After the block neither the instrument nor the thread is left, also after an error."""

    async def main() -> None:
        with pytest.raises(ValueError, match="broken"), watch_loop(LIMIT_S) as dog:
            raise ValueError("broken")
        with pytest.raises(KeyError):
            trio.lowlevel.remove_instrument(dog)

    before = {thread.name for thread in threading.enumerate()} - {"arka watchdog"}
    trio.run(main)
    deadline = time.monotonic() + 60
    while any(t.name == "arka watchdog" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert {thread.name for thread in threading.enumerate()} <= before
