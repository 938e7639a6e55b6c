"""What DoGet makes of marks and snapshot summaries that others copied (R15, R25): no LSN of theirs is believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.table.update import AssertTableUUID, RemovePropertiesUpdate, RemoveSnapshotsUpdate

from arka.errors import ArkaError, ErrorCode
from arka.iceberg import commit
from arka.iceberg.marks import mark_in
from arka.lineage import Lineage, Start
from arka.storage.ports import CommitOutcome, ReadJob
from arka.tableproperties import SUMMARY_LAST_LSN, SUMMARY_LOG, committed_lsn_property

KINDS = pytest.mark.parametrize("key", [(), ("n",)], ids=["append-only", "primary-key"])
LINEAGE = Lineage((Start(1, 77, 1),))


class _Tables:
    """Two tables of one log: one has committed up to LSN 5, the other up to 2."""

    def __init__(self, lake: Any, key: tuple[str, ...]) -> None:
        self.lake = lake
        self.schema = pa.schema([pa.field("n", pa.int64(), nullable=False)])
        self.one, self.other = (lake.create(self.schema, name=name, key=key) for name in ("one", "other"))
        self.older = ""
        self.put(self.one, 5, 0)
        self.put(self.other, 2, 0)

    def rows(self, count: int, first: int) -> list[pa.RecordBatch]:
        return [pa.RecordBatch.from_pylist([{"n": first + each}], schema=self.schema) for each in range(count)]

    def put(self, info: Any, count: int, after: int, lineage: Lineage = LINEAGE) -> None:
        staged = self.lake.encode(info, self.rows(count, after), after)
        result = commit.commit(self.lake.config, replace(self.lake.job(info, staged), lineage=lineage))
        assert result.outcome is CommitOutcome.COMMITTED

    def change(self, properties: dict[str, str]) -> None:
        catalog = self.lake.foreign()
        with catalog.load_table(tuple(self.other.name)).transaction() as transaction:
            transaction.set_properties(properties)
        catalog.close()

    def read(self, *, lineage: Lineage = LINEAGE, **more: Any) -> tuple[list[int], dict[bytes, bytes]]:
        found = self.lake.read(ReadJob(self.other, self.lake.log_uuid, lineage=lineage, **more))
        return sorted(found["n"].to_pylist()), found.schema.metadata

    def waiting(self, first: int = 2) -> Any:
        return self.lake.frames(self.other, self.rows(2, first), first)


def _copied_mark(tables: _Tables) -> None:
    tables.change(dict(tables.lake.table(tables.one).properties))


def _lowered_mark(tables: _Tables) -> None:
    tables.change({committed_lsn_property(tables.lake.log_uuid): "1"})


def _raised_mark(tables: _Tables) -> None:
    tables.change({committed_lsn_property(tables.lake.log_uuid): "900"})


def _other_copy(tables: _Tables) -> None:
    """A copy of the data directory, with a start of its own in the same epoch, went on with the table."""
    catalog = tables.lake.foreign()
    catalog.drop_table(tuple(tables.other.name))
    catalog.close()
    tables.other = tables.lake.create(tables.schema, name="other", key=tables.other.key_columns)
    tables.put(tables.other, 4, 0, Lineage((Start(1, 78, 1),)))


@KINDS
@pytest.mark.parametrize("how", [_copied_mark, _lowered_mark, _raised_mark, _other_copy])
def test_mark_that_is_not_ours(lake: Any, key: tuple[str, ...], how: Any) -> None:
    """No row that waits is left out or there twice, and no LSN is claimed; what the table holds can be read."""
    tables = _Tables(lake, key)
    how(tables)
    for asked in ({"tail": tables.waiting()}, {"at_lsn": 2}, {"at_lsn": 5}, {"at_lsn": 1000}):
        with pytest.raises(ArkaError, match=r"default\.other") as caught:
            tables.read(**asked)
        assert caught.value.code is ErrorCode.TABLE_STOPPED
    rows, notes = tables.read()
    assert rows == ([0, 1, 2, 3] if how is _other_copy else [0, 1])
    assert committed_lsn_property(lake.log_uuid).encode() not in notes


def _removed_mark(tables: _Tables, *, expire: bool = True) -> None:
    """Others remove the marks, rewrite the rows, and expire the snapshots that name an LSN."""
    catalog = tables.lake.foreign()
    table = catalog.load_table(tuple(tables.other.name))
    if expire:
        table.overwrite(table.scan().to_arrow())
        table = catalog.load_table(tuple(tables.other.name))
    now = table.metadata.current_snapshot_id
    old = [snapshot.snapshot_id for snapshot in table.snapshots() if snapshot.snapshot_id != now]
    ours = [name for name in table.properties if name.startswith("arka.")]
    changes = (RemovePropertiesUpdate(removals=ours), *([RemoveSnapshotsUpdate(snapshot_ids=old)] if old else ()))
    catalog.commit_table(table, (AssertTableUUID(uuid=table.metadata.table_uuid),), changes)
    catalog.close()


def _removed_mark_alone(tables: _Tables) -> None:
    _removed_mark(tables, expire=False)


def _put_back(tables: _Tables) -> None:
    """Others register older metadata of the table, with a mark of this log that was its own once."""
    older = tables.older
    catalog = tables.lake.foreign()
    catalog.drop_table(tuple(tables.other.name))
    catalog.register_table(tuple(tables.other.name), older)
    catalog.close()


@KINDS
@pytest.mark.parametrize("how", [_removed_mark, _removed_mark_alone, _put_back])
def test_mark_below_what_is_known(lake: Any, key: tuple[str, ...], how: Any) -> None:
    """An absent or lower mark is believed no more than a changed one, once the asking process knows of a commit."""
    tables = _Tables(lake, key)
    tables.older = lake.table(tables.other).metadata_location
    tables.put(tables.other, 1, 2)
    how(tables)
    held = [0, 1] if how is _put_back else [0, 1, 2]
    for asked in ({"tail": tables.waiting(3)}, {"at_lsn": 1}, {"at_lsn": 2}, {"at_lsn": 3}, {"at_lsn": 1000}):
        with pytest.raises(ArkaError, match=r"default\.other.*( but 3 was committed|has LSNs up to 3)") as caught:
            tables.read(known_lsn=3, **asked)
        assert caught.value.code is ErrorCode.TABLE_STOPPED
    rows, notes = tables.read(known_lsn=3)
    assert rows == held
    assert committed_lsn_property(lake.log_uuid).encode() not in notes


@KINDS
def test_mark_that_was_seen_says_more(lake: Any, key: tuple[str, ...]) -> None:
    """A mark of the same LSN in another epoch than the directory has seen is another copy's."""
    tables = _Tables(lake, key)
    later = Lineage((Start(5, 99, 9),))
    seen = mark_in(lake.table(tables.other).metadata, lake.log_uuid)
    for asked in ({"at_lsn": 2}, {"tail": tables.waiting()}):
        with pytest.raises(ArkaError, match="this directory has seen LSN 2 of epoch 2") as caught:
            tables.read(known_lsn=2, recorded=replace(seen, epoch=2), lineage=later, **asked)
        assert caught.value.code is ErrorCode.TABLE_STOPPED
    assert tables.read(known_lsn=2, recorded=seen, lineage=later, at_lsn=2)[0] == [0, 1]


@KINDS
def test_mark_that_is_ours(lake: Any, key: tuple[str, ...]) -> None:
    """Waiting rows come on top, once, and LSNs are named."""
    tables = _Tables(lake, key)
    rows, notes = tables.read(tail=tables.waiting())
    assert rows == [0, 1, 2, 3]
    assert notes[committed_lsn_property(lake.log_uuid).encode()] == b"2"
    assert tables.read(at_lsn=2)[0] == [0, 1]


@KINDS
def test_notes_that_others_copied(lake: Any, key: tuple[str, ...]) -> None:
    """A later snapshot of others with a commit's notes is not the state at that LSN."""
    tables = _Tables(lake, key)
    catalog = lake.foreign()
    table = catalog.load_table(tuple(tables.other.name))
    notes = {SUMMARY_LOG: str(lake.log_uuid), SUMMARY_LAST_LSN: "2"}
    table.append(pa.Table.from_batches(tables.rows(1, 50)), snapshot_properties=notes)
    catalog.close()
    tables.put(tables.other, 1, 2)
    assert tables.read(at_lsn=2)[0] == [0, 1]
    assert tables.read(at_lsn=3)[0] == [0, 1, 2, 50]
