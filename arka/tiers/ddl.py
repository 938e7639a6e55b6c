"""Creating and dropping tables: log first, catalog second (R5).

Owns: the payloads of create and drop records, and what "the same table" means. Does not own the list of
tables (``arka.tiers.tables``).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from uuid import UUID

import msgspec
import pyarrow as pa

from arka._core.framing import KIND_CREATE, KIND_DROP
from arka.errors import ArkaError, ErrorCode, InvalidRequest, Unavailable
from arka.records import TableDefinition, TableInfo, TableName, TableType
from arka.storage.ports import (
    Catalog,
    CatalogConflict,
    CatalogTable,
    CatalogUnavailable,
    TableExists,
    TableMissing,
)
from arka.tableproperties import OWNER
from arka.tiers.memory import MemoryTier
from arka.tiers.table import Ending, TableState


class CreateRecord(msgspec.Struct, frozen=True):
    """Payload of a CREATE record: which table was about to be made, and where; with ``table`` what was made."""

    namespace: str
    name: str
    location_suffix: str
    #: ``TableInfo.to_bytes``; empty for the intent.
    table: bytes = b""
    #: Of an intent: what was asked for, as ``arka.tiers.creates`` encodes it. Empty in logs of earlier versions.
    definition: bytes = b""
    #: Of an outcome: the intent came to nothing.
    failed: bool = False


class DropRecord(msgspec.Struct, frozen=True):
    """Payload of a DROP record: the intent, or with ``done`` and no name that the catalog has done it."""

    namespace: str
    name: str
    table_uuid: str
    purge: bool
    done: bool = False


@dataclass(frozen=True, slots=True)
class PendingDrop:
    """A drop that the log asks for and that is not known to be done.

    Attributes:
        lsn: its record's.
        name: the table's, when it was asked for.
        purge: whether files go too.
    """

    lsn: int
    name: TableName
    purge: bool


def parse_create(payload: bytes) -> CreateRecord:
    """Read a CREATE record's payload.

    Raises:
        ValueError: it is not one.
    """
    try:
        return msgspec.msgpack.decode(payload, type=CreateRecord)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a create record: {error}") from error


def parse_created(payload: bytes) -> TableInfo | None:
    """Read what a CREATE record's payload says was made; None for an intent.

    Raises:
        ValueError: it is none.
    """
    record = parse_create(payload)
    return TableInfo.from_bytes(record.table) if record.table else None


def parse_drop(payload: bytes) -> DropRecord:
    """Read a DROP record's payload.

    Raises:
        ValueError: it is none.
    """
    try:
        return msgspec.msgpack.decode(payload, type=DropRecord)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a drop record: {error}") from error


def log_created(memory: MemoryTier, info: TableInfo, location_suffix: str) -> int:
    """Put a CREATE record with the table that was made into the log; returns its LSN."""
    return memory.append_control(KIND_CREATE, _created(info, location_suffix))


def owe_created(memory: MemoryTier, info: TableInfo, location_suffix: str) -> None:
    """Let a CREATE record as ``log_created`` makes it precede the next write, for which there is no LSN now."""
    memory.owe(info.uuid, KIND_CREATE, _created(info, location_suffix))


def _created(info: TableInfo, location_suffix: str) -> bytes:
    record = CreateRecord(info.name.namespace, info.name.name, location_suffix, info.to_bytes())
    return msgspec.msgpack.encode(record)


def log_drop(memory: MemoryTier, info: TableInfo, *, purge: bool) -> int:
    """Put the record of a drop that is to be done into the log; returns its LSN.

    Raises:
        LsnExhausted: no LSN can be given now.
    """
    record = DropRecord(info.name.namespace, info.name.name, str(info.uuid), purge)
    return memory.append_control(KIND_DROP, msgspec.msgpack.encode(record))


def log_drop_done(memory: MemoryTier, table: UUID) -> int:
    """Put the record of a done drop into the log; returns its LSN."""
    # Behind this record one that is owed would bring the table back.
    memory.owe_nothing(table)
    record = DropRecord("", "", str(table), purge=False, done=True)
    return memory.append_control(KIND_DROP, msgspec.msgpack.encode(record), outcome=True)


def new_location_suffix() -> str:
    """Eight hex digits that no other table of this name will have (R5)."""
    return secrets.token_hex(4)


def check_identical(definition: TableDefinition, info: TableInfo) -> None:
    """Check that a table which exists is the one that is asked for (field ids and metadata aside).

    Raises:
        ArkaError: ``table_exists``, naming the first difference.
    """
    difference = _difference(definition, info)
    if difference is not None:
        raise ArkaError(f"Table already exists: {info.name} ({difference})", code=ErrorCode.TABLE_EXISTS)


def _difference(definition: TableDefinition, info: TableInfo) -> str | None:
    if definition.table_type is not info.table_type:
        return f"it is {info.table_type.value}, not {definition.table_type.value}"
    if definition.key_columns != info.key_columns:
        return f"its key is {list(info.key_columns)}, not {list(definition.key_columns)}"
    ours, theirs = _bare(definition.schema), _bare(info.schema)
    if not ours.equals(theirs):
        return f"its schema is {_spell(theirs)}, not {_spell(ours)}"
    names = {_field_id(field): field.name for field in info.schema}
    asked = [(definition.schema.field(f.source_index).name, f.transform, f.name) for f in definition.partition]
    kept = [(names.get(f.source_id, "?"), f.transform, f.name) for f in info.partition]
    if asked != kept:
        return f"its partition spec is {kept}, not {asked}"
    for key, value in definition.properties.items():
        if info.properties.get(key) != value:
            return f"its property {key} is {info.properties.get(key)!r}, not {value!r}"
    return None


def _field_id(field: pa.Field) -> int:
    return int((field.metadata or {}).get(b"PARQUET:field_id", b"-1"))


def _bare_type(kind: pa.DataType) -> pa.DataType:
    """A type without its fields' metadata and without the names that Arrow gives list items."""
    if pa.types.is_struct(kind):
        return pa.struct([_bare_field(kind.field(i)) for i in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(
            _bare_type(kind.key_type), pa.field("value", _bare_type(kind.item_type), kind.item_field.nullable)
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(pa.field("element", _bare_type(kind.value_type), kind.value_field.nullable))
    return kind


def _bare_field(field: pa.Field) -> pa.Field:
    return pa.field(field.name, _bare_type(field.type), field.nullable)


def _bare(schema: pa.Schema) -> pa.Schema:
    return pa.schema([_bare_field(field) for field in schema])


def _spell(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} {f.type}{'' if f.nullable else ' not null'}" for f in schema)


def dropped(info: TableInfo) -> Ending:
    """The ending of a dropped table."""
    return Ending(TableState.DROPPED, ErrorCode.TABLE_DROPPED, f"Table was dropped: {info.name}")


async def load_table(catalog: Catalog, name: TableName) -> CatalogTable | None:
    """Load a table, or None when there is none.

    Raises:
        ArkaError: ``table_stopped``: there is one that Arka cannot write.
        Unavailable: the catalog does not answer.
    """
    try:
        return await catalog.load_table(name)
    except TableMissing:
        return None
    except CatalogConflict as error:
        raise ArkaError(f"Not a table that Arka can write: {error}", code=ErrorCode.TABLE_STOPPED) from error
    except CatalogUnavailable as error:
        raise Unavailable(f"The catalog does not answer, so {name} cannot be looked up: {error}") from error


async def reload_table(catalog: Catalog, name: TableName) -> CatalogTable | None:
    """Load a table that could not be read; None when there is none that Arka can write.

    Raises:
        CatalogUnavailable: ask again.
    """
    try:
        return await catalog.load_table(name)
    except (TableMissing, CatalogConflict):
        return None
    except ArkaError as error:
        raise CatalogUnavailable(error.detail) from error


async def create_table(
    catalog: Catalog, definition: TableDefinition, suffix: str, *, owner: str
) -> tuple[CatalogTable, bool]:
    """Create a table in the catalog; one that appeared meanwhile and is the same will do.

    Args:
        catalog: where.
        definition: what was asked for.
        suffix: see ``new_location_suffix``.
        owner: the log that is to own a primary-key table (R26).

    Returns:
        The table, and whether it is the one that this call made (also when its response was lost).

    Raises:
        ArkaError: ``table_exists`` or ``invalid_request``.
        Unavailable: the catalog does not answer; whether the table exists is unknown, ask again.
    """
    made = definition
    if definition.table_type is TableType.PRIMARY_KEY:
        made = replace(definition, properties={**definition.properties, OWNER: owner})
    try:
        return await catalog.create_table(made, suffix), True
    except TableExists:
        found = await load_table(catalog, definition.name)
        if found is None:
            raise Unavailable(f"{definition.name} was created and dropped by others meanwhile: try again") from None
        check_identical(definition, found.info)
        return found, found.info.location.endswith(f"-{suffix}")
    except CatalogConflict as error:
        raise InvalidRequest(f"Cannot create {definition.name}: {error}") from error
    except CatalogUnavailable as error:
        raise Unavailable(f"The catalog does not answer, so {definition.name} may not exist: {error}") from error


async def drop_table(catalog: Catalog, name: TableName, table: UUID, *, purge: bool) -> None:
    """Drop a table that was just seen under a name.

    Raises:
        CatalogUnavailable: ask again, and look for it again: it may be gone, or have another name.
    """
    try:
        await catalog.drop_table(name, table, purge=purge)
    except TableMissing as error:
        raise CatalogUnavailable(f"{name} was renamed or dropped by others meanwhile") from error
    except (ArkaError, CatalogConflict) as error:
        # Of what lies there nothing can be made: others may mend it.
        raise CatalogUnavailable(f"{name} cannot be dropped: {error}") from error


def parse_table_uuid(record: DropRecord) -> UUID:
    """The dropped table's UUID."""
    return UUID(record.table_uuid)


__all__ = [
    "CreateRecord",
    "DropRecord",
    "PendingDrop",
    "check_identical",
    "create_table",
    "drop_table",
    "dropped",
    "load_table",
    "log_created",
    "log_drop",
    "log_drop_done",
    "new_location_suffix",
    "owe_created",
    "parse_create",
    "parse_created",
    "parse_drop",
    "parse_table_uuid",
    "reload_table",
]
