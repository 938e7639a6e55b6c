"""gRPC on top of a stream: the call a handler sees, its routes, metadata, timeouts and the health service.

Owns: request metadata, ``grpc-timeout``, message prefixes, ``grpc.health.v1``. Does not own HTTP/2
(``arka.flight.connection``) nor what Flight's methods do (``arka.flight.service``).

Source: gRPC over HTTP/2 (PROTOCOL-HTTP2.md), Requests; gRPC health checking protocol (health/v1/health.proto).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import structlog
import trio

from arka._core.wire import FlightMessage, read_fields
from arka.errors import ArkaError, InvalidRequest, quote
from arka.flight.flow import StreamIntake, Taker
from arka.flight.outbound import Outbox, StreamOutput
from arka.flight.status import OK, RpcError, RpcStatus, Status, status_of
from arka.flight.turns import TurnQueue
from arka.tiers.accounts import Account
from arka.tiers.admission import Charge
from arka.tiers.room import Room

log = structlog.get_logger(__name__)

#: Longest part of a method's name that is shown or logged, and of a value in an error; no method of ours is as long.
_SHOWN_BYTES: Final = 256
#: Longest part of a user-agent that is looked at.
_USER_AGENT_BYTES: Final = 1024
#: What a metadata key does not begin with, and what is none.
_RESERVED: Final = (b":", b"grpc-")
_NOT_METADATA: Final = frozenset({b"te", b"content-type", b"user-agent"})
#: Values of one binary metadata key: each is decoded by itself.
_BINARY_VALUES: Final = 256
_TIMEOUT: Final = re.compile(rb"(\d{1,8})([HMSmun])\Z")
_SECONDS_PER_UNIT: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


#: Largest request that is not FlightData, in bytes (T24).
UNARY_BYTES: Final = 1024 * 1024


class Call:
    """One RPC, as its handler sees it.

    A handler receives until None, sends, and returns: that ends the RPC with OK. Raising ends it with the error's
    status. It is cancelled when the client resets the stream, its deadline passes or the connection ends.

    Attributes:
        method: the request's path, ``/package.Service/Method``.
        metadata: the client's custom metadata, keys in lower case; ``-bin`` values decoded; values of a
            repeated key joined by commas.
        peer: the client's address, for logs.
        deadline: trio time at which the client gives up; None if it does not.
        user_agent: what the client says that it is; empty if it says nothing.
    """

    def __init__(
        self,
        method: str,
        metadata: Mapping[str, bytes],
        peer: str,
        deadline: float | None,
        intake: StreamIntake,
        output: StreamOutput,
        user_agent: str = "",
        turns: TurnQueue | None = None,
    ) -> None:
        self.user_agent = user_agent
        self._turns = TurnQueue() if turns is None else turns
        self.method = method
        self.metadata = metadata
        self.peer = peer
        self.deadline = deadline
        self._intake = intake
        self._output = output

    @property
    def peer_host(self) -> str:
        """The client's address without its port: what is shared among peers goes by it."""
        return self.peer.rpartition(":")[0] or self.peer

    async def receive(self) -> FlightMessage | bytes | None:
        """Take the client's next message.

        Returns:
            A FlightMessage on routes with ``flight_data`` (its charge is the caller's to release), else bytes;
            None once the client has half-closed.

        Raises:
            ArkaError: what the client sent is not a message, or one over the limits.

        Cancellation: no message is lost.
        """
        return await self._intake.receive()

    async def next_turn(self) -> None:
        """Let others run, in the middle of a long answer (T22).

        In each pass of the event loop one such RPC goes on, and addresses take turns: a thousand RPCs of one client
        delay another client as much as one does.

        Cancellation: the turn goes to the next.
        """
        await self._turns.wait(self.peer_host)

    def set_taker(self, taker: Taker) -> None:
        """Let ``taker`` have messages as they come, without a task switch, while ``receive`` waits.

        Args:
            taker: takes a message at once and returns True, or does nothing and returns False: then ``receive``
                returns it. What it raises, ``receive`` raises.
        """
        self._intake.set_taker(taker)

    def follow(self, room: Room) -> None:
        """Give the client's stream no window while ``room`` holds back."""
        self._intake.follow(room)

    @property
    def account(self) -> Account | None:
        """Who is charged for the RPC; None where nobody is."""
        return self._intake.account

    def keep(self, amount: int, what: str) -> Charge:
        """Charge bytes that are kept for as long as the RPC wants (T26); the caller releases the charge.

        Raises:
            AdmissionRejected: the ledger has no room for them.
        """
        return self._intake.keep(amount, what)

    def hold(self, end: Callable[[Exception], None] | None) -> None:
        """Say that the client does not read what it has to before it is read from; None: it does again.

        Args:
            end: ends the RPC, if what it holds meanwhile is needed by others (T25).
        """
        self._intake.hold(end)

    async def send(self, *parts: bytes | memoryview) -> None:
        """Send one message, made of ``parts``; waits while the stream's send buffer is full.

        Args:
            parts: byte-typed buffers; kept, and to be left unchanged, until they are sent.

        Raises:
            trio.ClosedResourceError: the stream is over.

        Cancellation: the message was not sent.
        """
        size = sum(len(part) for part in parts)
        await self._output.put(size + 5, message_prefix(size), *parts)

    async def send_bytes(self, part: bytes) -> None:
        """Send the next bytes of messages that the caller has framed; waits while the stream's send buffer is full.

        Raises:
            trio.ClosedResourceError: the stream is over.

        Cancellation: the bytes were not sent.
        """
        await self._output.put(len(part), part, charged=False)

    def discard_unsent(self) -> None:
        """Drop what waits to be sent, for an RPC that is about to end with an error: its client does not read."""
        self._output.discard()

    def attach_outbox(self, outbox: Outbox) -> None:
        """Let the connection pull messages from ``outbox`` whenever the client has room for them (T6)."""
        self._output.attach(outbox)

    def wake(self) -> None:
        """Say that the outbox may have something now."""
        self._output.wake()

    async def wait_outbox_drained(self) -> None:
        """Wait until all the outbox had is queued for the socket.

        Raises:
            trio.ClosedResourceError: the stream is over.

        Cancellation: nothing changes.
        """
        await self._output.wait_drained()


Handler = Callable[[Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """What serves one method.

    Attributes:
        handler: runs once for each RPC.
        flight_data: the client's messages are FlightData.
        request_bytes: largest request message, refused at its prefix (T24); FlightData has limits of its own.
        adopt: called with a request that was complete when its stream ended, and that no handler had taken (R41); must
            not raise or wait. None where such a request means nothing.
    """

    handler: Handler
    flight_data: bool = False
    adopt: Callable[[bytes], None] | None = None
    request_bytes: int = UNARY_BYTES


@dataclass(frozen=True, slots=True)
class Request:
    """What a request's header fields say.

    Attributes:
        path: the method.
        is_grpc: it is a gRPC request; if not, nothing else of it matters.
        content_bytes: its ``content-length``; -1 if it has none.
        shown_path: the method, cut to what is logged and told.
    """

    path: str
    is_grpc: bool
    is_head: bool
    timeout: bytes | None
    content_bytes: int
    fields: list[tuple[bytes, bytes]]
    user_agent: str = ""

    @property
    def shown_path(self) -> str:
        """See the class."""
        return self.path if len(self.path) <= _SHOWN_BYTES else self.path[:_SHOWN_BYTES] + "..."


def read_request(fields: list[tuple[bytes, bytes]]) -> Request:
    """Read the header fields of a request that h2 has validated."""
    known = dict(fields)
    kind = known.get(b"content-type", b"")
    return Request(
        path=known.get(b":path", b"").decode("ascii", "backslashreplace"),
        # application/grpc, application/grpc+proto, application/grpc;charset=utf-8; not application/grpc-web
        is_grpc=known.get(b":method") == b"POST" and re.match(rb"application/grpc(?:[+;]|\Z)", kind) is not None,
        is_head=known.get(b":method") == b"HEAD",
        timeout=known.get(b"grpc-timeout"),
        user_agent=known.get(b"user-agent", b"")[:_USER_AGENT_BYTES].decode("ascii", "backslashreplace"),
        content_bytes=int(known.get(b"content-length", b"-1")),
        fields=fields,
    )


async def run_call(route: Route, call: Call) -> RpcStatus:
    """Run a call's handler to its end.

    Returns:
        How the RPC ended. An unexpected error is logged with an incident id, which the client is told.

    Cancellation: the handler is cancelled.
    """
    deadline = call.deadline
    scope = trio.CancelScope() if deadline is None else trio.CancelScope(deadline=deadline)
    try:
        with scope:
            await route.handler(call)
    except (ArkaError, RpcError) as error:
        return status_of(error)
    except Exception as error:
        return _status_of_unexpected(error, call)
    except BaseExceptionGroup as group:
        # A handler's nursery failed while the call was being cancelled: keep the cancellation, log the rest.
        cancelled, rest = group.split(trio.Cancelled)
        if cancelled is None:
            raise
        if rest is not None:
            _status_of_unexpected(rest, call)
        raise cancelled from None
    if scope.cancelled_caught:
        return RpcStatus(Status.DEADLINE_EXCEEDED, f"The deadline that the client set for {call.method} has passed")
    return OK


def _status_of_unexpected(error: BaseException, call: Call) -> RpcStatus:
    known = _only_known(error)
    if known is not None:
        return status_of(known)
    incident = uuid4().hex[:12]
    log.error("rpc.failed", method=call.method, peer=call.peer, incident=incident, exc_info=error)
    return RpcStatus(Status.INTERNAL, f"[internal] Incident {incident}: the server's log says more")


def _only_known(error: BaseException) -> ArkaError | RpcError | None:
    """The first error in a nursery's group, if all of them are for the client to see."""
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, ArkaError | RpcError) else None
    found = [_only_known(inner) for inner in error.exceptions]
    return None if None in found else found[0]


def message_prefix(size: int) -> bytes:
    """Encode the five bytes in front of an uncompressed message of ``size`` bytes."""
    return b"\0" + size.to_bytes(4, "big")


def parse_timeout(value: bytes) -> float:
    """Read ``grpc-timeout``.

    Returns:
        Seconds.

    Raises:
        InvalidRequest: it is not one to eight digits and a unit.
    """
    match = _TIMEOUT.match(value)
    if match is None:
        raise InvalidRequest(
            f"Malformed grpc-timeout {value[:_SHOWN_BYTES]!r}: expected up to eight digits and one of HMSmun"
        )
    return int(match[1]) * _SECONDS_PER_UNIT[match[2]]


def parse_metadata(fields: Iterable[tuple[bytes, bytes]]) -> dict[str, bytes]:
    """Collect custom metadata from a request's header fields.

    Raises:
        InvalidRequest: a ``-bin`` value is not base64.
    """
    found: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        if not name.startswith(_RESERVED) and name not in _NOT_METADATA:
            found.setdefault(name, []).append(value)
    return {name.decode("ascii", "backslashreplace"): _join_values(name, values) for name, values in found.items()}


def _join_values(name: bytes, values: list[bytes]) -> bytes:
    """Join what one key has, in time that grows with its length."""
    joined = b",".join(values)
    if not name.endswith(b"-bin"):
        return joined
    parts = joined.split(b",", _BINARY_VALUES)
    if len(parts) > _BINARY_VALUES:
        raise InvalidRequest(f"More than {_BINARY_VALUES} values of metadata {_shown(name)}")
    return b",".join(_decode_binary(name, part) for part in parts)


def _decode_binary(name: bytes, value: bytes) -> bytes:
    try:
        # Padding is optional on the wire.
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"Malformed metadata {_shown(name)}: not base64") from error


def _shown(name: bytes) -> str:
    return repr(name[:_SHOWN_BYTES].decode("ascii", "backslashreplace"))


#: Largest request of the health service: the name of a service.
_HEALTH_BYTES: Final = 4096


class Health:
    """The service ``grpc.health.v1.Health``: what is served, for load balancers."""

    #: HealthCheckResponse with its status: SERVING 1, NOT_SERVING 2, SERVICE_UNKNOWN 3.
    _RESPONSES: Final = {True: b"\x08\x01", False: b"\x08\x02", None: b"\x08\x03"}

    def __init__(self, services: Iterable[str] = ()) -> None:
        """Begin as not serving.

        Args:
            services: full names of gRPC services; the empty name, for the whole server, is always known.
        """
        self._serving: dict[str, bool] = {"": False} | dict.fromkeys(services, False)
        self._changed = trio.Event()

    def set_serving(self, serving: bool) -> None:
        """Say whether the server, with all its services, serves."""
        self._serving = dict.fromkeys(self._serving, serving)
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def routes(self) -> dict[str, Route]:
        """The service's methods."""
        return {
            "/grpc.health.v1.Health/Check": Route(self._check, request_bytes=_HEALTH_BYTES),
            "/grpc.health.v1.Health/Watch": Route(self._watch, request_bytes=_HEALTH_BYTES),
        }

    async def _check(self, call: Call) -> None:
        service = await self._service(call)
        serving = self._serving.get(service)
        if serving is None:
            raise RpcError(Status.NOT_FOUND, f"Unknown service {quote(service)}")
        await call.send(self._RESPONSES[serving])

    async def _watch(self, call: Call) -> None:
        service = await self._service(call)
        while True:
            serving, changed = self._serving.get(service), self._changed
            await call.send(self._RESPONSES[serving])
            while self._serving.get(service) == serving:
                await changed.wait()
                changed = self._changed

    async def _service(self, call: Call) -> str:
        request = await call.receive()
        try:
            name = read_fields(request if isinstance(request, bytes) else b"").get(1, b"")
            return name.decode() if isinstance(name, bytes) else ""
        except ValueError as error:
            raise InvalidRequest(f"Malformed HealthCheckRequest: {error}") from error


__all__ = [
    "Call",
    "Handler",
    "Health",
    "Outbox",
    "Request",
    "Route",
    "message_prefix",
    "parse_metadata",
    "parse_timeout",
    "read_request",
    "run_call",
]
