/* What an arena is made of, and its runs: pages in a row in one file, lent or free. */
#ifndef FR_RUNS_H
#define FR_RUNS_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    FR_ARENA_PAGE = 4096,
    FR_ARENA_UNIT = 64,        /* small blocks are multiples of it: buffers in a payload begin at multiples of 64 */
    FR_SMALL = 32768,          /* the largest block that comes from a slab */
    FR_SLAB_BLOCKS = 8,        /* a slab has at least so many, */
    FR_SLAB_PAGES = 4,         /* and at least so many pages */
    FR_SMALL_STEPS = 8,        /* sizes of small blocks in each doubling: at most an eighth of one is unused, */
    FR_CLASSES = 57,           /* and there are so many sizes */
    FR_RUN_STEPS = 32,         /* of larger ones */
    FR_BINS = 256,             /* of free runs, by size; 8 in each doubling */
    FR_BIN_LOOKS = 8,          /* how many runs of a bin are looked at: some of it may be too small */
    FR_GRAIN = 256,            /* pages; files begin at multiples */
    FR_COMMIT_STEP = 256,      /* pages; memory is made sure of in steps of at least this much */
    FR_FILE_LEAST = 64 * 256,  /* pages of a file after the first: what is given back, is given back whole; */
    FR_FILE_MOST = 1024 * 256, /* of one that holds more than one block */
    FR_FILE_SHARE = 4          /* and a file is at least this part of all before it, so that there are never many */
};

enum { /* what fr_arena_lend says */
    FR_LENT,
    FR_WANTS_COMMIT, /* need: a range of a file, to be made sure of; the file is kept until fr_file_release */
    FR_WANTS_FILE,   /* need: pages of a file, to be planned */
    FR_OVER_LIMIT,
    FR_NO_MEMORY     /* of this process, for bookkeeping */
};

/* The word of a page: what begins, ends or lies there, and how many pages it has; of a slab, its number. */
enum { FR_TAG_NONE, FR_FREE_HEAD, FR_FREE_TAIL, FR_LENT_HEAD, FR_HELD_HEAD, FR_USED_TAIL, FR_IN_SLAB };
#define FR_TAG(kind, n) ((uint32_t)(kind) << 29 | (uint32_t)(n))
#define FR_KIND(tag) ((tag) >> 29)
#define FR_COUNT(tag) ((tag) & 0x1fffffffu)
#define FR_MOST_PAGES 0x1fffffffu

enum { FR_BLOCK_FREE, FR_BLOCK_LENT, FR_BLOCK_HELD };

struct fr_page {
    uint32_t tag, next, prev; /* next and prev: of a free run's first page, in its bin; page + 1, 0 is none */
};

struct fr_file {
    uint64_t start;           /* page of the arena */
    uint32_t pages, frontier, committed, populated;
    uint32_t used;            /* runs that are lent, and slabs */
    uint32_t bin[FR_BINS];
    uint64_t filled[FR_BINS / 64];
    int64_t idle_since_ns;
    uint8_t there;            /* it exists; before, it is only planned */
    uint8_t retiring;         /* nothing is lent there any more */
    uint32_t busy;            /* who commits or populates some of it */
    struct fr_page *page;
};

struct fr_slab {
    struct fr_file *file;
    uint32_t page, number, class, blocks, free;
    struct fr_slab *next, *prev; /* among those of its class with free blocks */
    uint16_t *waiting;           /* free blocks, the last given back on top */
    uint8_t state[];
};

struct fr_arena {
    pthread_mutex_t lock;
    uint64_t span, limit;         /* pages: of addresses; that may be committed */
    uint64_t committed, leaving;  /* pages; of these, those of files that are retiring, which do not count */
    uint64_t lent;                /* bytes */
    uint64_t blocks, files, given_back; /* given_back: pages, so far */
    struct fr_file **order;       /* the files, oldest first */
    uint32_t places;              /* in that list */
    struct fr_file **at_grain;    /* which file lies there */
    struct fr_slab **slab;
    uint32_t slabs, empty_slabs;  /* places for slabs; slabs without a block that is lent */
    struct fr_slab *partial[FR_CLASSES];
};

struct fr_need {
    struct fr_file *file;
    uint64_t start, pages;        /* to be committed, in pages of the arena; or the size that a file must have */
    uint64_t cold, cold_pages;    /* of a block that was lent: what nobody has touched yet */
};

/* ---- sizes */

/* The next size of which `parts` lie in each doubling. */
static inline uint64_t fr_rounded(uint64_t n, uint64_t parts)
{
    uint64_t step;
    if (n <= parts)
        return n;
    step = (UINT64_C(1) << (63 - __builtin_clzll(n - 1))) / parts;
    return (n + step - 1) / step * step;
}

/* The number of the largest of the sizes of which 8 lie in each doubling that is not above n. */
static inline unsigned fr_class_of(uint64_t n)
{
    unsigned top;
    if (n < 8)
        return n;
    top = 63 - __builtin_clzll(n);
    return 8 + (top - 3) * 8 + (n >> (top - 3) & 7);
}

/* What a block of this many bytes takes. */
static inline uint64_t fr_arena_rounded(uint64_t bytes)
{
    if (bytes <= FR_SMALL)
        return fr_rounded((bytes + FR_ARENA_UNIT - 1) / FR_ARENA_UNIT + !bytes, FR_SMALL_STEPS) * FR_ARENA_UNIT;
    return fr_rounded(bytes / FR_ARENA_PAGE + !!(bytes % FR_ARENA_PAGE), FR_RUN_STEPS) * FR_ARENA_PAGE;
}

/* ---- runs of pages */

static inline void fr_run_into_bin(struct fr_file *f, uint32_t page, uint32_t pages)
{
    unsigned bin = fr_class_of(pages);
    f->page[page + pages - 1].tag = FR_TAG(FR_FREE_TAIL, pages);
    f->page[page] = (struct fr_page){FR_TAG(FR_FREE_HEAD, pages), f->bin[bin], 0};
    if (f->bin[bin])
        f->page[f->bin[bin] - 1].prev = page + 1;
    f->bin[bin] = page + 1;
    f->filled[bin / 64] |= UINT64_C(1) << bin % 64;
}

static inline void fr_run_out_of_bin(struct fr_file *f, uint32_t page)
{
    struct fr_page *p = &f->page[page];
    unsigned bin = fr_class_of(FR_COUNT(p->tag));
    if (p->prev)
        f->page[p->prev - 1].next = p->next;
    else
        f->bin[bin] = p->next;
    if (p->next)
        f->page[p->next - 1].prev = p->prev;
    if (!f->bin[bin])
        f->filled[bin / 64] &= ~(UINT64_C(1) << bin % 64);
}

/* The free run that ends before a page; its length, 0 when there is none. */
static inline uint32_t fr_run_before(struct fr_file *f, uint32_t page)
{
    uint32_t tag = page ? f->page[page - 1].tag : 0;
    return FR_KIND(tag) == FR_FREE_TAIL || (FR_KIND(tag) == FR_FREE_HEAD && FR_COUNT(tag) == 1) ? FR_COUNT(tag) : 0;
}

static inline void fr_run_mark(struct fr_file *f, uint32_t page, uint32_t pages)
{
    f->page[page + pages - 1].tag = FR_TAG(FR_USED_TAIL, pages);
    f->page[page].tag = FR_TAG(FR_LENT_HEAD, pages);
    f->used++;
    f->idle_since_ns = 0;
}

/* A run among those that have been lent before. -1: none has room. */
static inline int64_t fr_run_take_warm(struct fr_file *f, uint32_t pages)
{
    unsigned bin = fr_class_of(pages), word;
    uint32_t page = f->bin[bin], left;
    uint64_t found;
    for (int looks = FR_BIN_LOOKS; page && FR_COUNT(f->page[page - 1].tag) < pages;)
        page = --looks ? f->page[page - 1].next : 0;
    if (!page) { /* all runs of the bins above are large enough */
        word = ++bin / 64;
        found = f->filled[word] & ~UINT64_C(0) << bin % 64;
        while (!found && ++word < FR_BINS / 64)
            found = f->filled[word];
        if (!found)
            return -1;
        page = f->bin[word * 64 + __builtin_ctzll(found)];
    }
    left = FR_COUNT(f->page[--page].tag) - pages;
    fr_run_out_of_bin(f, page);
    if (left)
        fr_run_into_bin(f, page + pages, left);
    fr_run_mark(f, page, pages);
    return page;
}

/* Pages that may still be committed. */
static inline uint64_t fr_arena_room(const struct fr_arena *a)
{
    return a->limit + a->leaving - a->committed;
}

/* A run that begins in the last free pages before the frontier, or at it. */
static inline int fr_run_take_fresh(struct fr_arena *a, struct fr_file *f, uint32_t pages, uint32_t *page,
                                    struct fr_need *need)
{
    uint32_t before = fr_run_before(f, f->frontier), end, wanted;
    if (pages - before > f->pages - f->frontier)
        return FR_WANTS_FILE;
    end = f->frontier + pages - before;
    if (end > f->committed) {
        wanted = end - f->committed;
        if (wanted > fr_arena_room(a))
            return FR_OVER_LIMIT;
        if (wanted < FR_COMMIT_STEP)
            wanted = f->pages - f->committed < FR_COMMIT_STEP ? f->pages - f->committed : FR_COMMIT_STEP;
        if (wanted > fr_arena_room(a))
            wanted = fr_arena_room(a);
        need->file = f;
        need->start = f->start + f->committed;
        need->pages = wanted;
        f->busy++;
        return FR_WANTS_COMMIT;
    }
    if (before)
        fr_run_out_of_bin(f, f->frontier - before);
    *page = f->frontier - before;
    need->cold = f->start + (f->frontier > f->populated ? f->frontier : f->populated);
    need->cold_pages = f->start + end > need->cold ? f->start + end - need->cold : 0;
    need->file = f;
    f->frontier = end;
    if (f->populated < end)
        f->populated = end;
    fr_run_mark(f, *page, pages);
    return FR_LENT;
}

/* A run in the oldest file that has one, warm if any has. */
static inline int fr_run_take(struct fr_arena *a, uint64_t pages, struct fr_file **file, uint32_t *page,
                              struct fr_need *need)
{
    int why = FR_WANTS_FILE;
    need->pages = pages;
    if (pages > a->limit)
        return FR_OVER_LIMIT;
    for (uint32_t i = 0; i < a->places; i++) {
        struct fr_file *f = a->order[i];
        int64_t found = f->there && !f->retiring ? fr_run_take_warm(f, pages) : -1;
        if (found >= 0) {
            *file = f;
            *page = found;
            return FR_LENT;
        }
    }
    for (uint32_t i = 0; i < a->places; i++) {
        struct fr_file *f = a->order[i];
        int what;
        if (!f->there || f->retiring || pages > f->pages)
            continue;
        what = fr_run_take_fresh(a, f, pages, page, need);
        if (what == FR_LENT || what == FR_WANTS_COMMIT) {
            *file = f;
            return what;
        }
        if (what == FR_OVER_LIMIT)
            why = what;
    }
    return pages > fr_arena_room(a) ? FR_OVER_LIMIT : why;
}

static inline void fr_run_give_back(struct fr_file *f, uint32_t page)
{
    uint32_t pages = FR_COUNT(f->page[page].tag), before = fr_run_before(f, page), after = page + pages;
    uint32_t tag = after < f->frontier ? f->page[after].tag : 0;
    f->page[page].tag = f->page[after - 1].tag = 0;
    if (FR_KIND(tag) == FR_FREE_HEAD) {
        fr_run_out_of_bin(f, after);
        f->page[after - 1].tag = f->page[after].tag = 0;
        pages += FR_COUNT(tag);
    }
    if (before) {
        fr_run_out_of_bin(f, page - before);
        f->page[page - 1].tag = 0;
        page -= before;
        pages += before;
    }
    fr_run_into_bin(f, page, pages);
    f->used--;
}

#endif
