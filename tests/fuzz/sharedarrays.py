"""Arrays whose rows share bytes, as buffers and as an independent reading of those buffers.

A ``Shared`` is one array: a type, its buffers as numbers, its children. ``flatten`` gives what a message holds of it,
``read`` what a row means by Arrow's columnar format, ``sizes`` how many bytes each row means. ``read`` raises ``Bad``
where a row that can be seen means nothing: such a batch must be refused. What lies where no row can see it may be
anything; a server may refuse it or not.

Owns: the model. Does not own messages (``ipcbytes``) nor what is done to a batch (``fuzz_shared``).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pyarrow as pa

from tests.fuzz.ipcbytes import Flat

#: A view's bytes up to which they stand in the view itself.
INLINE = 12
#: A size that no limit allows; sums of a few million of them fit anywhere.
MOST = 2**40

WORDS = [b"", b"a", b"word", "naïve".encode(), b"twelve bytes", b"thirteen byte", b"x" * 100, b"y" * 3_000]


class Bad(Exception):
    """A row that can be seen means nothing."""


@dataclass
class Shared:
    """One array.

    Attributes:
        type: as it is on the wire.
        length: rows.
        valid: of each row; None for all.
        numbers: by buffer: values, offsets, sizes, indices, run ends; of views
            (length, prefix or text, buffer, offset).
        data: bytes of strings, or the data buffers of views.
        children: below; of a dictionary its values, of runs their values.
        null_count: what the field node says; None for the truth.
    """

    type: pa.DataType
    length: int
    valid: list[bool] | None = None
    numbers: dict[str, list[Any]] = field(default_factory=dict)
    data: list[bytes] = field(default_factory=list)
    children: list[Shared] = field(default_factory=list)
    null_count: int | None = None

    def walk(self) -> Iterator[Shared]:
        """This array and all below."""
        yield self
        for child in self.children:
            yield from child.walk()

    def sees(self, row: int) -> bool:
        """Whether a row is valid."""
        return self.valid is None or self.valid[row]


# -- making -------------------------------------------------------------------------------------------


def make(rng: random.Random, rows: int, depth: int) -> Shared:
    """Make an array whose rows share what they mean, more or less."""
    scalars = ["view", "view", "string", "number", "bool", "dictionary", "runs"]
    nested = ["list_view", "list_view", "list", "struct", "runs", "fixed"]
    kind = rng.choice(scalars if depth == 0 else scalars + nested * 2)
    made = globals()[f"_make_{kind}"](rng, rows, depth)
    assert isinstance(made, Shared)
    if kind != "runs" and rng.random() < 0.4:
        made.valid = [rng.random() < 0.8 for _ in range(rows)]
    return made


def _make_number(rng: random.Random, rows: int, _depth: int) -> Shared:
    type_ = rng.choice([pa.int64(), pa.int32(), pa.int8(), pa.uint16()])
    return Shared(type_, rows, numbers={"values": [rng.randrange(100) for _ in range(rows)]})


def _make_bool(rng: random.Random, rows: int, _depth: int) -> Shared:
    return Shared(pa.bool_(), rows, numbers={"values": [rng.randrange(2) for _ in range(rows)]})


def _make_string(rng: random.Random, rows: int, _depth: int) -> Shared:
    words = [rng.choice(WORDS) for _ in range(rows)]
    type_ = rng.choice([pa.string(), pa.large_string(), pa.binary()])
    return Shared(type_, rows, numbers={"offsets": [0, *accumulate(map(len, words))]}, data=[b"".join(words)])


def view_of(text: bytes, buffer: int, offset: int) -> tuple[int, bytes, int, int]:
    """A view of bytes that stand in a buffer, or in the view itself."""
    return (len(text), text, 0, 0) if len(text) <= INLINE else (len(text), text[:4], buffer, offset)


def _make_view(rng: random.Random, rows: int, _depth: int) -> Shared:
    buffers = [
        rng.choice([b"", b"z" * rng.choice([20, 500, 60_000])]) + b"".join(rng.sample(WORDS, 5))
        for _ in range(rng.randrange(1, 4))
    ]
    # A few ranges for all rows: that is what makes a view array mean more than it holds.
    ranges = []
    for _ in range(rng.randrange(1, 5)):
        buffer = rng.randrange(len(buffers))
        # Cut at characters, where the bytes are text.
        text = buffers[buffer].decode()
        start = rng.randrange(len(text) + 1)
        end = rng.choice([len(text), rng.randrange(start, len(text) + 1)])
        ranges.append(view_of(text[start:end].encode(), buffer, len(text[:start].encode())))
    type_ = rng.choice([pa.string_view(), pa.binary_view()])
    return Shared(type_, rows, numbers={"views": [rng.choice(ranges) for _ in range(rows)]}, data=buffers)


def _make_dictionary(rng: random.Random, rows: int, _depth: int) -> Shared:
    values = globals()[f"_make_{rng.choice(['view', 'string', 'number'])}"](rng, rng.randrange(1, 20), 0)
    indices = [rng.randrange(values.length) for _ in range(rows)]
    type_ = pa.dictionary(rng.choice([pa.int8(), pa.int16(), pa.int32()]), values.type)
    return Shared(type_, rows, numbers={"indices": indices}, children=[values])


def _make_runs(rng: random.Random, rows: int, depth: int) -> Shared:
    ends = sorted(rng.sample(range(1, rows + 1), min(rows, rng.randrange(1, 6)))) if rows else []
    if rows:
        ends[-1] = rng.choice([rows, rows, rows + 5])
    values = make(rng, len(ends), max(depth - 1, 0))
    while pa.types.is_run_end_encoded(values.type) or pa.types.is_dictionary(values.type):
        values = make(rng, len(ends), 0)
    type_ = pa.run_end_encoded(
        rng.choice([pa.int32(), pa.int64(), pa.int16()] if rows < 2**14 else [pa.int32()]), values.type
    )
    return Shared(type_, rows, numbers={"ends": ends}, children=[values])


def _make_list_view(rng: random.Random, rows: int, depth: int) -> Shared:
    child = make(rng, rng.choice([0, 1, 5, 200]), depth - 1)
    ranges = []
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(child.length + 1)
        ranges.append((start, rng.randrange(child.length - start + 1)))
    chosen = [rng.choice(ranges) for _ in range(rows)]
    type_ = rng.choice([pa.list_view, pa.large_list_view])(child.type)
    return Shared(
        type_,
        rows,
        numbers={"offsets": [at for at, _ in chosen], "sizes": [size for _, size in chosen]},
        children=[child],
    )


def _make_list(rng: random.Random, rows: int, depth: int) -> Shared:
    lengths = [rng.randrange(4) for _ in range(rows)]
    child = make(rng, sum(lengths) + rng.choice([0, 0, 3]), depth - 1)
    type_ = rng.choice([pa.list_, pa.large_list])(child.type)
    return Shared(type_, rows, numbers={"offsets": [0, *accumulate(lengths)]}, children=[child])


def _make_fixed(rng: random.Random, rows: int, depth: int) -> Shared:
    size = rng.randrange(1, 4)
    child = make(rng, rows * size, depth - 1)
    return Shared(pa.list_(child.type, size), rows, children=[child])


def _make_struct(rng: random.Random, rows: int, depth: int) -> Shared:
    children = [make(rng, rows, depth - 1) for _ in range(rng.randrange(1, 4))]
    type_ = pa.struct([(f"f{number}", child.type) for number, child in enumerate(children)])
    return Shared(type_, rows, children=children)


# -- as buffers -----------------------------------------------------------------------------------------


def _pack(form: str, numbers: Sequence[int]) -> bytes:
    """Pack integers, cut to their width."""
    width = struct.calcsize(form)
    return b"".join((number % (1 << (8 * width))).to_bytes(width, "little") for number in numbers)


def _bits(flags: Sequence[bool | int]) -> bytes:
    out = bytearray((len(flags) + 7) // 8)
    for place, flag in enumerate(flags):
        if flag:
            out[place // 8] |= 1 << place % 8
    return bytes(out)


def _form(type_: pa.DataType) -> str:
    return {8: "b", 16: "h", 32: "i", 64: "q"}[type_.bit_width]


def is_large(type_: pa.DataType) -> bool:
    """Whether offsets are of 64 bits."""
    types = pa.types
    return bool(types.is_large_string(type_) or types.is_large_list(type_) or types.is_large_list_view(type_))


def is_view(type_: pa.DataType) -> bool:
    """Whether it is a string or binary view."""
    return bool(pa.types.is_string_view(type_) or pa.types.is_binary_view(type_))


def is_text(type_: pa.DataType) -> bool:
    """Whether its bytes are UTF-8."""
    types = pa.types
    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def is_bytes(type_: pa.DataType) -> bool:
    """Whether it is a string or binary with offsets."""
    return bool(is_text(type_) or pa.types.is_binary(type_)) and not is_view(type_)


def view_bytes(view: tuple[int, bytes, int, int]) -> bytes:
    """The sixteen bytes of a view."""
    length, text, buffer, offset = view
    if 0 <= length <= INLINE:
        return _pack("i", [length]) + text[:INLINE].ljust(INLINE, b"\0")
    return _pack("i", [length]) + text[:4].ljust(4, b"\0") + _pack("i", [buffer, offset])


def flatten(array: Shared, into: Flat, dictionaries: list[Shared]) -> None:
    """Append what a message lists of an array; the values of dictionaries go into messages of their own."""
    types = pa.types
    type_ = array.type
    truth = 0 if array.valid is None else array.valid.count(False)
    into.nodes.append((array.length, truth if array.null_count is None else array.null_count))
    if types.is_run_end_encoded(type_):
        ends = array.numbers["ends"]
        into.nodes.append((len(ends), 0))
        into.buffers += [b"", _pack(_form(type_.run_end_type), ends)]
        flatten(array.children[0], into, dictionaries)
        return
    into.buffers.append(b"" if array.valid is None else _bits(array.valid))
    offset_form = "q" if is_large(type_) else "i"
    if is_view(type_):
        into.buffers += [b"".join(map(view_bytes, array.numbers["views"])), *array.data]
        into.variadic.append(len(array.data))
    elif is_bytes(type_):
        into.buffers += [_pack(offset_form, array.numbers["offsets"]), array.data[0]]
    elif types.is_dictionary(type_):
        into.buffers.append(_pack(_form(type_.index_type), array.numbers["indices"]))
        dictionaries.append(array.children[0])
    elif types.is_struct(type_) or types.is_fixed_size_list(type_):
        for child in array.children:
            flatten(child, into, dictionaries)
    elif types.is_list_view(type_) or types.is_large_list_view(type_):
        into.buffers += [_pack(offset_form, array.numbers["offsets"]), _pack(offset_form, array.numbers["sizes"])]
        flatten(array.children[0], into, dictionaries)
    elif types.is_list(type_) or types.is_large_list(type_):
        into.buffers.append(_pack(offset_form, array.numbers["offsets"]))
        flatten(array.children[0], into, dictionaries)
    elif types.is_boolean(type_):
        into.buffers.append(_bits(array.numbers["values"]))
    else:
        into.buffers.append(_pack(_form(type_), array.numbers["values"]))


# -- an independent reading -----------------------------------------------------------------------------


def _stored(form: str, number: int) -> int:
    """What a number is once it has been cut to its width."""
    bits = 8 * struct.calcsize(form)
    cut = number % (1 << bits)
    return cut - (1 << bits) if cut >> (bits - 1) else cut


def read(array: Shared, row: int) -> Any:
    """What a row means.

    Raises:
        Bad: nothing.
    """
    if row >= array.length:
        raise Bad("a row beyond its array")
    types = pa.types
    type_ = array.type
    if types.is_run_end_encoded(type_):
        return read(array.children[0], _run_of(array, row))
    if not array.sees(row):
        return None
    if is_view(type_):
        return _text(type_, _viewed(array, array.numbers["views"][row]))
    if types.is_dictionary(type_):
        index = _stored(_form(type_.index_type), array.numbers["indices"][row])
        if not 0 <= index < array.children[0].length:
            raise Bad("an index outside its dictionary")
        return read(array.children[0], index)
    if types.is_struct(type_):
        return {field.name: read(child, row) for field, child in zip(type_, array.children, strict=True)}
    if types.is_fixed_size_list(type_):
        return [read(array.children[0], at) for at in range(row * type_.list_size, (row + 1) * type_.list_size)]
    if types.is_boolean(type_):
        return bool(array.numbers["values"][row])
    if "offsets" in array.numbers:
        return _ranged(array, row)
    number = array.numbers["values"][row]
    return number % (1 << type_.bit_width) if types.is_unsigned_integer(type_) else _stored(_form(type_), number)


def _ranged(array: Shared, row: int) -> Any:
    """What a row of strings, lists or list views means."""
    form = "q" if is_large(array.type) else "i"
    start = _stored(form, array.numbers["offsets"][row])
    if "sizes" in array.numbers:
        end = start + _stored(form, array.numbers["sizes"][row])
    else:
        end = _stored(form, array.numbers["offsets"][row + 1])
    there = array.children[0].length if array.children else len(array.data[0])
    if not 0 <= start <= end <= there:
        raise Bad("a range outside its values")
    if array.children:
        return [read(array.children[0], at) for at in range(start, end)]
    return _text(array.type, array.data[0][start:end])


def _run_of(array: Shared, row: int) -> int:
    form = _form(array.type.run_end_type)
    ends = [_stored(form, end) for end in array.numbers["ends"]]
    if any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
        raise Bad("run ends that do not rise")
    if len(ends) > array.children[0].length:
        raise Bad("more runs than values")
    for place, end in enumerate(ends):
        if row < end:
            return place
    raise Bad("runs that end before the rows do")


def _viewed(array: Shared, view: tuple[int, bytes, int, int]) -> bytes:
    raw = view_bytes(view)
    length = struct.unpack_from("<i", raw)[0]
    if length < 0:
        raise Bad("a negative length")
    if length <= INLINE:
        if any(raw[4 + length :]):
            raise Bad("bytes after an inline view")
        return raw[4 : 4 + length]
    buffer, offset = struct.unpack_from("<ii", raw, 8)
    if not 0 <= buffer < len(array.data) or offset < 0 or offset + length > len(array.data[buffer]):
        raise Bad("a view outside its buffers")
    found = array.data[buffer][offset : offset + length]
    if found[:4] != raw[4:8]:
        raise Bad("a prefix that is not its string's")
    return found


def _text(type_: pa.DataType, found: bytes) -> str | bytes:
    if not is_text(type_):
        return found
    try:
        return found.decode()
    except UnicodeDecodeError:
        raise Bad("not UTF-8") from None


def sizes(array: Shared) -> list[int]:
    """How many bytes each row means, about, each value as often as it is named; 0 for what means nothing."""
    types = pa.types
    type_ = array.type
    rows = range(array.length)
    if types.is_run_end_encoded(type_):
        below = sizes(array.children[0])
        out: list[int] = []
        for place, end in enumerate(array.numbers["ends"]):
            count = min(end, array.length) - len(out)
            if count > 0 and place < len(below):
                out += [below[place]] * count
        return out + [0] * (array.length - len(out))
    if is_view(type_):
        lengths = [view[0] for view in array.numbers["views"]]
        return [max(lengths[row], 0) if array.sees(row) else 0 for row in rows]
    if types.is_dictionary(type_):
        below = sizes(array.children[0])
        indices = array.numbers["indices"]
        return [below[indices[row]] if array.sees(row) and 0 <= indices[row] < len(below) else 0 for row in rows]
    if types.is_struct(type_):
        parts = [sizes(child) for child in array.children]
        return [sum(part[row] for part in parts if row < len(part)) if array.sees(row) else 0 for row in rows]
    if "offsets" not in array.numbers and not types.is_fixed_size_list(type_):
        return [type_.bit_width // 8] * array.length
    sums = [0, *accumulate(sizes(array.children[0]))] if array.children else list(range(len(array.data[0]) + 1))
    out = []
    for row in rows:
        if types.is_fixed_size_list(type_):
            start, end = row * type_.list_size, (row + 1) * type_.list_size
        else:
            start = array.numbers["offsets"][row]
            end = start + array.numbers["sizes"][row] if "sizes" in array.numbers else array.numbers["offsets"][row + 1]
        fits = array.sees(row) and 0 <= start <= end < len(sums)
        out.append(min(sums[end] - sums[start], MOST) if fits else 0)
    return out
