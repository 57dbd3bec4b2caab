/* What every stress program shares: checks that stay on, a watchdog, randomness, and memory as peers would map it.
 *
 * Each program runs for the seconds given as its only argument (1 without), prints one line of figures and exits 0.
 * A check that fails prints where and aborts; a hang is a failure too: the alarm ends the program. */
#ifndef FR_TEST_HARNESS_H
#define FR_TEST_HARNESS_H

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fr_atomic.h"

#define HANG_S 60 /* beyond the time asked for; sanitizers on a busy machine are slow, a lost wake-up is for ever */

#define CHECK(condition)                                                                    \
    do {                                                                                    \
        if (!(condition)) {                                                                 \
            fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #condition);   \
            abort();                                                                        \
        }                                                                                   \
    } while (0)

static int64_t end_ns; /* when producers stop to produce; set before any thread starts */

static inline int over(void) { return fr_now_ns() > end_ns; }

static inline void begin(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 1.0;
    CHECK(seconds > 0);
    end_ns = fr_now_ns() + (int64_t)(seconds * 1e9);
    alarm((unsigned)seconds + HANG_S);
}

/* xorshift64*: one state for each thread. */
static inline uint64_t random_next(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Dull;
}

static inline uint64_t random_below(uint64_t *state, uint64_t bound) { return (random_next(state) >> 11) % bound; }

static inline uint64_t random_seed(uint64_t thread)
{
    const char *given = getenv("FASTREF_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : (uint64_t)fr_now_ns();
    return (seed * 2 + 1) * 0x9E3779B97F4A7C15ull + thread * 0xBF58476D1CE4E5B9ull;
}

static inline void pause_us(uint64_t microseconds)
{
    struct timespec t = {0, (long)microseconds * 1000};
    nanosleep(&t, NULL);
}

/* Shared memory, zeroed, with a page before and behind that may not be touched; it ends at the page behind. */
static inline void *guarded(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    char *start = mmap(NULL, whole + 2 * page, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(start != MAP_FAILED);
    CHECK(mprotect(start + page, whole, PROT_READ | PROT_WRITE) == 0);
    return start + page + whole - bytes;
}

static inline pthread_t run(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, body, argument) == 0);
    return thread;
}

static inline void join(pthread_t thread) { CHECK(pthread_join(thread, NULL) == 0); }

#endif
