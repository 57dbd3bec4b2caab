"""The TCP channel: records over a connected stream, each once, however often the connection breaks.

A session is what the two ends remember beyond one connection. Records are numbered; the sender keeps each until the
receiver has said that it came. After a break the ends tell each other the last number that came, the sender sends again
what follows it, and the receiver drops what it has. So a record happens once while both processes live.

Sending is done by whoever sends, straight into the socket; what does not fit stays queued, and the loop goes on when
there is room. Receiving is done by the loop, on one thread for all channels of a worker, without the interpreter lock: a
record goes to the inbox, and the bytes behind it into memory of their own, from which tensors are made in place.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset, strerror

from fastref._core cimport (FR_FAILPOINT, failpoints, fr_failpoints_here, fr_load32_relaxed, fr_load32_acquire, fr_load_acquire,
                            fr_now_ns, fr_store32_relaxed, fr_store32_release, fr_store_release, pthread_mutex_destroy,
                            pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)
from fastref.channels.channel cimport FR_MAX_PEERS, SENT_CLOSED, SENT_FULL, SENT_TOO_LARGE, Bulk, Channel, Give, Inbox, iovec

from fastref.errors import ProtocolError, ResourceError, UsageError

__all__ = ["LARGEST_RECORD", "TcpChannel", "TcpLoop"]

fr_failpoints_here = failpoints()

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

cdef extern from "sys/eventfd.h" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned, int)

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
    ssize_t recv(int, void*, size_t, int)
    int shutdown(int, int)

cdef extern from "unistd.h" nogil:
    int close_fd "close"(int)
    ssize_t write(int, const void*, size_t)
    ssize_t read(int, void*, size_t)

cdef enum:
    LARGEST = 65536             # bytes of a record without its bulk
    BUFFER = 262144             # bytes read at once; at least one record with its head
    READS = 16                  # of that size, before another channel has its turn
    BULK_AHEAD = 4096           # bytes read at once behind a record with a bulk: another such one may follow
    PIECES = 128                # in one system call
    EVENTS = 64
    SIGNAL_NONE = 0
    SIGNAL_LEAVING = 1          # nothing follows: the process leaves
    CONFIRM_BYTES = 8388608     # received and not confirmed, when a confirmation is sent of its own
    CONFIRM_RECORDS = 256
    TICK_MS = 20                # while confirmations are owed
    TICK_NS = 10000000
    IDLE_TICK_MS = 500
    MS_NS = 1000000

LARGEST_RECORD = LARGEST

cdef uint64_t MAGIC = <uint64_t>0xFA << 56
cdef uint64_t SIZE_MASK = (<uint64_t>1 << 56) - 1

ROOM_BYTES = 64 << 20
cdef int64_t NEVER_NS = <int64_t>1 << 62


cdef class TcpChannel(Channel):
    """Records to and from one peer over a stream, a TCP connection or one end of a socket pair.

    Parameters
    ----------
    loop : TcpLoop
        Reads it.
    source : int
        Which source of the loop's inbox the peer is.
    room_bytes : int
        What may wait to be sent or confirmed. One record more is taken, however large.
    silence_s : float
        After how long without a sign of life the peer takes this end for broken. 0: never.
    """

    def __cinit__(self, loop: TcpLoop, source: int, room_bytes: int = ROOM_BYTES, silence_s: float = 0.0):
        self.room_bytes = room_bytes
        self.quiet_ns = min(loop.silence_ns or NEVER_NS, <int64_t>(silence_s * 1e9) or NEVER_NS) // 3
        self.loop, self.inbox, self.source = loop, loop.inbox, source
        self.largest, self.borrowing = LARGEST, True
        self.fd = -1
        self.broken = 1
        self.reason = "it is not connected yet"
        pthread_mutex_init(&self.lock, NULL)
        self.buffer, self.ahead = <char*>malloc(BUFFER), BUFFER
        if self.buffer == NULL:
            raise MemoryError()
        loop.inbox.add_queue(source)  # checks the number
        loop._kept.append(self)
        loop.channels[source] = <void*>self

    def __dealloc__(self):
        while self.first != NULL:
            self._drop_first()
        self._forget_partial()
        free(self.buffer)
        if self.fd >= 0:
            close_fd(self.fd)
        pthread_mutex_destroy(&self.lock)

    # ---- sending; any thread

    cdef int64_t try_send(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size) noexcept nogil:
        return self.try_send_bulk(head, head_size, body, body_size, NULL)

    cdef int64_t try_send_bulk(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                               Bulk* bulk) noexcept nogil:
        cdef int64_t position
        if head_size + body_size > LARGEST:
            return SENT_TOO_LARGE
        pthread_mutex_lock(&self.lock)
        if self.closed or self.leaving or self.peer_left:
            pthread_mutex_unlock(&self.lock)
            return SENT_CLOSED
        if self.kept >= self.room_bytes:
            pthread_mutex_unlock(&self.lock)
            return SENT_FULL
        position = self._queue(head, head_size, body, body_size, bulk)
        if position > 0 and not self.wants_room:
            self._flush()
        pthread_mutex_unlock(&self.lock)
        return position

    cdef int64_t _queue(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                        Bulk* bulk) noexcept nogil:
        cdef uint64_t size = head_size + body_size
        cdef Outgoing* record = <Outgoing*>malloc(sizeof(Outgoing) + size)
        if record == NULL:
            return SENT_FULL
        memset(record, 0, sizeof(Outgoing))
        record.size = size
        if bulk != NULL:
            record.bulk = bulk[0]
            if bulk.start == NULL and not self._borrow(record):
                free(record)
                return SENT_FULL
            bulk.start = NULL
        self.number += 1
        record.head.number, record.head.record = self.number, size
        record.head.size = MAGIC | (size + record.bulk.size)
        memcpy(record.data, head, head_size)
        if body_size:
            memcpy(record.data + head_size, body, body_size)
        if self.last == NULL:
            self.first = record
        else:
            self.last.after = record
        self.last = record
        if self.current == NULL:
            self.current, self.done = record, 0
        self.kept += sizeof(Outgoing) + size + record.bulk.size
        self.sent += 1
        return self.number

    cdef void _flush(self) noexcept nogil:
        """Send what is queued, as far as there is room. Under the lock."""
        cdef iovec[PIECES] pieces
        cdef msghdr message
        cdef Outgoing* record
        cdef uint64_t skip, left
        cdef ssize_t sent
        cdef size_t count
        while self.current != NULL and not self.broken:
            count = 0
            record, skip = self.current, self.done
            while record != NULL and count < PIECES:
                if not skip or record != self.current:
                    self._fill_head(&record.head)
                count = _add_pieces(record, skip, pieces, count)
                record, skip = record.after, 0
            memset(&message, 0, sizeof(message))
            message.msg_iov, message.msg_iovlen = pieces, count
            sent = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                if errno == EINTR:
                    continue
                # Full: the loop hears of room. Broken: the loop hears of that too, and says so.
                self._want_room(True)
                return
            self.bytes_sent += sent
            self.spoke_ns = fr_now_ns()
            left = sent
            while left:
                skip = sizeof(Head) + self.current.size + self.current.bulk.size - self.done
                if left < skip:
                    self.done += left
                    break
                left -= skip
                self.current, self.done = self.current.after, 0
        if self.leaving and not self.left and not self.broken:
            if self._speak(SIGNAL_LEAVING):
                self.left = True
                shutdown(self.fd, SHUT_WR)
            else:
                self._want_room(True)

    cdef void _want_room(self, bint wanted) noexcept nogil:
        """Have the loop go on when the socket has room, or not any more. Under the lock."""
        cdef epoll_event event
        if self.wants_room != wanted and not self.broken:
            self.wants_room = wanted
            event.events, event.data.ptr = EVENTS_OF | (EPOLLOUT if wanted else 0), <void*>self
            epoll_ctl(self.loop.fd, EPOLL_CTL_MOD, self.fd, &event)

    cdef void _fill_head(self, Head* head) noexcept nogil:
        """Confirm what has come, as of now."""
        self.owed_bytes = 0
        head.received = self.told_received = self.received
        # What the inbox has is counted as received a moment later.
        head.acquired = self.told_acquired = min(self.inbox.queue_position(self.source, True), head.received)

    cdef bint _speak(self, uint32_t signal) noexcept nogil:
        """Send a head of its own, between two records; under the lock. Without room there is traffic, which says it too."""
        cdef Head head
        cdef iovec piece
        cdef msghdr message
        cdef ssize_t sent
        if self.broken or self.wants_room or self.done or self.left or self.fd < 0:
            return False
        memset(&head, 0, sizeof(head))
        head.size, head.signal = MAGIC, signal
        self._fill_head(&head)
        piece.iov_base, piece.iov_len = &head, sizeof(head)
        memset(&message, 0, sizeof(message))
        message.msg_iov, message.msg_iovlen = &piece, 1
        sent = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if 0 < sent < <ssize_t>sizeof(head):  # half of it fitted: the connection is of no use any more
            shutdown(self.fd, SHUT_RDWR)
        elif sent > 0:
            self.spoke_ns = fr_now_ns()
        return sent > 0

    cdef bint _confirmed(self, uint64_t received) noexcept nogil:
        """The peer has all records up to a number; False when that cannot be. Under the lock."""
        if received >= (self.current.head.number if self.current != NULL else self.number + 1):
            return False
        while self.first != NULL and self.first != self.current and self.first.head.number <= received:
            self._drop_first()
        return True

    cdef void _drop_first(self) noexcept nogil:
        cdef Outgoing* record = self.first
        self.first = record.after
        if self.first == NULL:
            self.last = NULL
        if self.current == record:
            self.current, self.done = record.after, 0
        self.kept -= sizeof(Outgoing) + record.size + record.bulk.size
        if record.bulk.start != NULL:
            record.bulk.give(record.bulk.start, record.bulk.size)
        elif record == self.borrowed:
            self.borrowed = record.next_borrowed
            free(record.bulk.pieces)
        free(record)

    # ---- bytes that are lent; they are written by nobody meanwhile, or whoever writes them may be heard

    cdef bint _borrow(self, Outgoing* record) noexcept nogil:
        """Note where the bytes behind a new record lie."""
        cdef size_t size = record.bulk.piece_count * sizeof(iovec)
        cdef iovec* pieces = <iovec*>malloc(size)
        cdef Outgoing** at = &self.borrowed
        if pieces == NULL:
            return False
        memcpy(pieces, record.bulk.pieces, size)
        record.bulk.pieces = pieces
        while at[0] != NULL:
            at = &at[0].next_borrowed
        at[0] = record
        return True

    cdef Outgoing** _borrowed_at(self, int64_t position) noexcept nogil:
        cdef Outgoing** at = &self.borrowed
        while at[0] != NULL and at[0].head.number != <uint64_t>position:
            at = &at[0].next_borrowed
        return at

    cdef bint borrows(self, int64_t position) noexcept nogil:
        cdef bint found
        pthread_mutex_lock(&self.lock)
        found = self._borrowed_at(position)[0] != NULL
        pthread_mutex_unlock(&self.lock)
        return found

    cdef void give_back(self, int64_t position, Bulk* instead) noexcept nogil:
        """Read the bytes of a record from ``instead``, which is taken over, if they are still needed."""
        cdef Outgoing** at
        cdef Outgoing* record
        pthread_mutex_lock(&self.lock)
        at = self._borrowed_at(position)
        record = at[0]
        if record != NULL:
            at[0] = record.next_borrowed
            free(record.bulk.pieces)
            record.bulk = instead[0]
            instead.start = NULL
        pthread_mutex_unlock(&self.lock)

    cdef uint64_t acquired(self) noexcept nogil:
        return fr_load_acquire(&self.acquired_there)

    cdef uint64_t consumed(self) noexcept nogil:
        return fr_load_acquire(&self.acquired_there)

    cdef void close(self) noexcept nogil:
        """Send no more, and hang up: what the peer has not read may be lost."""
        pthread_mutex_lock(&self.lock)
        self.closed = True
        if self.fd >= 0:
            shutdown(self.fd, SHUT_RDWR)
        pthread_mutex_unlock(&self.lock)

    cdef void _end(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.closed, self.broken = True, 1
        if self.fd >= 0:
            shutdown(self.fd, SHUT_RDWR)  # a forked child may have it too
            close_fd(self.fd)
            self.fd = -1
        pthread_mutex_unlock(&self.lock)

    def hang_up(self) -> None:
        """End the present connection; the loop finds it broken, and ``attach`` goes on over another."""
        pthread_mutex_lock(&self.lock)
        if self.fd >= 0 and not self.broken:
            shutdown(self.fd, SHUT_RDWR)
        pthread_mutex_unlock(&self.lock)

    def disown(self) -> None:
        """In a forked child: have nothing to do with the parent's connection, which would not end with it otherwise."""
        if self.fd >= 0:
            close_fd(self.fd)
        self.fd = -1

    def leave(self) -> None:
        """Say, behind all that is queued, that nothing follows."""
        pthread_mutex_lock(&self.lock)
        self.leaving = True
        if not self.wants_room:
            self._flush()
        pthread_mutex_unlock(&self.lock)

    @property
    def is_broken(self) -> bool:
        """Whether it is not connected: nothing is sent or read until ``attach``."""
        return fr_load32_acquire(&self.broken) != 0

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits to be sent or confirmed."""
        return self.first == NULL

    @property
    def heard_s(self) -> float:
        """When something came last, on the clock of ``time.monotonic``."""
        return self.heard_ns / 1e9

    def attach(self, fd: int, received: int = 0) -> None:
        """Go on over a connected socket, which is this channel's from here on, unless this raises.

        Parameters
        ----------
        fd : int
            Non-blocking.
        received : int
            The last of our records that the peer has: what follows is sent (again).

        Raises
        ------
        ProtocolError
            When the peer claims records that were never sent, or that it confirmed before.
        UsageError
            When the channel is connected, or closed.
        """
        cdef epoll_event event
        cdef int wrong = 0, again
        cdef uint64_t kept_from
        pthread_mutex_lock(&self.lock)
        kept_from = self.first.head.number if self.first != NULL else self.number + 1
        if self.closed or not self.broken:
            wrong = 1
        elif <uint64_t>received > self.number or <uint64_t>received < kept_from - 1:
            wrong = 2
        else:
            self._forget_partial()
            self.current, self.done = NULL, 0
            while self.first != NULL and self.first.head.number <= <uint64_t>received:
                self._drop_first()
            self.current = self.first
            # A farewell is said again, and what was confirmed too: who knows what of it has come.
            self.wants_room = self.left = self.more = self.ending = False
            self.told_received = self.told_acquired = 0
            self.heard_ns = self.spoke_ns = fr_now_ns()
            again, self.fd = self.fd, fd
            # SYNC: the loop's thread has all of the above. Before it can hear of the socket: an edge is told but once.
            fr_store32_release(&self.broken, 0)
            event.events, event.data.ptr = EVENTS_OF, <void*>self
            if epoll_ctl(self.loop.fd, EPOLL_CTL_ADD, fd, &event):
                wrong = 3
                fr_store32_release(&self.broken, 1)
                self.fd = again
            else:
                self.reason = None
                if again >= 0:
                    close_fd(again)
                    self.resumed += 1
                self._flush()
        pthread_mutex_unlock(&self.lock)
        if wrong == 1:
            raise UsageError("the channel is connected, or closed")
        if wrong == 2:
            raise ProtocolError(f"the peer has {received} of {self.number} records")
        if wrong == 3:
            raise ResourceError(f"no more sockets can be watched: {strerror(errno).decode()}")

    # ---- receiving; the loop's thread

    cdef void _forget_partial(self) noexcept nogil:
        if self.bulk.start != NULL:
            self.loop.give(self.bulk.start, self.bulk.size)
            self.bulk.start = NULL
        self.start = self.end = self.filled = 0

    cdef const char* _read(self) noexcept nogil:
        """Read what is there. Returns what ended the connection; NULL: nothing has.

        ``spoilt``: it was what came, not the connection; another one would bring the same.
        """
        cdef ssize_t got, asked
        cdef int tries
        cdef const char* wrong
        cdef bint whole
        self.more = False
        for tries in range(READS):
            if self.bulk.start != NULL:
                whole = False
                asked = self.bulk.size - self.filled
                got = recv(self.fd, self.bulk.start + self.filled, asked, MSG_DONTWAIT)
            else:
                if self.start:
                    memmove(self.buffer, self.buffer + self.start, self.end - self.start)
                    self.start, self.end = 0, self.end - self.start
                whole = True
                asked = min(self.ahead, BUFFER - self.end)
                got = recv(self.fd, self.buffer + self.end, asked, MSG_DONTWAIT)
            if got == 0:
                return b"the connection was closed"
            if got < 0:
                if errno == EINTR:
                    continue
                if errno == EAGAIN:
                    return NULL
                return strerror(errno)
            self.bytes_received += got
            self.heard_ns = fr_now_ns()
            if not whole:
                self.filled += got
                if self.filled == self.bulk.size and not self._deliver(NULL, &self.bulk):
                    self.spoilt = True
                    return b"out of memory"
            else:
                self.end += got
                wrong = self._parse()
                if wrong != NULL:
                    self.spoilt = True
                    return wrong
            if got < asked and not self.ending:
                return NULL  # all that was there: what follows is another edge
        self.more = True
        return NULL

    cdef const char* _parse(self) noexcept nogil:
        """Deal with all whole records that were read. Returns what is wrong with them; NULL: nothing."""
        cdef Head* head = &self.head
        cdef uint64_t size, there, bulk
        cdef Bulk none
        cdef bint known
        while self.bulk.start == NULL and self.end - self.start >= sizeof(Head):
            memcpy(head, self.buffer + self.start, sizeof(Head))
            size = head.size & SIZE_MASK
            if head.size & ~SIZE_MASK != MAGIC or head.record > LARGEST or head.record > size or head.signal > SIGNAL_LEAVING:
                return b"it sent what is no frame"
            if not head.number and size:
                return b"it sent a record without a number"
            if self.end - self.start < sizeof(Head) + head.record:
                return NULL
            if head.number > self.received + 1:
                return b"it left out records"
            if head.received != self.confirmed_there:  # who sends much has the lock for long
                pthread_mutex_lock(&self.lock)
                known = self._confirmed(head.received)
                pthread_mutex_unlock(&self.lock)
                if not known:
                    return b"it confirmed what was never sent"
                self.confirmed_there = head.received
            if head.acquired > head.received:
                return b"it confirmed what was never sent"
            if head.acquired > self.acquired_there:
                fr_store_release(&self.acquired_there, head.acquired)  # SYNC: its pins are looked at after this
            if head.signal == SIGNAL_LEAVING:
                self.peer_left = True
            bulk = size - head.record
            if not bulk:
                if head.number > self.received:
                    none.start = NULL
                    if not self._deliver(self.buffer + self.start + sizeof(Head), &none):
                        return b"out of memory"
                self.start += sizeof(Head) + head.record
                continue
            # The claim of a size is only a number until its bytes come: memory is touched as they do.
            self.bulk.start = <char*>self.loop.take(bulk)
            if self.bulk.start == NULL:
                return b"it sent more at once than there is memory for"
            self.bulk.size, self.bulk.give, self.filled = bulk, self.loop.give, 0
            # The record stays in the buffer, in front, until its bulk is whole.
            there = self.end - self.start - sizeof(Head) - head.record
            there = min(there, bulk)
            memcpy(self.bulk.start, self.buffer + self.start + sizeof(Head) + head.record, there)
            memmove(self.buffer + self.start + sizeof(Head) + head.record,
                    self.buffer + self.start + sizeof(Head) + head.record + there,
                    self.end - self.start - sizeof(Head) - head.record - there)
            self.end -= there
            self.filled = there
            if there == bulk and not self._deliver(NULL, &self.bulk):
                return b"out of memory"
        return NULL

    cdef bint _deliver(self, const char* record, Bulk* bulk) noexcept nogil:
        """Put a record into the inbox. With its bulk it lies in front of the buffer; one that came before is dropped."""
        cdef bint stored = True
        cdef bint with_bulk = record == NULL
        self.ahead = BULK_AHEAD if with_bulk else BUFFER
        if with_bulk:
            record = self.buffer + self.start + sizeof(Head)
        if self.head.number > self.received:
            FR_FAILPOINT("tcp.received")
            stored = self.inbox.enqueue(self.source, record, self.head.record, NULL, 0, self.head.number,
                                        bulk if bulk.start != NULL else NULL)
            if stored:
                self.received += 1
                self.owed_bytes += bulk.size if bulk.start != NULL else 0
                bulk.start = NULL
        elif bulk.start != NULL:
            bulk.give(bulk.start, bulk.size)
            bulk.start = NULL
        if with_bulk:
            self.start += sizeof(Head) + self.head.record
        return stored

    cdef bint _owes(self) noexcept nogil:
        """Whether the peer waits for a confirmation."""
        return self.told_received < self.received or self.told_acquired < self.inbox.queue_position(self.source, True)

    cdef void _speak_if(self, int64_t quiet_ns, int64_t now) noexcept nogil:
        """Confirm what is owed; give a sign of life if nothing was sent for so long."""
        if self._owes() or quiet_ns and now - self.spoke_ns > quiet_ns:
            pthread_mutex_lock(&self.lock)
            self._speak(SIGNAL_NONE)
            pthread_mutex_unlock(&self.lock)

    def send_with(self, data: bytes, bulk: bytes) -> int | None:
        """Publish one record with bytes behind it, as ``send``. For tests."""
        cdef const char* start = data
        cdef const char* behind = bulk
        cdef Bulk one
        cdef int64_t position
        one.start, one.size, one.give = <char*>malloc(len(bulk)), len(bulk), _give
        memcpy(one.start, behind, len(bulk))
        position = self.try_send_bulk(start, len(data), NULL, 0, &one)
        if one.start != NULL:
            free(one.start)
        return position if position > 0 else None

    def snapshot(self) -> dict:
        """Plain figures."""
        cdef Outgoing* record
        borrowed = 0
        pthread_mutex_lock(&self.lock)
        record = self.borrowed
        while record != NULL:
            borrowed, record = borrowed + 1, record.next_borrowed
        pthread_mutex_unlock(&self.lock)
        return dict(connected=not self.broken, unconfirmed_bytes=self.kept, borrowed=borrowed, sent=self.sent, received=self.received,
                    bytes_sent=self.bytes_sent, bytes_received=self.bytes_received, resumed=self.resumed)


cdef class TcpLoop:
    """Reads all TCP channels of a worker, on the one thread that calls ``run``.

    Parameters
    ----------
    inbox : Inbox
        Where records go.
    on_break : callable
        ``on_break(source, reason)`` when a connection ends; the channel waits for ``attach``.
    silence_s : float
        A peer from which nothing comes for so long, not even a sign of life, counts as broken. 0: never.
    """

    def __cinit__(self, inbox: Inbox, on_break, silence_s: float = 15.0):
        cdef epoll_event event
        self.fd = self.waker = -1
        self.inbox, self.on_break = inbox, on_break
        self.silence_ns = <int64_t>(silence_s * 1e9)
        self.channels, self._kept = <void**>calloc(FR_MAX_PEERS, sizeof(void*)), []
        self.take, self.give = _take, _give
        if self.channels == NULL:
            raise MemoryError()
        self.fd = epoll_create1(EPOLL_CLOEXEC)
        self.waker = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        event.events, event.data.ptr = EPOLLIN, NULL
        if self.fd < 0 or self.waker < 0 or epoll_ctl(self.fd, EPOLL_CTL_ADD, self.waker, &event):
            raise ResourceError(f"no event loop: {strerror(errno).decode()}")

    def __dealloc__(self):
        if self.fd >= 0:
            close_fd(self.fd)
        if self.waker >= 0:
            close_fd(self.waker)
        free(self.channels)

    def stop(self) -> None:
        """Have ``run`` return."""
        fr_store32_relaxed(&self.stopping, 1)
        self.wake()

    def wake(self) -> None:
        """Have the loop look round."""
        cdef uint64_t one = 1
        write(self.waker, &one, sizeof(one))

    def close(self) -> None:
        """End all channels, once ``run`` has returned; idempotent."""
        memset(self.channels, 0, FR_MAX_PEERS * sizeof(void*))
        for channel in self._kept:
            (<TcpChannel>channel)._end()
        self._kept.clear()
        self.on_break = None

    def run(self) -> None:
        """Read until ``stop``."""
        cdef int idle_ms = IDLE_TICK_MS
        if self.silence_ns:  # signs of life are due three times in it
            idle_ms = max(1, min(IDLE_TICK_MS, self.silence_ns // 6000000))
        with nogil:
            while not fr_load32_relaxed(&self.stopping):
                self._look(idle_ms)

    def step(self, longest_ms: int = 0) -> None:
        """Deal with what is there, and confirm it; wait for it up to ``longest_ms``. For tests."""
        cdef int timeout_ms = longest_ms
        self.looked_ns = 0
        with nogil:
            self._look(timeout_ms)

    cdef int _look(self, int longest_ms) except -1 nogil:
        cdef epoll_event[EVENTS] events
        cdef int count, i
        cdef uint64_t dropped
        cdef int64_t now
        cdef void* channel
        for i in range(FR_MAX_PEERS):
            channel = self.channels[i]
            if channel != NULL and not fr_load32_acquire(&(<TcpChannel>channel).broken):
                if (<TcpChannel>channel).more:
                    longest_ms = 0
                elif (<TcpChannel>channel)._owes():
                    longest_ms = min(longest_ms, TICK_MS)
                elif (<TcpChannel>channel).quiet_ns // 2 < longest_ms * MS_NS:
                    longest_ms = max((<TcpChannel>channel).quiet_ns // 2 // MS_NS, 1)
        count = epoll_wait(self.fd, events, EVENTS, longest_ms)
        now = fr_now_ns()
        if self.silence_ns and self.awake_ns and now - self.awake_ns > self.silence_ns // 2:
            for i in range(FR_MAX_PEERS):  # this process was stopped: the silence was its own
                if self.channels[i] != NULL:
                    (<TcpChannel>self.channels[i]).heard_ns = now
        self.awake_ns = now
        for i in range(count):
            channel = events[i].data.ptr
            if channel == NULL:
                read(self.waker, &dropped, sizeof(dropped))
            else:
                self._serve(channel, events[i].events, now)
        for i in range(FR_MAX_PEERS):
            channel = self.channels[i]
            if channel == NULL or fr_load32_acquire(&(<TcpChannel>channel).broken):
                continue
            if (<TcpChannel>channel).more:
                self._serve(channel, EPOLLIN, now)
            elif self.silence_ns and now - (<TcpChannel>channel).heard_ns > self.silence_ns:
                # Who was stopped, and is woken without an event, has not read what came meanwhile.
                if self._serve(channel, EPOLLIN, now) and now - (<TcpChannel>channel).heard_ns > self.silence_ns:
                    with gil:
                        self._break(<TcpChannel>channel, SILENT)
            elif now - self.looked_ns >= TICK_NS:
                (<TcpChannel>channel)._speak_if((<TcpChannel>channel).quiet_ns, now)
        if now - self.looked_ns >= TICK_NS:
            self.looked_ns = now
        return 0

    cdef bint _serve(self, void* channel, uint32_t what, int64_t now) except -1 nogil:
        """Write and read what one channel can."""
        cdef const char* wrong
        if (<TcpChannel>channel).broken:
            return False
        if what & EPOLLOUT:
            pthread_mutex_lock(&(<TcpChannel>channel).lock)
            (<TcpChannel>channel)._want_room(False)
            (<TcpChannel>channel)._flush()
            pthread_mutex_unlock(&(<TcpChannel>channel).lock)
        if what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):  # the end is behind what is there: there will be no other edge
            (<TcpChannel>channel).ending = True
        wrong = (<TcpChannel>channel)._read()
        if wrong != NULL:
            if (<TcpChannel>channel).peer_left:  # it waits for that
                (<TcpChannel>channel)._speak_if(0, now)
            with gil:
                self._break(<TcpChannel>channel, wrong)
            return False
        if (<TcpChannel>channel).received - (<TcpChannel>channel).told_received >= CONFIRM_RECORDS \
                or (<TcpChannel>channel).owed_bytes >= CONFIRM_BYTES:
            (<TcpChannel>channel)._speak_if(0, now)
        return True

    cdef int _break(self, TcpChannel channel, const char* reason) except -1:
        """A connection is over."""
        channel.silent = reason == SILENT
        if channel.silent:
            channel.reason = f"nothing has come from it for {self.silence_ns / 1e9:g} s"
        else:
            channel.reason = reason.decode()
        pthread_mutex_lock(&channel.lock)
        fr_store32_release(&channel.broken, 1)
        epoll_ctl(self.fd, EPOLL_CTL_DEL, channel.fd, NULL)
        shutdown(channel.fd, SHUT_RDWR)
        pthread_mutex_unlock(&channel.lock)
        if self.on_break is not None:
            self.on_break(channel.source, channel.reason)
        return 0


cdef uint32_t EVENTS_OF = EPOLLIN | EPOLLRDHUP | EPOLLET
cdef const char* SILENT = b"silence"


cdef size_t _add_pieces(Outgoing* record, uint64_t skip, iovec* pieces, size_t count) noexcept nogil:
    """Add what follows ``skip`` bytes of a record to what is sent, as far as there is room; returns how many there are."""
    count = _add_piece(<char*>&record.head, sizeof(Head) + record.size, &skip, pieces, count)
    if record.bulk.start != NULL:
        return _add_piece(record.bulk.start, record.bulk.size, &skip, pieces, count)
    for i in range(record.bulk.piece_count):
        count = _add_piece(<char*>record.bulk.pieces[i].iov_base, record.bulk.pieces[i].iov_len, &skip, pieces, count)
    return count


cdef inline size_t _add_piece(char* start, uint64_t size, uint64_t* skip, iovec* pieces, size_t count) noexcept nogil:
    if skip[0] >= size:
        skip[0] -= size
    elif count < PIECES:
        pieces[count].iov_base, pieces[count].iov_len = start + skip[0], size - skip[0]
        count, skip[0] = count + 1, 0
    return count


cdef void* _take(uint64_t size) noexcept nogil:
    return malloc(size)


cdef void _give(void* start, uint64_t size) noexcept nogil:
    free(start)
