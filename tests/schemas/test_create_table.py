"""CreateTable's body: what it means, and what each mistake is told."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arka.errors import ErrorCode, InvalidRequest
from arka.flight.schemas import (
    MAX_BODY_BYTES,
    describe_partition,
    describe_schema,
    parse_create_table,
)
from arka.records import PartitionRequest, TableDefinition, TableName, TableType
from arka.testing.ipcstreams import make_table

FIELDS = [
    {"name": "id", "type": "int64", "nullable": False},
    {"name": "name", "type": "utf8"},
    {"name": "email", "data_type": "Utf8"},
    {"name": "signup", "data_type": {"Timestamp": ["Microsecond", None]}},
    {"name": "score", "type": "float64"},
]


def body(**changes: Any) -> bytes:
    request: dict[str, Any] = {"name": "users", "schema_json": {"fields": FIELDS}, **changes}
    return json.dumps({key: value for key, value in request.items() if value is not ...}).encode()


def fails(message: str, **changes: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_create_table(body(**changes))
    assert message in caught.value.detail
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def parse_fields(*fields: dict[str, Any]) -> pa.Schema:
    return parse_create_table(body(schema_json={"fields": list(fields)})).schema


def test_the_seeds_example_works_as_written() -> None:
    """The README's CreateTable: a JSON string of a schema, one key, one day partition."""
    request = {
        "name": "users",
        "schema_json": json.dumps({"fields": FIELDS}),
        "primary_key": "id",
        "table_type": "primary_key",
        "partition_spec": {
            "spec_id": 1,
            "fields": [{"source_id": 3, "field_id": 1000, "name": "signup_day", "transform": "Day"}],
        },
    }
    made = parse_create_table(json.dumps(request).encode())
    assert made == TableDefinition(
        name=TableName("default", "users"),
        schema=pa.schema(
            [
                pa.field("id", pa.int64(), nullable=False),
                ("name", pa.string()),
                ("email", pa.string()),
                ("signup", pa.timestamp("us")),
                ("score", pa.float64()),
            ]
        ),
        table_type=TableType.PRIMARY_KEY,
        key_columns=("id",),
        partition=(PartitionRequest(3, 1000, "signup_day", "day"),),
    )


@pytest.mark.parametrize("word", ["append_only", "AppendOnly", "APPEND_ONLY", "appendonly", ...])
def test_append_only_in_each_spelling(word: Any) -> None:
    """Enum words are read in any case; append-only is what a table is unless told otherwise."""
    assert parse_create_table(body(table_type=word)).table_type is TableType.APPEND_ONLY


@pytest.mark.parametrize("word", ["primary_key", "PrimaryKey", "PRIMARY_KEY"])
@pytest.mark.parametrize("key", ["name", ["name"], ["id", "name"]])
def test_a_key_makes_its_columns_required(word: str, key: Any) -> None:
    """A nullable key column is legal to ask for: no row can have a null key, so it becomes required."""
    made = parse_create_table(body(table_type=word, primary_key=key))
    assert made.key_columns == tuple([key] if isinstance(key, str) else key)
    assert not made.schema.field("name").nullable


def test_nothing_given_is_nothing_set() -> None:
    """Nulls and empty strings stand for absent members."""
    made = parse_create_table(body(primary_key="", partition_spec=None, properties=None, table_type=None))
    assert (made.key_columns, made.partition, dict(made.properties)) == ((), (), {})


def test_nullable_and_metadata_are_read() -> None:
    """Columns are nullable unless they say not; metadata is kept, field ids are the catalog's."""
    schema = parse_fields(
        {"name": "a", "type": "int32", "metadata": {"doc": "first", "PARQUET:field_id": "7"}, "x": 1},
        {"name": "b", "type": "int32", "nullable": False},
    )
    assert schema.field("a").nullable
    assert schema.field("a").metadata == {b"doc": b"first"}
    assert not schema.field("b").nullable


NANOS: list[Any] = [
    "timestamp[ns]",
    "timestamp[ns, tz=UTC]",
    "Timestamp(Nanosecond, None)",
    {"Timestamp": ["Nanosecond", None]},
    {"Timestamp": ["Nanosecond", "Europe/Paris"]},
    "time64[ns]",
    {"Time64": "Nanosecond"},
    "list<timestamp[ns]>",
    "fixed_size_list<time64[ns]>[2]",
    "struct<a: int64, b: list<timestamp[ns]>>",
    "map<utf8, timestamp[ns]>",
    "map<time64[ns], int64>",
    "dictionary<values=timestamp[ns], indices=int32>",
    "large_list_view<timestamp[ns, tz=UTC]>",
    {"List": {"name": "item", "data_type": {"Timestamp": ["Nanosecond", None]}, "nullable": True}},
]


@pytest.mark.parametrize("type_", NANOS, ids=str)
@pytest.mark.parametrize("kind", ["append_only", "primary_key"])
def test_nanoseconds_are_refused_with_what_to_use(type_: Any, kind: str) -> None:
    """A table of format version 2 would cut them off: nobody finds out later, value by value (protocol 5)."""
    fields = [{"name": "k", "type": "int64"}, {"name": "x", "type": type_}]
    for position in (fields, fields[::-1]):
        with pytest.raises(InvalidRequest) as caught:
            parse_create_table(
                body(
                    schema_json={"fields": position}, primary_key="k" if kind == "primary_key" else "",
                    partition_spec=None, properties=None, table_type=kind,
                )
            )  # fmt: skip
        assert "column 'x'" in caught.value.detail
        wanted = "time64[us]" if "ime64" in str(type_) else "timestamp[us"
        assert f"use {wanted}" in caught.value.detail


def test_a_nanosecond_key_is_refused() -> None:
    """As any other column."""
    fields = [{"name": "k", "type": "timestamp[ns]"}]
    with pytest.raises(InvalidRequest, match="column 'k'"):
        parse_create_table(
            body(schema_json={"fields": fields}, primary_key="k", partition_spec=None, table_type="primary_key")
        )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"metadata": {"unit": "ms", "doc": "x"}}, "column 'a': metadata 'unit' is not kept"),
        ({"metadata": {"ARROW:extension:name": "geo"}}, "'ARROW:extension:name' is not kept"),
        (
            {"type": {"Struct": [{"name": "b", "data_type": "Int64", "metadata": {"unit": "ms"}}]}},
            "field 'b': metadata 'unit': nested fields keep none",
        ),
        (
            {"type": {"List": {"name": "item", "data_type": "Int64", "metadata": {"doc": "ms"}}}},
            "field 'item': metadata 'doc': nested fields keep none",
        ),
        ({"metadata": {"doc": "a\x00b"}}, "column 'a' has the character '\\x00' in its 'doc'"),
    ],
)
def test_metadata_that_would_be_lost_is_refused(field: dict[str, Any], message: str) -> None:
    """An Iceberg column keeps its doc and nothing else: all of what is taken comes back."""
    with pytest.raises(InvalidRequest) as caught:
        parse_fields({"name": "a", "type": "int64", **field})
    assert message in caught.value.detail


def test_metadata_of_the_schema_is_refused() -> None:
    """It has no place in the catalog; an empty one, as arrow-rs writes it, is none."""
    schema = {"fields": [{"name": "a", "type": "int64", "metadata": {}}]}
    made = parse_create_table(
        body(
            schema_json={**schema, "metadata": {}},
            primary_key="",
            partition_spec=None,
            table_type=None,
            properties=None,
        )
    )
    assert made.schema.metadata is None
    with pytest.raises(InvalidRequest, match="metadata of the schema is not kept"):
        parse_create_table(body(schema_json={**schema, "metadata": {"a": "b"}}, primary_key="", partition_spec=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ...}, "`name`"),
        ({"name": "a-b"}, "Illegal table name 'a-b'"),
        ({"name": 5}, "Expected `str`, got `int` - at `$.name`"),
        ({"schema_json": ...}, "`schema_json`"),
        ({"schema_json": "{"}, "Malformed schema_json"),
        ({"schema_json": {}}, "Malformed schema_json: Object missing required field `fields`"),
        ({"schema_json": {"fields": []}}, "at least one column"),
        ({"schema_json": {"fields": [{"type": "int64"}]}}, "`name` - at `$.fields[0]`"),
        ({"schema_json": {"fields": [{"name": "a"}]}}, "column 'a' has no type"),
        ({"schema_json": {"fields": [{"name": "", "type": "int64"}]}}, "fields[0]: a field has no name"),
        ({"schema_json": {"fields": [{"name": "a\n", "type": "int64"}]}}, "cannot be printed"),
        ({"schema_json": {"fields": [{"name": "a" * 256, "type": "int64"}]}}, "at most 255"),
        ({"schema_json": {"fields": [{"name": "a", "type": "int63"}]}}, "column 'a': cannot read 'int63'"),
        ({"schema_json": {"fields": [{"name": "a", "type": "duration[s]"}]}}, "use int64 with microseconds"),
        ({"schema_json": {"fields": [{"name": "a", "type": "null"}]}}, "column 'a': null has no place"),
        ({"schema_json": {"fields": [{"name": "a", "type": "int32", "nullable": 1}]}}, "nullable"),
        ({"schema_json": {"fields": [FIELDS[0], {"name": "ID", "type": "utf8"}]}}, "'id' and 'ID'"),
        (
            {"schema_json": {"fields": [{"name": "a.b", "type": "utf8"}, {"name": "a", "type": "struct<b: utf8>"}]}},
            "full name 'a.b'",
        ),
        ({"table_type": "lsm"}, "table_type is 'lsm', expected append_only or primary_key"),
        ({"primary_key": "id"}, "table_type is append_only"),
        ({"table_type": "primary_key"}, "primary_key is missing"),
        ({"table_type": "primary_key", "primary_key": []}, "primary_key is missing"),
        ({"table_type": "primary_key", "primary_key": "key"}, "no column 'key', expected one of id, name"),
        ({"table_type": "primary_key", "primary_key": ["id", "id"]}, "'id' appears twice"),
        ({"table_type": "primary_key", "primary_key": "score"}, "'score' is float64, which cannot be a key"),
        ({"table_type": "primary_key", "primary_key": 5}, "primary_key"),
        ({"properties": {"a": 1}}, "properties"),
        ({"properties": {"arka.x": "1"}}, "'arka.x' cannot be set"),
        ({"properties": {"arka.partial": "null"}}, "primary_key tables only"),
        ({"properties": {"write.metadata.metrics.default": "everything"}}, "expected none, counts"),
        ({"properties": {"write.py-location-provider.impl": "os.system"}}, "cannot be set"),
        ({"properties": {"write.data.path": "s3://elsewhere"}}, "cannot be set"),
        ({"properties": {"format-version": "3"}}, "'3', expected 2"),
        ({"properties": {"a": "x" * 70_000}}, "at most 65536"),
        ({"properties": {"": "x"}}, "no name"),
    ],
)
def test_each_mistake_names_what_was_found_and_expected(changes: dict[str, Any], message: str) -> None:
    """An error names the field, what stands there and what is legal."""
    fails(message, **changes)


def partition(**field: Any) -> dict[str, Any]:
    return {"partition_spec": {"fields": [{"source_id": 3, "transform": "Day", **field}]}}


@pytest.mark.parametrize(
    ("transform", "source", "expected", "name"),
    [
        ("Identity", 1, "identity", "name"),
        ("year", 3, "year", "signup_year"),
        ("MONTH", 3, "month", "signup_month"),
        ("Day", 3, "day", "signup_day"),
        ("hour", 3, "hour", "signup_hour"),
        ("Bucket(16)", 0, "bucket[16]", "id_bucket"),
        ("bucket[16]", 0, "bucket[16]", "id_bucket"),
        (" bucket [ 16 ] ", 0, "bucket[16]", "id_bucket"),
        ({"Bucket": 16}, 0, "bucket[16]", "id_bucket"),
        ("Truncate(4)", 1, "truncate[4]", "name_trunc"),
        ({"truncate": 4}, 1, "truncate[4]", "name_trunc"),
    ],
)
def test_transforms_in_each_spelling(transform: Any, source: int, expected: str, name: str) -> None:
    """Each transform has one canonical spelling; a field without a name gets Iceberg's usual one."""
    changes = partition(transform=transform, source_id=source)
    if name == "name":
        changes["partition_spec"]["fields"][0]["name"] = "name"
    assert parse_create_table(body(**changes)).partition == (PartitionRequest(source, None, name, expected),)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"source_id": 5}, "source_id is 5, expected a column's index from 0 to 4"),
        ({"source_id": -1}, "source_id is -1"),
        ({"source_id": "3"}, "source_id"),
        ({"transform": "decade"}, "unknown transform 'decade', expected one of Identity"),
        ({"transform": "Day(3)"}, "takes no number"),
        ({"transform": "bucket"}, "takes a whole number"),
        ({"transform": "bucket[0]"}, "from 1 to"),
        ({"transform": "bucket[-1]"}, "'-1'"),
        ({"transform": "bucket[x]"}, "'x'"),
        ({"transform": "bucket[99999999999]"}, "from 1 to"),
        ({"transform": {"Bucket": 2**31}}, "from 1 to"),
        ({"transform": {"Bucket": True}}, "True"),
        ({"transform": {"Bucket": 1, "Day": 2}}, "expected one of"),
        ({"transform": "Day", "source_id": 1}, "on column 'name' (utf8)"),
        ({"transform": "bucket[4]", "source_id": 4}, "on column 'score' (float64)"),
        ({"field_id": 7}, "field_id is 7, expected a number from 1000"),
        ({"name": "Signup"}, "has the name of a column"),
        ({"name": "a\tb"}, "cannot be printed"),
    ],
)
def test_each_partition_mistake_is_named(field: dict[str, Any], message: str) -> None:
    """Nothing that the catalog would refuse, or a file's partition fail on, gets through."""
    fails(message, **partition(**field))


def test_two_fields_of_one_spec_must_differ() -> None:
    """Names, ids and the pair of source and transform are unique in a spec."""
    day = {"source_id": 3, "transform": "Day", "name": "d", "field_id": 1000}
    for other, message in (
        ({**day, "transform": "Hour", "field_id": 1001}, "two fields are named 'd'"),
        ({**day, "transform": "Hour", "name": "h"}, "two fields have field_id 1000"),
        ({**day, "name": "e", "field_id": 1001}, "are the same"),
    ):
        fails(message, partition_spec={"fields": [day, other]})


def test_a_nested_column_is_no_partition_source() -> None:
    """A struct cannot be partitioned by, whatever the transform."""
    fields = [{"name": "s", "type": "struct<a: int64>"}]
    for transform in ("identity", "bucket[4]"):
        fails(
            "on column 's'",
            schema_json={"fields": fields},
            partition_spec={"fields": [{"source_id": 0, "transform": transform, "name": "p"}]},
        )


def test_partition_spec_may_be_a_json_string() -> None:
    """Like schema_json, the spec is taken as a string of JSON too."""
    spec = json.dumps(partition()["partition_spec"])
    assert parse_create_table(body(partition_spec=spec)).partition[0].transform == "day"


def test_known_properties_pass() -> None:
    """Listed properties pass if their values make sense."""
    properties = {
        "comment": "mine",
        "write.parquet.compression-codec": "ZSTD",
        "write.metadata.metrics.column.id": "truncate(8)",
        "format-version": "2",
    }
    assert parse_create_table(body(properties=properties)).properties == properties
    partial = body(table_type="primary_key", primary_key="id", properties={"arka.partial": "null"})
    assert parse_create_table(partial).properties == {"arka.partial": "null"}


def test_a_body_has_a_limit() -> None:
    """An action's body cannot make the server parse without end."""
    with pytest.raises(InvalidRequest, match="at most"):
        parse_create_table(b" " * (MAX_BODY_BYTES + 1))
    many = [{"name": f"c{i}", "type": "int32"} for i in range(10_001)]
    fails("more than 10000 fields", schema_json={"fields": many})


@given(st.binary(max_size=80))
def test_no_bytes_do_more_than_fail(data: bytes) -> None:
    """Garbage is an InvalidRequest and nothing else."""
    with pytest.raises(InvalidRequest):
        parse_create_table(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PARTS = st.sampled_from(["name", "schema_json", "table_type", "primary_key", "partition_spec", "properties"])


@given(PARTS, JSON)
def test_no_json_in_any_part_does_more_than_fail(part: str, value: Any) -> None:
    """Whatever stands in a member, the request is taken or refused as InvalidRequest."""
    try:
        parse_create_table(body(**{part: value}))
    except InvalidRequest as error:
        assert error.code is ErrorCode.INVALID_REQUEST  # noqa: PT017


SPELLINGS = st.recursive(
    st.sampled_from(
        ["int32", "int64", "utf8", "float64", "bool", "date32", "timestamp[us]", "timestamp[us, tz=UTC]",
         "decimal128(9, 2)", "binary", "fixed_size_binary[3]", "uuid", "time64[us]", "float32"]
    ),
    lambda inner: st.one_of(
        inner.map("list<{}>".format),
        inner.map("list<{} not null>".format),
        st.tuples(inner, inner).map(lambda two: "struct<a: {}, b: {} not null>".format(*two)),
        inner.map("map<utf8, {}>".format),
    ),
    max_leaves=5,
)  # fmt: skip


@given(st.lists(st.tuples(SPELLINGS, st.booleans()), min_size=1, max_size=6))
def test_describe_is_what_create_takes(columns: list[tuple[str, bool]]) -> None:
    """DescribeTable's schema, given to CreateTable, makes the same table."""
    fields = [{"name": f"c {i}", "type": type_, "nullable": n} for i, (type_, n) in enumerate(columns)]
    schema = parse_fields(*fields)
    described = describe_schema(make_table(schema).schema)
    assert parse_fields(*described["fields"]) == schema
    assert next(field["field_id"] for field in described["fields"]) == 1


def test_a_described_spec_is_what_create_takes() -> None:
    """DescribeTable's partition spec names columns by index, as CreateTable does."""
    schema = parse_create_table(body()).schema
    table = make_table(schema, partition=[("signup", "day"), ("id", "bucket[16]")])
    described = describe_partition(table)
    made = parse_create_table(body(partition_spec=described)).partition
    assert [(f.source_index, f.transform) for f in made] == [(3, "day"), (0, "bucket[16]")]
    assert [f.field_id for f in made] == [1000, 1001]
