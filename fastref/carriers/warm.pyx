"""Memory for what is received and copied, kept warm between uses, and the thread that does what nobody waits for."""

import atexit

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int64_t, uint64_t

from fastref._core cimport pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock

__all__ = ["WarmBuffer", "keep_warm", "warm_figures"]

cdef extern from "fr_errand.h" nogil:
    void fr_errands_begin(fr_errands*)
    void fr_errands_stop(fr_errands*)
    void fr_errands_before_fork(fr_errands*)
    void fr_errands_after_fork(fr_errands*)

cdef extern from "fr_warm.h" nogil:
    struct fr_warm:
        pthread_mutex_t lock
        size_t limit, kept
        uint64_t warm, fresh
        fr_errands* errands
    void* fr_warm_take(fr_warm*, size_t)
    void fr_warm_give(fr_warm*, void*, size_t)
    void fr_warm_trim(fr_warm*, size_t, int64_t)

cdef extern from "pthread.h" nogil:
    int pthread_atfork(void (*)() noexcept nogil, void (*)() noexcept nogil, void (*)() noexcept nogil)

cdef extern from *:
    """
    static struct fr_warm fr_own_warm;
    static int64_t fr_attend(int64_t now_ns) { return fr_warm_attend(&fr_own_warm, now_ns); }
    static struct fr_errands fr_own_errands = {.idle = fr_attend};
    static inline uint64_t fr_errands_done(void) { return fr_own_errands.done; }
    """
    fr_errands fr_own_errands
    fr_warm fr_own_warm
    uint64_t fr_errands_done()

cdef enum:
    LIMIT = 64 << 20        # bytes that wait, until `keep_warm` says otherwise


cdef fr_errands* errands() noexcept nogil:
    """The one thread's list, for other extensions."""
    return &fr_own_errands


cdef void* take_memory(uint64_t size_bytes) noexcept nogil:
    """Memory for ``size_bytes``, at a multiple of 64; NULL when there is none. Any thread, with or without the lock."""
    return fr_warm_take(&fr_own_warm, size_bytes)


cdef void give_memory(void* start, uint64_t size_bytes) noexcept nogil:
    """Give back what ``take_memory`` returned for that size. Any thread, with or without the interpreter lock."""
    fr_warm_give(&fr_own_warm, start, size_bytes)


cdef void _before_fork() noexcept nogil:
    fr_errands_before_fork(&fr_own_errands)
    pthread_mutex_lock(&fr_own_warm.lock)


cdef void _after_fork() noexcept nogil:
    pthread_mutex_unlock(&fr_own_warm.lock)
    fr_errands_after_fork(&fr_own_errands)


cdef void _in_child() noexcept nogil:
    pthread_mutex_init(&fr_own_warm.lock, NULL)  # what waits there is the child's own, copied when it is written
    fr_errands_begin(&fr_own_errands)


fr_errands_begin(&fr_own_errands)
pthread_mutex_init(&fr_own_warm.lock, NULL)
fr_own_warm.limit, fr_own_warm.errands = LIMIT, &fr_own_errands
pthread_atfork(_before_fork, _after_fork, _in_child)


@atexit.register
def _stop() -> None:
    """Before the interpreter ends: errands may have something to tell it."""
    with nogil:
        fr_errands_stop(&fr_own_errands)


@cython.no_gc
cdef class WarmBuffer:
    """A writable buffer of warm memory, whose bytes are whatever they were.

    Raises
    ------
    MemoryError
        When there is none.
    """

    cdef void* _start
    cdef Py_ssize_t _size_bytes

    def __cinit__(self, size_bytes: int):
        self._size_bytes = size_bytes
        self._start = take_memory(max(size_bytes, 1))
        if self._start == NULL:
            raise MemoryError(f"no memory for a buffer of {size_bytes} bytes")

    def __dealloc__(self):
        if self._start != NULL:
            give_memory(self._start, max(self._size_bytes, 1))

    def __len__(self) -> int:
        return self._size_bytes

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self._start, self._size_bytes, False, flags)


def keep_warm(limit_bytes: int) -> None:
    """Let at most this much freed memory wait for its next use; what is more goes back to the system now."""
    pthread_mutex_lock(&fr_own_warm.lock)
    fr_own_warm.limit = limit_bytes
    pthread_mutex_unlock(&fr_own_warm.lock)
    fr_warm_trim(&fr_own_warm, limit_bytes, 0)


def warm_figures() -> dict:
    """Plain figures: bytes that wait, their limit, pieces taken warm and fresh so far, errands done."""
    pthread_mutex_lock(&fr_own_warm.lock)
    kept, limit, warm, fresh = fr_own_warm.kept, fr_own_warm.limit, fr_own_warm.warm, fr_own_warm.fresh
    pthread_mutex_unlock(&fr_own_warm.lock)
    return dict(kept=kept, limit=limit, warm=warm, fresh=fresh, errands=fr_errands_done())
