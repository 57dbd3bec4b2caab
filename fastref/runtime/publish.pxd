"""Values that users read without their owner."""

from libc.stdint cimport uint32_t, uint64_t

from fastref.codec.payload cimport Encoder
from fastref.rref cimport OwnedValue
from fastref.runtime.post cimport Post


cdef class Publisher(Post):
    cdef public uint64_t values_published, values_withdrawn
    cdef dict copies                    # index -> OwnedValue: what may be withdrawn for want of memory, oldest first

    cdef bint offer(self, OwnedValue owned, uint32_t index) except -1
    cdef int expose(self, OwnedValue owned) except -1
    cdef int withdraw(self, OwnedValue owned) except -1
    cdef Encoder frozen_copy(self, OwnedValue owned, int* flags)
    cdef int _show(self, OwnedValue owned, uint32_t index, Encoder body, int flags, uint64_t turn) except -1
