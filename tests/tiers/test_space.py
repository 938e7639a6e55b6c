"""The disk gate refuses before the disk is full and opens again by itself (R23)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from arka.errors import AdmissionRejected
from arka.tiers.room import NoRoom
from arka.tiers.space import DiskSpace


async def test_log_has_a_limit() -> None:
    """At the limit writes are refused with the figures; reads take nothing of it (T27)."""
    space = DiskSpace(limit_bytes=800, free_bytes=0, used_bytes=400, read_free=lambda: 10_000)
    space.note_copies(5000)
    space.room.check()
    space.note_written(401)
    with pytest.raises(AdmissionRejected, match="801 bytes"):
        space.room.check()
    space.note_released(2)
    space.room.check()


async def test_what_is_not_written_yet_counts() -> None:
    """Bytes that were accepted and wait for the disk are on their way to it: the limit is not passed by them."""
    accepted = 0
    space = DiskSpace(limit_bytes=800, free_bytes=0, used_bytes=0, read_free=lambda: 1 << 40)
    space.count_owed(int, lambda: accepted)
    while not space.room.shut:
        accepted += 10
        space.note_accepted(10)
        assert accepted < 1000
    assert accepted == 810


async def test_writes_wait_before_they_are_refused(autojump_clock: MockClock) -> None:
    """Without room they are held back, for ``stall_s`` since it was last there, and only then refused."""
    space = DiskSpace(limit_bytes=800, free_bytes=0, used_bytes=801, read_free=lambda: 10_000, stall_s=30)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(space.run)
        for _ in range(3):
            await trio.sleep(25)
            with pytest.raises(NoRoom):
                space.room.check()
            # A little room, for a moment: writes have waited for nothing since.
            space.note_released(2)
            space.room.check()
            space.note_written(2)
        before = trio.current_time()
        await space.room.wait()
        assert 30 <= trio.current_time() - before <= 32
        with pytest.raises(AdmissionRejected, match=r"801 bytes.*no room for 30 s") as refused:
            space.room.check()
        assert not isinstance(refused.value, NoRoom)
        space.note_released(2)
        space.room.check()
        nursery.cancel_scope.cancel()


async def test_free_space_is_watched(autojump_clock: MockClock) -> None:
    """A file system that fills up closes the gate, one that empties opens it."""
    free = 100
    space = DiskSpace(limit_bytes=1 << 40, free_bytes=50, used_bytes=0, read_free=lambda: free)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(space.run)
        await trio.sleep(3)
        space.room.check()
        free = 49
        await trio.sleep(3)
        with pytest.raises(AdmissionRejected, match="disk_free_bytes"):
            space.room.check()
        free = 60
        await trio.sleep(3)
        space.room.check()
        nursery.cancel_scope.cancel()


async def test_room_is_kept_for_what_is_owed() -> None:
    """What accepted writes will still write to the same file system stays free beside the least free bytes."""
    owed = 0
    free = 100
    space = DiskSpace(limit_bytes=1 << 40, free_bytes=50, used_bytes=0, read_free=lambda: free)
    space.count_owed(lambda: owed)
    space.room.check()
    owed = 51
    space.note_released(0)
    with pytest.raises(AdmissionRejected, match=r"100 bytes free, at least 101 are kept: 50 .* and the rest"):
        space.room.check()
    # It is written now, and nothing more is owed: the room is as small as before, and enough.
    owed = 0
    space.note_released(0)
    space.room.check()


async def test_a_burst_between_two_looks_is_seen() -> None:
    """The gate looks again, without a timer, once what was accepted since the last look could have filled the disk."""
    owed = 0
    looks = 0

    def read_free() -> int:
        nonlocal looks
        looks += 1
        return 1000

    space = DiskSpace(limit_bytes=1 << 40, free_bytes=100, used_bytes=0, read_free=read_free)
    space.count_owed(lambda: owed)
    before = looks
    for _ in range(10):
        owed += 10
        space.note_accepted(10)
    assert looks == before, "far from the mark nothing is asked for"
    for _ in range(81):
        space.room.check()
        owed += 10
        space.note_accepted(10)
    assert owed == 910
    with pytest.raises(AdmissionRejected):
        space.room.check()


async def test_what_is_held_counts() -> None:
    """What is held beside the log is within the same limit, is named in the refusal, and is given back."""
    space = DiskSpace(limit_bytes=100, free_bytes=0, used_bytes=50, read_free=lambda: 1000)
    space.note_held("parked", 60)
    assert space.used_bytes == 110
    with pytest.raises(AdmissionRejected, match=r"110 bytes .*60 of them parked.*limits\.disk_bytes"):
        space.room.check()
    space.note_held("parked", -60)
    space.room.check()


async def test_copies_of_reads_leave_the_room_to_writes() -> None:
    """A read may copy half of what writes do not need; what it has copied is as good as free for them (T27)."""
    free = 300
    space = DiskSpace(limit_bytes=1 << 40, free_bytes=100, used_bytes=0, read_free=lambda: free)
    # 200 bytes above what is kept, and a quarter of that.
    assert space.copy_room() == 112
    free -= 50
    space.note_copies(50)
    # Writers fill the disk as far as they may, copies or not.
    free = 51
    space.note_released(0)
    space.room.check()
    assert space.copy_room() == 0
    free = 49
    space.note_released(0)
    with pytest.raises(AdmissionRejected):
        space.room.check()
    free = 60
    space.note_copies(-50)
    space.note_released(0)
    with pytest.raises(AdmissionRejected):
        space.room.check()


async def test_copies_on_a_file_system_of_their_own() -> None:
    """Where they do not share the log's disk, only their own counts."""
    space = DiskSpace(
        limit_bytes=1 << 40, free_bytes=100, used_bytes=0, read_free=lambda: 90, read_spill_free=lambda: 275
    )
    assert space.copy_room() == 100
    space.note_copies(50)
    with pytest.raises(AdmissionRejected):
        space.room.check()
