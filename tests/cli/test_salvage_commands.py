"""``arka wal salvage``: what it copies, sends and sets aside, and the exit code that a script sees."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pytest
import trio
from click.testing import CliRunner

from arka import cli
from arka._core.framing import KIND_BATCH, Frame
from arka.options import WalOptions
from arka.records import TableInfo, TableName, TableType
from arka.storage.datadir import lock_data_dir
from arka.storage.disk import PosixDisk
from arka.testing.segmentfile import frame_buffer
from arka.wal.logstate import LogState
from arka.wal.salvage import REPORT_NAME
from arka.wal.writer import WalWriter

LOG = UUID(int=7)
SCHEMA = pa.schema([pa.field("n", pa.int64())])
TABLE = TableInfo(
    uuid=UUID(int=0xABCDEF12 << 96),
    name=TableName("default", "numbers"),
    schema=SCHEMA,
    schema_id=0,
    table_type=TableType.APPEND_ONLY,
    key_columns=(),
    spec_id=0,
    partition=(),
    location="file:///warehouse/numbers-00000000",
    properties={},
)


async def write_log(directory: Path) -> None:
    disk = PosixDisk()
    await LogState.create(directory, disk, log_uuid=LOG, epoch=3, lsn_ceiling=100, store_ceiling=1 << 40)
    options = WalOptions(segment_bytes=1 << 20)
    writer = await WalWriter.open(directory, disk, log_uuid=LOG, epoch=3, first_segment=1, options=options)
    for lsn in (1, 2, 3):
        batch = pa.record_batch([pa.array([lsn] * 100, pa.int64())], schema=SCHEMA)
        key = b"key" if lsn == 3 else b""
        payload = frame_buffer(batch)
        await writer.append([Frame(KIND_BATCH, lsn, table=TABLE, rows=100, payload=payload, key=key, accepted_us=lsn)])
    await writer.close()


@pytest.fixture
def data_dir(tmp_path):
    """Make a data directory with a closed log of three writes."""
    (tmp_path / "data" / "wal").mkdir(parents=True)
    trio.run(partial(write_log, tmp_path / "data" / "wal"))
    return tmp_path / "data"


def run(*arguments: object, **more: object):
    return CliRunner().invoke(cli.main, ["wal", "salvage", *map(str, arguments)], **more)


def damage(data_dir: Path) -> None:
    (segment,) = (data_dir / "wal").glob("segment-*.wal")
    data = bytearray(segment.read_bytes())
    data[data.index((2).to_bytes(8, "little") * 100) + 50] ^= 1
    segment.write_bytes(data)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_copy_of_a_whole_log(data_dir, tmp_path):
    """Everything comes out, exit code 0, and the log is as it was."""
    before = contents(data_dir)
    result = run(data_dir, "--to", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "intact LSNs 1..3" in result.stdout
    assert "default.numbers" in result.stdout
    assert json.loads((tmp_path / "out" / REPORT_NAME).read_text())["complete"]
    with pa.OSFile(str(tmp_path / "out" / "default.numbers-abcdef12.arrows")) as file:
        assert pa.ipc.open_stream(file).read_all()["n"].to_pylist() == [1] * 100 + [2] * 100 + [3] * 100
    assert contents(data_dir) == before


def test_copy_of_a_damaged_log(data_dir, tmp_path):
    """What is missing is said with LSNs, file and offset, on the screen and in the report; exit code 3."""
    damage(data_dir)
    before = contents(data_dir)
    result = run(data_dir, "--to", tmp_path / "out")
    assert result.exit_code == 3
    assert "missing: LSNs 2..2" in result.stderr
    assert "damaged at byte" in result.stderr
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert [(gap["first"], gap["last"]) for gap in report["missing"]] == [(2, 2)]
    (place,) = report["damaged"]
    assert place["file"].startswith("segment-")
    assert place.keys() == {"file", "offset", "expected", "found"}
    assert contents(data_dir) == before


def test_narrow_terminal(data_dir, tmp_path, monkeypatch):
    """Names and LSNs are printed whole, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", "20")
    result = run(data_dir, "--to", tmp_path / "a-folder-with-a-long-name")
    for word in ("default.numbers-abcdef12.arrows", "default.numbers ", "deletes", "1..3"):
        assert word in result.stdout
    result = CliRunner().invoke(cli.main, ["wal", "verify", str(data_dir)])
    for word in ("segment-0000000000000001.wal", "frames", "1..3"):
        assert word in result.stdout


@pytest.mark.parametrize("gone", ["log"])
def test_exit_code_where_no_write_is_missing(data_dir, tmp_path, gone):
    """A copy of everything ends with 0, though a start refuses the log; a look at the log says the latter."""
    (data_dir / "wal" / gone).unlink()
    result = run(data_dir, "--to", tmp_path / "out")
    assert (result.exit_code, json.loads((tmp_path / "out" / REPORT_NAME).read_text())["complete"]) == (0, True)
    assert "damaged" in result.stderr
    assert run(data_dir).exit_code == 3


def test_without_an_option_it_only_looks(data_dir):
    """It says what a copy would hold, and writes nothing anywhere."""
    before = contents(data_dir.parent)
    assert run(data_dir).exit_code == 0
    assert contents(data_dir.parent) == before
    damage(data_dir)
    before = contents(data_dir.parent)
    assert run(data_dir).exit_code == 3
    assert contents(data_dir.parent) == before


@pytest.mark.parametrize("inner", ["", "wal"])
def test_discard_sets_the_log_aside(data_dir, inner):
    """The log is renamed as a whole, its LSNs are named, and what was set aside can be salvaged still."""
    before = sorted(contents(data_dir / "wal").values())
    result = run(data_dir / inner, "--discard", "--yes")
    assert result.exit_code == 0, result.output
    assert "1..3" in result.stdout
    assert not (data_dir / "wal").exists()
    (aside,) = data_dir.glob("wal.discarded-*")
    assert sorted(contents(aside).values()) == before
    assert str(aside) in result.stdout
    assert "intact LSNs 1..3" in run(aside).stdout


def test_discard_asks_first(data_dir):
    """Without a yes nothing happens."""
    result = run(data_dir, "--discard", input="n\n")
    assert result.exit_code == 1
    assert (data_dir / "wal").is_dir()
    assert run(data_dir, "--discard", input="y\n").exit_code == 0
    assert not (data_dir / "wal").exists()


def test_discard_needs_the_data_directory_for_itself(data_dir):
    """While a server holds the data directory its log stays where it is."""
    with lock_data_dir(data_dir):
        result = run(data_dir, "--discard", "--yes")
    assert result.exit_code == 2
    assert "held by the server" in result.stderr
    assert (data_dir / "wal").is_dir()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--discard", "--to", "out"], "--discard goes with neither"),
        (["--discard", "--resubmit", "grpc://127.0.0.1:1"], "--discard goes with neither"),
        (["--above", "5"], "for --resubmit"),
        (["--keyless"], "for --resubmit"),
        (["--yes"], "for --discard"),
        (["--resubmit", "grpc://127.0.0.1:1", "--durability", "paper"], "Unknown durability"),
    ],
)
def test_options_that_contradict_each_other(data_dir, options, why):
    """What cannot be meant is refused with exit code 2 before anything is done."""
    before = contents(data_dir.parent)
    result = run(data_dir, *options)
    assert result.exit_code == 2
    assert why in result.stderr
    assert contents(data_dir.parent) == before


def test_folder_that_is_in_use_is_not_written_to(data_dir, tmp_path):
    """A copy needs a folder of its own."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    result = run(data_dir, "--to", tmp_path / "out")
    assert result.exit_code == 2
    assert "not empty" in result.stderr


def test_set_aside_log_cannot_be_discarded_again(data_dir):
    """Only a data directory's own log is set aside."""
    assert run(data_dir, "--discard", "--yes").exit_code == 0
    (aside,) = data_dir.glob("wal.discarded-*")
    result = run(aside, "--discard", "--yes")
    assert result.exit_code == 2
    assert aside.is_dir()


def test_server_that_is_away(data_dir):
    """A server that cannot be asked is one line and exit code 1; nothing was sent."""
    result = run(data_dir, "--resubmit", "grpc://127.0.0.1:9")
    assert result.exit_code == 1
    assert "Cannot ask grpc://127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.output


def test_verify_covers_state_and_seal(data_dir):
    """Damage to one copy of the log's state is a note, to both, or to both of the seal mark, a reason to refuse."""
    state, seal = data_dir / "wal" / "log", data_dir / "wal" / "sealed"

    def look(command: str):
        return CliRunner().invoke(cli.main, ["wal", command, str(data_dir)])

    assert "LSNs below 100" in look("verify").stdout
    whole = state.read_bytes()
    state.write_bytes(bytes(4096) + whole[4096:])
    result = look("verify")
    assert result.exit_code == 0
    assert "log: damaged at byte 0" in result.stderr
    state.write_bytes(bytes(8192))
    assert look("verify").exit_code == look("dump").exit_code == 3
    assert "log: damaged at byte 4096" in look("verify").stderr
    state.write_bytes(whole)
    marks = seal.read_bytes()
    seal.write_bytes(b"\0" + marks[1:])
    assert look("verify").exit_code == look("dump").exit_code == 0
    seal.write_bytes(b"\0" + marks[1:4096] + b"\0" + marks[4097:])
    assert look("verify").exit_code == look("dump").exit_code == 3
    assert "sealed: damaged at byte 0" in look("verify").stderr
    assert "seal" in look("dump").stdout
