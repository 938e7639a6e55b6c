"""The splitter and the assembler without a connection: bytes in, events out."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka._core import wire
from arka._core.wire import FlightMessage, MessageAssembler, Refusal, Splitter, WireError, read_fields
from tests.transport.peer import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    PING,
    PREFACE,
    WINDOW_UPDATE,
    data,
    flight_data,
    frame,
    grpc_message,
    proto_field,
    varint,
    window_update,
)

LIMIT = 1024 * 1024


def assembler(*, flight: bool = True, message_limit: int = LIMIT, body_limit: int = LIMIT) -> MessageAssembler:
    made = MessageAssembler(flight, message_limit, body_limit)
    made.window = 2**40
    return made


def describe(message: FlightMessage | bytes):
    if isinstance(message, bytes):
        return message
    body = None if message.buffer is None else bytes(message.buffer.body)
    return (message.descriptor, message.header, message.app_metadata, message.body_bytes, message.oversized, body)


def receive(splitter: Splitter, chunk: bytes) -> None:
    """Receive a chunk the way a source does: into the targets, as often as it takes."""
    while chunk:
        taken = 0
        for target in splitter.targets():
            part = chunk[taken : taken + len(target)]
            target[: len(part)] = part
            taken += len(part)
        splitter.received(taken)
        chunk = chunk[taken:]
        yield from drain(splitter)


def drain(splitter: Splitter):
    """Take all events there are, as values."""
    while kind := splitter.next():
        if kind == wire.MESSAGE:
            yield ("message", splitter.stream_id, describe(splitter.message), splitter.length)
        elif kind in (wire.CONTROL, wire.PREFACE):
            yield ("frame", splitter.frame)
        elif kind == wire.REFUSED:
            yield ("refused", splitter.assembler.error.kind)
        else:
            yield (kind, splitter.stream_id)


def run(chunks: list[bytes], streams: dict[int, MessageAssembler], *, preface: bool = False) -> list:
    """Split what comes in chunks; a broken connection is the last event."""
    splitter = Splitter(LIMIT)
    for stream_id, made in streams.items():
        splitter.open(stream_id, made)
    events = []
    try:
        for chunk in [b"" if preface else PREFACE, *chunks]:
            events.extend(receive(splitter, chunk))
    except WireError as error:
        events.append(("error", error.code))
    return events if preface else events[1:]


def assemble(payload: bytes, **options) -> list:
    """What one DATA frame with ``payload`` makes of itself."""
    return run([data(1, payload)], {1: assembler(**options)})


def one_message(payload: bytes, **options):
    [(kind, stream_id, message, length)] = assemble(grpc_message(payload), **options)
    assert (kind, stream_id, length) == ("message", 1, len(payload) + 5)
    return message


class TestFlightData:
    """T12: FlightData in every legal order and shape, nothing illegal."""

    def test_whole(self):
        """The four fields of a batch arrive as they were sent, the body in the frame's place."""
        message = one_message(flight_data(descriptor=b"D", header=b"HEAD", app_metadata=b"M", body=b"B" * 100))
        assert message == (b"D", b"HEAD", b"M", 100, False, b"B" * 100)

    def test_frame_layout(self):
        """The buffer is header space, IPC prefix and padded metadata, then the 64-byte aligned body."""
        splitter = Splitter(LIMIT)
        splitter.open(1, assembler())
        list(receive(splitter, PREFACE))
        chunk = data(1, grpc_message(flight_data(header=b"H" * 10, body=b"B" * 7)))
        target = splitter.targets()[0]
        target[: len(chunk)] = chunk
        splitter.received(len(chunk))
        assert splitter.next() == wire.MESSAGE
        raw = bytes(splitter.message.buffer)
        assert raw[:128] == bytes(128)
        assert raw[128:136] == b"\xff\xff\xff\xff" + (192 - 136).to_bytes(4, "little")
        assert raw[136:192] == b"H" * 10 + bytes(46)
        assert raw[192:] == b"B" * 7

    @pytest.mark.parametrize("order", [(1000, 3, 2, 1), (2, 1000, 3, 1), (3, 2, 1, 1000), (1000, 2, 1, 3)])
    def test_any_order(self, order):
        """Fields may come in any order; a body that does not end the message is copied."""
        values = {1: b"D", 2: b"HEAD", 3: b"M", 1000: b"B" * 50}
        payload = b"".join(proto_field(number, values[number]) for number in order)
        assert one_message(payload) == (b"D", b"HEAD", b"M", 50, False, b"B" * 50)

    def test_last_occurrence_wins(self):
        """Of a repeated field the last occurrence counts, for bodies as well."""
        payload = b"".join(
            [
                proto_field(1000, b"first body"),
                proto_field(2, b"first"),
                proto_field(3, b"a"),
                proto_field(2, b"second"),
                proto_field(3, b"b"),
                proto_field(1000, b"second body"),
            ]
        )
        assert one_message(payload) == (None, b"second", b"b", 11, False, b"second body")

    def test_last_body_wins_in_the_middle(self):
        """The last body counts although other fields follow it."""
        payload = proto_field(1000, b"one") + proto_field(1000, b"three") + proto_field(2, b"H")
        assert one_message(payload) == (None, b"H", None, 5, False, b"three")

    def test_body_is_optional(self):
        """A header without a body has an empty one: proto3 leaves it out."""
        assert one_message(flight_data(header=b"H")) == (None, b"H", None, 0, False, b"")
        assert one_message(flight_data(header=b"H", body=b"")) == (None, b"H", None, 0, False, b"")

    def test_header_is_optional(self):
        """A metadata-only message has no buffer; a body without a header is dropped."""
        assert one_message(flight_data(app_metadata=b"{}")) == (None, None, b"{}", 0, False, None)
        assert one_message(flight_data(body=b"stray")) == (None, None, None, 5, False, None)

    def test_empty_message(self):
        """An empty FlightData is a message, also directly behind another and at a frame's end."""
        assert assemble(grpc_message(b"") * 2) == [("message", 1, (None, None, None, 0, False, None), 5)] * 2

    @pytest.mark.parametrize(
        "unknown",
        [
            pytest.param(varint(9 << 3 | 0) + b"\xff" * 9 + b"\x01", id="ten-byte varint"),
            pytest.param(varint(9 << 3 | 1) + bytes(8), id="fixed64"),
            pytest.param(varint(9 << 3 | 5) + bytes(4), id="fixed32"),
            pytest.param(proto_field(9, b"x" * 300), id="length-delimited"),
            pytest.param(varint((2**29 - 1) << 3 | 0) + b"\x00", id="largest field number"),
            pytest.param(varint(2 << 3 | 0) + b"\x05", id="field 2 of another type"),
            pytest.param(varint(1000 << 3 | 5) + bytes(4), id="field 1000 of another type"),
        ],
    )
    def test_unknown_fields_are_skipped(self, unknown):
        """Unknown fields of every wire type are skipped, wherever they stand."""
        payload = unknown + proto_field(2, b"H") + unknown + proto_field(1000, b"body")
        assert one_message(payload) == (None, b"H", None, 4, False, b"body")
        assert one_message(payload + unknown) == (None, b"H", None, 4, False, b"body")

    @pytest.mark.parametrize(
        "payload",
        [
            pytest.param(b"\x12", id="tag without length"),
            pytest.param(b"\x12\x05abc", id="field cut off"),
            pytest.param(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", id="length of 2**64-1"),
            pytest.param(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", id="varint over 64 bits"),
            pytest.param(b"\x12" + b"\x80" * 10 + b"\x00", id="varint of eleven bytes"),
            pytest.param(b"\x80\x80\x80\x80\x80\x01", id="field number over 29 bits"),
            pytest.param(b"\x02\x00", id="field number 0"),
            pytest.param(varint(9 << 3 | 3) + varint(9 << 3 | 4), id="group"),
            pytest.param(varint(9 << 3 | 6), id="wire type 6"),
            pytest.param(varint(9 << 3 | 7), id="wire type 7"),
            pytest.param(varint(9 << 3 | 1) + bytes(7), id="fixed64 cut off"),
            pytest.param(proto_field(2, b"H") + b"\xc2\x3e\x05body", id="body cut off"),
            pytest.param(b"\x80", id="tag cut off"),
        ],
    )
    def test_malformed(self, payload):
        """What is not protobuf is refused, whole or split, and what follows is discarded."""
        for chunks in ([payload], [payload[:i] + payload[i:] for i in range(1)]):
            stream = data(1, grpc_message(b"".join(chunks)) + grpc_message(flight_data(header=b"H")))
            assert run([stream], {1: assembler()}) == [("refused", "malformed")]
            assert run([stream[i : i + 1] for i in range(len(stream))], {1: assembler()}) == [("refused", "malformed")]

    def test_oversized_body(self):
        """T17: a body over its limit is discarded, the other fields stay, the next message is as always."""
        big, small = (
            flight_data(descriptor=b"D", header=b"H", body=bytes(101)),
            flight_data(header=b"H", body=bytes(100)),
        )
        events = assemble(grpc_message(big) + grpc_message(small), body_limit=100)
        assert [event[2] for event in events] == [
            (b"D", b"H", None, 101, True, None),
            (None, b"H", None, 100, False, bytes(100)),
        ]

    def test_oversized_body_in_the_middle(self):
        """T17 holds for a body that other fields follow."""
        payload = proto_field(1000, bytes(101)) + proto_field(2, b"H")
        assert one_message(payload, body_limit=100) == (None, b"H", None, 101, True, None)


class TestPrefix:
    """The five bytes in front of a message."""

    @pytest.mark.parametrize(("flag", "kind"), [(1, "compressed"), (2, "flag"), (255, "flag")])
    def test_flag(self, flag, kind):
        """T12: a compressed message and an unknown flag are refused."""
        assert assemble(grpc_message(b"x", flag)) == [("refused", kind)]

    @pytest.mark.parametrize(("size", "kind"), [(100, "message"), (101, "refused")])
    def test_message_limit(self, size, kind):
        """T17: a message over the limit is refused at its prefix, one at the limit is not."""
        events = assemble(grpc_message(bytes(size)), flight=False, message_limit=100)
        assert [event[0] for event in events] == [kind]
        prefix_only = assemble(grpc_message(bytes(size))[:5], flight=False, message_limit=100)
        assert prefix_only == ([] if kind == "message" else [("refused", "too_large")])

    @pytest.mark.parametrize(("name", "most"), [("descriptor", 65_536), ("app_metadata", 65_536), ("header", 2**24)])
    def test_fields_of_flight_data_have_limits(self, name, most):
        """T24: a descriptor, metadata or header over its limit is refused when its length has come, not when it has."""
        for size, expected in ((most, []), (most + 1, [("refused", "too_large")])):
            payload = grpc_message(flight_data(**{name: bytes(size)}))
            assert assemble(payload[:20], message_limit=2**26) == expected
        if most < 2**20:
            (event,) = assemble(grpc_message(flight_data(**{name: bytes(most)})))
            assert event[0] == "message"

    @pytest.mark.parametrize("field", [b"\x1a\x00", b"\x0a\x00", b"\x20\x01", b"\xc2\x3e\x00", b"\x7a\x01x"])
    def test_number_of_fields_has_a_limit(self, field):
        """T24: unknown fields are skipped and known ones may repeat, 10,000 in all."""
        for count, kind in ((9_999, "message"), (10_001, "refused"), (100_000, "refused")):
            events = assemble(grpc_message(field * count + flight_data(header=b"h")), message_limit=2**26)
            assert [event[0] for event in events] == [kind]

    def test_event_when_the_window_does_not_cover_it(self):
        """T4: a prefix is an event exactly if the window is short of the message, or bytes are reserved ahead."""
        for window, ahead, expected in [(95, 0, []), (94, 0, [1]), (95, 1, [1])]:
            made = assembler(flight=False)
            made.window, made.ahead = window + 15, ahead
            events = run([data(1, grpc_message(bytes(105))[:15])], {1: made})
            assert [stream_id for kind, stream_id in events if kind == wire.PREFIX] == expected
            assert made.shortfall == 95 - window

    def test_no_event_for_an_empty_message(self):
        """An empty message needs no window: it is complete with its prefix."""
        made = assembler(flight=False)
        made.ahead = 100
        assert [event[0] for event in run([data(1, grpc_message(b""))], {1: made})] == ["message"]


class TestFrames:
    """RFC 9113, sections 4 and 6.1, as far as the splitter judges them."""

    def test_control_frames_come_whole(self):
        """Every frame but DATA is handed on as it came."""
        ping, unknown = frame(PING, 0, 0, b"12345678"), frame(0xBE, 0xFF, 7, b"extension")
        assert run([ping + unknown], {}) == [("frame", ping), ("frame", unknown)]

    def test_wrong_preface(self):
        """An HTTP/1 client is turned away at its first byte that is wrong."""
        assert run([b"G"], {}, preface=True) == [("error", 1)]
        assert run([b"PRI * HTTP/1"], {}, preface=True) == [("error", 1)]

    @pytest.mark.parametrize(
        ("raw", "code"),
        [
            pytest.param(frame(DATA, 0, 1)[:0] + b"\x10\x00\x01\x00\x00\x00\x00\x00\x01", 6, id="over MAX_FRAME_SIZE"),
            pytest.param(b"\x00\x40\x01\x01\x04\x00\x00\x00\x01", 11, id="HEADERS over 16 KiB"),
            pytest.param(b"\x00\x40\x01\xbe\x00\x00\x00\x00\x00", 11, id="unknown type over 16 KiB"),
            pytest.param(frame(DATA, 0x8, 1), 6, id="padded without length"),
            pytest.param(frame(DATA, 0x8, 1, b"\x01"), 1, id="padding as long as the frame"),
            pytest.param(frame(DATA, 0x8, 1, b"\x05abc"), 1, id="padding longer than the frame"),
            pytest.param(frame(HEADERS, 0, 1) + data(1), 1, id="DATA in a header block"),
            pytest.param(frame(HEADERS, 0, 1) + frame(PING, 0, 0, bytes(8)), 1, id="PING in a header block"),
            pytest.param(frame(HEADERS, 0, 1) + frame(CONTINUATION, 4, 3), 1, id="CONTINUATION of another stream"),
        ],
    )
    def test_fatal(self, raw, code):
        """T7, T9: what breaks framing ends the connection, at the header where that is enough."""
        assert run([raw], {1: assembler()})[-1] == ("error", code)

    def test_header_block_is_bounded(self):
        """T9: a header block of 64 KiB in all is accepted, one byte more is refused from its frame's header."""
        rest = [frame(CONTINUATION, 0, 1, bytes(16384)) for _ in range(3)]
        first = frame(HEADERS, 0, 1, bytes(16384))
        assert len(run([first, *rest, frame(CONTINUATION, END_HEADERS, 1)], {})) == 5
        assert run([first, *rest, frame(CONTINUATION, 0, 1, b"x")[:9]], {})[-1] == ("error", 11)

    def test_padding(self):
        """T7: padding is stripped, counted against both windows, and reported so that it is given back."""
        made = assembler(flight=False)
        made.window = 1000
        events = run([data(1, grpc_message(b"abc"), padding=10)], {1: made})
        assert events == [("message", 1, b"abc", 8), (wire.PADDING, 1)]
        assert made.window == 1000 - 8 - 11

    def test_padding_alone_is_empty(self):
        """A frame of nothing but padding carries nothing, and is counted as such."""
        assert run([data(1, padding=3)], {1: assembler()}) == [(wire.PADDING, 1), (wire.EMPTY, 1)]
        assert run([data(1)], {1: assembler()}) == [(wire.EMPTY, 1)]
        assert run([data(1, end=True)], {1: assembler()}) == [(wire.ENDED, 1)]

    def test_stray_data_is_discarded(self):
        """T7: DATA of a stream that is not live is reported, discarded, and credited to the connection."""
        splitter = Splitter(LIMIT)
        events = []
        for chunk in (PREFACE, data(3, bytes(5000)), frame(PING, 0, 0, bytes(8))):
            events += receive(splitter, chunk)
        assert [event[0] for event in events] == ["frame", wire.STRAY, "frame"]
        assert splitter.take_credit() == 5000
        assert splitter.take_credit() == 0

    def test_overrun(self):
        """T5: DATA beyond the stream's window is reported before any of it is kept."""
        made = assembler(flight=False)
        made.window = 10
        assert run([data(1, bytes(11))], {1: made}) == [(wire.OVERRUN, 1)]

    @pytest.mark.slow
    def test_connection_overrun(self):
        """T5: DATA beyond the connection's window is FLOW_CONTROL_ERROR; what was given back may be sent again."""
        splitter = Splitter(LIMIT)
        list(receive(splitter, PREFACE))
        full = data(99, bytes(LIMIT))
        for _ in range(2**31 // LIMIT - 1):
            list(receive(splitter, full))
        assert splitter.connection_window == LIMIT - 1
        with pytest.raises(WireError) as caught:
            list(receive(splitter, full))
        assert caught.value.code == 3
        assert splitter.take_credit() == 2**31 - LIMIT

    @pytest.mark.parametrize(
        ("frames", "bad"),
        [
            ([data(1, bytes(7)), data(1, bytes(3), end=True)], False),
            ([data(1, bytes(11))], True),
            ([data(1, bytes(9), end=True)], True),
            ([data(1, bytes(10)), data(1, end=True)], False),
            ([data(1, bytes(10), padding=20, end=True)], False),
        ],
    )
    def test_content_length(self, frames, bad):
        """T8: the payload, without padding, has to be what content-length says."""
        made = MessageAssembler(False, LIMIT, LIMIT)
        made.content_bytes = 10
        assert any(event[0] == wire.LENGTH for event in run(frames, {1: made})) == bad

    def test_closing_in_the_middle_of_a_frame(self):
        """T2: an RPC that ends while its body is received in place leaves the rest to be discarded."""
        splitter = Splitter(LIMIT)
        splitter.open(1, assembler())
        list(receive(splitter, PREFACE))
        whole = data(1, grpc_message(flight_data(header=b"H", body=bytes(100_000))))
        events = list(receive(splitter, whole[:20_000]))
        assert events == []
        targets = splitter.targets()
        assert len(targets) == 2
        splitter.close(1)
        targets[0][:100] = whole[20_000:20_100]
        splitter.received(100)
        assert list(drain(splitter)) == []
        assert list(receive(splitter, whole[20_100:] + frame(PING, 0, 0, bytes(8)))) == [
            ("frame", frame(PING, 0, 0, bytes(8)))
        ]
        assert splitter.take_credit() == len(whole) - 9


def parse_oracle(payload: bytes):
    """Parse FlightData slowly and plainly; None if it is malformed."""

    def read_varint(at: int) -> tuple[int, int] | None:
        value = 0
        for i in range(10):
            if at + i >= len(payload):
                return None
            value |= (payload[at + i] & 0x7F) << (7 * i)
            if payload[at + i] < 0x80:
                return (value, at + i + 1) if value < 2**64 else None
        return None

    fields: dict[int, bytes] = {}
    at = 0
    while at < len(payload):
        if (got := read_varint(at)) is None:
            return None
        tag, at = got
        number, kind = tag >> 3, tag & 7
        if tag >= 2**32 or number == 0 or kind in (3, 4, 6, 7):
            return None
        if kind in (0, 2):
            if (got := read_varint(at)) is None:
                return None
            size, at = got
            size = size if kind == 2 else 0
        else:
            size = 8 if kind == 1 else 4
        if at + size > len(payload):
            return None
        if kind == 2:
            fields[number] = payload[at : at + size]
        at += size
    body = fields.get(1000, b"")
    shown = body if 2 in fields else None
    return (fields.get(1), fields.get(2), fields.get(3), len(body), False, shown)


FIELD = st.one_of(
    st.tuples(st.sampled_from([1, 2, 3, 9, 1000]), st.binary(max_size=600)).map(lambda f: proto_field(*f)),
    st.tuples(st.sampled_from([2, 5, 1000]), st.integers(0, 2**64 - 1)).map(lambda f: varint(f[0] << 3) + varint(f[1])),
    st.sampled_from([varint(7 << 3 | 1) + bytes(8), varint(7 << 3 | 5) + bytes(4)]),
)
PAYLOAD = st.one_of(st.lists(FIELD, max_size=6).map(b"".join), st.binary(max_size=40))


@given(st.lists(PAYLOAD, min_size=1, max_size=4), st.data())
def test_chunks_do_not_matter(payloads, draw):
    """Messages, refusals and their order are what a plain parser says, however bytes are cut into frames and reads."""
    expected = []
    for payload in payloads:
        message = parse_oracle(payload)
        if message is None:
            expected.append(("refused", "malformed"))
            break
        expected.append(("message", 1, message, len(payload) + 5))
    body = b"".join(grpc_message(payload) for payload in payloads)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(body)), max_size=4)))
    stream = b"".join(data(1, body[a:b]) for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True) if a < b)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert run(chunks, {1: assembler()}) == expected
    assert run([stream], {1: assembler()}) == expected


@given(st.binary(max_size=300), st.integers(1, 50))
def test_garbage_is_an_error_or_nothing(garbage, step):
    """Garbage splits into events or raises WireError, the same way whole and in pieces."""
    streams = lambda: {1: assembler(), 3: assembler(flight=False)}  # noqa: E731
    whole = run([garbage], streams())
    assert run([garbage[i : i + step] for i in range(0, len(garbage), step)], streams()) == whole


def test_direct_receive_equals_copy():
    """A body of many frames is the same whether it is received in place or fed through the buffer byte by byte."""
    body = bytes(range(256)) * 1000
    payload = grpc_message(flight_data(header=b"H" * 700, app_metadata=b"M", body=body)) * 3
    stream = b"".join(data(1, payload[i : i + 70_000]) for i in range(0, len(payload), 70_000))
    expected = [("message", 1, (None, b"H" * 700, b"M", len(body), False, body), len(payload) // 3)] * 3
    for step in (1 << 20, 100_000, 9_000, 333):
        assert run([stream[i : i + step] for i in range(0, len(stream), step)], {1: assembler()}) == expected


class TestReadFields:
    """Small messages without a schema."""

    def test_values(self):
        """Bytes and varints are read, the last occurrence wins, fixed-width fields are left out."""
        raw = proto_field(1, b"a") + proto_field(1, b"b") + varint(2 << 3) + varint(300) + varint(3 << 3 | 5) + bytes(4)
        assert read_fields(raw) == {1: b"b", 2: 300}
        assert read_fields(b"") == {}

    @pytest.mark.parametrize("raw", [b"\x0a\x05abc", b"\x0b", b"\x00\x01", b"\x0a", b"\x80", b"\x09abc", b"\x08"])
    def test_malformed(self, raw):
        """What is not protobuf is a ValueError."""
        with pytest.raises(ValueError, match="byte"):
            read_fields(raw)


def test_records_show_themselves():
    """Refusals and messages read well in a log."""
    assert repr(Refusal("flag", "odd")) == "Refusal('flag', 'odd')"
    assert "body_bytes=3" in repr(FlightMessage(header=b"H", body_bytes=3))


def test_small_ring_is_refused():
    """The receive buffer has to hold the largest control frame."""
    with pytest.raises(ValueError, match="at least"):
        Splitter(LIMIT, 1024)


class TestWindowUpdates:
    """WINDOW_UPDATE is read here, as far as it is well formed."""

    def test_well_formed(self):
        """The increment of a stream or the connection, without the reserved bit."""
        splitter = Splitter(LIMIT)
        list(receive(splitter, PREFACE))
        for stream_id, increment in [(0, 1), (5, 2**31 - 1), (2**31 - 1, 70_000)]:
            raw = bytearray(window_update(stream_id, increment))
            raw[9] |= 0x80
            for chunk in (raw[:12], raw[12:]):
                kinds = [event[0] for event in receive(splitter, bytes(chunk))]
            assert kinds == [wire.WINDOW]
            assert (splitter.stream_id, splitter.length) == (stream_id, increment)

    @pytest.mark.parametrize(
        "raw", [window_update(1, 0), frame(WINDOW_UPDATE, 0, 1, bytes(3)), frame(WINDOW_UPDATE, 0, 1, bytes(5))]
    )
    def test_malformed(self, raw):
        """Anything else is a frame like others, for h2 to judge."""
        assert run([raw], {}) == [("frame", raw)]


SIZES = (0, 1, 5_000, 9_000, 400_000, 600_000, 100, 400_000)


class TestDescriptor:
    """Receiving from a descriptor instead of by way of memoryviews."""

    @pytest.mark.parametrize("chunk", [1, 1000, 70_000, 10**7])
    def test_same_events(self, chunk):
        """Whatever the sizes in which bytes come, the events are those of the other way."""
        messages = [grpc_message(flight_data(header=b"h", body=bytes([n]) * size)) for n, size in enumerate(SIZES)]
        whole = PREFACE + b"".join(
            data(1, part) + frame(PING, 0, 0, b"12345678")
            for message in messages
            for part in (message[:300_000], message[300_000:])
        )
        parts = [whole[at : at + chunk] for at in range(0, len(whole), chunk)][:5000]
        expected = run(parts, {1: assembler()}, preface=True)
        splitter = Splitter(LIMIT)
        splitter.open(1, assembler())
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            events = []
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[theirs.send(left) :]
                    while True:
                        try:
                            splitter.receive(ours.fileno())
                        except BlockingIOError:
                            break
                        events += drain(splitter)
            assert events == expected
            theirs.close()
            assert splitter.receive(ours.fileno()) == 0

    def test_errors(self):
        """A descriptor that cannot be read is the caller's error, and what was received stays."""
        with pytest.raises(OSError, match="Bad file descriptor"):
            Splitter(LIMIT).receive(-1)
