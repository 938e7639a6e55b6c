"""The table of keys, against a plain dict and list: found while held, forgotten oldest first, nothing else ever."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from arka._core.keys import ENTRY_BYTES, HASH_BYTES, MOVED_SLOTS, KeyTable

#: Entries are numbered modulo this.
NUMBERS = 2**32 - 1
ENTRY = struct.Struct("<16sQI")
#: Slots that a look for expired keys moves beside.
IDLE_MOVES = 1024


def hash_at(home: int, number: int, bits: int = 32) -> bytes:
    """A hash whose search begins at slot ``home`` of 2**bits, where the secret is 1."""
    return (home << (64 - bits)).to_bytes(8, "little") + number.to_bytes(8, "little")


@pytest.fixture
def plain_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test choose where a hash's search begins."""
    monkeypatch.setattr(os, "urandom", lambda size: (1).to_bytes(size, "little"))


class Oracle:
    """What a KeyTable is meant to be: a list of entries, searched from its end."""

    def __init__(self) -> None:
        self.entries: list[tuple[bytes, int, int]] = []

    def find(self, hash_: bytes) -> tuple[int, int] | None:
        return next(((lsn, digest) for key, lsn, digest in reversed(self.entries) if key == hash_), None)

    def pack(self, after: int, through: int) -> bytes:
        return b"".join(ENTRY.pack(*entry) for entry in self.entries if after < entry[1] <= through)


#: Few hashes, which come again, many of them with one home or with neighbouring ones at the array's end.
HASHES = st.builds(
    hash_at,
    st.sampled_from([0, 1, 7, 61, 62, 63]) | st.integers(0, 63),
    st.integers(0, 30),
    st.just(6),
)


class KeyTableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.oracle, self.last_lsn = Oracle(), 0

    @initialize(first_number=st.sampled_from([0, 5, NUMBERS - 3, NUMBERS - 1]), secret=st.sampled_from([1, 0x9E3779B1]))
    def make(self, first_number: int, secret: int) -> None:
        kept, os.urandom = os.urandom, lambda size: secret.to_bytes(size, "little")
        try:
            self.table = KeyTable(first_number)
        finally:
            os.urandom = kept

    @rule(hashes=st.lists(HASHES, max_size=60), step=st.integers(1, 3), digest=st.integers(0, 2**32 - 1))
    def insert(self, hashes: list[bytes], step: int, digest: int) -> None:
        for hash_ in hashes:
            self.last_lsn += step
            before = self.table.moves
            self.table.insert(hash_, self.last_lsn, digest)
            assert self.table.moves - before <= MOVED_SLOTS
            self.oracle.entries.append((hash_, self.last_lsn, digest))

    @rule(share=st.floats(0, 1), most=st.none() | st.integers(0, 20))
    def expire(self, share: float, most: int | None) -> None:
        entries = self.oracle.entries
        first = entries[0][1] if entries else 0
        lsn = first + int((self.last_lsn - first) * share)
        count = sum(entry[1] <= lsn for entry in entries)
        before = self.table.moves
        if most is None:
            assert self.table.expire_through(lsn) == count
        else:
            count = min(count, most)
            assert self.table.expire_through(lsn, most) == count
        # A table at rest finishes as well.
        assert self.table.moves - before <= count * MOVED_SLOTS + IDLE_MOVES
        del entries[:count]

    @rule(hashes=st.lists(HASHES, max_size=60), back=st.integers(0, 10))
    def load(self, hashes: list[bytes], back: int) -> None:
        start = max(self.last_lsn - back, 0)
        packed = [(hash_, start + n, n) for n, hash_ in enumerate(hashes, 1)]
        new = [entry for entry in packed if entry[1] > self.last_lsn]
        assert self.table.load(b"".join(ENTRY.pack(*entry) for entry in packed)) == len(new)
        self.oracle.entries += new
        self.last_lsn = new[-1][1] if new else self.last_lsn

    @rule(hash_=HASHES)
    def find(self, hash_: bytes) -> None:
        assert self.table.find(hash_) == self.oracle.find(hash_)

    @rule(after=st.floats(0, 1.2), through=st.floats(0, 1.2))
    def pack(self, after: float, through: float) -> None:
        bounds = int(self.last_lsn * after), int(self.last_lsn * through)
        assert self.table.pack(*bounds) == self.oracle.pack(*bounds)
        assert self.table.count(*bounds) * ENTRY_BYTES == len(self.oracle.pack(*bounds))

    @invariant()
    def agrees(self) -> None:
        entries = self.oracle.entries
        if not hasattr(self, "table"):
            return
        held = {entry[0] for entry in entries}
        assert len(self.table) == len(held)
        assert self.table.first_lsn == (entries[0][1] if entries else None)
        assert self.table.last_lsn == self.last_lsn
        for hash_ in held:
            assert self.table.find(hash_) == self.oracle.find(hash_)


KeyTableMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestKeyTable = KeyTableMachine.TestCase


@pytest.mark.parametrize("first_number", [0, NUMBERS - 1, NUMBERS - 20_000, NUMBERS - 4_096])
def test_a_moving_window(first_number: int) -> None:
    """Over many chunks and past the last number, exactly the keys of the window are found."""
    table, window = KeyTable(first_number), 9_000
    hashes = [os.urandom(HASH_BYTES) for _ in range(40_000)]
    for lsn, hash_ in enumerate(hashes, 1):
        table.insert(hash_, lsn, lsn ^ 0xFFFF)
        if lsn > window:
            assert table.expire_through(lsn - window) == 1
    found = [table.find(hash_) for hash_ in hashes]
    assert found[:-window] == [None] * (len(hashes) - window)
    assert found[-window:] == [(lsn, lsn ^ 0xFFFF) for lsn in range(len(hashes) - window + 1, len(hashes) + 1)]
    assert len(table) == window


@pytest.mark.usefixtures("plain_secret")
@pytest.mark.parametrize("bits", [6, 10, 17, 18])
def test_an_index_grows_and_shrinks_in_steps(bits: int) -> None:
    """No insertion moves more than a few slots, keys are found and forgotten meanwhile, and the old index goes.

    Of 17 bits on, the old index's memory goes back in pieces. Homes come in clusters of up to 40, at both ends too.
    """
    table, size = KeyTable(), 2**bits
    homes = [(n // 40 * 67 % size) << (32 - bits) for n in range(size)]
    hashes = [hash_at(home, n) for n, home in enumerate(homes)]
    grown = size * 2 // 3 - 1
    for lsn, hash_ in enumerate(hashes[:grown], 1):
        table.insert(hash_, lsn, lsn & 0xFF)
    table.expire_through(0), table.expire_through(0)
    most, moved, lsn, oldest = 0, table.moves, grown, 1
    # One that is there already, a new one and the oldest, while everything is on its way.
    while table.moves < moved + size:
        before = table.moves
        lsn += 1
        again = hash_at(homes[lsn % 40], lsn % 40) if lsn % 3 == 0 and lsn % 40 > oldest else hashes[lsn]
        table.insert(again, lsn, lsn & 0xFF)
        most = max(most, table.moves - before)
        assert table.find(again) == (lsn, lsn & 0xFF)
        if lsn % 5 == 0:
            table.expire_through(oldest)
            oldest += 1
        probe = oldest + lsn * 7919 % (grown - oldest)
        assert table.find(hashes[probe]) is not None
        assert table.find(hash_at(homes[probe], probe + 2**40)) is None
    assert 0 < most <= MOVED_SLOTS
    while table.first_lsn is not None:
        assert table.expire_through(lsn, 500) <= 500
    for _ in range(size // IDLE_MOVES + 1):
        table.expire_through(lsn)
    assert len(table) == 0
    assert table.memory_bytes < 64 * 1024 + 8 * 512 + 2**17


@pytest.mark.usefixtures("plain_secret")
@pytest.mark.parametrize("homes", [(63,), (62, 63, 0), (0,), (60, 60, 63, 63, 0, 2)])
@pytest.mark.parametrize("gone", range(1, 30))
def test_clusters_close_their_gaps(homes: tuple[int, ...], gone: int) -> None:
    """Keys that displaced each other, also past the index's end, are found when others before them have gone."""
    hashes = [hash_at(homes[n % len(homes)], n, 6) for n in range(30)]
    table = KeyTable()
    for lsn, hash_ in enumerate(hashes, 1):
        table.insert(hash_, lsn, lsn)
    table.expire_through(gone)
    assert [table.find(hash_) for hash_ in hashes] == [None] * gone + [(n, n) for n in range(gone + 1, 31)]


def test_a_tag_is_no_key() -> None:
    """Two hashes that agree in all that the index keeps of them are two keys."""
    one, other = b"t" * 8 + b"1" * 8, b"t" * 8 + b"2" * 8
    table = KeyTable()
    table.insert(one, 1, 7)
    assert table.find(other) is None
    table.insert(other, 2, 8)
    assert (table.find(one), table.find(other)) == ((1, 7), (2, 8))


def test_a_later_entry_outlives_the_earlier_one() -> None:
    """A hash that comes again is the later write's, also when the earlier entry goes."""
    table, hash_ = KeyTable(), os.urandom(16)
    table.insert(hash_, 10, 1)
    table.insert(hash_, 500, 2)
    assert table.find(hash_) == (500, 2)
    assert table.expire_through(10) == 1
    assert table.find(hash_) == (500, 2)
    assert (len(table), table.first_lsn) == (1, 500)


def test_what_is_packed_loads_again() -> None:
    """``pack`` and ``load`` are each other's inverse, in pieces that overlap as well."""
    table = KeyTable()
    for lsn in range(2, 20_000, 2):
        table.insert(os.urandom(16), lsn, lsn)
    assert len(table.pack(0, 2**64 - 1)) == 9_999 * ENTRY_BYTES
    copy = KeyTable()
    assert copy.load(table.pack(0, 9_000)) == 4_500
    assert copy.load(memoryview(table.pack(5_000, 30_000))) == 5_499
    assert copy.pack(0, 2**53) == table.pack(0, 2**53)
    assert len(copy) == len(table)


def entry(lsn: int) -> bytes:
    return ENTRY.pack(os.urandom(16), lsn, 0)


@pytest.mark.parametrize(
    "bad",
    [
        lambda table: table.insert(b"x" * 16, 10, 0),
        lambda table: table.insert(b"x" * 15, 11, 0),
        lambda table: table.insert(b"x" * 17, 11, 0),
        lambda table: table.find(b""),
        lambda table: table.load(entry(11)[:-1]),
        lambda table: table.load(entry(11) + entry(11)),
        lambda table: table.load(entry(12) + entry(13) + entry(11)),
        lambda table: table.load(entry(0)),
    ],
)
def test_refuses_what_would_break_the_order(bad: Callable[[KeyTable], object]) -> None:
    """Whatever is refused leaves the table as it was."""
    table = KeyTable()
    table.insert(b"k" * 16, 10, 3)
    with pytest.raises(ValueError, match=r"LSNs must rise|16 bytes|whole entries"):
        bad(table)
    assert table.pack(0, 99) == ENTRY.pack(b"k" * 16, 10, 3)
    assert table.last_lsn == 10


def test_memory_is_bounded_and_comes_back() -> None:
    """At most 64 bytes a key, also while a window of keys moves; what expired is given back."""
    table, count = KeyTable(), 100_000
    for lsn in range(1, count + 1):
        table.insert(os.urandom(16), lsn, 0)
    assert table.memory_bytes <= 64 * count
    full = table.memory_bytes
    for lsn in range(count + 1, 3 * count):
        table.insert(os.urandom(16), lsn, 0)
        table.expire_through(lsn - count)
    assert table.memory_bytes <= full * 1.05
    table.expire_through(3 * count)
    assert len(table) == 0
    assert table.memory_bytes < full / 20
