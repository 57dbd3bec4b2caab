"""The TCP channel, and the loop that reads all of a worker's."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref._core cimport pthread_mutex_t
from fastref.channels.channel cimport Bulk, Channel, Give, Inbox

ctypedef void* (*Take)(uint64_t size) noexcept nogil


cdef struct Head:               # in front of each record on the stream; little-endian
    uint64_t size               # bytes that follow it, behind the magic byte: the record and its bulk
    uint64_t number             # 1, 2, 3, ... of the records of this direction; 0: nothing follows
    uint64_t received           # the last number of the other direction that has come
    uint64_t acquired           # and the last one whose references have been taken
    uint32_t record             # bytes of the record; what is left of `size` is its bulk
    uint32_t signal             # SIGNAL_*


cdef struct Outgoing:           # a record that the peer has not confirmed
    Outgoing* after
    Outgoing* next_borrowed
    uint64_t size               # bytes of `data`
    Bulk bulk
    Head head                   # followed by the record
    char data[8]


cdef class TcpChannel(Channel):
    cdef readonly int fd        # -1: not connected
    cdef readonly uint64_t room_bytes
    cdef readonly uint32_t source
    cdef Inbox inbox
    cdef TcpLoop loop
    cdef pthread_mutex_t lock   # of all that is about sending
    cdef Outgoing* first        # the oldest that is not confirmed
    cdef Outgoing* last
    cdef Outgoing* current      # the next to be sent, or partly sent
    cdef Outgoing* borrowed     # the oldest whose bulk lies where it was lent; in order
    cdef uint64_t done          # bytes of it that were sent
    cdef uint64_t number        # of the last record
    cdef uint64_t kept          # bytes of records that are not confirmed
    cdef uint64_t acquired_there
    cdef uint64_t confirmed_there       # of our records
    cdef uint64_t told_received, told_acquired  # what the peer was told last
    cdef uint64_t owed_bytes    # of bulk that came since
    cdef bint wants_room        # the socket was full: the loop goes on when there is room
    cdef readonly bint leaving  # say so when all is sent
    cdef bint left              # it has been said
    cdef readonly bint peer_left
    cdef uint32_t broken        # nothing can be sent or read until `attach`
    cdef readonly bint spoilt   # by what came over it
    cdef readonly bint silent   # that was what broke it
    cdef readonly str reason
    cdef int64_t heard_ns, spoke_ns
    cdef int64_t quiet_ns       # after so long without a record a sign of life is sent
    cdef readonly uint64_t sent, received, bytes_sent, bytes_received, resumed
    # What follows belongs to the thread that reads.
    cdef bint more              # than was read at once
    cdef bint ending            # behind what is there
    cdef char* buffer
    cdef uint64_t ahead         # most bytes to read at once
    cdef uint64_t start, end    # of what was read and not dealt with
    cdef Bulk bulk              # that is being filled
    cdef uint64_t filled
    cdef Head head              # of the record that it belongs to

    cdef int64_t _queue(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                        Bulk* bulk) noexcept nogil
    cdef void _flush(self) noexcept nogil
    cdef bint _borrow(self, Outgoing* record) noexcept nogil
    cdef Outgoing** _borrowed_at(self, int64_t position) noexcept nogil
    cdef void _want_room(self, bint wanted) noexcept nogil
    cdef void _fill_head(self, Head* head) noexcept nogil
    cdef bint _confirmed(self, uint64_t received) noexcept nogil
    cdef void _drop_first(self) noexcept nogil
    cdef const char* _read(self) noexcept nogil
    cdef const char* _parse(self) noexcept nogil
    cdef bint _deliver(self, const char* record, Bulk* bulk) noexcept nogil
    cdef bint _owes(self) noexcept nogil
    cdef void _speak_if(self, int64_t quiet_ns, int64_t now) noexcept nogil
    cdef bint _speak(self, uint32_t signal) noexcept nogil
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
