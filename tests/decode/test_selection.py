"""Deletes: the key columns of a batch are looked at and kept, the others are not even read."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from arka._core import ipc
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.options import Limits
from arka.records import Operation
from arka.testing.ipcstreams import StreamMessage, make_table, write_stream

Feed = Callable[..., list[DecodedBatch]]
TABLE = make_table(
    pa.schema(
        [
            pa.field("name", pa.string(), nullable=False),
            ("age", pa.int64()),
            pa.field("id", pa.int64(), nullable=False),
        ]
    ),
    key_columns=["id", "name"],
)
UNION = pa.UnionArray.from_sparse(pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, 3]), pa.array(["a", "b", "c"])])
DENSE = pa.UnionArray.from_dense(
    pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array([1, 3]), pa.array(["b"])]
)
WORDS = pa.array(["a", None, "c" * 40], pa.string_view())
OTHERS: list[pa.Array] = [
    pa.array(["x", "y", None]),
    WORDS,
    UNION,
    DENSE,
    pa.array([datetime.timedelta(1), None, datetime.timedelta(2)]),
    pa.array([(1, 2, 3)] * 3, pa.month_day_nano_interval()),
    pa.nulls(3),
    pa.array([{}, None, {}], pa.struct([])),
    pa.array([1, None, 3], pa.decimal256(70, 1)),
    pa.array([[1], None, []], pa.list_view(pa.int8())),
    pa.array([["a"], None, []], pa.large_list_view(pa.string_view())),
    pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", None])),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array([[("k", UNION[0].as_py())], None, []], pa.map_(pa.string(), pa.int64())),
    pa.StructArray.from_arrays([DENSE, WORDS], names=["u", "w"]),
    pa.array([True, None, False]),
    pa.FixedSizeListArray.from_arrays(pa.array([1.5] * 6), 2),
]


def deleted(messages: list[StreamMessage], limits: Limits | None = None) -> DecodedBatch:
    decoder = BatchDecoder(TABLE, limits or Limits())
    for message in messages:
        kind = ipc.message_type(message.header)
        if kind == ipc.SCHEMA:
            decoder.set_schema(message.header)
        elif kind == ipc.DICTIONARY_BATCH:
            decoder.add_dictionary(message)
        else:
            decoder.needs_thread(message, Operation.DELETE)
            return decoder.decode(message, Operation.DELETE)
    raise AssertionError("no batch")


@pytest.mark.parametrize("other", OTHERS, ids=lambda it: str(it.type))
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_other_columns_are_removed_whatever_their_type(other: pa.Array, compression: str | None) -> None:
    """Before, between and after the key columns, which may themselves need a conversion."""
    ids, names = pa.array([1, 2, 3], pa.int32()), pa.array(["n1", "n2", "n3"], pa.string_view())
    plain_ids, plain_names = ids.cast(pa.int64()), names.cast(pa.string())
    keys = TABLE.key_schema().names
    for columns in (
        {"x": other, "id": ids, "y": other, "name": names, "z": other},
        {"name": names, "id": ids, "age": other},
        {"name": plain_names, "age": other, "id": plain_ids},
        {"age": other, "id": plain_ids.dictionary_encode(), "name": plain_names.dictionary_encode()},
    ):
        batch = pa.record_batch(columns)
        for part in (batch, batch.slice(1), batch.slice(0, 0)):
            made = deleted(write_stream(batch.schema, [part], compression=compression))
            expected = {"id": ids, "name": plain_names}
            assert made.schema.names == keys
            assert made.batch.to_pydict() == {
                key: expected[key].slice(len(batch) - len(part) if len(part) else 0, len(part)).to_pylist()
                for key in keys
            }


def test_what_is_wrong_in_other_columns_does_not_matter() -> None:
    """A delete looks at its key and at nothing else: not at text, lengths, nulls or sizes."""
    bad_text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe\xfd")]
    )
    huge = pa.array(["x" * 1_000_000] * 3)
    batch = pa.record_batch(
        {"bad": bad_text, "huge": huge, "id": pa.array([1, 2, 3]), "name": ["a", "b", "c"], "age": pa.nulls(3)}
    )
    for compression in (None, "zstd"):
        made = deleted(write_stream(batch.schema, [batch], compression=compression), Limits(batch_bytes=100_000))
        assert made.batch.to_pydict() == {
            name: {"id": [1, 2, 3], "name": ["a", "b", "c"]}[name] for name in made.schema.names
        }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": pa.array([1, None, 3]), "name": pa.array(["a", "b", "c"])}, "'id': is required but 1"),
        ({"id": pa.array([1.0, 2.5, 3.0]), "name": pa.array(["a", "b", "c"])}, "'id': row 1 holds 2.5"),
    ],
)
def test_what_is_wrong_in_a_key_is_told(columns: dict[str, Any], message: str) -> None:
    """As for upserts."""
    batch = pa.record_batch({"x": UNION, **columns})
    with pytest.raises(InvalidRequest, match=message) as caught:
        deleted(write_stream(batch.schema, [batch]))
    assert caught.value.code is ErrorCode.INVALID_BATCH


def test_a_message_of_another_shape_is_refused() -> None:
    """Nodes and buffers are counted before any of them is picked."""
    one = pa.record_batch({"x": pa.array([1]), "id": pa.array([1]), "name": ["a"]})
    other = pa.record_batch({"x": pa.array(["1"]), "id": pa.array([1]), "name": ["a"]})
    schema, *_ = write_stream(one.schema, [])
    _, message = write_stream(other.schema, [other])
    with pytest.raises(InvalidRequest, match="field nodes") as caught:
        deleted([schema, message])
    assert caught.value.code is ErrorCode.INVALID_BATCH
