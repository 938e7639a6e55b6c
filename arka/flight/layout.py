"""What a schema's batches look like on the wire: which nodes and buffers, and what must hold for them.

Owns: the step from Arrow types to ``_core.ipc``'s plans, and the names of nodes for error messages.

A dictionary-encoded field's batches carry its indices: with the index type in its place, a batch can be
read without any dictionary at hand. The same goes for an extension type and its storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from arka._core import ipc

#: Least and greatest value, both legal.
Range = tuple[int, int]

_NO_RANGE: Final = (0, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """A schema's nodes, depth first.

    Attributes:
        plan: for ``BatchLayout.check``.
        paths: each node's name for people, such as ``s.x``.
        columns: the column that each node belongs to.
        buffers: each node's kind and how many buffers it has, beside the data buffers of views.
    """

    plan: ipc.LayoutPlan
    paths: tuple[str, ...]
    columns: tuple[int, ...]
    buffers: tuple[tuple[int, int], ...]

    def is_column(self, node: int) -> bool:
        """Tell whether a node is a whole column, not a field below one."""
        return node == 0 or self.columns[node] != self.columns[node - 1]


#: How many buffers a node of a kind has, where they are not two.
_BUFFERS: Final = {
    ipc.KIND_NULL: 0,
    ipc.KIND_RUNS: 0,
    ipc.KIND_STRUCT: 1,
    ipc.KIND_UNION: 1,
    ipc.KIND_VARIABLE: 3,
    ipc.KIND_LIST_VIEW: 3,
}

_FINDINGS: Final = {
    ipc.FOUND_LENGTH: "its length is {found}, expected {expected}",
    ipc.FOUND_NULL_COUNT: "its null count is {found}, its validity bitmap says {expected}",
    ipc.FOUND_SHORT_BUFFER: "a buffer is too short: expected {expected}, found {found}",
    ipc.FOUND_NULL_ENTRY: "{found} map keys or entries are null",
    ipc.FOUND_REQUIRED_NULLS: "is required but {found} of its values are null",
}


def describe_finding(finding: tuple[int, int, int, int]) -> str:
    """Say what ``BatchLayout.check`` found, for a person."""
    found, _node, expected, actual = finding
    return _FINDINGS[found].format(expected=expected, found=actual)


#: Types that stand for themselves, with no other type below: most columns have one, and schemas have many columns.
_SCALARS: Final = frozenset(
    type_.id
    for type_ in (
        *(pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.float16(), pa.float32(), pa.float64(), pa.string(), pa.binary(), pa.large_string(), pa.large_binary()),
        *(pa.date32(), pa.date64(), pa.time32("ms"), pa.time64("us"), pa.timestamp("us"), pa.duration("us")),
        *(pa.binary(16), pa.decimal32(9), pa.decimal64(18), pa.decimal128(38), pa.decimal256(76)),
    )
)


def is_scalar(type_: pa.DataType) -> bool:
    """Tell whether a type is neither nested nor an encoding of another one; False where that is not certain."""
    return type_.id in _SCALARS


def wire_type(type_: pa.DataType) -> pa.DataType:
    """Return the type with which a batch of ``type_`` is read.

    That is: indices for dictionaries, storage for extensions, all the way down.
    """
    if is_scalar(type_):
        return type_
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return wire_type(type_.storage_type)
    if types.is_dictionary(type_):
        return type_.index_type
    if types.is_list(type_):
        return pa.list_(_wire_field(type_.value_field))
    if types.is_large_list(type_):
        return pa.large_list(_wire_field(type_.value_field))
    if types.is_fixed_size_list(type_):
        return pa.list_(_wire_field(type_.value_field), type_.list_size)
    if types.is_list_view(type_):
        return pa.list_view(_wire_field(type_.value_field))
    if types.is_large_list_view(type_):
        return pa.large_list_view(_wire_field(type_.value_field))
    if types.is_run_end_encoded(type_):
        return pa.run_end_encoded(type_.run_end_type, wire_type(type_.value_type))
    if types.is_struct(type_):
        return pa.struct([_wire_field(child) for child in type_])
    if types.is_map(type_):
        return pa.map_(_wire_field(type_.key_field), _wire_field(type_.item_field))
    return type_


def is_list_like(type_: pa.DataType) -> bool:
    """Tell whether a type is one of Arrow's five kinds of list."""
    types = pa.types
    return bool(
        types.is_list(type_)
        or types.is_large_list(type_)
        or types.is_fixed_size_list(type_)
        or types.is_list_view(type_)
        or types.is_large_list_view(type_)
    )


def _wire_field(field: pa.Field) -> pa.Field:
    return field.with_type(wire_type(field.type))


def wire_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema with which a stream's batches are read."""
    return pa.schema([_wire_field(field) for field in schema])


def plan_layout(schema: pa.Schema, *, required: bool = False, ranges: Mapping[str, Range] | None = None) -> Layout:
    """Plan the checks of a schema's batches.

    Args:
        schema: any types.
        required: whether fields that are not nullable may have no nulls.
        ranges: by path, the values that a 32-bit or 64-bit field may have.
    """
    walk = _Walk(required, ranges or {})
    for column, field in enumerate(schema):
        walk.column = column
        walk.visit(field, field.name, ipc.FLAG_TOP)
    buffers = tuple((kind, _BUFFERS.get(kind, 2)) for kind, *_ in walk.rules)
    return Layout(ipc.LayoutPlan(walk.rules), tuple(walk.paths), tuple(walk.columns), buffers)


class _Walk:
    """Collects a schema's nodes."""

    def __init__(self, required: bool, ranges: Mapping[str, Range]) -> None:
        self.rules: list[tuple[int, int, int, int, int]] = []
        self.paths: list[str] = []
        self.columns: list[int] = []
        self.column = 0
        self._required = required
        self._ranges = ranges

    def visit(self, field: pa.Field, path: str, flags: int = 0) -> None:
        type_ = field.type
        if isinstance(type_, pa.BaseExtensionType):
            type_ = type_.storage_type
        if self._required and not field.nullable:
            flags |= ipc.FLAG_REQUIRED
        kind, width = _kind(type_)
        lowest, highest = self._ranges.get(path, _NO_RANGE)
        if path in self._ranges:
            flags |= ipc.FLAG_RANGE_32 if width == 4 else ipc.FLAG_RANGE_64
        self.rules.append((kind, width, flags, lowest, highest))
        self.paths.append(path)
        self.columns.append(self.column)
        if is_scalar(type_):
            return
        types = pa.types
        if types.is_map(type_):
            entries = (ipc.KIND_STRUCT, 0, ipc.FLAG_NEVER_NULL, 0, 0)
            self.rules.append(entries)
            self.paths.append(path)
            self.columns.append(self.column)
            self.visit(type_.key_field, f"{path}.key", ipc.FLAG_NEVER_NULL)
            self.visit(type_.item_field, f"{path}.value")
        elif types.is_struct(type_):
            for child in type_:
                self.visit(child, f"{path}.{child.name}")
        elif types.is_run_end_encoded(type_):
            self.visit(pa.field("run_ends", type_.run_end_type), f"{path}.run_ends")
            self.visit(pa.field("values", type_.value_type), f"{path}.values")
        elif types.is_union(type_):
            for child in (type_.field(index) for index in range(type_.num_fields)):
                self.visit(child, f"{path}.{child.name}")
        elif is_list_like(type_):
            self.visit(type_.value_field, f"{path}.element")


def _kind(type_: pa.DataType) -> tuple[int, int]:
    """Return how a type's node lays out its buffers, and the width in bytes that goes with it."""
    types = pa.types
    if types.is_primitive(type_) and not types.is_boolean(type_):
        return ipc.KIND_FIXED, type_.bit_width // 8
    if types.is_null(type_):
        return ipc.KIND_NULL, 0
    if types.is_boolean(type_):
        return ipc.KIND_BOOL, 0
    if types.is_string(type_) or types.is_binary(type_):
        return ipc.KIND_VARIABLE, 4
    if types.is_large_string(type_) or types.is_large_binary(type_):
        return ipc.KIND_VARIABLE, 8
    if types.is_string_view(type_) or types.is_binary_view(type_):
        return ipc.KIND_VIEW, 16
    if types.is_list(type_) or types.is_map(type_):
        return ipc.KIND_LIST, 4
    if types.is_large_list(type_):
        return ipc.KIND_LIST, 8
    if types.is_list_view(type_):
        return ipc.KIND_LIST_VIEW, 4
    if types.is_large_list_view(type_):
        return ipc.KIND_LIST_VIEW, 8
    if types.is_struct(type_) or types.is_fixed_size_list(type_):
        return ipc.KIND_STRUCT, 0
    if types.is_run_end_encoded(type_):
        return ipc.KIND_RUNS, 0
    if types.is_union(type_):
        return (ipc.KIND_UNION if type_.mode == "sparse" else ipc.KIND_DENSE_UNION), 0
    return ipc.KIND_FIXED, type_.bit_width // 8


__all__ = [
    "Layout",
    "Range",
    "describe_finding",
    "is_list_like",
    "is_scalar",
    "plan_layout",
    "wire_schema",
    "wire_type",
]
