"""MurmurHash3 x86_32 with seed 0, as Iceberg hashes values for ``bucket`` (Iceberg spec, appendix B).

Inline functions only: there is no module to import at run time. Little-endian hosts only, like Arrow's
buffers here.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcpy


cdef inline uint32_t rotate_left(uint32_t word, int bits) noexcept nogil:
    return (word << bits) | (word >> (32 - bits))


cdef inline uint32_t mix_block(uint32_t block) noexcept nogil:
    block = block * <uint32_t> 0xCC9E2D51
    return rotate_left(block, 15) * <uint32_t> 0x1B873593


cdef inline uint32_t absorb(uint32_t state, uint32_t mixed) noexcept nogil:
    return rotate_left(state ^ mixed, 13) * <uint32_t> 5 + <uint32_t> 0xE6546B64


cdef inline uint32_t finish(uint32_t state, uint32_t length) noexcept nogil:
    state ^= length
    state = (state ^ (state >> 16)) * <uint32_t> 0x85EBCA6B
    state = (state ^ (state >> 13)) * <uint32_t> 0xC2B2AE35
    return state ^ (state >> 16)


cdef inline uint32_t murmur3_long(int64_t value) noexcept nogil:
    """Hash the value's 8 little-endian bytes."""
    cdef uint32_t state = absorb(0, mix_block(<uint32_t> value))
    return finish(absorb(state, mix_block(<uint32_t> (value >> 32))), 8)


cdef inline uint32_t murmur3_int(int32_t value) noexcept nogil:
    """Hash an int as the long of the same value: its upper block is all zeros or all ones."""
    # mix_block(0) is 0, and mix_block(0xFFFFFFFF) is this constant.
    cdef uint32_t upper = <uint32_t> (value >> 31) & <uint32_t> 0xBBEEB010
    return finish(absorb(absorb(0, mix_block(<uint32_t> value)), upper), 8)


cdef inline uint32_t murmur3_bytes(const uint8_t *data, int64_t length) noexcept nogil:
    """Hash ``length`` bytes."""
    cdef uint32_t state = 0
    cdef uint32_t block = 0
    cdef const uint8_t *end = data + (length & ~<int64_t> 3)
    cdef int tail = length & 3
    while data != end:
        memcpy(&block, data, 4)
        state = absorb(state, mix_block(block))
        data += 4
    if tail:
        block = data[0]
        if tail > 1:
            block |= <uint32_t> data[1] << 8
        if tail > 2:
            block |= <uint32_t> data[2] << 16
        state ^= mix_block(block)
    return finish(state, <uint32_t> length)
