"""The Iceberg catalog, behind worker processes.

Owns: which worker process a job goes to. Does not own the processes (``arka.storage.workers``) nor what the
jobs do (``arka.iceberg``).

Encoding, commits and everything else each have processes of their own (R19). A table's encode jobs go to
one single-worker context and its commits to another, chosen by its UUID, so that parsed metadata and
manifests stay warm in one process. A large encode job is divided among the contexts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple
from uuid import UUID

import structlog
import trio

from arka.iceberg import worker
from arka.iceberg.config import CatalogConfig
from arka.options import INDEX_BYTES, IcebergOptions
from arka.records import TableDefinition, TableInfo, TableName, TableType
from arka.storage.ports import (
    CatalogListing,
    CatalogTable,
    CatalogUnavailable,
    CommitJob,
    CommitResult,
    ReadJob,
    SegmentSlice,
    StagedFiles,
    TableFrames,
    WorkUnfinished,
)
from arka.storage.workers import DeadlineMissed, Template, WorkerPool, open_pool

#: Control calls at a time; scans may take all of them but one, so that a long one does not stop CreateTable.
_CONTROL_WORKERS: Final = 2

#: Of an offset in a slice.
_OFFSET_BYTES: Final = 8

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Shards:
    """Single-worker pools for one kind of job, and one more for tables that missed their deadline (R19)."""

    def __init__(self, pools: Sequence[WorkerPool], quarantine: WorkerPool) -> None:
        self.pools = pools
        self._quarantine = quarantine
        self._quarantined: set[UUID] = set()

    async def run(self, table: TableInfo, job: Callable[[*Ts], T | Exception], *args: *Ts, beside: int = 0) -> T:
        """Run a table's job where that table's jobs run, or so many pools beside that."""
        uuid = table.uuid
        slow = uuid in self._quarantined
        pool = self._quarantine if slow else self.pools[(uuid.int + beside) % len(self.pools)]
        try:
            result = await pool.run(job, *args)
        except DeadlineMissed:
            self._quarantined.add(uuid)
            _log.warning("catalog.deadline_missed", table=str(table.name), job=job.__name__)
            raise
        if slow:
            self._quarantined.discard(uuid)
        return result

    def forget(self, uuid: UUID) -> None:
        """Forget a table that was dropped."""
        self._quarantined.discard(uuid)


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
    ) -> None:
        self._config = config
        self._config_apart = replace(config, apart=True)
        self._encode = encode
        self._commit = commit
        self._builds = builds
        self._control = control
        self._scans = trio.CapacityLimiter(_CONTROL_WORKERS - 1)
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

    async def encode(self, job: TableFrames) -> StagedFiles:
        """See ``ports.Catalog.encode``; a large job is divided among the workers."""
        parts = divide(job, len(self._encode.pools), self._config.target_file_bytes)
        staged: list[StagedFiles | None] = [None] * len(parts)
        errors: list[Exception] = []

        async def run(number: int, part: TableFrames) -> None:
            try:
                staged[number] = await self._encode.run(job.table, worker.encode, self._config, part, beside=number)
            except Exception as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for number, part in enumerate(parts[1:], 1):
                nursery.start_soon(run, number, part)
            await run(0, parts[0])
        if errors:
            raise errors[0]
        made = _join([part for part in staged if part is not None])
        if made.notes != self._noted.get(job.table.uuid, ()):
            self._noted[job.table.uuid] = made.notes
            for note in made.notes:
                _log.warning("catalog.property_unusable", table=str(job.table.name), detail=note)
        return made

    async def commit(self, job: CommitJob) -> CommitResult:
        """See ``ports.Catalog.commit``.

        What takes long before a commit, the making of an index, goes on in a process of its own, in parts: tables that
        wait for the same take turns there (R19).
        """
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

    async def scan(self, job: ReadJob, path: str) -> int:
        """See ``ports.Catalog.scan``."""
        async with self._scans:
            return await self._control.run(worker.scan, self._config, job, path)


def divide(job: TableFrames, most: int, file_bytes: int) -> list[TableFrames]:
    """Divide an encode job into consecutive parts that fill at least a file each.

    Only of tables where that makes no more files: not of partitioned ones, and not of those with a key, whose rows are
    settled together.

    Args:
        job: the whole.
        most: how many parts at most.
        file_bytes: of a file.
    """
    count = min(most, job.size // file_bytes)
    if count < 2 or job.table.partition or job.table.table_type is TableType.PRIMARY_KEY:
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
    return replace(parts[0], files=files, rows=sum(part.rows for part in parts))


@asynccontextmanager
async def open_catalog(
    options: IcebergOptions,
    data_dir: Path,
    properties: Mapping[str, str] | None = None,
    *,
    index_bytes: int = INDEX_BYTES,
) -> AsyncIterator[IcebergCatalog]:
    """Open a catalog with its worker processes; no process starts before its first job or ``start``.

    Args:
        options: the Iceberg options.
        data_dir: the server's data directory, for the embedded catalog and warehouse.
        properties: further pyiceberg properties, beside ``options.catalog``: credentials, ``s3.*``.
        index_bytes: memory that a commit worker keeps of primary-key tables between commits.

    Raises:
        ConfigurationError: an option cannot work.

    Cancellation: closing waits for running jobs, so whoever runs them must be cancelled first; then it
        takes 0.2 s per worker process as a rule, 2 s at most.
    """
    config = CatalogConfig.from_options(options, data_dir, properties or {}, index_bytes=index_bytes)
    template = Template()
    async with AsyncExitStack() as stack:

        async def pool(size: int = 1) -> WorkerPool:
            return await stack.enter_async_context(open_pool(template, size, options.job_deadline_s))

        yield IcebergCatalog(
            config,
            encode=_Shards([await pool() for _ in range(options.encode_workers)], await pool()),
            commit=_Shards([await pool() for _ in range(options.commit_workers)], await pool()),
            builds=await pool(),
            control=await pool(_CONTROL_WORKERS),
        )


__all__ = ["IcebergCatalog", "divide", "open_catalog"]
