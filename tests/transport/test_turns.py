"""T22: what one connection makes the event loop do in one piece, counted in events and units, never in time."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import h2.connection
import hpack
import pytest
import structlog.testing
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from arka.errors import InvalidRequest
from arka.flight import turns
from arka.flight.floods import RATES, Flood, FloodGuard
from arka.flight.grpc import Call, Route, parse_metadata, read_request
from arka.flight.h2state import SETTINGS_VALUES, StatelessEncoder, make_h2
from arka.flight.http2 import ConnectionFactory
from arka.flight.status import Status, percent_encode
from arka.flight.turns import TurnQueue
from arka.options import MIB, Limits
from arka.tiers.admission import Ledger
from tests.transport.peer import (
    ECHO,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    S_INITIAL_WINDOW_SIZE,
    connected,
    data,
    echo,
    frame,
    goaway,
    grpc_message,
    rst_stream,
    served,
    settings,
    window_update,
)

#: A turn may be overdrawn by its last event: HEADERS whose fields decode to the most that is allowed.
MOST_UNITS = turns.TURN_UNITS + turns.HEADERS_UNITS + turns.FRAME_UNITS + 2 * 64
MOST_HEADERS = turns.TURN_UNITS // turns.HEADERS_UNITS + 1

BURSTS = {
    "unknown methods": (1_000, lambda p, i: p.request(i, "/no.Such/Method", end=True)),
    "long unknown methods": (300, lambda p, i: p.request(i, "/" + "x" * 6_000, end=True)),
    "methods that run": (1_000, lambda p, i: p.request(i)),
    "not gRPC": (1_000, lambda p, i: p.request(i, content_type=None)),
    "fields that expand": (
        1_000,
        lambda p, i: p.request(i, end=True, extra=tuple((f"x-{k}", "v" * 300) for k in range(8))),
    ),
    "cancelled at once": (400, lambda p, i: p.request(i) + rst_stream(i)),
}


async def settled(peer) -> None:
    with trio.fail_after(120):
        await peer.settle()


class TestBursts:
    """A burst of cheap input is done in many turns, and others run between them."""

    @pytest.mark.parametrize("kind", BURSTS)
    async def test_headers(self, kind):
        """However many HEADERS come at once, a turn begins a few streams."""
        count, make = BURSTS[kind]
        async with served() as s:
            await s.peer.send(b"".join(make(s.peer, 2 * k + 1) for k in range(count)))
            await settled(s.peer)
            counts = s.factory.turns
            assert counts.turns >= count // MOST_HEADERS
            assert 0 < counts.most_headers <= MOST_HEADERS
            assert counts.most_units <= MOST_UNITS

    @pytest.mark.parametrize(
        ("kind", "piece", "count"),
        [
            ("messages without content", data(1, grpc_message(b"") * 3_000), 4),
            ("small messages", data(1, grpc_message(b"x" * 20) * 600), 4),
            ("windows", window_update(1, 1) * 5_000, 4),
            ("windows of the connection", window_update(0, 1) * 5_000, 4),
            ("pings", frame(PING, 0, 0, bytes(8)) * 900, 1),
            ("priorities", frame(PRIORITY, 0, 1, bytes(5)) * 4_000, 1),
            ("settings", settings({S_INITIAL_WINDOW_SIZE: 70_000}) * 90, 1),
            ("unknown frames", frame(99, 0, 0, bytes(2_000)) * 400, 1),
            ("goaways", goaway(0, 1, b"x" * 2_000) * 400, 1),
        ],
    )
    async def test_other_frames(self, kind, piece, count):
        """However many frames come at once, a turn handles a few hundred."""

        async def swallow(call: Call) -> None:
            while await call.receive() is not None:
                pass

        async with served({ECHO: Route(swallow)}) as s:
            await s.peer.send(s.peer.request(1))
            for _ in range(count):
                await s.peer.send(piece)
                await settled(s.peer)
            counts = s.factory.turns
            assert counts.turns > 0, kind
            assert counts.most_events <= turns.TURN_UNITS, kind
            assert counts.most_units <= MOST_UNITS, kind

    async def test_a_neighbour_is_served_between_turns(self):
        """While one connection's burst is handled, another's PING is answered after a turn of it or two."""
        factory = ConnectionFactory({ECHO: Route(echo)}, Ledger(64 * MIB), Limits(memory_bytes=64 * MIB))
        async with connected(factory) as (hog, _), connected(factory) as (neighbour, _):
            burst = b"".join(hog.request(2 * k + 1, "/x", end=True) for k in range(1_000))
            before = factory.turns.turns
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hog.send, burst)
                with trio.fail_after(60):
                    await hog.wait(lambda: factory.turns.turns > before)
                for _ in range(5):
                    at = factory.turns.turns
                    await neighbour.settle_quickly()
                    # A few passes of the loop: the server's reader and writer, and this client's.
                    assert factory.turns.turns - at <= 20
            await settled(hog)
            for k in range(1_000):
                assert (await hog.response(2 * k + 1)).status == Status.UNIMPLEMENTED

    async def test_streams_of_a_connection_that_goes(self):
        """The RPCs that a client leaves behind end a few at a time."""
        ends: Counter[int] = Counter()
        passes = 0

        async def stay(call: Call) -> None:
            try:
                await trio.sleep_forever()
            finally:
                ends[passes] += 1

        async def count() -> None:
            nonlocal passes
            while True:
                passes += 1
                await trio.lowlevel.checkpoint()

        async with served({ECHO: Route(stay)}) as s:
            await s.peer.send(b"".join(s.peer.request(2 * k + 1) for k in range(400)))
            await settled(s.peer)
            assert s.factory.calls == 400
            async with trio.open_nursery() as nursery:
                nursery.start_soon(count)
                await s.peer.stream.aclose()
                with trio.fail_after(60):
                    await s.factory.wait_idle()
                nursery.cancel_scope.cancel()
        assert ends.total() == 400
        # Two slices may meet in one pass of the counter's.
        assert max(ends.values()) <= 2 * turns.STREAMS_PER_SLICE

    async def test_long_answers_go_on_one_in_a_pass(self):
        """Of hundreds of RPCs in the middle of a long answer, one goes on in each pass of the event loop."""
        passes, waiting, woken = 0, 0, trio.Event()
        steps: Counter[int] = Counter()

        async def answer(call: Call) -> None:
            nonlocal waiting
            waiting += 1
            # All of them go on at once, as those that wait for one list of tables do.
            await woken.wait()
            for _ in range(5):
                await call.next_turn()
                steps[passes] += 1

        async def count() -> None:
            nonlocal passes
            while True:
                passes += 1
                await trio.lowlevel.checkpoint()

        async with served({ECHO: Route(answer)}) as s, trio.open_nursery() as nursery:
            await s.peer.send(b"".join(s.peer.request(2 * k + 1) for k in range(200)))
            await settled(s.peer)
            assert waiting == 200
            nursery.start_soon(count)
            woken.set()
            with trio.fail_after(60):
                while steps.total() < 1_000:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        # Two passes of the loop may meet in one of the counter's.
        assert max(steps.values()) <= 2


class TestRates:
    """Over longer times."""

    async def test_requests_are_paced(self, autojump_clock):
        """A client that begins RPCs faster than the rate is read more slowly; none is lost."""
        limits = Limits(memory_bytes=64 * MIB, streams_per_connection=100)
        burst = RATES[Flood.REQUESTS].burst
        async with served(limits=limits) as s:
            start = trio.current_time()
            for first in range(0, 3 * burst, 500):
                await s.peer.send(
                    b"".join(s.peer.request(2 * (first + k) + 1, "/x", end=True) for k in range(500)),
                )
            assert (await s.peer.response(2 * (3 * burst) - 1)).status == Status.UNIMPLEMENTED
            assert trio.current_time() - start >= 2 * burst / RATES[Flood.REQUESTS].per_s - 0.1
            assert not s.peer.goaways

    def test_what_is_advertised_may_come_at_once(self):
        """As many streams as a client was told of are no flood."""
        guard = FloodGuard(0.0, requests=40_000)
        for _ in range(40_000):
            guard.take(Flood.REQUESTS, 0.0)
        assert guard.pause(Flood.REQUESTS, 0.0) == 0
        guard.take(Flood.REQUESTS, 0.0)
        assert guard.pause(Flood.REQUESTS, 0.0) == pytest.approx(1 / RATES[Flood.REQUESTS].per_s)
        assert guard.pause(Flood.REQUESTS, 1.0) == 0

    async def test_goaways(self):
        """GOAWAY is counted, and logged once."""
        with structlog.testing.capture_logs() as logs:
            async with served() as s:
                await s.peer.send(goaway(0, 2, b"x" * 10_000) * 3)
                await settled(s.peer)
                await s.peer.send(goaway(0, 2) * (3 * RATES[Flood.OTHER].burst))
                assert (await s.peer.wait_closed())[0] == ENHANCE_YOUR_CALM
        [line] = [entry for entry in logs if entry["event"] == "connection.peer_goaway"]
        assert len(line["detail"]) <= 256


class TestQueue:
    """Whose turn it is."""

    async def test_addresses_take_turns(self):
        """One reader goes on in a pass; an address with ten of them gets no more than one with one."""
        queue, order = TurnQueue(), []

        async def read(address: str, turn_count: int) -> None:
            for _ in range(turn_count):
                await queue.wait(address)
                order.append(address)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(read, "many", 20)
            nursery.start_soon(read, "one", 20)
        assert len(order) == 220
        # From its first turn on, the one has every second.
        first = order.index("one")
        assert order[first : first + 39 : 2] == ["one"] * 20
        assert len(queue) == 0

    async def test_one_in_each_pass(self):
        """Readers that want to go on do so in different passes of the loop."""
        queue, passes, went = TurnQueue(), 0, Counter()

        async def count() -> None:
            nonlocal passes
            while True:
                passes += 1
                await trio.lowlevel.checkpoint()

        async def read(address: str) -> None:
            for _ in range(10):
                await queue.wait(address)
                went[passes] += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            async with trio.open_nursery() as readers:
                for k in range(20):
                    readers.start_soon(read, str(k % 3))
            nursery.cancel_scope.cancel()
        # The counter may run before one and after the next.
        assert max(went.values()) <= 2
        assert went.total() == 200

    async def test_cancelled_readers_pass_the_turn(self):
        """Whoever is cancelled while it waits, or is called, holds nobody up."""
        queue, done = TurnQueue(), []

        async def read(name: int, scope: trio.CancelScope) -> None:
            with scope:
                while True:
                    await queue.wait(str(name % 2))
                    done.append(name)

        scopes = [trio.CancelScope() for _ in range(6)]
        async with trio.open_nursery() as nursery:
            for name, scope in enumerate(scopes):
                nursery.start_soon(read, name, scope)
            for scope in scopes[:-1]:
                for _ in range(7):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
            del done[:]
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            assert done.count(5) >= 5
            scopes[-1].cancel()
        assert len(queue) == 0
        with trio.fail_after(5):
            await queue.wait("later")


class CountedStreams(dict):
    """A table that tells when it is walked."""

    walks = 0

    def __iter__(self):
        type(self).walks += 1
        return super().__iter__()

    def items(self):
        type(self).walks += 1
        return super().items()

    def values(self):
        type(self).walks += 1
        return super().values()


class TestH2:
    """What h2 would do for each frame, and what is pinned of its private names."""

    def request(self, stream_id: int, *, end: bool = True) -> bytes:
        block = hpack.Encoder().encode([(":method", "POST"), (":path", "/x"), (":scheme", "http"), (":authority", "a")])
        return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream_id, block)

    def test_headers_do_not_walk_streams(self):
        """HEADERS cost the same however many streams are open or have been."""
        connection = make_h2()
        connection.receive_data(PREFACE + settings())
        connection.streams = CountedStreams(connection.streams)
        CountedStreams.walks = 0
        for k in range(100):
            connection.receive_data(self.request(2 * k + 1))
        assert CountedStreams.walks == 0
        assert connection.open_inbound_streams == 100

    def test_ended_streams_are_forgotten(self):
        """A stream that has ended leaves how it did, and no more; an open one stays."""
        connection = make_h2()
        connection.receive_data(PREFACE + settings() + self.request(1) + self.request(3))
        connection.forget(1)
        assert set(connection.streams) == {1, 3}
        connection.send_headers(1, [(b":status", b"200")], end_stream=True)
        connection.reset_stream(3)
        connection.forget(1)
        connection.forget(3)
        assert not connection.streams
        # RFC 9113, section 5.1: a late RST_STREAM or WINDOW_UPDATE is no error.
        connection.receive_data(rst_stream(1) + window_update(1, 5) + rst_stream(3))

    def test_the_names_that_are_replaced_exist(self):
        """h2 still asks for what is replaced here."""
        plain = h2.connection.H2Connection
        for name in ("open_inbound_streams", "_receive_settings_frame", "MAX_CLOSED_STREAMS"):
            assert hasattr(plain, name), name
        connection = make_h2()
        assert connection._frame_dispatch_table[h2.connection.SettingsFrame].__func__ is (
            type(connection)._receive_settings_frame
        )
        assert connection._closed_streams._size_limit == type(connection).MAX_CLOSED_STREAMS

    async def test_streams_do_not_pile_up(self):
        """After a thousand RPCs h2 knows none of them."""
        async with served() as s:
            await s.peer.send(b"".join(s.peer.request(2 * k + 1, "/x", end=True) for k in range(500)))
            await s.peer.send(b"".join(s.peer.request(2 * k + 1, "/x") for k in range(500, 600)))
            await s.peer.send(b"".join(s.peer.request(2 * k + 1, end=True) for k in range(600, 700)))
            await settled(s.peer)
            [connection] = s.factory._connections
            assert len(connection._h2.streams) == 0


class TestSettings:
    """SETTINGS of the peer."""

    def test_unknown_ones_are_not_kept(self):
        """RFC 9113, section 6.5.2: unknown settings are ignored; none of 60,000 stays."""
        connection = make_h2()
        connection.receive_data(PREFACE + settings())
        before = len(connection.remote_settings)
        for first in range(100, 60_000, 60):
            connection.receive_data(settings({first + k: 1 for k in range(60)}))
        assert len(connection.remote_settings) == before

    async def test_many_values(self):
        """A frame of more values than any peer has is refused before it is read."""
        async with served() as s:
            await s.peer.send(settings({100 + k: 1 for k in range(SETTINGS_VALUES)}))
            await settled(s.peer)
            await s.peer.send(settings({100 + k: 1 for k in range(SETTINGS_VALUES + 1)}))
            assert (await s.peer.wait_closed())[0] == ENHANCE_YOUR_CALM

    async def test_each_open_stream_is_walked_and_no_other(self, monkeypatch):
        """A new INITIAL_WINDOW_SIZE changes the open streams alone, as many as are charged for."""
        walked = Counter()
        enlarge = h2.connection.guard_increment_window

        def count(*arguments):
            walked["streams"] += 1
            return enlarge(*arguments)

        async def swallow(call: Call) -> None:
            while await call.receive() is not None:
                pass

        limits = Limits(memory_bytes=64 * MIB, streams_per_connection=50)
        async with served({ECHO: Route(swallow)}, limits=limits) as s:
            await s.peer.send(b"".join(s.peer.request(2 * k + 1) for k in range(200)))
            await s.peer.send(b"".join(s.peer.request(2 * k + 1, "/x", end=True) for k in range(200, 300)))
            await settled(s.peer)
            monkeypatch.setattr(h2.connection, "guard_increment_window", count)
            await s.peer.send(settings({S_INITIAL_WINDOW_SIZE: 70_000}))
            await settled(s.peer)
        assert walked["streams"] == 50

    def test_a_walk_over_all_streams_fits_a_turn(self):
        """However many RPCs a connection may have by its limit, one SETTINGS frame costs less than a turn."""
        [most] = [f.metadata["at_most"] for f in fields(Limits) if f.name == "streams_per_connection"]
        assert turns.SETTINGS_UNITS + turns.FRAME_UNITS + most // turns.STREAMS_PER_UNIT <= turns.TURN_UNITS

    async def test_large_header_table(self):
        """A peer that allows us a header table of 4 GiB does not make us keep one."""
        async with served(client_settings={1: 2**32 - 1}) as s:
            for k in range(200):
                await s.peer.send(s.peer.request(2 * k + 1, f"/{k:0100d}", end=True))
            await settled(s.peer)
            [connection] = s.factory._connections
            assert not connection._h2.encoder.header_table.dynamic_entries
            assert (await s.peer.response(399)).message == f"[unimplemented] Unknown method /{199:0100d}"


class TestTexts:
    """What clients write and servers echo, in time that grows with its length and no faster."""

    @given(
        st.lists(st.tuples(st.sampled_from([b":status", b"content-type", b"grpc-message"]), st.binary(max_size=300)))
    )
    def test_fields(self, fields):
        """Any decoder reads what the stateless encoder wrote."""
        encoder = StatelessEncoder()
        encoder.header_table_size = 0
        decoder = hpack.Decoder()
        for _ in range(2):
            assert list(decoder.decode(encoder.encode(fields), raw=True)) == fields
        assert not decoder.header_table.dynamic_entries

    @pytest.mark.parametrize("size", [126, 127, 128, 254, 255, 16_000])
    def test_lengths(self, size):
        """Lengths take one byte or several (RFC 7541, section 5.1)."""
        fields = [(b"grpc-message", b"x" * size)]
        assert list(hpack.Decoder().decode(StatelessEncoder().encode(fields), raw=True)) == fields

    async def test_long_method(self):
        """A method's name is cut where it is told."""
        async with served() as s:
            await s.peer.send(s.peer.request(1, "/" + "x" * 6_000, end=True))
            response = await s.peer.response(1)
            assert response.status == Status.UNIMPLEMENTED
            assert len(response.message) < 400

    def test_repeated_keys(self):
        """Values of one key are joined once, not once for each."""
        fields = [(b"a", b"x%d" % k) for k in range(2_000)]
        assert parse_metadata(fields) == {"a": b",".join(value for _, value in fields)}
        assert parse_metadata([(b"a-bin", b"YQ=="), (b"a-bin", b"Yg")]) == {"a-bin": b"a,b"}

    def test_many_binary_values(self):
        """A binary key of thousands of values is refused: each would be decoded by itself."""
        with pytest.raises(InvalidRequest, match="More than 256 values"):
            parse_metadata([(b"a-bin", b"," * 60_000)])

    def test_shown_path(self):
        """What is shown of a path is short; the path itself is whole."""
        request = read_request([(b":path", b"/" + b"y" * 1_000), (b":method", b"POST")])
        assert len(request.path) == 1_001
        assert len(request.shown_path) < 300

    @given(st.text())
    def test_percent_encoding(self, text):
        """grpc-message holds printable ASCII alone, and decodes to the text."""
        encoded = percent_encode(text)
        assert all(0x20 <= byte <= 0x7E for byte in encoded)
        plain, at = bytearray(), 0
        while at < len(encoded):
            if encoded[at] == 0x25:
                plain.append(int(encoded[at + 1 : at + 3], 16))
                at += 3
            else:
                plain.append(encoded[at])
                at += 1
        assert bytes(plain) == text.encode("utf-8", "replace")
