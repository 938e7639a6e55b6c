"""The errors that Arka raises and the codes that clients see.

Owns: the error codes of the wire contract, the exception classes above them, and how much of what a client sent may
stand in them (T24). Does not own their mapping to gRPC statuses (``arka.flight.status``).

A subclass exists only where a caller would act differently. Adapters translate foreign exceptions at
their own edge, with ``raise ... from``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from arka.redaction import redact

#: Most bytes of one text of a client's in an error (T24).
TEXT_BYTES: Final = 1024

#: Most characters of an error's detail, and most of a list of things in one.
DETAIL_CHARACTERS: Final = 8192
LIST_CHARACTERS: Final = 2048


class _Outline(reprlib.Repr):
    """Spells the beginning of what a client sent as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = 8
        self.maxstring = self.maxother = 128


_outline: Final = _Outline()


def cut(text: str) -> str:
    """Cut a client's text to what an error may hold of it (T24).

    Args:
        text: any text, of any length; lone surrogates become question marks.

    Returns:
        The text, or its first ``TEXT_BYTES`` bytes in UTF-8 at most with its length behind.
    """
    head = text[:TEXT_BYTES].encode("utf-8", "replace")
    if len(head) <= TEXT_BYTES and len(text) <= TEXT_BYTES:
        return head.decode()
    return f"{head[:TEXT_BYTES].decode('utf-8', 'ignore')}... ({len(text)} characters)"


def quote(value: object) -> str:
    """Spell what a client sent, between quotes where it is text, cut to what an error may hold of it (T24).

    Each error that says what was found uses this before the error's text is made: a client's text may have megabytes.

    Args:
        value: text, bytes, a number, or what JSON was decoded to.
    """
    if isinstance(value, str):
        spelled, size = repr(value[:TEXT_BYTES]), len(value)
    elif isinstance(value, bytes | bytearray | memoryview):
        spelled, size = repr(bytes(value[:TEXT_BYTES])), len(value)
    elif isinstance(value, int) and value.bit_length() > TEXT_BYTES:
        return f"a number of {value.bit_length()} bits"
    else:
        return cut(_outline.repr(value))
    head = spelled.encode("utf-8", "replace")
    if size <= TEXT_BYTES and len(head) <= TEXT_BYTES:
        return head.decode()
    unit = "characters" if isinstance(value, str) else "bytes"
    return f"{head[: TEXT_BYTES - 1].decode('utf-8', 'ignore')}{spelled[-1]}... ({size} {unit})"


def listed(items: Iterable[object], separator: str = ", ") -> str:
    """Join what an error lists, as much of it as an error may hold, with how many more there are.

    Args:
        items: their texts are cut already, or short; all of them are counted, those left out are not spelled.
        separator: what stands between two.
    """
    shown: list[str] = []
    left, more = LIST_CHARACTERS, 0
    for item in items:
        if left <= 0:
            more += 1
            continue
        text = str(item)
        left -= len(text) + len(separator)
        shown.append(text)
    return separator.join(shown) + (f"{separator}and {more} more" if more else "")


class ErrorCode(StrEnum):
    """The code in an ack's ``code`` field and in the ``[code]`` that begins a gRPC message."""

    TABLE_NOT_FOUND = "table_not_found"
    TABLE_EXISTS = "table_exists"
    SCHEMA_MISMATCH = "schema_mismatch"
    INVALID_REQUEST = "invalid_request"
    INVALID_BATCH = "invalid_batch"
    OVERLOADED = "overloaded"
    TOO_LARGE = "too_large"
    TABLE_DROPPED = "table_dropped"
    TABLE_STOPPED = "table_stopped"
    KEY_REUSED = "key_reused"
    UNAVAILABLE = "unavailable"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    OUTCOME_UNKNOWN = "outcome_unknown"
    SET_ASIDE = "set_aside"
    OUT_OF_RANGE = "out_of_range"
    UNIMPLEMENTED = "unimplemented"
    INTERNAL = "internal"


class ArkaError(Exception):
    """Any error that Arka reports.

    Attributes:
        code: what a client sees.
        detail: one sentence for a person: names the thing, what was expected and found, what to do. It is bounded
            whatever is put into it: acks hold it until they are read.
        retryable: whether the same request may succeed later without a change.
    """

    code: ErrorCode = ErrorCode.INTERNAL
    retryable: bool = False

    def __init__(self, detail: str, *, code: ErrorCode | None = None, retryable: bool | None = None) -> None:
        # Here, where every error passes: a detail may quote what a library said, and that what it was told.
        size = len(detail)
        detail = redact(detail[: 2 * DETAIL_CHARACTERS])
        if len(detail) > DETAIL_CHARACTERS:
            detail = f"{detail[:DETAIL_CHARACTERS]}... ({size} characters)"
        super().__init__(detail)
        self.detail = detail
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable


class InvalidRequest(ArkaError):
    """The request can never succeed as it is: the sender has to change it."""

    code = ErrorCode.INVALID_REQUEST


class AdmissionRejected(ArkaError):
    """There is no room now (streams, memory, disk); the same request may be sent again."""

    code = ErrorCode.OVERLOADED
    retryable = True


class Unavailable(ArkaError):
    """The server, or something it needs, is away or going away; retry the same node."""

    code = ErrorCode.UNAVAILABLE
    retryable = True


class OutcomeUnknown(ArkaError):
    """The operation may or may not have happened; resolve it before it is tried again."""

    code = ErrorCode.OUTCOME_UNKNOWN


class Fenced(ArkaError):
    """A newer epoch owns this log: nothing more may be promised by this process."""

    code = ErrorCode.UNAVAILABLE


class Closed(ArkaError):
    """The component was closed; the caller outlived it."""

    code = ErrorCode.UNAVAILABLE


class DataCorruption(ArkaError):
    """Stored bytes are not what was written.

    Attributes:
        path: the file or object key.
        offset: byte offset of the damage in it.
        expected: what should stand there.
        found: what stands there.
    """

    def __init__(self, path: str, offset: int, expected: str, found: str) -> None:
        super().__init__(f"{path}: damaged at byte {offset}: expected {expected}, found {found}")
        self.path = path
        self.offset = offset
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[type[DataCorruption], tuple[str, int, str, str]]:
        # Worker processes hand it over: an exception is rebuilt from its arguments, and these are not ours.
        return type(self), (self.path, self.offset, self.expected, self.found)


class ConfigurationError(ArkaError):
    """The settings, or what they point at, cannot work; the process must not start."""

    code = ErrorCode.INVALID_REQUEST


class InternalError(ArkaError):
    """A bug or a broken assumption of ours; carries an incident id once it was logged."""


__all__ = [
    "DETAIL_CHARACTERS",
    "TEXT_BYTES",
    "AdmissionRejected",
    "ArkaError",
    "Closed",
    "ConfigurationError",
    "DataCorruption",
    "ErrorCode",
    "Fenced",
    "InternalError",
    "InvalidRequest",
    "OutcomeUnknown",
    "Unavailable",
    "cut",
    "listed",
    "quote",
]
