"""Attacks with Flight's own messages: descriptors, schemas, WriteRequests and acks that nobody reads."""

from __future__ import annotations

import pyarrow as pa

from arka.testing.ipcstreams import write_stream
from tests.attacks.attacker import Attacker, attack
from tests.attacks.payloads import NUMBERS, numbers_stream, write_message
from tests.attacks.wire import Wire
from tests.transport.peer import S_INITIAL_WINDOW_SIZE, grpc_message, proto_field, varint


@attack("T22", prepares=True)
def many_tables_one_stream(attacker: Attacker) -> None:
    """WriteRequests that each name another table: a look-up, or a refusal, for each."""
    on = attacker.wire()
    schema, batch = numbers_stream(1)
    tables = [attacker.create(on, [("n", "int64!")]) for _ in range(20)]
    attacker.begin()
    while attacker.goes_on():
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(tables[0],)))
        for number in attacker.rounds(5_000):
            if not on.put(stream_id, write_message(batch, metadata={"table_name": tables[number % 20]})):
                break
        on.put(stream_id, b"", end=True)
        attacker.note(on.outcome(stream_id))


@attack("T24")
def descriptor_parts(attacker: Attacker) -> None:
    """Descriptors with 100,000 path parts."""
    on = attacker.wire()
    path = varint(1 << 3) + b"\x01" + proto_field(3, b"a") * 100_000
    schema, _ = numbers_stream(1)
    unary = grpc_message(path)
    streamed = grpc_message(proto_field(1, path) + proto_field(2, schema.header))
    for number in attacker.rounds():
        method = ("DoExchange", "GetFlightInfo", "GetSchema", "DoPut")[number % 4]
        stream_id = on.open(method)
        on.put(stream_id, streamed if method.startswith("Do") else unary, end=True)
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T22, T26", prepares=True)
def wide_schemas(attacker: Attacker) -> None:
    """Schemas of 10,000 columns on 200 streams that stay open."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    wide = pa.schema([(f"column_{n}", pa.int64()) for n in range(10_000)])
    message = write_message(write_stream(wide, [])[0], path=(table,))

    def one(_: int) -> None:
        own = attacker.wire()
        for _ in attacker.rounds(20):
            stream_id = own.open("DoExchange")
            own.put(stream_id, message)
            own.ping()
        for ended in list(own.statuses.values()):
            attacker.note(ended)

    attacker.begin()
    attacker.together(10, one)
    attacker.hold()


@attack("T22, T26", prepares=True)
def deep_schemas(attacker: Attacker) -> None:
    """Schemas that nest 60 deep, and 2,000 columns of structs with dictionaries, again and again."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    deep: pa.DataType = pa.int8()
    for _ in range(60):
        deep = pa.struct([("a", deep)])
    word = pa.dictionary(pa.int8(), pa.string())
    wide = pa.schema([(f"c{n}", pa.struct([("a", word), ("b", word), ("c", word)])) for n in range(2_000)])
    forms = [write_message(write_stream(form, [])[0], path=(table,)) for form in (pa.schema([("d", deep)]), wide)]
    attacker.begin()
    for number in attacker.rounds():
        stream_id = on.open("DoExchange")
        on.put(stream_id, forms[number % 2], end=True)
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T22", prepares=True)
def schema_metadata(attacker: Attacker) -> None:
    """Schemas with 20,000 entries of metadata and names of 1 MB."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    many = NUMBERS.with_metadata({f"k{n}": "v" for n in range(20_000)})
    long = pa.schema([("n" * 1_000_000, pa.int64())])
    forms = [write_message(write_stream(form, [])[0], path=(table,)) for form in (many, long)]
    attacker.begin()
    for number in attacker.rounds():
        stream_id = on.open("DoExchange")
        on.put(stream_id, forms[number % 2], end=True)
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T22")
def second_schemas(attacker: Attacker) -> None:
    """Schema messages again and again on one stream."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    schema, batch = numbers_stream(1)
    while attacker.goes_on():
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,)) + write_message(batch))
        for _ in attacker.rounds(1_000):
            if not on.put(stream_id, write_message(schema, path=(table,)) * 20):
                break
        attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))


@attack("T22")
def metadata_storm(attacker: Attacker) -> None:
    """Messages of metadata alone: JSON to read for each, and no write that could wait."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    schema, _ = numbers_stream(1)
    storm = write_message(metadata={"requested_durability": "memory"}) * 500
    stream_id = on.open("DoExchange")
    on.put(stream_id, write_message(schema, path=(table,)))
    for _ in attacker.rounds():
        if not on.put(stream_id, storm):
            break
    attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))


@attack("T6, T26")
def resume_storm(attacker: Attacker) -> None:
    """Handshakes without end on a stream whose acks are not read."""
    on = attacker.wire(values={S_INITIAL_WINDOW_SIZE: 0}, widen=False)
    table = attacker.create(attacker.wire(), [("n", "int64!")])
    schema, _ = numbers_stream(1)
    storm = write_message(metadata={"resume_after_lsn": 1}) * 500
    stream_id = on.open("DoExchange")
    on.put(stream_id, write_message(schema, path=(table,)))
    for _ in attacker.rounds():
        if not on.put(stream_id, storm):
            break
    attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))


def _unread(attacker: Attacker, messages: bytes, method: str = "DoExchange", **request: object) -> None:
    """Send the same writes on four streams without window, and read no answer."""
    on = attacker.wire(values={S_INITIAL_WINDOW_SIZE: 0}, widen=False)
    table = attacker.create(attacker.wire(), [("n", "int64!")])
    schema, batch = numbers_stream(1)

    def one(_: int) -> None:
        stream_id = on.open(method)
        on.put(stream_id, write_message(schema, path=(table,)) + write_message(batch, metadata=dict(request) or None))
        for _ in attacker.rounds():
            if not on.put(stream_id, messages):
                break
        attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))

    attacker.together(4, one)


@attack("T6, T26")
def unread_acks(attacker: Attacker) -> None:
    """One-row writes whose acks are not read."""
    _, batch = numbers_stream(1)
    _unread(attacker, write_message(batch) * 200)


@attack("T6, T26")
def unread_acks_doput(attacker: Attacker) -> None:
    """One-row writes over DoPut whose results are not read."""
    _, batch = numbers_stream(1)
    _unread(attacker, write_message(batch) * 200, "DoPut")


@attack("T24, T26")
def unread_rejections(attacker: Attacker) -> None:
    """Writes that are refused with a text as long as what they sent, which nobody reads."""
    _, batch = numbers_stream(1)
    _unread(attacker, write_message(batch, metadata={"requested_durability": "x" * 100_000}))


@attack("T24, T26")
def unread_rejections_doput(attacker: Attacker) -> None:
    """The same over DoPut."""
    _, batch = numbers_stream(1)
    _unread(attacker, write_message(batch, metadata={"operation": "\x01" * 16_000}), "DoPut")


@attack("T24, T26")
def unread_small_rejections(attacker: Attacker) -> None:
    """Refusals of short texts, hundreds in a message's time, which nobody reads."""
    _, batch = numbers_stream(1)
    _unread(attacker, write_message(batch, metadata={"operation": "no"}) * 200)


@attack("T24, T26")
def unread_duplicates(attacker: Attacker) -> None:
    """One idempotency key again and again: acks that wait for their first write, unread."""
    _, batch = numbers_stream(1)
    again = write_message(batch, metadata={"idempotency_key": "same"})
    _unread(attacker, again * 100, requested_durability="iceberg_committed")


@attack("T24")
def large_app_metadata(attacker: Attacker) -> None:
    """WriteRequests of 16 MB."""
    table = attacker.create(attacker.wire(), [("n", "int64!")])
    schema, batch = numbers_stream(1)
    big = write_message(batch, metadata=b'{"x": "' + b"y" * 16_000_000 + b'"}')
    for _ in attacker.rounds():
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,)))
        on.put(stream_id, big, end=True)
        attacker.note(on.outcome(stream_id))
        on.close()


@attack("T22, T25")
def doput_twins(attacker: Attacker) -> None:
    """DoPut and DoExchange of one table at once, 100 of each, one row a message."""
    table = attacker.create(attacker.wire(), [("n", "int64!")])
    schema, batch = numbers_stream(1)

    def twins(_: int) -> None:
        on = attacker.wire()
        streams = [on.open(("DoPut", "DoExchange")[number % 2]) for number in range(50)]
        for stream_id in streams:
            on.put(stream_id, write_message(schema, path=(table,)))
        for _ in attacker.rounds():
            for stream_id in streams:
                on.put(stream_id, write_message(batch) * 20)

    attacker.together(4, twins)


@attack("T22")
def no_descriptor(attacker: Attacker) -> None:
    """Streams whose first message lacks a descriptor, a schema, or everything."""
    on = attacker.wire()
    schema, batch = numbers_stream(1)
    firsts = [write_message(schema), write_message(batch), write_message(), write_message(batch, path=("nowhere",))]
    for number in attacker.rounds():
        stream_id = on.open(("DoExchange", "DoPut")[number % 2])
        on.put(stream_id, firsts[number % 4] * 20, end=True)
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


def _stay(attacker: Attacker, on: Wire) -> None:
    for ended in list(on.statuses.values()):
        attacker.note(ended)
    attacker.hold()


@attack("T22, T26")
def handshakes(attacker: Attacker) -> None:
    """Flight handshakes with payloads, on 900 streams that stay open."""
    on = attacker.wire()
    for _ in attacker.rounds(900):
        stream_id = on.open("Handshake")
        on.put(stream_id, grpc_message(proto_field(2, b"x" * 10_000)))
    _stay(attacker, on)
