/* Garbage in a ring: whatever the other side writes, nobody reads or writes outside, loops for ever or goes backwards.
 *
 * The ring ends at a page that may not be touched, so that a single byte too far ends the program. */
#include "harness.h"

#include "fr_ring.h"

#define SIZE 1024u
#define BYTES (FR_RING_DATA_OFFSET + SIZE)

static uint64_t rounds, records, broken;
static uint32_t vandal_may_go_on;

static uint64_t odd_number(uint64_t *state)
{
    static const uint64_t edges[] = {0, 1, 15, 16, 17, SIZE - 16, SIZE - 1, SIZE, SIZE + 16, 2 * SIZE, 0x7fffffff, 0x80000000,
                                     0xffffffff, 0x100000000, 0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff};
    switch (random_below(state, 4)) {
    case 0: return edges[random_below(state, sizeof edges / sizeof *edges)];
    case 1: return random_below(state, 2 * SIZE) & ~(uint64_t)15;
    case 2: return random_below(state, 2 * SIZE);
    default: return random_next(state);
    }
}

/* Read until there is no more; every record must lie inside. */
static void drain(struct fr_consumer *c, int touch)
{
    const char *payload;
    uint64_t size, before = c->head, sum = 0;
    for (unsigned steps = 0;; steps++) {
        int found = fr_ring_peek(c, &payload, &size);
        CHECK(found == FR_RING_EMPTY || found == FR_RING_RECORD || found == FR_RING_BROKEN);
        if (found != FR_RING_RECORD) {
            broken += found == FR_RING_BROKEN;
            break;
        }
        CHECK(payload >= c->data && size <= SIZE && payload + size <= c->data + SIZE);
        for (uint64_t i = 0; touch && i < size; i++)
            sum += (unsigned char)payload[i];
        fr_ring_mark_acquired(c);
        fr_ring_pop(c);
        CHECK(c->head > before);
        before = c->head;
        records++;
        CHECK(steps < SIZE / 16 || !touch); /* one tail covers at most one ring; a vandal may go on publishing */
        if (!touch && steps > 4 * SIZE)
            break;
    }
    __asm__ volatile("" : : "r"(sum)); /* the reads are the test */
}

/* Headers that make sense here and there, so that the reader gets further than the first. */
static void scribble(char *memory, uint64_t start, uint64_t *state)
{
    char *data = memory + FR_RING_DATA_OFFSET;
    for (uint64_t at = 0; at < SIZE; at += 16) {
        struct fr_record *record = (struct fr_record *)(data + ((start + at) & (SIZE - 1)));
        uint64_t left = SIZE - ((start + at) & (SIZE - 1));
        uint32_t size = (uint32_t)odd_number(state);
        if (random_below(state, 3) == 0)
            size = (uint32_t)random_below(state, 64);
        if (random_below(state, 6) == 0)
            size = FR_RECORD_PADDING | (uint32_t)(random_below(state, 4) ? left : odd_number(state));
        record->size = size;
        record->check = random_below(state, 10) ? ~size : (uint32_t)random_next(state);
        if (!(size & FR_RECORD_PADDING) && size < 256)
            at += fr_ring_round(size);
    }
}

static void read_garbage(char *memory, uint64_t *state)
{
    struct fr_ring *ring = (struct fr_ring *)memory;
    struct fr_consumer c;
    fr_consumer_open(&c, memory, SIZE);
    c.head = c.tail = (random_below(state, 4) ? random_below(state, 64 * SIZE) : random_next(state)) & ~(uint64_t)15;
    scribble(memory, c.head, state);
    ring->tail = random_below(state, 3) ? c.head + (random_below(state, SIZE + 16) & ~(uint64_t)15) : odd_number(state);
    ring->head = odd_number(state);
    ring->acquired = odd_number(state);
    drain(&c, 1);
}

/* A receiver that lies about its cursors must not make the sender write outside, nor let pins go too early. */
static void write_against_lies(char *memory, uint64_t *state)
{
    struct fr_ring *ring = (struct fr_ring *)memory;
    struct fr_producer p;
    fr_producer_open(&p, memory, SIZE);
    p.tail = p.head = ring->tail = ring->head = random_below(state, 1 << 20) & ~(uint64_t)15;
    for (int i = 0; i < 64; i++) {
        uint64_t size = random_below(state, fr_ring_largest(SIZE) + 1);
        if (random_below(state, 3)) {
            ring->head = random_below(state, 2) ? p.tail - random_below(state, 2 * SIZE) : odd_number(state);
            ring->acquired = odd_number(state);
        }
        char *room = fr_ring_reserve(&p, size);
        if (room) {
            CHECK(room >= p.data && room + size <= p.data + SIZE);
            memset(room, i, size);
            fr_ring_commit(&p, size);
        }
        CHECK(fr_ring_acquired(&p) <= p.tail && fr_ring_consumed(&p) <= p.tail);
    }
}

static void *vandalize(void *argument)
{
    char *memory = argument;
    uint64_t state = random_seed(2);
    while (fr_load32_relaxed(&vandal_may_go_on)) {
        uint32_t *word = (uint32_t *)(memory + FR_RING_DATA_OFFSET + (random_below(&state, SIZE) & ~(uint64_t)15));
        uint32_t size = (uint32_t)(random_below(&state, 2) ? random_below(&state, 64) : odd_number(&state));
        fr_store32_relaxed(word, size);
        fr_store32_relaxed(word + 1, ~size);
        struct fr_ring *ring = (struct fr_ring *)memory;
        uint64_t head = fr_load_relaxed(&ring->head);
        fr_store_release(&ring->tail, random_below(&state, 16) ? head + (random_below(&state, SIZE) & ~(uint64_t)15)
                                                               : odd_number(&state));
    }
    return NULL;
}

int main(int argc, char **argv)
{
    begin(argc, argv);
    char *memory = guarded(BYTES), *shared = guarded(BYTES);
    uint64_t state = random_seed(1);
    fr_store32_relaxed(&vandal_may_go_on, 1);
    pthread_t vandal = run(vandalize, shared);
    struct fr_consumer c;
    fr_consumer_open(&c, shared, SIZE);
    while (!over()) {
        for (int i = 0; i < 100; i++, rounds++) {
            read_garbage(memory, &state);
            write_against_lies(memory, &state);
        }
        /* Memory that changes while it is read. A broken ring is given up for good; here it begins afresh. */
        drain(&c, 0);
        c.tail = c.head;
        c.record = 0;
        c.head = c.tail += 16;
        sched_yield();
    }
    fr_store32_relaxed(&vandal_may_go_on, 0);
    join(vandal);
    CHECK(records > 0 && broken > 0);
    printf("ring_garbage: %lu rounds, %lu records, %lu rings broken\n", rounds, records, broken);
    return 0;
}
