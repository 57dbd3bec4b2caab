"""Blocks of shared memory that a peer lends."""

from libc.stdint cimport uint32_t, uint64_t

from fastref._core cimport Holder


cdef enum:
    LEASE_FROM = 131072     # smaller buffers are copied; the figures are in docs/architecture.md
    NO_ENTRY = 0xFFFFFFFF   # the place of a table entry where a block has none

cdef extern from *:
    """
    struct fr_lease;
    """
    struct fr_lease:
        pass


cdef class Lease:
    cdef fr_lease* lease
    cdef char* start                # the whole block, private to this process while the lease lasts
    cdef uint64_t size_bytes

    cdef fr_lease* share(self) noexcept nogil


cdef void drop_lease(fr_lease* lease) noexcept nogil
cdef Lease lease_of_own(char* start, uint64_t size_bytes, void (*give)(void*, uint64_t) noexcept nogil)


cdef struct Part:
    uint64_t start, end


cdef struct Place:              # of bytes in a block that somebody else lends; on the wire
    uint64_t offset, size, inner # where the block begins in its owner's arena, its size, where in it the bytes begin
    uint32_t index, generation  # of the block's entry
    uint32_t owner, unused      # rank


cdef class PeerArena:
    cdef const char* base
    cdef readonly uint64_t size_bytes
    cdef Part* parts                # the files that are mapped
    cdef int part_count
    cdef object _memory, _private, _look, _word
    cdef Holder _holder
    cdef void* leases
    cdef uint32_t owner, first_generation, generations  # whose it is, and the generations of its entries
    cdef int bits                   # how many ranks have a bit in its owner's table
    cdef const uint32_t* unannounced  # its owner's word: files that somebody has not been told of; NULL: never any

    cdef bint finds(self, uint64_t offset, uint64_t size_bytes) except -1
    cdef int check(self, uint64_t offset, uint64_t size_bytes) except -1
    cdef bint has(self, uint64_t offset, uint64_t size_bytes) noexcept
    cdef const char* borrow(self, uint64_t offset, uint64_t size_bytes) except NULL
    cdef Lease take(self, uint64_t offset, uint64_t size_bytes, uint32_t index, uint32_t generation,
                    uint32_t site)
    cdef bint find(self, const char* start, uint64_t size_bytes, unsigned receiver, Place* place) noexcept nogil
    cdef int check_forwarded(self, const Place* place, uint64_t size_bytes) except -1
    cdef Lease take_forwarded(self, const Place* place, uint32_t site)
    cdef int copy_forwarded(self, const Place* place, uint64_t size_bytes, char* target) except -1
    cdef bint pin(self, const Place* place) noexcept
