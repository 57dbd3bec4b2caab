/* Pages of a copy-on-write mapping: which of them were written here, and having those dropped, or all of them private. */
#ifndef FR_PAGES_H
#define FR_PAGES_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define FR_PAGE 4096u

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

/* Runs of pages of a range that are private to this process, by the PAGEMAP_SCAN call of Linux 6.7. */
struct fr_page_run {
    uint64_t start, end, categories;
};
struct fr_page_scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define FR_PAGEMAP_SCAN _IOWR('f', 16, struct fr_page_scan)
#define FR_PAGE_IS_FILE (1u << 2)
#define FR_PAGE_IS_PRESENT (1u << 3)
#define FR_PAGE_IS_SWAPPED (1u << 4)
#define FR_PAGE_RUNS 32

static int fr_pagemap = -1;       /* /proc/self/pagemap; belongs to one address space, so a child opens its own */
static int fr_pagemap_scans = 1;  /* whether the system knows the call */

static inline int fr_pagemap_fd(void)
{
    int fd = __atomic_load_n(&fr_pagemap, __ATOMIC_RELAXED);
    if (fd == -1) {
        int none = -1;
        fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            fd = -2;
        if (!__atomic_compare_exchange_n(&fr_pagemap, &none, fd, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            if (fd >= 0)
                close(fd);
            fd = none;
        }
    }
    return fd;
}

/* Drop the private pages of a range; the file's bytes show again. 0 when that cannot be done. */
static inline int fr_pages_drop_run(char *start, size_t size)
{
    if (madvise(start, size, MADV_DONTNEED) == 0)
        return 1;
    return munlock(start, size) == 0 && madvise(start, size, MADV_DONTNEED) == 0; /* it fails on locked pages */
}

/* Find pages that were written, in the whole pages from `*at` to `end`; `*at` moves behind what was looked at. Returns the
 * number of runs found, at most `most`, or -1 when nobody can say. None may be found before the end is reached. */
static inline int fr_pages_find_written(char **at, char *end, struct fr_page_run *runs, int most)
{
    uint64_t words[512];
    size_t pages = (size_t)(end - *at) / FR_PAGE;
    int fd = fr_pagemap_fd(), found = 0;
    ssize_t got;
    if (fd < 0)
        return -1;
    if (fr_pagemap_scans) {
        struct fr_page_scan scan = {
            .size = sizeof scan, .start = (uintptr_t)*at, .end = (uintptr_t)end,
            .vec = (uintptr_t)runs, .vec_len = (uint64_t)most,
            .category_inverted = FR_PAGE_IS_FILE, .category_mask = FR_PAGE_IS_FILE,
            .category_anyof_mask = FR_PAGE_IS_PRESENT | FR_PAGE_IS_SWAPPED, .return_mask = FR_PAGE_IS_FILE,
        };
        do
            found = ioctl(fd, FR_PAGEMAP_SCAN, &scan);
        while (found < 0 && errno == EINTR);
        if (found >= 0) {
            *at = (char *)(uintptr_t)scan.walk_end;
            return found;
        }
        fr_pagemap_scans = found = 0;
    }
    /* Older systems: a word for each page. Bit 63 present, 62 swapped, 61 the file's own. */
    got = pread(fd, words, (pages < 512 ? pages : 512) * 8, (off_t)((uintptr_t)*at / FR_PAGE * 8));
    if (got < 8)
        return -1;
    for (size_t i = 0; i < (size_t)got / 8 && found < most; i++, *at += FR_PAGE)
        if ((words[i] >> 62) && !(words[i] >> 61 & 1))
            runs[found++] = (struct fr_page_run){.start = (uintptr_t)*at, .end = (uintptr_t)*at + FR_PAGE};
    return found;
}

/* Drop exactly the pages of a range that were written. Returns how many, or -1 when that cannot be done. */
static inline int64_t fr_pages_drop_written(char *start, size_t size)
{
    struct fr_page_run runs[FR_PAGE_RUNS];
    int64_t dropped = 0;
    for (char *at = start; at < start + size;) {
        int found = fr_pages_find_written(&at, start + size, runs, FR_PAGE_RUNS);
        if (found < 0) /* nobody says which: all of them, and none that we know of */
            return fr_pages_drop_run(start, size) ? 0 : -1;
        for (int i = 0; i < found; i++) {
            if (!fr_pages_drop_run((char *)(uintptr_t)runs[i].start, runs[i].end - runs[i].start))
                return -1;
            dropped += (int64_t)((runs[i].end - runs[i].start) / FR_PAGE);
        }
    }
    return dropped;
}

/* Whether a page of a range was written here; 1 also when nobody can say. */
static inline int fr_pages_any_written(char *start, size_t size)
{
    struct fr_page_run run;
    int found = 0;
    for (char *at = start; at < start + size && !found;)
        found = fr_pages_find_written(&at, start + size, &run, 1);
    return found != 0;
}

/* The page faults of this process so far, or -1 where the system does not count them. A page of a copy-on-write mapping that
 * is written for the first time is one, also when the kernel writes it for the process. */
static inline int64_t fr_page_faults(void)
{
    static int counts; /* 0: not tried yet */
    struct rusage before, after;
    if (!__atomic_load_n(&counts, __ATOMIC_RELAXED)) { /* relaxed: as below */
        char *page = mmap(NULL, FR_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        int found = -1;
        if (page != MAP_FAILED) {
            if (getrusage(RUSAGE_SELF, &before) == 0) {
                *(volatile char *)page = 1;
                if (getrusage(RUSAGE_SELF, &after) == 0 && after.ru_minflt > before.ru_minflt)
                    found = 1;
            }
            munmap(page, FR_PAGE);
        }
        __atomic_store_n(&counts, found, __ATOMIC_RELAXED); /* relaxed: all who try find the same */
    }
    if (__atomic_load_n(&counts, __ATOMIC_RELAXED) < 0 || getrusage(RUSAGE_SELF, &after))
        return -1;
    return (int64_t)after.ru_minflt + (int64_t)after.ru_majflt;
}

/* Make every page of a range private, with the bytes that it shows now; other threads may write there meanwhile. */
static inline void fr_pages_make_private(char *start, size_t size)
{
    if (madvise(start, size, MADV_POPULATE_WRITE) == 0)
        return;
    for (size_t at = 0; at < size; at += FR_PAGE) { /* a byte that is exchanged for itself is written, never changed */
        uint8_t *byte = (uint8_t *)start + at, value = __atomic_load_n(byte, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(byte, &value, value, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            ;
    }
}

#endif
