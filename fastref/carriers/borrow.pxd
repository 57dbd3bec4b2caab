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


cdef struct Part:
    uint64_t start, end


cdef class PeerArena:
    cdef const char* base
    cdef readonly uint64_t size_bytes
    cdef Part* parts                # the files that are mapped
    cdef int part_count
    cdef object _memory, _private, _look
    cdef Holder _holder
    cdef void* leases

    cdef bint finds(self, uint64_t offset, uint64_t size_bytes) except -1
    cdef int check(self, uint64_t offset, uint64_t size_bytes) except -1
    cdef bint has(self, uint64_t offset, uint64_t size_bytes) noexcept
    cdef const char* borrow(self, uint64_t offset, uint64_t size_bytes) except NULL
    cdef Lease take(self, uint64_t offset, uint64_t size_bytes, uint32_t index, uint32_t generation,
                    uint32_t site)
