"""Threads for computing: peers take turns, small jobs have a thread, nobody waits for what is abandoned (T23)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import trio

from arka.storage import threads
from arka.storage.threads import SMALL_BYTES, Job, Lanes, run_compute

LARGE = SMALL_BYTES + 1


@pytest.fixture
async def lanes() -> Lanes:
    """One thread for jobs of any size."""
    made = Lanes(1)
    threads._lanes.set(made)
    return made


class Gate:
    """A job that holds its thread until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.began = threading.Event()

    def __call__(self) -> None:
        self.began.set()
        assert self._open.wait(30)

    def open(self) -> None:
        self._open.set()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread brings about."""
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.001)


async def test_a_peer_with_many_jobs_delays_another_by_one(lanes: Lanes) -> None:
    """However many of its jobs wait, the next one is another peer's."""
    gate, order = Gate(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_compute, gate, peer="hog", size=LARGE))
        await until(gate.began.is_set)
        for _ in range(50):
            nursery.start_soon(partial(run_compute, order.append, "hog", peer="hog", size=LARGE))
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            nursery.start_soon(partial(run_compute, order.append, "polite", peer="polite", size=LARGE))
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert len(order) == 53
    assert order[:7] == ["hog", "polite", "hog", "polite", "hog", "polite", "hog"]
    assert (lanes.free, lanes.free_small) == (1, 1)


async def test_large_jobs_do_not_fill_the_thread_for_small_ones(lanes: Lanes) -> None:
    """A small job runs while large ones hold, and wait for, every other thread."""
    gate = Gate()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(partial(run_compute, gate, peer="hog", size=LARGE))
        await until(gate.began.is_set)
        for _ in range(5):
            assert await run_compute(int, "7", peer="polite", size=SMALL_BYTES) == 7
        gate.open()
    assert (lanes.free, lanes.free_small) == (1, 1)


async def test_small_jobs_take_any_thread_that_nobody_waits_for(lanes: Lanes) -> None:
    """Two run at a time where one thread is for all; a third waits for whichever is free first."""
    gates = [Gate(), Gate(), Gate()]
    async with trio.open_nursery() as nursery:
        for gate in gates:
            nursery.start_soon(partial(run_compute, gate, peer="one", size=1))
        await until(lambda: sum(gate.began.is_set() for gate in gates) == 2)
        waiting = next(gate for gate in gates if not gate.began.is_set())
        for gate in gates:
            if gate is not waiting:
                gate.open()
                break
        await until(waiting.began.is_set)
        for gate in gates:
            gate.open()
    assert (lanes.free, lanes.free_small) == (1, 1)


class Held:
    """A charge."""

    released = 0

    def release(self) -> None:
        self.released += 1


async def test_a_drain_does_not_wait_for_a_job(lanes: Lanes) -> None:
    """Cancelled, its caller goes on at once; the job keeps its thread and its charge until it ends."""
    gate, held = Gate(), Held()
    job = Job("peer", LARGE)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(job.run, gate, abandon=True))
            await until(gate.began.is_set)
            scope.cancel()
    assert not gate._open.is_set()
    assert job.running
    job.keep(held)
    assert (lanes.free, held.released) == (0, 0)
    gate.open()
    await until(lambda: not job.running)
    assert (lanes.free, held.released) == (1, 1)
    job.keep(held)
    assert held.released == 2


async def test_a_job_that_waits_leaves_with_its_caller(lanes: Lanes) -> None:
    """Cancelled before its turn it never runs, keeps no thread, and the next one has its place."""
    gate, ran = Gate(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_compute, gate, peer="a", size=LARGE))
        await until(gate.began.is_set)
        scope = trio.CancelScope()

        async def wait_and_leave() -> None:
            with scope:
                await run_compute(ran.append, "left", peer="b", size=LARGE)

        nursery.start_soon(wait_and_leave)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(partial(run_compute, ran.append, "next", peer="c", size=LARGE))
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        gate.open()
        await trio.testing.wait_all_tasks_blocked(0.01)
        with trio.CancelScope() as ended:
            ended.cancel()
            await run_compute(ran.append, "cancelled from the start", peer="d", size=LARGE)
    assert ran == ["next"]
    assert (lanes.free, lanes.free_small) == (1, 1)


async def test_a_turn_that_comes_behind_a_cancellation_is_passed_on(lanes: Lanes) -> None:
    """A job that was cancelled and has not noticed yet may be given the thread: the next one gets it."""
    first, left, following = (Job(peer, LARGE) for peer in ("a", "b", "c"))
    await lanes.enter(first)
    scope = trio.CancelScope()

    async def wait_and_leave() -> None:
        with scope:
            await lanes.enter(left)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_and_leave)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lanes.enter, following)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        lanes.leave(first)
        assert left.turn.is_set()
    assert following.turn.is_set()
    assert lanes.free == 0
    lanes.leave(following)
    assert (lanes.free, lanes.free_small) == (1, 1)
