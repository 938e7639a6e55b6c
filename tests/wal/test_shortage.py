"""Running short of descriptors, memory or room holds a new segment back; only a failed write or fsync poisons (R31)."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import trio
import trio.testing

from arka.storage.disk import PosixDisk
from arka.wal.logstate import LogState, LogStateFile
from arka.wal.seal import SEAL_NAME
from arka.wal.segment import segment_name
from arka.wal.shortage import Shortage
from arka.wal.writer import WalPoisoned

from .logs import DIRECTORY, LOG, batch_frames, make_disk, open_log, recover_log

LACKS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT]


@pytest.mark.parametrize("error", LACKS)
@pytest.mark.parametrize("operation", ["create", "rename"])
async def test_a_new_segment_waits(autojump_clock: trio.testing.MockClock, operation: str, error: int) -> None:
    """Whatever lacks, the group is written when it is there again; nothing is poisoned."""
    disk = make_disk()
    writer = await open_log(disk)
    for _ in range(3):
        disk.fail_next(operation, error)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.append, batch_frames([1, 2]))
        await trio.sleep(0.1)
        assert writer.held_back is not None
        assert writer.held_back.errno == error
    assert writer.held_back is None
    assert not writer.poisoned
    await writer.append(batch_frames([3]))
    await writer.close()
    assert (await recover_log(disk)).lsns == [1, 2, 3]


@pytest.mark.parametrize("after", range(3))
async def test_a_mark_that_cannot_be_opened_waits(autojump_clock: trio.testing.MockClock, after: int) -> None:
    """The mark that names a new segment is opened in its place: without a descriptor nothing was written to it."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=8 * 1024)
    disk.fail_next("open", errno.EMFILE, after=after)
    await writer.append(batch_frames(range(1, 60)))
    await writer.close()
    assert (await recover_log(disk)).lsns == list(range(1, 60))


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE])
async def test_a_segment_that_has_its_name_waits(autojump_clock: trio.testing.MockClock, error: int) -> None:
    """Its directory could not be opened: the same segment goes on, and is none too many."""
    disk = make_disk()
    writer = await open_log(disk)
    disk.fail_next("sync_directory", error)
    await writer.append(batch_frames([1]))
    assert disk.list_names(DIRECTORY) == [SEAL_NAME, segment_name(1)]
    await writer.close()
    assert (await recover_log(disk)).lsns == [1]


async def test_a_group_over_two_segments_waits_between_them(autojump_clock: trio.testing.MockClock) -> None:
    """What the first segment took stays; the rest comes behind it, each frame once."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=8 * 1024)
    await writer.append(batch_frames([1]))
    for _ in range(4):
        disk.fail_next("create", errno.ENOSPC)
    ranges = await writer.append(batch_frames(range(2, 60)))
    assert len(ranges) > 2
    await writer.close()
    assert (await recover_log(disk)).lsns == list(range(1, 60))


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.ENOMEM])
@pytest.mark.parametrize("operation", ["write", "sync", "sync_directory"])
async def test_a_failed_write_or_fsync_of_a_new_segment_poisons(operation: str, error: int) -> None:
    """Nobody knows what is on the disk then, whatever the number says (R6)."""
    disk = make_disk(seed=4)
    writer = await open_log(disk)
    disk.fail_next(operation, error)
    with pytest.raises(WalPoisoned):
        await writer.append(batch_frames([1]))
    assert writer.poisoned


@pytest.mark.parametrize("operation", ["create", "rename", "sync_directory"])
async def test_a_wait_can_be_cancelled(autojump_clock: trio.testing.MockClock, operation: str) -> None:
    """Nothing was written: the frames may come again, or the log is closed and leaves nothing behind."""
    for again in (False, True):
        disk = make_disk()
        writer = await open_log(disk)
        for _ in range(1000):
            disk.fail_next(operation, errno.EMFILE)
        frames = batch_frames([1, 2])
        with trio.move_on_after(1) as scope:
            await writer.append(frames)
        assert scope.cancelled_caught
        disk.clear_faults()
        if again:
            await writer.append(frames)
        await writer.close()
        found = await recover_log(disk)
        assert found.lsns == ([1, 2] if again else [])
        assert found.log.closed


async def test_the_logs_state_waits(tmp_path: Path) -> None:
    """A state that cannot be opened is the old one, and is asked for again."""
    disk = make_disk()
    state = await LogState.create(DIRECTORY, disk, log_uuid=LOG, epoch=1, lsn_ceiling=10, store_ceiling=100)
    file = LogStateFile(DIRECTORY, disk, state)
    disk.fail_next("open", errno.EMFILE)
    with pytest.raises(Shortage):
        await file.raise_to(lsn_ceiling=20)
    assert file.state.lsn_ceiling == 10
    await file.raise_to(lsn_ceiling=20)
    assert (await LogState.read(DIRECTORY, disk)).lsn_ceiling == 20


async def test_a_process_without_descriptors_goes_on(tmp_path: Path) -> None:
    """On a real disk with no descriptor left, appends wait; with one again they are written."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path, segment_bytes=2**20)
    await writer.append(batch_frames([1]))
    await writer.append(batch_frames([2]))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = 6_000
    async with trio.open_nursery() as nursery:
        # The lowest number that is free is the limit: nothing can be opened.
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            nursery.start_soon(writer.append, batch_frames(range(3, 40), rows))
            while writer.held_back is None:
                await trio.sleep(0.01)
            assert writer.held_back.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await writer.close()
    assert (await recover_log(disk, directory=tmp_path)).lsns == list(range(1, 40))
