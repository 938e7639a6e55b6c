"""h2's half of a connection, without what makes one frame cost as much as the connection has streams (T22).

Owns: which of h2's methods are replaced, what of a peer's SETTINGS h2 gets to see, and how response fields are encoded.
Does not own frames that h2 never sees (``arka.flight.connection``) nor streams (``arka.flight.streams``).

h2 counts the open streams for each HEADERS frame by walking all of them, and drops closed ones while it walks. Here a
stream is dropped when it ends, and the count is a length. ``tests/transport/test_h2_contract.py`` pins the private
names that this relies on.

Source: RFC 9113 sections 5.1.2 and 6.5; RFC 7541 sections 4.2, 5 and 6.2.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
from h2.settings import SettingCodes
from hyperframe.frame import Frame, SettingsFrame

from arka.flight import frames

#: MAX_HEADER_LIST_SIZE, bytes (T9).
HEADER_LIST_BYTES: Final = 64 * 1024
#: Fields of one header block: each costs some us, and may be one byte on the wire. gRPC clients send a dozen.
BLOCK_FIELDS: Final = 512
#: Changes of the table's size in one block: the smallest size and the last one (RFC 7541, section 4.2).
_BLOCK_SIZES: Final = 2
#: Streams that ended and are remembered with how; frames on older ones break the protocol.
_CLOSED_STREAMS: Final = 1024
#: Settings in one frame; RFC 9113 knows six, extensions a few more.
SETTINGS_VALUES: Final = 64
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


class BoundedDecoder(hpack.Decoder):
    """Decodes request fields, of which a block has few."""

    def decode(self, data: bytes, raw: bool = False) -> Iterable[hpack.HeaderTuple]:
        """Decode one block.

        Raises:
            HPACKDecodingError: it is malformed, or changes the table's size more than twice.
            OversizedHeaderListError: it has more than ``BLOCK_FIELDS`` fields, or more bytes of them than announced.
        """
        if _leading_sizes(data) > _BLOCK_SIZES:
            raise hpack.HPACKDecodingError(f"more than {_BLOCK_SIZES} changes of the table's size in a header block")
        fields = list(super().decode(data, raw))
        if len(fields) > BLOCK_FIELDS:
            raise hpack.OversizedHeaderListError(f"a header block of {len(fields)} fields, at most {BLOCK_FIELDS}")
        return fields


def _leading_sizes(block: bytes) -> int:
    """Count the changes of the table's size that begin a block, up to one more than are legal."""
    at = found = 0
    while found <= _BLOCK_SIZES and at < len(block) and block[at] & 0xE0 == 0x20:
        found += 1
        # An integer with a prefix of five bits (RFC 7541, section 5.1).
        more = block[at] & 0x1F == 0x1F
        at += 1
        while more and at < len(block):
            more = block[at] & 0x80 != 0
            at += 1
    return found


class BoundedH2(h2.connection.H2Connection):
    """h2's server side of a connection, in which the cost of a frame does not depend on how many came before it."""

    MAX_CLOSED_STREAMS = _CLOSED_STREAMS

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
        normalize_outbound_headers=False,
    )
    connection = BoundedH2(config)
    connection.encoder = StatelessEncoder()
    connection.decoder = BoundedDecoder(HEADER_LIST_BYTES)
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
    "make_h2",
]
