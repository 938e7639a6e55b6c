"""Keys of rows: their hashes, and which row of several with one key stands."""

from __future__ import annotations

import datetime
import decimal
import random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka._core.rowkeys import (
    DROPPED,
    HASH_BYTES,
    IF_ABSENT,
    REMOVES,
    REPLACES,
    hash_keys,
    is_key_type,
    settle,
)

SECRET = bytes(range(16))

KEYS = {
    "bool": pa.array([True, False, True]),
    "int": pa.array([1, -1, 2**31 - 1], pa.int32()),
    "long": pa.array([1, -1, 2**63 - 1], pa.int64()),
    "date": pa.array([datetime.date(1969, 1, 1), datetime.date(2026, 1, 1), datetime.date(1, 1, 1)]),
    "time": pa.array([0, 1, 2], pa.time64("us")),
    "timestamp": pa.array([0, -1, 2], pa.timestamp("us", "UTC")),
    "decimal": pa.array([decimal.Decimal("1.50"), decimal.Decimal("-1.50"), decimal.Decimal("0.00")]),
    "string": pa.array(["", "a", "ä" * 1000]),
    "large_string": pa.array(["", "a", "b"], pa.large_utf8()),
    "binary": pa.array([b"", b"\0", b"\0\0"]),
    "large_binary": pa.array([b"", b"\0", b"\0\0"], pa.large_binary()),
    "fixed": pa.array([b"abc", b"abd", b"\0\0\0"], pa.binary(3)),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16), SECRET, b"x" * 16], pa.binary(16))),
}


def hashes_of(*columns: pa.Array) -> list[bytes]:
    found = bytes(hash_keys(columns, SECRET))
    return [found[at : at + HASH_BYTES] for at in range(0, len(found), HASH_BYTES)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, "da87c1d86b99af44347659119b22fc45"), (15, "5493e99933b0a8117e08ec0f97cfc3d9")],
)
def test_vectors(size: int, expected: str) -> None:
    """The hash is SipHash-2-4 with 128 bits: two of its authors' test vectors."""
    assert hashes_of(pa.array([bytes(range(size))], pa.binary(size)))[0].hex() == expected


@pytest.mark.parametrize("name", KEYS)
def test_equal_values_alone_share_a_hash(name: str) -> None:
    """Each type: rows are told apart by their values, wherever the array's buffers begin."""
    array = KEYS[name]
    assert is_key_type(array.type)
    found = hashes_of(array)
    assert [one == other for one in found for other in found] == [
        one == other for one in array.to_pylist() for other in array.to_pylist()
    ]
    padded = pa.concat_arrays([array[1:2], array, array[:1]])
    assert hashes_of(padded[1:4]) == found


@given(st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=3), st.booleans()), max_size=30))
def test_columns_do_not_flow_into_one_another(rows: list[tuple[str, bytes, bool]]) -> None:
    """Composite keys are equal where all their columns are."""
    columns = [pa.array([row[i] for row in rows], kind) for i, kind in enumerate((pa.utf8(), pa.binary(), pa.bool_()))]
    assert len(set(hashes_of(*columns))) == len(set(rows))


def test_widening_keeps_keys() -> None:
    """A column widened from int to long keeps its keys; so do the large types' rows."""
    assert hashes_of(KEYS["int"]) == hashes_of(KEYS["int"].cast(pa.int64()))
    assert hashes_of(KEYS["string"]) == hashes_of(KEYS["string"].cast(pa.large_utf8()))
    assert hashes_of(KEYS["binary"]) == hashes_of(KEYS["binary"].cast(pa.large_binary()))


def test_secrets_and_orders_matter() -> None:
    """Another secret or another order of the columns gives other hashes."""
    int_, string = KEYS["int"], KEYS["string"]
    assert bytes(hash_keys([int_], SECRET)) != bytes(hash_keys([int_], bytes(16)))
    assert hashes_of(int_, string) != hashes_of(string, int_)


def test_refusals() -> None:
    """What cannot be a key's column is an error that says why."""
    with pytest.raises(ValueError, match="1 nulls"):
        hash_keys([pa.array([1, None])], SECRET)
    with pytest.raises(ValueError, match="has 1 rows, its first column 2"):
        hash_keys([pa.array([1, 2]), pa.array([1])], SECRET)
    with pytest.raises(ValueError, match="type double"):
        hash_keys([pa.array([1.5])], SECRET)
    with pytest.raises(ValueError, match="at least one column"):
        hash_keys([], SECRET)
    with pytest.raises(ValueError, match="expected 16"):
        hash_keys([pa.array([1])], b"short")
    assert not any(map(is_key_type, (pa.float32(), pa.float64(), pa.list_(pa.int64()), pa.struct([]))))
    assert len(hash_keys([pa.array([], pa.int64())], SECRET)) == 0


def oracle(keys: list[int], deletes: list[bool], *, first: bool) -> list[int]:
    """What ``settle`` should say, by going through a dictionary."""
    standing: dict[int, tuple[int, int]] = {}
    for row, (key, delete) in enumerate(zip(keys, deletes, strict=True)):
        known = standing.get(key)
        if delete:
            standing[key] = (row, REMOVES)
        elif known is None:
            standing[key] = (row, IF_ABSENT if first else REPLACES)
        elif not first or known[1] == REMOVES:
            standing[key] = (row, REPLACES)
    verdicts = [DROPPED] * len(keys)
    for row, verdict in standing.values():
        verdicts[row] = verdict
    return verdicts


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("distinct", [1, 3, 100, 10_000])
def test_settle(first: bool, distinct: int) -> None:
    """One row of each key stands: the last, or the first since the last delete."""
    pick = random.Random(f"{first} {distinct}")
    for count in (0, 1, 2, 63, 64, 65, 5_000):
        keys = [pick.randrange(distinct) for _ in range(count)]
        deletes = [pick.random() < 0.3 for _ in range(count)]
        verdicts = settle(hash_keys([pa.array(keys, pa.int64())], SECRET), bytes(deletes), first=first)
        assert list(verdicts) == oracle(keys, deletes, first=first)


def test_settle_refuses_lengths() -> None:
    """Hashes and deletes belong together."""
    with pytest.raises(ValueError, match="17 bytes of hashes for 1 rows"):
        settle(bytes(17), bytes(1), first=False)
