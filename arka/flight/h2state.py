"""h2's half of a connection, without what makes one frame cost as much as the connection has streams (T22).

Owns: which of h2's methods are replaced, what of a peer's SETTINGS h2 gets to see, which fields a request needs, and
how response fields are encoded. Does not own how blocks are decoded (``arka._core.hpack``), frames that h2 never sees
(``arka.flight.connection``) nor streams (``arka.flight.streams``).

h2 counts the open streams for each HEADERS frame by walking all of them, and drops closed ones while it walks. Here a
stream is dropped when it ends, and the count is a length. ``tests/transport/test_h2_contract.py`` pins the private
names that this relies on.

Source: RFC 9113 sections 5.1.2, 6.5 and 8.3; RFC 7541 sections 4.2, 5 and 6.2.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable
from hyperframe.frame import Frame, HeadersFrame, SettingsFrame

from arka._core.hpack import (
    AUTHORITY,
    METHOD,
    PATH,
    PROTOCOL,
    SCHEME,
    STATUS,
    HeaderDecoder,
    HeaderError,
    HeadersTooLarge,
    HuffmanCode,
)
from arka.flight import frames

#: MAX_HEADER_LIST_SIZE, bytes (T9).
HEADER_LIST_BYTES: Final = 64 * 1024
#: Fields of one header block: each costs some us, and may be one byte on the wire. gRPC clients send a dozen.
BLOCK_FIELDS: Final = 512
#: Streams that ended and are remembered with how; frames on older ones break the protocol.
_CLOSED_STREAMS: Final = 1024
#: Settings in one frame; RFC 9113 knows six, extensions a few more.
SETTINGS_VALUES: Final = 64
#: How many pseudo-fields there are: they come first.
_PSEUDO_FIELDS: Final = 6
#: What h2 acts on. Others have to be ignored (RFC 9113, section 6.5.2); h2 would keep each of 65,536.
_KNOWN_SETTINGS: Final = frozenset(SettingCodes)

# Field representations (RFC 7541, section 6): the literals below change no table.
_STATUS_200: Final = b"\x88"
_STATUS: Final = b"\x08"
_CONTENT_TYPE: Final = b"\x0f\x10"
_LITERAL: Final = b"\x00"
_TABLE_SIZE_0: Final = b"\x20"


class StatelessEncoder(hpack.Encoder):
    """Encodes response fields as literals that no table keeps.

    A peer may allow a table of 4 GiB; hpack fills it with error messages, searches it for each field and compresses
    texts in time that grows with their square. Here a field costs its length and nothing is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resized = False

    @property
    def header_table_size(self) -> int:
        """The table's size, bytes: there is none."""
        return 0

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        # The peer's decoder may wait to hear that a smaller limit is kept (RFC 7541, section 4.2).
        self._resized = True

    def encode(self, headers: Iterable[tuple[bytes, bytes]], huffman: bool = False) -> bytes:  # type: ignore[override]
        """Encode fields; names are in lower case already."""
        parts = [_TABLE_SIZE_0] if self._resized else []
        self._resized = False
        for name, value in headers:
            if name == b":status":
                parts += (_STATUS_200,) if value == b"200" else (_STATUS, _string(value))
            elif name == b"content-type":
                parts += (_CONTENT_TYPE, _string(value))
            else:
                parts += (_LITERAL, _string(name), _string(value))
        return b"".join(parts)


_HUFFMAN: Final = HuffmanCode(REQUEST_CODES, REQUEST_CODES_LENGTH)


class BoundedDecoder(hpack.Decoder):
    """hpack's decoder by its interface; the work is done in C, and fields are checked as they are decoded.

    hpack copies the rest of the block for each field, decodes strings bit by bit in Python, and takes any number of
    changes of the table's size: a block of 64 KiB took 20 to 90 ms. h2 then checks each character of each field.
    """

    def __init__(self) -> None:
        super().__init__(HEADER_LIST_BYTES)
        self._decoder = HeaderDecoder(_HUFFMAN, HeaderTable.STATIC_TABLE, HEADER_LIST_BYTES)

    @property
    def decoded_bytes(self) -> int:
        """What the last block decoded to, 32 bytes for each field included."""
        return self._decoder.decoded_bytes

    @property
    def pseudo(self) -> int:
        """The pseudo-fields of the last block, as bits."""
        return self._decoder.pseudo

    def decode(self, data: bytes, raw: bool = False) -> list[tuple[bytes, bytes]]:  # type: ignore[override]
        """Decode one block.

        Raises:
            hpack.OversizedHeaderListError: it decodes to more than is allowed: bytes, or ``BLOCK_FIELDS``.
            hpack.HPACKDecodingError: it is malformed, changes the table's size more than twice, or a field is illegal.
        """
        try:
            fields = self._decoder.decode(bytes(data))
        except HeadersTooLarge as error:
            raise hpack.OversizedHeaderListError(str(error)) from error
        except HeaderError as error:
            raise hpack.HPACKDecodingError(str(error)) from error
        if len(fields) > BLOCK_FIELDS:
            raise hpack.OversizedHeaderListError(f"a header block of {len(fields)} fields, at most {BLOCK_FIELDS}")
        return fields


def check_request(fields: list[tuple[bytes, bytes]], pseudo: int) -> None:
    """Check that a request has the pseudo-fields that it needs and no others (RFC 9113, section 8.3.1).

    Args:
        fields: legal one by one; pseudo-fields are first and none is there twice.
        pseudo: which of those there are.

    Raises:
        ProtocolError: what is wrong.
    """
    first = dict(fields[:_PSEUDO_FIELDS])
    connect = first.get(b":method") == b"CONNECT" if pseudo & METHOD else False
    if not pseudo & METHOD:
        raise ProtocolError("a request without :method")
    if pseudo & STATUS:
        raise ProtocolError("a request with :status")
    if connect and not pseudo & PROTOCOL:
        if pseudo & (SCHEME | PATH):
            raise ProtocolError("CONNECT with :scheme or :path")
    elif pseudo & (SCHEME | PATH) != SCHEME | PATH:
        raise ProtocolError("a request without :scheme or :path")
    if pseudo & PROTOCOL and not connect:
        raise ProtocolError(":protocol without CONNECT")
    if pseudo & PATH and not first[b":path"]:
        raise ProtocolError("an empty :path")
    hosts = [value for name, value in fields if name == b"host"]
    if len(hosts) > 1:
        raise ProtocolError("several host fields")
    if not hosts and not pseudo & AUTHORITY:
        raise ProtocolError("a request without :authority and host")
    if hosts and pseudo & AUTHORITY and hosts[0] != first[b":authority"]:
        raise ProtocolError(":authority and host differ")


def _string(value: bytes) -> bytes:
    """Encode a string literal, uncompressed (RFC 7541, section 5.2)."""
    size = len(value)
    if size < 0x7F:
        return bytes((size,)) + value
    out = bytearray((0x7F,))
    size -= 0x7F
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out) + value


class BoundedH2(h2.connection.H2Connection):
    """h2's server side of a connection, in which the cost of a frame does not depend on how many came before it."""

    MAX_CLOSED_STREAMS = _CLOSED_STREAMS
    decoder: BoundedDecoder

    @property
    def open_inbound_streams(self) -> int:
        """How many streams h2 knows: those that ended are dropped by ``forget``."""
        return len(self.streams)

    def forget(self, stream_id: int) -> None:
        """Drop a stream that has ended, and remember how it did."""
        stream = self.streams.get(stream_id)
        if stream is not None and stream.closed:
            del self.streams[stream_id]
            self._closed_streams[stream_id] = stream.closed_by

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        answer, events = super()._receive_headers_frame(frame)
        pseudo = self.decoder.pseudo
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                check_request(event.headers, pseudo)
            elif isinstance(event, h2.events.TrailersReceived) and pseudo:
                raise ProtocolError("trailers with pseudo-fields")
        return answer, events

    def _receive_settings_frame(self, frame: SettingsFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        frame.settings = {code: value for code, value in frame.settings.items() if code in _KNOWN_SETTINGS}
        return super()._receive_settings_frame(frame)


def make_h2() -> BoundedH2:
    """Make h2's side of a connection. It announces nothing: our SETTINGS are raw."""
    config = h2.config.H2Configuration(
        client_side=False,
        header_encoding=None,
        # What we send is ours: lower case, and percent-encoded where a client's text is part of it.
        validate_outbound_headers=False,
        # Fields are checked where they are decoded, and in ``check_request``.
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
        normalize_outbound_headers=False,
    )
    connection = BoundedH2(config)
    connection.encoder = StatelessEncoder()
    connection.decoder = BoundedDecoder()
    # h2 answers one stream too many with a fatal error; the limits that hold are ours (T10).
    connection.local_settings = h2.settings.Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: frames.MAX_STREAM_ID,
            SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_LIST_BYTES,
        },
    )
    connection.initiate_connection()
    connection.clear_outbound_data_buffer()
    return connection


__all__ = [
    "BLOCK_FIELDS",
    "HEADER_LIST_BYTES",
    "SETTINGS_VALUES",
    "BoundedDecoder",
    "BoundedH2",
    "StatelessEncoder",
    "check_request",
    "make_h2",
]
