"""A batch over more partitions than ``limits.partitions`` is refused before its ack (R32)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka._core.transforms import count_partitions, parse_transform, split_batch
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.options import Limits
from arka.records import Operation
from arka.testing.ipcstreams import make_table, write_stream

LIMIT = 100
LIMITS = Limits(partitions=LIMIT)
Decode = Callable[..., DecodedBatch]


def spec(*transforms: str) -> tuple[tuple[str, str], ...]:
    return tuple(("v", text) for text in transforms)


def numbers(rows: int) -> pa.Array:
    return pa.array(np.arange(rows))


@pytest.mark.parametrize(
    ("column", "transforms", "count"),
    [
        (numbers(LIMIT + 1), ("identity",), LIMIT + 1),
        (numbers(5_000), ("bucket[1000]",), 993),
        (pa.array([f"user-{n}" for n in range(400)]), ("identity",), 400),
        (pa.array([f"user-{n}" for n in range(400)]), ("truncate[7]", "bucket[2]"), 130),
        (pa.array([dt.date(2000, 1, 1) + dt.timedelta(days=n) for n in range(101)]), ("day",), 101),
        (numbers(200).cast(pa.timestamp("s")).cast(pa.timestamp("us")), ("identity",), 200),
        (numbers(200).cast(pa.int32()), ("identity",), 200),
        (pa.array([f"user-{n}" for n in range(400)]).dictionary_encode(), ("identity",), 400),
        (pa.array([None, *range(LIMIT)]), ("identity",), LIMIT + 1),
    ],
)
def test_a_batch_over_too_many_partitions_is_refused(
    decode: Decode, column: pa.Array, transforms: tuple[str, ...], count: int
) -> None:
    """The refusal names the number of partitions and the limit, whatever the types, transforms and encodings are."""
    kind = column.type.value_type if isinstance(column.type, pa.DictionaryType) else column.type
    schema = pa.schema([("v", kind), ("w", pa.int64())])
    batch = pa.record_batch([column, numbers(len(column))], names=["v", "w"])
    table: dict[str, Any] = {"partition": spec(*transforms)}
    with pytest.raises(InvalidRequest, match=rf"{count} partitions, the limit is {LIMIT}") as caught:
        decode(schema, batch, limits=LIMITS, **table)
    assert caught.value.code is ErrorCode.INVALID_BATCH


@pytest.mark.parametrize(
    ("column", "transform"),
    [
        (numbers(LIMIT), "identity"),
        (numbers(50_000), "bucket[100]"),
        (pa.array([n % LIMIT for n in range(10_000)]), "identity"),
        (pa.array([f"user-{n}" for n in range(10_000)]), "truncate[6]"),
        (numbers(10_000).cast(pa.timestamp("s")).cast(pa.timestamp("us")), "day"),
    ],
)
def test_a_batch_within_the_limit_is_taken(decode: Decode, column: pa.Array, transform: str) -> None:
    """Rows do not count, partitions do; a batch with no more rows than the limit is not looked at."""
    schema = pa.schema([("v", column.type)])
    made = decode(schema, pa.record_batch([column], names=["v"]), limits=LIMITS, partition=spec(transform))
    assert made.rows == len(column)


def test_each_batch_of_a_stream_is_counted() -> None:
    """The second batch with the same header is counted as well, although Arrow is not asked again."""
    table = make_table(pa.schema([("v", pa.int64())]), partition=spec("identity"))
    decoder = BatchDecoder(table, LIMITS)
    rows = [n % 10 for n in range(500)]
    few, many = (pa.record_batch([pa.array(values)], names=["v"]) for values in (rows, range(500)))
    schema, *batches = write_stream(few.schema, [few, few, many])
    decoder.set_schema(schema.header)
    assert [decoder.decode(message).rows for message in batches[:2]] == [500, 500]
    with pytest.raises(InvalidRequest, match="500 partitions"):
        decoder.decode(batches[2])


def test_many_rows_are_counted_in_a_thread() -> None:
    """Counting many rows of a partitioned table does not hold trio's thread up; of others nothing is counted."""
    batch = pa.record_batch([numbers(40_000)], names=["v"])
    for partition, threaded in ((spec("bucket[8]"), True), ((), False)):
        decoder = BatchDecoder(make_table(batch.schema, partition=partition), LIMITS)
        schema, message = write_stream(batch.schema, [batch])
        decoder.set_schema(schema.header)
        assert decoder.needs_thread(message) is threaded


def test_deletes_are_not_counted() -> None:
    """A delete makes no file for each partition of its keys."""
    schema = pa.schema([pa.field("v", pa.int64(), nullable=False)])
    table = make_table(schema, partition=spec("identity"), key_columns=["v"])
    decoder = BatchDecoder(table, LIMITS)
    batch = pa.record_batch([numbers(500)], names=["v"])
    message, rows = write_stream(batch.schema, [batch])
    decoder.set_schema(message.header)
    assert decoder.decode(rows, Operation.DELETE).rows == 500


@given(st.lists(st.none() | st.integers(-50, 50) | st.integers(-(2**63), 2**63 - 1)), st.sampled_from((3, 100)))
def test_as_many_are_counted_as_are_made(values: list[int | None], width: int) -> None:
    """The count is the number of parts that the encoder splits the batch into."""
    batch = pa.record_batch([pa.array(values, pa.int64())], names=["v"])
    fields = [(0, parse_transform(f"bucket[{width}]")), (0, parse_transform("identity"))]
    assert count_partitions(batch, fields) == len(split_batch(batch, fields))
