# cython: language_level=3
"""The primary keys of rows: their hashes, and which of several rows with one key stands.

Owns: a key's hash, and what a sequence of upserts and deletes comes to. Does not own where a key's row lies
(``arka._core.runs``) nor what a table's key is (``arka.iceberg.stagedkeys``).

A key is known by 128 bits of SipHash-2-4 under a secret of the table's index: clients choose keys, and two keys of a
table with 10**9 of them share a hash with a probability of 10**-21. What is hashed is the value as Iceberg has it:
ints as 64 bits, so that a column widened from int to long keeps its keys; strings and binaries with their length, so
that columns cannot flow into one another.
"""

import pyarrow as pa
import pyarrow.lib as lib

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy

from arka._core.siphash cimport siphash128

cdef enum:
    HASH = 16
    #: Bytes of a key whose columns all have a fixed width; others grow.
    LEAST_ROOM = 512

HASH_BYTES = HASH

cdef enum Verdict:
    IS_DROPPED
    IS_REPLACING
    IS_IF_ABSENT
    IS_REMOVING

#: What ``settle`` says of a row. Another row of its key stands.
DROPPED = IS_DROPPED
#: It takes the place of whatever the table holds for its key.
REPLACES = IS_REPLACING
#: It stands if the table holds nothing for its key.
IF_ABSENT = IS_IF_ABSENT
#: It is a delete, and the table holds nothing for its key afterwards.
REMOVES = IS_REMOVING

cdef enum Kind:
    BITS
    INT32
    FIXED
    SPAN32
    SPAN64

cdef struct Column:
    Kind kind
    Py_ssize_t width           # of FIXED, in bytes
    const uint8_t *data
    const uint8_t *offsets     # of spans
    int64_t first              # the row in the buffers that row 0 is

cdef dict KINDS = {
    lib.Type_BOOL: (BITS, 0),
    lib.Type_INT32: (INT32, 0),
    lib.Type_DATE32: (INT32, 0),
    lib.Type_INT64: (FIXED, 8),
    lib.Type_TIME64: (FIXED, 8),
    lib.Type_TIMESTAMP: (FIXED, 8),
    lib.Type_DECIMAL128: (FIXED, 16),
    lib.Type_FIXED_SIZE_BINARY: (FIXED, 0),
    lib.Type_STRING: (SPAN32, 0),
    lib.Type_BINARY: (SPAN32, 0),
    lib.Type_LARGE_STRING: (SPAN64, 0),
    lib.Type_LARGE_BINARY: (SPAN64, 0),
}


def is_key_type(kind):
    """Whether rows can be told apart by a column of this Arrow type: no floats, nothing nested."""
    return (kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind).id in KINDS


cdef int64_t key_bytes(const Column *columns, Py_ssize_t count, int64_t row) noexcept nogil:
    """The length of a row's key as it is hashed."""
    cdef Py_ssize_t i
    cdef int64_t size = 0
    cdef const Column *column
    for i in range(count):
        column = &columns[i]
        if column.kind == BITS:
            size += 1
        elif column.kind == INT32:
            size += 8
        elif column.kind == FIXED:
            size += column.width
        else:
            size += 8 + span_end(column, row) - span_start(column, row)
    return size


cdef inline int64_t span_start(const Column *column, int64_t row) noexcept nogil:
    if column.kind == SPAN32:
        return (<const int32_t *> column.offsets)[column.first + row]
    return (<const int64_t *> column.offsets)[column.first + row]


cdef inline int64_t span_end(const Column *column, int64_t row) noexcept nogil:
    return span_start(column, row + 1)


cdef void write_key(const Column *columns, Py_ssize_t count, int64_t row, uint8_t *to) noexcept nogil:
    """Write a row's key; SAFETY: there is room for ``key_bytes``."""
    cdef Py_ssize_t i
    cdef int64_t at, value, start, size
    cdef const Column *column
    for i in range(count):
        column = &columns[i]
        at = column.first + row
        if column.kind == BITS:
            to[0] = (column.data[at >> 3] >> (at & 7)) & 1
            to += 1
        elif column.kind == INT32:
            value = (<const int32_t *> column.data)[at]
            memcpy(to, &value, 8)
            to += 8
        elif column.kind == FIXED:
            memcpy(to, column.data + at * column.width, column.width)
            to += column.width
        else:
            start = span_start(column, row)
            size = span_end(column, row) - start
            memcpy(to, &size, 8)
            memcpy(to + 8, column.data + start, size)
            to += 8 + size


cdef int hash_all(
    const Column *columns, Py_ssize_t count, int64_t rows, uint64_t k0, uint64_t k1, uint8_t *hashes
) noexcept nogil:
    """Hash each row's key; return 0, or -1 when there is no memory."""
    cdef int64_t row, size
    cdef int64_t room = LEAST_ROOM
    cdef uint64_t words[2]
    cdef uint8_t *grown
    cdef uint8_t *key = <uint8_t *> malloc(room)
    if key == NULL:
        return -1
    for row in range(rows):
        size = key_bytes(columns, count, row)
        if size > room:
            grown = <uint8_t *> realloc(key, 2 * size)
            if grown == NULL:
                free(key)
                return -1
            key = grown
            room = 2 * size
        write_key(columns, count, row, key)
        siphash128(k0, k1, key, size, words)
        memcpy(hashes + row * HASH, words, HASH)
    free(key)
    return 0


def hash_keys(columns, secret):
    """Hash the key of each row.

    Args:
        columns: the key's columns, in the key's order: Arrow arrays of one length without nulls, of types for which
            ``is_key_type`` holds, valid (``validate(full=True)``).
        secret: 16 bytes.

    Returns:
        ``HASH_BYTES`` bytes a row, in the rows' order.

    Raises:
        ValueError: a column has nulls, another length than the first or a type that is none for keys; no columns; a
            secret of another length.
        pyarrow.ArrowInvalid: a buffer is shorter than the array's length needs.
        MemoryError: no room for the hashes.
    """
    cdef Py_ssize_t count = len(columns)
    cdef Py_ssize_t i
    cdef int64_t rows
    cdef int status
    cdef uint64_t k0, k1
    cdef Column *bound
    cdef uint8_t *to
    if not count:
        raise ValueError("a key has at least one column")
    if len(secret) != 16:
        raise ValueError(f"a secret of {len(secret)} bytes: expected 16")
    k0 = int.from_bytes(secret[:8], "little")
    k1 = int.from_bytes(secret[8:], "little")
    rows = len(columns[0])
    hashes = bytearray(rows * HASH)
    bound = <Column *> calloc(count, sizeof(Column))
    if bound == NULL:
        raise MemoryError("no room for a key's columns")
    try:
        # Held until the end: the loop reads their buffers.
        held = [array.storage if isinstance(array, pa.ExtensionArray) else array for array in columns]
        for i in range(count):
            bind(held[i], rows, &bound[i])
        if rows:
            to = hashes
            # SAFETY: `held` owns the buffers, which `bind` found long enough; `hashes` has HASH bytes a row.
            with nogil:
                status = hash_all(bound, count, rows, k0, k1, to)
            if status != 0:
                raise MemoryError(f"no room to hash {rows} keys")
    finally:
        free(bound)
    return hashes


cdef int bind(object array, int64_t rows, Column *column) except -1:
    """Point a column at an array's buffers."""
    if len(array) != rows:
        raise ValueError(f"a key's column has {len(array)} rows, its first column {rows}")
    if array.null_count:
        raise ValueError(f"a key's column has {array.null_count} nulls")
    kind = KINDS.get(array.type.id)
    if kind is None:
        raise ValueError(f"rows cannot be told apart by a column of type {array.type}")
    # Costs a microsecond: buffers that are too short would be read behind their end.
    array.validate()
    buffers = array.buffers()
    column.kind, column.width = kind
    column.first = array.offset
    if array.type.id == lib.Type_FIXED_SIZE_BINARY:
        column.width = array.type.byte_width
    if column.kind in (SPAN32, SPAN64):
        column.offsets = address_of(buffers[1])
        column.data = address_of(buffers[2])
    else:
        column.data = address_of(buffers[1])
    return 0


cdef uint8_t *address_of(object buffer) except? NULL:
    return NULL if buffer is None else <uint8_t *> <uintptr_t> buffer.address


cdef int settle_all(
    const uint8_t *hashes, const uint8_t *deletes, int64_t rows, bint first, uint8_t *verdicts
) noexcept nogil:
    """See ``settle``; return 0, or -1 when there is no memory."""
    cdef int bits = 6
    cdef uint64_t mask, at
    cdef uint32_t *slots
    cdef int64_t row, standing
    while (<int64_t> 1 << bits) < rows + (rows >> 1):
        bits += 1
    mask = (<uint64_t> 1 << bits) - 1
    # A row's number plus one; 0 is an empty slot. At most two thirds are used.
    slots = <uint32_t *> calloc(<size_t> 1 << bits, sizeof(uint32_t))
    if slots == NULL:
        return -1
    for row in range(rows):
        # Hashes are as good as random to whoever does not know the secret.
        memcpy(&at, hashes + row * HASH, 8)
        at &= mask
        while slots[at] and memcmp(hashes + <int64_t> (slots[at] - 1) * HASH, hashes + row * HASH, HASH) != 0:
            at = (at + 1) & mask
        standing = <int64_t> slots[at] - 1
        if deletes[row]:
            verdicts[row] = IS_REMOVING
        elif standing < 0:
            verdicts[row] = IS_IF_ABSENT if first else IS_REPLACING
        elif first and verdicts[standing] != IS_REMOVING:
            verdicts[row] = IS_DROPPED
            continue
        else:
            verdicts[row] = IS_REPLACING
        if standing >= 0:
            verdicts[standing] = IS_DROPPED
        slots[at] = <uint32_t> row + 1
    free(slots)
    return 0


def settle(const uint8_t[::1] hashes, const uint8_t[::1] deletes, *, bint first):
    """Decide which row stands for each key.

    Args:
        hashes: ``HASH_BYTES`` bytes a row, in LSN order, the rows of a batch in theirs.
        deletes: a byte a row, 1 for a delete, 0 for an upsert.
        first: the first upsert of a key stands, not the last.

    Returns:
        A byte a row: DROPPED, REPLACES, IF_ABSENT (with ``first`` alone) or REMOVES. One row of each key is not
        DROPPED.

    Raises:
        ValueError: the lengths do not belong together, or there are 2**31 rows or more.
        MemoryError: no room.
    """
    cdef int64_t rows = deletes.shape[0]
    cdef int status
    cdef uint8_t *to
    if hashes.shape[0] != rows * HASH:
        raise ValueError(f"{hashes.shape[0]} bytes of hashes for {rows} rows")
    if rows >= <int64_t> 1 << 31:
        raise ValueError(f"{rows} rows at once: at most {2**31 - 1}")
    verdicts = bytearray(rows)
    if rows:
        to = verdicts
        # SAFETY: `hashes` has HASH bytes for each row, `deletes` and `verdicts` one.
        with nogil:
            status = settle_all(&hashes[0], &deletes[0], rows, first, to)
        if status != 0:
            raise MemoryError(f"no room to settle {rows} keys")
    return verdicts
