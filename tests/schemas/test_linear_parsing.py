"""CreateTable is read in linear time, and counts what it makes while it parses (T24)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from arka.errors import DETAIL_CHARACTERS, ErrorCode, InvalidRequest
from arka.flight import schemas
from arka.flight.datatypes import MAX_FIELDS, FieldCount, TypeSpelling, parse_type
from arka.flight.schemas import MAX_MARKS, MAX_PARTITION_FIELDS, parse_create_table
from tests.linecount import lines_run

COLUMNS = [{"name": "a", "type": "int64"}]
REFUSALS = (InvalidRequest, TypeSpelling)


def create(fields: list[Any] | None = None, **more: Any) -> Callable[[], object]:
    body = json.dumps({"name": "t", "schema_json": {"fields": COLUMNS if fields is None else fields}, **more}).encode()
    return lambda: parse_create_table(body)


def columns(count: int) -> list[Any]:
    return [{"name": f"c{number}", "type": "int8"} for number in range(count)]


def spec(count: int, **more: Any) -> dict[str, Any]:
    fields = [{"source_id": number, "transform": "Identity", **more} for number in range(count)]
    return {"fields": fields}


#: What a request is made of, by how much of it there is.
REQUESTS: dict[str, Callable[[int], Callable[[], object]]] = {
    "struct": lambda n: create([{"name": "a", "type": f"struct<{','.join(f'a{i}:int8' for i in range(n))}>"}]),
    "extensions": lambda n: create(
        [{"name": "a", "type": f"struct<{','.join(f'a{i}:extension<arrow.uuid>' for i in range(n))}>"}]
    ),
    "arguments": lambda n: create(
        [{"name": "a", "type": f"struct<{','.join(f'a{i}:timestamp[us, tz=UTC]' for i in range(n))}>"}]
    ),
    "objects": lambda n: create(
        [{"name": "a", "type": {"Struct": [{"name": f"a{i}", "data_type": "Int8"} for i in range(n)]}}]
    ),
    "columns": lambda n: create(columns(n)),
    "twice": lambda n: create(columns(n) + columns(1)),
    "keys": lambda n: create(columns(n), table_type="primary_key", primary_key=[f"c{i}" for i in range(n)]),
    "no such keys": lambda n: create(columns(n), table_type="primary_key", primary_key=["x" for i in range(n)]),
    "partitions": lambda n: create(columns(n), partition_spec=spec(n)),
    "partitions of one name": lambda n: create(columns(n), partition_spec=spec(n, name="p")),
    "properties": lambda n: create(properties={f"write.metadata.metrics.column.c{i}": "none" for i in range(n)}),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_four_times_as_much_is_four_times_the_work(what: str) -> None:
    """Each way to make a request long costs what its length says."""
    small, large = (lines_run(REQUESTS[what](count), *REFUSALS) for count in (200, 800))
    assert large < 6 * small + 1000, f"{small} lines, then {large}"


@pytest.mark.parametrize(
    "text",
    [
        f"struct<{','.join(f'a{i}:int8' for i in range(60_000))}>",
        "struct<" + ",".join("a:list<b:int8>" for _ in range(MAX_FIELDS)) + ">",
        "struct<a:" + " " * 4_000_000 + "int64>",
        "struct<a" + " " * 500_000 + "b" + " " * 500_000 + ":int64",
        "struct<" + " " * 1_000_000,
        'struct<"' + '\\"' * 500_000,
        'dictionary<values="' + '"' * 1_000_000,
        "decimal" + "(" * 1_000_000,
        "decimal(" + "1," * 500_000,
        "timestamp[us, tz=" + "x" * 1_000_000 + "]",
        "extension<" + "x" * 1_000_000 + ">",
        "list<" * 200_000,
        "struct<" + "('" * 500_000,
        "int8" + "('" * 500_000,
        "x" * 1_000_000,
        "not null " * 100_000,
    ],
    ids=lambda text: f"{text[:20].strip()}-{len(text)}",
)
def test_long_texts_are_refused_in_bounded_steps(text: str) -> None:
    """What is quadratic does not come to its end here; the error holds a beginning of the text."""
    lines = lines_run(lambda: parse_type(text), *REFUSALS)
    assert lines < 100 * MAX_FIELDS
    with pytest.raises(TypeSpelling) as caught:
        parse_type(text)
    assert len(str(caught.value)) < 4096


def test_fields_are_counted_over_all_columns() -> None:
    """1,000 columns of 100 fields stop at the first field too many."""
    wide = "struct<" + ",".join(f"a{j}:int8" for j in range(100)) + ">"
    request = create([{"name": f"c{i}", "type": wide} for i in range(1000)])
    assert lines_run(request, *REFUSALS) < 200 * MAX_FIELDS
    with pytest.raises(InvalidRequest, match=f"more than {MAX_FIELDS} fields, nested ones included"):
        request()
    with pytest.raises(InvalidRequest, match=f"more than {MAX_FIELDS} fields"):
        create(columns(MAX_FIELDS + 1))()
    create(columns(MAX_FIELDS))()
    with pytest.raises(TypeSpelling, match="more than 2 fields"):
        parse_type("struct<a: int8, b: list<int8>>", FieldCount(2))
    parse_type("struct<a: int8, b: list<int8>>", FieldCount(3))


def test_values_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB of empty lists would be 350 MB of objects."""

    def decode(*_arguments: object, **_options: object) -> object:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(schemas.msgspec.json, "decode", decode)
    for value in (b"[],", b"{},", b"1,"):
        body = b'{"name":"t","schema_json":{"fields":[' + value * (MAX_MARKS // 2 + 1) * 2
        with pytest.raises(InvalidRequest, match="commas, braces and brackets") as caught:
            parse_create_table(body)
        assert caught.value.code is ErrorCode.TOO_LARGE


def test_a_spec_has_a_bounded_number_of_fields() -> None:
    """100,000 partition fields are refused by their number."""
    with pytest.raises(InvalidRequest, match=f"30000 fields, at most {MAX_PARTITION_FIELDS} are legal"):
        create(partition_spec={"fields": [{"source_id": 0, "transform": "Day"}] * 30_000})()


#: 100 kB with escapes, characters of several bytes, and what cannot be printed.
LONG = '\0\\"é\U0001f600\U000e0001' * 17_000


@pytest.mark.parametrize(
    "more",
    [
        {"name": LONG},
        {"name": ".".join(["x"] * 100_000)},
        {"table_type": LONG},
        {"primary_key": LONG},
        {"primary_key": [LONG], "table_type": "primary_key"},
        {"primary_key": ["x" * 100] * 1000, "table_type": "append_only"},
        {"properties": {LONG: "v"}},
        {"properties": {"comment": LONG}},
        {"properties": {"write.parquet.compression-codec": "x" * 60_000}},
        {"partition_spec": {"fields": [{"source_id": 0, "transform": LONG}]}},
        {"partition_spec": {"fields": [{"source_id": 0, "transform": {LONG: LONG}}]}},
        {"partition_spec": {"fields": [{"source_id": 0, "transform": {"bucket": LONG}}]}},
        {"partition_spec": {"fields": [{"source_id": 0, "transform": "Day", "name": LONG}]}},
        {"partition_spec": LONG},
        {"schema_json": LONG},
        {"schema_json": {"fields": [{"name": LONG, "type": "int64"}]}},
        {"schema_json": {"fields": [{"name": "a", "type": LONG}]}},
        {"schema_json": {"fields": [{"name": "a", "type": {LONG: LONG}}]}},
        {"schema_json": {"fields": [{"name": "a", "type": {"Struct": LONG}}]}},
        {"schema_json": {"fields": [{"name": "a", "type": {"Struct": [{"name": LONG, "data_type": "x"}]}}]}},
        {"schema_json": {"fields": [{"name": "a", "type": {"Timestamp": ["Second", LONG]}}]}},
        {"schema_json": {"fields": [{"name": "a", "type": {"Timestamp": [LONG] * 3}}]}},
        {"schema_json": {"fields": [{"name": "a", "type": {"Decimal128": [LONG, 1]}}]}},
        {"schema_json": {"fields": [{"name": "a", "type": {"Map": [{"name": "x", "data_type": "Int8"}, LONG]}}]}},
        {"schema_json": {"fields": [{"name": "a", "type": [[LONG] * 10] * 3}]}},
        {"schema_json": {"fields": [{"name": "a", "type": f"struct<{json.dumps(LONG)}: int8>"}]}},
        {"schema_json": {"fields": [{"name": "a", "type": "struct<" + ",".join(["a: int8"] * 5000) + ">"}]}},
        {"schema_json": {"fields": [{"name": "a", "type": "int8", "metadata": {LONG: "x"}}]}},
        {"schema_json": {"fields": [{"name": "a", "type": "int8", "metadata": {f"k{i}": "x" for i in range(9000)}}]}},
    ],
    ids=lambda more: next(iter(more)) + "-" + json.dumps(next(iter(more.values())))[-40:],
)
def test_errors_hold_a_kilobyte_of_a_text(more: dict[str, Any]) -> None:
    """Whatever field holds the text, it is refused, and the error is short."""
    with pytest.raises(InvalidRequest) as caught:
        create(**more)()
    assert len(caught.value.detail.encode()) < 5000 < DETAIL_CHARACTERS
