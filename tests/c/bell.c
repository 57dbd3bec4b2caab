/* Several producers, one consumer that sleeps on the bell for ever: no wake-up is lost, no ready bit either.
 *
 * First all producers flood; then one record comes at a time, and the next only when it has been read, so that no other
 * record makes up for a wake-up that was lost. All the while the consumer makes another ring the favourite, or none. */
#include "harness.h"

#include "fr_bell.h"
#include "fr_ring.h"

#define PRODUCERS 3
#define SIZE 1024u
#define BURST 4 /* records drained from one ring before the next has its turn */

struct source {
    struct fr_producer producer;
    struct fr_consumer consumer;
    unsigned peer;      /* bit in the bell; spread over its words */
    uint64_t sent;      /* written by the producer, read after it has been joined */
    uint64_t received;
    int ended;
};

static struct source sources[PRODUCERS];
static pthread_t producers[PRODUCERS];
static struct fr_bell *bell;
static struct fr_listener listener;
static struct source *favourite;
static uint64_t sleeps, wakes, changes, unannounced, rounds;
static int64_t half_ns; /* until then a flood from all, then a conversation */

static void send(struct source *s, uint64_t number)
{
    char *room;
    while (!(room = fr_ring_reserve(&s->producer, sizeof number)))
        sched_yield();
    memcpy(room, &number, sizeof number);
    fr_ring_commit(&s->producer, sizeof number);
    fr_add_relaxed(&wakes, (uint64_t)fr_bell_ring(bell, s->peer));
}

/* Pauses around the length of the consumer's way to sleep: that is where wake-ups get lost. */
static void pause_somehow(uint64_t *state)
{
    switch (random_below(state, 4)) {
    case 0: pause_us(random_below(state, 120)); break;
    case 1: sched_yield(); break;
    default:
        for (uint64_t i = random_below(state, 400); i; i--)
            fr_pause();
    }
}

static void *flood(void *argument)
{
    struct source *s = argument;
    uint64_t state = random_seed(10 + s->peer);
    while (fr_now_ns() < half_ns) {
        for (uint64_t burst = 1 + random_below(&state, 6); burst; burst--)
            send(s, ++s->sent);
        pause_somehow(&state);
    }
    return NULL;
}

static void *converse(void *unused)
{
    uint64_t state = random_seed(99);
    (void)unused;
    for (unsigned i = 0; i < PRODUCERS; i++)
        join(producers[i]);
    for (; !over(); rounds++) {
        struct source *s = &sources[random_below(&state, PRODUCERS)];
        for (uint64_t run = 1 + random_below(&state, 20); run; run--) {
            send(s, ++s->sent);
            while (fr_ring_consumed(&s->producer) != s->producer.tail)
                if (random_below(&state, 2))
                    sched_yield();
            if (!random_below(&state, 4))
                pause_somehow(&state);
        }
    }
    for (unsigned i = 0; i < PRODUCERS; i++)
        send(&sources[i], 0); /* the end */
    return NULL;
}

static void prefer(struct source *s)
{
    favourite = s;
    if (s)
        fr_listener_prefer(&listener, (int)s->peer, &s->consumer.ring->tail, &s->consumer.head);
    else
        fr_listener_prefer_nobody(&listener);
    changes++;
}

static void prefer_somebody(uint64_t *state)
{
    uint64_t choice = random_below(state, 16); /* mostly it stays as it is: a favourite has to be one for a while */
    if (choice <= PRODUCERS)
        prefer(choice < PRODUCERS ? &sources[choice] : NULL);
}

static void drain(struct source *s)
{
    for (int i = 0; i < BURST; i++) {
        const char *payload;
        uint64_t size, number;
        int found = fr_ring_peek(&s->consumer, &payload, &size);
        CHECK(found != FR_RING_BROKEN);
        if (found == FR_RING_EMPTY)
            return;
        CHECK(size == sizeof number && !s->ended);
        memcpy(&number, payload, sizeof number);
        fr_ring_pop(&s->consumer);
        if (number)
            CHECK(number == ++s->received);
        else
            s->ended = 1;
    }
    if (!fr_ring_is_empty(&s->consumer))
        fr_or(&bell->ready[s->peer >> 6], (uint64_t)1 << (s->peer & 63));
}

/* Returns whether there was something to read already. */
static int sleep_without_limit(void)
{
    uint32_t seen = fr_load32_acquire(&bell->leader);
    fr_store32_relaxed(&bell->armed, FR_ARMED_LEADER);
    fr_fence();
    int any = fr_listener_any(&listener);
    if (!any) {
        sleeps++;
        fr_futex_wait(&bell->leader, seen, -1);
    }
    fr_cas32(&bell->armed, FR_ARMED_LEADER, FR_ARMED_NOBODY);
    return any;
}

static int is_set(const uint64_t *bits, unsigned peer) { return bits[peer >> 6] >> (peer & 63) & 1; }

int main(int argc, char **argv)
{
    pthread_t conversation;
    int left = PRODUCERS, any = 0;
    begin(argc, argv);
    half_ns = fr_now_ns() + (end_ns - fr_now_ns()) / 2;
    bell = guarded(sizeof *bell);
    fr_listener_open(&listener, bell);
    for (unsigned i = 0; i < PRODUCERS; i++) {
        void *memory = guarded(FR_RING_DATA_OFFSET + SIZE);
        sources[i].peer = i * 63; /* 0, 63, 126: edges of the words */
        fr_producer_open(&sources[i].producer, memory, SIZE);
        fr_consumer_open(&sources[i].consumer, memory, SIZE);
    }
    for (unsigned i = 0; i < PRODUCERS; i++)
        producers[i] = run(flood, &sources[i]);
    conversation = run(converse, NULL);
    for (uint64_t state = random_seed(0); left;) {
        uint64_t bits[FR_READY_WORDS];
        int visited = 0;
        for (unsigned word = 0; word < FR_READY_WORDS; word++)
            bits[word] = fr_listener_take(&listener, word);
        for (unsigned i = 0; i < PRODUCERS; i++) {
            struct source *s = &sources[i];
            int told = is_set(bits, s->peer);
            CHECK(!told || s != favourite); /* its bit stays where it is */
            if (!told && !(s == favourite && fr_listener_favourite(&listener)))
                continue;
            unannounced += !told;
            visited = 1;
            int ended = s->ended;
            drain(s);
            left -= s->ended && !ended;
        }
        CHECK(visited || !any); /* work that is seen and not found keeps a leader awake for ever */
        prefer_somebody(&state);
        any = left && sleep_without_limit();
    }
    uint64_t total = 0;
    join(conversation);
    for (unsigned i = 0; i < PRODUCERS; i++) {
        CHECK(sources[i].received == sources[i].sent);
        total += sources[i].sent;
    }
    CHECK(total > 0 && sleeps > 0 && wakes > 0 && rounds > 0 && changes > 0 && unannounced > 0); /* else nothing was tried */
    printf("bell: %lu records, %lu sleeps, %lu wake-ups, %lu rounds alone, %lu changes of the favourite, %lu visits to it\n",
           total, sleeps, wakes, rounds, changes, unannounced);
    return 0;
}
