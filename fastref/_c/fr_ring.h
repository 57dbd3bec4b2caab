/* The ring: ordered records from one producer process to one consumer process.
 *
 * The consumer makes it; the producer writes records and the tail, the consumer writes two cursors:
 *   head      everything before it may be overwritten
 *   acquired  the references of everything before it have been taken (the sender may let go of its pins)
 * Positions only grow; they are taken modulo the size for addressing. A record is contiguous: one that
 * would not fit before the end of the buffer is preceded by padding. Both sides keep their own position
 * privately and check what the other side wrote before using it, so a damaged or hostile peer can cost
 * the connection but not the process. */
#ifndef FR_RING_H
#define FR_RING_H

#include "fr_atomic.h"
#include <string.h>

#define FR_RING_ALIGN 16u
#define FR_RING_DATA_OFFSET 192u
#define FR_RECORD_PADDING 0x80000000u

struct fr_ring {            /* in shared memory */
    uint64_t tail;          /* producer writes */
    char pad0[56];
    uint64_t head;          /* consumer writes */
    uint64_t acquired;      /* consumer writes */
    char pad1[48];
    uint64_t reserved[8];
};

struct fr_record {          /* before each record; 16 bytes so that payloads stay aligned */
    uint32_t size;          /* payload bytes, or the padding flag and the bytes to skip */
    uint32_t check;         /* ~size: a torn or damaged header is noticed */
    uint64_t unused;
};

struct fr_producer {        /* private */
    struct fr_ring *ring;
    char *data;
    uint64_t size, tail, head; /* head: last value seen */
};

struct fr_consumer {        /* private */
    struct fr_ring *ring;
    const char *data;
    uint64_t size, head, tail; /* tail: last value seen and checked */
    uint64_t record;        /* whole length of the record being looked at, 0 for none */
};

enum { FR_RING_EMPTY = 0, FR_RING_RECORD = 1, FR_RING_BROKEN = -1 };

FR_INLINE uint64_t fr_ring_round(uint64_t n) { return (n + FR_RING_ALIGN - 1) & ~(uint64_t)(FR_RING_ALIGN - 1); }

/* Largest payload that always fits in an empty ring, whatever the padding. */
FR_INLINE uint64_t fr_ring_largest(uint64_t size) { return size / 2 - sizeof(struct fr_record); }

static inline void fr_producer_open(struct fr_producer *p, void *memory, uint64_t size)
{
    p->ring = (struct fr_ring *)memory;
    p->data = (char *)memory + FR_RING_DATA_OFFSET;
    p->size = size;
    p->tail = p->head = 0;
}

static inline void fr_consumer_open(struct fr_consumer *c, void *memory, uint64_t size)
{
    c->ring = (struct fr_ring *)memory;
    c->data = (const char *)memory + FR_RING_DATA_OFFSET;
    c->size = size;
    c->head = c->tail = c->record = 0;
}

/* Room for a record of `payload` bytes, or NULL while the ring is full. Nothing is visible before commit. */
static inline char *fr_ring_reserve(struct fr_producer *p, uint64_t payload)
{
    uint64_t need = sizeof(struct fr_record) + fr_ring_round(payload);
    uint64_t offset = p->tail & (p->size - 1), left = p->size - offset;
    uint64_t skip = left < need ? left : 0;
    if (p->tail + skip + need - p->head > p->size) {
        /* SYNC: acquire pairs with the consumer's release of head: it has finished reading what we overwrite. */
        uint64_t head = fr_load_acquire(&p->ring->head);
        if (head - p->head > p->tail - p->head)
            return NULL; /* not a position we ever published: treat as no progress, never overwrite unread data */
        p->head = head;
        if (p->tail + skip + need - head > p->size)
            return NULL;
    }
    if (skip) {
        struct fr_record *pad = (struct fr_record *)(p->data + offset);
        pad->size = FR_RECORD_PADDING | (uint32_t)skip;
        pad->check = ~pad->size;
        p->tail += skip;
        offset = 0;
    }
    struct fr_record *record = (struct fr_record *)(p->data + offset);
    record->size = (uint32_t)payload;
    record->check = ~record->size;
    return (char *)(record + 1);
}

/* Publish the record reserved last. Returns the position just behind it. */
static inline uint64_t fr_ring_commit(struct fr_producer *p, uint64_t payload)
{
    p->tail += sizeof(struct fr_record) + fr_ring_round(payload);
    /* SYNC: release pairs with the consumer's acquire of tail: it sees the whole record. */
    fr_store_release(&p->ring->tail, p->tail);
    return p->tail;
}

/* Position up to which the consumer has taken all references. Never beyond what was published. */
static inline uint64_t fr_ring_acquired(const struct fr_producer *p)
{
    /* SYNC: acquire pairs with the consumer's release in fr_ring_mark_acquired: its bits are set. */
    uint64_t acquired = fr_load_acquire(&p->ring->acquired);
    return acquired <= p->tail ? acquired : 0;
}

static inline uint64_t fr_ring_consumed(const struct fr_producer *p)
{
    uint64_t head = fr_load_acquire(&p->ring->head); /* SYNC: as in fr_ring_reserve */
    return head <= p->tail ? head : 0;
}

/* Look at the oldest record without taking it. */
static inline int fr_ring_peek(struct fr_consumer *c, const char **payload, uint64_t *length)
{
    for (;;) {
        if (c->head == c->tail) {
            /* SYNC: acquire pairs with the producer's release in fr_ring_commit. */
            uint64_t tail = fr_load_acquire(&c->ring->tail);
            if (tail == c->tail)
                return FR_RING_EMPTY;
            if (tail - c->head > c->size || (tail & (FR_RING_ALIGN - 1)))
                return FR_RING_BROKEN;
            c->tail = tail;
        }
        uint64_t offset = c->head & (c->size - 1), left = c->size - offset, room = c->tail - c->head;
        const struct fr_record *shared = (const struct fr_record *)(c->data + offset);
        __builtin_prefetch((const char *)shared + 64); /* a small record spans two lines: fetch them at once */
        /* relaxed: published by tail; read once, because the producer's process can still write here. */
        uint32_t size = __atomic_load_n(&shared->size, __ATOMIC_RELAXED);
        uint32_t check = __atomic_load_n(&shared->check, __ATOMIC_RELAXED);
        if (check != (uint32_t)~size)
            return FR_RING_BROKEN;
        if (size & FR_RECORD_PADDING) {
            uint64_t skip = size & ~FR_RECORD_PADDING;
            if (skip != left || skip > room)
                return FR_RING_BROKEN;
            fr_store_relaxed(&c->head, c->head + skip); /* relaxed: followers only compare it */
            continue;
        }
        uint64_t whole = sizeof(struct fr_record) + fr_ring_round(size);
        if (whole > left || whole > room)
            return FR_RING_BROKEN;
        c->record = whole;
        *payload = (const char *)(shared + 1);
        *length = size;
        return FR_RING_RECORD;
    }
}

/* The references of the record being looked at have been taken. */
static inline void fr_ring_mark_acquired(struct fr_consumer *c)
{
    /* SYNC: release pairs with the producer's acquire in fr_ring_acquired. */
    fr_store_release(&c->ring->acquired, c->head + c->record);
}

/* Done with the record being looked at: its room may be used again. */
static inline void fr_ring_pop(struct fr_consumer *c)
{
    fr_store_relaxed(&c->head, c->head + c->record); /* relaxed: followers only compare it */
    c->record = 0;
    /* SYNC: release pairs with the producer's acquire of head: our reads are over. */
    fr_store_release(&c->ring->acquired, c->head);
    fr_store_release(&c->ring->head, c->head);
}

FR_INLINE int fr_ring_is_empty(const struct fr_consumer *c)
{
    return c->head == c->tail && fr_load_acquire(&c->ring->tail) == c->tail; /* SYNC: as in fr_ring_peek */
}

#endif
