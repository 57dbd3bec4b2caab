"""The shared-memory channel: a ring in memory that the receiver made, and the receiver's doorbell."""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from fastref._core cimport (FR_FAILPOINT, failpoints, fr_failpoints_here, pthread_mutex_destroy, pthread_mutex_init,
                            pthread_mutex_lock, pthread_mutex_unlock)
from fastref.channels.channel cimport (FR_RING_DATA_OFFSET, SENT_CLOSED, SENT_FULL, SENT_TOO_LARGE, Channel, fr_bell,
                                       fr_bell_ring, fr_producer_open, fr_ring_acquired, fr_ring_commit,
                                       fr_ring_consumed, fr_ring_largest, fr_ring_reserve)
from fastref.errors import ProtocolError, UsageError

__all__ = ["ShmChannel", "ring_bytes", "RING_SIZE"]

fr_failpoints_here = failpoints()

RING_SIZE = 64 * 1024


def ring_bytes(size_bytes: int = RING_SIZE) -> int:
    """Return the bytes of shared memory that a ring with room for ``size_bytes`` needs."""
    if size_bytes < 1024 or size_bytes > 1 << 30 or size_bytes & (size_bytes - 1):
        raise UsageError(f"a ring's size is a power of two from 1 KiB to 1 GiB, got {size_bytes}")
    return FR_RING_DATA_OFFSET + size_bytes


cdef class ShmChannel(Channel):
    """Write records into a peer's ring.

    Parameters
    ----------
    ring : writable buffer
        The ring, made by the receiver: ``ring_bytes(size_bytes)`` zeroed bytes.
    size_bytes : int
        Room for records, a power of two.
    bell : writable buffer
        The receiver's bell.
    me : int
        Which source of the receiver's inbox this is.
    """

    def __cinit__(self, ring, size_bytes: int, bell, me: int):
        cdef unsigned char[::1] ring_memory = ring
        cdef unsigned char[::1] bell_memory = bell
        if ring_memory.shape[0] < ring_bytes(size_bytes):
            raise ProtocolError(f"a ring of {size_bytes} bytes in {ring_memory.shape[0]} bytes of memory")
        self._memory = (memoryview(ring), memoryview(bell))
        fr_producer_open(&self.producer, &ring_memory[0], size_bytes)
        self.bell = <fr_bell*>&bell_memory[0]
        self.me = me
        self.largest = fr_ring_largest(size_bytes)
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    cdef int64_t try_send(self, const char* head, uint64_t head_size, const char* body, uint64_t body_size) noexcept nogil:
        cdef uint64_t size = head_size + body_size
        cdef uint64_t position
        cdef char* room
        if size > self.largest:
            return SENT_TOO_LARGE
        if self.closed:
            return SENT_CLOSED
        pthread_mutex_lock(&self.lock)
        room = fr_ring_reserve(&self.producer, size)
        if room == NULL:
            pthread_mutex_unlock(&self.lock)
            return SENT_FULL
        FR_FAILPOINT("ring.reserved")
        memcpy(room, head, head_size)
        FR_FAILPOINT("ring.half_written")
        if body_size:
            memcpy(room + head_size, body, body_size)
        position = fr_ring_commit(&self.producer, size)
        self.sent += 1
        pthread_mutex_unlock(&self.lock)
        FR_FAILPOINT("ring.published_not_rung")
        if fr_bell_ring(self.bell, self.me):
            self.wakes += 1
        return position

    cdef uint64_t acquired(self) noexcept nogil:
        return fr_ring_acquired(&self.producer)

    cdef uint64_t consumed(self) noexcept nogil:
        return fr_ring_consumed(&self.producer)
