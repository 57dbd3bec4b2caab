"""Blocks of shared memory that this process lends."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref._core cimport Holder


cdef extern from "fr_arena.h" nogil:
    enum:
        FR_ARENA_PAGE
    struct fr_file:
        uint64_t start
        uint32_t pages, committed
    struct fr_arena:
        uint64_t span, limit, committed, leaving, lent, blocks, files, given_back
    struct fr_need:
        fr_file* file
        uint64_t start, pages, cold, cold_pages


cdef class Arena:
    cdef char* base
    cdef fr_arena blocks
    cdef object _memory, _files, _growing, _warmer
    cdef Holder _holder
    cdef dict _pinned               # offset -> table entry that we hold until the block is given back
    cdef dict _entries              # table entry -> offset: blocks that live as long as an entry
    cdef dict _retiring             # offset -> file that peers are asked to unmap
    cdef bint _ended
    cdef uint64_t _populated
    cdef public int unannounced     # peers that have not been told of all files: they have not read what they were sent

    cpdef uint64_t lend(self, uint64_t size_bytes) except? 0xFFFFFFFFFFFFFFFF
    cpdef int give_back(self, uint64_t offset) except -1
    cdef int _grow(self, uint64_t size_bytes, uint64_t* offset, fr_need* need) except -1
    cdef int _plan(self, uint64_t pages, bint exactly) except -1
    cdef object _full(self, uint64_t size_bytes)
    cdef int _warm(self, fr_need* cold) except -1
