# cython: language_level=3
"""Frame buffers: one aligned allocation that is the wire's body, the log's bytes and the batch (docs/architecture.md).

Owns: the layout ``[frame header][IPC prefix + metadata][body]`` and its alignment. Does not own what
the frame header says (``framing``) nor who fills the body (``wire``).
"""

from cpython.buffer cimport PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer, PyBUF_SIMPLE
from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove, memset

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **memptr, size_t alignment, size_t size)

#: Bytes kept for the frame header at the front of each frame buffer.
FRAME_HEADER_BYTES = 128
#: Alignment of the buffer and of the IPC body in it, in bytes.
FRAME_ALIGNMENT = 64

cdef enum:
    #: Blocks from this size on are kept for reuse, bytes: below it malloc keeps them itself.
    KEPT_LEAST = 131072
    #: Most bytes kept.
    KEPT_MOST = 67108864
    #: Most blocks kept.
    KEPT_BLOCKS = 64
    #: Bytes in front of a block that may be kept, for its size: as many as keep it aligned.
    KEPT_FRONT = 64

# Freed blocks, the latest last. A fresh block costs a page fault for each 4 KiB: a third of the work of receiving
# a batch of 3 MB. Invariant: used under the GIL only; kept_bytes is the sum of kept_capacity[:kept_count].
cdef unsigned char *kept[KEPT_BLOCKS]
cdef Py_ssize_t kept_capacity[KEPT_BLOCKS]
cdef int kept_count = 0
cdef Py_ssize_t kept_bytes = 0


cdef unsigned char *take_block(Py_ssize_t size) except NULL:
    """Find or allocate ``size`` bytes, aligned to 64. A large block's real size stands in front of it."""
    global kept_count, kept_bytes
    cdef unsigned char *block = NULL
    cdef int i
    cdef Py_ssize_t front = KEPT_FRONT if size >= KEPT_LEAST else 0
    if front:
        for i in range(kept_count - 1, -1, -1):
            # At most an eighth is wasted.
            if size <= kept_capacity[i] <= size + (size >> 3):
                block = kept[i]
                kept_bytes -= kept_capacity[i]
                forget_block(i)
                return block
    if posix_memalign(<void **> &block, 64, size + front) != 0:
        raise MemoryError(f"cannot allocate a frame of {size} bytes")
    if front:
        (<Py_ssize_t *> block)[0] = size
    return block + front


cdef void give_block(unsigned char *block, Py_ssize_t size) noexcept:
    """Keep a block that was taken for ``size`` bytes, in place of the oldest ones if need be, or free it."""
    global kept_count, kept_bytes
    cdef Py_ssize_t capacity
    if size < KEPT_LEAST:
        free(block)
        return
    capacity = (<Py_ssize_t *> (block - KEPT_FRONT))[0]
    if capacity > KEPT_MOST // 4:
        free(block - KEPT_FRONT)
        return
    while kept_count == KEPT_BLOCKS or kept_bytes + capacity > KEPT_MOST:
        free(kept[0] - KEPT_FRONT)
        kept_bytes -= kept_capacity[0]
        forget_block(0)
    kept[kept_count] = block
    kept_capacity[kept_count] = capacity
    kept_bytes += capacity
    kept_count += 1


cdef void forget_block(int i) noexcept:
    """Close the gap at place ``i`` of the kept blocks."""
    global kept_count
    kept_count -= 1
    memmove(&kept[i], &kept[i + 1], (kept_count - i) * sizeof(kept[0]))
    memmove(&kept_capacity[i], &kept_capacity[i + 1], (kept_count - i) * sizeof(kept_capacity[0]))


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
