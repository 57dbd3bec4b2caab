"""Running what peers ask for, keeping values, answering."""

from libc.stdint cimport uint32_t, uint64_t

from fastref.carriers.borrow cimport Lease
from fastref.codec.payload cimport Encoder
from fastref.rref cimport OwnedValue
from fastref.runtime.peer cimport Peer
from fastref.runtime.references cimport ReferenceCaller
from fastref.wire.frame cimport fr_frame


cdef class Job:
    cdef fr_frame head
    cdef Peer peer
    cdef list references
    cdef object body            # what the payload said, once it is decoded
    cdef bytes payload          # or the payload, when reading it runs code of the program: a copy of it,
    cdef Lease lease            # or the block in which `size` bytes at `start` are it
    cdef const char* start
    cdef uint64_t size
    cdef object failure         # or why it cannot be run
    cdef bint parked            # it waits for a value, or for the future that its function returned
    cdef uint64_t context       # the autograd context that it is run in; 0: none
    cdef bint alone             # nobody can reach what it answers: it need not be copied to be sent
    cdef bint answers_later     # its function returns a future of the answer

    cdef const char* undecoded(self, uint64_t* size) noexcept
    cdef void decoded(self) noexcept


cdef class Executor(ReferenceCaller):
    cdef public object around       # calls functions in our place, while a profile of all that is served is on; None
    cdef readonly uint64_t futures_awaited  # functions marked by async_execution that have returned, but not answered
    cdef set awaiting               # their jobs

    cdef Encoder execute(self, Job job, int* flags)
    cdef Encoder conclude(self, Job job, int* flags)
    cdef Encoder conclude_failed(self, Job job, object error, int* flags)
    cdef int _answer_when_done(self, Job job) except -1
    cdef bint _claim(self, Job job) except -1
    cdef int _answer_with(self, Job job, object future) except -1
    cdef int unpark(self, list jobs) except -1
    cdef void answered_to(self, uint32_t cpu) noexcept
    cdef object call_target(self, Job job)
    cdef int _enter_context(self, Job job) except -1
    cpdef object call_function(self, object func, object args, object kwargs)
    cdef bint _parks(self, OwnedValue owned, Job job) except -1
    cdef int _tell_maker(self, OwnedValue owned, uint32_t index, bint failed) except -1
    cdef int settle_value(self, OwnedValue owned, uint32_t index, object error) except -1
    cdef int answer(self, Job job, Encoder body, int flags) except -1
    cdef int fail_job(self, Job job, object error) except -1
    cdef int complete(self, Job job) except -1
