"""Which Arrow types a table can have, and which of them hold the values of which others.

Owns: the canonical type of each Arrow type (what an Iceberg v2 table can hold), and the lossless
widenings between canonical types. Does not own spellings (``datatypes``) nor values (``convert``).

Source: Iceberg table spec, "Schemas and Data Types"; protocol 6.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final
from zoneinfo import available_timezones

import pyarrow as pa

from arka.errors import cut, quote
from arka.flight.datatypes import type_name
from arka.flight.layout import is_list_like

_UTC_MICROS: Final = pa.timestamp("us", tz="UTC")

#: Decimal digits that any value of an integer type fits in.
_DIGITS: Final[dict[pa.DataType, int]] = {pa.int32(): 10, pa.int64(): 19}

#: Most digits of an Iceberg decimal.
_MAX_PRECISION: Final = 38


#: A zone that is an offset from UTC, as Arrow has them.
_OFFSET: Final = re.compile(r"[+-]([0-9]{2}):?([0-9]{2})\Z")


class UnsupportedType(ValueError):
    """No table can have this type; the message says what to use instead."""


def canonical_type(type_: pa.DataType) -> pa.DataType:
    """Return the type as which a table holds values of ``type_``.

    int32, int64, float32, float64, bool, utf8, binary, fixed_size_binary(n), uuid, decimal128(p, s),
    date32, time64[us], timestamp[us], timestamp[us, UTC] stand for themselves; lists, structs and maps of
    canonical types likewise, with the child names ``element``, ``key`` and ``value``. An instant is UTC whatever
    zone it is shown in; the zone itself is not kept.

    Args:
        type_: any Arrow type.

    Returns:
        The canonical type. Each value of ``type_`` has a place in it, except where it is finer than a
        microsecond or, in a decimal256, longer than 38 digits: that is for each batch to show.

    Raises:
        UnsupportedType: there is none.
    """
    scalar = _canonical_scalar(type_)
    if scalar is not None:
        return scalar
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return type_ if type_ == pa.uuid() else canonical_type(type_.storage_type)
    if types.is_dictionary(type_):
        if types.is_nested(type_.value_type) or types.is_dictionary(type_.value_type):
            raise UnsupportedType(f"{cut(type_name(type_))}: a dictionary of nested values; send the values plain")
        return canonical_type(type_.value_type)
    if types.is_decimal(type_):
        return _canonical_decimal(type_)
    if types.is_fixed_size_binary(type_):
        if type_.byte_width < 1:
            raise UnsupportedType(f"{type_name(type_)}: must be at least 1 byte wide")
        return type_
    if types.is_run_end_encoded(type_):
        return canonical_type(type_.value_type)
    if is_list_like(type_):
        if types.is_fixed_size_list(type_) and type_.list_size < 1:
            raise UnsupportedType(f"{cut(type_name(type_))}: the size must be at least 1")
        return pa.list_(_canonical_child(type_.value_field, "element"))
    if types.is_struct(type_):
        return _canonical_struct(type_)
    if types.is_map(type_):
        key = _canonical_child(type_.key_field, "key").with_nullable(False)
        return pa.map_(key, _canonical_child(type_.item_field, "value"))
    raise UnsupportedType(f"{cut(type_name(type_))} has no place in an Iceberg table; {_advice(type_)}")


def _canonical_scalar(type_: pa.DataType) -> pa.DataType | None:
    types = pa.types
    if type_ in (pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16()):
        return pa.int32()
    if type_ in (pa.int64(), pa.uint32()):
        return pa.int64()
    if type_ == pa.uint64():
        return pa.decimal128(20, 0)
    if types.is_floating(type_):
        return pa.float64() if type_ == pa.float64() else pa.float32()
    if types.is_boolean(type_):
        return type_
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return pa.string()
    if types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_):
        return pa.binary()
    if types.is_date(type_):
        return pa.date32()
    if types.is_time(type_):
        return pa.time64("us")
    if types.is_timestamp(type_):
        if type_.tz is None:
            return pa.timestamp("us")
        _check_zone(type_)
        return _UTC_MICROS
    return None


def _check_zone(type_: pa.DataType) -> None:
    """Check that a timestamp's zone exists: values are instants whatever it is, but no reader could show them in it."""
    offset = _OFFSET.match(type_.tz)
    known = int(offset[1]) < 24 and int(offset[2]) < 60 if offset else type_.tz in _zones()
    if not known:
        raise UnsupportedType(
            f"{cut(type_name(type_))}: unknown time zone {quote(type_.tz)}: expected UTC, an offset such as +05:30, "
            "or a name of the IANA time zone database such as Europe/Paris; a table holds and returns "
            "timestamp[us, tz=UTC]"
        )


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones()) | {"UTC", "Etc/UTC", "GMT", "Z"}


def declared_type(type_: pa.DataType) -> pa.DataType:
    """Return the canonical type of a column that a client asks for: one that loses nothing of any value.

    Streams may send finer types: there each value can be looked at.

    Raises:
        UnsupportedType: there is none; it says what to use instead.
    """
    canonical = canonical_type(type_)
    _check_units(type_)
    return canonical


def _check_units(type_: pa.DataType) -> None:
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    if (types.is_timestamp(type_) or types.is_time64(type_)) and type_.unit == "ns":
        micros = pa.time64("us") if types.is_time64(type_) else pa.timestamp("us", type_.tz)
        raise UnsupportedType(
            f"{type_name(type_)}: a table of format version 2 holds microseconds, which would cut nanoseconds off; "
            f"use {type_name(micros)}, or int64 for nanoseconds since 1970"
        )
    if types.is_dictionary(type_) or types.is_run_end_encoded(type_):
        _check_units(type_.value_type)
    elif types.is_map(type_):
        _check_units(type_.key_type)
        _check_units(type_.item_type)
    elif types.is_struct(type_):
        for child in type_:
            _check_units(child.type)
    elif is_list_like(type_):
        _check_units(type_.value_type)


def _canonical_decimal(type_: pa.DataType) -> pa.DataType:
    precision, scale = type_.precision, type_.scale
    if precision > _MAX_PRECISION:
        raise UnsupportedType(f"{type_name(type_)}: Iceberg decimals have at most {_MAX_PRECISION} digits")
    if not 0 <= scale <= precision:
        raise UnsupportedType(f"{type_name(type_)}: the scale must be from 0 to the precision, {precision}")
    return pa.decimal128(precision, scale)


def _canonical_child(field: pa.Field, name: str) -> pa.Field:
    return pa.field(name, canonical_type(field.type), nullable=field.nullable)


def _canonical_struct(type_: pa.DataType) -> pa.DataType:
    if type_.num_fields == 0:
        raise UnsupportedType("struct<>: a struct needs at least one field")
    names: set[str] = set()
    for child in type_:
        check_field_name(child.name)
        if child.name.lower() in names:
            raise UnsupportedType(f"{cut(type_name(type_))}: two fields are named {child.name!r}, case aside")
        names.add(child.name.lower())
    return pa.struct([_canonical_child(child, child.name) for child in type_])


#: Longest field name in characters: longer ones make Parquet footers and manifests unwieldy.
MAX_NAME: Final = 255


def check_field_name(name: str) -> None:
    """Check that a column or nested field may have this name.

    Raises:
        UnsupportedType: it is empty, too long, or has characters that cannot be printed.
    """
    if not name:
        raise UnsupportedType("a field has no name")
    if len(name) > MAX_NAME:
        raise UnsupportedType(f"the name {name[:40]!r}... has {len(name)} characters, at most {MAX_NAME} are legal")
    if not name.isprintable():
        raise UnsupportedType(f"the name {quote(name)} has characters that cannot be printed")


def _advice(type_: pa.DataType) -> str:
    types = pa.types
    if types.is_duration(type_):
        return "use int64 with microseconds"
    if types.is_null(type_):
        return "name the type of the values to come, such as utf8"
    if types.is_interval(type_) or "interval" in str(type_):
        return "use int64, or a struct of months, days and microseconds"
    if types.is_union(type_):
        return "use a struct with one nullable field per member"
    return "use one of int32, int64, float32, float64, bool, utf8, binary, date32, time64[us], timestamp[us]"


def by_value(source: pa.DataType, target: pa.DataType) -> bool:
    """Tell whether numbers are taken batch by batch, where every one is exact: integers as float64, floats as int64.

    Args:
        source: as sent, not nested. What widens to int64 or float64 goes where these go.
        target: canonical.
    """
    types = pa.types
    if types.is_integer(source) and source != pa.uint64():
        # Up to 16 bits all are exact in a float32, which has 24.
        return bool(target == pa.float64() or (target == pa.float32() and source.bit_width <= 16))
    return bool(types.is_floating(source) and target == pa.int64())


def widens(source: pa.DataType, target: pa.DataType) -> bool:
    """Tell whether each value of ``source`` is a value of ``target``: two canonical, not nested types."""
    if source == target:
        return True
    if source == pa.int32() and target == pa.int64():
        return True
    if source == pa.float32() and target == pa.float64():
        return True
    if pa.types.is_decimal128(target):
        whole = target.precision - target.scale
        if source in _DIGITS:
            return bool(whole >= _DIGITS[source])
        if pa.types.is_decimal128(source):
            return bool(target.scale >= source.scale and whole >= source.precision - source.scale)
    sixteen = pa.binary(16)
    return {source, target} == {sixteen, pa.uuid()}


__all__ = ["MAX_NAME", "UnsupportedType", "by_value", "canonical_type", "check_field_name", "declared_type", "widens"]
