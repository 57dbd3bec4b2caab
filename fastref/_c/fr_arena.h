/* Which parts of an arena are lent: a flat range of addresses made of files, each of them of runs of pages, some of those
 * runs being slabs of small blocks of one size.
 *
 * Only numbers are kept here, in private memory: no process that maps the arena, alive or killed, can leave them broken,
 * and nothing here touches a page of it. Pages of a file are used from its beginning: those before its `frontier` have
 * been lent before and are warm, those before `committed` are sure to exist, those from `populated` on cost a fault each.
 *
 * A block is looked for in the oldest file that has room, among warm runs first, so that the younger files become idle
 * and can be given back. Runs that are free merge with free neighbours at once: no two of them ever touch. */
#ifndef FR_ARENA_H
#define FR_ARENA_H

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

/* ---- slabs */

static inline void fr_slab_offer(struct fr_arena *a, struct fr_slab *s)
{
    s->prev = NULL;
    s->next = a->partial[s->class];
    if (s->next)
        s->next->prev = s;
    a->partial[s->class] = s;
}

static inline void fr_slab_withdraw(struct fr_arena *a, struct fr_slab *s)
{
    if (s->prev)
        s->prev->next = s->next;
    else
        a->partial[s->class] = s->next;
    if (s->next)
        s->next->prev = s->prev;
}

static inline uint64_t fr_slab_block_bytes(const struct fr_slab *s)
{
    uint64_t class = s->class;
    return (class < 8 ? class : (8 + (class - 8) % 8) << (class - 8) / 8) * FR_ARENA_UNIT;
}

static inline uint32_t fr_slab_pages(uint64_t block_bytes)
{
    uint32_t pages = (FR_SLAB_BLOCKS * block_bytes + FR_ARENA_PAGE - 1) / FR_ARENA_PAGE;
    return pages < FR_SLAB_PAGES ? FR_SLAB_PAGES : pages;
}

static inline int fr_slab_number(struct fr_arena *a, uint32_t *number)
{
    uint32_t places = a->slabs ? a->slabs * 2 : 64;
    struct fr_slab **more;
    for (*number = 0; *number < a->slabs; ++*number)
        if (!a->slab[*number])
            return 1;
    more = realloc(a->slab, places * sizeof *more);
    if (!more)
        return 0;
    memset(more + a->slabs, 0, (places - a->slabs) * sizeof *more);
    a->slab = more;
    a->slabs = places;
    return 1;
}

static inline int fr_slab_make(struct fr_arena *a, uint64_t block_bytes, struct fr_need *need)
{
    uint32_t pages = fr_slab_pages(block_bytes), blocks = pages * FR_ARENA_PAGE / block_bytes, page, number;
    struct fr_slab *s = malloc(sizeof *s + blocks * (1 + sizeof *s->waiting) + 1);
    struct fr_file *f;
    int what;
    if (!s || !fr_slab_number(a, &number)) {
        free(s);
        return FR_NO_MEMORY;
    }
    what = fr_run_take(a, pages, &f, &page, need);
    if (what != FR_LENT) {
        free(s);
        return what;
    }
    need->cold_pages = 0; /* small blocks are touched one by one */
    for (uint32_t i = 0; i < pages; i++)
        f->page[page + i].tag = FR_TAG(FR_IN_SLAB, number);
    *s = (struct fr_slab){.file = f, .page = page, .number = number, .class = fr_class_of(block_bytes / FR_ARENA_UNIT),
                          .blocks = blocks, .free = blocks};
    s->waiting = (uint16_t *)(s->state + blocks + blocks % 2);
    memset(s->state, FR_BLOCK_FREE, blocks);
    for (uint32_t i = 0; i < blocks; i++)
        s->waiting[i] = blocks - 1 - i;
    a->slab[number] = s;
    a->empty_slabs++;
    fr_slab_offer(a, s);
    return FR_LENT;
}

static inline void fr_slab_end(struct fr_arena *a, struct fr_slab *s)
{
    uint32_t pages = fr_slab_pages(fr_slab_block_bytes(s));
    for (uint32_t i = 1; i < pages; i++)
        s->file->page[s->page + i].tag = 0;
    s->file->page[s->page + pages - 1].tag = FR_TAG(FR_USED_TAIL, pages);
    s->file->page[s->page].tag = FR_TAG(FR_LENT_HEAD, pages);
    fr_run_give_back(s->file, s->page);
    fr_slab_withdraw(a, s);
    a->slab[s->number] = NULL;
    a->empty_slabs--;
    free(s);
}

/* ---- blocks; everything from here on takes the lock */

/* Lend a block, for the caller to fill. */
static inline int fr_arena_lend(struct fr_arena *a, uint64_t bytes, uint64_t *offset, struct fr_need *need)
{
    uint64_t size;
    struct fr_file *f;
    uint32_t page;
    int what = FR_LENT;
    need->cold_pages = 0;
    if (bytes > a->limit * FR_ARENA_PAGE)
        return FR_OVER_LIMIT;
    size = fr_arena_rounded(bytes);
    pthread_mutex_lock(&a->lock);
    if (size <= FR_SMALL) {
        unsigned class = fr_class_of(size / FR_ARENA_UNIT);
        struct fr_slab *s;
        if (!a->partial[class])
            what = fr_slab_make(a, size, need);
        s = a->partial[class];
        if (what == FR_LENT) {
            uint16_t block = s->waiting[--s->free];
            a->empty_slabs -= s->free + 1 == s->blocks;
            if (!s->free)
                fr_slab_withdraw(a, s);
            s->state[block] = FR_BLOCK_LENT;
            *offset = (s->file->start + s->page) * FR_ARENA_PAGE + block * size;
        }
    } else {
        what = fr_run_take(a, size / FR_ARENA_PAGE, &f, &page, need);
        if (what == FR_OVER_LIMIT) { /* for the block as it is, perhaps */
            size = (bytes + FR_ARENA_PAGE - 1) / FR_ARENA_PAGE * FR_ARENA_PAGE;
            what = fr_run_take(a, size / FR_ARENA_PAGE, &f, &page, need);
        }
        if (what == FR_LENT)
            *offset = (f->start + page) * FR_ARENA_PAGE;
    }
    if (what == FR_LENT) {
        a->lent += size;
        a->blocks++;
    }
    pthread_mutex_unlock(&a->lock);
    return what;
}

/* Where a block begins, by its offset: the word that says whether it is lent, and its size; NULL when none begins there. */
static inline struct fr_file *fr_arena_find(struct fr_arena *a, uint64_t offset, uint32_t *page, struct fr_slab **slab,
                                            uint32_t *block, uint64_t *bytes)
{
    uint64_t at = offset / FR_ARENA_PAGE;
    struct fr_file *f = at < a->span ? a->at_grain[at / FR_GRAIN] : NULL;
    uint32_t tag;
    if (!f || at - f->start >= f->pages)
        return NULL;
    *page = at - f->start;
    tag = f->page[*page].tag;
    *slab = NULL;
    if (FR_KIND(tag) == FR_IN_SLAB) {
        uint64_t inside;
        *slab = a->slab[FR_COUNT(tag)];
        *bytes = fr_slab_block_bytes(*slab);
        inside = offset - (f->start + (*slab)->page) * FR_ARENA_PAGE;
        *block = inside / *bytes;
        return inside % *bytes || *block >= (*slab)->blocks ? NULL : f;
    }
    *bytes = (uint64_t)FR_COUNT(tag) * FR_ARENA_PAGE;
    return offset % FR_ARENA_PAGE || (FR_KIND(tag) != FR_LENT_HEAD && FR_KIND(tag) != FR_HELD_HEAD) ? NULL : f;
}

/* Bytes of a block that is lent, 0 when none is. */
static inline uint64_t fr_arena_lent_bytes(struct fr_arena *a, uint64_t offset)
{
    uint32_t page, block;
    struct fr_slab *s;
    uint64_t bytes;
    struct fr_file *f;
    pthread_mutex_lock(&a->lock);
    f = fr_arena_find(a, offset, &page, &s, &block, &bytes);
    if (!f || (s ? s->state[block] != FR_BLOCK_LENT : FR_KIND(f->page[page].tag) != FR_LENT_HEAD))
        bytes = 0;
    pthread_mutex_unlock(&a->lock);
    return bytes;
}

/* A block that is lent is held from here on. 0 when none is lent there. */
static inline int fr_arena_hold(struct fr_arena *a, uint64_t offset)
{
    uint32_t page, block;
    struct fr_slab *s;
    uint64_t bytes;
    struct fr_file *f;
    int done = 0;
    pthread_mutex_lock(&a->lock);
    f = fr_arena_find(a, offset, &page, &s, &block, &bytes);
    if (f && s && s->state[block] == FR_BLOCK_LENT) {
        s->state[block] = FR_BLOCK_HELD;
        done = 1;
    } else if (f && !s && FR_KIND(f->page[page].tag) == FR_LENT_HEAD) {
        f->page[page].tag = FR_TAG(FR_HELD_HEAD, FR_COUNT(f->page[page].tag));
        done = 1;
    }
    pthread_mutex_unlock(&a->lock);
    return done;
}

/* Take a block back that is lent, or held. 0 when there is none. */
static inline int fr_arena_give_back(struct fr_arena *a, uint64_t offset, int held)
{
    uint32_t page, block;
    struct fr_slab *s;
    uint64_t bytes;
    struct fr_file *f;
    int done = 0;
    pthread_mutex_lock(&a->lock);
    f = fr_arena_find(a, offset, &page, &s, &block, &bytes);
    if (f && s && s->state[block] == (held ? FR_BLOCK_HELD : FR_BLOCK_LENT)) {
        s->state[block] = FR_BLOCK_FREE;
        if (s->free) /* to the front: its pages were used last */
            fr_slab_withdraw(a, s);
        fr_slab_offer(a, s);
        s->waiting[s->free++] = block;
        a->empty_slabs += s->free == s->blocks;
        done = 1;
    } else if (f && !s && FR_KIND(f->page[page].tag) == (held ? FR_HELD_HEAD : FR_LENT_HEAD)) {
        fr_run_give_back(f, page);
        done = 1;
    }
    if (done) {
        a->lent -= bytes;
        a->blocks--;
    }
    pthread_mutex_unlock(&a->lock);
    return done;
}

/* ---- files */

/* How large a file for a block of so many pages had better be; under the lock. */
static inline uint64_t fr_file_size(struct fr_arena *a, uint64_t pages)
{
    uint64_t all = 0, size;
    for (uint32_t i = 0; i < a->places; i++)
        all += a->order[i]->pages;
    size = all / FR_FILE_SHARE > FR_FILE_LEAST ? all / FR_FILE_SHARE : FR_FILE_LEAST;
    if (size < 2 * pages) /* another such block will follow */
        size = 2 * pages;
    if (size > FR_FILE_MOST)
        size = FR_FILE_MOST;
    return size < pages ? pages : size;
}

/* The first place for so many pages, -1 when there is none; under the lock. */
static inline int64_t fr_file_place(struct fr_arena *a, uint64_t pages)
{
    uint64_t grains = a->span / FR_GRAIN + !!(a->span % FR_GRAIN), run = 0;
    for (uint64_t i = 0; i < grains; i++) {
        run = a->at_grain[i] ? 0 : run + 1;
        if (run * FR_GRAIN >= pages && (i + 1 - run) * FR_GRAIN + pages <= a->span)
            return (i + 1 - run) * FR_GRAIN;
    }
    return -1;
}

/* Set a place aside for a file, in which blocks of so many pages fit; fr_file_open says that it is there. `exactly`: of
 * that size. */
static inline int fr_file_plan(struct fr_arena *a, uint64_t pages, int exactly, struct fr_file **file)
{
    struct fr_file *f = calloc(1, sizeof *f), **order;
    int64_t start = -1;
    uint64_t size = pages;
    pthread_mutex_lock(&a->lock);
    if (!exactly) {
        size = (fr_file_size(a, pages) + FR_GRAIN - 1) / FR_GRAIN * FR_GRAIN;
        start = fr_file_place(a, size);
    }
    if (start < 0) {
        size = pages;
        start = fr_file_place(a, size);
    }
    order = realloc(a->order, (a->places + 1) * sizeof *order);
    if (order)
        a->order = order;
    if (f && size <= FR_MOST_PAGES)
        f->page = calloc(size, sizeof *f->page);
    if (start < 0 || size > FR_MOST_PAGES || !f || !f->page || !order) {
        pthread_mutex_unlock(&a->lock);
        if (f)
            free(f->page);
        free(f);
        return start < 0 || size > FR_MOST_PAGES ? FR_OVER_LIMIT : FR_NO_MEMORY;
    }
    f->start = start;
    f->pages = size;
    a->order[a->places++] = f;
    for (uint64_t i = f->start / FR_GRAIN; i <= (f->start + size - 1) / FR_GRAIN; i++)
        a->at_grain[i] = f;
    pthread_mutex_unlock(&a->lock);
    *file = f;
    return FR_LENT;
}

static inline void fr_file_open(struct fr_arena *a, struct fr_file *f)
{
    pthread_mutex_lock(&a->lock);
    f->there = 1;
    a->files++;
    pthread_mutex_unlock(&a->lock);
}

/* A file that was planned, or is retiring, is no more. */
static inline void fr_file_forget(struct fr_arena *a, struct fr_file *f)
{
    uint32_t i = 0;
    pthread_mutex_lock(&a->lock);
    while (a->order[i] != f)
        i++;
    memmove(a->order + i, a->order + i + 1, (--a->places - i) * sizeof *a->order);
    for (uint64_t k = f->start / FR_GRAIN; k <= (f->start + f->pages - 1) / FR_GRAIN; k++)
        a->at_grain[k] = NULL;
    a->committed -= f->committed;
    a->leaving -= f->retiring ? f->committed : 0;
    if (f->there) {
        a->given_back += f->committed;
        a->files--;
    }
    pthread_mutex_unlock(&a->lock);
    free(f->page);
    free(f);
}

/* A range from the end of what is committed is there now. */
static inline void fr_file_committed(struct fr_arena *a, struct fr_file *f, uint64_t end)
{
    pthread_mutex_lock(&a->lock);
    if (end > f->start + f->committed) {
        a->committed += end - f->start - f->committed;
        f->committed = end - f->start;
    }
    pthread_mutex_unlock(&a->lock);
}

static inline void fr_slabs_trim(struct fr_arena *a)
{
    for (uint32_t i = 0; i < a->slabs && a->empty_slabs; i++)
        if (a->slab[i] && a->slab[i]->free == a->slab[i]->blocks)
            fr_slab_end(a, a->slab[i]);
}

/* Retire the file that has been idle for longest, if one has been for so long; NULL if none has. The first file stays.
 * Called every now and then: a file counts as idle from the first call that finds it so. */
static inline struct fr_file *fr_file_retire(struct fr_arena *a, int64_t now_ns, int64_t patience_ns)
{
    struct fr_file *found = NULL;
    pthread_mutex_lock(&a->lock);
    fr_slabs_trim(a);
    for (uint32_t i = 1; i < a->places; i++) {
        struct fr_file *f = a->order[i];
        if (!f->there || f->used || f->retiring || f->busy)
            continue;
        if (!f->idle_since_ns)
            f->idle_since_ns = now_ns;
        if (now_ns - f->idle_since_ns >= patience_ns && (!found || f->idle_since_ns < found->idle_since_ns))
            found = f;
    }
    if (found) {
        found->retiring = 1;
        a->leaving += found->committed;
    }
    pthread_mutex_unlock(&a->lock);
    return found;
}

/* ---- warm pages ahead of demand */

/* Up to which page of a file, from its beginning, pages had better be populated after so many were taken cold; what is to
 * be committed for it goes to `need`. 0: nothing. Nothing is done ahead that would fill more than half of the arena. */
static inline uint64_t fr_file_ahead(struct fr_arena *a, struct fr_file *f, uint64_t pages, struct fr_need *need)
{
    uint64_t end;
    pthread_mutex_lock(&a->lock);
    end = (uint64_t)f->frontier + pages;
    need->file = f;
    need->start = f->start + f->committed;
    need->pages = end > f->committed ? end - f->committed : 0;
    if (end > f->pages || a->committed + need->pages > a->limit / 2)
        end = 0;
    pthread_mutex_unlock(&a->lock);
    return end;
}

/* Keep a file from being retired, until fr_file_release; a block of it is lent now. */
static inline void fr_file_keep(struct fr_arena *a, struct fr_file *f)
{
    pthread_mutex_lock(&a->lock);
    f->busy++;
    pthread_mutex_unlock(&a->lock);
}

static inline void fr_file_release(struct fr_arena *a, struct fr_file *f)
{
    pthread_mutex_lock(&a->lock);
    f->busy--;
    pthread_mutex_unlock(&a->lock);
}

/* The next pages of a file to populate, at most so many, those before `end` pages are; 0: none is left. */
static inline uint64_t fr_file_next_cold(struct fr_arena *a, struct fr_file *f, uint64_t end, uint64_t most,
                                         uint64_t *start)
{
    uint64_t pages;
    pthread_mutex_lock(&a->lock);
    if (end > f->committed)
        end = f->committed;
    pages = end > f->populated ? end - f->populated : 0;
    if (pages > most)
        pages = most;
    *start = f->start + f->populated;
    pthread_mutex_unlock(&a->lock);
    return pages;
}

static inline void fr_file_populated(struct fr_arena *a, struct fr_file *f, uint64_t end)
{
    pthread_mutex_lock(&a->lock);
    if (f->start + f->populated < end)
        f->populated = end - f->start;
    pthread_mutex_unlock(&a->lock);
}

/* ---- the whole */

static inline int fr_arena_begin(struct fr_arena *a, uint64_t span_pages, uint64_t limit_pages)
{
    memset(a, 0, sizeof *a);
    a->span = span_pages;
    a->limit = limit_pages;
    a->at_grain = calloc(span_pages / FR_GRAIN + 1, sizeof *a->at_grain);
    pthread_mutex_init(&a->lock, NULL);
    return a->at_grain != NULL;
}

static inline void fr_arena_end(struct fr_arena *a)
{
    for (uint32_t i = 0; i < a->slabs; i++)
        free(a->slab[i]);
    for (uint32_t i = 0; i < a->places; i++) {
        free(a->order[i]->page);
        free(a->order[i]);
    }
    free(a->slab);
    free(a->order);
    free(a->at_grain);
    pthread_mutex_destroy(&a->lock);
}

#endif
