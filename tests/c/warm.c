/* Warm memory and errands under fire: threads take pieces of all sizes, fill them, pass some on to each other and give
 * them back, while others have errands run, and now and then the process forks.
 *
 * A piece belongs to one thread at a time, whatever was done with it before; what waits stays under the limit; every
 * errand runs once; what waits too long goes back by itself, the thread ends, and the next errand finds another one. */
#define _GNU_SOURCE
#include "harness.h"

#include <sys/wait.h>

#include "fr_warm.h"

#define THREADS 4u
#define HELD 6u
#define LIMIT (8u << 20)

struct held { char *start; size_t size; uint32_t pattern; };

struct counted { struct fr_errand errand; };

static struct fr_errands errands;
static struct fr_warm warm;
static struct held gift;
static pthread_mutex_t gift_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t posted, in_place, ran, pieces, forked;

static int64_t attend(int64_t now_ns) { return fr_warm_attend(&warm, now_ns); }

static void run_counted(struct fr_errand *errand)
{
    fr_add_relaxed(&ran, 1);
    free(errand);
}

static void post(void)
{
    struct counted *counted = malloc(sizeof *counted);
    CHECK(counted);
    counted->errand.run = run_counted;
    if (fr_errands_post(&errands, &counted->errand)) {
        fr_add_relaxed(&posted, 1);
    } else {
        free(counted);
        fr_add_relaxed(&in_place, 1);
    }
}

/* A word at the start of each page and the last one. */
static void fill(const struct held *held)
{
    for (size_t at = 0; at + 4 <= held->size; at += 4096)
        memcpy(held->start + at, &held->pattern, 4);
    memcpy(held->start + held->size - 4, &held->pattern, 4);
}

static void check(const struct held *held)
{
    for (size_t at = 0; at + 4 <= held->size - 4; at += 4096)
        CHECK(memcmp(held->start + at, &held->pattern, 4) == 0);
    CHECK(memcmp(held->start + held->size - 4, &held->pattern, 4) == 0);
}

static struct held take(uint64_t *seed)
{
    struct held held = {NULL, 8 + random_below(seed, 1u << (10 + random_below(seed, 13))), (uint32_t)random_next(seed)};
    held.start = fr_warm_take(&warm, held.size);
    CHECK(held.start && (uintptr_t)held.start % 64 == 0);
    fill(&held);
    fr_add_relaxed(&pieces, 1);
    return held;
}

static void give(const struct held *held)
{
    check(held);
    fr_warm_give(&warm, held->start, held->size);
}

static void *use(void *argument)
{
    struct held held[HELD];
    unsigned count = 0;
    uint64_t seed = random_seed((uintptr_t)argument + 1);
    while (!over()) {
        unsigned which = count ? (unsigned)random_below(&seed, count) : 0;
        switch (random_below(&seed, 5)) {
        case 0:
        case 1:
            if (count < HELD)
                held[count++] = take(&seed);
            break;
        case 2:
        case 3:
            if (count) {
                give(&held[which]);
                held[which] = held[--count];
            }
            break;
        default:
            if (count) { /* for whichever thread comes next */
                struct held before;
                pthread_mutex_lock(&gift_lock);
                before = gift;
                gift = held[which];
                pthread_mutex_unlock(&gift_lock);
                held[which] = held[--count];
                if (before.start)
                    give(&before);
            }
            post();
        }
        CHECK(warm.limit == LIMIT);
    }
    while (count)
        give(&held[--count]);
    return NULL;
}

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
static void fork_and_use(uint64_t *seed)
{
    struct held mine = take(seed);
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        struct held more = take(seed);
        uint64_t before = fr_load_relaxed(&ran);
        alarm(HANG_S);
        give(&mine);
        give(&more);
        post(); /* a thread of the child's own */
        while (fr_load_relaxed(&ran) == before)
            pause_us(100);
        fr_errands_stop(&errands);
        _exit(0);
    }
    forked++;
    give(&mine);
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#else
static void fork_and_use(uint64_t *seed) { (void)seed, pause_us(100); }
#endif

static void before_fork(void)
{
    fr_errands_before_fork(&errands);
    pthread_mutex_lock(&warm.lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&warm.lock);
    fr_errands_after_fork(&errands);
}

static void in_child(void)
{
    pthread_mutex_init(&warm.lock, NULL);
    fr_errands_begin(&errands);
}

static uint32_t has_thread(void)
{
    uint32_t running;
    pthread_mutex_lock(&errands.lock);
    running = errands.running;
    pthread_mutex_unlock(&errands.lock);
    return running;
}

static size_t kept(void)
{
    size_t bytes;
    pthread_mutex_lock(&warm.lock);
    bytes = warm.kept;
    pthread_mutex_unlock(&warm.lock);
    return bytes;
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    uint64_t seed;
    begin(argc, argv);
    seed = random_seed(0);
    fr_errands_begin(&errands);
    errands.idle = attend;
    pthread_mutex_init(&warm.lock, NULL);
    warm.limit = LIMIT;
    warm.errands = &errands;
    pthread_atfork(before_fork, after_fork, in_child);
    for (uintptr_t i = 0; i < THREADS; i++)
        threads[i] = run(use, (void *)i);
    while (!over())
        fork_and_use(&seed);
    for (unsigned i = 0; i < THREADS; i++)
        join(threads[i]);
    if (gift.start)
        give(&gift);
    CHECK(kept() <= LIMIT && warm.warm && warm.fresh && !in_place);
    while (kept() || has_thread()) /* by itself */
        pause_us(1000);
    CHECK(!warm.newest && !warm.oldest && ran == posted);
    post();
    fr_errands_stop(&errands);
    CHECK(ran == posted && !has_thread());
    post();
    CHECK(in_place == 1);
    void *last = fr_warm_take(&warm, FR_WARM_FROM);
    fr_warm_give(&warm, last, FR_WARM_FROM); /* nobody would look after it any more */
    CHECK(last && !kept());
    printf("warm: %lu pieces, %lu of %lu warm, %lu errands, %lu forks\n", (unsigned long)pieces, (unsigned long)warm.warm,
           (unsigned long)(warm.warm + warm.fresh), (unsigned long)ran, (unsigned long)forked);
    return 0;
}
