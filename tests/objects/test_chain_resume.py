"""Where a start goes on: the end of the chain, whatever a crash left in the store (R11, R12)."""

import random

import pytest
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arka.errors import DataCorruption, Fenced
from arka.options import KIB
from arka.storage.ports import StoreUnavailable
from arka.testing.simstore import Fault, Outcome, SimStore
from arka.tiers.chain import MAX_UPLOADS

from .tierbench import WAL, Bench, make_table, read_back


@pytest.fixture
def store():
    return SimStore()


def make_bench(store, **options):
    return Bench(store, **{"linger_s": 0.0, "bytes": 64 * KIB, "uploads": 4, **options})


async def upload(process, count):
    """Bring ``count`` objects of one frame each into the store."""
    async with process.running():
        for _ in range(count):
            await process.append(size=64 * KIB)
            await process.wait_acked()


async def leave_strays(bench, process, count, *, missing=1):
    """Bring ``count`` objects into the store behind ``missing`` whose PUTs never land; then the process dies."""
    first = bench.last_lsn + 1
    for lsn in range(first, first + missing):
        bench.store.plan("put_new", Fault(gate=trio.Event()), key=f"{process.lease.epoch:010d}/{lsn:016d}.wal")
    async with process.running():
        for _ in range(missing + count):
            await process.append(size=64 * KIB)
        await trio.sleep(10)
        assert len(bench.store.of("put_new", f"{process.lease.epoch:010d}/")) >= missing + count


def all_lsns(process):
    return sorted(set(read_back(process.chain())))


async def test_empty_store(store):
    """Where nothing was uploaded the chain begins, with no predecessor."""
    process = await make_bench(store).boot()
    assert process.resumed == 0
    await upload(process, 1)
    (found,) = process.chain()
    assert found.header.predecessor is None


async def test_restart_goes_on_behind_the_head(store, autojump_clock):
    """A new epoch's first object names the last one of the epochs before."""
    bench = make_bench(store)
    for epoch in range(1, 5):
        process = await bench.boot()
        assert process.resumed == bench.last_lsn
        await upload(process, 3)
        assert [found.header.epoch for found in process.chain()] == [e for e in range(1, epoch + 1) for _ in range(3)]
    assert read_back(process.chain()) == list(range(1, 13))


async def test_epochs_that_uploaded_nothing(store, autojump_clock):
    """Starts that wrote nothing, or only objects behind a break, do not hide the head before them."""
    bench = make_bench(store)
    await upload(await bench.boot(), 2)
    await bench.boot()
    await leave_strays(bench, await bench.boot(), 2)
    process = await bench.boot()
    assert process.resumed == 2
    async with process.running():
        await process.wait_acked()
    assert all_lsns(process) == list(range(1, 6))


@pytest.mark.parametrize("acked", [0, 1, 3, MAX_UPLOADS, MAX_UPLOADS + 1, MAX_UPLOADS + 10])
@pytest.mark.parametrize("strays", [1, 3])
async def test_strays_behind_a_break(acked, strays, store, autojump_clock):
    """What lies behind a break in an epoch was never acked: its frames are uploaded again, in the new epoch."""
    bench = make_bench(store)
    process = await bench.boot()
    await upload(process, acked)
    await leave_strays(bench, process, strays)
    assert process.acked_lsn == acked
    assert len(bench.wal_keys()) == acked + strays
    again = await bench.boot()
    assert again.resumed == acked
    async with again.running():
        await again.wait_acked()
    assert all_lsns(again) == list(range(1, acked + strays + 2))
    assert {found.header.epoch for found in again.chain()} == ({1, 2} if acked else {2})


async def test_as_many_strays_as_there_can_be(store, autojump_clock):
    """The head is found behind the most objects that can lie beyond it, without reading the whole chain."""
    bench = make_bench(store, uploads=MAX_UPLOADS)
    process = await bench.boot()
    await upload(process, 5)
    await leave_strays(bench, process, MAX_UPLOADS - 1)
    before = len(store.requests)
    again = await bench.boot()
    assert again.resumed == 5
    assert len([request for request in store.requests[before:] if request.operation == "get_range"]) <= MAX_UPLOADS + 1


async def test_put_that_lands_after_the_next_start(store, autojump_clock):
    """A PUT of a dead process that lands late, under its own epoch, changes nothing for its successors (R10)."""
    bench = make_bench(store)
    process = await bench.boot()
    await upload(process, 2)
    store.plan(
        "put_new",
        Fault(Outcome.LATE, late_s=1000.0),
        *[Fault(gate=trio.Event())] * 5,
        key="0000000001/0000000000000003",
    )
    await leave_strays(bench, process, 2, missing=1)
    second = await bench.boot()
    assert second.resumed == 2
    async with second.running():
        await second.wait_acked()
    before = read_back(second.chain())
    store.settle()
    assert f"{WAL}0000000001/0000000000000003.wal" in store.objects
    assert read_back(second.chain()) == before
    third = await bench.boot()
    assert third.resumed == 5
    await upload(third, 1)
    assert all_lsns(third) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("released", [1, 3, 4])
async def test_released_objects_are_no_break(released, store, autojump_clock):
    """Where the oldest objects of the running epoch were deleted behind a checkpoint, the rest is the chain (R12)."""
    bench = make_bench(store)
    await upload(await bench.boot(), 5)
    for key in bench.wal_keys()[:released]:
        del store.objects[key]
    again = await bench.boot(released_lsn=released)
    assert again.resumed == 5


async def test_released_objects_do_not_excuse_strays(store, autojump_clock):
    """A missing predecessor above the checkpoint is a break as ever."""
    bench = make_bench(store)
    process = await bench.boot()
    await leave_strays(bench, process, 2)
    again = await bench.boot()
    assert again.resumed == 0


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_break_below_what_was_acked(gone, store, autojump_clock):
    """Where an object is gone that a later one knew to be acked the start is refused: damage, no leftover (R11)."""
    bench = make_bench(store)
    await upload(await bench.boot(), 5)
    del store.objects[bench.wal_keys()[gone]]
    with pytest.raises(DataCorruption, match="acknowledged"):
        await bench.boot()


@pytest.mark.parametrize("part", ["header", "tables", "frames", "footer", "cut", "empty"])
async def test_damaged_head(part, store, autojump_clock):
    """A damaged last object refuses the start, with its path: it was acked (R11)."""
    bench = make_bench(store)
    await upload(await bench.boot(), 3)
    key = bench.wal_keys()[-1]
    data = bytearray(store.objects[key])
    at = {"header": 50, "tables": 200, "frames": len(data) // 2, "footer": len(data) - 60}.get(part)
    if at is not None:
        data[at] ^= 1
    store.objects[key] = bytes(data[: {"cut": len(data) - 1, "empty": 0}.get(part, len(data))])
    with pytest.raises(DataCorruption) as found:
        await bench.boot()
    assert found.value.path == f"{store.url}/{key}"


async def test_damaged_header_within_the_chain(store, autojump_clock):
    """An object before the head whose header is damaged refuses the start too."""
    bench = make_bench(store)
    await upload(await bench.boot(), 3)
    key = bench.wal_keys()[1]
    store.objects[key] = b"\xff" + store.objects[key][1:]
    with pytest.raises(DataCorruption, match=key):
        await bench.boot()


async def test_head_of_another_log(store, autojump_clock):
    """A chain of another log under the node's name is refused (R1)."""
    bench, other = make_bench(store), make_bench(SimStore())
    await upload(await other.boot(), 1)
    await bench.boot()
    store.objects[f"{WAL}0000000001/0000000000000001.wal"] = next(
        data for key, data in other.store.objects.items() if key.startswith(WAL)
    )
    with pytest.raises(DataCorruption, match=str(bench.log_uuid)):
        await bench.boot()


async def test_other_nodes_chains_are_not_ours(store, autojump_clock):
    """Objects below another node's name, also one that begins the same, are not looked at."""
    store.objects["n2/wal/0000000009/0000000000000001.wal"] = b"not ours"
    store.objects["n/walnut"] = b"not ours"
    assert (await make_bench(store).boot()).resumed == 0


# -- random faults --------------------------------------------------------------------------------


class Run:
    """A node that lives through faults, crashes and its own zombies; every promise is held against the chain."""

    def __init__(self, seed: int, share: float) -> None:
        self.rng = random.Random(seed)
        self.share = share
        self.store = SimStore(self.rng, fault_share=share, max_delay_s=1.0)
        self.bench = Bench(
            self.store,
            seed=seed,
            segment_bytes=256 * KIB,
            linger_s=self.rng.choice((0.0, 0.5)),
            bytes=64 * KIB,
            uploads=self.rng.choice((1, 2, 4, 8)),
        )

    async def boot(self):
        share = self.store.fault_share
        while True:
            try:
                process = await self.bench.boot()
            except StoreUnavailable:
                # A start is a dozen requests, and none may fail: let the store recover while it is tried again.
                self.store.fault_share /= 2
                await trio.sleep(1)
            else:
                self.store.fault_share = share
                return process

    async def write(self, process) -> None:
        """Write for a while."""
        with trio.move_on_after(self.rng.uniform(0.5, 20)):
            while True:
                await process.append(
                    self.rng.randrange(1, 5),
                    size=self.rng.choice((0, 100, 20 * KIB, 70 * KIB)),
                    table=make_table(self.rng.randrange(1, 4)),
                )
                if self.rng.random() < 0.1:
                    process.tier.hurry()
                if self.rng.random() < 0.05:
                    self.store.away = not self.store.away
                await trio.sleep(self.rng.choice((0, 0.1, 2)))
        self.store.away = False

    async def haunt(self, process) -> None:
        """Go on uploading although others take the log over; ``Process`` checks what it still promises."""
        try:
            async with process.running():
                await trio.sleep_forever()
        except* Fenced:
            pass

    def check(self, process) -> None:
        """All that was ever acked is in the chain of the newest process; nothing below it is missing."""
        acked = self.bench.acked
        lsns = set(read_back(process.chain()))
        assert set(range(1, acked + 1)) <= lsns

    async def main(self) -> None:
        async with trio.open_nursery() as zombies:
            for _ in range(4):
                process = await self.boot()
                if self.rng.random() < 0.4:
                    zombies.start_soon(self.haunt, process)
                    await self.write(process)
                else:
                    async with process.running():
                        await self.write(process)
                if process.acks:
                    self.check(process)
            self.store.calm()
            last = await self.boot()
            self.store.settle()
            async with last.running():
                await last.append(2)
                await last.wait_acked()
            zombies.cancel_scope.cancel()
        self.check(last)
        assert all_lsns(last) == list(range(1, self.bench.last_lsn + 1))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.05, 0.3, 0.6]))
@example(seed=1, share=0.6)
def test_random_faults(seed, share):
    """Whatever faults, outages, crashes and zombies: all that was acked is in the chain, in order, nothing skipped."""
    trio.run(Run(seed, share).main, clock=trio.testing.MockClock(autojump_threshold=0))
