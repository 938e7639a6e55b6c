"""Where a connection's bytes come from: one port over sockets, TLS and memory streams (T3).

Owns: receiving into several buffers at once. Does not own the stream: whoever opened it closes it.

A socket receives in place, by ``readv`` on its descriptor: the body of a batch and the frame behind it in
one call. TLS and memory streams hand out bytes, so that theirs are copied once more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final, Protocol

import trio

#: Calls that receive a body in place, without letting other tasks run between them.
_MOST_IN_A_ROW: Final = 4


class ByteSource(Protocol):
    """Receives bytes into buffers that the caller owns."""

    async def receive_into(self, buffers: Sequence[memoryview]) -> int:
        """Receive at least one byte, filling ``buffers`` in order.

        Returns:
            The number of bytes; 0 when the peer sends no more.

        Raises:
            trio.BrokenResourceError: the connection is gone.

        Cancellation: nothing was received.
        """
        ...


class SocketSource:
    """A TCP or Unix socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        self._descriptor = stream.socket.fileno()
        self._in_a_row = 0

    async def receive_into(self, buffers: Sequence[memoryview]) -> int:
        """See ByteSource. In the middle of a body, which nobody waits for yet, not every call is a checkpoint."""
        if len(buffers) > 1 and self._in_a_row < _MOST_IN_A_ROW:
            self._in_a_row += 1
        else:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()
        while True:
            try:
                return os.readv(self._descriptor, buffers)
            except BlockingIOError:
                self._in_a_row = 0
                # Closed meanwhile, this raises before the descriptor's number could be someone else's.
                await trio.lowlevel.wait_readable(self._socket)
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise trio.ClosedResourceError("the socket was closed by this process") from error
                raise trio.BrokenResourceError(f"receive failed: {error}") from error


class StreamSource:
    """Any other trio stream: TLS, memory, lockstep."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream

    async def receive_into(self, buffers: Sequence[memoryview]) -> int:
        """See ByteSource."""
        data = memoryview(await self._stream.receive_some(sum(len(buffer) for buffer in buffers)))
        at = 0
        for buffer in buffers:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(part)
        return at


def source_of(stream: trio.abc.Stream) -> ByteSource:
    """Choose the source for a stream."""
    return SocketSource(stream) if isinstance(stream, trio.SocketStream) else StreamSource(stream)


def peer_of(stream: trio.abc.Stream) -> str:
    """Name the other end of a stream, for logs: ``host:port``, or what kind of stream it is."""
    inner: object = stream
    while isinstance(inner, trio.SSLStream):
        inner = inner.transport_stream
    if not isinstance(inner, trio.SocketStream):
        return type(stream).__name__
    try:
        name = inner.socket.getpeername()
    except OSError:
        return "gone"
    if not isinstance(name, tuple):
        return "unix"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


__all__ = ["ByteSource", "SocketSource", "StreamSource", "peer_of", "source_of"]
