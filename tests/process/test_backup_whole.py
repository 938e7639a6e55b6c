"""A backup that says it succeeded has every file that a table of its catalog needs, whatever others delete (R38)."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table.statistics import BlobMetadata, StatisticsFile

from arka.errors import ConfigurationError, Unavailable
from arka.iceberg import adopt
from arka.iceberg.config import CatalogConfig
from arka.options import IcebergOptions
from arka.storage import backup, backuphold
from arka.storage.backup import BackedUp, back_up
from arka.storage.backuptables import CopiedTables, FileLacking
from arka.storage.disk import PosixDisk
from arka.storage.filecopy import FileCopies
from arka.storage.place import settle_place
from arka.testing.serverprocess import ServerProcess
from tests.process.clients import NUMBERS, connect, create, numbers, write_all

pytestmark = [pytest.mark.process, pytest.mark.slow]

TABLES = ("append", "keyed", "foreign", "beside")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of a stopped server, with tables of all kinds; one more place holds it as it was."""
    folder = tmp_path_factory.mktemp("it's 100%25")
    server = ServerProcess(folder / "data", {"iceberg.commit_interval_s": 0.05})
    with server, connect(server.location) as client:
        create(client, "append")
        create(client, "empty")
        create(client, "keyed", table_type="primary_key", primary_key="n")
        for table in ("append", "keyed"):
            for rows in ([1, 2], [1]):
                write_all(client, table, [numbers(rows)])
    with _catalog(folder / "data") as catalog:
        # One that Arka has never seen, and one that lies in the data directory beside the warehouse.
        foreign = catalog.create_table("default.foreign", NUMBERS)
        beside = catalog.create_table("default.beside", NUMBERS, location=f"file://{folder}/data/lake/beside")
        for table in (foreign, beside):
            table.append(pa.Table.from_batches([numbers([1])]))
            table.append(pa.Table.from_batches([numbers([2])]))
    shutil.copytree(folder / "data", folder / "as it was")
    return folder / "data"


@pytest.fixture
def data(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(made.with_name("as it was"), made)
    for name in ("bak", "bak.partial", "lost"):
        shutil.rmtree(made.with_name(name), ignore_errors=True)
    # No server runs that has to see the lock.
    monkeypatch.setattr(backuphold, "_HOLD_WAIT_S", 0.0)
    return made


def _catalog(data: Path) -> closing[SqlCatalog]:
    uri = f"sqlite:///{str(data).replace('%', '%25')}/catalog.db"
    return closing(SqlCatalog("arka", uri=uri, warehouse=f"file://{data}/warehouse"))


def _files_of(data: Path, name: str) -> dict[str, list[str]]:
    """The files of a table that are there: by what they are."""
    with _catalog(data) as catalog:
        table = catalog.load_table(f"default.{name}")
    found: dict[str, list[str]] = {key: [] for key in ("data", "deletes", "manifests", "lists")}
    found["metadata"] = [table.metadata_location]
    for snapshot in table.metadata.snapshots:
        found["lists"].append(snapshot.manifest_list)
        for manifest in snapshot.manifests(table.io):
            found["manifests"].append(manifest.manifest_path)
            for entry in manifest.fetch_manifest_entry(table.io):
                kind = "data" if entry.data_file.content.name == "DATA" else "deletes"
                found[kind].append(entry.data_file.file_path)
    return {key: sorted({path.removeprefix("file://") for path in paths}) for key, paths in found.items()}


def _compact(data: Path, name: str) -> None:
    """What a maintenance job does: rewrite, expire, and delete what no snapshot names any more."""
    before = _files_of(data, name)
    with _catalog(data) as catalog:
        table = catalog.load_table(f"default.{name}")
        table.overwrite(table.scan().to_arrow())
        table = catalog.load_table(f"default.{name}")
        current = table.current_snapshot()
        assert current is not None
        old = [each.snapshot_id for each in table.metadata.snapshots if each.snapshot_id != current.snapshot_id]
        table.maintenance.expire_snapshots().by_ids(old).commit()
    after = {path for paths in _files_of(data, name).values() for path in paths}
    for paths in before.values():
        for path in paths:
            if path not in after:
                os.unlink(path)


def _purge(data: Path, name: str) -> None:
    with _catalog(data) as catalog:
        location = catalog.load_table(f"default.{name}").metadata.location
        catalog.drop_table(f"default.{name}")
    shutil.rmtree(location.removeprefix("file://"))


def _once_the_catalog_is_copied(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[int]:
    """Have others act after the first copy of the catalog; returns one entry per copy of it."""
    copy_catalog, copies = backup._Copy._copy_catalog, []

    def copy(self: Any) -> list[tuple[str, str]]:
        pointers = copy_catalog(self)
        copies.append(len(pointers))
        if len(copies) == 1:
            act()
        return pointers

    monkeypatch.setattr(backup._Copy, "_copy_catalog", copy)
    return copies


def _back_up(data: Path) -> BackedUp:
    return back_up(data, data.with_name("bak"), PosixDisk())


def _restored(data: Path) -> dict[str, list[int]]:
    """Put the copy where the original was; returns the rows of each table, after a look at each snapshot."""
    data.rename(data.with_name("lost"))
    data.with_name("bak").rename(data)
    found = {}
    with _catalog(data) as catalog:
        for identifier in catalog.list_tables("default"):
            table = catalog.load_table(identifier)
            for snapshot in table.metadata.snapshots:
                table.scan(snapshot_id=snapshot.snapshot_id).to_arrow()
            found[identifier[-1]] = sorted(table.scan().to_arrow()["n"].to_pylist())
    return found


ALL = {"append": [1, 1, 2], "empty": [], "keyed": [1, 2], "foreign": [1, 2], "beside": [1, 2]}


def test_whole(data: Path) -> None:
    """Nothing happens meanwhile: all kinds of tables are there, those beside the warehouse and empty ones too."""
    made = _back_up(data)
    assert (made.attempts, made.outside) == (1, ())
    assert _restored(data) == ALL


@pytest.mark.parametrize("name", TABLES)
def test_compacted_meanwhile(data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The copy of the catalog names files that are gone by then: it is made again."""
    copies = _once_the_catalog_is_copied(monkeypatch, lambda: _compact(data, name))
    assert _back_up(data).attempts == len(copies) == 2
    assert _restored(data) == ALL


@pytest.mark.parametrize("name", TABLES)
def test_dropped_meanwhile(data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A table that is dropped with its files is not in the copy."""
    _once_the_catalog_is_copied(monkeypatch, lambda: _purge(data, name))
    assert _back_up(data).attempts == 2
    assert _restored(data) == {other: rows for other, rows in ALL.items() if other != name}


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("append", "data"),
        ("append", "manifests"),
        ("foreign", "data"),
        ("foreign", "lists"),
        ("beside", "data"),
        ("beside", "metadata"),
        ("keyed", "deletes"),
        ("keyed", "metadata"),
    ],
)
def test_damaged_original(data: Path, name: str, kind: str, damage: str) -> None:
    """A file that a table needs is gone or cut off for good: no success, and table and file are named."""
    path = _files_of(data, name)[kind][0]
    if damage == "gone":
        os.unlink(path)
    else:
        os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(Unavailable, match=f"default.{name}") as caught:
        _back_up(data)
    assert f"file://{path}" in caught.value.detail
    assert not data.with_name("bak").exists()


@pytest.mark.parametrize("damage", ["", "gone", "cut"])
def test_statistics(data: Path, damage: str) -> None:
    """Statistics files that metadata names are needed like any other file."""
    with _catalog(data) as catalog:
        table = catalog.load_table("default.foreign")
        path = Path(table.metadata.location.removeprefix("file://"), "metadata", "s.puffin")
        path.write_bytes(b"PFA1" * 10)
        snapshot = table.current_snapshot()
        assert snapshot is not None
        blob = BlobMetadata(
            **{"type": "deletion-vector-v1", "snapshot-id": snapshot.snapshot_id, "sequence-number": 1},
            fields=[1],
            properties={},
        )
        stated = StatisticsFile(
            **{"snapshot-id": snapshot.snapshot_id, "statistics-path": f"file://{path}", "file-size-in-bytes": 40},
            **{"file-footer-size-in-bytes": 8, "blob-metadata": [blob]},
        )
        with table.update_statistics() as update:
            update.set_statistics(stated)
    if damage == "gone":
        path.unlink()
    elif damage:
        path.write_bytes(b"PFA1")
    if damage:
        with pytest.raises(Unavailable, match=r"s\.puffin"):
            _back_up(data)
    else:
        _back_up(data)
        assert data.with_name("bak").joinpath(path.relative_to(data)).read_bytes() == b"PFA1" * 10


def test_superseded_metadata_may_be_gone(data: Path) -> None:
    """Iceberg's libraries delete superseded metadata files that the log still names: those are no loss."""
    with _catalog(data) as catalog:
        table = catalog.load_table("default.foreign")
        for entry in table.metadata.metadata_log:
            os.unlink(entry.metadata_file.removeprefix("file://"))
    assert _back_up(data).attempts == 1
    assert _restored(data) == ALL


@pytest.mark.parametrize("damage", ["", "gone"])
def test_view(data: Path, damage: str) -> None:
    """Of a view the metadata file is needed."""
    path = data / "warehouse" / "default" / "view.metadata.json"
    path.write_text(json.dumps({"view-uuid": "u", "format-version": 1, "versions": [], "location": "l"}))
    with closing(sqlite3.connect(data / "catalog.db")) as catalog, catalog:
        row = ("arka", "default", "view", f"file://{path}", None)
        columns = "catalog_name, table_namespace, table_name, metadata_location, previous_metadata_location"
        catalog.execute(f"INSERT INTO iceberg_tables ({columns}) VALUES (?, ?, ?, ?, ?)", row)
    if damage:
        path.unlink()
        with pytest.raises(Unavailable, match=r"default\.view"):
            _back_up(data)
    else:
        _back_up(data)
        assert (data.with_name("bak") / path.relative_to(data)).exists()


@pytest.mark.parametrize("folder", ["wal", "objects", "keyindex"])
def test_table_among_the_servers_own_files(data: Path, folder: str) -> None:
    """A table in a folder of the server's own is refused at once, with its name and its place."""
    with _catalog(data) as catalog:
        catalog.create_table("default.odd", NUMBERS, location=f"file://{data}/{folder}/odd")
    with pytest.raises(ConfigurationError, match=rf"default\.odd needs .*/{folder}/odd/"):
        _back_up(data)


@pytest.mark.parametrize("what", ["table", "data files"])
def test_files_elsewhere_are_said(data: Path, tmp_path: Path, what: str) -> None:
    """A table, or files of one, that lie outside of the data directory are not in the copy; the table is named."""
    with _catalog(data) as catalog:
        if what == "table":
            table = catalog.create_table("default.far", NUMBERS, location=f"file://{tmp_path}/far")
        else:
            table = catalog.create_table("default.far", NUMBERS, properties={"write.data.path": f"file://{tmp_path}/d"})
        table.append(pa.Table.from_batches([numbers([1])]))
    assert _back_up(data).outside == ("default.far",)


def test_warehouse_that_is_a_link(data: Path, tmp_path: Path) -> None:
    """A warehouse that is a link to another disk is in the copy."""
    (data / "warehouse").rename(tmp_path / "disk")
    (data / "warehouse").symlink_to(tmp_path / "disk")
    assert _back_up(data).outside == ()
    assert _restored(data) == ALL


def test_changed_in_its_place(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that others write again with the same size, between two attempts, is copied again."""
    path = Path(_files_of(data, "foreign")["data"][0])
    changed = bytes(reversed(path.read_bytes()))
    held, calls = backup._Copy._check_held, []

    def check(before: Any, after: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            path.write_bytes(changed)
            raise backup._Again("once more")
        held(before, after)

    monkeypatch.setattr(backup._Copy, "_check_held", staticmethod(check))
    _back_up(data)
    assert (data.with_name("bak") / path.relative_to(data)).read_bytes() == changed


def test_changed_behind_its_copy(data: Path, tmp_path: Path) -> None:
    """A needed file that is written to since it was copied is not taken for the copied one, with the same size."""
    location = _files_of(data, "foreign")["data"][0]
    copies = FileCopies(tmp_path)
    for path in (data / "warehouse").rglob("*"):
        if path.is_file():
            copies.copy(path, tmp_path / path.relative_to(data))
    with _catalog(data) as catalog:
        pointers = [("default.foreign", catalog.load_table("default.foreign").metadata_location)]
    assert CopiedTables(data, tmp_path, copies).check(pointers) == ()
    path = Path(location)
    path.write_bytes(bytes(reversed(path.read_bytes())))
    with pytest.raises(FileLacking, match="changed while it was copied"):
        CopiedTables(data, tmp_path, copies).check(pointers)


async def _adopt(data: Path, *, take_over: bool) -> None:
    config = CatalogConfig.from_options(IcebergOptions(), data, {})

    async def run(old: str, new: str, others: tuple[tuple[str, str], ...]) -> list[str]:
        return adopt.adopt(config, adopt.Move(old, new, others))

    await settle_place(config, data, PosixDisk(), data / "wal", run, adopting=True, take_over=take_over)


@pytest.fixture
def elsewhere(data: Path) -> Path:
    new = data.with_name("elsewhere")
    shutil.rmtree(new, ignore_errors=True)
    return new


@pytest.mark.parametrize("how", ["moved", "copied"])
async def test_adopted_beside_the_warehouse(data: Path, elsewhere: Path, how: str) -> None:
    """Tables in the data directory beside its warehouse move with it: each snapshot is read from the new place."""
    if how == "copied":
        shutil.copytree(data, elsewhere)
    else:
        data.rename(elsewhere)
    await _adopt(elsewhere, take_over=how == "copied")
    if how == "copied":
        shutil.rmtree(data)
    found = {}
    with _catalog(elsewhere) as catalog:
        for identifier in catalog.list_tables("default"):
            table = catalog.load_table(identifier)
            assert table.metadata.location.startswith(f"file://{elsewhere}/")
            for snapshot in table.metadata.snapshots:
                table.scan(snapshot_id=snapshot.snapshot_id).to_arrow()
            found[identifier[-1]] = sorted(table.scan().to_arrow()["n"].to_pylist())
    assert found == ALL


@pytest.mark.parametrize("name", TABLES)
async def test_adopted_without_a_table(data: Path, elsewhere: Path, name: str) -> None:
    """A table whose files did not come along is named, with where it lay, and nothing is changed."""
    with _catalog(data) as catalog:
        table = catalog.load_table(f"default.{name}")
    shutil.rmtree(table.metadata.location.removeprefix("file://"))
    data.rename(elsewhere)
    before = (elsewhere / "catalog.db").read_bytes()
    with pytest.raises(ConfigurationError, match=rf"default\.{name} ") as caught:
        await _adopt(elsewhere, take_over=False)
    assert table.metadata_location in caught.value.detail
    assert (elsewhere / "catalog.db").read_bytes() == before


async def test_adopted_without_leave(data: Path, elsewhere: Path) -> None:
    """What the disk refuses is said with the table's name: here a folder lies where a manifest list was."""
    path = Path(_files_of(data, "foreign")["lists"][0])
    path.unlink()
    path.mkdir()
    data.rename(elsewhere)
    with pytest.raises(OSError, match=r"default\.foreign"):
        await _adopt(elsewhere, take_over=False)
