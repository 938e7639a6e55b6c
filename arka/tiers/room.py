"""Room for new writes: streams are held back while there is none, and refused only after a long time (R23, R36).

Owns: whether writes are let in, held back or refused, since when, and who is told when that changes. Does not own
why there is no room (``arka.tiers.space`` for the disk, ``arka.tiers.apart`` for one table), windows
(``arka.flight.flow``) nor the order of a stream's writes (``arka.flight.ordering``).

The log has one room, each table one below it: what shuts the log's room shuts every table's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import trio

from arka.errors import AdmissionRejected

log = structlog.get_logger(__name__)

#: A room that is shut for less than this is not worth a line in the log, in seconds: under load it flaps.
_SAID_AFTER_S: Final = 1.0
#: What a room waits that is not below another one yet, in seconds.
_NEVER_S: Final = 1e9


class NoRoom(AdmissionRejected):
    """A write has to wait: nothing of it happened, and it may be tried again once ``room`` no longer holds back."""

    def __init__(self, room: Room) -> None:
        super().__init__(room.reason or "")
        self.room = room


class Room:
    """A gate for new writes: open, holding back, or refusing. Used from trio's thread only.

    Invariant: ``shut`` is ``held`` or ``refusing``, never both; a room below a shut one is shut.

    Attributes:
        shut: whether there is no room.
        held: whether writes wait and streams get no window.
        refusing: whether there was no room for ``limits.stall_s``, so that writes are refused.
        reason: why there is no room, with figures; None while there is.
    """

    __slots__ = (
        "_below",
        "_changed",
        "_fields",
        "_kind",
        "_listeners",
        "_own",
        "_own_refusing",
        "_said",
        "_since",
        "_stall_s",
        "_upper",
        "held",
        "reason",
        "refusing",
        "shut",
    )

    def __init__(self, kind: str, stall_s: float = _NEVER_S, *, table: str | None = None) -> None:
        """Begin open.

        Args:
            kind: of what there is room or not: ``disk``, ``table``, ``keys``; the first word of its log events.
            stall_s: how long writes wait, in seconds, before they are refused.
            table: whose room it is, for the log; None for the log's own.
        """
        self.shut = self.held = self.refusing = False
        self.reason: str | None = None
        self._kind = kind
        self._fields = {} if table is None else {"table": table}
        self._stall_s = stall_s
        self._own: str | None = None
        self._own_refusing = False
        self._since = 0.0
        self._said = False
        self._upper: Room | None = None
        self._below: dict[Room, None] = {}
        self._changed = trio.Event()
        self._listeners: dict[Callable[[], None], None] = {}

    def put_below(self, upper: Room) -> None:
        """Shut this room whenever ``upper`` is shut, and let writes wait as long as there."""
        self._upper, self._stall_s = upper, upper._stall_s
        upper._below[self] = None
        self._settle()

    def detach(self) -> None:
        """Leave the room above; what waits looks again."""
        if self._upper is not None:
            self._upper._below.pop(self, None)
            self._upper = None
        self._own, self._own_refusing = None, False
        self._settle()
        self.wake()

    def check(self) -> None:
        """Let a write in, or say why not.

        Raises:
            NoRoom: it has to wait.
            AdmissionRejected: ``overloaded``: there was no room for too long.
        """
        if self.held:
            raise NoRoom(self)
        if self.refusing:
            raise AdmissionRejected(
                f"{self.reason}; there was no room for {self._stall_s:g} s (limits.stall_s): retry later"
            )

    def close(self, reason: str) -> None:
        """Say that there is no room, and why; again with newer figures."""
        if self._own is None:
            self._since = trio.current_time()
            self._own_refusing = self._stall_s <= 0
            self._said = False
            if self._own_refusing:
                self._say_refusing(reason)
        self._own = reason
        self._settle()

    def open(self) -> None:
        """Say that there is room."""
        if self._own is None:
            return
        if self._said or self._own_refusing:
            shut_s = round(trio.current_time() - self._since, 1)
            log.info(f"{self._kind}.accepting", shut_s=shut_s, **self._fields)
        self._own, self._own_refusing = None, False
        self._settle()

    def tick(self) -> None:
        """Look at the time: refuse what has waited too long. To be called about once a second."""
        if self._own is not None and not self._own_refusing:
            shut_s = trio.current_time() - self._since
            if shut_s >= self._stall_s:
                self._own_refusing = True
                self._say_refusing(self._own)
                self._settle()
            elif shut_s >= _SAID_AFTER_S and not self._said:
                self._said = True
                log.warning(f"{self._kind}.holding_back", reason=self._own, **self._fields)
        for below in tuple(self._below):
            below.tick()

    async def wait(self) -> None:
        """Wait until writes are let in or refused, or until somebody has to look again.

        Cancellation: nothing changes.
        """
        if self.held:
            await self._changed.wait()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` once, when writes are next let in or refused; it must not raise or wait."""
        self._listeners[listener] = None

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Undo ``listen``."""
        self._listeners.pop(listener, None)

    def wake(self) -> None:
        """Let what waits look again, whether or not there is room: its table may have ended."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        listeners, self._listeners = self._listeners, {}
        for listener in listeners:
            listener()

    def _say_refusing(self, reason: str) -> None:
        log.warning(f"{self._kind}.refusing", reason=reason, after_s=self._stall_s, **self._fields)

    def _settle(self) -> None:
        """Work out what the room is, from its own state and the room above."""
        upper = self._upper
        was_held, was_refusing = self.held, self.refusing
        above = upper is not None and upper.shut
        self.shut = self._own is not None or above
        self.refusing = self._own_refusing or (upper is not None and upper.refusing)
        self.held = self.shut and not self.refusing
        if self._own is not None and (self._own_refusing or upper is None or not upper.refusing):
            self.reason = self._own
        else:
            self.reason = upper.reason if upper is not None else None
        for below in self._below:
            below._settle()
        if (was_held and not self.held) or (self.refusing and not was_refusing):
            self.wake()


__all__ = ["NoRoom", "Room"]
