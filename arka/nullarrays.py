"""Arrays of nulls that every writer of files takes.

Owns: what stands below a null. Arrow's own ``nulls`` puts nulls into the required fields of a struct too, which no
reader can see and which Parquet's writer refuses (R17).
"""

from __future__ import annotations

import pyarrow as pa


def null_array(rows: int, kind: pa.DataType) -> pa.Array:
    """Make an array of nulls; below them, required fields have values.

    Args:
        rows: how many.
        kind: a type that a table can have.
    """
    if pa.types.is_struct(kind) and not isinstance(kind, pa.BaseExtensionType):
        children = [null_array(rows, field.type) if field.nullable else _values(rows, field.type) for field in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=pa.repeat(pa.scalar(True), rows))
    return pa.nulls(rows, kind)


def _values(rows: int, kind: pa.DataType) -> pa.Array:
    """Make some values, zero or empty, for places that nobody can see."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _values(rows, kind.storage_type))
    if pa.types.is_struct(kind):
        children = [null_array(rows, field.type) if field.nullable else _values(rows, field.type) for field in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind))
    if pa.types.is_map(kind):
        no_keys, no_items = pa.nulls(0, kind.key_type), pa.nulls(0, kind.item_type)
        return pa.MapArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows + 1), no_keys, no_items, type=kind)
    if pa.types.is_list(kind):
        return pa.ListArray.from_arrays(
            pa.repeat(pa.scalar(0, pa.int32()), rows + 1), pa.nulls(0, kind.value_type), type=kind
        )
    # Arrow fills the buffers of nulls with zeros.
    return pa.Array.from_buffers(kind, rows, [None, *pa.nulls(rows, kind).buffers()[1:]], 0)


__all__ = ["null_array"]
