"""The grammar of types: what clients may write, and that what Arka writes reads back."""

from __future__ import annotations

import contextlib
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka.flight.datatypes import MAX_DEPTH, TypeSpelling, parse_type, type_name
from arka.flight.sqlwords import sql_hint

ENTRIES = {
    "name": "entries",
    "nullable": False,
    "data_type": {
        "Struct": [
            {"name": "keys", "data_type": "Utf8", "nullable": False},
            {"name": "values", "data_type": "Int32", "nullable": True},
        ]
    },
}
ITEM = {"name": "item", "data_type": "Int64", "nullable": True, "dict_id": 0, "metadata": {}}


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("int64", pa.int64()),
        ("Int64", pa.int64()),
        ("UInt8", pa.uint8()),
        ("utf8", pa.string()),
        ("string", pa.string()),
        ("Utf8", pa.string()),
        ("LargeUtf8", pa.large_string()),
        ("float64", pa.float64()),
        ("double", pa.float64()),
        ("Float32", pa.float32()),
        ("bool", pa.bool_()),
        ("Boolean", pa.bool_()),
        ("date32", pa.date32()),
        ("date32[day]", pa.date32()),
        ("binary", pa.binary()),
        ("fixed_size_binary[16]", pa.binary(16)),
        ("FixedSizeBinary(16)", pa.binary(16)),
        ("uuid", pa.uuid()),
        ("extension<arrow.uuid>", pa.uuid()),
        ("timestamp[us]", pa.timestamp("us")),
        ("timestamp[us, tz=UTC]", pa.timestamp("us", "UTC")),
        ("timestamp[ns, tz=+05:30]", pa.timestamp("ns", "+05:30")),
        ("Timestamp", pa.timestamp("us")),
        ("Timestamp(Microsecond, None)", pa.timestamp("us")),
        ('Timestamp(Millisecond, Some("UTC"))', pa.timestamp("ms", "UTC")),
        ("decimal128(10, 2)", pa.decimal128(10, 2)),
        ("Decimal128(10,2)", pa.decimal128(10, 2)),
        ("decimal(7)", pa.decimal128(7, 0)),
        ("time64[us]", pa.time64("us")),
        ("list<int64>", pa.list_(pa.int64())),
        ("list<item: int64>", pa.list_(pa.int64())),
        ("list<item: int64 not null>", pa.list_(pa.field("item", pa.int64(), nullable=False))),
        ("large_list<item: string>", pa.large_list(pa.string())),
        ("fixed_size_list<item: int32>[3]", pa.list_(pa.int32(), 3)),
        ("list<timestamp[us, tz=+00:00]>", pa.list_(pa.timestamp("us", "+00:00"))),
        (
            "struct<a: int64, b: string not null>",
            pa.struct([("a", pa.int64()), pa.field("b", pa.string(), nullable=False)]),
        ),
        ('struct<"a: b": int64>', pa.struct([("a: b", pa.int64())])),
        ("struct<first name: utf8>", pa.struct([("first name", pa.string())])),
        ("map<string, int64>", pa.map_(pa.string(), pa.int64())),
        ("map<string, int64, keys_sorted>", pa.map_(pa.string(), pa.int64())),
        ("map<string ('k'), int64 ('v')>", pa.map_(pa.string(), pa.int64())),
        ("dictionary<values=string, indices=int32, ordered=0>", pa.dictionary(pa.int32(), pa.string())),
        (" list < struct < a : int64 > > ", pa.list_(pa.struct([("a", pa.int64())]))),
        ({"Timestamp": ["Microsecond", None]}, pa.timestamp("us")),
        ({"Timestamp": ["Nanosecond", "Europe/Paris"]}, pa.timestamp("ns", "Europe/Paris")),
        ({"Decimal128": [10, 2]}, pa.decimal128(10, 2)),
        ({"FixedSizeBinary": 16}, pa.binary(16)),
        ({"Time64": "Microsecond"}, pa.time64("us")),
        ({"Time32": "Second"}, pa.time32("s")),
        ({"Duration": "Second"}, pa.duration("s")),
        ({"List": ITEM}, pa.list_(pa.int64())),
        ({"LargeList": ITEM}, pa.large_list(pa.int64())),
        ({"FixedSizeList": [ITEM, 3]}, pa.list_(pa.int64(), 3)),
        ({"Struct": [{"name": "x", "data_type": "Utf8", "nullable": False}]},
         pa.struct([pa.field("x", pa.string(), nullable=False)])),
        ({"Map": [ENTRIES, False]}, pa.map_(pa.string(), pa.int32())),
        ({"Dictionary": ["Int32", "Utf8"]}, pa.dictionary(pa.int32(), pa.string())),
    ],
)  # fmt: skip
def test_each_documented_spelling_is_read(spelled: object, expected: pa.DataType) -> None:
    """Pyarrow's and arrow-rs's spellings of a type name the same Arrow type (protocol 5)."""
    assert parse_type(spelled) == expected


def test_nullability_inside_a_nested_type_is_kept() -> None:
    """``not null`` below the top is part of the type."""
    type_ = parse_type("map<utf8, int64 not null>")
    assert not type_.item_field.nullable
    assert not parse_type({"Map": [ENTRIES, False]}).key_field.nullable


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("int63", "expected a type such as int32"),
        ("", "expected a type"),
        (5, "expected a type name"),
        (None, "expected a type name"),
        ({}, "expected a type name or an object of one key"),
        ({"a": 1, "b": 2}, "object of one key"),
        ({"Int64": {}}, "expected a type"),
        ("list<int64", "expected '>'"),
        ("list<int64>>", "expected the end"),
        ("struct<a>", "field 'name: type'"),
        ("map<utf8>", "expected ','"),
        ("decimal128", "takes (precision, scale)"),
        ("decimal128(39, 2)", "from 1 to 38"),
        ("decimal128(x, 2)", "whole number"),
        ("timestamp[xx]", "unit of s, ms, us or ns"),
        ("time64[ms]", "us or ns"),
        ("int64[3]", "takes no arguments"),
        ("extension<arrow.opaque>", "unknown extension type"),
        ({"Struct": [{"data_type": "Int64"}]}, "name and data_type"),
        ({"Struct": [{"name": "a", "data_type": "Int64", "nullable": "yes"}]}, "nullable must be"),
        ({"Map": [ITEM, False]}, "struct of key and value"),
        ("fixed_size_binary[9999999999]", "out of range"),
    ],
)
def test_what_is_no_type_is_refused_with_what_is(spelled: object, message: str) -> None:
    """An error says what stands there and what is expected."""
    with pytest.raises(TypeSpelling) as caught:
        parse_type(spelled)
    assert message in str(caught.value)


@pytest.mark.parametrize("spelled", ["list<" * 5000, "list<" * 40 + "int64" + ">" * 40])
def test_deep_nesting_is_refused_before_the_stack_ends(spelled: str) -> None:
    """No type, however deep, exhausts the interpreter's stack."""
    with pytest.raises(TypeSpelling, match="deeper"):
        parse_type(spelled)


def test_deep_serde_objects_are_refused() -> None:
    """The same holds for nested objects."""
    spelled: object = "Int64"
    for _ in range(MAX_DEPTH + 2):
        spelled = {"List": {"name": "item", "data_type": spelled}}
    with pytest.raises(TypeSpelling, match="deeper"):
        parse_type(spelled)


LEAVES = st.sampled_from(
    [
        pa.int32(), pa.int64(), pa.uint8(), pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.binary(),
        pa.binary(7), pa.uuid(), pa.date32(), pa.time64("us"), pa.timestamp("us"), pa.timestamp("ns", "UTC"),
        pa.decimal128(38, 10), pa.large_string(), pa.string_view(), pa.float16(), pa.duration("ms"),
    ]
)  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)


def _fields(types: st.SearchStrategy[pa.DataType]) -> st.SearchStrategy[pa.Field]:
    return st.builds(pa.field, NAMES, types, st.booleans())


TYPES = st.recursive(
    LEAVES,
    lambda types: st.one_of(
        st.builds(pa.list_, _fields(types)),
        st.builds(pa.large_list, _fields(types)),
        st.lists(_fields(types), max_size=4).map(pa.struct),
        st.builds(pa.map_, types, _fields(types)),
    ),
    max_leaves=8,
)


@given(TYPES)
def test_what_is_written_reads_back(type_: pa.DataType) -> None:
    """``parse_type(type_name(t))`` is t, whatever the names in it."""
    assert parse_type(type_name(type_)) == type_


@given(st.text(max_size=60))
def test_no_text_is_read_other_than_as_a_type_or_an_error(text: str) -> None:
    """Garbage parses or raises TypeSpelling, nothing else."""
    with contextlib.suppress(TypeSpelling):
        parse_type(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["Int64", "Second"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["List", "Struct", "Map", "Decimal128", "Timestamp", "name", "data_type", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(JSON)
def test_no_json_is_read_other_than_as_a_type_or_an_error(value: object) -> None:
    """The same for arrow-rs's objects."""
    with contextlib.suppress(TypeSpelling):
        parse_type(value)


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("interval", "int64 with microseconds"),
        ("INTERVAL", "int64 with microseconds"),
        ("interval day to second", "int64 with microseconds"),
        ("list<interval>", "int64 with microseconds"),
        ({"Interval": "YearMonth"}, "int64 with microseconds"),
        ("Interval(DayTime)", "int64 with microseconds"),
        ("double precision", "use float64"),
        ("character varying", "use utf8"),
        ("character varying(255)", "use utf8"),
        ("CHARACTER LARGE OBJECT", "use utf8"),
        ("numeric(10,2)", "use decimal128(precision, scale)"),
        ("timestamp without time zone", "use timestamp[us]"),
        ("timestamp(6) without time zone", "use timestamp[us]"),
        ("timestamp with time zone", "use timestamp[us, tz=UTC]"),
        ("timestamp(3)", "use timestamp[us]"),
        ("timestamptz", "use timestamp[us, tz=UTC]"),
        ("time without time zone", "use time64[us]"),
        ("time", "use time64[us]"),
        ("date", "use date32"),
        ("bigint", "use int64"),
        ("smallint", "use int32"),
        ("real", "use float32"),
        ("bytea", "use binary"),
        ("bit varying(3)", "use binary"),
        ("fixed[16]", "use fixed_size_binary[width]"),
        ("ARRAY", "use list<int64>"),
        ("USER-DEFINED", "use utf8"),
        ("struct<a: bigint>", "use int64"),
        ("map<varchar, int64>", "use utf8"),
    ],
)
def test_words_of_sql_are_refused_with_arrows(word: Any, instead: str) -> None:
    """None is guessed at: what is read is what was spelled, or an error that says what to use."""
    with pytest.raises(TypeSpelling) as caught:
        parse_type(word)
    assert instead in str(caught.value)


def test_a_column_may_have_the_name_of_a_word() -> None:
    """The hint is for types that cannot be read, not for names in those that can."""
    assert parse_type("struct<date: date32, interval: int64>") == pa.struct(
        [("date", pa.date32()), ("interval", pa.int64())]
    )
    assert sql_hint("no such word") is None
