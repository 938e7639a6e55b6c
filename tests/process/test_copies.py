"""Copies of a data directory whose catalog and warehouse lie outside of it, and marks that others changed (R15, R29).

On real files, with a table of each kind. What only the order of events decides is ``tests/tiers/test_copies.py``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyiceberg.catalog.sql import SqlCatalog

from arka.testing.serverprocess import ServerFailed, ServerProcess
from tests.process.clients import Stream, action, connect, create, numbers, write_all
from tests.process.lake import open_catalog

pytestmark = [pytest.mark.process, pytest.mark.slow]

TABLES = ("a", "p")
Make = Callable[..., ServerProcess]


@pytest.fixture
def make(make_server: Make, tmp_path: Path) -> Make:
    """Start servers whose catalog and warehouse are outside of their data directories."""

    def of(*flags: str, data: str = "data") -> ServerProcess:
        settings = {
            "iceberg__catalog_uri": f"sqlite:///{tmp_path}/catalog.db",
            "iceberg__warehouse": f"file://{tmp_path}/wh",
            "iceberg__commit_interval_s": 0.05,
        }
        return make_server(*flags, data=data, **settings)

    return of


def _column(tmp_path: Path, table: str) -> list[int]:
    with open_catalog(tmp_path, "wh") as catalog:
        found: list[int] = catalog.load_table(("default", table)).scan().to_arrow()["n"].to_pylist()
        return sorted(found)


def _write(server: ServerProcess, values: range) -> None:
    with connect(server.location) as client:
        for table in TABLES:
            write_all(client, table, [numbers([n]) for n in values])


def _first_life(server: ServerProcess) -> None:
    server.start()
    with connect(server.location) as client:
        create(client, "a")
        create(client, "p", table_type="primary_key", primary_key="n")
    _write(server, range(3))
    server.stop()


def _answer(server: ServerProcess, table: str, number: int) -> dict[str, Any]:
    """What a write is told last: an ack ``iceberg_committed``, or an error."""
    with connect(server.location) as client:
        stream = Stream(client, table, requested_durability="iceberg_committed")
        stream.write(numbers([number]))
        while True:
            ack = stream.ack()
            if ack.get("error") or ack["durability_level"] == "iceberg_committed":
                return ack


def _reason(server: ServerProcess, table: str) -> str:
    with connect(server.location) as client:
        return str(action(client, "DescribeTable", name=table)["reason"])


def _refusal(server: ServerProcess) -> str:
    with pytest.raises(ServerFailed):
        server.start()
    assert server.exit_code == 2
    return server.log_tail()


def test_directory_that_was_put_back(make: Make, tmp_path: Path) -> None:
    """An older state at the same path acknowledges nothing of tables that went on, and serves others."""
    _first_life(make())
    shutil.copytree(tmp_path / "data", tmp_path / "older")
    server = make().start()
    _write(server, range(3, 8))
    server.stop()
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "older").rename(tmp_path / "data")
    for _ in range(2):
        server = make().start()
        for table in TABLES:
            answer = _answer(server, table, 100)
            assert answer["code"] == "table_stopped"
            assert "copy of this data directory" in answer["error"]
            # What else stands still for now may be said before it.
            assert _reason(server, table).endswith(answer["error"])
        server.stop()
    server = make().start()
    with connect(server.location) as client:
        create(client, "new")
        write_all(client, "new", [numbers([1])])
    server.stop()
    assert _column(tmp_path, "new") == [1]
    assert [_column(tmp_path, table) for table in TABLES] == [list(range(8))] * 2


def test_copy_beside_its_original(make: Make, tmp_path: Path) -> None:
    """A copy is refused; with the flag that its message names, a table is one server's alone: the first that comes."""
    _first_life(make())
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    said = _refusal(make(data="copy"))
    assert str(tmp_path / "data") in said
    assert "--take-over" in said
    first, second = make().start(), make("--take-over", data="copy").start()
    acked: dict[str, set[int]] = {table: {0, 1, 2} for table in TABLES}
    refused = set()
    for number in range(10, 13):
        for base, server in ((0, first), (100, second)):
            # Each comes first at one of the two.
            for table in TABLES if server is first else TABLES[::-1]:
                answer = _answer(server, table, base + number)
                if answer.get("error"):
                    refused.add(answer["code"])
                else:
                    acked[table].add(base + number)
    first.stop()
    second.stop()
    assert refused == {"outcome_unknown", "table_stopped"}
    assert [set(_column(tmp_path, table)) for table in TABLES] == [acked[table] for table in TABLES]


@pytest.mark.long
def test_moved_directory_goes_on(make: Make, tmp_path: Path) -> None:
    """One that was moved starts without a flag, by its path or by a link, and a copy of it is known by its new path."""
    _first_life(make())
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for life, data in enumerate(("moved", "link", "moved")):
        server = make(data=data).start()
        _write(server, range(3 + life, 4 + life))
        server.stop()
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    for data in ("copy", "link"):
        assert str(tmp_path / "moved") in _refusal(make(data=data))
    assert [_column(tmp_path, table) for table in TABLES] == [list(range(6))] * 2


@pytest.mark.long
def test_copy_of_hard_links(make: Make, tmp_path: Path) -> None:
    """Two directories with the same files are refused whatever flag is given."""
    _first_life(make())
    shutil.copytree(tmp_path / "data", tmp_path / "links", copy_function=os.link)
    for flags in ((), ("--take-over",), ("--adopt-warehouse", "--take-over")):
        assert "hard links" in _refusal(make(*flags, data="links"))
    server = make().start()
    _write(server, range(3, 4))
    server.stop()


@pytest.mark.long
def test_embedded_copy_of_hard_links(make_server: Make, tmp_path: Path) -> None:
    """So are two that hold their warehouse."""
    server = make_server()
    _first_life(server)
    shutil.copytree(tmp_path / "data", tmp_path / "links", copy_function=os.link)
    assert "hard links" in _refusal(make_server("--adopt-warehouse", "--take-over", data="links"))


def test_copies_that_share_a_catalog_are_not_adopted(make_server: Make, tmp_path: Path) -> None:
    """A warehouse inside and a catalog outside: adopting the copy would take the original's tables away."""
    flags = ("--catalog-uri", f"sqlite:///{tmp_path}/catalog.db")
    server = make_server(*flags)
    _first_life(server)
    before = (tmp_path / "catalog.db").read_bytes()
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    said = _refusal(make_server(*flags, "--adopt-warehouse", "--take-over", data="copy"))
    assert "one catalog" in said
    assert (tmp_path / "catalog.db").read_bytes() == before
    server = make_server(*flags).start()
    _write(server, range(3, 5))
    server.stop()


def test_copy_with_tables_outside_is_not_adopted(make_server: Make, tmp_path: Path) -> None:
    """Tables that lie outside would be in both catalogs: the refusal names them."""
    server = make_server()
    _first_life(server)
    data = tmp_path / "data"
    with SqlCatalog("arka", uri=f"sqlite:///{data}/catalog.db", warehouse=f"file://{data}/warehouse") as catalog:
        schema = catalog.load_table("default.a").schema()
        catalog.create_table("default.far", schema, location=f"file://{tmp_path}/far")
    shutil.copytree(data, tmp_path / "copy")
    said = _refusal(make_server("--adopt-warehouse", "--take-over", data="copy"))
    assert "default.far" in said
    with SqlCatalog(
        "arka", uri=f"sqlite:///{tmp_path}/copy/catalog.db", warehouse=f"file://{data}/warehouse"
    ) as catalog:
        catalog.drop_table("default.far")
    make_server("--adopt-warehouse", "--take-over", data="copy").start().stop()


LSN, EPOCH, TOKEN = "committed-lsn", "epoch", "token"
CHANGES: dict[str, dict[str, str | None]] = {
    "lower": {LSN: "1"},
    "higher": {LSN: "40000000000"},
    "garbage": {LSN: "seven"},
    "gone": {LSN: None},
    "epoch": {EPOCH: "garbage"},
    "no_epoch": {EPOCH: None},
    "all_gone": {LSN: None, EPOCH: None, TOKEN: None},
    "no_token": {TOKEN: None},
}


@pytest.mark.parametrize("running", [False, pytest.param(True, marks=pytest.mark.long)])
def test_marks_that_others_changed(make: Make, tmp_path: Path, running: bool) -> None:
    """Each table whose mark was changed stops and says so; nothing is acknowledged, added or doubled; others go on."""
    server = make().start()
    with connect(server.location) as client:
        for name in CHANGES:
            kind = {"table_type": "primary_key", "primary_key": "n"} if name in ("gone", "higher") else {}
            create(client, name, **kind)
            write_all(client, name, [numbers([n]) for n in range(3)])
        create(client, "well")
    if not running:
        server.stop()
    kept: dict[str, dict[str, str]] = {}
    with open_catalog(tmp_path, "wh") as catalog:
        for name, changed in CHANGES.items():
            table = catalog.load_table(("default", name))
            marks = {key: key.rpartition(".")[2] for key in table.properties if key.endswith((LSN, EPOCH, TOKEN))}
            assert len(marks) == 3
            kept[name] = {key: table.properties[key] for key in marks}
            with table.transaction() as transaction:
                for key, which in marks.items():
                    value = changed.get(which, "as it was")
                    if value is None:
                        transaction.remove_properties(key)
                    elif value != "as it was":
                        transaction.set_properties({key: value})
    if not running:
        server = make().start()
    for name in CHANGES:
        answer = _answer(server, name, 100)
        assert answer["code"] == ("outcome_unknown" if running else "table_stopped")
        # A server that has just started may name the warehouse, which it has not looked at yet, before.
        assert _reason(server, name).endswith(answer["error"])
    assert not _answer(server, "well", 1).get("error")
    server.stop()
    for name in CHANGES:
        assert _column(tmp_path, name) == [0, 1, 2]
    # Set back, each goes on with what it had.
    with open_catalog(tmp_path, "wh") as catalog:
        for name, properties in kept.items():
            with catalog.load_table(("default", name)).transaction() as transaction:
                transaction.set_properties(properties)
    server = make().start()
    for name in CHANGES:
        assert not _answer(server, name, 200).get("error")
        assert _column(tmp_path, name) == ([0, 1, 2, 100, 200] if running else [0, 1, 2, 200])
    server.stop()
