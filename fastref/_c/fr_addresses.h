/* A set of addresses: of memory that this process made a tensor in, and that nothing but that tensor's storage uses.
 *
 * Any thread, with or without the interpreter lock. A child of fork() finds the set as its parent had it. */
#ifndef FR_ADDRESSES_H
#define FR_ADDRESSES_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

struct fr_addresses {
    pthread_mutex_t lock;
    uintptr_t *slots;        /* open addressing; 0: free. At most half of them are taken */
    size_t room, taken;      /* room: a power of two, or 0 */
};

static struct fr_addresses fr_known_addresses = {.lock = PTHREAD_MUTEX_INITIALIZER};

static inline size_t fr_address_slot(const struct fr_addresses *all, uintptr_t address)
{
    return (size_t)((uint64_t)address * 0x9E3779B97F4A7C15u >> 20) & (all->room - 1);
}

static inline void fr_address_put(struct fr_addresses *all, uintptr_t address)
{
    size_t at = fr_address_slot(all, address);
    while (all->slots[at])
        at = (at + 1) & (all->room - 1);
    all->slots[at] = address;
    all->taken++;
}

/* 0 when there is no memory: then the address is not in the set, which is safe. */
static inline int fr_address_add(void *address)
{
    struct fr_addresses *all = &fr_known_addresses;
    int done = 1;
    pthread_mutex_lock(&all->lock);
    if (2 * (all->taken + 1) > all->room) {
        struct fr_addresses grown = {.room = all->room ? 2 * all->room : 256};
        grown.slots = calloc(grown.room, sizeof *grown.slots);
        if (grown.slots) {
            for (size_t i = 0; i < all->room; i++)
                if (all->slots[i])
                    fr_address_put(&grown, all->slots[i]);
            free(all->slots);
            all->slots = grown.slots;
            all->room = grown.room;
        } else {
            done = 0;
        }
    }
    if (done)
        fr_address_put(all, (uintptr_t)address);
    pthread_mutex_unlock(&all->lock);
    return done;
}

static inline int fr_address_find(const struct fr_addresses *all, uintptr_t address, size_t *found)
{
    if (!all->room)
        return 0;
    for (size_t at = fr_address_slot(all, address); all->slots[at]; at = (at + 1) & (all->room - 1)) {
        if (all->slots[at] == address) {
            *found = at;
            return 1;
        }
    }
    return 0;
}

static inline int fr_address_has(void *address)
{
    size_t at;
    int has;
    pthread_mutex_lock(&fr_known_addresses.lock);
    has = fr_address_find(&fr_known_addresses, (uintptr_t)address, &at);
    pthread_mutex_unlock(&fr_known_addresses.lock);
    return has;
}

static inline void fr_address_remove(void *address)
{
    struct fr_addresses *all = &fr_known_addresses;
    size_t hole, at;
    pthread_mutex_lock(&all->lock);
    if (fr_address_find(all, (uintptr_t)address, &hole)) {
        all->taken--;
        /* Those behind move up, so that nobody who looks for them meets the hole. */
        for (at = (hole + 1) & (all->room - 1); all->slots[at]; at = (at + 1) & (all->room - 1)) {
            size_t home = fr_address_slot(all, all->slots[at]);
            if (((at - home) & (all->room - 1)) >= ((at - hole) & (all->room - 1))) {
                all->slots[hole] = all->slots[at];
                hole = at;
            }
        }
        all->slots[hole] = 0;
    }
    pthread_mutex_unlock(&all->lock);
}

static inline void fr_addresses_before_fork(void)
{
    pthread_mutex_lock(&fr_known_addresses.lock);
}

static inline void fr_addresses_after_fork(void)
{
    pthread_mutex_unlock(&fr_known_addresses.lock);
}

static inline void fr_addresses_watch_forks(void)
{
    pthread_atfork(fr_addresses_before_fork, fr_addresses_after_fork, fr_addresses_after_fork);
}

#endif
