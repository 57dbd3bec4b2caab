/* Threads lend, hold and give back blocks of every size while one of them gives idle files back: no two blocks that are
 * lent overlap, and when all has come back nothing is lent, used or lost. */
#include "harness.h"

#include "fr_arena.h"

#define THREADS 4
#define KEPT 40
#define SPAN (64 * 1024u) /* pages */
#define LIMIT (24 * 1024u)

static struct fr_arena arena;
static pthread_mutex_t growing = PTHREAD_MUTEX_INITIALIZER; /* as in the runtime: one makes a file at a time */
static uint32_t *owner;  /* of each unit of the span: who has a block there; 0, nobody */
static uint64_t lends, refusals, files_gone;

static int grow_and_lend(uint64_t bytes, uint64_t *offset)
{
    struct fr_need need;
    int what;
    pthread_mutex_lock(&growing);
    for (;;) {
        struct fr_file *file;
        what = fr_arena_lend(&arena, bytes, offset, &need);
        if (what == FR_WANTS_COMMIT) {
            fr_file_committed(&arena, need.file, need.start + need.pages);
            fr_file_release(&arena, need.file);
        } else if (what == FR_WANTS_FILE) {
            what = fr_file_plan(&arena, need.pages, 0, &file);
            if (what != FR_LENT)
                break;
            fr_file_open(&arena, file);
        } else {
            break;
        }
    }
    pthread_mutex_unlock(&growing);
    return what == FR_LENT;
}

/* Of a large block every eighth unit is looked at. */
static void own(uint64_t offset, uint64_t bytes, uint32_t from, uint32_t to)
{
    uint64_t step = bytes > FR_SMALL ? 8 : 1;
    for (uint64_t unit = offset / FR_ARENA_UNIT; unit * FR_ARENA_UNIT < offset + bytes; unit += step)
        CHECK(__atomic_exchange_n(&owner[unit], to, __ATOMIC_RELAXED) == from);
}

static void *work(void *argument)
{
    uint32_t me = 1 + (uint32_t)(uintptr_t)argument;
    uint64_t state = random_seed(me), offsets[KEPT], sizes[KEPT];
    int held[KEPT];
    unsigned count = 0;
    while (!over() || count) {
        if (!over() && count < KEPT && random_below(&state, 2)) {
            uint64_t bytes = random_below(&state, UINT64_C(64) << random_below(&state, 18)) + 1;
            if (!grow_and_lend(bytes, &offsets[count])) {
                __atomic_fetch_add(&refusals, 1, __ATOMIC_RELAXED);
                continue;
            }
            CHECK(fr_arena_lent_bytes(&arena, offsets[count]) >= bytes);
            CHECK(offsets[count] + bytes <= (uint64_t)SPAN * FR_ARENA_PAGE);
            CHECK(offsets[count] % (bytes > FR_SMALL ? FR_ARENA_PAGE : FR_ARENA_UNIT) == 0);
            own(offsets[count], bytes, 0, me);
            held[count] = random_below(&state, 2) && fr_arena_hold(&arena, offsets[count]);
            sizes[count++] = bytes;
            __atomic_fetch_add(&lends, 1, __ATOMIC_RELAXED);
        } else if (count) {
            unsigned i = random_below(&state, count);
            own(offsets[i], sizes[i], me, 0);
            CHECK(!fr_arena_give_back(&arena, offsets[i], !held[i]));
            CHECK(fr_arena_give_back(&arena, offsets[i], held[i]));
            count--;
            offsets[i] = offsets[count];
            sizes[i] = sizes[count];
            held[i] = held[count];
        }
        if (me == 1 && random_below(&state, 50) == 0) {
            struct fr_file *idle = fr_file_retire(&arena, fr_now_ns(), 1000);
            if (idle) {
                fr_file_forget(&arena, idle);
                files_gone++;
            }
        }
    }
    return NULL;
}

int main(int count, char **arguments)
{
    pthread_t threads[THREADS];
    struct fr_file *first, *idle;
    begin(count, arguments);
    owner = calloc(SPAN * (FR_ARENA_PAGE / FR_ARENA_UNIT), sizeof *owner);
    CHECK(owner && fr_arena_begin(&arena, SPAN, LIMIT));
    CHECK(fr_file_plan(&arena, 1024, 1, &first) == FR_LENT);
    fr_file_open(&arena, first);
    for (uintptr_t i = 0; i < THREADS; i++)
        threads[i] = run(work, (void *)i);
    for (int i = 0; i < THREADS; i++)
        join(threads[i]);
    CHECK(arena.lent == 0 && arena.blocks == 0 && arena.committed <= LIMIT);
    fr_file_retire(&arena, fr_now_ns(), INT64_MAX);
    while ((idle = fr_file_retire(&arena, fr_now_ns(), 0)) != NULL)
        fr_file_forget(&arena, idle);
    CHECK(arena.files == 1 && first->used == 0 && arena.empty_slabs == 0 && arena.committed == first->committed);
    printf("arena: %lu lent, %lu refused, %lu files gone meanwhile\n", lends, refusals, files_gone);
    CHECK(lends > 100);
    fr_arena_end(&arena);
    free(owner);
    return 0;
}
