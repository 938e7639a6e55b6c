"""Idempotency keys: kept from the write until retention after its commit has passed, and never more than may be."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from arka._core.keys import ENTRY_BYTES
from arka.errors import AdmissionRejected
from arka.tiers.keys import KeyedWrite, KeyIndex, pack_entry

#: Microseconds of a second.
S = 1_000_000


def index(retention_s: float = 100.0, limit: int = 1000) -> KeyIndex:
    return KeyIndex(retention_s, limit=limit)


def lsns(keys: KeyIndex, through_lsn: int) -> list[int]:
    """The LSNs of the uncovered entries."""
    packed = b"".join(entries for _, entries in keys.uncovered(through_lsn))
    return [int.from_bytes(packed[at + 16 : at + 24], "little") for at in range(0, len(packed), ENTRY_BYTES)]


def test_retention_counts_from_the_commit() -> None:
    """A key never goes before its write is committed, and goes a retention after that (R21)."""
    keys, table = index(), uuid4()
    keys.insert(table, b"a", 1, 7)
    keys.insert(table, b"b", 5, 8)
    keys.note_committed(table, 1, 1_000 * S)
    keys.note_committed(table, 1, 1_100 * S - 1)
    assert keys.find(table, b"a") == KeyedWrite(1, 7)
    keys.note_committed(table, 1, 1_100 * S)
    assert keys.find(table, b"a") is None
    keys.expire(10**15)
    assert keys.find(table, b"b") == KeyedWrite(5, 8)
    assert len(keys) == 1


async def test_keys_of_a_table_that_rests_expire() -> None:
    """A key goes when its time has come, also where no commit comes any more; each table gets its turn (R21)."""
    keys, tables = index(), [uuid4(), uuid4()]
    for lsn, table in enumerate(tables, 1):
        keys.insert(table, b"a", lsn, 7)
        keys.note_committed(table, lsn, lsn * S)
    keys.expire(101 * S)
    assert [keys.find(table, b"a") for table in tables] == [None, KeyedWrite(2, 7)]
    assert await keys.first_lsn() == 2
    keys.expire(102 * S)
    assert len(keys) == 0
    assert await keys.first_lsn() is None


def test_many_keys_expire_in_pieces() -> None:
    """However many keys expire at once, one call forgets a bounded number of them, and says that there are more."""
    keys, table, count = index(), uuid4(), 50_000
    for lsn in range(1, count + 1):
        keys.insert(table, b"%d" % lsn, lsn, 0)
    keys.note_committed(table, count, 0)
    held, more = count, True
    while more:
        assert held - len(keys) <= 4_000
        held, more = len(keys), keys.expire(100 * S)
    assert held > len(keys) == 0


def test_a_dropped_table_goes_in_pieces_and_is_not_known_meanwhile() -> None:
    """A drop of many keys, of all or up to an LSN, is true at once; their memory goes step by step."""
    keys, whole, part, count = index(), uuid4(), uuid4(), 50_000
    for lsn in range(1, count + 1):
        keys.insert(whole, b"%d" % lsn, 2 * lsn, 0)
        keys.insert(part, b"%d" % lsn, 2 * lsn + 1, 0)
    keys.drop_table(whole)
    keys.drop_table(part, count)
    assert [keys.find(whole, b"%d" % n) for n in (1, count // 2, count)] == [None] * 3
    assert [keys.find(part, b"%d" % n) for n in (1, count // 2 - 1)] == [None] * 2
    assert keys.find(part, b"%d" % count) == KeyedWrite(2 * count + 1, 0)
    assert min(lsns(keys, 2**62)) == count + 1
    full, calls = keys.memory_bytes, 1
    while keys.expire(0):
        calls += 1
    assert calls >= 70_000 // 4_000
    assert len(keys) == count // 2 + 1
    assert keys.memory_bytes < full * 0.5


def test_thousands_of_tables_are_looked_at_in_turn() -> None:
    """One call looks at some tables; a round of calls at all of them."""
    keys, tables = index(), [uuid4() for _ in range(1_200)]
    for lsn, table in enumerate(tables, 1):
        keys.insert(table, b"k", lsn, 0)
        keys.note_committed(table, lsn, 0)
    assert keys.expire(100 * S)
    assert 1_200 - len(keys) == 500
    assert keys.expire(100 * S)
    assert not keys.expire(100 * S)
    assert len(keys) == 0


async def test_packed_keys_come_in_pieces() -> None:
    """A checkpoint's keys are packed piece by piece, while others are inserted, expire and are dropped."""
    keys, one, other = index(), uuid4(), uuid4()
    for lsn in range(1, 40_001):
        keys.insert(one, b"%d" % lsn, lsn, 0)
    keys.insert(other, b"k", 40_001, 0)
    pieces = keys.uncovered(50_000)
    sizes = [len(next(pieces)[1]) // ENTRY_BYTES]
    keys.insert(one, b"new", 60_000, 0)
    keys.drop_table(other)
    found = [piece for piece in pieces if piece[1]]
    sizes += [len(packed) // ENTRY_BYTES for _, packed in found]
    assert sizes == [16_384, 16_384, 40_000 - 2 * 16_384]
    assert {table for table, _ in found} == {one}
    assert keys.fresh_bytes >= await keys.uncovered_bytes(2**62)
    await keys.forget_uncovered(50_000)
    assert keys.fresh_bytes == await keys.uncovered_bytes(2**62) == ENTRY_BYTES


async def test_pieces_that_are_out_of_order_are_refused() -> None:
    """Loading in steps finds what loading at once finds, also where one piece ends and the next begins."""
    table = uuid4()
    good = [pack_entry(table, b"%d" % lsn, lsn, 0) for lsn in range(1, 20_000)]
    keys = index()
    await keys.load_steps(table, b"".join(good))
    assert len(keys) == len(good)
    keys = index()
    with pytest.raises(ValueError, match="LSNs must rise"):
        await keys.load_steps(table, b"".join([*good[:16_384], good[5]]))


def test_one_table_does_not_use_up_the_keys_of_others() -> None:
    """While one table has filled the limit, tables with few keys use a reserve; the full one does not."""
    keys, hog, polite = index(limit=800), uuid4(), [uuid4() for _ in range(200)]
    for lsn in range(1, 801):
        assert not keys.full
        keys.insert(hog, b"%d" % lsn, lsn, 0)
    assert keys.full
    assert not keys.spares(hog)
    for lsn, table in enumerate(polite[:100], 801):
        assert keys.spares(table), lsn
        keys.insert(table, b"k", lsn, 0)
    # An eighth of the limit and no more: memory is bounded.
    assert len(keys) == 900
    assert not any(keys.spares(table) for table in polite[100:])
    # Many small ones beside it do not make a middling one look like a hog.
    keys.note_committed(hog, 200, 0)
    keys.expire(100 * S)
    for lsn in range(2_000, 2_300):
        if keys.full and not keys.spares(polite[0]):
            break
        keys.insert(polite[0], b"%d" % lsn, lsn, 0)
    assert len(keys) == 900
    assert not keys.spares(hog)


def test_equal_tables_share_the_limit() -> None:
    """Among tables that hold the same, none goes on at the limit; a new one does."""
    keys, tables = index(limit=800), [uuid4() for _ in range(4)]
    for lsn in range(1, 801):
        keys.insert(tables[lsn % 4], b"%d" % lsn, lsn, 0)
    assert not any(keys.spares(table) for table in tables)
    assert keys.spares(uuid4())


def test_frequent_commits_never_shorten_a_retention() -> None:
    """Commits are remembered in steps; a step lasts 1/256 of the retention, and its keys stay as long as its last."""
    keys, table = index(256.0), uuid4()
    for lsn in range(1, 6):
        keys.insert(table, b"%d" % lsn, lsn, 0)
        keys.note_committed(table, lsn, lsn * S // 4)
    for tenth in range(2_560, 2_600):
        keys.expire(tenth * S // 10)
        for lsn in range(1, 6):
            due_s = lsn / 4 + 256.0
            kept = keys.find(table, b"%d" % lsn) is not None
            assert kept or tenth / 10 >= due_s
            assert not kept or tenth / 10 < due_s + 1.0


def test_keys_belong_to_the_table() -> None:
    """The same key in two tables is two keys; dropping one table forgets its own only."""
    keys, one, other = index(), uuid4(), uuid4()
    keys.insert(one, b"k", 1, 0)
    assert keys.find(other, b"k") is None
    keys.insert(other, b"k", 2, 0)
    keys.drop_table(one)
    assert keys.find(one, b"k") is None
    assert keys.find(other, b"k") == KeyedWrite(2, 0)
    assert len(keys) == 1


def test_a_dropped_table_that_came_back_keeps_its_new_keys() -> None:
    """A drop forgets what lies before it; what a checkpoint says of drops goes with the checkpoints before it."""
    keys, table = index(), uuid4()
    keys.insert(table, b"old", 5, 0)
    keys.insert(table, b"new", 9, 0)
    keys.drop_table(table, 7)
    assert keys.find(table, b"old") is None
    assert keys.find(table, b"new") == KeyedWrite(9, 0)
    assert keys.dropped() == [(table, 7)]
    keys.forget_dropped(6)
    assert keys.dropped() == [(table, 7)]
    keys.forget_dropped(7)
    assert keys.dropped() == []


async def test_a_key_used_again_does_not_hide_the_keys_between() -> None:
    """A key that expired and came again must not keep later keys out of the checkpoint (R12, R21)."""
    keys, table = index(0.0), uuid4()
    keys.insert(table, b"k", 10, 1)
    keys.note_committed(table, 10, 1)
    assert keys.find(table, b"k") is None
    keys.insert(table, b"x", 300, 2)
    keys.insert(table, b"k", 500, 3)
    assert lsns(keys, 400) == [300]
    await keys.forget_uncovered(400)
    assert lsns(keys, 999) == [500]


async def test_a_key_used_again_belongs_to_the_later_write_after_a_restart() -> None:
    """Of two entries of a key, from two checkpoints, the later one counts, and outlives the earlier (R21)."""
    before, table = index(100.0), uuid4()
    before.insert(table, b"k", 10, 1)
    (first,) = (packed for _, packed in before.uncovered(10) if packed)
    await before.forget_uncovered(10)
    before.note_committed(table, 10, 0)
    before.expire(100 * S)
    assert before.find(table, b"k") is None
    before.insert(table, b"k", 500, 2)
    (second,) = (packed for _, packed in before.uncovered(500) if packed)

    after = index(100.0)
    after.load(table, first)
    after.note_committed(table, 10, 0)
    after.load(table, second)
    assert after.find(table, b"k") == KeyedWrite(500, 2)
    after.expire(100 * S)
    assert after.find(table, b"k") == KeyedWrite(500, 2)
    assert len(after) == 1


def test_recovered_entries_are_the_inserted_ones() -> None:
    """What recovery packs from a frame is the key that the write was remembered by; doubles are left out."""
    keys, table = index(), uuid4()
    keys.load(table, pack_entry(table, b"a", 3, 2**32 - 1) + pack_entry(table, b"b", 4, 0))
    keys.load(table, pack_entry(table, b"b", 4, 0) + pack_entry(table, b"c", 2**53 - 1, 1))
    assert keys.find(table, b"a") == KeyedWrite(3, 2**32 - 1)
    assert keys.find(table, b"c") == KeyedWrite(2**53 - 1, 1)
    assert keys.find(uuid4(), b"a") is None
    assert len(keys) == 3


def test_the_hash_of_a_key_never_changes() -> None:
    """Checkpoints hold hashes: another function of key and table would forget every key at an upgrade."""
    packed = pack_entry(UUID(int=0x0123456789ABCDEF), "schlüssel#7".encode(), 1, 2)
    assert packed.hex() == "9cbc6f653e158dca73eb54fbcbaa8bd4010000000000000002000000"


def test_a_full_index_refuses_new_keys_only() -> None:
    """At the limit new keys are told to come back; they may when others have expired."""
    keys, table = index(limit=3), uuid4()
    for lsn in range(1, 4):
        keys.check_room()
        keys.insert(table, b"%d" % lsn, lsn, 0)
    with pytest.raises(AdmissionRejected, match=r"idempotency\.keys.*retry later"):
        keys.check_room()
    assert keys.find(table, b"1") == KeyedWrite(1, 0)
    keys.note_committed(table, 1, 0)
    keys.expire(100 * S)
    keys.check_room()


class KeyIndexMachine(RuleBasedStateMachine):
    """Against plain dicts: a key is found from its insert until a retention after its commit, and later by chance."""

    TABLES = (UUID(int=1), UUID(int=2))
    RETENTION_S = 50.0

    def __init__(self) -> None:
        super().__init__()
        self.keys = index(self.RETENTION_S, limit=10**6)
        self.lsn = self.now_us = self.covered_lsn = 0
        # (table, key) to its write, and the time of its commit.
        self.writes: dict[tuple[UUID, bytes], tuple[int, int]] = {}
        self.committed_us: dict[tuple[UUID, bytes], int] = {}

    @rule(table=st.sampled_from(TABLES), name=st.integers(0, 20), digest=st.integers(0, 3))
    def write(self, table: UUID, name: int, digest: int) -> None:
        key = b"%d" % name
        self.lsn += 1
        found = self.keys.find(table, key)
        if found is not None:
            assert found == self.writes[table, key]
        else:
            # Nothing that has not been committed for that long may be gone.
            if (table, key) in self.writes:
                assert self.committed_us[table, key] + self.RETENTION_S * S <= self.now_us
            self.keys.insert(table, key, self.lsn, digest)
            self.writes[table, key] = (self.lsn, digest)
            self.committed_us.pop((table, key), None)

    @rule(table=st.sampled_from(TABLES))
    def commit(self, table: UUID) -> None:
        for (owner, key), _ in self.writes.items():
            if owner == table:
                self.committed_us.setdefault((owner, key), self.now_us)
        self.keys.note_committed(table, self.lsn, self.now_us)

    @rule(seconds=st.sampled_from([0.05, 1.0, 30.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now_us += int(seconds * S)
        assert not self.keys.expire(self.now_us)

    @rule(back=st.integers(0, 5))
    def checkpoint(self, back: int) -> None:
        through = max(self.lsn - back, self.covered_lsn)
        held = {lsn for (table, key), (lsn, _) in self.writes.items() if self.keys.find(table, key) is not None}
        assert set(lsns(self.keys, through)) == {lsn for lsn in held if self.covered_lsn < lsn <= through}
        assert trio.run(self.keys.uncovered_bytes, through) == ENTRY_BYTES * len(lsns(self.keys, through))
        trio.run(self.keys.forget_uncovered, through)
        self.covered_lsn = through

    @rule(table=st.sampled_from(TABLES))
    def drop(self, table: UUID) -> None:
        self.keys.drop_table(table)
        self.writes = {name: write for name, write in self.writes.items() if name[0] != table}

    @invariant()
    def what_must_be_kept_is(self) -> None:
        found = 0
        for (table, key), write in self.writes.items():
            committed_us = self.committed_us.get((table, key))
            kept = self.keys.find(table, key)
            found += kept is not None
            if committed_us is None or self.now_us < committed_us + self.RETENTION_S * S:
                assert kept == write
            elif self.now_us >= committed_us + (self.RETENTION_S + 61) * S:
                # One step of the retention, and one wait, later.
                assert kept is None
        assert found == len(self.keys)


KeyIndexMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestKeyIndex = KeyIndexMachine.TestCase
