/* Response slots: callers that give up, callees that are late; an answer reaches its own call or nobody. */
#include "harness.h"

#include "fr_slot.h"

#define CALLERS 2
#define CALLEES 2
#define SLOTS 4     /* of each caller: few, so that they are used again at once */
#define SPINS 200   /* looks at `done` alone before the caller goes to sleep */
#define WAITING 64  /* requests under way, in no order */

struct request {
    struct fr_slot *slot; /* NULL: a free place */
    uint64_t number;
};

struct caller {
    struct fr_slot *slots;
    uint64_t seed, calls, answers, in_time, too_late, abandoned;
};

static struct request waiting[WAITING];
static pthread_mutex_t waiting_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t numbers; /* call numbers of all callers: never used twice */
static uint64_t claimed, refused, unread;
static uint32_t finished;

static int post(struct fr_slot *slot, uint64_t number, uint64_t *state)
{
    int done = 0;
    pthread_mutex_lock(&waiting_lock);
    for (uint64_t i = random_below(state, WAITING), tries = 0; tries < WAITING && !done; tries++, i = (i + 1) % WAITING)
        if (!waiting[i].slot) {
            waiting[i] = (struct request){slot, number};
            done = 1;
        }
    pthread_mutex_unlock(&waiting_lock);
    return done;
}

static struct request take(uint64_t *state)
{
    struct request found = {NULL, 0};
    pthread_mutex_lock(&waiting_lock);
    for (uint64_t i = random_below(state, WAITING), tries = 0; tries < WAITING && !found.slot; tries++, i = (i + 1) % WAITING)
        if (waiting[i].slot) {
            found = waiting[i];
            waiting[i].slot = NULL;
        }
    pthread_mutex_unlock(&waiting_lock);
    return found;
}

static unsigned char expected(uint64_t number, uint32_t i) { return (unsigned char)(number * 31 + i); }

static void *serve(void *argument)
{
    uint64_t state = random_seed(100 + *(uint64_t *)argument);
    for (;;) {
        int last = (int)fr_load32_acquire(&finished);
        struct request r = take(&state);
        if (!r.slot) {
            if (last)
                return NULL;
            sched_yield();
            continue;
        }
        if (!random_below(&state, 4))
            pause_us(random_below(&state, 200)); /* late: the caller may be gone, its slot may serve another call */
        if (!fr_slot_claim(r.slot, r.number)) {
            fr_add_relaxed(&refused, 1);
            continue;
        }
        fr_add_relaxed(&claimed, 1);
        uint32_t size = (uint32_t)random_below(&state, FR_SLOT_ROOM + 1);
        for (uint32_t i = 0; i < size; i++) {
            r.slot->data[i] = (char)expected(r.number, i);
            if (i == size / 2 && !random_below(&state, 8))
                pause_us(random_below(&state, 100)); /* the caller gives up while its answer is being written */
        }
        r.slot->size = size;
        r.slot->flags = (uint32_t)r.number;
        if (!fr_slot_finish(r.slot, r.number))
            fr_add_relaxed(&unread, 1);
    }
}

/* Wait until the answer is there or the deadline over; 0 deadline: for ever, and asleep without slices. */
static int wait_for(struct fr_slot *s, uint64_t number, int64_t deadline_ns)
{
    for (int i = 0; i < SPINS; i++) {
        if (fr_slot_is_done(s, number))
            return 1;
        fr_pause();
    }
    while (!fr_slot_has_answer(s, number)) {
        int64_t left = deadline_ns ? deadline_ns - fr_now_ns() : -1;
        if (deadline_ns && left <= 0)
            return 0;
        fr_store32_release(&s->sleeping, 1);
        fr_fence();
        if (!fr_slot_has_answer(s, number))
            fr_futex_wait(&s->sleeping, 1, left);
        fr_store32_release(&s->sleeping, 0);
    }
    return 1;
}

static void *call(void *argument)
{
    struct caller *me = argument;
    uint64_t state = random_seed(me->seed), abandoned_number[SLOTS] = {0};
    while (!over()) {
        uint64_t which = random_below(&state, SLOTS);
        struct fr_slot *s = &me->slots[which];
        if (abandoned_number[which]) { /* ours again only once the callee has noticed */
            uint64_t word = fr_load_acquire(&s->state);
            CHECK(fr_slot_number(word) == abandoned_number[which]);
            if (fr_slot_state(word) != FR_SLOT_FREE) {
                CHECK(fr_slot_state(word) == FR_SLOT_ABANDONED);
                sched_yield();
                continue;
            }
            abandoned_number[which] = 0;
        }
        uint64_t number = fr_add(&numbers, 1) + 1;
        fr_slot_begin(s, number);
        while (!post(s, number, &state))
            sched_yield();
        me->calls++;
        int64_t deadline_ns = random_below(&state, 3) ? fr_now_ns() + (int64_t)random_below(&state, 150000) : 0;
        if (!wait_for(s, number, deadline_ns)) {
            int result = fr_slot_give_up(s, number);
            if (result == 1) {
                me->in_time++;
                continue;
            }
            if (result == -1) {
                me->abandoned++;
                abandoned_number[which] = number;
                continue;
            }
            me->too_late++; /* the answer came after all */
        }
        CHECK(s->flags == (uint32_t)number && s->size <= FR_SLOT_ROOM);
        for (uint32_t i = 0; i < s->size; i++)
            CHECK((unsigned char)s->data[i] == expected(number, i));
        memset(s->data, 0xA5, sizeof s->data);
        me->answers++;
        fr_store_release(&s->state, fr_slot_word(number, FR_SLOT_FREE));
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static struct caller callers[CALLERS];
    static uint64_t callee_numbers[CALLEES];
    pthread_t caller_threads[CALLERS], callee_threads[CALLEES];
    struct caller sum = {0};
    begin(argc, argv);
    for (uint64_t i = 0; i < CALLEES; i++) {
        callee_numbers[i] = i;
        callee_threads[i] = run(serve, &callee_numbers[i]);
    }
    for (uint64_t i = 0; i < CALLERS; i++) {
        callers[i].slots = guarded(SLOTS * sizeof(struct fr_slot));
        callers[i].seed = i;
        caller_threads[i] = run(call, &callers[i]);
    }
    for (int i = 0; i < CALLERS; i++)
        join(caller_threads[i]);
    fr_store32_release(&finished, 1);
    for (int i = 0; i < CALLEES; i++)
        join(callee_threads[i]);
    for (int i = 0; i < CALLERS; i++) {
        sum.calls += callers[i].calls;
        sum.answers += callers[i].answers;
        sum.in_time += callers[i].in_time;
        sum.too_late += callers[i].too_late;
        sum.abandoned += callers[i].abandoned;
    }
    /* Each call ends in one way at each end, and the two ends agree on it. */
    CHECK(sum.calls == sum.answers + sum.in_time + sum.abandoned);
    CHECK(sum.calls == claimed + refused);
    CHECK(unread == sum.abandoned && refused == sum.in_time);
    CHECK(sum.answers && sum.in_time && sum.abandoned); /* else nothing has been tried */
    printf("slot: %lu calls, %lu answered (%lu in the last moment), %lu given up, %lu abandoned\n", sum.calls, sum.answers,
           sum.too_late, sum.in_time, sum.abandoned);
    return 0;
}
