"""The buffer that payloads are written into, and the checked reader of one."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove

from fastref.carriers.warm cimport errands, fr_errands

from fastref.errors import ProtocolError

__all__ = ["Carried", "Decoder", "Encoder"]

cdef enum:
    ALIGNMENT = 64
    MOST_SPANS = 8192       # tensors in one value; with more, pickle's dictionary is the better memory

cdef extern from "fr_copy.h" nogil:
    void fr_copy_bytes(fr_errands*, char*, const char*, size_t)

cdef extern from "fr_gather.h" nogil:
    char* fr_gather_copy(const fr_gather*, uint32_t, char*, const char*)


cdef class Encoder:
    """A growing buffer; large tensors are remembered as segments and copied only once, to where they go."""

    def __cinit__(self):
        self.references, self.blocks, self.forwarded = [], [], []
        self.kept = []

    def __dealloc__(self):
        free(self.data)
        free(self.segments)
        free(self.spans)

    cdef void reset(self) noexcept:
        """Empty the buffer, keeping its memory unless it has grown large."""
        self.size = self.segment_bytes = self.largest_in_place = 0
        self.segment_count = self.seen_count = self.containers = self.span_count = 0
        self.plain = self.gradients = False
        self.linked = None
        if self.references:
            self.references = []
        if self.blocks:
            self.blocks = []
        if self.forwarded:
            self.forwarded = []
        self.arenas = None
        if self.kept:
            self.kept = []
        if self.room > 1 << 20:
            free(self.data)
            self.data, self.room = NULL, 0

    cdef char* grow(self, uint64_t size) except NULL:
        """Room for ``size`` more bytes."""
        cdef uint64_t room
        cdef char* data
        if self.size + size > self.room:
            room = max(self.size + size, self.room * 2, 512)
            data = <char*>realloc(self.data, room)
            if data == NULL:
                raise MemoryError()
            self.data, self.room = data, room
        self.size += size
        return self.data + self.size - size

    cdef int raw(self, const void* start, uint64_t size) except -1:
        memcpy(self.grow(size), start, size)
        return 0

    cdef int tag32(self, char tag, uint32_t number) except -1:
        cdef char* at = self.grow(5)
        at[0] = tag
        memcpy(at + 1, &number, 4)
        return 0

    cdef int segment(self, const char* start, uint64_t size, const fr_gather* plan, bint in_place,
                     object keep) except -1:
        """Append bytes that stay where they are until ``copy_to``; they begin at a multiple of 64.

        ``plan``: the bytes are the elements of a strided tensor. ``in_place``: the receiver can use them where they lie.
        ``keep``: what keeps them and the plan.
        """
        cdef Segment* segments
        cdef uint64_t padding = (ALIGNMENT - self.total() % ALIGNMENT) % ALIGNMENT
        cdef char* zeros = self.grow(padding) if padding else NULL
        for i in range(padding):
            zeros[i] = 0
        if self.segment_count == self.segment_room:
            segments = <Segment*>realloc(self.segments, (self.segment_room * 2 + 8) * sizeof(Segment))
            if segments == NULL:
                raise MemoryError()
            self.segments, self.segment_room = segments, self.segment_room * 2 + 8
        self.segments[self.segment_count] = Segment(self.size, start, size, plan)
        self.segment_count += 1
        self.segment_bytes += size
        if in_place:
            self.largest_in_place = max(self.largest_in_place, size)
        self.kept.append(keep)
        return 0

    cdef uint64_t total(self) noexcept nogil:
        """Bytes of the whole payload."""
        return self.size + self.segment_bytes

    cdef size_t pieces(self, iovec* pieces, size_t room) noexcept nogil:
        """Say where the payload lies, piece by piece, until something is appended; 0: it has to be copied together."""
        cdef uint64_t done = 0, end
        cdef size_t count = 0
        cdef unsigned i
        if 2 * self.segment_count + 1 > room:
            return 0
        for i in range(self.segment_count + 1):
            end = self.segments[i].position if i < self.segment_count else self.size
            if end > done:
                pieces[count].iov_base, pieces[count].iov_len = self.data + done, end - done
                count, done = count + 1, end
            if i < self.segment_count and self.segments[i].size:
                if self.segments[i].plan != NULL:
                    return 0
                pieces[count].iov_base, pieces[count].iov_len = <void*>self.segments[i].start, self.segments[i].size
                count += 1
        return count

    cdef void copy_to(self, char* target) noexcept nogil:
        """Write the payload to its destination, ``total()`` bytes."""
        cdef uint64_t done = 0
        cdef Segment* segment
        for i in range(self.segment_count):
            segment = &self.segments[i]
            memcpy(target, self.data + done, segment.position - done)
            target += segment.position - done
            done = segment.position
            if segment.plan == NULL:
                fr_copy_bytes(errands(), target, segment.start, segment.size)
            else:
                fr_gather_copy(segment.plan, 0, target, segment.start)
            target += segment.size
        if self.size > done:
            memcpy(target, self.data + done, self.size - done)

    cdef bint forward(self, const char* start, uint64_t size, Place* place) except -1:
        """Whether the receiver can have bytes where they lie, in a block that we have leased: then where that is."""
        cdef PeerArena arena
        cdef bint found
        for item in self.arenas:
            if item is None:
                continue
            arena = <PeerArena>item
            with nogil:
                found = arena.find(start, size, self.receiver, place)
            if found:
                self.forwarded.append((arena, PyBytes_FromStringAndSize(<const char*>place, sizeof(Place))))
                return True
        return False

    cdef bint is_apart(self, const char* start, uint64_t size) except -1:
        """Remember the memory of a tensor; False when it shares some with another, or there are too many to remember."""
        cdef unsigned low = 0, high = self.span_count, middle
        cdef Span* spans
        if self.plain:
            return True
        while low < high:
            middle = (low + high) // 2
            if self.spans[middle].end <= start:
                low = middle + 1
            else:
                high = middle
        if low < self.span_count and self.spans[low].start < start + size:
            return False
        if self.span_count == MOST_SPANS:
            return False
        if self.span_count == self.span_room:
            spans = <Span*>realloc(self.spans, (self.span_room * 2 + 16) * sizeof(Span))
            if spans == NULL:
                raise MemoryError()
            self.spans, self.span_room = spans, self.span_room * 2 + 16
        memmove(&self.spans[low + 1], &self.spans[low], (self.span_count - low) * sizeof(Span))
        self.spans[low] = Span(start, start + size)
        self.span_count += 1
        return True

    cdef bint first_meeting(self, object value) noexcept:
        """Remember a mutable object; False when it was met before, or when there are too many to remember."""
        cdef unsigned i
        if self.plain:
            return True
        for i in range(self.seen_count):
            if self.seen[i] == <void*>value:
                return False
        if self.seen_count == 32:
            return False
        self.seen[self.seen_count] = <void*>value
        self.seen_count += 1
        return True


cdef class Carried:
    """What is in a frame with an autograd context."""


cdef class Decoder:
    """Read what an Encoder wrote. Every length is checked against the bytes that are there."""

    cdef const char* take(self, uint64_t size) except NULL:
        if <uint64_t>(self.end - self.at) < size:
            raise ProtocolError(f"a payload ends {size - (self.end - self.at)} bytes too early")
        self.at += size
        return self.at - size

    cdef const char* aligned(self, uint64_t size) except NULL:
        self.take((ALIGNMENT - (self.at - self.start) % ALIGNMENT) % ALIGNMENT)
        return self.take(size)

    cdef PeerArena arena_of(self, const Place* place):
        arena = self.arenas[place.owner] if self.arenas is not None and place.owner < <size_t>len(self.arenas) else None
        if arena is None:
            raise ProtocolError(f"a payload points to memory of worker {place.owner}, whom nobody knows")
        return <PeerArena>arena

    cdef Lease lease_of(self, const Place* place):
        """Lease a block that was handed on, once for all tensors in it; None when they have to be copied."""
        cdef Lease lease
        key = (place.owner, place.index, place.offset, place.size)
        if self.taken is None:
            self.taken = {}
        elif key in self.taken:
            return self.taken[key]
        lease = self.arena_of(place).take_forwarded(place, self.site)
        self.taken[key] = lease
        return lease

    cdef uint32_t number(self) except? 0xFFFFFFFF:
        cdef uint32_t number
        memcpy(&number, self.take(4), 4)
        return number
