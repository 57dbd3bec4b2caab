"""Entries of the table for values that are handed on, and the holds under references that go out."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from fastref._core cimport Holder, IdGenerator, ReferenceTable, fr_fork
from fastref.codec.payload cimport Encoder
from fastref.rref cimport OwnedValue, RRef
from fastref.runtime.payloads cimport Payloads
from fastref.runtime.peer cimport Peer


cdef class Entries(Payloads):
    cdef readonly list peers            # by rank; None where nobody is
    cdef readonly ReferenceTable table
    cdef readonly IdGenerator ids
    cdef public object owned            # list: index of the entry -> OwnedValue
    cdef public uint64_t blocks_forwarded

    cdef bint has_bit(self, uint16_t owner, uint16_t holder) except -1
    cdef int _pack_forks(self, Peer peer, list references, bint first_is_new, int64_t deadline_ns, Encoder forks,
                         list pinned) except -1
    cdef int _fork_abroad(self, Peer peer, uint64_t fork_id, Holder holder, fr_fork* fork, list pinned) except -1
    cdef int _pin_forwarded(self, list forwarded, list pinned) except -1
    cdef tuple open_entry(self)
    cdef tuple open_entry_for_value(self, int64_t deadline_ns)
    cdef int share(self, RRef rref, int64_t deadline_ns) except -1
    cdef int publish(self, OwnedValue owned, uint32_t index) except -1
    cdef int64_t _nap(self, int64_t nap_ns) except -1
    cdef int drain_while_waiting(self) except -1
