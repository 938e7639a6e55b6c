"""Outbound: what streams have to say, and whose turn it is (T6).

Owns: each stream's bounded send buffer, its outbox and its trailers, and the fair order between streams. Does not
own windows (h2 has the outbound ones) nor the socket (``arka.flight.http2``). Nothing is ever dropped: what does
not fit the peer's windows stays where it is, unsent acks as their stream's state and not as bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

import h2.connection
import trio

#: Bytes of messages that wait for the peer's window, above which ``send`` waits.
SEND_BUFFER_BYTES: Final = 256 * 1024
#: Most DATA bytes of one stream before it is the next one's turn.
_TURN_BYTES: Final = 64 * 1024


class Outbox(Protocol):
    """Where a stream's acks come from: state that becomes bytes when the wire has room."""

    def take(self, budget: int) -> bytes:
        """Give whole gRPC-framed messages, about ``budget`` bytes, at least one if any; b"" for nothing now."""
        ...


class Turn(Enum):
    """How a stream's turn to send ended."""

    #: it has more for another turn
    MORE = "more"
    #: it has more, the peer's window does not
    BLOCKED = "blocked"
    #: it has nothing for now
    DRY = "dry"
    #: its trailers are out
    DONE = "done"


class StreamOutput:
    """The outbound half of one RPC.

    Attributes:
        stream_id: the stream.
        last_progress: trio time of the last byte that the windows let through, or of the RPC's end.
    """

    def __init__(self, stream_id: int, on_ready: Callable[[], None]) -> None:
        """Start with nothing to send.

        Args:
            stream_id: the stream.
            on_ready: called when there may be something to send.
        """
        self.stream_id = stream_id
        self.last_progress = 0.0
        self._on_ready = on_ready
        self._parts: deque[bytes | memoryview] = deque()
        # Invariant: the bytes in _parts.
        self._buffered = 0
        self._outbox: Outbox | None = None
        self._room = trio.lowlevel.ParkingLot()
        self._drained: trio.Event | None = None
        self._trailers: list[tuple[bytes, bytes]] | None = None
        self._closed = False

    @property
    def finishing(self) -> bool:
        """Whether the RPC has ended and its trailers are still to be sent."""
        return self._trailers is not None

    def attach(self, outbox: Outbox) -> None:
        """Ask ``outbox`` whenever the buffer is empty and the windows are open."""
        self._outbox = outbox
        self.wake()

    def wake(self) -> None:
        """Say that the outbox may have something."""
        if not self._closed:
            self._on_ready()

    async def put(self, size: int, *parts: bytes | memoryview) -> None:
        """Queue the parts of one message.

        Raises:
            trio.ClosedResourceError: the stream is over.

        Cancellation: nothing was queued.
        """
        while self._buffered >= SEND_BUFFER_BYTES and not self._closed:
            await self._room.park()
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")
        self._parts.extend(parts)
        self._buffered += size
        self._on_ready()

    def put_nowait(self, part: bytes) -> None:
        """Queue bytes however full the buffer is."""
        self._parts.append(part)
        self._buffered += len(part)
        self._on_ready()

    async def wait_drained(self) -> None:
        """Wait until the outbox had nothing more. Cancellation: nothing changes.

        Raises:
            trio.ClosedResourceError: the stream is over.
        """
        if self._outbox is None:
            return
        if self._drained is None:
            self._drained = trio.Event()
        self.wake()
        await self._drained.wait()
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")

    def finish(self, trailers: list[tuple[bytes, bytes]], now: float) -> None:
        """End the stream behind everything that is queued.

        Args:
            trailers: the closing header fields; empty for a response that ends with its last DATA.
            now: trio time.
        """
        if not self._closed:
            self._trailers = trailers
            self.last_progress = now
            self._on_ready()

    def give_up(self, trailers: list[tuple[bytes, bytes]], now: float) -> None:
        """End the stream now, without what could not be sent."""
        self._parts.clear()
        self._buffered = 0
        self._outbox = None
        self.finish(trailers, now)

    def close(self) -> None:
        """Forget everything: the stream is over. Whoever waits to send is told."""
        self._closed = True
        self._parts.clear()
        self._buffered = 0
        self._outbox = None
        self._trailers = None
        self._room.unpark_all()
        if self._drained is not None:
            self._drained.set()

    def pump(self, connection: h2.connection.H2Connection, now: float) -> Turn:
        """Hand one turn's worth to h2."""
        turn = _TURN_BYTES
        window = connection.local_flow_control_window(self.stream_id)
        while turn > 0:
            if not self._buffered and not self._refill(min(turn, max(window, 1))):
                break
            size = min(window, turn, connection.max_outbound_frame_size, self._buffered)
            if size <= 0:
                return Turn.BLOCKED
            connection.send_data(self.stream_id, self._cut(size))
            self.last_progress = now
            window -= size
            turn -= size
        else:
            return Turn.MORE
        if self._trailers is None:
            return Turn.DRY
        if self._trailers:
            connection.send_headers(self.stream_id, self._trailers, end_stream=True)
        else:
            connection.end_stream(self.stream_id)
        self._trailers = None
        return Turn.DONE

    def _refill(self, budget: int) -> bool:
        """Take from the outbox; returns whether there was anything."""
        data = b"" if self._outbox is None else self._outbox.take(budget)
        if data:
            self._parts.append(data)
            self._buffered += len(data)
            return True
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        return False

    def _cut(self, size: int) -> bytes | memoryview:
        """Take exactly ``size`` bytes off the front of the buffer."""
        first = self._parts[0]
        if len(first) <= size:
            self._parts.popleft()
            chunk: bytes | memoryview = first
            if len(first) < size:
                pieces = [first]
                left = size - len(first)
                while left:
                    piece = self._parts[0]
                    if len(piece) <= left:
                        self._parts.popleft()
                    else:
                        self._parts[0] = memoryview(piece)[left:]
                        piece = memoryview(piece)[:left]
                    pieces.append(piece)
                    left -= len(piece)
                chunk = b"".join(pieces)
        else:
            chunk = memoryview(first)[:size]
            self._parts[0] = memoryview(first)[size:]
        self._buffered -= size
        if self._buffered < SEND_BUFFER_BYTES:
            self._room.unpark_all()
        return chunk


__all__ = ["SEND_BUFFER_BYTES", "Outbox", "StreamOutput", "Turn"]
