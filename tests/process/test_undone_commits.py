"""What others undo, or remove of what says how far a table is, while no server runs (R15, R20)."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pyiceberg.table import Table

from arka.storage import backup
from arka.storage.disk import PosixDisk
from arka.testing.serverprocess import ServerFailed, ServerProcess
from arka.wal.committed import COMMITTED_NAME
from tests.process import lake
from tests.process.clients import Stream, action, connect, create, numbers, write_all
from tests.process.lake import open_catalog

pytestmark = [pytest.mark.process, pytest.mark.slow]

KINDS: dict[str, dict[str, Any]] = {"a": {}, "p": {"table_type": "primary_key", "primary_key": "n"}}
Make = Callable[..., ServerProcess]


def _put_back(data: Path, places: dict[str, str]) -> None:
    with sqlite3.connect(data / "catalog.db") as catalog:
        for name, place in places.items():
            catalog.execute("UPDATE iceberg_tables SET metadata_location = ? WHERE table_name = ?", (place, name))


def _expire(table: Table) -> Table:
    """Write all rows again, and expire every snapshot but that one."""
    table.overwrite(table.scan().to_arrow())
    table.refresh()
    current = table.metadata.current_snapshot_id
    old = [snapshot.snapshot_id for snapshot in table.snapshots() if snapshot.snapshot_id != current]
    table.maintenance.expire_snapshots().by_ids(old).commit()
    return table.refresh()


def _unset(table: Table) -> None:
    with table.transaction() as transaction:
        transaction.remove_properties(*[key for key in table.properties if key.startswith("arka.")])


def _roll_back(table: Table) -> None:
    table.manage_snapshots().rollback_to_snapshot(table.snapshots()[1].snapshot_id).commit()


#: What others do, and whether the table has to stop for it: where its mark is as it was, it goes on.
ACTS: dict[str, tuple[Callable[[Table], object], bool]] = {
    "marks_gone": (lambda table: _unset(_expire(table)), True),
    "marks_gone_snapshots_kept": (_unset, True),
    "snapshots_gone": (_expire, False),
    "rolled_back": (_roll_back, False),
}


@pytest.mark.parametrize(
    ("kind", "stops"),
    [("a", False), pytest.param("p", True, marks=pytest.mark.long)],
    ids=["append-only-kill", "primary-key-stop"],
)
def test_commits_that_others_undo(make_server: Make, kind: str, stops: bool) -> None:
    """Rows that were acknowledged are committed once, whatever others do before the next start; others go on."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    names = [*ACTS, "back_by_one", "back_by_many", "well"]
    places: dict[str, list[str]] = {name: [] for name in names}
    with connect(server.location) as client:
        for name in names:
            create(client, name, **KINDS[kind])
        for number in range(3):
            for name in names:
                write_all(client, name, [numbers([number])])
                places[name].append(lake.load(server.data, name).metadata_location)
    if stops:
        server.stop()
    else:
        server.kill()
    assert not list((server.data / "checkpoints").rglob("checkpoint/*/*"))
    _put_back(server.data, {name: places[name][1] for name in names if name == "back_by_one"})
    _put_back(server.data, {name: places[name][0] for name in names if name == "back_by_many"})
    with open_catalog(server.data) as catalog:
        for name in names:
            if name in ACTS:
                ACTS[name][0](catalog.load_table(("default", name)))
    before = {name: sorted(lake.column(server.data, name, "n")) for name in names}
    server.start()
    with connect(server.location) as client:
        for name in names:
            stream = Stream(client, name, requested_durability="iceberg_committed", acks="requested")
            stream.write(numbers([3]))
            (ack,) = stream.finish()
            described = action(client, "DescribeTable", name=name)
            if "back_by" in name or ACTS.get(name, (None, False))[1]:
                assert ack["code"] == "table_stopped", name
                assert "stands at LSN" in described["reason"] or "a snapshot has LSNs" in described["reason"]
            else:
                assert not ack["error"], name
                assert described["state"] == "active"
                before[name].append(3)
    server.stop()
    for name in names:
        assert sorted(lake.column(server.data, name, "n")) == sorted(before[name]), name
    # Put back to where they were, tables go on.
    back = [name for name in names if "back_by" in name]
    _put_back(server.data, {name: places[name][2] for name in back})
    server.start()
    _write_and_stop(server, back, 5)
    for name in back:
        assert sorted(lake.column(server.data, name, "n")) == [0, 1, 2, 5]


def _write_and_stop(server: ServerProcess, names: Iterable[str], number: int) -> None:
    """Let each table take one more row, up to Iceberg."""
    with connect(server.location) as client:
        for name in names:
            write_all(client, name, [numbers([number])])
    server.stop()


@pytest.mark.long
def test_damaged_record(make_server: Make) -> None:
    """A damaged file ends the start with exit code 3 and its name; without it the server starts."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        for name, kind in KINDS.items():
            create(client, name, **kind)
            write_all(client, name, [numbers([0])])
    server.stop()
    path = server.data / "wal" / COMMITTED_NAME
    kept = path.read_bytes()
    path.write_bytes(kept[:50] + bytes([kept[50] ^ 1]) + kept[51:])
    with pytest.raises(ServerFailed, match=f"(?s)exit code 3.*{path}: damaged at byte"):
        server.start()
    path.unlink()
    server.start()
    _write_and_stop(server, KINDS, 1)
    for name in KINDS:
        assert sorted(lake.column(server.data, name, "n")) == [0, 1]


def test_backup_while_tables_commit(make_server: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed after the catalog was copied does not make the copy's own tables look as if undone (R38)."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        for name, kind in KINDS.items():
            create(client, name, **kind)
            write_all(client, name, [numbers([0])])

        copy_catalog = backup._Copy._copy_catalog

        def go_on(copy: backup._Copy) -> list[tuple[str, str]]:
            found = copy_catalog(copy)
            for name in KINDS:
                write_all(client, name, [numbers([1])])
            return found

        monkeypatch.setattr(backup._Copy, "_copy_catalog", go_on)
        backup.back_up(server.data, tmp_path / "copy", PosixDisk())
    server.stop()
    assert (tmp_path / "copy" / "wal" / COMMITTED_NAME).is_file()
    shutil.rmtree(server.data)
    (tmp_path / "copy").rename(server.data)
    server.start()
    with connect(server.location) as client:
        for name in KINDS:
            write_all(client, name, [numbers([2])])
            assert action(client, "DescribeTable", name=name)["state"] == "active"
    server.stop()
    for name in KINDS:
        assert sorted(lake.column(server.data, name, "n")) == [0, 1, 2]
