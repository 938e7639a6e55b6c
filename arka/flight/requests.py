"""Unary requests: how large they may be, and that reading a large one delays nobody else (T24).

Owns: the bounds of actions, tickets and descriptors, the thread for those of more than 4 KiB, and the order of one
peer's requests meanwhile. Does not own what they ask for (``schemas``, ``service``) nor the bound at a message's prefix
(``grpc.Route``).

A client may create a table and write to it without reading an answer. A request that is read in a thread therefore
holds back later ones of its peer until it is read, and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import trio

from arka.errors import ArkaError, ErrorCode, InvalidRequest
from arka.flight import messages
from arka.flight.grpc import UNARY_BYTES
from arka.flight.schemas import MAX_BODY_BYTES, parse_create_table
from arka.records import TableDefinition, TableName
from arka.storage.threads import Job

T = TypeVar("T")

#: The action whose request may be larger than others.
CREATE_TABLE: Final = "CreateTable"
#: Largest Action message: the body of a CreateTable and what goes around it.
ACTION_BYTES: Final = MAX_BODY_BYTES + 64 * 1024
#: Largest descriptor: a table's name has two parts of 128 bytes.
DESCRIPTOR_BYTES: Final = 64 * 1024
#: Requests above this are read in a thread: 4 KiB of JSON take a millisecond or so.
THREAD_BYTES: Final = 4 * 1024
#: What a byte of JSON costs, in bytes of data that are looked at.
_WORK: Final = 16
#: Parts of a path that are looked at: more than a name has.
_PATH_PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class Action:
    """An action that was read.

    Attributes:
        type: its name.
        body: its JSON.
        definition: what CreateTable asks for; None for other actions.
    """

    type: str
    body: bytes
    definition: TableDefinition | None = None


def read_action(data: bytes) -> Action:
    """Read an Action message; may be called in any thread.

    Raises:
        ArkaError: ``too_large``: over 1 MiB, and not a CreateTable; InvalidRequest: malformed.
    """
    action = messages.parse("Action", data)
    if action.type == CREATE_TABLE:
        return Action(CREATE_TABLE, b"", parse_create_table(bytes(action.body)))
    if len(data) > UNARY_BYTES:
        raise ArkaError(
            f"An action of {len(data)} bytes: {UNARY_BYTES} are legal for all but {CREATE_TABLE}",
            code=ErrorCode.TOO_LARGE,
        )
    return Action(action.type, bytes(action.body))


def read_descriptor(data: bytes) -> Any:
    """Read a FlightDescriptor.

    Raises:
        ArkaError: ``too_large``: over 64 KiB; InvalidRequest: malformed.
    """
    if len(data) > DESCRIPTOR_BYTES:
        raise ArkaError(
            f"A descriptor of {len(data)} bytes, at most {DESCRIPTOR_BYTES} are legal", code=ErrorCode.TOO_LARGE
        )
    return messages.parse("FlightDescriptor", data)


def name_of(descriptor: Any) -> TableName:
    """Return the table that a descriptor's path names.

    Raises:
        InvalidRequest: it has no path, or one that is no name.
    """
    if not descriptor.path:
        raise InvalidRequest("The descriptor must be a path that names a table")
    return TableName.from_parts(list(descriptor.path[:_PATH_PARTS]))


class Requests:
    """Reads requests, in order for each peer. Used from trio's thread only."""

    def __init__(self) -> None:
        # The newest request of each peer that is being read in a thread.
        self._newest: dict[str, trio.Event] = {}

    async def read(self, peer: str, data: bytes, parse: Callable[[bytes], T]) -> T:
        """Parse a request: at once, or in a thread if it is large.

        Args:
            peer: the client's address.
            data: the message.
            parse: linear in the message; may be called in any thread.

        Returns:
            What ``parse`` returns, behind the peer's earlier requests; later ones go on when the caller next waits.

        Raises:
            ArkaError: what ``parse`` raises.

        Cancellation: a thread is left alone.
        """
        if len(data) <= THREAD_BYTES:
            await self.wait_for(peer)
            return parse(data)
        before = self._newest.get(peer)
        own = self._newest[peer] = trio.Event()
        try:
            parsed = await Job(peer, len(data) * _WORK).run(parse, data, abandon=True)
            if before is not None:
                await before.wait()
            return parsed
        finally:
            own.set()
            if self._newest.get(peer) is own:
                del self._newest[peer]

    async def wait_for(self, peer: str) -> None:
        """Wait until the requests that a peer sent before are read. Cancellation: nothing changes."""
        if (before := self._newest.get(peer)) is not None:
            await before.wait()


__all__ = [
    "ACTION_BYTES",
    "CREATE_TABLE",
    "DESCRIPTOR_BYTES",
    "THREAD_BYTES",
    "Action",
    "Requests",
    "name_of",
    "read_action",
    "read_descriptor",
]
