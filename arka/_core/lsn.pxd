from libc.stdint cimport uint64_t


cdef class LsnAllocator:
    cdef uint64_t _next
    cdef uint64_t _ceiling
