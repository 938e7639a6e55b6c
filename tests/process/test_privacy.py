"""Files are private whatever the umask; a group reads warehouse and catalog alone; hosts are loopback by default."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess
from tests.process.clients import connect, create, numbers, write_all

pytestmark = [pytest.mark.process]

ARKA = Path(sys.executable).with_name("arka")
#: Any group will do for a server of root's; another user's own one for its.
GROUP = 54321 if os.geteuid() == 0 else os.getegid()
#: Reads a table as an engine under another user does: the catalog's row, then every file of the warehouse.
READER = """
import os, sqlite3, sys
with sqlite3.connect(f"file:{sys.argv[1]}/catalog.db?mode=ro", uri=True) as catalog:
    [(location,)] = catalog.execute("SELECT metadata_location FROM iceberg_tables WHERE table_name = 'a'").fetchall()
open(location.removeprefix("file://"), "rb").read()
def stop(error): raise error
for folder, _, names in os.walk(f"{sys.argv[1]}/warehouse", onerror=stop):
    for name in names:
        open(os.path.join(folder, name), "rb").read()
for private in ("wal", "objects", "keyindex", "spill"):
    try:
        os.listdir(f"{sys.argv[1]}/{private}")
    except PermissionError:
        continue
    sys.exit(f"{private} is open")
"""


def _modes(root: Path) -> Iterator[tuple[str, int, os.stat_result]]:
    """Each path at and below a folder with its mode."""
    for path in (root, *root.rglob("*")):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        yield str(path), stat.S_IMODE(status.st_mode), status


def _use(server: ServerProcess) -> None:
    """Have the server make each kind of file that it has: both kinds of tables, keys, an answer, checkpoints."""
    with connect(server.location) as client:
        create(client, "a")
        create(client, "p", table_type="primary_key", primary_key="n")
        for _ in range(2):
            write_all(client, "a", [numbers([1, 2])])
            write_all(client, "p", [numbers([1, 2])])
        ticket = flight.Ticket(b'{"table_name": "a"}')
        assert client.do_get(ticket).read_all().num_rows == 4


@pytest.mark.parametrize("umask", [0o000, pytest.param(0o777, marks=pytest.mark.long)])
def test_all_that_a_server_makes_is_private(make_server: Callable[..., ServerProcess], tmp_path: Path, umask: int):
    """Files are 0600 and folders 0700: of a server that runs or was killed, in a backup and in what is salvaged."""
    server = make_server(wal__segment_bytes="1MiB", wal__release_grace_s=0, iceberg__commit_interval_s=0.1)
    server.umask = umask
    for end in (server.kill, server.stop):
        server.start()
        if end == server.kill:
            _use(server)
        for kind in (
            "wal",
            "objects",
            "keyindex",
            "spill",
            "warehouse",
            "catalog.db",
            "lock",
            "server.json",
            "disk-id",
        ):
            assert (server.data / kind).exists(), kind
        done = subprocess.run(
            [ARKA, "backup", server.data, tmp_path / f"copy-{end.__name__}"], umask=umask, timeout=120, check=False
        )
        assert done.returncode == 0
        _check_private(server.data)
        end()
        _check_private(server.data)
        _check_private(tmp_path / f"copy-{end.__name__}")
    out = tmp_path / "salvaged"
    subprocess.run([ARKA, "wal", "salvage", server.data, "--to", out], umask=umask, timeout=120, check=True)
    assert any(out.iterdir())
    _check_private(out)
    assert "data_dir.open_modes" not in server.log_tail(1000)


def _check_private(root: Path) -> None:
    found = list(_modes(root))
    assert len(found) > 1
    wrong = [
        (path, oct(mode)) for path, mode, status in found if mode != (0o700 if stat.S_ISDIR(status.st_mode) else 0o600)
    ]
    assert not wrong


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_group_reads_warehouse_and_catalog_alone(make_server: Callable[..., ServerProcess], umask: int):
    """With server.shared_group its members read both, while the server runs, and nothing else."""
    server = make_server(server__shared_group=GROUP, iceberg__commit_interval_s=0.1)
    server.umask = umask
    server.start()
    _use(server)
    shared = (str(server.data / "warehouse"), f"{server.data}/warehouse/", str(server.data / "catalog.db"))
    seen = set()
    for path, mode, status in _modes(server.data):
        is_folder = stat.S_ISDIR(status.st_mode)
        if path == str(server.data):
            assert (mode, status.st_gid) == (0o2710, GROUP)
        elif path == shared[0] or path.startswith(shared[1:]):
            assert (mode, status.st_gid) == (0o2750 if is_folder else 0o640, GROUP), path
            seen.add(Path(path).suffix)
        else:
            assert mode & 0o777 == (0o700 if is_folder else 0o600), (path, oct(mode))
    assert {".db", ".db-wal", ".db-shm", ".parquet", ".avro", ".json"} <= seen
    assert "data_dir.not_shared" not in server.log_tail(1000)
    if os.geteuid() == 0:
        for parent in server.data.parents:
            # Pytest's own folders are its user's alone; xdist has one more.
            if parent == Path(tempfile.gettempdir()):
                break
            parent.chmod(parent.stat().st_mode | 0o011)
        done = subprocess.run(
            ["/usr/bin/env", "python3", "-c", READER, server.data],
            user=54322, group=GROUP, extra_groups=[], cwd="/", capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    server.stop()


def test_open_modes_are_warned_of_and_stay(make_server: Callable[..., ServerProcess]):
    """What others can open already is named in one line with the command that closes it, and is not changed."""
    server = make_server()
    server.start()
    server.stop()
    assert "data_dir.open_modes" not in server.log_tail(1000)
    for path, mode in ((server.data / "wal", 0o777), (server.data / "catalog.db", 0o644)):
        path.chmod(mode)
    server.start()
    server.stop()
    (line,) = [line for line in server.log_tail(1000).splitlines() if "data_dir.open_modes" in line]
    assert f"{server.data}/wal (drwxrwxrwx)" in line
    assert line.index(f"{server.data}/wal (d") < line.index(f"{server.data}/catalog.db (-")
    assert f"chmod -R go= {server.data}/catalog.db {server.data}/wal" in line
    assert stat.S_IMODE((server.data / "wal").stat().st_mode) == 0o777
    assert stat.S_IMODE((server.data / "catalog.db").stat().st_mode) == 0o644


def test_files_that_a_group_cannot_read_yet_are_named(make_server: Callable[..., ServerProcess]):
    """A group that is set later is told of what it cannot pass or read, with the command that opens it."""
    server = make_server()
    server.start()
    server.stop()
    later = make_server(server__shared_group=GROUP)
    later.start()
    later.stop()
    (line,) = [line for line in later.log_tail(1000).splitlines() if "data_dir.not_shared" in line]
    assert f"chgrp {GROUP} {server.data} && chmod g=x,g+s {server.data}" in line
    assert stat.S_IMODE(server.data.stat().st_mode) == 0o700


def test_a_group_that_is_not_there_is_refused(make_server: Callable[..., ServerProcess]):
    """A start with an unknown group makes nothing."""
    server = make_server(server__shared_group="no-such-group")
    server.spawn()
    assert server.wait() == 2
    assert "server.shared_group = 'no-such-group'" in server.log_tail()
    assert not server.data.exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_hosts_that_others_reach_are_refused(make_server: Callable[..., ServerProcess], host: str):
    """Without server.insecure a host that is not loopback ends the start before anything is made."""
    server = make_server(server__host=host)
    server.spawn()
    assert server.wait() == 2
    assert "server.insecure (--insecure)" in server.log_tail()
    assert not server.data.exists()


def test_insecure_hosts_are_served_with_a_warning(make_server: Callable[..., ServerProcess]):
    """With --insecure the server listens there, and says at each start what that means."""
    server = make_server("--insecure", server__host="0.0.0.0")
    server.start()
    assert server.flight.startswith("0.0.0.0:")
    with connect(f"grpc://127.0.0.1:{server.address[1]}") as client:
        create(client, "a")
    server.stop()
    assert "server.insecure" in server.log_tail(1000)
