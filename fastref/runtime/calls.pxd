"""Calls out: synchronous and asynchronous."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref.carriers.borrow cimport Lease
from fastref.channels.slots cimport fr_waiting
from fastref.codec.payload cimport Encoder
from fastref.rref cimport RRef
from fastref.runtime.peer cimport Peer
from fastref.runtime.publish cimport Publisher
from fastref.wire.frame cimport fr_frame


cdef object PUBLISHED


cdef class Pending:
    cdef Caller caller
    cdef readonly object future         # None: a thread waits for it, and reads `value` or `error`
    cdef readonly Peer peer
    cdef readonly uint64_t call
    cdef readonly int64_t deadline_ns
    cdef bint inherits          # its time is that of the call it was made in
    cdef double timeout_s
    cdef object what
    cdef object value
    cdef object error
    cdef bint told                      # somebody settles it, under the GIL
    cdef uint32_t settled               # futex word: 1 once the outcome is there
    cdef uint32_t sleepers
    cdef uint64_t context               # the autograd context that it was made in; 0: none
    cdef uint32_t site                  # which function's answer it is, for whoever leases it

    cdef int settle(self, object value, object error) except -1


cdef class Caller(Publisher):
    cdef dict pending                   # call -> Pending
    cdef dict arrived                   # call -> the answer to a call that waits in a slot, which came as a message
    cdef fr_waiting fetch_waiting
    cdef dict interruptions             # thread -> what the call that it waits for raises
    cdef public object collector        # called with each new future while somebody collects them; None
    cdef public int64_t next_expiry_ns  # no pending call ends before

    cdef int prepare(self, Peer peer, fr_frame* head, Encoder body, object func, RRef target, str method, tuple args,
                     dict kwargs) except -1
    cdef int _write_call(self, Peer peer, fr_frame* head, Encoder body, object func, RRef target, str method, tuple args,
                         dict kwargs) except -1
    cdef int _check_interruption(self) except -1
    cdef object _give_number(self, Peer peer, object func, object introduction, dict names, tuple parts)
    cdef uint32_t number_of(self, Peer peer, object func) except? 0xFFFFFFFF
    cdef object call(self, Peer peer, object func, RRef target, str method, tuple args, dict kwargs, double timeout_s)
    cdef object call_async(self, Peer peer, object func, RRef target, str method, tuple args, dict kwargs, double timeout_s)
    cdef object exchange(self, Peer peer, fr_frame* head, Encoder body, double timeout_s, object what)
    cdef object _await_slot(self, Peer peer, int slot, fr_frame* head, int64_t deadline_ns, double timeout_s, object what)
    cdef object exchange_pending(self, Peer peer, fr_frame* head, Encoder body, double timeout_s, object what)
    cdef int _wait_longer(self, Peer peer, int slot, int64_t deadline_ns, double timeout_s, object what) except -1
    cdef Pending pend(self, Peer peer, fr_frame* head, double timeout_s, object future, object what)
    cdef object read_slot(self, Peer peer, int slot, uint64_t call, uint32_t site)
    cdef object outcome(self, Peer peer, const char* payload, uint64_t size, int flags, list references, Lease lease)
    cdef void blocked(self, bint yes) noexcept
