/* CRC-32C (Castagnoli), as iSCSI, ext4 and SCTP use it: finds every burst of up to 32 bits, and all but one of 2^32 others.
 *
 * Short runs take the processor's own instruction. Long ones are folded: a carry-less product moves what was read so far
 * past what comes next, many bytes at a time (Gopal and others, "Fast CRC Computation for Generic Polynomials Using
 * PCLMULQDQ", 2009). What is left at the end stands in for all that was folded, and is summed as any other bytes.
 */
#ifndef FR_CHECKSUM_H
#define FR_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Where the processor has no instruction for it: half a byte at a time. */
static inline uint32_t fr_crc32c_by_table(uint32_t crc, const unsigned char *data, size_t size)
{
    static const uint32_t of_half_a_byte[16] = {
        0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
        0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
    };
    for (; size; data++, size--) {
        crc ^= *data;
        crc = crc >> 4 ^ of_half_a_byte[crc & 15];
        crc = crc >> 4 ^ of_half_a_byte[crc & 15];
    }
    return crc;
}

#if defined(__x86_64__)
enum { FR_CRC_FOLD = 128, FR_CRC_FOLD_WIDE = 256, FR_CRC_WIDE_FROM = 1024 };

__attribute__((target("sse4.2"))) static inline uint32_t fr_crc32c_short(uint32_t crc, const unsigned char *data, size_t size)
{
    uint64_t word, sum = crc;
    for (; size >= 8; data += 8, size -= 8) {
        memcpy(&word, data, 8);
        sum = _mm_crc32_u64(sum, word);
    }
    for (; size; data++, size--)
        sum = _mm_crc32_u8((uint32_t)sum, *data);
    return (uint32_t)sum;
}

/* The two factors of a fold over d bits: x^(d+63) and x^(d-1) modulo the polynomial, in reflected order. */
#define FR_CRC_FACTORS_1024 0x7417153f00000000, 0x6577b24500000000
#define FR_CRC_FACTORS_2048 0x1426a81500000000, 0xe9a5d8be00000000

__attribute__((target("sse4.2,pclmul"))) static inline uint32_t fr_crc32c_folded(uint32_t crc, const unsigned char *data,
                                                                                 size_t size)
{
    const __m128i factors = _mm_set_epi64x(FR_CRC_FACTORS_1024);
    __m128i sums[8], low, high;
    unsigned char left[FR_CRC_FOLD];
    for (int i = 0; i < 8; i++)
        sums[i] = _mm_loadu_si128((const __m128i *)(data + 16 * i));
    sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128((int)crc));
    for (data += FR_CRC_FOLD, size -= FR_CRC_FOLD; size >= FR_CRC_FOLD; data += FR_CRC_FOLD, size -= FR_CRC_FOLD)
        for (int i = 0; i < 8; i++) {
            low = _mm_clmulepi64_si128(sums[i], factors, 0x00);
            high = _mm_clmulepi64_si128(sums[i], factors, 0x11);
            sums[i] = _mm_xor_si128(_mm_xor_si128(low, high), _mm_loadu_si128((const __m128i *)(data + 16 * i)));
        }
    memcpy(left, sums, sizeof left);
    return fr_crc32c_short(fr_crc32c_short(0, left, sizeof left), data, size);
}

__attribute__((target("sse4.2,avx512f,vpclmulqdq"))) static inline uint32_t fr_crc32c_folded_wide(uint32_t crc,
                                                                                                const unsigned char *data,
                                                                                                size_t size)
{
    const __m512i factors = _mm512_broadcast_i32x4(_mm_set_epi64x(FR_CRC_FACTORS_2048));
    __m512i sums[4], low, high;
    unsigned char left[FR_CRC_FOLD_WIDE];
    for (int i = 0; i < 4; i++)
        sums[i] = _mm512_loadu_si512(data + 64 * i);
    sums[0] = _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    for (data += FR_CRC_FOLD_WIDE, size -= FR_CRC_FOLD_WIDE; size >= FR_CRC_FOLD_WIDE;
         data += FR_CRC_FOLD_WIDE, size -= FR_CRC_FOLD_WIDE)
        for (int i = 0; i < 4; i++) {
            low = _mm512_clmulepi64_epi128(sums[i], factors, 0x00);
            high = _mm512_clmulepi64_epi128(sums[i], factors, 0x11);
            sums[i] = _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(data + 64 * i), 0x96); /* exclusive or of three */
        }
    memcpy(left, sums, sizeof left);
    return fr_crc32c_short(fr_crc32c_short(0, left, sizeof left), data, size);
}
#endif

/* Returns the checksum of what was summed before (0: nothing) and these bytes behind it. */
static inline uint32_t fr_crc32c(uint32_t before, const void *data, size_t size)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2")) {
        if (size >= FR_CRC_WIDE_FROM && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq"))
            return ~fr_crc32c_folded_wide(~before, data, size);
        if (size >= 2 * FR_CRC_FOLD && __builtin_cpu_supports("pclmul"))
            return ~fr_crc32c_folded(~before, data, size);
        return ~fr_crc32c_short(~before, data, size);
    }
#endif
    return ~fr_crc32c_by_table(~before, data, size);
}

#endif
