/* Leases under fire: an owner fills blocks, hands them to borrowers and uses them again when their entries are closed;
 * borrowers lease, check every page, write some, share the lease among threads and let go in any order.
 *
 * A borrower must see the bytes that were sent and its own, until it lets go, whatever the owner has filled meanwhile;
 * the next lease of the same place must show nothing of what was written under the one before. Of the two processes one
 * ends its leases in place, the other by errands. Now and then the process
 * forks, and the child must see its leases unchanged while the parent goes on. In the end those who still hold leases
 * cut themselves off, the owner overwrites everything, and nothing may have changed for them. */
#define _GNU_SOURCE
#include "harness.h"

#include <sys/wait.h>

#define FR_ERRAND_FROM 1 /* every lease of a process that has errands */
#define FR_COUNT_FROM 1
#include "fr_lease.h"

#define BLOCKS 12u
#define PAGES 5u
#define BLOCK (PAGES * FR_PAGE)
#define ENTRIES 64u
#define BORROWERS 4u   /* two processes of two threads each */
#define KEPT 4u        /* leases that one thread has at most */

struct offer { uint64_t offset; uint32_t index, generation, pattern; };

struct held {
    struct fr_lease *lease;
    uint32_t pattern;
    uint32_t written;  /* a bit for each page that carries its complement instead */
};

struct borrower {
    unsigned number;
    struct offer offer;
    uint32_t offered;  /* 1 while an offer waits; the owner's pin lasts as long */
    uint32_t over;
    struct held held[KEPT];
    unsigned count;
    uint64_t leased, copied, wrote, handed_on;
};

static struct fr_regions table;
static struct fr_holder owner, holders[2];
static struct fr_leases leases[2];
static struct fr_errands errands;
static struct borrower borrowers[BORROWERS];
static char *shared;                       /* the owner's mapping */
static struct fr_lease *gift[2];           /* a lease that threads of one process pass on to each other */
static uint32_t gift_pattern[2];
static pthread_mutex_t gift_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t firsts, emptied; /* each first lease is followed by one call that the last has ended */
static uint64_t forked;

static void count_empty(void *keeper)
{
    CHECK(keeper == leases);
    fr_add_relaxed(&emptied, 1);
}

static uint32_t *word_of(char *start, unsigned page, unsigned which)
{
    return (uint32_t *)(start + page * FR_PAGE) + (which ? FR_PAGE / 4 - 1 : 0);
}

static void check(const struct held *held)
{
    for (unsigned page = 0; page < PAGES; page++)
        for (unsigned which = 0; which < 2; which++) {
            uint32_t wanted = held->written >> page & 1 ? ~held->pattern : held->pattern;
            CHECK(__atomic_load_n(word_of(held->lease->start, page, which), __ATOMIC_RELAXED) == wanted);
        }
}

static void write_page(struct borrower *me, struct held *held, unsigned page)
{
    for (unsigned which = 0; which < 2; which++)
        __atomic_store_n(word_of(held->lease->start, page, which), ~held->pattern, __ATOMIC_RELAXED);
    held->written |= 1u << page;
    me->wrote++;
}

static void let_go(struct borrower *me, unsigned which)
{
    struct held held = me->held[which];
    check(&held);
    me->held[which] = me->held[--me->count];
    fr_lease_drop(held.lease);
}

/* Leave a lease to another thread of this process, which checks it once more and lets go of it. */
static void pass_on(struct borrower *me, struct held *held)
{
    unsigned process = me->number % 2;
    struct fr_lease *before;
    uint32_t pattern;
    if (held->written)
        return;
    fr_lease_share(held->lease);
    pthread_mutex_lock(&gift_lock);
    before = gift[process];
    pattern = gift_pattern[process];
    gift[process] = held->lease;
    gift_pattern[process] = held->pattern;
    pthread_mutex_unlock(&gift_lock);
    if (before) {
        (void)pattern; /* its other user may have written meanwhile */
        fr_lease_drop(before);
    }
}

/* What was not written here may be read where it lies, by a third process, as long as the entry is held. */
static void hand_on(struct borrower *me, struct held *held, unsigned page)
{
    struct fr_lease *lease = held->lease;
    struct fr_leases *of = lease->of;
    uint64_t offset, bytes;
    uint32_t index;
    if (!fr_lease_find(of, lease->start + page * FR_PAGE + 5, FR_PAGE - 5, &offset, &bytes, &index))
        return;
    CHECK(!(held->written >> page & 1));
    CHECK(lease->start == of->base + offset && bytes == lease->size && index == lease->index);
    CHECK(fr_holder_acquire(of->holder, index, of->holder->held[index].generation) == FR_KEPT);
    CHECK(*word_of(shared + offset, page, 0) == held->pattern);
    CHECK(fr_holder_release(of->holder, index) == FR_KEPT);
    me->handed_on++;
}

static void *borrow(void *argument)
{
    struct borrower *me = argument;
    struct fr_leases *of = &leases[me->number % 2];
    uint64_t seed = random_seed(me->number + 1);
    while (!fr_load32_acquire(&me->over)) {
        if (fr_load32_acquire(&me->offered) && me->count < KEPT) {
            struct offer offer = me->offer;
            int why, first;
            struct fr_lease *lease = fr_lease_take(of, offer.offset, BLOCK - random_below(&seed, FR_PAGE), offer.index,
                                                   offer.generation, (uint32_t)random_below(&seed, FR_SITES), &why, &first);
            if (lease) {
                fr_add_relaxed(&firsts, first);
                me->held[me->count++] = (struct held){lease, offer.pattern, 0};
                me->leased++;
            } else { /* it is told to copy */
                CHECK(why == 0);
                CHECK(*word_of(shared + offer.offset, 1, 0) == offer.pattern);
                me->copied++;
            }
            fr_store32_release(&me->offered, 0);
            if (lease)
                check(&me->held[me->count - 1]);
        }
        if (me->count) {
            unsigned which = (unsigned)random_below(&seed, me->count);
            switch (random_below(&seed, 9)) {
            case 0:
                if (random_below(&seed, 4) == 0)
                    write_page(me, &me->held[which], (unsigned)random_below(&seed, PAGES));
                break;
            case 1:
                if (random_below(&seed, 20) == 0)
                    for (unsigned page = 0; page < PAGES; page++)
                        write_page(me, &me->held[which], page);
                break;
            case 2:
                pass_on(me, &me->held[which]);
                break;
            case 5:
                hand_on(me, &me->held[which], (unsigned)random_below(&seed, PAGES));
                break;
            case 3:
            case 4:
                let_go(me, which);
                break;
            default:
                check(&me->held[which]);
            }
        }
        sched_yield();
    }
    return NULL;
}

static void before_fork(void) { fr_errands_before_fork(&errands); }
static void after_fork(void) { fr_errands_after_fork(&errands); }
static void in_child(void) { fr_errands_begin(&errands); }

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
/* A child looks at what it inherited while the parent goes on. The leases are those of this thread's own. */
static void fork_and_look(struct held *held, unsigned count)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        for (unsigned i = 0; i < 50; i++) {
            for (unsigned j = 0; j < count; j++)
                check(&held[j]);
            pause_us(200);
        }
        for (unsigned j = 0; j < count; j++)
            fr_lease_drop(held[j].lease); /* touches nothing of the parent's */
        _exit(0);
    }
    forked++;
    for (unsigned j = 0; j < count; j++) {
        check(&held[j]);
        fr_lease_drop(held[j].lease);
    }
}

static void look_after(pid_t child, int wait)
{
    int status;
    pid_t ended;
    while ((ended = waitpid(child, &status, wait ? 0 : WNOHANG)) > 0)
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#else
static void look_after(pid_t child, int wait) { (void)child, (void)wait; }
#endif

/* Open a free entry with the owner's bit set; ENTRIES when none was found. */
static uint32_t open_entry(uint64_t *seed)
{
    for (uint32_t tries = 0; tries < ENTRIES; tries++) {
        uint32_t index = (uint32_t)random_below(seed, ENTRIES);
        if (fr_table_open(&table, index, FR_BIT_OWNER)) {
            fr_holder_adopt(&owner, index, table.descriptors[index].generation);
            return index;
        }
    }
    return ENTRIES;
}

static void fill(unsigned block, uint32_t pattern)
{
    for (unsigned page = 0; page < PAGES; page++)
        for (unsigned which = 0; which < 2; which++)
            __atomic_store_n(word_of(shared + block * BLOCK, page, which), pattern, __ATOMIC_RELAXED);
}

/* Send a block to the first process and lease it on this thread. */
static struct held lease_here(unsigned block, uint32_t index, uint32_t pattern, int write)
{
    struct held held = {NULL, pattern, 0};
    int why, first;
    fill(block, pattern);
    while (!held.lease) { /* it may be told to copy, a number of times */
        held.lease = fr_lease_take(&leases[0], block * BLOCK, BLOCK, index, table.descriptors[index].generation, 7, &why,
                                   &first);
        CHECK(held.lease || why == 0);
        fr_add_relaxed(&firsts, held.lease && first);
    }
    CHECK(fr_holder_release(&owner, index) != FR_LOST);
    if (write) {
        *word_of(held.lease->start, 2, 0) = *word_of(held.lease->start, 2, 1) = ~pattern;
        held.written = 1u << 2;
    }
    return held;
}

int main(int argc, char **argv)
{
    char *hold = guarded(FR_HOLD_OFFSET + ENTRIES * 8 + ENTRIES / 8);
    struct fr_descriptor *descriptors = guarded(ENTRIES * sizeof *descriptors);
    int fd = memfd_create("blocks", MFD_CLOEXEC);
    uint32_t phase[BLOCKS] = {0}; /* 0 free, else index + 1 of its entry */
    uint32_t pinned[BLOCKS] = {0}, taker[BLOCKS] = {0};
    uint32_t next_pattern = 1;
    uint64_t seed, sent = 0, stuck = 0;
    pthread_t threads[BORROWERS];
    begin(argc, argv);
    seed = random_seed(0);
    CHECK(fd >= 0 && ftruncate(fd, BLOCKS * BLOCK) == 0);
    shared = mmap(NULL, BLOCKS * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(shared != MAP_FAILED);
    fr_errands_begin(&errands);
    pthread_atfork(before_fork, after_fork, in_child);
    fr_leases_watch_forks();
    table = (struct fr_regions){(uint64_t *)hold, (uint64_t *)(hold + FR_HOLD_OFFSET),
                                (uint64_t *)(hold + FR_HOLD_OFFSET + ENTRIES * 8), descriptors, ENTRIES};
    for (unsigned i = 0; i < ENTRIES; i++)
        table.hold[i] = FR_BIT_CLOSED;
    struct fr_holder *all[3] = {&owner, &holders[0], &holders[1]};
    for (unsigned i = 0; i < 3; i++) {
        all[i]->at = table;
        all[i]->bit = i ? (uint64_t)1 << (i - 1) : FR_BIT_OWNER;
        all[i]->held = calloc(ENTRIES, sizeof(struct fr_held));
        pthread_mutex_init(&all[i]->lock, NULL);
    }
    for (unsigned i = 0; i < 2; i++) {
        char *private = mmap(NULL, BLOCKS * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
        CHECK(private != MAP_FAILED);
        fr_leases_begin(&leases[i], &holders[i], private, BLOCKS * BLOCK, i ? NULL : &errands,
                        count_empty, leases);
    }
    for (unsigned i = 0; i < BORROWERS; i++) {
        borrowers[i].number = i;
        threads[i] = run(borrow, &borrowers[i]);
    }
    while (!over()) {
        for (unsigned b = 0; b < BLOCKS; b++) {
            uint32_t index = phase[b] - 1;
            if (!phase[b]) {
                struct borrower *to = &borrowers[random_below(&seed, BORROWERS)];
                uint32_t found = fr_load32_acquire(&to->offered) ? ENTRIES : open_entry(&seed);
                if (found == ENTRIES)
                    continue;
                fill(b, next_pattern);
                to->offer = (struct offer){b * BLOCK, found, descriptors[found].generation, next_pattern++};
                phase[b] = found + 1;
                pinned[b] = 1;
                taker[b] = to->number;
                fr_store32_release(&to->offered, 1);
                sent++;
            } else if (pinned[b]) {
                if (!fr_load32_acquire(&borrowers[taker[b]].offered)) {
                    CHECK(fr_holder_release(&owner, index) != FR_LOST);
                    pinned[b] = 0;
                }
            } else if (fr_table_close(&table, index)) { /* nobody leases it: it may be filled again */
                __atomic_store_n(&descriptors[index].generation, descriptors[index].generation + 1, __ATOMIC_RELEASE);
                phase[b] = 0;
            }
        }
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
        unsigned b = (unsigned)random_below(&seed, BLOCKS);
        uint32_t index = phase[b] || random_below(&seed, 300) ? ENTRIES : open_entry(&seed);
        if (index != ENTRIES) { /* a block that this thread sends to itself, for a child to look at */
            struct held held = lease_here(b, index, next_pattern++, random_below(&seed, 2));
            phase[b] = index + 1;
            fork_and_look(&held, 1);
        }
#endif
        look_after(-1, 0);
        sched_yield();
    }
    for (unsigned i = 0; i < BORROWERS; i++)
        fr_store32_release(&borrowers[i].over, 1);
    for (unsigned i = 0; i < BORROWERS; i++)
        join(threads[i]);
    struct held mine = {NULL, 0, 0};
    for (unsigned b = 0; b < BLOCKS && !mine.lease; b++) {
        uint32_t index = phase[b] && (pinned[b] || !fr_table_close(&table, phase[b] - 1)) ? ENTRIES : open_entry(&seed);
        if (index != ENTRIES)
            mine = lease_here(b, index, next_pattern++, 1);
    }
    for (unsigned i = 0; i < 2; i++)
        fr_leases_detach(&leases[i]);
    for (unsigned b = 0; b < BLOCKS; b++)
        fill(b, 0);
    if (mine.lease) {
        check(&mine);
        fr_lease_drop(mine.lease);
    }
    for (unsigned i = 0; i < BORROWERS; i++)
        while (borrowers[i].count)
            let_go(&borrowers[i], 0);
    for (unsigned i = 0; i < 2; i++) {
        if (gift[i])
            fr_lease_drop(gift[i]);
        if (i == 0)
            fr_errands_stop(&errands);
        CHECK(!leases[i].live && !leases[i].living && !holders[i].entries_held);
        stuck += leases[i].stuck;
        fr_leases_end(&leases[i]);
    }
    look_after(-1, 1);
    CHECK(!stuck && emptied == firsts && emptied >= 2);
    uint64_t leased = 0, copied = 0, wrote = 0, handed_on = 0;
    for (unsigned i = 0; i < BORROWERS; i++) {
        leased += borrowers[i].leased;
        copied += borrowers[i].copied;
        handed_on += borrowers[i].handed_on;
        wrote += borrowers[i].wrote;
    }
    CHECK(leased && wrote && copied && handed_on && errands.done);
    printf("lease: %lu sent, %lu leased, %lu copied, %lu pages written, %lu handed on, %lu forks\n", (unsigned long)sent,
           (unsigned long)leased, (unsigned long)copied, (unsigned long)wrote, (unsigned long)handed_on,
           (unsigned long)forked);
    return 0;
}
