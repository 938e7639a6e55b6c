"""Arrays that name one value many times: counted, then written out plain (T14, T23).

Owns: what such arrays refer to in bytes, told before anything walks them, and their plain form. Does not own
casts (``convert``), dictionaries' values by stream (``dictionaries``) nor which types a table takes (``conform``).

| type | plain form |
|---|---|
| ``string_view``, ``binary_view`` | ``string``, ``binary`` |
| ``list_view``, ``large_list_view`` | ``list`` |
| ``run_end_encoded`` | its values |

A message of 5 kB may name one string of 60 MB two million times. Arrow validates, casts and copies such an array
value by value, so its size is summed first, from offsets, lengths and run ends alone.
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from arka._core import ipc
from arka.flight.layout import is_list_like, is_scalar

#: More bytes than any row may have: sums of rows that are cut to this cannot overflow an int64.
_MOST: Final = 2**36


def is_plain(type_: pa.DataType) -> bool:
    """Tell whether each value of such arrays stands in them once (dictionaries aside)."""
    if is_scalar(type_):
        return True
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return is_plain(type_.storage_type)
    if (
        types.is_string_view(type_)
        or types.is_binary_view(type_)
        or types.is_list_view(type_)
        or types.is_large_list_view(type_)
        or types.is_run_end_encoded(type_)
    ):
        return False
    if types.is_map(type_):
        return is_plain(type_.key_type) and is_plain(type_.item_type)
    if types.is_struct(type_):
        return all(is_plain(child.type) for child in type_)
    return is_plain(type_.value_type) if is_list_like(type_) or types.is_dictionary(type_) else True


def plain_type(type_: pa.DataType) -> pa.DataType:
    """Return the type of an array's plain form; a type that is plain stands for itself."""
    made = _made_plain(type_)
    return type_ if made is None else made


def _made_plain(type_: pa.DataType) -> pa.DataType | None:
    """The plain form of a type that is not plain, else None: each level is looked at once, however deep it lies."""
    if is_scalar(type_):
        return None
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return _made_plain(type_.storage_type)
    if types.is_string_view(type_):
        return pa.string()
    if types.is_binary_view(type_):
        return pa.binary()
    if types.is_run_end_encoded(type_):
        return plain_type(type_.value_type)
    if types.is_dictionary(type_):
        values = _made_plain(type_.value_type)
        return None if values is None else pa.dictionary(type_.index_type, values)
    if types.is_struct(type_):
        children = [_made_plain(child.type) for child in type_]
        if all(child is None for child in children):
            return None
        return pa.struct([_with_type(field, child) for field, child in zip(type_, children, strict=True)])
    if types.is_map(type_):
        key, item = _made_plain(type_.key_type), _made_plain(type_.item_type)
        if key is None and item is None:
            return None
        return pa.map_(_with_type(type_.key_field, key), _with_type(type_.item_field, item))
    if not is_list_like(type_):
        return None
    element = _made_plain(type_.value_type)
    is_view = types.is_list_view(type_) or types.is_large_list_view(type_)
    if element is None and not is_view:
        return None
    field = _with_type(type_.value_field, element)
    if types.is_fixed_size_list(type_):
        return pa.list_(field, type_.list_size)
    return pa.large_list(field) if types.is_large_list(type_) else pa.list_(field)


def _with_type(field: pa.Field, type_: pa.DataType | None) -> pa.Field:
    return field if type_ is None else field.with_type(type_)


# -- counting -------------------------------------------------------------------------------------


def referred_bytes(array: pa.Array, most_rows: int) -> int:
    """Sum what an array refers to, each value as often as it is named.

    Args:
        array: its buffers are as long as its length needs (``validate()``); nothing else of it is trusted.
        most_rows: most rows of an array that is not plain, at any depth: runs make rows of no bytes at all.

    Returns:
        Bytes, about, of the rows or of the children, whichever are more; a row of more than 2**36 counts as that many.

    Raises:
        ValueError: offsets, lengths or run ends that cannot be, or too many rows.
    """
    if is_plain(array.type):
        return int(array.nbytes)
    array = _storage(array)
    types = pa.types
    kind = array.type
    if len(array) > most_rows:
        raise ValueError(f"{len(array)} rows, at most {most_rows} are legal in {kind}")
    if types.is_struct(kind):
        # Not flatten(): it would copy what was not counted yet.
        return sum(referred_bytes(array.field(index), most_rows) for index in range(kind.num_fields))
    if types.is_map(kind):
        return sum(referred_bytes(child, most_rows) for child in (array.keys, array.items))
    if types.is_run_end_encoded(kind):
        below = referred_bytes(array.values, most_rows)
        _check_runs(array)
        ends = pc.min_element_wise(array.run_ends.cast(pa.int64()), array.offset + len(array))
        before = pa.concat_arrays([pa.array([0], pa.int64()), ends.slice(0, max(len(ends) - 1, 0))])
        counts = pc.subtract(ends, before.slice(0, len(ends)))
        sizes = pc.multiply(_row_bytes(array.values).slice(0, len(ends)), counts)
        return max(below, pc.sum(pc.min_element_wise(sizes, pa.scalar(_MOST, pa.int64()))).as_py() or 0)
    if is_list_like(kind):
        below = referred_bytes(array.values, most_rows)
        if not (types.is_list_view(kind) or types.is_large_list_view(kind)):
            return below
        return max(below, pc.sum(_row_bytes(array)).as_py() or 0)
    return pc.sum(_row_bytes(array)).as_py() or 0


def _row_bytes(array: pa.Array) -> pa.Array:
    """Return what each row refers to, in bytes, as int64 without nulls."""
    array = _storage(array)
    types = pa.types
    rows = len(array)
    kind = array.type
    if types.is_string_view(kind) or types.is_binary_view(kind):
        sizes = pc.add(_view_lengths(array), 16)
    elif types.is_run_end_encoded(kind):
        sizes = _row_bytes(array.values).take(_run_indices(array))
    elif types.is_struct(kind):
        sizes = _repeat(1, rows)
        for index in range(kind.num_fields):
            sizes = pc.add(sizes, _row_bytes(array.field(index)))
    elif types.is_fixed_size_list(kind):
        starts = pa.arange(
            array.offset * kind.list_size, (array.offset + rows) * kind.list_size, max(kind.list_size, 1)
        )
        sizes = _ranges(array.values, starts.slice(0, rows), _repeat(kind.list_size, rows))
    elif types.is_list_view(kind) or types.is_large_list_view(kind):
        sizes = _ranges(array.values, *_view_ranges(array))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        starts, lengths = _offset_ranges(array.offsets.cast(pa.int64()))
        values = (
            pa.StructArray.from_arrays([array.keys, array.items], ["k", "v"]) if types.is_map(kind) else array.values
        )
        sizes = _ranges(values, starts, lengths)
    elif types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        wide = types.is_large_string(kind) or types.is_large_binary(kind)
        offsets = pa.Array.from_buffers(
            pa.int64() if wide else pa.int32(), rows + 1 if rows else 0, [None, array.buffers()[1]], 0, array.offset
        )
        lengths = _offset_ranges(offsets.cast(pa.int64()))[1]
        if array.null_count:
            # What stands in a null's place is no value, however long it is.
            lengths = pc.if_else(array.is_valid(), lengths, 0)
        sizes = pc.add(lengths, 8)
    else:
        width = 0 if types.is_null(kind) or types.is_union(kind) else max(1, int(kind.bit_width) // 8)
        sizes = _repeat(width, rows)
    return pc.min_element_wise(sizes, pa.scalar(_MOST, pa.int64()))


def _repeat(value: int, rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.int64()), rows)


def _offset_ranges(offsets: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return where each list begins and how long it is."""
    if len(offsets) == 0:
        return offsets, offsets
    starts = offsets.slice(0, len(offsets) - 1)
    return starts, pc.subtract(offsets.slice(1), starts)


def _view_ranges(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return where each list view begins and how long it is; a null one is empty."""
    starts, lengths = array.offsets.cast(pa.int64()), array.sizes.cast(pa.int64())
    if array.null_count:
        valid = array.is_valid()
        starts, lengths = (pc.if_else(valid, it, 0) for it in (starts, lengths))
    return starts, lengths


def _ranges(values: pa.Array, starts: pa.Array, lengths: pa.Array) -> pa.Array:
    """Sum the bytes of ranges of values.

    Raises:
        ValueError: one of them leaves the values.
    """
    _check_ranges(starts, lengths, len(values))
    sums = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(_row_bytes(values))])
    return pc.subtract(sums.take(pc.add(starts, lengths)), sums.take(starts))


def _check_ranges(starts: pa.Array, lengths: pa.Array, count: int) -> None:
    if len(starts) == 0:
        return
    # Starts and lengths are int32 or int64 as sent: each is held to the values before they are added.
    for numbers, what in ((starts, "offset"), (lengths, "size")):
        found = pc.min_max(numbers)
        if found["min"].as_py() < 0 or found["max"].as_py() > count:
            raise ValueError(f"a list's {what} leaves its {count} values")
    if pc.max(pc.add(starts, lengths)).as_py() > count:
        raise ValueError(f"a list leaves its {count} values")


def _cleaned(array: pa.Array) -> tuple[bytes, pa.Buffer | None, list[pa.Buffer]]:
    """Return a view array's views, empty where they are null, with its validity and data.

    Arrow checks no view in a null's place and follows it all the same in casts (T13).
    """
    validity, views, *data = array.buffers()
    bits = validity if array.null_count else None
    cleaned, _ = ipc.clean_views(views or b"", bits, array.offset, len(array))
    return cleaned, bits, data


def _view_lengths(array: pa.Array) -> pa.Array:
    cleaned, _, _ = _cleaned(array)
    words = pa.Array.from_buffers(pa.int32(), 4 * len(array), [None, pa.py_buffer(cleaned)], 0)
    return words.take(pa.arange(0, 4 * len(array), 4)).cast(pa.int64())


def _check_runs(array: pa.Array) -> None:
    """Check that an array's runs rise and cover its rows.

    Raises:
        ValueError: they do not.
    """
    ends, count = array.run_ends, len(array.values)
    wide = ends.cast(pa.int64())
    if ends.null_count or len(ends) > count:
        raise ValueError(f"{len(ends)} run ends, {ends.null_count} of them null, for {count} values")
    if len(array) == 0:
        return
    before = pa.concat_arrays([pa.array([0], pa.int64()), wide.slice(0, max(len(wide) - 1, 0))])
    if len(wide) == 0 or not pc.all(pc.greater(wide, before.slice(0, len(wide)))).as_py():
        raise ValueError("its run ends do not rise from 1")
    if wide[len(wide) - 1].as_py() < array.offset + len(array):
        raise ValueError(f"its runs end before row {len(array)}")


def _run_indices(array: pa.Array) -> pa.Array:
    """Return for each row of a run-end encoded array the place of its value.

    Raises:
        ValueError: its run ends do not rise, or end before the rows do.
    """
    _check_runs(array)
    ends = array.run_ends
    if len(array) == 0:
        return pa.array([], pa.int64())
    places = pa.Array.from_buffers(
        pa.run_end_encoded(ends.type, pa.int64()), len(array), [None], 0, array.offset,
        children=[ends, pa.arange(0, len(ends), 1)],
    )  # fmt: skip
    return pc.run_end_decode(places)


# -- writing out ----------------------------------------------------------------------------------


def plain_array(array: pa.Array) -> pa.Array:
    """Return an array in its plain form.

    Args:
        array: valid (``validate(full=True)``), and ``referred_bytes`` of it is within a limit.

    Returns:
        The same values as ``plain_type`` has them. What stands in a null's place is of no account.
    """
    if is_plain(array.type):
        return array
    array = _storage(array)
    types = pa.types
    kind = array.type
    target = plain_type(kind)
    mask = array.is_null() if not types.is_run_end_encoded(kind) and array.null_count else None
    if types.is_string_view(kind) or types.is_binary_view(kind):
        cleaned, bits, data = _cleaned(array)
        validity = array.is_valid().buffers()[1] if bits is not None else None
        buffers = [validity, pa.py_buffer(cleaned), *data]
        return pc.cast(pa.Array.from_buffers(kind, len(array), buffers, array.null_count), target)
    if types.is_run_end_encoded(kind):
        return plain_array(array.values).take(_run_indices(array))
    if types.is_struct(kind):
        children = [plain_array(array.field(index)) for index in range(kind.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(target), mask=mask)
    if types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(array.indices, plain_array(array.dictionary))
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        starts, lengths = _view_ranges(array)
        offsets = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(lengths)])
        values = plain_array(array.values).take(_spread(starts, offsets))
        return pa.ListArray.from_arrays(offsets.cast(pa.int32()), values, type=target, mask=mask)
    # Its offsets stay; a slice would leave them with an offset of its own, which from_buffers keeps.
    child = map_entries(array) if types.is_map(kind) else array.values
    made: list[Any] = [plain_array(child)]
    return pa.Array.from_buffers(
        target, len(array), array.buffers()[: 1 if types.is_fixed_size_list(kind) else 2], array.null_count,
        array.offset, children=made,
    )  # fmt: skip


def _spread(starts: pa.Array, offsets: pa.Array) -> pa.Array:
    """Return the place of each element of ranges that follow each other from ``offsets`` on."""
    total = offsets[len(offsets) - 1].as_py()
    lists = pa.LargeListArray.from_arrays(offsets, pa.nulls(total))
    shift = pc.subtract(starts, offsets.slice(0, len(starts)))
    return pc.add(pa.arange(0, total, 1), shift.take(pc.list_parent_indices(lists)))


def map_entries(array: pa.MapArray) -> pa.StructArray:
    """Return a map's entries as structs of key and value; no copy."""
    fields = [array.type.key_field, array.type.item_field]
    return pa.StructArray.from_arrays([array.keys, array.items], fields=fields)


def _storage(array: pa.Array) -> pa.Array:
    return array.storage if isinstance(array, pa.ExtensionArray) else array


__all__ = ["is_plain", "map_entries", "plain_array", "plain_type", "referred_bytes"]
