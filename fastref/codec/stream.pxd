"""The fast encoding of plain values."""

from fastref.codec.payload cimport Decoder, Encoder


cdef int encode_value(Encoder encoder, object value, int depth) except -1
cdef object decode_value(Decoder decoder, int depth)
