/* Response slots: where a callee leaves a small answer for a caller that waits for it.
 *
 * A slot lies in the caller's segment. Its state word holds a 48-bit call number and a state; every change
 * that another process can race with is one compare-and-swap on the whole word, so an answer that comes too
 * late can never reach a later call.
 *
 *   FREE -> PENDING (caller) -> WRITING (callee) -> DONE (callee) -> FREE with the next number (caller)
 *   PENDING -> FREE with the next number   the caller gave up before the callee began to write
 *   WRITING -> ABANDONED (caller gave up) -> FREE with the next number (callee; or the caller, callee dead) */
#ifndef FR_SLOT_H
#define FR_SLOT_H

#include "fr_atomic.h"
#include "fr_failpoint.h"

#define FR_SLOT_ROOM 168

enum { FR_SLOT_FREE = 0, FR_SLOT_PENDING = 1, FR_SLOT_WRITING = 2, FR_SLOT_DONE = 3, FR_SLOT_ABANDONED = 4 };

struct fr_slot {            /* in shared memory, 256 bytes; the first line is the callee's while it writes */
    uint64_t state;         /* call number << 16 | state */
    uint32_t sleeping;      /* futex word: 1 while the caller sleeps on it */
    uint32_t caller_cpu;    /* where the caller ran when it began the call */
    uint32_t pad0[12];
    uint64_t done;          /* number of the call whose answer is complete; here the caller looks while it waits */
    uint32_t size;          /* bytes of the answer */
    uint32_t flags;         /* how to read them; the runtime's business */
    uint32_t callee_cpu;    /* where the callee ran when it finished */
    uint32_t pad1;
    char data[FR_SLOT_ROOM];
};

FR_INLINE uint64_t fr_slot_word(uint64_t number, unsigned state) { return number << 16 | state; }
FR_INLINE uint64_t fr_slot_number(uint64_t word) { return word >> 16; }
FR_INLINE unsigned fr_slot_state(uint64_t word) { return word & 0xffff; }

/* Caller: begin call `number` in a free slot that is privately ours. */
FR_INLINE void fr_slot_begin(struct fr_slot *s, uint64_t number)
{
    fr_store32_relaxed(&s->sleeping, 0);
    fr_store32_relaxed(&s->caller_cpu, fr_cpu());
    fr_store_release(&s->state, fr_slot_word(number, FR_SLOT_PENDING)); /* relaxed would do: the request publishes it */
}

/* Callee: the slot will be claimed soon. On many cores the line comes from another one, while we run the call. */
FR_INLINE void fr_slot_expect(struct fr_slot *s) { __builtin_prefetch(&s->state, 1); }

/* Callee: claim the slot for the answer of call `number`. 0: the caller has given up. */
FR_INLINE int fr_slot_claim(struct fr_slot *s, uint64_t number)
{
    return fr_cas(&s->state, fr_slot_word(number, FR_SLOT_PENDING), fr_slot_word(number, FR_SLOT_WRITING));
}

/* Callee: the answer is written. 0: the caller gave up meanwhile, and the slot has been freed for it. */
static inline int fr_slot_finish(struct fr_slot *s, uint64_t number)
{
    fr_store32_relaxed(&s->callee_cpu, fr_cpu());
    /* SYNC: the answer before DONE; pairs with the caller's compare-and-swap in fr_slot_give_up. */
    if (!fr_cas(&s->state, fr_slot_word(number, FR_SLOT_WRITING), fr_slot_word(number, FR_SLOT_DONE))) {
        fr_cas(&s->state, fr_slot_word(number, FR_SLOT_ABANDONED), fr_slot_word(number, FR_SLOT_FREE));
        return 0;
    }
    fr_store_release(&s->done, number); /* SYNC: the answer before done; pairs with fr_slot_is_done */
    FR_FAILPOINT("slot.written");
    fr_fence(); /* SYNC: done before sleeping; pairs with the caller's sleeping before done */
    if (fr_load32_relaxed(&s->sleeping)) {
        fr_store32_release(&s->sleeping, 0);
        fr_futex_wake(&s->sleeping, 1);
    }
    return 1;
}

/* Caller: the answer of call `number` is there. The word that other processes claim is left alone: a caller that
 * looked at it all the time would take its cache line away from the callee three times in each call. */
FR_INLINE int fr_slot_is_done(const struct fr_slot *s, uint64_t number) { return fr_load_acquire(&s->done) == number; }

/* The same for a caller that is about to sleep: `done` alone may never say so. A callee that was held up before it stored
 * its number, and whose caller gave up and found the answer complete, stores it over that of a later call. */
FR_INLINE int fr_slot_has_answer(const struct fr_slot *s, uint64_t number)
{
    /* SYNC: pairs with fr_slot_finish, the answer before DONE */
    return fr_slot_is_done(s, number) || fr_load_acquire(&s->state) == fr_slot_word(number, FR_SLOT_DONE);
}

/* Caller: give up. 1: the slot is free now. 0: DONE after all. -1: abandoned, the callee will free it. */
static inline int fr_slot_give_up(struct fr_slot *s, uint64_t number)
{
    if (fr_cas(&s->state, fr_slot_word(number, FR_SLOT_PENDING), fr_slot_word(number, FR_SLOT_FREE)))
        return 1;
    if (fr_cas(&s->state, fr_slot_word(number, FR_SLOT_WRITING), fr_slot_word(number, FR_SLOT_ABANDONED)))
        return -1;
    return 0;
}

#endif
