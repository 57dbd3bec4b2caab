"""The buffer that payloads are written into, and the checked reader of one."""

from libc.stdint cimport uint32_t, uint64_t

from fastref.channels.channel cimport iovec
from fastref.carriers.borrow cimport Lease, PeerArena, Place


cdef extern from "fr_gather.h" nogil:
    struct fr_gather:
        uint32_t dims, item


cdef struct Segment:
    # Bytes that are copied once, straight to their destination: `size` bytes from `start` on, behind `position` of the
    # stream; the elements of a strided tensor where there is a plan.
    uint64_t position
    const char* start
    uint64_t size
    const fr_gather* plan


cdef struct Span:
    const char* start
    const char* end


cdef class Encoder:
    cdef char* data
    cdef uint64_t size, room
    cdef Segment* segments
    cdef unsigned segment_count, segment_room
    cdef uint64_t segment_bytes
    cdef uint64_t largest_in_place  # of the segments that the receiver can use where they lie
    cdef list references            # RRefs met, in the order of their numbers
    cdef list blocks                # blocks for sharing, which the receiver has to be handed
    cdef list arenas                # of which the receiver may be handed blocks that we have leased; None: of none
    cdef unsigned receiver          # its rank
    cdef list forwarded             # (arena, place as bytes) of the blocks that it is handed
    cdef bint lent                  # a channel reads from where it and its segments lie
    cdef list kept                  # objects whose memory the segments point into
    cdef list linked                # tensors met that want gradients, which a backward pass brings back; None: it does not
    cdef bint gradients             # one such tensor at least was met
    cdef void *seen[32]             # mutable objects met: a second meeting needs pickle, which keeps identity
    cdef unsigned seen_count, containers
    cdef bint plain                 # what is met again is somebody else's business, and no reason to say no
    cdef Span* spans                # memory of the tensors met, in its order
    cdef unsigned span_count, span_room

    cdef void reset(self) noexcept
    cdef char* grow(self, uint64_t size) except NULL
    cdef int raw(self, const void* start, uint64_t size) except -1
    cdef int tag32(self, char tag, uint32_t number) except -1
    cdef int segment(self, const char* start, uint64_t size, const fr_gather* plan, bint in_place,
                     object keep) except -1
    cdef bint forward(self, const char* start, uint64_t size, Place* place) except -1
    cdef bint is_apart(self, const char* start, uint64_t size) except -1
    cdef bint first_meeting(self, object value) noexcept
    cdef uint64_t total(self) noexcept nogil
    cdef size_t pieces(self, iovec* pieces, size_t room) noexcept nogil
    cdef void copy_to(self, char* target) noexcept nogil


cdef class Decoder:
    cdef const char* start
    cdef const char* at
    cdef const char* end
    cdef list references
    cdef Lease lease                # of the block that the payload lies in, if there is one: large buffers stay there
    cdef list arenas                # by rank, of blocks that third workers hand on; None: there are none
    cdef dict taken                 # leases of such blocks that this payload has met
    cdef uint32_t site              # of their use
    cdef uint64_t claimed           # elements of all containers so far
    cdef list linked                # tensors read whose gradients go back to the sender; None: no autograd context came along

    cdef const char* take(self, uint64_t size) except NULL
    cdef const char* aligned(self, uint64_t size) except NULL
    cdef PeerArena arena_of(self, const Place* place)
    cdef Lease lease_of(self, const Place* place)
    cdef uint32_t number(self) except? 0xFFFFFFFF


cdef class Carried:
    # A value that came along with an autograd context, before its tensors are part of the receiver's graph.
    cdef readonly object value
    cdef readonly uint64_t context  # its id
    cdef readonly uint64_t link     # which of the sender's links the tensors belong to; 0: none
    cdef readonly list tensors
