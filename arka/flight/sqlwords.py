"""The words of other type systems, and what they are called here (protocol 5).

Owns: the hint in the refusal of a type that SQL, Iceberg or a database spells in its own way. None of these words is
taken as it stands: ``float`` has 32 bits in Arrow and 64 in SQL, ``int8`` 8 and 64, so a guess would be wrong for some.
"""

from __future__ import annotations

import re
from typing import Final

#: By the word as information_schema, a dialect or Iceberg has it, without its arguments: the type to use.
_WORDS: Final[dict[str, str]] = {
    **dict.fromkeys(("bigint", "long", "int64_t", "bigserial", "serial8", "hugeint"), "int64"),
    **dict.fromkeys(("integer", "int", "int4", "mediumint", "serial"), "int32"),
    **dict.fromkeys(("smallint", "tinyint", "int2", "short", "byte"), "int32"),
    **dict.fromkeys(("real", "float4"), "float32"),
    **dict.fromkeys(("double precision", "float8", "number"), "float64"),
    **dict.fromkeys(("numeric", "dec", "money", "smallmoney", "bignumeric"), "decimal128(precision, scale)"),
    **dict.fromkeys(
        (
            "character varying", "varchar", "varchar2", "nvarchar", "nvarchar2", "character", "char", "bpchar", "nchar",
            "national character", "national character varying", "character large object", "clob", "text", "tinytext",
            "mediumtext", "longtext", "ntext", "citext", "name", "json", "jsonb", "xml", "enum", "set", "user-defined",
            "inet", "cidr", "macaddr", "tsvector", "tsquery", "variant",
        ),
        "utf8",
    ),
    **dict.fromkeys(
        (
            "bytea", "binary varying", "varbinary", "binary large object", "blob", "tinyblob", "mediumblob", "longblob",
            "image", "raw", "bytes", "bit varying", "varbit", "geometry", "geography",
        ),
        "binary",
    ),
    **dict.fromkeys(("bit", "logical"), "bool"),
    "fixed": "fixed_size_binary[width]",
    **dict.fromkeys(("uniqueidentifier", "guid"), "uuid"),
    "date": "date32",
    **dict.fromkeys(("time", "time without time zone"), "time64[us]"),
    **dict.fromkeys(("time with time zone", "timetz"), "time64[us] for the time in UTC"),
    **dict.fromkeys(
        ("timestamp without time zone", "timestamp_ntz", "datetime", "datetime2", "smalldatetime", "timestamp"),
        "timestamp[us]",
    ),
    **dict.fromkeys(
        (
            "timestamp with time zone", "timestamp with local time zone", "timestamptz", "timestamp_tz",
            "timestamp_ltz", "datetimeoffset",
        ),
        "timestamp[us, tz=UTC]",
    ),
    **dict.fromkeys(("timestamp_ns", "timestamp_s", "timestamp_ms"), "timestamp[us]"),
    "timestamptz_ns": "timestamp[us, tz=UTC]",
    "interval": "int64 with microseconds, or utf8",
    "year": "int32",
    "array": "list<int64> with the elements' type",
    "row": "struct<a: int64, b: utf8> with the fields' types",
    "record": "struct<a: int64, b: utf8> with the fields' types",
}  # fmt: skip
_ARGUMENTS: Final = re.compile(r"\s*\([^()]*\)")
#: Longer words first: "timestamp without time zone" before "timestamp".
_ANY: Final = re.compile(
    r"(?<![\w-])(" + "|".join(re.escape(word) for word in sorted(_WORDS, key=len, reverse=True)) + r")(?![\w-])"
)


def sql_hint(text: str) -> str | None:
    """Return what to write instead of another system's word in a type that could not be read; None if there is none.

    Args:
        text: as the client wrote it; its first 1,000 characters are looked at.
    """
    plain = " ".join(_ARGUMENTS.sub(" ", text[:1000]).lower().split())
    found = _ANY.search(plain)
    return None if found is None else f"{found[1]!r} is not a word of Arrow: use {_WORDS[found[1]]}"


__all__ = ["sql_hint"]
