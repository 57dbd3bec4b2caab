/* Leader and followers: which thread of a process reads its rings, and who is woken when a message comes.
 *
 * Whoever holds the drain token is the leader: it alone reads rings. Before it runs user code it passes the token on:
 * undrained bits go back, the bell is armed for a follower, so the next message wakes one and progress never depends
 * on user code. A conversation in which calls come one after the other never pays for a second thread.
 *
 * A woken follower does not rush in: it first watches whether the leader comes back by itself, since on few cores two
 * threads that fight for the interpreter halve the rate of short functions. While a follower watches, nobody arms the
 * bell, so a flood of short calls costs no system call at either end. */
#ifndef FR_SERVE_H
#define FR_SERVE_H

#include "fr_bell.h"
#include "fr_table.h"
#include "fr_wait.h"

#define FR_WATCH_NS 200000          /* how long a leader may be in user code before a follower steps in */
#define FR_WATCH_IDLE 25            /* looks without anything to do before the follower goes back to sleep */

struct fr_serving {                 /* private to the process, shared by its threads */
    struct fr_bell *bell;
    struct fr_listener *listener;   /* of the same bell */
    const uint64_t *hint;           /* of the table: FR_HINT_NOW, values wait to be let go of */
    uint32_t token;                 /* 1: somebody drains */
    uint32_t watcher;               /* 1: a follower is awake and watching */
    uint64_t progress;              /* grows when a leader comes back from user code */
    uint32_t away;                  /* leaders inside user code that are not known to be blocked */
    uint32_t queued;                /* calls that wait for a thread, and one may have it */
    uint32_t errands;               /* something else to do: a sweep, outcomes to settle */
    uint32_t stopping;
    uint32_t partner_cpu;           /* where the last caller that waits for its answer ran, or FR_NO_CPU */
    struct fr_waiting waiting;      /* the leader's habit */
    struct fr_waiting briefly;      /* and with the interpreter lock held */
};

FR_INLINE int fr_serve_take_token(struct fr_serving *s)
{
    return !fr_load32_relaxed(&s->token) && fr_cas32(&s->token, 0, 1);
}

FR_INLINE int fr_serve_has_work(struct fr_serving *s)
{
    return fr_listener_any(s->listener) || fr_load32_relaxed(&s->queued) || fr_load32_relaxed(&s->errands)
           || fr_load_relaxed(s->hint) & FR_HINT_NOW;
}

/* The leader, at the sight of a call: it will arm the bell, whose line the caller has just looked at. */
FR_INLINE void fr_serve_expect(struct fr_serving *s) { __builtin_prefetch(&s->bell->armed, 1); }

/* The leader, before user code: from here on a message wakes a follower. */
static inline void fr_serve_pass_token(struct fr_serving *s)
{
    fr_add32(&s->away, 1);
    fr_store32_release(&s->token, 0);
    fr_fence(); /* SYNC: token before watcher; pairs with the watcher's leave before it looks at the token */
    if (!fr_load32_relaxed(&s->watcher)) {
        /* Not a plain store: whoever has taken the token since may sleep as the leader already. */
        fr_cas32(&s->bell->armed, FR_ARMED_NOBODY, FR_ARMED_FOLLOWER);
        fr_fence(); /* SYNC: armed before ready; pairs with the producer's ready before armed */
        if (fr_serve_has_work(s))
            fr_bell_wake(s->bell);
    }
}

/* The leader, back from user code and before it answers: the next message must find nobody armed. */
static inline int fr_serve_retake_token(struct fr_serving *s)
{
    fr_add32(&s->away, (uint32_t)-1);
    fr_add_relaxed(&s->progress, 1);
    if (!fr_serve_take_token(s))
        return 0;
    fr_cas32(&s->bell->armed, FR_ARMED_FOLLOWER, FR_ARMED_NOBODY);
    return 1;
}

/* A leader in user code blocks inside fastref: it will not be back soon, so nobody need wait for it. */
static inline void fr_serve_block(struct fr_serving *s)
{
    fr_add32(&s->away, (uint32_t)-1);
    if (fr_serve_has_work(s)) {
        fr_add32(&s->bell->follower, 1);
        fr_futex_wake(&s->bell->follower, 1);
    }
}

FR_INLINE void fr_serve_unblock(struct fr_serving *s) { fr_add32(&s->away, 1); }

/* A queued call may run now: wake whoever can take it. */
static inline void fr_serve_kick(struct fr_serving *s)
{
    fr_fence(); /* SYNC: queued before armed; pairs with the sleepers' armed before queued */
    if (!fr_bell_wake(s->bell) && !fr_load32_relaxed(&s->token)) {
        fr_add32(&s->bell->follower, 1);
        fr_futex_wake(&s->bell->follower, 1);
    }
}

/* Everybody must look at `stopping`. */
static inline void fr_serve_stop(struct fr_serving *s)
{
    fr_store32_release(&s->stopping, 1);
    fr_fence();
    fr_add32(&s->bell->leader, 1);
    fr_add32(&s->bell->follower, 1);
    fr_futex_wake(&s->bell->leader, 0x7fffffff);
    fr_futex_wake(&s->bell->follower, 0x7fffffff);
}

/* The leader with nothing to do, still holding the interpreter lock: a conversation goes on within two microseconds. */
static inline int fr_serve_wait_briefly(struct fr_serving *s)
{
    if (fr_load32_relaxed(&s->partner_cpu) == fr_cpu())
        return 0;
    return FR_SPIN_BRIEFLY(&s->briefly, fr_serve_has_work(s) || fr_load32_relaxed(&s->stopping));
}

/* The leader with nothing to do: wait for a message. 1: look at the rings; 0: a slice is over. */
static inline int fr_serve_wait_leader(struct fr_serving *s, int64_t slice_ns)
{
    struct fr_bell *b = s->bell;
    if (fr_load32_relaxed(&s->partner_cpu) != fr_cpu()
        && FR_SPIN_UNTIL(&s->waiting, fr_serve_has_work(s) || fr_load32_relaxed(&s->stopping)))
        return 1;
    s->waiting.slept++;
    uint32_t seen = fr_load32_acquire(&b->leader); /* SYNC: before armed; pairs with the producer's bump */
    fr_store32_relaxed(&b->armed, FR_ARMED_LEADER);
    fr_fence(); /* SYNC: armed before ready; pairs with the producer's ready before armed */
    if (!fr_serve_has_work(s) && !fr_load32_relaxed(&s->stopping))
        fr_futex_wait(&b->leader, seen, slice_ns);
    fr_cas32(&b->armed, FR_ARMED_LEADER, FR_ARMED_NOBODY);
    return fr_serve_has_work(s);
}

/* True when a follower should step in: nobody drains, and nobody is expected back. */
FR_INLINE int fr_serve_deserted(struct fr_serving *s)
{
    return !fr_load32_relaxed(&s->token) && !fr_load32_relaxed(&s->away);
}

/* A thread without the token: sleep until woken, then watch. 1: it holds the token now; 0: a slice is over. */
static inline int fr_serve_follow(struct fr_serving *s, int64_t slice_ns)
{
    struct fr_bell *b = s->bell;
    uint32_t seen = fr_load32_acquire(&b->follower); /* SYNC: before the token; pairs with a waker's bump */
    if (fr_load32_relaxed(&s->stopping))
        return 0;
    if (fr_serve_deserted(s) && fr_serve_take_token(s))
        return 1;
    if (fr_load32_relaxed(&s->token) || fr_load32_relaxed(&b->armed) == FR_ARMED_FOLLOWER || fr_load32_relaxed(&s->watcher)) {
        int error = fr_futex_wait(&b->follower, seen, slice_ns);
        if (error == ETIMEDOUT && (fr_load32_relaxed(&s->token) || !fr_serve_has_work(s)))
            return 0;
    }
    if (!fr_cas32(&s->watcher, 0, 1))
        return 0;
    uint64_t progress = fr_load_relaxed(&s->progress);
    for (int idle = 0; idle < FR_WATCH_IDLE && !fr_load32_relaxed(&s->stopping);) {
        int work = fr_serve_has_work(s), moved = fr_load_relaxed(&s->progress) != progress;
        int stuck = work && !moved && idle && !fr_load32_relaxed(&s->token);
        if ((stuck || fr_serve_deserted(s)) && fr_serve_take_token(s)) {
            fr_store32_release(&s->watcher, 0);
            return 1;
        }
        idle = moved ? 1 : idle + 1;
        progress = fr_load_relaxed(&s->progress);
        seen = fr_load32_acquire(&b->follower);
        if (!fr_serve_deserted(s)) /* SYNC: after `seen`; a leader that blocks bumps the word after it has left */
            fr_futex_wait(&b->follower, seen, FR_WATCH_NS);
    }
    fr_store32_relaxed(&s->watcher, 0);
    fr_fence(); /* SYNC: watcher before token; pairs with the leader's token before watcher */
    if (!fr_load32_relaxed(&s->token)) {
        /* The leader passed the token while we watched, so it did not arm: arm in its place, then look again. */
        fr_cas32(&b->armed, FR_ARMED_NOBODY, FR_ARMED_FOLLOWER);
        fr_fence(); /* SYNC: armed before ready, as in fr_serve_pass_token */
        if (fr_serve_has_work(s) && fr_serve_take_token(s)) {
            fr_cas32(&b->armed, FR_ARMED_FOLLOWER, FR_ARMED_NOBODY);
            return 1;
        }
    }
    return 0;
}

#endif
