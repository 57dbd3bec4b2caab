"""Stretches in which the cyclic collector must not start."""

cdef void nogc_begin() noexcept
cdef void nogc_end() noexcept
cdef int nogc_pause() noexcept
cdef void nogc_resume(int depth) noexcept
