"""The server: listeners, connections, and the order in which everything ends.

Owns: the three nurseries (tiers, around connections, around streams) and the drain. Does not own what
runs in them. Shutdown, whatever the clients do, ends within ``drain_s``: stop accepting, tell clients,
bring down what is accepted, then cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from arka.flight.http2 import ConnectionFactory
from arka.flight.service import FlightService
from arka.tiers.pipeline import Pipeline

log = structlog.get_logger(__name__)

#: Share of drain_s after which acks are no longer waited for: the rest is for sealing and worker exit.
_ACK_SHARE: Final = 0.7
#: Share of drain_s after which connections are cancelled.
_CONNECTION_SHARE: Final = 0.8


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Server:
    """Serves Flight on its listeners until it is told to stop."""

    def __init__(
        self,
        pipeline: Pipeline,
        service: FlightService,
        connections: ConnectionFactory,
        listeners: list[trio.SocketListener],
        *,
        drain_s: float,
    ) -> None:
        """Join what is served with where.

        Args:
            pipeline: the tiers; run by this server.
            service: its write streams are told of the drain.
            connections: serves one accepted stream.
            listeners: open sockets; closed by this server.
            drain_s: longest time from ``stop`` to the end of ``run``.
        """
        self._pipeline = pipeline
        self._service = service
        self._connections = connections
        self._listeners = listeners
        self._drain_s = drain_s
        self._stopping = trio.Event()

    def stop(self) -> None:
        """Begin to drain; ``run`` returns within ``drain_s``. A second call does nothing."""
        self._stopping.set()

    async def run(self, *, on_ready: Callable[[], None]) -> None:
        """Serve until ``stop``.

        Args:
            on_ready: called once connections are accepted.

        Raises:
            WalPoisoned: the log's disk failed.
            Fenced: another process owns the log.

        Cancellation: as a crash at that moment: nothing acked is lost.
        """
        async with trio.open_nursery() as tiers:
            await tiers.start(self._pipeline.run)
            async with trio.open_nursery() as connections:
                accepting = trio.CancelScope()
                connections.start_soon(self._accept, accepting, connections)
                on_ready()
                await self._stopping.wait()
                await self._drain(accepting, connections.cancel_scope)
            await self._pipeline.close()
            tiers.cancel_scope.cancel()

    async def _accept(self, accepting: trio.CancelScope, connections: trio.Nursery) -> None:
        with accepting:
            await trio.serve_listeners(
                self._connections.serve, self._listeners, handler_nursery=connections
            )
        for listener in self._listeners:
            await listener.aclose()

    async def _drain(self, accepting: trio.CancelScope, connections: trio.CancelScope) -> None:
        """Stop intake, finish what is accepted as far as the time allows, end the connections."""
        started = trio.current_time()
        log.info("server.draining", drain_s=self._drain_s)
        accepting.cancel()
        self._pipeline.start_drain()
        acks_until = started + self._drain_s * _ACK_SHARE
        self._connections.start_drain()
        with trio.move_on_at(acks_until) as scope:
            # Streams end as soon as nothing is on its way any more: idle clients do not hold the process.
            self._service.start_drain(acks_until)
            await self._pipeline.wait_drained()
        if scope.cancelled_caught:
            log.warning("server.drain_incomplete", reason="writes are left for the next start to bring down")
        with trio.move_on_at(started + self._drain_s * _CONNECTION_SHARE):
            await self._connections.wait_idle()
        connections.cancel()


__all__ = ["Address", "Server"]
