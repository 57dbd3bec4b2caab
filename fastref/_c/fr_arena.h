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

#include "fr_blocks.h"

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
