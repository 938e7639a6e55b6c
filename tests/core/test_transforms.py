"""Partition transforms give exactly the Iceberg spec's results, for each type, null, sign and slice."""

from __future__ import annotations

import ctypes
import datetime as dt
import gc
import pickle
import random
import struct
import sys
from decimal import Decimal, localcontext
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import pyiceberg.transforms
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyiceberg.types import (
    BinaryType,
    BooleanType,
    DateType,
    DecimalType,
    DoubleType,
    FixedType,
    FloatType,
    IntegerType,
    LongType,
    PrimitiveType,
    StringType,
    TimestampNanoType,
    TimestampType,
    TimestamptzNanoType,
    TimestamptzType,
    TimeType,
    UUIDType,
)

from arka._core.transforms import Transform, parse_transform, split_batch
from tests.core.oracle_transforms import internal_values, make_array, murmur3_x86_32, transform

INT, LONG = pa.int32(), pa.int64()
DATE, TIME, TS, TSTZ = pa.date32(), pa.time64("us"), pa.timestamp("us"), pa.timestamp("us", tz="UTC")
NS, NSTZ = pa.timestamp("ns"), pa.timestamp("ns", tz="UTC")
DECIMALS = [
    pa.decimal128(2, 0),
    pa.decimal128(9, 2),
    pa.decimal128(18, 4),
    pa.decimal128(19, 0),
    pa.decimal128(38, 10),
]
STRINGS = [pa.string(), pa.large_string()]
BINARIES = [pa.binary(), pa.large_binary()]
FIXED = [pa.binary(1), pa.binary(16), pa.binary(21)]
DATES = [DATE, TS, TSTZ, NS, NSTZ]

#: Which types the spec's table allows for which transform.
SPEC = {
    "identity": [
        *(pa.bool_(), INT, LONG, pa.float32(), pa.float64(), TIME, pa.uuid()),
        *(*DECIMALS, *DATES, *STRINGS, *BINARIES, *FIXED),
    ],
    "bucket[16]": [INT, LONG, TIME, pa.uuid(), *DECIMALS, *DATES, *STRINGS, *BINARIES, *FIXED],
    "truncate[10]": [INT, LONG, *DECIMALS, *STRINGS, *BINARIES],
    "year": DATES,
    "month": DATES,
    "day": DATES,
    "hour": DATES[1:],
}
EVERY_TYPE = SPEC["identity"]
NEVER = [
    *(pa.int8(), pa.int16(), pa.uint32(), pa.uint64(), pa.float16(), pa.decimal256(50, 2)),
    *(
        pa.date64(),
        pa.time32("ms"),
        pa.time64("ns"),
        pa.timestamp("s"),
        pa.timestamp("ms"),
        pa.duration("us"),
    ),
    *(pa.null(), pa.string_view(), pa.dictionary(INT, pa.string()), pa.json_(pa.string())),
    *(pa.list_(INT), pa.struct([("a", INT)]), pa.map_(INT, INT)),
]

#: Limits of what Python's datetime, and with it pyiceberg's scalar code, can express.
YEAR_1, YEAR_9999 = -719_162, 2_932_896


def decimal_of(number: int, scale: int) -> Decimal:
    """Build a decimal exactly, whatever the context's precision."""
    return Decimal((int(number < 0), tuple(map(int, str(abs(number)))), -scale))


def values_of(kind: pa.DataType) -> st.SearchStrategy[object]:
    """Return internal values of a type, the extremes often among them."""
    if kind == pa.bool_():
        return st.booleans()
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_decimal(kind):
        top = 10**kind.precision - 1
        powers = [power for power in (7, 15, 31, 63, 64, 71, 95) if 2**power < top]
        near = [sign * 2**power for power in powers for sign in (1, -1)] + [top, -top, 0]
        numbers = st.integers(-top, top) | st.builds(
            lambda edge, by: max(-top, min(top, edge + by)), st.sampled_from(near), st.integers(-300, 300)
        )
        return numbers.map(lambda number: decimal_of(number, kind.scale))
    if kind in STRINGS:
        return st.text(max_size=24) | st.text("aé€😀", max_size=40)
    if kind in BINARIES:
        return st.binary(max_size=40)
    if kind in FIXED or kind == pa.uuid():
        return st.binary(min_size=kind.byte_width, max_size=kind.byte_width)
    if kind == TIME:
        return st.integers(0, 86_400_000_000 - 1)
    bits = kind.bit_width
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    numbers = st.integers(low, high) | st.sampled_from([low, low + 1, -1, 0, 1, high]) | st.integers(-300, 300)
    if pa.types.is_timestamp(kind):
        second = 10**6 if kind.unit == "us" else 10**9
        day = 86_400 * second
        numbers |= st.builds(
            lambda days, by: max(low, min(high, days * day + by)),
            st.integers(-5_000_000, 5_000_000),
            st.sampled_from([-second, -second + 1, -1, 0, 1, second]),
        )
    if kind == DATE:
        numbers |= st.integers(YEAR_1, YEAR_9999) | st.sampled_from([YEAR_1, YEAR_9999])
    return numbers


def sized(text: str) -> st.SearchStrategy[str]:
    """Return spellings of a transform with every size of its parameter."""
    name, bracket, _ = text.partition("[")
    if not bracket:
        return st.just(text)
    sizes = st.integers(1, 40) | st.integers(1, 2**31 - 1) | st.sampled_from([2**10, 2**31 - 1])
    return sizes.map(lambda size: f"{name}[{size}]")


@st.composite
def cases(draw: st.DrawFn, text: str) -> tuple[str, pa.DataType, list[object], int, int]:
    """Draw a transform, a type it takes, values, and how many rows before and after a slice leaves out."""
    kind = draw(st.sampled_from(SPEC[text]))
    element = values_of(kind)
    if draw(st.booleans()):
        element = st.none() | element
    values = draw(st.lists(element, max_size=40))
    before = draw(st.integers(0, min(17, len(values))))
    return draw(sized(text)), kind, values, before, draw(st.integers(0, min(3, len(values) - before)))


def expected(text: str, kind: pa.DataType, values: list[object]) -> list[object] | None:
    """Return the oracle's results, or None when one of them cannot be represented."""
    try:
        return [transform(text, kind, value) for value in values]
    except OverflowError:
        return None


def same(found: list[object], wanted: list[object]) -> bool:
    """Compare with NaN equal to itself and -0.0 unlike 0.0."""
    return len(found) == len(wanted) and all(map(lambda a, b: repr(a) == repr(b), found, wanted))


def iceberg_type(kind: pa.DataType) -> PrimitiveType:
    """Return the Iceberg type that an Arrow type stands for."""
    if pa.types.is_decimal(kind):
        return DecimalType(kind.precision, kind.scale)
    if kind in FIXED:
        return FixedType(kind.byte_width)
    return {
        pa.bool_(): BooleanType(), INT: IntegerType(), LONG: LongType(), pa.float32(): FloatType(),
        pa.float64(): DoubleType(), DATE: DateType(), TIME: TimeType(), TS: TimestampType(),
        TSTZ: TimestamptzType(), NS: TimestampNanoType(), NSTZ: TimestamptzNanoType(), pa.uuid(): UUIDType(),
        pa.string(): StringType(), pa.large_string(): StringType(),
        pa.binary(): BinaryType(), pa.large_binary(): BinaryType(),
    }[kind]  # fmt: skip


def within_datetime(text: str, kind: pa.DataType, value: object) -> bool:
    """Tell whether pyiceberg, which goes through Python's datetime, can express the value's year."""
    if value is None or text not in ("year", "month"):
        return True
    return YEAR_1 <= transform("day", kind, value) <= YEAR_9999


@pytest.mark.parametrize("name", SPEC)
@given(data=st.data())
def test_results_are_the_specs(name, data):
    """For each type, a transformed slice equals the oracle and pyiceberg's scalar code, null for null."""
    text, kind, values, before, after = data.draw(cases(name))
    whole = make_array(kind, values)
    array = whole.slice(before, len(values) - before - after)
    values = values[before : len(values) - after]
    bound = parse_transform(text)
    wanted = expected(text, kind, values)
    if wanted is None:
        with pytest.raises(ValueError, match="has no result"):
            bound.apply(array)
        with pytest.raises(ValueError, match="has no result"):
            bound.check_values(array)
        return
    bound.check_values(array)
    result = bound.apply(array)
    if not pa.types.is_decimal(result.type):  # truncation may leave the precision, see the next test
        result.validate(full=True)
    assert result.type == bound.result_type(kind)
    assert result.null_count == array.null_count
    assert same(internal_values(result), wanted)
    scalar = pyiceberg.transforms.parse_transform(text).transform(iceberg_type(kind))
    for value, found in zip(values, wanted, strict=True):
        if within_datetime(text, kind, value):
            assert same([found], [scalar(value)]), value


@pytest.mark.parametrize("precision", [2, 9, 18, 19, 38])
def test_truncated_decimals_stay_within_their_precision(precision):
    """A result with a digit more than the type has is refused: no commit could write it (R17)."""
    with localcontext() as context:
        context.prec = 60
        least = -(Decimal(10) ** precision - 1)
        kind = pa.decimal128(precision, 0)
        transform = parse_transform("truncate[10]")
        assert transform.apply(pa.array([least + 9], kind)).to_pylist() == [least + 9]
        with pytest.raises(ValueError, match=r"truncate\[10\] has no result"):
            transform.check_values(pa.array([least], kind))


#: Iceberg spec, appendix B: the hashes of example values.
HASHES = [
    (INT, 34, 2017239379),
    (LONG, 34, 2017239379),
    (pa.decimal128(9, 2), Decimal("14.20"), -500754589),
    (DATE, 17_486, -653330422),
    (TIME, 81_068_000_000, -662762989),
    (TS, 1_510_871_468_000_000, -2047944441),
    (TS, 1_510_871_468_000_001, -1207196810),
    (TSTZ, 1_510_871_468_000_000, -2047944441),
    (TSTZ, 1_510_871_468_000_001, -1207196810),
    (NS, 1_510_871_468_000_000_000, -2047944441),
    (NS, 1_510_871_468_000_001_001, -1207196810),
    (NSTZ, 1_510_871_468_000_001_001, -1207196810),
    (pa.string(), "iceberg", 1210000089),
    (pa.large_string(), "iceberg", 1210000089),
    (pa.uuid(), UUID("f79c3e09-677c-4bbd-a479-3f349cb785e7").bytes, 1488055340),
    (pa.binary(4), b"\x00\x01\x02\x03", -188683207),
    (pa.binary(), b"\x00\x01\x02\x03", -188683207),
    (pa.large_binary(), b"\x00\x01\x02\x03", -188683207),
]


@pytest.mark.parametrize(("kind", "value", "digest"), HASHES)
def test_hashes_of_the_spec(kind, value, digest):
    """Bucket numbers come from the hashes that the spec lists, for any N."""
    for count in (1, 2, 16, 1000, 2**31 - 1):
        result = parse_transform(f"bucket[{count}]").apply(make_array(kind, [value]))
        assert result.to_pylist() == [(digest & 0x7FFFFFFF) % count]


@given(st.binary(max_size=70), st.integers(1, 2**31 - 1))
def test_bucket_of_any_length(data, count):
    """All tail lengths of the hash, with any N."""
    wanted = (murmur3_x86_32(data) & 0x7FFFFFFF) % count
    bound = parse_transform(f"bucket[{count}]")
    assert bound.apply(pa.array([data], pa.binary())).to_pylist() == [wanted]
    assert bound.apply(pa.array([data], pa.binary(len(data)))).to_pylist() == [wanted] or not data


def every_month() -> list[int]:
    """Return the days around each turn of a month of the years 1 to 9999, and some far from them."""
    months = [dt.date(year, month, 1).toordinal() - 719_163 for year in range(1, 10_000) for month in range(1, 13)]
    rng = random.Random(1)
    far = [rng.randrange(-(2**31), 2**31) for _ in range(2_000)] + [-(2**31), 2**31 - 1]
    return [day for first in months for day in (first - 1, first)] + far


@pytest.mark.parametrize("text", ["year", "month"])
def test_calendar(text):
    """Years and months turn on the first of the month, over all of Python's calendar and all of date32."""
    days = every_month()
    wanted = [transform(text, DATE, day) for day in days]
    bound = parse_transform(text)
    assert bound.apply(make_array(DATE, days)).to_pylist() == wanted
    for kind, per_day in ((TS, 86_400_000_000), (NS, 86_400_000_000_000)):
        inside = [i for i, day in enumerate(days) if -(2**63) <= day * per_day < 2**63 - per_day]
        for by in (0, per_day - 1):
            array = make_array(kind, [days[i] * per_day + by for i in inside])
            assert bound.apply(array).to_pylist() == [wanted[i] for i in inside]


@pytest.mark.parametrize(
    ("text", "value", "wanted"),
    [
        ("year", -1, -1), ("month", -1, -1), ("day", -1, -1), ("hour", -1, -1),
        ("year", 0, 0), ("month", 0, 0), ("day", 0, 0), ("hour", 0, 0),
        # The last microseconds before a midnight before 1970, where pyiceberg-core 0.11 says -7206.
        ("day", -622_598_400_104_760, -7207),
        ("day", -622_598_400_000_000, -7206), ("day", -622_598_400_000_001, -7207),
        ("hour", -3_600_000_000, -1), ("hour", -3_600_000_001, -2),
        ("hour", -(2**31) * 3_600_000_000, -(2**31)), ("hour", 2**31 * 3_600_000_000 - 1, 2**31 - 1),
        # 292,277 years either way; 10 January 294247, 21 December 290309 BC.
        ("year", -(2**63), -292_278), ("month", 2**63 - 1, 292_277 * 12),
    ],
)  # fmt: skip
def test_floors_towards_the_past(text, value, wanted):
    """Time before 1970 belongs to the unit that began before it."""
    assert transform(text, TS, value) == wanted
    assert parse_transform(text).apply(make_array(TS, [value])).to_pylist() == [wanted]


@pytest.mark.parametrize("kind", [INT, LONG])
@pytest.mark.parametrize("width", [1, 2, 7, 10, 2**16, 2**31 - 1])
def test_truncation_at_the_end_of_the_range(kind, width):
    """The least number with a result has it; the one below is refused, unless it is null."""
    least = -(2 ** (kind.bit_width - 1) // width) * width
    bound = parse_transform(f"truncate[{width}]")
    top = 2 ** (kind.bit_width - 1) - 1
    values = [least, least + 1, least + width - 1, -1, 0, 1, top, top - 1, None]
    assert bound.apply(pa.array(values, kind)).to_pylist() == [
        None if value is None else value - value % width for value in values
    ]
    if least > -top - 1:
        with pytest.raises(ValueError, match=f"truncate.* has no result for the {kind} in row 70"):
            bound.apply(pa.array([0] * 70 + [least - 1], kind))
        with pytest.raises(ValueError, match="in row 2"):
            bound.check_values(pa.array([0, None, 0, 0, least - 1], kind).slice(2))


def test_bytes_under_nulls_do_not_matter():
    """A null row's bytes are never an error nor a value."""
    data = pa.array([0, -(2**31), 5], INT).buffers()[1]
    for bitmap in (b"\x05", b"\xfd"):
        array = pa.Array.from_buffers(INT, 3, [pa.py_buffer(bitmap), data])
        assert parse_transform("truncate[10]").apply(array).to_pylist() == [0, None, 0]
    empty = pa.Array.from_buffers(INT, 3, [pa.py_buffer(b"\0"), data])
    parse_transform("truncate[10]").check_values(empty)


@pytest.mark.parametrize("text", [text for text in SPEC if text != "identity"])
def test_each_offset_with_nulls(text):
    """A slice at each position in a byte of the bitmap keeps its nulls where they are."""
    for kind in SPEC[text]:
        if kind in FIXED or kind == pa.uuid():
            value = b"x" * kind.byte_width
        elif kind in DECIMALS:
            value = decimal_of(7, kind.scale)
        else:
            value = "ab" if kind in STRINGS else b"ab" if kind in BINARIES else 7
        values = [value if row % 3 else None for row in range(40)]
        whole = make_array(kind, values)
        for offset in range(18):
            array = whole.slice(offset, 19)
            result = parse_transform(text).apply(array)
            result.validate(full=True)
            assert internal_values(result) == expected(text, kind, values[offset : offset + 19])


class ArrowArray(ctypes.Structure):
    """The front of the C data interface's struct; the rest is only made room for."""

    _fields_ = [
        ("counts", ctypes.c_int64 * 5),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("rest", ctypes.c_void_p * 4),
    ]  # fmt: skip


def without_buffer(array: pa.Array, index: int) -> pa.Array:
    """Return the array as a producer might hand it over that leaves a buffer's address out."""
    raw = ArrowArray()
    array._export_to_c(ctypes.addressof(raw))
    raw.buffers[index] = None
    return pa.Array._import_from_c(ctypes.addressof(raw), array.type)


@pytest.mark.parametrize("kind", [*STRINGS, *BINARIES])
def test_empty_strings_without_data(kind):
    """Arrays may leave out the data buffer when no row has a byte."""
    empty = "" if kind in STRINGS else b""
    array = without_buffer(pa.array([empty] * 3, kind), 2)
    assert parse_transform("truncate[3]").apply(array).to_pylist() == [empty] * 3
    assert parse_transform("bucket[7]").apply(array).to_pylist() == [0] * 3


def test_short_buffer():
    """An array whose buffer is shorter than its length needs is an error, not a read behind the end."""
    batch = pa.record_batch({"a": pa.array([1, 2], INT)})
    message = bytearray(batch.serialize().to_pybytes())
    where = message.find(struct.pack("<qq", 0, 8))  # the flatbuffer's entry for the values
    message[where : where + 16] = struct.pack("<qq", 0, 4)
    broken = pa.ipc.read_record_batch(pa.py_buffer(bytes(message)), batch.schema)
    with pytest.raises(pa.ArrowInvalid, match="Buffer #1 too small"):
        parse_transform("bucket[3]").apply(broken.column(0))
    with pytest.raises(pa.ArrowInvalid, match="Buffer #1 too small"):
        split_batch(broken, [(0, parse_transform("bucket[3]"))])


@pytest.mark.parametrize("size", range(1, 20))
@pytest.mark.parametrize("kind", STRINGS)
def test_truncation_keeps_code_points_whole(kind, size):
    """Strings of all widths of UTF-8 are cut between code points, also at the end of their buffer."""
    rng = random.Random(size)
    for alphabet in ("a", "aé", "é€", "€😀", "aé€😀", "😀"):
        values = ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(50)]
        result = parse_transform(f"truncate[{size}]").apply(pa.array(values, kind))
        result.validate(full=True)
        assert result.to_pylist() == [value[:size] for value in values]


@pytest.mark.parametrize("name", SPEC)
def test_source_types(name):
    """A transform takes the types of the spec's table and refuses all others by name."""
    bound = parse_transform(name)
    other = pyiceberg.transforms.parse_transform(name)
    for kind in EVERY_TYPE:
        assert other.can_transform(iceberg_type(kind)) == (kind in SPEC[name])
        if kind in SPEC[name]:
            bound.check_source(kind)
            assert bound.result_type(kind) == (kind if name.startswith(("identity", "truncate")) else INT)
    for kind in [kind for kind in EVERY_TYPE if kind not in SPEC[name]] + NEVER:
        for call in (bound.check_source, bound.result_type):
            with pytest.raises(ValueError, match="does not take") as caught:
                call(kind)
            assert f"Transform {name} does not take {kind}: expected " in str(caught.value)
    with pytest.raises(ValueError, match="does not take"):
        bound.apply(pa.array([{"a": 1}]))


def test_identity_is_the_array_itself():
    """Identity copies nothing."""
    array = pa.array([1, None, 3])
    assert parse_transform("identity").apply(array) is array


def test_empty_arrays():
    """No rows give no rows, of the result's type."""
    for text, kinds in SPEC.items():
        bound = parse_transform(text)
        for kind in kinds:
            result = bound.apply(make_array(kind, []))
            assert (len(result), result.type) == (0, bound.result_type(kind))


@pytest.mark.parametrize("text", ["identity", "year", "month", "day", "hour", "bucket[1]", "truncate[2147483647]"])
def test_spelling(text):
    """A transform prints as it is spelt, equals its twin and survives pickling."""
    bound = parse_transform(text)
    assert str(bound) == text
    assert repr(bound) == f"Transform('{text}')"
    assert bound == parse_transform(text) == pickle.loads(pickle.dumps(bound))
    assert hash(bound) == hash(parse_transform(text))
    assert bound != parse_transform("bucket[3]")
    assert bound != text


def test_parts():
    """Name and parameter are readable."""
    assert (parse_transform("bucket[16]").name, parse_transform("bucket[16]").parameter) == ("bucket", 16)
    assert (parse_transform("day").name, parse_transform("day").parameter) == ("day", None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Bucket[16]",
        "bucket",
        "bucket(16)",
        "years",
        "void",
        "day[1]",
        " day",
        "day\n",
        "truncate",
        "bucket[4] ",
    ],
)
def test_unknown_transforms(text):
    """Anything but a canonical spelling is refused with the list of them."""
    with pytest.raises(ValueError, match="Unknown transform") as caught:
        parse_transform(text)
    assert repr(text) in str(caught.value)
    assert "bucket[N] or truncate[W]" in str(caught.value)


@pytest.mark.parametrize(
    "size",
    [
        "0",
        "-1",
        "+1",
        "01",
        "1.5",
        "",
        "x",
        " 3",
        "1_0",
        "2147483648",
        "9" * 11,
        "9" * 9999,
        "٣",
        "1]",
        "1\n",
    ],
)
@pytest.mark.parametrize(("name", "letter"), [("bucket", "N"), ("truncate", "W")])
def test_illegal_parameters(name, letter, size):
    """N and W are plain positive Iceberg ints."""
    with pytest.raises(ValueError, match=f"{letter} must be an integer from 1 to 2147483647"):
        parse_transform(f"{name}[{size}]")


def test_only_arrays():
    """A chunked array is refused by name."""
    with pytest.raises(TypeError, match=r"pyarrow\.Array, not ChunkedArray"):
        parse_transform("day").apply(pa.chunked_array([pa.array([], TS)]))


@pytest.mark.parametrize("text", ["bucket[16]", "truncate[10]", "identity"])
def test_sources_are_released(text):
    """Each export is released once, also after an error: its memory lives no longer than its users."""
    owner = bytearray(pa.array([7, -(2**31), 9], INT).buffers()[1].to_pybytes())
    before = sys.getrefcount(owner)
    array = pa.Array.from_buffers(INT, 2, [pa.py_buffer(b"\x05"), pa.py_buffer(owner)], offset=0)
    bad = pa.Array.from_buffers(INT, 2, [None, pa.py_buffer(owner)], offset=1)
    results = [parse_transform(text).apply(array) for _ in range(20)]
    if text == "truncate[10]":
        with pytest.raises(ValueError, match="row 0"):
            parse_transform(text).apply(bad)
    assert results[0].to_pylist()[1] is None
    del array, bad, results
    gc.collect()
    assert sys.getrefcount(owner) == before


def test_results_do_not_alias_their_source():
    """Results live on, unchanged, when the source's memory is reused; the source is never written to."""
    data = pa.array(["abcdef", "ghijkl"] * 50)
    copy = pa.array(["abcdef", "ghijkl"] * 50)
    result = parse_transform("truncate[2]").apply(data)
    assert data.equals(copy)
    del data
    gc.collect()
    assert pc.unique(result).to_pylist() == ["ab", "gh"]


def test_transforms_are_made_by_name_only():
    """A transform that does not exist cannot be built."""
    with pytest.raises(KeyError):
        Transform("void")
