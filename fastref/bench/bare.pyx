"""The ring by itself, filled and emptied without the interpreter, a lock or a bell: what its C code takes."""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from fastref.channels.channel cimport (FR_RING_RECORD, fr_consumer, fr_consumer_open, fr_producer, fr_producer_open,
                                       fr_ring_commit, fr_ring_mark_acquired, fr_ring_peek, fr_ring_pop,
                                       fr_ring_reserve)

from fastref.errors import FastrefError

__all__ = ["RECORDS", "BareRing"]

cdef enum:
    MOST_RECORDS = 100
    RECORD_BYTES = 64

RECORDS = MOST_RECORDS


cdef class BareRing:
    """Both ends of a ring.

    Parameters
    ----------
    ring : writable buffer
        Zeroed, with room for a ring of this size.
    size_bytes : int
        As ``ring_bytes`` takes it.
    """

    cdef fr_producer producer
    cdef fr_consumer consumer
    cdef object _ring

    def __cinit__(self, ring, uint64_t size_bytes):
        cdef unsigned char[::1] memory = ring
        self._ring = ring
        fr_producer_open(&self.producer, &memory[0], size_bytes)
        fr_consumer_open(&self.consumer, &memory[0], size_bytes)

    def turn(self) -> None:
        """Send and receive ``RECORDS`` records of 64 bytes, one by one.

        Raises
        ------
        FastrefError
            One did not come as it was sent.
        """
        cdef int number
        cdef char* room
        cdef const char* payload
        cdef uint64_t length
        cdef char[RECORD_BYTES] record
        for number in range(RECORD_BYTES):
            record[number] = number
        for number in range(MOST_RECORDS):
            room = fr_ring_reserve(&self.producer, RECORD_BYTES)
            if room != NULL:
                memcpy(room, record, RECORD_BYTES)
                fr_ring_commit(&self.producer, RECORD_BYTES)
            if fr_ring_peek(&self.consumer, &payload, &length) != FR_RING_RECORD or length != RECORD_BYTES:
                raise FastrefError(f"record {number} did not come as it was sent")
            fr_ring_mark_acquired(&self.consumer)
            memcpy(record, payload, RECORD_BYTES)
            fr_ring_pop(&self.consumer)
