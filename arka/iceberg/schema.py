"""Canonical Arrow types and Iceberg schemas, both ways.

Owns: which Arrow type stands for which Iceberg type, and where field ids live in Arrow schemas. Does not
own how a client's types become canonical ones.

The canonical types: int32, int64, float32, float64, bool, utf8, binary, fixed_size_binary(n), uuid,
decimal128(p, s), date32, time64[us], timestamp[us], timestamp[us, UTC], list, struct, map.

Source: Iceberg table spec, "Schemas and Data Types" and "Parquet field ids".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import pyarrow as pa
from pyiceberg.schema import Schema
from pyiceberg.types import (
    BinaryType,
    BooleanType,
    DateType,
    DecimalType,
    DoubleType,
    FixedType,
    FloatType,
    IcebergType,
    IntegerType,
    ListType,
    LongType,
    MapType,
    NestedField,
    StringType,
    StructType,
    TimestampType,
    TimestamptzType,
    TimeType,
    UUIDType,
)

from arka.records import FIELD_ID_KEY
from arka.storage.ports import CatalogConflict

_DOC_KEY = b"doc"

_TO_ICEBERG: dict[pa.DataType, IcebergType] = {
    pa.int32(): IntegerType(),
    pa.int64(): LongType(),
    pa.float32(): FloatType(),
    pa.float64(): DoubleType(),
    pa.bool_(): BooleanType(),
    pa.string(): StringType(),
    pa.binary(): BinaryType(),
    pa.uuid(): UUIDType(),
    pa.date32(): DateType(),
    pa.time64("us"): TimeType(),
    pa.timestamp("us"): TimestampType(),
    pa.timestamp("us", tz="UTC"): TimestamptzType(),
}
_TO_ARROW: dict[IcebergType, pa.DataType] = {iceberg: arrow for arrow, iceberg in _TO_ICEBERG.items()}


class UnsupportedType(ValueError):
    """A type has no canonical Arrow form; the message names the column and the type."""


def field_id(field: pa.Field) -> int:
    """Return the Iceberg id in a field's metadata.

    Raises:
        UnsupportedType: it has none.
    """
    value = (field.metadata or {}).get(FIELD_ID_KEY)
    if value is None:
        raise UnsupportedType(f"field {field.name!r} carries no Iceberg field id")
    return int(value)


def _iceberg_type(type_: pa.DataType, path: str, give_id: Callable[[pa.Field], int]) -> IcebergType:
    simple = _TO_ICEBERG.get(type_)
    if simple is not None:
        return simple
    if pa.types.is_decimal128(type_):
        if not 0 <= type_.scale <= type_.precision:
            raise UnsupportedType(f"column {path!r}: {type_} needs a scale from 0 to its precision")
        return DecimalType(type_.precision, type_.scale)
    if pa.types.is_fixed_size_binary(type_):
        if type_.byte_width == 0:
            raise UnsupportedType(f"column {path!r}: fixed_size_binary must be at least 1 byte wide")
        return FixedType(type_.byte_width)
    if pa.types.is_struct(type_):
        if type_.num_fields == 0:
            raise UnsupportedType(f"column {path!r}: a struct needs at least one field")
        return StructType(*_nested_fields(list(type_), f"{path}.", give_id))
    if pa.types.is_list(type_):
        element = type_.value_field
        return ListType(
            element_id=give_id(element),
            element_type=_iceberg_type(element.type, f"{path}.element", give_id),
            element_required=not element.nullable,
        )
    if pa.types.is_map(type_):
        return MapType(
            key_id=give_id(type_.key_field),
            key_type=_iceberg_type(type_.key_type, f"{path}.key", give_id),
            value_id=give_id(type_.item_field),
            value_type=_iceberg_type(type_.item_type, f"{path}.value", give_id),
            value_required=not type_.item_field.nullable,
        )
    raise UnsupportedType(f"column {path!r}: {type_} is not a canonical type")


def _nested_fields(fields: Sequence[pa.Field], prefix: str, give_id: Callable[[pa.Field], int]) -> list[NestedField]:
    ids = [give_id(field) for field in fields]
    return [
        NestedField(
            field_id=number,
            name=field.name,
            field_type=_iceberg_type(field.type, f"{prefix}{field.name}", give_id),
            required=not field.nullable,
            doc=(field.metadata or {}).get(_DOC_KEY, b"").decode() or None,
        )
        for number, field in zip(ids, fields, strict=True)
    ]


def new_iceberg_schema(schema: pa.Schema, key_columns: Sequence[str] = ()) -> Schema:
    """Make the Iceberg schema of a table that does not exist yet, with ids from 1.

    Args:
        schema: canonical Arrow types, no ids.
        key_columns: names of its identifier fields: required columns, neither float nor double.

    Returns:
        The schema; a column's id is its index plus one, nested fields come after.

    Raises:
        CatalogConflict: a type is not canonical, names clash, or a key column cannot be one.
    """
    if len(schema) == 0:
        raise CatalogConflict("a table needs at least one column")
    numbers = count(1)
    try:
        fields = _nested_fields(list(schema), "", lambda _field: next(numbers))
        ids = {field.name: field.field_id for field in fields}
        if len(ids) != len(fields):
            raise UnsupportedType("two columns have the same name")
        missing = [name for name in key_columns if name not in ids]
        if missing:
            raise UnsupportedType(f"key columns are not in the schema: {', '.join(missing)}")
        made = Schema(*fields, identifier_field_ids=[ids[name] for name in key_columns])
        # Builds the index by full name, which raises where a nested name and a dotted one collide.
        made.find_field(fields[0].name)
    except ValueError as error:
        raise CatalogConflict(f"Cannot create an Iceberg schema: {error}") from error
    return made


def iceberg_schema(schema: pa.Schema, schema_id: int = 0) -> Schema:
    """Rebuild the Iceberg schema that an Arrow schema with field ids stands for.

    Raises:
        UnsupportedType: a type is not canonical or a field has no id.
    """
    return Schema(*_nested_fields(list(schema), "", field_id), schema_id=schema_id)


def _arrow_type(type_: IcebergType, path: str) -> pa.DataType:
    simple = _TO_ARROW.get(type_)
    if simple is not None:
        return simple
    if isinstance(type_, DecimalType):
        return pa.decimal128(type_.precision, type_.scale)
    if isinstance(type_, FixedType):
        return pa.binary(len(type_))
    if isinstance(type_, StructType):
        return pa.struct([_arrow_field(field, f"{path}.{field.name}") for field in type_.fields])
    if isinstance(type_, ListType):
        return pa.list_(_arrow_field(type_.element_field, f"{path}.element"))
    if isinstance(type_, MapType):
        return pa.map_(_arrow_field(type_.key_field, f"{path}.key"), _arrow_field(type_.value_field, f"{path}.value"))
    raise UnsupportedType(f"column {path!r}: {type_} has no canonical Arrow type")


def _arrow_field(field: NestedField, path: str) -> pa.Field:
    metadata = {FIELD_ID_KEY: str(field.field_id).encode()}
    if field.doc:
        metadata[_DOC_KEY] = field.doc.encode()
    return pa.field(field.name, _arrow_type(field.field_type, path), nullable=not field.required, metadata=metadata)


def arrow_schema(schema: Schema) -> pa.Schema:
    """Give an Iceberg schema its canonical Arrow form, with ids on every nested field.

    Raises:
        UnsupportedType: a column has a type that Arka does not know.
    """
    return pa.schema([_arrow_field(field, field.name) for field in schema.fields])


__all__ = ["UnsupportedType", "arrow_schema", "field_id", "iceberg_schema", "new_iceberg_schema"]
