"""The TCP channel, and the loop that reads all of a worker's."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref.channels.channel cimport Bulk, Give, Inbox
from fastref.channels.sending cimport Head, StreamSender

ctypedef void* (*Take)(uint64_t size) noexcept nogil


cdef class TcpChannel(StreamSender):
    cdef TcpLoop loop
    cdef uint64_t confirmed_there       # of our records
    cdef readonly bint spoilt   # by what came over it
    cdef readonly bint silent   # that was what broke it
    cdef readonly str reason
    cdef int64_t heard_ns
    cdef int64_t quiet_ns       # after so long without a record a sign of life is sent
    cdef readonly uint64_t bytes_received, resumed
    # What follows belongs to the thread that reads.
    cdef bint more              # than was read at once
    cdef bint ending            # behind what is there
    cdef char* buffer
    cdef uint64_t ahead         # most bytes to read at once
    cdef uint64_t start, end    # of what was read and not dealt with
    cdef Head head              # of the record that is being read
    cdef Bulk bulk              # that is being filled
    cdef uint64_t filled        # bytes of it, and of the checksum behind it
    cdef uint64_t sum_size      # bytes of that; 0: there is none
    cdef uint32_t sum_said, sum # what it says, and what has come
    cdef readonly uint64_t damaged      # how often something came damaged
    cdef uint64_t damaged_behind        # behind which record that was
    cdef uint32_t damaged_again         # how often in a row

    cdef const char* _read(self) noexcept nogil
    cdef ssize_t _read_bulk(self, ssize_t* asked) noexcept nogil
    cdef const char* _came(self, uint64_t count) noexcept nogil
    cdef const char* _parse(self) noexcept nogil
    cdef const char* _damaged(self) noexcept nogil
    cdef bint _deliver(self, const char* record, Bulk* bulk) noexcept nogil
    cdef bint _owes(self) noexcept nogil
    cdef void _speak_if(self, int64_t quiet_ns, int64_t now) noexcept nogil
    cdef void _forget_partial(self) noexcept nogil
    cdef void _end(self) noexcept nogil


cdef class TcpLoop:
    cdef readonly int fd, waker
    cdef Inbox inbox
    cdef Take take
    cdef Give give
    cdef int64_t silence_ns
    cdef uint32_t stopping
    cdef int64_t looked_ns      # when confirmations and signs of life were last thought of
    cdef int64_t awake_ns       # when it last looked at all
    cdef void** channels        # by source; `_kept` keeps them
    cdef list _kept
    cdef object on_break

    cdef int _look(self, int longest_ms) except -1 nogil
    cdef bint _serve(self, void* channel, uint32_t what, int64_t now) except -1 nogil
    cdef int _break(self, TcpChannel channel, const char* reason) except -1
