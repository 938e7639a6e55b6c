# cython: language_level=3, auto_pickle=False, autotestdict=False
"""A bounds-checked reader of Arrow IPC messages: what must be known before Arrow may look (T12 to T15).

Owns: the flatbuffer Message, Schema, RecordBatch and DictionaryBatch as far as Arka reads them, and the
arithmetic checks of a record batch's nodes and buffers. Does not own types, casts or errors' wording for
clients (``arka.flight.decode``).

Nothing here reads outside the bytes that it was given, whatever they say: each table, vtable and vector
is checked against the end of the message before it is followed. What does not hold raises ValueError.

Source: https://arrow.apache.org/docs/format/Columnar.html (Message.fbs, Schema.fbs), flatbuffers internals.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from arka._core.buffers cimport FrameBuffer

cdef extern from *:
    int __builtin_popcountll(unsigned long long) nogil

#: Message.header's union members (Message.fbs).
NONE = 0
SCHEMA = 1
DICTIONARY_BATCH = 2
RECORD_BATCH = 3

#: BodyCompression.codec, and -1 for a body that is not compressed.
CODEC_NONE = -1
CODEC_LZ4_FRAME = 0
CODEC_ZSTD = 1

#: How a node lays out its buffers: what LayoutPlan takes.
KIND_NULL = 0           # no buffers at all
KIND_BOOL = 1           # validity, bits
KIND_FIXED = 2          # validity, values of ``width`` bytes
KIND_VARIABLE = 3       # validity, offsets of ``width`` bytes, data
KIND_LIST = 4           # validity, offsets of ``width`` bytes
KIND_STRUCT = 5         # validity
KIND_VIEW = 6           # validity, 16-byte views, any number of data buffers
KIND_LIST_VIEW = 7      # validity, offsets and sizes of ``width`` bytes
KIND_RUNS = 8           # no buffers: run ends and values are children
KIND_UNION = 9          # type ids, no validity
KIND_DENSE_UNION = 10   # type ids, offsets, no validity

#: What holds for a node, ored together.
FLAG_REQUIRED = 1       # nulls are a suspicion: a null parent may hide them
FLAG_NEVER_NULL = 2     # nulls are an error: map entries and keys, which Arrow itself refuses
FLAG_TOP = 4            # as long as the batch
FLAG_RANGE_32 = 8       # int32 values within [lowest, highest], nulls aside
FLAG_RANGE_64 = 16      # int64 values likewise

#: What ``BatchLayout.check`` found; the last two are suspicions that nesting may clear.
FOUND_LENGTH = 1
FOUND_NULL_COUNT = 2
FOUND_SHORT_BUFFER = 3
FOUND_NULL_ENTRY = 4
FOUND_REQUIRED_NULLS = 5
FOUND_OUT_OF_RANGE = 6

#: Deepest field nesting and most fields that a schema may have: a flatbuffer may name one vector of
#: children many times, so that a few bytes would stand for 2**64 fields.
MAX_DEPTH = 64
MAX_FIELDS = 20_000

#: Most bytes of the names, time zones and metadata that a schema refers to, and of the metadata of another message: a
#: flatbuffer may name one string many times, and Arrow copies it each time (T23).
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_METADATA_BYTES = 1024 * 1024

#: Longest header of a record batch or dictionary in bytes: one of 100,000 fields would have about 6 MiB.
MAX_BATCH_HEADER_BYTES = 8 * 1024 * 1024

cdef enum:
    #: Body, bytes, below which the GIL is kept: the check takes less time than giving it up and asking for it again.
    GIL_BYTES = 65536

cdef enum:
    C_NULL = 0
    C_BOOL = 1
    C_FIXED = 2
    C_VARIABLE = 3
    C_LIST = 4
    C_STRUCT = 5
    C_VIEW = 6
    C_LIST_VIEW = 7
    C_RUNS = 8
    C_UNION = 9
    C_DENSE_UNION = 10
    F_REQUIRED = 1
    F_NEVER_NULL = 2
    F_TOP = 4
    F_RANGE_32 = 8
    F_RANGE_64 = 16
    # Bytes of the Message that is put before a dictionary's RecordBatch: keeps its alignment of 8.
    PREFIX = 40
    # What Arrow keeps for a field or an entry of metadata, at least.
    ENTRY_BYTES = 64
    # Slots of flatbuffer tables, and members of the union Type (Schema.fbs).
    MESSAGE_METADATA = 4
    SCHEMA_METADATA = 2
    FIELD_METADATA = 6
    TYPE_TIMESTAMP = 10
    TYPE_UNION = 14
    # Most elements of an array in one call: keeps offset + length far from overflow.
    MAX_ROWS = 1 << 30


cdef struct View:
    const unsigned char *data
    Py_ssize_t size


cdef struct Table:
    Py_ssize_t at
    Py_ssize_t vtable
    Py_ssize_t vtable_size
    Py_ssize_t object_size


# ---------------------------------------------------------------------------------------------------
# Flatbuffers: little-endian loads, each checked against the end

cdef int _need(View view, Py_ssize_t at, Py_ssize_t count) except -1:
    if at < 0 or count < 0 or at > view.size or count > view.size - at:
        raise ValueError(f"IPC message of {view.size} bytes: needs {count} bytes at {at}")
    return 0


cdef uint16_t _u16(View view, Py_ssize_t at) except? 0xFFFF:
    cdef uint16_t value
    _need(view, at, 2)
    memcpy(&value, view.data + at, 2)
    return value


cdef int64_t _u32(View view, Py_ssize_t at) except -1:
    cdef uint32_t value
    _need(view, at, 4)
    memcpy(&value, view.data + at, 4)
    return value


cdef int64_t _i64(View view, Py_ssize_t at) except? -1:
    cdef int64_t value
    _need(view, at, 8)
    memcpy(&value, view.data + at, 8)
    return value


cdef Py_ssize_t _follow(View view, Py_ssize_t at) except -1:
    """The place that the unsigned offset at ``at`` points to; offsets only point forward."""
    cdef Py_ssize_t target = at + _u32(view, at)
    if target <= at:
        raise ValueError(f"IPC message: empty offset at {at}")
    _need(view, target, 4)
    return target


cdef int _table(View view, Py_ssize_t at, Table *table) except -1:
    cdef int32_t back
    _need(view, at, 4)
    memcpy(&back, view.data + at, 4)
    table.at = at
    table.vtable = at - <Py_ssize_t> back
    table.vtable_size = _u16(view, table.vtable)
    table.object_size = _u16(view, table.vtable + 2)
    if table.vtable_size < 4 or table.object_size < 4:
        raise ValueError(f"IPC message: vtable at {table.vtable} is too short")
    _need(view, table.vtable, table.vtable_size)
    _need(view, at, table.object_size)
    return 0


cdef Py_ssize_t _field(View view, Table table, int slot, int width) except -1:
    """Where the field in ``slot`` lies, or 0 when the table does not have it."""
    cdef Py_ssize_t entry = 4 + 2 * slot
    cdef Py_ssize_t offset
    if entry + 2 > table.vtable_size:
        return 0
    offset = _u16(view, table.vtable + entry)
    if offset == 0:
        return 0
    if offset < 4 or offset + width > table.object_size:
        raise ValueError(f"IPC message: field {slot} of the table at {table.at} leaves it")
    return table.at + offset


cdef Py_ssize_t _vector(View view, Table table, int slot, int width, Py_ssize_t *count) except -1:
    """Where the elements of the vector in ``slot`` begin, or 0 when there is none; sets ``count``."""
    cdef Py_ssize_t at = _field(view, table, slot, 4)
    count[0] = 0
    if at == 0:
        return 0
    at = _follow(view, at)
    count[0] = _u32(view, at)
    _need(view, at + 4, count[0] * width)
    return at + 4


cdef int _view(object header, View *view) except -1:
    if type(header) is not bytes:
        raise TypeError(f"an IPC header must be bytes, not {type(header).__name__}")
    # SAFETY: callers hold ``header`` for as long as they use the view.
    view.data = <const unsigned char *> PyBytes_AS_STRING(header)
    view.size = PyBytes_GET_SIZE(header)
    return 0


cdef int _message(object header, View *view, Table *message) except -1:
    _view(header, view)
    return _table(view[0], _follow(view[0], 0), message)


cdef int _header_type(View view, Table message) except -1:
    cdef Py_ssize_t at = _field(view, message, 1, 1)
    return view.data[at] if at else 0


cdef int _header_table(View view, Table message, int expected, Table *table) except -1:
    cdef int found = _header_type(view, message)
    cdef Py_ssize_t at
    if found != expected:
        raise ValueError(f"IPC message: header type {found}, expected {expected}")
    at = _field(view, message, 2, 4)
    if at == 0:
        raise ValueError("IPC message without a header")
    return _table(view, _follow(view, at), table)


# ---------------------------------------------------------------------------------------------------
# Messages and schemas

def message_type(bytes header):
    """Return which kind of message this is (T12, T13).

    Args:
        header: a Message flatbuffer, as FlightData.data_header carries it (no length prefix).

    Returns:
        Message.header's union member: 1 Schema, 2 DictionaryBatch, 3 RecordBatch; 0 when absent; any
        other byte as it stands.

    Raises:
        ValueError: not a Message.
    """
    cdef View view
    cdef Table message
    _message(header, &view, &message)
    return _header_type(view, message)


def metadata_version(bytes header):
    """Return Message.version: 4 is V5, 3 is V4, and so on down.

    Raises:
        ValueError: not a Message.
    """
    cdef View view
    cdef Table message
    cdef Py_ssize_t at
    cdef int16_t version
    _message(header, &view, &message)
    at = _field(view, message, 0, 2)
    if at == 0:
        return 0
    memcpy(&version, view.data + at, 2)
    return version


def body_length(bytes header):
    """Return Message.bodyLength in bytes.

    Raises:
        ValueError: not a Message, or the length is negative.
    """
    cdef View view
    cdef Table message
    _message(header, &view, &message)
    return _body_length(view, message)


cdef int64_t _body_length(View view, Table message) except -1:
    cdef Py_ssize_t at = _field(view, message, 3, 8)
    cdef int64_t length = _i64(view, at) if at else 0
    if length < 0:
        raise ValueError(f"IPC message: bodyLength is negative: {length}")
    return length


def schema_endianness(bytes header):
    """Return Schema.endianness: 0 little, 1 big (T15).

    Raises:
        ValueError: not a Schema message.
    """
    cdef View view
    cdef Table message, schema
    cdef Py_ssize_t at
    cdef int16_t endianness
    _message(header, &view, &message)
    _header_table(view, message, 1, &schema)
    at = _field(view, schema, 0, 2)
    if at == 0:
        return 0
    memcpy(&endianness, view.data + at, 2)
    return endianness


cdef int _spend(int64_t *left, int64_t amount, str what) except -1:
    left[0] -= amount
    if left[0] < 0:
        raise ValueError(f"IPC message: its {what} are too long: a text counts as often as it is named")
    return 0


cdef int _spend_string(View view, Table table, int slot, int64_t *left, str what) except -1:
    cdef Py_ssize_t count
    _vector(view, table, slot, 1, &count)
    return _spend(left, count, what)


cdef int _spend_metadata(View view, Table table, int slot, int64_t *left) except -1:
    """Count what a vector of KeyValue refers to, before Arrow copies it."""
    cdef Py_ssize_t count, i
    cdef Py_ssize_t at = _vector(view, table, slot, 4, &count)
    cdef Table entry
    _spend(left, count * ENTRY_BYTES, "metadata")
    for i in range(count):
        _table(view, _follow(view, at + 4 * i), &entry)
        _spend_string(view, entry, 0, left, "metadata")
        _spend_string(view, entry, 1, left, "metadata")
    return 0


cdef int _check_message_metadata(View view, Table message) except -1:
    cdef int64_t left = MAX_METADATA_BYTES
    return _spend_metadata(view, message, MESSAGE_METADATA, &left)


def schema_dictionary_ids(bytes header):
    """Return the ids of a schema's dictionary-encoded fields, depth first, and bound what Arrow will make of it.

    Call this before Arrow reads the schema: a flatbuffer may name one field, vector or text many times, and Arrow
    makes a copy for each name.

    Args:
        header: a Schema message.

    Returns:
        One id per dictionary-encoded field, in the order in which its fields are met when each field
        comes before its children. They mean something only if Arrow accepts the schema too.

    Raises:
        ValueError: not a Schema message, nested deeper than MAX_DEPTH, over MAX_FIELDS fields, or over
            MAX_TEXT_BYTES of texts.
    """
    cdef View view
    cdef Table message, schema
    cdef Py_ssize_t count, at
    cdef Py_ssize_t left = MAX_FIELDS
    cdef int64_t texts = MAX_TEXT_BYTES
    cdef list ids = []
    _message(header, &view, &message)
    _header_table(view, message, 1, &schema)
    _check_message_metadata(view, message)
    _spend_metadata(view, schema, SCHEMA_METADATA, &texts)
    at = _vector(view, schema, 1, 4, &count)
    _walk_fields(view, at, count, MAX_DEPTH, &left, &texts, ids)
    return ids


cdef int _walk_fields(
    View view, Py_ssize_t at, Py_ssize_t count, int depth, Py_ssize_t *left, int64_t *texts, list ids
) except -1:
    cdef Py_ssize_t i, place, children, child_count
    cdef int kind
    cdef Table field, encoding, type_
    if depth == 0:
        raise ValueError(f"IPC schema nests deeper than {MAX_DEPTH} levels")
    for i in range(count):
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"IPC schema has more than {MAX_FIELDS} fields")
        _table(view, _follow(view, at + 4 * i), &field)
        _spend_string(view, field, 0, texts, "names")
        _spend_metadata(view, field, FIELD_METADATA, texts)
        place = _field(view, field, 2, 1)
        kind = view.data[place] if place else 0
        place = _field(view, field, 3, 4)
        if place and (kind == TYPE_TIMESTAMP or kind == TYPE_UNION):
            _table(view, _follow(view, place), &type_)
            if kind == TYPE_TIMESTAMP:
                _spend_string(view, type_, 1, texts, "time zones")
            else:
                _vector(view, type_, 1, 4, &child_count)
                _spend(texts, 4 * child_count, "type ids")
        place = _field(view, field, 4, 4)
        if place:
            _table(view, _follow(view, place), &encoding)
            place = _field(view, encoding, 0, 8)
            ids.append(_i64(view, place) if place else 0)
        children = _vector(view, field, 5, 4, &child_count)
        if child_count:
            _walk_fields(view, children, child_count, depth - 1, left, texts, ids)
    return 0


def dictionary_batch(bytes header):
    """Take a DictionaryBatch apart.

    The values of a dictionary are a RecordBatch of one column. Instead of feeding Arrow a whole stream
    for each batch, the nested RecordBatch is made a message of its own: a new root is put before the
    old bytes, whose header offset points into them.

    Args:
        header: a DictionaryBatch message.

    Returns:
        (dictionary id, whether it is a delta, the RecordBatch message over the same body).

    Raises:
        ValueError: not a DictionaryBatch message.
    """
    cdef View view
    cdef Table message, dictionary, batch
    cdef Py_ssize_t at
    cdef int64_t identity, length
    cdef bint is_delta
    cdef unsigned char prefix[PREFIX]
    cdef uint32_t offset
    cdef int32_t back = 12
    cdef uint16_t vtable[6]
    _message(header, &view, &message)
    _header_table(view, message, 2, &dictionary)
    _check_message_metadata(view, message)
    length = _body_length(view, message)
    at = _field(view, dictionary, 0, 8)
    identity = _i64(view, at) if at else 0
    at = _field(view, dictionary, 2, 1)
    is_delta = at != 0 and view.data[at] != 0
    at = _field(view, dictionary, 1, 4)
    if at == 0:
        raise ValueError("IPC dictionary batch without data")
    at = _follow(view, at)
    _table(view, at, &batch)
    if at + PREFIX > 0x7FFFFFFF:
        raise ValueError("IPC dictionary batch: header over 2 GiB")
    memset(prefix, 0, PREFIX)
    # [0] root offset, [4] vtable of 12 bytes for a table of 24, [16] the table: back offset to the
    # vtable, [20] header offset, [24] bodyLength, [32] version, [34] header type.
    offset = 16
    memcpy(prefix, &offset, 4)
    vtable[0] = 12
    vtable[1] = 24
    vtable[2] = 16
    vtable[3] = 18
    vtable[4] = 4
    vtable[5] = 8
    memcpy(prefix + 4, vtable, 12)
    memcpy(prefix + 16, &back, 4)
    offset = <uint32_t> (PREFIX + at - 20)
    memcpy(prefix + 20, &offset, 4)
    memcpy(prefix + 24, &length, 8)
    at = _field(view, message, 0, 2)
    if at:
        memcpy(prefix + 32, view.data + at, 2)
    prefix[34] = 3
    return identity, is_delta, (<bytes> (<char *> prefix)[:PREFIX]) + header


# ---------------------------------------------------------------------------------------------------
# Record batches

def clean_views(views, validity, Py_ssize_t offset, Py_ssize_t length):
    """Copy the views of a string_view or binary_view array, with empty ones where it is null (T13, T14).

    Arrow validates no view in a null's place, and its casts add up the lengths there all the same: one
    negative length kills the process (pyarrow 26).

    Args:
        views: the array's buffer of 16-byte views.
        validity: its bitmap, or None where it has no nulls.
        offset: the array's offset, in elements.
        length: the array's length, in elements.

    Returns:
        (the views of these elements alone, the sum of the lengths that they claim).

    Raises:
        ValueError: a buffer is shorter than offset and length need, or a length is negative.
    """
    cdef Py_buffer data
    cdef Py_buffer bits
    cdef const unsigned char *bitmap = NULL
    cdef int64_t total
    cdef unsigned char *target
    cdef bytes copied
    if not 0 <= offset <= MAX_ROWS or not 0 <= length <= MAX_ROWS:
        raise ValueError(f"no views at {offset} for {length}")
    PyObject_GetBuffer(views, &data, PyBUF_SIMPLE)
    try:
        if data.len < 16 * (offset + length):
            raise ValueError(f"{data.len} bytes of views are too few for {offset + length} elements")
        copied = PyBytes_FromStringAndSize(<char *> data.buf + 16 * offset, 16 * length)
    finally:
        PyBuffer_Release(&data)
    if validity is not None:
        PyObject_GetBuffer(validity, &bits, PyBUF_SIMPLE)
        bitmap = <const unsigned char *> bits.buf
    try:
        if validity is not None and 8 * bits.len < offset + length:
            raise ValueError(f"{bits.len} bytes of validity are too few for {offset + length} elements")
        # SAFETY: ``copied`` is new and nobody else's yet; ``bits`` is held and long enough.
        target = <unsigned char *> PyBytes_AS_STRING(copied)
        with nogil:
            total = _clean_views(target, bitmap, offset, length)
    finally:
        if validity is not None:
            PyBuffer_Release(&bits)
    if total < 0:
        raise ValueError("a view has a negative length")
    return copied, total


cdef int64_t _clean_views(
    unsigned char *views, const unsigned char *bits, Py_ssize_t offset, Py_ssize_t length
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t size
    cdef int64_t total = 0
    for i in range(length):
        if bits != NULL and not bits[(offset + i) >> 3] >> ((offset + i) & 7) & 1:
            memset(views + 16 * i, 0, 16)
            continue
        memcpy(&size, views + 16 * i, 4)
        if size < 0:
            return -1
        total += size
    return total


cdef class LayoutPlan:
    """The field nodes that each batch of one schema has, depth first, and what must hold for them.

    Args:
        rules: one ``(kind, width, flags, lowest, highest)`` per node; width in bytes.
    """

    def __cinit__(self, rules):
        cdef Py_ssize_t i = 0
        cdef list items = list(rules)
        self.node_count = len(items)
        self.rules = <NodeRule *> malloc(max(1, self.node_count) * sizeof(NodeRule))
        if self.rules == NULL:
            raise MemoryError
        for kind, width, flags, lowest, highest in items:
            self.rules[i].kind = kind
            self.rules[i].width = width
            self.rules[i].flags = flags
            self.rules[i].lowest = lowest
            self.rules[i].highest = highest
            if not KIND_NULL <= kind <= KIND_DENSE_UNION:
                raise ValueError(f"unknown node kind {kind}")
            self.fixed_buffers += _buffers_of(kind)
            if kind == KIND_VIEW:
                self.view_count += 1
            i += 1

    def __dealloc__(self):
        free(self.rules)


cdef class BatchLayout:
    """A RecordBatch message's rows, field nodes and buffers.

    On return each buffer lies within the body at a multiple of 8, and all of them together are no longer
    than the body: no bytes are counted twice.

    Args:
        header: a RecordBatch message.

    Raises:
        ValueError: not a RecordBatch message, or what it says cannot be.
    """

    def __cinit__(self, bytes header):
        cdef View view
        cdef Table message, batch, compression
        cdef Py_ssize_t at, i
        cdef int64_t offset, length, total = 0
        if len(header) > MAX_BATCH_HEADER_BYTES:
            raise ValueError(
                f"IPC record batch: a header of {len(header)} bytes, at most {MAX_BATCH_HEADER_BYTES} are legal"
            )
        self.header = header
        _message(header, &view, &message)
        _check_message_metadata(view, message)
        self.data = view.data
        _header_table(view, message, 3, &batch)
        self.body_bytes = _body_length(view, message)
        at = _field(view, batch, 0, 8)
        self.rows = _i64(view, at) if at else 0
        if self.rows < 0:
            raise ValueError(f"IPC record batch: its row count is negative: {self.rows}")
        self.nodes_at = _vector(view, batch, 1, 16, &self.node_count)
        self.buffers_at = _vector(view, batch, 2, 16, &self.buffer_count)
        self.variadic_at = _vector(view, batch, 4, 8, &self.variadic_count)
        self.codec = -1
        at = _field(view, batch, 3, 4)
        if at:
            _table(view, _follow(view, at), &compression)
            at = _field(view, compression, 0, 1)
            self.codec = <int8_t> view.data[at] if at else 0
            if self.codec not in (CODEC_LZ4_FRAME, CODEC_ZSTD):
                raise ValueError(f"IPC record batch: unknown compression codec {self.codec}")
        for i in range(self.buffer_count):
            offset = self._load(self.buffers_at + 16 * i)
            length = self._load(self.buffers_at + 16 * i + 8)
            if length == 0:
                continue
            if offset < 0 or length < 0 or offset > self.body_bytes or length > self.body_bytes - offset:
                raise ValueError(
                    f"IPC record batch: buffer {i} ({length} bytes at {offset}) leaves the body of "
                    f"{self.body_bytes} bytes"
                )
            if offset & 7:
                raise ValueError(f"IPC record batch: buffer {i} begins at {offset}, not at a multiple of 8")
            # Cannot overflow: stops at the first sum over the body, and a length is at most that.
            total += length
            if total > self.body_bytes:
                raise ValueError("IPC record batch: its buffers overlap")

    cdef int64_t _load(self, Py_ssize_t at) noexcept nogil:
        # SAFETY: ``at`` lies in a vector that __cinit__ checked; ``self.header`` keeps the bytes.
        cdef int64_t value
        memcpy(&value, self.data + at, 8)
        return value

    @property
    def nodes(self):
        """The field nodes as (length, null_count), depth first."""
        cdef Py_ssize_t i
        return [
            (self._load(self.nodes_at + 16 * i), self._load(self.nodes_at + 16 * i + 8))
            for i in range(self.node_count)
        ]

    @property
    def buffers(self):
        """The buffers as (offset in the body, length), in bytes."""
        cdef Py_ssize_t i
        return [
            (self._load(self.buffers_at + 16 * i), self._load(self.buffers_at + 16 * i + 8))
            for i in range(self.buffer_count)
        ]

    @property
    def variadic_counts(self):
        """The number of data buffers of each view column."""
        cdef Py_ssize_t i
        return [self._load(self.variadic_at + 8 * i) for i in range(self.variadic_count)]

    def uncompressed_bytes(self, FrameBuffer frame not None):
        """Sum what a compressed body says it becomes, before anything is decompressed (T14).

        Args:
            frame: the message's frame buffer; its body is as long as ``body_bytes`` or longer.

        Returns:
            Bytes after decompression; of an uncompressed body, the sum of its buffers.

        Raises:
            ValueError: a length prefix is missing or negative, or the body is not all there.
        """
        cdef Py_ssize_t i
        cdef int64_t offset, length, prefix
        cdef uint64_t total = 0
        if frame.body_bytes < self.body_bytes:
            raise ValueError(f"IPC body of {frame.body_bytes} bytes, expected {self.body_bytes}")
        for i in range(self.buffer_count):
            offset = self._load(self.buffers_at + 16 * i)
            length = self._load(self.buffers_at + 16 * i + 8)
            if length == 0:
                continue
            if self.codec != -1:
                if length < 8:
                    raise ValueError(f"IPC record batch: compressed buffer {i} has no length prefix")
                # SAFETY: __cinit__ checked offset + length against body_bytes, and the frame has as many.
                memcpy(&prefix, frame.data + frame.body_offset + offset, 8)
                # -1: this buffer was left uncompressed after its prefix.
                length = length - 8 if prefix == -1 else prefix
                if length < 0:
                    raise ValueError(f"IPC record batch: compressed buffer {i} says {length} bytes")
            total += <uint64_t> length
            if total > <uint64_t> 0x7FFFFFFFFFFFFFFF:
                raise ValueError("IPC record batch: compressed buffers say more than 2**63 bytes")
        return total

    def variable_bytes(self, LayoutPlan plan not None):
        """Sum the data buffers of variable-width columns: what UTF-8 validation will read (T16).

        Returns:
            Bytes; 0 when the batch does not have the plan's shape, which ``check`` reports.
        """
        cdef Py_ssize_t i, _j, buffer = 0
        cdef Py_ssize_t views = 0
        cdef int64_t total = 0
        if not self._fits(plan):
            return 0
        for i in range(plan.node_count):
            if plan.rules[i].kind == C_VARIABLE:
                total += self._load(self.buffers_at + 16 * (buffer + 2) + 8)
                buffer += 3
            elif plan.rules[i].kind == C_VIEW:
                buffer += 2
                for _j in range(self._load(self.variadic_at + 8 * views)):
                    total += self._load(self.buffers_at + 16 * buffer + 8)
                    buffer += 1
                views += 1
            else:
                buffer += _buffers_of(plan.rules[i].kind)
        return total

    def fits(self, LayoutPlan plan not None):
        """Tell whether the message has the field nodes and buffers of the plan, whatever is in them."""
        return self._fits(plan)

    cdef bint _fits(self, LayoutPlan plan) noexcept:
        cdef Py_ssize_t i
        cdef int64_t count
        cdef int64_t expected = plan.fixed_buffers
        if self.node_count != plan.node_count or self.variadic_count < plan.view_count:
            return False
        if plan.view_count == 0:
            return self.buffer_count == expected
        for i in range(plan.view_count):
            count = self._load(self.variadic_at + 8 * i)
            if count < 0 or count > self.buffer_count:
                return False
            expected += count
        return self.buffer_count == expected

    def check(self, LayoutPlan plan not None, FrameBuffer frame not None, int64_t max_length):
        """Hold the nodes and buffers against a schema, without Arrow.

        Catches what Arrow's own validation leaves: row counts without columns, null counts that deny what
        the bitmap says, nulls in map keys. Looks into the body only if it is not compressed.

        Args:
            plan: the schema's nodes.
            frame: the message's frame buffer; its body is as long as ``body_bytes`` or longer.
            max_length: the longest that a node below the top may be.

        Returns:
            None when all is well, else (FOUND_..., node, expected, found) for the first error; where there
            is none, for the first suspicion of nulls; where there is none either, for the first of range.
            Node -1 stands for the batch.

        Raises:
            ValueError: the body is not all there.
        """
        cdef int found = 0
        cdef Py_ssize_t node = -1
        cdef int64_t expected = 0, actual = 0
        if frame.body_bytes < self.body_bytes:
            raise ValueError(f"IPC body of {frame.body_bytes} bytes, expected {self.body_bytes}")
        if not self._fits(plan):
            return FOUND_LENGTH, -1, plan.node_count, self.node_count
        # SAFETY: ``self``, ``plan`` and ``frame`` are held by the caller's arguments; each read of the
        # body lies in a buffer that __cinit__ checked, and is bounded by that buffer's own length.
        if self.body_bytes < GIL_BYTES:
            self._check(plan, frame.data + frame.body_offset, max_length, &found, &node, &expected, &actual)
        else:
            with nogil:
                self._check(plan, frame.data + frame.body_offset, max_length, &found, &node, &expected, &actual)
        return (found, node, expected, actual) if found else None

    cdef void _check(
        self, LayoutPlan plan, const unsigned char *body, int64_t max_length,
        int *found, Py_ssize_t *node, int64_t *expected, int64_t *actual,
    ) noexcept nogil:
        cdef Py_ssize_t i, buffer = 0, views = 0
        cdef int64_t length, nulls, need, have, ones
        cdef int32_t kind, flags
        cdef const unsigned char *validity
        cdef const unsigned char *values
        cdef int suspicion = 0
        cdef Py_ssize_t suspect = -1
        for i in range(plan.node_count):
            kind = plan.rules[i].kind
            flags = plan.rules[i].flags
            length = self._load(self.nodes_at + 16 * i)
            nulls = self._load(self.nodes_at + 16 * i + 8)
            node[0] = i
            if length < 0 or (flags & F_TOP and length != self.rows) or (
                not flags & F_TOP and length > max_length
            ):
                found[0] = 1
                expected[0] = self.rows if flags & F_TOP else max_length
                actual[0] = length
                return
            if nulls < 0 or nulls > length:
                found[0] = 2
                expected[0] = length
                actual[0] = nulls
                return
            if flags & F_NEVER_NULL and nulls:
                found[0] = 4
                expected[0] = 0
                actual[0] = nulls
                return
            if flags & F_REQUIRED and nulls and suspicion != 5:
                suspicion = 5
                suspect = i
                expected[0] = 0
                actual[0] = nulls
            if nulls and (kind == C_RUNS or kind == C_UNION or kind == C_DENSE_UNION):
                # They have no validity: their nulls are those of their children.
                found[0] = 2
                expected[0] = 0
                actual[0] = nulls
                return
            if self.codec == -1 and kind != C_NULL and kind < C_RUNS:
                have = self._load(self.buffers_at + 16 * buffer + 8)
                validity = body + self._load(self.buffers_at + 16 * buffer)
                need = (length + 7) >> 3
                if have == 0:
                    validity = NULL
                    if nulls:
                        found[0] = 3
                        expected[0] = need
                        actual[0] = 0
                        return
                else:
                    if have < need:
                        found[0] = 3
                        expected[0] = need
                        actual[0] = have
                        return
                    ones = _count_ones(validity, length)
                    if length - ones != nulls:
                        found[0] = 2
                        expected[0] = length - ones
                        actual[0] = nulls
                        return
                if kind == C_FIXED:
                    have = self._load(self.buffers_at + 16 * (buffer + 1) + 8)
                    # Compared by division: width times length might overflow.
                    if length > have // plan.rules[i].width:
                        found[0] = 3
                        expected[0] = length
                        actual[0] = have // plan.rules[i].width
                        return
                    if not suspicion and flags & (F_RANGE_32 | F_RANGE_64):
                        values = body + self._load(self.buffers_at + 16 * (buffer + 1))
                        if _out_of_range(values, validity, length, &plan.rules[i]):
                            suspicion = 6
                            suspect = i
                elif kind == C_BOOL:
                    have = self._load(self.buffers_at + 16 * (buffer + 1) + 8)
                    if have < need:
                        found[0] = 3
                        expected[0] = need
                        actual[0] = have
                        return
            if kind == C_VIEW:
                buffer += 2 + self._load(self.variadic_at + 8 * views)
                views += 1
            else:
                buffer += _buffers_of(kind)
        found[0] = suspicion
        node[0] = suspect


cdef inline int _buffers_of(int32_t kind) noexcept nogil:
    """How many buffers a node has; of a view column, beside its data buffers."""
    if kind == C_NULL or kind == C_RUNS:
        return 0
    if kind == C_STRUCT or kind == C_UNION:
        return 1
    if kind == C_VARIABLE or kind == C_LIST_VIEW:
        return 3
    return 2


cdef int64_t _count_ones(const unsigned char *bits, int64_t length) noexcept nogil:
    """Count the set bits among the first ``length``."""
    cdef int64_t total = 0
    cdef uint64_t word
    cdef Py_ssize_t i
    cdef Py_ssize_t words = length >> 6
    cdef Py_ssize_t rest = length & 63
    for i in range(words):
        memcpy(&word, bits + 8 * i, 8)
        total += __builtin_popcountll(word)
    if rest:
        word = 0
        memcpy(&word, bits + 8 * words, (rest + 7) >> 3)
        total += __builtin_popcountll(word & ((<uint64_t> 1 << rest) - 1))
    return total


cdef bint _out_of_range(
    const unsigned char *values, const unsigned char *validity, int64_t length, const NodeRule *rule
) noexcept nogil:
    """Tell whether a valid value lies outside the rule's range."""
    cdef Py_ssize_t i
    cdef int64_t lowest = rule.lowest
    cdef int64_t highest = rule.highest
    cdef int64_t wide = 0
    cdef int32_t narrow = 0
    cdef bint bad = False
    if rule.flags & F_RANGE_64:
        for i in range(length):
            memcpy(&wide, values + 8 * i, 8)
            bad |= (wide < lowest) | (wide > highest)
    else:
        for i in range(length):
            memcpy(&narrow, values + 4 * i, 4)
            bad |= (narrow < lowest) | (narrow > highest)
    if not bad or validity == NULL:
        return bad
    # Second look, value by value: what stands in a null's place is of no account.
    for i in range(length):
        if not validity[i >> 3] >> (i & 7) & 1:
            continue
        if rule.flags & F_RANGE_64:
            memcpy(&wide, values + 8 * i, 8)
        else:
            memcpy(&narrow, values + 4 * i, 4)
            wide = narrow
        if wide < lowest or wide > highest:
            return True
    return False
