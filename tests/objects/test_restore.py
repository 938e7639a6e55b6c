"""A log whose disk is gone is written anew from the object store (R2, R11, R12)."""

import random
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from arka._core.framing import KIND_BATCH
from arka.errors import DataCorruption, Fenced
from arka.options import KIB
from arka.storage.ports import StoreUnavailable
from arka.testing.simdisk import PowerCut, SimDisk
from arka.testing.simstore import Fault, Outcome, SimStore
from arka.tiers.chain import Chain
from arka.tiers.restore import restore_log
from arka.wal.recovery import recover

from .tierbench import NODE, Bench, make_table

DIRECTORY = Path("/restored")


@pytest.fixture
def store():
    return SimStore()


class Restored:
    """An empty disk that gets a log back."""

    def __init__(self, bench, *, released_lsn=0, segment_bytes=64 * KIB, seed=0):
        self.bench = bench
        self.disk = SimDisk(random.Random(seed))
        self.released_lsn = released_lsn
        self.segment_bytes = segment_bytes
        self.lsns = []
        self.tables = set()

    async def restore(self):
        chain = Chain(self.bench.store, NODE, self.bench.log_uuid, released_lsn=self.released_lsn)
        head = await chain.find_head()
        await restore_log(
            chain,
            head,
            DIRECTORY,
            self.disk,
            log_uuid=self.bench.log_uuid,
            epoch=9,
            released_lsn=self.released_lsn,
            segment_bytes=self.segment_bytes,
        )
        return head

    def take(self, frame):
        if frame.header.lsn:
            self.lsns.append(frame.header.lsn)
        if frame.header.kind == KIND_BATCH:
            assert frame.key == b"key-%d" % frame.header.lsn
            self.tables.add(frame.header.table_uuid)

    async def recover(self):
        self.lsns = []
        return await recover(
            DIRECTORY,
            self.disk,
            log_uuid=self.bench.log_uuid,
            new_epoch=9,
            on_frame=self.take,
            on_progress=lambda read, size: None,
        )


async def fill(store, **options):
    """Three epochs' objects of three tables, of all sizes."""
    bench = Bench(store, **{"linger_s": 0.0, "bytes": 64 * KIB, "segment_bytes": 128 * KIB, **options})
    for _ in range(3):
        process = await bench.boot()
        async with process.running():
            for number in range(6):
                await process.append(1 + number % 3, size=(number % 2) * 30 * KIB, table=make_table(1 + number % 3))
            await process.append_control()
            await process.wait_acked()
    return bench


@pytest.mark.parametrize("segment_bytes", [1, 64 * KIB, 1 << 30])
async def test_everything_in_the_store_comes_back(segment_bytes, store, autojump_clock):
    """Every frame of the chain is in the new segments, with key and table, once and in order; nothing is torn."""
    bench = await fill(store)
    restored = Restored(bench, segment_bytes=segment_bytes)
    head = await restored.restore()
    assert head.last_lsn == bench.last_lsn
    log = await restored.recover()
    assert restored.lsns == list(range(1, bench.last_lsn + 1))
    assert len(restored.tables) == 3
    assert (log.last_lsn, log.torn, log.closed, log.base_lsn) == (bench.last_lsn, None, False, 0)
    assert (len(log.segments) == 1) is (segment_bytes == 1 << 30)


async def test_what_was_released_is_not_missed(store, autojump_clock):
    """Objects that a checkpoint covers may be gone; the log then begins behind them (R12)."""
    bench = await fill(store)
    first = bench.wal_keys()[:4]
    chain = Chain(store, NODE, bench.log_uuid, released_lsn=0)
    released = (await chain.list_objects(await chain.find_head()))[3].last_lsn
    for key in first:
        del store.objects[key]
    restored = Restored(bench, released_lsn=released)
    await restored.restore()
    log = await restored.recover()
    assert restored.lsns == list(range(released + 1, bench.last_lsn + 1))
    assert log.base_lsn == released


async def test_empty_chain(store, autojump_clock):
    """A log that uploaded nothing, or whose every object was released, ends where its checkpoints end."""
    bench = Bench(store)
    await bench.boot()
    for released in (0, 17):
        restored = Restored(bench, released_lsn=released)
        assert await restored.restore() is None
        log = await restored.recover()
        assert (log.last_lsn, log.base_lsn, restored.lsns) == (released, released, [])


@pytest.mark.parametrize("at", [0, 3, -1])
async def test_missing_or_damaged_object(at, store, autojump_clock):
    """An object of the chain that is gone or damaged is named; nothing is restored around it (R11)."""
    bench = await fill(store)
    key = bench.wal_keys()[at]
    data = store.objects[key]
    store.objects[key] = data[:-70] + bytes([data[-70] ^ 1]) + data[-69:]
    with pytest.raises(DataCorruption, match=key):
        await Restored(bench).restore()
    if at != -1:
        # Without a successor an object that is gone was never there.
        del store.objects[key]
        with pytest.raises(DataCorruption, match=key):
            await Restored(bench).restore()


async def test_late_upload_of_a_fenced_process(store, autojump_clock):
    """What an older epoch's process uploads after the next one began is no part of the log (R10, R11)."""
    bench = await fill(store)
    old = bench.newest
    before = bench.last_lsn
    gate = trio.Event()
    store.plan("put_new", Fault(gate=gate), key=f"{old.lease.epoch:010d}/")
    try:
        async with old.running():
            await old.append(2)
            await trio.sleep(10)
            new = await bench.boot()
            gate.set()
            await trio.sleep(1)
    except* Fenced:
        pass
    assert f"{NODE}/wal/{old.lease.epoch:010d}/{before + 1:016d}.wal" in store.objects
    assert new.resumed == before
    restored = Restored(bench)
    await restored.restore()
    await restored.recover()
    assert restored.lsns == list(range(1, before + 1))


@pytest.mark.parametrize("operation", ["get", "get_range", "list_keys"])
async def test_outage_on_the_way(operation, store, autojump_clock):
    """A restore that the store cut short is begun again, and finds the same."""
    bench = await fill(store)
    restored = Restored(bench)
    store.plan(operation, *[Fault()] * 2, Fault(Outcome.REFUSED))
    with pytest.raises(StoreUnavailable):
        await restored.restore()
    await restored.restore()
    await restored.recover()
    assert restored.lsns == list(range(1, bench.last_lsn + 1))


async def test_object_that_goes_away_on_the_way(store, autojump_clock):
    """What another process releases while it is read is no damage: the restore begins anew."""
    bench = await fill(store)
    real = store.get
    key = bench.wal_keys()[2]

    async def get(wanted):
        if wanted == key:
            raise KeyError(key)
        return await real(wanted)

    store.get = get
    with pytest.raises(StoreUnavailable, match="released"):
        await Restored(bench).restore()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_power_cut_on_the_way(seed):
    """However often a restore is cut short, the next one leaves the same log as one that was not."""

    async def main():
        rng = random.Random(seed)
        bench = await fill(SimStore())
        restored = Restored(bench, seed=seed)
        for _ in range(rng.randrange(1, 4)):
            restored.disk.cut_power_after(rng.randrange(40))
            try:
                await restored.restore()
            except PowerCut:
                restored.disk.crash()
            else:
                restored.disk.crash()
                break
        else:
            await restored.restore()
        restored.disk.crash()
        await restored.recover()
        assert restored.lsns == list(range(1, bench.last_lsn + 1))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
