/* Warm memory: freed pieces wait here for the next use, since pages that the process has already are written ten times
 * as fast as new ones.
 *
 * Pieces come in size classes, eight to each doubling. What is kept is bounded; beyond that the piece that has waited
 * longest goes back to the system, as does each that has waited for a second. Any thread takes and gives. */
#ifndef FR_WARM_H
#define FR_WARM_H

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "fr_errand.h"

#define FR_WARM_FROM 65536u       /* smaller ones the allocator keeps itself */
#define FR_WARM_MAPS_FROM 1048576u /* these are mappings of their own, which go back to the system whole */
#define FR_WARM_HUGE_FROM 4194304u /* these ask for huge pages: new, they are written three times as fast */
#define FR_WARM_WAITS_NS 1000000000
#define FR_WARM_CLASSES 256u
#define FR_WARM_LARGEST ((size_t)1 << 46) /* classes go so far, memory does not */

struct fr_piece {                 /* at the start of a piece that waits */
    struct fr_piece *newer, *older;   /* of all */
    struct fr_piece *above, *below;   /* of its class */
    size_t size;
    int64_t since_ns;
};

struct fr_warm {
    pthread_mutex_t lock;         /* the fields below; the system is asked, and told, without it */
    size_t limit, kept;           /* bytes */
    struct fr_piece *newest, *oldest, *top[FR_WARM_CLASSES];
    uint64_t warm, fresh;         /* pieces of FR_WARM_FROM and more that were taken: from here, from the system */
    struct fr_errands *errands;   /* who looks after those that wait too long */
};

static inline size_t fr_warm_size(size_t size, unsigned *class)
{
    unsigned log = 63 - __builtin_clzll(size - 1);
    size_t step = ((size_t)1 << log) / 8, steps = (size + step - 1) / step;
    *class = (log - 15) * 8 + (unsigned)(steps - 8);
    return steps * step;
}

static inline void fr_piece_release(struct fr_piece *piece, size_t size)
{
    if (size >= FR_WARM_MAPS_FROM)
        munmap(piece, size);
    else
        free(piece);
}

static inline void fr_warm_unlink(struct fr_warm *warm, struct fr_piece *piece)
{
    unsigned class;
    fr_warm_size(piece->size, &class);
    *(piece->newer ? &piece->newer->older : &warm->newest) = piece->older;
    *(piece->older ? &piece->older->newer : &warm->oldest) = piece->newer;
    *(piece->above ? &piece->above->below : &warm->top[class]) = piece->below;
    if (piece->below)
        piece->below->above = piece->above;
    warm->kept -= piece->size;
}

/* Memory for `size` bytes, at a multiple of 64; NULL: there is none. */
static inline void *fr_warm_take(struct fr_warm *warm, size_t size)
{
    struct fr_piece *piece;
    void *start;
    unsigned class;
    if (size < FR_WARM_FROM)
        return posix_memalign(&start, 64, size) ? NULL : start;
    if (size > FR_WARM_LARGEST)
        return NULL;
    size = fr_warm_size(size, &class);
    pthread_mutex_lock(&warm->lock);
    piece = warm->top[class];
    if (piece) {
        fr_warm_unlink(warm, piece);
        warm->warm++;
    } else {
        warm->fresh++;
    }
    pthread_mutex_unlock(&warm->lock);
    if (piece)
        return piece;
    if (size < FR_WARM_MAPS_FROM)
        return posix_memalign(&start, 64, size) ? NULL : start;
    start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    if (size >= FR_WARM_HUGE_FROM)
        (void)madvise(start, size, MADV_HUGEPAGE); /* advice; small pages do as well */
#endif
    return start;
}

/* Give back to the system what is oldest, until at most `limit` bytes are left and nothing is older than `since_ns`. */
static inline void fr_warm_trim(struct fr_warm *warm, size_t limit, int64_t since_ns)
{
    for (;;) {
        struct fr_piece *piece;
        size_t size = 0;
        pthread_mutex_lock(&warm->lock);
        piece = warm->oldest;
        if (piece && (warm->kept > limit || piece->since_ns <= since_ns)) {
            size = piece->size;
            fr_warm_unlink(warm, piece);
        }
        pthread_mutex_unlock(&warm->lock);
        if (!size)
            return;
        fr_piece_release(piece, size);
    }
}

/* Give back what `fr_warm_take` returned for that size. */
static inline void fr_warm_give(struct fr_warm *warm, void *start, size_t size)
{
    struct fr_piece *piece = start;
    unsigned class;
    size_t limit;
    int over;
    if (size < FR_WARM_FROM) {
        free(start);
        return;
    }
    size = fr_warm_size(size, &class);
    if (!fr_errands_attend(warm->errands)) { /* nobody would ever give it back */
        fr_piece_release(piece, size);
        return;
    }
    piece->size = size;
    piece->since_ns = fr_now_ns();
    piece->newer = piece->above = NULL;
    pthread_mutex_lock(&warm->lock);
    piece->older = warm->newest;
    piece->below = warm->top[class];
    *(piece->older ? &piece->older->newer : &warm->oldest) = piece;
    if (piece->below)
        piece->below->above = piece;
    warm->newest = warm->top[class] = piece;
    warm->kept += size;
    limit = warm->limit;
    over = warm->kept > limit;
    pthread_mutex_unlock(&warm->lock);
    if (over)
        fr_warm_trim(warm, limit, INT64_MIN);
}

/* Give back what has waited for too long. Returns when that is so for the next piece, or -1 when none is left. */
static inline int64_t fr_warm_attend(struct fr_warm *warm, int64_t now_ns)
{
    int64_t due;
    fr_warm_trim(warm, SIZE_MAX, now_ns - FR_WARM_WAITS_NS);
    pthread_mutex_lock(&warm->lock);
    due = warm->oldest ? warm->oldest->since_ns + FR_WARM_WAITS_NS : -1;
    pthread_mutex_unlock(&warm->lock);
    return due;
}

#endif
