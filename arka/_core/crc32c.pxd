# cython: language_level=3
"""CRC-32C in C, compiled into each module that cimports it; such a module calls ``arka_crc_prepare`` once.

Owns: the checksum. Does not own what it is computed over.
"""

from libc.stdint cimport uint8_t, uint32_t

# CRC-32C (Castagnoli, reflected, polynomial 0x82F63B78): the SSE4.2 instruction has a latency of three
# cycles and a throughput of one, so three lanes are run at once and joined by tables that say what a
# register becomes after a lane's worth of zero bytes. Elsewhere: slicing by eight.
cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    #define ARKA_LONG_LANE 4096u
    #define ARKA_SHORT_LANE 256u

    static uint32_t arka_crc_table[8][256];
    static uint32_t arka_crc_long[4][256];
    static uint32_t arka_crc_short[4][256];
    static int arka_crc_hardware = 0;

    static uint64_t arka_load_le64(const uint8_t *data) {
        uint64_t word;
        memcpy(&word, data, 8);
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
    #endif
        return word;
    }

    /* All of these work on the bare register: inverting it is the caller's business. */
    static uint32_t arka_crc_software(uint32_t crc, const uint8_t *data, size_t size) {
        while (size >= 8) {
            uint64_t word = arka_load_le64(data) ^ crc;
            crc = arka_crc_table[7][word & 0xff] ^ arka_crc_table[6][(word >> 8) & 0xff]
                ^ arka_crc_table[5][(word >> 16) & 0xff] ^ arka_crc_table[4][(word >> 24) & 0xff]
                ^ arka_crc_table[3][(word >> 32) & 0xff] ^ arka_crc_table[2][(word >> 40) & 0xff]
                ^ arka_crc_table[1][(word >> 48) & 0xff] ^ arka_crc_table[0][word >> 56];
            data += 8;
            size -= 8;
        }
        while (size--)
            crc = (crc >> 8) ^ arka_crc_table[0][(crc ^ *data++) & 0xff];
        return crc;
    }

    static void arka_crc_lane_table(uint32_t table[4][256], size_t lane) {
        static const uint8_t zeros[256];
        uint32_t bit[32];
        for (int i = 0; i < 32; i++) {
            uint32_t crc = (uint32_t)1 << i;
            for (size_t done = 0; done < lane; done += sizeof zeros)
                crc = arka_crc_software(crc, zeros, sizeof zeros);
            bit[i] = crc;
        }
        for (int byte = 0; byte < 4; byte++)
            for (int value = 0; value < 256; value++) {
                uint32_t crc = 0;
                for (int i = 0; i < 8; i++)
                    if (value >> i & 1)
                        crc ^= bit[8 * byte + i];
                table[byte][value] = crc;
            }
    }

    static void arka_crc_prepare(void) {
        for (uint32_t value = 0; value < 256; value++) {
            uint32_t crc = value;
            for (int i = 0; i < 8; i++)
                crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
            arka_crc_table[0][value] = crc;
        }
        for (int slice = 1; slice < 8; slice++)
            for (int value = 0; value < 256; value++) {
                uint32_t crc = arka_crc_table[slice - 1][value];
                arka_crc_table[slice][value] = crc >> 8 ^ arka_crc_table[0][crc & 0xff];
            }
        arka_crc_lane_table(arka_crc_long, ARKA_LONG_LANE);
        arka_crc_lane_table(arka_crc_short, ARKA_SHORT_LANE);
    #if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        arka_crc_hardware = __builtin_cpu_supports("sse4.2") != 0;
    #endif
    }

    #if defined(__x86_64__) && defined(__GNUC__)
    #include <nmmintrin.h>

    static inline uint32_t arka_crc_skip(uint32_t table[4][256], uint32_t crc) {
        return table[0][crc & 0xff] ^ table[1][crc >> 8 & 0xff] ^ table[2][crc >> 16 & 0xff] ^ table[3][crc >> 24];
    }

    #define ARKA_CRC_LANES(LANE, TABLE)                                              \
        while (size >= 3 * LANE) {                                                   \
            uint64_t second = 0, third = 0;                                          \
            const uint8_t *end = data + LANE;                                        \
            do {                                                                     \
                first = _mm_crc32_u64(first, arka_load_le64(data));                  \
                second = _mm_crc32_u64(second, arka_load_le64(data + LANE));         \
                third = _mm_crc32_u64(third, arka_load_le64(data + 2 * LANE));       \
                data += 8;                                                           \
            } while (data < end);                                                    \
            first = arka_crc_skip(TABLE, (uint32_t)first) ^ second;                  \
            first = arka_crc_skip(TABLE, (uint32_t)first) ^ third;                   \
            data += 2 * LANE;                                                        \
            size -= 3 * LANE;                                                        \
        }

    __attribute__((target("sse4.2")))
    static uint32_t arka_crc_sse42(uint32_t crc, const uint8_t *data, size_t size) {
        uint64_t first = crc;
        ARKA_CRC_LANES(ARKA_LONG_LANE, arka_crc_long)
        ARKA_CRC_LANES(ARKA_SHORT_LANE, arka_crc_short)
        while (size >= 8) {
            first = _mm_crc32_u64(first, arka_load_le64(data));
            data += 8;
            size -= 8;
        }
        while (size--)
            first = _mm_crc32_u8((uint32_t)first, *data++);
        return (uint32_t)first;
    }
    #else
    #define arka_crc_sse42 arka_crc_software
    #endif
    """
    int arka_crc_hardware
    void arka_crc_prepare() noexcept nogil
    uint32_t arka_crc_software(uint32_t crc, const uint8_t *data, size_t size) noexcept nogil
    uint32_t arka_crc_sse42(uint32_t crc, const uint8_t *data, size_t size) noexcept nogil


cdef inline uint32_t crc32c_update(uint32_t crc, const uint8_t *data, size_t size) noexcept nogil:
    if arka_crc_hardware:
        return ~arka_crc_sse42(~crc, data, size)
    return ~arka_crc_software(~crc, data, size)
