"""A connection's bytes in and out: one port over sockets, TLS and memory streams (T3).

Owns: receiving into several buffers at once, and sending. Does not own the stream: whoever opened it closes it.

A socket receives in place, by ``readv`` on its descriptor: the body of a batch and the frame behind it in
one call. TLS and memory streams hand out bytes, so that theirs are copied once more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final, Protocol

import trio

from arka._core.wire import Splitter

#: Calls that find the socket ready, before other tasks get to run.
_MOST_IN_A_ROW: Final = 4
#: Bytes up to which the parts of a write are joined.
_JOINED_BYTES: Final = 64 * 1024
#: Most parts of one write; the least that POSIX systems in use allow (IOV_MAX).
_MOST_PARTS: Final = 1024


class Channel(Protocol):
    """Moves one connection's bytes. One task receives; one waits to send, while it rests others ``send_now``."""

    @property
    def expects_more(self) -> bool:
        """Whether the last receive left bytes behind, as far as one can tell: the next will not wait."""
        ...

    async def receive(self, splitter: Splitter) -> int:
        """Receive at least one byte for ``splitter``; as ``receive_into``, and may raise what ``splitter`` raises."""
        ...

    async def receive_into(self, buffers: Sequence[memoryview]) -> int:
        """Receive at least one byte, filling ``buffers`` in order.

        Returns:
            The number of bytes; 0 when the peer sends no more.

        Raises:
            trio.BrokenResourceError: the connection is gone.
            trio.ClosedResourceError: the stream was closed by this process.

        Cancellation: nothing was received.
        """
        ...

    def send_now(self, parts: Sequence[bytes | memoryview]) -> Sequence[bytes | memoryview]:
        """Send what goes without waiting; not while ``send_all`` runs.

        Returns:
            What is left, all of it if the stream cannot do this or is broken: it is ``send_all`` that says so.
        """
        ...

    async def send_all(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all of ``parts``, in order; waits while the peer does not take them.

        Raises:
            trio.BrokenResourceError: the connection is gone.
            trio.ClosedResourceError: the stream was closed by this process.

        Cancellation: an unknown part was sent; nothing more may be.
        """
        ...


class SocketChannel:
    """A TCP or Unix socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        self._descriptor = stream.socket.fileno()
        self._receives_in_a_row = 0
        self._sends_in_a_row = 0
        # Whether the last call took all there was, so that the next one has to wait.
        self._drained = False

    @property
    def expects_more(self) -> bool:
        """See Channel."""
        return not self._drained

    async def receive(self, splitter: Splitter) -> int:
        """See Channel. Not always a checkpoint: in the middle of a body nobody waits for what was received."""
        await self._take_turn(in_body=splitter.in_body)
        while True:
            try:
                size = splitter.receive(self._descriptor)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
            except OSError as error:
                raise _translate(error, "receive") from error
            else:
                self._drained = splitter.drained
                return size

    async def receive_into(self, buffers: Sequence[memoryview]) -> int:
        """See Channel; a checkpoint as for ``receive``."""
        await self._take_turn(in_body=len(buffers) > 1)
        while True:
            try:
                size = os.readv(self._descriptor, buffers)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
            except OSError as error:
                raise _translate(error, "receive") from error
            else:
                self._drained = 0 < size < sum(map(len, buffers))
                return size

    async def _take_turn(self, *, in_body: bool) -> None:
        """Wait if nothing is there, and let others run every few calls."""
        if self._drained:
            self._drained = False
            self._receives_in_a_row = 0
            await trio.lowlevel.wait_readable(self._socket)
        elif in_body and self._receives_in_a_row < _MOST_IN_A_ROW:
            self._receives_in_a_row += 1
        else:
            self._receives_in_a_row = 0
            await trio.lowlevel.checkpoint()

    def send_now(self, parts: Sequence[bytes | memoryview]) -> Sequence[bytes | memoryview]:
        """See Channel."""
        left = _join(parts)
        try:
            if left:
                self._send_some(left)
        except OSError:
            # Nothing of it was sent, and the next attempt meets the error again.
            pass
        return left

    async def send_all(self, parts: Sequence[bytes | memoryview]) -> None:
        """See Channel. A checkpoint when it waits, and every few calls."""
        left = _join(parts)
        while left:
            try:
                self._send_some(left)
            except BlockingIOError:
                self._sends_in_a_row = 0
                await trio.lowlevel.wait_writable(self._socket)
            except OSError as error:
                raise _translate(error, "send") from error
        self._sends_in_a_row += 1
        if self._sends_in_a_row >= _MOST_IN_A_ROW:
            self._sends_in_a_row = 0
            await trio.lowlevel.checkpoint()

    def _send_some(self, left: list[bytes | memoryview]) -> None:
        """Send what the socket takes at once, and remove it from ``left``."""
        sent = os.writev(self._descriptor, left if len(left) <= _MOST_PARTS else left[:_MOST_PARTS])
        done = 0
        while done < len(left) and sent >= len(left[done]):
            sent -= len(left[done])
            done += 1
        del left[:done]
        if sent:
            left[0] = memoryview(left[0])[sent:]


class StreamChannel:
    """Any other trio stream: TLS, memory, lockstep."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def receive(self, splitter: Splitter) -> int:
        """See Channel."""
        size = await self.receive_into(splitter.targets())
        splitter.received(size)
        return size

    async def receive_into(self, buffers: Sequence[memoryview]) -> int:
        """See Channel."""
        data = memoryview(await self._stream.receive_some(sum(map(len, buffers))))
        at = 0
        for buffer in buffers:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(part)
        return at

    @property
    def expects_more(self) -> bool:
        """See Channel: nothing is known."""
        return False

    def send_now(self, parts: Sequence[bytes | memoryview]) -> Sequence[bytes | memoryview]:
        """See Channel: these streams may always have to wait."""
        return parts

    async def send_all(self, parts: Sequence[bytes | memoryview]) -> None:
        """See Channel."""
        await self._stream.send_all(b"".join(parts))


def _join(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Make the parts of a write few, and none of them empty."""
    if sum(map(len, parts)) > _JOINED_BYTES:
        return [part for part in parts if part]
    # Many small parts are joined: that costs less than a vector of them.
    data = b"".join(parts)
    return [data] if data else []


def _translate(error: OSError, what: str) -> trio.BrokenResourceError | trio.ClosedResourceError:
    """Turn an error of the descriptor into trio's, as its streams do."""
    if error.errno == errno.EBADF:
        return trio.ClosedResourceError("the socket was closed by this process")
    return trio.BrokenResourceError(f"{what} failed: {error}")


def channel_of(stream: trio.abc.Stream) -> Channel:
    """Choose the channel for a stream."""
    return SocketChannel(stream) if isinstance(stream, trio.SocketStream) else StreamChannel(stream)


def peer_of(stream: trio.abc.Stream) -> str:
    """Name the other end of a stream, for logs: ``host:port``, or what kind of stream it is."""
    name = _peer_name(stream)
    if not isinstance(name, tuple):
        return name
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def address_of(stream: trio.abc.Stream) -> str:
    """Name the host at the other end of a stream: what a client cannot have many of. As ``peer_of`` without a host."""
    name = _peer_name(stream)
    return name[0] if isinstance(name, tuple) else name


def _peer_name(stream: trio.abc.Stream) -> tuple[str, int] | str:
    inner: object = stream
    while isinstance(inner, trio.SSLStream):
        inner = inner.transport_stream
    if not isinstance(inner, trio.SocketStream):
        return type(stream).__name__
    try:
        name = inner.socket.getpeername()
    except OSError:
        return "gone"
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else "unix"


__all__ = ["Channel", "SocketChannel", "StreamChannel", "address_of", "channel_of", "peer_of"]
