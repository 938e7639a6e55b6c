"""Arrays as clients send them, turned into arrays as tables hold them.

Owns: casts, decoded dictionaries, rebuilt nested arrays, and a limit on what they may grow to (T14). Does
not own which conversions are legal (``conform``) nor arrays that name one value many times (``plain``).

Each conversion is done here and nowhere else. Everything here is safe in Arrow's sense: a value that would change is
an error, which names the row. Between integers and floats more is asked for: a whole number of at most 53 bits. What
stands under a null parent is no value: it is neither cast nor counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Final, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from arka.errors import ErrorCode, InvalidRequest, cut, quote
from arka.flight.datatypes import type_name
from arka.flight.plain import plain_array
from arka.nullarrays import null_array

#: Integers up to here, and down to its negative, are float64 values each (protocol 6).
EXACT_MOST: Final = 2**53


class How(Enum):
    """How one field is converted."""

    #: nothing to do: type and content are the target's.
    KEEP = "keep"
    #: the source is of Arrow's null type.
    NULLS = "nulls"
    #: one safe cast.
    CAST = "cast"
    #: decode a dictionary, then cast its values.
    DICTIONARY = "dictionary"
    STRUCT = "struct"
    LIST = "list"
    MAP = "map"


@dataclass(frozen=True, slots=True)
class Step:
    """The conversion of one field and what is below it.

    Attributes:
        how: what to do.
        target: the canonical type to arrive at.
        path: the field's name for people, such as ``s.x``.
        children: a struct's target fields in order, each with the source's index (None: filled with
            nulls); a list's element; a map's key and value.
        slot: a dictionary's number among the stream's dictionary-encoded fields, depth first.
    """

    how: How
    target: pa.DataType
    path: str
    children: tuple[tuple[int | None, Step], ...] = ()
    slot: int = -1


class DictionaryValues:
    """A dictionary's values, with what is found out about them once for many batches."""

    def __init__(self, values: pa.Array) -> None:
        """Hold values.

        Args:
            values: plain (``plain_array``), not nested.
        """
        self.raw = values
        self._known: dict[pa.DataType, tuple[pa.Array, pa.Array | None, int]] = {}
        # Why all of them cannot be converted, by target, and the path that it names: found out once, like the values.
        # Thousands of columns may share a dictionary.
        self._refused: dict[pa.DataType, tuple[str, InvalidRequest]] = {}

    def as_type(self, target: pa.DataType, path: str, cast: Callable[[pa.Array], pa.Array]) -> tuple[pa.Array, int]:
        """Return the values in a table's type, and the longest one's bytes where they vary (else 0).

        Args:
            target: a canonical type.
            path: whose values they are, for people.
            cast: makes it of the values, if need be.

        Raises:
            InvalidRequest: what ``cast`` raised, each time.
        """
        known = self._known.get(target)
        if known is None:
            if (refusal := self._refused.get(target)) is not None:
                named, error = refusal
                if named == path:
                    raise error.with_traceback(None)
                raise type(error)(error.detail.replace(quote(named), quote(path), 1), code=error.code)
            try:
                values = self.raw if self.raw.type == target else cast(self.raw)
            except InvalidRequest as error:
                self._refused[target] = path, error
                raise
            varies = pa.types.is_string(target) or pa.types.is_binary(target)
            lengths = pc.binary_length(values).cast(pa.int64()) if varies else None
            known = values, lengths, (pc.max(lengths).as_py() or 0) if varies else 0
            self._known[target] = known
        return known[0], known[2]

    @property
    def fixed_width(self) -> bool:
        """Whether each value takes the same bytes: numbers and times."""
        return bool(pa.types.is_primitive(self.raw.type))

    def total_length(self, target: pa.DataType, indices: pa.Array) -> int:
        """Sum the bytes of the values that indices name; ``as_type`` comes first."""
        return pc.sum(pc.take(self._known[target][1], indices)).as_py() or 0


#: Gives the dictionary of a slot, or None when none has come.
Dictionaries = Callable[[int], "DictionaryValues | None"]


def invalid_batch(path: str, problem: str) -> InvalidRequest:
    """Make the error of a batch whose column ``path`` cannot be accepted."""
    return InvalidRequest(f"Invalid batch: column {quote(path)}: {cut(problem)}", code=ErrorCode.INVALID_BATCH)


class OverLimit(InvalidRequest):
    """A batch that decodes to more bytes than it may; told before they are made."""


def over_limit(path: str, limit_bytes: int, more: str = "") -> OverLimit:
    """Make the error of a batch that grows over a limit with column ``path``; ``more`` says how bytes are counted."""
    problem = f"the batch decodes to more than {limit_bytes} bytes (limits.batch_bytes){more}; send smaller batches"
    return OverLimit(invalid_batch(path, problem).detail, code=ErrorCode.INVALID_BATCH)


def _no_dictionaries(_slot: int) -> None:
    return None


class Converter:
    """Converts the columns of one batch, counting the bytes that they become.

    Args:
        limit_bytes: most bytes of all results together.
        dictionaries: for arrays of indices; arrays that carry their dictionary need none.
        values_bytes: most bytes of a dictionary's values, which are converted once for many batches; ``limit_bytes`` if
            None.
    """

    def __init__(
        self, limit_bytes: int, dictionaries: Dictionaries = _no_dictionaries, values_bytes: int | None = None
    ) -> None:
        self._limit = limit_bytes
        self._values_limit = limit_bytes if values_bytes is None else values_bytes
        self._left = limit_bytes
        self._dictionaries = dictionaries
        # The offsets of the lists around what is being converted, outermost first: they lead back to the row.
        self._lists_above: list[pa.Array] = []
        # The column that is being converted.
        self._column = ""

    def convert(self, array: pa.Array, step: Step) -> pa.Array:
        """Convert one column.

        Raises:
            InvalidRequest: ``invalid_batch``: a value does not fit, a required field is null, or the
                results would grow over the limit.
        """
        self._column = step.path
        try:
            return self._convert(array, step)
        except (pa.ArrowException, ValueError, IndexError, OverflowError) as error:
            raise invalid_batch(step.path, str(error)) from error

    def nulls(self, rows: int, step: Step) -> pa.Array:
        """Make a column of nulls."""
        self._spend(rows * _width(step.target), step)
        return null_array(rows, step.target)

    def _spend(self, size: int, step: Step) -> None:
        self._left -= size
        if self._left < 0:
            self._too_large(step)

    def _too_large(self, step: Step) -> NoReturn:
        raise over_limit(step.path, self._limit)

    def _convert(self, array: pa.Array, step: Step) -> pa.Array:
        if isinstance(array, pa.ExtensionArray) and step.how is not How.KEEP:
            array = array.storage
        match step.how:
            case How.KEEP:
                self._spend(array.nbytes, step)
                return array
            case How.NULLS:
                return self.nulls(len(array), step)
            case How.CAST:
                return self._cast(array, step)
            case How.DICTIONARY:
                return self._decode(array, step)
            case How.STRUCT:
                return self._struct(array, step)
            case How.LIST:
                lists, offsets, mask = self._lists(array, step)
                element = step.children[0][1]
                values = self._below(lists, offsets, element, step.target.value_field)
                return pa.ListArray.from_arrays(offsets, values, type=step.target, mask=mask)
            case How.MAP:
                entries, offsets, mask = self._lists(map_as_list(array), step)
                (_, key), (_, value) = step.children
                keys = self._below(entries.field(0), offsets, key, step.target.key_field)
                items = self._below(entries.field(1), offsets, value, step.target.item_field)
                return pa.MapArray.from_arrays(offsets, keys, items, type=step.target, mask=mask)

    def _below(self, values: pa.Array, offsets: pa.Array, step: Step, field: pa.Field) -> pa.Array:
        """Convert the children of lists, all of which can be seen."""
        self._lists_above.append(offsets)
        made = self._convert(values, step)
        if not field.nullable and made.null_count:
            raise invalid_batch(
                step.path,
                f"is required but {made.null_count} of its values are null, "
                f"row {self._row(pc.index(made.is_null(), True).as_py())} the first",
            )
        self._lists_above.pop()
        return made

    def _row(self, place: int) -> int:
        """The batch's row in which a value stands, by its place in the array that is being converted."""
        for offsets in reversed(self._lists_above):
            place = pc.sum(pc.less_equal(offsets, place)).as_py() - 1
        return place

    def _cast(self, array: pa.Array, step: Step) -> pa.Array:
        types = pa.types
        target = step.target
        if types.is_large_string(array.type) or types.is_large_binary(array.type):
            self._spend(array.nbytes, step)
        self._spend(len(array) * _width(target), step)
        if isinstance(target, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(target, array)
        if types.is_floating(array.type) != types.is_floating(target):
            self._check_whole(array, step)
        if array.type == target:
            return array
        try:
            return pc.cast(array, target, safe=True)
        except pa.ArrowInvalid as error:
            self._refuse(array, _first_refused(array, target), step, str(error), error)

    def _refuse(
        self, array: pa.Array, place: int, step: Step, problem: str, cause: Exception | None = None
    ) -> NoReturn:
        """Name the row and the value that cannot be converted."""
        where = "" if step.path == self._column else f" in {quote(step.path)}"
        raise invalid_batch(
            self._column or step.path, f"row {self._row(place)} holds {_spell(array, place)}{where}: {problem}"
        ) from cause

    def _check_whole(self, array: pa.Array, step: Step) -> None:
        """Check that numbers are the same as integers and as floats."""
        floating = pa.types.is_floating(array.type)
        if not floating and array.type.bit_width <= 32:
            return
        numbers = array.cast(pa.float64()) if floating else array
        limit = float(EXACT_MOST) if floating else EXACT_MOST
        within = pc.and_(pc.greater_equal(numbers, -limit), pc.less_equal(numbers, limit))
        if floating:
            # NaN and infinities are within nothing.
            within = pc.and_(within, pc.equal(numbers, pc.trunc(numbers)))
        place = pc.index(pc.fill_null(within, True), False).as_py()
        if place >= 0:
            problem = f"not the same as {type_name(step.target)}: expected a whole number from -2^53 to 2^53"
            self._refuse(array, place, step, problem)

    def _decode(self, array: pa.Array, step: Step) -> pa.Array:
        """Replace indices by their values, once it is known how long those are together."""
        held: DictionaryValues | None
        indices = array.indices if isinstance(array, pa.DictionaryArray) else array
        if indices.null_count == len(indices):
            # Nothing is done with values that no row names.
            return self.nulls(len(indices), step)
        if isinstance(array, pa.DictionaryArray):
            held = DictionaryValues(plain_array(array.dictionary))
        else:
            held = self._dictionaries(step.slot)
        if held is None:
            raise invalid_batch(step.path, "its dictionary has not been sent")
        try:
            # The values' own conversion has a limit to itself: it is done once for many batches.
            cast = partial(Converter(self._values_limit)._cast, step=step)
            values, longest = held.as_type(step.target, step.path, cast)
        except InvalidRequest:
            if not held.fixed_width:
                raise
            # One of the values does not fit; what no row names is of no account.
            return self._cast(held.raw.take(indices), step)
        self._spend(len(indices) * _width(step.target), step)
        most = len(indices) * longest
        if most > self._left:
            # The exact sum costs a pass over the rows: taken only where it can matter.
            most = held.total_length(step.target, indices)
        self._spend(most, step)
        return values.take(indices)

    def _struct(self, array: pa.Array, step: Step) -> pa.Array:
        # flatten() gives the children with the parent's nulls in them; without nulls it is the same.
        sources = array.flatten()
        rows = len(array)
        fields = list(step.target)
        children = []
        for field, (index, below) in zip(fields, step.children, strict=True):
            child = self.nulls(rows, below) if index is None else self._convert(sources[index], below)
            if not field.nullable and child.null_count:
                child = _hide_nulls(child, array, below.path)
            children.append(child)
        self._spend(rows // 8, step)
        mask = array.is_null() if array.null_count else None
        return pa.StructArray.from_arrays(children, fields=fields, mask=mask)

    def _lists(self, array: pa.Array, step: Step) -> tuple[pa.Array, pa.Array, pa.Array | None]:
        """Take a list array apart: the values of its valid lists, their offsets, and which are null."""
        rows = len(array)
        self._spend(4 * (rows + 1), step)
        lengths = pc.fill_null(pc.list_value_length(array).cast(pa.int64()), 0)
        sums = pc.cumulative_sum(lengths)
        offsets = pa.concat_arrays([pa.array([0], pa.int64()), sums]).cast(pa.int32())
        return array.flatten(), offsets, array.is_null() if array.null_count else None


def _spell(array: pa.Array, place: int) -> str:
    """Spell a value for a person: nanoseconds, which Python has not, included."""
    one = array.slice(place, 1)
    if pa.types.is_timestamp(array.type):
        one = one.cast(pa.timestamp(array.type.unit))
    try:
        return str(pc.cast(one, pa.string())[0].as_py())[:80]
    except pa.ArrowException:
        return str(one.to_pylist()[0])[:80]


def _first_refused(array: pa.Array, target: pa.DataType) -> int:
    """Find the first value that a safe cast refuses, of an array that has one."""
    low, high = 0, len(array)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pc.cast(array.slice(low, middle - low), target, safe=True)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _width(type_: pa.DataType) -> int:
    """Bytes per row that a column of this type has at least."""
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return _width(type_.storage_type)
    if types.is_struct(type_):
        return 1 + sum(_width(child.type) for child in type_)
    if types.is_nested(type_) or types.is_string(type_) or types.is_binary(type_):
        return 4
    return max(1, int(type_.bit_width) // 8)


def map_as_list(array: pa.MapArray) -> pa.ListArray:
    """View a map array as a list of its entries; no copy."""
    entries = pa.StructArray.from_arrays([array.keys, array.items], names=["key", "value"])
    buffers = array.buffers()[:2]
    return pa.Array.from_buffers(
        pa.list_(entries.type), len(array), buffers, array.null_count, array.offset, children=[entries]
    )


def _hide_nulls(child: pa.Array, parent: pa.Array, path: str) -> pa.Array:
    """Give a required field some value where its parent is null.

    Arrow's own builders leave such nulls behind, and Parquet's writer refuses them although nobody can
    see them.
    """
    seen = pc.and_(child.is_null(), parent.is_valid())
    count = pc.sum(seen).as_py() or 0
    if count:
        raise invalid_batch(path, f"is required but {count} of its values are null")
    return without_nulls(child)


def without_nulls(array: pa.Array) -> pa.Array:
    """Drop an array's validity: what stands in a null's place becomes a value."""
    if not array.null_count:
        return array
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(array.type, without_nulls(array.storage))
    children: list[Any] | None = None
    if pa.types.is_struct(array.type):
        children = [array.field(index) for index in range(array.type.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(array.type))
    buffers = [None, *array.buffers()[1:]]
    if pa.types.is_map(array.type):
        entry = pa.struct([array.type.key_field, array.type.item_field])
        children = [pa.StructArray.from_arrays([array.keys, array.items], fields=list(entry))]
        buffers = buffers[:2]
    elif pa.types.is_list(array.type):
        children = [array.values]
        buffers = buffers[:2]
    return pa.Array.from_buffers(array.type, len(array), buffers, 0, array.offset, children=children)


__all__ = [
    "EXACT_MOST",
    "Converter",
    "Dictionaries",
    "DictionaryValues",
    "How",
    "OverLimit",
    "Step",
    "invalid_batch",
    "map_as_list",
    "over_limit",
    "without_nulls",
]
