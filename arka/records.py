"""The plain data that the layers hand to each other: LSNs, tiers, requests, acks and tables.

Owns: these shapes and their JSON and binary forms. Knows nothing of sockets, files or catalogs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple, Protocol
from uuid import UUID

import msgspec
import pyarrow as pa

from arka.errors import ArkaError, ErrorCode, InvalidRequest, cut, quote
from arka.tableproperties import OWNER

#: LSNs are JSON integers for JavaScript clients too: below 2**53 (protocol 3.1).
MAX_LSN: Final = 2**53 - 1

#: A field's Iceberg id, as Parquet writers and readers spell it in Arrow field metadata.
FIELD_ID_KEY: Final = b"PARQUET:field_id"

DEFAULT_NAMESPACE: Final = "default"


class Releasable(Protocol):
    """What is held until it is released, such as a charge of the ledger."""

    def release(self) -> None:
        """Give it back."""
        ...


class Tier(IntEnum):
    """The durability tiers, in the order in which a write reaches them."""

    MEMORY = 0
    DISK = 1
    OBJECT_STORAGE = 2
    ICEBERG_COMMITTED = 3

    @property
    def word(self) -> str:
        """The tier as the wire contract spells it."""
        return self.name.lower()

    @classmethod
    def parse(cls, word: str) -> Tier:
        """Read a tier, whatever its case.

        Raises:
            InvalidRequest: naming the legal words.
        """
        try:
            return cls[cut(word).upper()]
        except KeyError:
            legal = ", ".join(tier.word for tier in cls)
            raise InvalidRequest(f"Unknown durability {quote(word)}: expected one of {legal}") from None


class Operation(IntEnum):
    """What a write does to its rows' keys."""

    UPSERT = 0
    DELETE = 1


class TableType(StrEnum):
    """How a table treats two rows with the same key."""

    APPEND_ONLY = "append_only"
    PRIMARY_KEY = "primary_key"


class LsnRange(NamedTuple):
    """The LSNs in ``(after, through]``: how commits are cut and lost ranges recorded."""

    after: int
    through: int


def owner_property(node_id: str, log_uuid: UUID) -> str:
    """Say who owns a primary-key table: the node for people, the log for Arka."""
    return f"{node_id} {log_uuid}"


_NAME_PART: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")


class TableName(NamedTuple):
    """A table's full name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> TableName:
        """Read ``name`` or ``namespace.name``.

        Raises:
            InvalidRequest: naming the part that is not legal.
        """
        # One part too many is enough to tell.
        return cls.from_parts(text.split(".", 2))

    @classmethod
    def from_parts(cls, parts: list[str]) -> TableName:
        """Build a name from one part (in the default namespace) or two.

        Raises:
            InvalidRequest: naming the part that is not legal.
        """
        if len(parts) == 1 and "." in parts[0]:
            parts = parts[0].split(".", 2)
        if len(parts) not in (1, 2):
            name = ".".join(cut(part) for part in parts[:3])
            more = f" and {len(parts) - 3} parts more" if len(parts) > 3 else ""
            raise InvalidRequest(
                f"Illegal table name {quote(name)}{more}: expected 'name' or 'namespace.name', not more than 2 parts"
            )
        for part in parts:
            if not _NAME_PART.match(part):
                whole = ".".join(map(cut, parts))
                raise InvalidRequest(
                    f"Illegal table name {quote(whole)}: part {quote(part)} must match [A-Za-z_][A-Za-z0-9_]{{0,127}}"
                )
        return cls(DEFAULT_NAMESPACE, parts[0]) if len(parts) == 1 else cls(*parts)


@dataclass(frozen=True, slots=True)
class PartitionField:
    """One field of a partition spec.

    Attributes:
        source_id: Iceberg field id of the source column.
        field_id: the partition field's own id, from 1000.
        name: the partition field's name.
        transform: canonical Iceberg spelling: ``identity``, ``year``, ``month``, ``day``, ``hour``,
            ``bucket[N]`` or ``truncate[N]``.
    """

    source_id: int
    field_id: int
    name: str
    transform: str

    @property
    def meaning(self) -> tuple[int, int, str]:
        """What its values depend on: others may rename it."""
        return self.source_id, self.field_id, self.transform


def same_partitions(found: Sequence[PartitionField] | None, wanted: Sequence[PartitionField]) -> bool:
    """Whether rows get the same partitions under a spec that was found as under one that is wanted.

    Args:
        found: None: there is no such spec any more.
        wanted: the fields that files were, or are to be, written under.
    """
    return found is not None and [field.meaning for field in found] == [field.meaning for field in wanted]


@dataclass(frozen=True, slots=True)
class PartitionRequest:
    """One field of a partition spec as a client asks for it: the source is a 0-based column index."""

    source_index: int
    field_id: int | None
    name: str
    transform: str


@dataclass(frozen=True, slots=True)
class TableDefinition:
    """What CreateTable asks for, checked and in canonical form, before the catalog knows it.

    Attributes:
        name: the full name.
        schema: canonical Arrow types, no field ids.
        table_type: append-only or primary-key.
        key_columns: names of the key columns, in key order; empty for append-only tables.
        partition: partition fields in spec order.
        properties: Iceberg table properties to set.
    """

    name: TableName
    schema: pa.Schema
    table_type: TableType = TableType.APPEND_ONLY
    key_columns: tuple[str, ...] = ()
    partition: tuple[PartitionRequest, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)


class _TableRecord(msgspec.Struct, frozen=True):
    """The stored form of TableInfo; fields are only ever added, with a default."""

    uuid: str
    namespace: str
    name: str
    schema: bytes
    schema_id: int
    table_type: str
    key_columns: list[str]
    spec_id: int
    partition: list[tuple[int, int, str, str]]
    location: str
    properties: dict[str, str]


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table as the catalog knows it, at one schema.

    Attributes:
        uuid: the Iceberg table UUID: a table's identity everywhere (R5); names are for people.
        name: the full name at the time of reading.
        schema: canonical Arrow types; every (nested) field carries its Iceberg id in its metadata
            under ``PARQUET:field_id`` (R24).
        schema_id: the Iceberg schema id that ``schema`` stands for.
        table_type: append-only or primary-key.
        key_columns: key column names in key order; empty for append-only tables.
        spec_id: id of the partition spec for new files.
        partition: its fields.
        location: the table's root URL; ends in ``-<first 8 hex digits of a UUID>`` (R5).
        properties: Iceberg table properties.
    """

    uuid: UUID
    name: TableName
    schema: pa.Schema
    schema_id: int
    table_type: TableType
    key_columns: tuple[str, ...]
    spec_id: int
    partition: tuple[PartitionField, ...]
    location: str
    properties: Mapping[str, str]

    def check_owner(self, log_uuid: UUID, properties: Mapping[str, str] | None = None) -> None:
        """Check that a log may write to the table (R26): to a primary-key table, its owner alone.

        Args:
            log_uuid: the log.
            properties: the table's as they are by now; None for ``properties``.

        Raises:
            ArkaError: ``table_stopped``, naming the owner.
        """
        if self.table_type is TableType.PRIMARY_KEY:
            owner = (self.properties if properties is None else properties).get(OWNER, "")
            if owner.rpartition(" ")[2] != str(log_uuid):
                raise ArkaError(
                    f"{self.name} is a primary-key table of {f'node {owner}' if owner else 'no node'}, which alone "
                    f"writes to it (table property {OWNER}); this is log {log_uuid}. If that log never runs again, "
                    'make this one the owner: docs/operations.md, "The identity of a log"',
                    code=ErrorCode.TABLE_STOPPED,
                )

    def key_schema(self, schema: pa.Schema | None = None) -> pa.Schema:
        """Return the key's columns of a schema that the table has or had (default: ``schema``).

        They are found and ordered by their field ids: names may change, and hashes and frames in the log outlive that.

        Raises:
            KeyError: it lacks one of them.
        """
        ids = sorted(int(self.schema.field(name).metadata[FIELD_ID_KEY]) for name in self.key_columns)
        fields = {int(field.metadata[FIELD_ID_KEY]): field for field in (self.schema if schema is None else schema)}
        return pa.schema([fields[number] for number in ids])

    def frame_schema(self, operation: Operation, schema: pa.Schema | None = None) -> pa.Schema:
        """Return the schema of a frame in the log: a delete holds the key alone.

        Raises:
            KeyError: see ``key_schema``.
        """
        if operation is Operation.DELETE:
            return self.key_schema(schema)
        return self.schema if schema is None else schema

    def to_bytes(self) -> bytes:
        """Encode for a WAL table record: MessagePack with the schema as an IPC message."""
        record = _TableRecord(
            uuid=str(self.uuid),
            namespace=self.name.namespace,
            name=self.name.name,
            schema=self.schema.serialize().to_pybytes(),
            schema_id=self.schema_id,
            table_type=self.table_type.value,
            key_columns=list(self.key_columns),
            spec_id=self.spec_id,
            partition=[(f.source_id, f.field_id, f.name, f.transform) for f in self.partition],
            location=self.location,
            properties=dict(self.properties),
        )
        return msgspec.msgpack.encode(record)

    @classmethod
    def from_bytes(cls, data: bytes) -> TableInfo:
        """Decode what ``to_bytes`` made.

        Raises:
            ValueError: the bytes are not a table record.
        """
        try:
            record = msgspec.msgpack.decode(data, type=_TableRecord)
            schema = pa.ipc.read_schema(pa.py_buffer(record.schema))
        except (msgspec.MsgspecError, pa.ArrowException) as error:
            raise ValueError(f"not a table record: {error}") from error
        return cls(
            uuid=UUID(record.uuid),
            name=TableName(record.namespace, record.name),
            schema=schema,
            schema_id=record.schema_id,
            table_type=TableType(record.table_type),
            key_columns=tuple(record.key_columns),
            spec_id=record.spec_id,
            partition=tuple(PartitionField(*item) for item in record.partition),
            location=record.location,
            properties=record.properties,
        )


class KnownTable(NamedTuple):
    """A table as a log remembers it.

    Attributes:
        info: what it is.
        committed_lsn: the last LSN that Iceberg was seen to hold of it.
        known_from_lsn: no LSN up to here was given to one of its writes.
    """

    info: TableInfo
    committed_lsn: int
    known_from_lsn: int = 0


class HeldObject(NamedTuple):
    """An object with frames of one table that may be in the object store only (R18, R33).

    Attributes:
        key: below the node's name.
        first_lsn: of its frames.
        last_lsn: of its frames.
    """

    key: str
    first_lsn: int
    last_lsn: int


class WriteRequest(msgspec.Struct, frozen=True):
    """A WriteRequest of the wire contract (protocol 3); absent fields are None."""

    table_name: str | None = None
    requested_durability: str | None = None
    idempotency_key: str | None = None
    key_start: int | None = None
    operation: str | None = None
    ack_as: str | None = None
    acks: str | None = None
    ordered: bool | None = None
    settled_lsn: int | None = None
    resume_after_lsn: int | None = None


_REQUEST_DECODER: Final = msgspec.json.Decoder(WriteRequest)


def parse_write_request(data: bytes) -> WriteRequest:
    """Read a WriteRequest from ``app_metadata``.

    Args:
        data: UTF-8 JSON; unknown fields are ignored.

    Raises:
        InvalidRequest: the JSON is malformed or a field has the wrong type.
    """
    try:
        return _REQUEST_DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"Malformed WriteRequest in app_metadata: {cut(str(error))}") from error


class AckMessage(msgspec.Struct, frozen=True, omit_defaults=False):
    """An AckMessage of the wire contract (protocol 3), as clients and tests decode it.

    The server writes acks in ``arka.flight.acks`` without building these.
    """

    lsn: int
    durability_level: str
    timestamp_us: int
    error: str | None = None
    sequence: int = -1
    code: str | None = None
    rows: int | None = None
    duplicate: bool = False
    snapshot_id: str | None = None
    dropped_columns: list[str] | None = None


__all__ = [
    "DEFAULT_NAMESPACE",
    "FIELD_ID_KEY",
    "MAX_LSN",
    "AckMessage",
    "HeldObject",
    "KnownTable",
    "LsnRange",
    "Operation",
    "PartitionField",
    "PartitionRequest",
    "Releasable",
    "TableDefinition",
    "TableInfo",
    "TableName",
    "TableType",
    "Tier",
    "WriteRequest",
    "parse_write_request",
    "same_partitions",
]
