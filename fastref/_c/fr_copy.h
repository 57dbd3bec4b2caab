/* Copies of many megabytes, by two threads: one alone does not get all that the memory can do. */
#ifndef FR_COPY_H
#define FR_COPY_H

#include <string.h>

#include "fr_errand.h"

#ifndef FR_COPY_BY_TWO_FROM /* tests copy less */
#define FR_COPY_BY_TWO_FROM 8388608 /* bytes; for less the second thread comes too late */
#endif

struct fr_copy {
    struct fr_errand errand; /* first, so that one is found by the other */
    char *target;
    const char *source;
    size_t size;
    uint32_t done;
};

static inline void fr_copy_run(struct fr_errand *errand)
{
    struct fr_copy *copy = (struct fr_copy *)errand;
    memcpy(copy->target, copy->source, copy->size);
    fr_store32_release(&copy->done, 1); /* SYNC: the bytes before it. The copy may be gone from here on; */
    fr_futex_wake(&copy->done, 1);      /* somebody else who sleeps at that address looks again */
}

/* As memcpy; the half that the errand thread has not begun when the first is done is copied here as well. */
static inline void fr_copy_bytes(struct fr_errands *errands, char *target, const char *source, size_t size)
{
    size_t first = size / 2 & ~(size_t)4095;
    struct fr_copy rest = {{NULL, fr_copy_run}, target + first, source + first, size - first, 0};
    if (size < FR_COPY_BY_TWO_FROM || !fr_errands_post(errands, &rest.errand)) {
        memcpy(target, source, size);
        return;
    }
    memcpy(target, source, first);
    if (fr_errands_take_back(errands, &rest.errand)) {
        memcpy(rest.target, rest.source, rest.size);
        return;
    }
    while (!fr_load32_acquire(&rest.done))
        fr_futex_wait(&rest.done, 0, -1);
}

#endif
