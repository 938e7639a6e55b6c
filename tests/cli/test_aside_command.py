"""``arka wal aside``: the writes that were set aside come out as they were sent (R32)."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pytest
from click.testing import CliRunner
from trio.testing import MockClock

from arka import cli
from arka.records import Tier
from arka.testing.simnode import SimNode, create_table, write_all
from arka.wal.asidefile import asides_of, find_asides, parse_aside


@pytest.fixture
async def data_dir(tmp_path: Path, autojump_clock: MockClock) -> Path:
    """A data directory as a server leaves it that has set two writes aside."""
    world = SimNode()
    world.catalog.poison |= {3, 7}
    async with world.run() as pipeline:
        await write_all(pipeline, await create_table(pipeline), range(10), Tier.ICEBERG_COMMITTED)
    for key, data in world.disk.checkpoints.objects.items():
        path = tmp_path / "checkpoints" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


async def test_they_are_listed_and_copied_out(data_dir: Path) -> None:
    """Each has its LSN, table, key, reason and rows; the command is the one that its ack names."""
    done = CliRunner().invoke(cli.main, ["wal", "aside", str(data_dir), "--to", str(data_dir / "out")])
    assert done.exit_code == 0, done.output
    assert "2 writes are set aside" in done.output
    assert "key=k3" in done.output
    assert "cannot be written" in done.output
    found = []
    for path in sorted((data_dir / "out").iterdir()):
        batch, notes = pa.ipc.open_stream(pa.OSFile(str(path))).read_next_batch_with_custom_metadata()
        found.append((batch.column("id").to_pylist(), notes[b"arka.key"]))
    assert sorted(found) == [([3], b"k3"), ([7], b"k7")]


async def test_a_damaged_one_is_said(data_dir: Path) -> None:
    """A damaged copy does not hide the others; the exit code says so."""
    first = sorted((data_dir / "checkpoints").glob("*/aside/*/*"))[0]
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    done = CliRunner().invoke(cli.main, ["wal", "aside", str(data_dir)])
    assert done.exit_code == 3
    assert "damaged" in done.output
    assert "key=k7" in done.output


async def test_those_of_another_log_are_told_apart(data_dir: Path) -> None:
    """LSNs belong to a log: what one set aside says nothing of another's writes."""
    (log_uuid,) = {
        parse_aside(str(path), "/".join(path.parts[-4:]), path.read_bytes()).object.header.log_uuid
        for path in find_asides(data_dir)
    }
    found = asides_of(data_dir, log_uuid)
    assert sorted(lsn for _, lsn in found) == sorted(int(path.name) for path in find_asides(data_dir))
    assert asides_of(data_dir, UUID(int=9)) == frozenset()
