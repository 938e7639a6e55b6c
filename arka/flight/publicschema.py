"""A table's schema as clients see it: without the marks that are Arka's and the catalog's.

Owns: which metadata leaves the server (GetSchema, GetFlightInfo, ListFlights, DescribeTable, DoGet), and the messages
that were made of it (T24: one of 10,000 columns takes 100 ms). Does not own what the catalog keeps
(``arka.iceberg.schema``) nor how types are spelled (``datatypes``).

Iceberg field ids stand in the metadata of every field, nested ones included (R24). A client that copies such a schema
into its own Parquet files would give its columns another table's ids.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

import pyarrow as pa

from arka.records import FIELD_ID_KEY, TableInfo
from arka.storage.threads import run_compute

#: Bytes of messages that are kept.
_KEPT_BYTES: Final = 16 * 1024 * 1024
#: What a column costs, in bytes of data: 10 us.
COLUMN_WORK: Final = 4096


class PublicSchemas:
    """Schemas as messages, made once for each version of a table. Used from trio's thread only."""

    def __init__(self) -> None:
        self._kept: dict[UUID, tuple[TableInfo, bytes]] = {}
        self._size = 0

    async def message(self, info: TableInfo, peer: str) -> bytes:
        """Return a table's schema as an encapsulated IPC message; made in a thread, the first time.

        Args:
            info: the table.
            peer: the client's address.

        Cancellation: nothing changes.
        """
        kept = self._kept.get(info.uuid)
        if kept is not None and kept[0] is info:
            return kept[1]
        made: bytes = await run_compute(_serialize, info.schema, peer=peer, size=len(info.schema) * COLUMN_WORK)
        if self._size + len(made) > _KEPT_BYTES:
            self._kept.clear()
            self._size = 0
        replaced = self._kept.pop(info.uuid, None)
        self._size += len(made) - (0 if replaced is None else len(replaced[1]))
        self._kept[info.uuid] = info, made
        return made


def _serialize(schema: pa.Schema) -> bytes:
    message: bytes = public_schema(schema).serialize().to_pybytes()
    return message


def public_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema without field ids at any depth, and without metadata of its own."""
    return pa.schema([_public_field(field) for field in schema])


def _public_field(field: pa.Field) -> pa.Field:
    metadata = {key: value for key, value in (field.metadata or {}).items() if key != FIELD_ID_KEY}
    return pa.field(field.name, _public_type(field.type), field.nullable, metadata or None)


def _public_type(type_: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_struct(type_):
        return pa.struct([_public_field(child) for child in type_])
    if types.is_map(type_):
        return pa.map_(_public_field(type_.key_field), _public_field(type_.item_field), type_.keys_sorted)
    if types.is_list(type_):
        return pa.list_(_public_field(type_.value_field))
    return type_


__all__ = ["COLUMN_WORK", "PublicSchemas", "public_schema"]
