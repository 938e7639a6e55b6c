"""Outbound: what streams have to say, and whose turn it is (T6).

Owns: each stream's bounded send buffer, its outbox, its DATA frames and its trailers. Does not own windows (h2
has the outbound ones) nor the socket (``arka.flight.connection``). Nothing is ever dropped: what does not fit
the peer's windows stays where it is, unsent acks as their stream's state and not as bytes.

DATA frames are raw: h2 would copy their payload four times. Its windows are read and lowered here, as its own
``send_data`` does; everything else that it knows of a stream does not depend on DATA.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

import h2.connection
import trio

from arka.flight.frames import FrameType, frame_header
from arka.records import Releasable

#: Bytes of messages that wait for the peer's window, above which ``send`` waits.
SEND_BUFFER_BYTES: Final = 256 * 1024
#: Bytes of one message from which on they are charged to the client (T26).
_CHARGED_BYTES: Final = 4096
#: Most DATA bytes of one stream before it is the next one's turn.
_TURN_BYTES: Final = 128 * 1024

#: What is written: whole frames, or pieces of them in order.
Parts = list[bytes | memoryview]


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

    def __init__(
        self,
        stream_id: int,
        on_ready: Callable[[], None],
        keep: Callable[[int, str], Releasable] | None = None,
    ) -> None:
        """Start with nothing to send.

        Args:
            stream_id: the stream.
            on_ready: called when there may be something to send.
            keep: charges bytes of answers until they are sent; raises AdmissionRejected.
        """
        self._keep = keep
        # Charges, each with the count of bytes sent after which it is released; and that count.
        self._charges: deque[tuple[int, Releasable]] = deque()
        self._sent = 0
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

    @property
    def needs_window(self) -> bool:
        """Whether what it has to say, trailers apart, may lack window."""
        return self._buffered > 0 or self._outbox is not None

    def attach(self, outbox: Outbox) -> None:
        """Ask ``outbox`` whenever the buffer is empty and the windows are open."""
        self._outbox = outbox
        self.wake()

    def wake(self) -> None:
        """Say that the outbox may have something."""
        if not self._closed:
            self._on_ready()

    async def put(self, size: int, *parts: bytes | memoryview, charged: bool = True) -> None:
        """Queue the parts of one message.

        Args:
            size: bytes of all parts.
            parts: what to send.
            charged: charge large ones to the client; answers of DoGet have a buffer of their own (T27).

        Raises:
            trio.ClosedResourceError: the stream is over, and the caller not cancelled for it.
            AdmissionRejected: the ledger has no room for what has to be kept until it is sent.

        Cancellation: nothing was queued.
        """
        charge = self._keep(size, "an answer") if charged and size >= _CHARGED_BYTES and self._keep else None
        try:
            while self._buffered >= SEND_BUFFER_BYTES and not self._closed:
                await self._room.park()
            if self._closed:
                await self._refuse()
        except BaseException:
            if charge is not None:
                charge.release()
            raise
        self._parts.extend(parts)
        self._buffered += size
        if charge is not None:
            self._charges.append((self._sent + self._buffered, charge))
        self._on_ready()

    def put_nowait(self, part: bytes) -> None:
        """Queue bytes however full the buffer is."""
        self._parts.append(part)
        self._buffered += len(part)
        self._on_ready()

    async def wait_drained(self) -> None:
        """Wait until the outbox had nothing more. Cancellation: nothing changes.

        Raises:
            trio.ClosedResourceError: the stream is over, and the caller not cancelled for it.
        """
        if self._closed:
            await self._refuse()
        if self._outbox is None:
            return
        if self._drained is None:
            self._drained = trio.Event()
        self.wake()
        await self._drained.wait()
        if self._closed:
            await self._refuse()

    async def _refuse(self) -> None:
        """End a call on a stream that is over."""
        # The RPC was cancelled together with the stream: that is what it is to see, not an error of its own.
        await trio.lowlevel.checkpoint()
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
        """End the stream now, without what could not be sent; an error that waits to be told stays the end."""
        self._drop_parts()
        self._outbox = None
        waiting = self._trailers
        self.finish(waiting if waiting and (b"grpc-status", b"0") not in waiting else trailers, now)

    def discard(self) -> None:
        """Drop what is queued, be it in the middle of a message: an error is about to end the stream."""
        self._drop_parts()
        self._room.unpark_all()

    def close(self) -> None:
        """Forget everything: the stream is over. Whoever waits to send is told."""
        self._closed = True
        self._drop_parts()
        self._outbox = None
        self._trailers = None
        self._room.unpark_all()
        if self._drained is not None:
            self._drained.set()

    def pump(self, connection: h2.connection.H2Connection, now: float, parts: Parts) -> Turn:
        """Append one turn's worth of frames to ``parts``.

        Args:
            connection: has the windows, and makes the trailers.
            now: trio time.
            parts: frames that go before these.
        """
        turn = _TURN_BYTES
        stream = connection.streams[self.stream_id]
        window = min(connection.outbound_flow_control_window, stream.outbound_flow_control_window)
        while turn > 0:
            if not self._buffered and not self._refill(min(turn, max(window, 1))):
                break
            size = min(window, turn, connection.max_outbound_frame_size, self._buffered)
            if size <= 0:
                return Turn.BLOCKED
            parts.append(frame_header(size, FrameType.DATA, 0, self.stream_id))
            self._cut(size, parts)
            connection.outbound_flow_control_window -= size
            stream.outbound_flow_control_window -= size
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
        parts.append(connection.data_to_send())
        self._trailers = None
        return Turn.DONE

    def _drop_parts(self) -> None:
        self._parts.clear()
        self._buffered = 0
        while self._charges:
            self._charges.popleft()[1].release()

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

    def _cut(self, size: int, parts: Parts) -> None:
        """Move exactly ``size`` bytes from the front of the buffer to ``parts``."""
        buffer, left = self._parts, size
        while left:
            first = buffer[0]
            if len(first) <= left:
                parts.append(buffer.popleft())
                left -= len(first)
            else:
                view = memoryview(first)
                parts.append(view[:left])
                buffer[0] = view[left:]
                left = 0
        self._buffered -= size
        self._sent += size
        while self._charges and self._charges[0][0] <= self._sent:
            self._charges.popleft()[1].release()
        if self._buffered < SEND_BUFFER_BYTES:
            self._room.unpark_all()


__all__ = ["SEND_BUFFER_BYTES", "Outbox", "Parts", "StreamOutput", "Turn"]
