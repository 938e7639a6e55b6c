"""The errors that Arka raises and the codes that clients see.

Owns: the error codes of the wire contract and the exception classes above them. Does not own their
mapping to gRPC statuses (``arka.flight.status``).

A subclass exists only where a caller would act differently. Adapters translate foreign exceptions at
their own edge, with ``raise ... from``.
"""

from __future__ import annotations

from enum import StrEnum

from arka.redaction import redact


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
        detail: one sentence for a person: names the thing, what was expected and found, what to do.
        retryable: whether the same request may succeed later without a change.
    """

    code: ErrorCode = ErrorCode.INTERNAL
    retryable: bool = False

    def __init__(self, detail: str, *, code: ErrorCode | None = None, retryable: bool | None = None) -> None:
        # Here, where every error passes: a detail may quote what a library said, and that what it was told.
        detail = redact(detail)
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
]
