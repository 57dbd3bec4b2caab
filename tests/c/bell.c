/* Several producers, one consumer that sleeps on the bell for ever: no wake-up is lost, no ready bit either. */
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
static struct fr_bell *bell;
static uint64_t sleeps, wakes;

static void send(struct source *s, uint64_t number)
{
    char *room;
    while (!(room = fr_ring_reserve(&s->producer, sizeof number)))
        sched_yield();
    memcpy(room, &number, sizeof number);
    fr_ring_commit(&s->producer, sizeof number);
    fr_add_relaxed(&wakes, (uint64_t)fr_bell_ring(bell, s->peer));
}

static void *produce(void *argument)
{
    struct source *s = argument;
    uint64_t state = random_seed(10 + s->peer);
    while (!over()) {
        for (uint64_t burst = 1 + random_below(&state, 6); burst; burst--)
            send(s, ++s->sent);
        /* Pauses around the length of the consumer's way to sleep: that is where wake-ups get lost. */
        switch (random_below(&state, 4)) {
        case 0: pause_us(random_below(&state, 120)); break;
        case 1: sched_yield(); break;
        default:
            for (uint64_t i = random_below(&state, 400); i; i--)
                fr_pause();
        }
    }
    send(s, 0); /* the end */
    return NULL;
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

static void sleep_without_limit(void)
{
    uint32_t seen = fr_load32_acquire(&bell->leader);
    fr_store32_relaxed(&bell->armed, FR_ARMED_LEADER);
    fr_fence();
    if (!fr_bell_any(bell)) {
        sleeps++;
        fr_futex_wait(&bell->leader, seen, -1);
    }
    fr_cas32(&bell->armed, FR_ARMED_LEADER, FR_ARMED_NOBODY);
}

int main(int argc, char **argv)
{
    pthread_t threads[PRODUCERS];
    int left = PRODUCERS;
    begin(argc, argv);
    bell = guarded(sizeof *bell);
    for (unsigned i = 0; i < PRODUCERS; i++) {
        void *memory = guarded(FR_RING_DATA_OFFSET + SIZE);
        sources[i].peer = i * 63; /* 0, 63, 126: edges of the words */
        fr_producer_open(&sources[i].producer, memory, SIZE);
        fr_consumer_open(&sources[i].consumer, memory, SIZE);
    }
    for (unsigned i = 0; i < PRODUCERS; i++)
        threads[i] = run(produce, &sources[i]);
    while (left) {
        uint64_t bits[FR_READY_WORDS];
        for (unsigned word = 0; word < FR_READY_WORDS; word++)
            bits[word] = fr_bell_take(bell, word);
        for (unsigned i = 0; i < PRODUCERS; i++)
            if (bits[sources[i].peer >> 6] >> (sources[i].peer & 63) & 1) {
                int ended = sources[i].ended;
                drain(&sources[i]);
                left -= sources[i].ended && !ended;
            }
        if (left)
            sleep_without_limit();
    }
    uint64_t total = 0;
    for (unsigned i = 0; i < PRODUCERS; i++) {
        join(threads[i]);
        CHECK(sources[i].received == sources[i].sent);
        total += sources[i].sent;
    }
    CHECK(total > 0 && sleeps > 0 && wakes > 0); /* else nothing has been tried */
    printf("bell: %lu records, %lu sleeps, %lu wake-ups\n", total, sleeps, wakes);
    return 0;
}
