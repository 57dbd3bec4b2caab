"""The sending half of a channel over a stream, and what its frames look like."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref._core cimport pthread_mutex_t
from fastref.channels.channel cimport Bulk, Channel, Inbox, iovec

cdef extern from "fr_checksum.h" nogil:
    uint32_t fr_crc32c(uint32_t before, const void* data, size_t size)


cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        void* ptr
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLET, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event*)
    int epoll_wait(int, epoll_event*, int, int)


cdef extern from "sys/socket.h" nogil:
    struct msghdr:
        void* msg_name
        size_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RDWR, SHUT_WR
    ssize_t sendmsg(int, msghdr*, int)
    ssize_t recvmsg(int, msghdr*, int)
    ssize_t recv(int, void*, size_t, int)
    int shutdown(int, int)


cdef extern from *:
    """
    #define FR_FRAME_MAGIC ((uint64_t)0xFA << 56)
    #define FR_FRAME_SIZE (((uint64_t)1 << 56) - 1)
    #define FR_STREAM_EVENTS (EPOLLIN | EPOLLRDHUP | EPOLLET)
    """
    const uint64_t FR_FRAME_MAGIC, FR_FRAME_SIZE
    const uint32_t FR_STREAM_EVENTS


cdef enum:
    LARGEST = 65536             # bytes of a record without its bulk
    SUM_BYTES = 4               # of a checksum: CRC-32C
    SIGNAL_NONE = 0
    SIGNAL_LEAVING = 1          # nothing follows: the process leaves
    SIGNAL_SUMMED = 2           # behind the bulk comes its checksum
    SIGNAL_LARGEST = 3


cdef struct Head:               # in front of each record on the stream; little-endian
    uint64_t size               # bytes that follow it, behind the magic byte: the record, its bulk and the bulk's checksum
    uint64_t number             # 1, 2, 3, ... of the records of this direction; 0: nothing follows
    uint64_t received           # the last number of the other direction that has come
    uint64_t acquired           # and the last one whose references have been taken
    uint32_t record             # bytes of the record; what is left of `size` is its bulk
    uint32_t signal             # SIGNAL_*
    uint32_t record_sum         # of the record
    uint32_t sum                # of this head up to here


cdef struct Outgoing:           # a record that the peer has not confirmed
    Outgoing* after
    Outgoing* next_borrowed
    uint64_t size               # bytes of `data`
    Bulk bulk
    uint64_t summed             # bytes of the bulk
    uint32_t bulk_sum           # of these
    Head head                   # followed by the record
    char data[8]


cdef class StreamSender(Channel):
    cdef readonly int fd        # -1: not connected
    cdef int watcher            # the epoll that hears of room in it
    cdef readonly uint64_t room_bytes
    cdef readonly uint32_t source
    cdef Inbox inbox
    cdef pthread_mutex_t lock   # of all that is about sending
    cdef Outgoing* first        # the oldest that is not confirmed
    cdef Outgoing* last
    cdef Outgoing* current      # the next to be sent, or partly sent
    cdef Outgoing* borrowed     # the oldest whose bulk lies where it was lent; in order
    cdef uint64_t done          # bytes of it that were sent
    cdef uint64_t number        # of the last record
    cdef uint64_t kept          # bytes of records that are not confirmed
    cdef readonly bint sums     # what this end sends behind records
    cdef uint64_t acquired_there
    cdef uint64_t told_received, told_acquired  # what the peer was told last
    cdef uint64_t owed_bytes    # of bulk that came since
    cdef bint wants_room        # the socket was full: the loop goes on when there is room
    cdef readonly bint leaving  # say so when all is sent
    cdef bint left              # it has been said
    cdef readonly bint peer_left
    cdef uint32_t broken        # nothing can be sent or read until it is connected again
    cdef int64_t spoke_ns
    cdef readonly uint64_t sent, received, bytes_sent

    cdef int64_t _queue(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                        Bulk* bulk) noexcept nogil
    cdef void _flush(self) noexcept nogil
    cdef bint _borrow(self, Outgoing* record) noexcept nogil
    cdef Outgoing** _borrowed_at(self, int64_t position) noexcept nogil
    cdef void _copy_borrowed(self) noexcept nogil
    cdef void _want_room(self, bint wanted) noexcept nogil
    cdef void _begin(self, Outgoing* record) noexcept nogil
    cdef void _fill_head(self, Head* head) noexcept nogil
    cdef bint _confirmed(self, uint64_t received) noexcept nogil
    cdef void _drop_first(self) noexcept nogil
    cdef bint _speak(self, uint32_t signal) noexcept nogil
    cdef void _go_on(self, uint64_t received, bint sums, bint again) noexcept nogil
