"""The object tier: what it promises, when, and what it uploads (R4, R10, R11). All times are simulated."""

import random

import pytest
import trio

from arka.errors import DataCorruption, Fenced, InternalError
from arka.options import KIB
from arka.testing.simstore import Fault, Outcome, SimStore

from .tierbench import EPOCH, WAL, Bench, Process, make_table, read_back


@pytest.fixture
def store():
    return SimStore()


async def boot(store, **options):
    return await Bench(store, **{"linger_s": 0.0, **options}).boot()


async def append_and_wait(process):
    async with process.running():
        await process.append()
        await trio.sleep(60)


def check(process, expected=None):
    """All that was acked is in the chain, in order, nothing skipped."""
    lsns = read_back(process.chain())
    assert lsns == (list(range(1, process.acked_lsn + 1)) if expected is None else expected)
    return lsns


async def test_acks_in_order(store, autojump_clock):
    """What is submitted is acked, in LSN order, and stands in the chain as it stood in the segments."""
    process = await boot(store)
    async with process.running():
        for count in (1, 3, 1, 10):
            await process.append(count)
            await process.wait_acked()
    assert [ack.lsn for ack in process.acks] == [1, 4, 5, 15]
    check(process)
    assert len(process.chain()) == process.tier.statistics().objects == 4


async def test_ack_only_after_a_later_read_of_the_epoch(store, autojump_clock):
    """Before each ack a read of the newest epoch was begun after the last of its PUTs returned (R10)."""
    store._rng, store.max_delay_s = random.Random(3), 1.0
    process = await boot(store, uploads=4)
    async with process.running():
        for _ in range(20):
            await process.append(2)
            await trio.sleep(process.bench.rng.uniform(0, 0.6))
        await process.wait_acked()
    assert len(process.acks) > 3
    for ack in process.acks:
        seen = store.requests[: ack.requests]
        puts = [
            request
            for request in seen
            if request.operation == "put_new" and request.key.startswith(WAL) and _first_lsn(request.key) <= ack.lsn
        ]
        reads = [request for request in seen if request.operation == "list_keys" and request.key == EPOCH]
        assert puts
        assert all(put.answered for put in puts)
        last_put = max(put.ended for put in puts)
        assert any(read.begun > last_put and read.answered for read in reads)
    check(process)


def _first_lsn(key):
    return int(key.rpartition("/")[2].removesuffix(".wal"))


async def test_read_under_way_when_a_put_returns_does_not_count(store, autojump_clock):
    """A read of the epoch that was begun before a PUT returned acks only what had returned before it (R10)."""
    reply, second_put = trio.Event(), trio.Event()
    process = await boot(store)
    store.plan("list_keys", Fault(reply_gate=reply), key=EPOCH)
    store.plan("put_new", Fault(), Fault(reply_gate=second_put), key=WAL)
    async with process.running():
        await process.append()
        await trio.sleep(1)
        await process.append()
        await trio.sleep(1)
        second_put.set()
        await trio.sleep(1)
        assert process.acks == []
        reads = len(store.of("list_keys", EPOCH))
        reply.set()
        await process.wait_acked()
    assert [ack.lsn for ack in process.acks] == [1, 2]
    assert len(store.of("list_keys", EPOCH)) == reads + 1


@pytest.mark.parametrize("lost", [False, True])
async def test_epoch_taken_between_put_and_read(lost, store, autojump_clock):
    """A frozen process that wakes after another took the epoch may put, but promises nothing more (R10)."""
    put = trio.Event()
    process = await boot(store)
    store.plan("put_new", Fault(Outcome.LOST if lost else Outcome.ANSWERED, reply_gate=put), key=WAL)
    others = []

    async def be_fenced():
        async with process.running():
            await process.append()
            await trio.sleep(1)
            others.append(await process.bench.boot())
            put.set()
            await trio.sleep(60)

    with pytest.raises(ExceptionGroup) as ended:
        await be_fenced()
    assert ended.group_contains(Fenced, match="epoch 1 is over", depth=None)
    assert process.acks == []
    # Where the other found the object it goes on behind it; either way its own word counts.
    (other,) = others
    async with other.running():
        await other.append()
        await other.wait_acked()
    check(other)


async def test_epoch_that_cannot_be_read_holds_acks_back(store, autojump_clock):
    """While the read of the epoch fails nothing is acked, however long (R10)."""
    process = await boot(store)
    refused = [Fault(Outcome.REFUSED), Fault(Outcome.LOST)] * 20
    store.plan("list_keys", *refused, key=EPOCH)
    async with process.running():
        for _ in range(3):
            await process.append()
            await trio.sleep(5)
            assert process.acks == []
            assert process.tier.statistics().stalled
        await process.wait_acked()
    # The read that was repeated covers what had returned when it was first begun, the next one the rest.
    assert [ack.lsn for ack in process.acks] == [1, 3]
    assert not process.tier.statistics().stalled
    check(process)


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.LOST, Outcome.LATE])
async def test_put_without_a_response(outcome, store, autojump_clock):
    """A PUT whose outcome is unknown is repeated until it is known; the object stands once (R11)."""
    process = await boot(store)
    store.plan("put_new", *[Fault(outcome, late_s=0.1)] * 3, key=WAL)
    async with process.running():
        await process.append(5)
        await process.wait_acked()
    check(process)
    assert len(process.chain()) == 1


async def test_key_that_exists_and_cannot_be_read_yet(store, autojump_clock):
    """A store that says "exists" of a put which is still under way is asked again."""
    process = await boot(store)
    store.plan("put_new", Fault(Outcome.LOST), key=WAL)
    real = store.get
    misses = [KeyError("n/wal"), KeyError("n/wal")]

    async def get(key):
        if misses:
            raise misses.pop()
        return await real(key)

    store.get = get
    async with process.running():
        await process.append()
        await process.wait_acked()
    assert misses == []
    check(process)


async def test_other_bytes_under_our_key(store, autojump_clock):
    """An object of ours that holds other bytes is damage, named, and not acked."""
    process = await boot(store)
    key = f"{WAL}0000000001/0000000000000001.wal"
    store.objects[key] = b"something else"
    with pytest.raises(ExceptionGroup) as ended:
        await append_and_wait(process)
    assert ended.group_contains(DataCorruption, match=key, depth=None)
    assert process.acks == []


async def test_outage_of_minutes(store, autojump_clock):
    """An outage holds acks back and costs bounded memory; then everything is acked, in order."""
    process = await boot(store, uploads=3, linger_s=0.05, bytes=64 * KIB)
    async with process.running():
        await process.append()
        await process.wait_acked()
        store.away = True
        for _ in range(60):
            await process.append(2, size=8 * KIB)
            await trio.sleep(5)
            found = process.tier.statistics()
            assert found.uploading <= 3
        assert found.stalled
        assert found.pending_bytes > 60 * 2 * 8 * KIB - 4 * 2 * 64 * KIB
        assert len(process.acks) == 1
        asked = len(store.requests)
        await trio.sleep(60)
        assert len(store.requests) - asked <= 3 * 60 / 2.5, "with pauses that grew"
        store.away = False
        await process.wait_acked()
    check(process)
    found = process.tier.statistics()
    assert (found.pending_bytes, found.uploading, found.stalled) == (0, 0, False)


# -- when an upload starts ------------------------------------------------------------------------


async def test_linger_gathers(store, autojump_clock):
    """What arrives within ``linger_s`` of the first goes in one object; the linger is not begun anew."""
    process = await boot(store, linger_s=10.0)
    begun = trio.current_time()
    async with process.running():
        for _ in range(4):
            await process.append()
            await trio.sleep(3)
        await process.wait_acked()
    puts = store.of("put_new", WAL)
    assert [put.begun_s - begun for put in puts] == [10.0]
    assert read_back(process.chain()) == [1, 2, 3, 4]


async def test_size_starts_an_upload(store, autojump_clock):
    """As many bytes as an object should have wait for nothing."""
    process = await boot(store, linger_s=60.0, bytes=64 * KIB)
    begun = trio.current_time()
    async with process.running():
        await process.append(size=60 * KIB)
        await trio.sleep(1)
        assert store.of("put_new", WAL) == []
        await process.append(size=10 * KIB)
        await process.wait_acked()
        assert trio.current_time() - begun == 1.0
    check(process)


async def test_objects_are_cut_by_size(store, autojump_clock):
    """A backlog goes in objects of about ``bytes``, none above that and one group more."""
    process = await boot(store, bytes=64 * KIB)
    for _ in range(40):
        await process.append(2, size=10 * KIB)
    async with process.running():
        await process.wait_acked()
    sizes = [len(store.objects[key]) for key in process.bench.wal_keys()]
    assert all(64 * KIB <= size <= 64 * KIB + 24 * KIB for size in sizes[:-1])
    assert len(sizes) > 8
    check(process)


async def test_group_above_the_size_is_one_object(store, autojump_clock):
    """A group is never split: frames are uploaded with the GROUP frame before them."""
    process = await boot(store, bytes=64 * KIB)
    async with process.running():
        await process.append(10, size=50 * KIB)
        await process.wait_acked()
    assert len(process.chain()) == 1
    check(process)


async def test_nothing_goes_up_before_there_is_an_epoch(store, autojump_clock):
    """What is submitted before the store was reached waits; then what the chain lacks is uploaded, in order."""
    bench = Bench(store, linger_s=0.0)
    first = await bench.boot()
    async with first.running():
        await first.append(3)
        await first.wait_acked()
    lease, head = first.lease, bench.newest_ref()
    second = Process(bench, lease)
    second.writer = first.writer
    bench.newest = second
    for found in bench.ranges:
        second.tier.submit_recovered(found)
    async with second.running():
        await second.append(2)
        await trio.sleep(100)
        assert second.acked_lsn == 0
        assert len(bench.wal_keys()) == 1
        second.tier.connect(lease, head)
        await second.wait_acked()
    assert read_back(second.chain()) == [1, 2, 3, 4, 5]


async def test_hurry(store, autojump_clock):
    """Nobody who waits for an ack waits for company, before or after frames arrived."""
    process = await boot(store, linger_s=60.0)
    begun = trio.current_time()
    async with process.running():
        await process.append()
        await trio.sleep(1)
        process.tier.hurry()
        await process.wait_acked()
        assert trio.current_time() - begun == 1.0
        await process.append()
        await process.wait_acked()
        assert trio.current_time() - begun == 61.0, "a hurry is over once what there was is up"
    check(process)


async def test_hurry_holds_for_all_that_is_pending(store, autojump_clock):
    """Who hurries waits for none of the objects that what is pending goes in, across segments too."""
    process = await boot(store, linger_s=60.0, segment_bytes=64 * KIB)
    begun = trio.current_time()
    for _ in range(6):
        await process.append(size=30 * KIB)
    async with process.running():
        process.tier.hurry()
        await process.wait_acked()
    assert trio.current_time() == begun
    assert len(process.chain()) > 2
    check(process)


async def test_full_segment_waits_for_no_company(store, autojump_clock):
    """Frames that nothing can join any more, their segment being full, are uploaded at once."""
    process = await boot(store, linger_s=60.0, segment_bytes=64 * KIB)
    async with process.running():
        await process.append(size=40 * KIB)
        await trio.sleep(1)
        await process.append(size=40 * KIB)
        await trio.sleep(1)
        assert [ack.lsn for ack in process.acks] == [1]
        await process.wait_acked()
    check(process)


# -- what goes in an object -----------------------------------------------------------------------


async def test_ranges_and_tables_are_joined(store, autojump_clock):
    """Groups of one segment go in one object, with each table at each schema that they use, once (R24)."""
    tables = [make_table(1), make_table(2), make_table(1, schema_id=1)]
    process = await boot(store, linger_s=1.0)
    for number in (0, 1, 0, 2, 1, 2, 0):
        await process.append(table=tables[number])
    await process.append_control()
    async with process.running():
        await process.wait_acked()
    (found,) = process.chain()
    assert read_back([found]) == list(range(1, 9))
    kinds = [frame.kind for _, frame in found.frames()]
    assert kinds[:4] == [2, 2, 2, 6], "three tables, then the first group"
    section = found.header.table_bytes
    defined = [(f.table_uuid, f.schema_id) for offset, f in found.frames() if offset < 192 + section]
    assert sorted(defined) == sorted((t.uuid.bytes, t.schema_id) for t in tables)


async def test_object_holds_frames_of_one_segment(store, autojump_clock):
    """An object never spans segments: one seed holds for all of its frames (R8)."""
    process = await boot(store, linger_s=1.0, segment_bytes=64 * KIB)
    for _ in range(8):
        await process.append(2, size=11 * KIB)
    async with process.running():
        await process.wait_acked()
    segments = [found.header.segment for found in process.chain()]
    assert segments == sorted(set(segments))
    assert len(segments) > 2
    check(process)


async def test_gaps_in_lsns_are_no_breaks(store, autojump_clock):
    """Contiguous means the chain: LSNs that were never given leave no hole (R2, R11)."""
    process = await boot(store)
    async with process.running():
        for gap in (0, 1000, 5):
            await process.append(2, gap=gap)
            await process.wait_acked()
    check(process, [1, 2, 1003, 1004, 1010, 1011])


async def test_only_rising_ranges_are_taken(store, autojump_clock):
    """A range that was submitted before is a bug of the caller, said aloud."""
    process = await boot(store)
    await process.append(3)
    with pytest.raises(InternalError, match="LSN 3 was submitted after 3"):
        process.tier.submit(process.bench.ranges[0])


# -- several at a time ----------------------------------------------------------------------------


async def test_uploads_that_finish_out_of_order(store, autojump_clock):
    """PUTs run in parallel and may return in any order: acks go by the contiguous prefix."""
    gates = [trio.Event() for _ in range(4)]
    process = await boot(store, uploads=4, bytes=64 * KIB)
    for lsn, gate in enumerate(gates, 1):
        store.plan("put_new", Fault(reply_gate=gate), key=f"/{lsn:016d}.wal")
    async with process.running():
        for _ in range(4):
            await process.append(size=64 * KIB)
        await trio.sleep(1)
        assert process.tier.statistics().uploading == 4
        seen = []
        for number in (3, 1, 0, 2):
            gates[number].set()
            await trio.sleep(1)
            seen.append([ack.lsn for ack in process.acks])
    assert seen == [[], [], [2], [2, 4]]
    check(process)


@pytest.mark.parametrize("uploads", [1, 3])
async def test_at_most_so_many_objects_beyond_the_acknowledged(uploads, store, autojump_clock):
    """However many PUTs returned: no more than ``uploads`` objects lie beyond the acknowledged prefix."""
    gate = trio.Event()
    process = await boot(store, uploads=uploads, bytes=64 * KIB)
    store.plan("put_new", Fault(gate=gate), key="/0000000000000001.wal")
    async with process.running():
        for _ in range(uploads * 3):
            await process.append(size=64 * KIB)
        await trio.sleep(10)
        assert len(process.bench.wal_keys()) == uploads - 1
        assert len(store.of("put_new", WAL)) == uploads
        gate.set()
        await process.wait_acked()
    check(process)


async def test_returned_puts_hold_their_slots_until_the_epoch_was_read(store, autojump_clock):
    """Objects in the store count as beyond the prefix until the read that covers them."""
    gate = trio.Event()
    process = await boot(store, uploads=2, bytes=64 * KIB)
    store.plan("list_keys", Fault(gate=gate), key=EPOCH)
    async with process.running():
        for _ in range(6):
            await process.append(size=64 * KIB)
        await trio.sleep(10)
        assert len(process.bench.wal_keys()) == 2
        gate.set()
        await process.wait_acked()
    check(process)


# -- its end --------------------------------------------------------------------------------------


async def test_segment_that_cannot_be_read_ends_the_tier(store, autojump_clock):
    """A segment that is gone or short is an error of the disk, not an outage: it is not retried for ever."""
    process = await boot(store)

    async def fail(path, start, end):
        raise OSError("short")

    process.tier._read_range = fail
    with pytest.raises(ExceptionGroup) as ended:
        await append_and_wait(process)
    assert ended.group_contains(OSError, match="short", depth=None)
    assert process.acks == []


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the task steps for the k-th time since it was made."""

    def __init__(self, scope, step):
        self.scope, self.left = scope, step

    def before_task_step(self, task):
        self.left -= 1
        if self.left == 0:
            self.scope.cancel()


@pytest.mark.parametrize("first", range(0, 120, 20))
async def test_cancelled_at_any_step(first, autojump_clock):
    """Cancelled at the k-th step of anything: no ack without its read, and the next start goes on from the chain."""
    for step in range(first, first + 20):
        store = SimStore(random.Random(step), max_delay_s=0.3)
        process = await boot(store, uploads=3, bytes=64 * KIB)
        for _ in range(4):
            await process.append(2, size=33 * KIB)
        with trio.CancelScope() as scope:
            instrument = CancelAt(scope, step + 1)
            trio.lowlevel.add_instrument(instrument)
            try:
                async with process.running():
                    await process.wait_acked()
            finally:
                trio.lowlevel.remove_instrument(instrument)
        check(process)
        store.calm()
        again = await process.bench.boot()
        async with again.running():
            await again.append()
            await again.wait_acked()
        assert sorted(set(read_back(again.chain()))) == list(range(1, 10))
