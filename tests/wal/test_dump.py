"""Looking at a log: every frame is shown, and the verdict is the one that a start would give."""

from __future__ import annotations

import random
from uuid import UUID

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from arka.errors import ArkaError
from arka.testing.simdisk import SimDisk
from arka.wal.dump import dump_log, verify_log
from arka.wal.logstate import STATE_NAME, LogState
from arka.wal.seal import SEAL_NAME
from arka.wal.segment import HEADER_BYTES, segment_name

from .logs import DIRECTORY, LOG, batch_frames, make_disk, open_log, recover_log

FIRST = DIRECTORY / segment_name(1)


async def test_dump_shows_every_frame() -> None:
    """Each frame is listed with file, offset, kind, LSN, table, rows and size; frames touch each other."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append(batch_frames([1, 2], rows=3))
    await writer.append(batch_frames([4]))
    await writer.close()
    before = disk.steps
    lines = list(dump_log(DIRECTORY, disk))
    assert disk.steps == before
    assert [line.kind for line in lines] == [
        "header", "group", "table", "batch", "batch", "group", "batch", "footer",
    ]  # fmt: skip
    assert all(line.crc_ok and line.file == FIRST.name for line in lines)
    assert [line.offset for line in lines[1:]] == [line.offset + line.size for line in lines[:-1]]
    batch = lines[3]
    assert (batch.lsn, batch.table, batch.rows, batch.note) == (1, "default.table_1", 3, "key key-1")


async def test_dump_reads_on_behind_damage() -> None:
    """A damaged stretch is shown with the reason; the next frame whose place is sure is shown again."""
    disk = make_disk()
    writer = await open_log(disk)
    ranges = [(await writer.append(batch_frames([lsn])))[0] for lsn in (1, 2, 3)]
    content = bytearray(disk.read(FIRST))
    # The GROUP frame, and the length of the frame behind it: nothing says where one begins before the next group.
    content[ranges[1].start + 5] ^= 1
    content[ranges[1].start + 192 + 8] ^= 1
    disk.damage(FIRST, bytes(content))
    lines = list(dump_log(DIRECTORY, disk))
    bad = [line for line in lines if not line.crc_ok]
    assert [(line.kind, line.offset, line.size) for line in bad] == [
        ("damaged", ranges[1].start, ranges[1].end - ranges[1].start)
    ]
    assert "CRC" in bad[0].note
    assert [line.lsn for line in lines if line.kind == "batch"] == [1, 3]
    content[10] ^= 1
    disk.damage(FIRST, bytes(content))
    (line,) = dump_log(DIRECTORY, disk)
    assert (line.kind, line.crc_ok) == ("header", False)


async def test_verify_of_a_good_log() -> None:
    """A closed log, an unsealed one and an empty directory are fine, and nothing is changed."""
    disk = make_disk()
    assert verify_log(DIRECTORY, disk).ok
    writer = await open_log(disk, segment_bytes=8 * 1024)
    await writer.append(batch_frames(range(1, 30)))
    before = disk.steps
    report = verify_log(DIRECTORY, disk)
    assert report.ok
    assert report.log_uuid == LOG
    assert {segment.state for segment in report.segments[:-1]} == {"sealed"}
    assert report.segments[-1].state == "tail"
    assert disk.steps == before
    await writer.close()
    report = verify_log(DIRECTORY, disk)
    assert report.ok
    assert report.seal is not None
    assert {segment.state for segment in report.segments} == {"sealed"}
    assert (report.segments[0].first_lsn, report.segments[-1].last_lsn) == (1, 29)


@given(
    seed=st.integers(0, 2**16),
    damage=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9 * 1024), st.integers(1, 255)), max_size=2),
    missing=st.sampled_from([None, None, None, 1, 2, 3, SEAL_NAME]),
    closed=st.booleans(),
)
def test_verify_says_what_a_start_would_say(
    seed: int, damage: list[tuple[int, int, int]], missing: object, closed: bool
) -> None:
    """Whatever is wrong with a log, ``verify`` finds a problem exactly where a recovery would refuse."""

    async def main() -> None:
        disk = SimDisk(random.Random(seed))
        writer = await open_log(disk, segment_bytes=9 * 1024)
        await writer.append(batch_frames(range(1, 25)))
        await writer.append(batch_frames(range(25, 40)))
        if closed:
            await writer.close()
        disk.kill()
        for index, at, flip in damage:
            path = DIRECTORY / segment_name(1 + index)
            content = bytearray(disk.read(path))
            content[at % len(content)] ^= flip
            disk.damage(path, bytes(content))
        if missing is not None:
            disk.remove(DIRECTORY / (missing if isinstance(missing, str) else segment_name(missing)))
        report = verify_log(DIRECTORY, disk)
        if report.problems:
            with pytest.raises(ArkaError) as caught:
                await recover_log(disk)
            assert caught.value.detail in report.problems
        else:
            found = await recover_log(disk)
            torn = [segment.torn for segment in report.segments if segment.torn is not None]
            assert len(torn) == (found.log.torn is not None)

    trio.run(main)


async def test_verify_shows_what_a_recovery_left_undone() -> None:
    """A segment whose copy exists already is shown as replaced, and is no problem."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append(batch_frames([1, 2]))
    disk.kill()
    original = disk.read(FIRST)
    await recover_log(disk, epoch=2)
    disk.create(FIRST, 0)
    disk.damage(FIRST, original)
    report = verify_log(DIRECTORY, disk)
    assert report.ok
    assert [segment.state for segment in report.segments] == ["replaced", "sealed"]
    assert (await recover_log(disk, epoch=2)).lsns == [1, 2]


async def test_verify_names_a_torn_tail() -> None:
    """What the next start would drop is named with its bounds, and is no problem."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append(batch_frames([1]))
    (last,) = await writer.append(batch_frames([2]))
    disk.kill()
    content = bytearray(disk.read(FIRST))
    content[last.start] ^= 1
    disk.damage(FIRST, bytes(content))
    report = verify_log(DIRECTORY, disk)
    assert report.ok
    torn = report.segments[0].torn
    assert torn is not None
    assert torn.start == last.start >= HEADER_BYTES


async def write_closed_log() -> tuple[SimDisk, list[str]]:
    disk = make_disk()
    writer = await open_log(disk, segment_bytes=8 * 1024)
    await writer.append(batch_frames(range(1, 40)))
    await writer.close()
    return disk, [name for name in disk.list_names(DIRECTORY) if name.endswith(".wal")]


def bad_lines(disk: SimDisk) -> list[tuple[str, str]]:
    return [(line.file, line.kind) for line in dump_log(DIRECTORY, disk) if not line.crc_ok]


async def test_dump_shows_a_missing_segment() -> None:
    """A segment that does not follow upon the one before it is shown at its header."""
    disk, names = await write_closed_log()
    assert bad_lines(disk) == []
    disk.remove(DIRECTORY / names[1])
    assert bad_lines(disk) == [(names[2], "header")]


async def test_dump_shows_swapped_segments() -> None:
    """Segments under each other's names are shown at their headers, and their frames all the same."""
    disk, names = await write_closed_log()
    first, second = (disk.read(DIRECTORY / name) for name in names[1:3])
    disk.damage(DIRECTORY / names[1], second)
    disk.damage(DIRECTORY / names[2], first)
    assert bad_lines(disk)[:2] == [(names[1], "header"), (names[2], "header")]
    assert {line.lsn for line in dump_log(DIRECTORY, disk) if line.kind == "batch"} == set(range(1, 40))


async def test_dump_shows_a_missing_footer() -> None:
    """A sealed segment that was cut between two frames, and bytes behind a footer, are damage."""
    disk, names = await write_closed_log()
    content = disk.read(DIRECTORY / names[1])
    (footer,) = [line for line in dump_log(DIRECTORY, disk) if line.kind == "footer" and line.file == names[1]]
    disk.damage(DIRECTORY / names[1], content[: footer.offset])
    assert bad_lines(disk) == [(names[1], "damaged")]
    behind = footer.offset + footer.size + 10
    disk.damage(DIRECTORY / names[1], content[:behind].ljust(behind, b"\0") + b"?")
    assert bad_lines(disk) == [(names[1], "damaged")]


async def test_dump_shows_damage_to_state_and_seal() -> None:
    """A damaged copy of the log's state and a damaged seal mark have lines; whole ones have none."""
    disk, _ = await write_closed_log()
    await LogState.create(DIRECTORY, disk, log_uuid=LOG, epoch=1, lsn_ceiling=100, store_ceiling=1 << 40)
    assert bad_lines(disk) == []
    disk.damage(DIRECTORY / STATE_NAME, bytes(8192))
    disk.damage(DIRECTORY / SEAL_NAME, bytes(56))
    assert bad_lines(disk) == [(STATE_NAME, "state"), (STATE_NAME, "state"), (SEAL_NAME, "seal")]


async def test_verify_judges_the_log_state() -> None:
    """One damaged copy of the state is a note, both are a problem, and another log's segments are too (R1)."""
    disk, _ = await write_closed_log()
    state = await LogState.create(DIRECTORY, disk, log_uuid=LOG, epoch=1, lsn_ceiling=100, store_ceiling=1 << 40)
    report = verify_log(DIRECTORY, disk)
    assert (report.ok, report.state, report.notes) == (True, state, ())
    whole = disk.read(DIRECTORY / STATE_NAME)
    disk.damage(DIRECTORY / STATE_NAME, whole[:4096] + bytes(4096))
    report = verify_log(DIRECTORY, disk)
    assert (report.ok, report.state) == (True, state)
    assert "damaged at byte 4096" in report.notes[0]
    disk.damage(DIRECTORY / STATE_NAME, bytes(8192))
    with pytest.raises(ArkaError) as caught:
        await LogState.read(DIRECTORY, disk)
    assert verify_log(DIRECTORY, disk).problems == (caught.value.detail,)
    disk.remove(DIRECTORY / STATE_NAME)
    await LogState.create(DIRECTORY, disk, log_uuid=UUID(int=1), epoch=1, lsn_ceiling=100, store_ceiling=1 << 40)
    with pytest.raises(ArkaError):
        await recover_log(disk, log_uuid=UUID(int=1))
    assert not verify_log(DIRECTORY, disk).ok


async def test_dump_of_a_segment_that_was_copied_already() -> None:
    """What a killed recovery left, a segment and its copy, is no damage."""
    disk = make_disk()
    writer = await open_log(disk)
    await writer.append(batch_frames([1, 2]))
    disk.kill()
    original = disk.read(FIRST)
    await recover_log(disk, epoch=2)
    disk.create(FIRST, 0)
    disk.damage(FIRST, original)
    assert bad_lines(disk) == []
