"""The streams of one connection: how each begins, whose turn it is to send, and how it ends.

Owns: the table of open streams, their RPC tasks, and which closed ones may still get DATA. Does not own the
socket, frames, nor the connection's end (``arka.flight.connection``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final
from uuid import uuid4

import h2.connection
import h2.events
import h2.stream
import structlog
import trio
from h2.errors import ErrorCodes

from arka._core.wire import CONNECTION_WINDOW, INITIAL_WINDOW, MessageAssembler, Splitter, WireError
from arka.errors import AdmissionRejected, ArkaError, Unavailable
from arka.flight import frames
from arka.flight.connections import OpenConnections
from arka.flight.floods import Flood
from arka.flight.flow import ReadAhead, StreamIntake
from arka.flight.grpc import Call, Request, Route, parse_metadata, parse_timeout, read_request, run_call
from arka.flight.h2state import BoundedH2
from arka.flight.lines import Lines
from arka.flight.outbound import Parts, StreamOutput, Turn
from arka.flight.pace import Pace
from arka.flight.rounds import Round
from arka.flight.status import RpcStatus, Status, status_of
from arka.flight.turns import TurnQueue
from arka.options import Limits
from arka.tiers.accounts import Account
from arka.tiers.admission import Charge, Ledger

log = structlog.get_logger(__name__)

#: How many times limits.streams_per_connection is advertised: at what is advertised clients hang in silence (T10).
ADVERTISED_STREAMS: Final = 4
#: Streams that get a turn in one write to the socket, and bytes after which none does any more.
_TURNS_PER_WRITE: Final = 64
#: The end of a stream counts as so many turns more: its trailers go through h2, and it is forgotten in five places.
_END_TURNS: Final = 3
_WRITE_BYTES: Final = 512 * 1024
#: Streams reset by us that are remembered: their DATA is on its way and no error.
_RESETS_REMEMBERED: Final = 1024
#: Largest content-length that is told from a larger one.
_CONTENT_BYTES: Final = 2**62
#: Bytes of an RPC's custom metadata from which on they are charged (T26).
_METADATA_BYTES: Final = 1024
#: Seconds to wait for the rest of a request that is not gRPC.
_FOREIGN_S: Final = 10.0
#: Requests that are not gRPC and get a body, at a time on one connection; others get their status at once.
_FOREIGN_MOST: Final = 8
_FOREIGN_BODY: Final = b"This endpoint speaks gRPC (Arrow Flight).\n"

_RESPONSE_FIELDS: Final = [
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b"identity"),
]


class Shared:
    """What all connections of a server share.

    Attributes:
        routes: method path to what serves it.
        ledger: charged with every byte that a client may send before it may.
        limits: of streams, messages and times.
        read_ahead: bounds what is granted before it is asked for.
        pace: ends streams that hold memory which others wait for.
        message_limit: largest message, bytes.
        streams: RPCs that are running.
        round: on while many streams are told of one thing.
        turns: whose turn it is, among connections that used up theirs.
        call_turns: the same among RPCs with long answers.
        connections: those that are open, and who gets a place.
        lines: log lines that clients cause.
    """

    def __init__(self, routes: Mapping[str, Route], ledger: Ledger, limits: Limits) -> None:
        self.routes = routes
        self.ledger = ledger
        self.limits = limits
        self.read_ahead = ReadAhead(ledger)
        self.pace = Pace(ledger, limits)
        # What the ledger could never grant beside a stream's own initial window is refused at once.
        self.message_limit = min(limits.message_bytes, ledger.statistics().limit_bytes - 2 * INITIAL_WINDOW)
        self.streams = 0
        self.round = Round()
        self.turns = TurnQueue()
        self.call_turns = TurnQueue()
        self.connections = OpenConnections(limits.connections, limits.peer_share)
        self.lines = Lines()


class Stream:
    """One stream that is open in HTTP/2's sense, with its RPC if there is one.

    Attributes:
        scope: cancelled when the stream is over before its RPC.
        peer_ended: the peer has half-closed it.
    """

    __slots__ = ("adopt", "id", "intake", "kept", "method", "output", "peer_ended", "scope")

    def __init__(self, stream_id: int, method: str, intake: StreamIntake, output: StreamOutput) -> None:
        self.id = stream_id
        self.method = method
        self.intake = intake
        self.output = output
        # Takes the request of an RPC that is over before its handler took it; see Route.
        self.adopt: Callable[[bytes], None] | None = None
        self.scope = trio.CancelScope()
        self.peer_ended = False
        # The charge of its metadata, until its RPC ends.
        self.kept: Charge | None = None


class Streams:
    """The open streams of one connection. Used from trio's thread only.

    Attributes:
        calls: RPCs that were started.
        draining: new write streams get no window beyond the first.
        last_served: no stream above this one is served.
    """

    def __init__(
        self,
        shared: Shared,
        connection: BoundedH2,
        splitter: Splitter,
        peer: str,
        *,
        account: Account | None = None,
        count: Callable[[Flood], None],
        wake: Callable[[], None],
        set_busy: Callable[[bool], None],
    ) -> None:
        """Begin without streams.

        Args:
            shared: what other connections have a part in.
            connection: h2's side.
            splitter: has the assemblers of live streams.
            peer: the client's address, for logs.
            account: the connection's, in the ledger; without one it is opened here.
            count: counts what the peer must not do too often; raises WireError.
            wake: called when the writer has something to do.
            set_busy: told when there are streams, or none any more.
        """
        self.calls = 0
        self.draining = False
        self.last_served = frames.MAX_STREAM_ID
        self._shared = shared
        self._limits = shared.limits
        self._h2 = connection
        self._splitter = splitter
        self._peer = peer
        self._account = account or shared.ledger.open_connection(peer)
        self._nursery: trio.Nursery | None = None
        # Whether a task looks at the rates of others because a stream of this connection waits.
        self._looking = False
        self._count = count
        self._foreign = 0
        self._wake = wake
        self._set_busy = set_busy
        self._open: dict[int, Stream] = {}
        # Streams that have something to send, in the order of their turns; and those that lack window for it.
        self._ready: dict[int, Stream] = {}
        self._blocked: dict[int, Stream] = {}
        # Streams that are owed a WINDOW_UPDATE.
        self._owed: dict[int, Stream] = {}
        # Streams that we reset while the peer could still be sending, oldest first; the newest one forgotten.
        self._resets: OrderedDict[int, None] = OrderedDict()
        # Streams that the peer reset and has sent nothing on since.
        self._reset_by_peer: OrderedDict[int, None] = OrderedDict()
        self._resets_forgotten = 0

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._open.values()))

    # -- beginning --------------------------------------------------------------------------------

    def begin(self, event: h2.events.RequestReceived, nursery: trio.Nursery) -> None:
        """Begin a stream: start its RPC, or answer why not."""
        stream_id = event.stream_id
        ended = event.stream_ended is not None
        if stream_id > self.last_served:
            # The drain has told the peer that this one is not served, so that it may be sent elsewhere.
            self._reset_new(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        self._nursery = nursery
        request = read_request(event.headers)
        route = self._shared.routes.get(request.path) if request.is_grpc else None
        if ended and request.content_bytes > 0:
            self._reset_new(stream_id, ErrorCodes.PROTOCOL_ERROR)
        elif not request.is_grpc:
            self._begin_foreign(stream_id, request, ended, nursery)
        elif route is None:
            text = f"[unimplemented] Unknown method {request.shown_path}"
            self._refuse(stream_id, ended, RpcStatus(Status.UNIMPLEMENTED, text))
        else:
            try:
                self._start(stream_id, route, request, nursery)
            except ArkaError as error:
                self._refuse(stream_id, ended, status_of(error))

    def _make(self, stream_id: int, request: Request, route: Route | None) -> Stream:
        """Make a stream.

        Raises:
            AdmissionRejected: the ledger has no window for one that is to run.
        """
        shared = self._shared
        flight_data = route is not None and route.flight_data
        most = shared.message_limit
        if route is not None and not flight_data:
            most = min(most, route.request_bytes)
        assembler = MessageAssembler(flight_data, most, self._limits.batch_bytes)
        intake = StreamIntake(
            assembler,
            shared.ledger,
            shared.read_ahead,
            lambda urgent: self._owe(stream, urgent),
            account=shared.ledger.open_stream(self._account),
            pace=shared.pace,
            on_wait=self._start_looking,
        )
        output = StreamOutput(stream_id, lambda: self._make_ready(stream), intake.keep)
        stream = Stream(stream_id, request.shown_path, intake, output)
        if route is not None and stream.intake.refusal is not None:
            raise stream.intake.refusal
        assembler.owner = stream
        assembler.content_bytes = min(request.content_bytes, _CONTENT_BYTES)
        self._open[stream_id] = stream
        self._splitter.open(stream_id, assembler)
        self._set_busy(True)
        return stream

    def _start(self, stream_id: int, route: Route, request: Request, nursery: trio.Nursery) -> None:
        """Start an RPC's task.

        Raises:
            ArkaError: why it is not to run; nothing was begun.
        """
        limits, here, total = self._limits, len(self._open), self._shared.streams
        if here >= limits.streams_per_connection:
            raise AdmissionRejected(
                f"{here} RPCs are open on this connection, allowed are {limits.streams_per_connection}: retry later"
            )
        if total >= limits.streams:
            raise AdmissionRejected(f"{total} RPCs are open on this server, allowed are {limits.streams}: retry later")
        deadline = None
        if request.timeout is not None:
            deadline = trio.current_time() + parse_timeout(request.timeout)
        metadata = parse_metadata(request.fields)
        held = sum(len(name) + len(value) for name, value in metadata.items())
        kept = None
        if held > _METADATA_BYTES:
            kept = self._shared.ledger.keep(held, self._shared.ledger.open_stream(self._account), "metadata")
        try:
            stream = self._make(stream_id, request, route)
        except AdmissionRejected:
            if kept is not None:
                kept.release()
            raise
        stream.kept = kept
        call = Call(
            stream.method,
            metadata,
            self._peer,
            deadline,
            stream.intake,
            stream.output,
            request.user_agent,
            self._shared.call_turns,
        )
        if self.draining and route.flight_data:
            stream.intake.withhold()
        self._h2.send_headers(stream.id, _RESPONSE_FIELDS)
        self.calls += 1
        self._shared.streams += 1
        stream.adopt = route.adopt
        nursery.start_soon(self._serve, stream, route, call)

    async def _serve(self, stream: Stream, route: Route, call: Call) -> None:
        """Run an RPC and queue its trailers behind what it sent."""
        try:
            with stream.scope:
                status = await run_call(route, call)
                stream.output.finish(status.trailers(), trio.current_time())
        finally:
            self._shared.streams -= 1
            stream.intake.abandon()
            if stream.kept is not None:
                stream.kept.release()

    def _refuse(self, stream_id: int, ended: bool, status: RpcStatus) -> None:
        """Answer an RPC that does not run, with trailers alone (T10): nothing is kept of it."""
        self._answer(stream_id, ended, [*_RESPONSE_FIELDS, *status.trailers()])

    def _answer(self, stream_id: int, ended: bool, fields: list[tuple[bytes, bytes]]) -> None:
        """Answer a request with header fields alone, at the end of this turn.

        Args:
            stream_id: of a request that came in this turn.
            ended: the peer has ended its side; if not, it is told to stop sending.
            fields: the answer.
        """
        self._h2.send_headers(stream_id, fields, end_stream=True)
        if ended:
            self._h2.forget(stream_id)
        else:
            self._h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
            self._remember_reset(stream_id)

    def _reset_new(self, stream_id: int, code: ErrorCodes) -> None:
        """Reset a stream whose request came in this turn."""
        self._count(Flood.RESETS_CAUSED)
        self._h2.reset_stream(stream_id, code)
        self._remember_reset(stream_id)

    def _begin_foreign(self, stream_id: int, request: Request, ended: bool, nursery: trio.Nursery) -> None:
        """Answer what is not gRPC (T11)."""
        if self._foreign >= _FOREIGN_MOST or len(self._open) >= self._limits.streams_per_connection:
            self._answer(stream_id, ended, [(b":status", b"415"), (b"content-length", b"0")])
            return
        self._foreign += 1
        stream = self._make(stream_id, request, None)
        # Its DATA is not made of messages, and discarded: no window of ours needs to be kept for that.
        stream.intake.abandon()
        stream.intake.assembler.window = CONNECTION_WINDOW
        nursery.start_soon(self._refuse_foreign, stream, request.is_head)

    async def _refuse_foreign(self, stream: Stream, is_head: bool) -> None:
        """Answer what is not gRPC with 415 and a body (T11), once all of the request is there and in order."""
        try:
            with stream.scope:
                with trio.move_on_after(_FOREIGN_S):
                    await stream.intake.receive()
                if stream.id not in self._open:
                    # Reset by either side at the moment at which it ended.
                    return
                fields = [
                    (b":status", b"415"),
                    (b"content-type", b"text/plain; charset=utf-8"),
                    (b"content-length", b"%d" % len(_FOREIGN_BODY)),
                ]
                self._h2.send_headers(stream.id, fields)
                if not is_head:
                    stream.output.put_nowait(_FOREIGN_BODY)
                stream.output.finish([], trio.current_time())
        finally:
            self._foreign -= 1

    # -- what the peer does -----------------------------------------------------------------------

    def is_idle(self, stream_id: int) -> bool:
        """Whether the peer has never used a stream."""
        return stream_id % 2 == 0 or stream_id > self._h2.highest_inbound_stream_id

    def judge_stray(self, stream_id: int) -> bytes:
        """Judge DATA on a stream that is not live; the splitter discards it (T7).

        Returns:
            A frame to send, or nothing. DATA behind the peer's own RST_STREAM is an error of that stream alone
            (RFC 9113, section 5.1): netty sends some when a call is cancelled while it writes.

        Raises:
            WireError: the peer had ended the stream.
        """
        self._count(Flood.STRAY_DATA)
        if stream_id in self._reset_by_peer:
            del self._reset_by_peer[stream_id]
            self._count(Flood.RESETS_CAUSED)
            self._remember_reset(stream_id)
            return frames.rst_stream(stream_id, ErrorCodes.STREAM_CLOSED)
        if stream_id in self._resets or 0 < stream_id <= self._resets_forgotten:
            return b""
        if self.is_idle(stream_id):
            raise WireError(ErrorCodes.PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is idle")
        stream = self._open.get(stream_id)
        if stream is None:
            raise WireError(ErrorCodes.STREAM_CLOSED, f"DATA on stream {stream_id}, which is closed")
        self.reset(stream, ErrorCodes.STREAM_CLOSED)
        return b""

    def end_by_peer(self, stream_id: int) -> None:
        """Note that the peer has half-closed a stream."""
        stream = self._open.get(stream_id)
        if stream is not None and not stream.peer_ended:
            stream.peer_ended = True
            stream.intake.end()
            self._splitter.close(stream_id)

    def drop(self, stream_id: int, *, by_peer: bool) -> None:
        """Forget a stream that h2 says was reset, by the peer or for what the peer did."""
        if by_peer:
            self._reset_by_peer[stream_id] = None
            if len(self._reset_by_peer) > _RESETS_REMEMBERED:
                self._resets_forgotten = max(self._resets_forgotten, self._reset_by_peer.popitem(last=False)[0])
        else:
            self._count(Flood.RESETS_CAUSED)
            self._remember_reset(stream_id)
        stream = self._open.get(stream_id)
        if stream is not None:
            self._forget(stream)

    def enlarge(self, stream_id: int, increment: int) -> bool:
        """Enlarge an outbound window as a WINDOW_UPDATE says, as h2 would.

        Args:
            stream_id: 0 for the connection.
            increment: bytes, 1 to 2**31-1.

        Returns:
            Whether that was done; if not, the frame is for h2 to judge: its stream is not open, or the window would
            be larger than is legal.
        """
        owner: h2.connection.H2Connection | h2.stream.H2Stream
        if stream_id == 0:
            owner = self._h2
        elif stream_id in self._open and stream_id in self._h2.streams:
            owner = self._h2.streams[stream_id]
        else:
            return False
        window = owner.outbound_flow_control_window + increment
        if window > frames.MAX_WINDOW:
            return False
        owner.outbound_flow_control_window = window
        return True

    def widen(self, stream_id: int) -> None:
        """Give a turn to a stream whose outbound window has grown; 0: to all of them."""
        if stream_id == 0:
            if self._blocked:
                self._ready.update(self._blocked)
                self._blocked.clear()
                self._wake()
        elif (stream := self._blocked.pop(stream_id, None)) is not None:
            self._ready[stream_id] = stream
            self._wake()

    # -- sending ----------------------------------------------------------------------------------

    def take_updates(self) -> bytes:
        """Take the WINDOW_UPDATE frames that streams are owed."""
        owed, self._owed = self._owed, {}
        return b"".join(
            frames.window_update(stream_id, increment)
            for stream_id, stream in owed.items()
            if (increment := stream.intake.take_increment())
        )

    def pump(self, parts: Parts) -> None:
        """Append one write's worth of DATA and trailers: a turn for each of some streams.

        Args:
            parts: what goes before them, h2's own output included.
        """
        now = trio.current_time()
        budget, counted = _WRITE_BYTES, len(parts)
        turns = _TURNS_PER_WRITE
        while turns > 0:
            turns -= 1
            budget -= sum(map(len, parts[counted:]))
            counted = len(parts)
            if not self._ready or budget <= 0:
                return
            stream_id = next(iter(self._ready))
            stream = self._ready.pop(stream_id)
            try:
                turn = stream.output.pump(self._h2, now, parts)
            except Exception:
                # An outbox is its RPC's code: what fails in it ends that RPC.
                incident = uuid4().hex[:12]
                log.exception("rpc.failed", method=stream.method, peer=self._peer, incident=incident)
                self._break_off(stream, RpcStatus(Status.INTERNAL, f"[internal] Incident {incident}"), now)
                continue
            if turn is Turn.MORE:
                self._ready[stream_id] = stream
            elif turn is Turn.BLOCKED:
                self._blocked[stream_id] = stream
            elif turn is Turn.DONE:
                self._close(stream)
                turns -= _END_TURNS

    @property
    def has_output(self) -> bool:
        """Whether ``pump`` or ``take_updates`` has something to do."""
        return bool(self._ready or self._owed)

    def slices(self, size: int) -> Iterator[list[Stream]]:
        """Divide the open streams into slices of ``size``; each is taken when it is asked for."""
        streams = list(self._open.values())
        for start in range(0, len(streams), size):
            yield [stream for stream in streams[start : start + size] if stream.id in self._open]

    def check_progress(self, streams: Iterable[Stream], now: float) -> None:
        """End those of ``streams`` whose message, or whose client as a reader, has stalled (T4)."""
        stall_s = self._limits.message_stall_s
        for stream in streams:
            if stream.intake.is_stalled(now, stall_s):
                stream.intake.fail(
                    Unavailable(f"A message stopped in the middle: nothing of it came for {stall_s:g} s")
                )
            output = stream.output
            if output.finishing and now - output.last_progress >= stall_s:
                self._break_off(stream, status_of(Unavailable(f"The client read nothing for {stall_s:g} s")), now)

    def _start_looking(self) -> None:
        """A stream waits for the ledger: see to it that those who hold it use it (T25)."""
        if not self._looking and self._nursery is not None:
            self._looking = True
            self._nursery.start_soon(self._look_at_rates)

    async def _look_at_rates(self) -> None:
        """Look at the rates of all streams of the server as long as one of this connection waits."""
        while True:
            next_at = self._shared.pace.look(trio.current_time())
            if not self._account.waiting:
                break
            await trio.sleep_until(next_at)
        self._looking = False

    def withhold(self) -> None:
        """Give write streams no new window: the connection drains (T19)."""
        self.draining = True
        for stream in self:
            if stream.intake.assembler.flight_data:
                stream.intake.withhold()

    # -- ending -----------------------------------------------------------------------------------

    def reset(self, stream: Stream, code: ErrorCodes) -> None:
        """End a stream for what its peer did."""
        self._count(Flood.RESETS_CAUSED)
        self._h2.reset_stream(stream.id, code)
        self._remember_reset(stream.id)
        self._forget(stream)

    def abandon(self, streams: Iterable[Stream]) -> None:
        """Drop some open streams and cancel their RPCs: the connection is over."""
        for stream in streams:
            self._forget(stream)

    def _close(self, stream: Stream) -> None:
        """Note that a stream's trailers are out."""
        if not stream.peer_ended:
            # The peer may stop sending: its RPC has ended (RFC 9113, section 8.1).
            self._h2.reset_stream(stream.id, ErrorCodes.NO_ERROR)
            self._remember_reset(stream.id)
        self._forget(stream)

    def _break_off(self, stream: Stream, status: RpcStatus, now: float) -> None:
        """End a stream without what is still to be sent."""
        self._blocked.pop(stream.id, None)
        stream.output.give_up(status.trailers(), now)
        stream.scope.cancel()

    def _forget(self, stream: Stream) -> None:
        del self._open[stream.id]
        self._h2.forget(stream.id)
        for table in (self._ready, self._blocked, self._owed):
            table.pop(stream.id, None)
        self._splitter.close(stream.id)
        stream.output.close()
        if stream.adopt is not None and (request := stream.intake.untaken()) is not None:
            # A client may cancel in the turn in which its request comes, as pyarrow does whose result is not read.
            stream.adopt(request)
        stream.intake.abandon()
        stream.scope.cancel()
        if not self._open:
            self._set_busy(False)
            self._wake()

    def _remember_reset(self, stream_id: int) -> None:
        self._h2.forget(stream_id)
        self._resets[stream_id] = None
        if len(self._resets) > _RESETS_REMEMBERED:
            self._resets_forgotten = max(self._resets_forgotten, self._resets.popitem(last=False)[0])

    def _make_ready(self, stream: Stream) -> None:
        if not stream.output.needs_window:
            # What it lacked window for was discarded: its trailers need none.
            self._blocked.pop(stream.id, None)
        if stream.id not in self._blocked:
            self._ready.setdefault(stream.id, stream)
            self._wake()
        elif stream.id in self._owed:
            # It has no window for what it would say, and what it is owed does not need any.
            self._wake()

    def _owe(self, stream: Stream, urgent: bool) -> None:
        self._owed.setdefault(stream.id, stream)
        if urgent:
            self._wake()


__all__ = ["ADVERTISED_STREAMS", "Shared", "Stream", "Streams"]
