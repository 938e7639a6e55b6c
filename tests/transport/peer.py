"""A client made of raw frames, and a server for it to talk to over memory or lockstep streams."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import hpack
import trio
import trio.testing

from arka.flight.grpc import Call, Route
from arka.flight.http2 import ConnectionFactory
from arka.options import MIB, Limits
from arka.tiers.admission import Ledger

#: Ends a test that hangs; on a clock that jumps, longer than any of the deadlines under test.
HANG_S = 1000

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

NO_ERROR = 0
PROTOCOL_ERROR = 1
FLOW_CONTROL_ERROR = 3
STREAM_CLOSED = 5
FRAME_SIZE_ERROR = 6
REFUSED_STREAM = 7
COMPRESSION_ERROR = 9
ENHANCE_YOUR_CALM = 11

S_ENABLE_PUSH = 2
S_MAX_CONCURRENT_STREAMS = 3
S_INITIAL_WINDOW_SIZE = 4
S_MAX_FRAME_SIZE = 5

ECHO = "/test.Service/Echo"
WRITES = "/test.Service/Writes"


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    length = len(payload)
    return struct.pack(">BHBBI", length >> 16, length & 0xFFFF, kind, flags, stream_id) + payload


def data(stream_id: int, payload: bytes = b"", *, end: bool = False, padding: int | None = None) -> bytes:
    flags = END_STREAM if end else 0
    if padding is not None:
        flags |= PADDED
        payload = bytes([padding]) + payload + bytes(padding)
    return frame(DATA, flags, stream_id, payload)


def rst_stream(stream_id: int, code: int = 8) -> bytes:
    return frame(RST_STREAM, 0, stream_id, struct.pack(">I", code))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, struct.pack(">I", increment))


def settings(values: dict[int, int] | None = None) -> bytes:
    payload = b"".join(struct.pack(">HI", code, value) for code, value in (values or {}).items())
    return frame(SETTINGS, 0, 0, payload)


def goaway(last: int = 0, code: int = NO_ERROR, detail: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last, code) + detail)


def grpc_message(payload: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + struct.pack(">I", len(payload)) + payload


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def proto_field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def flight_data(
    *,
    descriptor: bytes | None = None,
    header: bytes | None = None,
    app_metadata: bytes | None = None,
    body: bytes | None = None,
) -> bytes:
    """Serialise a FlightData as protobuf encoders do: fields in the order of their numbers."""
    parts = [(1, descriptor), (2, header), (3, app_metadata), (1000, body)]
    return b"".join(proto_field(number, value) for number, value in parts if value is not None)


@dataclass
class Frame:
    kind: int
    flags: int
    stream_id: int
    payload: bytes


@dataclass
class Response:
    """What came on one stream."""

    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def messages(self) -> list[bytes]:
        out, rest = [], self.body
        while len(rest) >= 5:
            size = int.from_bytes(rest[1:5], "big")
            out.append(rest[5 : 5 + size])
            rest = rest[5 + size :]
        assert not rest
        return out

    @property
    def status(self) -> int | None:
        found = dict(self.headers + self.trailers).get(b"grpc-status")
        return None if found is None else int(found)

    @property
    def message(self) -> str:
        return dict(self.headers + self.trailers).get(b"grpc-message", b"").decode()


class Peer:
    """A client that says exactly what it is told to, and keeps what it hears."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.frames: list[Frame] = []
        self.responses: dict[int, Response] = {}
        self.settings: dict[int, int] = {}
        #: Window that the server granted, initial ones included: 0 is the connection's.
        self.granted = {0: 65_535}
        self.pings: list[bytes] = []
        self.goaways: list[tuple[int, int, bytes]] = []
        self.settings_acks = 0
        self.closed = False
        self._changed = trio.Event()
        self._sending = trio.Lock()
        self._tokens = 0

    async def listen(self) -> None:
        """Take in what the server says until it closes."""
        buffer = bytearray()
        while True:
            try:
                received = await self.stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                received = b""
            if not received:
                break
            buffer += received
            while len(buffer) >= 9 and len(buffer) >= 9 + (size := int.from_bytes(buffer[:3], "big")):
                self._take(
                    Frame(
                        buffer[3],
                        buffer[4],
                        int.from_bytes(buffer[5:9], "big") & 0x7FFFFFFF,
                        bytes(buffer[9 : 9 + size]),
                    )
                )
                del buffer[: 9 + size]
            self._notify()
        assert not buffer, "the server stopped in the middle of a frame"
        self.closed = True
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _take(self, got: Frame) -> None:
        self.frames.append(got)
        response = self.responses.setdefault(got.stream_id, Response()) if got.stream_id else Response()
        if got.kind == HEADERS:
            fields = [(bytes(name), bytes(value)) for name, value in self.decoder.decode(got.payload, raw=True)]
            if response.headers:
                response.trailers += fields
            else:
                response.headers += fields
        elif got.kind == DATA:
            response.body += got.payload
        elif got.kind == RST_STREAM:
            response.reset = int.from_bytes(got.payload, "big")
        elif got.kind == SETTINGS and not got.flags & ACK:
            for at in range(0, len(got.payload), 6):
                code, value = struct.unpack_from(">HI", got.payload, at)
                self.settings[code] = value
        elif got.kind == SETTINGS:
            self.settings_acks += 1
        elif got.kind == PING and got.flags & ACK:
            self.pings.append(got.payload)
        elif got.kind == GOAWAY:
            last, code = struct.unpack_from(">II", got.payload)
            self.goaways.append((last, code, got.payload[8:]))
        elif got.kind == WINDOW_UPDATE:
            self.granted.setdefault(got.stream_id, 65536)
            self.granted[got.stream_id] += int.from_bytes(got.payload, "big")
        if got.kind in (HEADERS, DATA) and got.flags & END_STREAM:
            response.ended = True

    async def wait(self, condition) -> None:
        """Wait until ``condition()`` holds."""
        with trio.fail_after(HANG_S):
            while not condition():
                assert not self.closed, f"closed while waiting: {self.goaways}"
                await self._changed.wait()

    async def wait_closed(self) -> tuple[int, bytes]:
        """Wait until the server has closed; returns the last GOAWAY's code and detail."""
        with trio.fail_after(HANG_S):
            while not self.closed:
                await self._changed.wait()
        assert self.goaways, "closed without GOAWAY"
        return self.goaways[-1][1:]

    async def wait_reset(self, stream_id: int) -> int:
        """Wait for RST_STREAM; returns its code."""
        await self.wait(lambda: stream_id in self.responses and self.responses[stream_id].reset is not None)
        return self.responses[stream_id].reset

    async def response(self, stream_id: int) -> Response:
        """Wait until the server has ended a stream."""
        await self.wait(lambda: stream_id in self.responses and self.responses[stream_id].ended)
        return self.responses[stream_id]

    async def settle(self) -> None:
        """Wait until the server has taken note of all that was sent before."""
        await self.settle_quickly()
        await trio.testing.wait_all_tasks_blocked()

    async def settle_quickly(self) -> None:
        """Wait until the server has taken note of all that was sent before, however busy it is with others."""
        self._tokens += 1
        token = struct.pack(">Q", 0x7E57_0000_0000_0000 + self._tokens)
        await self.send(frame(PING, 0, 0, token))
        await self.wait(lambda: token in self.pings)

    async def send(self, *parts: bytes) -> None:
        async with self._sending:
            await self.stream.send_all(b"".join(parts))

    async def shake_hands(self, values: dict[int, int] | None = None) -> None:
        await self.send(PREFACE, settings(values))
        await self.wait(lambda: self.settings and self.settings_acks)
        await self.send(frame(SETTINGS, ACK))

    def request(
        self,
        stream_id: int,
        path: str = ECHO,
        *,
        end: bool = False,
        extra: tuple[tuple[str, str], ...] = (),
        content_type: str | None = "application/grpc",
        method: str = "POST",
    ) -> bytes:
        """Encode the HEADERS of a request."""
        fields = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "test")]
        if content_type is not None:
            fields += [("content-type", content_type), ("te", "trailers")]
        block = self.encoder.encode([*fields, *extra])
        return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream_id, block)


async def echo(call: Call) -> None:
    """Send back each message."""
    while (message := await call.receive()) is not None:
        await call.send(message)


class Writes:
    """Takes FlightData like a write stream: keeps what came, acks when told to, releases charges when told to."""

    def __init__(self, *, hold: bool = False) -> None:
        self.hold = hold
        self.messages: list = []
        self.calls: list[Call] = []
        self.cancelled = 0

    async def __call__(self, call: Call) -> None:
        self.calls.append(call)
        try:
            while (message := await call.receive()) is not None:
                self.messages.append(message)
                if not self.hold:
                    message.charge.release()
        except trio.Cancelled:
            self.cancelled += 1
            raise


@dataclass
class Served:
    """A server over an in-memory stream, and the client's end of it."""

    peer: Peer
    factory: ConnectionFactory
    ledger: Ledger
    server_stream: trio.abc.Stream


@asynccontextmanager
async def served(
    routes: dict[str, Route] | None = None,
    *,
    limits: Limits | None = None,
    ledger: Ledger | None = None,
    lockstep: bool = False,
    shake_hands: bool = True,
    client_settings: dict[int, int] | None = None,
    listen: bool = True,
) -> AsyncIterator[Served]:
    """Serve one in-memory connection."""
    limits = limits or Limits(memory_bytes=64 * MIB)
    ledger = ledger or Ledger(limits.memory_bytes)
    factory = ConnectionFactory(routes or {ECHO: Route(echo)}, ledger, limits)
    make_pair = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
    async with connected(factory, make_pair, shake_hands=shake_hands, settings=client_settings, listen=listen) as (
        peer,
        stream,
    ):
        yield Served(peer, factory, ledger, stream)
    assert ledger.statistics().waiting == 0, "a charge was left waiting"


@asynccontextmanager
async def connected(
    factory: ConnectionFactory,
    make_pair=trio.testing.memory_stream_pair,
    *,
    shake_hands: bool = True,
    settings: dict[int, int] | None = None,
    listen: bool = True,
) -> AsyncIterator[tuple[Peer, trio.abc.Stream]]:
    """Connect one more client to a factory."""
    client_stream, server_stream = make_pair()
    peer = Peer(client_stream)

    async def serve() -> None:
        try:
            await factory.serve(server_stream)
        finally:
            await trio.aclose_forcefully(server_stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        if listen:
            nursery.start_soon(peer.listen)
            if shake_hands:
                await peer.shake_hands(settings)
        yield peer, server_stream
        await trio.aclose_forcefully(client_stream)
        nursery.cancel_scope.cancel()
