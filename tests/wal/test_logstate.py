"""The log state: one of its two slots is always whole, and nothing in it ever falls (R1, R2)."""

from __future__ import annotations

import contextlib
import errno
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from arka.errors import ConfigurationError, DataCorruption, InternalError
from arka.lineage import MAX_STARTS, NO_STARTS, Start
from arka.storage.disk import PosixDisk
from arka.testing.simdisk import PowerCut
from arka.wal.logstate import STATE_NAME, LogState, LogStateFile

from .logs import DIRECTORY, LOG, make_disk


async def create(disk, ceiling: int = 100) -> LogState:
    return await LogState.create(DIRECTORY, disk, log_uuid=LOG, epoch=1, lsn_ceiling=ceiling, store_ceiling=1000)


async def test_round_trip_on_a_real_disk(tmp_path: Path) -> None:
    """What was created and written is read back."""
    disk = PosixDisk()
    directory = tmp_path / "log"
    assert await LogState.read(directory, disk) is None
    state = await LogState.create(directory, disk, log_uuid=LOG, epoch=1, lsn_ceiling=100, store_ceiling=1000)
    assert await LogState.read(directory, disk) == state
    written = await replace(state, epoch=2, lsn_ceiling=200).write(directory, disk)
    assert (written.epoch, written.lsn_ceiling, written.generation) == (2, 200, 2)
    assert await LogState.read(directory, disk) == written


async def test_starts_are_kept() -> None:
    """As many starts as a log remembers fit, with the largest numbers, and those of an older version are none (R15)."""
    disk = make_disk()
    file = LogStateFile(DIRECTORY, disk, await create(disk))
    starts = [Start(epoch, 2**63 - epoch, 2**53) for epoch in range(1, MAX_STARTS + 3)]
    for start in starts:
        await file.raise_to(epoch=start.epoch, start=start)
    found = await LogState.read(DIRECTORY, disk)
    assert found == file.state
    assert found is not None
    assert found.lineage.starts == tuple(starts[-MAX_STARTS:])
    await replace(found, lineage=NO_STARTS).write(DIRECTORY, disk)
    again = await LogState.read(DIRECTORY, disk)
    assert again is not None
    assert again.lineage == NO_STARTS


async def test_creating_twice_is_refused() -> None:
    """A log is made once: its UUID is never replaced (R1)."""
    disk = make_disk()
    await create(disk)
    with pytest.raises(ConfigurationError, match="already"):
        await create(disk)


@pytest.mark.parametrize(
    ("change", "why"),
    [({"epoch": 0}, "epoch"), ({"lsn_ceiling": 99}, "fall"), ({"log_uuid": UUID(int=1)}, "not")],
)
async def test_nothing_falls(change: dict[str, object], why: str) -> None:
    """Epoch and ceiling never fall, and the log stays the same, whoever asks."""
    disk = make_disk()
    state = await create(disk)
    with pytest.raises(InternalError, match=why):
        await replace(state, **change).write(DIRECTORY, disk)
    assert await LogState.read(DIRECTORY, disk) == state


@pytest.mark.parametrize("ceiling", [0, 2**53 + 1])
async def test_impossible_ceiling_is_refused(ceiling: int) -> None:
    """A ceiling is at least 1 and at most 2**53."""
    with pytest.raises(InternalError, match=r"2\*\*53"):
        await create(make_disk(), ceiling)


async def test_writing_what_was_never_created_is_refused() -> None:
    """Only ``create`` makes a log."""
    with pytest.raises(InternalError, match="create"):
        await LogState(LOG, 1, 100, 1000).write(DIRECTORY, make_disk())


async def test_damage_to_one_slot_costs_nothing() -> None:
    """With any one byte of either slot changed, the newest state is still read (R2)."""
    disk = make_disk()
    state = await (await create(disk)).write(DIRECTORY, disk)
    path = DIRECTORY / STATE_NAME
    content = disk.read(path)
    for at in (*range(80), 4095, *range(4096, 4096 + 80), 8191):
        damaged = bytearray(content)
        damaged[at] ^= 1
        disk.damage(path, bytes(damaged))
        assert await LogState.read(DIRECTORY, disk) == state
        written = await replace(state, lsn_ceiling=101).write(DIRECTORY, disk)
        assert await LogState.read(DIRECTORY, disk) == written


async def test_damage_to_both_slots_is_refused() -> None:
    """Without an intact slot nothing is guessed: the file is named."""
    disk = make_disk()
    await create(disk)
    path = DIRECTORY / STATE_NAME
    for damaged in (bytes(8192), b"", b"\xff" * 8192):
        disk.damage(path, damaged)
        with pytest.raises(DataCorruption, match=str(path)):
            await LogState.read(DIRECTORY, disk)


@pytest.mark.parametrize("seed", range(30))
async def test_power_cut_at_every_step(seed: int) -> None:
    """Whenever the power goes, the old state or the new one is read; what ``write`` returned is kept."""
    for step in range(5):
        disk = make_disk(seed)
        state = await create(disk)
        disk.cut_power_after(step)
        returned = None
        with contextlib.suppress(PowerCut):
            returned = await replace(state, lsn_ceiling=200).write(DIRECTORY, disk)
        disk.crash()
        found = await LogState.read(DIRECTORY, disk)
        assert found is not None
        assert found.lsn_ceiling in ((200,) if returned else (100, 200))


@pytest.mark.parametrize("seed", range(10))
async def test_power_cut_while_creating(seed: int) -> None:
    """A log is there whole or not at all."""
    for step in range(6):
        disk = make_disk(seed)
        disk.make_directory(DIRECTORY)
        disk.cut_power_after(step)
        returned = None
        with contextlib.suppress(PowerCut):
            returned = await create(disk)
        disk.crash()
        found = await LogState.read(DIRECTORY, disk)
        assert found is not None or returned is None
        assert found is None or found.lsn_ceiling == 100


async def test_failed_write_is_reported() -> None:
    """A ceiling whose fsync failed must not be used: the caller hears of it."""
    disk = make_disk()
    state = await create(disk)
    disk.fail_next("sync", errno.EIO)
    with pytest.raises(OSError, match=r".") as caught:
        await replace(state, lsn_ceiling=200).write(DIRECTORY, disk)
    assert caught.value.errno == errno.EIO
