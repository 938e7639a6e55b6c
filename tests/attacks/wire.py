"""An HTTP/2 client over a plain blocking socket: sends exactly what it is told to, and may stop reading.

Owns: the socket with its source address, windows that the server granted, and what came back. Does not own what is
sent (the ``over_*`` modules); frames are built by ``tests.transport.peer``.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

import hpack

from tests.transport.peer import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    S_INITIAL_WINDOW_SIZE,
    SETTINGS,
    WINDOW_UPDATE,
    data,
    frame,
    settings,
    window_update,
)

#: Attackers have an address of their own: shares of peers are what separates them from others.
ATTACKER_ADDRESS = "127.0.0.2"
SERVICE = "/arrow.flight.protocol.FlightService/"
_CHUNK = 16 * 1024
_WINDOW = 2**31 - 1


def connect(address: tuple[str, int], source: str, *, receive_buffer: int | None = None) -> socket.socket:
    """Open a socket from one of our own addresses."""
    opened = socket.socket()
    try:
        if receive_buffer is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.bind((source, 0))
        opened.settimeout(5)
        opened.connect(address)
    except BaseException:
        opened.close()
        raise
    return opened


def _ready(waits: socket.socket, what: int) -> None:
    """Wait a moment for a socket; more descriptors than ``select`` takes may be open."""
    poll = select.poll()
    poll.register(waits, what)
    poll.poll(100)


class Wire:
    """One connection.

    Attributes:
        sent: bytes that were written.
        statuses: gRPC status and message of each stream that ended, by its id.
        received: bytes of DATA that came, by stream.
        bodies: those bytes, of streams in ``keep``.
        keep: streams whose DATA is kept.
        closed: the server closed the connection, or it failed.
        goaway: detail of the server's GOAWAY.
    """

    def __init__(
        self,
        address: tuple[str, int],
        goes_on: Callable[[], bool],
        *,
        source: str = ATTACKER_ADDRESS,
        values: dict[int, int] | None = None,
        reads: bool = True,
        receive_buffer: int | None = None,
        widen: bool = True,
    ) -> None:
        """Connect and send preface and SETTINGS.

        Args:
            address: the server's.
            goes_on: whether the attack still runs; sending ends when it does not.
            source: our own address.
            values: SETTINGS.
            reads: whether answers are read at all.
            receive_buffer: SO_RCVBUF, bytes.
            widen: whether the connection's window is opened, and what was read is granted again.
        """
        self.socket = connect(address, source, receive_buffer=receive_buffer)
        self.socket.setblocking(False)
        self.encoder = hpack.Encoder()
        self.sent = 0
        self.statuses: dict[int, tuple[int | None, str]] = {}
        self.received: dict[int, int] = {}
        self.bodies: dict[int, bytearray] = {}
        self.keep: set[int] = set()
        self.closed = False
        self.goaway = b""
        self._goes_on = goes_on
        self._decoder = hpack.Decoder()
        self._initial = 65_535
        self._granted: dict[int, int] = {}
        self._spent: dict[int, int] = {}
        self._next = 1
        self._widen = widen
        self._pings: set[bytes] = set()
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self.send(PREFACE + settings(values) + (window_update(0, _WINDOW - 65_535) if widen else b""))
        if reads:
            threading.Thread(target=self._listen, daemon=True).start()

    # -- sending ------------------------------------------------------------------------------------

    def send(self, *parts: bytes) -> bool:
        """Write bytes as they are; returns whether all went out before the attack's end."""
        payload = memoryview(b"".join(parts))
        with self._writing:
            while payload and self._goes_on():
                try:
                    size = self.socket.send(payload)
                except BlockingIOError:
                    _ready(self.socket, select.POLLOUT)
                    continue
                except OSError:
                    self.closed = True
                    return False
                self.sent += size
                payload = payload[size:]
        return not payload

    def new_stream(self) -> int:
        """Take the next stream id."""
        taken, self._next = self._next, self._next + 2
        return taken

    def headers(
        self, stream_id: int, method: str, *, end: bool = False, extra: tuple[tuple[str, str], ...] = ()
    ) -> bytes:
        """Encode the HEADERS of a gRPC request; ``method`` is Flight's, or a path with its slash."""
        path = method if method.startswith("/") else SERVICE + method
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "attack")]
        block = self.encoder.encode([*fields, ("content-type", "application/grpc"), ("te", "trailers"), *extra])
        return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream_id, block)

    @staticmethod
    def headers_of(method: str) -> bytes:
        """The header block of a first request on a connection without a ``Wire``."""
        fields = [(":method", "POST"), (":scheme", "http"), (":path", SERVICE + method), (":authority", "attack")]
        encoded: bytes = hpack.Encoder().encode([*fields, ("content-type", "application/grpc"), ("te", "trailers")])
        return encoded

    def open(self, method: str, extra: tuple[tuple[str, str], ...] = ()) -> int:
        """Open a stream; returns its id."""
        stream_id = self.new_stream()
        self.send(self.headers(stream_id, method, extra=extra))
        return stream_id

    def put(self, stream_id: int, payload: bytes, *, end: bool = False) -> bool:
        """Send DATA as far as the server's windows allow, waiting for them; needs a reader.

        Returns:
            Whether all went out before the attack's or the stream's end.
        """
        rest = memoryview(payload)
        while rest:
            with self._changed:
                room = self._room(stream_id)
                while room <= 0 and self._alive(stream_id):
                    self._changed.wait(0.1)
                    room = self._room(stream_id)
                if not self._alive(stream_id):
                    return False
                size = min(room, len(rest), _CHUNK)
                self._spent[stream_id] = self._spent.get(stream_id, 0) + size
            last = end and size == len(rest)
            if not self.send(data(stream_id, bytes(rest[:size]), end=last)):
                return False
            rest = rest[size:]
        if end and not payload:
            return self.send(data(stream_id, end=True))
        return True

    def call(self, method: str, payload: bytes, *, extra: tuple[tuple[str, str], ...] = ()) -> int:
        """Send a whole unary request; returns its stream's id."""
        stream_id = self.open(method, extra)
        self.put(stream_id, payload, end=True)
        return stream_id

    def _room(self, stream_id: int) -> int:
        return self._initial + self._granted.get(stream_id, 0) - self._spent.get(stream_id, 0)

    def _alive(self, stream_id: int) -> bool:
        return self._goes_on() and not self.closed and stream_id not in self.statuses

    # -- receiving ----------------------------------------------------------------------------------

    def outcome(self, stream_id: int) -> tuple[int | None, str]:
        """Wait for a stream's status; (None, why) when the attack or the connection ended before."""
        with self._changed:
            while stream_id not in self.statuses:
                if not self._goes_on():
                    return None, "unanswered"
                if self.closed:
                    return None, f"connection closed {self.goaway[:60]!r}"
                self._changed.wait(0.1)
            return self.statuses[stream_id]

    def wait_data(self, stream_id: int, size: int) -> bool:
        """Wait until so many bytes of DATA have come on a stream."""
        with self._changed:
            while self.received.get(stream_id, 0) < size and self._alive(stream_id):
                self._changed.wait(0.1)
            return self.received.get(stream_id, 0) >= size

    def ping(self) -> float | None:
        """Seconds until a PING is answered; None when the attack or the connection ended before."""
        token = struct.pack(">d", time.monotonic())
        started = time.monotonic()
        self.send(frame(PING, 0, 0, token))
        with self._changed:
            while token not in self._pings:
                if self.closed or not self._goes_on():
                    return None
                self._changed.wait(0.1)
        return time.monotonic() - started

    def _listen(self) -> None:
        buffer = bytearray()
        try:
            while self._goes_on():
                try:
                    received = self.socket.recv(256 * 1024)
                except BlockingIOError:
                    _ready(self.socket, select.POLLIN)
                    continue
                if not received:
                    break
                buffer += received
                at = 0
                answers = bytearray()
                with self._changed:
                    while len(buffer) - at >= 9:
                        size = int.from_bytes(buffer[at : at + 3], "big")
                        if len(buffer) - at < 9 + size:
                            break
                        answers += self._take(
                            buffer[at + 3],
                            buffer[at + 4],
                            int.from_bytes(buffer[at + 5 : at + 9], "big") & 0x7FFFFFFF,
                            bytes(buffer[at + 9 : at + 9 + size]),
                        )
                        at += 9 + size
                    self._changed.notify_all()
                del buffer[:at]
                if answers:
                    self.send(bytes(answers))
        except (OSError, ValueError):
            # Closed meanwhile, also between a look and a wait: then there is no descriptor any more.
            pass
        finally:
            with self._changed:
                self.closed = True
                self._changed.notify_all()

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
        """Act on one frame; returns what answers it."""
        if kind == HEADERS:
            fields = dict(self._decoder.decode(payload, raw=True))
            if flags & END_STREAM:
                status = fields.get(b"grpc-status", b"").decode()
                self.statuses[stream_id] = (
                    int(status) if status else None,
                    fields.get(b"grpc-message", fields.get(b":status", b"")).decode(errors="replace"),
                )
        elif kind == DATA:
            self.received[stream_id] = self.received.get(stream_id, 0) + len(payload)
            if stream_id in self.keep:
                self.bodies.setdefault(stream_id, bytearray()).extend(payload)
            if self._widen and payload:
                return window_update(0, len(payload)) + window_update(stream_id, len(payload))
        elif kind == RST_STREAM:
            self.statuses.setdefault(stream_id, (None, f"reset {int.from_bytes(payload, 'big')}"))
        elif kind == WINDOW_UPDATE:
            self._granted[stream_id] = self._granted.get(stream_id, 0) + int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                code, value = struct.unpack_from(">HI", payload, at)
                if code == S_INITIAL_WINDOW_SIZE:
                    self._initial = value
            return frame(SETTINGS, ACK)
        elif kind == PING and flags & ACK:
            self._pings.add(payload)
        elif kind == PING:
            return frame(PING, ACK, 0, payload)
        elif kind == GOAWAY:
            self.goaway = payload[8:]
        return b""

    def close(self) -> None:
        """Close the socket."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
