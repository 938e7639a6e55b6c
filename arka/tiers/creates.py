"""Tables that the log asks for and whose outcome it does not tell yet (R5, R41).

Owns: the CREATE records of intents and of outcomes, and which intents are open. Does not own the call of the catalog
(``arka.tiers.ddl``) nor the list of tables (``arka.tiers.tables``).

A process may end between an intent and its outcome. The next start finishes such a create: it makes the table, or finds
that the catalog has it. A create that failed has an outcome as well, so no start brings it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from arka._core.framing import KIND_CREATE
from arka.records import PartitionRequest, TableDefinition, TableInfo, TableName, TableType
from arka.tiers.ddl import CreateRecord
from arka.tiers.memory import MemoryTier


class _Definition(msgspec.Struct, frozen=True):
    """The stored form of a TableDefinition; fields are only ever added, with a default."""

    schema: bytes
    table_type: str
    key_columns: list[str]
    partition: list[tuple[int, int | None, str, str]]
    properties: dict[str, str]


@dataclass(frozen=True, slots=True)
class PendingCreate:
    """A create whose outcome the log does not tell.

    Attributes:
        lsn: of its intent.
        suffix: of the table's location: what is found under it is this create's table.
        definition: what was asked for.
    """

    lsn: int
    suffix: str
    definition: TableDefinition


class OpenCreates:
    """The creates without an outcome, by location suffix. Used from trio's thread only."""

    def __init__(self, memory: MemoryTier) -> None:
        """Start with none.

        Args:
            memory: takes the records into the log's order.
        """
        self._memory = memory
        self._open: dict[str, PendingCreate] = {}

    def restore(self, pending: Iterable[PendingCreate]) -> None:
        """Take in what an earlier process left."""
        self._open = {create.suffix: create for create in pending}

    def pending(self) -> tuple[PendingCreate, ...]:
        """The open creates, oldest first."""
        return tuple(self._open.values())

    @property
    def lsns(self) -> list[int]:
        """The LSNs of the open intents: the log must keep them."""
        return [create.lsn for create in self._open.values()]

    def begin(self, definition: TableDefinition, suffix: str) -> int:
        """Put an intent into the log; returns its LSN.

        Raises:
            LsnExhausted: no LSN can be given now.
        """
        name = definition.name
        record = CreateRecord(name.namespace, name.name, suffix, definition=_encode(definition))
        lsn = self._memory.append_control(KIND_CREATE, msgspec.msgpack.encode(record))
        self._open[suffix] = PendingCreate(lsn, suffix, definition)
        return lsn

    def made(self, info: TableInfo, suffix: str) -> None:
        """Put into the log what was made: a start that finds the catalog unavailable knows the table from it."""
        record = CreateRecord(info.name.namespace, info.name.name, suffix, info.to_bytes())
        self._memory.append_control(KIND_CREATE, msgspec.msgpack.encode(record), outcome=True)
        self._open.pop(suffix, None)

    def failed(self, name: TableName, suffix: str) -> None:
        """Put into the log that an intent came to nothing, as its client is told."""
        record = CreateRecord(name.namespace, name.name, suffix, failed=True)
        self._memory.append_control(KIND_CREATE, msgspec.msgpack.encode(record), outcome=True)
        self._open.pop(suffix, None)


class ReplayedCreates:
    """Finds the open intents in the records of a log. Called in the disk's thread."""

    def __init__(self) -> None:
        self.open: dict[str, PendingCreate] = {}

    def take(self, lsn: int, record: CreateRecord) -> None:
        """Take one CREATE record, in LSN order.

        Raises:
            ValueError: the definition in it cannot be read.
        """
        if record.table or record.failed:
            self.open.pop(record.location_suffix, None)
        elif record.definition:
            name = TableName(record.namespace, record.name)
            definition = _decode(name, record.definition)
            self.open[record.location_suffix] = PendingCreate(lsn, record.location_suffix, definition)


def _encode(definition: TableDefinition) -> bytes:
    return msgspec.msgpack.encode(
        _Definition(
            schema=definition.schema.serialize().to_pybytes(),
            table_type=definition.table_type.value,
            key_columns=list(definition.key_columns),
            partition=[(f.source_index, f.field_id, f.name, f.transform) for f in definition.partition],
            properties=dict(definition.properties),
        )
    )


def _decode(name: TableName, data: bytes) -> TableDefinition:
    try:
        stored = msgspec.msgpack.decode(data, type=_Definition)
        schema = pa.ipc.read_schema(pa.py_buffer(stored.schema))
    except (msgspec.MsgspecError, pa.ArrowException) as error:
        raise ValueError(f"not a table definition: {error}") from error
    return TableDefinition(
        name=name,
        schema=schema,
        table_type=TableType(stored.table_type),
        key_columns=tuple(stored.key_columns),
        partition=tuple(PartitionRequest(*item) for item in stored.partition),
        properties=stored.properties,
    )


__all__ = ["OpenCreates", "PendingCreate", "ReplayedCreates"]
