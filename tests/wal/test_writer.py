"""The writer: what it writes can be read by every reader, and what fails poisons it."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pytest
import trio
import trio.testing

from arka._core.framing import (
    KIND_BATCH,
    KIND_CREATE,
    KIND_DROP,
    KIND_GROUP,
    KIND_LOST,
    KIND_TABLE,
    Frame,
    crc_seed,
    verify_frame,
)
from arka.errors import Closed, ConfigurationError, DataCorruption, Fenced, InternalError
from arka.records import LsnRange
from arka.storage.disk import PosixDisk
from arka.storage.ports import SegmentSlice
from arka.testing.simdisk import PowerCut
from arka.wal.seal import SEAL_NAME
from arka.wal.segment import encode_lost, read_slice, segment_name
from arka.wal.writer import WalPoisoned

from .logs import (
    DIRECTORY,
    LOG,
    SCHEMA,
    TABLE,
    batch_frame,
    batch_frames,
    make_batch,
    make_disk,
    make_table,
    open_log,
    recover_log,
    slice_of,
)


async def test_round_trip_on_a_real_disk(tmp_path: Path) -> None:
    """Batches small and large come back from the file as they were, by offset and by recovery."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path, segment_bytes=2**20)
    sizes = {1: 1, 2: 100, 3: 0, 4: 5_000, 5: 1, 6: 60_000, 7: 3}
    frames = [batch_frame(lsn, rows) for lsn, rows in sizes.items()]
    ranges = await writer.append(frames)
    await writer.close()
    found = {}
    for part in ranges:
        for header, message in read_slice(slice_of([part]), LOG):
            assert message.address % 64 == 0
            found[header.lsn] = pa.ipc.read_record_batch(pa.BufferReader(message), SCHEMA)
    assert list(found) == list(sizes)
    for lsn, rows in sizes.items():
        assert found[lsn].equals(make_batch(lsn, rows))
    recovered = await recover_log(disk, directory=tmp_path)
    assert recovered.lsns == list(sizes)
    assert recovered.log.closed


async def test_body_is_aligned_in_the_file(tmp_path: Path) -> None:
    """A batch's body begins at a multiple of 64 in the file, so that a mapped batch is aligned."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path)
    frames = [batch_frame(lsn, rows=lsn % 7, key=b"k" * (lsn % 70)) for lsn in range(1, 150)]
    for part in await writer.append(frames):
        for _, message in read_slice(slice_of([part]), LOG):
            batch = pa.ipc.read_record_batch(pa.BufferReader(message), SCHEMA)
            for buffer in batch.column(0).buffers():
                assert buffer is None or buffer.address % 64 == 0
    await writer.close()


async def test_every_kind_of_frame_is_recovered() -> None:
    """Batches, creates, drops and lost ranges come back in order, with payload and table."""
    disk = make_disk()
    writer = await open_log(disk)
    frames = [
        Frame(KIND_CREATE, 5, payload=b"create", accepted_us=7),
        batch_frame(6),
        Frame(KIND_LOST, 8, payload=encode_lost(LsnRange(6, 7)), accepted_us=8),
        Frame(KIND_DROP, 9, table=TABLE, payload=b"drop", accepted_us=9),
    ]
    await writer.append(frames)
    await writer.close()
    found = await recover_log(disk)
    kinds = [frame.header.kind for frame in found.frames]
    assert kinds == [KIND_CREATE, KIND_TABLE, KIND_BATCH, KIND_LOST, KIND_DROP]
    assert found.frames[0].payload() == b"create"
    assert found.frames[0].header.accepted_us == 7
    assert found.frames[1].payload() == TABLE.to_bytes()
    assert found.frames[4].payload() == b"drop"
    assert found.frames[4].header.table_uuid == TABLE.uuid.bytes
    assert found.log.lost == (LsnRange(6, 7),)
    assert found.log.last_lsn == 9


async def test_range_says_where_the_frames_are() -> None:
    """A range begins with a GROUP frame, ends behind its last frame, and names its tables."""
    disk = make_disk()
    writer = await open_log(disk)
    other = make_table(2)
    first = await writer.append([batch_frame(3), batch_frame(4, table=other), batch_frame(5)])
    second = await writer.append([batch_frame(9, table=other)])
    (one,), (two,) = first, second
    assert (one.first_lsn, one.last_lsn, two.first_lsn, two.last_lsn) == (3, 5, 9, 9)
    assert one.end == two.start
    assert one.tables == (TABLE, other)
    assert two.tables == (other,)
    assert one.segment == (DIRECTORY / segment_name(1), 1, 1)
    data = disk.read(one.segment.path)
    seed = crc_seed(LOG, one.segment.epoch, one.segment.number)
    for part in (one, two):
        assert verify_frame(data, part.start, seed).kind == KIND_GROUP
        assert part.frames[-1].offset + part.frames[-1].frame_bytes == part.end
        for frame in part.frames:
            assert verify_frame(data, frame.offset, seed).lsn == frame.lsn
            assert frame.payload is None
    assert writer.last_lsn == 9


async def test_each_segment_carries_its_tables() -> None:
    """Each segment holds a TABLE frame before the first batch of each table and schema in it (R24)."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=12 * 1024)
    newer = make_table(1, schema_id=1)
    segments: dict[int, int] = {}
    for lsn in range(1, 60):
        for part in await writer.append([batch_frame(lsn, table=(TABLE, newer)[lsn % 2])]):
            segments[part.segment.number] = segments.get(part.segment.number, 0) + 1
    await writer.close()
    assert len(segments) > 3
    known: set[tuple[int, bytes, int]] = set()
    tables = 0
    for frame in (await recover_log(disk)).frames:
        key = (frame.segment.number, frame.header.table_uuid, frame.header.schema_id)
        if frame.header.kind == KIND_TABLE:
            assert key not in known
            known.add(key)
            tables += 1
        else:
            assert key in known
    assert tables == 2 * len(segments)


async def test_group_that_spans_segments() -> None:
    """A group that does not fit is spread over segments in order; a huge frame gets a huge segment."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=16 * 1024)
    frames = [*batch_frames(range(1, 40)), batch_frame(40, rows=3_000), *batch_frames(range(41, 80))]
    ranges = await writer.append(frames)
    assert len({part.segment.number for part in ranges}) == len(ranges) > 3
    assert [frame.lsn for part in ranges for frame in part.frames] == list(range(1, 80))
    assert len(disk.read(next(p for p in ranges if p.first_lsn == 40 or p.last_lsn == 40).segment.path)) > 16 * 1024
    await writer.append([batch_frame(80)])
    await writer.close()
    assert (await recover_log(disk)).lsns == list(range(1, 81))


async def test_sealed_segment_keeps_its_length(tmp_path: Path) -> None:
    """A segment is never shortened, since somebody may have mapped it (R9)."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path, segment_bytes=2**20)
    (part,) = await writer.append([batch_frame(1)])
    await writer.close()
    assert part.segment.path.stat().st_size == 2**20
    assert part.segment.path.stat().st_blocks * 512 < 2**20


async def test_commits_without_a_thread_of_the_logs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none can be had (no descriptor is left, say) a thread of Python's commits: nothing was written yet."""

    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path)
    await writer.append([batch_frame(1)])
    with monkeypatch.context() as patch:
        patch.setattr("arka.storage.disk.LogThread", refuse)
        await writer.append([batch_frame(2)])
    assert not writer.poisoned
    await writer.append([batch_frame(3)])
    await writer.close()
    assert (await recover_log(disk, directory=tmp_path)).lsns == [1, 2, 3]


async def test_spare_is_asked_for_again_when_there_was_no_room(autojump_clock: trio.testing.MockClock) -> None:
    """A spare that could not be allocated is tried again by the appends that follow, not by the next roll alone."""
    disk = make_disk()
    writer = await open_log(disk)
    async with trio.open_nursery() as nursery:
        disk.fail_next("create", errno.ENOSPC)
        nursery.start_soon(writer.keep_spare)
        await trio.sleep(1)
        await writer.append([batch_frame(1)])
        await trio.sleep(1)
        disk.remove(DIRECTORY / "spare-2.new")
        writer._spare = None
        disk.fail_next("create", errno.ENOSPC)
        for lsn in (2, 3):
            await writer.append([batch_frame(lsn)])
            await trio.sleep(1)
        assert [name for name in disk.list_names(DIRECTORY) if name.startswith("spare")] == ["spare-4.new"]
        nursery.cancel_scope.cancel()


async def test_spare_is_used_for_the_next_segment() -> None:
    """A preallocated segment becomes the next one, and one that is left over is removed."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=8 * 1024)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.keep_spare)
        await trio.testing.wait_all_tasks_blocked()
        assert disk.list_names(DIRECTORY) == [SEAL_NAME, "spare-1.new"]
        await writer.append([batch_frame(1)])
        await trio.testing.wait_all_tasks_blocked()
        assert disk.list_names(DIRECTORY) == [SEAL_NAME, segment_name(1), "spare-2.new"]
        disk.fail_next("create", errno.ENOSPC)
        for lsn in range(2, 40):
            await writer.append([batch_frame(lsn)])
        nursery.cancel_scope.cancel()
    await writer.close()
    assert not [name for name in disk.list_names(DIRECTORY) if name.endswith(".new")]
    assert (await recover_log(disk)).lsns == list(range(1, 40))


async def test_empty_group_and_empty_log() -> None:
    """Nothing to append writes nothing; a log that was opened and closed recovers as empty and closed."""
    disk = make_disk()
    writer = await open_log(disk)
    assert await writer.append([]) == []
    await writer.close()
    await writer.close()
    found = await recover_log(disk)
    assert (found.lsns, found.log.last_lsn, found.log.next_segment, found.log.closed) == ([], 0, 1, True)


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([batch_frame(5)], "LSN 5"),
        ([batch_frame(7), batch_frame(6)], "LSN 6"),
        ([batch_frame(6), batch_frame(6)], "LSN 6"),
        ([Frame(KIND_BATCH, 6, payload=b"", accepted_us=0)], "needs its table"),
        ([Frame(KIND_BATCH, 6, table=TABLE, schema_id=3, payload=b"", accepted_us=0)], "schema 3"),
        ([Frame(KIND_TABLE, 6, payload=b"", accepted_us=0)], "writer's own"),
    ],
)
async def test_wrong_frames_write_nothing(frames: list[Frame], why: str) -> None:
    """Frames that break the log's order are refused before anything is written; the log goes on."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append([batch_frame(5)])
    before = disk.steps
    with pytest.raises(InternalError, match=why):
        await writer.append(frames)
    assert disk.steps == before
    await writer.append([batch_frame(6)])
    await writer.close()
    assert (await recover_log(disk)).lsns == [5, 6]


@pytest.mark.parametrize("operation", ["write", "sync"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
async def test_failed_write_poisons(operation: str, error: int) -> None:
    """After one failed write or fsync every later append fails, also though the disk works again (R6)."""
    disk = make_disk(seed=3)
    writer = await open_log(disk)
    await writer.append(batch_frames([1, 2]))
    disk.fail_next(operation, error)
    with pytest.raises(WalPoisoned):
        await writer.append(batch_frames([3]))
    assert writer.poisoned
    for _ in range(2):
        with pytest.raises(WalPoisoned, match="earlier write"):
            await writer.append(batch_frames([4]))
    await writer.close()
    disk.crash()
    assert (await recover_log(disk)).lsns[:2] == [1, 2]


@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename", "sync_directory"])
async def test_failed_roll_poisons(operation: str) -> None:
    """A new segment that cannot be made poisons the log; what was acked before stays."""
    disk = make_disk(seed=4)
    writer = await open_log(disk)
    disk.fail_next(operation)
    with pytest.raises(WalPoisoned):
        await writer.append(batch_frames([1]))
    with pytest.raises(WalPoisoned):
        await writer.append(batch_frames([1]))
    await writer.close()
    disk.kill()
    assert (await recover_log(disk)).lsns == []


async def test_page_cache_lies_after_a_failed_sync() -> None:
    """What a failed fsync left in the page cache only is durable once recovery hands it out (R6)."""
    for seed in range(20):
        disk = make_disk(seed)
        writer = await open_log(disk)
        await writer.append(batch_frames([1]))
        disk.fail_next("sync")
        with pytest.raises(WalPoisoned):
            await writer.append(batch_frames([2, 3]))
        disk.kill()
        found = await recover_log(disk, epoch=2)
        disk.crash()
        again = await recover_log(disk, epoch=3)
        assert again.lsns == found.lsns == [1, 2, 3]


async def test_append_cancelled_before_it_begins_wrote_nothing() -> None:
    """A cancelled append wrote nothing: its frames may be appended again."""
    disk = make_disk()
    writer = await open_log(disk)
    frames = batch_frames([1, 2])
    with trio.CancelScope() as scope:
        scope.cancel()
        await writer.append(frames)
    assert scope.cancelled_caught
    assert disk.list_names(DIRECTORY) == [SEAL_NAME]
    await writer.append(frames)
    assert writer.last_lsn == 2


async def test_append_cancelled_while_it_runs_is_finished() -> None:
    """A cancellation during the write is not seen by the append: it returns, and the frames are durable."""
    disk = make_disk(latency_s=0.01)
    writer = await open_log(disk)
    ended: list[int] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def append() -> None:
                ended.extend(part.last_lsn for part in await writer.append(batch_frames([1, 2])))

            nursery.start_soon(append)
            while writer.last_lsn == 0:
                await trio.lowlevel.checkpoint()
            scope.cancel()
    assert ended == [2]
    disk.crash()
    assert (await recover_log(disk)).lsns == [1, 2]


async def test_appends_of_two_tasks_do_not_mix() -> None:
    """Appends wait for each other, first come first served."""
    disk = make_disk(latency_s=0.001)
    writer = await open_log(disk)
    async with trio.open_nursery() as nursery:
        for lsn in range(1, 30, 3):
            nursery.start_soon(writer.append, batch_frames(range(lsn, lsn + 3)))
            await trio.testing.wait_all_tasks_blocked()
    await writer.close()
    assert (await recover_log(disk)).lsns == list(range(1, 31))


async def test_closed_writer_refuses() -> None:
    """After close nothing is appended."""
    writer = await open_log(make_disk())
    await writer.close()
    with pytest.raises(Closed):
        await writer.append(batch_frames([1]))


async def test_open_needs_a_sealed_log() -> None:
    """A log whose tail may be torn, another log's directory, a used number and an old epoch are refused."""
    disk = make_disk()
    writer = await open_log(disk, epoch=4)
    await writer.append(batch_frames([1]))
    with pytest.raises(ConfigurationError, match="recover"):
        await open_log(disk, epoch=4, first_segment=2)
    await writer.close()
    with pytest.raises(ConfigurationError, match="the next is 2"):
        await open_log(disk, epoch=4)
    with pytest.raises(Fenced):
        await open_log(disk, epoch=3, first_segment=2)
    with pytest.raises(DataCorruption, match="log"):
        await open_log(disk, epoch=4, first_segment=2, log_uuid=UUID(int=1))
    again = await open_log(disk, epoch=4, first_segment=2)
    assert again.last_lsn == 1
    await again.append(batch_frames([2]))
    with pytest.raises(ConfigurationError, match="recover"):
        await open_log(disk, epoch=4, first_segment=3)


async def test_retired_segments_are_gone_and_leave_no_hole() -> None:
    """The oldest segments can be retired; a hole and the active one cannot; recovery accepts the rest."""
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=8 * 1024)
    ranges = await writer.append(batch_frames(range(1, 60)))
    refs = sorted({part.segment for part in ranges})
    assert len(refs) > 3
    with pytest.raises(InternalError, match="active"):
        await writer.retire(refs[-1:])
    with pytest.raises(InternalError, match="oldest"):
        await writer.retire(refs[1:2])
    await writer.retire(refs[:2])
    await writer.retire(refs[:2])
    disk.crash()
    kept = [frame.lsn for part in ranges if part.segment not in refs[:2] for frame in part.frames]
    assert (await recover_log(disk)).lsns == kept


async def test_retirement_cut_short_leaves_no_hole() -> None:
    """Whenever the power goes while segments are removed, synced or not: what is left follows each other to the end."""
    for step in range(12):
        for seed in range(8):
            disk = make_disk(seed)
            writer = await open_log(disk, segment_bytes=8 * 1024)
            ranges = [
                part for lsn in range(1, 30, 3) for part in await writer.append(batch_frames(range(lsn, lsn + 3)))
            ]
            refs = list(dict.fromkeys(part.segment for part in ranges))
            doomed = refs[:3]
            kept = min(part.first_lsn for part in ranges if part.segment == refs[3])
            await writer.close()
            disk.cut_power_after(step)
            done = False
            try:
                await writer.retire(doomed)
                done = True
            except PowerCut:
                pass
            disk.crash()
            found = await recover_log(disk, epoch=2)
            assert found.lsns == list(range(found.lsns[0], 31)), (step, seed)
            assert found.lsns[0] <= kept
            assert not done or found.lsns[0] == kept
        if done:
            assert step >= len(doomed)
            return
    raise AssertionError("the retirement never ended")


@pytest.mark.parametrize("spare", [False, True])
async def test_segment_that_was_being_made(spare: bool) -> None:
    """Whenever the power goes while a group needs a new segment: nothing acked is lost, no half file stops a start."""
    for step in range(40):
        for seed in range(4):
            disk = make_disk(seed)
            writer = await open_log(disk, segment_bytes=8 * 1024)
            acked = list(range(1, 7))
            await writer.append(batch_frames(acked))
            async with trio.open_nursery() as nursery:
                if spare:
                    nursery.start_soon(writer.keep_spare)
                    await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert any(name.startswith("spare") for name in disk.list_names(DIRECTORY)) == spare
            disk.cut_power_after(step)
            ended = False
            try:
                await writer.append(batch_frames(range(7, 20)))
                ended = True
            except (PowerCut, WalPoisoned):
                pass
            disk.crash()
            found = await recover_log(disk, epoch=2)
            assert found.lsns == list(range(1, len(found.lsns) + 1)), (step, seed)
            assert len(found.lsns) >= (19 if ended else 6)
            assert [name for name in disk.list_names(DIRECTORY) if name.endswith(".new")] == []
        if ended:
            return
    raise AssertionError("the append never ended")


async def test_all_segments_retired_keeps_the_last_lsn() -> None:
    """A closed log without segments still knows its last LSN and the next segment's number."""
    disk = make_disk()
    writer = await open_log(disk)
    (part,) = await writer.append(batch_frames([1, 2, 3]))
    await writer.close()
    await writer.retire([part.segment])
    found = await recover_log(disk)
    assert (found.lsns, found.log.last_lsn, found.log.next_segment) == ([], 3, 2)


async def test_read_slice_refuses_what_is_not_asked_for(tmp_path: Path) -> None:
    """Another log, epoch or segment, an offset without a batch frame, and damage are found (R8, R9)."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path)
    (part,) = await writer.append(batch_frames([1, 2]))
    good = slice_of([part])
    assert [header.lsn for header, _ in read_slice(good, LOG)] == [1, 2]
    wrong: list[tuple[SegmentSlice, UUID]] = [
        (good, UUID(int=1)),
        (replace(good, epoch=2), LOG),
        (replace(good, segment=2), LOG),
        (replace(good, offsets=(part.start).to_bytes(8, "little")), LOG),
        (replace(good, offsets=(part.start + 64).to_bytes(8, "little")), LOG),
        (replace(good, offsets=(part.start + 1).to_bytes(8, "little")), LOG),
        (replace(good, offsets=(0).to_bytes(8, "little")), LOG),
        (replace(good, offsets=(2**40).to_bytes(8, "little")), LOG),
    ]
    for asked, log_uuid in wrong:
        with pytest.raises(DataCorruption, match=segment_name(1)):
            list(read_slice(asked, log_uuid))
    content = bytearray(part.segment.path.read_bytes())
    content[part.frames[1].offset + 300] ^= 1
    part.segment.path.write_bytes(content)
    found = []
    with pytest.raises(DataCorruption) as caught:
        found.extend(header.lsn for header, _ in read_slice(good, LOG))
    assert found == [1]
    assert caught.value.offset == part.frames[1].offset
    await writer.close()


async def test_mapped_batch_outlives_its_segment(tmp_path: Path) -> None:
    """A batch that was read stays readable after its segment is sealed and unlinked (R9)."""
    disk = PosixDisk()
    writer = await open_log(disk, directory=tmp_path)
    (part,) = await writer.append([batch_frame(1, rows=500)])
    ((_, message),) = list(read_slice(slice_of([part]), LOG))
    await writer.close()
    await writer.retire([part.segment])
    assert not part.segment.path.exists()
    assert pa.ipc.read_record_batch(pa.BufferReader(message), SCHEMA).equals(make_batch(1, 500))
