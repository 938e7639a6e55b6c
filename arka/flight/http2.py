"""The HTTP/2 server: what all connections have in common, and how they end together.

Owns: how many connections there are, and the drain. Does not own listeners (``arka.server``) nor what happens
on a connection. From here down: ``connection`` is one client's, ``streams`` its streams, ``flow`` what a
stream's client may send, ``outbound`` what it is sent, ``grpc`` what a handler sees of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import uuid4

import structlog
import trio

from arka.flight.channels import peer_of
from arka.flight.connection import Connection
from arka.flight.grpc import Route
from arka.flight.rounds import Round
from arka.flight.streams import Shared
from arka.flight.turns import TurnCounts
from arka.options import Limits
from arka.tiers.admission import Ledger

log = structlog.get_logger(__name__)


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
        self._draining = False
        self._idle = trio.Event()
        self._idle.set()

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection to its end. The caller closes ``stream``.

        Cancellation: its RPCs are cancelled, the peer is told nothing.
        """
        limit = self._shared.limits.connections
        if len(self._connections) >= limit:
            log.warning("connection.refused", peer=peer_of(stream), limit=limit)
            return
        connection = Connection(stream, self._shared)
        if self._draining:
            connection.start_drain()
        if not self._connections:
            self._idle = trio.Event()
        self._connections[connection] = None
        try:
            await connection.run()
        except* Exception as errors:
            # A bug of ours, outside of any RPC. Other connections do not pay for it.
            log.exception("connection.failed", peer=peer_of(stream), incident=uuid4().hex[:12], exc_info=errors)
        finally:
            del self._connections[connection]
            if not self._connections:
                self._idle.set()

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
