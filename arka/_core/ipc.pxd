from libc.stdint cimport int32_t, int64_t

cdef struct NodeRule:
    int32_t kind
    int32_t width
    int32_t flags
    int64_t lowest
    int64_t highest

cdef class LayoutPlan:
    cdef NodeRule *rules
    cdef readonly Py_ssize_t node_count
    cdef Py_ssize_t fixed_buffers
    cdef Py_ssize_t view_count

cdef class BatchLayout:
    cdef object header
    cdef const unsigned char *data
    cdef Py_ssize_t nodes_at
    cdef Py_ssize_t buffers_at
    cdef Py_ssize_t variadic_at
    cdef readonly Py_ssize_t node_count
    cdef readonly Py_ssize_t buffer_count
    cdef readonly Py_ssize_t variadic_count
    cdef readonly int64_t rows
    cdef readonly int64_t body_bytes
    cdef readonly int codec
    cdef int64_t _load(self, Py_ssize_t at) noexcept nogil
    cdef bint _fits(self, LayoutPlan plan) noexcept
    cdef void _check(
        self, LayoutPlan plan, const unsigned char *body, int64_t max_length,
        int *found, Py_ssize_t *node, int64_t *expected, int64_t *actual,
    ) noexcept nogil
