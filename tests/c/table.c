/* Holder words under fire: users take, hand on and drop references, some die, the owner opens, closes and sweeps.
 *
 * Beside the table a shadow count of live handles is kept for each entry, raised after a handle was taken and lowered
 * before it is dropped. The owner must never close an entry whose shadow is above zero, a handle must never outlive its
 * generation, and in the end every entry must have been closed by its flag alone. */
#include "harness.h"

#include "fr_table.h"

#define USERS 3
#define ENTRIES 64u     /* few, so that they are used again at once */
#define HANDLES 24      /* that one user has at most */

struct handle {
    uint32_t index, generation;
};

struct user {
    struct fr_holder holder;
    unsigned peer;
    struct handle handles[HANDLES];
    unsigned count;
    uint32_t wants_to_die; /* 1: asks for its bits to be taken out; the owner answers 0 */
    uint64_t taken, lost, handed, deaths;
};

static struct fr_regions table;
static struct user users[USERS];
static struct fr_holder owner;                 /* the owner's own handles and pins */
static uint64_t shadow[ENTRIES];
static uint64_t hint[ENTRIES];                 /* index and generation that an entry was opened with lately, for late visitors */
/* One message under way for each pair: entry and generation plus one, 0 when acquired. Row USERS is the owner's. Nothing
 * but this word orders sender and receiver, as nothing but the ring's cursor does between processes. */
static uint64_t mail[USERS + 1][USERS];
static uint64_t opened, closed, late;

static uint64_t packed(struct handle h) { return ((uint64_t)h.generation << 32 | h.index) + 1; }
static struct handle unpacked(uint64_t word) { return (struct handle){(uint32_t)(word - 1), (uint32_t)((word - 1) >> 32)}; }

/* This process has one more live handle, and the entry is still the one it was taken for. */
static void note(struct handle h)
{
    fr_add(&shadow[h.index], 1);
    CHECK(fr_load32_acquire(&table.descriptors[h.index].generation) == h.generation);
    CHECK(!(fr_load_acquire(&table.hold[h.index]) & FR_BIT_CLOSED));
}

static void drop(struct fr_holder *holder, struct handle h)
{
    CHECK(fr_load32_acquire(&table.descriptors[h.index].generation) == h.generation);
    fr_add(&shadow[h.index], (uint64_t)-1);
    CHECK(fr_holder_release(holder, h.index) != FR_LOST);
}

static void receive(struct user *me, uint64_t *from)
{
    uint64_t word = fr_load_acquire(from);
    if (!word || me->count == HANDLES)
        return;
    struct handle h = unpacked(word);
    CHECK(fr_holder_acquire(&me->holder, h.index, h.generation) != FR_LOST); /* the sender's pin keeps it open */
    note(h);
    me->handles[me->count++] = h;
    fr_store_release(from, 0);
}

static void die(struct user *me)
{
    /* What it had published has been acquired: its mail is empty. Its private memory goes with it. */
    for (unsigned to = 0; to < USERS; to++)
        while (fr_load_acquire(&mail[me->peer][to]))
            return; /* not now: its receiver has not looked yet */
    for (unsigned i = 0; i < me->count; i++)
        fr_add(&shadow[me->handles[i].index], (uint64_t)-1);
    me->count = 0;
    memset(me->holder.held, 0, ENTRIES * sizeof *me->holder.held);
    me->holder.entries_held = 0;
    me->deaths++;
    fr_store32_release(&me->wants_to_die, 1);
    while (fr_load32_acquire(&me->wants_to_die))
        sched_yield();
}

static void *use(void *argument)
{
    struct user *me = argument;
    uint64_t state = random_seed(me->peer);
    struct handle pins[USERS]; /* what our mail carries */
    uint32_t pinned[USERS] = {0};
    for (int last = 0; !last;) {
        last = over();
        for (unsigned from = 0; from <= USERS; from++)
            if (from != me->peer)
                receive(me, &mail[from][me->peer]);
        for (unsigned to = 0; to < USERS; to++)
            if (pinned[to] && !fr_load_acquire(&mail[me->peer][to])) {
                drop(&me->holder, pins[to]);
                pinned[to] = 0;
            }
        uint64_t what = random_below(&state, 100);
        if (what < 30 && me->count) { /* hand one on, pinned until it has been acquired */
            unsigned to = (unsigned)random_below(&state, USERS);
            struct handle h = me->handles[random_below(&state, me->count)];
            if (to != me->peer && !pinned[to]) {
                CHECK(fr_holder_acquire(&me->holder, h.index, h.generation) == FR_KEPT);
                note(h);
                pins[to] = h;
                pinned[to] = 1;
                fr_store_release(&mail[me->peer][to], packed(h));
                me->handed++;
            }
        } else if (what < 70 && me->count) {
            unsigned which = (unsigned)random_below(&state, me->count);
            struct handle h = me->handles[which];
            me->handles[which] = me->handles[--me->count];
            drop(&me->holder, h);
        } else if (what < 98 && me->count < HANDLES) { /* nobody's pin behind it: it may be too late */
            uint64_t word = fr_load_acquire(&hint[random_below(&state, ENTRIES)]);
            if (word) {
                struct handle h = unpacked(word);
                if (fr_holder_acquire_unpinned(&me->holder, h.index, h.generation) == FR_LOST) {
                    me->lost++;
                } else {
                    note(h);
                    me->handles[me->count++] = h;
                    me->taken++;
                }
            }
        } else if (what == 99 && !random_below(&state, 20)) {
            int pins_left = 0;
            for (unsigned to = 0; to < USERS; to++)
                pins_left |= (int)pinned[to];
            if (!pins_left)
                die(me);
        }
    }
    while (me->count) {
        struct handle h = me->handles[--me->count];
        drop(&me->holder, h);
    }
    /* The mail is emptied by whoever is last: take what comes until the owner says that nothing is under way. */
    for (unsigned to = 0; to < USERS; to++)
        if (pinned[to]) {
            while (fr_load_acquire(&mail[me->peer][to])) {
                for (unsigned from = 0; from <= USERS; from++)
                    if (from != me->peer)
                        receive(me, &mail[from][me->peer]);
                while (me->count) {
                    struct handle h = me->handles[--me->count];
                    drop(&me->holder, h);
                }
                sched_yield();
            }
            drop(&me->holder, pins[to]);
        }
    fr_store32_release(&me->wants_to_die, 2); /* ended; its mail is read by the main thread from now on */
    return NULL;
}

/* As the table does it: the hint before the flags, the flag before the word, the word before the generation. */
static void sweep(int *in_use)
{
    if (!fr_exchange(table.hint, 0))
        return;
    uint64_t bits = fr_exchange(&table.dirty[0], 0);
    for (uint32_t index = 0; index < ENTRIES; index++)
        if (bits >> index & 1 && in_use[index] && fr_table_close(&table, index)) {
            CHECK(fr_load_acquire(&shadow[index]) == 0);
            fr_store32_release(&table.descriptors[index].generation, table.descriptors[index].generation + 1);
            in_use[index] = 0;
            closed++;
        }
}

static void remove_dead(struct user *dead, const int *in_use)
{
    for (uint32_t index = 0; index < ENTRIES; index++) {
        if (fr_load_relaxed(&table.hold[index]) & dead->holder.bit)
            fr_table_clear(&table, index, dead->holder.bit);
        if (in_use[index] && fr_load_acquire(&table.hold[index]) == 0)
            fr_flag_dirty(&table, index);
    }
    fr_store32_release(&dead->wants_to_die, 0);
}

static void open_one(uint32_t index, int *in_use, uint64_t *state)
{
    struct handle h = {index, table.descriptors[index].generation};
    if (in_use[index])
        return;
    if (!fr_table_open(&table, index, FR_BIT_OWNER)) {
        late++; /* a late visitor has its bit in the word; it takes it back */
        return;
    }
    in_use[index] = 1;
    opened++;
    fr_holder_adopt(&owner, index, h.generation);
    note(h);
    fr_store_release(&hint[index], packed(h));
    unsigned to = (unsigned)random_below(state, USERS);
    if (!fr_load_acquire(&mail[USERS][to]) && fr_load32_acquire(&users[to].wants_to_die) != 2) {
        CHECK(fr_holder_acquire(&owner, index, h.generation) == FR_KEPT);
        note(h);
        fr_store_release(&mail[USERS][to], packed(h));
        while (fr_load_acquire(&mail[USERS][to])) { /* pinned until then; the dead are served meanwhile */
            for (unsigned i = 0; i < USERS; i++)
                if (fr_load32_acquire(&users[i].wants_to_die) == 1)
                    remove_dead(&users[i], in_use);
            if (fr_load32_acquire(&users[to].wants_to_die) == 2)
                break;
            sched_yield();
        }
        fr_store_release(&mail[USERS][to], 0); /* void, if the receiver has ended without it */
        drop(&owner, h);
    }
    drop(&owner, h);
}

static void holder_begin(struct fr_holder *h, uint64_t bit)
{
    h->at = table;
    h->bit = bit;
    h->held = calloc(ENTRIES, sizeof *h->held);
    CHECK(h->held && pthread_mutex_init(&h->lock, NULL) == 0);
}

static int all_ended(void)
{
    for (unsigned i = 0; i < USERS; i++)
        if (fr_load32_acquire(&users[i].wants_to_die) != 2)
            return 0;
    return 1;
}

int main(int argc, char **argv)
{
    static int in_use[ENTRIES];
    pthread_t threads[USERS];
    uint64_t state = random_seed(99), taken = 0, lost = 0, handed = 0, deaths = 0;
    begin(argc, argv);
    char *hold = guarded(FR_HOLD_OFFSET + ENTRIES * 8 + ENTRIES / 8);
    table.hint = (uint64_t *)hold;
    table.hold = (uint64_t *)(hold + FR_HOLD_OFFSET);
    table.dirty = table.hold + ENTRIES;
    table.descriptors = guarded(ENTRIES * sizeof *table.descriptors);
    table.capacity = ENTRIES;
    for (unsigned i = 0; i < ENTRIES; i++)
        fr_store_release(&table.hold[i], FR_BIT_CLOSED);
    holder_begin(&owner, FR_BIT_OWNER);
    for (unsigned i = 0; i < USERS; i++) {
        users[i].peer = i;
        holder_begin(&users[i].holder, (uint64_t)1 << (i * 30)); /* bits 0, 30 and 60 */
    }
    for (unsigned i = 0; i < USERS; i++)
        threads[i] = run(use, &users[i]);
    while (!all_ended()) {
        open_one((uint32_t)random_below(&state, ENTRIES), in_use, &state);
        sweep(in_use);
        for (unsigned i = 0; i < USERS; i++)
            if (fr_load32_acquire(&users[i].wants_to_die) == 1)
                remove_dead(&users[i], in_use);
    }
    for (unsigned i = 0; i < USERS; i++) {
        join(threads[i]);
        taken += users[i].taken;
        lost += users[i].lost;
        handed += users[i].handed;
        deaths += users[i].deaths;
        CHECK(users[i].holder.entries_held == 0);
        free(users[i].holder.held);
    }
    CHECK(owner.entries_held == 0);
    free(owner.held);
    sweep(in_use); /* by the flags alone: whoever left zero in a word has raised one */
    for (unsigned i = 0; i < ENTRIES; i++)
        CHECK(!in_use[i] && shadow[i] == 0 && table.hold[i] == FR_BIT_CLOSED);
    CHECK(opened == closed && opened > 0 && taken > 0 && lost > 0 && handed > 0);
    printf("table: %lu opened, %lu taken late, %lu too late, %lu handed on, %lu deaths, %lu visitors met\n", opened, taken, lost,
           handed, deaths, late);
    return 0;
}
