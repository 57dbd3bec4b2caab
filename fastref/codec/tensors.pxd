"""Plain CPU tensors in the fast encoding."""

from libc.stdint cimport uint64_t

from fastref.codec.payload cimport Decoder, Encoder


cdef bint is_plain_tensor(object value) noexcept
cdef int write_tensor(Encoder encoder, object tensor) except -1
cdef object read_tensor(Decoder decoder, bint is_forwarded)
cdef bint is_made_here(uint64_t address) noexcept nogil
