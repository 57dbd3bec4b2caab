/* How a thread waits: spin briefly, then sleep, and learn which of the two pays.
 *
 * Spinning pays when the answer comes within tens of microseconds and the spinner really runs meanwhile. After two
 * spins in a row that brought nothing, or one in which a gap in the clock shows that the spinner was preempted, the
 * next 8 waits go straight to sleep (doubling to 128); then one longer spin probes whether times have changed.
 * Whoever knows that the other end ran on this very processor does not spin at all: the two would only keep each other
 * from running. (With another process burning a core, the scheduler often puts both ends on the other one.)
 * There is no yield: it hands a competing process a whole time slice. */
#ifndef FR_WAIT_H
#define FR_WAIT_H

#include "fr_atomic.h"

#define FR_SPIN_NS 50000            /* measured: long enough for an empty call to a peer that sleeps lightly */
#define FR_PROBE_NS 100000
#define FR_BRIEF_NS 2000            /* with the interpreter lock held: giving it up and getting it back costs more */
#define FR_PREEMPTED_NS 20000       /* between two looks at the clock, which are well under a microsecond apart */
#define FR_SLICE_NS 100000000       /* longest sleep on a futex; a lost wake-up would cost this much */

struct fr_waiting {                 /* private to one thread's kind of wait */
    uint32_t failures, skip, penalty, probing;
    uint64_t spun, slept;           /* for snapshots */
};

FR_INLINE int64_t fr_spin_budget(struct fr_waiting *w, int64_t usual_ns, int64_t probe_ns)
{
    if (w->skip) {
        if (--w->skip == 0)
            w->probing = 1;
        return 0;
    }
    return w->probing ? probe_ns : usual_ns;
}

FR_INLINE void fr_spin_won(struct fr_waiting *w)
{
    w->failures = w->penalty = w->probing = 0;
    w->spun++;
}

FR_INLINE void fr_spin_lost(struct fr_waiting *w, int preempted)
{
    if (++w->failures >= 2 || preempted || w->probing) {
        w->penalty = w->penalty ? (w->penalty < 128 ? w->penalty * 2 : 128) : 8;
        w->skip = w->penalty;
        w->failures = w->probing = 0;
    }
}

#define FR_SPIN_UNTIL(w, condition) FR_SPIN_FOR(w, FR_SPIN_NS, FR_PROBE_NS, condition)

/* For a condition that another thread of this process may have to bring about, which takes the interpreter lock: soon
 * given up when it brings nothing. */
#define FR_SPIN_BRIEFLY(w, condition) FR_SPIN_FOR(w, FR_BRIEF_NS, FR_BRIEF_NS, condition)

/* Spin until `condition` is true or the budget is used up; evaluates to whether it became true. */
#define FR_SPIN_FOR(w, usual_ns, probe_ns, condition)                      \
    ({                                                                     \
        int fr_met = 0, fr_preempted = 0;                                  \
        int64_t fr_budget = fr_spin_budget(w, usual_ns, probe_ns);         \
        if (fr_budget) {                                                   \
            int64_t fr_start = fr_now_ns(), fr_last = fr_start, fr_now;    \
            for (;;) {                                                     \
                for (int fr_i = 0; fr_i < 16 && !fr_met; fr_i++) {         \
                    fr_met = (condition);                                  \
                    if (!fr_met)                                           \
                        fr_pause();                                        \
                }                                                          \
                if (fr_met)                                                \
                    break;                                                 \
                fr_now = fr_now_ns();                                      \
                if (fr_now - fr_last > FR_PREEMPTED_NS)                    \
                    fr_preempted = 1;                                      \
                fr_last = fr_now;                                          \
                if (fr_now - fr_start > fr_budget) {                       \
                    fr_met = (condition); /* it may have come true while we were preempted */ \
                    break;                                                 \
                }                                                          \
            }                                                              \
            if (fr_met)                                                    \
                fr_spin_won(w);                                            \
            else                                                           \
                fr_spin_lost(w, fr_preempted);                             \
        } else {                                                           \
            fr_met = (condition);                                          \
        }                                                                  \
        fr_met;                                                            \
    })

#endif
