"""What a log's own files name and is not there is damage, for a start, ``verify`` and ``salvage`` alike (R39)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arka.errors import ArkaError, DataCorruption
from arka.storage.disk import PosixDisk
from arka.testing.simdisk import PowerCut
from arka.wal import writer as writer_module
from arka.wal.dump import verify_log
from arka.wal.logstate import LogState
from arka.wal.named import find_headless
from arka.wal.seal import SEAL_NAME, read_seal
from arka.wal.survey import survey_log
from arka.wal.walk import list_segments
from tests.wal.logs import DIRECTORY, LOG, batch_frame, batch_frames, make_disk, open_log, recover_log


def _remove(path: Path) -> None:
    path.unlink()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


WAYS = [_remove, _directory, _fifo, _dangling]


async def _write(directory: Path, *, closed: bool) -> list[tuple[int, Path]]:
    """A log of several segments; returns them."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=directory, segment_bytes=16 * 1024)
    for lsn in range(1, 61):
        await writer.append([batch_frame(lsn)])
    if closed:
        await writer.close()
    found = list_segments(directory, disk)
    assert len(found) > 3
    return found


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("which", [0, 1, -1, None])
@pytest.mark.parametrize("way", WAYS)
async def test_segment_that_is_gone(
    tmp_path: Path, way: Callable[[Path], None], which: int | None, closed: bool
) -> None:
    """The first, a middle, the last or all segments, removed or something else: found by all three, nothing changed."""
    segments = await _write(tmp_path, closed=closed)
    gone = [path for _, path in (segments if which is None else [segments[which]])]
    for path in gone:
        way(path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataCorruption):
        await recover_log(PosixDisk(), directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not verify_log(tmp_path, PosixDisk()).ok
    survey = survey_log(tmp_path, PosixDisk())
    assert survey.damaged
    if closed or which in (0, 1):
        assert survey.missing, "the LSNs are named"


async def test_link_to_a_segment_is_one(tmp_path: Path) -> None:
    """A segment that was moved to another place, with a link to it, is read, and released by its name."""
    directory, elsewhere = tmp_path / "wal", tmp_path / "elsewhere"
    elsewhere.mkdir()
    segments = await _write(directory, closed=False)
    for _, path in segments:
        shutil.move(path, elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    assert verify_log(directory, PosixDisk()).ok
    found = await recover_log(PosixDisk(), directory=directory)
    assert found.lsns == list(range(1, 61))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["log", SEAL_NAME])
async def test_state_or_mark_that_is_gone(tmp_path: Path, way: Callable[[Path], None], name: str) -> None:
    """A log whose state or seal mark is gone is no new log (R1)."""
    disk = PosixDisk()
    state = await LogState.create(tmp_path, disk, log_uuid=LOG, epoch=1, lsn_ceiling=100, store_ceiling=1 << 40)
    await LogState(LOG, 1, 100, 1 << 40, state.generation, started_epoch=1).write(tmp_path, disk)
    await _write(tmp_path, closed=False)
    assert find_headless(tmp_path, disk) is None
    way(tmp_path / name)
    found: DataCorruption | None
    try:
        found = find_headless(tmp_path, disk)
    except DataCorruption as error:
        found = error
    assert found is not None
    assert found.path.endswith(name)


async def test_released_segments_are_not_missed() -> None:
    """Segments are forgotten before they are unlinked: killed at any step, the rest of the log is whole."""
    for step in range(12):
        for seed in range(3):
            disk = make_disk(seed)
            writer = await open_log(disk, segment_bytes=8 * 1024)
            refs = {}
            for lsn in range(1, 41):
                (part,) = (await writer.append([batch_frame(lsn)]))[-1:]
                refs.setdefault(part.segment.number, part.segment)
            oldest = [refs[number] for number in sorted(refs)][:3]
            disk.cut_power_after(step)
            try:
                await writer.retire(oldest)
            except PowerCut:
                disk.crash()
            else:
                disk.kill()
            found = await recover_log(disk)
            assert found.lsns[-1] == 40
            assert found.lsns == list(range(found.lsns[0], 41))


async def test_segment_begun_and_never_used() -> None:
    """A segment that a crash left before its first group is no damage, whatever of it reached the disk."""
    for step in range(16):
        for seed in range(3):
            disk = make_disk(seed)
            writer = await open_log(disk, segment_bytes=8 * 1024)
            await writer.append(batch_frames([1, 2]))
            disk.cut_power_after(step)
            try:
                for lsn in range(3, 40):
                    await writer.append([batch_frame(lsn)])
            except (PowerCut, ArkaError):
                disk.crash()
            else:
                disk.kill()
            first = await recover_log(disk)
            assert first.lsns[:2] == [1, 2]
            disk.crash()
            assert (await recover_log(disk, epoch=10)).lsns == first.lsns


async def test_catches_unlink_before_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that unlinks segments before it forgets them is caught: a crash between the two looks like damage."""
    monkeypatch.setattr(writer_module.WalWriter, "_forget", lambda self, numbers: None)
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=8 * 1024)
    refs = {}
    for lsn in range(1, 41):
        (part,) = (await writer.append([batch_frame(lsn)]))[-1:]
        refs.setdefault(part.segment.number, part.segment)
    await writer.retire([refs[min(refs)]])
    disk.kill()
    with pytest.raises(DataCorruption, match="which sealed names"):
        await recover_log(disk)


async def test_mark_of_an_older_version_names_nothing() -> None:
    """A log whose mark does not name segments yet is read as before, and named from then on."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=8 * 1024)
    await writer.append(batch_frames(range(1, 40)))
    disk.kill()
    mark = read_seal(disk, DIRECTORY)
    assert mark is not None
    assert mark.kept is not None
    old = writer_module.SealMark(LOG, 1, 0, 0, closed=False)
    assert len(old.to_bytes()) == 56
    disk.damage(DIRECTORY / SEAL_NAME, old.to_bytes())
    found = await recover_log(disk)
    assert found.lsns == list(range(1, 40))
    writer = await open_log(disk, epoch=9, first_segment=found.log.next_segment)
    named = read_seal(disk, DIRECTORY)
    assert named is not None
    assert named.kept is not None
    assert named.kept.oldest == list_segments(DIRECTORY, disk)[0][0]
