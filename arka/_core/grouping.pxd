"""The hash table that numbers distinct keys in the order in which they first appear.

Inline functions only: there is no module to import at run time. One table serves one partition field.
Its key is the row's group after the fields before it (the parent) with the field's own value, so that
the last field's group numbers are those of whole partition tuples.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

cdef extern from *:
    """
    typedef unsigned __int128 arka_uint128;
    static inline uint64_t arka_fold(uint64_t a, uint64_t b) {
        arka_uint128 product = (arka_uint128) a * b;
        return (uint64_t) product ^ (uint64_t) (product >> 64);
    }
    /* Odd constants with evenly spread bits (from the digits of pi), for mixing only. */
    #define ARKA_MIX_A 0x243F6A8885A308D3ULL
    #define ARKA_MIX_B 0x13198A2E03707345ULL
    """
    # The two halves of the 128-bit product, combined.
    uint64_t fold "arka_fold" (uint64_t a, uint64_t b) noexcept nogil
    const uint64_t MIX_A "ARKA_MIX_A"
    const uint64_t MIX_B "ARKA_MIX_B"

cdef enum:
    # No group number has it, not even with NULL_BIT: there are fewer than 2**31 rows.
    NO_PARENT = 0xFFFFFFFF
    # Set in the parent of a row whose value is null, so that null equals only null.
    NULL_BIT = 0x80000000

cdef struct Slot:
    uint64_t low       # the value; or the hash of the bytes at `high`
    uint64_t high      # upper half of a 16-byte value, else 0; or the address of the bytes
    int64_t length     # of the bytes
    uint32_t parent
    uint32_t group     # number + 1; 0 in an empty slot

cdef struct Groups:
    Slot *slots
    uint64_t capacity  # a power of two, at least twice `count`
    uint32_t count
    uint64_t seed      # secret of this process: senders choose the keys


cdef inline int reserve(Groups *groups, uint64_t more) noexcept nogil:
    """Make room for ``more`` new groups; return 0, or -1 when there is no memory (nothing changed)."""
    cdef uint64_t capacity = groups.capacity if groups.capacity else 64
    cdef uint64_t i, at
    cdef Slot *slots
    while capacity < 2 * (groups.count + more):
        capacity *= 2
    if capacity == groups.capacity:
        return 0
    slots = <Slot *> calloc(capacity, sizeof(Slot))
    if slots == NULL:
        return -1
    for i in range(groups.capacity):
        if groups.slots[i].group:
            at = hash_words(groups.slots[i].low, groups.slots[i].high if groups.slots[i].length < 0 else 0,
                            groups.slots[i].parent, groups.seed) & (capacity - 1)
            while slots[at].group:
                at = (at + 1) & (capacity - 1)
            slots[at] = groups.slots[i]
    free(groups.slots)
    groups.slots = slots
    groups.capacity = capacity
    return 0


cdef inline uint64_t hash_words(uint64_t low, uint64_t high, uint32_t parent, uint64_t seed) noexcept nogil:
    return fold(low ^ seed, (high + parent * MIX_A) ^ MIX_B)


cdef inline uint64_t hash_bytes(const uint8_t *data, int64_t length, uint64_t seed) noexcept nogil:
    cdef uint64_t state = seed ^ <uint64_t> length
    cdef uint64_t word = 0
    while length >= 8:
        memcpy(&word, data, 8)
        state = fold(state ^ word, MIX_A)
        data += 8
        length -= 8
    word = 0
    if length & 4:
        memcpy(&word, data, 4)
        data += 4
    if length & 2:
        word = (word << 16) | data[0] | (<uint64_t> data[1] << 8)
        data += 2
    if length & 1:
        word = (word << 8) | data[0]
    return fold(state ^ word, MIX_B)


cdef inline uint32_t number_words(
    Groups *groups, uint64_t low, uint64_t high, uint32_t parent
) noexcept nogil:
    """Return the group of a fixed-width value; the table must have room."""
    cdef uint64_t mask = groups.capacity - 1
    cdef uint64_t at = hash_words(low, high, parent, groups.seed) & mask
    cdef Slot *slot = groups.slots + at
    while slot.group:
        if slot.low == low and slot.parent == parent and slot.high == high:
            return slot.group - 1
        at = (at + 1) & mask
        slot = groups.slots + at
    groups.count += 1
    slot.low = low
    slot.high = high
    slot.length = -1
    slot.parent = parent
    slot.group = groups.count
    return groups.count - 1


cdef inline uint32_t number_bytes(
    Groups *groups, const uint8_t *data, int64_t length, uint32_t parent
) noexcept nogil:
    """Return the group of a byte string; the table must have room. The table keeps the address."""
    cdef uint64_t mask = groups.capacity - 1
    cdef uint64_t digest = hash_bytes(data, length, groups.seed)
    cdef uint64_t at = hash_words(digest, 0, parent, groups.seed) & mask
    cdef Slot *slot = groups.slots + at
    while slot.group:
        if (
            slot.low == digest
            and slot.parent == parent
            and slot.length == length
            and memcmp(<const void *> slot.high, data, length) == 0
        ):
            return slot.group - 1
        at = (at + 1) & mask
        slot = groups.slots + at
    groups.count += 1
    slot.low = digest
    slot.high = <uint64_t> data
    slot.length = length
    slot.parent = parent
    slot.group = groups.count
    return groups.count - 1


cdef inline bint has_value(const uint8_t *validity, int64_t bit) noexcept nogil:
    return validity == NULL or (validity[bit >> 3] >> (bit & 7)) & 1


cdef inline void number_lanes(
    Groups *groups,
    const uint8_t *results,
    int lane_bytes,
    const uint8_t *validity,
    int64_t bit,
    int64_t count,
    uint32_t *numbers,
) noexcept nogil:
    """Refine the groups of ``count`` rows by fixed-width values.

    Args:
        groups: with room for ``count`` more.
        results: the values, packed.
        lane_bytes: 4, 8 or 16; a constant at each call, so that the compiler makes three loops of this.
        validity: a bitmap, or NULL.
        bit: the first row's bit in it.
        count: rows.
        numbers: each row's group so far, and after.
    """
    cdef uint64_t low
    cdef uint64_t high = 0
    cdef uint64_t last_low = 0
    cdef uint64_t last_high = 0
    cdef uint32_t parent
    cdef uint32_t last_parent = NO_PARENT
    cdef uint32_t number = 0
    cdef int64_t i
    for i in range(count):
        parent = numbers[i]
        if lane_bytes == 4:
            low = (<const uint32_t *> results)[i]
        elif lane_bytes == 8:
            low = (<const uint64_t *> results)[i]
        else:
            low = (<const uint64_t *> results)[2 * i]
            high = (<const uint64_t *> results)[2 * i + 1]
        if not has_value(validity, bit + i):
            parent |= <uint32_t> NULL_BIT
            low = 0
            high = 0
        # Neighbours are often of one partition, above all in time: the table is asked only at a change.
        if low != last_low or parent != last_parent or high != last_high:
            number = number_words(groups, low, high, parent)
            last_low = low
            last_high = high
            last_parent = parent
        numbers[i] = number


cdef inline void number_spans(
    Groups *groups,
    const uint64_t *data,
    const int64_t *lengths,
    const uint8_t *validity,
    int64_t bit,
    int64_t count,
    uint32_t *numbers,
) noexcept nogil:
    """Refine the groups of ``count`` rows by byte strings; arguments as for ``number_lanes``."""
    cdef int64_t i
    for i in range(count):
        if has_value(validity, bit + i):
            numbers[i] = number_bytes(groups, <const uint8_t *> data[i], lengths[i], numbers[i])
        else:
            numbers[i] = number_bytes(groups, <const uint8_t *> groups, 0, numbers[i] | <uint32_t> NULL_BIT)
