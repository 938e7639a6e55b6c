"""A drop removes the entry that was looked at, and a purge deletes its files alone (R5, R29)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.table import Table
from pyiceberg.table.statistics import StatisticsFile

from arka import failpoints
from arka.iceberg import control
from arka.iceberg.fileio import local_path
from arka.records import TableInfo, TableName
from arka.storage.ports import TableMissing

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False)])
NAME = ("default", "t")


def rows(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array(numbers, pa.int64())], schema=SCHEMA)


def numbers_of(table: Table) -> list[int]:
    found: list[int] = sorted(table.scan().to_arrow()["n"].to_pylist())
    return found


def made_by_others(catalog: SqlCatalog, name: str, *numbers: int, location: str | None = None) -> Table:
    """Let another engine make a table with rows."""
    table = catalog.create_table(("default", name), SCHEMA, location=location)
    table.append(pa.Table.from_batches([rows(*numbers)]))
    return table


def folder(info: TableInfo) -> Path:
    return Path(local_path(info.location) or "")


@pytest.fixture(params=[False, True], ids=["append_only", "primary_key"])
def info(request: pytest.FixtureRequest, lake: Any) -> TableInfo:
    """A table of Arka's own with one commit."""
    made: TableInfo = lake.create(SCHEMA, key=["n"] if request.param else ())
    lake.append(made, [rows(1, 2)], 0)
    return made


def at_the_drop(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let others act once, between the look at the entry and its removal."""
    hit, left = failpoints.hit, [act]

    def hit_and_act(name: str) -> None:
        if name == "catalog.drop" and left:
            left.pop()()
        hit(name)

    monkeypatch.setattr(failpoints, "hit", hit_and_act)


@pytest.mark.parametrize("purge", [False, True], ids=["keep", "purge"])
def test_name_that_others_give_to_another_table_meanwhile(
    lake: Any, info: TableInfo, monkeypatch: pytest.MonkeyPatch, purge: bool
) -> None:
    """Others rename the table and make another one of its name: neither is dropped, and no file is deleted."""
    catalog: SqlCatalog = lake.foreign()

    def act() -> None:
        catalog.rename_table(NAME, ("default", "kept"))
        made_by_others(catalog, "t", 77)

    at_the_drop(monkeypatch, act)
    with pytest.raises(TableMissing):
        control.drop_table(lake.config, info.name, info.uuid, purge=purge)
    assert numbers_of(catalog.load_table(NAME)) == [77]
    assert numbers_of(catalog.load_table("default.kept")) == [1, 2]


def test_others_drop_the_table_and_make_another_one_meanwhile(
    lake: Any, info: TableInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table that has the name now, at the very same location, stays whole."""
    catalog: SqlCatalog = lake.foreign()

    def act() -> None:
        catalog.drop_table(NAME)
        made_by_others(catalog, "t", 77, location=info.location)

    at_the_drop(monkeypatch, act)
    with pytest.raises(TableMissing):
        control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert numbers_of(catalog.load_table(NAME)) == [77]


def test_others_commit_meanwhile(lake: Any, info: TableInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of others to the same table does not keep it: it is looked at again, and the new files go too."""
    catalog: SqlCatalog = lake.foreign()
    at_the_drop(monkeypatch, lambda: catalog.load_table(NAME).append(pa.Table.from_batches([rows(3)])))
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    with pytest.raises(NoSuchTableError):
        catalog.load_table(NAME)
    assert not folder(info).exists()


def test_purge_of_one_of_two_tables_in_one_folder(lake: Any) -> None:
    """Others rename a table and make another one of its old name: both lie in one folder, and one is purged."""
    catalog: SqlCatalog = lake.foreign()
    lake.create(SCHEMA, name="other")
    first = made_by_others(catalog, "a", 10, 11)
    catalog.rename_table("default.a", "default.b")
    second = made_by_others(catalog, "a", 20, 21)
    assert first.location() == second.location()
    info = control.load_table(lake.config, TableName("default", "b")).info
    lake.append(info, [rows(12)], 0)
    purged = lake.table(info)
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert numbers_of(catalog.load_table("default.a")) == [20, 21]
    # What the purged table alone had is gone.
    assert not any(Path(local_path(s.manifest_list) or "").exists() for s in purged.metadata.snapshots)
    assert not Path(local_path(purged.metadata_location) or "").exists()


def test_purge_leaves_statistics_that_another_table_names(lake: Any) -> None:
    """A statistics file that two tables of one folder name stays when one of them is purged."""
    catalog: SqlCatalog = lake.foreign()
    catalog.create_namespace("default")
    shared = None
    for name in ("a", "b"):
        table = made_by_others(
            catalog, name, 1, location=None if shared is None else shared.rpartition("/metadata/")[0]
        )
        if shared is None:
            shared = f"{table.location()}/metadata/shared.stats"
            Path(local_path(shared) or "").write_bytes(b"PFA1PFA1")
        snapshot = table.current_snapshot()
        assert snapshot is not None
        with table.update_statistics() as update:
            update.set_statistics(
                StatisticsFile(
                    snapshot_id=snapshot.snapshot_id,
                    statistics_path=shared,
                    file_size_in_bytes=8,
                    file_footer_size_in_bytes=4,
                    blob_metadata=[],
                )
            )
    info = control.load_table(lake.config, TableName("default", "a")).info
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert Path(local_path(shared or "") or "").exists()
    assert numbers_of(catalog.load_table("default.b")) == [1]


@pytest.mark.parametrize("where", ["above", "below", "at"])
def test_purge_of_a_table_that_lies_around_others(lake: Any, where: str) -> None:
    """The folder of a purged table is removed only where no other table of the catalog lies at, below or above it."""
    catalog: SqlCatalog = lake.foreign()
    info = lake.create(SCHEMA, name="own")
    lake.append(info, [rows(1)], 0)
    place = {"above": info.location.rpartition("/")[0], "below": f"{info.location}/inner", "at": info.location}[where]
    made_by_others(catalog, "guest", 5, location=place)
    guest = control.load_table(lake.config, TableName("default", "guest")).info
    control.drop_table(lake.config, guest.name, guest.uuid, purge=True)
    assert numbers_of(catalog.load_table("default.own")) == [1]
    # The other way round: Arka's own folder stays where a guest lies.
    made_by_others(catalog, "guest", 6, location=place)
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert numbers_of(catalog.load_table("default.guest")) == [6]


def test_purge_knows_tables_of_catalogs_with_other_names(lake: Any) -> None:
    """One database may hold several catalogs; what lies in the folder counts, whatever its catalog's name."""
    info = lake.create(SCHEMA)
    lake.append(info, [rows(1)], 0)
    theirs = SqlCatalog("spark", uri=lake.config.uri, warehouse=lake.config.warehouse)
    theirs.create_namespace("default")
    made_by_others(theirs, "guest", 5, location=f"{info.location}/inner")
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert numbers_of(theirs.load_table("default.guest")) == [5]
    theirs.close()


def test_purge_of_a_table_that_has_two_names(lake: Any, info: TableInfo) -> None:
    """What is registered a second time keeps its files until the last of its names is purged."""
    catalog: SqlCatalog = lake.foreign()
    catalog.register_table("default.second", catalog.load_table(NAME).metadata_location)
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert numbers_of(catalog.load_table("default.second")) == [1, 2]
    second = control.load_table(lake.config, TableName("default", "second")).info
    control.drop_table(lake.config, second.name, second.uuid, purge=True)
    assert not folder(info).exists()


def test_purge_beside_a_table_that_cannot_be_read(lake: Any, info: TableInfo) -> None:
    """Where it is not known which files are another table's, none is deleted."""
    catalog: SqlCatalog = lake.foreign()
    guest = made_by_others(catalog, "guest", 5, location=f"{info.location}/inner")
    Path(local_path(guest.metadata_location) or "").write_bytes(b"{}")
    before = [path for path in folder(info).rglob("*") if path.is_file()]
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert all(path.exists() for path in before)


def test_purge_leaves_files_that_lie_elsewhere(lake: Any, tmp_path: Path) -> None:
    """Files that others added from outside of the table's location are theirs."""
    catalog: SqlCatalog = lake.foreign()
    catalog.create_namespace("default")
    source = made_by_others(catalog, "source", 1, 2)
    table = catalog.create_table("default.borrower", SCHEMA)
    paths = [task.file.file_path for task in source.scan().plan_files()]
    table.add_files(paths)
    info = control.load_table(lake.config, TableName("default", "borrower")).info
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert numbers_of(catalog.load_table("default.source")) == [1, 2]


def test_purge_obeys_gc_enabled(lake: Any) -> None:
    """``gc.enabled: false`` says that others read the data files: they stay, and what Iceberg keeps of them goes."""
    catalog: SqlCatalog = lake.foreign()
    info = lake.create(SCHEMA)
    lake.append(info, [rows(1)], 0)
    with catalog.load_table(NAME).transaction() as transaction:
        transaction.set_properties({"gc.enabled": "false"})
    data = [Path(local_path(t.file.file_path) or "") for t in catalog.load_table(NAME).scan().plan_files()]
    control.drop_table(lake.config, info.name, info.uuid, purge=True)
    assert data
    assert all(path.exists() for path in data)
    assert not list(folder(info).rglob("*.avro"))
