"""A table's schema as clients see it: without the marks that are Arka's and the catalog's.

Owns: which metadata leaves the server (GetSchema, GetFlightInfo, ListFlights, DescribeTable, DoGet). Does not own what
the catalog keeps (``arka.iceberg.schema``) nor how types are spelled (``datatypes``).

Iceberg field ids stand in the metadata of every field, nested ones included (R24). A client that copies such a schema
into its own Parquet files would give its columns another table's ids.
"""

from __future__ import annotations

import pyarrow as pa

from arka.records import FIELD_ID_KEY


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


__all__ = ["public_schema"]
