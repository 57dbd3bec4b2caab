"""Stretches in which the cyclic collector must not start.

It starts wherever an object is made, and then runs destructors of the program. These may call anything, and wait for it:
not while their thread is the only one that could read the answer, and not under a lock that the call needs too.

The switch is one for the whole process. So it is off only between ``nogc_begin`` and ``nogc_end`` of a thread that has the
interpreter lock; where such a thread gives that away, it pauses. Another thread's own ``gc.disable()`` would be lost
otherwise.
"""

import os
import threading

__all__ = ["NoGcLock"]

cdef extern from *:
    """
    static __thread int fr_nogc_depth;
    """
    int fr_nogc_depth

cdef extern from "Python.h":
    int PyGC_Disable()
    int PyGC_Enable()

cdef int threads        # that are inside; more than one only where the interpreter lock was waited for
cdef bint was_enabled


cdef inline void enter() noexcept:
    global threads, was_enabled
    threads += 1
    if threads == 1:
        was_enabled = PyGC_Disable()


cdef inline void leave() noexcept:
    global threads
    threads -= 1
    if not threads and was_enabled:
        PyGC_Enable()


cdef void nogc_begin() noexcept:
    """Let the collector not start from here on. May be nested."""
    global fr_nogc_depth
    fr_nogc_depth += 1
    if fr_nogc_depth == 1:
        enter()


cdef void nogc_end() noexcept:
    """End the stretch that this thread has begun last."""
    global fr_nogc_depth
    fr_nogc_depth -= 1
    if not fr_nogc_depth:
        leave()


cdef int nogc_pause() noexcept:
    """Suspend all stretches of this thread, while it does without the interpreter lock; for ``nogc_resume``."""
    global fr_nogc_depth
    cdef int depth = fr_nogc_depth
    if depth:
        fr_nogc_depth = 0
        leave()
    return depth


cdef void nogc_resume(int depth) noexcept:
    """Go on with what ``nogc_pause`` has suspended."""
    global fr_nogc_depth
    if depth:
        fr_nogc_depth = depth
        enter()


def _forget() -> None:
    """In a forked child: no other thread is inside any more."""
    global threads
    cdef bint others = threads > (fr_nogc_depth > 0)
    threads = fr_nogc_depth > 0
    if others and not threads and was_enabled:
        PyGC_Enable()


cdef class NoGcLock:
    """A lock under which no destructor of the program runs. Its holder must not make one run itself."""

    cdef object _lock

    def __init__(self):
        self._lock = threading.Lock()

    def __enter__(self):
        cdef int depth
        if not self._lock.acquire(False):
            depth = nogc_pause()
            try:
                self._lock.acquire()
            finally:
                nogc_resume(depth)
        nogc_begin()
        return self

    def __exit__(self, *error):
        nogc_end()
        self._lock.release()


os.register_at_fork(after_in_child=_forget)
