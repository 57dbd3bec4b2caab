/* Leader and followers, asleep without slices: every message is handled, in order, though handlers sleep and block.
 *
 * The threads here do what a runtime's serving threads do. A message may make its handler sleep, or block until a later
 * message of the same sender has been handled: that hangs unless progress is independent of handlers. Whoever leads makes
 * another ring the favourite now and then, or none, while the others look for work. */
#include "harness.h"

#include "fr_ring.h"
#include "fr_serve.h"

#define PRODUCERS 3
#define BASE_THREADS 2
#define MOST_THREADS 64
#define SIZE 1024u
#define NO_FAVOURITE (-1)

enum { QUICK, SLEEPS, BLOCKS, RELEASES, KINDS };

struct message {
    uint64_t number;
    uint32_t kind, source;
};

struct source {
    struct fr_producer producer;
    struct fr_consumer consumer;
    uint64_t sent;
    uint64_t drained;   /* by whoever has the token */
    uint32_t released;  /* futex word: handlers of RELEASES so far */
    uint32_t blocked;   /* handlers of BLOCKS so far; only the drainer counts */
};

static struct fr_serving serving;
static struct fr_listener listener;
static struct source sources[PRODUCERS];
static pthread_t threads[MOST_THREADS];
static uint32_t thread_count, parked;
static uint64_t pending[FR_READY_WORDS], changes; /* with the token */
static int favourite = NO_FAVOURITE;
static uint64_t hint, dropped, closed; /* entries of a table that were flagged, a bit for each source, and closed */
static struct fr_regions table = {.hint = &hint, .dirty = &dropped};
static uint64_t handled, steps_in, rounds, kinds[KINDS];
static int64_t half_ns; /* until then a flood from all, then a conversation with one */
static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;

static void *serve(void *unused);

static void start_thread(void)
{
    pthread_mutex_lock(&start_lock);
    CHECK(thread_count < MOST_THREADS);
    fr_add32(&parked, 1);
    threads[thread_count] = run(serve, NULL);
    thread_count++;
    pthread_mutex_unlock(&start_lock);
}

/* Another favourite, or none. With the token; whoever has none may be looking at it. */
static void prefer_somebody(uint64_t *state)
{
    uint64_t choice = random_below(state, 16); /* mostly it stays as it is: a favourite has to be one for a while */
    if (choice > PRODUCERS)
        return;
    favourite = choice < PRODUCERS ? (int)choice : NO_FAVOURITE;
    if (favourite == NO_FAVOURITE)
        fr_listener_prefer_nobody(&listener);
    else
        fr_listener_prefer(&listener, favourite, &sources[favourite].consumer.ring->tail, &sources[favourite].consumer.head);
    changes++;
}

/* The next message and, for one that blocks, which release it waits for. With the token. */
static int next(struct message *message, uint32_t *awaited)
{
    if (fr_load_relaxed(&hint)) {
        fr_exchange(&hint, 0);
        closed += (uint64_t)__builtin_popcountl(fr_exchange(&dropped, 0));
    }
    for (unsigned word = 0; word < FR_READY_WORDS; word++)
        pending[word] |= fr_listener_take(&listener, word);
    if (favourite != NO_FAVOURITE && fr_listener_favourite(&listener))
        pending[0] |= (uint64_t)1 << favourite;
    for (unsigned i = 0; i < PRODUCERS; i++) {
        struct source *s = &sources[i];
        const char *payload;
        uint64_t size;
        if (!(pending[0] >> i & 1))
            continue;
        int found = fr_ring_peek(&s->consumer, &payload, &size);
        CHECK(found != FR_RING_BROKEN);
        if (found == FR_RING_EMPTY) {
            pending[0] &= ~((uint64_t)1 << i);
            continue;
        }
        CHECK(size == sizeof *message);
        memcpy(message, payload, sizeof *message);
        fr_ring_pop(&s->consumer);
        CHECK(message->source == i && message->number == ++s->drained);
        if (message->kind == BLOCKS)
            *awaited = ++s->blocked;
        return 1;
    }
    return 0;
}

/* An empty ring's bit would wake a follower for nothing, and hide a wake-up that was lost. */
static void put_back(void)
{
    for (unsigned i = 0; i < PRODUCERS; i++)
        if (pending[0] >> i & 1 && !fr_ring_is_empty(&sources[i].consumer))
            fr_or(&serving.bell->ready[0], (uint64_t)1 << i);
    memset(pending, 0, sizeof pending);
}

static void handle(const struct message *message, uint32_t awaited, uint64_t *state)
{
    struct source *s = &sources[message->source];
    switch (message->kind) {
    case SLEEPS:
        pause_us(200 + random_below(state, 800)); /* longer than a follower watches */
        break;
    case BLOCKS:
        fr_serve_block(&serving);
        for (uint32_t now; (int32_t)((now = fr_load32_acquire(&s->released)) - awaited) < 0;)
            fr_futex_wait(&s->released, now, -1);
        fr_serve_unblock(&serving);
        break;
    case RELEASES:
        fr_add32(&s->released, 1);
        fr_futex_wake(&s->released, 0x7fffffff);
        break;
    default:
        for (uint64_t i = random_below(state, 200); i; i--)
            fr_pause();
    }
    fr_add_relaxed(&kinds[message->kind], 1);
    fr_add(&handled, 1);
}

/* Drain and handle until nothing is left (1) or another thread has the token (0). */
static int lead(uint64_t *state)
{
    struct message message;
    uint32_t awaited = 0;
    while (next(&message, &awaited)) {
        prefer_somebody(state);
        put_back();
        if (!fr_load32_acquire(&parked))
            start_thread(); /* somebody must be left to drain */
        fr_serve_pass_token(&serving);
        /* As if the caller ran on this processor, or on another. */
        fr_store32_relaxed(&serving.partner_cpu, random_below(state, 2) ? fr_cpu() : FR_NO_CPU);
        handle(&message, awaited, state);
        if (!fr_serve_retake_token(&serving))
            return 0;
    }
    return 1;
}

static void *serve(void *unused)
{
    uint64_t state = random_seed(1000 + fr_add(&steps_in, 1));
    (void)unused;
    while (!fr_load32_acquire(&serving.stopping)) {
        if (!fr_serve_follow(&serving, -1))
            continue;
        fr_add_relaxed(&steps_in, 1);
        fr_add32(&parked, (uint32_t)-1);
        int leading;
        while ((leading = lead(&state)) && !fr_load32_acquire(&serving.stopping))
            if (!fr_serve_wait_briefly(&serving))
                fr_serve_wait_leader(&serving, -1);
        if (leading)
            fr_store32_release(&serving.token, 0);
        fr_add32(&parked, 1);
    }
    return NULL;
}

static void send(struct source *s, uint32_t kind)
{
    struct message message = {++s->sent, kind, (uint32_t)(s - sources)};
    char *room;
    while (!(room = fr_ring_reserve(&s->producer, sizeof message)))
        sched_yield();
    memcpy(room, &message, sizeof message);
    fr_ring_commit(&s->producer, sizeof message);
    fr_bell_ring(serving.bell, message.source);
}

/* The last holder of an entry lets go of it. */
static void drop(struct source *s)
{
    fr_flag_dirty(&table, (uint32_t)(s - sources));
    fr_hurry(&table, serving.bell);
}

/* Pauses around the length of the ways to sleep; now and then long enough for every thread to reach its deepest sleep. */
static void pause_somehow(uint64_t *state)
{
    switch (random_below(state, 4)) {
    case 0: pause_us(random_below(state, 50) ? random_below(state, 150) : 5000 + random_below(state, 5000)); break;
    case 1: sched_yield(); break;
    default:
        for (uint64_t i = random_below(state, 400); i; i--)
            fr_pause();
    }
}

static void *flood(void *argument)
{
    struct source *s = argument;
    uint64_t state = random_seed((uint64_t)(s - sources));
    while (fr_now_ns() < half_ns) {
        switch (random_below(&state, 40)) {
        case 0: send(s, SLEEPS); break;
        case 1:
            send(s, BLOCKS);
            if (random_below(&state, 2))
                pause_us(random_below(&state, 500));
            send(s, RELEASES);
            break;
        case 2: drop(s); break;
        default: send(s, QUICK);
        }
        pause_somehow(&state);
    }
    return NULL;
}

/* One sender alone, who waits for each answer: no other message makes up for a wake-up that was lost. */
static void converse(struct source *s)
{
    uint64_t state = random_seed(77);
    for (uint64_t sent = fr_load_acquire(&handled); !over(); rounds++) {
        unsigned quick = (unsigned)random_below(&state, 3);
        for (unsigned i = 0; i < quick; i++)
            send(s, QUICK);
        send(s, BLOCKS);
        if (random_below(&state, 4))
            pause_somehow(&state);
        send(s, RELEASES);
        sent += quick + 2;
        while (fr_load_acquire(&handled) != sent)
            if (random_below(&state, 2))
                pause_us(1);
        if (!random_below(&state, 4))
            pause_somehow(&state);
        drop(s);
        while (fr_load_acquire(&dropped)) /* no message comes meanwhile */
            if (random_below(&state, 2))
                pause_us(1);
    }
}

int main(int argc, char **argv)
{
    pthread_t producers[PRODUCERS];
    uint64_t sent = 0;
    begin(argc, argv);
    half_ns = fr_now_ns() + (end_ns - fr_now_ns()) / 2;
    serving.bell = guarded(sizeof *serving.bell);
    serving.listener = &listener;
    serving.hint = &hint;
    fr_listener_open(&listener, serving.bell);
    for (int i = 0; i < PRODUCERS; i++) {
        void *memory = guarded(FR_RING_DATA_OFFSET + SIZE);
        fr_producer_open(&sources[i].producer, memory, SIZE);
        fr_consumer_open(&sources[i].consumer, memory, SIZE);
    }
    for (int i = 0; i < BASE_THREADS; i++)
        start_thread();
    for (int i = 0; i < PRODUCERS; i++)
        producers[i] = run(flood, &sources[i]);
    for (int i = 0; i < PRODUCERS; i++) {
        join(producers[i]);
        sent += sources[i].sent;
    }
    /* Nobody rings any more: the last message too, and the last drop, must have woken somebody. */
    while (fr_load_acquire(&handled) != sent || fr_load_acquire(&dropped))
        pause_us(200);
    sent -= sources[0].sent;
    converse(&sources[0]);
    sent += sources[0].sent;
    fr_serve_stop(&serving);
    for (uint32_t i = 0; i < thread_count; i++)
        join(threads[i]);
    CHECK(handled == sent && serving.token == 0 && serving.away == 0);
    for (int kind = 0; kind < KINDS; kind++)
        CHECK(kinds[kind] > 0 && rounds > 0 && changes > 0 && closed > 0); /* else nothing has been tried */
    printf("serve: %lu messages, %lu blocked, %lu rounds alone, %u threads, %lu times another led, %lu changes of the favourite, "
           "closed %lu, "
           "slept %lu, spun %lu, briefly %lu\n",
           handled, kinds[BLOCKS], rounds, thread_count, steps_in, changes, closed, serving.waiting.slept, serving.waiting.spun,
           serving.briefly.spun);
    return 0;
}
