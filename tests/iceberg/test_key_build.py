"""Indexes made from tables that others wrote to: every row of a key dies with it, however long the making takes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.manifest import DataFileContent
from pyiceberg.table.locations import load_location_provider
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.update import AssertRefSnapshotId

from arka._core.runs import write_run
from arka.errors import ArkaError, ErrorCode
from arka.iceberg import commit, keybuild, keyindex, rowdelta, runfiles, stagedkeys
from arka.iceberg.catalogs import catalog
from arka.iceberg.control import drop_table, load_table
from arka.iceberg.deletes import LiveFile, write_deletes
from arka.iceberg.keybuild import BuildTerms, KeyBuild
from arka.iceberg.keyindex import IndexUnusable, KeyIndex
from arka.iceberg.keyscan import KeyScan
from arka.iceberg.manifests import ManifestMemory
from arka.iceberg.producer import snapshot_updates, stage_snapshot
from arka.iceberg.rowdelta import KeyedTable, KeyedTables
from arka.iceberg.sqlcatalog import LeanSqlCatalog
from arka.records import TableInfo
from arka.storage.ports import CatalogUnavailable, CommitJob, CommitOutcome, TableMissing, WorkUnfinished

from .conftest import Lake

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("name", pa.utf8(), nullable=False)])
KEY_SCHEMA = pa.schema([SCHEMA.field("id")])


def batch(rows: dict[int, str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array(list(rows), pa.int64()), pa.array(list(rows.values()), pa.utf8())], schema=SCHEMA
    )


def found(lake: Lake, info: TableInfo) -> list[tuple[int, str]]:
    return sorted((row["id"], row["name"]) for row in lake.table(info).scan().to_arrow().to_pylist())


class Writer:
    """Commits to a table, LSN after LSN."""

    def __init__(self, lake: Lake, **properties: str) -> None:
        self.lake = lake
        self.info = lake.create(SCHEMA, key=["id"], properties=properties)
        self.lsn = 0

    def job(self, rows: dict[int, str] | None = None, deletes: list[int] | None = None) -> CommitJob:
        batches = [] if rows is None else [batch(rows)]
        batches += [] if deletes is None else [pa.RecordBatch.from_arrays([pa.array(deletes)], schema=KEY_SCHEMA)]
        deleting = set() if deletes is None else {self.lsn + len(batches)}
        return self.lake.job(self.info, self.lake.encode(self.info, batches, self.lsn, deletes=deleting))

    def run(self, job: CommitJob) -> None:
        assert commit.commit(self.lake.config, job).outcome is CommitOutcome.COMMITTED
        self.lsn = job.staged.through_lsn

    def upsert(self, **rows: str) -> None:
        self.run(self.job({int(key[1:]): name for key, name in rows.items()}))

    def delete(self, *keys: int) -> None:
        self.run(self.job(deletes=list(keys)))

    def others_append(self, *rows: tuple[int, str]) -> None:
        keys, names = zip(*rows, strict=True)
        self.lake.table(self.info).append(pa.table([keys, names], schema=SCHEMA))

    def others_delete(self, path: str, positions: list[int]) -> None:
        """Add a position-delete file beside those that there are, as Spark does."""
        opened = catalog(self.lake.config)
        table = opened.load_table(tuple(self.info.name))
        file = next(task.file for task in table.scan().plan_files() if task.file.file_path == path)
        live = LiveFile(path, "", file.spec_id, file.partition, file.record_count, 0)
        locations = load_location_provider(table.location(), table.properties)
        made = write_deletes(table.io, locations, live, pa.array(positions, pa.int64()))
        staged = stage_snapshot(table, [made], ManifestMemory(), {}, {})
        head = AssertRefSnapshotId(ref=MAIN_BRANCH, snapshot_id=table.metadata.current_snapshot_id)
        opened.commit_table(table, (head,), snapshot_updates(table.metadata, staged, {}, 100))

    def data_files(self) -> list[str]:
        return [task.file.file_path for task in self.lake.table(self.info).scan().plan_files()]

    @property
    def rows(self) -> list[tuple[int, str]]:
        return found(self.lake, self.info)

    @property
    def folder(self) -> Path:
        return Path(self.lake.config.index_dir) / str(self.info.uuid)


@pytest.fixture
def writer(lake: Lake) -> Writer:
    return Writer(lake)


def new_worker() -> None:
    commit._keyed = KeyedTables()
    commit._memory = ManifestMemory()


@pytest.mark.parametrize("small_parts", [False, True])
def test_rows_that_others_left_under_a_key(writer: Writer, small_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upsert or a delete leaves none of the rows that others put under its key, in one file or in several."""
    if small_parts:
        monkeypatch.setattr(keybuild, "_PART_ENTRIES", 1)
    writer.upsert(k1="ours", k2="ours", k3="ours", k4="ours")
    writer.others_append((1, "a"), (2, "b"), (1, "c"))
    writer.others_append((1, "d"), (4, "e"), (5, "f"), (5, "g"))
    writer.upsert(k9="first commit after the others")
    assert len(writer.rows) == 12
    new_worker()
    writer.upsert(k1="new")
    writer.delete(2, 5)
    assert writer.rows == [(1, "new"), (3, "ours"), (4, "e"), (4, "ours"), (9, "first commit after the others")]
    # What is dead already stays dead, whatever becomes of its key.
    writer.upsert(k1="newer", k2="back", k5="back")
    writer.delete(1)
    new_worker()
    writer.upsert(k4="new", k1="last")
    assert writer.rows == [
        (1, "last"),
        (2, "back"),
        (3, "ours"),
        (4, "new"),
        (5, "back"),
        (9, "first commit after the others"),
    ]


def test_first_row_stands_before_those_of_others(lake: Lake) -> None:
    """With ``arka.merge`` first, what comes later changes nothing; a delete takes all of them."""
    writer = Writer(lake, **{"arka.merge": "first"})
    writer.upsert(k1="ours")
    writer.others_append((1, "theirs"))
    writer.upsert(k1="late", k2="new")
    assert writer.rows == [(1, "ours"), (1, "theirs"), (2, "new")]
    writer.delete(1)
    assert writer.rows == [(2, "new")]


@pytest.mark.parametrize("seed", range(6))
def test_many_rows_of_others(lake: Lake, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key is a list of rows to others and one row to Arka; parts of any size come to the same."""
    pick = random.Random(seed)
    monkeypatch.setattr(keybuild, "_PART_ENTRIES", pick.choice([1, 3, 10, 1000]))
    writer = Writer(lake)
    expected: dict[int, list[str]] = {}
    made = 0

    def names(count: int) -> list[str]:
        nonlocal made
        made += count
        return [f"n{made - back}" for back in range(count)]

    for _ in range(14):
        chosen = [pick.randrange(12) for _ in range(pick.randint(1, 6))]
        match pick.choice(["upsert", "upsert", "delete", "append", "worker"]):
            case "upsert":
                rows = dict(zip(chosen, names(len(chosen)), strict=True))
                writer.run(writer.job(rows))
                expected.update({key: [name] for key, name in rows.items()})
            case "delete":
                writer.delete(*chosen)
                for key in chosen:
                    expected.pop(key, None)
            case "append":
                rows_of = list(zip(chosen, names(len(chosen)), strict=True))
                if writer.lsn:
                    writer.others_append(*rows_of)
                    for key, name in rows_of:
                        expected.setdefault(key, []).append(name)
            case _:
                new_worker()
        assert writer.rows == sorted((key, name) for key, those in expected.items() for name in those)


def test_several_delete_files_of_one_data_file(lake: Lake) -> None:
    """Others may put delete files beside each other: all of them count, and one replaces them (R20)."""
    writer = Writer(lake, **{"arka.merge": "first"})
    writer.upsert(**{f"k{key}": "ours" for key in range(10)})
    (path,) = writer.data_files()
    writer.others_delete(path, [1, 2])
    writer.others_delete(path, [2, 3])
    # These keys have no row: the upserts hold.
    writer.upsert(k1="new", k2="new", k3="new", k4="late")
    assert writer.rows == [(k, "new" if k in (1, 2, 3) else "ours") for k in range(10)]
    writer.delete(5)
    (task,) = (task for task in lake.table(writer.info).scan().plan_files() if task.file.file_path == path)
    assert [file.record_count for file in task.delete_files] == [4]
    assert all(file.content == DataFileContent.POSITION_DELETES for file in task.delete_files)
    writer.delete(0, 4, 6, 7, 8, 9)
    assert path not in writer.data_files()
    assert writer.rows == [(k, "new") for k in (1, 2, 3)]


@pytest.mark.parametrize("key", [1, 2])
def test_a_file_that_was_taken_out_and_added_again(lake: Lake, writer: Writer, key: int) -> None:
    """Delete files that are older than their data file do not apply, to readers and to Arka alike."""
    writer.upsert(k1="a", k2="a", k3="a")
    writer.delete(1)
    (file,) = [task.file for task in lake.table(writer.info).scan().plan_files()]
    lake.table(writer.info).delete("id >= 0")
    with lake.table(writer.info).transaction() as transaction, transaction.update_snapshot().fast_append() as append:
        append.append_data_file(file)
    expected = {1: "a", 2: "a", 3: "a"}
    assert writer.rows == sorted(expected.items())
    for number in (key, 3):
        writer.upsert(**{f"k{number}": "new"})
        expected[number] = "new"
        assert writer.rows == sorted(expected.items())
        new_worker()


@pytest.mark.parametrize("positions", [[1, 1], [7], [0, 7, 7]])
def test_odd_positions_of_others(writer: Writer, positions: list[int]) -> None:
    """A delete file may name a row twice, or one that is not there: readers do not care."""
    writer.upsert(k0="a", k1="a", k2="a")
    (path,) = writer.data_files()
    writer.others_delete(path, positions)
    expected = {key: "a" for key in range(3) if key not in positions}
    assert writer.rows == sorted(expected.items())
    writer.upsert(k1="b", k2="b")
    assert writer.rows == sorted((expected | {1: "b", 2: "b"}).items())


def test_keys_of_others_in_other_types(lake: Lake, tmp_path: Path) -> None:
    """A key is its value, whatever width a file of others has for it."""
    schema = pa.schema([pa.field("at", pa.timestamp("us"), nullable=False), pa.field("n", pa.int64())])
    info = lake.create(schema, key=["at"])

    def rows(number: int) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([pa.array([5_000], pa.timestamp("us")), pa.array([number])], schema=schema)

    lake.commit(info, lake.encode(info, [rows(1)], 0))
    opened = catalog(lake.config)
    table = opened.load_table(tuple(info.name))
    (task,) = table.scan().plan_files()
    path = Path(task.file.file_path.removeprefix("file://"))
    # In place: the size in the manifest is all that others would have written anew.
    read = pq.read_table(path)
    at = pa.field("at", pa.timestamp("ms"), nullable=False, metadata=read.schema.field("at").metadata)
    pq.write_table(read.set_column(0, at, read.column("at").cast(pa.timestamp("ms"))), path)
    new_worker()
    shutil.rmtree(Path(lake.config.index_dir) / str(info.uuid))
    lake.commit(info, lake.encode(info, [rows(2)], 1))
    live = [task.file.record_count - len(task.delete_files) for task in lake.table(info).scan().plan_files()]
    assert sum(live) == 1


def test_an_index_left_by_a_drop_that_died(lake: Lake, writer: Writer) -> None:
    """The drop that is done again finds no table, and removes its index all the same."""
    writer.upsert(k1="a")
    opened = catalog(lake.config)
    opened.drop_table(tuple(writer.info.name))
    with pytest.raises(TableMissing):
        drop_table(lake.config, writer.info.name, writer.info.uuid, purge=False)
    assert not writer.folder.exists()


def test_what_is_left_of_unknown_tables_is_removed(lake: Lake, writer: Writer) -> None:
    """Indexes and staged runs go with their tables, whoever dropped these; all others stay."""
    writer.upsert(k1="a")
    writer.job({2: "b"})
    root = Path(lake.config.index_dir)
    known = set(root.rglob("*"))
    stranger = str(uuid4())
    (root / stranger / "building").mkdir(parents=True)
    (root / stranger / "building" / "note").write_bytes(b"x")
    (root / runfiles.STAGED / f"{stranger}-0-1-{runfiles.new_name()}").write_bytes(b"x")
    (root / "not-a-uuid-at-all").mkdir()
    runfiles.forget_others(str(root), frozenset([writer.info.uuid]))
    assert set(root.rglob("*")) == known | {root / "not-a-uuid-at-all"}
    runfiles.forget_others(str(root / "nowhere"), frozenset())
    runfiles.forget_others(str(root), frozenset())
    assert {path.name for path in root.iterdir()} == {"secret", "staged", "not-a-uuid-at-all"}
    writer.upsert(k1="c")
    assert writer.rows == [(1, "c")]


# -- over several jobs -----------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone."""


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    scan = KeyScan.read
    monkeypatch.setattr(KeyScan, "read", lambda self, path, deletes: read.append(path) or scan(self, path, deletes))
    return read


def one_file_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BuildTerms, "over", property(lambda _: True))


def filled(lake: Lake, files: int) -> Writer:
    writer = Writer(lake)
    for number in range(files):
        writer.upsert(**{f"k{3 * number + key}": f"{number}" for key in range(3)})
    new_worker()
    shutil.rmtree(writer.folder)
    return writer


def test_an_index_takes_as_many_jobs_as_it_needs(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job goes on where the one before ended; each file is read once."""
    writer = filled(lake, 7)
    one_file_a_job(monkeypatch)
    read = count_reads(monkeypatch)
    job = writer.job({0: "new", 20: "new", 21: "new"})
    for done in range(1, 7):
        with pytest.raises(CatalogUnavailable, match=f"{done} of 7 files"):
            commit.commit(lake.config, job)
        if done == 3:
            new_worker()
    writer.run(job)
    assert len(read) == len(set(read)) == 7
    assert len(writer.rows) == 22
    assert "building" not in os.listdir(writer.folder)


def test_others_commit_while_an_index_is_made(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of files that are still as they were is not read again."""
    writer = filled(lake, 6)
    one_file_a_job(monkeypatch)
    read = count_reads(monkeypatch)
    job = writer.job({0: "new", 30: "new"})
    for number in range(4):
        with pytest.raises(CatalogUnavailable, match="is being made"):
            commit.commit(lake.config, job)
        if number == 1:
            writer.others_append((40, "theirs"), (1, "theirs"))
    files = writer.data_files()
    writer.others_delete(read[3], [0])
    for _ in range(20):
        try:
            writer.run(job)
        except CatalogUnavailable:
            continue
        break
    assert set(read) == set(files)
    assert len(read) < 2 * len(files)
    expected = {3 * number + key: str(number) for number in range(6) for key in range(3)}
    gone = 3 * list(dict.fromkeys(read)).index(read[3])
    del expected[gone]
    rows = [*expected.items(), (40, "theirs"), (1, "theirs"), (30, "new")]
    assert writer.rows == sorted([*(row for row in rows if row[0] != 0), (0, "new")])
    writer.delete(1, 40)
    assert [row for row in writer.rows if row[0] in (1, 40)] == []


@pytest.mark.parametrize("small_parts", [False, True])
@pytest.mark.parametrize("step", ["write_run", "merge_runs", "_note", "_unlink", "_remove_files", "begin"])
def test_death_while_an_index_is_made(
    lake: Lake, step: str, small_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step a process dies at, the next one makes the same index, and nothing is left over."""
    if small_parts:
        monkeypatch.setattr(keybuild, "_PART_ENTRIES", 1)
    writer = filled(lake, 5)
    writer.others_append((1, "theirs"), (2, "theirs"))
    job = writer.job({1: "new", 30: "new"})
    owner: Any = {"_note": KeyBuild, "_unlink": KeyBuild, "begin": KeyIndex}.get(step, keybuild)
    for lives in range(4):
        left = lives
        original = getattr(owner, step)

        def dying(*args: Any, original: Callable[..., Any] = original, **named: Any) -> Any:
            nonlocal left
            if not left:
                raise Died
            left -= 1
            return original(*args, **named)

        with monkeypatch.context() as patched:
            patched.setattr(owner, step, dying)
            try:
                commit.commit(lake.config, job)
            except Died:
                new_worker()
                continue
            break
    if lake.table(writer.info).metadata.properties[f"arka.{job.log_uuid}.committed-lsn"] != str(job.staged.through_lsn):
        commit.commit(lake.config, job)
    writer.lsn = job.staged.through_lsn
    expected = {3 * number + key: str(number) for number in range(5) for key in range(3)} | {1: "new", 30: "new"}
    assert writer.rows == sorted([*expected.items(), (2, "theirs")])
    writer.delete(2)
    new_worker()
    writer.delete(0)
    assert {row[0] for row in writer.rows}.isdisjoint({0, 2})
    names = set(os.listdir(writer.folder))
    index = KeyIndex(str(writer.folder), writer.info.uuid, commit._keyed._open.popitem()[1].key_check)
    index.open()
    assert set(os.listdir(writer.folder)) == names


@pytest.mark.parametrize("note", [b"", bytes(4), bytes(100), b"garbage"])
def test_a_note_that_is_none(lake: Lake, note: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note of any bytes costs reading again; what cannot be removed beside it does no harm."""
    writer = filled(lake, 3)
    (writer.folder / "lost+found").mkdir(parents=True)
    one_file_a_job(monkeypatch)
    job = writer.job({0: "new"})
    with pytest.raises(CatalogUnavailable):
        commit.commit(lake.config, job)
    (writer.folder / "building" / "note").write_bytes(note)
    new_worker()
    monkeypatch.undo()
    writer.run(job)
    assert len(writer.rows) == 9


def lose_races(monkeypatch: pytest.MonkeyPatch, wins: Callable[[], None], count: int) -> None:
    """Others commit between Arka's look at a table and its commit, ``count`` times."""
    left = count
    stage = commit.stage_snapshot

    def late(*args: Any) -> Any:
        nonlocal left
        made = stage(*args)
        if left:
            left -= 1
            wins()
        return made

    monkeypatch.setattr(commit, "stage_snapshot", late)


def test_others_win_while_an_index_is_made(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that is lost to others costs the reading of what they changed, not of the table."""
    writer = filled(lake, 6)
    read = count_reads(monkeypatch)
    paths = writer.data_files()
    changed: list[str] = []

    def win() -> None:
        writer.others_append((100 + len(changed), "theirs"))
        changed.append(next(path for path in writer.data_files() if path not in paths + changed))

    lose_races(monkeypatch, win, 12)
    monkeypatch.setattr(keybuild, "_PART_ENTRIES", 6)
    job = writer.job({0: "new", 30: "new", 101: "new"})
    for number in range(12):
        try:
            writer.run(job)
        except CatalogUnavailable:
            if number == 1:
                new_worker()
            continue
        break
    # Each of theirs beside those that were read with it, since they may share a part.
    assert [read.count(path) for path in paths] == [1] * 6
    assert len(read) <= 6 + 2 * len(changed)
    expected = {3 * number + key: str(number) for number in range(6) for key in range(3)}
    expected |= {100 + number: "theirs" for number in range(12)} | {0: "new", 30: "new", 101: "new"}
    assert writer.rows == sorted(expected.items())
    assert "building" not in os.listdir(writer.folder)


def test_others_change_one_file_while_an_index_is_made(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that others delete costs its part, though all parts were merged already."""
    writer = filled(lake, 6)
    read = count_reads(monkeypatch)
    path = writer.data_files()[0]
    lose_races(monkeypatch, lambda: writer.others_delete(path, [1]), 1)
    monkeypatch.setattr(keybuild, "_PART_ENTRIES", 3)
    writer.upsert(k0="new", k30="new")
    assert len(read) == 7
    assert read.count(path) == 2


def test_the_time_for_an_index_is_that_of_a_job(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts that others win do not each read for as long as a job may."""
    writer = filled(lake, 6)
    lake.config = replace(lake.config, index_build_s=5.0)
    now = 0.0
    read = KeyScan.read

    def slowly(self: KeyScan, path: str, deletes: tuple[str, ...]) -> Any:
        nonlocal now
        now += 1.0
        return read(self, path, deletes)

    monkeypatch.setattr(KeyScan, "read", slowly)
    monkeypatch.setattr(keybuild.time, "monotonic", lambda: now)

    def win() -> None:
        for number in range(4):
            writer.others_append((number, "theirs"))

    lose_races(monkeypatch, win, 5)
    job = writer.job({0: "new"})
    for _ in range(30):
        began = now
        try:
            writer.run(job)
        except CatalogUnavailable:
            assert now - began <= 6.0
            continue
        break
    assert writer.lsn == job.staged.through_lsn


def test_damaged_parts_are_read_again(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte in what an earlier job left is noticed, and costs its time alone."""
    pick = random.Random(1)
    one_file_a_job(monkeypatch)
    for _ in range(12):
        name = f"t{pick.randrange(2**32)}"
        writer = Writer.__new__(Writer)
        writer.lake, writer.lsn = lake, 0
        writer.info = lake.create(SCHEMA, key=["id"], name=name)
        for number in range(4):
            writer.upsert(**{f"k{3 * number + key}": f"{number}" for key in range(3)})
        new_worker()
        shutil.rmtree(writer.folder)
        job = writer.job({0: "new", 30: "new"})
        for number in range(20):
            try:
                writer.run(job)
            except CatalogUnavailable:
                if number == 2:
                    parts = writer.folder / "building"
                    path = parts / pick.choice(sorted(os.listdir(parts)))
                    data = bytearray(path.read_bytes())
                    data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
                    path.write_bytes(data)
                continue
            break
        assert len(writer.rows) == 13


def test_a_merge_is_done_where_nobody_waits(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of a large table are merged apart, also where the parts were all there at the beginning."""
    writer = filled(lake, 4)
    monkeypatch.setattr(keybuild, "_PART_ENTRIES", 3)
    monkeypatch.setattr(keybuild, "_MERGE_HERE", 11)
    read = count_reads(monkeypatch)
    job = writer.job({0: "new"})
    for _ in range(2):
        with pytest.raises(WorkUnfinished, match="to be merged"):
            commit.commit(lake.config, job)
        new_worker()
    lake.config = replace(lake.config, apart=True)
    writer.run(job)
    assert len(read) == 4
    assert not commit._keyed._open, "what is merged away later would stay mapped"
    assert len(writer.rows) == 12


def test_many_parts_are_merged_in_rounds(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be more parts than a process may map; older rows of others come through."""
    writer = filled(lake, 9)
    writer.others_append((1, "theirs"), (4, "theirs"), (4, "again"))
    writer.others_append((1, "last"), (26, "theirs"))
    monkeypatch.setattr(keybuild, "_PART_ENTRIES", 1)
    monkeypatch.setattr(keybuild, "_MERGE_PARTS", 3)
    writer.upsert(k1="new", k4="new", k26="new")
    expected = {3 * number + key: str(number) for number in range(9) for key in range(3)}
    assert writer.rows == sorted((expected | {1: "new", 4: "new", 26: "new"}).items())
    new_worker()
    writer.delete(1, 2)
    assert {1, 2}.isdisjoint(row[0] for row in writer.rows)


def test_killed_merges_leave_nothing(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a merge is killed, the disk has what it wrote once; after some times the parts are read again."""
    writer = filled(lake, 4)
    monkeypatch.setattr(keybuild, "_PART_ENTRIES", 3)
    read = count_reads(monkeypatch)
    job = writer.job({0: "new"})
    sizes = []
    for _ in range(7):
        with monkeypatch.context() as patched:
            merge = keybuild.merge_runs

            def killed(*args: Any, merge: Callable[..., Any] = merge, **named: Any) -> Any:
                merge(*args, **named)
                # As SIGKILL: what cleans up does not run.
                patched.setattr(os, "unlink", lambda _: None)
                raise Died

            patched.setattr(keybuild, "merge_runs", killed)
            with pytest.raises(Died):
                commit.commit(lake.config, job)
        new_worker()
        sizes.append(sum(1 for path in writer.folder.rglob("*") if path.is_file()))
    # Parts, note, and the two runs of the last merge.
    assert max(sizes) <= 4 + 1 + 2
    assert len(read) == 3 * 4
    writer.run(job)
    assert len(writer.rows) == 12


def test_parts_that_come_to_nothing_are_given_up(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that is no use as soon as it is made takes its parts with it."""
    writer = filled(lake, 3)
    job = writer.job({0: "new"})
    with monkeypatch.context() as patched:
        patched.setattr(KeyIndex, "path_of", lambda *_: (_ for _ in ()).throw(IndexUnusable("wrong")))
        with pytest.raises(ArkaError, match="cannot be told"):
            commit.commit(lake.config, job)
    assert not (writer.folder / "building").exists()
    writer.run(job)
    assert len(writer.rows) == 9


def test_time_before_the_reading_counts_for_it(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose table has many manifests, or a slow catalog, reads for as long as these took."""
    writer = filled(lake, 8)
    now = 0.0
    read, resolve = KeyScan.read, KeyedTable.resolve

    def slow_read(self: KeyScan, path: str, deletes: tuple[str, ...]) -> Any:
        nonlocal now
        now += 1.0
        return read(self, path, deletes)

    def slow_resolve(self: KeyedTable, *args: Any) -> Any:
        nonlocal now
        now += 4.0
        return resolve(self, *args)

    monkeypatch.setattr(KeyScan, "read", slow_read)
    monkeypatch.setattr(KeyedTable, "resolve", slow_resolve)
    monkeypatch.setattr(keybuild.time, "monotonic", lambda: now)
    job = writer.job({0: "new"})
    with pytest.raises(WorkUnfinished, match="4 of 8"):
        commit.commit(lake.config, job)
    writer.run(job)
    assert len(writer.rows) == 24


def test_manifests_are_read_once_while_an_index_is_made(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job that goes on with an index knows the table's files from the one before."""
    writer = filled(lake, 5)
    one_file_a_job(monkeypatch)
    made: list[object] = []
    files = rowdelta._read_files
    monkeypatch.setattr(rowdelta, "_read_files", lambda *args: made.append(args) or files(*args))
    job = writer.job({0: "new"})
    for _ in range(4):
        with pytest.raises(WorkUnfinished):
            commit.commit(lake.config, job)
    writer.run(job)
    assert len(made) == 1


# -- whose index it is -----------------------------------------------------------------------------


def test_another_worker_went_on(lake: Lake, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose index is behind the disk's reads that one; it makes none, and writes nothing over it."""
    writer.upsert(k1="a", k2="a")
    first = commit._keyed, commit._memory
    new_worker()
    writer.upsert(k1="b", k3="b")
    second = commit._keyed, commit._memory
    monkeypatch.setattr(KeyBuild, "run", lambda *_: pytest.fail("the index was made again"))
    for number in range(6):
        commit._keyed, commit._memory = (first, second)[number % 2]
        writer.upsert(k1=f"{number}", k4=f"{number}")
    assert writer.rows == [(1, "5"), (2, "a"), (3, "b"), (4, "5")]


def test_an_index_takes_no_descriptors(lake: Lake) -> None:
    """A worker may have any number of tables open (R23)."""

    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    infos = [lake.create(SCHEMA, key=["id"], name=f"t{number}") for number in range(12)]
    counts = []
    for info in infos:
        for lsn in range(2):
            lake.commit(info, lake.encode(info, [batch({1: f"{lsn}", 2: "x"})], lsn))
        counts.append(opened())
    assert len(commit._keyed._open) == 12
    assert max(counts) <= counts[0]


def test_others_change_the_key(lake: Lake) -> None:
    """Rows are neither doubled nor lost where others make other columns the key: the table says so, and stops."""
    schema = pa.schema([SCHEMA.field("id"), SCHEMA.field("name"), pa.field("n", pa.int64())])
    info = lake.create(schema, key=["id"])

    def rows(*values: tuple[int, str, int]) -> list[pa.RecordBatch]:
        columns = zip(*values, strict=True)
        return [
            pa.RecordBatch.from_arrays(
                [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
            )
        ]

    lake.commit(info, lake.encode(info, rows((1, "a", 1), (2, "b", 1)), 0))
    table = lake.table(info)
    with table.update_schema() as update:
        update.set_identifier_fields("id", "name")
    with lake.table(info).transaction() as transaction:
        transaction.set_properties({"arka.primary-key": '["id", "name"]'})
    with pytest.raises(ArkaError, match="changed its primary key") as caught:
        lake.commit(info, lake.encode(info, rows((1, "a", 2)), 1))
    assert caught.value.code is ErrorCode.TABLE_STOPPED
    # A restart learns of the key; the index was made for another one.
    for keyed in (None, KeyedTables()):
        commit._keyed = keyed or commit._keyed
        now = load_table(lake.config, info.name).info
        assert now.key_columns == ("id", "name")
        mark = lake.table(info).metadata.properties[f"arka.{lake.log_uuid}.committed-lsn"]
        lake.commit(now, lake.encode(now, rows((1, "a", 3), (1, "z", 3)), int(mark)))
        found = lake.table(info).scan().to_arrow().to_pylist()
        assert sorted((row["id"], row["name"], row["n"]) for row in found) == [(1, "a", 3), (1, "z", 3), (2, "b", 1)]


# -- what is left over -----------------------------------------------------------------------------


def test_runs_that_could_not_be_written_are_removed(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves no runs, neither staged nor in the index."""
    writer.upsert(k1="a", k2="b")
    root = Path(writer.lake.config.index_dir)
    before = set(root.rglob("*"))

    def fill(descriptor: int, *args: Any, **named: Any) -> int:
        write_run(descriptor, *args, **named)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stagedkeys, "write_run", fill)
        with pytest.raises(OSError, match="No space"):
            writer.job({1: "c"})
    # What was staged for the last commit is removed as soon as that has landed.
    assert set(root.rglob("*")) <= before


def test_attempts_do_not_lengthen_the_journal(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog that is away for long costs the journal's limit, not a record for each attempt."""
    writer.upsert(k1="a", k2="b")
    job = writer.job({1: "c"})
    monkeypatch.setattr(keyindex, "_JOURNAL_BYTES", 4_000)

    def fail(*_: object) -> None:
        raise OSError("the catalog is away")

    sizes = []
    with monkeypatch.context() as patched:
        patched.setattr(LeanSqlCatalog, "commit_table", fail)
        for number in range(60):
            with pytest.raises(CatalogUnavailable, match="away"):
                commit.commit(writer.lake.config, job)
            sizes.append((writer.folder / "journal").stat().st_size)
            if number == 30:
                new_worker()
    assert max(sizes) < 6_000
    # The last one had landed after all: its record says so.
    swap = LeanSqlCatalog.commit_table

    def lose(*args: Any) -> None:
        swap(*args)
        raise ConnectionError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(LeanSqlCatalog, "commit_table", lose)
        writer.run(job)
    new_worker()
    monkeypatch.setattr(KeyBuild, "run", lambda *_: pytest.fail("the index was made again"))
    writer.upsert(k1="d")
    assert writer.rows == [(1, "d"), (2, "b")]


@pytest.mark.parametrize("name", ["journal", "building/note"])
def test_what_the_disk_cannot_read_is_made_again(lake: Lake, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector under an index costs its making, not its table."""
    writer = filled(lake, 3)
    if name == "journal":
        writer.upsert(k1="x")
    else:
        with monkeypatch.context() as patched:
            one_file_a_job(patched)
            with pytest.raises(CatalogUnavailable):
                commit.commit(lake.config, writer.job({1: "x"}))
    new_worker()
    read = Path.read_bytes
    bad = [writer.folder / name]

    def fail(path: Path) -> bytes:
        if path in bad:
            bad.clear()
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    writer.upsert(k1="new")
    assert not bad
    assert (1, "new") in writer.rows
    assert len(writer.rows) == 9


def test_runs_of_attempts_are_removed(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warehouse that is away for long costs one run, not one for each attempt."""
    writer.upsert(k1="a", k2="b")
    job = writer.job({1: "c"})

    def fail(*_: object) -> None:
        raise OSError("the warehouse is away")

    with monkeypatch.context() as patched:
        patched.setattr(commit, "stage_snapshot", fail)
        for _ in range(5):
            with pytest.raises(OSError, match="away"):
                commit.commit(writer.lake.config, job)
    assert len([name for name in os.listdir(writer.folder) if name.endswith(".run")]) <= 2
    writer.run(job)
    assert writer.rows == [(1, "c"), (2, "b")]
    assert runfiles.STAGED in os.listdir(writer.lake.config.index_dir)
