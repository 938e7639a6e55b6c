"""T9, T22: what one header block may ask of its decoder: fields and table sizes, however few bytes they take."""

from __future__ import annotations

import hpack
import pytest
import trio
import trio.testing

from arka.flight import turns
from arka.flight.h2state import BLOCK_FIELDS
from tests.transport.peer import END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, HEADERS, PROTOCOL_ERROR, frame, served

#: Keep the table's size as it is, in one byte and in three; 4,096 bytes are the default.
SIZE_0 = b"\x20"
SIZE_DEFAULT = b"\x3f\xe1\x1f"
FIELDS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/no.Such/Method"),
    (":authority", "test"),
    ("content-type", "application/grpc"),
]


def request(stream_id: int, block: bytes) -> bytes:
    return frame(HEADERS, END_HEADERS | END_STREAM, stream_id, block)


@pytest.mark.parametrize("updates", [SIZE_0 * 3, SIZE_0 * 15_000, (SIZE_0 + SIZE_DEFAULT) * 3_000, SIZE_DEFAULT * 3])
async def test_table_sizes_of_a_block_are_few(updates):
    """A block changes the table's size twice at most (RFC 7541, section 4.2); more end the connection."""
    async with served() as s:
        await s.peer.send(request(1, updates + hpack.Encoder().encode(FIELDS)))
        await trio.testing.wait_all_tasks_blocked()
        assert [code for _, code, _ in s.peer.goaways] == [PROTOCOL_ERROR]


async def test_a_table_may_shrink_and_grow_in_a_block():
    """The smallest size and the last one: what an encoder says whose table was changed twice."""
    async with served() as s:
        await s.peer.send(request(1, SIZE_0 + SIZE_DEFAULT + hpack.Encoder().encode(FIELDS)))
        assert (await s.peer.response(1)).status == 12


async def test_fields_of_a_block_are_bounded():
    """A field of an indexed name and value is one byte on the wire: as many as fit are too many."""
    async with served() as s:
        block = hpack.Encoder().encode([*FIELDS, ("a", "b")])
        await s.peer.send(request(1, block + b"\xbe" * (BLOCK_FIELDS - 6)))
        assert (await s.peer.response(1)).status == 12
        await s.peer.send(request(3, block + b"\xbe" * (BLOCK_FIELDS + 1)))
        await trio.testing.wait_all_tasks_blocked()
        assert [code for _, code, _ in s.peer.goaways] == [ENHANCE_YOUR_CALM]


async def test_fields_count_in_a_turn():
    """Blocks of many small fields use a turn up as much as blocks of few large ones do."""
    async with served() as s:
        encoder = hpack.Encoder()
        blocks = [encoder.encode([*FIELDS, ("a", "b")]) + b"\xbe" * (BLOCK_FIELDS - 10) for _ in range(100)]
        await s.peer.send(b"".join(request(2 * number + 1, block) for number, block in enumerate(blocks)))
        with trio.fail_after(120):
            await s.peer.settle()
        assert s.factory.turns.most_headers <= 1 + turns.TURN_UNITS // BLOCK_FIELDS


async def test_huffman_codes_count_in_a_turn():
    """Text in Huffman codes is read bit by bit: a block of much of it uses up a turn of its own."""
    async with served() as s:
        encoder = hpack.Encoder()
        blocks = [encoder.encode([*FIELDS, (f"x-{number}", "v" * 15_000)]) for number in range(20)]
        await s.peer.send(b"".join(request(2 * number + 1, block) for number, block in enumerate(blocks)))
        with trio.fail_after(120):
            await s.peer.settle()
        assert s.factory.turns.most_headers == 1
