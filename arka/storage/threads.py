"""Work for a thread: what would hold trio's thread for milliseconds although it waits for nothing (T23).

Owns: how many such jobs run at a time, and whose turn it is. Blocking I/O has its own limiters beside its adapters.
Does not own how large a job may be: whoever starts one bounds its work first.

Jobs wait by peer, and the peers take turns: a peer with a thousand streams delays another by one job for each thread,
whatever it has sent. Within a peer the first to come is the first to go; a stream has one job at a time, so its streams
take turns too. Small jobs have a thread that no large one can take.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from arka.records import Releasable
from arka.roundrobin import RoundRobin

T = TypeVar("T")

#: Jobs of at most so many bytes have a thread of their own: some milliseconds of validation.
SMALL_BYTES: Final = 1024 * 1024

#: The peer of the server's own jobs.
SERVER: Final = ""


class Lanes:
    """The threads for computing, and the jobs that wait for one. Used from trio's thread only.

    Attributes:
        free: threads that any job may take.
        free_small: threads that only a small job may take.
    """

    def __init__(self, threads: int) -> None:
        """Start with all threads free.

        Args:
            threads: for jobs of any size; one more is kept for small jobs.
        """
        self.free = threads
        self.free_small = 1
        self._large: RoundRobin[Job] = RoundRobin()
        self._small: RoundRobin[Job] = RoundRobin()

    async def enter(self, job: Job) -> None:
        """Wait for the job's turn. Cancellation: the job leaves the queue."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._admit(job):
            return
        queue = self._small if job.small else self._large
        queue.add(job.peer, job)
        try:
            await job.turn.wait()
        except trio.Cancelled:
            if job.turn.is_set():
                # Its turn came after its cancellation and before this: the thread is the next job's.
                self.leave(job)
            else:
                queue.remove(job.peer, job)
            raise

    def _admit(self, job: Job) -> bool:
        if job.small and self.free_small:
            self.free_small -= 1
            job.reserved = True
        elif self.free and not (self._small if job.small else self._large):
            self.free -= 1
        else:
            return False
        return True

    def leave(self, job: Job) -> None:
        """Give the job's thread to the next one."""
        if job.reserved:
            job.reserved = False
            self._pass_on(self._small, reserved=True)
        else:
            self._pass_on(self._large if self._large else self._small, reserved=False)

    def _pass_on(self, queue: RoundRobin[Job], *, reserved: bool) -> None:
        if queue:
            heir = queue.take()
            heir.reserved = reserved
            heir.turn.set()
        elif reserved:
            self.free_small += 1
        else:
            self.free += 1


_lanes: trio.lowlevel.RunVar[Lanes] = trio.lowlevel.RunVar("arka compute lanes")


def lanes() -> Lanes:
    """Return this run's threads: one per core, and the one for small jobs."""
    try:
        return _lanes.get()
    except LookupError:
        made = Lanes(os.cpu_count() or 1)
        _lanes.set(made)
        return made


class Job:
    """One piece of work for a thread.

    Attributes:
        peer: the address of the client that it is for.
        small: whether it may have the thread for small jobs.
        turn: set once it has a thread.
        reserved: whether that is the thread for small jobs.
        running: whether it has a thread; one that was abandoned still has.
    """

    __slots__ = ("_kept", "_lanes", "peer", "reserved", "running", "small", "turn")

    def __init__(self, peer: str, size: int) -> None:
        """Make a job that has not begun.

        Args:
            peer: see above; SERVER for work of the server's own.
            size: its work, in bytes of data that are looked at.
        """
        self.peer = peer
        self.small = size <= SMALL_BYTES
        self.turn = trio.Event()
        self.reserved = False
        self.running = False
        self._kept: Releasable | None = None
        self._lanes = lanes()

    async def run(self, function: Callable[..., T], *args: object, abandon: bool = False) -> T:
        """Run ``function(*args)`` in a thread when its turn comes.

        Args:
            function: bounded in its work, since it cannot be stopped.
            args: its arguments.
            abandon: whether a cancellation leaves it alone; then all that it touches must be its own from there on.

        Returns:
            What it returns; raises what it raises.

        Cancellation: a job that waits is dropped. One that runs goes on without its caller (``abandon``), and keeps its
        thread to its end; else it is finished first, so that nothing it touches is used by two at once.
        """
        return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=abandon, limiter=self)  # type: ignore[arg-type]

    def keep(self, held: Releasable) -> None:
        """Release ``held`` once the job no longer runs: at once if it does not."""
        if self.running:
            self._kept = held
        else:
            held.release()

    # -- what trio asks of a limiter --------------------------------------------------------------

    async def acquire_on_behalf_of(self, _borrower: object) -> None:
        """Wait for a thread."""
        await self._lanes.enter(self)
        self.running = True

    def release_on_behalf_of(self, _borrower: object) -> None:
        """Give the thread back; called on trio's thread when the function has ended, abandoned or not."""
        self.running = False
        self._lanes.leave(self)
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.release()


async def run_compute(function: Callable[..., T], *args: object, peer: str = SERVER, size: int = SMALL_BYTES + 1) -> T:
    """Run ``function(*args)`` in a thread when its turn comes.

    Args:
        function: bounded in its work, since it cannot be stopped.
        args: its arguments.
        peer: the address of the client that it is for.
        size: its work, in bytes of data that are looked at.

    Returns:
        What it returns; raises what it raises.

    Cancellation: see ``Job.run`` without ``abandon``.
    """
    return await Job(peer, size).run(function, *args)


def most_threads() -> int:
    """Return how many threads jobs may take: those for computing, and trio's own limit for what waits for disks.

    However many clients there are: a request takes none while it waits for its turn.
    """
    computing = (os.cpu_count() or 1) + 1
    return computing + int(trio.to_thread.current_default_thread_limiter().total_tokens)


__all__ = ["SERVER", "SMALL_BYTES", "Job", "Lanes", "lanes", "most_threads", "run_compute"]
