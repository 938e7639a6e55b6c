"""The inner loops of the partition transforms: one for each transform and physical type.

Inline functions only: there is no module to import at run time; ``transforms.pyx`` picks one by address.

SAFETY, for all of them: the caller keeps the Arrow array (and with it the pointers in the kernel) alive,
rows [start, start + count) lie in it, and `out`, `data` and `lengths` have room for `count` results. Null
rows are computed like others, from whatever bytes they have: their results are never looked at.
"""

from libc.stdint cimport INT32_MIN, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from arka._core.civil cimport (
    epoch_day,
    epoch_hour_of_ns,
    epoch_hour_of_us,
    epoch_month,
    epoch_year,
    shifted_days_of_date,
    shifted_days_of_ns,
    shifted_days_of_us,
)
from arka._core.murmur3 cimport murmur3_bytes, murmur3_int, murmur3_long

cdef extern from *:
    """
    typedef __int128 arka_int128;
    typedef unsigned __int128 arka_uint128;
    static inline uint64_t arka_multiply_high(uint64_t a, uint64_t b) {
        return (uint64_t) (((arka_uint128) a * b) >> 64);
    }
    """
    # Cython needs some integer type to reason with; the C compiler uses the real one.
    ctypedef long long int128_t "arka_int128"
    uint64_t multiply_high "arka_multiply_high" (uint64_t a, uint64_t b) noexcept nogil
    int clzll "__builtin_clzll" (unsigned long long) noexcept nogil
    uint64_t bswap64 "__builtin_bswap64" (uint64_t) noexcept nogil

ctypedef fused offset_t:
    int32_t
    int64_t

cdef struct Kernel

# Computes the results of rows [start, start + count) into `out`, one `lane_bytes` wide value each.
# Returns nonzero when some row of them, null or not, has no representable result.
ctypedef uint64_t (*Fill)(const Kernel *kernel, int64_t start, int64_t count, void *out) noexcept nogil

# Finds the bytes of the results of rows [start, start + count): addresses and lengths.
ctypedef void (*Span)(
    const Kernel *kernel, int64_t start, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil

# One transform bound to one Arrow array: all that an inner loop reads.
cdef struct Kernel:
    Fill fill                   # NULL: results are byte strings, see span
    Span span
    int64_t lane_bytes          # width of one result: 4, 8 or 16
    int64_t rows
    int64_t offset              # the array's, in rows: for the bitmaps
    const uint8_t *validity     # NULL: no nulls
    const uint8_t *values       # the first row's value or offset; the whole bitmap of a bool array
    const uint8_t *data         # byte strings that the offsets point into
    int64_t value_bytes         # width of a fixed_size_binary value
    uint64_t divisor            # N of bucket, W of truncate
    uint64_t reciprocal         # of the divisor, see bind_parameter
    uint64_t bias               # truncate: a multiple of W that makes each value non-negative
    int64_t lowest              # truncate of int, long: the least value whose result is representable
    int128_t lowest_wide        # truncate of decimal: the least result of its precision


cdef inline uint64_t fill_bool(const Kernel *kernel, int64_t start, int64_t count, void *out) noexcept nogil:
    cdef uint32_t *results = <uint32_t *> out
    cdef int64_t i, bit
    for i in range(count):
        bit = kernel.offset + start + i
        results[i] = (kernel.values[bit >> 3] >> (bit & 7)) & 1
    return 0


cdef inline uint64_t fill_copy(const Kernel *kernel, int64_t start, int64_t count, void *out) noexcept nogil:
    memcpy(out, kernel.values + start * kernel.lane_bytes, count * kernel.lane_bytes)
    return 0


cdef inline uint64_t fill_float(const Kernel *kernel, int64_t start, int64_t count, void *out) noexcept nogil:
    """Copy bit patterns, except that every NaN becomes the canonical one; -0.0 and 0.0 stay apart."""
    cdef const uint32_t *values = <const uint32_t *> kernel.values + start
    cdef uint32_t *results = <uint32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = <uint32_t> 0x7FC00000 if (values[i] & 0x7FFFFFFF) > <uint32_t> 0x7F800000 else values[i]
    return 0


cdef inline uint64_t fill_double(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    """Copy bit patterns, except that every NaN becomes the canonical one; -0.0 and 0.0 stay apart."""
    cdef const uint64_t *values = <const uint64_t *> kernel.values + start
    cdef uint64_t *results = <uint64_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = (
            <uint64_t> 0x7FF8000000000000
            if (values[i] & <uint64_t> 0x7FFFFFFFFFFFFFFF) > <uint64_t> 0x7FF0000000000000
            else values[i]
        )
    return 0


cdef inline uint64_t fill_year_date(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int32_t *values = <const int32_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = epoch_year(shifted_days_of_date(values[i]))
    return 0


cdef inline uint64_t fill_year_us(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = epoch_year(shifted_days_of_us(values[i]))
    return 0


cdef inline uint64_t fill_year_ns(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = epoch_year(shifted_days_of_ns(values[i]))
    return 0


cdef inline uint64_t fill_month_date(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int32_t *values = <const int32_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = epoch_month(shifted_days_of_date(values[i]))
    return 0


cdef inline uint64_t fill_month_us(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = epoch_month(shifted_days_of_us(values[i]))
    return 0


cdef inline uint64_t fill_month_ns(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = epoch_month(shifted_days_of_ns(values[i]))
    return 0


cdef inline uint64_t fill_day_us(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = epoch_day(shifted_days_of_us(values[i]))
    return 0


cdef inline uint64_t fill_day_ns(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = epoch_day(shifted_days_of_ns(values[i]))
    return 0


cdef inline uint64_t fill_hour_us(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i, hour
    cdef uint64_t outside = 0
    for i in range(count):
        hour = epoch_hour_of_us(values[i])
        results[i] = <int32_t> hour
        # Some 245,000 years from 1970, hours leave the range of an Iceberg int.
        outside |= <uint64_t> (hour - INT32_MIN) >> 32
    return outside


cdef inline uint64_t fill_hour_ns(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = <int32_t> epoch_hour_of_ns(values[i])
    return 0


cdef inline int32_t bucket_of(const Kernel *kernel, uint32_t digest) noexcept nogil:
    # Lemire's remainder: exact for 32-bit numbers, with reciprocal = ceil(2**64 / N).
    return <int32_t> multiply_high(kernel.reciprocal * (digest & 0x7FFFFFFF), kernel.divisor)


cdef inline uint64_t fill_bucket_int(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int32_t *values = <const int32_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = bucket_of(kernel, murmur3_int(values[i]))
    return 0


cdef inline uint64_t fill_bucket_long(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = bucket_of(kernel, murmur3_long(values[i]))
    return 0


cdef inline uint64_t fill_bucket_ns(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    """Hash nanoseconds as the microseconds that they floor to, so that both types share buckets."""
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i, micros
    for i in range(count):
        micros = values[i] / 1000
        micros -= values[i] < micros * 1000
        results[i] = bucket_of(kernel, murmur3_long(micros))
    return 0


cdef inline uint64_t fill_bucket_decimal(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    """Hash the unscaled value's big-endian two's complement in as few bytes as hold it."""
    cdef const int64_t *values = <const int64_t *> kernel.values + 2 * start
    cdef int32_t *results = <int32_t *> out
    cdef uint64_t image[2]
    cdef int64_t i, low, high, sign
    cdef int length
    for i in range(count):
        low = values[2 * i]
        high = values[2 * i + 1]
        sign = high >> 63
        # Bits but for the sign, over 8, and the byte that the sign bit is in. `| 1` keeps clz defined; 0 and
        # 1 bits need the same byte.
        if high == low >> 63:
            length = ((64 - clzll(<uint64_t> (low ^ sign) | 1)) >> 3) + 1
        else:
            length = ((64 - clzll(<uint64_t> (high ^ sign) | 1)) >> 3) + 9
        image[0] = bswap64(<uint64_t> high)
        image[1] = bswap64(<uint64_t> low)
        results[i] = bucket_of(kernel, murmur3_bytes(<uint8_t *> image + 16 - length, length))
    return 0


cdef inline uint64_t fill_bucket_fixed(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const uint8_t *values = kernel.values + start * kernel.value_bytes
    cdef int32_t *results = <int32_t *> out
    cdef int64_t i
    for i in range(count):
        results[i] = bucket_of(kernel, murmur3_bytes(values + i * kernel.value_bytes, kernel.value_bytes))
    return 0


cdef inline uint64_t bucket_strings(
    const Kernel *kernel, const offset_t *offsets, int64_t count, int32_t *results
) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        results[i] = bucket_of(kernel, murmur3_bytes(kernel.data + offsets[i], offsets[i + 1] - offsets[i]))
    return 0


cdef inline uint64_t fill_bucket_string(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    return bucket_strings(kernel, <const int32_t *> kernel.values + start, count, <int32_t *> out)


cdef inline uint64_t fill_bucket_large(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    return bucket_strings(kernel, <const int64_t *> kernel.values + start, count, <int32_t *> out)


cdef inline int64_t floor_remainder(const Kernel *kernel, int64_t value) noexcept nogil:
    """Return ``value`` mod W, in [0, W); only for values from ``kernel.lowest`` on."""
    cdef uint64_t number = <uint64_t> value + kernel.bias
    # The reciprocal is floor((2**64 - 1) / W): the quotient is exact or one too small.
    cdef uint64_t rest = number - multiply_high(number, kernel.reciprocal) * kernel.divisor
    return <int64_t> (rest - kernel.divisor if rest >= kernel.divisor else rest)


cdef inline uint64_t fill_truncate_int(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int32_t *values = <const int32_t *> kernel.values + start
    cdef int32_t *results = <int32_t *> out
    cdef uint32_t bias = <uint32_t> kernel.bias
    cdef uint32_t divisor = <uint32_t> kernel.divisor
    cdef uint64_t reciprocal = kernel.reciprocal >> 32
    cdef int32_t lowest = <int32_t> kernel.lowest
    cdef uint32_t number, rest
    cdef int64_t i
    cdef uint32_t outside = 0
    for i in range(count):
        # floor_remainder in half the width, which vector units have.
        number = <uint32_t> values[i] + bias
        rest = number - <uint32_t> ((number * reciprocal) >> 32) * divisor
        rest = rest - divisor if rest >= divisor else rest
        results[i] = <int32_t> (<uint32_t> values[i] - rest)
        outside |= values[i] < lowest
    return outside


cdef inline uint64_t fill_truncate_long(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const int64_t *values = <const int64_t *> kernel.values + start
    cdef int64_t *results = <int64_t *> out
    cdef int64_t i
    cdef uint64_t outside = 0
    for i in range(count):
        results[i] = <int64_t> (<uint64_t> values[i] - <uint64_t> floor_remainder(kernel, values[i]))
        outside |= values[i] < kernel.lowest
    return outside


cdef inline uint64_t fill_truncate_decimal(
    const Kernel *kernel, int64_t start, int64_t count, void *out
) noexcept nogil:
    cdef const uint8_t *values = kernel.values + 16 * start
    cdef uint8_t *results = <uint8_t *> out
    cdef int128_t value = 0
    cdef int128_t rest
    cdef int64_t i
    cdef uint64_t outside = 0
    for i in range(count):
        # memcpy: neither side promises the 16-byte alignment that the compiler may assume of an int128.
        memcpy(&value, values + 16 * i, 16)
        if value == <int64_t> value and <int64_t> value >= kernel.lowest:
            rest = floor_remainder(kernel, <int64_t> value)
        else:
            rest = value % <int128_t> kernel.divisor
            if rest < 0:
                rest += <int128_t> kernel.divisor
        # Before the subtraction, which could overflow; lowest_wide + rest cannot.
        outside |= value < kernel.lowest_wide + rest
        value = <int128_t> (value - rest)
        memcpy(results + 16 * i, &value, 16)
    return outside


cdef inline int64_t code_point_bytes(const uint8_t *data, int64_t length, int64_t points) noexcept nogil:
    """Return how many bytes the first ``points`` code points of valid UTF-8 take, at most ``length``."""
    cdef int64_t at = 0
    cdef uint64_t word = 0
    if length <= points:
        return length
    # Eight bytes hold at most eight code points: take them whole while that many are still wanted.
    while points >= 8 and at + 8 <= length:
        memcpy(&word, data + at, 8)
        # One bit per continuation byte (10xxxxxx), then their sum in the top byte.
        word = (word >> 7) & ~(word >> 6) & <uint64_t> 0x0101010101010101
        points -= 8 - <int64_t> ((word * <uint64_t> 0x0101010101010101) >> 56)
        at += 8
    while at < length:
        if (data[at] & 0xC0) != 0x80:
            if points == 0:
                break
            points -= 1
        at += 1
    return at


cdef inline int64_t truncated_bytes(
    const Kernel *kernel, const uint8_t *data, int64_t length, bint text
) noexcept nogil:
    if text:
        return code_point_bytes(data, length, kernel.divisor)
    return min(length, <int64_t> kernel.divisor)


cdef inline void span_offsets(
    const Kernel *kernel, const offset_t *offsets, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        data[i] = <uint64_t> (kernel.data + offsets[i])
        lengths[i] = offsets[i + 1] - offsets[i]


cdef inline void span_string(
    const Kernel *kernel, int64_t start, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil:
    span_offsets(kernel, <const int32_t *> kernel.values + start, count, data, lengths)


cdef inline void span_large(
    const Kernel *kernel, int64_t start, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil:
    span_offsets(kernel, <const int64_t *> kernel.values + start, count, data, lengths)


cdef inline void span_fixed(
    const Kernel *kernel, int64_t start, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        data[i] = <uint64_t> (kernel.values + (start + i) * kernel.value_bytes)
        lengths[i] = kernel.value_bytes


cdef inline void clip_spans(
    const Kernel *kernel, int64_t count, const uint64_t *data, int64_t *lengths, bint text
) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        lengths[i] = truncated_bytes(kernel, <const uint8_t *> data[i], lengths[i], text)


cdef inline void span_truncated_string(
    const Kernel *kernel, int64_t start, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil:
    span_string(kernel, start, count, data, lengths)
    clip_spans(kernel, count, data, lengths, True)


cdef inline void span_truncated_large_string(
    const Kernel *kernel, int64_t start, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil:
    span_large(kernel, start, count, data, lengths)
    clip_spans(kernel, count, data, lengths, True)


cdef inline void span_truncated_binary(
    const Kernel *kernel, int64_t start, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil:
    span_string(kernel, start, count, data, lengths)
    clip_spans(kernel, count, data, lengths, False)


cdef inline void span_truncated_large_binary(
    const Kernel *kernel, int64_t start, int64_t count, uint64_t *data, int64_t *lengths
) noexcept nogil:
    span_large(kernel, start, count, data, lengths)
    clip_spans(kernel, count, data, lengths, False)


cdef inline int64_t truncate_strings(
    const Kernel *kernel, const offset_t *offsets, bint text, offset_t *new_offsets, uint8_t *out
) noexcept nogil:
    """Write each row's prefix to ``out`` and where it ends to ``new_offsets``; return the bytes written."""
    cdef int64_t i, length, begin
    cdef int64_t at = 0
    # Beyond this start, eight bytes cannot be loaded without leaving the source.
    cdef int64_t last_word = <int64_t> offsets[kernel.rows] - 8
    cdef int64_t width = kernel.divisor
    # The top bits of the first W bytes: all clear means W ASCII characters.
    cdef uint64_t high_bits = <uint64_t> 0x8080808080808080 >> (64 - 8 * min(width, 8))
    cdef uint64_t word = 0
    new_offsets[0] = 0
    for i in range(kernel.rows):
        begin = offsets[i]
        length = offsets[i + 1] - begin
        if begin <= last_word:
            memcpy(&word, kernel.data + begin, 8)
            if length > width:
                if not text or (width <= 8 and word & high_bits == 0):
                    length = width
                else:
                    length = code_point_bytes(kernel.data + begin, length, width)
            memcpy(out + at, &word, 8)
            if length > 8:
                memcpy(out + at + 8, kernel.data + begin + 8, length - 8)
        else:
            length = truncated_bytes(kernel, kernel.data + begin, length, text)
            memcpy(out + at, kernel.data + begin, length)
        at += length
        new_offsets[i + 1] = <offset_t> at
    return at
