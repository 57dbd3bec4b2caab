/* The reference table: who holds what, as one 64-bit word per entry, and where the value can be read.
 *
 * Three regions in shared memory, all made by the owner of the values:
 *   hold         a word per entry; peers write it. One bit for each peer, one for the owner itself, one for all
 *                holders that go by messages, one that says CLOSED (the entry is free).
 *   dirty        a bit per entry; whoever's AND leaves zero in the word sets it. A hint says "look at the bits".
 *   descriptors  generation, state and the published value; only the owner writes them, peers map them read-only.
 * No count lives in shared memory: counts are private to each process (struct fr_holder), changed together with
 * the process's bit under one private lock. */
#ifndef FR_TABLE_H
#define FR_TABLE_H

#include "fr_atomic.h"
#include "fr_bell.h"
#include "fr_failpoint.h"
#include <pthread.h>

#define FR_TABLE_PEERS 61u                      /* peers that have a bit of their own */
#define FR_BIT_OWNER ((uint64_t)1 << 61)
#define FR_BIT_ABROAD ((uint64_t)1 << 62)
#define FR_BIT_CLOSED ((uint64_t)1 << 63)

#define FR_HOLD_OFFSET 64u                      /* the hint lies in the first line of the region */
#define FR_HINT_ANY ((uint64_t)1)               /* entries are flagged; */
#define FR_HINT_NOW ((uint64_t)2)               /* and somebody wants the owner to close them at once */
#define FR_INLINE_VALUE 88u
#define FR_NO_ENTRY 0xFFFFFFFFu

enum { FR_VALUE_PENDING = 0, FR_VALUE_READY = 1, FR_VALUE_FAILED = 2 };
enum { FR_FORM_ASK = 0, FR_FORM_INLINE = 1, FR_FORM_BLOCK = 2 }; /* ask the owner | bytes here | block in its arena */

struct fr_descriptor {       /* 128 bytes; the owner writes */
    uint32_t generation;
    uint32_t state;          /* FR_VALUE_*, stored last (release) */
    int64_t settled_ns;      /* CLOCK_MONOTONIC, when the value came or failed; before the state */
    uint32_t version;        /* odd while the owner changes what follows, see fr_descriptor_read */
    uint32_t form;           /* FR_FORM_* */
    uint32_t flags;          /* how the value is encoded */
    uint32_t unused;
    uint64_t size;           /* bytes of the encoded value */
    union {
        uint64_t words[FR_INLINE_VALUE / 8]; /* FR_FORM_INLINE */
        struct {
            uint64_t offset; /* FR_FORM_BLOCK: where in the arena, */
            uint32_t index, generation; /* and whose entry has to be held meanwhile; FR_NO_ENTRY: the value's own */
        } block;
    };
};

struct fr_regions {          /* private: where this process mapped one owner's table */
    uint64_t *hint, *hold, *dirty;
    struct fr_descriptor *descriptors; /* writable in the owner only */
    uint32_t capacity;       /* entries; a multiple of 64 */
};

struct fr_held {
    uint32_t count, generation;
};

struct fr_holder {           /* private: what this process holds of one owner's table */
    struct fr_regions at;
    uint64_t bit;            /* 0: this process goes by messages */
    pthread_mutex_t lock;
    struct fr_held *held;    /* per entry */
    uint64_t entries_held;   /* entries with a count above zero; under the lock */
};

enum { FR_LOST = -1, FR_KEPT = 0, FR_FIRST = 1, FR_LAST = 1, FR_LAST_FLAGGED = 2 };

static inline void fr_flag_dirty(struct fr_regions *at, uint32_t index)
{
    FR_FAILPOINT("table.and_before_dirty");
    fr_or(&at->dirty[index >> 6], (uint64_t)1 << (index & 63)); /* SYNC: after the AND; pairs with the owner's take */
    fr_or(at->hint, FR_HINT_ANY);                               /* SYNC: after the bit; the owner clears it first */
}

/* After a release that flagged a value: have the owner let go of it now. Blocks can wait until the owner looks anyway. */
static inline void fr_hurry(struct fr_regions *at, struct fr_bell *bell)
{
    if (!(fr_or(at->hint, FR_HINT_NOW) & FR_HINT_NOW)) /* SYNC: now before armed; pairs with the sleepers' armed before it */
        fr_bell_wake(bell);
}

/* Take one more handle or pin. Somebody else's pin keeps the entry open meanwhile, so the OR cannot come late.
 * Returns FR_FIRST when the process did not hold the entry, FR_KEPT when it did, FR_LOST when it holds a newer one. */
static inline int fr_holder_acquire(struct fr_holder *h, uint32_t index, uint32_t generation)
{
    struct fr_held *held = &h->held[index];
    int result = FR_KEPT;
    pthread_mutex_lock(&h->lock);
    if (held->count) {
        if (held->generation == generation)
            held->count++;
        else
            result = FR_LOST;
    } else {
        if (h->bit)
            fr_or(&h->at.hold[index], h->bit); /* SYNC: before the acquired cursor moves */
        FR_FAILPOINT("table.or_before_count");
        held->count = 1;
        held->generation = generation;
        h->entries_held++;
        result = FR_FIRST;
    }
    pthread_mutex_unlock(&h->lock);
    return result;
}

/* Take one more with nobody known to hold the entry meanwhile: look afterwards whether it is still the one. */
static inline int fr_holder_acquire_unpinned(struct fr_holder *h, uint32_t index, uint32_t generation)
{
    struct fr_held *held = &h->held[index];
    int result = FR_KEPT, flag = 0;
    pthread_mutex_lock(&h->lock);
    if (held->count) {
        if (held->generation == generation)
            held->count++;
        else
            result = FR_LOST;
    } else if (!h->bit) {
        result = FR_LOST; /* without a bit only the owner can say; the message path asks it */
    } else {
        uint64_t before = fr_or(&h->at.hold[index], h->bit); /* SYNC: before the generation is read */
        uint32_t now = fr_load32_acquire(&h->at.descriptors[index].generation);
        if (!(before & FR_BIT_CLOSED) && now == generation) {
            held->count = 1;
            held->generation = generation;
            h->entries_held++;
            result = FR_FIRST;
        } else {
            result = FR_LOST;
            if (!(before & h->bit)) /* a bit that was there is not ours to take: the owner opened a credit with it */
                flag = (fr_and(&h->at.hold[index], ~h->bit) & ~h->bit) == 0;
        }
    }
    pthread_mutex_unlock(&h->lock);
    if (flag)
        fr_flag_dirty(&h->at, index);
    return result;
}

/* The owner opened the entry with this process's bit set: note the first handle. */
static inline void fr_holder_adopt(struct fr_holder *h, uint32_t index, uint32_t generation)
{
    pthread_mutex_lock(&h->lock);
    if (!h->held[index].count)
        h->entries_held++;
    h->held[index].count++;
    h->held[index].generation = generation;
    pthread_mutex_unlock(&h->lock);
}

/* Let one handle or pin go. FR_LAST: it was the process's last (FR_LAST_FLAGGED: and the last of all).
 * FR_LOST: there was none, nothing changed. */
static inline int fr_holder_release(struct fr_holder *h, uint32_t index)
{
    struct fr_held *held = &h->held[index];
    int result = FR_KEPT;
    pthread_mutex_lock(&h->lock);
    if (!held->count) {
        result = FR_LOST;
    } else if (--held->count == 0) {
        h->entries_held--;
        result = FR_LAST;
        if (h->bit && (fr_and(&h->at.hold[index], ~h->bit) & ~h->bit) == 0)
            result = FR_LAST_FLAGGED;
    }
    pthread_mutex_unlock(&h->lock);
    if (result == FR_LAST_FLAGGED)
        fr_flag_dirty(&h->at, index);
    return result;
}

/* ---- what is published: form to block. Only the owner writes it, and may do so again and again: readers have one whole
 * version, or are told to ask. */

struct fr_published {
    uint32_t form, flags;
    uint64_t size;
    union {
        uint64_t words[FR_INLINE_VALUE / 8];
        struct {
            uint64_t offset;
            uint32_t index, generation;
        } block;
    };
};

/* Returns 0 when the owner is at it and does not come to an end: who is not running does not change words. */
static inline int fr_descriptor_read(struct fr_descriptor *d, struct fr_published *seen)
{
    for (int tries = 0; tries < 1000; tries++) {
        uint32_t version = fr_load32_acquire(&d->version); /* SYNC: before the rest; pairs with fr_descriptor_end */
        uint64_t words = 2;
        if (version & 1) {
            fr_pause();
            continue;
        }
        seen->form = fr_load32_relaxed(&d->form);
        seen->flags = fr_load32_relaxed(&d->flags);
        seen->size = fr_load_relaxed(&d->size);
        if (seen->form == FR_FORM_INLINE)
            words = seen->size < FR_INLINE_VALUE ? (seen->size + 7) / 8 : FR_INLINE_VALUE / 8;
        for (uint64_t i = 0; i < words; i++)
            seen->words[i] = fr_load_relaxed(&d->words[i]);
        fr_fence_acquire(); /* SYNC: the rest before the version again; pairs with fr_descriptor_begin */
        if (fr_load32_relaxed(&d->version) == version)
            return 1;
    }
    return 0;
}

FR_INLINE void fr_descriptor_begin(struct fr_descriptor *d)
{
    fr_store32_relaxed(&d->version, d->version + 1);
    fr_fence(); /* SYNC: the odd version before the rest */
}

FR_INLINE void fr_descriptor_end(struct fr_descriptor *d)
{
    FR_FAILPOINT("table.half_published");
    fr_store32_release(&d->version, d->version + 1); /* SYNC: the rest before the even version */
}

/* What is written between the two: `form`, with `size` bytes of `data` or with `block`. One caller at a time. */
static inline void fr_descriptor_write(struct fr_descriptor *d, const struct fr_published *now)
{
    uint64_t words = now->form == FR_FORM_INLINE ? (now->size + 7) / 8 : 2;
    fr_descriptor_begin(d);
    fr_store32_relaxed(&d->form, now->form);
    fr_store32_relaxed(&d->flags, now->flags);
    fr_store_relaxed(&d->size, now->size);
    for (uint64_t i = 0; i < words; i++)
        fr_store_relaxed(&d->words[i], now->words[i]);
    fr_descriptor_end(d);
}

/* ---- the owner's half; one caller at a time, under the owner's table lock */

/* Open a free entry with `holder` set. 0 while a late visitor still has its bit in the word. */
FR_INLINE int fr_table_open(struct fr_regions *at, uint32_t index, uint64_t holder)
{
    return fr_cas(&at->hold[index], FR_BIT_CLOSED, holder);
}

/* Close an entry that nobody holds; from here on whoever comes is too late. 0 when somebody does hold it. */
FR_INLINE int fr_table_close(struct fr_regions *at, uint32_t index)
{
    return fr_cas(&at->hold[index], 0, FR_BIT_CLOSED);
}

/* Take a peer's bit out. Returns 1 when that leaves zero. */
FR_INLINE int fr_table_clear(struct fr_regions *at, uint32_t index, uint64_t bit)
{
    return (fr_and(&at->hold[index], ~bit) & ~bit) == 0;
}

#endif
