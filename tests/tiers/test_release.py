"""Release: nothing of the log goes before a checkpoint with its keys is in the store (R12)."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID, uuid4

import pytest
import trio
from trio.testing import MockClock

from arka.errors import DataCorruption
from arka.records import LsnRange
from arka.testing.simstore import SimStore
from arka.tiers.keys import KeyIndex
from arka.tiers.release import LogRelease, LostRange, load_checkpoints
from arka.tiers.space import DiskSpace
from arka.tiers.watermarks import now_us
from arka.wal.segment import SegmentRef

LOG, TABLE = UUID(int=1), uuid4()


class Writer:
    """Notes what is unlinked."""

    def __init__(self) -> None:
        self.retired: list[int] = []

    async def retire(self, segments: list[SegmentRef]) -> None:
        await trio.lowlevel.checkpoint()
        self.retired += [ref.number for ref in segments]


class Bench:
    def __init__(self, *, retention_s: float = 1000.0, lost: tuple[LostRange, ...] = ()) -> None:
        self.store, self.writer = SimStore(), Writer()
        self.keys = KeyIndex(retention_s)
        self.space = DiskSpace(limit_bytes=1 << 40, free_bytes=0, used_bytes=300, read_free=lambda: 1)
        self.retention_s = retention_s
        self.needed = 1
        self.release = LogRelease(
            self.store,
            self.writer,
            self.keys,
            self.space,
            node_id="n",
            log_uuid=LOG,
            epoch=1,
            lost=lost,
            after_lsn=0,
            retention_s=retention_s,
            grace_s=10.0,
        )

    def segment(self, number: int, last_lsn: int) -> None:
        self.release.note(SegmentRef(Path(f"s{number}"), number, 1), last_lsn, 100)

    async def load(self):
        return await load_checkpoints(self.store, "n", LOG, self.retention_s)


async def test_checkpoint_first_grace_second(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A segment goes a grace period after the checkpoint that carries its keys, never the last one."""
    bench = Bench()
    for lsn in range(1, 10):
        bench.keys.insert(TABLE, b"k%d" % lsn, lsn, lsn)
    for number in (1, 2, 3):
        bench.segment(number, number * 3)
    nursery.start_soon(bench.release.run, lambda: bench.needed)
    await trio.sleep(30)
    assert not bench.store.objects
    bench.needed = 6
    await trio.sleep(5)
    loaded = await bench.load()
    assert [key.key for key in loaded.keys] == [b"k1", b"k2", b"k3"]
    assert loaded.through_lsn == 3
    assert bench.writer.retired == []
    await trio.sleep(10)
    assert bench.writer.retired == [1]
    assert bench.space.used_bytes == 200
    bench.needed = 100
    await trio.sleep(30)
    assert bench.writer.retired == [1, 2]
    loaded = await bench.load()
    assert [(key.key, key.lsn, key.digest) for key in loaded.keys] == [(b"k%d" % n, n, n) for n in range(1, 7)]


async def test_wal_objects_go_behind_the_segments(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A WAL object goes once it lies wholly below what was released; the newest one stays."""
    bench = Bench()
    for first in (1, 3, 5, 7):
        bench.store.objects[f"n/wal/0000000001/{first:016d}.wal"] = b"x"
    bench.segment(1, 4)
    bench.segment(2, 8)
    bench.needed = 100
    nursery.start_soon(bench.release.run, lambda: bench.needed)
    await trio.sleep(30)
    left = [key for key in bench.store.objects if "/wal/" in key]
    assert [int(key[-20:-4]) for key in left] == [5, 7]


async def test_lost_ranges_are_carried_and_expire(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Lost ranges outlive the segment that recorded them, as long as they are kept (R3)."""
    fresh = LostRange(LsnRange(10, 20), now_us())
    bench = Bench(lost=(LostRange(LsnRange(1, 5), 0), fresh))
    bench.segment(1, 4)
    bench.segment(2, 30)
    bench.needed = 100
    nursery.start_soon(bench.release.run, lambda: bench.needed)
    await trio.sleep(5)
    assert (await bench.load()).lost == (fresh,)


async def test_the_newest_checkpoint_stays(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Expired checkpoints go, but the newest says how far the log was let go of."""
    bench = Bench(retention_s=0.0)
    for number in range(1, 6):
        bench.segment(number, number)
    bench.needed = 3
    nursery.start_soon(bench.release.run, lambda: bench.needed)
    await trio.sleep(30)
    bench.needed = 100
    await trio.sleep(60)
    assert [key for key in bench.store.objects if "/checkpoint/" in key] == [f"n/checkpoint/{1:010d}/{4:016d}"]


async def test_damaged_checkpoint_is_found(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A byte flip anywhere in a checkpoint stops the start, naming it."""
    bench = Bench()
    bench.keys.insert(TABLE, b"key", 1, 7)
    bench.segment(1, 1)
    bench.segment(2, 2)
    bench.needed = 100
    nursery.start_soon(bench.release.run, lambda: bench.needed)
    await trio.sleep(5)
    (name,) = bench.store.objects
    whole = bench.store.objects[name]
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        bench.store.objects[name] = bytes(damaged)
        with pytest.raises(DataCorruption, match=name):
            await bench.load()
