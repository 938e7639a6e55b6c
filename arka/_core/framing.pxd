from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef class Frame:
    cdef readonly uint8_t kind
    cdef readonly uint8_t operation
    cdef readonly uint32_t schema_id
    cdef readonly uint64_t lsn
    cdef readonly uint64_t rows
    cdef readonly uint64_t accepted_us
    cdef readonly uint64_t frame_bytes
    cdef readonly uint64_t offset
    cdef readonly object table
    cdef readonly object payload
    cdef readonly bytes key
    cdef uint64_t payload_bytes
    cdef void write_header(self, uint8_t *header, bytes identity)


cdef class FrameHeader:
    cdef readonly uint8_t kind
    cdef readonly uint8_t operation
    cdef readonly uint16_t key_bytes
    cdef readonly uint32_t crc
    cdef readonly uint32_t schema_id
    cdef readonly uint64_t frame_bytes
    cdef readonly uint64_t lsn
    cdef readonly uint64_t accepted_us
    cdef readonly uint64_t payload_bytes
    cdef readonly uint64_t rows
    cdef readonly bytes table_uuid


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef struct Item:
    uint8_t *payload        # of a frame buffer: from its header on
    size_t payload_bytes
    const uint8_t *key
    size_t key_bytes
    size_t frame_bytes
    uint8_t *arena          # where this frame's copied part goes
    bint in_buffer          # the header stands before the payload
    bint copied             # all of the frame goes through the arena


cdef class Group:
    cdef readonly list frames
    cdef readonly uint64_t offset
    cdef readonly uint64_t size
    cdef uint32_t seed
    cdef bint sealed
    cdef Py_ssize_t count
    cdef Item *items
    cdef uint8_t *arena
    cdef iovec *iov
    cdef Py_ssize_t iov_count
    cdef size_t describe(self, Item *item, Frame frame) except? 0
    cdef void add_iovec(self, uint8_t *data, size_t size) noexcept nogil
    cdef void seal_nogil(self, Py_ssize_t first, Py_ssize_t last) noexcept nogil
    cdef int write_nogil(self, int fd, uint64_t offset) noexcept nogil
    cdef int commit_nogil(self, int fd) noexcept nogil
