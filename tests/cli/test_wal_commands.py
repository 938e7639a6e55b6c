"""``arka wal``: what a person sees of a log, and the exit code that a script sees."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from uuid import UUID

import pytest
import trio
from click.testing import CliRunner

from arka import cli
from arka._core.framing import KIND_CREATE, Frame
from arka.options import WalOptions
from arka.storage.disk import PosixDisk
from arka.wal.logstate import LogState
from arka.wal.writer import WalWriter

LOG = UUID(int=7)


async def write_log(directory: Path) -> None:
    options = WalOptions(segment_bytes=1 << 20)
    disk = PosixDisk()
    await LogState.create(directory, disk, log_uuid=LOG, epoch=3, lsn_ceiling=100, store_ceiling=1 << 40)
    writer = await WalWriter.open(directory, disk, log_uuid=LOG, epoch=3, first_segment=1, options=options)
    for lsn in (1, 2, 3):
        await writer.append([Frame(KIND_CREATE, lsn, table=None, payload=b"x" * 100, accepted_us=lsn)])
    await writer.close()


@pytest.fixture
def data_dir(tmp_path):
    """Make a data directory with a closed log of three frames."""
    (tmp_path / "wal").mkdir()
    trio.run(partial(write_log, tmp_path / "wal"))
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def damage(data_dir: Path) -> None:
    (segment,) = (data_dir / "wal").glob("segment-*.wal")
    data = bytearray(segment.read_bytes())
    data[data.index(b"x" * 100) + 50] ^= 1
    segment.write_bytes(data)


@pytest.mark.parametrize("inner", ["", "wal"])
def test_dump_shows_every_frame(data_dir, inner):
    """Each frame is a line with its LSN, in order; a data directory may be named as well as its log."""
    result = run("wal", "dump", data_dir / inner)
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if " create " in line]
    assert [line.split("lsn=")[1].split()[0] for line in lines] == ["1", "2", "3"]


def test_dump_reads_on_behind_damage(data_dir):
    """A flipped bit is shown where it is, later groups are shown all the same, and the exit code is 3."""
    damage(data_dir)
    result = run("wal", "dump", data_dir)
    assert result.exit_code == 3
    assert " damaged " in result.stdout
    assert "lsn=3" in result.stdout
    only = run("wal", "dump", "--damaged", data_dir)
    assert len(only.stdout.splitlines()) == 1
    assert only.exit_code == 3


def test_verify_accepts_a_closed_log(data_dir):
    """A log that a start would accept: exit code 0, each segment with its state and LSNs."""
    result = run("wal", "verify", data_dir)
    assert result.exit_code == 0
    assert "1..3" in result.stdout
    assert str(LOG) in result.stdout


def test_verify_refuses_damage(data_dir):
    """A log that a start would refuse: exit code 3, with file and offset."""
    damage(data_dir)
    result = run("wal", "verify", data_dir)
    assert result.exit_code == 3
    assert "damaged at byte" in result.stderr


@pytest.mark.parametrize("command", ["dump", "verify"])
def test_directory_without_a_log_is_a_usage_error(tmp_path, command):
    """A wrong directory is no empty log."""
    result = run("wal", command, tmp_path)
    assert result.exit_code == 2
    assert "No log in" in result.stderr


def test_verify_changes_nothing(data_dir):
    """Looking at a log leaves every byte as it is."""
    before = {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}
    run("wal", "verify", data_dir)
    run("wal", "dump", data_dir)
    assert {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()} == before
