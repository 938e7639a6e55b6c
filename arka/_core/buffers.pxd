cdef enum:
    HEADER = 128

cdef class FrameBuffer:
    cdef unsigned char *data
    cdef readonly Py_ssize_t size
    cdef readonly Py_ssize_t body_offset
    cdef readonly Py_ssize_t body_bytes
