"""Arrow types as clients spell them, and as Arka spells them back (protocol 5).

Owns: the grammar: pyarrow's ``str(type)``, pyarrow's aliases, and arrow-rs's serde and Display spellings.
Does not own which of these types a table can have (``arka.flight.canonical``).

A type is a string, or arrow-rs's JSON object of one key::

    type    = name [args] | nested
    args    = "[" words "]" | "(" words ")"
    nested  = ("list" | "large_list" | "list_view" | "large_list_view") "<" item ">"
            | "fixed_size_list" "<" item ">" "[" size "]"
            | "struct" "<" [named {"," named}] ">"
            | "map" "<" item "," item [", keys_sorted"] ">"
            | "dictionary" "<" "values=" type "," "indices=" type [", ordered=" digit] ">"
            | "extension" "<" name ">"
    item    = [field-name ":"] type ["('" field-name "')"] ["not null"]
    named   = field-name ":" type ["not null"]
    field-name = characters other than <>,:()[]" or a JSON string

Names of types are read in any case. Reading takes linear time, and what it makes is counted on the way (T24): texts,
arguments, levels and fields are bounded before they are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import pyarrow as pa

from arka.errors import cut, listed, quote
from arka.flight.sqlwords import sql_hint

#: Most arguments of a word of JSON.
_MOST_ARGUMENTS: Final = 8

#: Deepest nesting of a type: far above what tables have, far below Python's recursion limit.
MAX_DEPTH: Final = 32
#: Most fields of a table, nested ones included: each costs some 20 us of each commit's statistics.
MAX_FIELDS: Final = 10_000
#: Longest text of a type, in characters, and of the arguments of one word in it.
MAX_TEXT: Final = 1024 * 1024
MAX_ARGUMENTS: Final = 256

_SIMPLE: Final[dict[str, pa.DataType]] = {
    "null": pa.null(),
    "bool": pa.bool_(),
    "boolean": pa.bool_(),
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "uint32": pa.uint32(),
    "uint64": pa.uint64(),
    "float16": pa.float16(),
    "halffloat": pa.float16(),
    "float32": pa.float32(),
    "float": pa.float32(),
    "float64": pa.float64(),
    "double": pa.float64(),
    "utf8": pa.string(),
    "string": pa.string(),
    "str": pa.string(),
    "large_utf8": pa.large_string(),
    "largeutf8": pa.large_string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "utf8_view": pa.string_view(),
    "utf8view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "largebinary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "binaryview": pa.binary_view(),
    "date32": pa.date32(),
    "date64": pa.date64(),
    "time32": pa.time32("ms"),
    "time64": pa.time64("us"),
    "timestamp": pa.timestamp("us"),
    "duration": pa.duration("us"),
    "month_day_nano_interval": pa.month_day_nano_interval(),
    "uuid": pa.uuid(),
}
_UNITS: Final = {
    "s": "s",
    "second": "s",
    "ms": "ms",
    "millisecond": "ms",
    "us": "us",
    "microsecond": "us",
    "ns": "ns",
    "nanosecond": "ns",
    "day": "day",
}
_EXTENSIONS: Final[dict[str, Callable[[], pa.DataType]]] = {
    "arrow.uuid": pa.uuid,
    "arrow.json": pa.json_,
    "arrow.bool8": pa.bool8,
}
_DECIMALS: Final[dict[str, tuple[Callable[[int, int], pa.DataType], int]]] = {
    "decimal": (pa.decimal128, 38),
    "decimal32": (pa.decimal32, 9),
    "decimal64": (pa.decimal64, 18),
    "decimal128": (pa.decimal128, 38),
    "decimal256": (pa.decimal256, 76),
}
_LISTS: Final[dict[str, Callable[[pa.Field], pa.DataType]]] = {
    "list": pa.list_,
    "large_list": pa.large_list,
    "largelist": pa.large_list,
    "list_view": pa.list_view,
    "listview": pa.list_view,
    "large_list_view": pa.large_list_view,
    "largelistview": pa.large_list_view,
}
_SPACE: Final = re.compile(r"\s*")
_WORD: Final = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)")
_BARE_NAME: Final = re.compile(r'([^<>,:()\[\]"]+):')
_QUOTED_NAME: Final = re.compile(r'\s*("(?:[^"\\]|\\.)*")\s*:')
_CHILD_NAME: Final = re.compile(r"\s*\('([^']*)'\)")
_NOT_NULL: Final = re.compile(r"\s*not\s+null\b", re.IGNORECASE)
_PLAIN_NAME: Final = re.compile(r'[^<>,:()\[\]"\s](?:[^<>,:()\[\]"]*[^<>,:()\[\]"\s])?\Z')

_EXAMPLES: Final = (
    "int32, int64, float32, float64, bool, utf8, binary, fixed_size_binary[16], uuid, date32, time64[us], "
    "timestamp[us], timestamp[us, tz=UTC], decimal128(10, 2), list<int64>, struct<a: int64, b: utf8>, "
    "map<utf8, int64>"
)


class TypeSpelling(ValueError):
    """What stands there is not a type; the message says what was found and expected."""


class FieldCount:
    """How many fields a schema may still have, nested ones included; counted while it is parsed."""

    def __init__(self, most: int = MAX_FIELDS) -> None:
        self._most = most
        self._left = most

    def add(self) -> None:
        """Count one more field.

        Raises:
            TypeSpelling: it is one too many.
        """
        self._left -= 1
        if self._left < 0:
            raise TypeSpelling(f"more than {self._most} fields, nested ones included")


def parse_type(value: object, count: FieldCount | None = None) -> pa.DataType:
    """Read a type in any of the spellings.

    Args:
        value: a string, or arrow-rs's JSON as decoded: ``{"Timestamp": ["Microsecond", null]}``.
        count: of the schema that it belongs to; the fields below the type are added to it.

    Returns:
        The Arrow type as spelled, whether or not a table can have it.

    Raises:
        TypeSpelling: naming what was found and what is expected.
    """
    return _parse_value(value, 0, FieldCount() if count is None else count)


def _parse_value(value: object, depth: int, count: FieldCount) -> pa.DataType:
    if depth > MAX_DEPTH:
        raise TypeSpelling(f"types nest deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        try:
            return _Text(value, count).whole(depth)
        except TypeSpelling as error:
            hint = sql_hint(value)
            if hint is None:
                raise
            raise TypeSpelling(f"{error}; {hint}") from error
    if isinstance(value, Mapping) and len(value) == 1:
        name, argument = next(iter(value.items()))
        return _parse_object(str(name), argument, depth, count)
    raise TypeSpelling(f"found {quote(value)}, expected a type name or an object of one key; such as {_EXAMPLES}")


def _build(make: Callable[..., pa.DataType], *args: object) -> pa.DataType:
    """Call a pyarrow type factory; what it refuses is the client's mistake."""
    try:
        return make(*args)
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
        raise TypeSpelling(cut(str(error))) from error


def _whole_number(word: object, what: str) -> int:
    if isinstance(word, int) and not isinstance(word, bool):
        return word
    if isinstance(word, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", word):
        return int(word)
    raise TypeSpelling(f"{what} must be a whole number, found {quote(word)}")


def _with_arguments(name: str, words: list[str]) -> pa.DataType:
    """Make ``name[words]``; a word is a bare string such as ``us`` or ``tz=UTC``."""
    if name in _DECIMALS:
        factory, most = _DECIMALS[name]
        if len(words) not in (1, 2):
            raise TypeSpelling(f"{name} takes (precision, scale), found ({listed(words)})")
        precision = _whole_number(words[0], f"{name}'s precision")
        scale = _whole_number(words[1], f"{name}'s scale") if len(words) == 2 else 0
        if not 1 <= precision <= most:
            raise TypeSpelling(f"{name}'s precision must be from 1 to {most}, found {precision}")
        if not -(2**31) <= scale < 2**31:
            raise TypeSpelling(f"{name}'s scale is out of range: {scale}")
        return _build(factory, precision, scale)
    if name in ("fixed_size_binary", "fixedsizebinary", "binary"):
        if len(words) != 1:
            raise TypeSpelling(f"{name} takes [width], found [{listed(words)}]")
        width = _whole_number(words[0], f"{name}'s width")
        if not 0 <= width < 2**31:
            raise TypeSpelling(f"{name}'s width is out of range: {width}")
        return pa.binary(width)
    if name in ("timestamp", "time32", "time64", "duration", "date32", "date64"):
        return _temporal(name, words)
    if name == "interval":
        if len(words) == 1 and words[0].lower() == "monthdaynano":
            return pa.month_day_nano_interval()
        found = f" ({listed(words)})" if words else ""
        raise TypeSpelling(
            f"interval{found} has no type in an Iceberg table; use int64 with microseconds, or utf8; types are spelled "
            f"as in {_EXAMPLES}"
        )
    raise TypeSpelling(f"{quote(name)} takes no arguments; expected a type such as {_EXAMPLES}")


def _temporal(name: str, words: list[str]) -> pa.DataType:
    unit = _UNITS.get(words[0].lower()) if words else None
    if unit is None:
        raise TypeSpelling(f"{name} takes a unit of s, ms, us or ns, found {listed(words) or 'nothing'}")
    if name == "timestamp":
        zone = words[1] if len(words) == 2 else None
        if len(words) > 2 or unit == "day":
            raise TypeSpelling(f"timestamp takes [unit] or [unit, tz=zone], found [{listed(words)}]")
        if zone is not None:
            zone = zone.removeprefix("tz=").strip()
            some = re.fullmatch(r'Some\("?([^"]*)"?\)', zone, re.IGNORECASE)
            zone = some.group(1) if some else zone
            if zone.lower() in ("none", "null", ""):
                zone = None
        return _build(pa.timestamp, unit, zone)
    if len(words) != 1:
        raise TypeSpelling(f"{name} takes one unit, found {listed(words)}")
    legal = {"date32": ("day",), "date64": ("ms",), "time32": ("s", "ms"), "time64": ("us", "ns")}
    if unit not in legal.get(name, ("s", "ms", "us", "ns")):
        raise TypeSpelling(f"{name} takes {' or '.join(legal.get(name, ()))}, found {quote(words[0])}")
    if name in ("date32", "date64"):
        return _SIMPLE[name]
    return _build({"time32": pa.time32, "time64": pa.time64, "duration": pa.duration}[name], unit)


# -- arrow-rs's serde objects ---------------------------------------------------------------------


def _parse_object(name: str, argument: object, depth: int, count: FieldCount) -> pa.DataType:
    key = cut(name).lower().replace("_", "")
    many = argument if isinstance(argument, list) else [argument]
    if key in ("list", "largelist", "listview", "largelistview"):
        return _build(_LISTS[key], _parse_field(argument, depth, count))
    if key == "fixedsizelist" and len(many) == 2:
        return _build(pa.list_, _parse_field(many[0], depth, count), _whole_number(many[1], f"{name}'s size"))
    if key == "struct" and isinstance(argument, list):
        return _build(pa.struct, [_parse_field(item, depth, count) for item in argument])
    if key == "map" and argument:
        entries = _parse_field(many[0], depth, count).type
        if not pa.types.is_struct(entries) or entries.num_fields != 2:
            raise TypeSpelling(f"Map takes a struct of key and value, found {cut(str(entries))}")
        return _build(pa.map_, entries.field(0).with_nullable(False), entries.field(1))
    if key == "dictionary" and len(many) == 2:
        indices, values = (_parse_value(item, depth + 1, count) for item in many)
        return _build(pa.dictionary, indices, values)
    scalars = len(many) <= _MOST_ARGUMENTS and all(
        item is None or isinstance(item, int) or (isinstance(item, str) and len(item) <= MAX_ARGUMENTS) for item in many
    )
    if argument is not None and scalars:
        return _with_arguments(key, ["none" if item is None else str(item) for item in many])
    raise TypeSpelling(f"found {quote({cut(name): argument})}; expected a type such as {_EXAMPLES}")


def _parse_field(value: object, depth: int, count: FieldCount) -> pa.Field:
    """Read arrow-rs's Field: an object with name, data_type and nullable."""
    count.add()
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise TypeSpelling(f"found {quote(value)}, expected a field with name and data_type")
    spelled: Any = value.get("data_type", value.get("type"))
    kept = [key for key in value.get("metadata") or () if key != "PARQUET:field_id"]
    if kept:
        raise TypeSpelling(
            f"field {quote(value['name'])}: metadata {listed(map(quote, kept))}: nested fields keep none; "
            "put a text under 'doc' of the column"
        )
    nullable = value.get("nullable", True)
    if not isinstance(nullable, bool):
        raise TypeSpelling(f"field {quote(value['name'])}: nullable must be true or false, found {quote(nullable)}")
    return pa.field(value["name"], _parse_value(spelled, depth + 1, count), nullable=nullable)


# -- text -----------------------------------------------------------------------------------------


class _Text:
    """A recursive-descent reader of one spelled type."""

    def __init__(self, text: str, count: FieldCount) -> None:
        if len(text) > MAX_TEXT:
            raise TypeSpelling(f"a type of {len(text)} characters, at most {MAX_TEXT} are legal")
        self._text = text
        self._count = count
        self._at = 0
        self._skip_space()

    def whole(self, depth: int) -> pa.DataType:
        type_ = self._type(depth)
        if self._at < len(self._text):
            raise self._error("the end")
        return type_

    def _skip_space(self) -> None:
        """Go on to the next character that is no space: each space is passed once."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()

    def _error(self, expected: str) -> TypeSpelling:
        rest = self._text[self._at : self._at + 40] or "the end"
        return TypeSpelling(f"cannot read {self._text[:120]!r}: expected {expected}, found {rest!r}")

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found:
            self._at = found.end()
            self._skip_space()
        return found

    def _take(self, mark: str) -> bool:
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        self._skip_space()
        return True

    def _need(self, mark: str) -> None:
        if not self._take(mark):
            raise self._error(repr(mark))

    def _arguments(self) -> list[str] | None:
        """Read ``[a, b]`` or ``(a, b)``; None when neither follows, or a child's name ``('a')``."""
        if _CHILD_NAME.match(self._text, self._at):
            return None
        for opening, closing in ("[]", "()"):
            if not self._take(opening):
                continue
            depth, end = 1, self._at
            most = min(len(self._text), end + MAX_ARGUMENTS)
            while end < most and depth:
                depth += {opening: 1, closing: -1}.get(self._text[end], 0)
                end += 1
            if depth:
                raise self._error(repr(closing))
            inside = self._text[self._at : end - 1]
            self._at = end
            self._skip_space()
            return [word.strip().strip("\"'") for word in inside.split(",")]
        return None

    def _type(self, depth: int) -> pa.DataType:
        if depth > MAX_DEPTH:
            raise TypeSpelling(f"types nest deeper than {MAX_DEPTH} levels")
        start = self._at
        word = self._match(_WORD)
        if word is None:
            raise self._error(f"a type such as {_EXAMPLES}")
        name = word.group(1).lower()
        if self._take("<"):
            return self._nested(name, depth)
        if name in _DECIMALS or name in ("fixed_size_binary", "fixedsizebinary"):
            return _with_arguments(name, self._arguments() or [])
        if name == "interval":
            return _with_arguments(name, self._arguments() or [])
        if name in _SIMPLE:
            arguments = self._arguments()
            return _SIMPLE[name] if arguments is None else _with_arguments(name, arguments)
        self._at = start
        raise self._error(f"a type such as {_EXAMPLES}")

    def _nested(self, name: str, depth: int) -> pa.DataType:
        if name in _LISTS:
            item = self._item("item", depth)
            self._need(">")
            return _build(_LISTS[name], item)
        if name in ("fixed_size_list", "fixedsizelist"):
            item = self._item("item", depth)
            self._need(">")
            return _build(pa.list_, item, _whole_number((self._arguments() or [""])[0], "fixed_size_list's size"))
        if name == "struct":
            return self._struct(depth)
        if name == "map":
            key = self._item("key", depth)
            self._need(",")
            value = self._item("value", depth)
            if self._take(","):
                self._need("keys_sorted")
            self._need(">")
            return _build(pa.map_, key.with_nullable(False), value)
        if name == "dictionary":
            return self._dictionary(depth)
        if name == "extension":
            end = self._text.find(">", self._at, self._at + MAX_ARGUMENTS)
            if end < 0:
                raise self._error("'>'")
            word = self._text[self._at : end].strip()
            self._at = end
            self._need(">")
            if word.lower() not in _EXTENSIONS:
                raise TypeSpelling(f"unknown extension type {quote(word)}: spell its storage type instead")
            return _EXTENSIONS[word.lower()]()
        raise self._error(f"a nested type such as list<int64>, not {name!r}")

    def _struct(self, depth: int) -> pa.DataType:
        fields: list[pa.Field] = []
        if self._take(">"):
            return pa.struct([])
        while True:
            name = self._field_name()
            if name is None:
                raise self._error("a field 'name: type'")
            fields.append(self._rest_of_field(name, depth))
            if self._take(">"):
                return _build(pa.struct, fields)
            self._need(",")

    def _dictionary(self, depth: int) -> pa.DataType:
        self._need("values=")
        values = self._type(depth + 1)
        self._need(",")
        self._need("indices=")
        indices = self._type(depth + 1)
        if self._take(","):
            self._need("ordered=")
            if not (self._take("0") or self._take("1")):
                raise self._error("0 or 1")
        self._need(">")
        return _build(pa.dictionary, indices, values)

    def _item(self, default_name: str, depth: int) -> pa.Field:
        return self._rest_of_field(self._field_name() or default_name, depth)

    def _rest_of_field(self, name: str, depth: int) -> pa.Field:
        self._count.add()
        type_ = self._type(depth + 1)
        child_name = self._match(_CHILD_NAME)
        nullable = self._match(_NOT_NULL) is None
        return pa.field(child_name.group(1) if child_name else name, type_, nullable=nullable)

    def _field_name(self) -> str | None:
        quoted = self._match(_QUOTED_NAME)
        if quoted:
            try:
                return str(json.loads(quoted.group(1)))
            except ValueError:
                raise TypeSpelling(f"cannot read the field name {cut(quoted.group(1))}") from None
        # A name is what stands before a colon: one look ahead, however many spaces there are in it.
        bare = _BARE_NAME.match(self._text, self._at)
        name = bare.group(1).strip() if bare else ""
        if bare is None or not name:
            return None
        self._at = bare.end()
        self._skip_space()
        return name


# -- back to text ---------------------------------------------------------------------------------


def type_name(type_: pa.DataType) -> str:
    """Spell a type so that ``parse_type`` reads it back.

    Args:
        type_: any Arrow type; of one that the grammar does not have, pyarrow's own spelling.
    """
    types = pa.types
    for test, word in _SPELLED:
        if test(type_):
            return word
    if isinstance(type_, pa.BaseExtensionType):
        return "uuid" if type_ == pa.uuid() else str(type_)
    if types.is_fixed_size_list(type_):
        return f"fixed_size_list<{_item_name(type_.value_field)}>[{type_.list_size}]"
    if types.is_list(type_):
        return f"list<{_item_name(type_.value_field)}>"
    if types.is_large_list(type_):
        return f"large_list<{_item_name(type_.value_field)}>"
    if types.is_struct(type_):
        return f"struct<{', '.join(f'{_spell_name(child.name)}: {_item_name(child)}' for child in type_)}>"
    if types.is_map(type_):
        return f"map<{type_name(type_.key_type)}, {_item_name(type_.item_field)}>"
    if types.is_dictionary(type_):
        return f"dictionary<values={type_name(type_.value_type)}, indices={type_name(type_.index_type)}>"
    return str(type_)


#: Where pyarrow's own word is not the one that the protocol uses.
_SPELLED: Final[tuple[tuple[Callable[[pa.DataType], bool], str], ...]] = (
    (pa.types.is_string, "utf8"),
    (pa.types.is_large_string, "large_utf8"),
    (pa.types.is_float16, "float16"),
    (pa.types.is_float32, "float32"),
    (pa.types.is_float64, "float64"),
    (pa.types.is_date32, "date32"),
    (pa.types.is_date64, "date64"),
)


def _item_name(field: pa.Field) -> str:
    return f"{type_name(field.type)}{'' if field.nullable else ' not null'}"


def _spell_name(name: str) -> str:
    return name if _PLAIN_NAME.match(name) else json.dumps(name, ensure_ascii=False)


__all__ = ["MAX_DEPTH", "MAX_FIELDS", "FieldCount", "TypeSpelling", "parse_type", "type_name"]
