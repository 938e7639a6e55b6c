"""HTTP/2 connections: one nursery each, with one reader, one writer, one clock and a task for each RPC (T2).

Owns: which frames h2 sees, the life of streams, GOAWAY, and how a connection ends. Does not own frame parsing
(``arka._core.wire``), windows (``arka.flight.flow``, h2), timers (``arka.flight.deadlines``) nor gRPC.

h2 gets every frame but DATA and GOAWAY, whole. DATA goes from the receive buffer to its stream's assembler;
GOAWAY would close h2 for good while the peer merely opens no more streams (T1). Our WINDOW_UPDATE and GOAWAY
frames are raw for the same reasons.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final
from uuid import uuid4

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import structlog
import trio
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from arka._core import wire
from arka._core.wire import CONNECTION_WINDOW, INITIAL_WINDOW, MessageAssembler, Refusal, Splitter, WireError
from arka.errors import AdmissionRejected, ArkaError, ErrorCode, Unavailable
from arka.flight import frames
from arka.flight.deadlines import Deadlines, Due
from arka.flight.floods import Flood, FloodGuard
from arka.flight.flow import ReadAhead, StreamIntake, Wakeup
from arka.flight.frames import FrameType
from arka.flight.grpc import Call, Request, Route, parse_metadata, parse_timeout, read_request, run_call
from arka.flight.outbound import StreamOutput, TurnOrder
from arka.flight.sources import peer_of, source_of
from arka.flight.status import RpcStatus, Status, status_of
from arka.options import Limits
from arka.tiers.admission import Ledger

log = structlog.get_logger(__name__)

#: MAX_FRAME_SIZE, bytes: larger frames are no faster, and one frame is discarded whole (T9).
MAX_FRAME_BYTES: Final = 1024 * 1024
#: Streams that get a turn in one write to the socket.
_TURNS_PER_WRITE: Final = 16
#: Most bytes of control frames that wait for the socket because the peer does not read (T9).
_CONTROL_BYTES: Final = 256 * 1024
#: Bytes for the connection's window that are put off: a small part of its 2**31-1.
_CONNECTION_CREDIT_BYTES: Final = 1024 * 1024
#: How many times limits.streams_per_connection is advertised: at the advertised limit clients hang in silence (T10).
_ADVERTISED_STREAMS: Final = 4
#: Streams reset by us that are remembered: their DATA is on its way and no error.
_RESETS_REMEMBERED: Final = 4096
#: Seconds to wait for a peer to read our last frames, or to take note of a GOAWAY.
_GOODBYE_S: Final = 1.0
#: How often in limits.message_stall_s a stream's progress is looked at.
_STALL_CHECKS: Final = 4
#: MAX_HEADER_LIST_SIZE, bytes (T9).
_HEADER_LIST_BYTES: Final = 64 * 1024
#: Largest content-length that is told from a larger one.
_CONTENT_BYTES: Final = 2**62
_DRAIN_PING: Final = b"arkdrain"
_KEEPALIVE_PING: Final = b"arkalive"
_FOREIGN_BODY: Final = b"This endpoint speaks gRPC (Arrow Flight).\n"

_RESPONSE_FIELDS: Final = [
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b"identity"),
]


class _Stream:
    """One stream that is open in HTTP/2's sense, with its RPC if there is one."""

    __slots__ = ("id", "intake", "output", "peer_ended", "scope")

    def __init__(self, stream_id: int, intake: StreamIntake, output: StreamOutput) -> None:
        self.id = stream_id
        self.intake = intake
        self.output = output
        # Cancelled when the stream is over before its RPC.
        self.scope = trio.CancelScope()
        self.peer_ended = False


class Connection:
    """One client's connection, from its preface to its end. Nothing it does can end another connection."""

    def __init__(self, stream: trio.abc.Stream, factory: ConnectionFactory) -> None:
        """Prepare to serve ``stream``; the caller closes it after ``run``."""
        self._stream = stream
        self._factory = factory
        self._limits = factory.limits
        self._source = source_of(stream)
        self._peer = peer_of(stream)
        self._splitter = Splitter(MAX_FRAME_BYTES)
        self._h2 = _make_h2()
        self._streams: dict[int, _Stream] = {}
        # Streams that we reset while the peer could still be sending, oldest first; and the newest one forgotten.
        self._resets: OrderedDict[int, None] = OrderedDict()
        self._resets_forgotten = 0
        self._turns = TurnOrder()
        # Streams that are owed a WINDOW_UPDATE.
        self._updates: dict[_Stream, None] = {}
        self._control = bytearray(_first_frames(self._limits))
        self._wakeup = Wakeup()
        self._flushed = trio.Event()
        self._reading = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        now = trio.current_time()
        self._floods = FloodGuard(now)
        self._deadlines = Deadlines(self._limits, now)
        self._now = now
        self._settings_seen = False
        self._draining = False
        # The last stream that is served, once the final GOAWAY has said so.
        self._last_served: int | None = None
        # Why the connection ends, once it does.
        self._ending: str | None = None
        self._calls = 0
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
                if self._factory.draining:
                    self.start_drain()
                nursery.start_soon(self._write)
                nursery.start_soon(self._watch)
                with self._reading:
                    await self._read()
                await self._say_goodbye()
                nursery.cancel_scope.cancel()
        finally:
            for stream in list(self._streams.values()):
                self._forget(stream)
            log.info(
                "connection.closed",
                peer=self._peer,
                reason=self._ending or "cancelled",
                rpcs=self._calls,
                bytes_in=self._bytes_in,
                bytes_out=self._bytes_out,
                seconds=round(trio.current_time() - started, 3),
            )

    def start_drain(self) -> None:
        """Ask the peer to open no more streams; those that are open go on, without new window (T1, T19)."""
        if self._draining or self._ending is not None:
            return
        self._draining = True
        # Two steps, so that streams that are on their way when the peer hears of it are still served.
        self._control += frames.goaway(frames.MAX_STREAM_ID, ErrorCodes.NO_ERROR, "draining")
        self._h2.ping(_DRAIN_PING)
        for stream in self._streams.values():
            if stream.intake.assembler.flight_data:
                stream.intake.withhold()
        if self._nursery is not None:
            self._nursery.start_soon(self._drain_anyway)
        self._wakeup.set()

    # -- reading ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Take bytes in and act on them until the connection ends."""
        splitter = self._splitter
        try:
            while True:
                size = await self._source.receive_into(splitter.targets())
                if not size:
                    self._ending = self._ending or "the peer closed it"
                    return
                self._now = now = trio.current_time()
                self._deadlines.heard(now)
                self._bytes_in += size
                splitter.received(size)
                while event := splitter.next():
                    self._handle(event)
                self._pick_up()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._ending = self._ending or "the peer is gone"
        except WireError as error:
            self._fail(ErrorCodes(error.code), error.detail)
        except h2.exceptions.ProtocolError as error:
            # h2 has its GOAWAY ready.
            self._ending = self._ending or f"{error.error_code!r}: {error}"
        except Exception:
            # The outermost handler of a connection: a bug, or one of h2's, ends this connection and no other.
            incident = uuid4().hex[:12]
            log.exception("connection.failed", peer=self._peer, incident=incident)
            self._fail(ErrorCodes.INTERNAL_ERROR, f"incident {incident}")

    def _handle(self, event: int) -> None:
        """Act on one event of the splitter's."""
        splitter = self._splitter
        if event == wire.MESSAGE:
            splitter.assembler.owner.intake.complete(splitter.message, splitter.length)
        elif event == wire.PREFIX:
            splitter.assembler.owner.intake.begin(splitter.length, splitter.assembler.shortfall)
        elif event == wire.CONTROL:
            self._handle_frame(splitter.frame_type, splitter.flags, splitter.stream_id, splitter.frame)
        elif event == wire.ENDED:
            stream = splitter.assembler.owner
            self._h2.receive_data(frames.end_of_stream(stream.id))
            self._peer_ended(stream)
        elif event == wire.REFUSED:
            self._refuse_message(splitter.assembler)
        elif event == wire.STRAY:
            self._handle_stray(splitter.stream_id)
        elif event == wire.OVERRUN:
            self._reset(splitter.assembler.owner, ErrorCodes.FLOW_CONTROL_ERROR)
        elif event == wire.LENGTH:
            self._reset(splitter.assembler.owner, ErrorCodes.PROTOCOL_ERROR)
        elif event == wire.PADDING:
            splitter.assembler.owner.intake.add_padding(splitter.length)
        elif event == wire.EMPTY:
            self._count(Flood.EMPTY_DATA)
        elif event == wire.PREFACE:
            self._h2.receive_data(splitter.frame)

    def _refuse_message(self, assembler: MessageAssembler) -> None:
        refusal = assembler.error
        assert refusal is not None
        assembler.owner.intake.fail(_error_of(refusal))

    def _handle_stray(self, stream_id: int) -> None:
        """Judge DATA on a stream that is not live; the splitter discards it (T7)."""
        self._count(Flood.STRAY_DATA)
        if stream_id in self._resets or 0 < stream_id <= self._resets_forgotten:
            return
        if self._is_idle(stream_id):
            raise WireError(ErrorCodes.PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is idle")
        stream = self._streams.get(stream_id)
        if stream is None:
            raise WireError(ErrorCodes.STREAM_CLOSED, f"DATA on stream {stream_id}, which is closed")
        self._reset(stream, ErrorCodes.STREAM_CLOSED)

    def _handle_frame(self, kind: int, flags: int, stream_id: int, frame: bytes) -> None:
        """Act on a frame other than DATA, most of them by way of h2."""
        if not self._settings_seen:
            if kind != FrameType.SETTINGS or flags & frames.ACK:
                raise WireError(ErrorCodes.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self._settings_seen = True
            self._deadlines.shook_hands()
        if kind == FrameType.GOAWAY:
            self._handle_goaway(stream_id, frame)
            return
        if kind == FrameType.RST_STREAM:
            self._count(Flood.RESETS_RECEIVED)
            # h2 takes no notice of this one (T8).
            if self._is_idle(stream_id):
                raise WireError(ErrorCodes.PROTOCOL_ERROR, f"RST_STREAM on stream {stream_id}, which is idle")
        elif kind == FrameType.SETTINGS:
            self._count(Flood.SETTINGS)
        elif kind == FrameType.PING:
            self._count(Flood.PING)
        elif kind == FrameType.PRIORITY or kind > FrameType.CONTINUATION:
            self._count(Flood.OTHER)
        events = self._h2.receive_data(frame)
        for event in events:
            self._handle_h2(event)
        if not events and kind == FrameType.HEADERS and flags & frames.END_HEADERS:
            # h2 has answered HEADERS on a stream that was reset with another reset.
            self._count(Flood.RESETS_CAUSED)

    def _handle_h2(self, event: h2.events.Event) -> None:
        """Act on an event of h2's."""
        if isinstance(event, h2.events.RequestReceived):
            self._open(event)
        elif isinstance(event, h2.events.WindowUpdated):
            self._windows_moved(event.stream_id)
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            self._windows_moved(0)
        elif isinstance(event, h2.events.StreamEnded):
            stream = self._streams.get(event.stream_id)
            if stream is not None and not stream.peer_ended:
                self._peer_ended(stream)
        elif isinstance(event, h2.events.StreamReset):
            if not event.remote_reset:
                self._count(Flood.RESETS_CAUSED)
            stream = self._streams.get(event.stream_id)
            if stream is not None:
                self._forget(stream)
        elif isinstance(event, h2.events.PingAckReceived) and event.ping_data == _DRAIN_PING:
            self._finish_drain()

    def _handle_goaway(self, stream_id: int, frame: bytes) -> None:
        """Note that the peer opens no more streams; its open ones go on (T1)."""
        if stream_id:
            raise WireError(ErrorCodes.PROTOCOL_ERROR, f"GOAWAY on stream {stream_id}")
        if len(frame) < 17:
            raise WireError(ErrorCodes.FRAME_SIZE_ERROR, f"GOAWAY of {len(frame) - 9} bytes")
        code = int.from_bytes(frame[13:17], "big")
        if code != ErrorCodes.NO_ERROR:
            log.info(
                "connection.peer_goaway",
                peer=self._peer,
                code=code,
                detail=frame[17:].decode("ascii", "replace"),
            )

    def _count(self, kind: Flood) -> None:
        if not self._floods.allow(kind, self._now):
            raise WireError(ErrorCodes.ENHANCE_YOUR_CALM, f"too many {kind.value}")

    def _is_idle(self, stream_id: int) -> bool:
        return stream_id % 2 == 0 or stream_id > self._h2.highest_inbound_stream_id

    # -- streams ----------------------------------------------------------------------------------

    def _open(self, event: h2.events.RequestReceived) -> None:
        """Begin a stream: start its RPC, or answer why not."""
        stream_id = event.stream_id
        request = read_request(event.headers)
        route = self._factory.routes.get(request.path) if request.is_grpc else None
        limits = self._limits
        if len(self._streams) >= _ADVERTISED_STREAMS * limits.streams_per_connection or (
            self._last_served is not None and stream_id > self._last_served
        ):
            self._h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            self._remember_reset(stream_id)
            self._count(Flood.RESETS_CAUSED)
            return
        assembler = MessageAssembler(
            route is not None and route.flight_data, self._factory.message_limit, limits.batch_bytes
        )
        stream = _Stream(
            stream_id,
            StreamIntake(
                assembler, self._factory.ledger, self._factory.read_ahead, lambda urgent: self._owe_window(stream, urgent)
            ),
            StreamOutput(stream_id, self._make_ready),
        )
        assembler.owner = stream
        assembler.content_bytes = min(request.content_bytes, _CONTENT_BYTES)
        self._streams[stream_id] = stream
        self._deadlines.set_busy(True, self._now)
        self._splitter.open(stream_id, assembler)
        if event.stream_ended is not None and request.content_bytes > 0:
            self._reset(stream, ErrorCodes.PROTOCOL_ERROR)
        elif not request.is_grpc:
            self._refuse_foreign(stream, is_head=request.is_head)
        elif (refusal := self._why_not(request.path, route)) is not None:
            self._answer(stream, refusal)
        else:
            assert route is not None
            self._start(stream, route, request)

    def _why_not(self, path: str, route: Route | None) -> RpcStatus | None:
        """The status of an RPC that is not to run."""
        if route is None:
            return RpcStatus(Status.UNIMPLEMENTED, f"[unimplemented] Unknown method {path}")
        limits, here, total = self._limits, len(self._streams), self._factory.streams
        if here > limits.streams_per_connection:
            detail = (
                f"{here - 1} RPCs are open on this connection, allowed are {limits.streams_per_connection}"
            )
        elif total >= limits.streams:
            detail = f"{total} RPCs are open on this server, allowed are {limits.streams}"
        else:
            return None
        return status_of(AdmissionRejected(f"{detail}: retry later"))

    def _start(self, stream: _Stream, route: Route, request: Request) -> None:
        """Start an RPC's task."""
        try:
            timeout = parse_timeout(request.timeout) if request.timeout is not None else None
            metadata = parse_metadata(request.fields)
        except ArkaError as error:
            self._answer(stream, status_of(error))
            return
        call = Call(
            request.path,
            metadata,
            self._peer,
            None if timeout is None else self._now + timeout,
            stream.intake,
            stream.output,
        )
        if self._draining and route.flight_data:
            stream.intake.withhold()
        self._calls += 1
        self._h2.send_headers(stream.id, _RESPONSE_FIELDS)
        assert self._nursery is not None
        self._factory.streams += 1
        self._nursery.start_soon(self._serve, stream, route, call)

    async def _serve(self, stream: _Stream, route: Route, call: Call) -> None:
        """Run an RPC and queue its trailers behind what it sent."""
        try:
            with stream.scope:
                status = await run_call(route, call)
                stream.output.finish(status.trailers(), trio.current_time())
        finally:
            self._factory.streams -= 1
            stream.intake.abandon()

    def _answer(self, stream: _Stream, status: RpcStatus) -> None:
        """End an RPC that did not run, with trailers alone."""
        stream.intake.abandon()
        stream.output.finish([*_RESPONSE_FIELDS, *status.trailers()], self._now)

    def _refuse_foreign(self, stream: _Stream, *, is_head: bool) -> None:
        """Answer what is not gRPC with 415 and a body (T11)."""
        stream.intake.abandon()
        self._h2.send_headers(
            stream.id,
            [
                (b":status", b"415"),
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", b"%d" % len(_FOREIGN_BODY)),
            ],
        )
        if not is_head:
            stream.output.put_nowait(_FOREIGN_BODY)
        stream.output.finish([], self._now)

    def _peer_ended(self, stream: _Stream) -> None:
        stream.peer_ended = True
        stream.intake.end()
        self._splitter.close(stream.id)

    def _finished(self, stream: _Stream) -> None:
        """Note that a stream's trailers are out."""
        if not stream.peer_ended:
            # The peer may stop sending: its RPC has ended (RFC 9113, section 8.1).
            self._h2.reset_stream(stream.id, ErrorCodes.NO_ERROR)
            self._remember_reset(stream.id)
        self._forget(stream)

    def _reset(self, stream: _Stream, code: ErrorCodes) -> None:
        """End a stream for what its peer did."""
        self._count(Flood.RESETS_CAUSED)
        self._h2.reset_stream(stream.id, code)
        self._remember_reset(stream.id)
        self._forget(stream)

    def _remember_reset(self, stream_id: int) -> None:
        self._resets[stream_id] = None
        if len(self._resets) > _RESETS_REMEMBERED:
            self._resets_forgotten = max(self._resets_forgotten, self._resets.popitem(last=False)[0])

    def _forget(self, stream: _Stream) -> None:
        """Drop a stream that is closed on both sides, and cancel its RPC if it still runs."""
        del self._streams[stream.id]
        self._splitter.close(stream.id)
        self._turns.remove(stream.output)
        self._updates.pop(stream, None)
        stream.output.close()
        stream.intake.abandon()
        stream.scope.cancel()
        if not self._streams:
            self._deadlines.set_busy(False, trio.current_time())
            self._wakeup.set()

    # -- writing ----------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Write what is due until the connection ends and all of it is out."""
        try:
            while True:
                data = self._collect()
                if data:
                    await self._stream.send_all(data)
                    self._bytes_out += len(data)
                elif self._ending is not None:
                    break
                elif self._last_served is not None and not self._streams:
                    self._stop("drained")
                else:
                    await self._wakeup.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._stop("the peer is gone")
        self._flushed.set()

    def _collect(self) -> bytes:
        """Gather one write: control frames, window updates, and a turn of each of some streams."""
        connection, now = self._h2, self._now
        for _ in range(_TURNS_PER_WRITE):
            if not self._turns:
                break
            output = self._turns.take()
            more = output.pump(connection, now)
            if more:
                self._turns.add(output)
            elif more is None:
                self._finished(self._streams[output.stream_id])
        updates = [
            frames.window_update(stream.id, increment)
            for stream in self._updates
            if (increment := stream.intake.take_increment())
        ]
        self._updates.clear()
        data = b"".join((self._control, *updates, connection.data_to_send()))
        self._control.clear()
        return data

    def _pick_up(self) -> None:
        """See to it that what the last bytes caused is written."""
        control = self._control
        control += self._h2.data_to_send()
        if len(control) > _CONTROL_BYTES:
            raise WireError(ErrorCodes.ENHANCE_YOUR_CALM, "answers pile up: the peer does not read them")
        credit = self._splitter.take_credit(_CONNECTION_CREDIT_BYTES)
        if credit:
            control += frames.window_update(0, credit)
        if control:
            self._wakeup.set()

    def _make_ready(self, output: StreamOutput) -> None:
        self._turns.add(output)
        self._wakeup.set()

    def _owe_window(self, stream: _Stream, urgent: bool) -> None:
        self._updates.setdefault(stream)
        if urgent:
            self._wakeup.set()

    def _windows_moved(self, stream_id: int) -> None:
        """Give a turn to a stream whose window has grown; 0: to all of them."""
        if stream_id == 0:
            for stream in self._streams.values():
                self._make_ready(stream.output)
        elif (found := self._streams.get(stream_id)) is not None:
            self._make_ready(found.output)

    # -- time and the end -------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep the connection's deadlines."""
        stall_s = self._limits.message_stall_s
        while True:
            now = trio.current_time()
            await trio.sleep_until(min(self._deadlines.next_at(now), now + stall_s / _STALL_CHECKS))
            now = trio.current_time()
            if self._ending is not None:
                return
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
            for stream in list(self._streams.values()):
                self._check_progress(stream, now)

    def _check_progress(self, stream: _Stream, now: float) -> None:
        """End a stream whose message or whose reader has stalled."""
        stall_s = self._limits.message_stall_s
        if stream.intake.is_stalled(now, stall_s):
            detail = f"A message stopped in the middle: nothing of it came for {stall_s:g} s"
            stream.intake.fail(Unavailable(detail))
        output = stream.output
        if output.finishing and now - output.last_progress >= stall_s:
            output.give_up(
                status_of(Unavailable(f"The client read nothing for {stall_s:g} s")).trailers(), now
            )

    async def _drain_anyway(self) -> None:
        await trio.sleep(_GOODBYE_S)
        self._finish_drain()

    def _finish_drain(self) -> None:
        """Name the last stream that is served: the peer has had time to hear of the drain."""
        if self._last_served is None and self._ending is None:
            self._last_served = self._h2.highest_inbound_stream_id
            self._control += frames.goaway(self._last_served, ErrorCodes.NO_ERROR, "draining")
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
        for stream in list(self._streams.values()):
            self._forget(stream)
        self._wakeup.set()
        with trio.move_on_after(_GOODBYE_S):
            await self._flushed.wait()
            try:
                if isinstance(self._stream, trio.abc.HalfCloseableStream):
                    await self._stream.send_eof()
                # Closing with bytes unread would reset the connection, and the peer lose our GOAWAY.
                scratch = [memoryview(bytearray(4096))]
                while await self._source.receive_into(scratch):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return


class ConnectionFactory:
    """Serves connections, and counts what they have in common.

    Attributes:
        streams: RPCs that are running.
        draining: no new RPCs are wanted.
    """

    def __init__(self, routes: Mapping[str, Route], ledger: Ledger, limits: Limits) -> None:
        """Share routes and limits among connections.

        Args:
            routes: method path to what serves it.
            ledger: charged with every byte that a client may send before it may.
            limits: of streams, messages and times.
        """
        self.routes = routes
        self.ledger = ledger
        self.limits = limits
        self.read_ahead = ReadAhead(ledger)
        # What the ledger could never grant beside a stream's own initial window is refused at once.
        self.message_limit = min(limits.message_bytes, ledger.statistics().limit_bytes - 2 * INITIAL_WINDOW)
        self.streams = 0
        self.draining = False
        self._connections: dict[Connection, None] = {}
        self._idle = trio.Event()
        self._idle.set()

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection to its end. The caller closes ``stream``.

        Cancellation: its RPCs are cancelled, the peer is told nothing.
        """
        if len(self._connections) >= self.limits.connections:
            log.warning("connection.refused", peer=peer_of(stream), limit=self.limits.connections)
            return
        connection = Connection(stream, self)
        if not self._connections:
            self._idle = trio.Event()
        self._connections[connection] = None
        try:
            await connection.run()
        finally:
            del self._connections[connection]
            if not self._connections:
                self._idle.set()

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._connections)

    def start_drain(self) -> None:
        """Ask all clients to go elsewhere; open streams go on, without new window."""
        self.draining = True
        for connection in list(self._connections):
            connection.start_drain()

    async def wait_idle(self) -> None:
        """Wait until no connection is open. Cancellation: nothing changes."""
        await self._idle.wait()


def _make_h2() -> h2.connection.H2Connection:
    """Make h2's side of a connection. It announces nothing: our SETTINGS are raw."""
    config = h2.config.H2Configuration(client_side=False, header_encoding=None)
    connection = h2.connection.H2Connection(config)
    # h2 answers one stream too many with a fatal error; the limits that hold are ours (T10).
    connection.local_settings = h2.settings.Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: frames.MAX_STREAM_ID,
            SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_LIST_BYTES,
        },
    )
    connection.initiate_connection()
    connection.clear_outbound_data_buffer()
    return connection


def _first_frames(limits: Limits) -> bytes:
    """What the server says first."""
    values: dict[int, int] = {
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.MAX_CONCURRENT_STREAMS: _ADVERTISED_STREAMS * limits.streams_per_connection,
        SettingCodes.INITIAL_WINDOW_SIZE: INITIAL_WINDOW,
        SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
        SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_LIST_BYTES,
    }
    return frames.settings(values) + frames.window_update(0, CONNECTION_WINDOW - 65_535)


_CODE_OF_REFUSAL: Final = {
    "compressed": ErrorCode.UNIMPLEMENTED,
    "flag": ErrorCode.INTERNAL,
    "too_large": ErrorCode.TOO_LARGE,
    "malformed": ErrorCode.INVALID_REQUEST,
}


def _error_of(refusal: Refusal) -> ArkaError:
    """What an RPC is told about bytes that are no message (T12, T17)."""
    return ArkaError(refusal.detail, code=_CODE_OF_REFUSAL[refusal.kind])


__all__ = ["MAX_FRAME_BYTES", "Connection", "ConnectionFactory"]
