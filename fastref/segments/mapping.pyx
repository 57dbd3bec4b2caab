"""Mappings of files that need no descriptor once they are made.

``mmap.mmap`` keeps a duplicate of the descriptor as long as it lives; with a handful of mappings for each peer that
would be most of what a worker has open.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno

import os

cdef extern from "sys/mman.h" nogil:
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)
    int PROT_READ, PROT_WRITE, PROT_NONE, MAP_SHARED, MAP_PRIVATE, MAP_NORESERVE, MAP_FIXED, MAP_ANONYMOUS
    void* MAP_FAILED

__all__ = ["Mapping", "Reservation"]


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


cdef class Reservation:
    """A range of addresses in which files are mapped and unmapped; a buffer, of which only that may be touched.

    Parameters
    ----------
    size_bytes : int
        Above zero.
    writable : bool
        Whether what is mapped here may be written.
    private : bool
        What is written stays in this process, on pages of its own.

    Raises
    ------
    OSError
        As ``mmap(2)`` says.
    """

    cdef void* start
    cdef readonly Py_ssize_t size_bytes
    cdef readonly bint writable
    cdef int kind

    def __cinit__(self, size_bytes: int, writable: bool, private: bool = False):
        self.start = mmap(NULL, size_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.start == MAP_FAILED:
            self.start = NULL
            raise OSError(errno, os.strerror(errno))
        self.size_bytes, self.writable = size_bytes, writable
        self.kind = MAP_PRIVATE if private else MAP_SHARED

    def place(self, fd: int, offset: int, size_bytes: int) -> None:
        """Map the first ``size_bytes`` bytes of a file, which is that long, at ``offset``.

        Raises
        ------
        OSError
            As ``mmap(2)`` says.
        """
        cdef int protection = PROT_READ | (PROT_WRITE if self.writable else 0)
        self._map(offset, size_bytes, protection, self.kind | MAP_NORESERVE, fd)

    def clear(self, offset: int, size_bytes: int) -> None:
        """Unmap what is mapped in a range: pages of nothing but zeros take its place, which cannot be written.

        Nobody may look there any more; but whoever is misled into doing so by a peer reads nonsense, and lives.

        Raises
        ------
        OSError
            As ``mmap(2)`` says.
        """
        self._map(offset, size_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1)

    cdef int _map(self, Py_ssize_t offset, Py_ssize_t size_bytes, int protection, int flags, int fd) except -1:
        if offset < 0 or size_bytes <= 0 or size_bytes > self.size_bytes or offset > self.size_bytes - size_bytes:
            raise ValueError(f"{size_bytes} bytes at {offset} are outside of {self.size_bytes}")
        if mmap(<char*>self.start + offset, size_bytes, protection, flags | MAP_FIXED, fd, 0) == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        return 0

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.size_bytes)

    def __len__(self) -> int:
        return self.size_bytes

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.size_bytes, not self.writable, flags)
