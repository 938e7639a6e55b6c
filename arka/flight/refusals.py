"""What Arka does not offer, and what to use in its place: Flight SQL, and actions that others know.

Owns: the messages of ``unimplemented``. Does not own what is offered (``arka.flight.service``).

Source: Apache Arrow's Flight SQL: commands are packed as ``google.protobuf.Any`` whose type URL names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from arka._core.wire import read_fields
from arka.errors import ArkaError, ErrorCode, cut, quote

_PACKAGE: Final = "arrow.flight.protocol.sql."
_READ: Final = (
    "read a table with DoGet, whose ticket is its name, or query the Iceberg table with any engine that reads it"
)
_WRITE: Final = "write record batches with DoExchange or DoPut, whose descriptor is the path [table]"
_TABLES: Final = "the action ListTables and ListFlights list the tables, DescribeTable and GetSchema describe one"
_NO_STATE: Final = "there are no statements, transactions or sessions: each record batch is one atomic write"

#: Beginnings of Flight SQL's names, and what to use in their place; the first that fits counts.
_IN_PLACE_OF: Final = (
    ("CommandStatementIngest", _WRITE),
    ("CommandStatementUpdate", _WRITE),
    ("CommandPreparedStatementUpdate", _WRITE),
    ("CommandStatement", _READ),
    ("CommandPrepared", _READ),
    ("TicketStatement", _READ),
    ("CommandGet", _TABLES),
)
#: Actions of Flight and Flight SQL that Arka does not have.
_ACTIONS: Final = {
    "CreatePreparedStatement": _READ,
    "CreatePreparedSubstraitPlan": _READ,
    "ClosePreparedStatement": _NO_STATE,
    "BeginTransaction": _NO_STATE,
    "EndTransaction": _NO_STATE,
    "BeginSavepoint": _NO_STATE,
    "EndSavepoint": _NO_STATE,
    "CancelQuery": "cancel the call itself",
    "CancelFlightInfo": "cancel the call itself",
    "RenewFlightEndpoint": "tickets do not expire",
    "SetSessionOptions": _NO_STATE,
    "GetSessionOptions": _NO_STATE,
    "CloseSession": _NO_STATE,
}


def check_not_sql(data: bytes) -> None:
    """Check that a descriptor's command or a ticket is not one of Flight SQL.

    Raises:
        ArkaError: ``unimplemented``, with what to use in its place.
    """
    name = _sql_name(data)
    if name is not None:
        use = next((use for beginning, use in _IN_PLACE_OF if name.startswith(beginning)), _READ)
        raise ArkaError(
            f"Flight SQL's {cut(name)}: this server does not speak Flight SQL; {use}", code=ErrorCode.UNIMPLEMENTED
        )


def unknown_action(name: str, known: Iterable[str]) -> ArkaError:
    """The error of an action that there is none of."""
    names = list(known)
    if name in _ACTIONS:
        return ArkaError(
            f"Unknown action {name!r}, which is Flight SQL's: {_ACTIONS[name]}. This server has {', '.join(names)}",
            code=ErrorCode.UNIMPLEMENTED,
        )
    folded = cut(name).replace("_", "").replace("-", "").lower()
    meant = next((other for other in names if other.lower() == folded), None)
    hint = "" if meant is None else f" (names are case-sensitive: {meant})"
    return ArkaError(
        f"Unknown action {quote(name)}{hint}: expected one of {', '.join(names)}", code=ErrorCode.UNIMPLEMENTED
    )


def _sql_name(data: bytes) -> str | None:
    """The message that a ``google.protobuf.Any`` of Flight SQL holds; None if these bytes are none."""
    if _PACKAGE.encode() not in data[:256]:
        return None
    try:
        url = read_fields(data).get(1, b"")
    except ValueError:
        return None
    if not isinstance(url, bytes):
        return None
    _, found, name = url.decode("utf-8", "replace").partition(_PACKAGE)
    return name if found and name.isidentifier() else None


__all__ = ["check_not_sql", "unknown_action"]
