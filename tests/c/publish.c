/* Published values under fire: one owner shows version after version, in the descriptor or in blocks, and withdraws them.
 *
 * A version is a number from which every byte of it follows, its size and its flags too. Readers, two of which share the
 * private counts of one process, must get one whole version, not older than the last that was shown when they began. A
 * block is overwritten as soon as its entry is closed, so who reads one that is not held for him sees it. */
#include "harness.h"

#include "fr_table.h"

#define PROCESSES 2
#define READERS 3            /* the first two are threads of one process */
#define BLOCKS 6u            /* entries 1 to BLOCKS; the value has entry 0 */
#define BLOCK_WORDS 24
#define CAPACITY 64u
#define MEMORY_WORDS (BLOCKS * BLOCK_WORDS)

struct reader {
    struct fr_holder *holder;
    uint64_t seed, inline_read, blocks_read, too_late, asked;
};

static struct fr_regions table;
static struct fr_holder owner, processes[PROCESSES];
static uint64_t *memory;     /* the arena */
static uint64_t shown;       /* the number of the last version that was shown, or of the last withdrawal */
static uint32_t finished;

static uint64_t word_of(uint64_t number, uint64_t i) { return (number + i) * 0x9E3779B97F4A7C15ull + number; }
static uint64_t words_of(uint64_t number, int in_block) { return 1 + number % (in_block ? BLOCK_WORDS : FR_INLINE_VALUE / 8); }

/* ---- the owner */

static void close_unheld(uint32_t *block_in_use)
{
    if (!fr_exchange(table.hint, 0))
        return;
    uint64_t bits = fr_exchange(&table.dirty[0], 0);
    for (uint32_t index = 1; index <= BLOCKS; index++)
        if (bits >> index & 1 && block_in_use[index] && fr_table_close(&table, index)) {
            fr_store32_release(&table.descriptors[index].generation, table.descriptors[index].generation + 1);
            block_in_use[index] = 0;
            for (uint64_t i = 0; i < BLOCK_WORDS; i++) /* it is lent to somebody else */
                fr_store_relaxed(&memory[(index - 1) * BLOCK_WORDS + i], ~(uint64_t)0);
        }
}

/* Copy a version into a block whose entry the owner holds; 0 when there is none. */
static uint32_t fill_block(uint32_t *block_in_use, uint64_t number, uint64_t words)
{
    for (uint32_t index = 1; index <= BLOCKS; index++) {
        if (block_in_use[index] || !fr_table_open(&table, index, FR_BIT_OWNER))
            continue;
        block_in_use[index] = 1;
        fr_holder_adopt(&owner, index, table.descriptors[index].generation);
        for (uint64_t i = 0; i < words; i++)
            fr_store_relaxed(&memory[(index - 1) * BLOCK_WORDS + i], word_of(number, i));
        return index;
    }
    return 0;
}

static void show(struct fr_published *now, uint64_t number, uint32_t *last, uint32_t next)
{
    fr_descriptor_write(&table.descriptors[0], now);
    fr_store_release(&shown, number);
    if (*last)
        CHECK(fr_holder_release(&owner, *last) != FR_LOST);
    *last = next;
}

static void *publish(void *argument)
{
    uint64_t state = random_seed(7), *counts = argument;
    uint32_t block_in_use[BLOCKS + 1] = {0}, last = 0;
    for (uint64_t number = 1; !over(); number++) {
        struct fr_published now;
        uint32_t index = 0;
        memset(&now, 0, sizeof now);
        close_unheld(block_in_use);
        uint64_t what = random_below(&state, 10);
        if (what < 6) {
            now.form = FR_FORM_BLOCK;
            now.size = words_of(number, 1);
            index = fill_block(block_in_use, number, now.size);
            if (!index)
                continue; /* readers hold them all: the last version stays */
            now.block.offset = (index - 1) * BLOCK_WORDS;
            now.block.index = index;
            now.block.generation = table.descriptors[index].generation;
        } else if (what < 9) {
            now.form = FR_FORM_INLINE;
            now.size = words_of(number, 0) * 8;
            for (uint64_t i = 0; i < now.size / 8; i++)
                now.words[i] = word_of(number, i);
        } else {
            now.form = FR_FORM_ASK;
        }
        now.flags = (uint32_t)number;
        show(&now, number, &last, index);
        counts[now.form]++;
        if (!random_below(&state, 50))
            pause_us(random_below(&state, 100));
    }
    struct fr_published none = {.form = FR_FORM_ASK};
    show(&none, 0, &last, 0);
    fr_store32_release(&finished, 1);
    while (fr_load32_acquire(&finished) != READERS + 1)
        sched_yield();
    close_unheld(block_in_use);
    for (uint32_t index = 1; index <= BLOCKS; index++)
        CHECK(!block_in_use[index] && table.hold[index] == FR_BIT_CLOSED);
    return NULL;
}

/* ---- readers */

static void check_whole(const uint64_t *words, uint64_t count, uint32_t flags, uint64_t least)
{
    uint64_t number = least + (uint32_t)(flags - (uint32_t)least); /* the flags are its lower half */
    CHECK((uint32_t)(flags - (uint32_t)least) < UINT32_MAX / 2);    /* not older than when the read began */
    for (uint64_t i = 0; i < count; i++)
        CHECK(words[i] == word_of(number, i));
}

/* Wait a while between two steps, so that the owner does something there on one processor too. */
static void linger(uint64_t *state)
{
    if (!random_below(state, 20))
        sched_yield();
    else if (!random_below(state, 200))
        pause_us(random_below(state, 50));
}

static void read_block(struct reader *me, const struct fr_published *seen, uint64_t least, uint64_t *state)
{
    uint64_t words[BLOCK_WORDS];
    CHECK(seen->block.index >= 1 && seen->block.index <= BLOCKS && seen->size <= BLOCK_WORDS);
    CHECK(seen->block.offset == (seen->block.index - 1) * BLOCK_WORDS && seen->size == words_of(seen->flags, 1));
    linger(state);
    if (fr_holder_acquire_unpinned(me->holder, seen->block.index, seen->block.generation) == FR_LOST) {
        me->too_late++;
        return;
    }
    for (uint64_t i = 0; i < seen->size; i++) {
        words[i] = fr_load_relaxed(&memory[seen->block.offset + i]);
        if (i == seen->size / 2)
            linger(state);
    }
    CHECK(fr_load32_acquire(&table.descriptors[seen->block.index].generation) == seen->block.generation);
    check_whole(words, seen->size, seen->flags, least);
    CHECK(fr_holder_release(me->holder, seen->block.index) != FR_LOST);
    me->blocks_read++;
}

static void *read_all(void *argument)
{
    struct reader *me = argument;
    uint64_t state = random_seed(me->seed);
    while (!fr_load32_acquire(&finished)) {
        struct fr_published seen;
        uint64_t least = fr_load_acquire(&shown);
        if (!fr_descriptor_read(&table.descriptors[0], &seen) || seen.form == FR_FORM_ASK) {
            me->asked++;
        } else if (seen.form == FR_FORM_INLINE) {
            CHECK(seen.size == words_of(seen.flags, 0) * 8);
            check_whole(seen.words, seen.size / 8, seen.flags, least);
            me->inline_read++;
        } else {
            CHECK(seen.form == FR_FORM_BLOCK);
            read_block(me, &seen, least, &state);
        }
    }
    fr_add32(&finished, 1);
    return NULL;
}

/* An owner that stands still in the middle of a change is not waited for. */
static void stand_still(void)
{
    struct fr_published seen;
    fr_descriptor_begin(&table.descriptors[0]);
    CHECK(!fr_descriptor_read(&table.descriptors[0], &seen));
    fr_descriptor_end(&table.descriptors[0]);
    CHECK(fr_descriptor_read(&table.descriptors[0], &seen));
}

static void holder_begin(struct fr_holder *h, uint64_t bit)
{
    h->at = table;
    h->bit = bit;
    h->held = calloc(CAPACITY, sizeof *h->held);
    CHECK(h->held && pthread_mutex_init(&h->lock, NULL) == 0);
}

int main(int argc, char **argv)
{
    static struct reader readers[READERS];
    uint64_t counts[3] = {0}, inline_read = 0, blocks_read = 0, too_late = 0;
    pthread_t publisher, threads[READERS];
    char *hold = guarded(FR_HOLD_OFFSET + CAPACITY * 8 + CAPACITY / 8);
    table.hint = (uint64_t *)hold;
    table.hold = (uint64_t *)(hold + FR_HOLD_OFFSET);
    table.dirty = table.hold + CAPACITY;
    table.descriptors = guarded(CAPACITY * sizeof *table.descriptors);
    table.capacity = CAPACITY;
    memory = guarded(MEMORY_WORDS * 8);
    for (unsigned i = 0; i < CAPACITY; i++)
        fr_store_release(&table.hold[i], FR_BIT_CLOSED);
    stand_still();
    holder_begin(&owner, FR_BIT_OWNER);
    for (unsigned i = 0; i < PROCESSES; i++)
        holder_begin(&processes[i], (uint64_t)1 << (i * 60));
    begin(argc, argv);
    for (unsigned i = 0; i < READERS; i++) {
        readers[i].holder = &processes[i / 2];
        readers[i].seed = i;
        threads[i] = run(read_all, &readers[i]);
    }
    publisher = run(publish, counts);
    for (unsigned i = 0; i < READERS; i++) {
        join(threads[i]);
        inline_read += readers[i].inline_read;
        blocks_read += readers[i].blocks_read;
        too_late += readers[i].too_late;
    }
    join(publisher);
    CHECK(owner.entries_held == 0);
    free(owner.held);
    for (unsigned i = 0; i < PROCESSES; i++) {
        CHECK(processes[i].entries_held == 0);
        free(processes[i].held);
    }
    CHECK(counts[FR_FORM_ASK] && counts[FR_FORM_INLINE] && counts[FR_FORM_BLOCK] && inline_read && blocks_read && too_late);
    printf("publish: %lu versions in blocks, %lu in the descriptor, %lu withdrawn; %lu and %lu read, %lu too late\n",
           counts[FR_FORM_BLOCK], counts[FR_FORM_INLINE], counts[FR_FORM_ASK], blocks_read, inline_read, too_late);
    return 0;
}
