"""Worker processes: their deadlines, their deaths, and that they never outlive the server."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trio
import trio._core._thread_cache as thread_cache

from arka.errors import ConfigurationError, DataCorruption, Fenced, InternalError, InvalidRequest
from arka.iceberg import worker
from arka.iceberg.config import CatalogConfig
from arka.options import IcebergOptions
from arka.records import TableInfo, TableName, TableType
from arka.storage.catalog import IcebergCatalog, divide, open_catalog
from arka.storage.ports import (
    CatalogListing,
    CatalogUnavailable,
    CommitJob,
    DeadlineMissed,
    SegmentSlice,
    StagedFiles,
    TableFrames,
    WorkUnfinished,
)
from arka.storage.workers import WorkerPool

from .conftest import Lake

INFO = TableInfo(
    uuid=UUID(int=4),
    name=TableName("default", "t"),
    schema=pa.schema([pa.field("n", pa.int64(), metadata={b"PARQUET:field_id": b"1"})]),
    schema_id=0,
    table_type=TableType.APPEND_ONLY,
    key_columns=(),
    spec_id=0,
    partition=(),
    location="file:///nowhere/t-00000000",
    properties={},
)


@asynccontextmanager
async def _pool(tmp_path: Path, deadline_s: float = 60) -> AsyncIterator[WorkerPool]:
    async with open_catalog(IcebergOptions(job_deadline_s=deadline_s), tmp_path) as catalog:
        yield catalog._encode.pools[0]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_worker_outlives_the_thread_that_could_have_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the pooled thread that asked for a worker does not take the worker with it."""
    monkeypatch.setattr(thread_cache, "IDLE_TIMEOUT", 0.05)
    async with _pool(tmp_path) as pool:
        first = await pool.run(os.getpid)
        await trio.to_thread.run_sync(bool)
        await trio.sleep(0.5)
        assert await pool.run(os.getpid) == first != os.getpid()


#: The threads in which a ``Traced`` was packed and unpacked in this process.
PACKED: list[int] = []
UNPACKED: list[int] = []


class Traced:
    """As large as a wide schema, and tells where that work is done."""

    def __reduce__(self) -> tuple[object, ...]:
        PACKED.append(threading.get_ident())
        return _unpack_traced, (bytes(100_000),)


def _unpack_traced(_: bytes) -> Traced:
    UNPACKED.append(threading.get_ident())
    return Traced()


def give_back(thing: Traced) -> Traced:
    """A job."""
    return thing


async def test_jobs_are_packed_and_unpacked_in_threads(tmp_path: Path) -> None:
    """T22: a schema of thousands of columns, or a list of tables, takes no time of trio's thread on its way."""
    PACKED.clear()
    UNPACKED.clear()
    async with _pool(tmp_path) as pool:
        assert isinstance(await pool.run(give_back, Traced()), Traced)
    assert len(PACKED) == len(UNPACKED) == 1
    assert threading.get_ident() not in {*PACKED, *UNPACKED}


async def test_missed_deadline_kills_the_worker(tmp_path: Path) -> None:
    """A job past its deadline ends as unavailable, its worker with it; the next job gets another (R19)."""
    async with _pool(tmp_path, deadline_s=1) as pool:
        pid = await pool.run(os.getpid)
        with pytest.raises(CatalogUnavailable, match="sleep took longer than 1 s"):
            await pool.run(time.sleep, 60)
        assert not _alive(pid)
        assert await pool.run(os.getpid) != pid


async def test_waiting_for_a_turn_is_not_counted(tmp_path: Path) -> None:
    """The deadline is the job's own: a job that waited behind another still has all of it."""
    async with _pool(tmp_path, deadline_s=1) as pool:
        await pool.run(os.getpid)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(pool.run, time.sleep, 0.6)


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGSEGV, signal.SIGKILL])
async def test_dead_worker_costs_its_job_alone(tmp_path: Path, number: signal.Signals) -> None:
    """A worker that dies, of SIGBUS on a vanished file say, fails one job; the next one runs (R9)."""
    async with _pool(tmp_path) as pool:
        with pytest.raises(CatalogUnavailable, match=rf"exit code -{number}"):
            await pool.run(signal.raise_signal, number)
        assert await pool.run(os.getpid) > 0


async def test_dead_template_costs_nothing_but_time(tmp_path: Path) -> None:
    """The process that workers are forked from may be killed: those that run go on, and it is started again."""
    async with _pool(tmp_path) as pool:
        first = await pool.run(os.getpid)
        os.kill(await pool.run(os.getppid), signal.SIGKILL)
        with contextlib.suppress(CatalogUnavailable):
            # A worker is told from a dead one by the template: it may be given up, and is replaced.
            await pool.run(os.getpid)
        second = await pool.run(os.getpid)
        with pytest.raises(CatalogUnavailable):
            await pool.run(signal.raise_signal, signal.SIGKILL)
        assert await pool.run(os.getpid) not in (first, second)
    assert not _alive(first)
    assert not _alive(second)


async def test_refused_fork_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that dies between two steps of a fork refuses the connection: the job may be asked for again."""
    async with open_catalog(IcebergOptions(), tmp_path) as catalog:
        await catalog.start()
        control = catalog._control
        (kept, *_) = control._context._worker_cache
        os.kill(kept.proc.pid, signal.SIGKILL)
        refusal = mock.Mock(side_effect=ConnectionRefusedError(111, "Connection refused"))
        with monkeypatch.context() as patched:
            patched.setattr("multiprocessing.forkserver.connect_to_new_process", refusal)
            # The first may find the dead one in the cache.
            for _ in range(3):
                with contextlib.suppress(CatalogUnavailable):
                    await catalog.list_tables()
        assert refusal.called
        assert (await catalog.list_tables()).tables == ()


async def test_dead_worker_does_not_hide_what_ended_the_server(tmp_path: Path) -> None:
    """An error that ends the server leaves the catalog's scope although a worker is found dead on the way out."""

    async def fail() -> None:
        async with _pool(tmp_path) as pool:
            os.kill(await pool.run(os.getpid), signal.SIGKILL)
            raise Fenced("epoch 1 is over")

    with pytest.raises(Fenced, match="epoch 1 is over"):
        await fail()


async def test_slow_table_is_quarantined_until_it_succeeds(tmp_path: Path) -> None:
    """A table that missed its deadline runs apart from its shard until a job of it succeeds (R19)."""
    async with open_catalog(IcebergOptions(job_deadline_s=1), tmp_path) as catalog:
        shards = catalog._encode
        other = await shards.run(INFO, os.getpid)
        with pytest.raises(CatalogUnavailable):
            await shards.run(INFO, time.sleep, 30)
        apart = await shards.run(INFO, os.getpid)
        back = await shards.run(INFO, os.getpid)
        again = await shards.pools[0].run(os.getpid)
        assert len({other, apart, back}) == 3
        assert again == back


OTHER = replace(INFO, uuid=UUID(int=5), name=TableName("default", "other"))
THIRD = replace(INFO, uuid=UUID(int=6), name=TableName("default", "third"))


def wait_for(path: Path) -> int:
    """A job that goes on until a file is there."""
    while not path.exists():
        time.sleep(0.05)
    return os.getpid()


async def test_a_long_job_that_makes_progress_lets_others_in(tmp_path: Path) -> None:
    """After its deadline a job goes on in the quarantine: tables that share its worker get another one (R19)."""
    async with open_catalog(IcebergOptions(job_deadline_s=4, encode_workers=1), tmp_path) as catalog:
        shards = catalog._encode
        (pool,) = shards.pools
        first = await shards.run(INFO, os.getpid)
        pids: list[int] = []

        async def run_long(table: TableInfo, name: str) -> None:
            progress = iter(range(1, 1_000_000))
            pids.append(await shards.run(table, wait_for, tmp_path / name, progress=lambda: next(progress)))

        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_long, INFO, "one")
                while INFO.uuid not in shards._quarantined:
                    await trio.sleep(0.05)
                # The long job ends after this one alone: it must not have to wait.
                second = await shards.run(OTHER, os.getpid)
                assert shards._quarantine._turns.borrowed_tokens == 1
                # Another long one keeps its turn until the place is free.
                nursery.start_soon(run_long, THIRD, "two")
                while THIRD.uuid not in shards._quarantined:
                    await trio.sleep(0.05)
                assert pids == []
                (tmp_path / "one").touch()
                assert await shards.run(OTHER, os.getpid) > 0
                (tmp_path / "two").touch()
        assert pids[0] == first != second
        assert OTHER.uuid not in shards._quarantined
        assert pool._processes.total_tokens == 1
        assert [limiter.borrowed_tokens for limiter in (pool._turns, shards._quarantine._turns)] == [0, 0]
        # Back after a job that ended in time.
        assert await shards.run(INFO, os.getpid) not in (first, second)
        assert INFO.uuid not in shards._quarantined


async def test_a_job_that_can_be_no_smaller_gets_more_time(tmp_path: Path) -> None:
    """Each missed deadline doubles the next one's: a long job without progress is not begun again for ever (R19)."""
    async with open_catalog(IcebergOptions(job_deadline_s=3), tmp_path) as catalog:
        shards = catalog._commit
        with trio.fail_after(120):
            for _ in range(3):
                with contextlib.suppress(DeadlineMissed):
                    await shards.run(INFO, time.sleep, 4)
                    break
        # It ended late: it stays until one ends in time.
        assert shards._quarantined[INFO.uuid] >= 1
        await shards.run(INFO, os.getpid)
        assert INFO.uuid not in shards._quarantined


def in_parts(config: CatalogConfig, job: CommitJob) -> tuple[list[bool], list[int]] | WorkUnfinished:
    """A commit whose index takes four jobs to make."""
    with Path(config.index_dir).open("a+") as file:
        file.write(f"{config.apart} {os.getpid()} ")
        file.seek(0)
        done = file.read().split()
    if len(done) < 8:
        return WorkUnfinished(f"{len(done) // 2} of 4 of {job.table.name}")
    return [word == "True" for word in done[::2]], list(map(int, done[1::2]))


async def test_an_index_is_made_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that waits for an index holds its worker up for the first part alone, and no slow table ever (R19)."""
    monkeypatch.setattr(worker, "commit", in_parts)
    job = CommitJob(INFO, UUID(int=1), 1, UUID(int=2), StagedFiles(0, 1, (), 0))
    async with open_catalog(IcebergOptions(), tmp_path) as catalog:
        apart, pids = await catalog._run_commit(job)  # type: ignore[misc]
        assert apart == [False, True, True, True]
        assert len(set(pids[1:])) == 1
        assert pids[0] != pids[1]
        assert await catalog._commit.run(INFO, os.getpid) == pids[0]
        assert await catalog._commit._quarantine.run(os.getpid) not in pids


async def test_encode_and_commit_have_processes_of_their_own(tmp_path: Path) -> None:
    """Encoding, commits and control calls never share a worker; a table keeps its own (R19)."""
    async with open_catalog(IcebergOptions(encode_workers=2, commit_workers=2), tmp_path) as catalog:
        encode = {await pool.run(os.getpid) for pool in catalog._encode.pools}
        commit = {await pool.run(os.getpid) for pool in catalog._commit.pools}
        control = {await catalog._control.run(os.getpid)}
        assert len(encode | commit | control) == 5
        mine = {await catalog._commit.run(INFO, os.getpid) for _ in range(3)}
        assert len(mine) == 1
        assert mine <= commit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_group_do_not_stop_workers(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C in a terminal and a service manager's SIGTERM reach workers too: they go on until closed."""
    async with _pool(tmp_path) as pool:
        pid = await pool.run(os.getpid)
        os.kill(pid, number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run, time.sleep, 0.3)
            await trio.sleep(0.1)
            os.kill(pid, number)
        assert await pool.run(os.getpid) == pid
    assert not _alive(pid)


async def test_cancelled_job_is_killed(tmp_path: Path) -> None:
    """Closing never waits for a job: cancelling it kills its worker."""
    async with _pool(tmp_path) as pool:
        pid = await pool.run(os.getpid)
        with trio.move_on_after(0.2) as scope:
            await pool.run(time.sleep, 60)
        assert scope.cancelled_caught
        assert not _alive(pid)


SERVER = """
    import os, sys, time
    from pathlib import Path
    import trio
    from arka.options import IcebergOptions
    from arka.storage.catalog import open_catalog

    async def main():
        directory = Path(sys.argv[1])
        async with open_catalog(IcebergOptions(), directory) as catalog, trio.open_nursery() as nursery:
            pools = [*catalog._encode.pools, *catalog._commit.pools, catalog._control]
            pids = [await pool.run(os.getpid) for pool in pools]
            for pool in pools:
                nursery.start_soon(pool.run, time.sleep, 60)
            await trio.sleep(0.2)
            print(*pids, flush=True)
            await trio.sleep_forever()

    if __name__ == "__main__":
        trio.run(main)
"""


@pytest.mark.process
def test_killed_server_leaves_no_worker(tmp_path: Path) -> None:
    """SIGKILL of the server kills its workers in the middle of their jobs (R15)."""
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    server = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with server.stdout:
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert len(pids) == 4
        assert all(map(_alive, pids))
        server.kill()
        server.wait()
    while any(map(_alive, pids)):
        time.sleep(0.01)


@pytest.mark.process
def test_server_never_loads_pyiceberg() -> None:
    """The server names its jobs without importing what they need: that is for the workers."""
    code = "import sys, arka.storage.catalog; print([m for m in sys.modules if m.split('.')[0] in BAD])"
    found = subprocess.run(
        [sys.executable, "-c", f"BAD = ('pyiceberg', 'sqlalchemy', 'pydantic')\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


async def test_start_warms_every_pool(tmp_path: Path) -> None:
    """After ``start`` the first jobs find their workers running, and an SQL catalog has its tables."""
    async with open_catalog(IcebergOptions(), tmp_path) as catalog:
        await catalog.start()
        pools = [*catalog._encode.pools, *catalog._commit.pools, catalog._control]
        assert [pool._context.statistics().idle_workers for pool in pools] == [1, 1, 1, 1]
        assert (tmp_path / "catalog.db").exists()
        assert await catalog.list_tables() == CatalogListing(())


async def test_start_without_a_catalog_is_unavailable(tmp_path: Path) -> None:
    """A catalog that does not answer makes ``start`` fail in a way that may pass."""
    options = IcebergOptions(catalog_uri="http://127.0.0.1:9")
    async with open_catalog(options, tmp_path) as catalog:
        with pytest.raises(CatalogUnavailable, match="ConnectionError"):
            await catalog.start()


async def test_catalog_in_memory_is_refused(tmp_path: Path) -> None:
    """A database that only one process could see is a mistake of the settings, found at start."""
    async with open_catalog(IcebergOptions(catalog_uri="sqlite:///:memory:"), tmp_path) as catalog:
        with pytest.raises(ConfigurationError, match="in memory"):
            await catalog.start()


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[IcebergCatalog]:
    async with open_catalog(IcebergOptions(), tmp_path) as opened:
        yield opened


async def test_errors_cross_as_what_they_are(catalog: IcebergCatalog, lake: Lake, tmp_path: Path) -> None:
    """A definite error keeps its type and fields, an unknown one becomes unavailable, a bug internal."""
    # Each job looks for catalog and table first.
    info = lake.create(INFO.schema)
    folder = SegmentSlice(str(tmp_path), 1, 1, b"")
    job = TableFrames(info, {}, UUID(int=1), 0, 1, (folder,))
    with pytest.raises(CatalogUnavailable, match="is a directory"):
        await catalog.encode(job)
    missing = SegmentSlice(str(tmp_path / "gone"), 1, 1, b"")
    with pytest.raises(DataCorruption, match="found no file"):
        await catalog.encode(TableFrames(info, {}, UUID(int=1), 0, 1, (missing,)))
    (tmp_path / "short").write_bytes(b"ARKS")
    short = SegmentSlice(str(tmp_path / "short"), 1, 1, b"")
    with pytest.raises(DataCorruption) as damaged:
        await catalog.encode(TableFrames(info, {}, UUID(int=1), 0, 1, (short,)))
    assert damaged.value.path == short.path
    assert damaged.value.__cause__ is None
    nonsense: Any = 5
    with pytest.raises(InternalError, match="AttributeError"):
        await catalog.encode(TableFrames(info, {}, UUID(int=1), 0, 1, (nonsense,)))


@pytest.mark.parametrize(
    "error",
    [
        DataCorruption("/segment", 64, "a frame", "zeros"),
        InvalidRequest("No such column: x"),
        InternalError("broken", retryable=True),
        CatalogUnavailable("refused"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error: Exception) -> None:
    """Errors come out of a pickle as they went in: workers hand them over that way."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_jobs_are_importable_by_name() -> None:
    """Each job is found again under its name in a fresh process."""
    for name in worker.__all__:
        job = getattr(worker, name)
        assert pickle.loads(pickle.dumps(job)) is job


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("pieces", [[1], [5], [3, 4], [1, 1, 1, 1], [10, 1, 7]])
def test_parts_of_a_job_are_the_job(most: int, pieces: list[int]) -> None:
    """However a job is divided, its frames stay in order, and no part is empty."""
    offsets = iter(range(1_000))
    slices = tuple(
        SegmentSlice(f"s{number}", number, 1, b"".join(next(offsets).to_bytes(8, "little") for _ in range(count)))
        for number, count in enumerate(pieces)
    )
    job = TableFrames(INFO, {}, UUID(int=1), 0, 99, slices, 4 << 20)
    parts = divide(job, most, 1 << 20)
    assert len(parts) == min(most, 4, sum(pieces))
    assert all(piece.offsets for part in parts for piece in part.slices)
    for number, piece in enumerate(slices):
        found = [made.offsets for part in parts for made in part.slices if made.path == f"s{number}"]
        assert b"".join(found) == piece.offsets
    assert [piece.segment for part in parts for piece in part.slices] == sorted(
        piece.segment for part in parts for piece in part.slices
    )
    assert divide(replace(job, size=(2 << 20) - 1), 8, 1 << 20) == [replace(job, size=(2 << 20) - 1)]
    keyed = replace(job, table=replace(INFO, table_type=TableType.PRIMARY_KEY))
    assert divide(keyed, 8, 1 << 20) == [keyed]


async def test_a_large_job_is_encoded_by_several_workers(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files come in the order of the LSNs; a part that fails is the whole job's failure."""
    schema = pa.schema([pa.field("n", pa.int64())])
    info = lake.create(schema)
    batches = [
        pa.RecordBatch.from_arrays([pa.array(range(number * 100, number * 100 + 100))], schema=schema)
        for number in range(9)
    ]
    job = replace(lake.frames(info, batches, 0), size=64 << 20)
    options = IcebergOptions(encode_workers=4, target_file_bytes=16 << 20)
    async with open_catalog(options, lake.directory) as catalog:
        staged = await catalog.encode(job)
        assert [file.rows for file in staged.files] == [200, 200, 200, 300]
        assert (staged.after_lsn, staged.through_lsn, staged.rows) == (0, 9, 900)
        lake.commit(info, staged)
        files = [Path(file.path.removeprefix("file://")) for file in staged.files]
        read = [number for path in files for number in pq.read_table(path).column("n").to_pylist()]
        assert read == list(range(900))
        wrong = replace(job.slices[0], offsets=job.slices[0].offsets[:-8] + (1 << 40).to_bytes(8, "little"))
        with pytest.raises(DataCorruption):
            await catalog.encode(replace(job, slices=(wrong,)))
        assert (await catalog.encode(job)).rows == 900
