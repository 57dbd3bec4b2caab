"""The TCP channel: records over a connected stream, each once, however often the connection breaks.

A session is what the two ends remember beyond one connection. Records are numbered; the sender keeps each until the
receiver has said that it came. After a break the ends tell each other the last number that came, the sender sends again
what follows it, and the receiver drops what it has. So a record happens once while both processes live.

Sending is in ``sending``. Receiving is done by the loop, on one thread for all channels of a worker, without the
interpreter lock: a record goes to the inbox, and the bytes behind it into memory of their own, from which tensors are made
in place. What was damaged on its way ends the connection, and is sent again over the next one; what is intact and makes
no sense ends the session.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset, strerror

from fastref._core cimport (FR_FAILPOINT, failpoints, fr_failpoints_here, fr_load32_relaxed, fr_load32_acquire, fr_now_ns,
                            fr_store32_relaxed, fr_store32_release, fr_store_release, pthread_mutex_lock,
                            pthread_mutex_unlock)
from fastref.channels.channel cimport FR_MAX_PEERS, Bulk, Give, Inbox, iovec
from fastref.channels.sending cimport (EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT,
                                       EPOLLRDHUP, FR_FRAME_MAGIC, FR_FRAME_SIZE, FR_STREAM_EVENTS, LARGEST, MSG_DONTWAIT,
                                       SHUT_RDWR, SIGNAL_LARGEST, SIGNAL_LEAVING, SIGNAL_NONE, SIGNAL_SUMMED, SUM_BYTES,
                                       Head, Outgoing, StreamSender, epoll_create1, epoll_ctl, epoll_event, epoll_wait,
                                       fr_crc32c, msghdr, recv, recvmsg, shutdown)

from fastref.errors import ProtocolError, ResourceError, UsageError

__all__ = ["LARGEST_RECORD", "TcpChannel", "TcpLoop"]

fr_failpoints_here = failpoints()

cdef extern from "sys/eventfd.h" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned, int)

cdef extern from "unistd.h" nogil:
    int close_fd "close"(int)
    ssize_t write(int, const void*, size_t)
    ssize_t read(int, void*, size_t)

cdef enum:
    BUFFER = 262144             # bytes read at once; at least one record with its head
    READS = 16                  # of that size, before another channel has its turn
    SUM_AT_ONCE = 524288        # bytes that are read at once, and summed while they are in the cache
    MOST_DAMAGED = 8            # times that the same record may come damaged
    BULK_AHEAD = 4096           # bytes read at once behind a record with a bulk: another such one may follow
    EVENTS = 64
    CONFIRM_BYTES = 8388608     # received and not confirmed, when a confirmation is sent of its own
    CONFIRM_RECORDS = 256
    TICK_MS = 20                # while confirmations are owed
    TICK_NS = 10000000
    IDLE_TICK_MS = 500
    MS_NS = 1000000

LARGEST_RECORD = LARGEST

ROOM_BYTES = 64 << 20
cdef int64_t NEVER_NS = <int64_t>1 << 62


cdef class TcpChannel(StreamSender):
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
        self.watcher = loop.fd
        self.reason = "it is not connected yet"
        self.buffer, self.ahead = <char*>malloc(BUFFER), BUFFER
        if self.buffer == NULL:
            raise MemoryError()
        loop.inbox.add_queue(source)  # checks the number
        loop._kept.append(self)
        loop.channels[source] = <void*>self

    def __dealloc__(self):
        self._forget_partial()
        free(self.buffer)
        if self.fd >= 0:
            close_fd(self.fd)

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

    def attach(self, fd: int, received: int = 0, sums: bool = False) -> None:
        """Go on over a connected socket, which is this channel's from here on, unless this raises.

        Parameters
        ----------
        fd : int
            Non-blocking.
        received : int
            The last of our records that the peer has: what follows is sent (again).
        sums : bool
            Whether checksums are sent of what lies behind records.

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
            self.more = self.ending = False
            self._go_on(received, sums, self.fd >= 0)
            self.heard_ns = fr_now_ns()
            again, self.fd = self.fd, fd
            # SYNC: the loop's thread has all of the above. Before it can hear of the socket: an edge is told but once.
            fr_store32_release(&self.broken, 0)
            event.events, event.data.ptr = FR_STREAM_EVENTS, <void*>self
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
                got = self._read_bulk(&asked)
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
                wrong = self._came(got)
            else:
                self.end += got
                wrong = self._parse()
            if wrong != NULL:
                self.spoilt = wrong != DAMAGED
                return wrong
            if got < asked and not self.ending:
                return NULL  # all that was there: what follows is another edge
        self.more = True
        return NULL

    cdef ssize_t _read_bulk(self, ssize_t* asked) noexcept nogil:
        """Read into the memory for a bulk, and what lies behind it: its checksum."""
        cdef iovec[2] pieces
        cdef msghdr message
        cdef uint64_t left = self.bulk.size - min(self.filled, self.bulk.size)
        cdef uint64_t left_of_sum = self.bulk.size + self.sum_size - self.filled - left
        if not self.sum_size:
            asked[0] = left
            return recv(self.fd, self.bulk.start + self.filled, left, MSG_DONTWAIT)
        if left > SUM_AT_ONCE:
            left, left_of_sum = SUM_AT_ONCE, 0
        memset(&message, 0, sizeof(message))
        pieces[0].iov_base, pieces[0].iov_len = self.bulk.start + self.filled, left
        pieces[1].iov_base, pieces[1].iov_len = <char*>&self.sum_said + (self.sum_size - left_of_sum), left_of_sum
        message.msg_iov, message.msg_iovlen = pieces, 2
        asked[0] = left + left_of_sum
        return recvmsg(self.fd, &message, MSG_DONTWAIT)

    cdef const char* _came(self, uint64_t count) noexcept nogil:
        """So many more bytes of a bulk have come, or of its checksum. Returns what is wrong with it; NULL: nothing."""
        cdef uint64_t before = self.filled
        self.filled += count
        if self.sum_size and before < self.bulk.size:
            self.sum = fr_crc32c(self.sum, self.bulk.start + before, min(self.filled, self.bulk.size) - before)
        if self.filled < self.bulk.size + self.sum_size:
            return NULL
        if self.sum_size and self.sum != self.sum_said:
            return self._damaged()
        if not self._deliver(NULL, &self.bulk):
            return NO_MEMORY
        return NULL

    cdef const char* _damaged(self) noexcept nogil:
        """What has come is not what was sent. Over another connection it will come again."""
        self.damaged_again = self.damaged_again + 1 if self.received == self.damaged_behind else 1
        self.damaged_behind = self.received
        self.damaged += 1
        if self.damaged_again < MOST_DAMAGED:
            return DAMAGED
        return b"what it sends comes damaged, again and again"

    cdef const char* _parse(self) noexcept nogil:
        """Deal with all whole records that were read. Returns what is wrong with them; NULL: nothing."""
        cdef Head* head = &self.head
        cdef const char* record
        cdef const char* wrong
        cdef uint64_t size, there, bulk
        cdef Bulk none
        cdef bint known
        while self.bulk.start == NULL and self.end - self.start >= sizeof(Head):
            memcpy(head, self.buffer + self.start, sizeof(Head))
            if head.sum != fr_crc32c(0, head, sizeof(Head) - SUM_BYTES):
                return self._damaged()
            size = head.size & FR_FRAME_SIZE
            if head.size & ~FR_FRAME_SIZE != FR_FRAME_MAGIC or head.record > LARGEST or head.record > size \
                    or head.signal > SIGNAL_LARGEST:
                return b"it sent what is no frame"
            if not head.number and size:
                return b"it sent a record without a number"
            bulk, self.sum_size = size - head.record, 0
            if head.signal & SIGNAL_SUMMED:
                if bulk <= SUM_BYTES:
                    return b"it sent what is no frame"
                bulk, self.sum_size = bulk - SUM_BYTES, SUM_BYTES
            if self.end - self.start < sizeof(Head) + head.record:
                return NULL
            record = self.buffer + self.start + sizeof(Head)
            if head.record_sum != fr_crc32c(0, record, head.record):
                return self._damaged()
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
            if head.signal & SIGNAL_LEAVING:
                self.peer_left = True
            if not bulk:
                if head.number > self.received:
                    none.start = NULL
                    if not self._deliver(record, &none):
                        return NO_MEMORY
                self.start += sizeof(Head) + head.record
                continue
            # The claim of a size is only a number until its bytes come: memory is touched as they do.
            self.bulk.start = <char*>self.loop.take(bulk)
            if self.bulk.start == NULL:
                return b"it sent more at once than there is memory for"
            self.bulk.size, self.bulk.give, self.filled, self.sum = bulk, self.loop.give, 0, 0
            # The record stays in the buffer, in front, until its bulk is whole.
            record += head.record
            there = min(<uint64_t>(self.buffer + self.end - record), bulk + self.sum_size)
            memcpy(self.bulk.start, record, min(there, bulk))
            if there > bulk:
                memcpy(&self.sum_said, record + bulk, there - bulk)
            memmove(<char*>record, record + there, <size_t>(self.buffer + self.end - record) - there)
            self.end -= there
            wrong = self._came(there)
            if wrong != NULL:
                return wrong
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
                    bytes_sent=self.bytes_sent, bytes_received=self.bytes_received, resumed=self.resumed, damaged=self.damaged)


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


cdef const char* SILENT = b"silence"
cdef const char* DAMAGED = b"what it sent was damaged on its way"
cdef const char* NO_MEMORY = b"out of memory"


cdef void* _take(uint64_t size) noexcept nogil:
    return malloc(size)


cdef void _give(void* start, uint64_t size) noexcept nogil:
    free(start)
