/* Holder words under fire: users take, hand on and drop references, some die, the owner opens, closes and sweeps.
 *
 * Beside the table a shadow count of live handles is kept for each entry, raised after a handle was taken and lowered
 * before it is dropped. The owner must never close an entry whose shadow is above zero, a handle must never outlive its
 * generation, and in the end every entry must have been closed by its flag alone. */
#include "harness.h"

#include "fr_table.h"

#define USERS 3
#define ENTRIES 64u     /* few, so that they are used again at once */
#define HANDLES 6       /* that one user has at most */

struct handle {
    uint32_t index, generation;
};

struct user {
    struct fr_holder holder;
    unsigned peer;
    struct handle handles[HANDLES];
    unsigned count;
    uint32_t is_dead; /* until the owner has taken its bit out */
    uint64_t taken, lost, handed, deaths;
};

/* What a sender's mail carries, one for each receiver: held until the receiver has acquired it. */
struct pins {
    struct handle handle[USERS];
    uint32_t held[USERS];
};

static struct fr_regions table;
static struct user users[USERS];
static struct fr_holder owner;                 /* the owner's own handles and pins */
static uint64_t shadow[ENTRIES];
static uint64_t lately[ENTRIES];               /* what each entry was opened as last, for visitors */
/* One message under way for each pair: entry and generation plus one, 0 when acquired. Row USERS is the owner's. Nothing
 * but this word orders sender and receiver, as nothing but the ring's cursor does between processes. */
static uint64_t mail[USERS + 1][USERS];
static uint64_t opened, closed, late;
static uint32_t senders_done;

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

static void receive_all(struct user *me)
{
    for (unsigned from = 0; from <= USERS && me->count < HANDLES; from++) {
        uint64_t word = from == me->peer ? 0 : fr_load_acquire(&mail[from][me->peer]);
        struct handle h = unpacked(word);
        if (!word)
            continue;
        CHECK(fr_holder_acquire(&me->holder, h.index, h.generation) != FR_LOST); /* the sender's pin keeps it open */
        note(h);
        me->handles[me->count++] = h;
        fr_store_release(&mail[from][me->peer], 0);
    }
}

static void drop_all(struct user *me)
{
    while (me->count) {
        struct handle h = me->handles[--me->count];
        drop(&me->holder, h);
    }
}

/* Let pins go that their receivers do not need any more; returns how many are left. */
static unsigned unpin(struct pins *pins, struct fr_holder *holder, const uint64_t *sent)
{
    unsigned left = 0;
    for (unsigned to = 0; to < USERS; to++) {
        if (pins->held[to] && !fr_load_acquire(&sent[to])) {
            drop(holder, pins->handle[to]);
            pins->held[to] = 0;
        }
        left += pins->held[to];
    }
    return left;
}

static void hand_on(struct pins *pins, struct fr_holder *holder, uint64_t *sent, unsigned to, struct handle h)
{
    CHECK(fr_holder_acquire(holder, h.index, h.generation) == FR_KEPT);
    note(h);
    pins->handle[to] = h;
    pins->held[to] = 1;
    fr_store_release(&sent[to], packed(h));
}

/* Nothing that this user published is under way. What it holds goes with its private memory, without a word. */
static void die(struct user *me)
{
    for (unsigned i = 0; i < me->count; i++)
        fr_add(&shadow[me->handles[i].index], (uint64_t)-1);
    me->count = 0;
    memset(me->holder.held, 0, ENTRIES * sizeof *me->holder.held);
    me->holder.entries_held = 0;
    me->deaths++;
    fr_store32_release(&me->is_dead, 1);
    while (fr_load32_acquire(&me->is_dead))
        sched_yield();
}

static void *use(void *argument)
{
    struct user *me = argument;
    struct pins pins = {0};
    uint64_t state = random_seed(me->peer);
    int dying = 0;
    while (!over()) {
        receive_all(me);
        unsigned pinned = unpin(&pins, &me->holder, mail[me->peer]);
        uint64_t what = random_below(&state, 100);
        if (dying && !pinned) {
            die(me);
            dying = 0;
        } else if (what < 25 && me->count && !dying) {
            unsigned to = (unsigned)random_below(&state, USERS);
            if (to != me->peer && !pins.held[to]) {
                hand_on(&pins, &me->holder, mail[me->peer], to, me->handles[random_below(&state, me->count)]);
                me->handed++;
            }
        } else if (what < 75 && me->count) {
            unsigned which = (unsigned)random_below(&state, me->count);
            struct handle h = me->handles[which];
            me->handles[which] = me->handles[--me->count];
            drop(&me->holder, h);
        } else if (what < 99 && me->count < HANDLES) { /* nobody's pin behind it: it may be too late */
            uint64_t word = fr_load_acquire(&lately[random_below(&state, ENTRIES)]);
            struct handle h = unpacked(word);
            if (word && fr_holder_acquire_unpinned(&me->holder, h.index, h.generation) == FR_LOST) {
                me->lost++;
            } else if (word) {
                note(h);
                me->handles[me->count++] = h;
                me->taken++;
            }
        } else if (what == 99 && !random_below(&state, 20)) {
            dying = 1; /* once what it has published is acquired: until then its bits would have to stay */
        }
    }
    /* Nobody sends from now on; take and drop what is still under way, until everybody's mail has been acquired. */
    for (int counted = 0; fr_load32_acquire(&senders_done) != USERS + 1;) {
        receive_all(me);
        drop_all(me);
        if (!unpin(&pins, &me->holder, mail[me->peer]) && !counted) {
            fr_add32(&senders_done, 1);
            counted = 1;
        }
        sched_yield();
    }
    drop_all(me);
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

static void remove_dead(const int *in_use)
{
    for (unsigned i = 0; i < USERS; i++) {
        struct user *dead = &users[i];
        if (!fr_load32_acquire(&dead->is_dead))
            continue;
        for (uint32_t index = 0; index < ENTRIES; index++) {
            if (fr_load_relaxed(&table.hold[index]) & dead->holder.bit)
                fr_table_clear(&table, index, dead->holder.bit);
            if (in_use[index] && fr_load_acquire(&table.hold[index]) == 0)
                fr_flag_dirty(&table, index);
        }
        fr_store32_release(&dead->is_dead, 0);
    }
}

static void open_one(uint32_t index, int *in_use, struct pins *pins, unsigned to)
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
    fr_store_release(&lately[index], packed(h));
    if (!pins->held[to])
        hand_on(pins, &owner, mail[USERS], to, h);
    drop(&owner, h);
}

static void holder_begin(struct fr_holder *h, uint64_t bit)
{
    h->at = table;
    h->bit = bit;
    h->held = calloc(ENTRIES, sizeof *h->held);
    CHECK(h->held && pthread_mutex_init(&h->lock, NULL) == 0);
}

int main(int argc, char **argv)
{
    static int in_use[ENTRIES];
    struct pins pins = {0};
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
    while (!over()) {
        open_one((uint32_t)random_below(&state, ENTRIES), in_use, &pins, (unsigned)random_below(&state, USERS));
        unpin(&pins, &owner, mail[USERS]);
        sweep(in_use);
        remove_dead(in_use);
    }
    while (unpin(&pins, &owner, mail[USERS])) {
        remove_dead(in_use);
        sched_yield();
    }
    fr_add32(&senders_done, 1);
    while (fr_load32_acquire(&senders_done) != USERS + 1) {
        remove_dead(in_use);
        sched_yield();
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
    CHECK(opened == closed && opened > 0 && taken > 0 && lost > 0 && handed > 0 && deaths > 0);
    printf("table: %lu opened, %lu taken without a pin, %lu too late, %lu handed on, %lu deaths, %lu visitors met\n", opened, taken, lost,
           handed, deaths, late);
    return 0;
}
