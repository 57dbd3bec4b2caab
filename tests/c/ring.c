/* One ring, one producer thread, one consumer thread: records arrive whole, in order, each once, whatever their sizes. */
#include "harness.h"

#include "fr_ring.h"

#define SIZE 4096u

static struct fr_producer producer;
static struct fr_consumer consumer;
static uint64_t records, full, empty;
static uint32_t finished;

static void *produce(void *unused)
{
    uint64_t state = random_seed(1), acquired = 0, consumed = 0;
    (void)unused;
    for (uint64_t number = 0; !over(); number++) {
        /* Mostly small ones; every size up to the largest, the empty one too. */
        uint64_t bound = random_below(&state, 8) ? 64 : fr_ring_largest(SIZE) + 1, size = random_below(&state, bound);
        unsigned char *room;
        while (!(room = (unsigned char *)fr_ring_reserve(&producer, size))) {
            full++;
            sched_yield();
        }
        for (uint64_t i = 0; i < size; i++)
            room[i] = (unsigned char)(number + i * 7);
        uint64_t position = fr_ring_commit(&producer, size);
        CHECK(position == producer.tail && position % FR_RING_ALIGN == 0);
        uint64_t consumed_now = fr_ring_consumed(&producer), acquired_now = fr_ring_acquired(&producer);
        CHECK(consumed_now >= consumed && acquired_now >= acquired); /* cursors only move forward */
        CHECK(consumed_now <= acquired_now && acquired_now <= position);
        consumed = consumed_now;
        acquired = acquired_now;
        fr_store_relaxed(&records, number + 1);
    }
    fr_store32_release(&finished, 1);
    return NULL;
}

static void *consume(void *unused)
{
    uint64_t state = random_seed(2), number = 0;
    (void)unused;
    for (;;) {
        const unsigned char *payload;
        uint64_t size;
        int last = (int)fr_load32_acquire(&finished), found = fr_ring_peek(&consumer, (const char **)&payload, &size);
        CHECK(found != FR_RING_BROKEN);
        if (found == FR_RING_EMPTY) {
            CHECK(fr_ring_is_empty(&consumer) || !last);
            if (last)
                break;
            empty++;
            sched_yield();
            continue;
        }
        for (uint64_t i = 0; i < size; i++)
            CHECK(payload[i] == (unsigned char)(number + i * 7));
        if (random_below(&state, 2))
            fr_ring_mark_acquired(&consumer);
        if (!random_below(&state, 4)) { /* looking twice shows the same record */
            const char *again;
            uint64_t size_again;
            CHECK(fr_ring_peek(&consumer, &again, &size_again) == FR_RING_RECORD);
            CHECK(again == (const char *)payload && size_again == size);
        }
        fr_ring_pop(&consumer);
        number++;
    }
    CHECK(number == fr_load_relaxed(&records));
    return NULL;
}

int main(int argc, char **argv)
{
    begin(argc, argv);
    void *memory = guarded(FR_RING_DATA_OFFSET + SIZE);
    fr_producer_open(&producer, memory, SIZE);
    fr_consumer_open(&consumer, memory, SIZE);
    pthread_t a = run(produce, NULL), b = run(consume, NULL);
    join(a);
    join(b);
    CHECK(fr_ring_consumed(&producer) == producer.tail && fr_ring_acquired(&producer) == producer.tail);
    CHECK(records > 0);
    printf("ring: %lu records, %lu times full, %lu times empty\n", records, full, empty);
    return 0;
}
