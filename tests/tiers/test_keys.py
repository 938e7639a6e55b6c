"""Idempotency keys: kept from the write until retention after its commit has passed."""

from __future__ import annotations

from uuid import uuid4

from arka.tiers.keys import KeyedWrite, KeyIndex


def test_retention_counts_from_the_commit() -> None:
    """A key never goes before its write is committed, and goes a retention after that (R21)."""
    keys, table = KeyIndex(100.0), uuid4()
    keys.insert(table, b"a", 1, 7)
    keys.insert(table, b"b", 5, 8)
    keys.note_committed(table, 1, 1_000.0)
    keys.note_committed(table, 1, 1_099.0)
    assert keys.find(table, b"a") == KeyedWrite(1, 7)
    keys.note_committed(table, 1, 1_100.0)
    assert keys.find(table, b"a") is None
    assert keys.find(table, b"b") == KeyedWrite(5, 8)
    assert len(keys) == 1


def test_keys_belong_to_the_table() -> None:
    """The same key in two tables is two keys; dropping one table forgets its own only."""
    keys, one, other = KeyIndex(10.0), uuid4(), uuid4()
    keys.insert(one, b"k", 1, 0)
    assert keys.find(other, b"k") is None
    keys.insert(other, b"k", 2, 0)
    keys.drop_table(one)
    assert keys.find(one, b"k") is None
    assert keys.find(other, b"k") == KeyedWrite(2, 0)


def test_a_key_used_again_does_not_hide_the_keys_between() -> None:
    """A key that expired and came again must not keep later keys out of the checkpoint (R12, R21)."""
    keys, table = KeyIndex(0.0), uuid4()
    keys.insert(table, b"k", 10, 1)
    keys.note_committed(table, 10, 1.0)
    assert keys.find(table, b"k") is None
    keys.insert(table, b"x", 300, 2)
    keys.insert(table, b"k", 500, 3)
    assert [(key.key, key.lsn) for key in keys.uncovered(400)] == [(b"x", 300)]
    keys.forget_uncovered(400)
    assert [(key.key, key.lsn) for key in keys.uncovered(999)] == [(b"k", 500)]
