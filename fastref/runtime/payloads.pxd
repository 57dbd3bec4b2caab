"""Values in frames: how they are written, and read again."""

from libc.stdint cimport uint32_t, uint64_t

from fastref.carriers.borrow cimport Lease
from fastref.codec.payload cimport Carried, Decoder, Encoder
from fastref.rref cimport Wiring
from fastref.runtime.peer cimport Peer


cdef class Payloads(Wiring):
    cdef list arenas                    # by rank, theirs
    cdef readonly object info
    cdef list _encoders
    cdef readonly bint strict           # nothing is pickled or unpickled, and only what is registered can be called
    cdef public object autograd         # keeps the autograd contexts and links tensors that travel in them; None: nobody does
    cdef public object encode_failure   # how exceptions travel
    cdef public object decode_failure

    cdef Encoder encoder(self)
    cdef void encoder_done(self, Encoder encoder) noexcept
    cdef int encode_any(self, Encoder body, object value, bint shares_main, str what) except -1
    cdef int encode_pickled(self, Encoder body, object value, bint shares_main) except -1
    cdef uint64_t begin_links(self, Encoder body, uint64_t context, Peer peer, bint is_call) except? 0xFFFFFFFFFFFFFFFF
    cdef int end_links(self, Encoder body, uint64_t context, Peer peer) except -1
    cdef object unload(self, Carried carried, Peer peer)
    cdef object _read(self, Decoder decoder, uint64_t size, int flags)
    cdef object _read_payload(self, Decoder decoder, uint64_t size, int flags)
    cdef object decode_forwarded(self, const char* payload, uint64_t size, int flags, list references, Lease lease,
                                uint32_t site)
    cdef object decode_any(self, const char* payload, uint64_t size, int flags, list references, Lease lease)
