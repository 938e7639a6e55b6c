"""Attacks on what is stored: commits, idempotency keys, primary keys."""

from __future__ import annotations

import pyarrow as pa

from tests.attacks.attacker import Attacker, attack
from tests.attacks.payloads import NUMBERS, numbers_stream, stream_of, write_message


@attack("R32, R35")
def many_tiny_tables(attacker: Attacker) -> None:
    """100 tables with a row every moment: a commit for each, while others wait for theirs."""
    schema, batch = numbers_stream(1)

    def one(_: int) -> None:
        on = attacker.wire()
        tables = [attacker.create(on, [("n", "int64!")]) for _ in attacker.rounds(25)]
        streams = [on.open("DoExchange") for _ in tables]
        for stream_id, table in zip(streams, tables, strict=True):
            on.put(stream_id, write_message(schema, path=(table,)))
        for _ in attacker.rounds():
            for stream_id in streams:
                on.put(stream_id, write_message(batch))
            attacker.pause(0.2)

    attacker.together(4, one)


@attack("R30")
def many_keys(attacker: Attacker) -> None:
    """Idempotency keys of one table, as many as fit: the index grows, others' keys are refused."""
    schema, batch = numbers_stream(1)
    table = attacker.create(attacker.wire(), [("n", "int64!")])
    many = write_message(batch) * 1_000

    def one(number: int) -> None:
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        key = {"idempotency_key": f"{attacker.name()}-{number}", "requested_durability": "memory"}
        on.put(stream_id, write_message(schema, path=(table,)) + write_message(metadata=key))
        for _ in attacker.rounds():
            if not on.put(stream_id, many):
                break
        attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))

    attacker.together(2, one)


@attack("R30, T24")
def long_keys(attacker: Attacker) -> None:
    """Idempotency keys of 256 bytes and more, a new one for each write."""
    schema, batch = numbers_stream(1)
    table = attacker.create(attacker.wire(), [("n", "int64!")])
    on = attacker.wire()
    stream_id = on.open("DoExchange")
    on.put(stream_id, write_message(schema, path=(table,)))
    for number in attacker.rounds():
        size = 240 if number % 10 else 60_000
        key = {"idempotency_key": f"{number}-" + "k" * size}
        if not on.put(stream_id, write_message(batch, metadata=key)):
            break
    attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))


@attack("R32, T23")
def deletes_of_absent_keys(attacker: Attacker) -> None:
    """Deletes of keys that a table does not have, 100,000 in a batch."""
    table = attacker.create(
        attacker.wire(), [("n", "int64!"), ("v", "utf8")], table_type="primary_key", primary_key="n"
    )
    batch = pa.record_batch([pa.array(range(10**12, 10**12 + 100_000), pa.int64())], schema=NUMBERS)
    schema, body = stream_of(batch)
    on = attacker.wire()
    while attacker.goes_on():
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,), metadata={"operation": "delete"}))
        for _ in attacker.rounds(50):
            if not on.put(stream_id, write_message(body)):
                break
        on.put(stream_id, b"", end=True)
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("R32, T23")
def upserts_of_one_key(attacker: Attacker) -> None:
    """Upserts of the same 1,000 keys, batch after batch: each replaces what the last one wrote."""
    table = attacker.create(
        attacker.wire(), [("n", "int64!"), ("v", "utf8")], table_type="primary_key", primary_key="n"
    )
    batch = pa.record_batch(
        [pa.array(range(1_000), pa.int64()), pa.array(["v" * 100] * 1_000)],
        schema=pa.schema([pa.field("n", pa.int64(), nullable=False), ("v", pa.string())]),
    )
    schema, body = stream_of(batch)
    on = attacker.wire()
    stream_id = on.open("DoExchange")
    on.put(stream_id, write_message(schema, path=(table,)))
    for _ in attacker.rounds():
        if not on.put(stream_id, write_message(body) * 5):
            break
    attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))


@attack("T25")
def bulk_writers(attacker: Attacker) -> None:
    """Eight streams of 4 MB batches as fast as they are taken: what a hog may have of the log and the memory."""
    table = attacker.create(attacker.wire(), [("n", "int64!")])
    schema, body = numbers_stream(500_000)
    message = write_message(body)

    def one(_: int) -> None:
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,), metadata={"requested_durability": "memory"}))
        for _ in attacker.rounds():
            if not on.put(stream_id, message):
                break

    attacker.together(8, one)


@attack("R30")
def odd_properties(attacker: Attacker) -> None:
    """Tables with properties that would redirect, slow or break others' work."""
    on = attacker.wire()
    properties = [
        {"s3.endpoint": "http://127.0.0.1:1"},
        {"write.metadata.previous-versions-max": "0"},
        {"py-io-impl": "os.system"},
        {"write.parquet.row-group-limit": "1"},
        {"write.target-file-size-bytes": "1"},
        {"history.expire.max-snapshot-age-ms": "1"},
    ]
    fields = {"fields": [{"name": "n", "type": "int64", "nullable": False}]}
    schema, batch = numbers_stream(1_000)
    for number in attacker.rounds():
        name = attacker.name()
        attacker.action(
            on, "CreateTable", {"name": name, "schema_json": fields, "properties": properties[number % len(properties)]}
        )
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(name,)) + write_message(batch), end=True)
        on.outcome(stream_id)
        if on.closed:
            on = attacker.wire()
