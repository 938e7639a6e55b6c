"""gRPC's own rules, without HTTP/2: timeouts, metadata, statuses, health."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import pytest
import structlog.testing
import trio
from hypothesis import given
from hypothesis import strategies as st

from arka.errors import ArkaError, ErrorCode, InvalidRequest
from arka.flight.deadlines import Deadlines, Due
from arka.flight.floods import RATES, Flood, FloodGuard
from arka.flight.grpc import Call, Health, Route, message_prefix, parse_metadata, parse_timeout, read_request, run_call
from arka.flight.status import RpcError, RpcStatus, Status, percent_encode, status_of
from arka.options import Limits
from tests.transport.peer import data, grpc_message, proto_field, served


class TestTimeout:
    """``grpc-timeout``: one to eight digits and a unit."""

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            (b"1H", 3600),
            (b"2M", 120),
            (b"30S", 30),
            (b"500m", 0.5),
            (b"7u", 7e-6),
            (b"1n", 1e-9),
            (b"0S", 0),
            (b"99999999H", 99_999_999 * 3600),
        ],
    )
    def test_legal(self, value, seconds):
        """Each unit is read."""
        assert parse_timeout(value) == pytest.approx(seconds)

    @pytest.mark.parametrize("value", [b"", b"S", b"1", b"123456789S", b"-1S", b"1.5S", b"1s", b"1S ", b"1S\n"])
    def test_illegal(self, value):
        """Anything else is refused."""
        with pytest.raises(InvalidRequest, match="grpc-timeout"):
            parse_timeout(value)


class TestMetadata:
    """Custom metadata."""

    def test_reserved_names_are_left_out(self):
        """A handler sees no field of HTTP's or gRPC's own."""
        fields = [
            (b":path", b"/x"),
            (b"te", b"trailers"),
            (b"grpc-timeout", b"1S"),
            (b"content-type", b"a"),
            (b"k", b"v"),
        ]
        assert parse_metadata(fields) == {"k": b"v"}

    @pytest.mark.parametrize("value", [b"AAECAw==", b"AAECAw"])
    def test_binary(self, value):
        """``-bin`` values are base64, padded or not."""
        assert parse_metadata([(b"k-bin", value)]) == {"k-bin": b"\0\1\2\3"}

    def test_repeated(self):
        """Values of a repeated key are joined."""
        assert parse_metadata([(b"k", b"a"), (b"k", b"b"), (b"b-bin", b"AA,AQ")]) == {"k": b"a,b", "b-bin": b"\0,\1"}

    @pytest.mark.parametrize("value", [b"A", b"****", b"AA=A"])
    def test_not_base64(self, value):
        """A ``-bin`` value that is not base64 is refused."""
        with pytest.raises(InvalidRequest, match="k-bin"):
            parse_metadata([(b"k-bin", value)])


class TestStatus:
    """Protocol 6: every error code has a status."""

    @pytest.mark.parametrize("code", list(ErrorCode))
    def test_every_code(self, code):
        """Each code maps to a status that is not OK, with the code at the front of the message."""
        status, message = status_of(ArkaError("the detail", code=code))
        assert status is not Status.OK
        assert message == f"[{code}] the detail"

    @pytest.mark.parametrize(
        ("code", "status"),
        [
            ("table_not_found", "NOT_FOUND"),
            ("table_exists", "ALREADY_EXISTS"),
            ("schema_mismatch", "INVALID_ARGUMENT"),
            ("invalid_request", "INVALID_ARGUMENT"),
            ("overloaded", "UNAVAILABLE"),
            ("too_large", "RESOURCE_EXHAUSTED"),
            ("table_dropped", "NOT_FOUND"),
            ("table_stopped", "FAILED_PRECONDITION"),
            ("unavailable", "UNAVAILABLE"),
            ("unauthenticated", "UNAUTHENTICATED"),
            ("permission_denied", "PERMISSION_DENIED"),
            ("out_of_range", "OUT_OF_RANGE"),
            ("unimplemented", "UNIMPLEMENTED"),
            ("internal", "INTERNAL"),
        ],
    )
    def test_table(self, code, status):
        """The statuses are those of the wire contract."""
        assert status_of(ArkaError("x", code=ErrorCode(code))).status.name == status

    def test_trailers(self):
        """OK has no message; others have an encoded one."""
        assert RpcStatus(Status.OK).trailers() == [(b"grpc-status", b"0")]
        assert RpcStatus(Status.INTERNAL, "a%b\n").trailers() == [
            (b"grpc-status", b"13"),
            (b"grpc-message", b"a%25b%0A"),
        ]

    @given(st.text(max_size=200))
    def test_percent_encoding(self, text):
        """Encoded messages are printable ASCII, and decode to what they were."""
        encoded = percent_encode(text)
        assert all(0x20 <= byte <= 0x7E for byte in encoded)
        assert unquote_to_bytes(encoded) == text.encode("utf-8", "replace")

    def test_long_message_is_cut(self):
        """A message too long for a header is cut at a whole character."""
        encoded = percent_encode("€" * 10_000)
        assert unquote_to_bytes(encoded) == ("€" * 1365).encode()


class TestRequest:
    """Which requests are gRPC."""

    def test_whole(self):
        """A request's fields are read once."""
        request = read_request(
            [
                (b":method", b"POST"),
                (b":path", b"/s/m"),
                (b"content-type", b"application/grpc"),
                (b"content-length", b"12"),
                (b"grpc-timeout", b"1S"),
            ]
        )
        assert (request.path, request.is_grpc, request.is_head) == ("/s/m", True, False)
        assert (request.content_bytes, request.timeout) == (12, b"1S")

    def test_odd_path(self):
        """A path that is not ASCII is no method, and no error."""
        assert read_request([(b":path", b"/\xff")]).path == "/\\xff"


def make_call(deadline: float | None = None) -> Call:
    return Call("/s/m", {}, "peer", deadline, None, None)


class TestRunCall:
    """How a handler's end becomes a status."""

    async def run(self, handler, deadline: float | None = None) -> RpcStatus:
        return await run_call(Route(handler), make_call(deadline))

    async def test_cancellation_goes_through(self):
        """A cancelled handler is cancelled, with what else its nursery raised in the log."""

        async def handler(call) -> None:
            async def fail() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    raise ValueError("while being cancelled")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                await trio.sleep_forever()

        with structlog.testing.capture_logs() as logs, trio.move_on_after(0) as scope:
            await self.run(handler)
        assert scope.cancelled_caught
        assert [entry["event"] for entry in logs] == ["rpc.failed"]

    async def test_deadline_in_a_nursery(self, autojump_clock):
        """A deadline cancels what the handler has started."""

        async def handler(call) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)

        assert (await self.run(handler, trio.current_time() + 3)).status is Status.DEADLINE_EXCEEDED

    async def test_exit_goes_through(self):
        """What ends the process is not an RPC's status."""

        async def handler(call) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            await self.run(handler)

        async def group(call) -> None:
            raise BaseExceptionGroup("n", [KeyboardInterrupt()])

        with pytest.raises(BaseExceptionGroup):
            await self.run(group)

    async def test_chosen_status(self):
        """A handler may end with a status of its own."""

        async def handler(call) -> None:
            raise RpcError(Status.ABORTED, "why")

        assert await self.run(handler) == (Status.ABORTED, "why")


class TestHealth:
    """grpc.health.v1."""

    def request(self, service: bytes = b"") -> bytes:
        return grpc_message(proto_field(1, service) if service else b"")

    async def check(self, s, stream_id: int, raw: bytes):
        await s.peer.send(s.peer.request(stream_id, "/grpc.health.v1.Health/Check"), data(stream_id, raw, end=True))
        return await s.peer.response(stream_id)

    async def test_check(self):
        """Check says what is served, for the server and for each service it knows."""
        health = Health(["a.B"])
        async with served(health.routes()) as s:
            assert (await self.check(s, 1, self.request())).messages == [b"\x08\x02"]
            health.set_serving(True)
            assert (await self.check(s, 3, self.request())).messages == [b"\x08\x01"]
            assert (await self.check(s, 5, self.request(b"a.B"))).messages == [b"\x08\x01"]
            assert (await self.check(s, 7, self.request(b"c.D"))).status == Status.NOT_FOUND
            assert (await self.check(s, 9, grpc_message(b"\x0a\x05"))).status == Status.INVALID_ARGUMENT

    async def test_check_under_a_full_ledger(self):
        """Health answers while all memory is taken: its small request waits for nobody."""
        health = Health()
        health.set_serving(True)
        async with served(health.routes()) as s:
            hog = s.ledger.try_request(s.ledger.statistics().limit_bytes)
            s.ledger.request(1)
            assert (await self.check(s, 1, self.request())).messages == [b"\x08\x01"]
            hog.release()

    async def test_watch(self):
        """Watch tells the state and each change of it; an unknown service is unknown until it is not."""
        health = Health(["a.B"])
        async with served(health.routes()) as s:
            await s.peer.send(
                s.peer.request(1, "/grpc.health.v1.Health/Watch"), data(1, self.request(b"a.B"), end=True)
            )
            await s.peer.send(
                s.peer.request(3, "/grpc.health.v1.Health/Watch"), data(3, self.request(b"c.D"), end=True)
            )
            await s.peer.settle()
            health.set_serving(True)
            await s.peer.settle()
            health.set_serving(True)
            await s.peer.settle()
            health.set_serving(False)
            await s.peer.settle()
            assert s.peer.responses[1].messages == [b"\x08\x02", b"\x08\x01", b"\x08\x02"]
            assert s.peer.responses[3].messages == [b"\x08\x03"]


class TestFloodGuard:
    """Token buckets."""

    @pytest.mark.parametrize("kind", list(Flood))
    def test_burst_and_rate(self, kind):
        """A burst passes, one more does not, and tokens come back at the rate and never beyond the burst."""
        guard = FloodGuard(100.0)
        burst, per_s = RATES[kind]
        assert all(guard.allow(kind, 100.0) for _ in range(burst))
        assert not guard.allow(kind, 100.0)
        assert not guard.allow(kind, 100.0 + 0.5 / per_s)
        assert guard.allow(kind, 100.0 + 1.01 / per_s)
        assert all(guard.allow(kind, 1e6) for _ in range(burst))
        assert not guard.allow(kind, 1e6)


class TestDeadlines:
    """The clock of one connection."""

    LIMITS = Limits(handshake_s=5, keepalive_s=10, keepalive_timeout_s=3, idle_s=100)

    def test_handshake(self):
        """The handshake's deadline holds until SETTINGS have come."""
        deadlines = Deadlines(self.LIMITS, 0)
        assert deadlines.next_at(0) == 5
        assert deadlines.due(4.9) is Due.NOTHING
        assert deadlines.due(5) is Due.HANDSHAKE
        deadlines.shook_hands()
        assert deadlines.due(5) is Due.NOTHING

    def test_keepalive(self):
        """A PING is due once after silence; bytes of any kind answer it; else the peer is silent."""
        deadlines = Deadlines(self.LIMITS, 0)
        deadlines.shook_hands()
        assert deadlines.next_at(0) == 10
        assert deadlines.due(10) is Due.PING
        assert deadlines.due(10) is Due.NOTHING
        assert deadlines.next_at(10) == 13
        deadlines.heard(12)
        assert deadlines.due(13) is Due.NOTHING
        assert deadlines.due(22) is Due.PING
        assert deadlines.due(25) is Due.SILENT

    def test_idle(self):
        """Idleness counts from the last RPC, whatever keepalive hears meanwhile."""
        deadlines = Deadlines(self.LIMITS, 0)
        deadlines.shook_hands()
        deadlines.set_busy(True, 1)
        deadlines.heard(500)
        assert deadlines.due(505) is Due.NOTHING
        deadlines.set_busy(False, 506)
        deadlines.heard(605)
        assert deadlines.due(605) is Due.NOTHING
        assert deadlines.next_at(605) == 606
        assert deadlines.due(606) is Due.IDLE


def test_message_prefix():
    """The prefix of an uncompressed message is a zero and its big-endian length."""
    assert message_prefix(0x01020304) == b"\0\1\2\3\4"
