"""Inbound flow control against a ledger, without frames: R22 and T4 as invariants."""

from __future__ import annotations

from collections import deque

import pytest
import trio
import trio.testing
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from arka._core import wire
from arka._core.wire import INITIAL_WINDOW, FlightMessage, MessageAssembler, Splitter
from arka.errors import InvalidRequest, Unavailable
from arka.flight.flow import STEP_BYTES, ReadAhead, StreamIntake, Wakeup
from arka.flight.grpc import Route
from arka.options import MIB, Limits
from arka.tiers.admission import Charge, Ledger
from arka.tiers.room import Room
from tests.transport.peer import PREFACE, Writes, data, flight_data, grpc_message, served

LEDGER_BYTES = 2 * MIB


class Client:
    """One stream's two ends: a client that writes as much as its window allows, and the server's intake."""

    def __init__(self, splitter: Splitter, stream_id: int, ledger: Ledger, read_ahead: ReadAhead, flight: bool) -> None:
        self.stream_id = stream_id
        self.splitter = splitter
        self.flight = flight
        self.assembler = MessageAssembler(flight, LEDGER_BYTES // 2, LEDGER_BYTES // 2, self)
        self.intake = StreamIntake(self.assembler, ledger, read_ahead, lambda _: None)
        splitter.open(stream_id, self.assembler)
        self.window = INITIAL_WINDOW
        self.unsent: deque[bytes] = deque()
        self.written = 0
        #: Bytes of the message in progress that were sent.
        self.partial = 0
        self.delivered: list[int] = []
        self.held: list[Charge] = []

    def hear(self) -> None:
        """Take the WINDOW_UPDATE that is due, if any."""
        self.window += self.intake.take_increment()

    def write(self, size: int) -> None:
        self.written += 1
        payload = flight_data(header=b"H", body=bytes(size)) if self.flight else bytes(size)
        self.unsent.append(grpc_message(payload))

    def send(self, most: int, padding: int | None) -> None:
        """Send some of what is unsent."""
        overhead = 0 if padding is None else padding + 1
        size = min(most, self.window - overhead, len(self.unsent[0]) if self.unsent else 0)
        if size <= 0 and not (overhead and 0 < overhead <= self.window):
            return
        size = max(size, 0)
        part = self.unsent[0][:size] if size else b""
        if size:
            rest = self.unsent.popleft()[size:]
            self.partial = self.partial + size if rest else 0
            if rest:
                self.unsent.appendleft(rest)
        self.window -= size + overhead
        receive(self.splitter, data(self.stream_id, part, padding=padding))

    def receive(self) -> bool:
        """Let the RPC take a message, if there is one."""
        if not self.intake._inbox:
            return False
        message = take_now(self.intake)
        if isinstance(message, FlightMessage):
            assert message.charge.granted
            self.held.append(message.charge)
        self.delivered.append(1)
        return True


def take_now(intake: StreamIntake):
    """Run ``receive`` when it does not wait."""
    coroutine = intake.receive()
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    return stopped.value.value


def receive(splitter: Splitter, chunk: bytes) -> None:
    """Do with bytes what a connection's reader does."""
    while chunk:
        taken = 0
        for target in splitter.targets():
            part = chunk[taken : taken + len(target)]
            target[: len(part)] = part
            taken += len(part)
        splitter.received(taken)
        chunk = chunk[taken:]
        while kind := splitter.next():
            if kind == wire.PREFACE:
                continue
            client = splitter.assembler.owner
            if kind == wire.MESSAGE:
                client.intake.complete(splitter.message, splitter.length)
            elif kind == wire.PREFIX:
                client.intake.begin(splitter.length, splitter.assembler.shortfall)
            elif kind == wire.PADDING:
                client.intake.add_padding(splitter.length)
            elif kind == wire.LOW:
                client.intake.step(0)
            else:
                assert kind == wire.EMPTY, kind
        if (lacking := splitter.lacking()) is not None:
            lacking.owner.intake.step(splitter.frame_left)


class Flow(RuleBasedStateMachine):
    """Some streams, one ledger; every rule is something that a client, a handler or a tier does."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(LEDGER_BYTES)
        read_ahead = ReadAhead(self.ledger)
        self.splitter = Splitter(MIB)
        receive(self.splitter, PREFACE)
        self.clients = [Client(self.splitter, 2 * i + 1, self.ledger, read_ahead, flight=i != 3) for i in range(4)]

    streams = st.integers(0, 3)

    @rule(stream=streams, size=st.sampled_from([0, 1, 100, 5_000, 20_000, 60_000, 70_000, 300_000, 900_000]))
    def write(self, stream, size):
        self.clients[stream].write(size)

    @rule(
        stream=streams,
        most=st.sampled_from([1, 4, 5, 6, 1_000, 16_384, 65_536, 900_000]),
        padding=st.sampled_from([None, None, 0, 255]),
    )
    def send(self, stream, most, padding):
        self.clients[stream].send(most, padding)

    @rule(stream=streams, sizes=st.lists(st.sampled_from([30_000, 70_000, 150_000, 400_000]), min_size=2, max_size=4))
    def burst(self, stream, sizes):
        """Messages one after the other, as far as they get without a release: later ones meet a reservation."""
        client = self.clients[stream]
        for size in sizes:
            client.write(size)
        for _ in range(20):
            client.hear()
            client.send(100_000, None)
            client.receive()
            self.window_is_what_was_granted()

    @rule(stream=streams)
    def hear(self, stream):
        self.clients[stream].hear()

    @rule(stream=streams)
    def receive(self, stream):
        self.clients[stream].receive()

    @rule(stream=streams, newest=st.booleans())
    def release(self, stream, newest):
        held = self.clients[stream].held
        if held:
            held.pop(-1 if newest else 0).release()

    def everything_gets_through(self):
        """R22: as long as handlers take and tiers release, every message arrives: nobody waits for ever."""
        for _ in range(100_000):
            moved = False
            for client in self.clients:
                client.hear()
                moved |= client.receive()
                while client.held:
                    client.held.pop().release()
                    moved = True
                before = client.window
                client.hear()
                client.send(10**9, None)
                moved |= client.window != before
            if not moved:
                break
        for client in self.clients:
            assert not client.unsent, "a client waits for window and nothing moves"
            assert len(client.delivered) == client.written
        assert self.ledger.statistics().waiting == 0

    @invariant()
    def windows_agree(self):
        """Neither end believes in a window that the other does not know of."""
        for client in self.clients:
            assert client.window + client.intake.increment == client.assembler.window >= 0

    @invariant()
    def window_is_what_was_granted(self):
        """A window is the initial one, what is reserved ahead, and the message in progress if it is granted."""
        for client in self.clients:
            made = client.intake
            granted, entry = 0, made._open
            if made._current is not None or (entry is not None and entry.granted):
                granted = client.assembler.message_bytes
            elif entry is not None:
                granted = entry.total - entry.credit
            put_off = made._owed + sum(item[3] for item in made._inbox)
            put_off += sum(waiting.credit for waiting in made._awaiting if waiting is not entry) + made._promised
            expected = INITIAL_WINDOW + client.assembler.ahead + granted - client.partial
            assert client.assembler.window + put_off == expected

    @invariant()
    def ledger_bounds_what_may_come(self):
        """What peers may still send is covered: the initial windows, and charges for all beyond them."""
        statistics = self.ledger.statistics()
        assert statistics.charged_bytes <= LEDGER_BYTES
        beyond = sum(max(0, client.assembler.window - INITIAL_WINDOW) for client in self.clients)
        # A stream that has to wait gives up its reservation, but not the window that it stood for.
        assert beyond <= statistics.charged_bytes + LEDGER_BYTES // 8

    def teardown(self):
        self.everything_gets_through()
        for client in self.clients:
            self.splitter.close(client.stream_id)
            client.intake.abandon()
            for charge in client.held:
                charge.release()
        statistics = self.ledger.statistics()
        assert (statistics.charged_bytes, statistics.waiting) == (0, 0)


TestFlow = Flow.TestCase
TestFlow.settings = hypothesis_settings(max_examples=100, stateful_step_count=50, deadline=None)


def intake(ledger: Ledger | None = None) -> tuple[StreamIntake, MessageAssembler, list[bool]]:
    ledger = ledger or Ledger(64 * MIB)
    assembler = MessageAssembler(True, MIB, MIB)
    told: list[bool] = []
    return StreamIntake(assembler, ledger, ReadAhead(ledger), told.append), assembler, told


def large_intake(ledger: Ledger) -> tuple[StreamIntake, MessageAssembler, list[bool]]:
    assembler = MessageAssembler(True, 64 * MIB, 64 * MIB)
    told: list[bool] = []
    stream = ledger.open_stream(ledger.open_connection("peer"))
    return StreamIntake(assembler, ledger, ReadAhead(ledger), told.append, account=stream), assembler, told


def send_large(made: StreamIntake, assembler: MessageAssembler, size: int) -> int:
    """Send a message as its window comes; returns in how many pieces that was told while it came."""
    made.take_increment()
    made.begin(size, size - assembler.window)
    left, told = size, 0
    while True:
        told += made.take_increment() > 0
        sent = min(left, assembler.window)
        assembler.window -= sent
        left -= sent
        if not left:
            break
        assert sent, "no window, and a message to send"
        made.step(0)
    made.complete(FlightMessage(), size)
    take_now(made).charge.release()
    return told


class TestReceive:
    """What an RPC sees."""

    async def test_order_of_endings(self):
        """Messages come first, then the error; an end without error is None, again and again."""
        made, _, _ = intake()
        made.complete(FlightMessage(header=b"1"), 10)
        made.fail(InvalidRequest("broken"))
        assert (await made.receive()).header == b"1"
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="broken"):
                await made.receive()
        ended, _, _ = intake()
        ended.end()
        assert await ended.receive() is None
        assert await ended.receive() is None

    async def test_first_error_counts(self):
        """A later error does not replace the first."""
        made, _, _ = intake()
        made.fail(InvalidRequest("first"))
        made.fail(Unavailable("second"))
        with pytest.raises(InvalidRequest, match="first"):
            await made.receive()

    async def test_error_while_a_message_waits(self):
        """An error behind a prefix that waits for the ledger withdraws the request, and is what is received."""
        ledger = Ledger(4 * MIB)
        made, _, _ = intake(ledger)
        ledger.try_request(3 * MIB)
        made.begin(2 * MIB, MIB)
        assert ledger.statistics().waiting == 1
        made.fail(InvalidRequest("broken"))
        assert ledger.statistics().waiting == 0
        with pytest.raises(InvalidRequest, match="broken"):
            await made.receive()

    async def test_reserved_message_stays_behind_one_that_waits(self):
        """A message that is paid for ahead does not overtake an earlier one whose charge still waits."""
        ledger = Ledger(4 * MIB)
        made, assembler, _ = intake(ledger)
        made.begin(100_000, 50_000)
        made.complete(FlightMessage(), 100_000)
        (await made.receive()).charge.release()
        assert assembler.ahead == 200_000
        hog = ledger.try_request(4 * MIB - INITIAL_WINDOW - 200_000)
        made.begin(210_000, -1)
        made.complete(FlightMessage(header=b"waits"), 210_000)
        made.begin(50_000, -1)
        made.complete(FlightMessage(header=b"reserved"), 50_000)
        assert not made._inbox
        hog.release()
        assert [(await made.receive()).header for _ in range(2)] == [b"waits", b"reserved"]

    async def test_cancelled_receive_loses_nothing(self):
        """A cancelled receive leaves the message that came meanwhile for the next one."""
        made, _, _ = intake()
        with trio.CancelScope() as scope:
            scope.cancel()
            await made.receive()
        assert scope.cancelled_caught
        made.complete(FlightMessage(header=b"1"), 10)
        with trio.CancelScope() as scope:
            scope.cancel()
            assert (await made.receive()).header == b"1"

    async def test_abandon_is_idempotent(self):
        """Abandoning releases all charges once."""
        ledger = Ledger(MIB)
        made, _, _ = intake(ledger)
        made.complete(FlightMessage(header=b"1"), 1_000)
        assert ledger.statistics().charged_bytes == INITIAL_WINDOW + 1_000
        made.abandon()
        made.abandon()
        assert ledger.statistics().charged_bytes == 0

    async def test_small_updates_are_put_off(self):
        """Window is given back in portions while half of it is open, at once below that."""
        made, assembler, told = intake()
        made.complete(FlightMessage(), 100)
        assert told == []
        made.complete(FlightMessage(), INITIAL_WINDOW // 4)
        assert told == [True]
        assert made.take_increment() == INITIAL_WINDOW // 4 + 100
        assembler.window = INITIAL_WINDOW // 2 - 1
        made.complete(FlightMessage(), 100)
        assert made.take_increment() == 100

    @pytest.mark.parametrize("end", ["open", "refuse", "detach"])
    async def test_no_window_while_there_is_no_room(self, end, autojump_clock):
        """While a room holds back, nothing is granted, small messages or large; after it, all that was put off is."""
        log, room = Room("disk", 30), Room("table", table="t")
        room.put_below(log)
        ledger = Ledger(64 * MIB)
        made, assembler, _ = intake(ledger)
        made.follow(room)
        log.close("full")
        made.complete(FlightMessage(header=b"1"), INITIAL_WINDOW // 2)
        made.begin(MIB // 2, MIB // 2 - INITIAL_WINDOW // 2)
        assert made.take_increment() == 0
        assert assembler.ahead == 0
        assert ledger.statistics().charged_bytes == INITIAL_WINDOW + INITIAL_WINDOW // 2
        # What was granted already has come, and is for the RPC to wait with.
        assert (await made.receive()).header == b"1"
        assert made.take_increment() == 0
        if end == "open":
            log.open()
        elif end == "refuse":
            await trio.sleep(30)
            log.tick()
        else:
            room.detach()
        assert made.take_increment() >= MIB // 2 + INITIAL_WINDOW // 2
        log.open()
        log.close("full")
        made.abandon()
        log.open()
        assert made.take_increment() == 0

    async def test_another_room_is_another_matter(self):
        """A stream that changes its table follows that one's room alone."""
        first, second = Room("table"), Room("table")
        made, _, _ = intake()
        made.follow(first)
        first.close("far behind")
        made.complete(FlightMessage(), INITIAL_WINDOW // 2)
        assert made.take_increment() == 0
        made.follow(second)
        assert made.take_increment() == INITIAL_WINDOW // 2
        second.close("far behind")
        first.open()
        made.complete(FlightMessage(), INITIAL_WINDOW // 2)
        assert made.take_increment() == 0

    async def test_no_update_for_a_stream_that_has_ended(self):
        """A peer that has ended its side needs no window."""
        made, _, _ = intake()
        made.complete(FlightMessage(), INITIAL_WINDOW // 2)
        made.end()
        assert made.take_increment() == 0


class TestReadAhead:
    """T4: window before it is asked for, but never at another's cost."""

    def test_bounded_for_all(self):
        """All streams together reserve an eighth of the ledger at most."""
        ledger = Ledger(8 * MIB)
        ahead = ReadAhead(ledger)
        first = ahead.take(MIB)
        assert first is not None
        assert ahead.take(1) is None
        ahead.give_back(MIB)
        assert ahead.take(1) is not None

    def test_not_while_others_wait(self):
        """Nothing is reserved ahead while somebody waits for the ledger."""
        ledger = Ledger(MIB)
        ahead = ReadAhead(ledger)
        ledger.request(MIB)
        ledger.request(10)
        assert ahead.take(1) is None

    def test_idle_stream_keeps_little(self):
        """A stream's reservation is two messages like its recent ones, however many came."""
        ledger = Ledger(64 * MIB)
        made, assembler, _ = intake(ledger)
        for _ in range(50):
            made.begin(200_000, 200_000 - INITIAL_WINDOW - assembler.ahead)
            made.complete(FlightMessage(), 200_000)
            take_now(made).charge.release()
        assert assembler.ahead == 400_000
        assert ledger.statistics().charged_bytes == INITIAL_WINDOW + 400_000

    def test_wide_where_there_is_plenty(self):
        """A stream of large messages may have megabytes ahead; the more streams there are, the less each has."""
        ledger = Ledger(1024 * MIB)
        shared = ReadAhead(ledger)
        ahead = []
        for _ in range(100):
            assembler = MessageAssembler(True, MIB, MIB)
            made = StreamIntake(assembler, ledger, shared, lambda _: None)
            made.begin(200_000, 200_000 - INITIAL_WINDOW)
            ahead.append(assembler.ahead)
        assert ahead[0] == 4 * MIB
        assert ahead == sorted(ahead, reverse=True)
        assert ahead[-1] >= 400_000
        assert sum(ahead) <= 128 * MIB

    def test_large_messages_have_window_ahead(self):
        """After the first large message, whose window comes in steps, the next ones have theirs before they begin."""
        ledger = Ledger(1024 * MIB)
        made, assembler, _ = large_intake(ledger)
        assert send_large(made, assembler, 3 * MIB) == 3
        for _ in range(5):
            assert send_large(made, assembler, 3 * MIB) <= 1

    def test_steps_while_others_wait(self):
        """While another stream waits, a granted message has no more than a step of window ahead of what came (T25)."""
        ledger = Ledger(64 * MIB)
        made, assembler, _ = large_intake(ledger)
        send_large(made, assembler, 12 * MIB)
        send_large(made, assembler, 12 * MIB)
        ledger.try_request(12 * MIB)
        made.begin(12 * MIB, 12 * MIB - assembler.window)
        assert assembler.window > STEP_BYTES
        other, _, _ = large_intake(ledger)
        other.begin(60 * MIB, 60 * MIB)
        assert ledger.statistics().waiting == 1
        assembler.window = 0
        made.step(0)
        assert assembler.window == STEP_BYTES

    def test_reservation_is_given_up_before_waiting(self):
        """R22: a stream that has to wait for a message holds nothing but its initial window meanwhile."""
        ledger = Ledger(4 * MIB)
        made, assembler, _ = intake(ledger)
        made.begin(100_000, 50_000)
        made.complete(FlightMessage(), 100_000)
        take_now(made).charge.release()
        assert assembler.ahead == 200_000
        hog = ledger.try_request(4 * MIB - INITIAL_WINDOW - 200_000)
        made.begin(900_000, 700_000)
        assert ledger.statistics().charged_bytes == INITIAL_WINDOW + hog.amount
        assert ledger.statistics().waiting_bytes == 900_000
        hog.release()
        # 200,000 of the 900,000 had been granted ahead of it.
        made.complete(FlightMessage(), 900_000)
        assert take_now(made).charge.amount == 900_000


class TestPadding:
    """Padding takes window that no message needs."""

    def test_inside_a_message(self):
        """Padding that comes inside a message which the window just covered does not stop the message for ever."""
        state = Flow()
        client = state.clients[0]
        client.send(1, 255)
        client.write(5_000)
        client.write(60_000)
        for most, padding in ((16_384, None), (5, None), (1, 255)):
            client.send(most, padding)
        state.teardown()


class TestTaker:
    """Messages that are taken in the reader's own turn."""

    async def test_only_while_receive_waits(self):
        """What comes while the RPC is at work waits for it, in order; so does what the taker leaves."""
        made, _, _ = intake()
        taken: list[bytes | None] = []

        def take(message: FlightMessage) -> bool:
            if message.header == b"not now":
                return False
            assert message.charge.granted
            message.charge.release()
            taken.append(message.header)
            return True

        received: list[bytes | None] = []
        go_on = trio.Event()

        async def rpc() -> None:
            while (message := await made.receive()) is not None:
                received.append(message.header)
                if message.header == b"not now":
                    await go_on.wait()

        made.set_taker(take)
        async with trio.open_nursery() as nursery:
            made.complete(FlightMessage(header=b"early"), 10)
            nursery.start_soon(rpc)
            await trio.testing.wait_all_tasks_blocked()
            for header in (b"at once", b"not now", b"behind it"):
                made.complete(FlightMessage(header=header), 10)
            assert taken == [b"at once"]
            await trio.testing.wait_all_tasks_blocked()
            made.complete(FlightMessage(header=b"while it works"), 10)
            go_on.set()
            await trio.testing.wait_all_tasks_blocked()
            made.complete(FlightMessage(header=b"at once again"), 10)
            made.end()
        assert taken == [b"at once", b"at once again"]
        assert received == [b"early", b"not now", b"behind it", b"while it works"]

    async def test_not_before_its_charge(self):
        """A message that the ledger has no room for waits for it as ever."""
        ledger = Ledger(MIB)
        made, _, _ = intake(ledger)
        hog = ledger.request(MIB - INITIAL_WINDOW)
        taken: list[FlightMessage] = []
        made.set_taker(lambda message: not taken.append(message))
        async with trio.open_nursery() as nursery:

            async def rpc() -> None:
                assert (await made.receive()).header == b"1"

            nursery.start_soon(rpc)
            await trio.testing.wait_all_tasks_blocked()
            made.complete(FlightMessage(header=b"1"), 1000)
            await trio.testing.wait_all_tasks_blocked()
            assert not taken
            hog.release()
        assert not taken

    async def test_failure_is_the_rpcs(self):
        """What the taker raises is raised where the RPC receives, and the charge is given back."""
        ledger = Ledger(MIB)
        made, _, _ = intake(ledger)

        def take(_: FlightMessage) -> bool:
            raise RuntimeError("a bug")

        made.set_taker(take)
        async with trio.open_nursery() as nursery:

            async def rpc() -> None:
                with pytest.raises(RuntimeError, match="a bug"):
                    await made.receive()

            nursery.start_soon(rpc)
            await trio.testing.wait_all_tasks_blocked()
            made.complete(FlightMessage(header=b"1"), 1000)
        made.abandon()
        assert ledger.statistics().charged_bytes == 0


class TestWakeup:
    """The one-task event."""

    async def test_set_is_remembered(self):
        """A set that nobody waited for ends the next wait, once."""
        wakeup = Wakeup()
        wakeup.set()
        wakeup.set()
        await wakeup.wait()
        with trio.move_on_after(0) as scope:
            await wakeup.wait()
        assert scope.cancelled_caught

    async def test_wakes_the_waiter(self):
        """A set wakes the task that waits; after a cancelled wait it is remembered instead."""
        wakeup = Wakeup()
        woken = []

        async def waiter() -> None:
            await wakeup.wait()
            woken.append(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        wakeup.set()
        await waiter()
        assert woken == [1]


WRITES = "/arrow.flight.protocol.FlightService/DoExchange"


@pytest.mark.parametrize("limit_mib", [64, 128, 160, 192])
@pytest.mark.parametrize("size", [20_000, 28_000, 40_000, 55_000, 75_000, 100_000])
async def test_a_client_that_hears_of_nothing_but_window(limit_mib: int, size: int) -> None:
    """Messages that cause no ack go on for as long as the client uses the window it was told of, and no more (T4)."""
    writes = Writes()
    limit = limit_mib * MIB
    first, other = (grpc_message(flight_data(header=b"h" * 50, body=bytes(length))) for length in (70_000, size))
    async with served(
        {WRITES: Route(writes, flight_data=True)}, limits=Limits(memory_bytes=limit), ledger=Ledger(limit)
    ) as shared:
        peer = shared.peer
        await peer.send(peer.request(1, WRITES))
        sent = 0
        for number in range(60):
            left = other if number else first
            while left:
                room = min(peer.granted[0], peer.granted.get(1, INITIAL_WINDOW)) - sent
                if room <= 0:
                    await trio.testing.wait_all_tasks_blocked()
                    room = min(peer.granted[0], peer.granted.get(1, INITIAL_WINDOW)) - sent
                    assert room > 0, f"the client waits in message {number}, {len(left)} bytes before its end"
                part, left = left[: min(room, 16_384)], left[min(room, 16_384) :]
                await peer.send(data(1, part))
                sent += len(part)
                await trio.lowlevel.checkpoint()
