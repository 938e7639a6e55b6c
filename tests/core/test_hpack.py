"""HPACK: the decoder in C says what hpack and h2's checks say, and its work is bounded by what it is given (T22)."""

from __future__ import annotations

import h2.exceptions
import hpack
import pytest
from h2.utilities import HeaderValidationFlags, validate_headers
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arka._core.hpack import HuffmanCode
from arka.flight.h2state import HEADER_LIST_BYTES, BoundedDecoder, check_request

REQUEST = HeaderValidationFlags(is_client=False, is_trailer=False, is_response_header=False, is_push_promise=False)
PSEUDO = [b":method", b":scheme", b":path", b":authority", b":status", b":protocol", b":other"]
NAMES = st.one_of(
    st.sampled_from([*PSEUDO, b"te", b"host", b"connection", b"transfer-encoding", b"content-type", b"a", b"A", b""]),
    st.binary(max_size=6),
)
VALUES = st.one_of(
    st.sampled_from([b"", b"POST", b"CONNECT", b"trailers", b"/x", b"a", b" a", b"a\t", b"a\nb"]),
    st.binary(max_size=40),
)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=8)
GOOD = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x"), (b":authority", b"a")]


def checked(decoder: BoundedDecoder, block: bytes) -> list[tuple[bytes, bytes]] | None:
    """What a request's block decodes to; None where it is refused."""
    try:
        fields = decoder.decode(block)
        check_request(fields, decoder.pseudo)
    except (hpack.HPACKError, h2.exceptions.ProtocolError):
        return None
    return fields


@settings(max_examples=400)
@given(FIELDS, st.booleans(), st.booleans())
@example([(b"te", b"trailers")], True, True)
@example([(b"host", b"a")], True, False)
@example([(b"host", b"b")], True, False)
@example([(b"a", b"b"), (b":protocol", b"x")], True, False)
def test_requests_are_judged_as_h2_judges_them(fields, complete, huffman):
    """Whatever fields a request has, it is accepted or refused as by hpack and h2's own checks."""
    fields = [*GOOD, *fields] if complete else fields
    block = hpack.Encoder().encode(fields, huffman=huffman)
    try:
        expected = [tuple(field) for field in validate_headers([(bytes(n), bytes(v)) for n, v in fields], REQUEST)]
    except h2.exceptions.ProtocolError:
        expected = None
    assert checked(BoundedDecoder(), block) == expected


LEGAL = st.tuples(
    st.text("abcdefgh-", min_size=1, max_size=8).map(str.encode),
    st.text("abcdefghijklmnop%/ABC0123", max_size=60).map(str.encode),
)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.lists(LEGAL, max_size=10), st.booleans(), st.sampled_from([None, 0, 64, 200, 4096])), max_size=8
    )
)
def test_blocks_of_one_connection(blocks):
    """The dynamic table is hpack's, block by block, whatever sizes its encoder chooses."""
    encoder, ours, theirs = hpack.Encoder(), BoundedDecoder(), hpack.Decoder()
    for fields, huffman, size in blocks:
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode(fields, huffman=huffman)
        expected = [tuple(field) for field in theirs.decode(block, raw=True)]
        assert ours.decode(block) == expected == fields
        assert ours._decoder.table_bytes == theirs.header_table._current_size
        assert ours.decoded_bytes == sum(32 + len(name) + len(value) for name, value in fields)


@settings(max_examples=600)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4))
@example([b"\x3f\xe1\x1f\x82"])
@example([b"\xff\xff\xff\xff\xff\x0f"])
@example([b"\x00\x83\xff\xff\xff\x00"])
@example([b"\x00\x01a\x81\xff"])
@example([b"\x82\x20"])
@example([b"\x80"])
@example([b"\x00\x01a\x84\x3f\xff\xff\xff"])
def test_any_bytes(blocks):
    """Any bytes decode to what hpack decodes them to, or are refused where it refuses, or for an illegal field."""
    ours, theirs = BoundedDecoder(), hpack.Decoder()
    for block in blocks:
        try:
            expected = [tuple(field) for field in theirs.decode(block, raw=True)]
        except (hpack.HPACKError, IndexError):
            with pytest.raises(hpack.HPACKError):
                ours.decode(block)
            return
        try:
            assert ours.decode(block) == expected
        except hpack.HPACKError as error:
            if "table's size" in str(error):
                return
            regular = [(name, value) for name, value in expected if not name.startswith(b":")]
            pseudo = [name for name, _ in expected if name.startswith(b":")]
            illegal = not _legal(regular) or pseudo != [name for name, _ in expected][: len(pseudo)]
            assert (
                illegal
                or len(set(pseudo)) < len(pseudo)
                or not set(pseudo) <= set(PSEUDO[:-1])
                or not _legal([(name[1:] or b"", value) for name, value in expected if name.startswith(b":")])
            )
            return


def _legal(fields: list[tuple[bytes, bytes]]) -> bool:
    try:
        list(validate_headers([*GOOD, *(field for field in fields if field[0] != b"host")], REQUEST))
    except h2.exceptions.ProtocolError:
        return False
    return True


class TestBounds:
    """What a small block may cost."""

    def test_references_that_expand(self):
        """A byte that stands for 3 KB of the table counts as 3 KB, and decoding ends at the limit."""
        decoder = BoundedDecoder()
        first = hpack.Encoder().encode([(b"x-a", b"a" * 3_000)], huffman=False)
        assert len(decoder.decode(first + b"\xbe" * 20)) == 21
        with pytest.raises(hpack.OversizedHeaderListError):
            decoder.decode(b"\xbe" * 10_000)
        assert decoder.decoded_bytes < HEADER_LIST_BYTES + 3_100

    def test_fields_of_the_table_are_shared(self):
        """A reference is no copy: 20 fields of 3 KB are one."""
        decoder = BoundedDecoder()
        first = hpack.Encoder().encode([(b"x-a", b"a" * 3_000)], huffman=False)
        fields = decoder.decode(first + b"\xbe" * 20)
        assert len({id(value) for _, value in fields}) == 1

    def test_changes_of_the_size(self):
        """A block of nothing but changes of the table's size is refused after a few."""
        BoundedDecoder().decode(b"\x20" * 2)
        with pytest.raises(hpack.HPACKDecodingError, match="many of them"):
            BoundedDecoder().decode(b"\x20" * 60_000)

    def test_empty_fields(self):
        """Fields of no length count 32 bytes each."""
        decoder = BoundedDecoder()
        assert len(decoder.decode(b"\x00\x01a\x00" * 500)) == 500
        assert decoder.decoded_bytes == 500 * 33
        with pytest.raises(hpack.OversizedHeaderListError):
            decoder.decode(b"\x00\x01a\x00" * 2_100)

    @pytest.mark.parametrize("lengths", [REQUEST_CODES_LENGTH[:-1], [4, *REQUEST_CODES_LENGTH[1:]]])
    def test_a_code_that_does_not_fit(self, lengths):
        """A code with symbols of four bits, or too few symbols, is no code for this machine."""
        with pytest.raises(ValueError, match="257 symbols"):
            HuffmanCode(REQUEST_CODES, lengths)

    def test_every_symbol(self):
        """Each octet is decoded from its code, alone and behind each other one."""
        for octet in range(256):
            value = bytes([octet]) * 3 + b"x"
            block = hpack.Encoder().encode([(b"a", value)], huffman=True)
            if octet in (0, 10, 13, 9, 32):
                with pytest.raises(hpack.HPACKDecodingError):
                    BoundedDecoder().decode(block)
            else:
                assert BoundedDecoder().decode(block) == [(b"a", value)]
