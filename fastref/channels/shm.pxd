"""The shared-memory channel."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref._core cimport pthread_mutex_t
from fastref.channels.channel cimport Channel, fr_bell, fr_producer


cdef class ShmChannel(Channel):
    cdef fr_producer producer
    cdef fr_bell* bell
    cdef unsigned me
    cdef pthread_mutex_t lock
    cdef object _memory
    cdef readonly uint64_t sent
    cdef readonly uint64_t wakes
