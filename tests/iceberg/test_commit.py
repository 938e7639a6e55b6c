"""The commit: exactly once, whatever others do in between and whatever the answer was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException
from sqlalchemy import event

from arka.iceberg import catalogs, commit, control
from arka.iceberg.fileio import local_path
from arka.iceberg.garbage import Garbage
from arka.iceberg.manifests import COLD_ENTRIES, MERGE_AT
from arka.lineage import Lineage, Start
from arka.records import TableName
from arka.storage.ports import CatalogListing, CatalogUnavailable, CommitOutcome

SCHEMA = pa.schema([pa.field("n", pa.int64()), pa.field("day", pa.date32())])


def _rows(*numbers: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"n": number} for number in numbers], schema=SCHEMA)


def _numbers(lake: Any, info: Any) -> list[int]:
    return sorted(lake.table(info).scan().to_arrow()["n"].to_pylist())


class _Between:
    """Runs something once, between a commit's checks and its compare-and-swap."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lake: Any, action: Callable[[], object]) -> None:
        catalog = catalogs.catalog(lake.config)
        self._real = catalog.commit_table
        self._action: Callable[[], object] | None = action
        self.attempts = 0
        monkeypatch.setattr(catalog, "commit_table", self._commit_table)

    def _commit_table(self, *args: Any) -> Any:
        self.attempts += 1
        action, self._action = self._action, None
        if action is not None:
            action()
        return self._real(*args)


def _foreign_append(lake: Any, info: Any, number: int) -> None:
    catalog = lake.foreign()
    catalog.load_table(tuple(info.name)).append(pa.Table.from_batches([_rows(number)]))
    catalog.close()


def _set_properties(lake: Any, info: Any, **values: str) -> None:
    catalog = lake.foreign()
    names = {"committed": f"arka.{lake.log_uuid}.committed-lsn", "epoch": f"arka.{lake.log_uuid}.epoch"}
    with catalog.load_table(tuple(info.name)).transaction() as transaction:
        transaction.set_properties({names[key]: value for key, value in values.items()})
    catalog.close()


@pytest.mark.parametrize("stock", [False, True], ids=["lean", "stock"])
def test_foreign_commit_between_check_and_swap_is_kept(
    make_lake: Any, monkeypatch: pytest.MonkeyPatch, stock: bool
) -> None:
    """A commit that loses the swap looks again and lands on top of the winner: both keep their rows (R15)."""
    lake = make_lake(stock_commit=stock)
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1)], 0)
    between = _Between(monkeypatch, lake, lambda: _foreign_append(lake, info, 100))
    assert lake.append(info, [_rows(2)], 1).outcome is CommitOutcome.COMMITTED
    assert between.attempts == 2
    assert _numbers(lake, info) == [1, 2, 100]
    # What the lost attempt wrote is gone again.
    named = {
        local_path(name)
        for snapshot in lake.table(info).metadata.snapshots
        for name in [snapshot.manifest_list]
        + [manifest.manifest_path for manifest in snapshot.manifests(lake.table(info).io)]
    }
    assert {str(path) for path in lake.files(info, ".avro")} == named


def test_mark_moved_between_check_and_swap_means_recut(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark that moves without a snapshot, after our check, still stops the swap (R15)."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1)], 0)
    between = _Between(monkeypatch, lake, lambda: _set_properties(lake, info, committed="2"))
    result = lake.append(info, [_rows(2), _rows(3)], 1)
    assert (result.outcome, result.committed_lsn) == (CommitOutcome.RECUT, 2)
    assert between.attempts == 1
    assert _numbers(lake, info) == [1]


@pytest.mark.parametrize("between", [False, True], ids=["before", "at the swap"])
@pytest.mark.parametrize("key", [(), ("n",)], ids=["append_only", "primary_key"])
def test_properties_copied_from_another_table(
    lake: Any, monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...], between: bool
) -> None:
    """Others copy all properties of a table to another one of the log: its writes do not count as committed (R15)."""
    schema = SCHEMA.set(0, SCHEMA.field(0).with_nullable(not key))
    rows = [pa.RecordBatch.from_pylist([{"n": number}], schema=schema) for number in range(9)]
    one, other = (lake.create(schema, name=name, key=key) for name in ("one", "other"))
    lineage = Lineage((Start(1, 77, 1),))

    def put(info: Any, batches: list[pa.RecordBatch], after: int) -> Any:
        job = replace(lake.job(info, lake.encode(info, batches, after)), lineage=lineage)
        return commit.commit(lake.config, job)

    def copy() -> None:
        catalog = lake.foreign()
        with catalog.load_table(tuple(other.name)).transaction() as transaction:
            transaction.set_properties(catalog.load_table(tuple(one.name)).properties)
        catalog.close()

    assert put(one, rows[:5], 0).outcome is CommitOutcome.COMMITTED
    assert put(other, rows[:2], 0).outcome is CommitOutcome.COMMITTED
    if between:
        _Between(monkeypatch, lake, copy)
    else:
        copy()
    result = put(other, rows[2:4], 2)
    assert result.outcome is CommitOutcome.NOT_OURS
    assert "another table's arka.* properties" in result.detail
    assert _numbers(lake, other) == [0, 1]
    assert put(one, rows[5:6], 5).outcome is CommitOutcome.COMMITTED


def test_epoch_raised_between_check_and_swap_fences(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer epoch that appears after our check still stops the swap (R15)."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1)], 0)
    _Between(monkeypatch, lake, lambda: _set_properties(lake, info, epoch="2"))
    assert lake.append(info, [_rows(2)], 1).outcome is CommitOutcome.FENCED
    assert _numbers(lake, info) == [1]


def test_table_dropped_between_check_and_swap_is_gone(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is dropped after our check is not made again by the commit (R5)."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1)], 0)
    _Between(monkeypatch, lake, lambda: control.drop_table(lake.config, info.name, info.uuid, purge=False))
    assert lake.append(info, [_rows(2)], 1).outcome is CommitOutcome.TABLE_GONE
    assert control.list_tables(lake.config) == CatalogListing(())


@pytest.mark.parametrize("stock", [False, True], ids=["lean", "stock"])
@pytest.mark.parametrize("landed", [True, False], ids=["landed", "not-landed"])
def test_lost_response_is_resolved_from_fresh_metadata(
    make_lake: Any, monkeypatch: pytest.MonkeyPatch, stock: bool, landed: bool
) -> None:
    """After an unclear answer the table's own mark says what happened, and no row is doubled (R16)."""
    lake = make_lake(stock_commit=stock)
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1)], 0)
    catalog = catalogs.catalog(lake.config)
    real = catalog.commit_table

    def unclear(*args: Any) -> Any:
        if landed:
            real(*args)
        raise CommitStateUnknownException("504 Gateway Timeout")

    job = lake.job(info, lake.encode(info, [_rows(2)], 1))
    monkeypatch.setattr(catalog, "commit_table", unclear)
    if landed:
        first = commit.commit(lake.config, job)
        assert (first.outcome, first.committed_lsn) == (CommitOutcome.COMMITTED, 2)
    else:
        with pytest.raises(CatalogUnavailable, match="504"):
            commit.commit(lake.config, job)
    monkeypatch.setattr(catalog, "commit_table", real)
    again = commit.commit(lake.config, job)
    assert again.outcome is CommitOutcome.COMMITTED
    assert again.snapshot_id == lake.table(info).metadata.current_snapshot_id
    assert _numbers(lake, info) == [1, 2]


def test_unclear_answer_of_a_silent_catalog_is_unavailable(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the catalog cannot be asked either, the outcome stays unknown and no file is deleted (R16)."""
    info = lake.create(SCHEMA)
    job = lake.job(info, lake.encode(info, [_rows(1)], 0))
    catalog = catalogs.catalog(lake.config)
    real = catalog.load_table
    calls = iter([real])

    def load(identifier: Any) -> Any:
        try:
            return next(calls)(identifier)
        except StopIteration:
            raise ConnectionError("refused") from None

    def commit_table(*args: Any) -> Any:
        raise ConnectionError("reset")

    monkeypatch.setattr(catalog, "load_table", load)
    monkeypatch.setattr(catalog, "commit_table", commit_table)
    with pytest.raises(CatalogUnavailable, match="reset"):
        commit.commit(lake.config, job)
    assert len(lake.files(info, ".avro")) == 2
    assert len(lake.files(info, ".parquet")) == 1


def test_endless_contention_gives_up(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that loses every swap ends as unavailable, with nothing left behind."""
    info = lake.create(SCHEMA)
    catalog = catalogs.catalog(lake.config)

    def lose(*args: Any) -> Any:
        raise CommitFailedException("lost")

    monkeypatch.setattr(catalog, "commit_table", lose)
    with pytest.raises(CatalogUnavailable, match="other writers"):
        lake.append(info, [_rows(1)], 0)
    assert lake.files(info, ".avro") == []


def test_stock_path_never_lets_pyiceberg_retry(make_lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a foreign table that asks for retries, a lost swap comes back to our own checks (R15)."""
    lake = make_lake(stock_commit=True)
    info = lake.create(SCHEMA)
    catalog = lake.foreign()
    with catalog.load_table(tuple(info.name)).transaction() as transaction:
        transaction.set_properties({"commit.retry.num-retries": "5", "commit.retry.min-wait-ms": "1"})
    catalog.close()
    lake.append(info, [_rows(1)], 0)
    # The other process commits the very rows that we are about to commit.
    between = _Between(
        monkeypatch,
        lake,
        lambda: (_foreign_append(lake, info, 2), _set_properties(lake, info, committed="2")),
    )
    result = lake.append(info, [_rows(2)], 1)
    assert (result.outcome, result.committed_lsn) == (CommitOutcome.COMMITTED, 2)
    assert between.attempts == 1
    assert _numbers(lake, info) == [1, 2]


def test_user_rollback_is_not_undone(lake: Any) -> None:
    """After a rollback the next commit builds on what the user chose; what was rolled back stays so (R20)."""
    info = lake.create(SCHEMA)
    first = lake.append(info, [_rows(1)], 0)
    lake.append(info, [_rows(2)], 1)
    catalog = lake.foreign()
    table = catalog.load_table(tuple(info.name))
    table.manage_snapshots().rollback_to_snapshot(first.snapshot_id).commit()
    catalog.close()
    assert lake.append(info, [_rows(3)], 2).outcome is CommitOutcome.COMMITTED
    assert _numbers(lake, info) == [1, 3]


def test_files_of_an_older_spec_keep_it(lake: Any) -> None:
    """Files encoded before a change of the partition spec are committed under the spec they were made for."""
    info = lake.create(SCHEMA, (1, "day"))
    staged = lake.encode(info, [_rows(1, 2)], 0)
    catalog = lake.foreign()
    with catalog.load_table(tuple(info.name)).update_spec() as update:
        update.add_field("n", "bucket[2]", "b")
    catalog.close()
    assert lake.commit(info, staged).outcome is CommitOutcome.COMMITTED
    newer = control.load_table(lake.config, info.name).info
    assert newer.spec_id == 1
    mixed = lake.encode(newer, [_rows(3, 4, 5)], 1)
    assert lake.commit(newer, mixed).outcome is CommitOutcome.COMMITTED
    table = lake.table(info)
    assert {task.file.spec_id for task in table.scan().plan_files()} == {0, 1}
    assert _numbers(lake, info) == [1, 2, 3, 4, 5]
    assert table.scan(row_filter="n = 4").to_arrow()["n"].to_pylist() == [4]


def test_summary_tells_people_what_was_committed(lake: Any) -> None:
    """The snapshot names log, LSN range and commit; totals count on from the parent."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1)], 0)
    staged = lake.encode(info, [_rows(2, 3)], 1, through=8)
    job = lake.job(info, staged)
    commit.commit(lake.config, job)
    summary = lake.table(info).current_snapshot().summary.additional_properties
    assert summary["arka.log"] == str(lake.log_uuid)
    assert (summary["arka.lsn-first"], summary["arka.lsn-last"]) == ("2", "8")
    assert summary["arka.commit-id"] == str(job.commit_id)
    assert (summary["added-records"], summary["total-records"]) == ("2", "3")


def test_everything_is_durable_before_the_swap(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, manifests, metadata and their directories are fsynced before the catalog names them."""
    info = lake.create(SCHEMA, (1, "day"))
    lake.append(info, [_rows(1)], 0)
    before = set(lake.files(info))
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    swaps: list[set[str]] = []

    def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().upper().startswith("UPDATE"):
            swaps.append(set(synced))

    engine = catalogs.catalog(lake.config).engine
    event.listen(engine, "before_cursor_execute", executed)
    lake.append(info, [_rows(2)], 1)
    (durable,) = swaps
    new = set(lake.files(info)) - before
    assert len(new) == 4
    assert {str(path) for path in new} <= durable
    assert {str(path.parent) for path in new} <= durable


def test_sqlite_keeps_what_it_acknowledged(lake: Any) -> None:
    """The embedded catalog writes ahead and syncs every commit: a swap survives power loss."""
    lake.create(SCHEMA)
    with catalogs.catalog(lake.config).engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_three_hundred_commits_stay_flat(make_lake: Any, monkeypatch: pytest.MonkeyPatch, duck: Any) -> None:
    """What a commit reads and writes does not grow with the number of commits before it."""
    keep = 10
    lake = make_lake(keep_snapshots=keep)
    monkeypatch.setattr(commit, "_garbage", Garbage(grace_s=0))
    info = lake.create(SCHEMA)
    reads: list[str] = []
    io_class = type(catalogs.catalog(lake.config).load_table(tuple(info.name)).io)
    real = io_class.new_input
    monkeypatch.setattr(io_class, "new_input", lambda io, name: (reads.append(name), real(io, name))[1])
    for lsn in range(300):
        assert lake.append(info, [_rows(lsn)], lsn).outcome is CommitOutcome.COMMITTED
    assert len(reads) < 10
    table = lake.table(info)
    assert len(table.metadata.snapshots) == keep
    assert len(table.metadata.snapshot_log) == keep
    # The default of the Iceberg libraries: a smaller one in the properties would be every writer's (R30).
    assert len(table.metadata.metadata_log) <= 100
    manifests = table.current_snapshot().manifests(table.io)
    assert len(manifests) <= MERGE_AT + 300 // MERGE_AT
    live = {local_path(m.manifest_path) for s in table.snapshots() for m in s.manifests(table.io)}
    lists = {local_path(s.manifest_list) for s in table.snapshots()}
    assert {str(path) for path in lake.files(info, ".avro")} == live | lists
    assert _numbers(lake, info) == list(range(300))
    for snapshot in table.snapshots():
        found = table.scan(snapshot_id=snapshot.snapshot_id).to_arrow().num_rows
        assert found == snapshot.sequence_number
    (by_duckdb,) = duck.execute("SELECT count(*), sum(n) FROM iceberg_scan(?)", [table.metadata_location]).fetchall()
    assert by_duckdb == (300, sum(range(300)))


def test_merged_manifests_keep_sequence_numbers(lake: Any) -> None:
    """An entry that moves to a merged manifest keeps who added it and when: deletes depend on that."""
    info = lake.create(SCHEMA)
    for lsn in range(MERGE_AT + 2):
        lake.append(info, [_rows(lsn)], lsn)
    table = lake.table(info)
    manifests = table.current_snapshot().manifests(table.io)
    assert sorted(m.existing_files_count for m in manifests) == [0, 0, MERGE_AT]
    merged = next(m for m in manifests if m.existing_files_count)
    assert merged.min_sequence_number == 1
    entries = merged.fetch_manifest_entry(table.io)
    by_sequence = {snapshot.sequence_number: snapshot.snapshot_id for snapshot in table.snapshots()}
    assert sorted(entry.sequence_number for entry in entries) == list(range(1, MERGE_AT + 1))
    assert all(entry.snapshot_id == by_sequence[entry.sequence_number] for entry in entries)
    assert COLD_ENTRIES > MERGE_AT


def test_restarted_worker_goes_on(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that remembers nothing reads what it needs and merges what another one wrote."""
    info = lake.create(SCHEMA)
    for lsn in range(2 * MERGE_AT):
        if lsn % 7 == 0:
            commit._memory.__init__()  # type: ignore[misc]
            monkeypatch.setattr(catalogs, "_opened", {})
        lake.append(info, [_rows(lsn)], lsn)
    assert _numbers(lake, info) == list(range(2 * MERGE_AT))
    table = lake.table(info)
    assert len(table.current_snapshot().manifests(table.io)) <= MERGE_AT + 2


def test_expiry_spares_tags_and_branches(make_lake: Any) -> None:
    """Snapshots that a tag or another branch can reach stay, and can still be read."""
    lake = make_lake(keep_snapshots=3)
    info = lake.create(SCHEMA)
    ids = [lake.append(info, [_rows(lsn)], lsn).snapshot_id for lsn in range(3)]
    catalog = lake.foreign()
    manage = catalog.load_table(tuple(info.name)).manage_snapshots()
    manage.create_tag(ids[0], "first").create_branch(ids[2], "side").commit()
    catalog.close()
    for lsn in range(3, 12):
        lake.append(info, [_rows(lsn)], lsn)
    table = lake.table(info)
    kept = {snapshot.snapshot_id for snapshot in table.snapshots()}
    assert set(ids) <= kept
    assert len(kept) == 3 + 3, "main keeps its own three beside them"
    assert table.scan(snapshot_id=ids[0]).to_arrow().num_rows == 1
    assert table.scan(snapshot_id=ids[2]).to_arrow().num_rows == 3


def test_table_may_ask_for_more_snapshots(make_lake: Any) -> None:
    """A table's own history.expire.min-snapshots-to-keep raises the number of snapshots kept."""
    lake = make_lake(keep_snapshots=2)
    info = lake.create(SCHEMA, properties={"history.expire.min-snapshots-to-keep": "6"})
    for lsn in range(10):
        lake.append(info, [_rows(lsn)], lsn)
    assert len(lake.table(info).metadata.snapshots) == 6


def test_expired_files_outlive_their_snapshot_by_the_grace_period(
    make_lake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that loaded a table just before its snapshot expired still finds its manifests."""
    now = [0.0]
    monkeypatch.setattr(commit, "_garbage", Garbage(grace_s=60, clock=lambda: now[0]))
    lake = make_lake(keep_snapshots=2)
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(0)], 0)
    lake.append(info, [_rows(1)], 1)
    reader = lake.table(info)
    for lsn in range(2, 50):
        lake.append(info, [_rows(lsn)], lsn)
    assert reader.scan().to_arrow().num_rows == 2
    now[0] = 61
    for lsn in range(50, 56):
        lake.append(info, [_rows(lsn)], lsn)
    with pytest.raises(FileNotFoundError):
        reader.scan().to_arrow()
    assert _numbers(lake, info) == list(range(56))


def _metadata_files(lake: Any, info: Any) -> set[str]:
    return {path.name for path in lake.files(info, ".metadata.json")}


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("key", [(), ("n",)])
def test_superseded_metadata_outlives_its_log_by_the_grace_period(
    make_lake: Any, monkeypatch: pytest.MonkeyPatch, stock: bool, key: tuple[str, ...]
) -> None:
    """A copy of the catalog names metadata files that are there for ten minutes, whatever the table's properties say.

    After that they go, also those that other writers' commits pushed out of the log.
    """
    now = [0.0]
    monkeypatch.setattr(commit, "_garbage", Garbage(clock=lambda: now[0]))
    lake = make_lake(keep_snapshots=2, stock_commit=stock)
    schema = pa.schema([pa.field("n", pa.int64(), nullable=not key), SCHEMA.field("day")])
    properties = {"write.metadata.delete-after-commit.enabled": "true", "write.metadata.previous-versions-max": "2"}
    info = lake.create(schema, properties=properties, key=key)
    every = _metadata_files(lake, info)
    for lsn in range(6):
        lake.append(info, [_rows(lsn).cast(schema)], lsn)
        every |= _metadata_files(lake, info)
    catalog = lake.foreign()
    table = catalog.load_table(tuple(info.name))
    monkeypatch.setattr(catalog, "_delete_old_metadata", lambda *_: None)
    for number in range(4):
        table.transaction().set_properties({"by-others": str(number)}).commit_transaction()
    catalog.close()
    lake.append(info, [_rows(6).cast(schema)], 6)
    now[0] = 599
    lake.append(info, [_rows(7).cast(schema)], 7)
    assert every <= _metadata_files(lake, info)
    now[0] = 1300
    for lsn in range(8, 12):
        lake.append(info, [_rows(lsn).cast(schema)], lsn)
    assert len(_metadata_files(lake, info) & every) == 0
    assert _numbers(lake, info) == list(range(12))


def test_metadata_that_others_made_current_again_is_kept(make_lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metadata file that had left the log, and that others registered, is not deleted when its grace is over."""
    now = [0.0]
    monkeypatch.setattr(commit, "_garbage", Garbage(clock=lambda: now[0]))
    lake = make_lake()
    info = lake.create(SCHEMA, properties={"write.metadata.previous-versions-max": "3"})
    lake.append(info, [_rows(0)], 0)
    old = lake.table(info).metadata_location
    for lsn in range(1, 8):
        lake.append(info, [_rows(lsn)], lsn)
    catalog = lake.foreign()
    catalog.drop_table(tuple(info.name))
    catalog.register_table(tuple(info.name), old)
    catalog.close()
    now[0] = 10_000
    for lsn in range(1, 3):
        lake.append(info, [_rows(lsn)], lsn)
    assert Path(local_path(old) or "").exists()
    assert _numbers(lake, info) == [0, 1, 2]


def test_metadata_that_an_earlier_worker_forgot(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is new deletes what earlier ones left, if it is older than the grace and the table's own."""
    info = lake.create(SCHEMA, properties={"write.metadata.previous-versions-max": "2"})
    for lsn in range(8):
        lake.append(info, [_rows(lsn)], lsn)
    files = sorted(lake.files(info, ".metadata.json"))
    assert len(files) == 9
    for path in files[:3]:
        os.utime(path, (1_000_000_000, 1_000_000_000))
    (files[0].parent / "notes.metadata.json").write_text("not ours")
    monkeypatch.setattr(commit, "_garbage", Garbage())
    lake.append(info, [_rows(8)], 8)
    left = set(lake.files(info, ".metadata.json"))
    assert not left & set(files[:3])
    assert set(files[3:]) | {files[0].parent / "notes.metadata.json"} <= left


def test_rollback_keeps_manifests_that_come_back(make_lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests that a merge replaced are not deleted once a rollback has made them current again."""
    monkeypatch.setattr(commit, "_garbage", Garbage(grace_s=0))
    lake = make_lake(keep_snapshots=4)
    info = lake.create(SCHEMA)
    ids = [lake.append(info, [_rows(lsn)], lsn).snapshot_id for lsn in range(MERGE_AT + 1)]
    catalog = lake.foreign()
    table = catalog.load_table(tuple(info.name))
    # The snapshot before the merge.
    table.manage_snapshots().rollback_to_snapshot(ids[-2]).commit()
    catalog.close()
    for lsn in range(MERGE_AT + 1, MERGE_AT + 20):
        lake.append(info, [_rows(lsn)], lsn)
    expected = [n for n in range(MERGE_AT + 20) if n != MERGE_AT]
    assert _numbers(lake, info) == expected


def test_delete_manifests_of_others_are_left_alone(lake: Any) -> None:
    """Commits on top of another writer's deletes keep those deletes in force."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1, 2, 3)], 0)
    catalog = lake.foreign()
    catalog.load_table(tuple(info.name)).delete("n = 2")
    catalog.close()
    lake.append(info, [_rows(4)], 3 - 2)
    assert _numbers(lake, info) == [1, 3, 4]


def test_purge_leaves_no_file(lake: Any) -> None:
    """DropTable with purge removes data, metadata and what was written and never committed."""
    info = lake.create(SCHEMA, (1, "day"))
    lake.append(info, [_rows(1)], 0)
    lake.encode(info, [_rows(2)], 1)
    assert len(lake.files(info)) > 4
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert not Path(local_path(info.location) or "").exists()


def test_foreign_tables_beyond_arka_are_listed_without(lake: Any) -> None:
    """Tables of other format versions, with other names or without metadata do not break the list."""
    info = lake.create(SCHEMA)
    catalog: Catalog = lake.foreign()
    catalog.create_table(("default", "old"), SCHEMA, properties={"format-version": "1"})
    location = catalog.load_table(tuple(info.name)).metadata_location
    newer = json.loads(Path(local_path(location) or "").read_text())
    newer |= {"format-version": 3, "next-row-id": 0, "table-uuid": str(uuid4())}
    path = lake.directory / "00000-newer.metadata.json"
    path.write_text(json.dumps(newer))
    catalog.register_table(("default", "newer"), f"file://{path}")
    broken = catalog.create_table(("default", "broken"), SCHEMA)
    Path(local_path(broken.metadata_location) or "").unlink()
    garbage = catalog.create_table(("default", "garbage"), SCHEMA)
    Path(local_path(garbage.metadata_location) or "").write_bytes(b"\xff no metadata at all")
    odd = catalog.create_table(("default", "odd name"), SCHEMA)
    catalog.create_namespace(("default", "inner"))
    inner = catalog.create_table(("default", "inner", "t"), SCHEMA)
    catalog.create_table(("default", "fine"), SCHEMA)
    catalog.close()
    listing = control.list_tables(lake.config)
    assert [table.info.name.name for table in listing.tables] == ["fine", info.name.name]
    assert listing.unread == {TableName("default", "broken"), TableName("default", "garbage")}
    unspelled = {uuid: str(table.name) for uuid, table in listing.unusable.items() if not table.spelled}
    assert unspelled == {
        odd.metadata.table_uuid: "default.odd name",
        inner.metadata.table_uuid: "default.inner.t",
    }
    assert sorted(table.reason for table in listing.unusable.values() if table.spelled) == [
        "table default.newer has format version 3, expected 2",
        "table default.old has format version 1, expected 2",
    ]
    with pytest.raises(CatalogUnavailable, match="garbage"):
        control.load_table(lake.config, TableName("default", "garbage"))
