"""One HTTP/2 connection: a nursery with one reader, one writer, one clock and a task for each RPC (T2).

Owns: which frames h2 sees, GOAWAY, and how a connection ends. Does not own frame parsing
(``arka._core.wire``), windows (``arka.flight.flow``, h2), streams (``arka.flight.streams``) nor gRPC.

h2 gets every frame but DATA, GOAWAY, and what is well formed of WINDOW_UPDATE and PING, whole. DATA goes from the
receive buffer to its stream's assembler; GOAWAY would close h2 for good while the peer merely opens no more streams
(T1). Our WINDOW_UPDATE and GOAWAY frames are raw for the same reasons. Clients send a WINDOW_UPDATE or a PING with
almost every ack that they read: h2 took a tenth of a round trip for them, and holds no state of a PING.

What the reader's turn makes due is written at its end if the writer rests and the socket takes it: that saves a
task switch for each ack. So is what a tier's rise makes due (``rounds``), in that tier's task. The writer does the
rest, whatever has to wait first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import uuid4

import h2.events
import h2.exceptions
import structlog
import trio
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from arka._core import wire
from arka._core.wire import CONNECTION_WINDOW, INITIAL_WINDOW, MessageAssembler, Splitter, WireError
from arka.errors import ArkaError, ErrorCode
from arka.flight import frames
from arka.flight.channels import address_of, channel_of, peer_of
from arka.flight.deadlines import Deadlines, Due
from arka.flight.floods import Flood, FloodGuard
from arka.flight.flow import Wakeup
from arka.flight.frames import FrameType
from arka.flight.h2state import HEADER_LIST_BYTES, SETTINGS_VALUES
from arka.flight.h2state import make_h2 as _make_h2
from arka.flight.outbound import Parts
from arka.flight.streams import ADVERTISED_STREAMS, Shared, Streams
from arka.flight.turns import (
    BLOCK_BYTES_PER_UNIT,
    COSTS,
    FRAME_BYTES_PER_UNIT,
    MESSAGE_BYTES_PER_UNIT,
    RESET_UNITS,
    SETTINGS_UNITS,
    STREAMS_PER_LOOK,
    STREAMS_PER_SLICE,
    STREAMS_PER_UNIT,
    ReaderTurn,
)
from arka.options import Limits

log = structlog.get_logger(__name__)

#: MAX_FRAME_SIZE, bytes: larger frames are no faster, and one frame is discarded whole (T9).
MAX_FRAME_BYTES: Final = 1024 * 1024
#: Most bytes of control frames that wait for the socket because the peer does not read (T9).
_CONTROL_BYTES: Final = 256 * 1024
#: Bytes for the connection's window that are put off: a small part of its 2**31-1.
_CONNECTION_CREDIT_BYTES: Final = 1024 * 1024
#: Seconds to wait for a peer to read our last frames, or to take note of a GOAWAY.
GOODBYE_S: Final = 1.0
#: How often in limits.message_stall_s the progress of streams is looked at.
_STALL_CHECKS: Final = 4
_NOT_SETTINGS: Final = "the first frame is not SETTINGS"
_DRAIN_PING: Final = b"arkdrain"
_KEEPALIVE_PING: Final = b"arkalive"
#: Bytes that a PING carries (RFC 9113, section 6.7).
_PING_BYTES: Final = 8
#: Bytes of a peer's GOAWAY text that are logged.
_GOAWAY_TEXT_BYTES: Final = 256


class Connection:
    """One client's connection, from its preface to its end. Nothing it does can end another connection."""

    def __init__(self, stream: trio.abc.Stream, shared: Shared) -> None:
        """Prepare to serve ``stream``; the caller closes it after ``run``."""
        self._stream = stream
        self._limits = shared.limits
        self._lines = shared.lines
        self._open = shared.connections
        self._round = shared.round
        self._channel = channel_of(stream)
        self._peer = peer_of(stream)
        self._ledger = shared.ledger
        self._account = shared.ledger.open_connection(address_of(stream))
        self._splitter = Splitter(MAX_FRAME_BYTES)
        self._h2 = _make_h2()
        self._now = now = trio.current_time()
        self._floods = FloodGuard(now, requests=ADVERTISED_STREAMS * shared.limits.streams_per_connection)
        self._turn = ReaderTurn(shared.turns, address_of(stream))
        self._deadlines = Deadlines(shared.limits, now)
        self._wakeup = Wakeup()
        # Whether the reader is acting on what came, and whether that made something due.
        self._in_turn = False
        self._due = False
        # What is left of a write that the reader began: it goes out before anything else.
        self._unsent: Sequence[bytes | memoryview] = ()
        self._streams = Streams(
            shared,
            self._h2,
            self._splitter,
            self._peer,
            account=self._account,
            count=self._count,
            wake=self._wake,
            set_busy=self._set_busy,
        )
        # Frames of our own and of h2's that are not DATA, in order.
        self._control = bytearray(_first_frames(shared.limits))
        self._flushed = trio.Event()
        self._reading = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._settings_seen = False
        self._connection_widened = False
        self._drain_asked = False
        self._goaway_seen = False
        # Why the connection ends, once it does.
        self._ending: str | None = None
        self._bytes_in = 0
        self._bytes_out = 0

    async def run(self) -> None:
        """Serve until either side ends the connection.

        Cancellation: RPCs are cancelled, the peer is told nothing more.
        """
        started = self._now
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._write)
                nursery.start_soon(self._watch)
                if self._drain_asked:
                    nursery.start_soon(self._drain)
                with self._reading:
                    await self._read(nursery)
                await self._say_goodbye()
                nursery.cancel_scope.cancel()
        finally:
            self._streams.abandon(self._streams)
            self._ledger.close_connection(self._account)
            self._lines.write(
                log.info,
                "connection.closed",
                trio.current_time(),
                peer=self._peer,
                reason=self._ending or "cancelled",
                rpcs=self._streams.calls,
                bytes_in=self._bytes_in,
                bytes_out=self._bytes_out,
                seconds=round(trio.current_time() - started, 3),
            )

    def start_drain(self) -> None:
        """Ask the peer to open no more streams; those that are open go on, without new window (T1, T19)."""
        if not self._drain_asked:
            self._drain_asked = True
            self._streams.withhold()
            if self._nursery is not None and self._ending is None:
                self._nursery.start_soon(self._drain)

    def end_idle(self) -> None:
        """End, since another connection needs the place (``arka.flight.connections``)."""
        if self._ending is None:
            self._h2.close_connection(ErrorCodes.NO_ERROR, b"idle, and others need the connection")
            self._stop("idle, and others need the place")

    def _set_busy(self, busy: bool) -> None:
        self._deadlines.set_busy(busy, trio.current_time())
        self._open.set_busy(self, busy)

    # -- reading ----------------------------------------------------------------------------------

    async def _read(self, nursery: trio.Nursery) -> None:
        """Take bytes in and act on them until the connection ends."""
        splitter, turn = self._splitter, self._turn
        try:
            while size := await self._channel.receive(splitter):
                self._now = now = trio.current_time()
                self._deadlines.heard(now)
                self._bytes_in += size
                self._in_turn = True
                while event := splitter.next():
                    self._handle(event, nursery)
                    turn.events += 1
                    turn.left -= COSTS[event]
                    if turn.left <= 0:
                        await self._next_turn()
                if (lacking := splitter.lacking()) is not None:
                    lacking.owner.intake.step(splitter.frame_left)
                self._end_turn(expects_more=self._channel.expects_more)
                self._in_turn = False
            self._ending = self._ending or "the peer closed it"
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._ending = self._ending or "the peer is gone"
        except WireError as error:
            self._fail(ErrorCodes(error.code), error.detail)
        except h2.exceptions.ProtocolError as error:
            # h2 has its GOAWAY ready.
            self._ending = self._ending or f"{ErrorCodes(error.error_code).name}: {error}"
        except Exception:
            # The outermost handler of a connection: a bug, or one of h2's, ends this connection and no other.
            incident = uuid4().hex[:12]
            log.exception("connection.failed", peer=self._peer, incident=incident)
            self._fail(ErrorCodes.INTERNAL_ERROR, f"incident {incident}")
        finally:
            self._in_turn = False

    async def _next_turn(self) -> None:
        """Let others run in the middle of what was received (T22).

        What it has caused so far is written now if this takes longer than a pass of the loop, else at the end.
        """
        pause_s = self._floods.pause(Flood.REQUESTS, self._now)
        if not pause_s and self._turn.is_next:
            await self._turn.wait_next()
            return
        self._end_turn(expects_more=True)
        self._in_turn = False
        if pause_s:
            await trio.sleep(pause_s)
        await self._turn.wait_next()
        self._now = trio.current_time()
        self._in_turn = True

    def _handle(self, event: int, nursery: trio.Nursery) -> None:
        """Act on one event of the splitter's; the frequent ones first."""
        splitter = self._splitter
        if event == wire.MESSAGE:
            length = splitter.length
            splitter.assembler.owner.intake.complete(splitter.message, length)
            if length >= MESSAGE_BYTES_PER_UNIT:
                self._turn.spend_message(length)
        elif event == wire.PREFIX:
            splitter.assembler.owner.intake.begin(splitter.length, splitter.assembler.shortfall)
        elif event == wire.WINDOW:
            self._handle_window(nursery)
        elif event == wire.CONTROL:
            self._handle_frame(nursery)
        elif event == wire.ENDED:
            self._h2.receive_data(frames.end_of_stream(splitter.stream_id))
            self._streams.end_by_peer(splitter.stream_id)
        elif event == wire.REFUSED:
            splitter.assembler.owner.intake.fail(_error_of(splitter.assembler))
        elif event == wire.STRAY:
            self._control += self._streams.judge_stray(splitter.stream_id)
        elif event == wire.OVERRUN:
            self._streams.reset(splitter.assembler.owner, ErrorCodes.FLOW_CONTROL_ERROR)
        elif event == wire.LENGTH:
            self._streams.reset(splitter.assembler.owner, ErrorCodes.PROTOCOL_ERROR)
        elif event == wire.PADDING:
            splitter.assembler.owner.intake.add_padding(splitter.length)
        elif event == wire.LOW:
            splitter.assembler.owner.intake.step(0)
        elif event == wire.EMPTY:
            self._count(Flood.EMPTY_DATA)
        elif event == wire.PREFACE:
            self._h2.receive_data(splitter.frame)

    def _handle_window(self, nursery: trio.Nursery) -> None:
        """Act on a WINDOW_UPDATE."""
        stream_id, increment = self._splitter.stream_id, self._splitter.length
        if not self._settings_seen:
            raise WireError(ErrorCodes.PROTOCOL_ERROR, _NOT_SETTINGS)
        if not self._streams.enlarge(stream_id, increment):
            self._count(Flood.STRAY_WINDOW)
            for event in self._h2.receive_data(frames.window_update(stream_id, increment)):
                self._handle_h2(event, nursery)
        elif stream_id:
            self._streams.widen(stream_id)
        else:
            self._connection_widened = True

    def _handle_frame(self, nursery: trio.Nursery) -> None:
        """Act on a frame other than DATA, most of them by way of h2."""
        splitter = self._splitter
        kind, flags, stream_id = splitter.frame_type, splitter.flags, splitter.stream_id
        in_block = kind in (FrameType.HEADERS, FrameType.CONTINUATION)
        self._turn.spend(splitter.length // (BLOCK_BYTES_PER_UNIT if in_block else FRAME_BYTES_PER_UNIT))
        if not self._settings_seen:
            if kind != FrameType.SETTINGS or flags & frames.ACK:
                raise WireError(ErrorCodes.PROTOCOL_ERROR, _NOT_SETTINGS)
            self._settings_seen = True
            self._deadlines.shook_hands()
        if kind == FrameType.GOAWAY:
            self._handle_goaway(stream_id, splitter.frame)
            return
        if kind == FrameType.RST_STREAM:
            self._count(Flood.RESETS_RECEIVED)
            self._turn.spend(RESET_UNITS)
            # h2 takes no notice of this one (T8).
            if self._streams.is_idle(stream_id):
                raise WireError(ErrorCodes.PROTOCOL_ERROR, f"RST_STREAM on stream {stream_id}, which is idle")
        elif kind == FrameType.SETTINGS:
            self._count(Flood.SETTINGS)
            if flags & frames.ACK and splitter.length:
                raise WireError(ErrorCodes.FRAME_SIZE_ERROR, "an acknowledgement of SETTINGS has a payload")
            if splitter.length > SETTINGS_VALUES * frames.SETTING_BYTES:
                raise WireError(ErrorCodes.ENHANCE_YOUR_CALM, f"more than {SETTINGS_VALUES} values in one SETTINGS")
            # A new INITIAL_WINDOW_SIZE changes the window of each open stream.
            self._turn.spend(SETTINGS_UNITS + len(self._streams) // STREAMS_PER_UNIT)
        elif kind == FrameType.PING:
            self._count(Flood.PING)
            if stream_id == 0 and splitter.length == _PING_BYTES:
                self._handle_ping(flags, splitter.frame[-_PING_BYTES:])
                return
        elif kind == FrameType.PRIORITY or kind > FrameType.CONTINUATION:
            self._count(Flood.OTHER)
        if kind in (FrameType.HEADERS, FrameType.CONTINUATION) and flags & frames.END_HEADERS:
            self._floods.take(Flood.REQUESTS, self._now)
        events = self._h2.receive_data(splitter.frame)
        for event in events:
            self._handle_h2(event, nursery)
        if not events and kind in (FrameType.HEADERS, FrameType.CONTINUATION) and flags & frames.END_HEADERS:
            # h2 has answered HEADERS on a stream that was reset with another reset.
            self._count(Flood.RESETS_CAUSED)

    def _handle_h2(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        """Act on an event of h2's."""
        if isinstance(event, h2.events.WindowUpdated):
            if event.stream_id:
                self._streams.widen(event.stream_id)
            else:
                self._connection_widened = True
        elif isinstance(event, h2.events.RequestReceived):
            self._turn.spend_headers(self._h2.decoder.decoded_bytes, len(event.headers))
            self._streams.begin(event, nursery)
        elif isinstance(event, h2.events.StreamEnded):
            self._streams.end_by_peer(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self._streams.drop(event.stream_id, by_peer=event.remote_reset)
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            self._connection_widened = True

    def _handle_ping(self, flags: int, data: bytes) -> None:
        """Answer a PING, or take the answer to ours."""
        if not flags & frames.ACK:
            self._control += frames.ping_ack(data)
        elif data == _DRAIN_PING:
            self._finish_drain()

    def _handle_goaway(self, stream_id: int, frame: bytes) -> None:
        """Note that the peer opens no more streams; its open ones go on (T1)."""
        if stream_id:
            raise WireError(ErrorCodes.PROTOCOL_ERROR, f"GOAWAY on stream {stream_id}")
        if len(frame) < 17:
            raise WireError(ErrorCodes.FRAME_SIZE_ERROR, f"GOAWAY of {len(frame) - 9} bytes")
        self._count(Flood.OTHER)
        code = int.from_bytes(frame[13:17], "big")
        if code != ErrorCodes.NO_ERROR and not self._goaway_seen:
            # Once: a client that repeats it must not fill the log.
            self._goaway_seen = True
            detail = frame[17 : 17 + _GOAWAY_TEXT_BYTES].decode("ascii", "replace")
            self._lines.write(log.info, "connection.peer_goaway", self._now, peer=self._peer, code=code, detail=detail)

    def _count(self, kind: Flood) -> None:
        if not self._floods.allow(kind, self._now):
            raise WireError(ErrorCodes.ENHANCE_YOUR_CALM, f"too many {kind.value}")

    def _wake(self) -> None:
        """See to it that what is due is written: at the end of the reader's turn or of the round, or by the writer."""
        self._due = True
        if not self._in_turn and not self._round.join(self):
            self._wakeup.set()

    def write_due(self, *, at_once: bool) -> None:
        """Write what a round has made due; what does not go at once is left to the writer."""
        if at_once and self._due and self._ending is None:
            try:
                self._write_now()
            except Exception:
                # It is the tiers that call, and none of them is to pay for a bug of a connection's.
                incident = uuid4().hex[:12]
                log.exception("connection.failed", peer=self._peer, incident=incident)
                self._stop(f"incident {incident}")
        else:
            self._wakeup.set()

    def _end_turn(self, *, expects_more: bool) -> None:
        """Write what the last bytes caused, or see to it that it is written.

        Args:
            expects_more: more bytes are at hand: what they cause goes out together with this.
        """
        control = self._control
        control += self._h2.data_to_send()
        if len(control) > _CONTROL_BYTES:
            raise WireError(ErrorCodes.ENHANCE_YOUR_CALM, "answers pile up: the peer does not read them")
        if self._connection_widened:
            # Once for all WINDOW_UPDATEs of a read: each touches every stream that waits.
            self._connection_widened = False
            self._streams.widen(0)
        credit = self._splitter.take_credit(_CONNECTION_CREDIT_BYTES)
        if credit:
            control += frames.window_update(0, credit)
        if not control and not self._due:
            return
        if expects_more:
            self._wakeup.set()
        else:
            self._write_now()

    def _write_now(self) -> None:
        """Do what the writer would do, unless it is at work or drains; what does not go at once is left to it."""
        if self._wakeup.waiting and not self._drain_asked:
            parts = self._gather()
            size = sum(map(len, parts))
            if size:
                self._bytes_out += size
                self._unsent = self._channel.send_now(parts)
            if not self._unsent and not self._streams.has_output:
                return
        self._wakeup.set()

    # -- writing ----------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Write what is due until the connection ends and all of it is out."""
        try:
            while True:
                if self._unsent:
                    unsent, self._unsent = self._unsent, ()
                    await self._channel.send_all(unsent)
                parts = self._gather()
                size = sum(map(len, parts))
                if size:
                    self._bytes_out += size
                    await self._channel.send_all(parts)
                elif self._ending is not None:
                    break
                elif self._streams.last_served != frames.MAX_STREAM_ID and not self._streams:
                    self._stop("drained")
                elif not self._streams.has_output:
                    await self._wakeup.wait()
                else:
                    # Streams without window had their turn to no effect: others run before the next of them do.
                    await trio.lowlevel.checkpoint()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._stop("the peer is gone")
        self._flushed.set()

    def _gather(self) -> Parts:
        """Take one write's worth of what is due."""
        self._due = False
        parts: Parts = [bytes(self._control), self._streams.take_updates(), self._h2.data_to_send()]
        self._control.clear()
        self._streams.pump(parts)
        # What the turns have caused: resets of streams whose client was still sending.
        parts.append(self._h2.data_to_send())
        return parts

    # -- time and the end -------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep the connection's deadlines."""
        while True:
            now = trio.current_time()
            stall_check_at = now + self._limits.message_stall_s / _STALL_CHECKS
            await trio.sleep_until(min(self._deadlines.next_at(now), stall_check_at))
            if self._ending is not None:
                return
            now = trio.current_time()
            due = self._deadlines.due(now)
            if due is Due.PING:
                self._h2.ping(_KEEPALIVE_PING)
                self._wakeup.set()
            elif due is Due.IDLE:
                self._h2.close_connection(ErrorCodes.NO_ERROR, b"idle")
                self._stop("idle")
            elif due is Due.HANDSHAKE:
                self._stop("the handshake took too long")
            elif due is Due.SILENT:
                self._stop("the peer does not answer")
            for streams in self._streams.slices(STREAMS_PER_LOOK):
                self._streams.check_progress(streams, now)
                await trio.lowlevel.checkpoint()

    async def _drain(self) -> None:
        """Tell the peer of the drain in two steps, so that streams on their way meanwhile are still served."""
        self._control += frames.goaway(frames.MAX_STREAM_ID, ErrorCodes.NO_ERROR, "draining")
        self._h2.ping(_DRAIN_PING)
        self._wakeup.set()
        await trio.sleep(GOODBYE_S)
        self._finish_drain()

    def _finish_drain(self) -> None:
        """Name the last stream that is served: the peer has had time to hear of the drain."""
        if self._streams.last_served == frames.MAX_STREAM_ID and self._ending is None:
            self._streams.last_served = last = self._h2.highest_inbound_stream_id
            self._control += frames.goaway(last, ErrorCodes.NO_ERROR, "draining")
            self._wakeup.set()

    def _fail(self, code: ErrorCodes, detail: str) -> None:
        """End the connection for what its peer did, and say so."""
        self._h2.close_connection(code, detail.encode("ascii", "replace"))
        self._ending = self._ending or f"{code.name}: {detail}"

    def _stop(self, reason: str) -> None:
        """End the connection from outside the reader."""
        self._ending = self._ending or reason
        self._reading.cancel()

    async def _say_goodbye(self) -> None:
        """Cancel what runs, write the last frames, and let the peer read them."""
        for streams in self._streams.slices(STREAMS_PER_SLICE):
            # A client may leave a thousand RPCs behind at once, and each of them takes a while to end.
            self._streams.abandon(streams)
            await trio.lowlevel.checkpoint()
        self._wakeup.set()
        with trio.move_on_after(GOODBYE_S):
            await self._flushed.wait()
            try:
                if isinstance(self._stream, trio.abc.HalfCloseableStream):
                    await self._stream.send_eof()
                # Closing with bytes unread would reset the connection, and the peer lose our GOAWAY.
                scratch = [memoryview(bytearray(4096))]
                while await self._channel.receive_into(scratch):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return


def _first_frames(limits: Limits) -> bytes:
    """What the server says first."""
    values: dict[int, int] = {
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.MAX_CONCURRENT_STREAMS: ADVERTISED_STREAMS * limits.streams_per_connection,
        SettingCodes.INITIAL_WINDOW_SIZE: INITIAL_WINDOW,
        SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
        SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_LIST_BYTES,
    }
    return frames.settings(values) + frames.window_update(0, CONNECTION_WINDOW - 65_535)


_CODE_OF_REFUSAL: Final = {
    "compressed": ErrorCode.UNIMPLEMENTED,
    "flag": ErrorCode.INTERNAL,
    "too_large": ErrorCode.TOO_LARGE,
    "malformed": ErrorCode.INVALID_REQUEST,
}


def _error_of(assembler: MessageAssembler) -> ArkaError:
    """What an RPC is told about bytes that are no message (T12, T17)."""
    refusal = assembler.error
    assert refusal is not None
    return ArkaError(refusal.detail, code=_CODE_OF_REFUSAL[refusal.kind])


__all__ = ["GOODBYE_S", "MAX_FRAME_BYTES", "Connection"]
