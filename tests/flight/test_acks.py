"""Acks: for any interleaving of writes, rises and budgets the client sees what protocol 3 promises."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arka.errors import ErrorCode
from arka.flight.acks import AckForm, AckQueue
from arka.records import Tier
from arka.tiers.watermarks import Advance


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def fields(message: bytes) -> dict[int, bytes]:
    """The length-delimited fields of one protobuf message."""
    out, at = {}, 0
    while at < len(message):
        tag, at = _varint(message, at)
        assert tag & 7 == 2
        length, at = _varint(message, at)
        out[tag >> 3] = message[at : at + length]
        at += length
    assert at == len(message)
    return out


def messages(data: bytes) -> list[dict[int, bytes]]:
    """The gRPC messages in ``data``, each as its fields."""
    out, at = [], 0
    while at < len(data):
        assert data[at] == 0
        length = int.from_bytes(data[at + 1 : at + 5], "big")
        out.append(fields(data[at + 5 : at + 5 + length]))
        at += 5 + length
    assert at == len(data)
    return out


def acks(data: bytes, number: int = 3) -> list[dict[str, object]]:
    return [json.loads(message[number]) for message in messages(data) if number in message]


def drain(queue: AckQueue, budget: int = 1 << 20) -> list[dict[str, object]]:
    out = []
    while data := queue.take(budget):
        out += acks(data)
    return out


def test_one_write_reaches_every_tier() -> None:
    """A write that asked for the last tier has one ack per tier, in order, each when the tier has it."""
    queue = AckQueue()
    assert queue.settled
    assert queue.accept(5, 10, Tier.ICEBERG_COMMITTED) == 0
    (memory,) = drain(queue)
    assert memory["durability_level"] == "memory"
    assert (memory["lsn"], memory["sequence"], memory["rows"], memory["error"]) == (5, 0, 10, None)
    queue.advance(Advance(Tier.ICEBERG_COMMITTED, 9, 400, 2**62))
    assert drain(queue) == []
    queue.advance(Advance(Tier.OBJECT_STORAGE, 5, 300))
    queue.advance(Advance(Tier.DISK, 7, 200))
    assert not queue.settled
    told = drain(queue)
    assert [(a["durability_level"], a["timestamp_us"]) for a in told] == [
        ("disk", 200),
        ("object_storage", 300),
        ("iceberg_committed", 400),
    ]
    assert told[-1]["snapshot_id"] == str(2**62)
    assert queue.settled
    assert queue.unsent == 0


def test_timestamp_is_the_first_rise_that_covers_the_write() -> None:
    """An ack that goes out late says when the tier was reached, not when it was sent."""
    queue = AckQueue()
    for lsn in (1, 2, 3):
        queue.accept(lsn, 1, Tier.DISK)
    queue.advance(Advance(Tier.DISK, 1, 100))
    queue.advance(Advance(Tier.DISK, 3, 300))
    told = [a for a in drain(queue) if a["durability_level"] == "disk"]
    assert [a["timestamp_us"] for a in told] == [100, 300, 300]


def test_rejection_takes_its_turn() -> None:
    """A rejected write is told in sequence, once, with lsn 0, and does not hold up later writes."""
    queue = AckQueue()
    queue.accept(1, 1, Tier.DISK)
    queue.reject(ErrorCode.INVALID_BATCH, "column 'a' has \"nulls\"")
    queue.accept(2, 1, Tier.DISK)
    told = drain(queue)
    assert [a["sequence"] for a in told] == [0, 1, 2]
    assert told[1] == {
        "lsn": 0,
        "durability_level": "memory",
        "timestamp_us": told[1]["timestamp_us"],
        "error": "column 'a' has \"nulls\"",
        "sequence": 1,
        "code": "invalid_batch",
    }
    queue.advance(Advance(Tier.DISK, 2, 50))
    assert [(a["sequence"], a["durability_level"]) for a in drain(queue)] == [(0, "disk"), (2, "disk")]
    assert queue.settled


def test_duplicate_carries_the_first_lsn_and_keeps_its_place() -> None:
    """A duplicate's ack for a tier comes when its first write and all earlier writes of the stream have it."""
    queue = AckQueue()
    queue.accept(8, 1, Tier.DISK)
    queue.duplicate(3, 1, Tier.DISK, None)
    queue.duplicate(4, 1, Tier.DISK, ErrorCode.KEY_REUSED)
    drain(queue)
    queue.advance(Advance(Tier.DISK, 7, 50))
    assert drain(queue) == []
    queue.advance(Advance(Tier.DISK, 8, 60))
    told = drain(queue)
    assert [(a["sequence"], a["lsn"], a.get("duplicate"), a.get("code")) for a in told] == [
        (0, 8, None, None),
        (1, 3, True, None),
        (2, 4, True, "key_reused"),
    ]


def test_failure_ends_only_open_writes() -> None:
    """After a failure each open write gets one error ack in order; settled and later writes are untouched."""
    queue = AckQueue()
    queue.accept(1, 1, Tier.MEMORY)
    queue.accept(2, 1, Tier.DISK)
    queue.accept(3, 1, Tier.ICEBERG_COMMITTED)
    queue.advance(Advance(Tier.DISK, 2, 50))
    drain(queue)
    queue.accept(4, 1, Tier.DISK)
    queue.fail(ErrorCode.TABLE_DROPPED, "gone")
    told = drain(queue)
    assert [(a["sequence"], a["lsn"], a["error"]) for a in told] == [(3, 4, None), (2, 3, "gone"), (3, 4, "gone")]
    assert queue.settled
    queue.reject(ErrorCode.TABLE_DROPPED, "gone")
    assert [a["sequence"] for a in drain(queue)] == [4]
    assert queue.settled


def test_watermark_mode_tells_only_the_latest() -> None:
    """acks=watermark gives one ack per tier at a time; duplicates and rejections still get their own."""
    queue = AckQueue()
    queue.coalesce = True
    for lsn in range(1, 101):
        queue.accept(lsn, 1, Tier.DISK)
    queue.reject(ErrorCode.INVALID_BATCH, "bad")
    queue.accept(101, 1, Tier.DISK)
    queue.advance(Advance(Tier.DISK, 101, 70))
    assert [(a["durability_level"], a["sequence"]) for a in drain(queue)] == [
        ("memory", 99),
        ("memory", 100),
        ("memory", 101),
        ("disk", 101),
    ]
    assert queue.settled


def test_batch_form_sends_a_schema_first_and_put_form_uses_put_result() -> None:
    """ack_as=batch is a readable record-batch stream; DoPut's acks are PutResults."""
    import pyarrow as pa

    queue = AckQueue()
    queue.form = AckForm.BATCH
    queue.accept(1, 1, Tier.MEMORY)
    queue.accept(2, 1, Tier.MEMORY)
    first, second, third = messages(queue.take(1 << 20))
    assert 3 not in first
    schema = pa.ipc.read_schema(pa.py_buffer(_encapsulated(first[2])))
    for message in (second, third):
        batch = pa.ipc.read_record_batch(pa.py_buffer(_encapsulated(message[2])), schema)
        assert batch.num_rows == 0
        assert json.loads(message[3])["durability_level"] == "memory"

    queue = AckQueue()
    queue.form = AckForm.PUT_RESULT
    queue.accept(1, 1, Tier.MEMORY)
    assert [a["lsn"] for a in acks(queue.take(1 << 20), number=1)] == [1]


def _encapsulated(header: bytes) -> bytes:
    padded = header + b"\0" * (-len(header) % 8)
    return b"\xff\xff\xff\xff" + len(padded).to_bytes(4, "little") + padded


def test_handshake_stands_outside_the_order() -> None:
    """resume_after_lsn is answered by one ack per tier with sequence -1, before anything else."""
    queue = AckQueue()
    queue.accept(9, 1, Tier.MEMORY)
    queue.handshake({Tier.MEMORY: 8, Tier.DISK: 7, Tier.OBJECT_STORAGE: 6, Tier.ICEBERG_COMMITTED: 0})
    assert [(a["sequence"], a["lsn"]) for a in drain(queue)] == [(-1, 8), (-1, 7), (-1, 6), (-1, 0), (0, 9)]


@pytest.mark.parametrize("requested_only", [False, True], ids=["each", "requested"])
@pytest.mark.parametrize("form", [AckForm.METADATA, AckForm.PUT_RESULT])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_interleaving_keeps_the_order_rules(form: AckForm, requested_only: bool, data: st.DataObject) -> None:
    """Each write gets each of its acks exactly once, never skipped, never out of order, never early."""
    queue = AckQueue()
    queue.form = form
    queue.requested_only = requested_only
    number = 3 if form is AckForm.METADATA else 1
    marks = dict.fromkeys(Tier, 0)
    writes: list[tuple[str, int, Tier]] = []
    seen: list[dict[str, object]] = []
    lsn = 0

    def look(budget: int) -> None:
        out = queue.take(budget)
        for ack in acks(out, number):
            kind, write_lsn, requested = writes[int(ack["sequence"])]
            tier = Tier.parse(str(ack["durability_level"]))
            if kind == "reject":
                assert ack["error"]
            else:
                assert ack["lsn"] == write_lsn
                assert tier <= requested
                assert tier is Tier.MEMORY or marks[tier] >= write_lsn
            seen.append(ack)

    for _ in range(data.draw(st.integers(0, 60))):
        step = data.draw(st.sampled_from(["accept", "accept", "reject", "duplicate", "rise", "take"]))
        requested = data.draw(st.sampled_from(list(Tier)))
        if step == "accept":
            lsn += data.draw(st.integers(1, 3))
            queue.accept(lsn, 1, requested)
            writes.append((step, lsn, requested))
        elif step == "reject":
            queue.reject(ErrorCode.INVALID_BATCH, "no")
            writes.append((step, 0, Tier.MEMORY))
        elif step == "duplicate" and lsn:
            first = data.draw(st.integers(1, lsn))
            queue.duplicate(first, 1, requested, None)
            writes.append((step, first, requested))
        elif step == "rise":
            tier = data.draw(st.sampled_from([Tier.DISK, Tier.OBJECT_STORAGE, Tier.ICEBERG_COMMITTED]))
            marks[tier] = max(marks[tier], data.draw(st.integers(0, lsn)))
            queue.advance(Advance(tier, marks[tier], 5))
        else:
            look(data.draw(st.integers(1, 400)))
    for tier in list(Tier)[1:]:
        marks[tier] = lsn
        queue.advance(Advance(tier, lsn, 9))
    while not queue.settled:
        before = len(seen)
        look(100)
        assert len(seen) > before or (requested_only and not queue.due)
    for sequence, (kind, _, requested) in enumerate(writes):
        own = [a["durability_level"] for a in seen if a["sequence"] == sequence]
        told = [tier.word for tier in Tier if tier == requested or (tier < requested and not requested_only)]
        expected = ["memory"] if kind == "reject" else told
        assert own == expected
    for tier in Tier:
        order = [a["sequence"] for a in seen if a["durability_level"] == tier.word]
        assert order == sorted(order)


def test_requested_mode_tells_the_requested_tier_alone() -> None:
    """Of each write one ack; a duplicate has its own at its tier, a rejection at once."""
    queue = AckQueue()
    queue.requested_only = True
    queue.accept(4, 1, Tier.ICEBERG_COMMITTED)
    queue.accept(5, 1, Tier.MEMORY)
    queue.duplicate(2, 1, Tier.DISK, None)
    queue.reject(ErrorCode.INVALID_BATCH, "no")
    queue.accept(6, 1, Tier.DISK)
    queue.accept(7, 1, Tier.OBJECT_STORAGE)

    def told() -> list[tuple[object, object]]:
        return [(ack["sequence"], ack["durability_level"]) for ack in drain(queue)]

    assert told() == [(1, "memory"), (3, "memory")]
    queue.advance(Advance(Tier.DISK, 6, 1))
    assert told() == [(2, "disk"), (4, "disk")]
    queue.advance(Advance(Tier.DISK, 7, 1))
    assert told() == []
    assert not queue.due
    queue.advance(Advance(Tier.ICEBERG_COMMITTED, 5, 2, 77))
    assert told() == [(0, "iceberg_committed")]
    queue.advance(Advance(Tier.OBJECT_STORAGE, 7, 3))
    assert told() == [(5, "object_storage")]
    assert queue.settled


def test_requested_mode_ends_open_writes_with_an_error() -> None:
    """An error reaches each write that has not had its one ack, and no other."""
    queue = AckQueue()
    queue.requested_only = True
    queue.accept(1, 1, Tier.MEMORY)
    queue.accept(2, 1, Tier.DISK)
    queue.accept(3, 1, Tier.ICEBERG_COMMITTED)
    queue.advance(Advance(Tier.DISK, 3, 1))
    assert [ack["sequence"] for ack in drain(queue)] == [0, 1]
    queue.fail(ErrorCode.TABLE_DROPPED, "gone")
    assert [(ack["sequence"], ack["code"]) for ack in drain(queue)] == [(2, "table_dropped")]
    assert queue.settled


def test_a_million_unread_acks_stay_small() -> None:
    """Unsent acks are state, not bytes: a million writes in flight cost less than 50 MB."""
    import tracemalloc

    tracemalloc.start()
    queue = AckQueue()
    for lsn in range(1, 1_000_001):
        queue.accept(lsn, 1, Tier.DISK)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 50_000_000
    assert queue.unread == 1_000_000
