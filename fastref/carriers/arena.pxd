"""Blocks of shared memory that this process lends."""

from libc.stdint cimport uint64_t

from fastref._core cimport Holder


cdef class Arena:
    cdef char* base
    cdef readonly uint64_t limit
    cdef readonly uint64_t committed
    cdef uint64_t top
    cdef object _memory, _commit, _lock
    cdef Holder _holder
    cdef dict _lent, _held          # offset -> bytes: until it is given back; until its table entry is closed
    cdef dict _free                 # bytes -> offsets
    cdef dict _pinned               # offset -> table entry that we hold until the block is given back
    cdef dict _entries              # table entry -> offset: blocks that live as long as an entry
    cdef readonly uint64_t bytes_lent

    cpdef uint64_t lend(self, uint64_t size_bytes) except? 0xFFFFFFFFFFFFFFFF
    cpdef int give_back(self, uint64_t offset) except -1
    cdef int _take_back(self, dict blocks, uint64_t offset, list fresh) except -1
