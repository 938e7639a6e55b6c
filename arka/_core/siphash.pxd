# cython: language_level=3
"""SipHash-2-4 with 128 bits of result.

Owns: the hash function. Does not own what is hashed or under which secret.

Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012), and its 128-bit extension.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

cdef struct Sip:
    uint64_t v0
    uint64_t v1
    uint64_t v2
    uint64_t v3


cdef inline uint64_t rotate(uint64_t word, int bits) noexcept nogil:
    return (word << bits) | (word >> (64 - bits))


cdef inline void sip_rounds(Sip *s, int rounds) noexcept nogil:
    cdef int _round
    for _round in range(rounds):
        s.v0 += s.v1
        s.v1 = rotate(s.v1, 13) ^ s.v0
        s.v0 = rotate(s.v0, 32)
        s.v2 += s.v3
        s.v3 = rotate(s.v3, 16) ^ s.v2
        s.v0 += s.v3
        s.v3 = rotate(s.v3, 21) ^ s.v0
        s.v2 += s.v1
        s.v1 = rotate(s.v1, 17) ^ s.v2
        s.v2 = rotate(s.v2, 32)


cdef inline void sip_word(Sip *s, uint64_t word) noexcept nogil:
    s.v3 ^= word
    sip_rounds(s, 2)
    s.v0 ^= word


cdef inline void siphash128(
    uint64_t k0, uint64_t k1, const uint8_t *data, size_t size, uint64_t *result
) noexcept nogil:
    """Hash ``size`` bytes into two words, the low one first; little-endian machines only."""
    cdef Sip s
    cdef uint64_t word
    cdef size_t done = 0
    s.v0 = k0 ^ <uint64_t> 0x736F6D6570736575
    s.v1 = k1 ^ <uint64_t> 0x646F72616E646F6D ^ 0xEE
    s.v2 = k0 ^ <uint64_t> 0x6C7967656E657261
    s.v3 = k1 ^ <uint64_t> 0x7465646279746573
    while size - done >= 8:
        memcpy(&word, data + done, 8)
        sip_word(&s, word)
        done += 8
    word = 0
    memcpy(&word, data + done, size - done)
    sip_word(&s, word | <uint64_t> size << 56)
    s.v2 ^= 0xEE
    sip_rounds(&s, 4)
    result[0] = s.v0 ^ s.v1 ^ s.v2 ^ s.v3
    s.v1 ^= 0xDD
    sip_rounds(&s, 4)
    result[1] = s.v0 ^ s.v1 ^ s.v2 ^ s.v3
