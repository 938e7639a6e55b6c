"""The partition transforms as the Iceberg spec words them: slow, obvious, in plain Python.

Values are Iceberg's internal ones: ints for dates (days), times (microseconds) and timestamps (since
1970), Decimal, str, bytes (also for uuid), bool, float, None.
"""

from __future__ import annotations

import datetime as dt
import re
import struct
from decimal import Decimal

import pyarrow as pa

EPOCH = dt.date(1970, 1, 1)
#: The Gregorian calendar repeats itself after 400 years.
ERA_DAYS, ERA_YEARS = 146_097, 400
UNITS_PER_SECOND = {"us": 10**6, "ns": 10**9}


def murmur3_x86_32(data: bytes) -> int:
    """Hash with seed 0; unsigned."""

    def rotate(word: int, bits: int) -> int:
        return (word << bits | word >> (32 - bits)) & 0xFFFFFFFF

    def mix(block: int) -> int:
        return rotate(block * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF

    state = 0
    whole = len(data) // 4 * 4
    for start in range(0, whole, 4):
        state ^= mix(int.from_bytes(data[start : start + 4], "little"))
        state = (rotate(state, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    if data[whole:]:
        state ^= mix(int.from_bytes(data[whole:], "little"))
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        state ^= state >> shift
        state = state * factor & 0xFFFFFFFF
    return state


def unscaled(value: Decimal) -> int:
    sign, digits, _ = value.as_tuple()
    return int("".join(map(str, digits))) * (-1 if sign else 1)


def minimal_bytes(number: int) -> bytes:
    """Write a number as big-endian two's complement, trying lengths until it fits."""
    for length in range(1, 20):
        if -(1 << (8 * length - 1)) <= number < 1 << (8 * length - 1):
            return number.to_bytes(length, "big", signed=True)
    raise AssertionError(number)


def hashed_bytes(kind: pa.DataType, value: object) -> bytes:
    """Return what the spec's appendix B hashes."""
    if isinstance(value, Decimal):
        return minimal_bytes(unscaled(value))
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return struct.pack("<q", value // 1000)
    return struct.pack("<q", value)


def days_of(kind: pa.DataType, value: int) -> int:
    if pa.types.is_date(kind):
        return value
    return value // (86_400 * UNITS_PER_SECOND[kind.unit])


def year_and_month(days: int) -> tuple[int, int]:
    eras = days // ERA_DAYS
    date = EPOCH + dt.timedelta(days=days - eras * ERA_DAYS)
    return date.year + eras * ERA_YEARS, date.month


def largest_magnitude(kind: pa.DataType) -> int:
    """Return m such that no result may lie below -m."""
    if pa.types.is_decimal(kind):
        # Of the source's precision: a writer refuses a digit more.
        return int(10**kind.precision) - 1
    return 1 << (kind.bit_width - 1)


def truncate(kind: pa.DataType, width: int, value: object) -> object:
    if isinstance(value, str | bytes):
        return value[:width]
    number = unscaled(value) if isinstance(value, Decimal) else value
    result = number - number % width
    if result < -largest_magnitude(kind):
        raise OverflowError(f"{result} in {kind}")
    if not isinstance(value, Decimal):
        return result
    return Decimal((int(result < 0), tuple(map(int, str(abs(result)))), -kind.scale))


def transform(text: str, kind: pa.DataType, value: object) -> object:
    """Transform one value.

    Raises:
        OverflowError: the result cannot be represented in the result type.
    """
    if value is None:
        return None
    name, _, parameter = text.partition("[")
    size = int(re.sub(r"\D", "", parameter) or 0)
    if name == "identity":
        return value
    if name == "bucket":
        return (murmur3_x86_32(hashed_bytes(kind, value)) & 0x7FFFFFFF) % size
    if name == "truncate":
        return truncate(kind, size, value)
    if name == "hour":
        hour = value // (3600 * UNITS_PER_SECOND[kind.unit])
        if not -(2**31) <= hour < 2**31:
            raise OverflowError(hour)
        return hour
    days = days_of(kind, value)
    if name == "day":
        return days
    year, month = year_and_month(days)
    return year - 1970 if name == "year" else (year - 1970) * 12 + month - 1


def internal_values(array: pa.Array) -> list[object]:
    """Return an array's values in Iceberg's internal form."""
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if pa.types.is_date(array.type):
        array = array.view(pa.int32())
    elif pa.types.is_timestamp(array.type) or pa.types.is_time(array.type):
        array = array.view(pa.int64())
    return array.to_pylist()


def make_array(kind: pa.DataType, values: list[object]) -> pa.Array:
    """Build an array of ``kind`` from internal values."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    if pa.types.is_date(kind):
        return pa.array(values, pa.int32()).view(kind)
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        return pa.array(values, pa.int64()).view(kind)
    return pa.array(values, kind)


def partition_key(value: object) -> object:
    """Return what tells partitions apart: NaN is one value, -0.0 and 0.0 are two."""
    if isinstance(value, float):
        return "nan" if value != value else struct.pack("<d", value)
    return value


def split(
    columns: list[tuple[pa.DataType, list[object]]], texts: list[str]
) -> list[tuple[tuple[object, ...], list[int]]]:
    """Group rows by their transformed values: (values, row numbers), in order of appearance."""
    groups: dict[tuple[object, ...], tuple[tuple[object, ...], list[int]]] = {}
    for row in range(len(columns[0][1])):
        values = tuple(transform(text, kind, column[row]) for text, (kind, column) in zip(texts, columns, strict=True))
        groups.setdefault(tuple(map(partition_key, values)), (values, []))[1].append(row)
    return list(groups.values())
