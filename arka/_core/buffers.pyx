# cython: language_level=3
"""Frame buffers: one aligned allocation that is the wire's body, the log's bytes and the batch (docs/architecture.md).

Owns: the layout ``[frame header][IPC prefix + metadata][body]`` and its alignment. Does not own what
the frame header says (``framing``) nor who fills the body (``wire``).
"""

from cpython.buffer cimport PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer, PyBUF_SIMPLE
from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **memptr, size_t alignment, size_t size)

cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil

#: Bytes kept for the frame header at the front of each frame buffer.
FRAME_HEADER_BYTES = 128
#: Alignment of the buffer and of the IPC body in it, in bytes.
FRAME_ALIGNMENT = 64

cdef enum:
    #: Blocks from this size on are kept for reuse, bytes: below it malloc keeps them itself.
    KEPT_LEAST_BITS = 17
    KEPT_LEAST = 131072
    #: Larger ones are given back at once, bytes.
    KEPT_LARGEST = 67108864
    #: Capacities: eight between a power of two and the next, so that at most an eighth of a block is wasted.
    CLASSES = 88
    #: Bytes in front of a block that may be kept, for what is below: as many as keep it aligned.
    FRONT = 64

cdef struct Block:
    Py_ssize_t capacity
    # All kept blocks, in the order in which they were given.
    Block *older
    Block *newer
    # Those of its capacity, likewise.
    Block *below
    Block *above

# Freed blocks. A fresh block costs a page fault for each 4 KiB: a third of the work of receiving a batch of 3 MB.
# Invariant: used under the GIL only; kept_bytes is the sum of the capacities of all blocks in the lists.
cdef Block *tops[CLASSES]
cdef Block *oldest = NULL
cdef Block *newest = NULL
cdef Py_ssize_t kept_bytes = 0
cdef Py_ssize_t kept_most = 67108864


cdef Py_ssize_t capacity_of(Py_ssize_t size) noexcept:
    """Round a size up to a capacity."""
    cdef int shift = 63 - __builtin_clzll(size) - 3
    return (((size - 1) >> shift) + 1) << shift


cdef int class_of(Py_ssize_t capacity) noexcept:
    """Number a capacity."""
    cdef int bits = 63 - __builtin_clzll(capacity)
    return 8 * (bits - KEPT_LEAST_BITS) + <int> (capacity >> (bits - 3)) - 8


cdef void unlink_block(Block *block) noexcept:
    """Take a block out of the lists."""
    global oldest, newest, kept_bytes
    if block.older == NULL:
        oldest = block.newer
    else:
        block.older.newer = block.newer
    if block.newer == NULL:
        newest = block.older
    else:
        block.newer.older = block.older
    if block.below != NULL:
        block.below.above = block.above
    if block.above == NULL:
        tops[class_of(block.capacity)] = block.below
    else:
        block.above.below = block.below
    kept_bytes -= block.capacity


cdef void link_block(Block *block) noexcept:
    """Put a block into the lists, as the newest."""
    global oldest, newest, kept_bytes
    cdef int number = class_of(block.capacity)
    block.older, block.newer = newest, NULL
    if newest == NULL:
        oldest = block
    else:
        newest.newer = block
    newest = block
    block.below, block.above = tops[number], NULL
    if tops[number] != NULL:
        tops[number].above = block
    tops[number] = block
    kept_bytes += block.capacity


cdef void shrink_to(Py_ssize_t limit) noexcept:
    """Free the oldest blocks until no more than so many bytes are kept."""
    cdef Block *block
    while kept_bytes > limit:
        block = oldest
        unlink_block(block)
        free(block)


cdef unsigned char *take_block(Py_ssize_t size) except NULL:
    """Find or allocate ``size`` bytes, aligned to 64. A large block has its ``Block`` in front of it."""
    cdef Block *block
    cdef unsigned char *small = NULL
    if size < KEPT_LEAST:
        if posix_memalign(<void **> &small, 64, size) != 0:
            raise MemoryError(f"cannot allocate a frame of {size} bytes")
        return small
    cdef Py_ssize_t capacity = size
    if size <= KEPT_LARGEST:
        capacity = capacity_of(size)
        block = tops[class_of(capacity)]
        if block != NULL:
            unlink_block(block)
            return <unsigned char *> block + FRONT
    if posix_memalign(<void **> &block, 64, capacity + FRONT) != 0:
        raise MemoryError(f"cannot allocate a frame of {size} bytes")
    block.capacity = capacity
    return <unsigned char *> block + FRONT


cdef void give_block(unsigned char *data, Py_ssize_t size) noexcept:
    """Keep a block that was taken for ``size`` bytes, in place of the oldest ones if need be, or free it."""
    cdef Block *block
    if size < KEPT_LEAST:
        free(data)
        return
    block = <Block *> (data - FRONT)
    if size > KEPT_LARGEST or block.capacity > kept_most:
        free(block)
        return
    shrink_to(kept_most - block.capacity)
    link_block(block)


def set_kept_bytes(Py_ssize_t count):
    """Set how many bytes of freed frames are kept for reuse; all of the process has one such store.

    Raises:
        ValueError: the number is negative.
    """
    global kept_most
    if count < 0:
        raise ValueError(f"kept bytes must not be negative: {count}")
    kept_most = count
    shrink_to(count)


def kept():
    """Return how many bytes of freed frames are kept."""
    return kept_bytes


cdef class FrameBuffer:
    """A heap buffer laid out as a frame: header space, one encapsulated IPC message, nothing else.

    Args:
        metadata: the message's flatbuffer, without the 8-byte IPC prefix; copied.
        body_bytes: length of the IPC body; its bytes are uninitialised until the owner fills them.

    The buffer protocol exposes all ``size`` bytes, writable. The body starts at ``body_offset``, a
    multiple of 64, in memory and (frames being 64-byte aligned) in the segment file.
    """

    def __cinit__(self, metadata, Py_ssize_t body_bytes):
        cdef Py_buffer view
        cdef Py_ssize_t prefix = 8
        cdef Py_ssize_t padded
        cdef uint32_t continuation = 0xFFFFFFFF
        cdef int32_t length
        if body_bytes < 0:
            raise ValueError(f"body_bytes must not be negative: {body_bytes}")
        PyObject_GetBuffer(metadata, &view, PyBUF_SIMPLE)
        try:
            self.body_offset = (HEADER + prefix + view.len + 63) & ~63
            padded = self.body_offset - HEADER - prefix
            if padded > 0x7FFFFFFF:
                raise ValueError(f"IPC metadata of {view.len} bytes is too long")
            self.size = self.body_offset + body_bytes
            self.body_bytes = body_bytes
            self.data = take_block(self.size)
            memset(self.data, 0, HEADER)
            length = <int32_t> padded
            memcpy(self.data + HEADER, &continuation, 4)
            memcpy(self.data + HEADER + 4, &length, 4)
            memcpy(self.data + HEADER + prefix, view.buf, view.len)
            memset(self.data + HEADER + prefix + view.len, 0, padded - view.len)
        finally:
            PyBuffer_Release(&view)

    def __dealloc__(self):
        if self.data != NULL:
            give_block(self.data, self.size)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, 0, flags)

    def __len__(self):
        return self.size

    @property
    def ipc(self):
        """The encapsulated IPC message (prefix, metadata, body) as a writable memoryview."""
        return memoryview(self)[HEADER:]

    @property
    def body(self):
        """The IPC body as a writable memoryview."""
        return memoryview(self)[self.body_offset:]
