"""A stream's schema held against its table's: every difference, or the way from one to the other.

Owns: which streams a table takes (protocol 6) and the plan of their conversion. Does not own the
conversion of arrays (``convert``) nor the bytes (``decode``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from arka.errors import ErrorCode, InvalidRequest, cut, listed, quote
from arka.flight.canonical import UnsupportedType, by_value, canonical_type, widens
from arka.flight.convert import Converter, Dictionaries, How, Step, invalid_batch
from arka.flight.datatypes import type_name
from arka.flight.layout import is_list_like, is_scalar, wire_type
from arka.flight.plain import plain_array, plain_type
from arka.records import Operation, TableInfo, TableName, TableType
from arka.tableproperties import PARTIAL, PARTIAL_NULL

#: Differences that are spelled; of the others the error says how many there are.
_MOST_DIFFERENCES: Final = 32


@dataclass(frozen=True, slots=True)
class Conformance:
    """The way from a stream's batches to what a table's log holds of them.

    Attributes:
        schema: what ``apply`` returns: the table's schema, or its key's for deletes.
        identical: the stream's bytes are what such batches would be made of: same columns, order
            and physical types. Values may still have to be checked.
        columns: per column of ``schema``, its index in the stream (None: filled with nulls) and its step.
    """

    schema: pa.Schema
    identical: bool
    columns: tuple[tuple[int | None, Step], ...]

    def apply(
        self,
        batch: pa.RecordBatch,
        *,
        limit_bytes: int = 2**62,
        dictionaries: Dictionaries | None = None,
        values_bytes: int | None = None,
    ) -> pa.RecordBatch:
        """Convert one batch.

        Args:
            batch: in the stream's schema, or with indices in the place of dictionary-encoded columns; valid in
                Arrow's sense, and what it refers to is counted (``plain``). Buffers are shared where nothing changes.
            limit_bytes: most bytes that the result may have.
            dictionaries: by slot, the values of dictionary-encoded columns of which only indices are here.
            values_bytes: most bytes of a dictionary's values; see ``Converter``.

        Raises:
            InvalidRequest: ``invalid_batch``, naming the column whose values do not fit.
            OverLimit: the same, where the result would have more than ``limit_bytes``.
        """
        converter = Converter(limit_bytes, dictionaries, values_bytes) if dictionaries else Converter(limit_bytes)
        columns = []
        for position, (index, step) in enumerate(self.columns):
            field = self.schema.field(position)
            if index is None:
                column = converter.nulls(batch.num_rows, step)
            else:
                column = converter.convert(plain_array(batch.column(index)), step)
                if not field.nullable and column.null_count:
                    raise invalid_batch(field.name, f"is required but {column.null_count} of its values are null")
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What a stream may do with a table, and how.

    Attributes:
        name: the table's name, for messages.
        upserts: whole rows; None where the stream fits deletes alone.
        deletes: keys; None for append-only tables.
        keys: the same, of batches that hold ``key_columns`` alone.
        differences: what keeps the stream from upserts.
        key_columns: which of the stream's columns a delete looks at, in the stream's order.
        dictionary_types: the value type of each dictionary-encoded field of the stream, depth first; None where nothing
            ever looks at it.
    """

    name: TableName
    upserts: Conformance | None
    deletes: Conformance | None
    keys: Conformance | None
    differences: tuple[str, ...]
    key_columns: tuple[int, ...]
    dictionary_types: tuple[pa.DataType | None, ...]

    def conformance(self, operation: Operation) -> Conformance:
        """Return the way of one operation's batches.

        Raises:
            InvalidRequest: the table has no keys to delete by; or ``schema_mismatch``: the stream fits deletes alone.
        """
        if operation is Operation.DELETE:
            if self.deletes is None:
                raise InvalidRequest(f"operation delete needs a primary-key table; {self.name} is append-only")
            return self.deletes
        if self.upserts is None:
            raise _mismatch(self.name, self.differences, "; the stream fits deletes alone")
        return self.upserts

    def selected(self) -> Conformance:
        """Return the way of a delete's batches that hold ``key_columns`` alone; ``conformance`` comes first."""
        assert self.keys is not None
        return self.keys


def _mismatch(name: TableName, differences: Sequence[str], behind: str = "") -> InvalidRequest:
    return InvalidRequest(
        f"Schema mismatch for {name}: {listed(differences, '; ')}{behind}", code=ErrorCode.SCHEMA_MISMATCH
    )


def plan_conformance(stream: pa.Schema, table: TableInfo) -> StreamPlan:
    """Hold a stream's schema against a table's.

    A stream may have fewer nullable columns (of a primary-key table only if its property ``arka.partial``
    is ``null``), another order, and types whose values fit the table's. One whose key columns fit those of a
    primary-key table is taken for deletes, whatever the others are: a delete looks at no other column (protocol 3).

    Args:
        stream: as the client sent it.
        table: canonical types.

    Raises:
        InvalidRequest: ``schema_mismatch``, with every difference: the stream fits neither.
    """
    return _Planner(stream, table).plan()


class _Planner:
    """Collects the differences and steps of one stream."""

    def __init__(self, stream: pa.Schema, table: TableInfo) -> None:
        self._stream = stream
        self._table = table
        # What keeps the stream from upserts: the first of them as texts, and how many there are.
        self._differences: list[str] = []
        self._different = 0
        # The number of the dictionary-encoded field that is met next.
        self._slot = 0

    def plan(self) -> StreamPlan:
        schema = self._table.schema
        names = self._stream.names
        places = {field.name: position for position, field in enumerate(schema)}
        near = _Near(field.name for field in schema)
        if not names:
            self._differ("the stream has no columns, expected at least one")
        steps: dict[int, tuple[int, Step]] = {}
        unfit: set[str] = set()
        slots: list[tuple[int, list[pa.DataType]]] = []
        for index, field in enumerate(self._stream):
            place = places.get(field.name)
            below = dictionary_value_types(field.type)
            first_slot, found = self._slot, self._different
            if place is None:
                self._differ("column {} is not in the table{}", field.name, near.hint(field.name))
            elif place in steps:
                self._differ("column {} appears twice", field.name)
            else:
                steps[place] = index, self._step(field.type, schema.field(place), field.name)
            if self._different > found:
                unfit.add(field.name)
            slots.append((index, below))
            self._slot = first_slot + len(below)
        self._find_lacking([place for place in range(len(schema)) if place not in steps])
        keys = self._table.key_schema().names if self._table.key_columns else []
        known = set(names)
        deletes = bool(keys) and all(name in known and name not in unfit for name in keys)
        if self._different > len(self._differences):
            self._differences.append(f"and {self._different - len(self._differences)} more")
        if self._differences and not deletes:
            raise _mismatch(self._table.name, self._differences)
        key_places = [places[name] for name in keys] if deletes else []
        key_columns = sorted(steps[place][0] for place in key_places)
        wanted = set(key_columns if self._differences else range(len(names)))
        return StreamPlan(
            name=self._table.name,
            upserts=None if self._differences else self._conformance(range(len(schema)), steps, range(len(names))),
            deletes=self._conformance(key_places, steps, range(len(names))) if deletes else None,
            keys=self._conformance(key_places, steps, key_columns) if deletes else None,
            differences=tuple(self._differences),
            key_columns=tuple(key_columns),
            dictionary_types=tuple(type_ if index in wanted else None for index, below in slots for type_ in below),
        )

    def _conformance(
        self, places: Sequence[int], steps: Mapping[int, tuple[int, Step]], held: Sequence[int]
    ) -> Conformance:
        """The way to these columns of the table, of batches that hold these columns of the stream."""
        positions = {index: position for position, index in enumerate(held)}
        fields = [self._table.schema.field(place) for place in places]
        columns: list[tuple[int | None, Step]] = []
        for place, field in zip(places, fields, strict=True):
            index, step = steps.get(place, (None, Step(How.NULLS, field.type, field.name)))
            columns.append((None if index is None else positions[index], step))
        return Conformance(
            schema=pa.schema(fields),
            identical=[index for index, _ in columns] == list(range(len(held)))
            and all(
                same_bytes(self._stream.field(index).type, ours.type) for index, ours in zip(held, fields, strict=True)
            ),
            columns=tuple(columns),
        )

    def _find_lacking(self, absent: Sequence[int]) -> None:
        """Record which absent columns cannot be filled with nulls, and why."""
        partial = self._table.table_type is not TableType.PRIMARY_KEY or (
            self._table.properties.get(PARTIAL) == PARTIAL_NULL
        )
        for place in absent:
            field = self._table.schema.field(place)
            if not field.nullable:
                self._differ("required column {} ({}) is missing", field.name, field.type)
            elif not partial:
                self._differ(
                    "column {} ({}) is missing: an upsert replaces the whole row unless the table has the property "
                    f"{PARTIAL!r}: {PARTIAL_NULL!r}",
                    field.name,
                    field.type,
                )

    def _step(self, source: pa.DataType, target: pa.Field, path: str) -> Step:
        """Plan one field; what cannot be is recorded as a difference."""
        types = pa.types
        if isinstance(source, pa.BaseExtensionType) and source != target.type:
            source = source.storage_type
        if types.is_run_end_encoded(source):
            # Only what stands in them is to be converted: they are written out before (``plain``).
            return self._step(source.value_type, target, path)
        if types.is_dictionary(source):
            return self._dictionary_step(source, target, path)
        if types.is_null(source):
            if not target.nullable:
                self._differ_in_type(path, source, target.type)
            return Step(How.NULLS, target.type, path)
        if types.is_struct(target.type) and types.is_struct(source):
            return self._struct_step(source, target, path)
        if types.is_list(target.type) and is_list_like(source):
            element = self._step(source.value_type, target.type.value_field, f"{path}.element")
            return self._nested(How.LIST, source, target, path, ((0, element),))
        if types.is_map(target.type) and types.is_map(source):
            key = self._step(source.key_type, target.type.key_field, f"{path}.key")
            value = self._step(source.item_type, target.type.item_field, f"{path}.value")
            return self._nested(How.MAP, source, target, path, ((0, key), (1, value)))
        self._check_scalar(source, source, target.type, path)
        return Step(How.KEEP if wire_type(plain_type(source)) == target.type else How.CAST, target.type, path)

    def _dictionary_step(self, source: pa.DataType, target: pa.Field, path: str) -> Step:
        slot = self._slot
        self._slot += len(dictionary_value_types(source))
        self._check_scalar(source, source.value_type, target.type, path)
        return Step(How.DICTIONARY, target.type, path, slot=slot)

    def _check_scalar(self, source: pa.DataType, values: pa.DataType, target: pa.DataType, path: str) -> None:
        try:
            canonical = canonical_type(source)
        except UnsupportedType as error:
            unknown_zone = pa.types.is_timestamp(values) and pa.types.is_timestamp(target)
            self._differ_in_type(path, source, target, f" ({error})" if unknown_zone else "")
            return
        nested = pa.types.is_nested(values) or pa.types.is_nested(target)
        if nested or not (widens(canonical, target) or by_value(values, target)):
            self._differ_in_type(path, source, target)

    def _struct_step(self, source: pa.DataType, target: pa.Field, path: str) -> Step:
        places = {child.name: place for place, child in enumerate(target.type)}
        near = _Near(places)
        steps: dict[int, tuple[int | None, Step]] = {}
        for index, child in enumerate(source):
            below = f"{path}.{child.name}"
            place = places.get(child.name)
            if place is None:
                self._differ("column {} is not in the table{}", below, near.hint(child.name))
            elif place in steps:
                self._differ("column {} appears twice", below)
            else:
                steps[place] = index, self._step(child.type, target.type.field(place), below)
        for place, child in enumerate(target.type):
            below = f"{path}.{child.name}"
            if place not in steps:
                if not child.nullable:
                    self._differ("required column {} ({}) is missing", below, child.type)
                steps[place] = None, Step(How.NULLS, child.type, below)
        children = tuple(steps[place] for place in range(len(places)))
        return self._nested(How.STRUCT, source, target, path, children)

    def _nested(
        self,
        how: How,
        source: pa.DataType,
        target: pa.Field,
        path: str,
        children: tuple[tuple[int | None, Step], ...],
    ) -> Step:
        """Make a nested field's step: kept whole only where nothing below can need a change."""
        # The wire type of a dictionary is that of its indices, which may be the table's type by chance.
        encoded = bool(dictionary_value_types(source))
        kept = not encoded and wire_type(plain_type(source)) == target.type and not _has_required(target.type)
        return Step(How.KEEP if kept else how, target.type, path, children)

    def _differ_in_type(self, path: str, source: pa.DataType, target: pa.DataType, why: str = "") -> None:
        self._differ("column {} is {}, expected {}{}", path, source, target, why)

    def _differ(self, template: str, path: str = "", *parts: pa.DataType | str) -> None:
        """Record a difference; it is spelled only if the error has room for it."""
        self._different += 1
        if len(self._differences) < _MOST_DIFFERENCES:
            spelled = (cut(type_name(part)) if isinstance(part, pa.DataType) else part for part in parts)
            self._differences.append(template.format(quote(path), *spelled))


class _Near:
    """Finds names that differ in case alone."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names
        self._folded: dict[str, str] | None = None

    def hint(self, name: str) -> str:
        """Name the column that differs in case alone, if there is one."""
        if self._folded is None:
            self._folded = {}
            for other in self._names:
                self._folded.setdefault(other.lower(), other)
        same = self._folded.get(name.lower())
        return "" if same is None else f" (names are case-sensitive: expected {same!r})"


def dictionary_value_types(type_: pa.DataType) -> list[pa.DataType]:
    """Return the value types of the dictionary-encoded fields of a type, depth first, a field before its children."""
    if is_scalar(type_):
        return []
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return dictionary_value_types(type_.storage_type)
    if types.is_dictionary(type_):
        return [type_.value_type, *dictionary_value_types(type_.value_type)]
    if types.is_map(type_):
        return [*dictionary_value_types(type_.key_type), *dictionary_value_types(type_.item_type)]
    if types.is_run_end_encoded(type_) or is_list_like(type_):
        return dictionary_value_types(type_.value_type)
    children = range(type_.num_fields) if types.is_struct(type_) or types.is_union(type_) else ()
    return [found for index in children for found in dictionary_value_types(type_.field(index).type)]


def _has_required(type_: pa.DataType) -> bool:
    """Tell whether a struct below has a required field, whose nulls under a null parent must be hidden."""
    types = pa.types
    if types.is_struct(type_):
        return any(not child.nullable or _has_required(child.type) for child in type_)
    if types.is_map(type_):
        return not type_.item_field.nullable or _has_required(type_.key_type) or _has_required(type_.item_type)
    if types.is_list(type_):
        return not type_.value_field.nullable or _has_required(type_.value_type)
    return False


def same_bytes(source: pa.DataType, target: pa.DataType) -> bool:
    """Tell whether arrays of two types have the same buffers for the same values.

    Names of list elements and map entries, nullability, time zones (instants are UTC whatever the zone)
    and the uuid type's name do not matter to them; names and order of struct fields do.
    """
    types = pa.types
    if source == target:
        return True
    if types.is_timestamp(source) and types.is_timestamp(target):
        return bool(source.unit == target.unit and (source.tz is None) == (target.tz is None))
    if isinstance(source, pa.BaseExtensionType) or isinstance(target, pa.BaseExtensionType):
        return same_bytes(
            source.storage_type if isinstance(source, pa.BaseExtensionType) else source,
            target.storage_type if isinstance(target, pa.BaseExtensionType) else target,
        )
    if types.is_list(source) and types.is_list(target):
        return same_bytes(source.value_type, target.value_type)
    if types.is_map(source) and types.is_map(target):
        return same_bytes(source.key_type, target.key_type) and same_bytes(source.item_type, target.item_type)
    if types.is_struct(source) and types.is_struct(target):
        return source.num_fields == target.num_fields and all(
            ours.name == theirs.name and same_bytes(ours.type, theirs.type)
            for ours, theirs in zip(source, target, strict=True)
        )
    return False


__all__ = ["Conformance", "StreamPlan", "plan_conformance", "same_bytes"]
