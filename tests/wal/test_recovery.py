"""Recovery: torn is dropped, damage is refused, nothing else is lost, and it may be killed at any point."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from arka._core.framing import KIND_LOST, Frame, Group
from arka.errors import ConfigurationError, DataCorruption, Fenced
from arka.storage.disk import PosixDisk
from arka.testing.simdisk import PowerCut, SimDisk
from arka.wal.recovery import recover
from arka.wal.seal import SEAL_NAME, SealMark, read_seal
from arka.wal.segment import HEADER_BYTES, AppendedRange, GroupMark, SegmentHeader, segment_name
from arka.wal.writer import WalPoisoned

from .logs import DIRECTORY, LOG, batch_frame, batch_frames, make_disk, open_log, recover_log

FIRST = DIRECTORY / segment_name(1)


@dataclass
class WrittenLog:
    """A log that was written and whose process was killed: one segment, unsealed."""

    disk: SimDisk
    ranges: list[AppendedRange]
    content: bytes

    @property
    def end(self) -> int:
        return self.ranges[-1].end

    def lsns_whole_below(self, offset: int) -> list[int]:
        """LSNs of the frames that end at or before ``offset``."""
        frames = [frame for part in self.ranges for frame in part.frames]
        return [frame.lsn for frame in frames if frame.offset + frame.frame_bytes <= offset]


async def write_log(groups: list[list[int]], *, segment_bytes: int = 64 * 1024) -> WrittenLog:
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=segment_bytes)
    ranges = [(await writer.append(batch_frames(lsns)))[0] for lsns in groups]
    disk.kill()
    return WrittenLog(disk, ranges, disk.read(FIRST))


async def recover_damaged(content: bytes) -> list[int]:
    """Recover a log whose only segment has ``content``; twice, since the first one changes the log."""
    disk = make_disk()
    disk.make_directory(DIRECTORY)
    disk.create(FIRST, 0)
    disk.damage(FIRST, content)
    found = await recover_log(disk, epoch=2)
    disk.crash()
    again = await recover_log(disk, epoch=3)
    assert again.lsns == found.lsns
    assert again.log.torn is None
    return found.lsns


@pytest.mark.parametrize("cut", ["truncated", "zeroed", "garbled"])
async def test_every_torn_position_of_the_last_group(cut: str) -> None:
    """Wherever the last segment ends, exactly the whole frames before are recovered; never an error (R7)."""
    log = await write_log([[1, 2], [3], [4, 5, 6]])
    for at in range(HEADER_BYTES, log.end + 64):
        if cut == "truncated":
            content = log.content[:at]
        elif cut == "zeroed":
            content = log.content[:at].ljust(len(log.content), b"\0")
        else:
            content = log.content[:at] + b"\xa5" * (log.end + 64 - at)
            content = content.ljust(len(log.content), b"\0")
        expected = log.lsns_whole_below(at)
        # A frame is padded with zeros: it is whole without its padding if that comes back as zeros.
        found = await recover_damaged(content)
        if cut == "zeroed":
            assert found[: len(expected)] == expected
            assert len(found) - len(expected) in (0, 1)
        else:
            assert found == expected, at


@pytest.mark.parametrize("fill", [0x00, 0xA5])
async def test_every_damaged_position_below_the_last_group(fill: int) -> None:
    """A bad or zero spot below what a later group calls fsynced is damage, and is named (R7)."""
    log = await write_log([[1, 2], [3], [4]])
    last = log.ranges[-1]
    for at in range(HEADER_BYTES, last.start, 8):
        content = bytearray(log.content)
        if bytes(content[at : at + 8]) == bytes([fill]) * 8:
            continue
        content[at : at + 8] = bytes([fill]) * 8
        with pytest.raises(DataCorruption) as caught:
            await recover_damaged(bytes(content))
        assert caught.value.path == str(FIRST)
        assert at - log.end < caught.value.offset <= at


async def test_hole_that_swallows_a_whole_group_is_damage() -> None:
    """Zeros from one group's start to the next one's are damage, not the end of the log (R7)."""
    log = await write_log([[1], [2], [3]])
    middle = log.ranges[1]
    content = bytearray(log.content)
    content[middle.start : middle.end] = bytes(middle.end - middle.start)
    with pytest.raises(DataCorruption) as caught:
        await recover_damaged(bytes(content))
    assert caught.value.offset == middle.start


async def test_damage_leaves_the_log_as_it_was() -> None:
    """A refused recovery changes no segment, so that a person can look."""
    log = await write_log([[1], [2], [3]])
    content = bytearray(log.content)
    content[log.ranges[0].start + 200] ^= 4
    log.disk.damage(FIRST, bytes(content))
    with pytest.raises(DataCorruption):
        await recover_log(log.disk)
    assert log.disk.list_names(DIRECTORY) == [SEAL_NAME, segment_name(1)]
    assert log.disk.read(FIRST) == bytes(content)


async def test_every_byte_of_a_sealed_segment_counts() -> None:
    """One changed byte anywhere in a sealed segment, also behind its footer, is refused and named."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=HEADER_BYTES + 3 * 1024)
    (part,) = await writer.append(batch_frames([1, 2]))
    await writer.close()
    content = disk.read(FIRST)
    assert content[-64:] == bytes(64)
    bounds = [
        0,
        HEADER_BYTES,
        *(frame.offset for frame in part.frames),
        part.end,
        part.end + 192,
        len(content),
    ]
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        disk.damage(FIRST, bytes(damaged))
        with pytest.raises((DataCorruption, ConfigurationError)) as caught:
            await recover_log(disk)
        assert isinstance(caught.value, DataCorruption)
        assert caught.value.path == str(FIRST)
        begin = max(bound for bound in bounds if bound <= at)
        end = min(bound for bound in bounds if bound > at)
        assert begin <= caught.value.offset < end, at


async def test_torn_bytes_are_kept_aside() -> None:
    """What is dropped is copied to a file of its own first, and reported with where and why."""
    log = await write_log([[1], [2, 3]])
    start = log.ranges[1].frames[1].offset
    content = bytearray(log.content)
    content[start + 100] ^= 1
    log.disk.damage(FIRST, bytes(content))
    found = await recover_log(log.disk, epoch=2)
    torn = found.log.torn
    assert torn is not None
    assert (torn.segment.number, torn.offset, torn.after_lsn) == (1, start, 2)
    assert found.lsns == [1, 2]
    log.disk.crash()
    kept = log.disk.read(torn.copied_to)
    assert kept == bytes(content[start : start + torn.size])
    assert bytes(content[start + torn.size :]).strip(b"\0") == b""


async def test_tail_is_rewritten_under_the_new_epoch() -> None:
    """Frames of an unsealed tail are handed out where they stay: in a new sealed segment (R6)."""
    log = await write_log([[1, 2], [3]])
    found = await recover_log(log.disk, epoch=5)
    assert {(frame.segment.number, frame.segment.epoch) for frame in found.frames} == {(2, 5)}
    assert found.log.next_segment == 3
    assert not found.log.closed
    assert log.disk.list_names(DIRECTORY) == [SEAL_NAME, segment_name(2)]
    log.disk.crash()
    again = await recover_log(log.disk, epoch=6)
    assert {frame.segment.number for frame in again.frames} == {2}
    assert not again.log.closed


async def test_footer_alone_does_not_make_a_segment_sealed() -> None:
    """A footer that can be read was perhaps never fsynced: the segment is rewritten all the same (R6)."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append(batch_frames([1, 2]))
    # The footer is written, its fsync fails: the page cache shows it, the platter does not have it.
    disk.fail_next("sync")
    with pytest.raises(WalPoisoned):
        await writer.close()
    disk.kill()
    found = await recover_log(disk, epoch=2)
    assert {frame.segment.number for frame in found.frames} == {2}
    disk.crash()
    assert (await recover_log(disk, epoch=3)).lsns == [1, 2]


async def test_closed_log_is_not_rewritten() -> None:
    """After close a restart reads the log and writes nothing, however often."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append(batch_frames([1, 2]))
    await writer.close()
    before = disk.steps
    for _ in range(2):
        found = await recover_log(disk, epoch=2)
        assert found.log.closed
        assert found.log.segments[0].ref.number == 1
    assert disk.steps == before


async def test_segments_follow_each_other_by_lsn() -> None:
    """A sealed segment that is missing in the middle, or after the end of a closed log, is found."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=8 * 1024)
    await writer.append(batch_frames(range(1, 40)))
    await writer.close()
    names = [name for name in disk.list_names(DIRECTORY) if name.startswith("segment")]
    assert len(names) > 3
    for missing, where in ((names[1], names[2]), (names[-1], SEAL_NAME)):
        content = disk.read(DIRECTORY / missing)
        disk.remove(DIRECTORY / missing)
        with pytest.raises(DataCorruption, match=where):
            await recover_log(disk)
        disk.create(DIRECTORY / missing, 0)
        disk.damage(DIRECTORY / missing, content)
    await recover_log(disk)


async def test_stale_bytes_are_not_accepted() -> None:
    """A group of another log, epoch or segment at the log's end is torn bytes, not frames (R8)."""
    log = await write_log([[1], [2]])
    start, end = log.ranges[1].start, log.ranges[1].end
    for log_uuid, epoch, number in ((UUID(int=1), 1, 1), (LOG, 2, 1), (LOG, 1, 2)):
        disk = make_disk()
        writer = await open_log(disk, log_uuid=log_uuid, epoch=epoch, first_segment=number)
        parts = [(await writer.append(batch_frames([lsn])))[0] for lsn in (1, 2)]
        assert (parts[1].start, parts[1].end) == (start, end)
        stale = disk.read(parts[1].segment.path)[start:end]
        assert await recover_damaged(log.content[:start] + stale + log.content[end:]) == [1]


async def test_whole_segment_of_another_place_is_refused() -> None:
    """A segment file of another log or under another number is refused by its header (R1, R8)."""
    for log_uuid, number in ((UUID(int=1), 1), (LOG, 2)):
        disk = make_disk()
        writer = await open_log(disk, log_uuid=log_uuid, first_segment=number)
        (part,) = await writer.append(batch_frames([1]))
        with pytest.raises(DataCorruption):
            await recover_damaged(disk.read(part.segment.path))


def _insert(log: WrittenLog, frames: list[Frame]) -> bytes:
    """The log's bytes with one more group at its end, sealed as if the writer had written it."""
    header = SegmentHeader.from_bytes("", memoryview(log.content))
    size = sum(frame.frame_bytes for frame in frames)
    mark = GroupMark(header.nonce, log.end, log.end, 192 + size, len(frames))
    group = Group([mark.to_frame(0), *frames], log.end, header.seed).to_bytes()
    return log.content[: log.end] + group + log.content[log.end + len(group) :]


async def test_lsns_must_rise() -> None:
    """Intact frames whose LSNs do not rise contradict the log: damage, not a tear (R8)."""
    log = await write_log([[1], [2]])
    assert await recover_damaged(_insert(log, [batch_frame(3, key=b"")])) == [1, 2, 3]
    for lsn in (1, 2):
        with pytest.raises(DataCorruption, match="LSN"):
            await recover_damaged(_insert(log, [batch_frame(lsn)]))


async def test_batch_without_its_table_is_refused() -> None:
    """A segment that lacks a TABLE frame that its batches need contradicts itself (R24)."""
    log = await write_log([[1]])
    unknown = Frame(1, 2, schema_id=7, payload=b"", accepted_us=0)
    with pytest.raises(DataCorruption, match="TABLE"):
        await recover_damaged(_insert(log, [unknown]))


async def test_unreadable_lost_range_is_refused() -> None:
    """A LOST frame that cannot be read is not passed over (R3)."""
    log = await write_log([[1]])
    with pytest.raises(DataCorruption, match="lost range"):
        await recover_damaged(_insert(log, [Frame(KIND_LOST, 2, payload=b"?", accepted_us=0)]))


async def test_payload_cannot_pass_for_a_group() -> None:
    """A client that puts a forged GROUP frame into a batch cannot turn a torn tail into damage."""
    log = await write_log([[1]])
    header = SegmentHeader.from_bytes("", memoryview(log.content))
    place = log.end + 192 + 128 + 1024
    forged = GroupMark(bytes(16), place, place, 192, 0)
    fake = Group([forged.to_frame(0)], place, header.seed).to_bytes()
    payload = bytes(1024) + fake + bytes(1024)
    content = bytearray(_insert(log, [Frame(4, 2, payload=payload, accepted_us=0)]))
    assert bytes(content[place : place + 192]) == fake
    content[log.end + 192 + 200] ^= 1
    assert await recover_damaged(bytes(content)) == [1]


async def test_old_epoch_is_fenced() -> None:
    """A recovery under an epoch below the log's changes nothing."""
    disk = make_disk()
    writer = await open_log(disk, epoch=7)
    await writer.append(batch_frames([1]))
    disk.kill()
    before = disk.steps
    with pytest.raises(Fenced, match="epoch 7"):
        await recover_log(disk, epoch=6)
    assert disk.steps == before
    assert (await recover_log(disk, epoch=7)).lsns == [1]


async def test_leftovers_are_removed() -> None:
    """Spares and unfinished files go; files of others stay."""
    disk = make_disk()
    disk.make_directory(DIRECTORY)
    for name in ("spare-1.new", f"{segment_name(4)}.new", "sealed.new", "notes.txt"):
        disk.create(DIRECTORY / name, 100)
    found = await recover_log(disk)
    assert found.log.next_segment == 1
    assert disk.list_names(DIRECTORY) == ["notes.txt"]


async def test_segment_without_frames_is_dropped() -> None:
    """A segment whose process died before its first group holds nothing; its number is not used again."""
    log = await write_log([[1]])
    log.disk.damage(FIRST, log.content[:HEADER_BYTES])
    found = await recover_log(log.disk)
    assert (found.lsns, found.log.next_segment) == ([], 2)
    assert log.disk.list_names(DIRECTORY) == [SEAL_NAME]


@pytest.mark.parametrize("size", [0, 1, 4095])
async def test_cut_header_is_damage(size: int) -> None:
    """A segment gets its name after its header is durable: under that name a cut header is damage."""
    log = await write_log([[1]])
    with pytest.raises(DataCorruption):
        await recover_damaged(log.content[:size])


async def test_damaged_seal_is_refused() -> None:
    """A seal mark that is damaged is not taken for a missing one."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append(batch_frames([1]))
    await writer.close()
    content = disk.read(DIRECTORY / SEAL_NAME)
    size, copy = 80, 4096
    assert len(content) == copy + size
    for at in range(size):
        damaged = bytearray(content)
        damaged[at] ^= 0x21
        damaged[copy + at] ^= 0x21
        disk.damage(DIRECTORY / SEAL_NAME, bytes(damaged))
        with pytest.raises(DataCorruption):
            await recover_log(disk)
        for whole in (at, copy + at):
            one = bytearray(content)
            one[whole] ^= 0x21
            disk.damage(DIRECTORY / SEAL_NAME, bytes(one))
            assert read_seal(disk, DIRECTORY) == SealMark.from_bytes("", memoryview(content))


@pytest.mark.parametrize("torn", [False, True])
async def test_recovery_killed_at_every_step(torn: bool) -> None:
    """A recovery that loses power before any of its steps can be run again, and finds the same."""
    for step in range(40):
        for seed in range(4):
            disk = make_disk(seed)
            writer = await open_log(disk, segment_bytes=8 * 1024)
            await writer.append(batch_frames(range(1, 20)))
            (part,) = await writer.append(batch_frames([20]))
            disk.kill()
            expected = list(range(1, 21))
            if torn:
                content = bytearray(disk.read(part.segment.path))
                content[part.start + 40] ^= 1
                disk.damage(part.segment.path, bytes(content))
                expected.pop()
            disk.cut_power_after(step)
            try:
                await recover_log(disk, epoch=2)
            except PowerCut:
                pass
            else:
                assert step > 8
                return
            disk.crash()
            assert (await recover_log(disk, epoch=2)).lsns == expected, (step, seed)
    raise AssertionError("the recovery never ended")


async def test_callback_that_raises_ends_recovery_safely() -> None:
    """An exception from a callback ends the recovery; the next one finds everything."""
    log = await write_log([[1], [2], [3]])

    def fail(frame: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        await recover(
            DIRECTORY,
            log.disk,
            log_uuid=LOG,
            new_epoch=2,
            on_frame=fail,
            on_progress=lambda done, total: None,
        )
    assert (await recover_log(log.disk, epoch=3)).lsns == [1, 2, 3]


async def test_large_tail_on_a_real_disk(tmp_path: Path) -> None:
    """A tail of several ranges is rewritten with all of its frames, large and small."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path, segment_bytes=2**25)
    for lsn in range(1, 13):
        await writer.append([batch_frame(2 * lsn - 1, rows=60_000), batch_frame(2 * lsn)])
    found = await recover_log(disk, directory=tmp_path)
    assert found.lsns == list(range(1, 25))
    assert len(found.log.segments) == 1
    assert len(found.log.segments[0].ranges) > 1
    again = await recover_log(disk, directory=tmp_path)
    assert again.lsns == found.lsns
    await writer.close()
