"""The handle, and what it may ask of the runtime that made it."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from fastref._core cimport Holder, fr_fork


cdef enum:
    VALUE_PENDING = 0
    VALUE_READY = 1
    VALUE_FAILED = 2


cdef class OwnedValue:
    cdef uint32_t settled           # futex word: VALUE_PENDING until it is set
    cdef readonly object value
    cdef readonly object error
    cdef list waiters
    cdef uint64_t name              # of the reference it was made for: created_on << 48 | local_id
    cdef uint32_t index             # of the entry under which it is published
    cdef int64_t block              # where in the arena the published copy lies; -1: nowhere
    cdef bint published             # holders read a copy that can be withdrawn
    cdef bint lasting               # nobody can ever change it
    cdef bint publishing            # a copy is being made
    cdef bint exposed               # code of the program may have reached it: it is not published by itself any more
    cdef uint64_t turns             # publications that the program has begun, or ended
    cdef uint64_t shown_turn        # the one that holders see, or that had them ask again
    cdef bint gradients             # what is published wants gradients: in an autograd context the owner is asked
    cdef bint frozen                # published by the program: holders see that version, whatever becomes of the value

    cdef void settle(self, uint32_t state)


cdef class Wiring:
    cdef readonly uint16_t rank
    cdef readonly bint closed
    cdef public bint users_deleted  # no handle on a value elsewhere may be used any more
    cdef unsigned fork_count

    cdef int check(self) except -1
    cdef void release_pins(self) noexcept
    cdef object fetch(self, RRef rref, double timeout_s)
    cdef object local(self, RRef rref, double timeout_s)
    cdef object invoke(self, RRef rref, str method, tuple args, dict kwargs, double timeout_s, int how)
    cdef int freeze(self, RRef rref, bint publish) except -1
    cdef object worker(self, uint16_t rank)
    cdef bint confirmed(self, RRef rref) except -1
    cdef int check_creation(self, RRef rref) except -1
    cdef object confirmation(self, RRef rref)
    cdef object type_of(self, RRef rref, double timeout_s)


cpdef enum:
    HOW_SYNC = 0
    HOW_ASYNC = 1
    HOW_REMOTE = 2


cdef class RRef:
    cdef Wiring wiring
    cdef Holder holder              # None: a local value that was never shared
    cdef fr_fork fork
    cdef OwnedValue owned           # None: this process is a user
    cdef readonly str type_str
    cdef int64_t value_deadline_ns  # of a remote() with a timeout of its own; 0: none
    cdef object creation            # what went wrong when it was made, or None
    cdef object type_future         # of the value's type, once somebody has asked
    cdef object profiling_future
    cdef object __weakref__

    cdef object creation_error(self)
    cdef int _usable(self, what) except -1
    cdef int _freeze(self, bint publish) except -1
    cdef str _describe(self)


cdef RRef make_rref(Wiring wiring, Holder holder, fr_fork* fork, OwnedValue owned, str type_str)
cdef unsigned forks_so_far() noexcept nogil
