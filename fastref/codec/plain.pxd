"""The encoding of strict jobs."""

from fastref.codec.payload cimport Decoder, Encoder


cdef int encode_plain(Encoder encoder, object value, str what) except -1
cdef object decode_plain(Decoder decoder)
