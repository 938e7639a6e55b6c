"""What owners say of snapshots and files holds through commits: retention of refs, staged snapshots, shared files."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.table.refs import SnapshotRefType
from pyiceberg.table.update import SetSnapshotRefUpdate

from arka.iceberg import commit
from arka.iceberg.garbage import Garbage

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False)])
KINDS = pytest.mark.parametrize("key", [(), ("n",)], ids=["append-only", "primary-key"])


def _rows(number: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array([number], pa.int64())], schema=SCHEMA)


def _ids(lake: Any, info: Any) -> set[int]:
    return {snapshot.snapshot_id for snapshot in lake.table(info).metadata.snapshots}


@KINDS
def test_nothing_goes_without_gc(make_lake: Any, key: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gc.enabled=false every snapshot and each of its files stays, also what was queued before (R29)."""
    now = [0.0]
    monkeypatch.setattr(commit, "_garbage", Garbage(grace_s=10, clock=lambda: now[0]))
    lake = make_lake(keep_snapshots=2)
    info = lake.create(SCHEMA, key=key)
    for lsn in range(4):
        lake.append(info, [_rows(1)], lsn)
    catalog = lake.foreign()
    with catalog.load_table(tuple(info.name)).transaction() as change:
        change.set_properties({"gc.enabled": "FALSE"})
    catalog.close()
    snapshots = _ids(lake, info)
    files = {path for path in lake.files(info) if not path.name.endswith(".metadata.json")}
    for lsn in range(4, 8):
        now[0] += 100
        lake.append(lake.reload(info), [_rows(1)], lsn)
    assert snapshots < _ids(lake, info)
    assert len(_ids(lake, info)) == len(snapshots) + 4
    assert files < set(lake.files(info))


@KINDS
def test_retention_of_main_is_carried_over(make_lake: Any, key: tuple[str, ...]) -> None:
    """Branch main keeps what its owner set, and its number and age of snapshots hold."""
    lake = make_lake(keep_snapshots=2)
    info = lake.create(SCHEMA, key=key)
    lake.append(info, [_rows(0)], 0)
    for retention in ({"min_snapshots_to_keep": 5}, {"max_snapshot_age_ms": 10**12, "max_ref_age_ms": 10**13}):
        catalog = lake.foreign()
        table = catalog.load_table(tuple(info.name))
        ref = {"ref_name": "main", "type": SnapshotRefType.BRANCH, "snapshot_id": table.current_snapshot().snapshot_id}
        catalog.commit_table(table, (), (SetSnapshotRefUpdate(**ref, **retention),))
        catalog.close()
        first = 1 if "min_snapshots_to_keep" in retention else 9
        for lsn in range(first, first + 8):
            lake.append(info, [_rows(lsn)], lsn)
        main = lake.table(info).metadata.refs["main"]
        assert {name: getattr(main, name) for name in retention} == retention
        assert len(_ids(lake, info)) == (5 if first == 1 else 13)


@KINDS
@pytest.mark.parametrize(("age_ms", "left"), [("1000000000000", 9), ("0", 2), ("", 2), ("soon", 2)])
def test_age_that_the_table_states(make_lake: Any, key: tuple[str, ...], age_ms: str, left: int) -> None:
    """Snapshots of main stay as long as the table's owner says; without a word the number alone counts (R30)."""
    lake = make_lake(keep_snapshots=2)
    properties = {"history.expire.max-snapshot-age-ms": age_ms} if age_ms else {}
    info = lake.create(SCHEMA, key=key, properties=properties)
    for lsn in range(9):
        lake.append(info, [_rows(lsn)], lsn)
    assert len(_ids(lake, info)) == left


@KINDS
def test_age_that_the_branch_states(make_lake: Any, key: tuple[str, ...]) -> None:
    """What branch main says of its own counts more than what the table says."""
    lake = make_lake(keep_snapshots=2)
    info = lake.create(SCHEMA, key=key, properties={"history.expire.max-snapshot-age-ms": "1000000000000"})
    lake.append(info, [_rows(0)], 0)
    catalog = lake.foreign()
    table = catalog.load_table(tuple(info.name))
    ref = {"ref_name": "main", "type": SnapshotRefType.BRANCH, "snapshot_id": table.current_snapshot().snapshot_id}
    catalog.commit_table(table, (), (SetSnapshotRefUpdate(**ref, max_snapshot_age_ms=1),))
    catalog.close()
    for lsn in range(1, 9):
        lake.append(info, [_rows(lsn)], lsn)
    assert len(_ids(lake, info)) == 2


@KINDS
def test_staged_snapshots_stay_until_they_are_old(make_lake: Any, key: tuple[str, ...]) -> None:
    """A snapshot without a ref stays; so do a tag's and a branch's with all it follows. Main keeps its own number."""
    lake = make_lake(keep_snapshots=3)
    info = lake.create(SCHEMA, key=key)
    lake.append(info, [_rows(0)], 0)
    catalog = lake.foreign()
    table = catalog.load_table(tuple(info.name))
    table.append(pa.Table.from_batches([_rows(100)]), branch="wap")
    staged = catalog.load_table(tuple(info.name)).refs()["wap"].snapshot_id
    catalog.load_table(tuple(info.name)).manage_snapshots().remove_branch("wap").commit()
    for lsn in range(1, 8):
        lake.append(info, [_rows(lsn)], lsn)
    assert staged in _ids(lake, info)
    assert len(_ids(lake, info)) == 4
    with catalog.load_table(tuple(info.name)).transaction() as change:
        change.set_properties({"history.expire.max-snapshot-age-ms": "0"})
    catalog.close()
    lake.append(lake.reload(info), [_rows(8)], 8)
    assert staged not in _ids(lake, info)
    assert len(_ids(lake, info)) == 3
