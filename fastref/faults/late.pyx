"""A channel that keeps chosen records back.

They are published when they are due, behind what was sent meanwhile; all others go at once and in order. Positions count
records, and none is passed while one before it is kept back: pins and blocks stay as long as a record needs them.
"""

from collections import deque

from libc.stdint cimport int64_t, uint64_t

from fastref._core cimport fr_now_ns
from fastref.channels.channel cimport SENT_CLOSED, SENT_TOO_LARGE, Bulk, Channel
from fastref.runtime.post cimport Bulky
from fastref.wire.frame cimport PYTHON_CALL, PYTHON_REMOTE_CALL, RREF_FETCH_CALL, fr_frame

__all__ = ["LateChannel"]

cdef enum:
    AGAIN_NS = 1000000      # until the next look at a ring that is full


cdef class LateChannel(Channel):
    """Carry records over another channel.

    Parameters
    ----------
    inner : Channel
    agenda : Agenda
        Who publishes what was kept back.
    """

    def __init__(self, inner: Channel, agenda):
        self.inner, self.agenda = inner, agenda
        self.largest = inner.largest
        self.delays, self.under_way = {}, deque()

    cdef void keep_back(self, uint64_t call, double delay_s):
        """Have the record of a call, which is about to be sent, wait."""
        self.delays[call] = <int64_t>(delay_s * 1e9)

    cdef void forget(self, uint64_t call):
        """The record was sent, or never will be."""
        self.delays.pop(call, None)

    cdef int64_t try_send(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size) noexcept nogil:
        return self.try_send_bulk(head, head_size, body, body_size, NULL)

    cdef int64_t try_send_bulk(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                               Bulk* bulk) noexcept nogil:
        with gil:
            return self._send(head, head_size, body, body_size, bulk)

    cdef int64_t _send(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size, Bulk* bulk):
        cdef const fr_frame* frame = <const fr_frame*>head
        cdef Bulky kept = None
        cdef int64_t position
        self.forget_consumed()
        if self.closed:
            return SENT_CLOSED
        if frame.kind in (PYTHON_CALL, PYTHON_REMOTE_CALL, RREF_FETCH_CALL) and frame.call in self.delays:
            if head_size + body_size > self.largest:
                return SENT_TOO_LARGE
            record = head[:head_size] + (body[:body_size] if body_size else b"")
            due_ns = fr_now_ns() + self.delays[frame.call]
            if bulk != NULL:
                kept = Bulky.__new__(Bulky)
                kept.bulk = bulk[0]
                bulk.start = NULL
            entry = self._note(0)
            position = entry[0]
            self.agenda.add(due_ns, lambda: self._publish(entry, record, kept))
            return position
        position = self.inner.try_send_bulk(head, head_size, body, body_size, bulk)
        return self._note(position)[0] if position > 0 else position

    cdef list _note(self, int64_t inner):
        """Give the next position to a record. The interpreter lock is kept meanwhile: positions are in order."""
        entry = [self.sent + 1, inner]
        self.sent += 1
        self.under_way.append(entry)
        return entry

    def _publish(self, entry: list, record: bytes, kept: Bulky | None) -> None:
        cdef const char* start = record
        cdef int64_t position = self.inner.try_send_bulk(start, len(record), NULL, 0, NULL if kept is None else &kept.bulk)
        if position > 0:
            entry[1] = position
        elif position == 0:
            self.agenda.add(fr_now_ns() + AGAIN_NS, lambda: self._publish(entry, record, kept))

    cdef uint64_t passed(self, uint64_t reached):
        """The last of our positions up to which every record lies before ``reached`` on the inner channel."""
        cdef uint64_t last = self.done
        for position, inner in self.under_way:
            if not inner or inner > reached:
                break
            last = position
        return last

    cdef uint64_t forget_consumed(self):
        self.done = self.passed(self.inner.consumed())
        while self.under_way and self.under_way[0][0] <= self.done:
            self.under_way.popleft()
        return self.done

    cdef uint64_t acquired(self) noexcept nogil:
        with gil:
            return self.passed(self.inner.acquired())

    cdef uint64_t consumed(self) noexcept nogil:
        with gil:
            return self.forget_consumed()

    cdef void close(self) noexcept nogil:
        self.closed = True
        self.inner.close()
