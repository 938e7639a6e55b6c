"""Epochs and LSN blocks: who may write a node's log, and which LSNs it may give (R1, R2, R10, R13)."""

import contextlib
import itertools
import random
from uuid import UUID

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from arka._core.framing import crc32c
from arka.errors import ConfigurationError, DataCorruption, Fenced
from arka.lineage import NO_STARTS
from arka.records import MAX_LSN
from arka.storage.ports import StoreUnavailable
from arka.testing.simstore import Fault, Outcome, SimStore
from arka.tiers.epochs import STORE_BLOCK, Claim, LocalLog, take_epoch

DISK = UUID(int=0xD15C)
OTHER_DISK = UUID(int=0x07DE)
LOG = UUID(int=0x106)
BEAT_S = 2.0


@pytest.fixture
def store():
    return SimStore()


def record(fields):
    """An epoch object of these fields."""
    body = msgspec.json.encode(fields)
    return body + b"\n%08x\n" % crc32c(body)


async def take(store, *, local=None, disk=DISK, node="n", take_over=False):
    return await take_epoch(store, Claim(node, local, disk, take_over=take_over, heartbeat_s=BEAT_S))


async def start(store, **claim):
    """Take an epoch and go on from there, as a process does once its disk knows of it."""
    lease = await take(store, **claim)
    await lease.record_start(None, NO_STARTS)
    return lease


def after(lease, *, given=0):
    """What the disk knows once a process with this lease has given ``given`` LSNs."""
    return LocalLog(lease.log_uuid, lease.epoch, lease.first_lsn + given)


def epochs(store, node="n"):
    return [int(key.rpartition("/")[2]) for key in sorted(store.objects) if key.startswith(f"{node}/epoch/")]


async def test_first_start(store):
    """Where disk and store are empty a log is minted, at epoch 1 and LSN 1, with a block reserved (R1, R2)."""
    lease = await take(store)
    assert (lease.epoch, lease.first_lsn) == (1, 1)
    assert lease.lsn_ceiling >= 1 + STORE_BLOCK // 2
    await lease.verify()
    assert epochs(store) == [1]
    other = await take(store, node="m")
    assert (other.epoch, other.first_lsn) == (1, 1)
    assert other.log_uuid != lease.log_uuid, "another node is another log"
    await lease.verify()


async def test_node_whose_name_begins_the_same_is_another(store):
    """The epochs of node n1 are not those of node n."""
    lease = await take(store, node="n")
    for _ in range(3):
        await take(store, node="n1")
    await lease.verify()
    assert epochs(store, "n") == [1]


async def test_restart_on_the_same_disk(store):
    """A restart keeps the log, takes the next epoch and fences the one before (R10)."""
    first = await take(store)
    second = await take(store, local=after(first, given=1000))
    assert second.log_uuid == first.log_uuid
    assert second.epoch == 2
    await second.verify()
    with pytest.raises(Fenced, match="epoch 1 is over"):
        await first.verify()


async def test_epoch_ten_is_above_nine(store):
    """The highest epoch wins, by number."""
    lease = await take(store)
    for epoch in range(2, 13):
        before, lease = lease, await take(store, local=after(lease))
        assert lease.epoch == epoch
        await lease.verify()
        with pytest.raises(Fenced):
            await before.verify()


async def test_crash_between_epoch_and_log_state(store):
    """A first start that died before the disk knew of its log is continued, above the block that it reserved (R2)."""
    first = await take(store)
    again = await take(store, local=None)
    assert again.log_uuid == first.log_uuid
    assert again.epoch == 2
    assert again.first_lsn >= first.lsn_ceiling


async def test_other_log_is_refused(store):
    """A disk of another log is refused, naming both; no epoch is taken from the log's owner (R1)."""
    lease = await take(store)
    with pytest.raises(ConfigurationError) as refused:
        await take(store, local=LocalLog(LOG, 7, 100))
    assert str(LOG) in refused.value.detail
    assert str(lease.log_uuid) in refused.value.detail
    assert epochs(store) == [1]
    await lease.verify()


async def test_stale_disk_is_refused(store):
    """A disk after which the log went on elsewhere does not replay by itself; the message names its LSNs (R13)."""
    first = await start(store)
    local = after(first, given=500)
    second = await start(store, disk=OTHER_DISK)
    with pytest.raises(ConfigurationError, match=r"stale: it ends in epoch 1, at LSN 500 .*--resubmit"):
        await take(store, local=local)
    assert epochs(store) == [1, 2]
    third = await take(store, local=after(second, given=900), disk=OTHER_DISK)
    assert third.epoch == 3


async def test_copy_of_a_disk_that_was_stopped_in_order(store):
    """A data directory that was copied after a clean stop is stale once the original went on (R13, R2)."""
    first = await start(store)
    copy = after(first, given=500)
    second = await start(store, local=copy)
    with pytest.raises(ConfigurationError, match="stale"):
        await take(store, local=copy)
    await second.verify()


async def test_start_that_died_makes_no_disk_stale(store):
    """An epoch whose process died before its disk knew of it stands in nobody's way, whoever's disk it had (R13)."""
    first = await start(store)
    local = after(first, given=500)
    await take(store, local=local)
    await take(store, disk=OTHER_DISK)
    later = LocalLog(local.log_uuid, local.epoch, local.lsn_ceiling + 100)
    assert (await take(store, local=later)).epoch == 4


async def test_older_state_of_a_disk_whose_start_died(store):
    """A directory that is older than what a start found in it is stale, also if that start died (R13)."""
    first = await start(store)
    await take(store, local=after(first, given=500))
    with pytest.raises(ConfigurationError, match="stale"):
        await take(store, local=after(first, given=499))


async def test_start_that_is_recorded_while_an_epoch_is_taken(store, autojump_clock):
    """A disk after which another one's start was recorded, just before its own epoch was there, is stale (R13)."""
    first = await start(store)
    other = await take(store, disk=OTHER_DISK)
    gate = trio.Event()
    store.plan("put_new", Fault(gate=gate), key="n/epoch/0000000003")
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def record():
            while not store.of("put_new", "n/epoch/0000000003"):
                await trio.sleep(0.01)
            await other.record_start(None, NO_STARTS)
            gate.set()

        with pytest.raises(ConfigurationError, match="stale"):
            await take(store, local=after(first))


async def test_empty_disk_takes_a_log_over(store):
    """A node whose disk is gone comes up on an empty one, above every LSN that the old one may have given (R2)."""
    first = await start(store)
    second = await take(store, disk=OTHER_DISK)
    assert second.log_uuid == first.log_uuid
    assert second.first_lsn >= first.lsn_ceiling
    with pytest.raises(Fenced):
        await first.verify()


@pytest.mark.parametrize("take_over", [False, True])
async def test_living_owner(take_over, store, autojump_clock):
    """A log whose process shows that it lives is taken from it only when that is asked for (R10)."""
    first = await start(store)
    with contextlib.suppress(Fenced):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.beat, BEAT_S)
            await trio.sleep(1)
            if take_over:
                await take(store, disk=OTHER_DISK, take_over=True)
            else:
                with pytest.raises(ConfigurationError, match="--take-over"):
                    await take(store, disk=OTHER_DISK)
                await first.verify()
            nursery.cancel_scope.cancel()
    assert epochs(store) == ([1, 2] if take_over else [1])


@pytest.mark.parametrize("leaves", [False, True])
async def test_dead_owner(leaves, store, autojump_clock):
    """A process that died is waited for as long as a heartbeat takes; one that left in order is not."""
    first = await start(store)
    with trio.move_on_after(5.5):
        await first.beat(BEAT_S)
    if leaves:
        await first.leave()
    before = trio.current_time()
    assert (await take(store, disk=OTHER_DISK)).epoch == 2
    assert (trio.current_time() > before) is not leaves
    assert not [key for key in store.objects if "/heartbeat/" in key]


async def test_last_beat_of_a_dead_owner(store, autojump_clock):
    """A beat that was on its way when its process died, and lands while a start looks, is no sign of life."""
    first = await start(store)
    with trio.move_on_after(5.5):
        await first.beat(BEAT_S)
    last = max(key for key in store.objects if "/heartbeat/" in key)
    prefix, _, number = last.rpartition("/")

    async def land():
        await trio.sleep(1)
        await store.put_new(f"{prefix}/{int(number) + 1:010d}", [b""])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(land)
        assert (await take(store, disk=OTHER_DISK)).epoch == 2


async def test_beats_leave_nothing_behind(store, autojump_clock):
    """However often a process shows that it lives, and whatever fails, one heartbeat is in the store."""
    lease = await start(store)
    for operation in ("put_new", "delete"):
        store.plan(operation, *[Fault(outcome) for outcome in Outcome for _ in range(2)], key="/heartbeat/")
    with trio.move_on_after(100):
        await lease.beat(BEAT_S)
    store.settle()
    assert len([key for key in store.objects if "/heartbeat/" in key]) <= 2


async def test_idle_process_hears_that_it_is_fenced(store, autojump_clock):
    """A process that has nothing to upload finds out all the same that another one owns its log (R10)."""
    first = await start(store)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def take_later():
                await trio.sleep(3)
                await take(store, disk=OTHER_DISK, take_over=True)

            nursery.start_soon(take_later)
            with pytest.raises(Fenced, match="epoch 1 is over"):
                await first.beat(BEAT_S)


async def test_emptied_store(store):
    """An empty store beside a disk with a log is refused: whether the disk is stale cannot be told (R13)."""
    with pytest.raises(ConfigurationError):
        await take(store, local=LocalLog(LOG, 41, 10**12))
    assert not store.objects


@pytest.mark.parametrize("racers", [2, 5])
async def test_racers_win_each_number_once(racers, autojump_clock):
    """Of processes on one disk that take epochs at once each gets its own, and only the highest stays (R10)."""
    store = SimStore(random.Random(racers), max_delay_s=1.0)
    first = await take(store)
    leases = []

    async def race():
        # A loser is fenced here already, or at its first verify.
        with contextlib.suppress(Fenced):
            leases.append(await take(store, local=after(first, given=10)))

    async with trio.open_nursery() as nursery:
        for _ in range(racers):
            nursery.start_soon(race)
    epochs = sorted(lease.epoch for lease in leases)
    assert len(set(epochs)) == len(epochs)
    assert epochs[-1] == 1 + racers
    newest = max(leases, key=lambda lease: lease.epoch)
    for lease in leases:
        if lease is newest:
            await lease.verify()
        else:
            with pytest.raises(Fenced):
                await lease.verify()


async def test_first_starts_race(autojump_clock):
    """Of two empty disks that start at once one mints the log, and only the later one goes on with it (R1)."""
    store = SimStore(random.Random(1), max_delay_s=1.0)
    leases, fenced = [], []

    async def race(disk):
        try:
            leases.append(await start(store, disk=disk))
        except Fenced:
            fenced.append(disk)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(race, DISK)
        nursery.start_soon(race, OTHER_DISK)
    newest = max(leases, key=lambda lease: lease.epoch)
    await newest.verify()
    assert newest.epoch == 2
    assert len(leases) + len(fenced) == 2
    assert len({lease.log_uuid for lease in leases}) == 1


async def test_epochs_that_others_keep_taking(store):
    """Whoever loses every race is told so, instead of trying for ever."""
    store.plan("list_keys", *[Fault()] * 100, key="n/epoch/")
    real = store.put_new

    async def lose(key, parts):
        await real(key, parts)
        await real(key, parts)

    store.put_new = lose
    with pytest.raises(ConfigurationError, match="running twice"):
        await take(store)


async def test_lost_response_of_an_epoch(store):
    """An epoch whose response was lost is not used by whoever did not hear of it; the next one is taken."""
    store.plan("put_new", Fault(Outcome.LOST), key="n/epoch/")
    with pytest.raises(StoreUnavailable):
        await take(store)
    lease = await take(store)
    assert lease.epoch == 2
    await lease.verify()


async def test_outage_says_nothing(store):
    """While the store does not answer nobody is told that an epoch is still theirs (R10)."""
    lease = await take(store)
    store.away = True
    with pytest.raises(StoreUnavailable):
        await lease.verify()
    with pytest.raises(StoreUnavailable):
        await take(store, local=after(lease))
    with pytest.raises(StoreUnavailable):
        await lease.reserve_block()


async def test_blocks_follow_each_other(store):
    """Each block lies above the one before, also where the response to its reservation was lost (R2)."""
    lease = await take(store)
    ceilings = [lease.lsn_ceiling]
    for outcome in (Outcome.ANSWERED, Outcome.LOST, Outcome.REFUSED, Outcome.LATE, Outcome.ANSWERED):
        store.plan("put_new", Fault(outcome), key="n/lsn/")
        while lease.lsn_ceiling == ceilings[-1]:
            try:
                await lease.reserve_block()
            except StoreUnavailable:
                assert lease.lsn_ceiling == ceilings[-1], "not reserved for all we know"
        ceilings.append(lease.lsn_ceiling)
        assert f"n/lsn/{lease.lsn_ceiling:016d}" in store.objects
    assert [high - low for low, high in itertools.pairwise(ceilings)] == [STORE_BLOCK] * 5


async def test_fenced_owner_reserves_no_block(store):
    """An owner that was fenced while it slept gets no block: the new owner's begins where it would (R2, R10)."""
    fenced = await take(store)
    ceiling = fenced.lsn_ceiling
    owner = await take(store, local=after(fenced))
    await owner.reserve_block()
    with pytest.raises(Fenced, match="epoch 1 is over"):
        await fenced.reserve_block()
    assert fenced.lsn_ceiling == ceiling


async def test_lsns_end(store):
    """Ceilings never exceed what JavaScript can count; a start at the end of the LSNs ends (R2)."""
    first = await take(store)
    lease = await take(store, local=LocalLog(first.log_uuid, first.epoch, MAX_LSN - 5))
    assert lease.lsn_ceiling == MAX_LSN + 1
    assert await lease.reserve_block() == MAX_LSN + 1


async def test_damaged_epoch_record(store):
    """A byte flip anywhere in the newest epoch's record stops the start, naming it; nobody mints a new log."""
    lease = await take(store)
    key = "n/epoch/0000000001"
    whole = store.objects[key]
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 0x80
        store.objects[key] = bytes(data)
        with pytest.raises(DataCorruption, match=key):
            await take(store, local=after(lease))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"log_uuid":"x"}'])
async def test_epoch_record_of_another_shape(content, store):
    """What is no epoch record is damage with its path, not a fresh start."""
    await take(store)
    store.objects["n/epoch/0000000001"] = content
    with pytest.raises(DataCorruption, match="n/epoch/0000000001"):
        await take(store)


async def test_epoch_record_in_the_wrong_place(store):
    """A record under another epoch's key is damage: keys decide who is newest."""
    await take(store)
    store.objects["n/epoch/0000000009"] = store.objects["n/epoch/0000000001"]
    with pytest.raises(DataCorruption, match="n/epoch/0000000009"):
        await take(store)


async def test_records_may_grow(store):
    """A field that a later version added does not stop this one."""
    first = await take(store)
    key = "n/epoch/0000000001"
    store.objects[key] = record(msgspec.json.decode(store.objects[key].splitlines()[0]) | {"heartbeat_us": 5})
    assert (await take(store, local=after(first))).epoch == 2


@given(seed=st.integers(0, 2**32), starts=st.integers(2, 6), share=st.sampled_from([0.0, 0.2, 0.5]))
def test_lsns_are_never_given_twice(seed, starts, share):
    """Whatever faults and crashes: no two processes of a log share a block, on one disk or after losing it (R2)."""

    async def main():
        rng = random.Random(seed)
        store = SimStore(rng, fault_share=share, max_delay_s=2.0)
        local, used, log_uuid, last_epoch = None, 0, None, 0
        for _ in range(starts):
            try:
                lease = await take(store, local=local)
            except StoreUnavailable:
                continue
            assert log_uuid in (None, lease.log_uuid)
            log_uuid = lease.log_uuid
            assert lease.epoch > last_epoch
            last_epoch = lease.epoch
            assert lease.first_lsn > used or local is not None
            first = lease.first_lsn if local is None else local.lsn_ceiling
            assert first > used
            ceiling = lease.lsn_ceiling
            for _ in range(rng.randrange(3)):
                try:
                    ceiling = await lease.reserve_block()
                except StoreUnavailable:
                    continue
            used = rng.randrange(first, ceiling)
            assert any(int(key[6:]) > used for key in store.objects if key.startswith("n/lsn/"))
            # The disk's state may be lost before it is written: then it is an empty one of the same identity.
            local = LocalLog(log_uuid, lease.epoch, used + 1) if rng.random() < 0.6 else None

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
