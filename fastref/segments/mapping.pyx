"""A mapping of a file that needs no descriptor once it is made.

``mmap.mmap`` keeps a duplicate of the descriptor as long as it lives; with a handful of mappings for each peer that
would be most of what a worker has open.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno

import os

cdef extern from "sys/mman.h" nogil:
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_NORESERVE, MAP_FIXED
    void* MAP_FAILED

__all__ = ["Mapping"]


cdef class Mapping:
    """The first ``size_bytes`` bytes of a file; a buffer. Unmapped when the last view of it is gone.

    Parameters
    ----------
    fd : int
        The file; not needed afterwards.
    size_bytes : int
        Above zero; the caller has made sure that the file is that long.
    writable : bool
        Whether it may be written through this mapping.
    private : bool
        What is written stays in this process, on pages of its own; else all who map the file see it.

    Raises
    ------
    OSError
        As ``mmap(2)`` says.
    """

    cdef void* start
    cdef readonly Py_ssize_t size_bytes
    cdef readonly bint writable

    def __cinit__(self, fd: int, size_bytes: int, writable: bool, private: bool = False):
        cdef int protection = PROT_READ | (PROT_WRITE if writable else 0)
        cdef int kind = MAP_PRIVATE if private else MAP_SHARED
        self.start = mmap(NULL, size_bytes, protection, kind | MAP_NORESERVE, fd, 0)
        if self.start == MAP_FAILED:
            self.start = NULL
            raise OSError(errno, os.strerror(errno))
        self.size_bytes, self.writable = size_bytes, writable

    def replace(self, fd: int) -> None:
        """Map another file in the same place, shared and of the same size: who looks here sees that one from now on.

        Raises
        ------
        OSError
            As ``mmap(2)`` says; then the first file is still there.
        """
        cdef int protection = PROT_READ | (PROT_WRITE if self.writable else 0)
        if mmap(self.start, self.size_bytes, protection, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0) == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.size_bytes)

    def __len__(self) -> int:
        return self.size_bytes

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.size_bytes, not self.writable, flags)
