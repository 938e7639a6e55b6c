"""Encode jobs of very many partitions end before their last frame, and writes keep the spec they need (R19, R27)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.table.update import RemovePartitionSpecsUpdate, SetDefaultSpecUpdate
from pyiceberg.transforms import IdentityTransform

from arka.iceberg import commit, encode
from arka.records import TableInfo
from arka.storage.catalog import divide
from arka.storage.ports import AcceptedSpec, CatalogConflict, CommitOutcome, StagedFiles, TableFrames

from .conftest import Lake

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("v", pa.int64())])


def batch(info: TableInfo, numbers: Sequence[int]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(numbers, pa.int64()), pa.array(numbers, pa.int64())], schema=info.schema)


def rows_of(lake: Lake, info: TableInfo) -> list[int]:
    return sorted(lake.table(info).scan().to_arrow().column("n").to_pylist())


@pytest.mark.parametrize("key", [(), ("n",)], ids=["append", "key"])
def test_a_job_of_many_partitions_goes_in_steps(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...]
) -> None:
    """No commit has more files than the budget, each covers what it says, and together they are the whole."""
    monkeypatch.setattr(encode, "MOST_PARTITIONS", 7)
    info = lake.create(SCHEMA, (0, "identity"), key=key)
    writes = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [6, 9], [10, 11, 12, 13, 14]]
    staged: list[StagedFiles] = []
    while not staged or staged[-1].through_lsn < len(writes):
        after = staged[-1].through_lsn if staged else 0
        made = lake.encode(info, [batch(info, numbers) for numbers in writes[after:]], after)
        assert made.frames == made.through_lsn - after
        assert lake.commit(info, made).outcome is CommitOutcome.COMMITTED
        staged.append(made)
    assert [made.through_lsn for made in staged] == [2, 5, 6]
    assert max(len(made.files) for made in staged) <= 7
    expected = [number for numbers in writes for number in numbers]
    assert rows_of(lake, info) == sorted(set(expected) if key else expected)


@pytest.mark.parametrize("key", [(), ("n",)], ids=["append", "key"])
def test_a_single_frame_is_never_cut(lake: Lake, monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...]) -> None:
    """A write with more partitions than a job may have is a job of its own."""
    monkeypatch.setattr(encode, "MOST_PARTITIONS", 3)
    info = lake.create(SCHEMA, (0, "bucket[64]"), key=key)
    made = lake.encode(info, [batch(info, range(40)), batch(info, [1])], 0)
    assert (made.through_lsn, made.frames) == (1, 1)
    assert len(made.files) > 3


def test_deletes_and_empty_writes_make_no_files(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are part of the job whatever the budget says."""
    monkeypatch.setattr(encode, "MOST_PARTITIONS", 2)
    info = lake.create(SCHEMA, (0, "identity"), key=("n",))
    keys = pa.record_batch([pa.array([1, 2, 3], pa.int64())], schema=info.key_schema())
    made = lake.encode(info, [batch(info, [1, 2]), keys, batch(info, [])], 0, deletes={2})
    assert made.through_lsn == 3


def repartition(lake: Lake, info: TableInfo) -> TableInfo:
    """Have others partition a table by its first column."""
    with lake.table(info).update_spec() as update:
        update.add_field("n", IdentityTransform(), "n_part")
    return lake.reload(info)


def accepted_before(lake: Lake, now: TableInfo, before: TableInfo, batches: Sequence[Any], after: int) -> TableFrames:
    spec = AcceptedSpec(after + 1, before.spec_id, before.partition)
    return replace(lake.frames(now, batches, after), accepted=(spec,))


@pytest.mark.parametrize("key", [(), ("n",)], ids=["append", "key"])
@pytest.mark.parametrize("old", [(), ((0, "bucket[2]"),)], ids=["none", "buckets"])
def test_a_write_over_the_limit_keeps_its_spec(
    lake: Lake, key: tuple[str, ...], old: tuple[tuple[int, str], ...]
) -> None:
    """A write with too many partitions under a newly adopted spec is written under its own, others are not (R27)."""
    lake.config = replace(lake.config, partitions=4)
    before = lake.create(SCHEMA, *old, key=key)
    now = repartition(lake, before)
    assert now.spec_id != before.spec_id
    job = accepted_before(lake, now, before, [batch(now, range(10)), batch(now, [20, 21]), batch(now, [30] * 9)], 0)
    if key:
        job = accepted_before(lake, now, before, [batch(now, range(10)), batch(now, [20, 21])], 0)
    staged = lake.encode_job(job)
    wide = [file for file in staged.files if file.spec_id == before.spec_id]
    assert sum(file.rows for file in wide) == 10
    assert len(wide) <= 2
    assert {file.spec_id for file in staged.files} == {before.spec_id, now.spec_id}
    assert lake.commit(now, staged).outcome is CommitOutcome.COMMITTED
    expected = [*range(10), 20, 21] + ([] if key else [30] * 9)
    assert rows_of(lake, now) == expected
    # What comes later replaces rows in files of either spec, and has no reason for the old one.
    end = staged.through_lsn
    later = lake.encode(now, [batch(now, [0, 20])], end)
    assert {file.spec_id for file in later.files} == {now.spec_id}
    assert lake.commit(now, later).outcome is CommitOutcome.COMMITTED
    assert rows_of(lake, now) == sorted(expected if key else [*expected, 0, 20])


def remove_spec(lake: Lake, info: TableInfo, *, again: str = "") -> None:
    """Have others remove the newest partition spec, which nothing uses yet; ``again``: and give its id to another."""
    table = lake.table(info)
    updates: list[Any] = [SetDefaultSpecUpdate(spec_id=0), RemovePartitionSpecsUpdate(spec_ids=[info.spec_id])]
    table.catalog.commit_table(table, (), tuple(updates))
    if again:
        with lake.table(info).update_spec() as update:
            update.add_field("v", again, "again")
        assert lake.reload(info).spec_id == info.spec_id


@pytest.mark.parametrize("key", [(), ("n",)], ids=["append", "key"])
@pytest.mark.parametrize("again", ["", "bucket[3]"], ids=["removed", "replaced"])
def test_files_under_a_spec_that_others_removed_are_not_committed(lake: Lake, key: tuple[str, ...], again: str) -> None:
    """Between encoding and commit a spec goes, or its id gets another meaning: the rows are written again (R27)."""
    first = lake.create(SCHEMA, key=key)
    info = repartition(lake, first)
    staged = lake.encode(info, [batch(info, range(5))], 0)
    remove_spec(lake, info, again=again)
    with pytest.raises(CatalogConflict, match=f"removed partition spec {info.spec_id}"):
        lake.commit(info, staged)
    now = lake.reload(info)
    assert lake.commit(now, lake.encode(now, [batch(now, range(5))], 0)).outcome is CommitOutcome.COMMITTED
    assert rows_of(lake, now) == list(range(5))


@pytest.mark.parametrize("key", [(), ("n",)], ids=["append", "key"])
def test_a_spec_that_is_removed_while_the_commit_runs(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...]
) -> None:
    """The compare-and-swap looks at the specs of the very metadata that it replaces (R15, R27)."""
    info = repartition(lake, lake.create(SCHEMA, key=key))
    staged = lake.encode(info, [batch(info, range(5))], 0)
    stage = commit.stage_snapshot

    def remove_first(*args: Any) -> Any:
        monkeypatch.setattr(commit, "stage_snapshot", stage)
        made = stage(*args)
        remove_spec(lake, info)
        return made

    monkeypatch.setattr(commit, "stage_snapshot", remove_first)
    with pytest.raises(CatalogConflict, match="removed partition spec"):
        lake.commit(info, staged)
    now = lake.reload(info)
    assert lake.commit(now, lake.encode(now, [batch(now, range(5))], 0)).outcome is CommitOutcome.COMMITTED
    assert rows_of(lake, now) == list(range(5))


def test_a_spec_whose_column_is_gone_is_not_kept(lake: Lake) -> None:
    """Without its source a spec has no values: the write goes under the table's own spec."""
    lake.config = replace(lake.config, partitions=1)
    before = lake.create(SCHEMA)
    now = repartition(lake, before)
    spec = AcceptedSpec(1, 77, (replace(now.partition[0], source_id=99),))
    job = replace(lake.frames(now, [batch(now, [1, 2, 3])], 0), accepted=(spec,))
    assert {file.spec_id for file in lake.encode_job(job).files} == {now.spec_id}


def test_a_job_with_another_spec_is_not_divided(lake: Lake) -> None:
    """Its parts would each end where their own budget does."""
    info = lake.create(SCHEMA)
    job = replace(lake.frames(info, [batch(info, [1]), batch(info, [2])], 0), size=1 << 30)
    assert len(divide(job, 2, 1 << 20)) == 2
    job = replace(job, accepted=(AcceptedSpec(1, 5, ()),))
    assert divide(job, 2, 1 << 20) == [job]
