"""A primary-key table against a dictionary: writes, commits, deaths, other writers and damage in any order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pyiceberg.expressions import In
from pyiceberg.table import Table

from arka.errors import Unavailable
from arka.iceberg import catalogs, commit
from arka.iceberg.garbage import Garbage
from arka.iceberg.manifests import ManifestMemory
from arka.iceberg.rowdelta import KeyedTable, KeyedTables
from arka.iceberg.sqlcatalog import LeanSqlCatalog
from arka.options import IcebergOptions
from arka.storage.ports import CatalogUnavailable, CommitJob, CommitOutcome

from .conftest import Lake

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.utf8(), nullable=False),
        pa.field("city", pa.utf8()),
        pa.field("stamp", pa.int64()),
    ]
)
#: Out of the order of the columns.
KEY = ["name", "id"]
#: What a delete's frame has: the key's columns in the order of their field ids.
KEY_SCHEMA = pa.schema([SCHEMA.field("id"), SCHEMA.field("name")])
#: Partitions that a key never leaves, that it moves between, both, and none.
LAYOUTS = [(), ((2, "identity"),), ((0, "bucket[3]"), (2, "truncate[1]"))]
#: Few, so that snapshots expire within a history.
KEEP_SNAPSHOTS = 6

Key = tuple[str, int]
#: Keys and cities; a delete has None for them.
Write = tuple[list[Key], list[str | None] | None]

keys = st.tuples(st.sampled_from(["", "a", "ä"]), st.integers(0, 5))
cities = st.sampled_from([None, "", "Ulm", "Umeå"])
upserts = st.lists(st.tuples(keys, cities), max_size=12).map(lambda rows: ([k for k, _ in rows], [c for _, c in rows]))
deletes = st.lists(keys, max_size=5).map(lambda chosen: (chosen, None))
writes = st.lists(st.one_of(upserts, deletes), min_size=1, max_size=3)
#: What another writer does, and to which keys.
TheirCommit = tuple[str, list[Key]]
their_commits = st.tuples(st.sampled_from(["add", "move", "remove"]), st.lists(keys, min_size=1, max_size=4))


class Died(BaseException):
    """The process is gone."""


def die(*_: object, **__: object) -> None:
    raise Died


#: Where a commit may die: before and after the catalog has done it.
STEPS: dict[str, tuple[type, str]] = {
    "staged": (KeyedTable, "stage"),
    "asked": (LeanSqlCatalog, "commit_table"),
    "swapped": (KeyedTable, "landed"),
    "landed": (Garbage, "landed"),
}


class KeyMachine(RuleBasedStateMachine):
    """The table holds what a dictionary holds after every step, and each snapshot what it held at its commit.

    The model: ``rows`` is what is committed, and ``pending`` are writes in their order that are not.
    """

    @initialize(layout=st.sampled_from(LAYOUTS), first=st.booleans())
    def start(self, layout: tuple[tuple[int, str], ...], first: bool) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="arka-keys-")
        self.lake = Lake(Path(self.folder.name), IcebergOptions(keep_snapshots=KEEP_SNAPSHOTS))
        self.first = first
        self.info = self.lake.create(SCHEMA, *layout, key=KEY, properties={"arka.merge": "first"} if first else {})
        self.rows: dict[Key, tuple[str | None, int]] = {}
        self.pending: list[tuple[list[Key], list[str | None] | None, int]] = []
        self.snapshots: dict[int, dict[Key, tuple[str | None, int]]] = {}
        self.lsn = 0
        self.stamp = 0
        self.changed = True

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            self.check_snapshots()
        finally:
            self.end_worker()
            catalogs._opened.pop(self.lake.config).close()
            self.folder.cleanup()

    # -- writes and commits -----------------------------------------------------------------------

    @rule(some=writes)
    def write(self, some: list[Write]) -> None:
        for chosen, values in some:
            self.pending.append((chosen, values, self.stamp))
            self.stamp += len(chosen)

    @rule(several=st.lists(writes, min_size=1, max_size=3))
    def commit_several(self, several: list[list[Write]]) -> None:
        for some in several:
            self.write(some)
            self.commit(self.job())

    @rule(some=writes)
    def lose_the_answer(self, some: list[Write]) -> None:
        """The catalog did it and did not say so."""
        self.write(some)
        swap = LeanSqlCatalog.commit_table

        def lose(*args: Any) -> None:
            swap(*args)
            raise ConnectionError("no answer")

        with patch.object(LeanSqlCatalog, "commit_table", lose):
            self.commit(self.job())

    @rule(some=writes, times=st.integers(1, 2))
    def lose_the_question(self, some: list[Write], times: int) -> None:
        """The catalog was never asked; the job comes again."""
        self.write(some)
        job = self.job()
        for _ in range(times):
            with patch.object(LeanSqlCatalog, "commit_table", refuse), pytest.raises(CatalogUnavailable):
                commit.commit(self.lake.config, job)
        self.commit(job)

    @rule(some=writes, step=st.sampled_from(sorted(STEPS)), index_lost=st.booleans())
    def die_around_a_commit(self, some: list[Write], step: str, index_lost: bool) -> None:
        self.write(some)
        job = self.job()
        with patch.object(*STEPS[step], die), pytest.raises(Died):
            commit.commit(self.lake.config, job)
        self.end_worker()
        if index_lost:
            # With the keys of the job: its rows are encoded again, as after a restart.
            self.remove_index()
            job = self.job()
        self.commit(job)

    @rule(some=writes)
    def lose_the_index(self, some: list[Write]) -> None:
        """With the keys of a job, under the worker that has it open: the job is encoded again."""
        self.write(some)
        job = self.job()
        self.remove_index()
        with pytest.raises(Unavailable):
            commit.commit(self.lake.config, job)
        self.commit(self.job())

    @rule(some=writes, theirs=their_commits)
    def lose_a_race(self, some: list[Write], theirs: TheirCommit) -> None:
        """Another writer's commit comes between looking up keys and asking the catalog."""
        self.write(some)
        job = self.job()
        swap = LeanSqlCatalog.commit_table
        tries = []

        def race(*args: Any) -> Any:
            tries.append(1)
            if len(tries) == 1:
                with patch.object(LeanSqlCatalog, "commit_table", swap):
                    self.other_writer(theirs)
            return swap(*args)

        with patch.object(LeanSqlCatalog, "commit_table", race):
            self.commit(job)

    def job(self) -> CommitJob:
        """Encode what is pending."""
        batches, deleting = [], set()
        for lsn, (chosen, values, stamp) in enumerate(self.pending, self.lsn + 1):
            if values is None:
                deleting.add(lsn)
                batches.append(batch(KEY_SCHEMA, ([number for _, number in chosen], [name for name, _ in chosen])))
            else:
                batches.append(batch(SCHEMA, table_columns(chosen, values, stamp)))
        return self.lake.job(self.info, self.lake.encode(self.info, batches, self.lsn, deletes=deleting))

    def commit(self, job: CommitJob) -> None:
        """Commit what is pending, and do the same to the dictionary."""
        result = commit.commit(self.lake.config, job)
        assert result.outcome is CommitOutcome.COMMITTED
        self.lsn += len(self.pending)
        assert result.committed_lsn == self.lsn
        for chosen, values, stamp in self.pending:
            for number, key in enumerate(chosen):
                if values is None:
                    self.rows.pop(key, None)
                elif not (self.first and key in self.rows):
                    self.rows[key] = (values[number], stamp + number)
        self.pending = []
        assert result.snapshot_id is not None
        self.note(result.snapshot_id)

    def note(self, snapshot_id: int) -> None:
        assert snapshot_id not in self.snapshots
        self.snapshots[snapshot_id] = dict(self.rows)
        self.changed = True

    # -- the worker and its index -----------------------------------------------------------------

    def end_worker(self) -> None:
        commit._keyed.forget(self.lake.config, self.info)
        commit._keyed, commit._memory, commit._garbage = KeyedTables(), ManifestMemory(), Garbage()

    def remove_index(self) -> None:
        shutil.rmtree(self.lake.config.index_dir, ignore_errors=True)

    @rule(
        how=st.sampled_from(["alive", "", "lost", "bit", "torn"]), choice=st.integers(0, 99), at=st.integers(0, 2**20)
    )
    def another_worker(self, how: str, choice: int, at: int) -> None:
        """A worker goes on that knows nothing, and finds the index as it was left, or not there, or damaged.

        Or the index goes while a worker has it open.
        """
        if how != "alive":
            self.end_worker()
        if how in ("alive", "lost"):
            self.remove_index()
            return
        files = sorted(path for path in Path(self.lake.config.index_dir).rglob("*") if path.is_file())
        if how == "torn":
            files = [path for path in files if path.name == "journal"]
        if not how or not files:
            return
        # Any file: a run, a journal, or the secret of the hashes.
        path = files[choice % len(files)]
        data = bytearray(path.read_bytes())
        if how == "bit":
            data[at // 8 % len(data)] ^= 1 << at % 8
        else:
            del data[at % len(data) :]
        path.write_bytes(data)

    # -- other writers ----------------------------------------------------------------------------

    @rule(theirs=their_commits)
    def other_writer(self, theirs: TheirCommit) -> None:
        """Another writer adds rows whose keys are not there, moves all rows, or copies files without some rows."""
        how, chosen = theirs
        table = self.lake.table(self.info)
        if how == "add":
            new = [key for key in dict.fromkeys(chosen) if key not in self.rows]
            values = ["theirs"] * len(new)
            table.append(pa.table(batch(SCHEMA, table_columns(new, values, self.stamp))))
            self.rows.update((key, ("theirs", self.stamp + number)) for number, key in enumerate(new))
            self.stamp += len(new)
        elif how == "move" and self.rows:
            table.overwrite(table.scan().to_arrow())
        elif how == "remove" and any(key in self.rows for key in chosen):
            numbers = {number for _, number in chosen}
            table.delete(In("id", numbers))
            self.rows = {key: row for key, row in self.rows.items() if key[1] not in numbers}
        current = table.current_snapshot()
        if current is not None and current.snapshot_id not in self.snapshots:
            self.note(current.snapshot_id)

    # -- what must hold ---------------------------------------------------------------------------

    @invariant()
    def equal_to_the_dictionary(self) -> None:
        if self.changed:
            assert rows_of(self.lake.table(self.info)) == self.rows
            self.changed = False

    def check_snapshots(self) -> None:
        """Each snapshot that is kept holds what the dictionary held then."""
        table = self.lake.table(self.info)
        for snapshot in table.snapshots():
            ours = snapshot.summary is not None and "arka.lsn-last" in snapshot.summary.additional_properties
            # An overwrite of another writer is two snapshots; nobody noted what is in between.
            assert snapshot.snapshot_id in self.snapshots or not ours
            if snapshot.snapshot_id in self.snapshots:
                assert rows_of(table, snapshot.snapshot_id) == self.snapshots[snapshot.snapshot_id]


def refuse(*_: object) -> None:
    raise ConnectionError("no connection")


def table_columns(chosen: list[Key], values: Iterable[str | None], stamp: int) -> list[list[Any]]:
    """The columns of a batch of ``SCHEMA``."""
    return [
        [number for _, number in chosen],
        [name for name, _ in chosen],
        list(values),
        list(range(stamp, stamp + len(chosen))),
    ]


def batch(schema: pa.Schema, columns: Iterable[Any]) -> pa.RecordBatch:
    arrays = [pa.array(column, item.type) for column, item in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def rows_of(table: Table, snapshot_id: int | None = None) -> dict[Key, tuple[str | None, int]]:
    found = table.scan(snapshot_id=snapshot_id).to_arrow().to_pylist()
    rows = {(row["name"], row["id"]): (row["city"], row["stamp"]) for row in found}
    assert len(rows) == len(found)
    return rows


TestKeyMachine = KeyMachine.TestCase
# Without Phase.shrink, which would go on for longer than a test may: a history is short enough to be read as it is.
TestKeyMachine.settings = settings(
    max_examples=10, stateful_step_count=18, derandomize=True, deadline=None, phases=[Phase.generate]
)
TestKeyMachine.__doc__ = KeyMachine.__doc__
