"""Bring a batch that was accepted under an older schema into the table's current one (R24).

Owns: matching columns and nested fields by Iceberg id, widening, nulls for what came later. Does not own
which schema a frame was accepted under.

Source: Iceberg table spec, "Schema Evolution" and "Column Projection".
"""

from __future__ import annotations

import pyarrow as pa

from arka.iceberg.schema import field_id
from arka.nullarrays import null_array


def align_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return the rows of ``batch`` as ``schema`` has them.

    Args:
        batch: its schema carries field ids on every nested field; buffers are shared where types agree.
        schema: the same; a column that ``batch`` lacks becomes null, one that only ``batch`` has is dropped.

    Raises:
        ValueError: a field without an id, or a required column that the batch does not have.
        pa.ArrowInvalid: a value does not fit its new type.
    """
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    sources = {field_id(field): index for index, field in enumerate(batch.schema)}
    columns = []
    for target in schema:
        index = sources.get(field_id(target))
        if index is None:
            columns.append(_missing(target, batch.num_rows))
        else:
            columns.append(_align(batch.column(index), batch.schema.field(index), target))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _missing(target: pa.Field, rows: int) -> pa.Array:
    if not target.nullable and rows:
        raise ValueError(f"required column {target.name!r} is not in the batch")
    return null_array(rows, target.type)


def _align(array: pa.Array, source: pa.Field, target: pa.Field) -> pa.Array:
    if source.type.equals(target.type, check_metadata=True):
        return array
    if pa.types.is_struct(target.type):
        return _align_struct(array, source, target)
    if pa.types.is_list(target.type):
        # From here on: no slice offset, so that offsets and validity can be reused as they are.
        whole = pa.concat_arrays([array])
        values = _align(whole.values, source.type.value_field, target.type.value_field)
        return pa.ListArray.from_arrays(whole.offsets, values, type=target.type, mask=_mask(whole))
    if pa.types.is_map(target.type):
        whole = pa.concat_arrays([array])
        keys = _align(whole.keys, source.type.key_field, target.type.key_field)
        items = _align(whole.items, source.type.item_field, target.type.item_field)
        return pa.MapArray.from_arrays(whole.offsets, keys, items, type=target.type, mask=_mask(whole))
    return array.cast(target.type)


def _align_struct(array: pa.StructArray, source: pa.Field, target: pa.Field) -> pa.StructArray:
    sources = {field_id(field): index for index, field in enumerate(source.type)}
    children = []
    for field in target.type:
        index = sources.get(field_id(field))
        if index is None:
            children.append(_missing(field, len(array)))
        else:
            children.append(_align(array.field(index), source.type.field(index), field))
    return pa.StructArray.from_arrays(children, fields=list(target.type), mask=_mask(array))


def _mask(array: pa.Array) -> pa.Array | None:
    return array.is_null() if array.null_count else None


__all__ = ["align_batch"]
