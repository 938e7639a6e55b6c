"""Inbound flow control: what a stream's peer may send, and who has paid for it (T4, R22).

Owns: each stream's window and its charges, from the first byte of a message until the RPC takes it. Does not
own the bytes (``arka._core.wire``), the ledger (``arka.tiers.admission``) nor the connection's window, which
is given back whatever happens here.

The initial window is charged when a stream opens; if the ledger has none, the stream is refused. Beyond it a message's
bytes are granted only when the ledger holds a charge for the whole message: at its prefix if the window does not cover
it, else when it is complete. Of a granted message the window is told in steps of ``STEP_BYTES`` ahead of receipt (T25).
Nobody waits while holding: a stream that has to wait gives up what it had reserved ahead. The window of that was told
and cannot be taken back, so it counts against what all streams may reserve ahead until the message is granted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from arka._core.wire import INITIAL_WINDOW, FlightMessage, MessageAssembler
from arka.errors import AdmissionRejected, ArkaError, ErrorCode
from arka.flight.pace import Pace
from arka.tiers.accounts import Account
from arka.tiers.admission import Charge, Ledger
from arka.tiers.room import Room

#: Window bytes owed to the peer, below which a WINDOW_UPDATE is put off while the window is half open.
_CREDIT_BYTES: Final = INITIAL_WINDOW // 4
#: Bytes received and not yet taken by the RPC, above which its stream gets no more window. Bounds what a handler
#: that does not receive (unread acks, a slow catalog) can hold; a few batches of the usual sizes.
_INBOX_BYTES: Final = 4 * 1024 * 1024
#: What a message in the inbox costs beside its bytes, in bytes: objects and the frame's header.
_MESSAGE_OVERHEAD: Final = 512
#: Of a gRPC message: what has to come before anybody knows its size.
_PREFIX_BYTES: Final = 5
#: Messages from this size on are worth a reservation ahead, bytes: smaller ones flow within the initial window.
_AHEAD_LEAST: Final = INITIAL_WINDOW // 4
#: Window of a granted message that is told ahead of receipt, in bytes (T25). A stream that has sent larger messages is
#: told as much as one of those while no other waits: on one core, 1 MiB is too little to keep its client at work.
STEP_BYTES: Final = 1024 * 1024
#: Most bytes reserved ahead for one stream: more hides no round trip, and window once given cannot be taken back.
_AHEAD_MOST: Final = 8 * 1024 * 1024
#: Bytes reserved ahead where there is plenty, beside two messages: what a client sends while the server's thread waits
#: for its turn on a busy machine. With two messages of 320 kB alone, streams of them ran at two thirds of the speed.
_AHEAD_WIDE: Final = 4 * 1024 * 1024
#: The part of what is left to be reserved that one stream may take beyond two messages: many streams share it evenly.
_AHEAD_PART: Final = 32
#: Share of the ledger that all streams together may reserve ahead: an idle stream keeps its reservation.
_AHEAD_SHARE: Final = 8
#: One peer may reserve ahead so many times what it leaves: three quarters if it is alone.
_PEER_TIMES: Final = 3


class Wakeup:
    """Lets one task wait until another calls ``set``; a ``set`` that nobody waits for is remembered."""

    __slots__ = ("_is_set", "_task")

    def __init__(self) -> None:
        self._is_set = False
        self._task: trio.lowlevel.Task | None = None

    def set(self) -> None:
        """Wake the waiting task, or the next one that waits."""
        task, self._task = self._task, None
        if task is None:
            self._is_set = True
        else:
            trio.lowlevel.reschedule(task)

    @property
    def waiting(self) -> bool:
        """Whether a task waits and has not been woken."""
        return self._task is not None

    async def wait(self) -> None:
        """Wait for ``set``. Cancellation: nothing changes."""
        if self._is_set:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._is_set = False
            return
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)


#: Takes a message without waiting and returns True, or does nothing and returns False.
Taker = Callable[[FlightMessage], bool]


class ReadAhead:
    """Window granted before a message asks for it, bounded for all streams together."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._left = ledger.statistics().limit_bytes // _AHEAD_SHARE

    @property
    def wide(self) -> int:
        """How many bytes one stream may reserve whatever its messages are like."""
        return min(_AHEAD_WIDE, self._left // _AHEAD_PART)

    def take(self, amount: int, account: Account | None = None) -> Charge | None:
        """Reserve ``amount`` bytes if that makes nobody wait, and leaves something for other peers."""
        if amount > self._left:
            return None
        if account is not None and account.peer.ahead + amount > _PEER_TIMES * (self._left - amount):
            return None
        charge = self._ledger.try_ahead(amount, account)
        if charge is not None:
            self._left -= amount
        return charge

    def give_back(self, amount: int) -> None:
        """Count ``amount`` bytes as no longer reserved ahead; their charge is its holder's business."""
        self._left += amount


class _Entry:
    """A message that is not the RPC's yet: its charge waits, or an earlier message's does."""

    __slots__ = ("charge", "credit", "granted", "intake", "message", "told", "total")

    def __init__(self, intake: StreamIntake, total: int, credit: int, told: int = 0) -> None:
        self.intake = intake
        self.total = total
        # Window bytes owed to the peer once the charge is granted.
        self.credit = credit
        # Window bytes that were told ahead of it and are not charged while it waits.
        self.told = told
        self.charge: Charge | None = None
        self.granted = False
        self.message: FlightMessage | bytes | None = None

    def on_grant(self) -> None:
        self.granted = True
        self.intake._on_granted(self)


class StreamIntake:
    """The inbound half of one RPC.

    The connection's reader calls ``begin``, ``complete``, ``add_padding``, ``end`` and ``fail``; the RPC's task
    calls ``receive``. Used from trio's thread only.

    Attributes:
        assembler: has the stream's window; None of its messages is larger than the ledger can ever grant.
        increment: bytes for the stream's next WINDOW_UPDATE, in ``assembler.window`` already.
        ended: the peer has ended its side.
        refusal: why the stream is not to run: there was no initial window for it; None if there was.
        account: who is charged.
        paced: whether ``Pace`` knows of it.
    """

    def __init__(
        self,
        assembler: MessageAssembler,
        ledger: Ledger,
        read_ahead: ReadAhead,
        on_credit: Callable[[bool], None],
        *,
        account: Account | None = None,
        pace: Pace | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        """Charge the initial window.

        Args:
            assembler: puts the stream's messages together.
            ledger: charged with them.
            read_ahead: bounds what is reserved ahead.
            on_credit: called when ``increment`` grows, with whether the peer should be told at once.
            account: the stream's, in the ledger.
            pace: watches the rate of granted messages.
            on_wait: called when a message has to wait for the ledger.
        """
        self.account = account
        self.paced = False
        self._pace = pace
        self._on_wait = on_wait
        self.assembler = assembler
        self.increment = 0
        self.ended = False
        self._ledger = ledger
        self._read_ahead = read_ahead
        self._on_credit = on_credit
        self.refusal: AdmissionRejected | None = None
        self._base: Charge | None = None
        try:
            self._base = ledger.take_window(INITIAL_WINDOW, account)
        except AdmissionRejected as error:
            self.refusal = error
        # What the RPC may take: message, wire bytes, charge to release then, window to give back then.
        self._inbox: deque[tuple[FlightMessage | bytes, int, Charge | None, int]] = deque()
        self._inbox_cost = 0
        # Invariant: complete messages in order, then at most the one in progress, which is also _open.
        self._awaiting: deque[_Entry] = deque()
        self._open: _Entry | None = None
        # The granted charge of the message in progress.
        self._current: Charge | None = None
        # Invariant: while there is a reserve, its amount is assembler.ahead.
        self._reserve: Charge | None = None
        # Window of the granted message in progress that is not told yet.
        self._promised = 0
        # A message that needs window while none is given: its wire bytes.
        self._deferred = 0
        self._owed = 0
        self._withheld = False
        # Where the stream's messages go; it gets no window while that holds back.
        self._room: Room | None = None
        self._recent = 0
        self._error: Exception | None = None
        self._wakeup = Wakeup()
        # Who may have a message at once, and whether the RPC waits for one.
        self._taker: Taker | None = None
        self._receiving = False
        # Ends the RPC while it does not take what it has because its client does not read.
        self._end_unread: Callable[[Exception], None] | None = None
        self._progress = 0
        self._progress_at = 0.0
        self._taken = 0

    # -- the RPC's side ---------------------------------------------------------------------------

    async def receive(self) -> FlightMessage | bytes | None:
        """Take the next message; None once the peer has ended its side.

        Raises:
            ArkaError: the peer sent what cannot be a message; all before it was delivered.

        Cancellation: no message is lost. A checkpoint only when it waits: what is in the inbox is bounded.
        """
        while not self._inbox:
            if not self._awaiting:
                if self._error is not None:
                    raise self._error
                if self.ended:
                    return None
            self._receiving = True
            try:
                await self._wakeup.wait()
            finally:
                self._receiving = False
        message, total, charge, credit = self._inbox.popleft()
        was_closed = self._closed
        self._inbox_cost -= total + _MESSAGE_OVERHEAD
        if charge is not None:
            charge.release()
        if credit:
            self._credit(credit)
        if was_closed and not self._closed:
            self._reopen()
        return message

    def set_taker(self, taker: Taker) -> None:
        """Offer each message to ``taker`` first, in the reader's own turn, whenever ``receive`` waits for one.

        That saves a FlightData message a task switch. What ``taker`` raises, ``receive`` raises.
        """
        self._taker = taker

    def follow(self, room: Room) -> None:
        """Give no window while ``room`` holds back; what was granted already may still come."""
        before, self._room = self._room, room
        if before is not None:
            before.unlisten(self._on_room)
            self._on_room()

    def keep(self, amount: int, what: str) -> Charge:
        """Charge the stream's account with bytes that are kept; see ``Ledger.keep``."""
        return self._ledger.keep(amount, self.account, what)

    def hold(self, end: Callable[[Exception], None] | None) -> None:
        """Say that the RPC takes nothing since its client does not read, and what ends it; None: it does again."""
        self._end_unread = end
        if end is not None:
            self._watch_pace()

    # -- the reader's side ------------------------------------------------------------------------

    def begin(self, total: int, shortfall: int) -> None:
        """Find the bytes for a message whose prefix has come.

        Args:
            total: its wire bytes, prefix included.
            shortfall: how many of them the window does not cover; <= 0 if it does.
        """
        ahead = self.assembler.ahead
        untold = self.increment
        if ahead >= total and self._reserve is not None:
            self._current = self._reserve.split(total)
            self._read_ahead.give_back(total)
            self.assembler.ahead = ahead - total
            self._watch_pace()
            self._reserve_ahead(total, shortfall)
        elif shortfall > 0:
            if self._closed:
                self._deferred = total
            else:
                self._request(total, total - _PREFIX_BYTES - shortfall)
        if self.increment and -shortfall - untold < max(total, self._recent) + _PREFIX_BYTES:
            # Nothing else may bring the peer the update: its messages need not cause acks, and it need not read those.
            # Invariant: by what it was told, it gets as far as the prefix behind another message like these.
            self._on_credit(True)

    def complete(self, message: FlightMessage | bytes, total: int) -> None:
        """Hand over a message; it reaches the RPC when it is paid for, in order."""
        credit = 0
        self._deferred = 0
        if self._promised:
            # The initial window stood in for it.
            promised, self._promised, self.assembler.low = self._promised, 0, 0
            self._credit(promised)
            self._reserve_ahead(total, 0)
        entry, self._open = self._open, None
        if entry is not None:
            entry.message = message
            self._deliver_granted()
            return
        charge, self._current = self._current, None
        if charge is None:
            if not self.assembler.flight_data:
                # Small and soon gone: the initial window's charge stands for it until it is taken.
                credit = total
            else:
                charge = self._ledger.try_request(total, self.account)
                if charge is None:
                    self._await(message, total)
                    return
                self._credit(total)
        if self._awaiting:
            entry = _Entry(self, total, credit)
            entry.message, entry.charge, entry.granted = message, charge, True
            self._awaiting.append(entry)
        elif not self._receiving or self._inbox or charge is None or not self._take_at_once(message, charge):
            self._deliver(message, total, charge, credit)

    def add_padding(self, amount: int) -> None:
        """Give back padding: it was discarded.

        At once inside a message: at its prefix the window was judged without it, and nothing may come after it.
        """
        self._credit(amount)
        if not self._closed and not self.assembler.between_messages:
            self._pay(0, urgent=True)

    def step(self, frame_left: int) -> None:
        """Tell the peer of more window for a granted message, if it has received enough of what it was told of.

        Args:
            frame_left: bytes of a frame in progress that have not come, and that the window has no more.
        """
        most = STEP_BYTES
        if self._recent > most and not self._ledger.others_wait(self.account):
            most = min(self._recent, _AHEAD_MOST)
        amount = min(self._promised, most - self.assembler.window - frame_left)
        if amount > 0:
            self._promised -= amount
            self._pay(amount, urgent=True)
            charge = self._current if self._open is None else self._open.charge
            if not self._promised and charge is not None:
                self._reserve_ahead(charge.amount, 0)
        self.assembler.low = most // 2 if self._promised and not self.ended else 0

    def end(self) -> None:
        """Note that the peer has ended its side."""
        self.ended = True
        if not self.assembler.between_messages:
            self.fail(ArkaError("the request ended in the middle of a message", code=ErrorCode.INVALID_REQUEST))
        self._wakeup.set()

    def fail(self, error: Exception) -> None:
        """Take no more messages: ``receive`` raises ``error`` behind those that are complete."""
        if self._error is None:
            self._error = error
        self._drop_partial()
        if self._end_unread is not None:
            self._end_unread(error)
        self._wakeup.set()

    def withhold(self) -> None:
        """Give no more window, but for a message that was granted already (drain, T19)."""
        self._withheld = True

    def is_stalled(self, now: float, limit_s: float) -> bool:
        """Whether a granted message has made no progress for ``limit_s``; to be asked again and again."""
        progress = self.assembler.progress_bytes
        if not self.is_granted or progress != self._progress:
            self._progress = progress
            self._progress_at = now
            return False
        return now - self._progress_at >= limit_s

    @property
    def is_granted(self) -> bool:
        """Whether a message is in progress whose bytes are charged, or that was granted while it waits for others."""
        return self._current is not None or (self._open is not None and self._open.granted)

    @property
    def holds_grant(self) -> bool:
        """Whether its client holds memory: a granted message in progress, or any that is not taken for its sake."""
        return self.is_granted or (self._end_unread is not None and bool(self._inbox))

    @property
    def progress_bytes(self) -> int:
        """Payload that has come on the stream so far."""
        return self.assembler.progress_bytes

    def take_increment(self) -> int:
        """Take what the stream's next WINDOW_UPDATE is to say; 0 when nothing, or nobody, needs one."""
        increment, self.increment = self.increment, 0
        return 0 if self.ended else increment

    def untaken(self) -> bytes | None:
        """The first complete message that the RPC did not take, if it is no FlightData; it stays where it is."""
        message = self._inbox[0][0] if self._inbox else None
        return message if isinstance(message, bytes) else None

    def abandon(self) -> None:
        """Release everything that the RPC did not take. Idempotent."""
        self._drop_partial()
        if self.paced and self._pace is not None:
            self._pace.leave(self)
        for entry in self._awaiting:
            self._take_back(entry)
            if entry.charge is not None:
                entry.charge.release()
        self._awaiting.clear()
        for message, _, charge, _ in self._inbox:
            if isinstance(message, FlightMessage):
                message.charge.release()
            elif charge is not None:
                charge.release()
        self._inbox.clear()
        if self._base is not None:
            self._base.release()
            self._base = None
        if self._room is not None:
            self._room.unlisten(self._on_room)
            self._room = None

    # -- charges ----------------------------------------------------------------------------------

    @property
    def _closed(self) -> bool:
        room = self._room
        if room is not None and room.held:
            # Whoever asks goes without: the room says when to ask again.
            room.listen(self._on_room)
            return True
        return self._withheld or self._inbox_cost > _INBOX_BYTES

    def _on_room(self) -> None:
        """The room lets writes in again, or refuses them: either way they may come."""
        if not self._closed:
            self._reopen()

    def _request(self, total: int, unreceived: int) -> None:
        """Ask for a whole message, without holding anything meanwhile (R22).

        Args:
            total: its wire bytes.
            unreceived: bytes of window, and of the frame in progress, that have not come.
        """
        granted_ahead, self.assembler.ahead = self.assembler.ahead, 0
        charge = self._ledger.try_request(total, self.account)
        reserve, self._reserve = self._reserve, None
        if reserve is not None:
            reserve.release()
        if charge is not None:
            self._read_ahead.give_back(granted_ahead)
            self._current = charge
            self._watch_pace()
            self._promised += total - granted_ahead
            self.step(unreceived - self.assembler.window)
            return
        self._open = entry = _Entry(self, total, total - granted_ahead, granted_ahead)
        self._wait(entry)

    def _await(self, message: FlightMessage | bytes, total: int) -> None:
        entry = _Entry(self, total, total)
        entry.message = message
        self._wait(entry)

    def _wait(self, entry: _Entry) -> None:
        """Let a message wait for the ledger, in its stream's order."""
        self._awaiting.append(entry)
        entry.charge = self._ledger.request(entry.total, entry.on_grant, self.account)
        if entry.granted:
            self._on_granted(entry)
        elif self._on_wait is not None:
            self._on_wait()

    def _on_granted(self, entry: _Entry) -> None:
        if entry.charge is None:
            # Granted while still being asked for: whoever asks goes on.
            return
        self._take_back(entry)
        credit, entry.credit = entry.credit, 0
        if entry is self._open:
            self._watch_pace()
            self._promised += credit
            self.step(0)
        else:
            self._credit(credit)
        self._deliver_granted()

    def _take_back(self, entry: _Entry) -> None:
        """Count the window that was told ahead of a message no more as reserved."""
        told, entry.told = entry.told, 0
        self._read_ahead.give_back(told)

    def _watch_pace(self) -> None:
        """Let the rate of what was granted be watched, until a look finds no granted message in progress."""
        if not self.paced and self._pace is not None:
            self._pace.join(self)

    def _deliver_granted(self) -> None:
        awaiting = self._awaiting
        while awaiting and awaiting[0].granted and (message := awaiting[0].message) is not None:
            entry = awaiting.popleft()
            self._deliver(message, entry.total, entry.charge, entry.credit)

    def _deliver(self, message: FlightMessage | bytes, total: int, charge: Charge | None, credit: int) -> None:
        if isinstance(message, FlightMessage):
            message.charge = charge
            charge = None
        self._inbox.append((message, total, charge, credit))
        self._inbox_cost += total + _MESSAGE_OVERHEAD
        self._wakeup.set()

    def _take_at_once(self, message: FlightMessage | bytes, charge: Charge) -> bool:
        """Offer a message to the taker; nothing is before it, and the RPC waits for it."""
        if self._taker is None or not isinstance(message, FlightMessage):
            return False
        message.charge = charge
        try:
            return self._taker(message)
        except Exception as error:
            # It is the RPC's code: what fails in it ends the RPC, and not the connection.
            charge.release()
            self.fail(error)
            return True

    def _reserve_ahead(self, total: int, shortfall: int) -> None:
        """Grant about two messages like the recent ones in advance, or a few MB, if that makes nobody wait."""
        self._recent = recent = max(total, (7 * self._recent + total) // 8)
        ahead = self.assembler.ahead
        want = min(max(2 * recent, self._read_ahead.wide), _AHEAD_MOST)
        if recent < _AHEAD_LEAST or want - ahead < max(recent // 2, want // 4) or self._closed:
            return
        charge = self._read_ahead.take(want, self.account)
        if charge is None:
            return
        self._drop_reserve(ahead)
        self._reserve = charge
        self.assembler.ahead = want
        # While the peer has half a message's window beyond this one, its ack can carry the update.
        self._pay(want - ahead, urgent=-shortfall - self.increment < recent // 2)

    def _drop_reserve(self, amount: int) -> None:
        reserve, self._reserve = self._reserve, None
        if reserve is not None:
            self._read_ahead.give_back(amount)
            reserve.release()

    def _drop_partial(self) -> None:
        """Drop the message in progress and what is reserved for those after it."""
        self.assembler.abort()
        self._deferred = self._promised = self.assembler.low = 0
        ahead, self.assembler.ahead = self.assembler.ahead, 0
        self._drop_reserve(ahead)
        current, self._current = self._current, None
        if current is not None:
            current.release()
        entry, self._open = self._open, None
        if entry is not None:
            self._awaiting.remove(entry)
            self._take_back(entry)
            if entry.charge is not None:
                entry.charge.release()

    # -- window -----------------------------------------------------------------------------------

    def _credit(self, amount: int) -> None:
        self._owed += amount
        if not self._closed and (self._owed >= _CREDIT_BYTES or self.assembler.window < INITIAL_WINDOW // 2):
            self._pay(0, urgent=True)

    def _pay(self, amount: int, *, urgent: bool) -> None:
        """Enlarge the window by ``amount`` and what was put off."""
        amount, self._owed = amount + self._owed, 0
        if amount and not self.ended:
            self.assembler.window += amount
            self.increment += amount
            self._on_credit(urgent)

    def _reopen(self) -> None:
        """The inbox has room again: make up for what was put off."""
        self._pay(0, urgent=True)
        deferred, self._deferred = self._deferred, 0
        if deferred:
            self._request(deferred, self.assembler.window)


__all__ = ["STEP_BYTES", "ReadAhead", "StreamIntake", "Taker", "Wakeup"]
