# cython: language_level=3, autotestdict=False
"""Iceberg partition transforms on Arrow arrays, and the split of a batch by them.

Owns: the transforms identity, year, month, day, hour, bucket and truncate with exactly the Iceberg
spec's results, and the grouping of a batch's rows by partition. Does not own partition specs, field ids
or what becomes of the parts (``arka.iceberg``).

The inner loops are in ``transform_loops.pxd`` (on ``murmur3.pxd`` and ``civil.pxd``) and ``grouping.pxd``,
which are compiled into this module. It is longer than the habit because its two drivers, a transform of
an array and the split of a batch, run the same bound kernels, whose layout is nobody else's business.
"""

import os
import re
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.lib as lib

from cython cimport auto_pickle, final
from libc.stdint cimport UINT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset

from arka._core.grouping cimport NO_PARENT, Groups, has_value, number_lanes, number_spans, reserve
from arka._core.transform_loops cimport (
    Fill,
    Kernel,
    Span,
    fill_bool,
    fill_bucket_decimal,
    fill_bucket_fixed,
    fill_bucket_int,
    fill_bucket_large,
    fill_bucket_long,
    fill_bucket_ns,
    fill_bucket_string,
    fill_copy,
    fill_day_ns,
    fill_day_us,
    fill_double,
    fill_float,
    fill_hour_ns,
    fill_hour_us,
    fill_month_date,
    fill_month_ns,
    fill_month_us,
    fill_truncate_decimal,
    fill_truncate_int,
    fill_truncate_long,
    fill_year_date,
    fill_year_ns,
    fill_year_us,
    int128_t,
    span_fixed,
    span_large,
    span_string,
    span_truncated_binary,
    span_truncated_large_binary,
    span_truncated_large_string,
    span_truncated_string,
    truncate_strings,
)

# N and W are positive Iceberg ints.
MAX_PARAMETER = 2**31 - 1

# Rows of one split: group numbers are 31-bit, and take() gets 32-bit indices.
MAX_SPLIT_ROWS = 2**31 - 1

cdef enum:
    # Rows handled at a time by split_batch: its scratch (16 KiB) stays in the first-level cache.
    BLOCK_ROWS = 1024
    # Room behind truncated strings, so that eight bytes at a time may be stored.
    SLACK_BYTES = 8

cdef enum Kind:
    IDENTITY
    YEAR
    MONTH
    DAY
    HOUR
    BUCKET
    TRUNCATE

# The physical types that a source column may have, by Iceberg type.
cdef enum Source:
    BOOLEAN
    INT
    LONG
    FLOAT
    DOUBLE
    DECIMAL
    DATE
    TIME
    TIMESTAMP_US
    TIMESTAMP_NS
    STRING
    LARGE_STRING
    BINARY
    LARGE_BINARY
    FIXED
    UUID

# One object for every NaN: tuples that hold it are equal, and find each other in a dict.
cdef object NAN = float("nan")

cdef uint8_t NO_BYTES = 0

# Keys of the split's hash tables come from clients: one that does not know the seed cannot make them collide.
cdef uint64_t SEED = int.from_bytes(os.urandom(8), "little")

cdef object PARAMETRISED = re.compile(r"(bucket|truncate)\[(.*)\]", re.DOTALL)

cdef dict KINDS = {
    "identity": IDENTITY,
    "year": YEAR,
    "month": MONTH,
    "day": DAY,
    "hour": HOUR,
    "bucket": BUCKET,
    "truncate": TRUNCATE,
}

cdef dict SOURCES = {
    lib.Type_BOOL: BOOLEAN,
    lib.Type_INT32: INT,
    lib.Type_INT64: LONG,
    lib.Type_FLOAT: FLOAT,
    lib.Type_DOUBLE: DOUBLE,
    lib.Type_DECIMAL128: DECIMAL,
    lib.Type_DATE32: DATE,
    lib.Type_STRING: STRING,
    lib.Type_LARGE_STRING: LARGE_STRING,
    lib.Type_BINARY: BINARY,
    lib.Type_LARGE_BINARY: LARGE_BINARY,
    lib.Type_FIXED_SIZE_BINARY: FIXED,
}

cdef frozenset TEMPORAL = frozenset((DATE, TIMESTAMP_US, TIMESTAMP_NS))
cdef frozenset TRUNCATABLE = frozenset((INT, LONG, DECIMAL, STRING, LARGE_STRING, BINARY, LARGE_BINARY))

# Iceberg spec, "Partition Transforms": the source types of each transform, and how an error names them.
cdef dict ALLOWED = {
    IDENTITY: (frozenset(range(BOOLEAN, UUID + 1)), "any primitive Iceberg type in its canonical Arrow form"),
    YEAR: (TEMPORAL, "date32 and timestamp[us or ns]"),
    MONTH: (TEMPORAL, "date32 and timestamp[us or ns]"),
    DAY: (TEMPORAL, "date32 and timestamp[us or ns]"),
    HOUR: (TEMPORAL - {DATE}, "timestamp[us or ns]"),
    BUCKET: (
        TRUNCATABLE | TEMPORAL | {TIME, FIXED, UUID},
        "int32, int64, decimal128, date32, time64[us], timestamp[us or ns], string, binary, "
        "fixed_size_binary and uuid",
    ),
    TRUNCATE: (TRUNCATABLE, "int32, int64, decimal128, string and binary"),
}


cdef int source_of(object type) except -2:
    """Return the Source that an Arrow type is, or -1 when it is none."""
    if type.id == lib.Type_TIMESTAMP:
        return {"us": TIMESTAMP_US, "ns": TIMESTAMP_NS}.get(type.unit, -1)
    if type.id == lib.Type_TIME64:
        return TIME if type.unit == "us" else -1
    if isinstance(type, pa.BaseExtensionType):
        return UUID if type.extension_name == "arrow.uuid" else -1
    return SOURCES.get(type.id, -1)


# ---------------------------------------------------------------------------------------------------
# Arrow arrays in and out.


@auto_pickle(False)
@final
cdef class ExportedArray:
    """An Arrow array held through the C data interface, released exactly once with this object.

    Raises:
        pyarrow.ArrowInvalid: a buffer is shorter than the array's length needs.
    """

    def __cinit__(self, array):
        # Costs a microsecond whatever the length: buffers that are too short would be read behind their end.
        array.validate()
        # Invariant: `release` is NULL unless this object owns the exported array (zeroed by Cython).
        array._export_to_c(<uintptr_t> &self.array)

    def __dealloc__(self):
        if self.array.release != NULL:
            self.array.release(&self.array)


cdef object make_array(object type, object source, object buffers, Py_ssize_t lead):
    """Build a result of ``source``'s length that shares its validity bitmap.

    Args:
        type: the result's Arrow type.
        source: the source array.
        buffers: the result's buffers but for the bitmap, with ``lead`` unused rows first.
        lead: what ``lead_rows`` said.
    """
    cdef object bitmap = None
    if source.null_count:
        bitmap = source.buffers()[0].slice(source.offset >> 3)
    return pa.Array.from_buffers(type, len(source), [bitmap, *buffers], source.null_count, lead)


cdef Py_ssize_t lead_rows(object source) except -1:
    """Return how many rows a result begins with so that its bitmap can be its source's, on a byte."""
    return source.offset & 7 if source.null_count else 0


cdef Fill choose_fill(int kind, int source) noexcept:
    """Return the loop for a legal pair, or NULL when its results are byte strings."""
    if kind == IDENTITY:
        if source == BOOLEAN:
            return fill_bool
        if source == FLOAT:
            return fill_float
        if source == DOUBLE:
            return fill_double
        if source in (STRING, LARGE_STRING, BINARY, LARGE_BINARY, FIXED):
            return NULL
        return fill_copy
    if kind == YEAR:
        if source == DATE:
            return fill_year_date
        return fill_year_us if source == TIMESTAMP_US else fill_year_ns
    if kind == MONTH:
        if source == DATE:
            return fill_month_date
        return fill_month_us if source == TIMESTAMP_US else fill_month_ns
    if kind == DAY:
        if source == DATE:
            return fill_copy
        return fill_day_us if source == TIMESTAMP_US else fill_day_ns
    if kind == HOUR:
        return fill_hour_us if source == TIMESTAMP_US else fill_hour_ns
    if kind == TRUNCATE:
        if source == INT:
            return fill_truncate_int
        if source == LONG:
            return fill_truncate_long
        if source == DECIMAL:
            return fill_truncate_decimal
        return NULL
    if source in (INT, DATE):
        return fill_bucket_int
    if source in (LONG, TIME, TIMESTAMP_US):
        return fill_bucket_long
    if source == TIMESTAMP_NS:
        return fill_bucket_ns
    if source == DECIMAL:
        return fill_bucket_decimal
    if source in (FIXED, UUID):
        return fill_bucket_fixed
    return fill_bucket_string if source in (STRING, BINARY) else fill_bucket_large


cdef Span choose_span(int kind, int source) noexcept:
    """Return what finds the byte strings of a pair for which choose_fill has nothing."""
    if source == FIXED:
        return span_fixed
    if kind == IDENTITY:
        return span_string if source in (STRING, BINARY) else span_large
    if source == STRING:
        return span_truncated_string
    if source == LARGE_STRING:
        return span_truncated_large_string
    return span_truncated_binary if source == BINARY else span_truncated_large_binary


cdef int64_t source_bytes(int source) noexcept:
    """Return the width of one value, or of one offset; 0 for bits and for fixed_size_binary."""
    if source in (BOOLEAN, FIXED):
        return 0
    if source in (INT, FLOAT, DATE, STRING, BINARY):
        return 4
    return 16 if source in (DECIMAL, UUID) else 8


cdef void bind_parameter(Kernel *kernel, int kind, int source, object type, object parameter) except *:
    """Set what bucket and truncate derive from N or W."""
    if kind == BUCKET:
        kernel.divisor = parameter
        kernel.reciprocal = UINT64_MAX / kernel.divisor + 1
    elif kind == TRUNCATE:
        kernel.divisor = parameter
        kernel.reciprocal = UINT64_MAX / kernel.divisor
        # The greatest multiple of W that is no greater than the type's range below zero.
        kernel.bias = (<uint64_t> 1 << (31 if source == INT else 63)) / kernel.divisor * kernel.divisor
        kernel.lowest = <int64_t> (0 - kernel.bias)
        if source == DECIMAL:
            # The result has the source's precision: writers refuse a value with a digit more. In two halves, as
            # 10**38 fits an int128 and no other C integer.
            lowest = 10**type.precision - 1
            kernel.lowest_wide = <int128_t> <uint64_t> (lowest >> 64) << 64
            kernel.lowest_wide = -(kernel.lowest_wide | <int128_t> <uint64_t> (lowest & 0xFFFFFFFFFFFFFFFF))


@final
cdef class Transform:
    """One partition transform; made by ``parse_transform``.

    Attributes:
        name: the transform without its parameter: ``bucket``, ``day``, ...
        parameter: N of ``bucket[N]``, W of ``truncate[W]``, else None.

    ``str(transform)`` is the canonical Iceberg spelling. Immutable, hashable, comparable and picklable.
    """

    def __init__(self, str name, parameter=None):
        self.name = name
        self.parameter = parameter
        self.kind = KINDS[name]

    def __str__(self):
        return self.name if self.parameter is None else f"{self.name}[{self.parameter}]"

    def __repr__(self):
        return f"Transform({str(self)!r})"

    def __eq__(self, other):
        return isinstance(other, Transform) and str(self) == str(other)

    def __hash__(self):
        return hash(str(self))

    def __reduce__(self):
        return parse_transform, (str(self),)

    cdef int check(self, object type) except -1:
        """Return the Source of a type that the transform takes."""
        cdef int source = source_of(type)
        allowed, words = ALLOWED[self.kind]
        if source not in allowed:
            raise ValueError(f"Transform {self} does not take {type}: expected {words}")
        return source

    def check_source(self, type):
        """Check that the Iceberg spec allows this transform on a column type.

        Args:
            type: Arrow type in the table's canonical schema; a uuid is Arrow's ``arrow.uuid`` extension.

        Raises:
            ValueError: naming the transform, the type and the types it takes.

        Source: Iceberg spec, "Partition Transforms".
        """
        self.check(type)

    def result_type(self, type):
        """Return the Arrow type of the results on a column of ``type``.

        Returns:
            The type itself for identity and truncate, else int32.

        Raises:
            ValueError: as ``check_source``.
        """
        self.check(type)
        return type if self.kind in (IDENTITY, TRUNCATE) else pa.int32()

    cdef Kernel bind(self, object type, ExportedArray exported) except *:
        """Return the kernel for an array that is not empty; it lives no longer than ``exported``."""
        cdef Kernel kernel
        cdef int source = self.check(type)
        cdef ArrowArray *array = &exported.array
        memset(&kernel, 0, sizeof(Kernel))
        kernel.fill = choose_fill(self.kind, source)
        if kernel.fill == NULL:
            kernel.span = choose_span(self.kind, source)
        elif self.kind not in (IDENTITY, TRUNCATE):
            kernel.lane_bytes = 4
        else:
            kernel.lane_bytes = 4 if source == BOOLEAN else source_bytes(source)
        kernel.rows = array.length
        kernel.offset = array.offset
        kernel.value_bytes = type.byte_width if source == FIXED else 16
        if array.null_count != 0:
            kernel.validity = <const uint8_t *> array.buffers[0]
        kernel.values = <const uint8_t *> array.buffers[1]
        if kernel.values == NULL:
            # Only where values have no bytes: ExportedArray validated the rest.
            kernel.values = &NO_BYTES
        elif source == FIXED:
            kernel.values += array.offset * kernel.value_bytes
        else:
            kernel.values += array.offset * source_bytes(source)
        if array.n_buffers == 3:
            # Where all strings are empty there may be no data at all.
            kernel.data = <const uint8_t *> array.buffers[2]
            if kernel.data == NULL:
                kernel.data = &NO_BYTES
        bind_parameter(&kernel, self.kind, source, type, self.parameter)
        return kernel

    def apply(self, array):
        """Transform each value of an array.

        Args:
            array: values of a type that ``check_source`` accepts, valid as ``Array.validate(full=True)``
                has it; slices are fine. Not changed.

        Returns:
            As many results, of ``result_type(array.type)``; null for null. Shares the source's validity
            bitmap, and for identity is the source itself.

        Raises:
            ValueError: as ``check_source``; or a value has no representable result (see ``check_values``).
            TypeError: not a ``pyarrow.Array``.

        Source: Iceberg spec, "Partition Transforms" and appendix B.
        """
        cdef ExportedArray exported
        cdef Kernel kernel
        cdef uint64_t outside
        cdef uint8_t *out
        cdef Py_ssize_t lead
        if not isinstance(array, pa.Array):
            raise TypeError(f"Transform {self} takes a pyarrow.Array, not {type(array).__name__}")
        result_type = self.result_type(array.type)
        if self.kind == IDENTITY:
            return array
        if len(array) == 0:
            return pa.array([], result_type)
        source_type = array.type
        array = storage_of(array)
        if self.kind == DAY and source_type.id == lib.Type_DATE32:
            return array.view(result_type)
        exported = ExportedArray(array)
        kernel = self.bind(source_type, exported)
        lead = lead_rows(array)
        if kernel.fill == NULL:
            return truncate_array(&kernel, array, lead)
        buffer = pa.allocate_buffer((lead + kernel.rows) * kernel.lane_bytes)
        out = <uint8_t *> <uintptr_t> buffer.address
        memset(out, 0, lead * kernel.lane_bytes)
        out += lead * kernel.lane_bytes
        # SAFETY: `exported` keeps the source alive and `buffer` the results; both are locals.
        with nogil:
            outside = kernel.fill(&kernel, 0, kernel.rows, out)
        if outside:
            raise_if_outside(self, source_type, &kernel)
        return make_array(result_type, array, [buffer], lead)

    def check_values(self, array):
        """Check that each value of an array has a result, without making the results.

        Two transforms lack some: ``hour`` for timestamps some 245,000 years from 1970, and ``truncate``
        for numbers within W of the least one of their type (for decimals: of their precision).

        Args:
            array: as for ``apply``.

        Raises:
            ValueError: as ``apply``, naming the first such row.
        """
        cdef ExportedArray exported
        cdef Kernel kernel
        source = self.check(array.type)
        if len(array) and (
            (self.kind == HOUR and source == TIMESTAMP_US)
            or (self.kind == TRUNCATE and source in (INT, LONG, DECIMAL))
        ):
            exported = ExportedArray(array)
            kernel = self.bind(array.type, exported)
            raise_if_outside(self, array.type, &kernel)


cdef object storage_of(object array):
    """Return the array that an extension array wraps; another array as it is."""
    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array


cdef void raise_if_outside(Transform transform, object type, const Kernel *kernel) except *:
    """Raise ValueError for the first row that is not null and has no representable result."""
    cdef int64_t row
    # SAFETY: the caller holds the exported array.
    with nogil:
        row = first_outside(kernel)
    if row >= 0:
        raise ValueError(f"Transform {transform} has no result for the {type} in row {row}: out of range")


cdef int64_t first_outside(const Kernel *kernel) noexcept nogil:
    """Return the first row that is not null and has no representable result, or -1."""
    cdef uint8_t scratch[16 * 64]
    cdef int64_t row, i
    for row in range(0, kernel.rows, 64):
        if kernel.fill(kernel, row, min(64, kernel.rows - row), scratch):
            for i in range(row, min(row + 64, kernel.rows)):
                if has_value(kernel.validity, kernel.offset + i) and kernel.fill(kernel, i, 1, scratch):
                    return i
    return -1


cdef object truncate_array(const Kernel *kernel, object array, Py_ssize_t lead):
    """Build the array of truncated strings or byte strings."""
    cdef bint large = array.type.id in (lib.Type_LARGE_STRING, lib.Type_LARGE_BINARY)
    cdef bint text = array.type.id in (lib.Type_STRING, lib.Type_LARGE_STRING)
    cdef Py_ssize_t offset_bytes = 8 if large else 4
    cdef int64_t rows = kernel.rows
    cdef int64_t source, used
    cdef uint8_t *offsets
    cdef uint8_t *data
    if large:
        source = (<const int64_t *> kernel.values)[rows] - (<const int64_t *> kernel.values)[0]
    else:
        source = (<const int32_t *> kernel.values)[rows] - (<const int32_t *> kernel.values)[0]
    # A code point takes at most four bytes. Neither factor exceeds 2**31 by much: no overflow in 64 bits
    # but for arrays larger than any memory.
    room = min(source, 4 * int(kernel.divisor) * rows)
    offsets_buffer = pa.allocate_buffer((lead + rows + 1) * offset_bytes)
    data_buffer = pa.allocate_buffer(room + SLACK_BYTES)
    offsets = <uint8_t *> <uintptr_t> offsets_buffer.address
    data = <uint8_t *> <uintptr_t> data_buffer.address
    memset(offsets, 0, lead * offset_bytes)
    offsets += lead * offset_bytes
    # SAFETY: the caller holds the exported array, this function both buffers.
    with nogil:
        if large:
            used = truncate_strings(kernel, <const int64_t *> kernel.values, text, <int64_t *> offsets, data)
        else:
            used = truncate_strings(kernel, <const int32_t *> kernel.values, text, <int32_t *> offsets, data)
    return make_array(array.type, array, [offsets_buffer, data_buffer.slice(0, used)], lead)


def parse_transform(text):
    """Read a transform in its canonical Iceberg spelling.

    Args:
        text: ``identity``, ``year``, ``month``, ``day``, ``hour``, ``bucket[N]`` or ``truncate[W]``, N and
            W from 1 to 2147483647 without sign or leading zeros.

    Returns:
        The transform.

    Raises:
        ValueError: an unknown transform or an illegal N or W.
    """
    match = PARAMETRISED.fullmatch(text)
    if match is None:
        if text in ("identity", "year", "month", "day", "hour"):
            return Transform(text)
        raise ValueError(
            f"Unknown transform {text!r}: expected identity, year, month, day, hour, bucket[N] or truncate[W]"
        )
    name, digits = match.groups()
    # At most ten digits: int() of a long text is slow.
    if not re.fullmatch(r"[1-9][0-9]{0,9}", digits) or int(digits) > MAX_PARAMETER:
        letter = "N" if name == "bucket" else "W"
        raise ValueError(
            f"Illegal transform {text!r}: {letter} must be an integer from 1 to {MAX_PARAMETER}, in digits"
        )
    return Transform(name, int(digits))


# ---------------------------------------------------------------------------------------------------
# The split.


class Partition(NamedTuple):
    """The rows of a batch that share one partition tuple.

    Attributes:
        values: per partition field, in order, the value as Iceberg's manifests hold it: int for dates,
            times, timestamps, ints and every int result; Decimal; bool; float; str; bytes for binary,
            fixed and uuid; None for null.
        batch: the rows, in the order in which they were; it shares memory with its siblings.
    """

    values: tuple[Any, ...]
    batch: pa.RecordBatch


cdef struct Field:
    Kernel kernel
    Groups groups
    uint64_t outside           # some row of the batch, null or not, has no representable result


@auto_pickle(False)
@final
cdef class Grouping:
    """The state of one split: a group number for each row, and what is known of each group."""

    cdef Field *fields
    cdef int64_t field_count
    cdef int64_t rows
    cdef list exported         # keeps the arrays that the kernels point into alive
    cdef uint32_t *groups      # of each row
    cdef uint32_t *first_rows  # of each group
    cdef uint32_t *sizes       # of each group, in rows
    cdef uint64_t room         # of first_rows and sizes
    cdef uint64_t count        # groups
    cdef int64_t runs          # maximal runs of rows of one group
    cdef uint8_t *scratch      # one block's results

    def __cinit__(self, batch, fields):
        cdef int64_t i
        cdef Transform transform
        cdef ExportedArray exported
        self.rows = batch.num_rows
        self.field_count = len(fields)
        # Invariant: freed in __dealloc__, also when the rest of this fails (Cython zeroed all of it).
        self.exported = []
        self.fields = <Field *> calloc(self.field_count, sizeof(Field))
        self.groups = <uint32_t *> calloc(self.rows, sizeof(uint32_t))
        self.scratch = <uint8_t *> malloc(16 * BLOCK_ROWS)
        if self.fields == NULL or self.groups == NULL or self.scratch == NULL:
            raise MemoryError(f"cannot split a batch of {self.rows} rows")
        for i in range(self.field_count):
            column, transform = fields[i]
            array = batch.column(column)
            exported = ExportedArray(array)
            self.exported.append(exported)
            self.fields[i].kernel = transform.bind(array.type, exported)
            self.fields[i].groups.seed = SEED

    def __dealloc__(self):
        cdef int64_t i
        if self.fields != NULL:
            for i in range(self.field_count):
                free(self.fields[i].groups.slots)
        free(self.fields)
        free(self.groups)
        free(self.first_rows)
        free(self.sizes)
        free(self.scratch)

    cdef int number_rows(self) noexcept nogil:
        """Give each row its group; return 0, or -1 when there is no memory."""
        cdef int64_t count, i
        cdef int64_t start = 0
        cdef uint32_t previous = NO_PARENT
        while start < self.rows:
            count = min(<int64_t> BLOCK_ROWS, self.rows - start)
            for i in range(self.field_count):
                if reserve(&self.fields[i].groups, count) != 0:
                    return -1
                number_block(&self.fields[i], start, count, self.groups + start, self.scratch)
            if self.make_room(count) != 0:
                return -1
            previous = self.note_block(start, count, previous)
            start += count
        return 0

    cdef uint32_t note_block(self, int64_t start, int64_t count, uint32_t previous) noexcept nogil:
        """Count the block's rows and runs; return its last row's group."""
        cdef int64_t row
        cdef uint32_t group
        for row in range(start, start + count):
            group = self.groups[row]
            if group == self.count:
                self.first_rows[group] = <uint32_t> row
                self.sizes[group] = 0
                self.count += 1
            self.sizes[group] += 1
            self.runs += group != previous
            previous = group
        return previous

    cdef int make_room(self, uint64_t more) noexcept nogil:
        """Make room for ``more`` groups; return 0, or -1 when there is no memory."""
        cdef uint64_t room = self.room if self.room else 64
        cdef uint32_t *grown
        while room < self.count + more:
            room *= 2
        if room == self.room:
            return 0
        grown = <uint32_t *> realloc(self.first_rows, room * sizeof(uint32_t))
        if grown == NULL:
            return -1
        self.first_rows = grown
        grown = <uint32_t *> realloc(self.sizes, room * sizeof(uint32_t))
        if grown == NULL:
            return -1
        self.sizes = grown
        self.room = room
        return 0

    cdef object order(self):
        """Return the rows sorted by group, stably, as an Arrow array of indices (a counting sort)."""
        cdef int64_t row
        cdef uint64_t group
        cdef uint32_t start = 0
        cdef uint32_t *order
        cdef uint32_t *cursors = <uint32_t *> malloc(self.count * sizeof(uint32_t))
        if cursors == NULL:
            raise MemoryError(f"cannot split a batch of {self.rows} rows")
        try:
            buffer = pa.allocate_buffer(self.rows * sizeof(uint32_t))
            order = <uint32_t *> <uintptr_t> buffer.address
            # SAFETY: `buffer` and `cursors` outlive the block; sizes add up to rows.
            with nogil:
                for group in range(self.count):
                    cursors[group] = start
                    start += self.sizes[group]
                for row in range(self.rows):
                    order[cursors[self.groups[row]]] = <uint32_t> row
                    cursors[self.groups[row]] += 1
        finally:
            free(cursors)
        return pa.Array.from_buffers(pa.uint32(), self.rows, [None, buffer])


cdef void number_block(
    Field *field, int64_t start, int64_t count, uint32_t *numbers, uint8_t *scratch
) noexcept nogil:
    """Refine the groups of a block's rows by one field.

    SAFETY: the field's table has room for ``count`` more groups, ``scratch`` for 16 bytes a row.
    """
    cdef const Kernel *kernel = &field.kernel
    cdef int64_t bit = kernel.offset + start
    cdef uint64_t *data = <uint64_t *> scratch
    cdef int64_t *lengths = <int64_t *> scratch + BLOCK_ROWS
    if kernel.fill == NULL:
        kernel.span(kernel, start, count, data, lengths)
        number_spans(&field.groups, data, lengths, kernel.validity, bit, count, numbers)
        return
    field.outside |= kernel.fill(kernel, start, count, scratch)
    if kernel.lane_bytes == 4:
        number_lanes(&field.groups, scratch, 4, kernel.validity, bit, count, numbers)
    elif kernel.lane_bytes == 8:
        number_lanes(&field.groups, scratch, 8, kernel.validity, bit, count, numbers)
    else:
        number_lanes(&field.groups, scratch, 16, kernel.validity, bit, count, numbers)


cdef list partition_values(object column, object transform, object rows):
    """Return the partition values of some rows as manifests hold them."""
    results = storage_of(transform.apply(column.take(rows)))
    if results.type.id == lib.Type_DATE32:
        results = results.view(pa.int32())
    elif results.type.id in (lib.Type_TIMESTAMP, lib.Type_TIME64):
        results = results.view(pa.int64())
    elif results.type.id in (lib.Type_FLOAT, lib.Type_DOUBLE):
        return [NAN if value != value else value for value in results.to_pylist()]
    return results.to_pylist()


def count_partitions(batch, fields):
    """Count the distinct tuples of partition values of a batch.

    Args:
        batch: as for ``split_batch``.
        fields: as for ``split_batch``.

    Raises:
        ValueError: a transform does not take its column's type, or the batch is too long.
        IndexError: no such column.
        MemoryError: no room for the row numbers.
    """
    cdef Grouping grouping
    cdef int status
    if batch.num_rows == 0:
        return 0
    if not fields:
        return 1
    if batch.num_rows > MAX_SPLIT_ROWS:
        raise ValueError(f"Cannot split {batch.num_rows} rows at once: at most {MAX_SPLIT_ROWS}")
    grouping = Grouping(batch, fields)
    # SAFETY: `grouping` holds the exported arrays and all it writes to.
    with nogil:
        status = grouping.number_rows()
    if status != 0:
        raise MemoryError(f"cannot split a batch of {batch.num_rows} rows")
    return int(grouping.count)


def split_batch(batch, fields):
    """Split a batch by partition: one batch for each distinct tuple of partition values.

    Floats are told apart by bit pattern (-0.0 and 0.0 are two partitions, since readers may take an
    identity column from its partition value), except that all NaN are one partition. Python holds -0.0 and
    0.0 to be equal: a dict keyed by ``Partition.values`` merges them across batches, but never NaN with
    anything else.

    Args:
        batch: at most 2**31 - 1 rows, any column types; partition columns as for ``Transform.apply``.
            Not changed.
        fields: for each partition field the index of its source column and its transform. None: one
            partition with an empty tuple.

    Returns:
        The partitions in the order of their first rows, rows in their order; empty for an empty batch.
        One partition, or partitions that are runs of rows already, are the batch itself or slices of it;
        otherwise slices of one reordered copy.

    Raises:
        ValueError: a transform does not take its column's type, a value has no representable result (see
            ``Transform.check_values``) or the batch is too long.
        IndexError: no such column.
        MemoryError: no room for the row numbers.
    """
    cdef Grouping grouping
    cdef int status
    cdef uint64_t group
    cdef int64_t i, start
    if batch.num_rows == 0:
        return []
    if not fields:
        return [Partition((), batch)]
    if batch.num_rows > MAX_SPLIT_ROWS:
        raise ValueError(f"Cannot split {batch.num_rows} rows at once: at most {MAX_SPLIT_ROWS}")
    grouping = Grouping(batch, fields)
    # SAFETY: `grouping` holds the exported arrays and all it writes to.
    with nogil:
        status = grouping.number_rows()
    if status != 0:
        raise MemoryError(f"cannot split a batch of {batch.num_rows} rows")
    for i in range(grouping.field_count):
        if grouping.fields[i].outside:
            column, transform = fields[i]
            raise_if_outside(transform, batch.column(column).type, &grouping.fields[i].kernel)
    first_rows = pa.array([grouping.first_rows[group] for group in range(grouping.count)], pa.uint32())
    columns = [partition_values(batch.column(column), transform, first_rows) for column, transform in fields]
    values = zip(*columns)
    if grouping.count == 1:
        return [Partition(next(values), batch)]
    if grouping.runs > <int64_t> grouping.count:
        batch = pc.take(batch, grouping.order(), boundscheck=False)
    partitions = []
    start = 0
    for group, row_values in enumerate(values):
        partitions.append(Partition(row_values, batch.slice(start, grouping.sizes[group])))
        start += grouping.sizes[group]
    return partitions
