"""The HTTP/2 server: what all connections have in common, and how they end together.

Owns: how a connection begins or is refused, and the drain. Does not own listeners (``arka.server``), who gets a place
(``arka.flight.connections``) nor what happens on a connection. From here down: ``connection`` is one client's,
``streams`` its streams, ``flow`` what a stream's client may send, ``outbound`` what it is sent, ``grpc`` what a handler
sees of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from uuid import uuid4

import structlog
import trio
from h2.errors import ErrorCodes

from arka.flight import frames
from arka.flight.channels import address_of, channel_of, peer_of
from arka.flight.connection import GOODBYE_S, Connection
from arka.flight.grpc import Route
from arka.flight.rounds import Round
from arka.flight.streams import Shared
from arka.flight.turns import TurnCounts
from arka.options import Limits
from arka.tiers.admission import Ledger

log = structlog.get_logger(__name__)

#: Connections that are being refused politely at a time: each has a descriptor. Others are closed at once.
REFUSING_MOST: Final = 32
#: Reads of what a refused client still sends, of 4 KiB each.
_LAST_READS: Final = 64


class ConnectionFactory:
    """Serves connections, and counts what they have in common."""

    def __init__(self, routes: Mapping[str, Route], ledger: Ledger, limits: Limits) -> None:
        """Share routes and limits among connections.

        Args:
            routes: method path to what serves it.
            ledger: charged with every byte that a client may send before it may.
            limits: of connections, streams, messages and times.
        """
        self._shared = Shared(routes, ledger, limits)
        self._connections: dict[Connection, None] = {}
        self._refusing = 0
        self._draining = False
        self._idle = trio.Event()
        self._idle.set()

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection to its end. The caller closes ``stream``.

        Cancellation: its RPCs are cancelled, the peer is told nothing.
        """
        address = address_of(stream)
        if not self._shared.connections.make_room(address):
            await self._refuse(stream)
            return
        connection = Connection(stream, self._shared)
        if self._draining:
            connection.start_drain()
        if not self._connections:
            self._idle = trio.Event()
        self._connections[connection] = None
        self._shared.connections.add(connection, address)
        try:
            await connection.run()
        except* Exception as errors:
            # A bug of ours, outside of any RPC. Other connections do not pay for it.
            log.exception("connection.failed", peer=peer_of(stream), incident=uuid4().hex[:12], exc_info=errors)
        finally:
            self._shared.connections.remove(connection)
            del self._connections[connection]
            if not self._connections:
                self._idle.set()

    async def _refuse(self, stream: trio.abc.Stream) -> None:
        """Tell a client that there is no place for its connection, and let it read that."""
        limit = self._shared.limits.connections
        self._shared.lines.write(
            log.warning, "connection.refused", trio.current_time(), peer=peer_of(stream), limit=limit
        )
        text = f"[overloaded] {limit} connections are open, or this address has its share of them: retry later"
        last = frames.settings({}) + frames.goaway(0, ErrorCodes.ENHANCE_YOUR_CALM, text)
        if self._refusing >= REFUSING_MOST:
            channel_of(stream).send_now([last])
            return
        self._refusing += 1
        try:
            with trio.move_on_after(GOODBYE_S):
                await stream.send_all(last)
                if isinstance(stream, trio.abc.HalfCloseableStream):
                    await stream.send_eof()
                # Closing with bytes unread would reset the connection, and the client lose the reason.
                for _ in range(_LAST_READS):
                    if not await stream.receive_some(4096):
                        break
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # The client is gone already.
            return
        finally:
            self._refusing -= 1

    @property
    def round(self) -> Round:
        """For who tells many streams of one thing."""
        return self._shared.round

    @property
    def turns(self) -> TurnCounts:
        """What readers did in one piece (T22)."""
        return self._shared.turns.counts

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._connections)

    @property
    def calls(self) -> int:
        """The number of RPCs that are running."""
        return self._shared.streams

    def start_drain(self) -> None:
        """Ask all clients to go elsewhere; open streams go on, without new window."""
        self._draining = True
        for connection in self._connections:
            connection.start_drain()

    async def wait_idle(self) -> None:
        """Wait until no connection is open. Cancellation: nothing changes."""
        await self._idle.wait()


__all__ = ["ConnectionFactory"]
