"""Attacks with reads: DoGet and what else answers with more than was asked in bytes."""

from __future__ import annotations

import json

import pyarrow as pa

from tests.attacks.attacker import Attacker, attack
from tests.attacks.payloads import descriptor, stream_of, write_message
from tests.transport.peer import S_INITIAL_WINDOW_SIZE, data, grpc_message, proto_field, rst_stream


def _fill(attacker: Attacker, megabytes: int, *, durability: str = "iceberg_committed") -> str:
    """Make a table of so many megabytes, then begin; returns its name."""
    on = attacker.wire()
    table = attacker.create(on, [("a", "int64"), ("s", "utf8")])
    batch = pa.record_batch([pa.array(range(10_000), pa.int64()), pa.array(["x" * 90] * 10_000)], names=["a", "s"])
    schema, body = stream_of(batch)
    stream_id = on.open("DoExchange")
    on.put(stream_id, write_message(schema, path=(table,), metadata={"requested_durability": durability}))
    for _ in attacker.rounds(megabytes):
        on.put(stream_id, write_message(body))
    on.put(stream_id, b"", end=True)
    on.outcome(stream_id)
    attacker.begin()
    return table


def _ticket(table: str, **request: object) -> bytes:
    text = json.dumps({"table_name": table, **request}) if request else table
    return grpc_message(proto_field(1, text.encode()))


@attack("T27", prepares=True)
def forty_readers(attacker: Attacker) -> None:
    """40 readers of a table of 20 MB in a loop: the room that writers need."""
    table = _fill(attacker, 20)

    def read(_: int) -> None:
        on = attacker.wire()
        for _ in attacker.rounds():
            attacker.note(on.outcome(on.call("DoGet", _ticket(table))))
            if on.closed:
                on = attacker.wire()

    attacker.together(40, read)


@attack("T27", prepares=True)
def unread_answers(attacker: Attacker) -> None:
    """400 readers that read nothing of their answers: buffers, spill files and pins of the log."""
    table = _fill(attacker, 20)
    on = attacker.wire(values={S_INITIAL_WINDOW_SIZE: 0}, widen=False)
    for _ in attacker.rounds(400):
        on.call("DoGet", _ticket(table))
    attacker.hold()
    for ended in list(on.statuses.values()):
        attacker.note(ended)


@attack("T27", prepares=True)
def unread_answers_many_connections(attacker: Attacker) -> None:
    """The same with a connection for each reader, whose socket's buffer is small."""
    table = _fill(attacker, 20)
    for _ in attacker.rounds(300):
        on = attacker.wire(reads=False, receive_buffer=4096)
        stream_id = on.new_stream()
        on.send(on.headers(stream_id, "DoGet"), _data_of(stream_id, _ticket(table)))
    attacker.hold()


def _data_of(stream_id: int, payload: bytes) -> bytes:
    return data(stream_id, payload, end=True)


@attack("T27, T9", prepares=True)
def reads_reset_at_once(attacker: Attacker) -> None:
    """Reads that are reset as soon as they are asked for: their work goes on or piles up."""
    table = _fill(attacker, 20)
    for _ in attacker.rounds():
        on = attacker.wire()
        for _ in attacker.rounds(200):
            stream_id = on.new_stream()
            on.send(on.headers(stream_id, "DoGet"), _data_of(stream_id, _ticket(table)), rst_stream(stream_id))
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T27", prepares=True)
def waiting_reads(attacker: Attacker) -> None:
    """900 reads that wait for an LSN which will not come."""
    table = _fill(attacker, 1)
    on = attacker.wire()
    streams = [on.call("DoGet", _ticket(table, wait_for_lsn=2**50)) for _ in attacker.rounds(900)]
    attacker.hold()
    attacker.outcomes["waiting at the end"] = sum(stream_id not in on.statuses for stream_id in streams)
    for ended in list(on.statuses.values()):
        attacker.note(ended)


@attack("T24, T27", prepares=True)
def wide_selections(attacker: Attacker) -> None:
    """Tickets with 50,000 column names, and names of 500 KB."""
    table = _fill(attacker, 1)
    on = attacker.wire()
    tickets = [
        _ticket(table, columns=[f"c{n}" for n in range(50_000)]),
        _ticket(table, columns=["a"] * 100_000),
        _ticket(table, columns=["x" * 500_000]),
        _ticket("y" * 500_000),
    ]
    for number in attacker.rounds():
        attacker.note(on.outcome(on.call("DoGet", tickets[number % 4])))
        if on.closed:
            on = attacker.wire()


@attack("T27", prepares=True)
def reads_of_a_tail(attacker: Attacker) -> None:
    """Reads of a table whose rows are still in the log, while more are written: the tail is copied for each."""
    on = attacker.wire()
    table = attacker.create(on, [("a", "int64"), ("s", "utf8")])
    batch = pa.record_batch([pa.array(range(10_000), pa.int64()), pa.array(["x" * 90] * 10_000)], names=["a", "s"])
    schema, body = stream_of(batch)

    def work(number: int) -> None:
        own = attacker.wire()
        if number == 0:
            stream_id = own.open("DoExchange")
            own.put(stream_id, write_message(schema, path=(table,), metadata={"requested_durability": "disk"}))
            for _ in attacker.rounds():
                own.put(stream_id, write_message(body))
                attacker.pause(0.05)
            return
        for _ in attacker.rounds():
            attacker.note(own.outcome(own.call("DoGet", _ticket(table, limit=1))))

    attacker.begin()
    attacker.together(9, work)


@attack("T22, T27", prepares=True)
def flight_info_storm(attacker: Attacker) -> None:
    """GetFlightInfo and GetSchema of one table, 500 at a time."""
    table = _fill(attacker, 1)
    on = attacker.wire()
    request = grpc_message(descriptor((table,)))
    for _ in attacker.rounds():
        streams = [on.call(("GetFlightInfo", "GetSchema")[n % 2], request) for n in range(500)]
        for stream_id in streams:
            attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T27", prepares=True)
def compressed_reads(attacker: Attacker) -> None:
    """Reads that ask for zstd: the server's CPU for each byte that it sends."""
    table = _fill(attacker, 20)

    def read(_: int) -> None:
        on = attacker.wire()
        for _ in attacker.rounds():
            attacker.note(on.outcome(on.call("DoGet", _ticket(table, compression="zstd"))))

    attacker.together(10, read)
