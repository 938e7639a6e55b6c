"""A data directory that was moved or copied: it refuses to start, and can be adopted as its message says (R29)."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arka.testing.serverprocess import ServerFailed, ServerProcess
from tests.process import lake
from tests.process.clients import connect, create, numbers, write_all

pytestmark = [pytest.mark.process, pytest.mark.slow]


def _fill(server: ServerProcess) -> None:
    with connect(server.location) as client:
        create(client, "a", [("n", "int64!")])
        create(client, "p", [("n", "int64!")], table_type="primary_key", primary_key="n")
        for table in ("a", "p"):
            write_all(client, table, [numbers([n]) for n in range(3)])
        # Both rows of key 0 and 1 are replaced: there are position deletes.
        write_all(client, "p", [numbers([0, 1])])
    server.stop()


def _digests(data: Path) -> dict[str, str]:
    files = [path for path in data.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _refusal(server: ServerProcess) -> str:
    with pytest.raises(ServerFailed):
        server.start()
    assert server.exit_code == 2
    return server.log_tail()


def test_moved_directory(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A moved directory names both paths and the flag; with the flag it goes on, on both kinds of tables."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    _fill(server)
    server.data.rename(tmp_path / "bigger")
    before = _digests(tmp_path / "bigger")
    said = _refusal(make_server(data="bigger"))
    assert str(tmp_path / "data") in said
    assert str(tmp_path / "bigger") in said
    assert _digests(tmp_path / "bigger") == before
    (flag,) = set(re.findall(r"--[a-z-]+", said))
    moved = make_server(flag, data="bigger").start()
    with connect(moved.location) as client:
        acks = write_all(client, "a", [numbers([3])])
        write_all(client, "p", [numbers([2, 3])])
    moved.stop()
    assert min(ack["lsn"] for ack in acks) >= 2**32
    assert sorted(lake.column(moved.data, "a", "n")) == [0, 1, 2, 3]
    assert sorted(lake.column(moved.data, "p", "n")) == [0, 1, 2, 3]
    # Once adopted it is an ordinary directory.
    make_server(data="bigger").start().stop()


def test_copy(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A copy needs both flags that its message names, and the original keeps each byte and goes on."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    _fill(server)
    shutil.copytree(server.data, tmp_path / "copy")
    before = _digests(server.data)
    said = _refusal(make_server(data="copy"))
    flags = sorted(set(re.findall(r"--[a-z-]+", said)))
    assert flags == ["--adopt-warehouse", "--take-over"]
    _refusal(make_server("--adopt-warehouse", data="copy"))
    copy = make_server(*flags, data="copy").start()
    with connect(copy.location) as client:
        for table in ("a", "p"):
            write_all(client, table, [numbers([10])])
    copy.stop()
    assert _digests(server.data) == before
    server.start()
    with connect(server.location) as client:
        for table in ("a", "p"):
            write_all(client, table, [numbers([3])])
    server.stop()
    for table in ("a", "p"):
        assert sorted(lake.column(server.data, table, "n")) == [0, 1, 2, 3]
        assert sorted(lake.column(copy.data, table, "n")) == [0, 1, 2, 10]


@pytest.mark.long
def test_copy_from_before_there_were_markers(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A copy without a marker is known by where its catalog's pointers lead."""
    server = make_server().start()
    _fill(server)
    for name in ("warehouse/arka-warehouse.json", "warehouse.json"):
        (server.data / name).unlink()
    shutil.copytree(server.data, tmp_path / "copy")
    before = _digests(server.data)
    assert "--adopt-warehouse --take-over" in _refusal(make_server(data="copy"))
    assert _digests(server.data) == before


@pytest.mark.long
def test_copy_with_a_catalog_of_its_own_beside_a_shared_warehouse(
    make_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """Two catalogs that name the same tables of one warehouse: the copy refuses while the original is there."""
    flags = ("--warehouse", f"file://{tmp_path}/wh")
    server = make_server(*flags).start()
    with connect(server.location) as client:
        create(client, "a", [("n", "int64!")])
        write_all(client, "a", [numbers([0])])
    server.stop()
    shutil.copytree(server.data, tmp_path / "copy")
    assert str(server.data) in _refusal(make_server(*flags, data="copy"))
    server.data.rename(tmp_path / "moved")
    moved = make_server(*flags, data="moved").start()
    with connect(moved.location) as client:
        write_all(client, "a", [numbers([1])])
    moved.stop()
    assert sorted(lake.column(moved.data, "a", "n")) == [0, 1]
