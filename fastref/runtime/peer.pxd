"""What a runtime knows of one peer."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from fastref._core cimport Holder, PinQueue
from fastref.carriers.arena cimport Arena
from fastref.carriers.borrow cimport PeerArena
from fastref.channels.channel cimport Channel
from fastref.channels.slots cimport PeerSlots
from fastref.codec.payload cimport Encoder


cdef class Peer:
    cdef readonly uint16_t rank
    cdef readonly object info
    cdef readonly int pid
    cdef readonly Channel channel
    cdef readonly PeerSlots slots       # None where no memory is shared, as are
    cdef readonly Holder holder
    cdef readonly PinQueue pins
    cdef readonly PeerArena arena       # this
    cdef readonly object host           # equal for workers that share memory
    cdef public str way                 # how it is reached, and why so
    cdef readonly bint is_far           # no memory is shared with it: payloads go along with frames
    cdef readonly uint32_t bits         # how many ranks of its host have a bit in its table
    cdef readonly uint32_t incarnation  # how many workers of this group had its rank before
    cdef uint32_t first_generation, generations     # of the entries in its table
    cdef readonly Holder serves         # what calls through references must hold of it; None: it takes no calls
    cdef public bint shares_main
    cdef public bint greeted
    cdef public bint left               # it said goodbye
    cdef uint32_t died
    cdef uint32_t cpu           # where it ran when it last left an answer in a slot
    cdef public str death
    cdef uint32_t numbers_given
    cdef dict numbers                   # callable -> (number, module dict, name): what it knows by number
    cdef public dict callables          # number -> (module, qualname): what we know by its numbers
    cdef list credits
    cdef public bint credits_asked
    cdef public str credits_refused     # why the peer opened none when last asked
    cdef public uint32_t credits_open   # entries of ours that are open for its remote() calls
    cdef public uint32_t credit_window
    cdef public dict children           # fork -> (holder, index): pinned until the child is accepted
    cdef readonly object outgoing       # (record, pins, block): frames that wait for room in the ring
    cdef bint flushing
    cdef object loans                   # (position, offset): blocks that frames to it point to
    cdef readonly object lent           # (position, encoder): answers that the channel reads from where they lie
    cdef list slot_loans                # (slot, call, offset): blocks that answers in its slots point to
    cdef readonly object guard          # what `lock` is made of; taken by itself no signal handler comes between it and its block
    cdef public object lock

    cdef void release_pins(self) noexcept
    cdef int release_loans(self, Arena arena) except -1
    cdef int lend(self, int64_t position, Encoder body) except -1
    cdef int release_lent(self) except -1
    cdef int release(self, Arena arena) except -1
