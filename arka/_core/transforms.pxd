from libc.stdint cimport int64_t

from arka._core.transform_loops cimport Kernel

cdef extern from *:
    """
    /* The Arrow C data interface: this layout is fixed by its specification. */
    #ifndef ARROW_C_DATA_INTERFACE
    #define ARROW_C_DATA_INTERFACE
    struct ArrowArray {
        int64_t length;
        int64_t null_count;
        int64_t offset;
        int64_t n_buffers;
        int64_t n_children;
        const void **buffers;
        struct ArrowArray **children;
        struct ArrowArray *dictionary;
        void (*release)(struct ArrowArray *);
        void *private_data;
    };
    #endif
    """
    cdef struct ArrowArray:
        int64_t length
        int64_t null_count
        int64_t offset
        int64_t n_buffers
        int64_t n_children
        const void **buffers
        ArrowArray **children
        ArrowArray *dictionary
        void (*release)(ArrowArray *) noexcept
        void *private_data

cdef class ExportedArray:
    cdef ArrowArray array

cdef class Transform:
    cdef readonly str name
    cdef readonly object parameter
    cdef int kind
    cdef int check(self, object type) except -1
    cdef Kernel bind(self, object type, ExportedArray exported) except *
