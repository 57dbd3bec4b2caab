"""Frames out: payloads, blocks, full rings."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from fastref.carriers.arena cimport Arena
from fastref.channels.channel cimport Bulk, Inbox
from fastref.channels.slots cimport ResponseSlots
from fastref.codec.payload cimport Encoder
from fastref.rref cimport RRef
from fastref.runtime.entries cimport Entries
from fastref.runtime.peer cimport Peer
from fastref.wire.frame cimport fr_block, fr_frame


cdef enum:
    LENT_FROM = 16384       # smaller payloads are copied before they are sent: that is cheaper than to keep book

cdef extern from *:
    """
    #ifndef FR_THREAD_DECLARED
    #define FR_THREAD_DECLARED
    /* What a thread is doing for its runtime. */
    struct fr_thread {
        int running;            /* inside a user function that a peer called */
        int away;               /* it passed the drain token on for that */
        int leading;            /* it holds the drain token */
        int draining;           /* it is looking at a record of the inbox */
        int64_t deadline_ns;    /* of the call it serves; nested calls inherit it. 0: none */
        uint64_t context;       /* the autograd context that its calls belong to. 0: none */
    };
    #endif
    """
    struct fr_thread:
        int running
        int away
        int leading
        int draining
        int64_t deadline_ns
        uint64_t context

cdef fr_thread* this_thread() noexcept nogil


cdef class Bulky:               # a payload that goes along with its frame, until the channel has taken it over
    cdef Bulk bulk


cdef class Post(Entries):
    cdef readonly list ranks            # by rank, who may be called; None for others
    cdef dict names                     # by name, likewise
    cdef readonly Inbox inbox
    cdef readonly ResponseSlots slots
    cdef readonly Arena arena
    cdef uint64_t last_call
    cdef public double default_timeout_s
    cdef public int64_t slice_ns        # longest sleep on a futex; -1 only in tests
    cdef public uint64_t calls_sent

    cdef uint64_t new_call(self) noexcept nogil
    cdef int64_t deadline(self, double timeout_s) noexcept
    cdef Peer peer_of(self, object to)
    cdef Peer owner_of(self, RRef rref)
    cdef int64_t post(self, Peer peer, fr_frame* head, Encoder body, int64_t deadline_ns, bint lends=*) except -1
    cdef int take_back(self, Peer peer, int64_t position, Encoder body) except -1
    cdef int _sent(self, Peer peer, int64_t position, list pinned, int64_t lent) except -1
    cdef bint flush(self, Peer peer) except -1
    cdef object _cannot_send(self, Peer peer, int64_t why, uint64_t size)
    cdef bint lend(self, Peer peer, Encoder body, uint64_t size, fr_block* block) except -1
    cdef uint64_t lend_to_all(self, uint64_t size) except? 0xFFFFFFFFFFFFFFFF
    cdef int64_t _wait_for_room(self, Peer peer, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                                Bulk* along, int64_t deadline_ns) except -1
    cdef bint inherits(self, double timeout_s, int64_t deadline_ns) noexcept
    cdef object raise_timeout(self, Peer peer, what, double timeout_s, bint inherited)
