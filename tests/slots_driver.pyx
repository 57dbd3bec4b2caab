# cython: language_level=3
"""Lets Python tests call what response slots offer to compiled code only. Built by ``test_slots.py``."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from fastref.channels.slots cimport (FR_SLOT_ROOM, WAIT_DONE, WAIT_INTERRUPTED, WAIT_PEER_DIED, WAIT_STOPPED,
                                     WAIT_TIMED_OUT, PeerSlots, ResponseSlots, fr_slot, fr_slot_finish)
from fastref._core cimport fr_now_ns, fr_store32_release

ROOM = FR_SLOT_ROOM
OUTCOMES = {WAIT_DONE: "done", WAIT_TIMED_OUT: "timed out", WAIT_PEER_DIED: "died", WAIT_INTERRUPTED: "interrupted",
            WAIT_STOPPED: "stopped"}


cdef class Caller:
    """A process that waits in its slots for answers of one peer."""

    cdef readonly ResponseSlots slots
    cdef uint32_t died

    def __init__(self, memory, count):
        self.slots = ResponseSlots(memory, count)

    def begin(self, uint64_t number):
        return self.slots.begin(number, &self.died)

    def wait(self, int slot, double timeout_s=0, double slice_s=-1):
        """Wait without slices unless told otherwise; 0 timeout: for ever. Spins only with a slice of 0."""
        cdef long long deadline = fr_now_ns() + <long long>(timeout_s * 1e9) if timeout_s else 0
        cdef long long slice_ns = <long long>(slice_s * 1e9)
        cdef int outcome
        with nogil:
            outcome = self.slots.wait(slot, deadline, slice_ns)
        return OUTCOMES[outcome]

    def give_up(self, int slot, bint dead=False):
        return OUTCOMES[self.slots.give_up(slot, dead)]

    def read(self, int slot):
        """Return the answer and its flags, and end the call."""
        cdef fr_slot* s = &self.slots.slots[slot]
        answer = (s.data[:s.size], s.flags)
        self.slots.end(slot)
        return answer

    def finish_here(self, int slot, uint64_t number, uint32_t flags):
        self.slots.finish_here(slot, number, flags)

    def waits_for(self, int slot, uint64_t number):
        return self.slots.waits_for(slot, number)

    def peer_dies(self):
        fr_store32_release(&self.died, 1)
        self.slots.wake_waiting()


cdef class Callee:
    """A process that answers."""

    cdef readonly PeerSlots slots
    cdef fr_slot* claimed

    def __init__(self, memory, count):
        self.slots = PeerSlots(memory, count)

    def claim(self, unsigned slot, uint64_t number):
        self.claimed = self.slots.claim(slot, number)
        return self.claimed != NULL

    def finish(self, uint64_t number, bytes data, uint32_t flags=0):
        cdef const char* start = data
        memcpy(&self.claimed.data[0], start, len(data))
        self.claimed.size, self.claimed.flags = len(data), flags
        return fr_slot_finish(self.claimed, number)

    def answer(self, unsigned slot, uint64_t number, bytes data, uint32_t flags=0):
        return self.claim(slot, number) and self.finish(number, data, flags)

    def still_reads(self, unsigned slot, uint64_t number):
        return self.slots.still_reads(slot, number)
