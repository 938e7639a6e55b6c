"""RFC 9113, sections 5 and 8: the states of a stream, and what a request may look like."""

from __future__ import annotations

import struct

import pytest
import trio

from arka.flight.grpc import Route
from tests.transport.peer import (
    CONTINUATION,
    ECHO,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    HEADERS,
    PRIORITY,
    PROTOCOL_ERROR,
    STREAM_CLOSED,
    data,
    echo,
    frame,
    grpc_message,
    rst_stream,
    served,
    window_update,
)

SLEEP = "/test.Service/Sleep"


async def sleep(call) -> None:
    await trio.sleep_forever()


ROUTES = {ECHO: Route(echo), SLEEP: Route(sleep)}


async def outcome(s, stream_id: int) -> tuple[str, int]:
    """Wait for an error on a stream or the connection, whichever comes."""
    response = lambda: s.peer.responses.get(stream_id)  # noqa: E731
    await s.peer.wait(lambda: s.peer.goaways or (response() and response().reset))
    return ("connection", s.peer.goaways[0][1]) if s.peer.goaways else ("stream", response().reset)


class TestIdle:
    """Section 5.1, idle: HEADERS and PRIORITY alone are legal."""

    @pytest.mark.parametrize(
        "raw", [data(5, b"x"), rst_stream(5), window_update(5, 9), frame(CONTINUATION, END_HEADERS, 5), data(2, b"x")]
    )
    async def test_not_legal(self, raw):
        """Any other frame on an idle stream is a connection error."""
        async with served(ROUTES) as s:
            await s.peer.send(raw)
            assert (await s.peer.wait_closed())[0] == PROTOCOL_ERROR


class TestHalfClosedRemote:
    """Section 5.1, half-closed (remote): the peer has ended its side, the RPC still runs."""

    @pytest.mark.parametrize("again", ["data", "end", "headers", "continuation"])
    async def test_not_legal(self, again):
        """More DATA or HEADERS is STREAM_CLOSED."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(1, SLEEP, end=True))
            raw = {
                "data": data(1, b"x"),
                "end": data(1, end=True),
                "headers": s.peer.request(1, SLEEP),
                "continuation": frame(CONTINUATION, END_HEADERS, 1),
            }[again]
            await s.peer.send(raw)
            where, code = await outcome(s, 1)
            expected = (PROTOCOL_ERROR, STREAM_CLOSED) if again == "continuation" else (STREAM_CLOSED,)
            assert code in expected, where
            await s.peer.wait(lambda: s.factory.calls == 0 or s.peer.closed)

    async def test_legal(self):
        """WINDOW_UPDATE, PRIORITY and RST_STREAM are legal."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(1, SLEEP, end=True), window_update(1, 1))
            await s.peer.send(frame(PRIORITY, 0, 1, struct.pack(">IB", 0, 1)), rst_stream(1))
            await s.peer.settle()
            assert not s.peer.goaways
            assert s.factory.calls == 0


class TestClosed:
    """Section 5.1, closed: by both ends, by the peer's reset, by ours."""

    async def close_by_ends(self, s) -> None:
        await s.peer.send(s.peer.request(1, end=True))
        await s.peer.response(1)

    async def close_by_peer(self, s) -> None:
        await s.peer.send(s.peer.request(1), rst_stream(1))

    async def close_by_us(self, s) -> None:
        await s.peer.send(s.peer.request(1), window_update(1, 2**31 - 1))
        assert await s.peer.wait_reset(1) == FLOW_CONTROL_ERROR

    @pytest.mark.parametrize("how", ["close_by_ends", "close_by_peer"])
    @pytest.mark.parametrize("raw", [data(1, b"x"), data(1, end=True), "headers"])
    async def test_peer_knew(self, how, raw):
        """DATA or HEADERS on a stream that the peer knew to be closed is STREAM_CLOSED."""
        async with served(ROUTES) as s:
            await getattr(self, how)(s)
            await s.peer.settle()
            s.peer.responses.clear()
            await s.peer.send(s.peer.request(1) if raw == "headers" else raw)
            _, code = await outcome(s, 1)
            assert code == STREAM_CLOSED

    async def test_data_behind_the_peers_own_reset(self):
        """DATA behind the peer's RST_STREAM costs that stream alone: clients that cancel while they write send some."""
        async with served(ROUTES) as s:
            await self.close_by_peer(s)
            await s.peer.settle()
            await s.peer.send(data(1, bytes(1000)) * 50, data(1, end=True))
            await s.peer.send(s.peer.request(3, end=True))
            assert (await s.peer.response(3)).status == 0
            assert [f.kind for f in s.peer.frames].count(3) == 1

    async def test_peer_could_not_know(self):
        """DATA on a stream that we reset is discarded: it may have been on its way."""
        async with served(ROUTES) as s:
            await self.close_by_us(s)
            await s.peer.send(data(1, bytes(1000)) * 50, data(1, end=True))
            await s.peer.send(s.peer.request(3, end=True))
            assert (await s.peer.response(3)).status == 0
            assert [f.kind for f in s.peer.frames].count(3) == 1

    @pytest.mark.parametrize("how", ["close_by_ends", "close_by_peer", "close_by_us"])
    @pytest.mark.parametrize("raw", [window_update(1, 1), rst_stream(1), frame(PRIORITY, 0, 1, b"\0\0\0\0\1")])
    async def test_stragglers(self, how, raw):
        """WINDOW_UPDATE, RST_STREAM and PRIORITY on a closed stream are ignored."""
        async with served(ROUTES) as s:
            await getattr(self, how)(s)
            await s.peer.send(raw)
            await s.peer.settle()
            assert not s.peer.goaways


class TestIdentifiers:
    """Section 5.1.1."""

    @pytest.mark.parametrize("stream_id", [2, 3, 4])
    async def test_illegal(self, stream_id):
        """A new stream's id is odd and larger than all before."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(5, SLEEP))
            await s.peer.settle()
            await s.peer.send(s.peer.request(stream_id, SLEEP))
            assert (await s.peer.wait_closed())[0] in (PROTOCOL_ERROR, STREAM_CLOSED)

    async def test_gap(self):
        """Ids may be left out; the streams in between are closed then."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(1), s.peer.request(2**31 - 1, end=True))
            assert (await s.peer.response(2**31 - 1)).status == 0
            await s.peer.send(data(1, end=True))
            assert (await s.peer.response(1)).status == 0
            await s.peer.send(data(3, b"x"))
            assert (await s.peer.wait_closed())[0] == STREAM_CLOSED


class TestWindows:
    """Sections 5.2 and 6.9."""

    async def test_stream_window_overflow(self):
        """A stream's window beyond 2**31-1 resets the stream, not the connection."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(1, SLEEP), window_update(1, 2**31 - 1))
            assert await s.peer.wait_reset(1) == FLOW_CONTROL_ERROR
            await s.peer.settle()
            assert s.factory.calls == 0

    async def test_window_update_of_zero(self):
        """WINDOW_UPDATE of 0 on a stream is PROTOCOL_ERROR."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(1, SLEEP), window_update(1, 0))
            assert (await outcome(s, 1))[1] == PROTOCOL_ERROR

    async def test_connection_window_is_kept(self):
        """No more DATA is sent than the connection's window allows, whatever the streams' are."""
        async with served(ROUTES) as s:
            ids = (1, 3, 5)
            await s.peer.send(*(s.peer.request(i) + window_update(i, 10**6) for i in ids))
            await s.peer.send(*(data(i, grpc_message(bytes(40_000)), end=True) for i in ids))
            await s.peer.settle()
            assert sum(len(s.peer.responses[i].body) for i in ids) == 65_535
            await s.peer.send(window_update(0, 10**6))
            for i in ids:
                assert len((await s.peer.response(i)).messages[0]) == 40_000


def request_block(peer, fields) -> bytes:
    return peer.encoder.encode(fields)


AUTHORITY = (":authority", "test")
GOOD = [(":method", "POST"), (":scheme", "http"), (":path", ECHO), AUTHORITY, ("content-type", "application/grpc")]
MALFORMED = [
    ("8.2.1 upper case", [*GOOD, ("X-Upper", "v")]),
    ("8.2.1 control character in a value", [*GOOD, ("x", "a\nb")]),
    ("8.2.2 connection", [*GOOD, ("connection", "keep-alive")]),
    ("8.2.2 transfer-encoding", [*GOOD, ("transfer-encoding", "chunked")]),
    ("8.2.2 te", [*GOOD, ("te", "gzip")]),
    ("8.3 unknown pseudo-header", [(":mine", "x"), *GOOD]),
    ("8.3 pseudo-header of responses", [(":status", "200"), *GOOD]),
    ("8.3 pseudo-header behind others", [*GOOD[:3], GOOD[4], AUTHORITY]),
    ("8.3.1 no method", GOOD[1:]),
    ("8.3.1 no scheme", [GOOD[0], *GOOD[2:]]),
    ("8.3.1 no path", [*GOOD[:2], *GOOD[3:]]),
    ("8.3.1 empty path", [*GOOD[:2], (":path", ""), *GOOD[3:]]),
    ("8.3.1 method twice", [GOOD[0], *GOOD]),
    ("8.1.1 content-length that is no number", [*GOOD, ("content-length", "ten")]),
    ("8.1.1 contradicting content-lengths", [*GOOD, ("content-length", "1"), ("content-length", "2")]),
]


async def test_well_formed_request():
    """Section 8.3.1: the request that those below are variations of is served."""
    async with served(ROUTES) as s:
        await s.peer.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, request_block(s.peer, GOOD)))
        assert (await s.peer.response(1)).status == 0


@pytest.mark.parametrize("fields", [pytest.param(case[1], id=case[0]) for case in MALFORMED])
async def test_malformed_requests(fields):
    """Section 8.1.1: a malformed request is PROTOCOL_ERROR and reaches no handler."""
    reached = []

    async def handler(call) -> None:
        reached.append(call)

    async with served({ECHO: Route(handler)}) as s:
        block = request_block(s.peer, fields)
        await s.peer.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
        assert (await outcome(s, 1))[1] == PROTOCOL_ERROR
    assert reached == []


class TestContentLength:
    """Section 8.1.1 and T8: content-length is held against the DATA, and kills no connection when it is right."""

    @pytest.mark.parametrize("pieces", [[11], [5, 6], [11, 0]])
    async def test_right(self, pieces):
        """A request whose content-length is its DATA's length is served."""
        async with served(ROUTES) as s:
            message = grpc_message(b"abcdef")
            await s.peer.send(s.peer.request(1, extra=(("content-length", "11"),)))
            for i, size in enumerate(pieces):
                at = sum(pieces[:i])
                await s.peer.send(data(1, message[at : at + size], end=i == len(pieces) - 1))
            response = await s.peer.response(1)
            assert response.messages == [b"abcdef"]
            assert not s.peer.goaways

    @pytest.mark.parametrize(("length", "sent"), [(12, 11), (10, 11), (0, 11), (11, 0)])
    async def test_wrong(self, length, sent):
        """One that does not match resets the stream with PROTOCOL_ERROR."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(1, SLEEP, extra=(("content-length", str(length)),)))
            await s.peer.send(data(1, grpc_message(b"abcdef")[:sent], end=True))
            assert await s.peer.wait_reset(1) == PROTOCOL_ERROR
            await s.peer.settle()
            assert s.factory.calls == 0

    async def test_wrong_without_data(self):
        """A content-length on a request that ends with its HEADERS has to be 0."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(1, end=True, extra=(("content-length", "1"),)))
            assert await s.peer.wait_reset(1) == PROTOCOL_ERROR
            await s.peer.send(s.peer.request(3, end=True, extra=(("content-length", "0"),)))
            assert (await s.peer.response(3)).status == 0

    async def test_huge(self):
        """A content-length beyond any integer type is just never reached."""
        async with served(ROUTES) as s:
            await s.peer.send(s.peer.request(1, extra=(("content-length", "9" * 100),)))
            await s.peer.send(data(1, grpc_message(b"x")))
            await s.peer.wait(lambda: s.peer.responses.get(1) and s.peer.responses[1].body)
            await s.peer.send(data(1, end=True))
            assert await s.peer.wait_reset(1) == PROTOCOL_ERROR


class TestTrailers:
    """Section 8.1: a request may end with trailers."""

    async def test_end_the_request(self):
        """Trailers end the peer's side like an END_STREAM on DATA (T7)."""
        async with served(ROUTES) as s:
            trailers = s.peer.encoder.encode([("x-checksum", "1")])
            await s.peer.send(s.peer.request(1), data(1, grpc_message(b"x")))
            await s.peer.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, trailers))
            response = await s.peer.response(1)
            assert response.messages == [b"x"]
            assert response.status == 0
            assert response.reset is None

    async def test_without_end(self):
        """A second HEADERS without END_STREAM is PROTOCOL_ERROR."""
        async with served(ROUTES) as s:
            trailers = s.peer.encoder.encode([("x-checksum", "1")])
            await s.peer.send(s.peer.request(1), frame(HEADERS, END_HEADERS, 1, trailers))
            assert (await outcome(s, 1))[1] == PROTOCOL_ERROR

    async def test_data_behind(self):
        """DATA behind trailers is STREAM_CLOSED."""
        async with served(ROUTES) as s:
            trailers = s.peer.encoder.encode([("x-checksum", "1")])
            await s.peer.send(s.peer.request(1, SLEEP))
            await s.peer.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, trailers), data(1, b"x"))
            assert (await outcome(s, 1))[1] == STREAM_CLOSED
