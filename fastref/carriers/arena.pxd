"""Blocks of shared memory."""

from libc.stdint cimport int64_t, uint64_t


cdef class Arena:
    cdef char* base
    cdef readonly uint64_t limit
    cdef readonly uint64_t committed
    cdef uint64_t top
    cdef object _memory, _commit, _lock
    cdef dict _lent
    cdef dict _free
    cdef readonly uint64_t bytes_lent

    cpdef uint64_t lend(self, uint64_t size_bytes) except? 0xFFFFFFFFFFFFFFFF
    cpdef int give_back(self, uint64_t offset) except -1


cdef class PeerArena:
    cdef const char* base
    cdef readonly uint64_t size_bytes
    cdef object _memory

    cdef const char* borrow(self, uint64_t offset, uint64_t size_bytes) except NULL
