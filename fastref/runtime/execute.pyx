"""Running what peers ask for: functions, methods and fetches; keeping values, answering.

Whatever runs code of the program, an unpickling too, is called without the drain token; ``answer`` may hold it.
"""

import functools
import logging

import torch
from torch.jit._builtins import _find_builtin

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastref._core cimport FR_FAILPOINT, failpoints, fr_failpoints_here, fr_load32_acquire, fr_load32_relaxed, fr_now_ns, fr_store32_relaxed
from fastref.channels.slots cimport FR_SLOT_ROOM, fr_slot, fr_slot_finish
from fastref.codec.payload cimport Carried, Encoder
from fastref.codec.publishable cimport NOT_PUBLISHABLE, value_publishability
from fastref.codec.stream cimport encode_value
from fastref.rref cimport VALUE_FAILED, VALUE_PENDING, VALUE_READY, OwnedValue, RRef, forks_so_far
from fastref.runtime.calls cimport PUBLISHED, Pending
from fastref.runtime.post cimport LENT_FROM, this_thread
from fastref.runtime.references cimport ASK_TYPE, ASK_WHETHER_THERE, ReferenceCaller
from fastref.wire.frame cimport (FLAG_BLOCK, FLAG_CONTEXT, FLAG_ERROR, FLAG_LOCAL, FLAG_METHOD, FLAG_PUBLISHED, NO_SLOT, PYTHON_REMOTE_CALL,
                                 PYTHON_RET, RREF_FETCH_CALL, fr_block, fr_frame)

from fastref.codec.lookup import find_callable
from fastref.codec.registry import find_method, find_registered
from fastref.codec.script import type_name
from fastref.errors import CallTimeout, PeerError, ProtocolError, RemoteError, ResourceError, StrictModeError
from fastref.futures import Future

__all__ = ["Executor", "Job"]

fr_failpoints_here = failpoints()

logger = logging.getLogger("fastref")

cdef extern from "Python.h":
    ctypedef struct PyFunctionObject:
        PyObject* func_dict
    bint PyFunction_Check(object)
    bint PyMethod_Check(object)
    bint PyCFunction_Check(object)
    PyObject* PyMethod_GET_FUNCTION(object)

cdef object Tensor = torch.Tensor
cdef str MARK = "_wrapped_async_rpc_function"

cdef enum:
    GRACE_NS = 1000000000  # after a call's time, so that its caller has given up himself


cdef class Job:
    """One frame that takes code of the program to deal with."""

    cdef const char* undecoded(self, uint64_t* size) noexcept:
        """The payload that has not been read yet, or NULL."""
        if self.lease is not None:
            size[0] = self.size
            return self.start
        if self.payload is not None:
            size[0] = PyBytes_GET_SIZE(self.payload)
            return PyBytes_AS_STRING(self.payload)
        return NULL

    cdef void decoded(self) noexcept:
        self.payload, self.lease = None, None


cdef class Executor(ReferenceCaller):
    """The part of a runtime that runs jobs and settles their outcomes."""

    def __cinit__(self):
        self.awaiting = set()

    cdef Encoder execute(self, Job job, int* flags):
        """Run a job; returns the encoded answer, or None when there is none to give (yet)."""
        cdef Encoder body
        cdef OwnedValue owned
        cdef RRef rref
        cdef uint64_t size
        cdef const char* payload = job.undecoded(&size)
        try:
            if job.failure is not None:
                raise job.failure
            if payload != NULL:
                job.body = self.decode_any(payload, size, job.head.flags, job.references, job.lease)
                job.decoded()
            job.parked = False
            if job.head.flags & FLAG_CONTEXT and type(job.body) is Carried:
                self._enter_context(job)
            if job.head.kind == RREF_FETCH_CALL:
                rref = job.references[0]
                owned = rref.owned
                if owned is None:
                    raise ProtocolError(f"{self.info} does not own what {job.peer.info} wants to fetch")
                if self._parks(owned, job):
                    return None
                if owned.settled == VALUE_FAILED:
                    flags[0] = FLAG_ERROR
                    body = self.encoder()
                    body.raw(<const char*>(<bytes>owned.error), len(owned.error))
                    return body
                if job.context and owned.gradients and owned.frozen:
                    job.body = owned.value
                    return self.conclude(job, flags)
                if self.has_bit(self.rank, job.peer.rank) and self.offer(owned, rref.fork.index):
                    flags[0] = FLAG_PUBLISHED
                    return self.encoder()
                if owned.frozen:
                    body = self.frozen_copy(owned, flags)
                    if body is not None:
                        return body
                job.body = owned.value
            else:
                if job.head.flags & FLAG_METHOD:
                    rref = job.references[1 if job.head.kind == PYTHON_REMOTE_CALL else 0]
                    if rref.owned is None:
                        raise ProtocolError(f"{self.info} does not own what {job.peer.info} calls")
                    if self._parks(rref.owned, job):
                        return None
                this_thread().context = job.context
                try:
                    job.body = self.call_target(job)
                finally:
                    this_thread().context = 0
            if job.answers_later:
                self._answer_when_done(job)
                return None
            return self.conclude(job, flags)
        except BaseException as error:
            return self.conclude_failed(job, error, flags)

    cdef Encoder conclude(self, Job job, int* flags):
        """What a job's function returned is its body now: keep it, or return its encoding as the answer.

        What is kept is held by nothing else here when holders learn of it: only then can it be published.
        """
        cdef RRef rref
        cdef Encoder body
        cdef uint64_t context
        if job.head.kind == PYTHON_REMOTE_CALL:
            rref = job.references[0]
            if rref.owned.settled != VALUE_PENDING:
                raise ProtocolError(f"entry {rref.fork.index} has a value already")
            rref.owned.value, job.body = job.body, None
            self.settle_value(rref.owned, rref.fork.index, None)
            return None
        body = self.encoder()
        if not job.peer.is_far:
            body.arenas, body.receiver = self.arenas, job.peer.rank
        elif _may_be_large(job.body):
            job.alone = value_publishability(<PyObject*>job.body) != NOT_PUBLISHABLE
        context = self.begin_links(body, job.context, job.peer, False) if job.context else 0
        flags[0] = self.encode_any(body, job.body, job.peer.shares_main, "result")
        if context:
            self.end_links(body, context, job.peer)
            flags[0] |= FLAG_CONTEXT
        return body

    cdef int _enter_context(self, Job job) except -1:
        """A job came with an autograd context: it runs in it, unless that has been let go of meanwhile."""
        cdef Carried carried = <Carried>job.body
        job.body = self.unload(carried, job.peer)
        if self.autograd is not None and self.autograd.enter(carried.context):
            job.context = carried.context
        return 0

    cdef Encoder conclude_failed(self, Job job, object error, int* flags):
        """As ``conclude``, of a function that raised, or whose result cannot travel."""
        cdef RRef rref
        cdef Encoder body
        failure = self.encode_failure(error, self.info)
        if job.head.kind == PYTHON_REMOTE_CALL:
            if job.references and job.references[0] is not None:
                rref = job.references[0]
                self.settle_value(rref.owned, rref.fork.index, failure)
            return None
        flags[0] = FLAG_ERROR
        body = self.encoder()
        body.raw(<const char*>(<bytes>failure), len(failure))
        return body

    cdef int _answer_when_done(self, Job job) except -1:
        """A function marked by ``async_execution`` has returned: its answer is the result of a future. No thread waits."""
        future, job.body = job.body, None
        job.parked = True  # it is not served yet
        self.futures_awaited += 1
        self.awaiting.add(job)
        try:
            future.add_done_callback(functools.partial(self._future_done, job))
        except BaseException:
            self.awaiting.discard(job)
            self.futures_awaited -= 1
            job.parked = False
            raise
        return 0

    def _future_done(self, job: Job, future) -> None:
        if self.fork_count != forks_so_far():
            return  # a child that ``os.fork`` made: its parent answers
        if self._claim(job):
            self._answer_with(job, future)

    def give_up_futures(self) -> None:
        """Have done with futures that have not come in their calls' time: nobody wants them, and leaving must not wait."""
        cdef int64_t now = fr_now_ns()
        cdef Job job
        for item in list(self.awaiting):
            job = <Job>item
            if job.head.deadline_ns and now > job.head.deadline_ns + GRACE_NS and self._claim(job):
                self._answer_with(job, None)
                job.references = []  # the future may live on, and refers to the job

    cdef bint _claim(self, Job job) except -1:
        """True for one only: who is to answer a job whose function has returned a future."""
        try:
            self.awaiting.remove(job)
        except KeyError:
            return False
        return True

    cdef int _answer_with(self, Job job, object future) except -1:
        """Answer a job with the result of a future; None: it did not come in time."""
        cdef Encoder body
        cdef int flags = 0
        try:
            try:
                if future is None:
                    raise CallTimeout("the future of a function marked by async_execution did not come in its call's time")
                job.body = future.value()
                body = self.conclude(job, &flags)
            except BaseException as error:
                body = self.conclude_failed(job, error, &flags)
            if body is not None:
                try:
                    self.answer(job, body, flags)
                except PeerError as error:
                    logger.debug("nobody is left to answer: %s", error)
                self.encoder_done(body)
        finally:
            self.calls_served += 1
            self.futures_awaited -= 1
        return 0

    cdef int unpark(self, list jobs) except -1:
        """Queue jobs whose value is there now."""
        raise NotImplementedError

    cdef void answered_to(self, uint32_t cpu) noexcept:
        """A caller that runs on ``cpu`` waits for what goes into its slot now."""

    cdef object call_target(self, Job job):
        """Call what a frame asks for."""
        cdef OwnedValue owned
        if job.head.flags & FLAG_METHOD:
            owned = (<RRef>job.references[1 if job.head.kind == PYTHON_REMOTE_CALL else 0]).owned
            method, args, kwargs = job.body
            if owned.settled == VALUE_FAILED:
                raise self.decode_failure(owned.error)
            if method == ASK_TYPE:
                return type(owned.value)
            if method == ASK_WHETHER_THERE:
                return None
            if not owned.exposed:
                self.expose(owned)
            func = find_method(owned.value, method) if self.strict else getattr(owned.value, method)
        elif job.head.callable:
            args, kwargs = job.body
            find = find_registered if self.strict else find_callable
            func = find(job.peer.callables, job.head.callable, job.peer.info)
        elif self.strict:
            raise StrictModeError(f"{job.peer.info} sends what to call by value, and this worker is strict: it takes registered names only")
        else:
            func, args, kwargs = job.body
        job.body = None
        job.answers_later = _is_marked(func)
        result = self.call_function(func, args, kwargs) if self.around is None else self.around(func, args, kwargs or {})
        if job.answers_later:
            _require_future(result, func)
        return result

    cpdef object call_function(self, object func, object args, object kwargs):
        """Call a function that a peer named."""
        if PyCFunction_Check(func):
            try:
                return func(*args, **(kwargs or {}))
            except TypeError as error:
                operator = _find_builtin(func)
                if operator is None:
                    raise
                # torch runs these without the interpreter, and programs catch what it says of wrong arguments.
                kinds = [type(value).__name__ for value in args]
                kinds += [f"{name}={type(value).__name__}" for name, value in (kwargs or {}).items()]
                raise RuntimeError("Overloaded torch operator invoked from Python failed to match any schema: "
                                   f"{operator}({', '.join(kinds)}): {error}") from error
        if kwargs is None:
            return func(*args)
        return func(*args, **kwargs)

    def future_of(self, func, args, kwargs):
        """Call a function that a peer named; return a future of its result, its own if ``async_execution`` marked it."""
        result = self.call_function(func, args, kwargs)
        if _is_marked(func):
            _require_future(result, func)
            return result
        future = Future()
        future.set_result(result)
        return future

    cdef bint _parks(self, OwnedValue owned, Job job) except -1:
        """Leave a job with a value that is not there yet. No thread waits for it."""
        if owned.settled != VALUE_PENDING:
            return False
        if owned.waiters is None:
            owned.waiters = []
        owned.waiters.append(job)
        job.parked = True
        if owned.settled != VALUE_PENDING and job in owned.waiters:  # settled between our looks
            owned.waiters.remove(job)
            job.parked = False
            return False
        return True

    def settle_failed(self, index: int, failure: bytes) -> None:
        """The value of an entry never will be; ``failure`` is what ``encode_failure`` made of the reason."""
        owned = <OwnedValue>self.owned[index]
        if owned.settled == VALUE_PENDING:
            self.settle_value(owned, index, failure)

    cdef int settle_value(self, OwnedValue owned, uint32_t index, object error) except -1:
        """A value is there, or never will be: tell whoever waits for it, and publish it if nobody can ever change it."""
        if owned.settled != VALUE_PENDING:
            raise ProtocolError(f"entry {index} has a value already")
        owned.error = error
        self.table.at.descriptors[index].settled_ns = fr_now_ns()  # plain: published by the state
        # What holders read first, then what answers them: who has fetched a value by message finds it published.
        if error is not None:
            self.table.set_state(index, "failed")
            owned.settle(VALUE_FAILED)
        else:
            self.publish(owned, index)
            owned.settle(VALUE_READY)
        FR_FAILPOINT("remote.created")
        self._tell_maker(owned, index, error is not None)
        waiters, owned.waiters = owned.waiters, None
        if waiters:
            self.unpark(waiters)
        return 0

    cdef int _tell_maker(self, OwnedValue owned, uint32_t index, bint failed) except -1:
        """Whoever made a value by ``remote()`` sees in the descriptor that it is there; where no memory is shared he is told."""
        cdef uint64_t maker = owned.name >> 48
        cdef Peer peer
        if maker != self.rank and maker < <uint64_t>len(self.peers) and self.peers[maker] is not None:
            peer = <Peer>self.peers[maker]
            if peer.is_far:
                self.tell_settled(peer, index, failed)
        return 0

    def tell_settled(self, peer, index: int, failed: bool) -> None:
        """Tell a worker with which no memory is shared that a value that it made is there, or never will be."""
        raise NotImplementedError

    cdef int answer(self, Job job, Encoder body, int flags) except -1:
        """Leave the answer in the caller's slot, or send it as a message."""
        cdef fr_frame head
        cdef int64_t position
        cdef fr_slot* slot
        cdef uint64_t size = body.total()
        cdef int64_t lent = -1
        cdef fr_block block
        if fr_load32_acquire(&job.peer.died):
            return 0
        if job.head.slot != NO_SLOT and not (job.peer.is_far or body.references or body.blocks or body.forwarded):
            if size > FR_SLOT_ROOM:
                try:
                    if self.lend(job.peer, body, size, &block):
                        lent = block.offset
                except ResourceError as error:
                    return self.fail_job(job, error)
            if size <= FR_SLOT_ROOM or lent >= 0:
                if lent >= 0:
                    with nogil:
                        body.copy_to(self.arena.base + lent)
                slot = job.peer.slots.claim(job.head.slot, job.head.call)
                if slot == NULL:
                    if lent >= 0:
                        self.arena.give_back(lent)
                    return 0
                FR_FAILPOINT("slot.writing")
                self.answered_to(fr_load32_relaxed(&slot.caller_cpu))
                if lent >= 0:
                    memcpy(slot.data, &block, sizeof(fr_block))
                    flags |= FLAG_BLOCK
                    job.peer.slot_loans.append((job.head.slot, job.head.call, lent))
                    size = sizeof(fr_block)
                else:
                    body.copy_to(slot.data)
                fr_store32_relaxed(&slot.size, size)    # relaxed: published by DONE
                fr_store32_relaxed(&slot.flags, flags)
                with nogil:
                    fr_slot_finish(slot, job.head.call)
                job.peer.release(self.arena)
                return 0
        memset(&head, 0, sizeof(fr_frame))
        head.kind, head.flags, head.slot, head.call = PYTHON_RET, flags, job.head.slot, job.head.call
        try:
            position = self.post(job.peer, &head, body, 0, job.alone)
            if job.alone and position:
                job.peer.lend(position, body)
        except PeerError:
            raise
        except Exception as error:  # no memory for the answer, or a reference in it that cannot travel
            self.fail_job(job, error)
        return 0

    cdef int fail_job(self, Job job, object error) except -1:
        """Answer a job with an exception of our own."""
        cdef Encoder body = self.encoder()
        failure = self.encode_failure(error, self.info)
        body.raw(<const char*>(<bytes>failure), len(failure))
        self.answer(job, body, FLAG_ERROR)
        self.encoder_done(body)
        return 0

    # ---- answers to our own calls

    cdef int complete(self, Job job) except -1:
        """An answer came as a message: settle the call it belongs to."""
        cdef Pending pending
        cdef uint64_t size
        cdef const char* payload = job.undecoded(&size)
        value = error = None
        try:
            if job.failure is not None:
                raise job.failure
            if payload != NULL:
                value = self.outcome(job.peer, payload, size, job.head.flags, job.references, job.lease)
                job.decoded()
            elif job.head.flags & FLAG_PUBLISHED:
                value = PUBLISHED
            elif job.head.flags & FLAG_CONTEXT:
                value = self.unload(<Carried>job.body, job.peer)
            else:
                value = job.body
        except Exception as trouble:
            error = trouble
        except BaseException as trouble:  # reading the answer ran code of the program, which wants to exit
            error = RemoteError(f"reading the answer of {job.peer.info} raised {trouble!r}")
            error.__cause__ = trouble
        pending = self.pending.pop(job.head.call, None)
        if pending is not None:
            this_thread().context = pending.context  # callbacks go on with what the call was part of
            try:
                pending.settle(value, error)
            except BaseException:
                logger.exception("a callback of a future raised")
            this_thread().context = 0
        elif job.head.slot != NO_SLOT and job.head.slot < self.slots.count:
            self.arrived[job.head.call] = (value, error)
            self.slots.finish_here(job.head.slot, job.head.call, FLAG_LOCAL)
            if not self.slots.waits_for(job.head.slot, job.head.call):
                self.arrived.pop(job.head.call, None)  # the caller has given up
        return 0


cdef int _require_future(object value, object func) except -1:
    """Raise when a function marked by ``async_execution`` has returned something else than a future."""
    if not isinstance(value, torch._C.Future):  # what ``then`` returns is one, and no torch.futures.Future
        if isinstance(getattr(func, MARK), torch.jit.ScriptFunction):
            raise TypeError(f"Async functions must return an IValue of Future type, but got {type_name(value)}")
        kind = type(value)
        raise TypeError("Functions decorated with @rpc.async_function must return a torch.futures.Future object, but got "
                        f"{kind.__module__}.{kind.__qualname__}")
    return 0


cdef bint _may_be_large(object value) except -1:
    kind = type(value)
    if kind is Tensor:
        return value.numel() * value.itemsize >= LENT_FROM  # a sparse one has no "nbytes"
    return kind is tuple or kind is list or kind is dict or kind is bytes


cdef bint _is_marked(object func) except -1:
    """Whether ``async_execution`` marked a function; of most the dict need not even be looked at."""
    if PyMethod_Check(func):
        func = <object>PyMethod_GET_FUNCTION(func)
    if PyFunction_Check(func):
        return (<PyFunctionObject*>func).func_dict != NULL and MARK in <object>(<PyFunctionObject*>func).func_dict
    return not isinstance(func, type) and hasattr(func, MARK)
