"""Primary-key tables: each snapshot holds one row of each key, the last; and every reader sees it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import pyarrow as pa
import pytest
from pyiceberg.exceptions import CommitFailedException

from arka.errors import ArkaError, ErrorCode, Unavailable
from arka.iceberg import commit, control
from arka.iceberg.deletes import PATH_ID
from arka.iceberg.garbage import Garbage
from arka.iceberg.keybuild import KeyBuild
from arka.iceberg.keyindex import KeyIndex
from arka.iceberg.manifests import ManifestMemory
from arka.iceberg.rowdelta import KeyedTable, KeyedTables
from arka.iceberg.sqlcatalog import LeanSqlCatalog
from arka.records import TableInfo, owner_property
from arka.storage.ports import CatalogUnavailable, CommitOutcome
from arka.tableproperties import OWNER
from tests import readers

from .conftest import Lake

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.utf8()),
        pa.field("city", pa.utf8(), nullable=False),
    ]
)
KEY_SCHEMA = pa.schema([SCHEMA.field("id")])

Rows = dict[int, tuple[str, str]]


def upserts(rows: list[tuple[int, str, str]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), SCHEMA, strict=True)], schema=SCHEMA
    )


def keys(numbers: list[int]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(numbers, pa.int64())], schema=KEY_SCHEMA)


def rows_of(table: Any, snapshot_id: int | None = None) -> Rows:
    found = table.scan(snapshot_id=snapshot_id).to_arrow()
    rows = {row["id"]: (row["name"], row["city"]) for row in found.to_pylist()}
    assert len(rows) == found.num_rows
    return rows


class Source:
    """A table's writes and what they should come to."""

    def __init__(self, lake: Lake, info: TableInfo, seed: int, *, first: bool = False) -> None:
        self.lake = lake
        self.info = info
        self.rows: Rows = {}
        self.lsn = 0
        self.snapshots: dict[int, Rows] = {}
        self._pick = random.Random(seed)
        self._first = first
        self._writes = 0

    def make(self, frames: int, keys_of_frame: int, distinct: int) -> tuple[list[pa.RecordBatch], set[int]]:
        pick = self._pick
        batches, deletes = [], set()
        for number in range(frames):
            chosen = [pick.randrange(distinct) for _ in range(pick.randint(1, keys_of_frame))]
            if pick.random() < 0.3:
                deletes.add(self.lsn + 1 + number)
                batches.append(keys(chosen))
                for key in chosen:
                    self.rows.pop(key, None)
                continue
            made = []
            for key in chosen:
                self._writes += 1
                made.append((key, f"n{self._writes}", f"c{pick.randrange(4)}"))
                if not (self._first and key in self.rows):
                    self.rows[key] = made[-1][1:]
            batches.append(upserts(made))
        return batches, deletes

    def commit(self, frames: int = 3, keys_of_frame: int = 20, distinct: int = 60) -> None:
        batches, deletes = self.make(frames, keys_of_frame, distinct)
        staged = self.lake.encode(self.info, batches, self.lsn, deletes=deletes)
        result = self.lake.commit(self.info, staged)
        self.lsn += len(batches)
        assert result.snapshot_id is not None
        self.snapshots[result.snapshot_id] = dict(self.rows)

    def check(self) -> None:
        table = self.lake.table(self.info)
        assert rows_of(table) == self.rows


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("transforms", [(), ((2, "identity"),), ((0, "bucket[3]"), (2, "truncate[1]"))])
@pytest.mark.parametrize("seed", range(2))
def test_equal_to_a_dictionary(lake: Lake, first: bool, transforms: Any, seed: int) -> None:
    """Upserts, deletes and moves between partitions: each snapshot holds what a dictionary would."""
    properties = {"arka.merge": "first"} if first else {}
    info = lake.create(SCHEMA, *transforms, key=["id"], properties=properties)
    source = Source(lake, info, seed, first=first)
    for number in range(8):
        source.commit()
        if number % 5 == 4:
            new_worker()
        source.check()
    table = lake.table(info)
    for snapshot_id, rows in source.snapshots.items():
        assert rows_of(table, snapshot_id) == rows


@pytest.fixture
def source(lake: Lake) -> Source:
    info = lake.create(SCHEMA, (2, "identity"), key=["id"])
    return Source(lake, info, 7)


def index_files(lake: Lake, info: TableInfo) -> list[Path]:
    folder = Path(lake.config.index_dir) / str(info.uuid)
    return sorted(path for path in folder.iterdir() if path.is_file())


def new_worker() -> None:
    """Forget what a worker knows, as its end would."""
    commit._keyed = KeyedTables()
    commit._memory = ManifestMemory()


def test_index_is_made_from_the_table(lake: Lake, source: Source) -> None:
    """Without its index, and without the secret of its hashes, a table goes on as if nothing had happened."""
    for number in range(9):
        source.commit()
        if number % 3 == 1:
            new_worker()
            shutil.rmtree(lake.config.index_dir)
        elif number % 3 == 2:
            new_worker()
            (Path(lake.config.index_dir) / "secret").unlink()
        source.check()


def commit_over(source: Source, rounds: int, harm: Callable[[], None]) -> None:
    """Commit by one worker after another, and do harm to the index in between."""
    for _ in range(rounds):
        source.commit(frames=2)
        new_worker()
        harm()
    source.commit()
    source.check()


def test_index_removed_under_a_server(lake: Lake, source: Source) -> None:
    """Keys hashed with a new secret are never looked for among those of the old one."""
    source.commit()
    source.commit()
    shutil.rmtree(lake.config.index_dir)
    # The encoder makes another secret; the committer still has its index open.
    source.commit()
    source.check()
    batches, deletes = source.make(3, 20, 60)
    staged = lake.encode(source.info, batches, source.lsn, deletes=deletes)
    shutil.rmtree(lake.config.index_dir)
    with pytest.raises(Unavailable, match="staged again"):
        lake.commit(source.info, staged)
    staged = lake.encode(source.info, batches, source.lsn, deletes=deletes)
    damaged = bytearray(Path(staged.keys).read_bytes())
    damaged[4096 + 50] ^= 1
    Path(staged.keys).write_bytes(damaged)
    with pytest.raises(Unavailable, match="staged again"):
        lake.commit(source.info, staged)
    staged = lake.encode(source.info, batches, source.lsn, deletes=deletes)
    new_worker()
    assert lake.commit(source.info, staged).outcome is CommitOutcome.COMMITTED
    source.lsn += len(batches)
    source.check()


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("lost", ["all", "directory", "runs"])
def test_index_lost_under_a_worker(
    lake: Lake, source: Source, lost: str, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes while a worker has the index open is made anew, also where its last commit was not answered.

    Nothing is tried for ever: a job is committed, or its keys are staged again.
    """
    source.commit()
    swap = LeanSqlCatalog.commit_table

    def lose(*args: Any) -> None:
        swap(*args)
        raise ConnectionError("no answer")

    with monkeypatch.context() as patched:
        if not answered:
            patched.setattr(LeanSqlCatalog, "commit_table", lose)
        source.commit()
    batches, deletes = source.make(3, 20, 60)
    staged = lake.encode(source.info, batches, source.lsn, deletes=deletes)
    if lost == "runs":
        for path in index_files(lake, source.info):
            if path.suffix == ".run":
                path.unlink()
    else:
        shutil.rmtree(Path(lake.config.index_dir) / (str(source.info.uuid) if lost == "directory" else ""))
    if lost == "all":
        with pytest.raises(Unavailable, match="staged again"):
            lake.commit(source.info, staged)
        staged = lake.encode(source.info, batches, source.lsn, deletes=deletes)
    assert lake.commit(source.info, staged).outcome is CommitOutcome.COMMITTED
    source.lsn += len(batches)
    source.check()
    new_worker()
    source.commit()
    source.check()


def test_damaged_index_deletes_no_wrong_row(lake: Lake, source: Source) -> None:
    """A flipped byte anywhere in the index is noticed, and the index made anew."""
    pick = random.Random(5)

    def flip() -> None:
        path = pick.choice(index_files(lake, source.info))
        data = bytearray(path.read_bytes())
        data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        path.write_bytes(data)

    commit_over(source, 20, flip)


def test_torn_journal(lake: Lake, source: Source) -> None:
    """A journal that was cut anywhere says less, and never anything wrong."""
    pick = random.Random(3)
    path = Path(lake.config.index_dir) / str(source.info.uuid) / "journal"
    commit_over(source, 15, lambda: path.write_bytes(path.read_bytes()[: pick.randrange(path.stat().st_size)]))


def test_index_that_could_not_be_made(lake: Lake, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index whose making failed in the middle is not taken for one without keys."""
    source.commit()
    # Another writer moves all rows: the open index has to be made anew.
    table = lake.table(source.info)
    table.overwrite(table.scan().to_arrow())
    batches, deletes = source.make(3, 20, 60)
    job = lake.job(source.info, lake.encode(source.info, batches, source.lsn, deletes=deletes))
    for method in ("_map", "_rewrite"):
        with monkeypatch.context() as patched:
            patched.setattr(KeyIndex, method, fail)
            with pytest.raises(OSError, match="No space"):
                commit.commit(lake.config, job)
    assert commit.commit(lake.config, job).outcome is CommitOutcome.COMMITTED
    source.check()


def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


class Died(BaseException):
    """The process is gone."""


def die(*_: object, **__: object) -> None:
    raise Died


STEPS = {
    "staged": (KeyedTable, "stage"),
    "asked": (LeanSqlCatalog, "commit_table"),
    "swapped": (KeyedTable, "landed"),
    "landed": (Garbage, "landed"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("index_lost", [False, True])
def test_death_around_a_commit(
    lake: Lake, source: Source, step: str, index_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may die before and after the catalog has done it: rows are there once, the index as the table is.

    The index is read from the table only where it is lost.
    """
    source.commit()
    made: list[object] = []
    build = KeyBuild.run
    monkeypatch.setattr(KeyBuild, "run", lambda *args: made.append(args) or build(*args))
    for _ in range(4):
        batches, deletes = source.make(3, 20, 60)
        job = lake.job(source.info, lake.encode(source.info, batches, source.lsn, deletes=deletes))
        with monkeypatch.context() as patched:
            patched.setattr(*STEPS[step], die)
            with pytest.raises(Died):
                commit.commit(lake.config, job)
        new_worker()
        if index_lost:
            shutil.rmtree(Path(lake.config.index_dir) / str(source.info.uuid))
        assert commit.commit(lake.config, job).outcome is CommitOutcome.COMMITTED
        source.lsn += len(batches)
        source.check()
        source.commit()
        source.check()
    assert len(made) == (4 if index_lost else 0)


def test_answer_lost(lake: Lake, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that the catalog did and did not answer is in the index of the worker that goes on."""
    source.commit()
    swap = LeanSqlCatalog.commit_table
    for _ in range(3):
        batches, deletes = source.make(3, 20, 60)
        job = lake.job(source.info, lake.encode(source.info, batches, source.lsn, deletes=deletes))

        def lose(*args: Any) -> None:
            swap(*args)
            raise ConnectionError("no answer")

        with monkeypatch.context() as patched:
            patched.setattr(LeanSqlCatalog, "commit_table", lose)
            assert commit.commit(lake.config, job).outcome is CommitOutcome.COMMITTED
        source.lsn += len(batches)
        source.commit()
        source.check()


def test_foreign_commits(lake: Lake, source: Source) -> None:
    """After another writer's commit, keys are looked for where the table has them now (R20)."""
    for number in range(6):
        source.commit()
        table = lake.table(source.info)
        if number % 2:
            # Copy on write: all rows move to other files.
            table.overwrite(table.scan().to_arrow())
        else:
            key = 1_000 + number
            table.append(pa.table([[key], ["theirs"], ["c0"]], schema=SCHEMA))
            source.rows[key] = ("theirs", "c0")
        source.check()
    batches = [upserts([(1_000, "ours", "c3")]), keys([1_002, 1_004])]
    lake.commit(source.info, lake.encode(source.info, batches, source.lsn, deletes={source.lsn + 2}))
    source.rows[1_000] = ("ours", "c3")
    del source.rows[1_002], source.rows[1_004]
    source.check()


def test_nothing_is_left_of_a_dropped_table(lake: Lake, source: Source) -> None:
    """Its index goes with it, and what was staged for a commit; those of others stay."""
    other = Source(lake, lake.create(SCHEMA, key=["id"], name="other"), 1)
    for each in (source, other):
        each.commit()
        lake.encode(each.info, [upserts([(1, "x", "c0")])], each.lsn)
    control.drop_table(lake.config, source.info.name, source.info.uuid, purge=False)
    left = [path.name for path in Path(lake.config.index_dir).rglob("*")]
    assert [name for name in left if str(source.info.uuid) in name] == []
    assert [name for name in left if str(other.info.uuid) in name] != []
    other.commit()
    other.check()


def test_commits_without_keys_leave_no_runs(lake: Lake, source: Source) -> None:
    """Runs without an entry are merged like others: each would keep a file open."""
    source.commit()
    for _ in range(8):
        lake.commit(source.info, lake.encode(source.info, [keys([])], source.lsn, deletes={source.lsn + 1}))
        source.lsn += 1
    assert len([path for path in index_files(lake, source.info) if path.suffix == ".run"]) <= 3
    source.commit()
    source.check()


def test_columns_named_like_helpers(lake: Lake) -> None:
    """A column's name is its own."""
    schema = pa.schema([SCHEMA.field("id"), ("arka.hash", pa.utf8()), ("arka.unless-there", pa.bool_())])
    info = lake.create(schema, key=["id"])
    batch = pa.RecordBatch.from_pylist([{"id": 1, "arka.hash": "x", "arka.unless-there": True}], schema=schema)
    lake.commit(info, lake.encode(info, [batch], 0))
    assert lake.table(info).scan().to_arrow().to_pylist() == batch.to_pylist()


def test_table_that_was_handed_over(lake: Lake, source: Source) -> None:
    """Its owner is read from what the commit is based on: nothing of another log goes in (R26)."""
    source.commit()
    with lake.table(source.info).transaction() as transaction:
        transaction.set_properties({OWNER: owner_property("other", uuid4())})
    staged = lake.encode(source.info, [upserts([(1, "late", "c0")])], source.lsn)
    with pytest.raises(ArkaError, match="of node other") as caught:
        lake.commit(source.info, staged)
    assert caught.value.code is ErrorCode.TABLE_STOPPED
    source.check()


def test_tables_that_do_not_fit_into_memory(lake: Lake) -> None:
    """A worker that may remember nothing opens each index again from the disk, and is right all the same."""
    lake.config = replace(lake.config, index_bytes=0)
    infos = [lake.create(SCHEMA, (2, "identity"), key=["id"], name=name) for name in ("one", "two")]
    sources = [Source(lake, info, seed) for seed, info in enumerate(infos)]
    for _ in range(4):
        for source in sources:
            source.commit()
            source.check()
            assert len(commit._keyed._open) == 1


def test_nothing_is_left_of_a_commit_that_failed(lake: Lake, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete files, manifests and runs of attempts that came to nothing are removed, whatever step failed."""
    source.commit()
    source.commit()

    def files() -> set[Path]:
        roots = (Path(lake.table(source.info).location().removeprefix("file://")), Path(lake.config.index_dir))
        return {path for root in roots for path in root.rglob("*") if path.is_file()}

    batches, deletes = source.make(3, 20, 60)
    staged = lake.encode(source.info, batches, source.lsn, deletes=deletes)
    before = files()
    full, beaten = OSError("no room"), CommitFailedException("others won")
    steps: list[tuple[Any, str, Exception]] = [
        (KeyIndex, "adopt", full),
        (commit, "stage_snapshot", full),
        (KeyIndex, "stage", full),
        (LeanSqlCatalog, "commit_table", beaten),
    ]
    for owner, name, error in steps:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, mock.Mock(side_effect=error))
            with pytest.raises((OSError, CatalogUnavailable)):
                lake.commit(source.info, staged)
        new_worker()
        # Runs are swept when the index is opened again.
        assert {path for path in files() - before if path.suffix != ".run"} == set(), name
    assert lake.commit(source.info, staged).outcome is CommitOutcome.COMMITTED
    source.lsn += len(batches)
    source.check()


def test_one_delete_file_for_each_data_file(lake: Lake, source: Source) -> None:
    """A data file has one delete file at most, of its own; one whose rows are all dead is gone."""
    for _ in range(15):
        source.commit()
    table = lake.table(source.info)
    tasks = list(table.scan().plan_files())
    assert any(task.delete_files for task in tasks)
    for task in tasks:
        assert len(task.delete_files) <= 1
        for delete in task.delete_files:
            assert 0 < delete.record_count < task.file.record_count
            assert bytes(delete.lower_bounds[PATH_ID]) == bytes(delete.upper_bounds[PATH_ID])
            assert bytes(delete.lower_bounds[PATH_ID]).decode() == task.file.file_path
    live = sum(task.file.record_count - sum(d.record_count for d in task.delete_files) for task in tasks)
    assert live == len(source.rows)
    summary = table.current_snapshot().summary
    assert int(summary["total-records"]) - int(summary["total-position-deletes"]) == live
    assert int(summary["total-data-files"]) == len(tasks)
    lake.commit(source.info, lake.encode(source.info, [keys(list(source.rows))], source.lsn, deletes={source.lsn + 1}))
    assert list(lake.table(source.info).scan().plan_files()) == []


def test_duckdb_sees_the_same(lake: Lake, source: Source, duck: Any) -> None:
    """Another engine applies the deletes as pyiceberg does."""
    for _ in range(8):
        source.commit()
        location = lake.table(source.info).metadata_location
        found = duck.execute(f"SELECT id, name, city FROM iceberg_scan('{location}')").fetchall()
        assert sorted(found) == sorted((key, *row) for key, row in source.rows.items())


def test_every_engine_sees_the_same(lake: Lake) -> None:
    """Five engines apply the deletes as pyiceberg does, whatever the partitions."""
    sources = []
    for number, transforms in enumerate([(), ((2, "identity"),), ((0, "bucket[3]"), (2, "truncate[1]"))]):
        source = Source(lake, lake.create(SCHEMA, *transforms, key=["id"], name=f"t{number}"), number)
        for _ in range(8):
            source.commit()
        sources.append(source)
    locations = [lake.table(source.info).metadata_location for source in sources]
    for engine in readers.ENGINES:
        for source, found in zip(sources, readers.read(engine, *locations), strict=True):
            rows = sorted((row["id"], row["name"], row["city"]) for row in found)
            assert rows == sorted((key, *row) for key, row in source.rows.items()), engine


def test_retry_after_others_won(lake: Lake, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that loses to another writer finds its rows again in what that writer left."""
    source.commit()
    swap = LeanSqlCatalog.commit_table
    tries = []

    def race(*args: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            table = lake.table(source.info)
            table.overwrite(table.scan().to_arrow())
        return swap(*args)

    batches, deletes = source.make(3, 20, 60)
    staged = lake.encode(source.info, batches, source.lsn, deletes=deletes)
    with monkeypatch.context() as patched:
        patched.setattr(LeanSqlCatalog, "commit_table", race)
        assert lake.commit(source.info, staged).outcome is CommitOutcome.COMMITTED
    assert len(tries) == 2
    source.lsn += len(batches)
    source.check()
    source.commit()
    source.check()
