"""The contract of a channel, and the inbox that all kinds of channels deliver into.

A channel carries records to one peer: whole, in order, each once, as long as both ends live. It promises no
delivery to a peer that dies, no fairness between peers, and no answer: those are the runtime's business.

    try_send    publishes a record, or says that there is no room; it never waits. Any thread may call it.
    try_send_bulk   as try_send, of a record that may have bytes behind it, which the channel takes over when it publishes
                them; only where no memory is shared: other channels refuse them as too large. A channel that is
                ``borrowing`` can also have them lent, in pieces, and reads them until the receiver has them or others
                are given in their place
    borrows     whether the bytes of a record are read from where they were lent
    give_back   have others like them read from here on, which the channel takes over
    acquired    how far the receiver has taken the references that records carry
    consumed    how far the receiver is done with the records' bytes
    close       later sends say so; records already published may or may not arrive

An inbox belongs to one runtime. Whoever holds its drain token calls ``next``, ``acquired`` and ``done``; one caller
at a time. ``next`` goes round the sources, so that a flood from one peer does not starve the others.
"""

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from fastref._core cimport (pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
                            fr_fence, fr_load_acquire, fr_or, fr_store_release)
from fastref.errors import ProtocolError, UsageError

cdef extern from *:
    int __builtin_ctzll(unsigned long long) nogil

__all__ = ["Channel", "Inbox", "BELL_BYTES", "BELL_UNANNOUNCED", "MAX_PEERS"]

BELL_BYTES = 192
BELL_UNANNOUNCED = slice(68, 72)    # of these bytes, the word in which a receiver says whom it has still to tell of memory
MAX_PEERS = FR_MAX_PEERS

cdef enum:
    NOBODY = 0
    RING = 1
    QUEUE = 2
    ROUND = 64      # records from one peer before the next peer has its turn
    FAVOUR_AFTER = 8        # records in a row from one ring, others silent, make it the favourite
    NO_FAVOURITE = -64      # sets no bit


cdef class Channel:
    """One direction to one peer. ``largest``: bytes of the largest record it can carry."""

    cdef int64_t try_send(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size) noexcept nogil:
        return SENT_CLOSED

    cdef int64_t try_send_bulk(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                               Bulk* bulk) noexcept nogil:
        return self.try_send(head, head_size, body, body_size) if bulk == NULL else SENT_TOO_LARGE

    cdef bint borrows(self, int64_t position) noexcept nogil:
        return False

    cdef void give_back(self, int64_t position, Bulk* instead) noexcept nogil:
        pass

    cdef uint64_t acquired(self) noexcept nogil:
        return 0

    cdef uint64_t consumed(self) noexcept nogil:
        return 0

    cdef void close(self) noexcept nogil:
        self.closed = True

    def send(self, data: bytes) -> int | None:
        """Publish one record; returns its position, or None while there is no room.

        Raises
        ------
        UsageError
            When the record is larger than ``largest`` or the channel is closed.
        """
        cdef const char* start = data
        position = self.try_send(start, len(data), NULL, 0)
        if position == SENT_TOO_LARGE:
            raise UsageError(f"a record of {len(data)} bytes; the channel carries at most {self.largest}")
        if position == SENT_CLOSED:
            raise UsageError("the channel is closed")
        return position or None

    def acquired_position(self) -> int:
        """Position up to which the receiver has taken all references."""
        return self.acquired()

    def consumed_position(self) -> int:
        """Position up to which the receiver is done."""
        return self.consumed()

    def shut(self) -> None:
        """Close this end."""
        self.close()

    def snapshot(self) -> dict:
        """Plain figures."""
        return {}


cdef struct Message:
    Message* after
    uint64_t size
    uint64_t position
    Bulk bulk
    char data[8]


cdef void _free_message(Message* message) noexcept nogil:
    if message.bulk.start != NULL:
        message.bulk.give(message.bulk.start, message.bulk.size)
    free(message)


cdef class Inbox:
    """Where frames from all peers of one runtime arrive.

    Parameters
    ----------
    bell : writable buffer
        ``BELL_BYTES`` zeroed bytes; shared with the peers that have rings.
    """

    def __cinit__(self, bell):
        cdef unsigned char[::1] memory = bell
        if memory.shape[0] < BELL_BYTES:
            raise UsageError(f"a bell needs {BELL_BYTES} bytes, got {memory.shape[0]}")
        self._bell_memory = memoryview(bell)
        self._rings = []
        self.bell = <fr_bell*>&memory[0]
        self.sources = <Source*>calloc(FR_MAX_PEERS, sizeof(Source))
        if self.sources == NULL:
            raise MemoryError()
        self.current = 0
        self.favourite = NO_FAVOURITE
        fr_listener_open(&self.listener, self.bell)
        pthread_mutex_init(&self.queue_lock, NULL)

    def __dealloc__(self):
        cdef Message* message
        cdef Message* after
        if self.sources == NULL:
            return
        for i in range(FR_MAX_PEERS):
            message = <Message*>self.sources[i].first
            while message != NULL:
                after = message.after
                _free_message(message)
                message = after
        free(self.sources)
        pthread_mutex_destroy(&self.queue_lock)

    def add_ring(self, source: int, ring, size_bytes: int) -> None:
        """Read the ring that peer ``source`` writes. ``ring``: zeroed memory of ``ring_bytes(size_bytes)``.

        While others read the inbox, one caller at a time with ``next``.
        """
        cdef unsigned char[::1] memory = ring
        self._checked(source)
        if size_bytes < 1024 or size_bytes > 1 << 30 or size_bytes & (size_bytes - 1) or memory.shape[0] < size_bytes + <Py_ssize_t>FR_RING_DATA_OFFSET:
            raise UsageError(f"a ring of {size_bytes} bytes in {memory.shape[0]} bytes of memory")
        if source == self.favourite:
            self._prefer(NO_FAVOURITE)
        if self.sources[source].memory != &memory[0]:
            self._rings.append(memoryview(ring))  # for good: a thread without the token may be looking at its tail
            self.sources[source].memory = &memory[0]
        fr_consumer_open(&self.sources[source].consumer, &memory[0], size_bytes)
        self.sources[source].kind = RING
        fr_or(&self.bell.ready[source >> 6], <uint64_t>1 << (source & 63))  # look at it once: it may hold something

    def add_queue(self, source: int) -> None:
        """Accept records that this process itself puts in (``enqueue``) as coming from ``source``."""
        self._checked(source)
        self.sources[source].kind = QUEUE

    def remove(self, source: int) -> None:
        """Forget a source, once nothing of it is left to read. One caller at a time with ``next``."""
        self._checked(source)
        if source == self.favourite:
            self._prefer(NO_FAVOURITE)
        self.sources[source].kind = NOBODY

    def _checked(self, source):
        if not 0 <= source < FR_MAX_PEERS:
            raise UsageError(f"an inbox has sources 0 to {FR_MAX_PEERS - 1}, got {source}")

    cdef int next(self, Arrival* arrival) noexcept nogil:
        """Look at the next record: 1 with ``arrival`` filled, 0 when there is none, -1 when ``source`` sent nonsense."""
        cdef unsigned i
        cdef int which, found
        cdef Source* source
        for i in range(FR_READY_WORDS):
            self.pending[i] |= fr_listener_take(&self.listener, i)
        if fr_listener_favourite(&self.listener):
            self.pending[self.favourite >> 6] |= <uint64_t>1 << (self.favourite & 63)
        while True:
            which = self.current
            if self.drained_in_a_row >= ROUND or not self.pending[which >> 6] >> (which & 63) & 1:
                which = self._next_in_turn()
                self.drained_in_a_row = 0
                if which < 0:
                    return 0
            self.current = which
            source = &self.sources[which]
            arrival.source = which
            found = self._peek(source, arrival)
            if found == FR_RING_RECORD:
                self.drained_in_a_row += 1
                self._note(which)
                return 1
            self.pending[which >> 6] &= ~(<uint64_t>1 << (which & 63))
            self.drained_in_a_row = 0
            if found == FR_RING_BROKEN:
                if which == self.favourite:
                    self._prefer(NO_FAVOURITE)
                source.kind = NOBODY
                source.broken += 1
                return -1

    cdef int _next_in_turn(self) noexcept nogil:
        """The first source after the current one whose bit is set, the current one last; -1 when there is none."""
        cdef unsigned start = (self.current + 1) % FR_MAX_PEERS
        cdef unsigned i, word
        cdef uint64_t bits
        for i in range(FR_READY_WORDS + 1):
            word = ((start >> 6) + i) % FR_READY_WORDS
            bits = self.pending[word]
            if i == 0:
                bits &= <uint64_t>0xFFFFFFFFFFFFFFFF << (start & 63)
            if bits:
                return word << 6 | __builtin_ctzll(bits)
        return -1

    cdef void _note(self, uint32_t which) noexcept nogil:
        """A record came from ``which``: a ring from which all of the last ones came becomes the favourite."""
        if which != self.last:
            self.last, self.alone = which, 0
        self.alone += 1
        if self.alone == FAVOUR_AFTER and <int>which != self.favourite and self.sources[which].kind == RING:
            self._prefer(which)

    cdef void _prefer(self, int which) noexcept nogil:
        cdef fr_consumer* consumer
        self.favourite, self.alone = which, 0
        if which == NO_FAVOURITE:
            fr_listener_prefer_nobody(&self.listener)
        else:
            consumer = &self.sources[which].consumer
            fr_listener_prefer(&self.listener, which, &consumer.ring.tail, &consumer.head)

    cdef int _peek(self, Source* source, Arrival* arrival) noexcept nogil:
        cdef Message* message
        if source.kind == RING:
            return fr_ring_peek(&source.consumer, &arrival.data, &arrival.size)
        if source.kind == QUEUE:
            pthread_mutex_lock(&self.queue_lock)
            message = <Message*>source.first
            source.looking_at = message
            pthread_mutex_unlock(&self.queue_lock)
            if message != NULL:
                arrival.data, arrival.size = message.data, message.size
                return FR_RING_RECORD
        return FR_RING_EMPTY

    cdef void acquired(self) noexcept nogil:
        """The references of the record being looked at have been taken."""
        cdef Source* source = &self.sources[self.current]
        if source.kind == RING:
            fr_ring_mark_acquired(&source.consumer)
        elif source.kind == QUEUE:
            fr_store_release(&source.consumer.record, (<Message*>source.looking_at).position)

    cdef void done(self) noexcept nogil:
        """The bytes of the record being looked at are not needed any more."""
        cdef Source* source = &self.sources[self.current]
        cdef Message* message
        source.received += 1
        self.taken += 1
        if source.kind == RING:
            fr_ring_pop(&source.consumer)
        elif source.kind == QUEUE:
            pthread_mutex_lock(&self.queue_lock)
            message = <Message*>source.looking_at
            source.first = message.after
            if source.first == NULL:
                source.last = NULL
            source.looking_at = NULL
            source.consumer.head = message.position
            fr_store_release(&source.consumer.record, message.position)
            pthread_mutex_unlock(&self.queue_lock)
            _free_message(message)

    cdef Bulk take_bulk(self) noexcept nogil:
        """The bytes behind the record being looked at: the caller's from here on. ``start`` is NULL when there are none."""
        cdef Source* source = &self.sources[self.current]
        cdef Message* message = <Message*>source.looking_at
        cdef Bulk bulk
        memset(&bulk, 0, sizeof(bulk))
        if source.kind == QUEUE:
            bulk = message.bulk
            memset(&message.bulk, 0, sizeof(bulk))
        return bulk

    cdef void put_back(self) noexcept nogil:
        """Give the ready bits of what was not drained back to the bell."""
        cdef unsigned i
        cdef uint64_t left, bit
        for i in range(FR_READY_WORDS):
            left = self.pending[i]
            while left:
                bit = left & (0 - left)
                left ^= bit
                # Not for a source that is empty: its bit would wake a follower for nothing. A record that is published
                # from here on finds the bit unset, and its sender sets it.
                if self.is_empty(i << 6 | __builtin_ctzll(bit)):
                    self.pending[i] ^= bit
            if self.pending[i]:
                fr_or(&self.bell.ready[i], self.pending[i])  # SYNC: before the token is passed on
                self.pending[i] = 0

    cdef bint is_empty(self, uint32_t which) noexcept nogil:
        """True when nothing of ``which`` is left to read. With the drain token."""
        cdef Source* source = &self.sources[which]
        cdef bint empty
        if source.kind == RING:
            return fr_ring_is_empty(&source.consumer)
        pthread_mutex_lock(&self.queue_lock)
        empty = source.first == NULL
        pthread_mutex_unlock(&self.queue_lock)
        return empty

    cdef int enqueue(self, uint32_t which, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                     uint64_t position, const Bulk* bulk) noexcept nogil:
        """Append a record from within this process and ring the bell; False when memory has run out.

        ``bulk``: what goes along with it, taken over; NULL: nothing.
        """
        cdef Source* source = &self.sources[which]
        cdef Message* message = <Message*>malloc(sizeof(Message) + head_size + body_size)
        if message == NULL:
            return False
        memset(&message.bulk, 0, sizeof(Bulk))
        if bulk != NULL:
            message.bulk = bulk[0]
        message.after, message.size, message.position = NULL, head_size + body_size, position
        memcpy(message.data, head, head_size)
        if body_size:
            memcpy(message.data + head_size, body, body_size)
        pthread_mutex_lock(&self.queue_lock)
        if source.last == NULL:
            source.first = message
        else:
            (<Message*>source.last).after = message
        source.last = message
        pthread_mutex_unlock(&self.queue_lock)
        fr_bell_ring(self.bell, which)
        return True

    cdef uint64_t queue_position(self, uint32_t which, bint acquired) noexcept nogil:
        cdef uint64_t position
        if acquired:
            return fr_load_acquire(&self.sources[which].consumer.record)
        pthread_mutex_lock(&self.queue_lock)
        position = self.sources[which].consumer.head
        pthread_mutex_unlock(&self.queue_lock)
        return position

    def receive(self) -> tuple | None:
        """Take the next record as (source, bytes), or None.

        Raises
        ------
        ProtocolError
            When a source sent what is no record; it is not read again.
        """
        cdef Arrival arrival
        found = self.next(&arrival)
        if found < 0:
            raise ProtocolError(f"source {arrival.source} wrote a damaged record; it is not read again")
        if not found:
            return None
        data = arrival.data[:arrival.size]
        self.acquired()
        self.done()
        return (arrival.source, data)

    def receive_whole(self) -> tuple | None:
        """Take the next record as (source, bytes, the bytes behind it, or None). For tests."""
        cdef Arrival arrival
        cdef Bulk bulk
        if self.next(&arrival) <= 0:
            return None
        bulk = self.take_bulk()
        data, behind = arrival.data[:arrival.size], None
        if bulk.start != NULL:
            behind = bulk.start[:bulk.size]
            bulk.give(bulk.start, bulk.size)
        self.acquired()
        self.done()
        return (arrival.source, data, behind)

    def has_any(self) -> bool:
        """True when a source may have something to read."""
        return fr_listener_any(&self.listener)

    def ring_for_dead(self, source: int) -> None:
        """Look at what a dead peer wrote, even if it was killed before it could ring."""
        self._checked(source)
        fr_bell_ring_for_dead(self.bell, source)

    def give_back(self) -> None:
        """Give undrained ready bits back to the bell, as before another thread drains."""
        self.put_back()

    def snapshot(self) -> dict:
        """Plain figures for each source: kind, records received, bytes waiting."""
        figures = {}
        for i in range(FR_MAX_PEERS):
            kind = self.sources[i].kind
            if kind != NOBODY or self.sources[i].received:
                figures[i] = dict(kind=("none", "ring", "queue")[kind], received=self.sources[i].received,
                                  empty=bool(self.is_empty(i)), broken=self.sources[i].broken)
        return figures
