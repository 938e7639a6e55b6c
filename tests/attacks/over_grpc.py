"""Attacks with gRPC: prefixes, flags, timeouts, metadata and messages that come slowly."""

from __future__ import annotations

import struct

from tests.attacks.attacker import Attacker, attack
from tests.attacks.payloads import numbers_stream, write_message
from tests.transport.peer import CONTINUATION, END_HEADERS, HEADERS, frame, grpc_message, proto_field, varint


@attack("T17, T24")
def huge_prefixes(attacker: Attacker) -> None:
    """Prefixes that announce 4 GiB, to unary methods and to streams."""
    on = attacker.wire()
    for number in attacker.rounds():
        method = ("DoExchange", "DoAction", "GetFlightInfo", "DoGet")[number % 4]
        stream_id = on.open(method)
        on.put(stream_id, struct.pack(">BI", 0, 2**32 - 1) + b"x" * 1000)
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T24")
def unary_hoard(attacker: Attacker) -> None:
    """900 unary requests of 60 KiB each that lack their last byte: memory for as long as the client likes."""
    on = attacker.wire()
    for number in attacker.rounds(900):
        method = ("GetFlightInfo", "GetSchema", "DoGet", "ListFlights")[number % 4]
        stream_id = on.open(method)
        on.put(stream_id, struct.pack(">BI", 0, 60_001) + bytes(60_000))
    attacker.hold()


@attack("T24")
def action_hoard(attacker: Attacker) -> None:
    """300 actions of 1 MiB that lack their last byte."""
    on = attacker.wire()
    size = 1024 * 1024 - 100

    def one(_: int) -> None:
        stream_id = on.open("DoAction")
        on.put(stream_id, struct.pack(">BI", 0, size) + proto_field(1, b"CreateTable") + bytes(size - 100))

    for _ in attacker.rounds(10):
        attacker.together(30, one)
    attacker.hold()


@attack("T22")
def compressed_flags(attacker: Attacker) -> None:
    """Messages that say they are compressed, and flags that do not exist."""
    on = attacker.wire()
    for number in attacker.rounds():
        stream_id = on.open(("DoExchange", "ListActions")[number % 2])
        on.put(stream_id, grpc_message(b"x" * 100, flag=(1, 2, 255)[number % 3]))
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


def _trickle(attacker: Attacker, streams: int, size: int, at_once: int = 1) -> None:
    """Announce a message of ``size`` bytes on each stream, then send a byte of each every half second."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    schema, batch = numbers_stream(1)
    opened = []
    for _ in attacker.rounds(streams):
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,)))
        head = proto_field(2, batch.header) + varint(1000 << 3 | 2) + varint(size)
        on.put(stream_id, struct.pack(">BI", 0, len(head) + size) + head + bytes(at_once))
        opened.append(stream_id)
    while attacker.pause(0.5):
        for stream_id in opened:
            if stream_id not in on.statuses:
                on.put(stream_id, b"\0")
    for ended in list(on.statuses.values()):
        attacker.note(ended)


@attack("T25")
def trickled_messages(attacker: Attacker) -> None:
    """Five streams that announce 250 MB each and send a byte at a time: all of limits.memory_bytes."""
    _trickle(attacker, 5, 250_000_000)


@attack("T25")
def trickled_small_messages(attacker: Attacker) -> None:
    """900 streams that announce 60 KiB each: the eighth that is reserved for small messages."""
    _trickle(attacker, 900, 60 * 1024)


@attack("T25")
def trickled_medium_messages(attacker: Attacker) -> None:
    """200 streams that announce 6 MB each and send 64 KiB of it."""
    _trickle(attacker, 200, 6_000_000, 64 * 1024)


@attack("T22")
def tiny_timeouts(attacker: Attacker) -> None:
    """Thousands of calls with a deadline of a nanosecond."""
    on = attacker.wire()
    for _ in attacker.rounds():
        streams = [on.open("ListFlights", (("grpc-timeout", "1n"),)) for _ in range(500)]
        for stream_id in streams:
            attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T22")
def odd_timeouts(attacker: Attacker) -> None:
    """Deadlines of 99,999,999 hours and such as no number is: timers that are kept or fail."""
    on = attacker.wire()
    for number in attacker.rounds():
        value = ("99999999H", "1" * 5000 + "S", "-1S", "0n", "٣S", "")[number % 6]
        stream_id = on.call("ListActions", grpc_message(b""), extra=(("grpc-timeout", value),))
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T24")
def long_paths(attacker: Attacker) -> None:
    """Methods that do not exist, with names of 50 KB: their texts go into answers and the log."""
    on = attacker.wire()
    for number in attacker.rounds():
        stream_id = on.open("/" + "x" * 50_000 + str(number))
        attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()


@attack("T9, T26")
def large_metadata(attacker: Attacker) -> None:
    """900 open streams of a connection with 60 KB of metadata each, ten connections."""
    for _ in attacker.rounds(10):
        on = attacker.wire()
        for number in attacker.rounds(900):
            extra = tuple((f"x-{number}-{n}", "v" * 3_000) for n in range(5))
            if not on.send(_split(on.headers(on.new_stream(), "DoExchange", extra=extra))) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
    attacker.hold()


def _split(block: bytes) -> bytes:
    """A HEADERS frame that is longer than a control frame may be, as HEADERS and CONTINUATION."""
    stream_id = int.from_bytes(block[5:9], "big")
    payload = block[9:]
    size = 16_000
    parts = [payload[at : at + size] for at in range(0, len(payload), size)]
    out = frame(HEADERS, END_HEADERS if len(parts) == 1 else 0, stream_id, parts[0])
    for number, part in enumerate(parts[1:], 2):
        out += frame(CONTINUATION, END_HEADERS if number == len(parts) else 0, stream_id, part)
    return out


@attack("T22, R31")
def many_connections_many_streams(attacker: Attacker) -> None:
    """Ten connections with 1,000 open write streams each: all of limits.streams."""
    for _ in attacker.rounds(10):
        on = attacker.wire()
        on.send(*(on.headers(on.new_stream(), "DoExchange") for _ in range(999)))
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        for ended in list(on.statuses.values())[:5]:
            attacker.note(ended)
    attacker.hold()
