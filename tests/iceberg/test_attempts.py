"""Attempts at encode jobs: no failed or killed one leaves files for good, and progress is no delay (R32)."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest
import trio

from arka.iceberg import adopt, attempts, commit, encode, fileio, parquet, worker
from arka.iceberg.config import CatalogConfig
from arka.iceberg.garbage import Garbage
from arka.iceberg.leftovers import discard_attempt, own_paths
from arka.options import IcebergOptions
from arka.records import TableInfo
from arka.storage.attempts import Attempts
from arka.storage.catalog import IcebergCatalog, open_catalog
from arka.storage.ports import (
    CatalogUnavailable,
    CommitJob,
    CommitOutcome,
    DeadlineMissed,
    StagedFiles,
    TableFrames,
    UnwritableRows,
)

from .conftest import LOG, Lake

SCHEMA = pa.schema([("n", pa.int64())])
KEYED = pa.schema([pa.field("n", pa.int64(), nullable=False)])


def rows(info: TableInfo, *values: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array(values, pa.int64())], schema=info.schema)


def data_files(lake: Lake, info: TableInfo) -> list[Path]:
    return lake.files(info, ".parquet")


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[IcebergCatalog]:
    async with open_catalog(IcebergOptions(), tmp_path) as opened:
        yield opened


def write_and_hang(config: CatalogConfig, job: TableFrames) -> StagedFiles:
    """Encode, and then hang."""
    made = encode.encode(config, job)
    time.sleep(600)
    return made


def write_and_fail(config: CatalogConfig, job: TableFrames) -> Exception:
    encode.encode(config, job)
    return CatalogUnavailable("the network is gone")


def write_and_refuse(config: CatalogConfig, job: TableFrames) -> Exception:
    encode.encode(config, job)
    return UnwritableRows("no such value")


@pytest.mark.parametrize("fault", [write_and_hang, write_and_fail, write_and_refuse])
@pytest.mark.parametrize("fresh", [False, True])
async def test_a_failed_encode_leaves_no_files(
    lake: Lake, tmp_path: Path, fault: Any, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed or failed attempt wrote is gone when the job's error is told, and so is its journal."""
    info = lake.create(SCHEMA, (0, "identity"))
    job = lake.frames(info, [rows(info, 1, 2, 3)], 0)
    monkeypatch.setattr(worker, "encode", fault)
    options = IcebergOptions(job_deadline_s=8 if fault is write_and_hang else 120)
    async with open_catalog(options, tmp_path) as catalog:
        with pytest.raises((CatalogUnavailable, UnwritableRows)) as caught:
            await catalog.encode(job, fresh=fresh)
    assert isinstance(caught.value, DeadlineMissed) == (fault is write_and_hang)
    assert data_files(lake, info) == []
    assert not any((lake.directory / "attempts").iterdir())


def finish_files_slowly(config: CatalogConfig, job: TableFrames) -> StagedFiles:
    """Take longer than the deadline, and finish a file well within it each time."""
    with attempts.Journal(job.journal).open() as journal:
        for number in range(8):
            time.sleep(1.5)
            journal.begin(f"file:///none/{number}")
            journal.finished()
    return StagedFiles(job.after_lsn, job.through_lsn, (), 0)


async def test_a_job_that_finishes_files_is_not_late(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline counts from the last finished file."""
    info = lake.create(SCHEMA)
    monkeypatch.setattr(worker, "encode", finish_files_slowly)
    async with open_catalog(IcebergOptions(job_deadline_s=10), tmp_path) as catalog:
        # A busy machine takes seconds to start a worker: that is not what is tried here.
        await catalog.start()
        made = await catalog.encode(lake.frames(info, [rows(info, 1)], 0))
    assert made.files == ()


async def test_files_of_a_commit_that_lost_go_with_the_next(lake: Lake, catalog: IcebergCatalog) -> None:
    """Files that were given to a commit stay until the table has moved, and go if no snapshot names them."""
    info = lake.create(SCHEMA)
    lost = await catalog.encode(lake.frames(info, [rows(info, 1)], 5))
    result = await catalog.commit(lake.job(info, lost))
    assert result.outcome is CommitOutcome.RECUT
    assert len(data_files(lake, info)) == 1
    kept = await catalog.encode(lake.frames(info, [rows(info, 2)], 0))
    assert (await catalog.commit(lake.job(info, kept))).outcome is CommitOutcome.COMMITTED
    assert [f"file://{path}" for path in data_files(lake, info)] == [file.path for file in kept.files]
    assert not any((lake.directory / "attempts").iterdir())


async def test_what_an_earlier_process_left_goes_with_the_next_commit(lake: Lake, tmp_path: Path) -> None:
    """The journal of an attempt whose server died tells the next one which files to look at."""
    info = lake.create(SCHEMA, (0, "identity"))
    earlier = Attempts(lake.config.attempts_dir)
    job = await earlier.begin(lake.frames(info, [rows(info, 1, 2)], 0))
    encode.encode(lake.config, job)
    assert len(data_files(lake, info)) == 2
    async with open_catalog(IcebergOptions(), tmp_path) as catalog:
        staged = await catalog.encode(lake.frames(info, [rows(info, 1, 2)], 0))
        await catalog.commit(lake.job(info, staged))
    assert {f"file://{path}" for path in data_files(lake, info)} == {file.path for file in staged.files}


def commit_and_hang(config: CatalogConfig, job: CommitJob) -> Any:
    made = commit.commit(config, job)
    Path(config.attempts_dir, "reached").touch()
    time.sleep(600)
    return made


def hang_and_commit(config: CatalogConfig, job: CommitJob) -> Any:
    Path(config.attempts_dir, "reached").touch()
    time.sleep(600)
    return commit.commit(config, job)


def encode_and_hang(config: CatalogConfig, job: TableFrames) -> StagedFiles:
    encode.encode(config, job)
    Path(config.attempts_dir, "reached").touch()
    time.sleep(600)
    raise AssertionError


@pytest.mark.parametrize("key", [(), ("n",)], ids=["append", "key"])
@pytest.mark.parametrize("fault", [encode_and_hang, hang_and_commit, commit_and_hang])
async def test_what_a_cancelled_attempt_left(
    lake: Lake, tmp_path: Path, fault: Any, key: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is set apart cancels what is under way: the mark says whether it landed; its files go, or stay.

    So no row is there twice, none is missing, and no file is left that no snapshot names (R15, R16, R32, R33).
    """
    info = lake.create(KEYED, (0, "identity"), key=key)
    reached = Path(lake.config.attempts_dir, "reached")
    real = worker.encode if fault is encode_and_hang else worker.commit
    monkeypatch.setattr(worker, "encode" if fault is encode_and_hang else "commit", fault)
    async with open_catalog(IcebergOptions(), tmp_path) as catalog:
        async with trio.open_nursery() as nursery:

            async def attempt() -> None:
                staged = await catalog.encode(lake.frames(info, [rows(info, 1, 2)], 0))
                await catalog.commit(lake.job(info, staged))

            nursery.start_soon(attempt)
            with trio.fail_after(60):
                while not reached.exists():
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        reached.unlink()
        assert list(Path(lake.config.attempts_dir).iterdir())
        monkeypatch.setattr(worker, "encode" if fault is encode_and_hang else "commit", real)
        staged = await catalog.encode(lake.frames(info, [rows(info, 1, 2), rows(info, 3)], 0))
        result = await catalog.commit(lake.job(info, staged))
        if fault is commit_and_hang:
            # It had landed: the table stands at 1, and what comes next begins there.
            assert (result.outcome, result.committed_lsn) == (CommitOutcome.RECUT, 1)
            staged = await catalog.encode(lake.frames(info, [rows(info, 3)], 1))
            result = await catalog.commit(lake.job(info, staged))
        assert result.outcome is CommitOutcome.COMMITTED
    assert sorted(lake.table(info).scan().to_arrow()["n"].to_pylist()) == [1, 2, 3]
    named = {file["file_path"] for file in lake.table(info).inspect.files().to_pylist()}
    assert {f"file://{path}" for path in data_files(lake, info)} == named
    assert not any((lake.directory / "attempts").iterdir())


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("key", [(), ("n",)], ids=["append", "key"])
async def test_a_copy_never_deletes_files_of_its_original(
    make_lake: Callable[..., Lake], tmp_path: Path, given: bool, key: tuple[str, ...]
) -> None:
    """A copied data directory has the journals of its original, which goes on and commits what they name (R29).

    The copy deletes what it has of such files itself, since no commit of its own names them.
    """
    original = make_lake(tmp_path / "original")
    info = original.create(KEYED, (0, "identity"), key=key)
    attempts_of = Attempts(original.config.attempts_dir)
    job = await attempts_of.begin(original.frames(info, [rows(info, 1, 2)], 0))
    staged = encode.encode(original.config, job)
    if given:
        await attempts_of.give(staged.journals, uuid4())
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    copy = make_lake(tmp_path / "copy")
    adopt.adopt(copy.config, adopt.Move(original.config.warehouse, copy.config.warehouse))
    assert original.commit(info, staged).outcome is CommitOutcome.COMMITTED
    theirs = data_files(original, info)
    ours = copy.reload(info)
    assert len(data_files(copy, ours)) == len(theirs) == 2
    async with open_catalog(IcebergOptions(), tmp_path / "copy") as catalog:
        made = await catalog.encode(copy.frames(ours, [rows(ours, 7)], 0))
        assert (await catalog.commit(copy.job(ours, made))).outcome is CommitOutcome.COMMITTED
    assert data_files(original, info) == theirs
    assert sorted(original.table(info).scan().to_arrow()["n"].to_pylist()) == [1, 2]
    assert [f"file://{path}" for path in data_files(copy, ours)] == [file.path for file in made.files]
    assert not any((copy.directory / "attempts").iterdir())


def test_files_of_other_tables_are_not_ours() -> None:
    """What a journal names is looked for below the table's location, by the folder that is its own (R5, R29)."""
    here = "file:///b/warehouse/default/t-0123abcd"
    named = [
        "file:///b/warehouse/default/t-0123abcd/data/x.parquet",
        "file:///a/warehouse/default/t-0123abcd/data/n=1/y.parquet",
        "s3://lake/default/t-0123abcd/data/z.parquet",
        "file:///b/warehouse/default/t-9999abcd/data/x.parquet",
        "file:///b/warehouse/default/t-0123abcde/data/x.parquet",
        "file:///a/t-0123abcd/../../x.parquet",
        "file:///etc/passwd",
    ]
    assert own_paths(here, named) == [
        f"{here}/data/x.parquet",
        f"{here}/data/n=1/y.parquet",
        f"{here}/data/z.parquet",
    ]


def journalled(lake: Lake, info: TableInfo) -> StagedFiles:
    journal = attempts.start(lake.config.attempts_dir, uuid4(), info.uuid)
    job = lake.frames(info, [rows(info, 7)], 0)
    made = TableFrames(info, job.schemas, LOG, 0, 1, job.slices, attempt="a", journal=journal)
    return encode.encode(lake.config, made)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("expired", [False, True])
def test_files_that_a_commit_names_are_never_deleted(lake: Lake, expired: bool, told: bool) -> None:
    """A commit whose answer was lost may have landed, and others may have expired its snapshot since.

    A journal that was copied before the commit, or lost its last line with the power, does not tell of it.
    """
    info = lake.create(SCHEMA)
    staged = journalled(lake, info)
    job: CommitJob = lake.job(info, staged)
    (journal,) = staged.journals
    if told:
        attempts.give(journal, job.commit_id)
    assert commit.commit(lake.config, job).named
    lake.append(info, [rows(info, 8)], 1)
    if expired:
        table = lake.table(info)
        table.maintenance.expire_snapshots().by_id(table.metadata.snapshots[0].snapshot_id).commit()
    record = attempts.read(journal)
    assert record.commits == ((str(job.commit_id),) if told else ())
    assert not discard_attempt(lake.config, info, record.commits, record.files)
    assert sorted(lake.table(info).scan().to_arrow().column("n").to_pylist()) == [7, 8]


def test_a_file_is_in_the_journal_before_it_is_in_the_warehouse(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death between the two leaves a name without a file, never a file without a name."""
    info = lake.create(SCHEMA, (0, "identity"))
    seen: list[bool] = []
    write = parquet.write_file

    def look(io: Any, location: str, data: Any) -> int:
        seen.append(any(location in attempts.read(path).files for path in attempts.left_over(lake.config.attempts_dir)))
        return write(io, location, data)

    monkeypatch.setattr(parquet, "write_file", look)
    job = lake.frames(info, [rows(info, *range(40))], 0)
    journal = attempts.start(lake.config.attempts_dir, uuid4(), info.uuid)
    named = TableFrames(info, job.schemas, LOG, 0, 1, job.slices, attempt="fixed", journal=journal)
    made = encode.encode(lake.config, named)
    assert seen == [True] * 40
    assert {file.path for file in made.files} == set(attempts.read(journal).files)
    assert all(file.path.endswith("-fixed.parquet") for file in made.files)
    assert attempts.finished_files(journal) == 40


def test_files_keep_their_order_whoever_writes_them(lake: Lake) -> None:
    """Many files of one job are written at a time; each row is in one, and keys find their rows."""
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False), ("v", pa.int64())])
    info = lake.create(schema, (0, "bucket[64]"), key=["n"])
    batch = pa.record_batch([pa.array(range(2_000)), pa.array(range(2_000))], schema=info.schema)
    lake.append(info, [batch], 0)
    again = pa.record_batch([pa.array(range(1_000, 2_000)), pa.array([0] * 1_000)], schema=info.schema)
    lake.append(info, [again], 1)
    found = sorted(zip(*lake.table(info).scan().to_arrow().to_pydict().values(), strict=True))
    assert found == [(n, n if n < 1_000 else 0) for n in range(2_000)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE])
def test_an_error_of_the_warehouse_is_not_the_rows(lake: Lake, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write is not called unwritable because a file could not be made (R32)."""
    info = lake.create(SCHEMA)

    def fail(*_: Any) -> int:
        raise OSError(number, "injected")

    monkeypatch.setattr(parquet, "write_file", fail)
    with pytest.raises(OSError, match="injected"):
        lake.encode(info, [rows(info, 1)], 0)


@pytest.mark.parametrize("error", [MemoryError("too little"), pa.ArrowMemoryError("too little")])
def test_a_lack_of_memory_is_not_the_rows(lake: Lake, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write is not called unwritable because memory was short (R32)."""
    info = lake.create(SCHEMA)

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(parquet.FileWriter, "_encode_with", fail)
    with pytest.raises(MemoryError):
        lake.encode(info, [rows(info, 1)], 0)


def test_rows_that_cannot_be_written_are_told_apart(lake: Lake) -> None:
    """A value that a partition spec of others cannot take is an error of the rows themselves."""
    info = lake.create(pa.schema([("n", pa.int64())]), (0, "truncate[7]"))
    job = lake.frames(info, [rows(info, -(2**63))], 0)
    with pytest.raises(UnwritableRows, match="truncate"):
        encode.encode(lake.config, job)
    assert data_files(lake, info) == []


def test_files_made_durable_by_several_threads(tmp_path: Path) -> None:
    """What is written by threads of one batch is whole and durable at its end; an error takes all of it away."""
    io = fileio.WarehouseFileIO({})
    with io.batch(), ThreadPoolExecutor(8) as threads:
        sizes = list(
            threads.map(
                lambda n: fileio.write_file(io, f"file://{tmp_path}/a/{n % 7}/{n}", pa.py_buffer(b"x" * n)), range(600)
            )
        )
    assert sizes == list(range(600))
    assert sorted(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == sizes


def test_an_error_takes_away_what_is_not_durable(tmp_path: Path) -> None:
    """A batch of files that ends with an error removes those that it had not made durable."""
    io = fileio.WarehouseFileIO({})

    def write() -> None:
        with io.batch():
            for n in range(300):
                fileio.write_file(io, f"file://{tmp_path}/{n}", pa.py_buffer(b"x"))
            raise OSError(errno.EIO, "injected")

    with pytest.raises(OSError, match="injected"):
        write()
    assert len(list(tmp_path.iterdir())) < 300


def test_files_that_upserts_replace_go_with_the_last_snapshot_that_names_them(
    make_lake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead data files and replaced delete files leave the warehouse once no retained snapshot names them."""
    monkeypatch.setattr(commit, "_garbage", Garbage(grace_s=0))
    lake = make_lake(keep_snapshots=3)
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False), ("v", pa.int64())])
    info = lake.create(schema, key=["n"])
    for lsn in range(12):
        keys = range(lsn % 2, 40)
        batch = pa.record_batch([pa.array(keys), pa.array([lsn] * len(keys))], schema=info.schema)
        lake.append(info, [batch], lsn)
    table = lake.table(info)
    manifests = {m.manifest_path: m for s in table.snapshots() for m in s.manifests(table.io)}.values()
    named = {e.data_file.file_path for m in manifests for e in m.fetch_manifest_entry(table.io)}
    found = {f"file://{path}" for path in data_files(lake, info)}
    assert found <= named
    for snapshot in table.snapshots():
        assert table.scan(snapshot_id=snapshot.snapshot_id).to_arrow().num_rows == 40
