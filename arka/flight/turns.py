"""The budget of a reader's turn: how much one connection makes trio's thread do before others run (T22).

Owns: what each kind of event costs, how much fits in a turn, and whose turn comes next once a turn is used up. Does not
own the events (``arka._core.wire``), what is done about them (``arka.flight.connection``) nor rates over longer times
(``arka.flight.floods``). Bytes are bounded where they are received (``arka.flight.channels``).

Costs are counted, not timed: the same input always takes the same turns. A unit stands for about 5 us on a slow core.

A reader that uses up its turn asks for another. In each pass of the event loop one such reader goes on, and addresses
take turns before connections do. So a hundred busy connections of one client delay a quiet one by one turn, not by a
hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio

from arka._core import wire
from arka.roundrobin import RoundRobin

#: What fits in one turn, in units: 2.5 ms or so.
TURN_UNITS: Final = 512
#: A frame that h2 handles, beside what its type costs, in units.
FRAME_UNITS: Final = 6
#: Each this many bytes of such a frame cost a unit more.
FRAME_BYTES_PER_UNIT: Final = 256
#: Each this many bytes of a header block cost a unit more: Huffman codes are read bit by bit.
BLOCK_BYTES_PER_UNIT: Final = 12
#: HEADERS that begin a stream: their block, h2's stream, a task and its first step.
HEADERS_UNITS: Final = 58
#: Each this many decoded bytes of header fields cost a unit more.
HEADER_BYTES_PER_UNIT: Final = 1024
#: RST_STREAM: it cancels an RPC.
RESET_UNITS: Final = 20
#: SETTINGS, and how many open streams that it changes cost a unit more.
SETTINGS_UNITS: Final = 20
STREAMS_PER_UNIT: Final = 16
#: How many streams end, or are looked at, before others run.
STREAMS_PER_SLICE: Final = 16
STREAMS_PER_LOOK: Final = 256

#: Each this many bytes of a message cost a unit more.
MESSAGE_BYTES_PER_UNIT: Final = 512

#: A message costs this beside its bytes, and its bytes no more than the second number. They are received in place, and
#: what walks them is bounded elsewhere (T16, T23).
_MESSAGE_UNITS: Final = 8
_MESSAGE_MOST: Final = 32

_COST_OF_EVENT: Final = {
    wire.CONTROL: FRAME_UNITS,
    wire.PREFACE: 1,
    wire.PREFIX: 2,
    wire.MESSAGE: _MESSAGE_UNITS,
    wire.REFUSED: RESET_UNITS,
    wire.ENDED: RESET_UNITS,
    wire.STRAY: 2,
    wire.OVERRUN: RESET_UNITS,
    wire.LENGTH: RESET_UNITS,
    wire.PADDING: 1,
    wire.EMPTY: 1,
    wire.WINDOW: 1,
    wire.LOW: 2,
}
#: Indexed by event: what each costs, in units.
COSTS: Final = tuple(_COST_OF_EVENT.get(event, 0) for event in range(max(_COST_OF_EVENT) + 1))


@dataclass(slots=True)
class TurnCounts:
    """What the turns of all connections have done, for tests and metrics.

    Attributes:
        turns: turns that were used up.
        most_units: the most expensive turn, in units.
        most_events: most events of one turn.
        most_headers: most header blocks of one turn.
    """

    turns: int = 0
    most_units: int = 0
    most_events: int = 0
    most_headers: int = 0


class TurnQueue:
    """Readers whose turn is used up, or RPCs within a long answer: one goes on in each pass of the event loop.

    Addresses come one after the other, those of an address too. Used from trio's thread only.
    """

    def __init__(self) -> None:
        self.counts = TurnCounts()
        self._waiting: RoundRobin[trio.lowlevel.Task] = RoundRobin()
        # Whether a reader is on its way through this pass; it calls the next one.
        self._taken = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nobody waits, and no reader is on its way through this pass."""
        return not self._taken

    async def wait(self, address: str) -> None:
        """Let others run; returns when it is the turn of a reader of ``address``.

        Cancellation: the turn goes to the next.
        """
        if self._taken:
            # Whoever is called keeps the pass taken.
            await self._queue(address)
            try:
                await trio.lowlevel.checkpoint_if_cancelled()
            finally:
                self._call_next(address)
            return
        self._taken = True
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self._call_next(address)

    async def _queue(self, address: str) -> None:
        task = trio.lowlevel.current_task()
        self._waiting.add(address, task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.remove(address, task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _call_next(self, address: str) -> None:
        """Wake the next reader; it runs in the next pass.

        Args:
            address: whose turn it is in this pass: others come before it.
        """
        if not self._waiting:
            self._taken = False
            return
        self._waiting.put_last(address)
        trio.lowlevel.reschedule(self._waiting.take())


class ReaderTurn:
    """What is left of one connection's turn.

    Attributes:
        left: units; at or below 0 the turn is over. The last event may overdraw it.
        events: events of this turn.
        headers: header blocks of this turn.
    """

    __slots__ = ("_address", "_queue", "events", "headers", "left")

    def __init__(self, queue: TurnQueue, address: str) -> None:
        """Begin with a whole turn.

        Args:
            queue: where to wait for another.
            address: of the peer, without its port.
        """
        self._queue = queue
        self._address = address
        self.left = TURN_UNITS
        self.events = 0
        self.headers = 0

    @property
    def is_next(self) -> bool:
        """Whether another turn would begin in the next pass of the loop, since no other reader wants one."""
        return self._queue.idle

    def spend_message(self, length: int) -> None:
        """Count a message of ``length`` wire bytes beside the cost of its event."""
        self.left -= min(length // MESSAGE_BYTES_PER_UNIT, _MESSAGE_MOST)

    def spend_headers(self, decoded_bytes: int, fields: int) -> None:
        """Count a header block by what it decodes to: bytes, and fields, each of which costs a unit."""
        self.headers += 1
        self.left -= HEADERS_UNITS + fields + decoded_bytes // HEADER_BYTES_PER_UNIT

    def spend(self, units: int) -> None:
        """Count anything else."""
        self.left -= units

    async def wait_next(self) -> None:
        """End the turn, let others run, and begin another. Cancellation: the turn is over."""
        counts = self._queue.counts
        counts.turns += 1
        counts.most_units = max(counts.most_units, TURN_UNITS - self.left)
        counts.most_events = max(counts.most_events, self.events)
        counts.most_headers = max(counts.most_headers, self.headers)
        self.left = TURN_UNITS
        self.events = self.headers = 0
        await self._queue.wait(self._address)


__all__ = [
    "BLOCK_BYTES_PER_UNIT",
    "COSTS",
    "FRAME_BYTES_PER_UNIT",
    "FRAME_UNITS",
    "HEADERS_UNITS",
    "MESSAGE_BYTES_PER_UNIT",
    "RESET_UNITS",
    "SETTINGS_UNITS",
    "STREAMS_PER_LOOK",
    "STREAMS_PER_SLICE",
    "STREAMS_PER_UNIT",
    "TURN_UNITS",
    "ReaderTurn",
    "TurnCounts",
    "TurnQueue",
]
