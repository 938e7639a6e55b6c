"""CreateTable's JSON, and the same grammar back for DescribeTable (protocol 5).

Owns: the request's shape, its names, keys and partition spec, and what each error says. Does not own how
types are spelled (``datatypes``), which of them a table can have (``canonical``) nor what the catalog
makes of the definition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import pyarrow as pa

from arka._core.rowkeys import is_key_type
from arka._core.transforms import parse_transform
from arka.errors import ErrorCode, InvalidRequest, cut, listed, quote
from arka.flight.canonical import UnsupportedType, check_field_name, declared_type
from arka.flight.datatypes import MAX_FIELDS, FieldCount, TypeSpelling, parse_type, type_name
from arka.flight.properties import check_properties, check_text
from arka.records import (
    FIELD_ID_KEY,
    PartitionRequest,
    TableDefinition,
    TableInfo,
    TableName,
    TableType,
)
from arka.tableproperties import KEYED_ONLY

#: Most bytes of a CreateTable request.
MAX_BODY_BYTES: Final = 16 * 1024 * 1024
#: Most commas, braces and brackets of one, those in texts included: each may stand for a value that takes 64 bytes and
#: more once it is decoded. A field of arrow-rs's spelling has eight.
MAX_MARKS: Final = 250_000
#: Most fields of a partition spec.
MAX_PARTITION_FIELDS: Final = 1_000
#: Longest full name of a nested field, and longest transform, in characters.
_MAX_PATH: Final = 4096
_MAX_TRANSFORM: Final = 256
#: Iceberg numbers partition fields from here.
_FIRST_PARTITION_ID: Final = 1000
_MAX_ID: Final = 2**31 - 1
#: The metadata that an Iceberg column keeps: its doc.
_DOC: Final = "doc"

_TABLE_TYPES: Final = {kind.value.replace("_", ""): kind for kind in TableType}
_PLAIN_TRANSFORMS: Final = frozenset({"identity", "year", "month", "day", "hour"})
_SIZED_TRANSFORMS: Final = frozenset({"bucket", "truncate"})
_SIZED: Final = re.compile(r"\s*([A-Za-z]+)\s*(?:\[\s*(\S+?)\s*\]|\(\s*(\S+?)\s*\))\s*\Z")
_TRANSFORM_WORDS: Final = "Identity, Year, Month, Day, Hour, Bucket(N), Truncate(N)"


class _Field(msgspec.Struct):
    """One field of ``schema_json``."""

    name: str
    type: Any = None
    data_type: Any = None
    nullable: bool | None = None
    metadata: dict[str, str] | None = None


class _Schema(msgspec.Struct):
    """``schema_json``."""

    fields: list[_Field]
    metadata: Any = None


class _PartitionField(msgspec.Struct):
    """One field of ``partition_spec``."""

    source_id: int
    transform: str | dict[str, Any]
    field_id: int | None = None
    name: str | None = None


class _PartitionSpec(msgspec.Struct):
    """``partition_spec``; its ``spec_id`` is the catalog's to give."""

    fields: list[_PartitionField] = []


class _CreateTable(msgspec.Struct):
    """The body of a CreateTable action."""

    name: str
    schema_json: str | dict[str, Any]
    table_type: str | None = None
    primary_key: str | list[str] | None = None
    partition_spec: str | dict[str, Any] | None = None
    properties: dict[str, str] | None = None


def parse_create_table(body: bytes) -> TableDefinition:
    """Read and check the body of a CreateTable action.

    Args:
        body: UTF-8 JSON; unknown fields are ignored.

    Returns:
        The definition with canonical types. Key columns are required columns whatever the request says,
        since no row can have a null key.

    Raises:
        InvalidRequest: naming the field, what was found and what is expected.
    """
    if len(body) > MAX_BODY_BYTES:
        raise InvalidRequest(
            f"CreateTable: a body of {len(body)} bytes, at most {MAX_BODY_BYTES} are legal", code=ErrorCode.TOO_LARGE
        )
    marks = sum(map(body.count, (b",", b"{", b"[")))
    if marks > MAX_MARKS:
        raise InvalidRequest(
            f"CreateTable: the body has {marks} commas, braces and brackets, at most {MAX_MARKS} are legal",
            code=ErrorCode.TOO_LARGE,
        )
    try:
        request = msgspec.json.decode(body, type=_CreateTable)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"Malformed CreateTable request: {cut(str(error))}") from error
    name = TableName.parse(request.name)
    table_type = _parse_table_type(request.table_type)
    schema = _parse_schema(request.schema_json)
    keys = _parse_keys(request.primary_key, table_type, schema)
    if keys:
        required = set(keys)
        schema = pa.schema([field.with_nullable(False) if field.name in required else field for field in schema])
    properties = check_properties(request.properties or {})
    if table_type is not TableType.PRIMARY_KEY:
        for word in sorted(KEYED_ONLY & properties.keys()):
            raise InvalidRequest(f"properties: {word!r} has a meaning for primary_key tables only; leave it out")
    return TableDefinition(
        name=name,
        schema=schema,
        table_type=table_type,
        key_columns=keys,
        partition=_parse_partition(request.partition_spec, schema),
        properties=properties,
    )


def _parse_table_type(word: str | None) -> TableType:
    if word is None:
        return TableType.APPEND_ONLY
    found = _TABLE_TYPES.get(cut(word).replace("_", "").lower())
    if found is None:
        raise InvalidRequest(f"table_type is {quote(word)}, expected append_only or primary_key")
    return found


# -- schema ---------------------------------------------------------------------------------------


def _parse_schema(value: str | dict[str, Any]) -> pa.Schema:
    parsed: _Schema = _decode_part("schema_json", value, _Schema)
    if not parsed.fields:
        raise InvalidRequest("schema_json: 'fields' is empty, expected at least one column")
    if parsed.metadata:
        raise InvalidRequest("schema_json: metadata of the schema is not kept; put it into the table's properties")
    count = FieldCount()
    fields = [_parse_field(position, item, count) for position, item in enumerate(parsed.fields)]
    names: dict[str, str] = {}
    for field in fields:
        key = field.name.lower()
        if key in names:
            raise InvalidRequest(
                f"schema_json: columns {names[key]!r} and {field.name!r} have the same name, case aside"
            )
        names[key] = field.name
    schema = pa.schema(fields)
    _check_paths(schema)
    return schema


def _parse_field(position: int, item: _Field, count: FieldCount) -> pa.Field:
    where = f"schema_json: column {quote(item.name)}" if item.name else f"schema_json: fields[{position}]"
    spelled = item.type if item.type is not None else item.data_type
    try:
        count.add()
    except TypeSpelling as error:
        raise InvalidRequest(f"schema_json: {error}") from error
    try:
        check_field_name(item.name)
        if spelled is None:
            raise InvalidRequest(f"{where} has no type: expected 'type' or 'data_type'")
        type_ = declared_type(parse_type(spelled, count))
    except (TypeSpelling, UnsupportedType) as error:
        raise InvalidRequest(f"{where}: {error}") from error
    # Field ids are the catalog's to give (R24); a schema that was read from a Parquet file has some.
    metadata = {key: value for key, value in (item.metadata or {}).items() if key.encode() != FIELD_ID_KEY}
    others = sorted(metadata.keys() - {_DOC})
    if others:
        raise InvalidRequest(
            f"{where}: metadata {listed(map(quote, others))} is not kept: an Iceberg column has one text, "
            f"under {_DOC!r}; leave the others out, or put them into the table's properties"
        )
    check_text(metadata.get(_DOC, ""), where, f"its {_DOC!r}")
    return pa.field(item.name, type_, nullable=item.nullable is not False, metadata=metadata or None)


def _check_paths(schema: pa.Schema) -> None:
    """Check that no two fields have one full name, and that there are not too many.

    Iceberg knows a nested field by its path with dots, which a column's own name may spell too.
    """
    seen: set[str] = set()
    waiting: list[tuple[str, pa.Field]] = [(field.name, field) for field in schema]
    while waiting:
        path, field = waiting.pop()
        if len(path) > _MAX_PATH:
            raise InvalidRequest(
                f"schema_json: a field's full name has more than {_MAX_PATH} characters: {quote(path)}"
            )
        if path.lower() in seen:
            raise InvalidRequest(f"schema_json: two fields have the full name {quote(path)}; rename one of them")
        seen.add(path.lower())
        if len(seen) > MAX_FIELDS:
            raise InvalidRequest(f"schema_json: more than {MAX_FIELDS} fields, nested ones included")
        type_ = field.type
        if pa.types.is_map(type_):
            waiting += [(f"{path}.key", type_.key_field), (f"{path}.value", type_.item_field)]
        elif pa.types.is_list(type_):
            waiting.append((f"{path}.element", type_.value_field))
        elif pa.types.is_struct(type_):
            waiting += [(f"{path}.{child.name}", child) for child in type_]


def _parse_keys(value: str | list[str] | None, table_type: TableType, schema: pa.Schema) -> tuple[str, ...]:
    keys = [value] if isinstance(value, str) and value else list(value or [])
    if table_type is TableType.APPEND_ONLY:
        if keys:
            raise InvalidRequest(
                f"primary_key is {listed(map(quote, keys))} but table_type is append_only: "
                "set table_type to primary_key or leave the key out"
            )
        return ()
    if not keys:
        raise InvalidRequest("primary_key is missing: a primary_key table needs at least one key column")
    types = {field.name: field.type for field in schema}
    seen: set[str] = set()
    for key in keys:
        type_ = types.get(key)
        if type_ is None:
            raise InvalidRequest(f"primary_key: no column {quote(key)}, expected one of {listed(types)}")
        if key in seen:
            raise InvalidRequest(f"primary_key: column {key!r} appears twice")
        seen.add(key)
        if not is_key_type(type_):
            raise InvalidRequest(
                f"primary_key: column {key!r} is {cut(type_name(type_))}, which cannot be a key; "
                "expected an integer, decimal, string, binary, boolean, date or time column"
            )
    return tuple(keys)


# -- partition spec -------------------------------------------------------------------------------


def _parse_partition(value: str | dict[str, Any] | None, schema: pa.Schema) -> tuple[PartitionRequest, ...]:
    if value is None or value == "":
        return ()
    parsed: _PartitionSpec = _decode_part("partition_spec", value, _PartitionSpec)
    if len(parsed.fields) > MAX_PARTITION_FIELDS:
        raise InvalidRequest(f"partition_spec: {len(parsed.fields)} fields, at most {MAX_PARTITION_FIELDS} are legal")
    made = _Partitions(schema)
    for position, item in enumerate(parsed.fields):
        made.add(_parse_partition_field(position, item, schema))
    return tuple(made.fields)


def _parse_partition_field(position: int, item: _PartitionField, schema: pa.Schema) -> PartitionRequest:
    where = f"partition_spec: field {quote(item.name)}" if item.name else f"partition_spec: fields[{position}]"
    if not 0 <= item.source_id < len(schema):
        raise InvalidRequest(
            f"{where}: source_id is {item.source_id}, expected a column's index from 0 to {len(schema) - 1}"
        )
    source = schema.field(item.source_id)
    try:
        transform = _spell_transform(item.transform)
        parse_transform(transform).check_source(source.type)
    except ValueError as error:
        raise InvalidRequest(
            f"{where} on column {source.name!r} ({cut(type_name(source.type))}): {cut(str(error))}"
        ) from error
    if item.field_id is not None and not _FIRST_PARTITION_ID <= item.field_id <= _MAX_ID:
        raise InvalidRequest(
            f"{where}: field_id is {item.field_id}, expected a number from {_FIRST_PARTITION_ID} or none"
        )
    name = item.name or _default_name(source.name, transform)
    try:
        check_field_name(name)
    except UnsupportedType as error:
        raise InvalidRequest(f"{where}: {error}") from error
    return PartitionRequest(item.source_id, item.field_id, name, transform)


class _Partitions:
    """The fields of a partition spec; each is held against those before it by its name, id and meaning."""

    def __init__(self, schema: pa.Schema) -> None:
        self.fields: list[PartitionRequest] = []
        self._schema = schema
        self._columns = {column.name.lower(): index for index, column in enumerate(schema)}
        self._names: set[str] = set()
        self._ids: set[int] = set()
        self._meanings: dict[tuple[int, str], str] = {}

    def add(self, request: PartitionRequest) -> None:
        """Add a field.

        Raises:
            InvalidRequest: it cannot stand beside one before it, or beside a column.
        """
        folded, meaning = request.name.lower(), (request.source_index, request.transform)
        if folded in self._names:
            raise InvalidRequest(f"partition_spec: two fields are named {request.name!r}; rename one of them")
        if request.field_id in self._ids:
            raise InvalidRequest(f"partition_spec: two fields have field_id {request.field_id}")
        if meaning in self._meanings:
            raise InvalidRequest(
                f"partition_spec: fields {self._meanings[meaning]!r} and {request.name!r} are the same: "
                f"{request.transform} of column {self._schema.field(request.source_index).name!r}"
            )
        column = self._columns.get(folded)
        if column is not None and not (request.transform == "identity" and column == request.source_index):
            raise InvalidRequest(
                f"partition_spec: field {request.name!r} has the name of a column; only identity of that "
                f"column may; choose another, such as {request.name + '_part'!r}"
            )
        self._names.add(folded)
        if request.field_id is not None:
            self._ids.add(request.field_id)
        self._meanings[meaning] = request.name
        self.fields.append(request)


def _spell_transform(value: str | Mapping[str, Any]) -> str:
    """Bring a transform into Iceberg's spelling: ``day``, ``bucket[16]``.

    Raises:
        ValueError: what was found and what is legal.
    """
    size: object = None
    if isinstance(value, str):
        if len(value) > _MAX_TRANSFORM:
            raise ValueError(f"unknown transform {quote(value)}, expected one of {_TRANSFORM_WORDS}")
        sized = _SIZED.match(value)
        word = sized.group(1) if sized else value.strip()
        if sized:
            digits = sized.group(2) or sized.group(3)
            size = int(digits) if re.fullmatch(r"[0-9]{1,10}", digits) else digits
    else:
        if len(value) != 1:
            raise ValueError(f"transform is {quote(dict(value))}, expected one of {_TRANSFORM_WORDS}")
        word, size = next(iter(value.items()))
    word = cut(word).lower()
    if word in _PLAIN_TRANSFORMS:
        if size is not None:
            raise ValueError(f"transform {word} takes no number, found {quote(size)}")
        return word
    if word not in _SIZED_TRANSFORMS:
        raise ValueError(f"unknown transform {quote(value)}, expected one of {_TRANSFORM_WORDS}")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= _MAX_ID:
        raise ValueError(f"transform {word} takes a whole number from 1 to {_MAX_ID}, found {quote(size)}")
    return f"{word}[{size}]"


def _default_name(column: str, transform: str) -> str:
    """Name a partition field as Iceberg libraries do: ``ts_day``, ``id_bucket``, ``name_trunc``."""
    word = transform.partition("[")[0]
    if word == "identity":
        return column
    return f"{column}_{'trunc' if word == 'truncate' else word}"


def _decode_part(name: str, value: str | dict[str, Any], kind: Any) -> Any:
    """Decode a part that is a JSON string or a nested object."""
    try:
        if isinstance(value, str):
            return msgspec.json.decode(value, type=kind)
        return msgspec.convert(value, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"Malformed {name}: {cut(str(error))}") from error


# -- and back -------------------------------------------------------------------------------------


def describe_schema(schema: pa.Schema) -> dict[str, Any]:
    """Spell a schema as ``schema_json`` has it, so that CreateTable takes it again.

    Args:
        schema: canonical Arrow types; Iceberg field ids are given apart from other metadata.
    """
    fields: list[dict[str, Any]] = []
    for field in schema:
        item: dict[str, Any] = {
            "name": field.name,
            "type": type_name(field.type),
            "nullable": field.nullable,
        }
        metadata = dict(field.metadata or {})
        field_id = metadata.pop(FIELD_ID_KEY, None)
        if field_id is not None:
            item["field_id"] = int(field_id)
        if metadata:
            item["metadata"] = {
                key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, value in metadata.items()
            }
        fields.append(item)
    return {"fields": fields}


def describe_partition(table: TableInfo) -> dict[str, Any]:
    """Spell a table's partition spec as ``partition_spec`` has it.

    Args:
        table: its columns carry field ids.

    Returns:
        The spec; ``source_id`` is the column's index, or null where the source is a nested field, which
        only another Iceberg client can have made.
    """
    indices = {
        int(field.metadata[FIELD_ID_KEY]): index
        for index, field in enumerate(table.schema)
        if field.metadata and FIELD_ID_KEY in field.metadata
    }
    return {
        "spec_id": table.spec_id,
        "fields": [
            {
                "source_id": indices.get(field.source_id),
                "field_id": field.field_id,
                "name": field.name,
                "transform": field.transform,
            }
            for field in table.partition
        ],
    }


__all__ = ["MAX_BODY_BYTES", "MAX_FIELDS", "describe_partition", "describe_schema", "parse_create_table"]
