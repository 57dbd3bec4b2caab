"""The in-process channel: frames between runtimes of one process, delivered when a test says so."""

from collections import deque

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref._core cimport (pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
                            pthread_mutex_t)
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from fastref.channels.channel cimport SENT_CLOSED, SENT_FULL, SENT_TOO_LARGE, Bulk, Channel, Inbox
from fastref.errors import UsageError

__all__ = ["InprocChannel"]


cdef class InprocChannel(Channel):
    """Carry records to an inbox of the same process.

    Parameters
    ----------
    inbox : Inbox
        The receiver's; ``me`` must be one of its queues.
    me : int
        Which source of the inbox this is.
    hold : bool
        Keep records back until ``deliver`` is called.
    room : int
        Records that may be under way before the channel says that it is full.
    """

    cdef Inbox inbox
    cdef uint32_t me
    cdef bint hold
    cdef uint64_t room, sent, delivered
    cdef object _held
    cdef pthread_mutex_t lock

    def __init__(self, inbox: Inbox, me: int, hold: bool = False, room: int = 1024, largest: int = 1 << 15):
        inbox.add_queue(me)
        self.inbox, self.me, self.hold, self.room, self.largest = inbox, me, hold, room, largest
        self._held = deque()
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    cdef int64_t try_send(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size) noexcept nogil:
        return self.try_send_bulk(head, head_size, body, body_size, NULL)

    cdef int64_t try_send_bulk(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                               Bulk* bulk) noexcept nogil:
        cdef uint64_t position
        cdef int stored = True
        if head_size + body_size > self.largest:
            return SENT_TOO_LARGE
        if self.closed:
            return SENT_CLOSED
        pthread_mutex_lock(&self.lock)
        if self.sent - self.inbox.queue_position(self.me, True) >= self.room:
            pthread_mutex_unlock(&self.lock)
            return SENT_FULL
        position = self.sent + 1
        self.sent = position
        if not self.hold:
            stored = self.inbox.enqueue(self.me, head, head_size, body, body_size, position, bulk)
        pthread_mutex_unlock(&self.lock)
        if self.hold:
            with gil:
                self._held.append((position, head[:head_size] + (body[:body_size] if body_size else b""),
                                   bulk.start[:bulk.size] if bulk != NULL else None))
        if stored and bulk != NULL:
            if self.hold:
                bulk.give(bulk.start, bulk.size)
            bulk.start = NULL
        return position if stored else SENT_FULL

    cdef uint64_t acquired(self) noexcept nogil:
        return self.inbox.queue_position(self.me, True)

    cdef uint64_t consumed(self) noexcept nogil:
        return self.inbox.queue_position(self.me, False)

    @property
    def under_way(self) -> int:
        """Records held back."""
        return len(self._held)

    def peek(self) -> bytes | None:
        """The oldest record held back."""
        return self._held[0][1] if self._held else None

    def deliver(self, count: int = 1) -> int:
        """Let up to ``count`` records held back arrive, oldest first; returns how many did."""
        cdef const char* start
        cdef Bulk bulk
        done = 0
        while done < count and self._held:
            position, data, behind = self._held.popleft()
            start = data
            if behind is not None:
                bulk.start, bulk.size, bulk.give = <char*>malloc(len(behind)), len(behind), _give
                memcpy(bulk.start, <const char*>(<bytes>behind), len(behind))
            if not self.inbox.enqueue(self.me, start, len(data), NULL, 0, position, &bulk if behind is not None else NULL):
                raise MemoryError()
            done += 1
        return done

    def drop_all(self) -> int:
        """Lose what is held back, as when the sender dies before the receiver has looked; returns how many."""
        lost = len(self._held)
        self._held.clear()
        return lost


cdef void _give(void* start, uint64_t size) noexcept nogil:
    free(start)
