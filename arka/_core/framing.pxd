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
    cdef void write_header(self, uint8_t *header) except *


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
