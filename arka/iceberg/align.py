"""Bring a batch that was accepted under an older schema into the table's current one (R24, R27).

Owns: matching columns and nested fields by Iceberg id, widening, nulls for what came later, and telling which rows and
which files do not fit what others made of the table. Does not own which schema a frame was accepted under, nor what
becomes of a write that does not fit (``arka.tiers.committer``).

Source: Iceberg table spec, "Schema Evolution" and "Column Projection".
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from arka.iceberg.schema import field_id
from arka.nullarrays import null_array
from arka.storage.ports import SchemaMisfit


def align_batch(batch: pa.RecordBatch, schema: pa.Schema, *, strict: bool = True) -> pa.RecordBatch:
    """Return the rows of ``batch`` as ``schema`` has them.

    Args:
        batch: its schema carries field ids on every nested field; buffers are shared where types agree.
        schema: the same; a column that ``batch`` lacks becomes null, one that only ``batch`` has is dropped.
        strict: refuse nulls in a column or a nested field that became required. Rows that are in the table already
            are read as they are.

    Raises:
        ValueError: a field without an id.
        SchemaMisfit: a required column or nested field for which there is no value, or a value that does not fit its
            new type.
    """
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    sources = {field_id(field): index for index, field in enumerate(batch.schema)}
    columns = []
    for target in schema:
        index = sources.get(field_id(target))
        if index is None:
            columns.append(_missing(target, target.name, batch.num_rows))
        else:
            columns.append(_align(batch.column(index), batch.schema.field(index), target, target.name, strict))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def misfit(staged: pa.Schema, now: pa.Schema) -> str:
    """Say why files that were written under one schema cannot be files of a table that has another one by now.

    Args:
        staged: what the files were written under; with field ids.
        now: the table's; the same.

    Returns:
        The first reason; empty if they can. A file may lack optional columns, have dropped ones and narrower types.
    """
    return "" if staged.equals(now) else _misfit(list(staged), list(now), "")


def _misfit(staged: Sequence[pa.Field], now: Sequence[pa.Field], prefix: str) -> str:
    known = {field_id(field): field for field in staged}
    for target in now:
        source, path = known.get(field_id(target)), prefix + target.name
        if source is None:
            if not target.nullable:
                return f"others added the required column {path!r}"
            continue
        if source.nullable and not target.nullable:
            return f"others made column {path!r} required"
        below, above = _below(source.type), _below(target.type)
        if below and above and source.type.id == target.type.id:
            if reason := _misfit(below, above, f"{path}."):
                return reason
        elif source.type != target.type and not _is_promotion(source.type, target.type):
            return f"others changed column {path!r} from {source.type} to {target.type}"
    return ""


def _below(kind: pa.DataType) -> list[pa.Field]:
    if pa.types.is_struct(kind):
        return list(kind)
    if pa.types.is_list(kind):
        return [kind.value_field]
    return [kind.key_field, kind.item_field] if pa.types.is_map(kind) else []


def _is_promotion(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether readers take a file's column of one type for one of another."""
    if pa.types.is_decimal(old) and pa.types.is_decimal(new):
        return bool(old.scale == new.scale and old.precision <= new.precision)
    return (old, new) in ((pa.int32(), pa.int64()), (pa.float32(), pa.float64()))


def _missing(target: pa.Field, path: str, rows: int) -> pa.Array:
    if not target.nullable and rows:
        raise SchemaMisfit(
            f"others added the required column {path!r}, for which there is no value: make it optional, or drop it"
        )
    return null_array(rows, target.type)


def _align(array: pa.Array, source: pa.Field, target: pa.Field, path: str, strict: bool) -> pa.Array:
    if strict and source.nullable and not target.nullable and array.null_count:
        raise SchemaMisfit(
            f"others made column {path!r} required, and there are nulls in it: make it optional again, or drop it"
        )
    if source.type.equals(target.type, check_metadata=True):
        return array
    if pa.types.is_struct(target.type) and pa.types.is_struct(source.type):
        return _align_struct(array, source, target, path, strict)
    if pa.types.is_list(target.type) and pa.types.is_list(source.type):
        # From here on: no slice offset, so that offsets and validity can be reused as they are.
        whole = pa.concat_arrays([array])
        if strict and not target.type.value_field.nullable and source.type.value_field.nullable:
            _check_elements(whole, f"{path}.{target.type.value_field.name}")
        values = _align(
            whole.values,
            source.type.value_field,
            target.type.value_field.with_nullable(True),
            f"{path}.element",
            strict,
        )
        return pa.ListArray.from_arrays(whole.offsets, values, type=target.type, mask=_mask(whole))
    if pa.types.is_map(target.type) and pa.types.is_map(source.type):
        whole = pa.concat_arrays([array])
        if strict and not target.type.item_field.nullable and source.type.item_field.nullable:
            lists = pa.ListArray.from_arrays(whole.offsets, whole.items, mask=_mask(whole))
            _check_elements(lists, f"{path}.{target.type.item_field.name}")
        keys = _align(whole.keys, source.type.key_field, target.type.key_field, f"{path}.key", strict)
        items = _align(
            whole.items, source.type.item_field, target.type.item_field.with_nullable(True), f"{path}.value", strict
        )
        return pa.MapArray.from_arrays(whole.offsets, keys, items, type=target.type, mask=_mask(whole))
    try:
        return array.cast(target.type)
    except pa.ArrowException as error:
        raise SchemaMisfit(
            f"others changed column {path!r} from {source.type} to {target.type}, which its values do not fit: change "
            f"it back ({error})"
        ) from error


def _check_elements(lists: pa.ListArray, path: str) -> None:
    """Check for nulls in those elements that belong to a list: what lies below a null list is no value."""
    if lists.flatten().null_count:
        raise SchemaMisfit(
            f"others made the elements {path!r} required, and there are nulls among them: make them optional again, or "
            "drop the column"
        )


def _align_struct(array: pa.StructArray, source: pa.Field, target: pa.Field, path: str, strict: bool) -> pa.StructArray:
    sources = {field_id(field): index for index, field in enumerate(source.type)}
    present = len(array) - array.null_count
    children = []
    for field in target.type:
        index, below = sources.get(field_id(field)), f"{path}.{field.name}"
        if index is None:
            _missing(field, below, present)
            children.append(null_array(len(array), field.type))
            continue
        child, inner = array.field(index), source.type.field(index)
        if strict and inner.nullable and not field.nullable and child.null_count:
            # What lies below a null struct is no value.
            if child.filter(array.is_valid()).null_count:
                _align(child, inner, field, below, strict)
            inner = inner.with_nullable(False)
        children.append(_align(child, inner, field, below, strict))
    return pa.StructArray.from_arrays(children, fields=list(target.type), mask=_mask(array))


def _mask(array: pa.Array) -> pa.Array | None:
    return array.is_null() if array.null_count else None


__all__ = ["align_batch", "misfit"]
