"""HTTP/2 frames that Arka writes itself: those that h2 must not see, or must not count.

Owns: frame types and the bytes of SETTINGS, WINDOW_UPDATE, GOAWAY and DATA's header. Does not own when they
are sent (``arka.flight.connection``, ``arka.flight.outbound``).

Source: RFC 9113 sections 4.1, 6.5, 6.8 and 6.9.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class FrameType(IntEnum):
    """Frame types (RFC 9113, section 6)."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


#: Flag of SETTINGS and PING.
ACK: Final = 0x1
#: Flag of DATA and HEADERS.
END_STREAM: Final = 0x1
#: Flag of HEADERS and CONTINUATION.
END_HEADERS: Final = 0x4

#: Largest stream identifier.
MAX_STREAM_ID: Final = 2**31 - 1
#: Bytes of one value in a SETTINGS frame.
SETTING_BYTES: Final = 6
#: Largest window, bytes.
MAX_WINDOW: Final = 2**31 - 1

_HEADER: Final = struct.Struct(">HBBBI")
_WINDOW_UPDATE: Final = struct.Struct(">HBBBII")
_GOAWAY: Final = struct.Struct(">II")
_SETTING: Final = struct.Struct(">HI")


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """Encode the nine bytes that begin a frame."""
    return _HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def window_update(stream_id: int, increment: int) -> bytes:
    """Encode a WINDOW_UPDATE.

    Args:
        stream_id: 0 for the connection.
        increment: bytes, 1 to 2**31-1.
    """
    return _WINDOW_UPDATE.pack(0, 4, FrameType.WINDOW_UPDATE, 0, stream_id, increment)


def ping_ack(data: bytes) -> bytes:
    """Encode the answer to a PING.

    Args:
        data: the eight bytes that it carried.
    """
    return frame_header(8, FrameType.PING, ACK, 0) + data


def rst_stream(stream_id: int, error_code: int) -> bytes:
    """Encode a RST_STREAM frame (RFC 9113, section 6.4)."""
    return frame_header(4, FrameType.RST_STREAM, 0, stream_id) + error_code.to_bytes(4, "big")


def goaway(last_stream_id: int, error_code: int, detail: str = "") -> bytes:
    """Encode a GOAWAY.

    Args:
        last_stream_id: the highest stream that is or will be served.
        error_code: an HTTP/2 error code.
        detail: debug data, for people.
    """
    payload = _GOAWAY.pack(last_stream_id, error_code) + detail.encode()
    return frame_header(len(payload), FrameType.GOAWAY, 0, 0) + payload


def settings(values: dict[int, int]) -> bytes:
    """Encode a SETTINGS frame from setting identifiers and values."""
    payload = b"".join(_SETTING.pack(code, value) for code, value in values.items())
    return frame_header(len(payload), FrameType.SETTINGS, 0, 0) + payload


def end_of_stream(stream_id: int) -> bytes:
    """Encode what tells h2 that the peer ended a stream whose DATA it never saw.

    Empty trailers, not an empty DATA frame: that one h2 would hold against the content-length (T8).
    """
    return frame_header(0, FrameType.HEADERS, END_STREAM | END_HEADERS, stream_id)


__all__ = [
    "ACK",
    "END_HEADERS",
    "END_STREAM",
    "MAX_STREAM_ID",
    "MAX_WINDOW",
    "SETTING_BYTES",
    "FrameType",
    "end_of_stream",
    "frame_header",
    "goaway",
    "ping_ack",
    "rst_stream",
    "settings",
    "window_update",
]
