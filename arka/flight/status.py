"""How an RPC ends: gRPC statuses, and which error becomes which (protocol 6).

Owns: the mapping and the trailers' text. Does not own when trailers are sent.

Source: gRPC "Status codes and their use"; gRPC over HTTP/2, "Status-Message".
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final, NamedTuple

from arka.errors import ArkaError, ErrorCode


class Status(IntEnum):
    """The gRPC statuses that Arka sends."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


_STATUS_OF: Final[dict[ErrorCode, Status]] = {
    ErrorCode.TABLE_NOT_FOUND: Status.NOT_FOUND,
    ErrorCode.TABLE_EXISTS: Status.ALREADY_EXISTS,
    ErrorCode.SCHEMA_MISMATCH: Status.INVALID_ARGUMENT,
    ErrorCode.INVALID_REQUEST: Status.INVALID_ARGUMENT,
    ErrorCode.INVALID_BATCH: Status.INVALID_ARGUMENT,
    # Retryable exhaustion is UNAVAILABLE; RESOURCE_EXHAUSTED is for sizes (T19).
    ErrorCode.OVERLOADED: Status.UNAVAILABLE,
    ErrorCode.TOO_LARGE: Status.RESOURCE_EXHAUSTED,
    ErrorCode.TABLE_DROPPED: Status.NOT_FOUND,
    ErrorCode.TABLE_STOPPED: Status.FAILED_PRECONDITION,
    ErrorCode.KEY_REUSED: Status.ALREADY_EXISTS,
    ErrorCode.UNAVAILABLE: Status.UNAVAILABLE,
    ErrorCode.UNAUTHENTICATED: Status.UNAUTHENTICATED,
    ErrorCode.PERMISSION_DENIED: Status.PERMISSION_DENIED,
    ErrorCode.OUTCOME_UNKNOWN: Status.UNAVAILABLE,
    ErrorCode.SET_ASIDE: Status.FAILED_PRECONDITION,
    ErrorCode.OUT_OF_RANGE: Status.OUT_OF_RANGE,
    ErrorCode.UNIMPLEMENTED: Status.UNIMPLEMENTED,
    ErrorCode.INTERNAL: Status.INTERNAL,
}

#: Bytes of a message in the trailers: peers limit a header list to 8 KiB and up.
_MESSAGE_BYTES: Final = 4096
_ESCAPED: Final = re.compile(rb"[^\x20-\x7e]|%")


class RpcStatus(NamedTuple):
    """How an RPC ended: the status and, unless it is OK, a message for people."""

    status: Status
    message: str = ""

    def trailers(self) -> list[tuple[bytes, bytes]]:
        """The header fields that tell the client."""
        fields = [(b"grpc-status", b"%d" % self.status)]
        if self.message:
            fields.append((b"grpc-message", percent_encode(self.message)))
        return fields


OK: Final = RpcStatus(Status.OK)


class RpcError(Exception):
    """Ends an RPC with a status that no error code of Arka stands for."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: ArkaError | RpcError) -> RpcStatus:
    """Map an error to what the client is told: ``[code] detail``."""
    if isinstance(error, RpcError):
        return RpcStatus(error.status, str(error))
    return RpcStatus(_STATUS_OF[error.code], f"[{error.code}] {error.detail}")


def percent_encode(message: str) -> bytes:
    """Encode a message for ``grpc-message``: UTF-8, with all but printable ASCII and ``%`` as ``%XX``.

    A message too long for a header is cut at a whole character.
    """
    # Cut first: a character takes four bytes at most, and the whole message may be long.
    raw = message[:_MESSAGE_BYTES].encode("utf-8", "replace")[:_MESSAGE_BYTES].decode("utf-8", "ignore").encode()
    return _ESCAPED.sub(_escape, raw)


def _escape(match: re.Match[bytes]) -> bytes:
    return b"%%%02X" % match[0][0]


__all__ = ["OK", "RpcError", "RpcStatus", "Status", "percent_encode", "status_of"]
