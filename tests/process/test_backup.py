"""``arka backup``: a copy made under load starts, and has every row that was acked before it began, once (R2, R38)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from click.testing import CliRunner

from arka import cli
from arka.errors import ConfigurationError
from arka.storage.backup import BACKUP_FILE, settle_restored
from arka.storage.disk import PosixDisk
from arka.testing.serverprocess import ServerFailed, ServerProcess
from arka.wal.logstate import LogState
from tests.process import lake
from tests.process.clients import NUMBERS, Stream, connect, create, numbers, write_all

pytestmark = [pytest.mark.process, pytest.mark.slow]

ARKA = Path(sys.executable).with_name("arka")
TABLES = ("a", "p")


def _back_up(server: ServerProcess, dest: Path) -> str:
    done = subprocess.run([ARKA, "backup", server.data, dest], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _restore(server: ServerProcess, copy: Path) -> None:
    """Put a copy where the data directory was, and start it."""
    subprocess.run(["cp", "-a", copy, server.data], check=True)
    server.start()


class _Load:
    """Writes rows to a table, one after the other, until it is told to stop; the table's name is the key's prefix."""

    def __init__(self, server: ServerProcess, table: str) -> None:
        self.acked: list[int] = []
        self.lsns: list[int] = []
        self.begun = threading.Event()
        self._stop = threading.Event()
        self._server, self._table = server, table
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with connect(self._server.location) as client:
            n = 0
            while not self._stop.is_set():
                stream = Stream(client, self._table, NUMBERS, requested_durability="disk", acks="requested")
                for _ in range(20):
                    stream.write(numbers([n]), idempotency_key=f"{self._table}{n}")
                    n += 1
                acks = stream.finish()
                assert [ack for ack in acks if ack["error"]] == []
                self.lsns += [ack["lsn"] for ack in acks]
                self.acked += range(n - 20, n)
                self.begun.set()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_backup_under_load(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Each row that was acked on disk before the copy began is there once, on both kinds of tables, keys included."""
    settings = {"iceberg__commit_interval_s": 0.05, "object_store__linger_s": 0.02}
    server = make_server(**settings).start()
    with connect(server.location) as client:
        create(client, "a")
        create(client, "p", table_type="primary_key", primary_key="n")
    loads = [_Load(server, table) for table in TABLES]
    try:
        for load in loads:
            assert load.begun.wait(60)
        before = [len(load.acked) for load in loads]
        _back_up(server, tmp_path / "copy")
    finally:
        for load in loads:
            load.stop()
    server.kill()
    given = max(lsn for load in loads for lsn in load.lsns)
    server.data.rename(tmp_path / "lost")
    for _ in range(2):
        # The second time it is the same copy that is restored: LSNs of the first time are not given again.
        _restore(server, tmp_path / "copy")
        with connect(server.location) as client:
            for table, load in zip(TABLES, loads, strict=True):
                # Those that the copy has are known by their keys.
                stream = Stream(client, table, NUMBERS, requested_durability="iceberg_committed", acks="requested")
                for n in load.acked:
                    stream.write(numbers([n]), idempotency_key=f"{table}{n}")
                acks = stream.finish()
                assert [ack for ack in acks if ack["error"]] == []
                known = [n for n, ack in zip(load.acked, acks, strict=True) if ack.get("duplicate")]
                assert known[: before[loads.index(load)]] == load.acked[: before[loads.index(load)]]
                assert sorted(lake.column(server.data, table, "n")) == load.acked
            acks = [ack for table in TABLES for ack in write_all(client, table, [numbers([-1])])]
        assert min(ack["lsn"] for ack in acks) > given
        given = max(ack["lsn"] for ack in acks)
        server.stop()
        shutil.rmtree(server.data)


@pytest.mark.long
def test_backup_of_a_stopped_server_elsewhere(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Started in its own place, a copy refuses and names the way; adopted it holds every row, and new ones."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "a")
        create(client, "p", table_type="primary_key", primary_key="n")
        for table in TABLES:
            write_all(client, table, [numbers([n]) for n in range(3)])
    server.stop()
    assert "up to LSN" in _back_up(server, tmp_path / "copy")
    copy = make_server(data="copy")
    with pytest.raises(ServerFailed, match="--adopt-warehouse"):
        copy.start()
    server.data.rename(tmp_path / "lost")
    copy = make_server("--adopt-warehouse", data="copy").start()
    with connect(copy.location) as client:
        for table in TABLES:
            write_all(client, table, [numbers([3])])
    copy.stop()
    for table in TABLES:
        assert sorted(lake.column(copy.data, table, "n")) == [0, 1, 2, 3]
    # Once started it is an ordinary directory, which can be backed up.
    assert not (copy.data / "backup.json").exists()
    _back_up(copy, tmp_path / "another")


@pytest.mark.long
def test_what_came_after_the_backup_of_a_stopped_server(
    make_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """The copy's log was closed and whole; what the original acked since is lost, and not vouched for (R3)."""
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "a")
        first = max(ack["lsn"] for ack in write_all(client, "a", [numbers([0])]))
    server.stop()
    _back_up(server, tmp_path / "copy")
    server.start()
    with connect(server.location) as client:
        last = max(ack["lsn"] for ack in write_all(client, "a", [numbers([1])]))
    server.kill()
    server.data.rename(tmp_path / "lost")
    _restore(server, tmp_path / "copy")
    with connect(server.location) as client:
        stream = Stream(client, "a", None, resume_after_lsn=last)
        acks = stream.acks(4)
        stream.writer.close()
    assert [ack["sequence"] for ack in acks] == [-1] * 4
    assert first <= max(ack["lsn"] for ack in acks) < last


@pytest.mark.parametrize("restarts", [0, *(pytest.param(restarts, marks=pytest.mark.long) for restarts in (1, 2))])
def test_what_is_sent_again_after_a_restore(
    restarts: int, make_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """Nothing that the lost log holds is left out, however often it was started since the backup (R38).

    The restored copy's own commits are not taken for the lost log's: its epochs are above all of those.
    """
    server = make_server(iceberg__commit_interval_s=0.05).start()
    with connect(server.location) as client:
        create(client, "a")
        through = max(ack["lsn"] for ack in write_all(client, "a", [numbers([0])]))
    server.stop()
    _back_up(server, tmp_path / "copy")
    for restart in range(restarts + 1):
        server.start()
        with connect(server.location) as client:
            acks = write_all(client, "a", [numbers([10 * restart + n]) for n in (1, 2)])
        last = max(ack["lsn"] for ack in acks)
        server.kill()
    server.data.rename(tmp_path / "lost")
    _restore(server, tmp_path / "copy")
    with connect(server.location) as client:
        assert min(ack["lsn"] for ack in write_all(client, "a", [numbers([99])])) > last
    sending = [ARKA, "wal", "salvage", tmp_path / "lost", "--resubmit", server.location, "--keyless", "--above"]
    sent = subprocess.run([*sending, str(through)], capture_output=True, text=True, timeout=120, check=False)
    server.stop()
    written = [0, *(10 * restart + n for restart in range(restarts + 1) for n in (1, 2)), 99]
    assert sorted(lake.column(server.data, "a", "n")) == sorted(written), sent.stdout + sent.stderr


@pytest.mark.parametrize("age_s", [0, 3600, 30 * 86400])
async def test_restarts_after_a_backup(tmp_path: Path, age_s: int) -> None:
    """A restored copy begins above the LSNs that crash restarts and starts on empty disks have taken since (R2)."""
    (tmp_path / BACKUP_FILE).write_text(json.dumps({"taken_us": (int(time.time()) - age_s) * 1_000_000}))

    async def skip(log_uuid: UUID, epoch: int) -> None:
        assert epoch > age_s

    wal_dir = tmp_path / "wal"
    await LogState.create(wal_dir, PosixDisk(), log_uuid=UUID(int=1), epoch=1, lsn_ceiling=100, store_ceiling=100)
    await settle_restored(tmp_path, PosixDisk(), wal_dir, skip)
    state = await LogState.read(wal_dir, PosixDisk())
    assert state is not None
    # In that time: so many starts on an empty disk, and three restarts after a crash in each second.
    assert state.lsn_ceiling > 100 + 15 * 2**32 + age_s * 3 * 2**24
    assert state.lsn_ceiling < 2**53 // 50


async def test_backup_from_the_future(tmp_path: Path) -> None:
    """A clock behind the backup's could let two restores give the same LSNs: the start is refused (R2)."""
    (tmp_path / BACKUP_FILE).write_text(json.dumps({"taken_us": (int(time.time()) + 3600) * 1_000_000}))

    async def skip(log_uuid: UUID, epoch: int) -> None:
        raise AssertionError(f"epoch {epoch} of {log_uuid} is taken")

    wal_dir = tmp_path / "wal"
    await LogState.create(wal_dir, PosixDisk(), log_uuid=UUID(int=1), epoch=1, lsn_ceiling=100, store_ceiling=100)
    with pytest.raises(ConfigurationError, match="Set the clock"):
        await settle_restored(tmp_path, PosixDisk(), wal_dir, skip)
    assert (tmp_path / BACKUP_FILE).exists()


def test_what_cannot_be_backed_up(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """No data directory, a part elsewhere, a destination that exists: each is refused with its reason."""

    def refusal(*arguments: Path) -> str:
        result = CliRunner().invoke(cli.main, ["backup", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        return result.stderr

    (tmp_path / "empty").mkdir()
    assert "there is no log in it" in refusal(tmp_path / "empty", tmp_path / "copy")
    server = make_server("--warehouse", f"file://{tmp_path}/wh", data="apart").start()
    server.stop()
    assert "lie elsewhere: a backup is of" in (said := refusal(server.data, tmp_path / "copy"))
    assert said.count("the warehouse of") == 1
    young = make_server(data="young").start()
    young.stop()
    for name in ("warehouse.json", "warehouse", "catalog.db"):
        part = young.data / name
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    said = refusal(young.data, tmp_path / "copy")
    assert "the catalog and the warehouse of" in said
    assert "stopped before it had made them" in said
    server = make_server().start()
    with connect(server.location) as client:
        # Until a table needs it, the warehouse may not have been made.
        create(client, "a")
    server.stop()
    assert "exists already" in refusal(server.data, tmp_path / "empty")
    assert "lies in the data directory" in refusal(server.data, server.data / "copy")
    assert not (tmp_path / "copy").exists()
