"""The Iceberg catalog, behind worker processes.

Owns: the processes, which of them a job goes to, deadlines and what a dead worker means. Does not own what
the jobs do (``arka.iceberg``).

Encoding, commits and everything else each have processes of their own (R19). A table's encode jobs go to
one single-worker context and its commits to another, chosen by its UUID, so that parsed metadata and
manifests stay warm in one process.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple
from uuid import UUID

import structlog
import trio
import trio_parallel
from trio_parallel._proc import SpawnProcWorker

from arka.iceberg import worker
from arka.iceberg.config import CatalogConfig
from arka.options import IcebergOptions
from arka.records import TableDefinition, TableInfo, TableName
from arka.storage.ports import (
    CatalogListing,
    CatalogTable,
    CatalogUnavailable,
    CommitJob,
    CommitResult,
    EncodeJob,
    StagedFiles,
)

#: An idle worker keeps its caches for as long as trio-parallel can wait: 24 h.
_IDLE_S: Final = 86_400.0
#: How long closing waits for an idle worker to leave (0.2 s as a rule) before it kills it.
_GRACE_S: Final = 2.0
#: Control calls at a time; scans may take all of them but one, so that a long one does not stop CreateTable.
_CONTROL_WORKERS: Final = 2

_ENCODE_MODULES: Final = ("arka.iceberg.encode",)
_COMMIT_MODULES: Final = ("arka.iceberg.commit",)
_CONTROL_MODULES: Final = ("arka.iceberg.control",)

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _SteadyWorker(SpawnProcWorker):  # type: ignore[misc]
    """A worker process that is started by trio's own thread.

    PR_SET_PDEATHSIG acts when the *thread* that started a process ends. trio-parallel starts processes in
    a pooled thread, which ends after some idle seconds and would take its worker with it.
    """

    async def start(self) -> None:
        """Start the process; blocks for the 4 to 10 ms of an exec."""
        await trio.lowlevel.checkpoint_if_cancelled()
        # An interrupt from the terminal must not hit the child before it ignores interrupts. The mask is
        # inherited; here, one that comes meanwhile is delivered at the second call.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.proc.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._child_send_pipe.close()
        self._child_recv_pipe.close()


class WorkerPool:
    """Up to ``size`` worker processes that run one kind of job.

    Args:
        context: where the processes come from.
        size: jobs at a time.
        deadline_s: a job that takes longer is killed with its worker.
    """

    def __init__(self, context: trio_parallel.WorkerContext, size: int, deadline_s: float) -> None:
        self._context = context
        self._turns = trio.CapacityLimiter(size)
        self._processes = trio.CapacityLimiter(size)
        self._deadline_s = deadline_s

    async def run(self, job: Callable[[*Ts], T | Exception], *args: *Ts) -> T:
        """Run one job; waits for a free worker first.

        Returns:
            What the job returned.

        Raises:
            CatalogUnavailable: the worker died or missed the deadline; whether the job happened is unknown.
            Exception: what the job returned as an error.

        Cancellation: a running job's worker is killed; what the job had done stays done.
        """
        async with self._turns:
            with trio.move_on_after(self._deadline_s) as deadline:
                try:
                    result: T | Exception = await self._context.run_sync(
                        job, *args, kill_on_cancel=True, limiter=self._processes
                    )
                except trio_parallel.BrokenWorkerError as error:
                    process = error.args[-1]
                    raise CatalogUnavailable(
                        f"the worker running {job.__name__} died with exit code {process.exitcode}"
                    ) from None
        if deadline.cancelled_caught:
            raise _DeadlineMissed(f"{job.__name__} took longer than {self._deadline_s:g} s")
        if isinstance(result, Exception):
            raise result
        return result


class _DeadlineMissed(CatalogUnavailable):
    """A job's worker was killed because the job took too long."""


class _Shards:
    """Single-worker pools for one kind of job, and one more for tables that missed their deadline (R19)."""

    def __init__(self, pools: Sequence[WorkerPool], quarantine: WorkerPool) -> None:
        self.pools = pools
        self._quarantine = quarantine
        self._quarantined: set[UUID] = set()

    async def run(self, table: TableInfo, job: Callable[[*Ts], T | Exception], *args: *Ts) -> T:
        """Run a table's job where that table's jobs run."""
        uuid = table.uuid
        slow = uuid in self._quarantined
        pool = self._quarantine if slow else self.pools[uuid.int % len(self.pools)]
        try:
            result = await pool.run(job, *args)
        except _DeadlineMissed:
            self._quarantined.add(uuid)
            _log.warning("catalog.deadline_missed", table=str(table.name), job=job.__name__)
            raise
        if slow:
            self._quarantined.discard(uuid)
        return result


class IcebergCatalog:
    """``ports.Catalog`` on pyiceberg in worker processes; made by ``open_catalog``."""

    def __init__(
        self,
        config: CatalogConfig,
        *,
        encode: _Shards,
        commit: _Shards,
        control: WorkerPool,
    ) -> None:
        self._config = config
        self._encode = encode
        self._commit = commit
        self._control = control
        self._scans = trio.CapacityLimiter(_CONTROL_WORKERS - 1)

    @property
    def warehouse(self) -> str:
        """The URL under which tables are made."""
        return self._config.warehouse

    async def start(self) -> None:
        """Start the workers ahead of their first jobs; makes an SQL catalog's own tables.

        Raises:
            CatalogUnavailable: the catalog does not answer. Workers that have started stay.
        """
        config = self._config
        # First alone: two processes that make the catalog's tables at once would collide.
        await self._control.run(worker.warm, config, _CONTROL_MODULES, True)
        failures: list[CatalogUnavailable] = []

        async def warm(pool: WorkerPool, modules: Sequence[str], connect: bool) -> None:
            try:
                await pool.run(worker.warm, config, modules, connect)
            except CatalogUnavailable as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for pool in self._encode.pools:
                nursery.start_soon(warm, pool, _ENCODE_MODULES, False)
            for pool in self._commit.pools:
                nursery.start_soon(warm, pool, _COMMIT_MODULES, True)
        if failures:
            raise failures[0]

    async def create_table(self, definition: TableDefinition, location_suffix: str) -> CatalogTable:
        """See ``ports.Catalog.create_table``."""
        return await self._control.run(worker.create_table, self._config, definition, location_suffix)

    async def drop_table(self, info: TableInfo, *, purge: bool) -> None:
        """See ``ports.Catalog.drop_table``."""
        await self._control.run(worker.drop_table, self._config, info, purge)

    async def load_table(self, name: TableName) -> CatalogTable:
        """See ``ports.Catalog.load_table``."""
        return await self._control.run(worker.load_table, self._config, name)

    async def list_tables(self) -> CatalogListing:
        """See ``ports.Catalog.list_tables``."""
        return await self._control.run(worker.list_tables, self._config)

    async def encode(self, job: EncodeJob) -> StagedFiles:
        """See ``ports.Catalog.encode``."""
        return await self._encode.run(job.table, worker.encode, self._config, job)

    async def commit(self, job: CommitJob) -> CommitResult:
        """See ``ports.Catalog.commit``."""
        return await self._commit.run(job.table, worker.commit, self._config, job)

    async def scan(self, info: TableInfo, columns: Sequence[str] | None, limit: int | None, path: str) -> int:
        """See ``ports.Catalog.scan``."""
        async with self._scans:
            return await self._control.run(worker.scan, self._config, info, columns, limit, path)


@asynccontextmanager
async def open_catalog(
    options: IcebergOptions, data_dir: Path, properties: Mapping[str, str] | None = None
) -> AsyncIterator[IcebergCatalog]:
    """Open a catalog with its worker processes; no process starts before its first job or ``start``.

    Args:
        options: the Iceberg options.
        data_dir: the server's data directory, for the embedded catalog and warehouse.
        properties: further pyiceberg properties, beside ``options.catalog``: credentials, ``s3.*``.

    Raises:
        ConfigurationError: an option cannot work.

    Cancellation: closing waits for running jobs, so whoever runs them must be cancelled first; then it
        takes 0.2 s per worker process as a rule, 2 s at most.
    """
    config = CatalogConfig.from_options(options, data_dir, properties or {})
    init = functools.partial(worker.initialise, os.getpid())
    async with AsyncExitStack() as stack:

        async def pool(size: int = 1) -> WorkerPool:
            context = await stack.enter_async_context(_open_context(init))
            return WorkerPool(context, size, options.job_deadline_s)

        yield IcebergCatalog(
            config,
            encode=_Shards([await pool() for _ in range(options.encode_workers)], await pool()),
            commit=_Shards([await pool() for _ in range(options.commit_workers)], await pool()),
            control=await pool(_CONTROL_WORKERS),
        )


@asynccontextmanager
async def _open_context(init: Callable[[], None]) -> AsyncIterator[trio_parallel.WorkerContext]:
    """Open a worker context whose processes trio's own thread starts."""
    reason: BaseException | None = None
    try:
        async with trio_parallel.open_worker_context(idle_timeout=_IDLE_S, init=init, grace_period=_GRACE_S) as context:
            context.__dict__["_worker_class"] = _SteadyWorker
            try:
                yield context
            except BaseException as error:
                reason = error
                raise
    except trio_parallel.BrokenWorkerError as error:
        # Raised by closing alone: a worker that was dead already is worth a line, no more. It must not stand in for
        # what ended the server.
        _log.warning("catalog.worker_died", detail=str(error))
        if reason is not None:
            raise reason from None


__all__ = ["IcebergCatalog", "WorkerPool", "open_catalog"]
