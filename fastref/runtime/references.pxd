"""Calls through references."""

from libc.stdint cimport int64_t, uint64_t

from fastref._core cimport fr_fork, fr_published
from fastref.rref cimport RRef
from fastref.runtime.calls cimport Caller
from fastref.runtime.peer cimport Peer


cdef str ASK_TYPE, ASK_WHETHER_THERE, NEVER_MADE


cdef class ReferenceCaller(Caller):
    cdef public uint64_t fetched_directly, fetched_by_message
    cdef readonly dict on_their_way     # number -> a reference that the program hands over itself
    cdef public object detour           # makes all calls in our place: they go through a pickler of the program; None
    cdef public object profiler         # makes the calls of threads that torch profiles; None: they are not seen

    cdef object _rpc(self, int how, Peer peer, object func, tuple row, dict kwargs, double timeout)
    cdef object _invoke(self, RRef rref, str method, tuple args, dict kwargs, double timeout_s, int how)
    cdef object _fetch(self, RRef rref, double timeout_s)
    cdef object call_remote(self, Peer peer, object func, RRef target, str method, tuple args, dict kwargs, double timeout_s)
    cdef RRef own_pending(self, fr_fork* fork, int64_t deadline_ns)
    cdef bint _ends_with_creation(self, RRef rref, int64_t deadline_ns) except -1
    cdef tuple credit(self, Peer peer, int64_t deadline_ns, double timeout_s)
    cdef object _ask(self, RRef rref, str question, double timeout_s)
    cdef object read_published(self, RRef rref, Peer peer)
    cdef object _read_block(self, RRef rref, Peer peer, fr_published* seen)
