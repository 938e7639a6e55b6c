"""Columns that a stream leaves out, or sends as nulls: whatever their type, files can be written of them (R17)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arka.flight.decode import DecodedBatch
from arka.iceberg.align import align_batch
from arka.nullarrays import null_array


def required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


STRUCT = pa.struct([required("q", pa.int64())])
KINDS = [
    STRUCT,
    pa.struct([("q", pa.int64())]),
    pa.struct([("o", STRUCT)]),
    pa.struct([required("o", pa.struct([required("q", pa.string()), ("z", STRUCT)]))]),
    pa.struct([required("l", pa.list_(required("element", pa.int64())))]),
    pa.struct([required("m", pa.map_(pa.string(), required("value", STRUCT)))]),
    pa.struct([required("u", pa.uuid()), required("f", pa.binary(4)), required("d", pa.decimal128(38, 2))]),
    pa.struct([required("b", pa.bool_()), required("x", pa.binary()), required("t", pa.timestamp("us", "UTC"))]),
    pa.list_(required("element", pa.int64())),
    pa.list_(required("element", STRUCT)),
    pa.map_(pa.string(), required("value", STRUCT)),
]


def stored(batch: pa.RecordBatch) -> list[Any]:
    """Write rows as the encoder does, and read them."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, batch.schema, store_schema=False) as writer:
        writer.write_batch(batch)
    rows: list[Any] = pq.read_table(io.BytesIO(sink.getvalue())).column("r").to_pylist()
    return rows


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("how", ["left out", "null column", "nulls", "nulls of another width", "keyed"])
def test_a_column_of_nulls_can_be_written(decode: Callable[..., DecodedBatch], kind: pa.DataType, how: str) -> None:
    """Rows whose nested column is null, however that is sent, are in a file with that column null."""
    schema = pa.schema([required("id", pa.int64()), pa.field("r", kind)])
    ids = pa.array([1, 2], pa.int64())
    table: dict[str, Any] = {}
    if how in ("left out", "keyed"):
        batch = pa.record_batch([ids], names=["id"])
        if how == "keyed":
            table = {"key_columns": ["id"], "properties": {"arka.partial": "null"}}
    elif how == "null column":
        batch = pa.record_batch([pa.nulls(2), ids], names=["r", "id"])
    elif how == "nulls of another width":
        batch = pa.record_batch([ids.cast(pa.int32()), pa.nulls(2, kind)], names=["id", "r"])
    else:
        batch = pa.record_batch([ids, pa.nulls(2, kind)], names=["id", "r"])
    decoded = decode(schema, batch, **table)
    made = pa.ipc.read_record_batch(pa.py_buffer(decoded.buffer.ipc), decoded.schema)
    assert stored(made) == [None, None]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_column_that_others_added_can_be_written(kind: pa.DataType) -> None:
    """Frames from before a column was added have nulls in it, in a file too; also below a struct."""
    plain = pa.field("id", pa.int64(), metadata={"PARQUET:field_id": "1"})
    added = pa.field("r", kind, metadata={"PARQUET:field_id": "2"})
    batch = pa.record_batch([pa.array([1, 2])], schema=pa.schema([plain]))
    assert stored(align_batch(batch, pa.schema([plain, added]))) == [None, None]
    struct = pa.field("r", pa.struct([plain]), metadata={"PARQUET:field_id": "3"})
    wider = pa.field("r", pa.struct([plain, added]), metadata={"PARQUET:field_id": "3"})
    nested = pa.record_batch([pa.array([{"id": 1}, None], struct.type)], schema=pa.schema([struct]))
    assert stored(align_batch(nested, pa.schema([wider]))) == [{"id": 1, "r": None}, None]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_null_arrays_are_valid(kind: pa.DataType, rows: int) -> None:
    """An array of nulls is valid in Arrow's sense and holds nothing but nulls."""
    array = null_array(rows, kind)
    array.validate(full=True)
    assert array.to_pylist() == [None] * rows
