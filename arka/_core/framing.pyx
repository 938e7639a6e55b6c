# cython: language_level=3
"""Frames of the log: their 128-byte header, their CRC-32C, and a group of them on its way to the disk.

Owns: every byte of a frame (arka/wal/FORMAT.md, "Frames"), the checksum, and the one GIL-free stretch
in which a group is sealed, written and fsynced. Does not own segments, nor what a payload means.

One module although it is long: reading, sealing and writing share inlined helpers, and a call through
another module's pointer for each of a million small frames would show.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

import os

from arka._core.buffers cimport FrameBuffer
from arka._core.crc32c cimport arka_crc_hardware, arka_crc_prepare, arka_crc_software, crc32c_update

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <limits.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #ifndef IOV_MAX
    #define IOV_MAX 1024
    #endif

    static int arka_punch_hole(int fd, long long offset, long long size) {
    #if defined(FALLOC_FL_PUNCH_HOLE) && defined(FALLOC_FL_KEEP_SIZE)
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size);
    #else
        (void)fd; (void)offset; (void)size;
        return -1;
    #endif
    }

    /* Have the kernel begin to write a range back; returns 0 or an errno. Errors of the disk also reach fdatasync. */
    static int arka_begin_writeback(int fd, unsigned long long offset, unsigned long long size) {
    #ifdef SYNC_FILE_RANGE_WRITE
        if (sync_file_range(fd, (off_t)offset, (off_t)size, SYNC_FILE_RANGE_WRITE) != 0
            && (errno == EIO || errno == ENOSPC)) {
            return errno;
        }
    #else
        (void)fd; (void)offset; (void)size;
    #endif
        return 0;
    }
    """
    int IOV_MAX
    ctypedef Py_ssize_t ssize_t
    ctypedef long long off_t
    ssize_t pwritev(int fd, const iovec *iov, int count, off_t offset) noexcept nogil
    int fdatasync(int fd) noexcept nogil
    int arka_begin_writeback(int fd, unsigned long long offset, unsigned long long size) noexcept nogil
    int arka_punch_hole(int fd, long long offset, long long size) noexcept nogil

cdef enum:
    HEADER = 128
    #: "ARKF", little-endian.
    MAGIC = 0x464B5241
    BATCH = 1
    TABLE = 2
    CREATE = 3
    DROP = 4
    LOST = 5
    GROUP = 6
    FOOTER = 7
    #: Size of every GROUP and FOOTER frame, so that a search for them needs no trust in lengths.
    MARK = 192
    #: Frames up to this size are copied next to their neighbours: below it, a copy costs less than an iovec.
    COALESCE = 16384
    #: Checksums of less than this keep the GIL: giving it away costs more.
    KEEP_GIL = 16384
    #: The disk begins with so many bytes of a group while the next ones are sealed and copied.
    WRITE_STEP = 4194304

KIND_BATCH = BATCH
KIND_TABLE = TABLE
KIND_CREATE = CREATE
KIND_DROP = DROP
KIND_LOST = LOST
KIND_GROUP = GROUP
KIND_FOOTER = FOOTER
MARK_BYTES = MARK

arka_crc_prepare()
#: Whether checksums use the processor's instruction.
CRC32C_HARDWARE = bool(arka_crc_hardware)


cdef inline void put16(uint8_t *at, uint16_t value) noexcept nogil:
    at[0] = value & 0xFF
    at[1] = value >> 8


cdef inline void put32(uint8_t *at, uint32_t value) noexcept nogil:
    cdef int i
    for i in range(4):
        at[i] = (value >> (8 * i)) & 0xFF


cdef inline void put64(uint8_t *at, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(8):
        at[i] = (value >> (8 * i)) & 0xFF


cdef inline uint32_t get32(const uint8_t *at) noexcept nogil:
    return at[0] | (<uint32_t> at[1] << 8) | (<uint32_t> at[2] << 16) | (<uint32_t> at[3] << 24)


cdef inline uint64_t get64(const uint8_t *at) noexcept nogil:
    return get32(at) | (<uint64_t> get32(at + 4) << 32)


def crc32c(data, uint32_t crc=0):
    """Checksum ``data`` with CRC-32C.

    Args:
        data: any contiguous buffer.
        crc: the checksum of what stood before it: ``crc32c(b, crc32c(a)) == crc32c(a + b)``.

    Returns:
        The checksum, 32 bits.
    """
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len < KEEP_GIL:
            return crc32c_update(crc, <const uint8_t *> view.buf, view.len)
        # SAFETY: the exported view keeps the bytes in place; others may change them, which a checksum shows.
        with nogil:
            crc = crc32c_update(crc, <const uint8_t *> view.buf, view.len)
        return crc
    finally:
        PyBuffer_Release(&view)


def crc32c_portable(data, uint32_t crc=0):
    """Compute ``crc32c`` without the processor's instruction: what machines without it use."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return <uint32_t> ~arka_crc_software(~crc, <const uint8_t *> view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


def crc_seed(log_uuid, uint64_t epoch, uint64_t segment):
    """Compute what the CRCs of a segment's frames start from, so that no other segment's bytes pass (R8).

    Args:
        log_uuid: the log.
        epoch: the epoch in the segment's header.
        segment: the segment's number.

    Returns:
        The CRC-32C of the three as 32 little-endian bytes (the UUID in its network order).
    """
    cdef uint8_t block[32]
    cdef bytes identity = log_uuid.bytes
    memcpy(block, PyBytes_AS_STRING(identity), 16)
    put64(block + 16, epoch)
    put64(block + 24, segment)
    return crc32c_update(0, block, 32)


class FrameError(ValueError):
    """What stands at an offset is not a whole, intact frame.

    Attributes:
        offset: where in the buffer.
        expected: what should stand there.
        found: what stands there.
    """

    def __init__(self, offset, expected, found):
        super().__init__(f"no frame at byte {offset}: expected {expected}, found {found}")
        self.offset = offset
        self.expected = expected
        self.found = found


cdef class Frame:
    """One frame before it is written.

    Args:
        kind: one of the KIND constants.
        lsn: its LSN; 0 for the kinds that take none (TABLE, GROUP, FOOTER).
        payload: a FrameBuffer (a batch: its first 128 bytes become the header, in place) or bytes.
        accepted_us: when it was accepted, microseconds since the Unix epoch.
        table: the table it belongs to, if any.
        schema_id: the Iceberg schema that a batch's columns are bound to (R24).
        operation: ``Operation`` as an integer, 0 .. 255.
        rows: row count.
        key: idempotency key, at most 65535 bytes.

    ``offset`` is the place in the segment file once a Group was made of it. ``payload`` is None after
    ``drop_payloads``.
    """

    def __cinit__(
        self,
        uint8_t kind,
        uint64_t lsn,
        *,
        payload not None,
        uint64_t accepted_us,
        table=None,
        uint32_t schema_id=0,
        uint8_t operation=0,
        uint64_t rows=0,
        bytes key not None=b"",
    ):
        if PyBytes_GET_SIZE(key) > 0xFFFF:
            raise ValueError(f"a key has at most 65535 bytes, found {len(key)}")
        self.kind = kind
        self.lsn = lsn
        self.accepted_us = accepted_us
        self.table = table
        self.schema_id = schema_id
        self.operation = operation
        self.rows = rows
        self.key = key
        self.payload = payload
        if isinstance(payload, FrameBuffer):
            self.payload_bytes = (<FrameBuffer> payload).size - HEADER
        elif type(payload) is bytes:
            self.payload_bytes = PyBytes_GET_SIZE(payload)
        else:
            raise TypeError(f"payload must be a FrameBuffer or bytes, found {type(payload).__name__}")
        self.frame_bytes = (HEADER + self.payload_bytes + PyBytes_GET_SIZE(key) + 63) & ~(<uint64_t> 63)

    cdef void write_header(self, uint8_t *header, bytes identity):
        """Write all of the header but its CRC; ``identity`` is the table's UUID, None for no table."""
        memset(header, 0, HEADER)
        put32(header, MAGIC)
        put64(header + 8, self.frame_bytes)
        put64(header + 16, self.lsn)
        put64(header + 24, self.accepted_us)
        put64(header + 32, self.payload_bytes)
        put64(header + 40, self.rows)
        header[48] = self.kind
        header[49] = self.operation
        put16(header + 50, <uint16_t> PyBytes_GET_SIZE(self.key))
        put32(header + 52, self.schema_id)
        if identity is not None:
            memcpy(header + 56, PyBytes_AS_STRING(identity), 16)


cdef class FrameHeader:
    """A frame's header as it was read; see FORMAT.md for the fields."""

    def __repr__(self):
        return f"FrameHeader(kind={self.kind}, lsn={self.lsn}, frame_bytes={self.frame_bytes})"


# -- reading ------------------------------------------------------------------------------------------


cdef FrameHeader parse(const uint8_t *data, Py_ssize_t size, Py_ssize_t offset):
    """Read the header at ``offset``, checking all that can be checked without the frame's other bytes."""
    cdef const uint8_t *at
    cdef FrameHeader header
    cdef uint64_t expected
    if offset < 0 or offset > size or size - offset < HEADER:
        raise FrameError(offset, "a frame header of 128 bytes", f"{max(size - offset, 0)} bytes")
    at = data + offset
    if get32(at) != MAGIC:
        raise FrameError(offset, "frame magic 'ARKF'", f"{PyBytes_FromStringAndSize(<char *> at, 4)!r}")
    header = FrameHeader.__new__(FrameHeader)
    header.crc = get32(at + 4)
    header.frame_bytes = get64(at + 8)
    header.lsn = get64(at + 16)
    header.accepted_us = get64(at + 24)
    header.payload_bytes = get64(at + 32)
    header.rows = get64(at + 40)
    header.kind = at[48]
    header.operation = at[49]
    header.key_bytes = at[50] | (<uint16_t> at[51] << 8)
    header.schema_id = get32(at + 52)
    header.table_uuid = PyBytes_FromStringAndSize(<char *> (at + 56), 16)
    if header.frame_bytes > <uint64_t> (size - offset):
        raise FrameError(offset, f"a frame that ends within {size} bytes", f"{header.frame_bytes} bytes")
    # Bounded first, so that the sum cannot overflow: then ``expected`` is at least the header's length.
    if header.payload_bytes > <uint64_t> (size - offset):
        raise FrameError(offset, f"a payload that ends within {size} bytes", f"{header.payload_bytes} bytes")
    expected = (HEADER + header.payload_bytes + header.key_bytes + 63) & ~(<uint64_t> 63)
    if header.frame_bytes != expected:
        raise FrameError(
            offset,
            f"a length that fits payload ({header.payload_bytes}) and key ({header.key_bytes})",
            f"{header.frame_bytes} bytes",
        )
    return header


def parse_header(buffer, Py_ssize_t offset):
    """Read a frame's header; its CRC is not checked.

    Args:
        buffer: the segment file, or any part of it that holds the frame whole.
        offset: where the frame begins in it.

    Raises:
        FrameError: no frame can begin there.
    """
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        return parse(<const uint8_t *> view.buf, view.len, offset)
    finally:
        PyBuffer_Release(&view)


def verify_frame(buffer, Py_ssize_t offset, uint32_t seed):
    """Read a frame's header and check the frame's CRC.

    Args:
        buffer: the segment file, or any part of it that holds the frame whole.
        offset: where the frame begins in it.
        seed: ``crc_seed`` of the segment.

    Raises:
        FrameError: it is not an intact frame of that segment.
    """
    cdef Py_buffer view
    cdef FrameHeader header
    cdef const uint8_t *at
    cdef size_t covered
    cdef uint32_t crc
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        header = parse(<const uint8_t *> view.buf, view.len, offset)
        at = <const uint8_t *> view.buf + offset + 8
        covered = header.frame_bytes - 8
        if covered < KEEP_GIL:
            crc = crc32c_update(seed, at, covered)
        else:
            # SAFETY: the exported view keeps the bytes in place; ``parse`` checked that the frame ends in it.
            with nogil:
                crc = crc32c_update(seed, at, covered)
    finally:
        PyBuffer_Release(&view)
    if crc != header.crc:
        raise FrameError(offset, f"CRC-32C {crc:#010x} over {covered + 8} bytes", f"{header.crc:#010x}")
    return header


def reseal_header(buffer, Py_ssize_t offset, uint32_t seed):
    """Make the header that a frame has in another segment: the same but for its CRC.

    Args:
        buffer: holds the frame whole; verified before.
        offset: where the frame begins in it.
        seed: ``crc_seed`` of the segment that it goes to.

    Returns:
        128 bytes, to be followed by the frame's bytes from 128 on.

    Raises:
        FrameError: no frame can begin there.
    """
    cdef Py_buffer view
    cdef FrameHeader header
    cdef bytes resealed
    cdef uint32_t crc
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        header = parse(<const uint8_t *> view.buf, view.len, offset)
        # SAFETY: the exported view keeps the bytes in place; ``parse`` checked that the frame ends in it.
        with nogil:
            crc = crc32c_update(seed, <const uint8_t *> view.buf + offset + 8, header.frame_bytes - 8)
        resealed = PyBytes_FromStringAndSize(<char *> view.buf + offset, HEADER)
        put32(<uint8_t *> PyBytes_AS_STRING(resealed) + 4, crc)
        return resealed
    finally:
        PyBuffer_Release(&view)


cdef inline Py_ssize_t next_mark(const uint8_t *data, Py_ssize_t size, Py_ssize_t at, uint32_t seed) noexcept nogil:
    # Cost: one look per 64 bytes; a CRC only over 192 bytes, so hostile payloads cannot make it quadratic.
    while at + MARK <= size:
        if (
            get32(data + at) == MAGIC
            and get64(data + at + 8) == MARK
            and (data[at + 48] == GROUP or data[at + 48] == FOOTER)
            and crc32c_update(seed, data + at + 8, MARK - 8) == get32(data + at + 4)
        ):
            return at
        at += 64
    return -1


def find_mark(buffer, Py_ssize_t start, uint32_t seed):
    """Find the first intact GROUP or FOOTER frame at or after ``start``, whatever lies between.

    Args:
        buffer: the segment file.
        start: a multiple of 64.
        seed: ``crc_seed`` of the segment.

    Returns:
        Its offset, or -1.
    """
    cdef Py_buffer view
    cdef Py_ssize_t found
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        # SAFETY: the exported view keeps the bytes in place.
        with nogil:
            found = next_mark(<const uint8_t *> view.buf, view.len, start, seed)
        return found
    finally:
        PyBuffer_Release(&view)


cdef Py_ssize_t scan_nonzero(const uint8_t *data, Py_ssize_t size, Py_ssize_t at) noexcept nogil:
    cdef uint64_t word
    while at + 8 <= size:
        memcpy(&word, data + at, 8)
        if word:
            break
        at += 8
    while at < size and data[at] == 0:
        at += 1
    return at if at < size else -1


cdef Py_ssize_t scan_nonzero_back(const uint8_t *data, Py_ssize_t size, Py_ssize_t start) noexcept nogil:
    cdef uint64_t word
    while size - 8 >= start:
        memcpy(&word, data + size - 8, 8)
        if word:
            break
        size -= 8
    while size > start and data[size - 1] == 0:
        size -= 1
    return size - 1 if size > start else -1


def first_nonzero(buffer, Py_ssize_t start):
    """Find the first byte at or after ``start`` that is not zero; -1 for none."""
    cdef Py_buffer view
    cdef Py_ssize_t found
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        # SAFETY: the exported view keeps the bytes in place.
        with nogil:
            found = scan_nonzero(<const uint8_t *> view.buf, view.len, start)
        return found
    finally:
        PyBuffer_Release(&view)


def last_nonzero(buffer, Py_ssize_t start):
    """Find the last byte at or after ``start`` that is not zero; -1 for none."""
    cdef Py_buffer view
    cdef Py_ssize_t found
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        # SAFETY: the exported view keeps the bytes in place.
        with nogil:
            found = scan_nonzero_back(<const uint8_t *> view.buf, view.len, start)
        return found
    finally:
        PyBuffer_Release(&view)


# -- many frames --------------------------------------------------------------------------------------


def first_out_of_order(list frames not None, uint64_t last_lsn):
    """Find the first frame whose LSN is not above the one before it.

    Args:
        frames: to be in LSN order.
        last_lsn: what the first one's has to be above.

    Returns:
        Its index; -1 when the order holds.
    """
    cdef Py_ssize_t i
    cdef Frame frame
    for i in range(len(frames)):
        frame = <Frame?> frames[i]
        if frame.lsn <= last_lsn:
            return i
        last_lsn = frame.lsn
    return -1


def run_end(list frames not None, Py_ssize_t start):
    """Find the end of the run of batches of one table, at one schema, that begins with ``frames[start]``.

    Args:
        start: an index of the list; not checked.

    Returns:
        The index behind the run; ``start + 1`` if the frame is no batch.
    """
    cdef Frame first = <Frame?> frames[start]
    cdef Frame frame
    cdef Py_ssize_t end = start + 1
    if first.kind == BATCH:
        while end < len(frames):
            frame = <Frame?> frames[end]
            if frame.kind != BATCH or frame.table is not first.table or frame.schema_id != first.schema_id:
                break
            end += 1
    return end


def fit(list frames not None, Py_ssize_t start, Py_ssize_t end, int64_t room):
    """Find how many of ``frames[start:end]`` fit into so many bytes; the indexes are not checked.

    Returns:
        The index behind the last one that does, and the bytes of those that do.
    """
    cdef int64_t size = 0
    cdef Frame frame
    cdef Py_ssize_t i = start
    while i < end:
        frame = <Frame?> frames[i]
        if size + <int64_t> frame.frame_bytes > room:
            break
        size += frame.frame_bytes
        i += 1
    return i, size


def places(list frames not None, Py_ssize_t start, Py_ssize_t end, uint64_t base):
    """Describe ``frames[start:end]``, of which a Group was made, as arrays of native-endian 64-bit integers.

    Args:
        start: first index; not checked, as the next.
        end: the index behind the last.
        base: what the sum of sizes begins with.

    Returns:
        Bytes of the LSNs, of the file offsets, and of the running sums of the sizes.
    """
    cdef Py_ssize_t count = max(end - start, 0)
    cdef bytes lsns = PyBytes_FromStringAndSize(NULL, count * sizeof(uint64_t))
    cdef bytes offsets = PyBytes_FromStringAndSize(NULL, count * sizeof(uint64_t))
    cdef bytes ends = PyBytes_FromStringAndSize(NULL, count * sizeof(uint64_t))
    cdef uint64_t *lsn = <uint64_t *> PyBytes_AS_STRING(lsns)
    cdef uint64_t *offset = <uint64_t *> PyBytes_AS_STRING(offsets)
    cdef uint64_t *sum_ = <uint64_t *> PyBytes_AS_STRING(ends)
    cdef Py_ssize_t i
    cdef Frame frame
    for i in range(count):
        frame = <Frame?> frames[start + i]
        base += frame.frame_bytes
        lsn[i], offset[i], sum_[i] = frame.lsn, frame.offset, base
    return lsns, offsets, ends


def drop_payloads(list frames not None):
    """Let the payloads' bytes go: they are in the segment. The frames cannot be written again."""
    cdef object frame
    for frame in frames:
        (<Frame?> frame).payload = None


# -- writing ------------------------------------------------------------------------------------------


cdef class Group:
    """Frames that are written together: laid out at an offset, sealed, written and fsynced as one.

    Args:
        frames: in file order; each gets its ``offset``. Their payloads must not change any more.
        offset: where the group begins in the segment file, a multiple of 64.
        seed: ``crc_seed`` of the segment.

    Small frames are copied into one allocation so that neighbours leave as one iovec; of large ones only
    key and padding are. The headers of frame buffers are written in place.
    """

    def __cinit__(self, list frames not None, uint64_t offset, uint32_t seed):
        cdef Py_ssize_t i
        cdef Frame frame
        cdef size_t arena_bytes = 0
        cdef uint8_t *arena
        cdef object table = None
        cdef bytes identity = None
        self.frames = frames
        self.offset = offset
        self.seed = seed
        self.count = len(frames)
        self.items = <Item *> calloc(self.count + 1, sizeof(Item))
        self.iov = <iovec *> malloc((2 * self.count + 1) * sizeof(iovec))
        if self.items == NULL or self.iov == NULL:
            raise MemoryError(f"cannot lay out a group of {self.count} frames")
        for i in range(self.count):
            frame = <Frame?> frames[i]
            arena_bytes += self.describe(&self.items[i], frame)
            frame.offset = offset + self.size
            self.size += frame.frame_bytes
        self.arena = <uint8_t *> malloc(arena_bytes + 1)
        if self.arena == NULL:
            raise MemoryError(f"cannot allocate {arena_bytes} bytes for a group of {self.count} frames")
        arena = self.arena
        for i in range(self.count):
            frame = <Frame> frames[i]
            self.items[i].arena = arena
            if frame.table is not table:
                # Frames of one table mostly come in a row.
                table = frame.table
                identity = None if table is None else table.uuid.bytes
            frame.write_header(self.items[i].payload if self.items[i].in_buffer else arena, identity)
            if self.items[i].copied:
                arena += self.items[i].frame_bytes
            else:
                arena += self.items[i].frame_bytes - self.items[i].payload_bytes

    def __dealloc__(self):
        free(self.items)
        free(self.iov)
        free(self.arena)

    cdef size_t describe(self, Item *item, Frame frame) except? 0:
        """Point ``item`` at the frame's bytes; returns how many bytes of arena it takes."""
        cdef FrameBuffer buffer
        item.key = <const uint8_t *> PyBytes_AS_STRING(frame.key)
        item.key_bytes = PyBytes_GET_SIZE(frame.key)
        item.frame_bytes = frame.frame_bytes
        item.in_buffer = isinstance(frame.payload, FrameBuffer)
        if item.in_buffer:
            buffer = <FrameBuffer> frame.payload
            item.payload = buffer.data
            item.payload_bytes = buffer.size
            item.copied = item.frame_bytes <= COALESCE
        elif frame.payload is None:
            raise ValueError(f"the frame with LSN {frame.lsn} was written before: its payload is gone")
        else:
            item.payload = <uint8_t *> PyBytes_AS_STRING(frame.payload)
            item.payload_bytes = PyBytes_GET_SIZE(frame.payload)
            item.copied = True
        return item.frame_bytes if item.copied else item.frame_bytes - item.payload_bytes

    cdef void add_iovec(self, uint8_t *data, size_t size) noexcept nogil:
        cdef iovec *last
        if size == 0:
            return
        if self.iov_count:
            last = &self.iov[self.iov_count - 1]
            if <uint8_t *> last.iov_base + last.iov_len == data:
                last.iov_len += size
                return
        self.iov[self.iov_count].iov_base = data
        self.iov[self.iov_count].iov_len = size
        self.iov_count += 1

    cdef void seal_nogil(self, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
        """Seal the frames ``[first, last)``, and lay them out for writing in place of what was laid out before."""
        cdef Py_ssize_t i
        cdef Item *item
        cdef uint8_t *tail
        cdef size_t tail_bytes
        cdef uint32_t crc
        self.iov_count = 0
        for i in range(first, last):
            item = &self.items[i]
            tail = item.arena
            if item.copied:
                if item.in_buffer:
                    memcpy(tail, item.payload, item.payload_bytes)
                    tail += item.payload_bytes
                else:
                    memcpy(tail + HEADER, item.payload, item.payload_bytes)
                    tail += HEADER + item.payload_bytes
                tail_bytes = item.frame_bytes - (tail - item.arena)
            else:
                tail_bytes = item.frame_bytes - item.payload_bytes
            memcpy(tail, item.key, item.key_bytes)
            memset(tail + item.key_bytes, 0, tail_bytes - item.key_bytes)
            if item.copied:
                put32(item.arena + 4, crc32c_update(self.seed, item.arena + 8, item.frame_bytes - 8))
                self.add_iovec(item.arena, item.frame_bytes)
            else:
                crc = crc32c_update(self.seed, item.payload + 8, item.payload_bytes - 8)
                put32(item.payload + 4, crc32c_update(crc, tail, tail_bytes))
                self.add_iovec(item.payload, item.payload_bytes)
                self.add_iovec(tail, tail_bytes)
        self.sealed = last - first == self.count

    cdef int write_nogil(self, int fd, uint64_t offset) noexcept nogil:
        """Write what is laid out; returns 0 or an errno. Consumes the iovecs."""
        cdef iovec *iov = self.iov
        cdef Py_ssize_t left = self.iov_count
        cdef ssize_t written
        cdef size_t step
        self.sealed = False
        while left:
            written = pwritev(fd, iov, <int> min(left, IOV_MAX), <off_t> offset)
            if written < 0:
                if errno == EINTR:
                    continue
                return errno
            if written == 0:
                return EIO
            offset += written
            while written:
                step = min(<size_t> written, iov.iov_len)
                iov.iov_base = <uint8_t *> iov.iov_base + step
                iov.iov_len -= step
                written -= step
                if iov.iov_len == 0:
                    iov += 1
                    left -= 1
        return 0

    cdef int commit_nogil(self, int fd) noexcept nogil:
        """Seal the group, write it and fsync the file's data; returns 0 or an errno."""
        cdef Py_ssize_t first = 0
        cdef Py_ssize_t last = 0
        cdef uint64_t offset = self.offset
        cdef uint64_t size
        cdef int error = 0
        while first < self.count and error == 0:
            size = 0
            while last < self.count and size < WRITE_STEP:
                size += self.items[last].frame_bytes
                last += 1
            self.seal_nogil(first, last)
            error = self.write_nogil(fd, offset)
            if error == 0 and last < self.count:
                error = arka_begin_writeback(fd, offset, size)
            offset += size
            first = last
        while error == 0 and fdatasync(fd) != 0:
            if errno != EINTR:
                error = errno
        return error

    def seal(self):
        """Compute every frame's CRC, and lay the group out for writing."""
        # SAFETY: ``frames`` holds the frames, they hold payloads and keys, and nobody changes those any more.
        with nogil:
            self.seal_nogil(0, self.count)

    def to_bytes(self):
        """Return the group's bytes as they go to the file."""
        cdef Py_ssize_t i
        if not self.sealed:
            self.seal()
        return b"".join(
            [
                PyBytes_FromStringAndSize(<char *> self.iov[i].iov_base, self.iov[i].iov_len)
                for i in range(self.iov_count)
            ]
        )

    def commit(self, int fd):
        """Seal the group, write it at its offset and fsync the file's data, all without the GIL.

        Args:
            fd: the segment file, open for writing.

        Raises:
            OSError: any of it failed; what the file holds then is unknown (R6).

        Durability: on return the group is on disk.
        """
        cdef int error
        # SAFETY: as in ``seal``; the caller keeps ``fd`` open.
        with nogil:
            error = self.commit_nogil(fd)
        if error:
            raise OSError(error, os.strerror(error))


def punch_hole(int fd, long long offset, long long size):
    """Give the blocks of a file's range back to the file system; the file keeps its length.

    Returns:
        Whether the file system could.
    """
    return size > 0 and arka_punch_hole(fd, offset, size) == 0
