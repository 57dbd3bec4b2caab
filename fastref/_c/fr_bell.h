/* The doorbell: how producers tell one receiving process that a ring has something, and when to wake it.
 *
 * The receiver owns one bell. `ready` has a bit for each peer. `armed` says who has to be woken by the
 * next message: nobody, the leader (asleep, nothing to do) or the follower (the leader is inside user code). */
#ifndef FR_BELL_H
#define FR_BELL_H

#include "fr_atomic.h"

#define FR_READY_WORDS 4
#define FR_MAX_PEERS (64 * FR_READY_WORDS)

enum { FR_ARMED_NOBODY = 0, FR_ARMED_LEADER = 1, FR_ARMED_FOLLOWER = 2 };

struct fr_bell {                    /* in shared memory */
    uint64_t ready[FR_READY_WORDS];
    char pad0[32];
    uint32_t armed;
    uint32_t unannounced;           /* whom the receiver has still to tell of a file of its arena; not of the bell, but as rare */
    uint32_t leader;                /* futex words, bumped at each wake-up */
    uint32_t follower;              /* a word of its own: one word for both loses wake-ups */
    char pad2[48];
};

/* Wake whoever asked to be woken. The caller has published what there is to see, and fenced. */
static inline int fr_bell_wake(struct fr_bell *b)
{
    if (fr_load32_relaxed(&b->armed) == FR_ARMED_NOBODY)
        return 0;
    uint32_t who = fr_exchange32(&b->armed, FR_ARMED_NOBODY);
    if (who == FR_ARMED_NOBODY || who > FR_ARMED_FOLLOWER)
        return 0;
    uint32_t *word = who == FR_ARMED_LEADER ? &b->leader : &b->follower;
    fr_add32(word, 1); /* SYNC: pairs with the value the sleeper read before it armed */
    fr_futex_wake(word, 1);
    return 1;
}

/* Producer, after publishing its tail. */
static inline int fr_bell_ring(struct fr_bell *b, unsigned peer)
{
    uint64_t *word = &b->ready[peer >> 6], bit = (uint64_t)1 << (peer & 63);
    /* SYNC: tail before ready; pairs with the consumer, who takes ready before it reads tail. */
    fr_fence();
    if (!(fr_load_relaxed(word) & bit))
        fr_or(word, bit);
    /* SYNC: ready before armed; pairs with the consumer's armed before ready. */
    fr_fence();
    return fr_bell_wake(b);
}

/* Receiver, at the death of a peer: it may have been killed anywhere inside fr_bell_ring, after its tail and before
 * its bit, or between taking `armed` and the wake-up. Do the whole of it in its place. */
static inline void fr_bell_ring_for_dead(struct fr_bell *b, unsigned peer)
{
    fr_or(&b->ready[peer >> 6], (uint64_t)1 << (peer & 63));
    fr_exchange32(&b->armed, FR_ARMED_NOBODY);
    fr_add32(&b->leader, 1);
    fr_add32(&b->follower, 1);
    fr_futex_wake(&b->leader, 1);
    fr_futex_wake(&b->follower, 1);
}

/* The receiver's end of the bell. One ring, the favourite, keeps its ready bit set for good: its producer need not set
 * it and the consumer not take it, so the line of `ready` stays in both caches, and a message costs the transfer of
 * its tail and of itself. Whoever looks for work looks at the favourite's tail instead. The bit of a ring that is not
 * the favourite any more is found set, and taken like any other. */
struct fr_listener {                /* private to the process, shared by its threads; written with the drain token */
    struct fr_bell *bell;
    uint64_t kept[FR_READY_WORDS];  /* the favourite's bit */
    const uint64_t *tail;           /* how far the favourite is written (shared) */
    const uint64_t *read;           /* and read (private); both point to `nobody` when there is no favourite */
    uint64_t nobody;
};

static inline void fr_listener_prefer(struct fr_listener *l, int peer, const uint64_t *tail, const uint64_t *read)
{
    for (int i = 0; i < FR_READY_WORDS; i++)
        fr_store_relaxed(&l->kept[i], i == peer >> 6 ? (uint64_t)1 << (peer & 63) : 0);
    /* relaxed: threads without the token may see half of it; they believe it only after an acquire of the token */
    __atomic_store_n(&l->tail, tail, __ATOMIC_RELAXED);
    __atomic_store_n(&l->read, read, __ATOMIC_RELAXED);
}

static inline void fr_listener_prefer_nobody(struct fr_listener *l)
{
    fr_listener_prefer(l, -64, &l->nobody, &l->nobody); /* a peer whose bit lies before the first word */
}

static inline void fr_listener_open(struct fr_listener *l, struct fr_bell *bell)
{
    l->bell = bell;
    l->nobody = 0;
    fr_listener_prefer_nobody(l);
}

/* True when the favourite may have something to read. */
FR_INLINE int fr_listener_favourite(const struct fr_listener *l)
{
    const uint64_t *tail = __atomic_load_n(&l->tail, __ATOMIC_RELAXED), *read = __atomic_load_n(&l->read, __ATOMIC_RELAXED);
    return fr_load_acquire(tail) != fr_load_relaxed(read); /* SYNC: as in fr_ring_peek */
}

/* Consumer: take all ready bits of one word but the favourite's. */
FR_INLINE uint64_t fr_listener_take(struct fr_listener *l, unsigned index)
{
    uint64_t kept = l->kept[index], bits = fr_load_relaxed(&l->bell->ready[index]) & ~kept;
    if (!bits)
        return 0;
    if (kept)
        bits = fr_and(&l->bell->ready[index], kept) & ~kept;
    else
        bits = fr_exchange(&l->bell->ready[index], 0);
    fr_fence(); /* SYNC: ready before tail, as in fr_bell_ring */
    return bits;
}

/* True when some ring may have something to read. */
FR_INLINE int fr_listener_any(const struct fr_listener *l)
{
    uint64_t any = 0;
    for (unsigned i = 0; i < FR_READY_WORDS; i++)
        any |= fr_load_relaxed(&l->bell->ready[i]) & ~fr_load_relaxed(&l->kept[i]);
    return any != 0 || fr_listener_favourite(l);
}

#endif
