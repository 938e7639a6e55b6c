"""Worker processes: where they come from, deadlines, and what a dead one means.

Owns: the template that workers are forked from, and the pools of them. Does not own what the jobs do
(``arka.iceberg``) nor which pool a job goes to (``arka.storage.catalog``).
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from typing import Final, TypeVar, TypeVarTuple

import structlog
import trio
import trio_parallel

from arka import privacy, redaction
from arka.errors import ConfigurationError
from arka.iceberg import worker
from arka.importpath import SAFE_PATH
from arka.storage.ports import CatalogUnavailable, DeadlineMissed, WarehouseChanged

#: An idle worker keeps its caches for as long as trio-parallel can wait: 24 h.
_IDLE_S: Final = 86_400.0
#: How long closing waits for an idle worker to leave (some milliseconds as a rule) before it kills it.
_GRACE_S: Final = 2.0
#: How often in a deadline a job's progress is looked at.
_LOOKS: Final = 8
#: An answer of at most so many bytes is unpacked on trio's thread: a field of a schema has some 60, and costs 10 us.
_UNPACKED_BYTES: Final = 4096
#: What the fork server imports: the program, as it would without us, and what jobs need.
_PRELOAD: Final = ["__main__", "arka.iceberg.template"]

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Template:
    """``multiprocessing``'s fork server, which imports what jobs need once for all workers.

    There is one in a process, for all catalogs and for whatever else forks from it. One that was running before it
    was asked to import anything does as well: its workers import for themselves.
    """

    def __init__(self) -> None:
        self._turn = trio.Lock()
        self._ready = False

    async def wait_ready(self) -> None:
        """Start it if it does not run, and wait until it forks.

        Raises:
            CatalogUnavailable: it does not start.
            ConfigurationError: it cannot import what jobs need: the installation is broken (R40).

        Cancellation: it goes on starting.
        """
        async with self._turn:
            if self._ready:
                return
            multiprocessing.set_forkserver_preload(_PRELOAD)
            # The mask is inherited: an interrupt from the terminal must not hit it before it ignores interrupts. Here,
            # one that comes meanwhile is delivered at the second call.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            safe_path = os.environ.get(SAFE_PATH)
            # It starts with its working directory on its path, else: a folder there would stand in for a module (R40).
            os.environ[SAFE_PATH] = "1"
            try:
                forkserver.ensure_running()
            finally:
                if safe_path is None:
                    del os.environ[SAFE_PATH]
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            await trio.to_thread.run_sync(_fork_once, abandon_on_cancel=True)
            self._ready = True


def _fork_once() -> None:
    context = multiprocessing.get_context("forkserver")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker.check_installation, args=(sender,), daemon=True)
    reason: str | None = None
    with answer, sender:
        try:
            process.start()
            sender.close()
            with contextlib.suppress(EOFError):
                reason = answer.recv()
            process.join()
        except (OSError, EOFError) as error:
            raise CatalogUnavailable(f"the process that workers are forked from does not start: {error!r}") from None
    if reason is not None:
        raise ConfigurationError(
            f"This installation is broken: worker processes cannot import what they need ({reason}). Install it again, "
            "or take what stands in the way off PYTHONPATH"
        )
    if process.exitcode != 0:
        raise CatalogUnavailable(f"a process forked for a worker ended with exit code {process.exitcode}")


@dataclass(slots=True)
class JobWatch:
    """What becomes of a job that takes long, and how long it took.

    Attributes:
        apart: takes the job in once it has run for the pool's whole deadline and makes progress; None: it stays.
        on_long: called at that moment; must not raise or wait.
        patience: how many deadlines the job has.
        took_s: seconds from its turn until its end; set by the pool.
    """

    apart: WorkerPool | None = None
    on_long: Callable[[], None] = lambda: None
    patience: int = 1
    took_s: float = 0.0


class _Turn:
    """A job's place in a pool.

    Attributes:
        pool: the one whose turn it holds.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool


class WorkerPool:
    """Up to ``size`` worker processes that run one kind of job.

    Args:
        template: what they are forked from.
        context: where the processes are kept.
        size: jobs at a time.
        deadline_s: a job that takes longer is killed with its worker; progress starts it again (R32).

    Attributes:
        deadline_s: the same.
    """

    def __init__(self, template: Template, context: trio_parallel.WorkerContext, size: int, deadline_s: float) -> None:
        self._template = template
        self._context = context
        self._turns = trio.CapacityLimiter(size)
        # As many as there are turns, and one for each job that has left its turn and still runs.
        self._processes = trio.CapacityLimiter(size)
        self.deadline_s = deadline_s

    async def run(
        self,
        job: Callable[[*Ts], T | Exception],
        *args: *Ts,
        progress: Callable[[], int] | None = None,
        watch: JobWatch | None = None,
    ) -> T:
        """Run one job; waits for a free worker first.

        Args:
            job: what is run.
            args: its arguments.
            progress: returns how much the job has finished so far; blocking. Each rise starts the deadline again.
            watch: what becomes of the job if it takes long; None: it keeps its turn until it ends.

        Returns:
            What the job returned.

        Raises:
            CatalogUnavailable: the worker died, did not start or missed the deadline; whether the job happened is
                unknown.
            WarehouseChanged: the worker ended because an SQLite catalog was restored while it had it open (R28).
            Exception: what the job returned as an error.

        Cancellation: a running job's worker is killed; what the job had done stays done.
        """
        watch = JobWatch() if watch is None else watch
        deadline_s = self.deadline_s * watch.patience
        turn = _Turn(self)
        await self._turns.acquire_on_behalf_of(turn)
        started = trio.current_time()
        result: T | Exception
        try:
            await self._template.wait_ready()
            # A schema of thousands of columns, or a list of as many tables, takes a tenth of a second and more.
            asked = await trio.to_thread.run_sync(pickle.dumps, (job, args), pickle.HIGHEST_PROTOCOL)
            with trio.move_on_after(deadline_s) as deadline:
                try:
                    answer: bytes = await self._run_watched(
                        partial(
                            self._context.run_sync,
                            worker.run_packed,
                            asked,
                            kill_on_cancel=True,
                            limiter=self._processes,
                        ),
                        deadline,
                        deadline_s,
                        progress,
                        None if watch.apart is None else partial(self._leave, turn, watch),
                    )
                except trio_parallel.BrokenWorkerError as error:
                    process = error.args[-1]
                    if process.exitcode == worker.RESTORED_EXIT:
                        raise WarehouseChanged(
                            "the catalog's file was restored or copied over, or its -wal or -shm removed, while in use"
                        ) from None
                    raise CatalogUnavailable(
                        f"the worker running {job.__name__} died with exit code {process.exitcode}"
                    ) from None
                except (EOFError, OSError) as error:
                    # Jobs return their errors: this one is of starting a process for it.
                    raise CatalogUnavailable(f"the process that workers are forked from died: {error!r}") from None
        finally:
            watch.took_s = trio.current_time() - started
            self._end(turn)
        if deadline.cancelled_caught:
            raise DeadlineMissed(f"{job.__name__} took longer than {deadline_s:g} s")
        if len(answer) <= _UNPACKED_BYTES:
            result = pickle.loads(answer)
        else:
            # The job has happened: what it says is not lost to a cancellation.
            with trio.CancelScope(shield=True):
                result = await trio.to_thread.run_sync(pickle.loads, answer)
        if isinstance(result, Exception):
            raise result
        return result

    async def _leave(self, turn: _Turn, watch: JobWatch) -> None:
        """Give a job's turn to others once it has had the whole deadline; its process goes on elsewhere (R19)."""
        assert watch.apart is not None
        await trio.sleep(self.deadline_s)
        watch.on_long()
        # One at a time: where another table has the place, this one keeps its turn until that is free.
        await watch.apart._turns.acquire_on_behalf_of(turn)
        turn.pool = watch.apart
        self._processes.total_tokens += 1
        self._turns.release_on_behalf_of(turn)

    def _end(self, turn: _Turn) -> None:
        """Give back what a job has held, here or where it went."""
        if turn.pool is not self:
            self._processes.total_tokens -= 1
        turn.pool._turns.release_on_behalf_of(turn)

    async def _run_watched(
        self,
        run: Callable[[], Awaitable[T]],
        deadline: trio.CancelScope,
        deadline_s: float,
        progress: Callable[[], int] | None,
        leave: Callable[[], Awaitable[None]] | None,
    ) -> T:
        """Run a job, and move its deadline whenever it has finished something."""
        if progress is None:
            return await run()
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, deadline, deadline_s, progress)
            if leave is not None:
                nursery.start_soon(leave)
            try:
                result = await run()
            except Exception as error:
                # Not through the nursery, which would make a group of it.
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return result

    @staticmethod
    async def _watch(deadline: trio.CancelScope, deadline_s: float, progress: Callable[[], int]) -> None:
        finished = 0
        while True:
            await trio.sleep(deadline_s / _LOOKS)
            now = await trio.to_thread.run_sync(progress, abandon_on_cancel=True)
            if now > finished:
                finished = now
                deadline.deadline = trio.current_time() + deadline_s


@asynccontextmanager
async def open_pool(
    template: Template,
    size: int,
    deadline_s: float,
    *,
    idle_s: float = _IDLE_S,
    initialise: Callable[[int, int | None, tuple[str, ...]], None] = worker.initialise,
) -> AsyncIterator[WorkerPool]:
    """Open a pool; no process starts before its first job.

    Args:
        template: what its workers are forked from.
        size: jobs at a time.
        deadline_s: see ``WorkerPool``.
        idle_s: how long a process waits for its next job.
        initialise: runs once in each process, as ``worker.initialise``.

    Cancellation: closing waits for running jobs, so whoever runs them must be cancelled first.
    """
    reason: BaseException | None = None
    try:
        async with trio_parallel.open_worker_context(
            idle_timeout=idle_s,
            init=functools.partial(initialise, os.getpid(), privacy.shared_group(), redaction.known()),
            grace_period=_GRACE_S,
            worker_type=trio_parallel.WorkerType.FORKSERVER,
        ) as context:
            try:
                yield WorkerPool(template, context, size, deadline_s)
            except BaseException as error:
                reason = error
                raise
    except trio_parallel.BrokenWorkerError as error:
        # Raised by closing alone: a worker that was dead already is worth a line, no more. It must not stand in for
        # what ended the server.
        _log.warning("catalog.worker_died", detail=str(error))
        if reason is not None:
            raise reason from None


__all__ = ["JobWatch", "Template", "WorkerPool", "open_pool"]
