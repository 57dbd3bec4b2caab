"""Calls out: synchronous and asynchronous.

A synchronous call makes no Future and crosses no thread of its own process: the calling thread writes the frame, polls
its response slot and reads the answer there.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastref._core cimport (fr_add32, fr_cpu, fr_fence, fr_futex_wait, fr_futex_wake, fr_load32_acquire, fr_load32_relaxed,
                            fr_now_ns, fr_store32_release)
from fastref.carriers.borrow cimport Lease
from fastref.channels.slots cimport (FR_SLOT_ROOM, WAIT_DONE, WAIT_INTERRUPTED, WAIT_PEER_DIED, WAIT_STOPPED,
                                     WAIT_TIMED_OUT, fr_slot, fr_waiting)
from fastref.codec.payload cimport Carried, Encoder
from fastref.rref cimport RRef
from fastref.runtime.peer cimport Peer
from fastref.runtime.publish cimport Publisher
from fastref.runtime.post cimport this_thread
from fastref.wire.frame cimport (FLAG_BLOCK, FLAG_CONTEXT, FLAG_ERROR, FLAG_LOCAL, FLAG_METHOD, FLAG_PICKLED, FLAG_PUBLISHED, INTERN, NO_SLOT,
                                 PYTHON_CALL, fr_block, fr_frame)

import operator
from threading import get_ident
from sys import modules as _modules
from types import BuiltinFunctionType, FunctionType
from typing import SupportsIndex

import cython
import torch

from fastref.codec import mainmodule
from fastref.codec.registry import by_name, name_of
from fastref.errors import CallTimeout, NotInitialized, PeerError, ProtocolError, WorkerDied
from fastref.futures import Future

__all__ = ["Caller", "Pending"]

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef extern from *:
    """
    #include "fr_wait.h"
    static inline int fr_settled_spin(uint32_t *word, struct fr_waiting *w)
    {
        return FR_SPIN_UNTIL(w, fr_load32_acquire(word) != 0);
    }
    """
    int fr_settled_spin(uint32_t*, fr_waiting*) nogil
    int INT_MAX

cdef int64_t NEVER = 0x7FFFFFFFFFFFFFFF
cdef object PUBLISHED = object()    # the answer to a fetch that need not be answered: look at the descriptor again
cdef int64_t SETTLING_NS = 1000000      # time for another thread to finish settling a call

# What `Future()` and `set_result` come to, without the Python frames in between: they were a quarter of a call.
cdef object _new_future = Future.__new__
cdef object _init_future = torch._C.Future.__init__
cdef object _set_result = torch._C.Future.set_result
cdef list _NO_DEVICES = []


@cython.no_gc
cdef class Pending:
    """One asynchronous call that has not been answered.

    The garbage collector does not track it: each call in flight would bring the next full collection nearer, and the
    only cycle through it, with its future, is cut when it is settled.
    """

    cdef int settle(self, object value, object error) except -1:
        """Note the outcome, once; wake whoever waits."""
        if self.told:
            return 0
        self.told = True
        # A future that is told is let go of: it refers to us, and its result must not wait for the garbage collector.
        future, self.future = self.future, None
        try:
            if future is None:
                self.value, self.error = value, error
            elif error is not None:
                future.set_exception(error)
            else:
                _set_result(future, value)
        finally:
            fr_store32_release(&self.settled, 1)
        fr_fence()  # SYNC: settled before sleepers; pairs with the waiter's sleepers before settled
        if fr_load32_relaxed(&self.sleepers):
            fr_futex_wake(&self.settled, INT_MAX)
        return 0

    def give_up(self, error) -> None:
        """Settle it with an error, unless an answer has come; one that comes later is nobody's."""
        if self.caller.pending.pop(self.call, None) is not None:
            self.settle(None, error)

    def wait(self) -> None:
        """Wait until the outcome is there. Signals are handled meanwhile."""
        cdef int64_t slice_ns = self.caller.slice_ns, left
        if fr_load32_acquire(&self.settled):
            return
        self.caller.blocked(True)
        try:
            with nogil:
                fr_settled_spin(&self.settled, &self.caller.fetch_waiting)
            while not fr_load32_acquire(&self.settled):
                left = slice_ns
                if self.deadline_ns:
                    left = self.deadline_ns - fr_now_ns()
                    if left <= 0:
                        self.caller.expire()  # at its next tick the monitor would
                        left = SETTLING_NS
                    if slice_ns >= 0:
                        left = min(left, slice_ns)
                with nogil:
                    fr_add32(&self.sleepers, 1)
                    fr_fence()
                    if not fr_load32_acquire(&self.settled):
                        fr_futex_wait(&self.settled, 0, left)
                    fr_add32(&self.sleepers, <uint32_t>-1)
                PyErr_CheckSignals()
                self.caller.check()
                if self.caller.interruptions:
                    self.caller._check_interruption()
                if self.caller.closed:
                    self.settle(None, NotInitialized("the runtime was shut down before the answer came"))
        finally:
            self.caller.blocked(False)


cdef class Caller(Publisher):
    """The calling half of a runtime."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pending, self.arrived = {}, {}
        self.interruptions = {}
        self.next_expiry_ns = NEVER

    cdef void blocked(self, bint yes) noexcept:
        """This thread is about to wait, or has waited: a serving thread counts as idle meanwhile."""

    cdef int prepare(self, Peer peer, fr_frame* head, Encoder body, object func, RRef target, str method, tuple args,
                     dict kwargs) except -1:
        """Write the callable and the arguments of a call into ``body``."""
        cdef uint64_t context = this_thread().context
        memset(head, 0, sizeof(fr_frame))
        head.slot = NO_SLOT
        head.call = self.new_call()
        if not peer.is_far:
            body.arenas, body.receiver = self.arenas, peer.rank
        if context:
            context = self.begin_links(body, context, peer, True)
        self._write_call(peer, head, body, func, target, method, args, kwargs)
        if context:
            self.end_links(body, context, peer)
            head.flags |= FLAG_CONTEXT
        return 0

    cdef int _write_call(self, Peer peer, fr_frame* head, Encoder body, object func, RRef target, str method, tuple args,
                         dict kwargs) except -1:
        cdef bint shares_main = peer.shares_main
        if target is not None:
            body.references.append(target)
            head.callable = <uint32_t>hash(method) ^ target.fork.index
            head.flags = FLAG_METHOD | self.encode_any(body, (method, args, kwargs or None), shares_main, "method")
            return 0
        head.callable = self.number_of(peer, func)
        if head.callable:
            head.flags = self.encode_any(body, (args, kwargs or None), shares_main, "call")
        else:
            self.encode_pickled(body, (func, args, kwargs or None), shares_main)
            head.flags = FLAG_PICKLED
        return 0

    cdef uint32_t number_of(self, Peer peer, object func) except? 0xFFFFFFFF:
        """The number under which the peer knows a callable; 0 when it has to be pickled."""
        cdef object known
        kind = type(func)
        if kind is not FunctionType and kind is not BuiltinFunctionType and kind is not type:
            if not self.strict:
                return 0
            name_of(func)  # which says so, should it not even be hashable
        known = peer.numbers.get(func)
        if known is not None:
            number, names, parts = <tuple>known
            found = (<dict>names).get(parts[0]) if type(names) is dict else None
            for part in parts[1:]:
                found = getattr(found, part, None)
            if found is func:
                return number
            del peer.numbers[func]  # rebound since: look again
        return self._introduce(peer, func)

    def _introduce(self, peer, func) -> int:
        """Tell the peer a number for a callable that it can find by name; 0 when it cannot."""
        if self.strict:
            name = name_of(func)
            return self._give_number(peer, func, name, by_name, (name,))
        module, qualname = getattr(func, "__module__", None), getattr(func, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(qualname, str) or "<locals>" in qualname:
            return 0
        if mainmodule.owns(func):
            if not peer.shares_main or not mainmodule.is_shared(func):
                return 0
            module = "__main__"
        home = _modules.get(module)
        parts = tuple(qualname.split("."))
        found = home
        for part in parts:
            found = getattr(found, part, None)
        if found is not func:
            return 0
        return self._give_number(peer, func, (module, qualname), vars(home), parts)

    cdef object _give_number(self, Peer peer, object func, object introduction, dict names, tuple parts):
        """Tell the peer a number for what ``introduction`` says; ``names`` and ``parts`` lead to it here."""
        cdef fr_frame head
        cdef Encoder body
        peer.numbers_given += 1
        number = peer.numbers_given
        body = self.encoder()
        memset(&head, 0, sizeof(fr_frame))
        head.kind, head.slot, head.callable = INTERN, NO_SLOT, number
        self.encode_any(body, introduction, False, "name")
        self.post(peer, &head, body, 0)
        self.encoder_done(body)
        peer.numbers[func] = (number, names, parts)
        return number

    def interrupt(self, thread: int, error, is_meant) -> None:
        """Have the call that a thread waits for raise an error; its answer is nobody's then.

        At once if the answer is to come into a slot, else within 100 ms. ``is_meant()``, asked by that thread, says
        whether it still waits for the call that is meant.
        """
        self.interruptions[thread] = (error, is_meant)
        self.slots.wake_waiting()

    cdef int _check_interruption(self) except -1:
        found = self.interruptions.pop(get_ident(), None)
        if found is not None:
            error, is_meant = found
            if is_meant():
                raise error
        return 0

    def wait_aside(self, lock, timeout_s: float) -> bool:
        """Acquire a lock that another thread releases; a serving thread that waits so counts as idle. -1: for ever."""
        self.blocked(True)
        try:
            return lock.acquire(timeout=timeout_s)
        finally:
            self.blocked(False)

    # ---- synchronous

    def check_process(self) -> None:
        """Raise in a child that ``os.fork`` made."""
        self.check()

    def find(self, to):
        """Return the ``WorkerInfo`` of a worker by name or rank, which may be an integer of any library."""
        return self.peer_of(operator.index(to) if isinstance(to, SupportsIndex) else to).info

    def close(self) -> None:
        """Refuse further use; wake every thread that waits, and fail what nobody will answer any more."""
        cdef Pending pending
        self.closed = True
        self.slots.stop()
        for item in list(self.pending.values()):
            pending = <Pending>item
            if self.pending.pop(pending.call, None) is not None:
                pending.settle(None, NotInitialized("the runtime was shut down before the answer came"))

    cdef object call(self, Peer peer, object func, RRef target, str method, tuple args, dict kwargs, double timeout_s):
        """Run a function, or a method of ``target``, on the peer and return its result."""
        cdef fr_frame head
        cdef Encoder body = self.encoder()
        self.prepare(peer, &head, body, func, target, method, args, kwargs)
        head.kind = PYTHON_CALL
        return self.exchange(peer, &head, body, timeout_s, func if target is None else method)

    cdef object exchange(self, Peer peer, fr_frame* head, Encoder body, double timeout_s, object what):
        """Send a frame and wait for its answer in a response slot."""
        cdef int slot
        cdef int64_t deadline_ns = self.deadline(timeout_s)
        cdef int64_t position
        slot = self.slots.begin(head.call, &peer.died)
        if slot < 0:
            return self.exchange_pending(peer, head, body, timeout_s, what)
        head.slot, head.deadline_ns = slot, deadline_ns
        try:
            position = self.post(peer, head, body, deadline_ns, True)
        except BaseException:
            self.slots.give_up(slot, True)
            raise
        if not peer.is_far or not peer.channel.borrows(position):
            self.encoder_done(body)
            return self._await_slot(peer, slot, head, deadline_ns, timeout_s, what)
        try:
            return self._await_slot(peer, slot, head, deadline_ns, timeout_s, what)
        finally:
            self.take_back(peer, position, body)
            self.encoder_done(body)

    cdef object _await_slot(self, Peer peer, int slot, fr_frame* head, int64_t deadline_ns, double timeout_s, object what):
        cdef int status
        if peer.cpu == fr_cpu():  # it runs when we sleep; if it has preempted us already, the answer is there
            status = self.slots.look(slot)
        elif peer.rank != self.rank and self.slots.wait_briefly(slot):
            status = WAIT_DONE
        else:
            with nogil:
                status = self.slots.wait(slot, deadline_ns, 0)
        if status != WAIT_DONE:
            self._wait_longer(peer, slot, deadline_ns, timeout_s, what)
        return self.read_slot(peer, slot, head.call, ~head.callable)

    cdef int _wait_longer(self, Peer peer, int slot, int64_t deadline_ns, double timeout_s, object what) except -1:
        """Spinning brought nothing: sleep until the answer is in the slot. Else the slot is given up, and this raises."""
        cdef int64_t slice_ns = self.slice_ns
        cdef int status
        cdef bint waiting = True
        self.blocked(True)
        try:
            while True:
                with nogil:
                    status = self.slots.wait(slot, deadline_ns, slice_ns)
                if status == WAIT_DONE:
                    return 0
                PyErr_CheckSignals()
                self.check()
                if self.interruptions:
                    self._check_interruption()
                if status == WAIT_INTERRUPTED:
                    if not deadline_ns or fr_now_ns() < deadline_ns:
                        continue
                    status = WAIT_TIMED_OUT
                waiting = False
                if self.slots.give_up(slot, status == WAIT_PEER_DIED) == WAIT_DONE:
                    return 0
                if status == WAIT_PEER_DIED:
                    raise peer.died_error(isinstance(what, str))  # a method or a fetch: of a value that is gone
                if status == WAIT_STOPPED:
                    raise NotInitialized("the runtime was shut down before the answer came")
                self.raise_timeout(peer, _name_of(what), timeout_s, self.inherits(timeout_s, deadline_ns))
        except BaseException:  # a signal handler may raise anything
            if waiting and self.slots.give_up(slot, False) == WAIT_DONE:
                self.slots.end(slot)
            raise
        finally:
            self.blocked(False)

    cdef object read_slot(self, Peer peer, int slot, uint64_t call, uint32_t site):
        """Read the answer in a slot that is DONE, and free the slot."""
        cdef fr_slot* s = &self.slots.slots[slot]
        cdef char[FR_SLOT_ROOM] copy
        cdef uint32_t size = fr_load32_relaxed(&s.size), flags = fr_load32_relaxed(&s.flags)
        cdef fr_block block
        cdef Lease lease
        cdef const char* payload
        peer.cpu = fr_load32_relaxed(&s.callee_cpu)
        if flags & FLAG_LOCAL:
            self.slots.end(slot)
            value, error = self.arrived.pop(call)
            if error is not None:
                raise error
            return value
        try:
            if size > FR_SLOT_ROOM:
                raise ProtocolError(f"worker {peer.info.name!r} left an answer of {size} bytes in a slot of {FR_SLOT_ROOM}")
            if flags & FLAG_BLOCK:
                if peer.is_far:
                    raise ProtocolError(f"an answer of worker {peer.info.name!r}, with whom no memory is shared, lies in memory")
                memcpy(&block, s.data, sizeof(fr_block))
                lease = peer.arena.take(block.offset, block.size, block.index, block.generation, site)
                payload = <const char*>lease.start if lease is not None else peer.arena.borrow(block.offset, block.size)
                return self.outcome(peer, payload, block.size, flags, [], lease)
            memcpy(copy, s.data, size)
            return self.outcome(peer, copy, size, flags, _NOTHING, None)
        finally:
            self.slots.end(slot)

    cdef object outcome(self, Peer peer, const char* payload, uint64_t size, int flags, list references, Lease lease):
        """Return the result in an answer, or raise the exception in it."""
        if flags & FLAG_ERROR:
            raise self.decode_failure(payload[:size])
        if flags & FLAG_PUBLISHED:
            return PUBLISHED
        value = self.decode_any(payload, size, flags, references, lease)
        return self.unload(<Carried>value, peer) if flags & FLAG_CONTEXT else value

    cdef object exchange_pending(self, Peer peer, fr_frame* head, Encoder body, double timeout_s, object what):
        """As ``exchange``, with the answer as a message: all slots are taken."""
        cdef Pending pending = self.pend(peer, head, timeout_s, None, what)
        try:
            self.post(peer, head, body, pending.deadline_ns)
            self.encoder_done(body)
            pending.wait()
        except BaseException:
            self.pending.pop(pending.call, None)
            raise
        if pending.error is not None:
            raise pending.error
        return pending.value

    # ---- asynchronous

    cdef Pending pend(self, Peer peer, fr_frame* head, double timeout_s, object future, object what):
        """Note a call whose answer comes as a message."""
        cdef Pending pending = Pending.__new__(Pending)
        head.deadline_ns = self.deadline(timeout_s)
        pending.caller, pending.peer, pending.call, pending.deadline_ns = self, peer, head.call, head.deadline_ns
        pending.timeout_s, pending.future, pending.what, pending.site = timeout_s, future, what, ~head.callable
        pending.inherits = self.inherits(timeout_s, head.deadline_ns)
        pending.context = this_thread().context
        self.pending[head.call] = pending
        if pending.deadline_ns and pending.deadline_ns < self.next_expiry_ns:
            self.next_expiry_ns = pending.deadline_ns
            self.expires_sooner()
        return pending

    def expires_sooner(self) -> None:
        """``next_expiry_ns`` is earlier than it was: for whoever sleeps until then."""

    def expire(self) -> None:
        """Fail the pending calls whose time is over."""
        cdef Pending pending
        cdef int64_t now = fr_now_ns(), following = NEVER
        if now < self.next_expiry_ns:
            return
        for item in list(self.pending.values()):
            pending = <Pending>item
            if not pending.deadline_ns:
                continue
            if pending.deadline_ns > now:
                following = min(following, pending.deadline_ns)
            elif self.pending.pop(pending.call, None) is not None:
                try:
                    self.raise_timeout(pending.peer, _name_of(pending.what), pending.timeout_s, pending.inherits)
                except CallTimeout as error:
                    pending.settle(None, error)
        self.next_expiry_ns = following

    def fail_pending(self, rank: int) -> None:
        """Fail the pending calls to a worker that died."""
        cdef Pending pending
        for item in list(self.pending.values()):
            pending = <Pending>item
            # Dead: by now another may have its rank.
            if pending.peer.rank == rank and pending.peer.is_dead and self.pending.pop(pending.call, None) is not None:
                pending.settle(None, pending.peer.died_error(isinstance(pending.what, str)))

    @property
    def calls_pending(self) -> int:
        """Asynchronous calls without an answer."""
        return len(self.pending)

    cdef object call_async(self, Peer peer, object func, RRef target, str method, tuple args, dict kwargs, double timeout_s):
        """As ``call``, but return a Future at once."""
        cdef fr_frame head
        cdef Encoder body = self.encoder()
        cdef Pending pending
        self.prepare(peer, &head, body, func, target, method, args, kwargs)
        head.kind = PYTHON_CALL
        future = _new_future(Future)
        _init_future(future, _NO_DEVICES)
        pending = self.pend(peer, &head, timeout_s, future, func if target is None else method)
        future._pending = pending
        try:
            self.post(peer, &head, body, pending.deadline_ns)
        except PeerError as error:
            self.pending.pop(pending.call, None)
            pending.settle(None, peer.died_error(True) if target is not None and type(error) is WorkerDied else error)
        except BaseException:
            self.pending.pop(pending.call, None)
            raise
        self.encoder_done(body)
        if self.collector is not None:
            self.collector(future)
        if pending.peer.is_dead and self.pending.pop(pending.call, None) is not None:
            pending.settle(None, peer.died_error(target is not None))  # it died after the sweep over pending calls
        return future


cdef list _NOTHING = []


cdef object _name_of(what):
    return getattr(what, "__qualname__", None) or str(what)
