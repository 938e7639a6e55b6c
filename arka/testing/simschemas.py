"""Foreign schema changes in simulations, and a check that each value lands in the column that its writer meant (R27).

Owns: the columns that others change, what they do to them, and values that say which field they were meant for. Does
not own writers (``simwriters``) nor when something happens (``simulation``).

A value carries the id of the field that its column's name meant when its stream began. Wherever it turns up later, it
has to be in the field with that id, whatever others have done to names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from typing import Final, Protocol

import pyarrow as pa

from arka.iceberg.schema import field_id
from arka.records import FIELD_ID_KEY, TableDefinition, TableName, TableType

SCHEMA: Final = pa.schema([pa.field("id", pa.int64()), pa.field("part", pa.int32()), pa.field("filler", pa.utf8())])


def definition_of(name: TableName, *, keyed: bool) -> TableDefinition:
    """A table that clients write to."""
    if keyed:
        required = pa.schema([field.with_nullable(field.name == "filler") for field in SCHEMA])
        return TableDefinition(name, required, TableType.PRIMARY_KEY, ("part", "id"))
    return TableDefinition(name, SCHEMA)


#: Names of the columns that others change, with the type that clients send.
WIDE: Final[Mapping[str, pa.DataType]] = {"left": pa.utf8(), "right": pa.utf8(), "count": pa.int32()}
#: How far back a stream's columns may be, in seconds: ``iceberg.adopt_s``, and some time for the answer.
MOST_AGE_S: Final = 1.5
_TAG: Final = 100_000


def wide_definition(name: TableName, *, keyed: bool) -> TableDefinition:
    """A table that clients write to and whose columns others change."""
    made = definition_of(name, keyed=keyed)
    schema = pa.schema([*made.schema, *(pa.field(column, kind) for column, kind in WIDE.items())])
    return TableDefinition(name, schema, made.table_type, made.key_columns)


def stream_schema(table: pa.Schema) -> pa.Schema:
    """What a client sends that has just asked for a table's schema."""
    wide = [pa.field(name, WIDE[name]) for name in table.names if name in WIDE]
    return pa.schema([*SCHEMA, *wide])


def values_for(number: int, rows: int, fields: Mapping[str, int]) -> list[list[object]]:
    """The values of the further columns of a write: each names the field that it is meant for."""
    return [
        [number * _TAG + meant if name == "count" else f"{number}@{meant}"] * rows for name, meant in fields.items()
    ]


def fields_of(table: pa.Schema) -> dict[str, int]:
    """The ids of the columns that others change, by their names now."""
    return {column.name: field_id(column) for column in table if column.name in WIDE}


def change_schema(rng: random.Random) -> tuple[str, Callable[[pa.Schema, Callable[[], int]], pa.Schema]]:
    """Choose what others do to a table's columns; returns its name, and the change."""
    changes = {
        "swap": _swap,
        "drop": lambda schema, _: _without(schema, rng.choice(list(WIDE))),
        "drop and add": lambda schema, new_id: _add(_without(schema, "left"), "left", new_id),
        "add": lambda schema, new_id: _add(schema, rng.choice(list(WIDE)), new_id),
        "rename": lambda schema, new_id: _rename(schema, {"right": "other", "other": "right"}),
        "promote": lambda schema, _: _promote(schema),
    }
    name = rng.choice(list(changes))
    return name, changes[name]


def _rename(schema: pa.Schema, names: Mapping[str, str]) -> pa.Schema:
    made = pa.schema([column.with_name(names.get(column.name, column.name)) for column in schema])
    return made if len(set(made.names)) == len(made) else schema


def _swap(schema: pa.Schema, _: Callable[[], int]) -> pa.Schema:
    return _rename(schema, {"left": "right", "right": "left"})


def _without(schema: pa.Schema, name: str) -> pa.Schema:
    return pa.schema([column for column in schema if column.name != name])


def _add(schema: pa.Schema, name: str, new_id: Callable[[], int]) -> pa.Schema:
    if name in schema.names:
        return schema
    return schema.append(pa.field(name, WIDE[name], metadata={FIELD_ID_KEY: b"%d" % new_id()}))


def _promote(schema: pa.Schema) -> pa.Schema:
    return pa.schema([column.with_type(pa.int64()) if column.name == "count" else column for column in schema])


class _Sent(Protocol):
    """What the check needs of a write."""

    sends: int
    shapes: set[tuple[int, ...]]


def misplaced(batch: pa.RecordBatch, writes: Mapping[int, _Sent]) -> str | None:
    """Look for a value that is in another column than its writer meant, or is missing from it; None for none.

    Args:
        batch: rows as they were committed; its columns carry field ids.
        writes: by number.
    """
    numbers = batch.column("id").to_pylist()
    for index, column in enumerate(batch.schema):
        number = field_id(column)
        if number <= len(SCHEMA):
            continue
        for write, value in zip(numbers, batch.column(index).to_pylist(), strict=True):
            if value is None:
                sent = writes.get(write)
                if sent is not None and sent.sends == 1 and any(number in shape for shape in sent.shapes):
                    return f"write {write} has no value in column {column.name!r} (field {number}), and it had sent one"
                continue
            meant = value % _TAG if isinstance(value, int) else int(value.rpartition("@")[2])
            if meant != number:
                return (
                    f"write {write} has {value!r} in column {column.name!r} (field {number}), it was meant for "
                    f"field {meant}"
                )
    return None


class SchemaHistory:
    """Which schemas a table has had, and since when."""

    def __init__(self) -> None:
        self._since: list[tuple[float, int]] = [(-1e18, 0)]

    def note(self, now: float, schema_id: int) -> None:
        """Record a change."""
        self._since.append((now, schema_id))

    def between(self, start: float, end: float) -> Collection[int]:
        """The ids of the schemas that the table had at some moment from ``start`` to ``end``."""
        ends = [since for since, _ in self._since[1:]] + [1e18]
        return {
            number for (since, number), until in zip(self._since, ends, strict=True) if since <= end and until >= start
        }


__all__ = [
    "MOST_AGE_S",
    "SCHEMA",
    "WIDE",
    "SchemaHistory",
    "change_schema",
    "definition_of",
    "fields_of",
    "misplaced",
    "stream_schema",
    "values_for",
    "wide_definition",
]
