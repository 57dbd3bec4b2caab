"""The sending half of a channel over a stream: records are numbered, and kept until the peer has said that they came.

Sending is done by whoever sends, straight into the socket; what does not fit stays queued, and the thread that reads the
stream goes on when there is room.

Every head and every record carries a checksum. What lies behind a record, up to gigabytes, has one behind it where the
stream leaves the host and TLS does not see to it anyway; it is computed piece by piece, just ahead of the copy into the
socket, so that it costs no second way through memory.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fastref._core cimport fr_load_acquire, fr_now_ns, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
from fastref.channels.channel cimport SENT_CLOSED, SENT_FULL, SENT_TOO_LARGE, Bulk, Channel, iovec

__all__ = ["StreamSender", "checksum"]

cdef enum:
    PIECES = 128                # in one system call
    SUM_AHEAD = 1048576         # bytes that are summed before they are sent; they are in the cache when the kernel copies


cdef class StreamSender(Channel):
    """What sends records to one peer over a stream, a TCP connection or one end of a socket pair."""

    def __cinit__(self):
        self.largest, self.borrowing = LARGEST, True
        self.fd = self.watcher = -1
        self.broken = 1
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        while self.first != NULL:
            self._drop_first()
        pthread_mutex_destroy(&self.lock)

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
        memcpy(record.data, head, head_size)
        if body_size:
            memcpy(record.data + head_size, body, body_size)
        record.head.record_sum = fr_crc32c(0, record.data, size)
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
                    self._begin(record)
                count = _add_pieces(record, skip, pieces, count)
                if record.head.signal & SIGNAL_SUMMED and record.summed < record.bulk.size:
                    break  # the rest has its turn when this has gone
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
                skip = sizeof(Head) + (self.current.head.size & FR_FRAME_SIZE) - self.done
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
            event.events, event.data.ptr = FR_STREAM_EVENTS | (EPOLLOUT if wanted else 0), <void*>self
            epoll_ctl(self.watcher, EPOLL_CTL_MOD, self.fd, &event)

    cdef void _begin(self, Outgoing* record) noexcept nogil:
        """Fill the head of a record of which nothing is sent yet."""
        record.head.signal = SIGNAL_SUMMED if self.sums and record.bulk.size else SIGNAL_NONE
        record.head.size = FR_FRAME_MAGIC | (record.size + record.bulk.size + (SUM_BYTES if record.head.signal else 0))
        self._fill_head(&record.head)

    cdef void _fill_head(self, Head* head) noexcept nogil:
        """Confirm what has come, as of now, and sum the head."""
        self.owed_bytes = 0
        head.received = self.told_received = self.received
        # What the inbox has is counted as received a moment later.
        head.acquired = self.told_acquired = min(self.inbox.queue_position(self.source, True), head.received)
        head.sum = fr_crc32c(0, head, sizeof(Head) - SUM_BYTES)

    cdef bint _speak(self, uint32_t signal) noexcept nogil:
        """Send a head of its own, between two records; under the lock. Without room there is traffic, which says it too."""
        cdef Head head
        cdef iovec piece
        cdef msghdr message
        cdef ssize_t sent
        if self.broken or self.wants_room or self.done or self.left or self.fd < 0:
            return False
        memset(&head, 0, sizeof(head))
        head.size, head.signal = FR_FRAME_MAGIC, signal
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

    cdef void _copy_borrowed(self) noexcept nogil:
        """Keep what was lent as a copy, as far as there is memory for it."""
        cdef Outgoing* record = self.borrowed
        cdef Outgoing** at = &self.borrowed
        cdef char* copy
        cdef uint64_t filled
        cdef size_t i
        while record != NULL:
            copy, filled = <char*>malloc(record.bulk.size), 0
            if copy == NULL:
                at = &record.next_borrowed
            else:
                for i in range(record.bulk.piece_count):
                    memcpy(copy + filled, record.bulk.pieces[i].iov_base, record.bulk.pieces[i].iov_len)
                    filled += record.bulk.pieces[i].iov_len
                at[0] = record.next_borrowed
                free(record.bulk.pieces)
                record.bulk.start, record.bulk.give = copy, _give
            record.summed = record.bulk_sum = 0
            record = at[0]

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

    cdef void _go_on(self, uint64_t received, bint sums, bint again) noexcept nogil:
        """Send over a new connection what follows the last record that the peer has. Under the lock."""
        self.sums = sums
        self.current, self.done = NULL, 0
        while self.first != NULL and self.first.head.number <= received:
            self._drop_first()
        if again and sums and self.borrowed != NULL:
            # Perhaps the last one broke because somebody writes what was lent, and so its sum was wrong. It would be again.
            self._copy_borrowed()
            self.borrowing = False
        self.current = self.first
        # A farewell is said again, and what was confirmed too: who knows what of it has come.
        self.wants_room = self.left = False
        self.told_received = self.told_acquired = 0
        self.spoke_ns = fr_now_ns()

    def leave(self) -> None:
        """Say, behind all that is queued, that nothing follows."""
        pthread_mutex_lock(&self.lock)
        self.leaving = True
        if not self.wants_room:
            self._flush()
        pthread_mutex_unlock(&self.lock)

cdef size_t _add_pieces(Outgoing* record, uint64_t skip, iovec* pieces, size_t count) noexcept nogil:
    """Add what follows ``skip`` bytes of a record to what is sent, as far as there is room; returns how many there are."""
    cdef uint64_t room = UINT64_MAX
    cdef bint summed = record.head.signal & SIGNAL_SUMMED
    cdef size_t i
    count = _add_piece(<char*>&record.head, sizeof(Head) + record.size, &skip, &room, pieces, count)
    if summed:
        _sum(record, min(skip + SUM_AHEAD, record.bulk.size))
        room = record.summed - min(skip, record.summed)
    if record.bulk.start != NULL:
        count = _add_piece(record.bulk.start, record.bulk.size, &skip, &room, pieces, count)
    else:
        for i in range(record.bulk.piece_count):
            count = _add_piece(<char*>record.bulk.pieces[i].iov_base, record.bulk.pieces[i].iov_len, &skip, &room, pieces, count)
    if summed and record.summed == record.bulk.size:
        room = SUM_BYTES
        count = _add_piece(<char*>&record.bulk_sum, SUM_BYTES, &skip, &room, pieces, count)
    return count


cdef inline size_t _add_piece(char* start, uint64_t size, uint64_t* skip, uint64_t* room, iovec* pieces,
                              size_t count) noexcept nogil:
    if skip[0] >= size:
        skip[0] -= size
    elif count < PIECES and room[0]:
        pieces[count].iov_base, pieces[count].iov_len = start + skip[0], min(size - skip[0], room[0])
        room[0] -= pieces[count].iov_len
        count, skip[0] = count + 1, 0
    return count


cdef void _sum(Outgoing* record, uint64_t until) noexcept nogil:
    """Sum the bulk of a record up to a byte of it."""
    cdef uint64_t begin = 0, end
    cdef size_t i
    cdef iovec whole = iovec(record.bulk.start, record.bulk.size)
    cdef iovec* pieces = record.bulk.pieces
    cdef size_t count = record.bulk.piece_count
    if record.bulk.start != NULL:
        pieces, count = &whole, 1
    for i in range(count):
        if record.summed >= until:
            return
        end = begin + pieces[i].iov_len
        if record.summed < end:
            end = min(end, until)
            record.bulk_sum = fr_crc32c(record.bulk_sum, <char*>pieces[i].iov_base + (record.summed - begin), end - record.summed)
            record.summed = end
        begin += pieces[i].iov_len


cdef void _give(void* start, uint64_t size) noexcept nogil:
    free(start)


def checksum(data: bytes, before: int = 0) -> int:
    """Return the CRC-32C of bytes that follow some with the sum ``before``. For tests."""
    cdef const char* start = data
    return fr_crc32c(before, start, len(data))
