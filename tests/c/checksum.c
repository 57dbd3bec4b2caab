/* Every way to sum gives what the slowest gives, which gives what the standard says; whole and in pieces, at any place. */
#define _GNU_SOURCE
#include "harness.h"

#include "fr_checksum.h"

#define ROOM 5000u

static void compare(const unsigned char *data, size_t size, uint32_t before)
{
    uint32_t right = fr_crc32c_by_table(before, data, size);
    CHECK(fr_crc32c(~before, data, size) == ~right);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        CHECK(fr_crc32c_short(before, data, size) == right);
    if (size >= FR_CRC_FOLD && __builtin_cpu_supports("pclmul"))
        CHECK(fr_crc32c_folded(before, data, size) == right);
    if (size >= FR_CRC_FOLD_WIDE && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq"))
        CHECK(fr_crc32c_folded_wide(before, data, size) == right);
#endif
}

int main(int argc, char **argv)
{
    static unsigned char data[ROOM + 64];
    uint64_t seed = random_seed(1), rounds = 0;
    begin(argc, argv);
    CHECK(fr_crc32c(0, "123456789", 9) == 0xe3069283);          /* the catalogue's check value */
    CHECK(fr_crc32c(0, memset(data, 0, 32), 32) == 0x8a9136aa); /* RFC 3720, B.4 */
    CHECK(fr_crc32c(0, memset(data, 0xff, 32), 32) == 0x62a8ab43);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)random_next(&seed);
    for (size_t size = 0; size < ROOM; size++)
        compare(data + random_below(&seed, 64), size, (uint32_t)random_next(&seed));
    while (!over()) {
        size_t size = random_below(&seed, ROOM), at = random_below(&seed, 64), cut = random_below(&seed, size + 1);
        uint32_t whole = fr_crc32c(0, data + at, size);
        CHECK(fr_crc32c(fr_crc32c(0, data + at, cut), data + at + cut, size - cut) == whole);
        compare(data + at, size, (uint32_t)random_next(&seed));
        if (size) {
            size_t bit = random_below(&seed, 8 * size);
            data[at + bit / 8] ^= (unsigned char)(1 << bit % 8);
            CHECK(fr_crc32c(0, data + at, size) != whole);
        }
        rounds++;
    }
    CHECK(rounds);
    printf("checksum: %lu rounds\n", (unsigned long)rounds);
    return 0;
}
