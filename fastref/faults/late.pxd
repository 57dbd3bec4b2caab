"""A channel that keeps chosen records back."""

from libc.stdint cimport int64_t, uint64_t

from fastref.channels.channel cimport Bulk, Channel


cdef class LateChannel(Channel):
    cdef Channel inner
    cdef object agenda
    cdef dict delays        # call -> nanoseconds for which its record is kept back
    cdef object under_way   # [position, inner position; 0 while it is kept back]: not known to be consumed
    cdef uint64_t sent, done

    cdef void keep_back(self, uint64_t call, double delay_s)
    cdef void forget(self, uint64_t call)
    cdef int64_t _send(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size, Bulk* bulk)
    cdef list _note(self, int64_t inner)
    cdef uint64_t passed(self, uint64_t reached)
    cdef uint64_t forget_consumed(self)
