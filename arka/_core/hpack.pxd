from libc.stdint cimport int16_t, int64_t, uint8_t


cdef class HuffmanCode:
    # Where each node goes by each four bits, -1 for nowhere, and which symbol that ends, -1 for none.
    cdef int16_t *following
    cdef int16_t *emitted
    cdef uint8_t *may_end

    cdef bytes decode(self, const uint8_t *data, int64_t size)


cdef class HeaderDecoder:
    cdef HuffmanCode code
    cdef list static_table
    # Invariant: the newest first; table_size is what they count for, at most table_limit.
    cdef object entries
    cdef int64_t table_size
    cdef int64_t table_limit
    cdef public int64_t max_header_list_size
    cdef public int64_t max_allowed_table_size
    cdef readonly int64_t decoded_bytes
    cdef readonly int pseudo

    cdef int _count(self, tuple field) except -1
    cdef tuple _entry(self, int64_t index)
    cdef bytes _string(self, const uint8_t *data, int64_t have, int64_t *at)
    cdef int _insert(self, tuple field) except -1
    cdef int _shrink(self, int64_t limit) except -1
