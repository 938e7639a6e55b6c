# cython: language_level=3
"""Frame buffers: one aligned allocation that is the wire's body, the log's bytes and the batch (docs/architecture.md).

Owns: the layout ``[frame header][IPC prefix + metadata][body]`` and its alignment. Does not own what
the frame header says (``framing``) nor who fills the body (``wire``).
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer, PyBUF_SIMPLE
from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **memptr, size_t alignment, size_t size)

#: Bytes kept for the frame header at the front of each frame buffer.
FRAME_HEADER_BYTES = 128
#: Alignment of the buffer and of the IPC body in it, in bytes.
FRAME_ALIGNMENT = 64


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
            if posix_memalign(<void **> &self.data, 64, self.size) != 0:
                self.data = NULL
                raise MemoryError(f"cannot allocate a frame of {self.size} bytes")
            memset(self.data, 0, HEADER)
            length = <int32_t> padded
            memcpy(self.data + HEADER, &continuation, 4)
            memcpy(self.data + HEADER + 4, &length, 4)
            memcpy(self.data + HEADER + prefix, view.buf, view.len)
            memset(self.data + HEADER + prefix + view.len, 0, padded - view.len)
        finally:
            PyBuffer_Release(&view)

    def __dealloc__(self):
        free(self.data)

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
