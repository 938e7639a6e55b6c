"""Calendar arithmetic on the proleptic Gregorian calendar, without branches or divisions by variables.

Inline functions only: there is no module to import at run time. Every division is by a constant, which
the compiler turns into a multiplication; all of them are on unsigned numbers, so that they floor.

Source: Neri and Schneider, "Euclidean affine functions and their application to calendar algorithms",
Software: Practice and Experience 53 (2023), algorithm for the computational calendar that begins a year
on 1 March.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef enum:
    # Whole 400-year eras added so that no date is negative: 14,700 eras of 146,097 days are more than
    # the 2**31 days that a date32 may lie before 1970 (a timestamp in microseconds reaches 2**26.7 days).
    ERAS = 14700
    # Years from the shifted era's start to 1970.
    SHIFTED_YEARS = 400 * 14700 + 1970

cdef extern from *:
    """
    /* Days from the shifted era's first 1 March to 1970-01-01. */
    #define ARKA_SHIFTED_DAYS (719468ULL + 146097ULL * 14700ULL)
    /* A day and an hour without the powers of two that a shift takes out first (exact: shifts floor). */
    #define ARKA_DAY_US_ODD 10546875ULL      /* 86,400,000,000 >> 13 */
    #define ARKA_DAY_NS_ODD 1318359375ULL    /* 86,400,000,000,000 >> 16 */
    #define ARKA_HOUR_US_ODD 3515625ULL      /* 3,600,000,000 >> 10 */
    #define ARKA_HOUR_NS_ODD 439453125ULL    /* 3,600,000,000,000 >> 13 */
    """
    const uint64_t SHIFTED_DAYS "ARKA_SHIFTED_DAYS"
    const uint64_t DAY_US_ODD "ARKA_DAY_US_ODD"
    const uint64_t DAY_NS_ODD "ARKA_DAY_NS_ODD"
    const uint64_t HOUR_US_ODD "ARKA_HOUR_US_ODD"
    const uint64_t HOUR_NS_ODD "ARKA_HOUR_NS_ODD"


cdef inline uint64_t shifted_days_of_date(int32_t days) noexcept nogil:
    return <uint64_t> days + SHIFTED_DAYS


cdef inline uint64_t shifted_days_of_us(int64_t micros) noexcept nogil:
    """Days since the shifted era's start; the shift is added before the division, which then floors."""
    return <uint64_t> ((micros >> 13) + <int64_t> (SHIFTED_DAYS * DAY_US_ODD)) / DAY_US_ODD


cdef inline uint64_t shifted_days_of_ns(int64_t nanos) noexcept nogil:
    return <uint64_t> ((nanos >> 16) + <int64_t> (SHIFTED_DAYS * DAY_NS_ODD)) / DAY_NS_ODD


cdef inline int32_t epoch_day(uint64_t shifted_days) noexcept nogil:
    return <int32_t> (<int64_t> shifted_days - <int64_t> SHIFTED_DAYS)


cdef inline int64_t epoch_hour_of_us(int64_t micros) noexcept nogil:
    # 2**32 hours are more than a microsecond timestamp reaches (2**31.3): nothing is negative.
    cdef uint64_t shifted = <uint64_t> ((micros >> 10) + <int64_t> (HOUR_US_ODD << 32))
    return <int64_t> (shifted / HOUR_US_ODD) - (<int64_t> 1 << 32)


cdef inline int64_t epoch_hour_of_ns(int64_t nanos) noexcept nogil:
    # 2**22 hours are more than a nanosecond timestamp reaches (2**21.3).
    cdef uint64_t shifted = <uint64_t> ((nanos >> 13) + <int64_t> (HOUR_NS_ODD << 22))
    return <int64_t> (shifted / HOUR_NS_ODD) - (<int64_t> 1 << 22)


cdef inline int32_t epoch_year(uint64_t shifted_days) noexcept nogil:
    """Years from 1970 of a shifted day number."""
    cdef uint64_t quarters = 4 * shifted_days + 3
    cdef uint64_t century = quarters / 146097
    cdef uint32_t within = <uint32_t> (quarters - century * 146097) | 3
    cdef uint64_t product = <uint64_t> 2939745 * within
    # The low half over 4 * 2939745 is the day of the year from 1 March; January and February, from day
    # 306 on, belong to the next civil year.
    cdef uint32_t new_year = <uint32_t> product >= <uint32_t> (306u * 4 * 2939745)
    return <int32_t> (100 * century + (product >> 32) + new_year) - SHIFTED_YEARS


cdef inline int32_t epoch_month(uint64_t shifted_days) noexcept nogil:
    """Months from 1970-01 of a shifted day number."""
    cdef uint64_t quarters = 4 * shifted_days + 3
    cdef uint64_t century = quarters / 146097
    cdef uint32_t within = <uint32_t> (quarters - century * 146097) | 3
    cdef uint64_t product = <uint64_t> 2939745 * within
    cdef uint32_t day_of_year = <uint32_t> product / <uint32_t> (4u * 2939745)
    # 3 (March) to 14 (February of the next civil year): a plain sum with the years needs no correction.
    cdef uint32_t month = (<uint32_t> 2141 * day_of_year + 197913) >> 16
    return <int32_t> (12 * (<int64_t> (100 * century + (product >> 32)) - SHIFTED_YEARS) + month - 1)
