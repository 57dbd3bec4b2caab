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
    uint32_t pad1;
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
    /* SYNC: tail before ready; pairs with the consumer's exchange of ready before it reads tail. */
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

/* Consumer: take all ready bits of one word. */
FR_INLINE uint64_t fr_bell_take(struct fr_bell *b, unsigned index)
{
    if (!fr_load_relaxed(&b->ready[index]))
        return 0;
    uint64_t bits = fr_exchange(&b->ready[index], 0);
    fr_fence(); /* SYNC: ready before tail, as in fr_bell_ring */
    return bits;
}

FR_INLINE int fr_bell_any(const struct fr_bell *b)
{
    uint64_t any = 0;
    for (unsigned i = 0; i < FR_READY_WORDS; i++)
        any |= fr_load_relaxed(&b->ready[i]);
    return any != 0;
}

#endif
