"""Release: nothing of the log goes before a checkpoint with its keys is in the store (R12)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka._core.keys import ENTRY_BYTES
from arka.errors import DataCorruption, Fenced
from arka.records import KnownTable, LsnRange, TableInfo, TableName, TableType, Tier
from arka.storage import backuphold
from arka.storage.ports import StoreUnavailable
from arka.testing.simnode import SimNode, create_table, write_all
from arka.testing.simstore import Fault, Outcome, SimStore
from arka.tiers import release
from arka.tiers.assembly import Surroundings
from arka.tiers.keys import KeyedWrite, KeyIndex, pack_entry
from arka.tiers.logclock import LogClock
from arka.tiers.release import LoadedCheckpoints, LogRelease, LostRange, load_checkpoints, merge_lost
from arka.tiers.space import DiskSpace
from arka.wal.segment import SegmentRef

LOG, TABLE = UUID(int=1), uuid4()
S = 1_000_000
NOTHING = LoadedCheckpoints((), (), 0, 0)


def table_info(name: str, uuid: UUID) -> TableInfo:
    schema = pa.schema([pa.field("a", pa.int64(), metadata={"PARQUET:field_id": "1"})])
    return TableInfo(
        uuid, TableName("default", name), schema, 0, TableType.APPEND_ONLY, (), 0, (), f"file:///w/{name}", {"p": "v"}
    )


class Writer:
    """Notes what is unlinked."""

    def __init__(self) -> None:
        self.retired: list[int] = []

    async def retire(self, segments: list[SegmentRef]) -> None:
        await trio.lowlevel.checkpoint()
        self.retired += [ref.number for ref in segments]


class Bench:
    """One process's release, on a store that outlives it."""

    def __init__(
        self,
        *,
        store: SimStore | None = None,
        retention_s: float = 1000.0,
        epoch: int = 1,
        loaded: LoadedCheckpoints = NOTHING,
        keys: KeyIndex | None = None,
    ) -> None:
        self.store, self.writer = store or SimStore(), Writer()
        self.keys = keys or KeyIndex(retention_s, limit=10**6)
        self.space = DiskSpace(limit_bytes=1 << 40, free_bytes=0, used_bytes=300, read_free=lambda: 1)
        self.clock = LogClock(loaded.clock_us)
        self.retention_s = retention_s
        self.needed = 1
        # The table of the keys: everything that a checkpoint covers is committed, unless a test says otherwise.
        self.tables = [KnownTable(table_info("t", TABLE), 1 << 40)]
        self.fenced: Exception | None = None
        self.release = LogRelease(
            self.store,
            self.writer,
            self.keys,
            self.space,
            self.clock,
            verify=self.verify,
            node_id="n",
            log_uuid=LOG,
            epoch=lambda: epoch,
            lost=loaded.lost,
            after_lsn=loaded.through_lsn,
            retention_s=retention_s,
            grace_s=10.0,
        )

    async def verify(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.fenced is not None:
            raise self.fenced

    async def needed_from(self) -> int:
        return self.needed

    async def run(self) -> None:
        await self.release.run(self.needed_from, lambda: self.tables)

    async def run_for(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.run()

    def segment(self, number: int, last_lsn: int) -> None:
        self.release.note(SegmentRef(Path(f"s{number}"), number, 1), last_lsn, 100)

    async def load(self) -> tuple[KeyIndex, LoadedCheckpoints]:
        keys = KeyIndex(self.retention_s, limit=10**6)
        return keys, await load_checkpoints(self.store, "n", LOG, self.retention_s, keys)

    async def restart(self) -> Bench:
        keys, loaded = await self.load()
        return Bench(store=self.store, retention_s=self.retention_s, epoch=2, loaded=loaded, keys=keys)

    @property
    def checkpoints(self) -> list[int]:
        """The last LSN of each checkpoint in the store."""
        return [int(key[-16:]) for key in sorted(self.store.objects) if "/checkpoint/" in key]


async def test_checkpoint_first_grace_second(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A segment goes a grace period after the checkpoint that carries its keys, never the last one."""
    bench = Bench()
    for lsn in range(1, 10):
        bench.keys.insert(TABLE, b"k%d" % lsn, lsn, lsn)
    for number in (1, 2, 3):
        bench.segment(number, number * 3)
    nursery.start_soon(bench.run)
    await trio.sleep(30)
    assert not bench.store.objects
    bench.needed = 6
    await trio.sleep(5)
    keys, loaded = await bench.load()
    assert [keys.find(TABLE, b"k%d" % lsn) for lsn in range(1, 5)] == [*(KeyedWrite(n, n) for n in range(1, 4)), None]
    assert loaded.through_lsn == 3
    assert bench.writer.retired == []
    await trio.sleep(10)
    assert bench.writer.retired == [1]
    assert bench.space.used_bytes == 200
    bench.needed = 100
    await trio.sleep(30)
    assert bench.writer.retired == [1, 2]
    keys, _ = await bench.load()
    assert [keys.find(TABLE, b"k%d" % n) for n in range(1, 7)] == [KeyedWrite(n, n) for n in range(1, 7)]
    assert len(keys) == 6


async def test_wal_objects_go_behind_the_segments(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A WAL object goes once it lies wholly below what was released; the newest one stays."""
    bench = Bench()
    for first in (1, 3, 5, 7):
        bench.store.objects[f"n/wal/0000000001/{first:016d}.wal"] = b"x"
    bench.segment(1, 4)
    bench.segment(2, 8)
    bench.needed = 100
    nursery.start_soon(bench.run)
    await trio.sleep(30)
    left = [key for key in bench.store.objects if "/wal/" in key]
    assert [int(key[-20:-4]) for key in left] == [5, 7]


async def test_lost_ranges_are_carried_and_expire(autojump_clock: MockClock) -> None:
    """Lost ranges outlive the segment that recorded them, as long as the log has been up since (R3)."""
    lost = (LostRange(LsnRange(1, 5), 0), LostRange(LsnRange(10, 20), 500 * S))
    bench = Bench(loaded=LoadedCheckpoints(lost, (), 0, 900 * S))
    bench.segment(1, 24)
    bench.segment(2, 30)
    bench.needed = 100
    await bench.run_for(50)
    _, loaded = await bench.load()
    assert loaded.lost == lost
    bench = await bench.restart()
    await trio.sleep(200)
    assert bench.release.remembered_lost() == [lost[1]]
    bench.segment(3, 40)
    bench.segment(4, 50)
    bench.needed = 100
    await bench.run_for(5)
    _, loaded = await bench.load()
    assert loaded.lost == (lost[1],)


def test_a_lost_range_counts_from_when_it_was_first_noted() -> None:
    """A range that the log and a checkpoint both name is one, and is not kept for longer with each restart (R3)."""
    early, late = LostRange(LsnRange(1, 5), 7), LostRange(LsnRange(1, 5), 900)
    other = LostRange(LsnRange(0, 1), 800)
    assert merge_lost([[late], [early, other]]) == merge_lost([[early], [late, other]]) == [other, early]


async def test_the_newest_checkpoint_stays(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Checkpoints without keys go, but the newest says how far the log was let go of."""
    bench = Bench(retention_s=0.0)
    for number in range(1, 6):
        bench.segment(number, number)
    bench.needed = 3
    nursery.start_soon(bench.run)
    await trio.sleep(30)
    bench.needed = 100
    await trio.sleep(60)
    assert bench.checkpoints == [4]


async def test_a_checkpoint_stays_while_one_of_its_keys_is_known(autojump_clock: MockClock) -> None:
    """What the index answers for, the next process answers for too: a checkpoint goes after the last of its keys."""
    bench = Bench(retention_s=1000.0)
    for number in range(1, 20):
        bench.keys.insert(TABLE, b"k%d" % number, number, 0)
        bench.segment(number, number)
    bench.needed = 4
    await bench.run_for(20)
    assert bench.checkpoints == [3]
    # The keys up to 2 are committed now, that of LSN 3 later: all three lie in one checkpoint.
    bench.keys.note_committed(TABLE, 2, bench.clock.now_us())
    await bench.run_for(100)
    bench.keys.note_committed(TABLE, 19, bench.clock.now_us())
    for needed, wait_s in ((7, 915), (10, 20)):
        bench.needed = needed
        await bench.run_for(wait_s)
        assert bench.keys.find(TABLE, b"k3") is not None
        assert 3 in bench.checkpoints
    assert bench.keys.find(TABLE, b"k2") is None
    await bench.run_for(100)
    assert len(bench.keys) == 0
    bench.needed = 12
    await bench.run_for(20)
    assert bench.checkpoints == [11]


async def test_the_clock_goes_on_over_restarts(autojump_clock: MockClock) -> None:
    """Keys are kept for a retention of uptime: time without a process does not count, restarts begin nothing anew."""
    bench = Bench()
    bench.keys.insert(TABLE, b"k", 1, 0)
    bench.keys.note_committed(TABLE, 1, bench.clock.now_us())
    bench.segment(1, 1)
    bench.segment(2, 2)
    bench.needed = 100
    await bench.run_for(600)
    for lsn in (3, 4):
        await trio.sleep(5_000)
        bench = await bench.restart()
        assert bench.keys.find(TABLE, b"k") == KeyedWrite(1, 0)
        await bench.run_for(300)
        bench.segment(3, lsn)
        bench.segment(4, 10)
        bench.needed = 100
        await bench.run_for(50)
    await bench.run_for(700)
    assert bench.keys.find(TABLE, b"k") is None


async def test_the_newest_checkpoint_knows_the_tables(autojump_clock: MockClock) -> None:
    """A start during a catalog outage learns from checkpoints which tables there are (R5)."""
    bench = Bench()
    assert (await bench.load())[1].tables == ()
    one, other = table_info("one", uuid4()), table_info("other", uuid4())
    for number, tables in ((1, [one]), (2, [one, other]), (3, [])):
        bench.segment(number, number)
        bench.tables = [KnownTable(info, number) for info in tables]
        bench.needed = number
        await bench.run_for(5)
    _, loaded = await bench.load()
    assert list(loaded.tables) == []
    bench.tables = [KnownTable(one, 4), KnownTable(other, 2)]
    bench.segment(4, 4)
    bench.segment(5, 5)
    bench.needed = 100
    await bench.run_for(5)
    _, loaded = await bench.load()
    assert list(loaded.tables) == bench.tables


async def test_keys_of_a_dropped_table_stay_forgotten(autojump_clock: MockClock) -> None:
    """Older checkpoints hold a dropped table's keys: they take no room after a restart, nor hide new ones (R21)."""
    bench, kept = Bench(), uuid4()
    for lsn in (1, 2):
        bench.keys.insert(TABLE, b"k%d" % lsn, lsn, 0)
    bench.keys.insert(kept, b"k", 3, 0)
    for number in range(1, 6):
        bench.segment(number, number)
    bench.needed = 4
    await bench.run_for(5)
    bench.keys.drop_table(TABLE)
    bench.keys.insert(TABLE, b"k1", 4, 9)
    bench.needed = 100
    await bench.run_for(5)
    assert bench.checkpoints == [3, 4]
    keys, _ = await bench.load()
    assert len(keys) == 2
    assert keys.find(TABLE, b"k1") == KeyedWrite(4, 9)
    assert keys.find(TABLE, b"k2") is None
    assert keys.find(kept, b"k") == KeyedWrite(3, 0)


async def test_a_long_outage_makes_several_checkpoints(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is let go of at once, one checkpoint holds a bounded number of keys (R12)."""
    monkeypatch.setattr(release, "_CHECKPOINT_BYTES", 50 * ENTRY_BYTES)
    bench = Bench()
    for lsn in range(1, 201):
        bench.keys.insert(TABLE, b"%d" % lsn, lsn, 0)
    # 20 keys in each segment, and 80 in the last one that goes.
    for number, last_lsn in enumerate([20, 40, 60, 80, 100, 180, 200], 1):
        bench.segment(number, last_lsn)
    bench.needed = 1000
    await bench.run_for(1.5)
    assert bench.checkpoints == [40, 80, 100, 180]
    keys, _ = await bench.load()
    assert [keys.find(TABLE, b"%d" % lsn) for lsn in range(1, 181)] == [KeyedWrite(lsn, 0) for lsn in range(1, 181)]


async def test_a_repeated_load_takes_each_key_once(autojump_clock: MockClock) -> None:
    """A start whose store fails halfway asks again with the same index, and nothing is missing or double."""
    bench = Bench()
    for lsn in range(1, 31):
        bench.keys.insert(TABLE, b"%d" % lsn, lsn, 0)
        bench.segment(lsn, lsn)
        bench.needed = lsn
        await bench.run_for(1.5)
    assert len(bench.checkpoints) > 20
    for fails in range(1, len(bench.checkpoints)):
        bench.store.plan("get", *[Fault()] * fails, Fault(Outcome.REFUSED))
        keys = KeyIndex(1000.0, limit=10**6)
        with pytest.raises(StoreUnavailable):
            await load_checkpoints(bench.store, "n", LOG, 1000.0, keys)
        loaded = await load_checkpoints(bench.store, "n", LOG, 1000.0, keys)
        assert loaded.through_lsn == len(keys) == bench.checkpoints[-1]


@pytest.mark.parametrize("when", ["before", "between"])
async def test_a_fenced_process_deletes_nothing(autojump_clock: MockClock, nursery: trio.Nursery, when: str) -> None:
    """A process that was frozen and lost its log looks before it deletes; what its successor reads is there (R10)."""
    bench = Bench()
    for first in (1, 3, 5, 7):
        bench.store.objects[f"n/wal/0000000001/{first:016d}.wal"] = b"x"
    bench.segment(1, 4)
    bench.segment(2, 8)
    bench.needed = 100
    await bench.run_for(5)
    kept = dict(bench.store.objects)
    answered = trio.Event()
    if when == "before":
        bench.fenced = Fenced("epoch 2 has been taken")
    else:
        # Frozen after the segments went, before the objects.
        bench.store.plan("list_keys", Fault(gate=answered))

    async def take_over() -> None:
        await trio.sleep(30)
        bench.fenced = Fenced("epoch 2 has been taken")
        if when == "between":
            answered.set()

    nursery.start_soon(take_over)
    with trio.fail_after(100), pytest.raises(Fenced):
        await bench.run()
    assert bench.writer.retired == ([] if when == "before" else [1])
    assert bench.store.objects == kept


async def test_deletion_waits_for_the_store(autojump_clock: MockClock) -> None:
    """A store that does not say whose log it is keeps segments and objects, and both go when it is back."""
    bench = Bench()
    for first in (1, 3, 5, 7):
        bench.store.objects[f"n/wal/0000000001/{first:016d}.wal"] = b"x"
    bench.segment(1, 4)
    bench.segment(2, 8)
    bench.needed = 100
    await bench.run_for(5)
    bench.fenced = StoreUnavailable("away")
    await bench.run_for(30)
    assert bench.writer.retired == []
    bench.fenced = None
    bench.store.plan("delete", Fault(Outcome.REFUSED))
    await bench.run_for(1.5)
    assert bench.writer.retired == [1]
    assert len([key for key in bench.store.objects if "/wal/" in key]) == 4
    await bench.run_for(1.5)
    assert len([key for key in bench.store.objects if "/wal/" in key]) == 2


class Leaky(SimStore):
    """Loses one object between its listing and its reading."""

    gone = ""

    async def get(self, key: str) -> bytes:
        if key == self.gone:
            self.objects.pop(key)
        return await super().get(key)


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_a_checkpoint_that_goes_while_it_is_read(autojump_clock: MockClock, gone: int) -> None:
    """A fenced predecessor's last deletion does not stop the start; a newest checkpoint that is gone does (R12)."""
    store = Leaky()
    bench = Bench(store=store)
    for lsn in range(1, 5):
        bench.keys.insert(TABLE, b"%d" % lsn, lsn, 0)
        bench.segment(lsn, lsn)
        bench.needed = lsn
        await bench.run_for(1.5)
    store.gone = [key for key in sorted(store.objects) if "/checkpoint/" in key][gone]
    if gone == 2:
        with pytest.raises(DataCorruption, match=store.gone):
            await bench.load()
        return
    keys, loaded = await bench.load()
    assert [keys.find(TABLE, b"%d" % lsn) is None for lsn in (1, 2, 3)] == [lsn == gone + 1 for lsn in (1, 2, 3)]
    assert loaded.through_lsn == 3


async def test_damaged_checkpoint_is_found(autojump_clock: MockClock) -> None:
    """A byte flip anywhere in a checkpoint stops the start, naming it."""
    bench = Bench()
    bench.keys.insert(TABLE, b"key", 1, 7)
    bench.segment(1, 1)
    bench.segment(2, 2)
    bench.needed = 100
    await bench.run_for(5)
    (name,) = bench.store.objects
    whole = bench.store.objects[name]
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        bench.store.objects[name] = bytes(damaged)
        with pytest.raises(DataCorruption, match=name):
            await bench.load()


async def test_checkpoint_with_keys_out_of_order_is_damage(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a checkpoint's keys are that are not keys in LSN order: no key of it is left out in silence."""
    bench = Bench()
    bad = pack_entry(TABLE, b"b", 2, 0) + pack_entry(TABLE, b"a", 1, 0)
    monkeypatch.setattr(KeyIndex, "uncovered", lambda self, through_lsn: iter([(TABLE, bad)]))
    bench.segment(1, 2)
    bench.segment(2, 3)
    bench.needed = 100
    await bench.run_for(5)
    with pytest.raises(DataCorruption, match="LSN order"):
        await bench.load()


async def test_the_log_clock_is_never_fast(autojump_clock: MockClock) -> None:
    """The clock goes on from what was recorded by the time that passes here, whatever the wall clock shows (R3)."""
    clock = LogClock(5 * S)
    assert clock.now_us() == 5 * S
    await trio.sleep(10.5)
    assert clock.now_us() == 15_500_000


async def test_keys_of_parked_writes_outlive_their_retention(autojump_clock: MockClock) -> None:
    """A key whose write left the log without being committed is kept until it is, through restarts (R18, R21)."""
    bench = Bench(retention_s=100.0)
    for lsn in (1, 2, 3):
        bench.keys.insert(TABLE, b"k%d" % lsn, lsn, 0)
    bench.tables = [KnownTable(table_info("t", TABLE), 1)]
    bench.segment(1, 3)
    bench.segment(2, 9)
    bench.needed = 100
    await bench.run_for(500)
    assert bench.checkpoints == [3]
    bench = await bench.restart()
    await bench.run_for(500)
    assert [bench.keys.find(TABLE, b"k%d" % lsn) is None for lsn in (1, 2, 3)] == [True, False, False]
    bench.keys.note_committed(TABLE, 3, bench.clock.now_us())
    await bench.run_for(500)
    assert len(bench.keys) == 0


async def test_nothing_goes_while_a_backup_is_made(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """A backup's attempt counts only if nothing went meanwhile: the log waits for it, and goes on then (R38)."""
    node = SimNode()
    held = True
    make = Surroundings.__init__

    def with_backup(self: Surroundings, *args: Any, **more: Any) -> None:
        make(self, *args, **more, backup_runs=lambda: held)

    monkeypatch.setattr(Surroundings, "__init__", with_backup)
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(30)
        assert not node.keys_of("checkpoint")
        held = False
        await trio.sleep(30)
        assert node.keys_of("checkpoint")


def test_a_backup_holds_the_log_as_long_as_it_lives(tmp_path: Path) -> None:
    """Its lock ends with it; what an earlier one left holds nothing, nor does one that has run for hours."""
    assert not backuphold.is_held(tmp_path)
    with backuphold.hold(tmp_path):
        assert backuphold.is_held(tmp_path)
        os.utime(tmp_path / "backup.hold", (0, 0))
        assert not backuphold.is_held(tmp_path)
    os.utime(tmp_path / "backup.hold")
    assert not backuphold.is_held(tmp_path)
