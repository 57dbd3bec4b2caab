"""Memory for what is received, and the thread that does what nobody waits for."""

from libc.stdint cimport uint64_t


cdef extern from "fr_errand.h" nogil:
    struct fr_errands:
        pass


cdef fr_errands* errands() noexcept nogil
cdef void* take_memory(uint64_t size_bytes) noexcept nogil
cdef void give_memory(void* start, uint64_t size_bytes) noexcept nogil
