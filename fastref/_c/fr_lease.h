/* Leases: blocks of a peer's memory that this process reads where they lie, and writes as its own.
 *
 * The peer's memory is mapped copy-on-write. While a lease lasts, this process's bit in the block's table entry keeps
 * the peer from using the block again; what is written meanwhile lands in private pages. At the end exactly those
 * pages are dropped, so that the next lease of the same place shows the peer's bytes again and finds the page tables
 * filled, and then the bit is cleared: in this order.
 *
 * A lease ends wherever its last user lets go: on any thread, with or without the interpreter lock. Nothing here calls
 * Python. Looking through the pages of a large one takes long, so that is an errand: until it is done the lease counts as
 * living, and its bit is set; nobody uses its pages any more, so whatever else may happen to them meanwhile is no matter.
 * Two leases of one place never overlap in one process: whoever reads a block that is leased already copies it.
 *
 * If the process has had no page fault since a large lease began, none of its pages was written, and none is looked at.
 *
 * A page that is written costs a fault and a copy, 20 times what copying it ahead would have cost; a page that is only
 * read costs next to nothing. So the end of a lease tells whether those who get such blocks write, and blocks for the
 * same use, its `site`, are copied from then on, 8 times and then twice as often each time that a probe is written. */
#ifndef FR_LEASE_H
#define FR_LEASE_H

#include <stdlib.h>

#include "fr_errand.h"
#include "fr_pages.h"
#include "fr_table.h"

#define FR_SITES 256u
#define FR_WRITTEN_PART 16 /* a lease of which more than this part was written would have been cheaper as a copy */
#define FR_LONGEST_ABSTENTION 128
#ifndef FR_ERRAND_FROM /* tests have small leases take the long way too */
#define FR_ERRAND_FROM 4194304 /* bytes; smaller leases end in less time than it takes to wake the thread */
#endif

#ifndef FR_COUNT_FROM /* tests count for all */
#define FR_COUNT_FROM 4194304 /* bytes; looking through the pages of smaller leases costs less than counting faults twice */
#endif

struct fr_leases;

struct fr_lease {
    struct fr_errand errand;      /* its end, if it is large; first, so that one is found by the other */
    uint32_t users;               /* tensors, buffers, whoever is decoding */
    uint32_t index;               /* of the block's entry in its owner's table */
    uint32_t site;
    int loose;                    /* its pages were made private by us; under the lock */
    int untouched;                /* no page of it can have been written */
    int64_t faults;               /* of the process, when it began; -1: not counted */
    struct fr_leases *of;         /* NULL: the memory is this process's own, */
    void (*give)(void *, uint64_t); /* for this one to have back */
    char *start;                  /* whole pages */
    size_t size;
    struct fr_lease *next, **link; /* in the list of those that live; under the lock */
};

struct fr_leases {                /* all leases of one peer's memory */
    pthread_mutex_t lock;
    struct fr_holder *holder;
    char *base;                   /* the peer's memory, copy-on-write; NULL: it could not be mapped so */
    size_t size;
    struct fr_lease *living;
    uint64_t live;                /* leases taken and not yet given back */
    uint64_t pages_written;       /* that leases dropped at their end, so far */
    uint64_t stuck;               /* leases whose pages could not be dropped: their blocks are never given back */
    struct {
        uint8_t copies, next;     /* blocks yet to be copied before the next probe; how many after it, if it is written */
    } site[FR_SITES];
    struct fr_lease **leased;     /* per entry of the owner's table: the lease of its block; set under the lock */
    int closed;                   /* no lease is made any more */
    void *keeper;                 /* who has to outlive the leases: kept from the first on, */
    void (*emptied)(void *keeper); /* until the last has ended; any thread, with or without the interpreter lock */
    struct fr_leases *next, **link; /* in the list of all, for fork(); under fr_leases_lock */
    int foreign;                  /* made before this process was forked */
    struct fr_errands *errands;   /* who ends large leases; NULL: nobody but who lets go */
};

/* ---- leases */

/* The end of a lease that has no user and is in no list. */
static inline void fr_lease_end(struct fr_lease *lease)
{
    struct fr_leases *of = lease->of;
    void (*emptied)(void *);
    void *keeper;
    int64_t written;
    written = lease->untouched ? 0 : fr_pages_drop_written(lease->start, lease->size);
    FR_FAILPOINT("lease.cleaned");
    if (written >= 0) {
        __atomic_store_n(&of->leased[lease->index], NULL, __ATOMIC_RELEASE); /* SYNC: the pages before the next lease */
        fr_holder_release(of->holder, lease->index);
    }
    pthread_mutex_lock(&of->lock);
    if (written < 0) {
        of->stuck++;
    } else if (!lease->loose) { /* else nobody knows who wrote its pages */
        of->pages_written += written;
        if (written * FR_WRITTEN_PART > (int64_t)(lease->size / FR_PAGE)) {
            uint8_t next = of->site[lease->site].next;
            of->site[lease->site].copies = next = next ? next : 8;
            of->site[lease->site].next = next < FR_LONGEST_ABSTENTION ? next * 2 : FR_LONGEST_ABSTENTION;
        } else {
            of->site[lease->site].next = 0;
        }
    }
    of->live--;
    keeper = of->live ? NULL : of->keeper;
    emptied = of->emptied;
    pthread_mutex_unlock(&of->lock);
    free(lease);
    if (keeper)
        emptied(keeper); /* `of` may be gone already, or be in use again */
}

static inline void fr_lease_run_errand(struct fr_errand *errand) { fr_lease_end((struct fr_lease *)errand); }

/* If the last lease of a block has no user any more, and only its end is still to be done, have it done: whoever fetches
 * a value again and again would copy it else. */
static inline void fr_lease_await_end(struct fr_leases *of, uint32_t index)
{
    const struct timespec moment = {0, 20000};
    for (int tries = 0; tries < 1000; tries++) {
        struct fr_lease *last;
        int in_use;
        pthread_mutex_lock(&of->lock);
        last = __atomic_load_n(&of->leased[index], __ATOMIC_ACQUIRE); /* SYNC: with its end */
        in_use = last && __atomic_load_n(&last->users, __ATOMIC_RELAXED); /* it is not freed before we let go of the lock */
        pthread_mutex_unlock(&of->lock);
        if (!last || in_use || !of->errands)
            return;
        /* Another lease may be there by now, and have ended too: then that one is ended. */
        if (fr_errands_take_back(of->errands, &last->errand))
            fr_lease_end(last);
        else
            nanosleep(&moment, NULL);
    }
}

/* Lease a block whose sender still pins it. NULL, with *why: 0, this cannot be leased and must be copied; 1, no memory;
 * 2, the entry is not what the sender says. The first lease of `of` sets *first: whoever keeps `of` alive must know. */
static inline struct fr_lease *fr_lease_take(struct fr_leases *of, uint64_t offset, uint64_t size, uint32_t index,
                                             uint32_t generation, uint32_t site, int *why, int *first)
{
    struct fr_lease *lease;
    int closed;
    *why = *first = 0;
    if (!of->base || !of->holder->bit || !size || offset % FR_PAGE || offset > of->size || size > of->size - offset)
        return NULL;
    site = (site ^ site >> 8 ^ site >> 16) % FR_SITES;
    pthread_mutex_lock(&of->lock);
    closed = of->closed || of->site[site].copies;
    if (of->site[site].copies)
        of->site[site].copies--;
    pthread_mutex_unlock(&of->lock);
    if (closed)
        return NULL;
    lease = malloc(sizeof *lease);
    *why = 1;
    if (!lease)
        return NULL;
    lease->users = 1;
    lease->index = index;
    lease->site = site;
    lease->loose = lease->untouched = 0;
    lease->of = of;
    lease->start = of->base + offset;
    lease->size = (size + FR_PAGE - 1) / FR_PAGE * FR_PAGE;
    /* The sender pins the entry; looking whether it is open costs nothing beside the block. */
    *why = 2;
    if (index >= of->holder->at.capacity || fr_holder_acquire_unpinned(of->holder, index, generation) == FR_LOST) {
        free(lease);
        return NULL;
    }
    FR_FAILPOINT("lease.taken");
    fr_lease_await_end(of, index);
    pthread_mutex_lock(&of->lock);
    closed = of->closed || __atomic_load_n(&of->leased[index], __ATOMIC_ACQUIRE); /* SYNC: with its end */
    lease->faults = closed || lease->size < FR_COUNT_FROM ? -1 : fr_page_faults();
    if (!closed) {
        __atomic_store_n(&of->leased[index], lease, __ATOMIC_RELAXED); /* relaxed: under the lock */
        lease->next = of->living;
        lease->link = &of->living;
        if (lease->next)
            lease->next->link = &lease->next;
        of->living = lease;
        of->live++;
        *first = of->live == 1;
    }
    pthread_mutex_unlock(&of->lock);
    if (closed) { /* meanwhile, or the block is leased already */
        fr_holder_release(of->holder, index);
        free(lease);
        *why = 0;
        return NULL;
    }
    return lease;
}

FR_INLINE void fr_lease_share(struct fr_lease *lease)
{
    __atomic_fetch_add(&lease->users, 1, __ATOMIC_RELAXED);
}

/* Memory that came over a network and is nobody else's, used like a leased block: `give` has it back after the last user.
 * NULL without memory. */
static inline struct fr_lease *fr_lease_own(char *start, size_t size, void (*give)(void *, uint64_t))
{
    struct fr_lease *lease = calloc(1, sizeof *lease);
    if (!lease)
        return NULL;
    lease->users = 1;
    lease->start = start;
    lease->size = size;
    lease->give = give;
    return lease;
}

/* One user fewer; the last one ends the lease. */
static inline void fr_lease_drop(struct fr_lease *lease)
{
    struct fr_leases *of = lease->of;
    /* SYNC: what other users wrote happened before the pages are dropped. */
    if (__atomic_sub_fetch(&lease->users, 1, __ATOMIC_ACQ_REL))
        return;
    if (!of) {
        lease->give(lease->start, lease->size);
        free(lease);
        return;
    }
    if (of->foreign) { /* a forked child: the block, the bit and the list are its parent's */
        free(lease);
        return;
    }
    pthread_mutex_lock(&of->lock);
    *lease->link = lease->next;
    if (lease->next)
        lease->next->link = lease->link;
    lease->untouched = lease->faults >= 0 && !lease->loose && lease->faults == fr_page_faults();
    pthread_mutex_unlock(&of->lock);
    lease->errand.run = fr_lease_run_errand;
    if (lease->size < FR_ERRAND_FROM || lease->untouched || !of->errands || !fr_errands_post(of->errands, &lease->errand))
        fr_lease_end(lease);
}

/* All that is leased now lies in private pages afterwards. Under the lock. */
static inline void fr_leases_loosen(struct fr_leases *of)
{
    for (struct fr_lease *lease = of->living; lease; lease = lease->next) {
        fr_pages_make_private(lease->start, lease->size);
        lease->loose = 1;
    }
}

/* From here on all that is leased lies in private pages, whatever becomes of the peer's, and nothing is leased anew. */
static inline void fr_leases_detach(struct fr_leases *of)
{
    pthread_mutex_lock(&of->lock);
    of->closed = 1;
    if (!of->foreign) /* in a forked child the list is its parent's */
        fr_leases_loosen(of);
    pthread_mutex_unlock(&of->lock);
}

/* Whether something in a range is leased now. */
static inline int fr_leases_any(struct fr_leases *of, uint64_t offset, uint64_t size)
{
    int any = 0;
    pthread_mutex_lock(&of->lock);
    for (struct fr_lease *lease = of->living; lease && !any; lease = lease->next)
        any = lease->start < of->base + offset + size && of->base + offset < lease->start + lease->size;
    pthread_mutex_unlock(&of->lock);
    return any;
}

/* Where bytes that belong to somebody's lease lie in the peer's memory, if they are still what the peer wrote: others may
 * read them there as long as our bit is set. 0: they are not leased, or were written here. */
static inline int fr_lease_find(struct fr_leases *of, const char *start, size_t size, uint64_t *offset, uint64_t *bytes,
                                uint32_t *index)
{
    char *first = (char *)((uintptr_t)start & ~(uintptr_t)(FR_PAGE - 1));
    char *end = (char *)(((uintptr_t)start + size + FR_PAGE - 1) & ~(uintptr_t)(FR_PAGE - 1));
    int found = 0;
    if (!of->base || start < of->base || start >= of->base + of->size)
        return 0;
    pthread_mutex_lock(&of->lock);
    for (struct fr_lease *lease = of->closed || of->foreign ? NULL : of->living; lease && !found; lease = lease->next) {
        if (lease->start <= first && end <= lease->start + lease->size && !lease->loose) {
            *offset = (uint64_t)(lease->start - of->base);
            *bytes = lease->size;
            *index = lease->index;
            found = 1;
        }
    }
    pthread_mutex_unlock(&of->lock);
    return found && !fr_pages_any_written(first, (size_t)(end - first));
}

/* ---- all of a process, for fork(): a child's copies must not change when the parent gives a block back */

static pthread_mutex_t fr_leases_lock = PTHREAD_MUTEX_INITIALIZER;
static struct fr_leases *fr_all_leases;

static inline void fr_leases_before_fork(void)
{
    pthread_mutex_lock(&fr_leases_lock);
    for (struct fr_leases *of = fr_all_leases; of; of = of->next) {
        pthread_mutex_lock(&of->lock);
        if (!of->foreign)
            fr_leases_loosen(of);
    }
}

static inline void fr_leases_after_fork(void)
{
    for (struct fr_leases *of = fr_all_leases; of; of = of->next)
        pthread_mutex_unlock(&of->lock);
    pthread_mutex_unlock(&fr_leases_lock);
}

static inline void fr_leases_in_child(void)
{
    int fd = __atomic_exchange_n(&fr_pagemap, -1, __ATOMIC_RELAXED);
    if (fd >= 0)
        close(fd);
    for (struct fr_leases *of = fr_all_leases; of; of = of->next)
        of->foreign = of->closed = 1;
    fr_leases_after_fork();
}

static inline void fr_leases_watch_forks(void)
{
    pthread_atfork(fr_leases_before_fork, fr_leases_after_fork, fr_leases_in_child);
}

/* Returns 0 when there is no memory. */
static inline int fr_leases_begin(struct fr_leases *of, struct fr_holder *holder, char *base, size_t size,
                                  struct fr_errands *errands, void (*emptied)(void *keeper), void *keeper)
{
    memset(of, 0, sizeof *of);
    of->leased = calloc(holder->at.capacity, sizeof *of->leased);
    if (!of->leased)
        return 0;
    pthread_mutex_init(&of->lock, NULL);
    of->holder = holder;
    of->base = base;
    of->size = size;
    of->errands = errands;
    of->emptied = emptied;
    of->keeper = keeper;
    pthread_mutex_lock(&fr_leases_lock);
    of->next = fr_all_leases;
    of->link = &fr_all_leases;
    if (of->next)
        of->next->link = &of->next;
    fr_all_leases = of;
    pthread_mutex_unlock(&fr_leases_lock);
    return 1;
}

/* No lease lives any more. */
static inline void fr_leases_end(struct fr_leases *of)
{
    pthread_mutex_lock(&fr_leases_lock);
    *of->link = of->next;
    if (of->next)
        of->next->link = of->link;
    pthread_mutex_unlock(&fr_leases_lock);
    pthread_mutex_destroy(&of->lock);
    free(of->leased);
}

#endif
