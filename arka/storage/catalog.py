"""The Iceberg catalog, behind worker processes.

Owns: which worker process a job goes to. Does not own the processes (``arka.storage.workers``) nor what the
jobs do (``arka.iceberg``).

Encoding, commits and everything else each have processes of their own (R19). A table's encode jobs go to
one single-worker context and its commits to another, chosen by its UUID, so that parsed metadata and
manifests stay warm in one process. A large encode job is divided among the contexts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple
from uuid import UUID

import structlog
import trio

from arka.errors import ArkaError, InternalError
from arka.iceberg import worker
from arka.iceberg.attempts import finished_files
from arka.iceberg.config import CatalogConfig
from arka.options import INDEX_BYTES, READS, IcebergOptions
from arka.records import TableDefinition, TableInfo, TableName, TableType
from arka.storage.attempts import Attempts
from arka.storage.ports import (
    Answer,
    CatalogListing,
    CatalogTable,
    CatalogUnavailable,
    CommitJob,
    CommitOutcome,
    CommitResult,
    DeadlineMissed,
    ReadJob,
    SegmentSlice,
    StagedFiles,
    TableFrames,
    TableMissing,
    WorkUnfinished,
)
from arka.storage.readpipe import READ_FOLDER, ReadPipe, open_read_pipe
from arka.storage.workers import JobWatch, Template, WorkerPool, open_pool

#: Control calls at a time.
_CONTROL_WORKERS: Final = 2

#: How long a worker has to notice that nobody wants its answer any more, in seconds; then it is killed.
_GIVING_UP_S: Final = 0.25

#: How long a reader process waits for the next read before it ends, in seconds.
_READER_IDLE_S: Final = 60.0

#: How long rewriting the paths of all tables may take, in seconds.
_ADOPT_S: Final = 86_400.0

#: How many deadlines a job in quarantine may have at most: each miss doubles its time.
_MOST_PATIENCE: Final = 8

#: Of an offset in a slice.
_OFFSET_BYTES: Final = 8

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Shards:
    """Single-worker pools for one kind of job, and one more for tables whose jobs take long (R19).

    A job that misses its deadline is killed, and its table's next one runs in the quarantine. A job that makes progress
    goes on: after the same time it moves there with its process, and other tables get a new one. A table leaves the
    quarantine when a job of it has ended in time.
    """

    def __init__(self, pools: Sequence[WorkerPool], quarantine: WorkerPool) -> None:
        self.pools = pools
        self._quarantine = quarantine
        # How often in a row each table's jobs were killed; tables that are not in here are not in quarantine.
        self._quarantined: dict[UUID, int] = {}

    async def run(
        self,
        table: TableInfo,
        job: Callable[[*Ts], T | Exception],
        *args: *Ts,
        beside: int = 0,
        progress: Callable[[], int] | None = None,
    ) -> T:
        """Run a table's job where that table's jobs run, or so many pools beside that."""
        uuid = table.uuid
        missed = self._quarantined.get(uuid)
        if missed is None:
            pool = self.pools[(uuid.int + beside) % len(self.pools)]
            watch = JobWatch(self._quarantine, partial(self._quarantine_long, table, job.__name__))
        else:
            pool = self._quarantine
            # A job that can be made no smaller ends some day: there it holds up none but its like.
            watch = JobWatch(patience=min(2**missed, _MOST_PATIENCE))
        try:
            result = await pool.run(job, *args, progress=progress, watch=watch)
        except DeadlineMissed:
            self._quarantined[uuid] = self._quarantined.get(uuid, 0) + 1
            _log.warning("catalog.deadline_missed", table=str(table.name), job=job.__name__)
            raise
        if watch.took_s <= pool.deadline_s:
            self._quarantined.pop(uuid, None)
        return result

    def _quarantine_long(self, table: TableInfo, job: str) -> None:
        self._quarantined.setdefault(table.uuid, 0)
        _log.warning("catalog.job_long", table=str(table.name), job=job)

    def forget(self, uuid: UUID) -> None:
        """Forget a table that was dropped."""
        self._quarantined.pop(uuid, None)


class IcebergCatalog:
    """``ports.Catalog`` on pyiceberg in worker processes; made by ``open_catalog``."""

    def __init__(
        self,
        config: CatalogConfig,
        *,
        encode: _Shards,
        commit: _Shards,
        builds: WorkerPool,
        control: WorkerPool,
        reads: WorkerPool,
        read_dir: Path,
        attempts: Attempts,
        open_fresh: Callable[[], AbstractAsyncContextManager[WorkerPool]],
    ) -> None:
        self._config = config
        self._config_apart = replace(config, apart=True)
        self._encode = encode
        self._commit = commit
        self._builds = builds
        self._control = control
        self._attempts = attempts
        self._open_fresh = open_fresh
        self._reads = reads
        self._read_dir = read_dir
        # What was last said of each table's properties: once, not with each commit.
        self._noted: dict[UUID, tuple[str, ...]] = {}

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
        await self._control.run(worker.connect, config)
        failures: list[CatalogUnavailable] = []

        async def warm(pool: WorkerPool, job: Callable[[*Ts], Exception | None], *args: *Ts) -> None:
            try:
                await pool.run(job, *args)
            except CatalogUnavailable as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for pool in self._encode.pools:
                nursery.start_soon(warm, pool, worker.do_nothing)
            for pool in self._commit.pools:
                nursery.start_soon(warm, pool, worker.connect, config)
        if failures:
            raise failures[0]

    async def create_table(self, definition: TableDefinition, location_suffix: str) -> CatalogTable:
        """See ``ports.Catalog.create_table``."""
        return await self._control.run(worker.create_table, self._config, definition, location_suffix)

    async def drop_table(self, name: TableName, uuid: UUID, *, purge: bool) -> None:
        """See ``ports.Catalog.drop_table``."""
        await self._control.run(worker.drop_table, self._config, name, uuid, purge)
        self._encode.forget(uuid)
        self._noted.pop(uuid, None)
        self._commit.forget(uuid)

    async def forget_others(self, tables: frozenset[UUID]) -> None:
        """See ``ports.Catalog.forget_others``."""
        await self._control.run(worker.forget_others, self._config, tables)

    async def load_table(self, name: TableName) -> CatalogTable:
        """See ``ports.Catalog.load_table``."""
        return await self._control.run(worker.load_table, self._config, name)

    async def list_tables(self) -> CatalogListing:
        """See ``ports.Catalog.list_tables``."""
        return await self._control.run(worker.list_tables, self._config)

    async def encode(self, job: TableFrames, *, fresh: bool = False) -> StagedFiles:
        """See ``ports.Catalog.encode``; a large job is divided among the workers."""
        try:
            made = await self._encode_parts(job, fresh=fresh)
        except Exception:
            # Its processes are gone or idle, and nobody was given its files.
            await self._discard(job.table, given=False)
            raise
        if made.notes != self._noted.get(job.table.uuid, ()):
            self._noted[job.table.uuid] = made.notes
            for note in made.notes:
                _log.warning("catalog.property_unusable", table=str(job.table.name), detail=note)
        return made

    async def _encode_parts(self, job: TableFrames, *, fresh: bool) -> StagedFiles:
        count = 1 if fresh else len(self._encode.pools)
        try:
            parts = [await self._attempts.begin(part) for part in divide(job, count, self._config.target_file_bytes)]
        except OSError as error:
            raise CatalogUnavailable(f"the journal of an attempt cannot be made: {error}") from error
        if fresh:
            async with self._open_fresh() as pool:
                return await pool.run(worker.encode, self._config, parts[0], progress=_progress_of(parts[0]))
        staged: list[StagedFiles | None] = [None] * len(parts)
        errors: list[Exception] = []

        async def run(number: int, part: TableFrames) -> None:
            try:
                staged[number] = await self._encode.run(
                    job.table, worker.encode, self._config, part, beside=number, progress=_progress_of(part)
                )
            except Exception as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for number, part in enumerate(parts[1:], 1):
                nursery.start_soon(run, number, part)
            await run(0, parts[0])
        if errors:
            raise errors[0]
        return _join([part for part in staged if part is not None])

    async def _discard(self, table: TableInfo, *, given: bool) -> None:
        """Delete what attempts at a table's jobs left; what cannot be deleted now is looked at again later."""
        for journal, record in await self._attempts.over(table.uuid, given=given):
            try:
                if record.files:
                    gone = await self._builds.run(
                        worker.discard_attempt, self._config, table, record.commits, record.files
                    )
                    _log.info("catalog.attempt_over", table=str(table.name), files=len(record.files), deleted=gone)
            except (CatalogUnavailable, TableMissing, ArkaError) as error:
                _log.debug("catalog.attempt_left", table=str(table.name), reason=str(error))
                return
            await self._attempts.end(table.uuid, [journal])

    async def commit(self, job: CommitJob) -> CommitResult:
        """See ``ports.Catalog.commit``.

        What takes long before a commit, the making of an index, goes on in a process of its own, in parts: tables that
        wait for the same take turns there (R19).
        """
        uuid, journals = job.table.uuid, job.staged.journals
        try:
            await self._attempts.give(journals, job.commit_id)
        except OSError as error:
            raise CatalogUnavailable(f"the journal of an attempt cannot be written: {error}") from error
        result = await self._run_commit(job)
        if result.outcome is CommitOutcome.COMMITTED:
            if result.named:
                await self._attempts.end(uuid, journals)
            if self._attempts.waiting(uuid):
                # The table has moved: no earlier commit of this log can land any more.
                await self._discard(job.table, given=True)
        return result

    async def _run_commit(self, job: CommitJob) -> CommitResult:
        try:
            return await self._commit.run(job.table, worker.commit, self._config, job)
        except WorkUnfinished as error:
            unfinished = error
        while True:
            _log.info("catalog.unfinished", table=str(job.table.name), detail=str(unfinished))
            try:
                return await self._builds.run(worker.commit, self._config_apart, job)
            except WorkUnfinished as error:
                unfinished = error

    async def look_at(self, table: TableInfo) -> None:
        """See ``ports.Catalog.look_at``."""
        await self._control.run(worker.look_at, self._config, table)

    async def scan(self, job: ReadJob, answer: Answer) -> int:
        """See ``ports.Catalog.scan``."""
        async with open_read_pipe(self._read_dir) as pipe:
            return await self._scan(job, answer, pipe)

    async def _scan(self, job: ReadJob, answer: Answer, pipe: ReadPipe) -> int:
        rows = 0
        complete = True
        failures: list[Exception] = []
        ended = trio.Event()
        working = trio.CancelScope(shield=True)

        async def work() -> None:
            nonlocal rows
            try:
                with working:
                    rows = await self._reads.run(worker.scan, self._config, job, pipe.folder, progress=pipe.progress)
            except Exception as error:
                failures.append(error)
            finally:
                pipe.end()
                ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            try:
                complete = await pipe.run(answer)
            except Exception as error:
                failures.insert(0, error)
            finally:
                # A worker whose answer is not wanted any more finds that out soon, and its process lives on.
                pipe.close()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _GIVING_UP_S):
                    await ended.wait()
                working.cancel()
        if failures:
            raise failures[0]
        if not complete:
            raise InternalError(f"the answer of {job.table.name} ended inside a message")
        return rows


def _progress_of(job: TableFrames) -> Callable[[], int]:
    return partial(finished_files, job.journal)


def divide(job: TableFrames, most: int, file_bytes: int) -> list[TableFrames]:
    """Divide an encode job into consecutive parts that fill at least a file each.

    Only of tables where that makes no more files: not of partitioned ones, now or when rows were accepted, and not of
    those with a key, whose rows are settled together.

    Args:
        job: the whole.
        most: how many parts at most.
        file_bytes: of a file.
    """
    count = min(most, job.size // file_bytes)
    if count < 2 or job.table.partition or job.accepted or job.table.table_type is TableType.PRIMARY_KEY:
        return [job]
    frames = sum(len(piece.offsets) for piece in job.slices) // _OFFSET_BYTES
    count = max(1, min(count, frames))
    ends = [frames * (number + 1) // count for number in range(count)]
    parts: list[list[SegmentSlice]] = [[] for _ in range(count)]
    at = number = 0
    for piece in job.slices:
        left = memoryview(piece.offsets)
        while left:
            taken = min(len(left) // _OFFSET_BYTES, ends[number] - at)
            parts[number].append(replace(piece, offsets=bytes(left[: taken * _OFFSET_BYTES])))
            left = left[taken * _OFFSET_BYTES :]
            at += taken
            number += at == ends[number]
    return [replace(job, slices=tuple(slices), size=job.size // count) for slices in parts]


def _join(parts: list[StagedFiles]) -> StagedFiles:
    """Make one of what became of a job's parts."""
    if len(parts) == 1:
        return parts[0]
    files = tuple(file for part in parts for file in part.files)
    journals = tuple(journal for part in parts for journal in part.journals)
    return replace(parts[0], files=files, rows=sum(part.rows for part in parts), journals=journals)


@asynccontextmanager
async def open_catalog(
    options: IcebergOptions,
    data_dir: Path,
    properties: Mapping[str, str] | None = None,
    *,
    index_bytes: int = INDEX_BYTES,
    partitions: int = 10_000,
    reads: int = READS,
) -> AsyncIterator[IcebergCatalog]:
    """Open a catalog with its worker processes; no process starts before its first job or ``start``.

    Args:
        options: the Iceberg options.
        data_dir: the server's data directory, for the embedded catalog and warehouse.
        properties: further pyiceberg properties, beside ``options.catalog``: credentials, ``s3.*``.
        index_bytes: memory that a commit worker keeps of primary-key tables between commits.
        partitions: most partitions that a write may touch under a spec that is newer than it (R27).
        reads: reads at a time, each in a process of its own (T27).

    Raises:
        ConfigurationError: an option cannot work.

    Cancellation: closing waits for running jobs, so whoever runs them must be cancelled first; then it
        takes 0.2 s per worker process as a rule, 2 s at most.
    """
    config = CatalogConfig.from_options(
        options, data_dir, properties or {}, index_bytes=index_bytes, partitions=partitions
    )
    template = Template()
    async with AsyncExitStack() as stack:

        async def pool(size: int = 1) -> WorkerPool:
            return await stack.enter_async_context(open_pool(template, size, options.job_deadline_s))

        readers = open_pool(
            template, reads, options.job_deadline_s, idle_s=_READER_IDLE_S, initialise=worker.initialise_reader
        )

        attempts = Attempts(config.attempts_dir)
        await attempts.load()
        yield IcebergCatalog(
            config,
            encode=_Shards([await pool() for _ in range(options.encode_workers)], await pool()),
            commit=_Shards([await pool() for _ in range(options.commit_workers)], await pool()),
            builds=await pool(),
            control=await pool(_CONTROL_WORKERS),
            reads=await stack.enter_async_context(readers),
            read_dir=data_dir / READ_FOLDER,
            attempts=attempts,
            open_fresh=partial(open_pool, template, 1, options.job_deadline_s),
        )


async def adopt_warehouse(config: CatalogConfig, old: str, new: str, others: tuple[tuple[str, str], ...]) -> list[str]:
    """Rewrite the paths of all tables in a worker process; see ``arka.iceberg.adopt``.

    Cancellation: the worker is killed; the catalog's transaction has happened or not.
    """
    async with open_pool(Template(), 1, _ADOPT_S) as pool:
        return await pool.run(worker.adopt, config, old, new, others)


__all__ = ["IcebergCatalog", "adopt_warehouse", "divide", "open_catalog"]
