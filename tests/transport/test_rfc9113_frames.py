"""RFC 9113, sections 3, 4 and 6: the preface, framing, and each frame's own rules."""

from __future__ import annotations

import contextlib
import struct

import pytest
import trio

from tests.transport.peer import (
    ACK,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    S_ENABLE_PUSH,
    S_INITIAL_WINDOW_SIZE,
    S_MAX_FRAME_SIZE,
    SETTINGS,
    WINDOW_UPDATE,
    data,
    frame,
    goaway,
    grpc_message,
    served,
    settings,
    window_update,
)

PRIORITY_FLAG = 0x20


class TestPreface:
    """Section 3.4."""

    @pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", PREFACE[:-1] + b"X", b"\0" * 24])
    async def test_wrong(self, said):
        """A connection that begins with anything else ends with PROTOCOL_ERROR."""
        async with served(shake_hands=False) as s:
            await s.peer.send(said)
            assert (await s.peer.wait_closed())[0] == PROTOCOL_ERROR

    @pytest.mark.parametrize(
        "first", [frame(PING, 0, 0, bytes(8)), frame(SETTINGS, ACK), window_update(0, 1), goaway(), data(1)]
    )
    async def test_settings_come_first(self, first):
        """The client's first frame is SETTINGS."""
        async with served(shake_hands=False) as s:
            await s.peer.send(PREFACE, first)
            assert (await s.peer.wait_closed())[0] == PROTOCOL_ERROR

    async def test_server_speaks_first(self):
        """The server's SETTINGS do not wait for the client's."""
        async with served(shake_hands=False) as s:
            await s.peer.wait(lambda: s.peer.settings)


# What ends the connection: section, what is sent on a connection with stream 1 open and 3 never used, the code.
CONNECTION_ERRORS = [
    ("4.1 unused bits aside, DATA on stream 0", data(0, b"x"), PROTOCOL_ERROR),
    ("4.2 DATA over MAX_FRAME_SIZE", b"\x10\x00\x01\x00\x00\x00\x00\x00\x01", FRAME_SIZE_ERROR),
    ("4.2 HEADERS over MAX_FRAME_SIZE", b"\x10\x00\x01\x01\x04\x00\x00\x00\x03", FRAME_SIZE_ERROR),
    ("4.2 HEADERS over 16 KiB", b"\x00\x40\x01\x01\x04\x00\x00\x00\x03", ENHANCE_YOUR_CALM),
    ("4.3 invalid header block", frame(HEADERS, END_HEADERS, 3, b"\x40"), (PROTOCOL_ERROR, COMPRESSION_ERROR)),
    ("4.3 block interrupted by DATA", frame(HEADERS, 0, 3, b"\x82") + data(1), PROTOCOL_ERROR),
    ("4.3 block interrupted by another", frame(HEADERS, 0, 3) + frame(HEADERS, 0, 5), PROTOCOL_ERROR),
    ("4.3 block interrupted by an unknown type", frame(HEADERS, 0, 3) + frame(0xBE), PROTOCOL_ERROR),
    ("6.1 padding too long", frame(DATA, PADDED, 1, b"\x03ab"), PROTOCOL_ERROR),
    ("6.1 padded without its length", frame(DATA, PADDED, 1), FRAME_SIZE_ERROR),
    ("6.2 HEADERS on stream 0", frame(HEADERS, END_HEADERS, 0, b"\x82"), PROTOCOL_ERROR),
    ("6.2 padding too long", frame(HEADERS, END_HEADERS | PADDED, 3, b"\x05\x82"), PROTOCOL_ERROR),
    ("6.3 PRIORITY on stream 0", frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL_ERROR),
    ("6.4 RST_STREAM on stream 0", frame(RST_STREAM, 0, 0, bytes(4)), PROTOCOL_ERROR),
    ("6.4 RST_STREAM on an idle stream", frame(RST_STREAM, 0, 3, bytes(4)), PROTOCOL_ERROR),
    ("6.4 RST_STREAM on a server's stream", frame(RST_STREAM, 0, 2, bytes(4)), PROTOCOL_ERROR),
    ("6.4 RST_STREAM of another size", frame(RST_STREAM, 0, 1, bytes(3)), FRAME_SIZE_ERROR),
    ("6.5 SETTINGS ACK with payload", frame(SETTINGS, ACK, 0, bytes(6)), FRAME_SIZE_ERROR),
    ("6.5 SETTINGS on a stream", frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
    ("6.5 SETTINGS not a multiple of six", frame(SETTINGS, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
    ("6.5.2 ENABLE_PUSH neither 0 nor 1", settings({S_ENABLE_PUSH: 2}), PROTOCOL_ERROR),
    ("6.5.2 INITIAL_WINDOW_SIZE too large", settings({S_INITIAL_WINDOW_SIZE: 2**31}), FLOW_CONTROL_ERROR),
    ("6.5.2 MAX_FRAME_SIZE too small", settings({S_MAX_FRAME_SIZE: 16383}), PROTOCOL_ERROR),
    ("6.5.2 MAX_FRAME_SIZE too large", settings({S_MAX_FRAME_SIZE: 2**24}), PROTOCOL_ERROR),
    ("6.6 PUSH_PROMISE", frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4) + b"\x82"), PROTOCOL_ERROR),
    ("6.7 PING on a stream", frame(PING, 0, 1, bytes(8)), PROTOCOL_ERROR),
    ("6.7 PING of another size", frame(PING, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    ("6.8 GOAWAY on a stream", frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL_ERROR),
    ("6.8 GOAWAY too short", frame(GOAWAY, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    ("6.9 WINDOW_UPDATE of 0 on the connection", window_update(0, 0), PROTOCOL_ERROR),
    ("6.9 WINDOW_UPDATE of another size", frame(WINDOW_UPDATE, 0, 0, bytes(3)), FRAME_SIZE_ERROR),
    ("6.9 WINDOW_UPDATE on an idle stream", window_update(3, 1), PROTOCOL_ERROR),
    ("6.9.1 connection window overflow", window_update(0, 2**31 - 1), FLOW_CONTROL_ERROR),
    ("6.10 CONTINUATION without HEADERS", frame(CONTINUATION, END_HEADERS, 1), PROTOCOL_ERROR),
    ("6.10 CONTINUATION on another stream", frame(HEADERS, 0, 3) + frame(CONTINUATION, 4, 1), PROTOCOL_ERROR),
    ("6.10 CONTINUATION without an end", frame(HEADERS, 0, 3, b"x") + frame(CONTINUATION, 0, 3, b"x" * 16384) * 4, 11),
]


@pytest.mark.parametrize(("raw", "code"), [pytest.param(*case[1:], id=case[0]) for case in CONNECTION_ERRORS])
@pytest.mark.parametrize("pieces", [False, True])
async def test_connection_errors(raw, code, pieces):
    """What breaks the connection's rules ends it with the error code that the RFC names; its RPCs are cancelled."""
    async with served() as s:
        await s.peer.send(s.peer.request(1))
        await s.peer.settle()
        if pieces:
            # What is over the line shows before the last byte: the server reads on for a moment, then closes.
            with contextlib.suppress(trio.BrokenResourceError):
                for byte in raw:
                    await s.peer.send(bytes([byte]))
        else:
            await s.peer.send(raw + b"\0" * 50)
        got, detail = await s.peer.wait_closed()
        assert got in (code if isinstance(code, tuple) else (code,)), detail
        assert s.peer.goaways[-1][0] == 1
        assert s.factory.calls == 0
        assert s.ledger.statistics().charged_bytes == 0


# What is legal, odd as it may look: the connection and stream 1 go on.
HARMLESS = [
    ("4.1 reserved bit set", b"\x00\x00\x08\x06\x00\x80\x00\x00\x00" + bytes(8)),
    ("4.1 unknown flags", frame(PING, 0xFE, 0, bytes(8))),
    ("4.1 unknown frame type", frame(0xBE, 0xFF, 1, b"whatever")),
    ("4.1 unknown frame type of 16 KiB", frame(0xBE, 0, 0, bytes(16384))),
    ("5.5 extension on an idle stream", frame(0xBE, 0, 77, b"")),
    ("6.1 empty DATA", data(1)),
    ("6.1 padding of nothing", data(1, padding=0)),
    ("6.3 PRIORITY on an idle stream", frame(PRIORITY, 0, 99, struct.pack(">IB", 1, 15))),
    ("6.5 unknown setting", settings({0xFFF0: 7})),
    ("6.5 same setting twice", settings({S_INITIAL_WINDOW_SIZE: 5}) + settings({S_INITIAL_WINDOW_SIZE: 70_000})),
    ("6.7 PING answer that nobody asked for", frame(PING, ACK, 0, b"whatever")),
    ("6.8 GOAWAY", goaway(0, 0, b"bye")),
    ("6.8 GOAWAY with an unknown code", goaway(0, 0xFFFFFFFF)),
    ("6.8 two GOAWAYs", goaway(2**31 - 1) + goaway(0)),
    ("6.9 WINDOW_UPDATE", window_update(0, 1) + window_update(1, 1)),
    ("6.9.1 the largest window", window_update(1, 2**31 - 1 - 65_535)),
]


@pytest.mark.parametrize("raw", [pytest.param(case[1], id=case[0]) for case in HARMLESS])
async def test_harmless(raw):
    """What the RFC allows, or says to ignore, disturbs nothing."""
    async with served() as s:
        await s.peer.send(s.peer.request(1), raw)
        await s.peer.send(data(1, grpc_message(b"alive"), end=True))
        response = await s.peer.response(1)
        assert response.messages == [b"alive"]
        assert not s.peer.goaways


class TestAnswers:
    """Frames that ask for one."""

    async def test_settings_are_acknowledged(self):
        """Section 6.5.3: each SETTINGS is acknowledged, in order."""
        async with served() as s:
            await s.peer.send(settings({S_INITIAL_WINDOW_SIZE: 1}) * 3)
            await s.peer.wait(lambda: s.peer.settings_acks == 4)

    async def test_ping_is_answered(self):
        """Section 6.7: a PING comes back as it went."""
        async with served() as s:
            await s.peer.send(frame(PING, 0, 0, b"whatever"))
            await s.peer.wait(lambda: s.peer.pings == [b"whatever"])

    async def test_max_frame_size_of_the_peer(self):
        """Section 4.2: no frame is longer than the peer accepts, and larger ones are used when it does."""

        async def longest(values) -> int:
            async with served(client_settings=values) as s:
                await s.peer.send(window_update(0, 2**20), s.peer.request(1), window_update(1, 2**20))
                left = grpc_message(bytes(200_000))
                await s.peer.send(data(1, left[:60_000]))
                await s.peer.wait(lambda: s.peer.granted.get(1, 0) > 200_000)
                await s.peer.send(data(1, left[60_000:], end=True))
                assert len((await s.peer.response(1)).messages[0]) == 200_000
                return max(len(f.payload) for f in s.peer.frames)

        assert await longest({}) == 16_384
        assert 16_384 < await longest({S_MAX_FRAME_SIZE: 2**20}) <= 2**20

    async def test_headers_may_come_in_pieces(self):
        """Section 6.10: a header block may be spread over HEADERS and CONTINUATION frames."""
        async with served() as s:
            block = s.peer.request(1)[9:]
            await s.peer.send(
                frame(HEADERS, END_STREAM, 1, block[:3]),
                *(frame(CONTINUATION, 0, 1, block[i : i + 1]) for i in range(3, len(block) - 1)),
                frame(CONTINUATION, END_HEADERS, 1, block[-1:]),
            )
            assert (await s.peer.response(1)).status == 0

    async def test_padded_headers_with_priority(self):
        """Section 6.2: padding and the old priority fields are read over."""
        async with served() as s:
            block = s.peer.request(1)[9:]
            payload = b"\x04" + struct.pack(">IB", 0, 7) + block + bytes(4)
            await s.peer.send(frame(HEADERS, END_HEADERS | END_STREAM | PADDED | PRIORITY_FLAG, 1, payload))
            assert (await s.peer.response(1)).status == 0
