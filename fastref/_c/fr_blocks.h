/* The blocks of an arena: runs of pages, or parts of a slab. */
#ifndef FR_BLOCKS_H
#define FR_BLOCKS_H

#include "fr_runs.h"

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

#endif
