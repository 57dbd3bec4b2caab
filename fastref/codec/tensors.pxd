"""Plain CPU tensors in the fast encoding."""

from fastref.codec.payload cimport Decoder, Encoder


cdef bint is_plain_tensor(object value) noexcept
cdef int write_tensor(Encoder encoder, object tensor) except -1
cdef object read_tensor(Decoder decoder)
