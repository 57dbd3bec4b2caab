"""Response slots: waiting for an answer in one's own memory, leaving one in a peer's."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref._core cimport pthread_mutex_t


cdef extern from "fr_slot.h" nogil:
    enum:
        FR_SLOT_ROOM, FR_SLOT_FREE, FR_SLOT_PENDING, FR_SLOT_WRITING, FR_SLOT_DONE, FR_SLOT_ABANDONED
    struct fr_slot:
        uint64_t state
        uint32_t sleeping
        uint64_t done
        uint32_t size
        uint32_t flags
        uint32_t caller_cpu
        uint32_t callee_cpu
        char* data
    uint64_t fr_slot_word(uint64_t, unsigned)
    uint64_t fr_slot_number(uint64_t)
    unsigned fr_slot_state(uint64_t)
    void fr_slot_begin(fr_slot*, uint64_t)
    bint fr_slot_is_done(const fr_slot*, uint64_t)
    bint fr_slot_has_answer(const fr_slot*, uint64_t)
    void fr_slot_expect(fr_slot*)
    bint fr_slot_claim(fr_slot*, uint64_t)
    bint fr_slot_finish(fr_slot*, uint64_t)
    int fr_slot_give_up(fr_slot*, uint64_t)


cdef extern from "fr_wait.h" nogil:
    struct fr_waiting:
        uint32_t failures
        uint32_t skip
        uint32_t penalty
        uint64_t spun
        uint64_t slept


cdef enum:
    WAIT_DONE = 0
    WAIT_TIMED_OUT = 1
    WAIT_PEER_DIED = 2
    WAIT_INTERRUPTED = 3    # a signal came, or a slice is over: look at signals, then wait on
    WAIT_STOPPED = 4


cdef class ResponseSlots:
    cdef fr_slot* slots
    cdef readonly unsigned count
    cdef uint64_t free_mask
    cdef uint64_t abandoned
    cdef uint64_t* numbers
    cdef uint32_t** died
    cdef pthread_mutex_t lock
    cdef fr_waiting waiting
    cdef fr_waiting briefly
    cdef uint32_t stopped
    cdef object _memory

    cdef int begin(self, uint64_t number, uint32_t* died) noexcept nogil
    cdef bint wait_briefly(self, int slot) noexcept nogil
    cdef int wait(self, int slot, int64_t deadline_ns, int64_t slice_ns) noexcept nogil
    cdef int look(self, int slot) noexcept nogil
    cdef void _collect_abandoned(self) noexcept nogil
    cdef void end(self, int slot) noexcept nogil
    cdef int give_up(self, int slot, bint dead) noexcept nogil
    cdef void finish_here(self, int slot, uint64_t number, uint32_t flags) noexcept nogil
    cdef bint waits_for(self, int slot, uint64_t number) noexcept nogil
    cdef void wake_all(self) noexcept nogil


cdef class PeerSlots:
    cdef fr_slot* slots
    cdef readonly unsigned count
    cdef object _memory

    cdef void expect(self, unsigned slot) noexcept nogil
    cdef fr_slot* claim(self, unsigned slot, uint64_t number) noexcept nogil
    cdef bint still_reads(self, unsigned slot, uint64_t number) noexcept nogil
