"""Actions that change something: each runs to its end, whatever becomes of the client that asked for it (R41).

Owns: the tasks of such actions, their order, how many there are at a time, and the log line with each outcome. Does not
own what an action does (``arka.tiers.tables``) nor how it is asked for (``arka.flight.service``). Waits, such as Flush
and reads, are not effects: they end with their client.

Actions on one subject run in the order in which they were asked for. A client may create a table and write to it, or
drop and create one, without reading an answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

import structlog
import trio

from arka.errors import AdmissionRejected, ArkaError, Unavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")

_ENDED: Final = "The server ended before this action did: what is in its log is finished by the next start"


class _Outcome(Generic[T]):
    """What became of one effect, for the client that waits for it."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.waiting = False
        self.error: Exception | None = None
        self.result: T | None = None


class Effects:
    """Runs the actions that change something in a nursery of the server's. Used from trio's thread only."""

    def __init__(self, limit: int) -> None:
        """Start with none.

        Args:
            limit: how many run at a time.
        """
        self._limit = limit
        self._running = 0
        self._idle = trio.Event()
        # The newest effect on each subject.
        self._newest: dict[str, trio.Event] = {}
        self._nursery: trio.Nursery | None = None
        self._draining = False

    @property
    def running(self) -> int:
        """How many effects run now."""
        return self._running

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the nursery that effects run in, until cancelled.

        Cancellation: as a crash: the next start finishes what the log asks for.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start_drain(self) -> None:
        """Refuse new effects; those that run go on."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Wait until no effect runs. Cancellation: nothing changes."""
        while self._running:
            self._idle = trio.Event()
            await self._idle.wait()

    async def wait_for(self, subject: str) -> None:
        """Wait for the effects on a subject that were asked for already. Cancellation: nothing changes."""
        ended = self._newest.get(subject)
        if ended is not None:
            await ended.wait()

    async def do(self, action: str, subject: str, effect: Callable[[], Awaitable[T]]) -> T:
        """Run an effect and wait for its result.

        Args:
            action: its name, for the log.
            subject: what it is about, for the log.
            effect: awaited once, in the server's nursery.

        Raises:
            AdmissionRejected: ``overloaded``: as many run as may.
            Unavailable: the server drains, or ended before the effect did.
            Exception: what the effect raised.

        Cancellation: the effect goes on.
        """
        outcome = self._start(action, subject, effect)
        outcome.waiting = True
        try:
            await outcome.ended.wait()
        finally:
            outcome.waiting = False
        if outcome.error is not None:
            raise outcome.error
        return outcome.result  # type: ignore[return-value]

    def adopt(self, action: str, subject: str, effect: Callable[[], Awaitable[object]]) -> None:
        """Run an effect whose client has gone already; its outcome is in the log alone."""
        try:
            self._start(action, subject, effect)
        except ArkaError as error:
            log.warning("action.refused", action=action, subject=subject, reason=error.detail)

    def _start(self, action: str, subject: str, effect: Callable[[], Awaitable[T]]) -> _Outcome[T]:
        if self._nursery is None or self._draining:
            raise Unavailable("The server is draining: ask the same node again")
        if self._running >= self._limit:
            raise AdmissionRejected(
                f"{self._running} actions run on this server, allowed are {self._limit} (limits.actions): retry later"
            )
        outcome = _Outcome[T]()
        before, self._newest[subject] = self._newest.get(subject), outcome.ended
        self._running += 1
        self._nursery.start_soon(self._carry_out, action, subject, effect, outcome, before)
        return outcome

    async def _carry_out(
        self,
        action: str,
        subject: str,
        effect: Callable[[], Awaitable[T]],
        outcome: _Outcome[T],
        before: trio.Event | None,
    ) -> None:
        """Run one effect to its end and log what became of it."""
        began = trio.current_time()
        outcome.error = Unavailable(_ENDED)
        try:
            if before is not None:
                await before.wait()
            outcome.result = await effect()
        except ArkaError as error:
            outcome.error = error
            log.warning(
                "action.failed",
                action=action,
                subject=subject,
                code=str(error.code),
                reason=error.detail,
                client_waits=outcome.waiting,
            )
        except Exception as error:
            # A bug of one action's: the RPC that waits reports it, and the server goes on.
            outcome.error = error
            log.exception("action.failed", action=action, subject=subject, client_waits=outcome.waiting)
        else:
            outcome.error = None
            seconds = round(trio.current_time() - began, 3)
            log.info("action.done", action=action, subject=subject, client_waits=outcome.waiting, seconds=seconds)
        finally:
            if self._newest.get(subject) is outcome.ended:
                del self._newest[subject]
            self._running -= 1
            if not self._running:
                self._idle.set()
            outcome.ended.set()


__all__ = ["Effects"]
