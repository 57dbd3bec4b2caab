"""Calls in: the threads that serve, draining, taking references."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastref.carriers.borrow cimport Lease
from fastref.channels.channel cimport Arrival, fr_bell, fr_listener
from fastref.channels.slots cimport fr_waiting
from fastref.runtime.execute cimport Executor, Job
from fastref.runtime.peer cimport Peer
from fastref.wire.frame cimport FrameView, fr_frame


cdef extern from "fr_serve.h" nogil:
    struct fr_serving:
        fr_bell* bell
        fr_listener* listener
        const uint64_t* hint
        uint32_t token
        uint32_t watcher
        uint64_t progress
        uint32_t away
        uint32_t queued
        uint32_t errands
        uint32_t stopping
        uint32_t partner_cpu
        fr_waiting waiting
    bint fr_serve_take_token(fr_serving*)
    void fr_serve_expect(fr_serving*)
    void fr_serve_pass_token(fr_serving*)
    bint fr_serve_retake_token(fr_serving*)
    void fr_serve_block(fr_serving*)
    void fr_serve_unblock(fr_serving*)
    void fr_serve_kick(fr_serving*)
    void fr_serve_stop(fr_serving*)
    bint fr_serve_wait_briefly(fr_serving*)
    bint fr_serve_wait_leader(fr_serving*, int64_t)
    bint fr_serve_follow(fr_serving*, int64_t)


cdef class Server(Executor):
    cdef fr_serving serving
    cdef readonly uint32_t running      # functions inside user code, not blocked in fastref
    cdef readonly uint32_t threads, parked
    cdef public uint32_t thread_cap
    cdef object queue                   # jobs that wait for a thread
    cdef list completions               # answers to settle without the token
    cdef readonly object errands                 # callables to run without the token
    cdef object _threads
    cdef bint flushed                   # nothing that was kept back waits for room
    cdef readonly object watched                 # dead workers whose last records are still to be read
    cdef object controls                # bookkeeping frames to act on once the inbox is at rest
    cdef public uint64_t calls_served
    cdef public bint gil_is_profiled
    cdef readonly int64_t gil_waits, gil_waited_ns  # how often and how long a woken leader waited for it
    cdef readonly dict credit_of        # index -> rank for whose remote() the entry is open

    cdef int lead(self) except -1
    cdef int _lead(self) except -1
    cdef Job drain(self, bint run_calls)
    cdef Job accept(self, Arrival* arrival, Peer peer)
    cdef Lease _bulk_of(self, FrameView* view, Peer peer)
    cdef uint32_t site_of(self, fr_frame* head)
    cdef int take_references(self, FrameView* view, Peer peer, list references) except -1
    cdef int run(self, Job job, bint leading) except -1
    cdef void count_queue(self) noexcept
