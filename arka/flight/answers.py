"""Answers of DoGet on their way from a reader to a client: a bounded buffer, and clients that are too slow (T27).

Owns: the bytes that wait for a client's window, how many there may be, and when a slow client loses its answer. Does
not own where they come from (``arka.tiers.reads``), whose turn it is (``arka.tiers.readturns``) nor the wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import pyarrow as pa
import trio

from arka.errors import ArkaError, ErrorCode
from arka.flight import messages
from arka.flight.grpc import Call, message_prefix
from arka.flight.publicschema import public_schema
from arka.storage.threads import run_compute

#: Seconds over which a client's rate is averaged (T25).
RATE_S: Final = 10
#: The part of the buffer that answers share which have no reader any more, and those that are ahead of their client.
_COMMON_PART: Final = 2
#: In front of each message in an IPC stream: the continuation mark; the header's bytes follow.
_CONTINUATION: Final = b"\xff\xff\xff\xff"


class AnswerBuffers:
    """The buffer of all answers (``limits.read_buffer_bytes``). Used from trio's thread only.

    Each read that runs has the same part of one half for itself. The other half is common: a read that is ahead of its
    client takes from it, and so do answers that are read to their end, so that a slow client with little left holds
    that much and no reader process.
    """

    def __init__(self, limit_bytes: int, reads: int) -> None:
        """Divide the buffer.

        Args:
            limit_bytes: of all answers together.
            reads: how many run at a time.
        """
        self.common_bytes = limit_bytes // _COMMON_PART
        self.share_bytes = (limit_bytes - self.common_bytes) // reads
        #: How many answers wait for common bytes.
        self.waiting = 0
        self._freed = trio.Event()

    def free(self, size: int) -> None:
        """Give common bytes back."""
        self.common_bytes += size
        if size and self.waiting:
            freed, self._freed = self._freed, trio.Event()
            freed.set()

    async def wait_freed(self) -> None:
        """Wait until common bytes are given back. Cancellation: nothing changes."""
        self.waiting += 1
        try:
            await self._freed.wait()
        finally:
            self.waiting -= 1


class BufferedAnswer:
    """One answer; see ``arka.tiers.reads.ReaderAnswer``. One task puts, another one takes.

    Invariant: what waits in it is ``own`` bytes of its reader's share and ``common`` bytes of the common half.

    Attributes:
        reading: whether a reader still puts into it.
        too_slow: whether it ends since its client is too slow: what waits to be sent is not to be waited for.
        sent_bytes: what its client's window has let through to the send buffer.
    """

    def __init__(self, buffers: AnswerBuffers, peer: str = "") -> None:
        self.reading = True
        self.sent_bytes = 0
        self.too_slow = False
        self._peer = peer
        self._buffers = buffers
        self._parts: deque[bytes] = deque()
        self._own = self._common = 0
        self._first = True
        self._ended = False
        self._error: Exception | None = None
        self._changed = trio.Event()

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait for the client."""
        return self._own + self._common

    # -- from the reader --------------------------------------------------------------------------

    async def tail_copied(self) -> None:
        """See ``ports.Answer.tail_copied``: nothing depends on it here."""
        await trio.lowlevel.checkpoint()

    async def begin(self, header: bytes, body_bytes: int) -> None:
        """See ``ports.Answer.begin``."""
        if self._first:
            self._first = False
            header = await run_compute(_public_header, header, peer=self._peer, size=len(header))
        head = messages.flight_data_head(header, body_bytes)
        await self.add(message_prefix(len(head) + body_bytes) + head)

    async def add(self, part: bytes) -> None:
        """See ``ports.Answer.add``; waits while the answer has its share and nothing is left of the common half."""
        buffers, size = self._buffers, len(part)
        while self._own and self._own + size > buffers.share_bytes and size > buffers.common_bytes:
            await self._wait_changed(buffers.wait_freed)
        # One part is always taken, however small the share is.
        if self._own + size <= buffers.share_bytes or size > buffers.common_bytes:
            self._own += size
        else:
            self._common += size
            buffers.common_bytes -= size
        self._parts.append(part)
        self._wake()
        await trio.lowlevel.checkpoint()

    async def end(self) -> None:
        """See ``ReaderAnswer.end``: what is left moves to the common half."""
        self._ended = True
        self._wake()
        while self._own > self._buffers.common_bytes:
            await self._wait_changed(self._buffers.wait_freed)
        self._buffers.common_bytes -= self._own
        self._common += self._own
        self._own = 0
        self.reading = False

    def fail(self, error: Exception) -> None:
        """End the answer with an error, behind what waits."""
        self._error = error
        self._ended = True
        self.reading = False
        self._wake()

    # -- to the client ----------------------------------------------------------------------------

    async def take(self) -> bytes | None:
        """Take the next bytes for the wire; None at the end.

        Raises:
            Exception: what ``fail`` was told.
        """
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            await self._changed.wait()
        part = self._parts.popleft()
        common = min(self._common, len(part))
        self._common -= common
        self._own -= len(part) - common
        self._buffers.free(common)
        self._wake()
        return part

    def close(self) -> None:
        """Drop what waits: the call is over."""
        self._parts.clear()
        self._buffers.free(self._common)
        self._own = self._common = 0
        self._ended = True
        self._wake()

    async def _wait_changed(self, also: Callable[[], object]) -> None:
        """Wait until something was taken from this answer, or ``also`` returns."""
        async with trio.open_nursery() as nursery:

            async def wait_also() -> None:
                await also()  # type: ignore[misc]
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_also)
            await self._changed.wait()
            nursery.cancel_scope.cancel()

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


async def deliver(call: Call, answer: BufferedAnswer, stall_s: float) -> None:
    """Send an answer to its end.

    Args:
        call: the client's.
        answer: what is sent.
        stall_s: ``limits.message_stall_s``.

    Raises:
        ArkaError: ``overloaded``: the client took nothing for so long.
        Exception: what the answer ends with.

    Cancellation: the rest is not sent.
    """
    while (part := await answer.take()) is not None:
        with trio.move_on_after(stall_s) as stall:
            await call.send_bytes(part)
        if stall.cancelled_caught:
            answer.too_slow = True
            raise ArkaError(
                f"Nothing of the answer was read in {stall_s:g} s (limits.message_stall_s): read again, and faster",
                code=ErrorCode.OVERLOADED,
            )
        answer.sent_bytes += len(part)


async def check_rate(answer: BufferedAnswer, least: int, contended: Callable[[], bool]) -> None:
    """End an answer whose client is too slow while others wait; returns once nobody can wait for it (T25).

    Args:
        answer: what is sent.
        least: bytes a second, averaged over ``RATE_S`` (``limits.min_bytes_per_s``).
        contended: whether others wait for what this answer holds.

    Raises:
        ArkaError: ``overloaded``.
    """
    # How much was sent, for as long as the client, and not the reader, is the slower one.
    sent: deque[int] = deque([answer.sent_bytes], maxlen=RATE_S + 1)
    while answer.reading or answer.waiting_bytes:
        await trio.sleep(1)
        if not answer.waiting_bytes:
            sent.clear()
        sent.append(answer.sent_bytes)
        took = sent[-1] - sent[0]
        if len(sent) > RATE_S and took < least * RATE_S and contended():
            answer.too_slow = True
            raise ArkaError(
                f"Other reads wait, and {took} bytes of this answer were read in {RATE_S} s; the least is {least} a "
                "second (limits.min_bytes_per_s): read again, and faster",
                code=ErrorCode.OVERLOADED,
            )


def _public_header(header: bytes) -> bytes:
    """A schema's flatbuffer without the field ids and marks that the scan put there."""
    framed = _CONTINUATION + len(header).to_bytes(4, "little") + header
    schema = pa.ipc.read_schema(pa.py_buffer(framed))
    return bytes(pa.ipc.read_message(public_schema(schema).serialize()).metadata)


__all__ = ["AnswerBuffers", "BufferedAnswer", "check_rate", "deliver"]
