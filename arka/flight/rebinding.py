"""A stream's columns, held by Iceberg field id while others change its table (R27).

Owns: which field of the table each field of a stream meant when the stream began, nested ones too, and the stream's
schema with the names that these fields have now. Does not own whether the table takes that schema (``conform``).

A renamed column goes on under its new name. A column that was dropped gets a name that no table has, so that the
comparison with the table refuses it and says why; one of the same name that was added since is another column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from arka.flight.layout import is_list_like
from arka.records import FIELD_ID_KEY


@dataclass(frozen=True, slots=True)
class Bound:
    """A field of a stream.

    Attributes:
        field_id: of the table's field that it meant; None where the table had no such field.
        children: the fields below it, in the stream's order.
    """

    field_id: int | None
    children: tuple[Bound, ...] = ()


def bind_fields(stream: Sequence[pa.Field], table: Sequence[pa.Field]) -> tuple[Bound, ...]:
    """Say which fields of a table the fields of a stream mean, by their names.

    Args:
        stream: as the client sent them.
        table: canonical types with field ids.
    """
    targets = {field.name: field for field in table}
    bound = []
    for field in stream:
        target = targets.get(field.name)
        bound.append(Bound(None) if target is None else Bound(_id_of(target), _bind_below(field.type, target.type)))
    return tuple(bound)


def rename_fields(stream: Sequence[pa.Field], bound: Sequence[Bound], table: Sequence[pa.Field]) -> list[pa.Field]:
    """Give the fields of a stream the names that the same fields of the table have now.

    Args:
        stream: as the client sent them.
        bound: what they meant; see ``bind_fields``.
        table: the table's fields now.

    Returns:
        The fields in the stream's order. The values' bytes are the same.
    """
    targets = {_id_of(field): field for field in table}
    named = []
    for field, meant in zip(stream, bound, strict=True):
        target = None if meant.field_id is None else targets.get(meant.field_id)
        if target is not None:
            named.append(field.with_name(target.name).with_type(_rename_below(field.type, meant, target.type)))
        elif meant.field_id is None:
            named.append(field.with_name(f"{field.name} (not in the table when the stream began)"))
        else:
            named.append(field.with_name(f"{field.name} (field {meant.field_id}, dropped by others since)"))
    return named


def _id_of(field: pa.Field) -> int:
    return int(field.metadata[FIELD_ID_KEY])


def _bind_below(source: pa.DataType, target: pa.DataType) -> tuple[Bound, ...]:
    """Bind what is below a field; nothing where the types have no fields in common."""
    types = pa.types
    if isinstance(source, pa.BaseExtensionType):
        return _bind_below(source.storage_type, target)
    if types.is_run_end_encoded(source):
        return _bind_below(source.value_type, target)
    if types.is_struct(source) and types.is_struct(target):
        return bind_fields(list(source), list(target))
    if is_list_like(source) and types.is_list(target):
        return (_bind_one(source.value_field, target.value_field),)
    if types.is_map(source) and types.is_map(target):
        return (_bind_one(source.key_field, target.key_field), _bind_one(source.item_field, target.item_field))
    return ()


def _bind_one(source: pa.Field, target: pa.Field) -> Bound:
    """Bind a list's element, or a map's key or value: their names mean nothing."""
    return Bound(_id_of(target), _bind_below(source.type, target.type))


def _rename_below(source: pa.DataType, meant: Bound, target: pa.DataType) -> pa.DataType:
    """Rename the fields below a field; a type that the table no longer has in its place stays as it is."""
    types = pa.types
    if not meant.children:
        return source
    if isinstance(source, pa.BaseExtensionType):
        return _rename_below(source.storage_type, meant, target)
    if types.is_run_end_encoded(source):
        return pa.run_end_encoded(source.run_end_type, _rename_below(source.value_type, meant, target))
    if types.is_struct(source):
        return (
            pa.struct(rename_fields(list(source), meant.children, list(target))) if types.is_struct(target) else source
        )
    if types.is_map(source) and types.is_map(target):
        key, value = meant.children
        return pa.map_(
            source.key_field.with_type(_rename_below(source.key_type, key, target.key_type)),
            source.item_field.with_type(_rename_below(source.item_type, value, target.item_type)),
            keys_sorted=source.keys_sorted,
        )
    if is_list_like(source) and types.is_list(target):
        element = source.value_field.with_type(_rename_below(source.value_type, meant.children[0], target.value_type))
        return _list_of(source, element)
    return source


def _list_of(kind: pa.DataType, element: pa.Field) -> pa.DataType:
    """A list type of the same kind with another element."""
    types = pa.types
    if types.is_fixed_size_list(kind):
        return pa.list_(element, kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(element)
    if types.is_list_view(kind):
        return pa.list_view(element)
    if types.is_large_list_view(kind):
        return pa.large_list_view(element)
    return pa.list_(element)


__all__ = ["Bound", "bind_fields", "rename_fields"]
