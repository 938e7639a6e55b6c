"""Attacks with Arrow IPC: batches that mean more than they weigh."""

from __future__ import annotations

import pyarrow as pa

from arka.testing.ipcstreams import StreamMessage, write_stream
from tests.attacks.attacker import Attacker, attack
from tests.attacks.payloads import stream_of, write_message
from tests.transport.peer import flight_data, grpc_message

MIB = 1024 * 1024


def _bomb(
    attacker: Attacker,
    fields: list[tuple[str, str]],
    messages: list[StreamMessage],
    *,
    threads: int = 3,
    again: int = 1,
    **table: object,
) -> None:
    """Send a stream's messages, the last one ``again`` times, on streams of their own until the end."""
    name = attacker.create(attacker.wire(), fields, **table)
    first = write_message(messages[0], path=(name,))
    rest = [write_message(message) for message in messages[1:]]

    def one(_: int) -> None:
        on = attacker.wire()
        on.put(on.open("DoExchange"), b"")
        while attacker.goes_on():
            if on.closed:
                on = attacker.wire()
            stream_id = on.open("DoExchange")
            on.put(stream_id, first)
            for part in rest[:-1]:
                on.put(stream_id, part)
            for _ in attacker.rounds(again):
                if not on.put(stream_id, rest[-1]):
                    break
            on.put(stream_id, b"", end=True)
            attacker.note(on.outcome(stream_id))

    attacker.begin()
    attacker.together(threads, one)


def _shared_views(rows: int, size: int) -> pa.Array:
    """Rows that all view the same string."""
    one = pa.array(["a" * size], pa.string_view()).buffers()
    views = pa.py_buffer(one[1].to_pybytes()[:16] * rows)
    return pa.Array.from_buffers(pa.string_view(), rows, [None, views, one[2]])


def _one_column(column: pa.Array, name: str = "s") -> pa.RecordBatch:
    return pa.record_batch([column], names=[name])


@attack("T23", prepares=True)
def view_bomb(attacker: Attacker) -> None:
    """5 KB of zstd: two million views of one string of 60 MB, hours of validation."""
    batch = _one_column(_shared_views(2_000_000, 60_000_000))
    _bomb(attacker, [("s", "utf8")], list(stream_of(batch, "zstd")))


@attack("T23", prepares=True)
def view_bomb_small(attacker: Attacker) -> None:
    """Views of one 64 KiB string, as many as pass the limit of rows: the same below each single limit."""
    batch = _one_column(_shared_views(100_000, 64 * 1024))
    _bomb(attacker, [("s", "utf8")], list(stream_of(batch, "zstd")))


@attack("T23", prepares=True)
def view_bomb_at_limit(attacker: Attacker) -> None:
    """Views that refer to just less than limits.batch_bytes, again and again, from 10 KB of zstd each."""
    batch = _one_column(_shared_views(2_000, 60_000))
    _bomb(attacker, [("s", "utf8")], list(stream_of(batch, "zstd")), again=20)


@attack("T23", prepares=True)
def list_view_nesting(attacker: Attacker) -> None:
    """List views of list views that share their elements: each level multiplies what a row means."""
    values: pa.Array = pa.array([1] * 1_000, pa.int64())
    for _ in range(3):
        size = len(values)
        values = pa.ListViewArray.from_arrays(
            pa.array([0] * 1_000, pa.int32()), pa.array([size] * 1_000, pa.int32()), values
        )
    batch = _one_column(values)
    _bomb(attacker, [("s", "list<list<list<int64>>>")], list(stream_of(batch, "zstd")))


@attack("T23, T26", prepares=True)
def dictionaries_replaced(attacker: Attacker) -> None:
    """A dictionary of 4 MB replaced before each batch of one row."""
    word = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([("s", word)])
    batches = [
        pa.record_batch(
            [
                pa.DictionaryArray.from_arrays(
                    pa.array([0], pa.int32()), pa.array([f"{n}-{i}" + "x" * 30 for i in range(100_000)])
                )
            ],
            schema=schema,
        )
        for n in range(2)
    ]
    schema_message, *parts = write_stream(schema, batches, compression="zstd")
    table = attacker.create(attacker.wire(), [("s", "utf8")])
    body = b"".join(write_message(part) for part in parts)

    def one(_: int) -> None:
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema_message, path=(table,)))
        for _ in attacker.rounds():
            if not on.put(stream_id, body):
                break
        attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))

    attacker.begin()
    attacker.together(3, one)


@attack("T14, T26", prepares=True)
def dictionary_deltas(attacker: Attacker) -> None:
    """Deltas without end to one dictionary, a value each: held for the stream, copied at each."""
    word = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([("s", word)])
    values = [f"value {n}" for n in range(3_000)]
    batches = [
        pa.record_batch(
            [pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(values[: n + 1]))], schema=schema
        )
        for n in range(3_000)
    ]
    messages = write_stream(schema, batches, deltas=True)
    table = attacker.create(attacker.wire(), [("s", "utf8")])
    body = [write_message(part) for part in messages[1:]]
    attacker.begin()
    while attacker.goes_on():
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(messages[0], path=(table,)))
        for at in range(0, len(body), 100):
            if not on.put(stream_id, b"".join(body[at : at + 100])):
                break
        on.put(stream_id, b"", end=True)
        attacker.note(on.outcome(stream_id))
        on.close()


@attack("T23", prepares=True)
def dictionary_bomb(attacker: Attacker) -> None:
    """Two million indices of one value of 20 MB."""
    word = pa.dictionary(pa.int8(), pa.string())
    batch = pa.record_batch(
        [pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int8()), pa.array(["d" * 20_000_000]))],
        schema=pa.schema([("s", word)]),
    )
    _bomb(attacker, [("s", "utf8")], write_stream(batch.schema, [batch], compression="zstd"))


@attack("T23", prepares=True)
def run_end_bomb(attacker: Attacker) -> None:
    """A run of 16 million rows of one string."""
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2**24 - 1], pa.int32()), pa.array(["r" * 1_000]))
    _bomb(attacker, [("s", "utf8")], list(stream_of(_one_column(runs))), again=20)


def _zeros(megabytes: int) -> list[StreamMessage]:
    column = pa.array(memoryview(bytes(megabytes * MIB)).cast("q"), pa.int64())
    return list(stream_of(_one_column(column, "n"), "zstd"))


@attack("T14, T23", prepares=True)
def zstd_bomb(attacker: Attacker) -> None:
    """120 MiB of zeros in 12 KB of zstd, just below limits.batch_bytes, ten to a stream."""
    _bomb(attacker, [("n", "int64")], _zeros(120), again=10)


@attack("T14", prepares=True)
def zstd_bomb_over(attacker: Attacker) -> None:
    """500 MiB of zeros in 50 KB of zstd."""
    _bomb(attacker, [("n", "int64")], _zeros(500), again=10)


@attack("T23, T22", prepares=True)
def zero_column_batches(attacker: Attacker) -> None:
    """Batches without columns that claim 16 million rows, in 100 bytes."""
    schema, body = stream_of(pa.RecordBatch.from_struct_array(pa.array([{}] * 1_000_000, pa.struct([]))))
    _bomb(attacker, [("n", "int64")], [schema, body], again=2_000)


@attack("T23", prepares=True)
def null_columns(attacker: Attacker) -> None:
    """200 columns of type null and 16 million rows: no bytes on the wire, columns of nulls in the log."""
    names = [f"c{n}" for n in range(200)]
    batch = pa.record_batch([pa.nulls(2**24 - 1) for _ in names], names=names)
    _bomb(attacker, [(name, "int64") for name in names], list(stream_of(batch)), again=5)


@attack("T23", prepares=True)
def missing_columns(attacker: Attacker) -> None:
    """One column of 2 million bits of a table with 500: the others are filled with nulls for each batch."""
    fields = [("b", "bool")] + [(f"c{n}", "utf8") for n in range(499)]
    batch = _one_column(pa.array([True] * 2_000_000), "b")
    _bomb(attacker, fields, list(stream_of(batch, "zstd")), again=10)


@attack("T12, T17", prepares=True)
def lying_lengths(attacker: Attacker) -> None:
    """Batches whose headers claim a thousand times the rows, nulls and bytes that their bodies have."""
    batch = _one_column(pa.array(range(1000), pa.int64()), "n")
    schema, body = stream_of(batch)
    rows, size = (1000).to_bytes(8, "little"), (8000).to_bytes(8, "little")
    lies = []
    for value in (0, 2**24, 2**31, 2**40, 2**62, 2**63, 2**64 - 1):
        for old in (rows, size):
            header = body.header.replace(old, value.to_bytes(8, "little"))
            lies.append(StreamMessage.build(header, body.body))
    table = attacker.create(attacker.wire(), [("n", "int64")])
    on = attacker.wire()
    attacker.begin()
    for number in attacker.rounds():
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,)) + write_message(lies[number % len(lies)]), end=True)
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T22", prepares=True)
def one_row_batches(attacker: Attacker) -> None:
    """200,000 batches of a row each in as few DATA frames as possible."""
    schema, body = stream_of(_one_column(pa.array([1], pa.int64()), "n"))
    table = attacker.create(attacker.wire(), [("n", "int64")])
    many = write_message(body) * 2_000

    def one(_: int) -> None:
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,), metadata={"requested_durability": "memory"}))
        for _ in attacker.rounds(100):
            if not on.put(stream_id, many):
                break
        on.put(stream_id, b"", end=True)
        attacker.note(on.outcome(stream_id))

    attacker.begin()
    attacker.together(2, one)


@attack("T22", prepares=True)
def tiny_batches_needing_threads(attacker: Attacker) -> None:
    """Compressed batches that each need a thread, on 100 streams at once."""
    batch = _one_column(pa.array(["x" * 100] * 20_000))
    schema, body = stream_of(batch, "zstd")
    table = attacker.create(attacker.wire(), [("s", "utf8")])
    message = write_message(body)

    def one(_: int) -> None:
        on = attacker.wire()
        streams = [on.open("DoExchange") for _ in range(25)]
        for stream_id in streams:
            on.put(stream_id, write_message(schema, path=(table,)))
        for _ in attacker.rounds():
            for stream_id in streams:
                on.put(stream_id, message)

    attacker.begin()
    attacker.together(4, one)


@attack("R32", prepares=True)
def partition_explosion(attacker: Attacker) -> None:
    """One batch of 9,000 distinct values in an identity partition: 9,000 files for 70 KB, again and again."""
    batch = _one_column(pa.array(range(9_000), pa.int64()), "u")
    spec = {"fields": [{"source_id": 0, "transform": "identity"}]}
    _bomb(attacker, [("u", "int64")], list(stream_of(batch)), threads=1, again=3, partition_spec=spec)


@attack("R32, T23", prepares=True)
def partition_explosion_over(attacker: Attacker) -> None:
    """200,000 distinct values in an identity partition, more than limits.partitions."""
    batch = _one_column(pa.array(range(200_000), pa.int64()), "u")
    spec = {"fields": [{"source_id": 0, "transform": "identity"}]}
    _bomb(attacker, [("u", "int64")], list(stream_of(batch)), threads=2, again=3, partition_spec=spec)


@attack("T12, T13", prepares=True)
def odd_messages(attacker: Attacker) -> None:
    """IPC messages of types that have no place here, with bodies of 1 MiB and headers of noise."""
    schema, body = stream_of(_one_column(pa.array([1], pa.int64()), "n"))
    table = attacker.create(attacker.wire(), [("n", "int64")])
    odd = [
        grpc_message(flight_data(header=b"\xff" * 50_000, body=bytes(MIB))),
        grpc_message(flight_data(header=b"", body=bytes(MIB))),
        grpc_message(flight_data(header=body.header[:20], body=bytes(MIB))),
        grpc_message(flight_data(header=schema.header, body=bytes(MIB))),
    ]
    on = attacker.wire()
    attacker.begin()
    for number in attacker.rounds():
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,)) + odd[number % len(odd)], end=True)
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T23", prepares=True)
def wide_batches(attacker: Attacker) -> None:
    """Batches of a row and 5,000 columns with as many buffers: structure instead of bytes."""
    names = [f"c{n}" for n in range(5_000)]
    batch = pa.record_batch([pa.array([1], pa.int64()) for _ in names], names=names)
    _bomb(attacker, [(name, "int64") for name in names], list(stream_of(batch)), threads=2, again=200)


@attack("T23, T22", prepares=True)
def many_view_buffers(attacker: Attacker) -> None:
    """A view column whose header counts 100,000 variadic buffers."""
    parts = [pa.array(["x" * 20], pa.string_view()).buffers()[2]] * 100_000
    views = pa.array(["x" * 20], pa.string_view()).buffers()[1]
    column = pa.Array.from_buffers(pa.string_view(), 1, [None, views, *parts])
    _bomb(attacker, [("s", "utf8")], list(stream_of(_one_column(column))), again=5)
