/* Copies by two threads: many at once, of any size and place, while the thread that helps has other errands too. */
#define _GNU_SOURCE
#include "harness.h"

#define FR_COPY_BY_TWO_FROM 8192
#include "fr_copy.h"

#define COPIERS 3
#define ROOM 200000u

static struct fr_errands errands;
static uint64_t copies[COPIERS], others;

static void nothing(struct fr_errand *errand)
{
    fr_add_relaxed(&others, 1);
    free(errand);
}

static void *copy(void *argument)
{
    uint64_t number = (uint64_t)(uintptr_t)argument, seed = random_seed(number);
    char *source = malloc(ROOM), *target = malloc(ROOM);
    CHECK(source && target);
    while (!over()) {
        size_t size = random_below(&seed, random_below(&seed, 4) ? ROOM - 64 : 3 * 8192), at = random_below(&seed, 64);
        char mark = (char)random_next(&seed);
        for (size_t i = 0; i < size; i += 97)
            source[at + i] = (char)(mark + (char)i);
        target[at + size] = 77;
        fr_copy_bytes(&errands, target + at, source + at, size);
        CHECK(memcmp(target + at, source + at, size) == 0 && target[at + size] == 77);
        copies[number]++;
        if (!random_below(&seed, 4)) {
            struct fr_errand *errand = malloc(sizeof *errand);
            CHECK(errand);
            errand->run = nothing;
            if (!fr_errands_post(&errands, errand))
                nothing(errand);
        }
    }
    free(source);
    free(target);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[COPIERS];
    uint64_t all = 0;
    begin(argc, argv);
    fr_errands_begin(&errands);
    for (uint64_t i = 0; i < COPIERS; i++)
        threads[i] = run(copy, (void *)(uintptr_t)i);
    for (unsigned i = 0; i < COPIERS; i++) {
        join(threads[i]);
        all += copies[i];
    }
    fr_errands_stop(&errands);
    CHECK(all && others && errands.done > others);
    printf("copy: %lu copies, %lu errands, %lu others among them\n", (unsigned long)all, (unsigned long)errands.done,
           (unsigned long)others);
    return 0;
}
