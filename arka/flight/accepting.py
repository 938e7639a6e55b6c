"""Accepts connections, also while the process or the machine has no descriptor left (R31).

Owns: the accept loop of one listener and the spare descriptor. Does not own listeners (``arka.server``), how many
connections there may be (``arka.flight.connections``) nor what they do.

A connection that cannot be accepted stays in the kernel's queue, and the listener stays readable: a loop that tries
again at once takes a whole core. The spare descriptor is given up for a moment to accept such a connection and to close
it, so that its client hears of it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from arka.flight.channels import peer_of
from arka.flight.lines import Lines

log = structlog.get_logger(__name__)

#: What accept says when there is no room for another connection.
SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
#: Seconds to wait after a connection that had to be closed: others may give descriptors back.
_PAUSE_S: Final = 0.05

Serve = Callable[[trio.SocketStream], Awaitable[None]]


class Spare:
    """One descriptor that is kept to be given up."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self.keep()

    def keep(self) -> None:
        """Open it, if there is a descriptor to be had."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                # Others took it; the next call tries again.
                return

    def give_up(self) -> None:
        """Close it, so that somebody may have a descriptor."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


async def accept_connections(listener: trio.SocketListener, serve: Serve, nursery: trio.Nursery) -> None:
    """Accept connections until cancelled; closes neither the listener nor what it serves.

    Args:
        listener: open.
        serve: runs once for each connection, which is closed behind it.
        nursery: what ``serve`` runs in.

    Raises:
        OSError: the listener is broken.

    Cancellation: no connection is accepted and lost.
    """
    spare, lines = Spare(), Lines()
    try:
        while True:
            spare.keep()
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in SHORTAGES:
                    raise
                lines.write(
                    log.warning,
                    "connection.not_accepted",
                    trio.current_time(),
                    reason=os.strerror(error.errno),
                    hint="raise the limit of descriptors (ulimit -Hn, LimitNOFILE), or lower limits.connections",
                )
                await _close_one(listener, spare)
                await trio.sleep(_PAUSE_S)
            else:
                nursery.start_soon(_serve, serve, stream)
    finally:
        spare.give_up()


async def _close_one(listener: trio.SocketListener, spare: Spare) -> None:
    """Accept one connection in place of the spare descriptor, and close it."""
    spare.give_up()
    with trio.move_on_after(_PAUSE_S):
        try:
            stream = await listener.accept()
        except OSError:
            # The system as a whole has none, or somebody else was faster.
            return
        log.debug("connection.closed_unserved", peer=peer_of(stream))
        await trio.aclose_forcefully(stream)


async def _serve(serve: Serve, stream: trio.SocketStream) -> None:
    try:
        await serve(stream)
    finally:
        await trio.aclose_forcefully(stream)


__all__ = ["SHORTAGES", "Spare", "accept_connections"]
