"""Which types a table can have, and which values fit where."""

from __future__ import annotations

import pyarrow as pa
import pytest

from arka.flight.canonical import UnsupportedType, canonical_type, widens
from arka.iceberg.schema import arrow_schema, new_iceberg_schema

UTC = pa.timestamp("us", "UTC")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (pa.int8(), pa.int32()),
        (pa.int16(), pa.int32()),
        (pa.uint8(), pa.int32()),
        (pa.uint16(), pa.int32()),
        (pa.uint32(), pa.int64()),
        (pa.uint64(), pa.decimal128(20, 0)),
        (pa.float16(), pa.float32()),
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.large_binary(), pa.binary()),
        (pa.binary_view(), pa.binary()),
        (pa.dictionary(pa.int8(), pa.large_string()), pa.string()),
        (pa.decimal32(5, 2), pa.decimal128(5, 2)),
        (pa.decimal256(38, 2), pa.decimal128(38, 2)),
        (pa.date64(), pa.date32()),
        (pa.time32("s"), pa.time64("us")),
        (pa.time64("ns"), pa.time64("us")),
        (pa.timestamp("s"), pa.timestamp("us")),
        (pa.timestamp("ns"), pa.timestamp("us")),
        (pa.timestamp("ms", "Europe/Paris"), UTC),
        (pa.timestamp("us", "+00:00"), UTC),
        (pa.uuid(), pa.uuid()),
        (pa.json_(), pa.string()),
        (pa.bool8(), pa.int32()),
        (pa.large_list(pa.int8()), pa.list_(pa.int32())),
        (pa.list_(pa.int8(), 3), pa.list_(pa.int32())),
        (pa.list_view(pa.int8()), pa.list_(pa.int32())),
        (pa.large_list_view(pa.string_view()), pa.list_(pa.string())),
        (pa.run_end_encoded(pa.int32(), pa.float16()), pa.float32()),
        (pa.timestamp("us", "-08:00"), UTC),
        (pa.timestamp("us", "America/Argentina/Ushuaia"), UTC),
        (pa.map_(pa.large_string(), pa.uint32()), pa.map_(pa.string(), pa.int64())),
        (pa.struct([("a", pa.float16())]), pa.struct([("a", pa.float32())])),
    ],
)
def test_each_type_has_one_canonical_form(given: pa.DataType, expected: pa.DataType) -> None:
    """What a client declares becomes what an Iceberg table can hold."""
    assert canonical_type(given) == expected
    assert canonical_type(expected) == expected


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (pa.duration("s"), "int64 with microseconds"),
        (pa.month_day_nano_interval(), "use int64"),
        (pa.null(), "name the type"),
        (pa.timestamp("us", "Mars/Base"), "expected UTC, an offset such as +05:30, or a name"),
        (pa.timestamp("us", "+24:00"), "unknown time zone '+24:00'"),
        (pa.timestamp("us", "+01:60"), "unknown time zone '+01:60'"),
        (pa.timestamp("us", "europe/paris"), "unknown time zone 'europe/paris'"),
        (pa.list_view(pa.duration("s")), "int64 with microseconds"),
        (pa.run_end_encoded(pa.int32(), pa.duration("s")), "int64 with microseconds"),
        (pa.dense_union([pa.field("a", pa.int64())]), "struct"),
        (pa.decimal256(40, 2), "at most 38 digits"),
        (pa.decimal128(5, -2), "scale must be from 0"),
        (pa.decimal128(5, 7), "scale must be from 0"),
        (pa.struct([]), "at least one field"),
        (pa.struct([("a", pa.int64()), ("A", pa.int64())]), "two fields are named 'A'"),
        (pa.struct([("", pa.int64())]), "no name"),
        (pa.binary(0), "at least 1 byte"),
        (pa.list_(pa.int64(), 0), "at least 1"),
        (pa.dictionary(pa.int8(), pa.list_(pa.int64())), "nested values"),
        (pa.list_(pa.duration("s")), "int64 with microseconds"),
    ],
)
def test_a_type_without_a_form_is_refused_with_one_to_use(given: pa.DataType, advice: str) -> None:
    """Nothing that the catalog or the Parquet writer would refuse later gets through (R17)."""
    with pytest.raises(UnsupportedType) as caught:
        canonical_type(given)
    assert advice in str(caught.value)


def test_canonical_types_are_the_catalogs() -> None:
    """What this calls canonical survives the way to Iceberg and back."""
    types = [
        pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.binary(), pa.binary(4),
        pa.uuid(), pa.decimal128(20, 0), pa.date32(), pa.time64("us"), pa.timestamp("us"), UTC,
        pa.list_(pa.int32()), pa.map_(pa.string(), pa.int64()), pa.struct([("a", pa.int64())]),
    ]  # fmt: skip
    schema = pa.schema([pa.field(f"c{i}", canonical_type(type_)) for i, type_ in enumerate(types)])
    assert arrow_schema(new_iceberg_schema(schema)).types == schema.types


@pytest.mark.parametrize(
    ("source", "target", "fits"),
    [
        (pa.int32(), pa.int64(), True),
        (pa.int64(), pa.int32(), False),
        (pa.float32(), pa.float64(), True),
        (pa.float64(), pa.float32(), False),
        (pa.int32(), pa.float64(), False),
        (pa.int32(), pa.decimal128(10, 0), True),
        (pa.int32(), pa.decimal128(10, 1), False),
        (pa.int64(), pa.decimal128(19, 0), True),
        (pa.decimal128(10, 2), pa.decimal128(12, 4), True),
        (pa.decimal128(10, 2), pa.decimal128(12, 5), False),
        (pa.decimal128(10, 2), pa.decimal128(38, 1), False),
        (pa.date32(), pa.timestamp("us"), False),
        (pa.timestamp("us"), UTC, False),
        (pa.string(), pa.binary(), False),
        (pa.binary(16), pa.uuid(), True),
        (pa.binary(15), pa.uuid(), False),
    ],
)
def test_only_what_always_fits_widens(source: pa.DataType, target: pa.DataType, fits: bool) -> None:
    """A conversion is accepted only if no value of the source is lost (protocol 6)."""
    assert widens(source, target) is fits
