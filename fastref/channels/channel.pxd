"""The contract of a channel, and the inbox that all kinds of channels deliver into."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref._core cimport pthread_mutex_t

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len


cdef extern from "fr_ring.h" nogil:
    struct fr_ring:
        uint64_t tail
    struct fr_producer:
        fr_ring* ring
        uint64_t size
        uint64_t tail
    struct fr_consumer:
        fr_ring* ring
        uint64_t size
        uint64_t head
        uint64_t record
    enum:
        FR_RING_EMPTY, FR_RING_RECORD, FR_RING_BROKEN, FR_RING_DATA_OFFSET
    uint64_t fr_ring_largest(uint64_t)
    void fr_producer_open(fr_producer*, void*, uint64_t)
    void fr_consumer_open(fr_consumer*, void*, uint64_t)
    char* fr_ring_reserve(fr_producer*, uint64_t)
    uint64_t fr_ring_commit(fr_producer*, uint64_t)
    uint64_t fr_ring_acquired(fr_producer*)
    uint64_t fr_ring_consumed(fr_producer*)
    int fr_ring_peek(fr_consumer*, const char**, uint64_t*)
    void fr_ring_mark_acquired(fr_consumer*)
    void fr_ring_pop(fr_consumer*)
    bint fr_ring_is_empty(fr_consumer*)


cdef extern from "fr_bell.h" nogil:
    enum:
        FR_READY_WORDS, FR_MAX_PEERS
    struct fr_bell:
        uint64_t ready[4]
        uint32_t armed
        uint32_t leader
        uint32_t follower
    struct fr_listener:
        uint64_t* kept
    void fr_listener_open(fr_listener*, fr_bell*)
    void fr_listener_prefer_nobody(fr_listener*)
    void fr_listener_prefer(fr_listener*, int, const uint64_t*, const uint64_t*)
    bint fr_listener_favourite(fr_listener*)
    uint64_t fr_listener_take(fr_listener*, unsigned)
    bint fr_listener_any(fr_listener*)
    bint fr_bell_ring(fr_bell*, unsigned)
    void fr_bell_ring_for_dead(fr_bell*, unsigned)


cdef enum:
    SENT_FULL = 0
    SENT_CLOSED = -1
    SENT_TOO_LARGE = -2


cdef struct Arrival:
    const char* data
    uint64_t size
    uint32_t source


ctypedef void (*Give)(void* start, uint64_t size) noexcept nogil


cdef struct Bulk:               # what goes along with a record where no memory is shared
    char* start                 # NULL: nothing, or pieces that the sender lends
    uint64_t size
    Give give                   # who has it last calls this
    iovec* pieces
    size_t piece_count


cdef class Channel:
    cdef readonly uint64_t largest
    cdef readonly bint closed
    cdef readonly bint borrowing        # it can read what goes along with a record from where it lies

    cdef int64_t try_send(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size) noexcept nogil
    cdef int64_t try_send_bulk(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                               Bulk* bulk) noexcept nogil
    cdef bint borrows(self, int64_t position) noexcept nogil
    cdef void give_back(self, int64_t position, Bulk* instead) noexcept nogil
    cdef uint64_t acquired(self) noexcept nogil
    cdef uint64_t consumed(self) noexcept nogil
    cdef void close(self) noexcept nogil


cdef struct Source:
    int kind                # 0: nobody, 1: ring, 2: queue
    fr_consumer consumer
    void* memory            # of the ring that was read last
    void* first             # queue: singly linked messages
    void* last
    void* looking_at
    uint64_t received
    uint64_t broken


cdef class Inbox:
    cdef fr_bell* bell
    cdef fr_listener listener
    cdef Source* sources
    cdef uint64_t[4] pending
    cdef uint32_t current
    cdef uint32_t drained_in_a_row
    cdef int favourite          # source whose ready bit stays set; NO_FAVOURITE for none
    cdef uint32_t alone         # records in a row from one source, with or without pauses
    cdef uint32_t last
    cdef uint64_t taken         # records that were done with, from all sources
    cdef pthread_mutex_t queue_lock
    cdef object _bell_memory
    cdef list _rings

    cdef int next(self, Arrival* arrival) noexcept nogil
    cdef int _next_in_turn(self) noexcept nogil
    cdef void _note(self, uint32_t source) noexcept nogil
    cdef void _prefer(self, int source) noexcept nogil
    cdef int _peek(self, Source* source, Arrival* arrival) noexcept nogil
    cdef void acquired(self) noexcept nogil
    cdef void done(self) noexcept nogil
    cdef void put_back(self) noexcept nogil
    cdef bint is_empty(self, uint32_t source) noexcept nogil
    cdef int enqueue(self, uint32_t source, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                     uint64_t position, const Bulk* bulk) noexcept nogil
    cdef Bulk take_bulk(self) noexcept nogil
    cdef uint64_t queue_position(self, uint32_t source, bint acquired) noexcept nogil
