"""Calls through references: making them with ``remote()``, waiting for their values, fetching, calling their methods."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from fastref._core cimport (FR_FAILPOINT, FR_FORM_ASK, FR_FORM_BLOCK, FR_FORM_INLINE, FR_INLINE_VALUE, FR_LOST,
                            FR_NO_ENTRY, FR_VALUE_PENDING, FR_VALUE_READY, failpoints, fr_descriptor, fr_descriptor_read, fr_failpoints_here,
                            fr_fence_acquire, fr_fork, fr_futex_wait, fr_holder_adopt, fr_load32_acquire, fr_load32_relaxed,
                            fr_now_ns, fr_published)
from fastref.carriers.borrow cimport LEASE_FROM, Lease
from fastref.channels.slots cimport fr_waiting
from fastref.codec.payload cimport Encoder
from fastref.rref cimport (HOW_ASYNC, HOW_REMOTE, HOW_SYNC, VALUE_FAILED, VALUE_PENDING, VALUE_READY, OwnedValue, RRef,
                           make_rref)
from fastref.runtime.calls cimport PUBLISHED, Caller
from fastref.runtime.peer cimport Peer
from fastref.runtime.post cimport this_thread
from fastref.wire.frame cimport CREDIT_REQUEST, FLAG_CONTEXT, FLAG_GRADIENTS, FLAG_PICKLED, FLAG_PLAIN, NO_SLOT, PYTHON_REMOTE_CALL, RREF_FETCH_CALL, fr_frame

import torch

from fastref.codec.registry import register
from fastref.codec.script import ANY_TYPE, type_name, type_string
from fastref.errors import CallTimeout, NotInitialized, PeerError, ProtocolError, ReferenceLost, UsageError
from fastref.futures import Future
from fastref.rref import current_wiring

__all__ = ["ReferenceCaller", "use_profiler_flag"]

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef extern from *:
    """
    #include "fr_table.h"
    #include "fr_wait.h"
    static inline int fr_descriptor_spin(struct fr_descriptor *d, uint32_t *died, struct fr_waiting *w)
    {
        return FR_SPIN_UNTIL(w, fr_load32_acquire(&d->state) != FR_VALUE_PENDING || fr_load32_relaxed(died));
    }
    """
    int fr_descriptor_spin(fr_descriptor*, uint32_t*, fr_waiting*) nogil

cdef extern from *:
    """
    #include <stdbool.h>
    typedef bool (*fr_flag)(void);
    """
    ctypedef bint (*fr_flag)() noexcept nogil

fr_failpoints_here = failpoints()

cdef fr_flag _flag = NULL


def use_profiler_flag(address: int) -> None:
    """Have ``bool()`` at an address say whether a torch profiler is on in the calling thread; torch is asked else."""
    global _flag
    _flag = <fr_flag><size_t>address


cdef inline bint _profiled() except -1:
    return _flag() if _flag != NULL else torch.autograd._profiler_enabled()


cdef tuple _row(object args):
    """Positional arguments; what is false stands for none, as in torch."""
    try:
        return tuple(args)
    except TypeError:
        if args:
            raise
        return ()


cdef uint64_t NUMBER_MASK = (<uint64_t>1 << 48) - 1    # the part of an id that its maker counts
cdef list _NOTHING = []

# In the place of a method's name, which neither can be.
ASK_TYPE = "_get_type()"
ASK_WHETHER_THERE = "_get_future()"

NEVER_MADE = "RRef creation via rpc.remote() timed out, and it is possible that the RRef on the owner node does not exist."


cdef class ReferenceCaller(Caller):
    """The part of a runtime that makes and uses references, beside plain calls."""

    def __cinit__(self):
        self.on_their_way = {}

    def rpc(self, how: int, to, func, args, kwargs, timeout: float):
        """Call ``func`` on the worker ``to``: HOW_SYNC, HOW_ASYNC or HOW_REMOTE."""
        cdef Peer peer
        cdef tuple row
        self.check()
        if self.closed:
            raise NotInitialized("RPC has not been initialized. Call torch.distributed.rpc.init_rpc first.")
        peer = self.peer_of(to)
        row = () if args is None else <tuple>args if type(args) is tuple else _row(args)
        if kwargs is not None and type(kwargs) is not dict:
            if kwargs and not hasattr(kwargs, "keys"):
                raise TypeError(f"kwargs must be a mapping, not {type(kwargs).__name__}")
            kwargs = dict(kwargs or ())
        if how != HOW_REMOTE and not callable(func):
            raise TypeError("function should be callable.")
        if self.detour is not None:
            return self.detour.rpc(how, peer.info, func, row, kwargs, timeout)
        if _profiled() and self.profiler is not None:
            return self.profiler.rpc(how, peer.info, func, row, kwargs, timeout)
        return self._rpc(how, peer, func, row, kwargs, timeout)

    def rpc_unprofiled(self, how: int, to, func, args: tuple, kwargs, timeout: float):
        """As ``rpc``, but no profiler sees it."""
        return self._rpc(how, self.peer_of(to), func, args, kwargs, timeout)

    cdef object _rpc(self, int how, Peer peer, object func, tuple row, dict kwargs, double timeout):
        if how == HOW_REMOTE:
            return self.call_remote(peer, func, None, None, row, kwargs, timeout)
        if how == HOW_SYNC:
            return self.call(peer, func, None, None, row, kwargs, timeout)
        return self.call_async(peer, func, None, None, row, kwargs, timeout)

    # ---- remote

    cdef object call_remote(self, Peer peer, object func, RRef target, str method, tuple args, dict kwargs, double timeout_s):
        """Run a function on the peer, keep the result there, and return a reference to it at once."""
        cdef fr_frame head
        cdef Encoder body
        cdef RRef rref
        cdef fr_fork fork
        cdef int64_t deadline_ns = self.deadline(timeout_s)
        cdef uint64_t rref_id, fork_id
        if fr_load32_acquire(&peer.died):
            raise peer.died_error(target is not None)
        rref_id = self.ids.next()
        fork_id = self.ids.next()
        memset(&fork, 0, sizeof(fr_fork))
        fork.owner, fork.parent = peer.rank, self.rank
        fork.rref_created_on = fork.fork_created_on = self.rank
        fork.rref_local, fork.fork_local = rref_id & NUMBER_MASK, fork_id & NUMBER_MASK
        fork.has_entry = 1
        if peer.rank == self.rank:
            rref = self.own_pending(&fork, deadline_ns)
        else:
            try:
                fork.index, fork.generation = self.credit(peer, deadline_ns, timeout_s)
            except CallTimeout as error:
                if timeout_s == -1.0:
                    raise
                fork.has_entry = 0
                rref = make_rref(self, None, &fork, None, None)
                rref.creation = CallTimeout(f"{error}. {NEVER_MADE}", peer.info.name)
                return rref
            fr_holder_adopt(&peer.holder.h, fork.index, fork.generation)
            rref = make_rref(self, peer.holder, &fork, None, None)
        body = self.encoder()
        body.references.append(rref)
        try:
            self.prepare(peer, &head, body, func, target, method, args, kwargs)
            head.kind = PYTHON_REMOTE_CALL
            if timeout_s != -1.0:
                rref.value_deadline_ns = head.deadline_ns = deadline_ns
            FR_FAILPOINT("remote.before_send")
            self.post(peer, &head, body, deadline_ns)
            FR_FAILPOINT("remote.sent")
        except PeerError as error:
            rref.creation = error
        self.encoder_done(body)
        return rref

    cdef RRef own_pending(self, fr_fork* fork, int64_t deadline_ns):
        """A reference to a value of our own that is not there yet."""
        cdef OwnedValue owned = OwnedValue.__new__(OwnedValue)
        owned.name = <uint64_t>fork.rref_created_on << 48 | fork.rref_local
        fork.index, fork.generation = self.open_entry_for_value(deadline_ns)
        self.own(fork.index, owned)
        return make_rref(self, self.table.holder, fork, owned, None)

    def new_local(self, rref, value, type_hint):
        """Fill a fresh handle with a value that lives here; it gets an entry when it is first handed on."""
        cdef RRef handle = <RRef>rref
        cdef uint64_t number = self.ids.next()
        handle.type_str = type_string(value, type_hint)
        handle.wiring = self
        handle.owned = OwnedValue.__new__(OwnedValue)
        handle.owned.value, handle.owned.name = value, number
        handle.owned.settled = VALUE_READY
        memset(&handle.fork, 0, sizeof(fr_fork))
        handle.fork.owner = handle.fork.parent = handle.fork.rref_created_on = handle.fork.fork_created_on = self.rank
        handle.fork.rref_local = handle.fork.fork_local = number & NUMBER_MASK

    def hand_over(self, rref: RRef) -> tuple:
        """Hold a reference for whoever will ask for it by the number returned; return torch's name for its type, too."""
        number = self.ids.next() & NUMBER_MASK
        self.on_their_way[number] = rref
        if rref.type_str is not None:
            return number, rref.type_str
        is_there = rref.owned is not None and rref.owned.settled == VALUE_READY
        return number, type_name(rref.owned.value) if is_there else ANY_TYPE

    def take_over(self, parent: int, number: int):
        """Return what a worker holds under a number that ``hand_over`` returned there."""
        if parent == self.rank:
            return _claim(number)
        return self.rpc_unprofiled(HOW_SYNC, parent, _claim, (number,), None, -1.0)

    cdef object local(self, RRef rref, double timeout_s):
        """Wait for a value of our own and return it."""
        cdef OwnedValue owned = rref.owned
        cdef int64_t creation_ns = rref.value_deadline_ns
        cdef int64_t deadline_ns, slice_ns = self.slice_ns, left
        self.check_creation(rref)
        if owned.settled == VALUE_PENDING:
            deadline_ns = self.deadline(timeout_s)
            if creation_ns and (not deadline_ns or creation_ns < deadline_ns):
                deadline_ns = creation_ns
            self.blocked(True)
            try:
                while fr_load32_acquire(&owned.settled) == VALUE_PENDING:
                    left = slice_ns
                    if deadline_ns:
                        left = deadline_ns - fr_now_ns()
                        if left <= 0:
                            if deadline_ns == creation_ns:
                                self.check_creation(rref)
                            self.raise_timeout(self.peers[self.rank], "local_value()", timeout_s, self.inherits(timeout_s, deadline_ns))
                        if slice_ns >= 0:
                            left = min(left, slice_ns)
                    with nogil:
                        fr_futex_wait(&owned.settled, VALUE_PENDING, left)
                    PyErr_CheckSignals()
                    if self.closed:
                        raise NotInitialized("the runtime was shut down before the value came")
            finally:
                self.blocked(False)
            self.check_creation(rref)
        if owned.settled == VALUE_FAILED:
            raise self.decode_failure(owned.error)
        if not owned.exposed:
            self.expose(owned)
        return owned.value

    cdef tuple credit(self, Peer peer, int64_t deadline_ns, double timeout_s):
        """An entry that the peer opened for us; asks for more and waits when there is none."""
        cdef fr_frame head
        while True:
            try:
                index, generation = peer.credits.pop()
                return index, generation
            except IndexError:
                pass
            if fr_load32_acquire(&peer.died):
                raise peer.died_error()
            with peer.guard:
                ask = not peer.credits_asked and not peer.credits
                peer.credits_asked = peer.credits_asked or ask
            if ask:
                memset(&head, 0, sizeof(fr_frame))
                head.kind, head.slot = CREDIT_REQUEST, NO_SLOT
                self.post(peer, &head, None, deadline_ns)
            self.blocked(True)
            try:
                self.drain_while_waiting()
                with peer.guard:
                    if not peer.credits:
                        peer.lock.wait(0.05)
            finally:
                self.blocked(False)
            if deadline_ns and fr_now_ns() > deadline_ns:
                why = f" ({peer.credits_refused})" if peer.credits_refused else ""
                self.raise_timeout(peer, f"remote(): no free table entry{why}", timeout_s, self.inherits(timeout_s, deadline_ns))

    # ---- fetch

    cdef object fetch(self, RRef rref, double timeout_s):
        """Return a copy of the value a reference names, from its owner's memory if it is published there."""
        if self.detour is not None:
            return self.detour.to_here(rref, timeout_s)
        if _profiled() and self.profiler is not None:
            return self.profiler.to_here(rref, timeout_s)
        return self._fetch(rref, timeout_s)

    def fetch_unprofiled(self, rref: RRef, timeout: float):
        """As ``rref.to_here(timeout)`` on a user, but no profiler sees it."""
        return self._fetch(rref, timeout)

    cdef object _fetch(self, RRef rref, double timeout_s):
        cdef Peer peer
        cdef fr_descriptor* d
        cdef fr_frame head
        cdef Encoder body
        cdef bint ends_with_creation
        cdef uint64_t context
        cdef int64_t deadline_ns = -1
        cdef double left_s = timeout_s, wait_s
        if rref.creation is not None:
            raise rref.creation_error()
        peer = self.owner_of(rref)
        d = &rref.holder.h.at.descriptors[rref.fork.index]
        if rref.type_str is not None and rref.type_str.startswith("__torch__."):
            raise UsageError(f"{rref._describe()} is an RRef to a ScriptModule. It can't be sent through RPC from owner, "
                             f"{peer.info}, to user, {self.info}.")
        if fr_load32_acquire(&d.state) == FR_VALUE_PENDING:
            with nogil:
                fr_descriptor_spin(d, &peer.died, &self.fetch_waiting)
        if fr_load32_acquire(&peer.died):
            raise peer.died_error(True)
        self.check_creation(rref)
        while True:
            if fr_load32_acquire(&d.state) == FR_VALUE_READY and fr_load32_relaxed(&d.form) != FR_FORM_ASK:
                value = self.read_published(rref, peer)
                if value is not PUBLISHED:
                    return value
            self.fetched_by_message += 1
            if deadline_ns < 0:
                deadline_ns = self.deadline(timeout_s)
            memset(&head, 0, sizeof(fr_frame))
            head.kind, head.slot, head.call = RREF_FETCH_CALL, NO_SLOT, self.new_call()
            head.callable = rref.fork.index
            body = self.encoder()
            body.references.append(rref)
            context = this_thread().context
            if context and self.begin_links(body, context, peer, True):
                self.encode_any(body, None, False, "fetch")
                head.flags = FLAG_CONTEXT
            ends_with_creation = self._ends_with_creation(rref, deadline_ns)
            wait_s = max((rref.value_deadline_ns - fr_now_ns()) / 1e9, 1e-9) if ends_with_creation else left_s
            value = PUBLISHED  # or not in time
            try:
                value = self.exchange(peer, &head, body, wait_s, "to_here()")
            except CallTimeout:
                self.check_creation(rref)
                if not ends_with_creation:
                    if left_s != timeout_s:
                        self.raise_timeout(peer, "to_here()", timeout_s, self.inherits(timeout_s, deadline_ns))
                    raise
            if value is not PUBLISHED:
                return value
            if deadline_ns:  # one for all questions
                left_s = (deadline_ns - fr_now_ns()) / 1e9
                if left_s <= 0:
                    self.raise_timeout(peer, "to_here()", timeout_s, self.inherits(timeout_s, deadline_ns))

    cdef bint _ends_with_creation(self, RRef rref, int64_t deadline_ns) except -1:
        """Whether who waits for a value has to stop when its remote() is out of time, before his own deadline."""
        if not rref.value_deadline_ns:
            return False
        if fr_load32_acquire(&rref.holder.h.at.descriptors[rref.fork.index].state) != FR_VALUE_PENDING:
            return False
        return not deadline_ns or rref.value_deadline_ns < deadline_ns

    cdef int check_creation(self, RRef rref) except -1:
        """Raise when the value did not come, or has not come, within the time that its remote() was given."""
        cdef fr_descriptor* d
        cdef bint pending
        if rref.creation is not None:
            raise rref.creation_error()
        if not rref.value_deadline_ns:
            return 0
        d = &rref.holder.h.at.descriptors[rref.fork.index]
        pending = fr_load32_acquire(&d.state) == FR_VALUE_PENDING
        if (fr_now_ns() if pending else d.settled_ns) > rref.value_deadline_ns:
            raise CallTimeout(NEVER_MADE, (<Peer>self.peers[rref.fork.owner]).info.name)
        return 0

    cdef object read_published(self, RRef rref, Peer peer):
        """Decode a published value straight from the owner's memory; PUBLISHED when it has to be asked for after all.

        Our bit or fork keeps the value's entry open, unless all others take us for dead, and we have not noticed yet. So
        the generation is looked at before, and again when all is read.
        """
        cdef fr_descriptor* d = &rref.holder.h.at.descriptors[rref.fork.index]
        cdef fr_published seen
        cdef int tries
        for tries in range(4):
            if not fr_descriptor_read(d, &seen) or seen.form == FR_FORM_ASK:
                return PUBLISHED
            _check_generation(rref, d, peer)
            FR_FAILPOINT("publish.seen")
            if seen.flags & FLAG_GRADIENTS and this_thread().context:
                return PUBLISHED  # of a copy no gradient comes back
            if seen.form > FR_FORM_BLOCK or seen.flags & ~(FLAG_PICKLED | FLAG_PLAIN | FLAG_GRADIENTS):
                raise ProtocolError(f"worker {peer.info.name!r} published a value in form {seen.form} with flags {seen.flags:#x}")
            if seen.form == FR_FORM_INLINE:
                if seen.size > FR_INLINE_VALUE:
                    raise ProtocolError(f"worker {peer.info.name!r} published {seen.size} bytes in {FR_INLINE_VALUE}")
                value = self.decode_any(<const char*>seen.words, seen.size, seen.flags, _NOTHING, None)
            elif not peer.arena.finds(seen.block.offset, seen.size):
                return PUBLISHED  # in a file that we have not been sent yet
            elif seen.block.index == FR_NO_ENTRY:
                value = self.decode_any(peer.arena.borrow(seen.block.offset, seen.size), seen.size, seen.flags, _NOTHING, None)
            elif peer.holder.take_unpinned(seen.block.index, seen.block.generation) == FR_LOST:
                continue  # withdrawn, or replaced by the next version, since we looked
            else:
                value = self._read_block(rref, peer, &seen)
            self.fetched_directly += 1
            fr_fence_acquire()  # SYNC: the value before the generation; pairs with the owner's new generation before a new value
            _check_generation(rref, d, peer)
            return value
        return PUBLISHED

    cdef object _read_block(self, RRef rref, Peer peer, fr_published* seen):
        """Decode a block that is held for us, and let go of it; large tensors go on holding it."""
        cdef Lease lease = None
        cdef const char* payload
        try:
            if seen.size >= LEASE_FROM:
                lease = peer.arena.take(seen.block.offset, seen.size, seen.block.index, seen.block.generation, ~rref.fork.index)
            payload = <const char*>lease.start if lease is not None else peer.arena.borrow(seen.block.offset, seen.size)
            return self.decode_any(payload, seen.size, seen.flags, _NOTHING, lease)
        finally:
            peer.holder.drop_block(seen.block.index)

    cdef object confirmation(self, RRef rref):
        cdef double timeout_s = 0
        if rref.value_deadline_ns:
            timeout_s = max((rref.value_deadline_ns - fr_now_ns()) / 1e9, 1e-9)
        future = self._ask(rref, ASK_WHETHER_THERE, timeout_s)
        if not future.done():
            return future
        try:
            future.value()
        except CallTimeout as error:
            if not str(error).startswith(NEVER_MADE):
                return future
            # It was over before the owner could be asked: to whoever waits that is the same as a moment later.
            peer = <Peer>self.peers[rref.fork.owner]
            late = CallTimeout("RPCErr:1:RPC ran for more than set timeout and will now be marked with an error: remote() on "
                               f"worker {peer.info.name!r}", peer.info.name)
            late.__cause__ = error
            future = Future()
            future.set_exception(late)
        except Exception:
            pass  # for whoever waits
        return future

    cdef object type_of(self, RRef rref, double timeout_s):
        future = self._ask(rref, ASK_TYPE, timeout_s)
        if rref.owned is None and self.profiler is not None and _profiled():
            return self.profiler.asked_for_type(rref, future)
        return future

    cdef object _ask(self, RRef rref, str question, double timeout_s):
        """A future of what the owner of a value says about it; as with a method, no thread waits for the value."""
        if rref.creation is None and (rref.owned is None or rref.owned.settled == VALUE_PENDING):
            return self._invoke(rref, question, (), None, timeout_s, HOW_ASYNC)
        future = Future()
        if rref.creation is not None:
            future.set_exception(rref.creation)
        elif rref.owned.settled == VALUE_FAILED:
            future.set_exception(self.decode_failure(rref.owned.error))
        else:
            future.set_result(type(rref.owned.value) if question == ASK_TYPE else None)
        return future

    cdef bint confirmed(self, RRef rref) except -1:
        if rref.fork.parent != self.rank:
            return True  # who was handed it holds its bit, which the owner sees; no word from there is needed
        if rref.creation is not None:
            return False
        return fr_load32_acquire(&rref.holder.h.at.descriptors[rref.fork.index].state) != FR_VALUE_PENDING

    cdef object invoke(self, RRef rref, str method, tuple args, dict kwargs, double timeout_s, int how):
        if rref.creation is None:
            if self.detour is not None:
                return self.detour.invoke(how, rref, method, args, kwargs, timeout_s)
            if _profiled() and self.profiler is not None:
                return self.profiler.invoke(how, rref, method, args, kwargs, timeout_s)
        return self._invoke(rref, method, args, kwargs, timeout_s, how)

    cdef object _invoke(self, RRef rref, str method, tuple args, dict kwargs, double timeout_s, int how):
        cdef Peer peer
        if rref.creation is not None:
            raise rref.creation_error()
        try:
            peer = self.owner_of(rref) if rref.holder is not None else <Peer>self.peers[self.rank]
        except PeerError as error:
            if how != HOW_ASYNC:
                raise
            future = Future()
            future.set_exception(error)
            return future
        if fr_load32_acquire(&peer.died) and how == HOW_SYNC:
            raise peer.died_error(True)
        if how == HOW_SYNC:
            return self.call(peer, None, rref, method, args, kwargs, timeout_s)
        if how == HOW_ASYNC:
            return self.call_async(peer, None, rref, method, args, kwargs, timeout_s)
        return self.call_remote(peer, None, rref, method, args, kwargs, timeout_s)


cdef int _check_generation(RRef rref, fr_descriptor* d, Peer peer) except -1:
    if fr_load32_acquire(&d.generation) != rref.fork.generation:
        raise ReferenceLost(f"worker {peer.info.name!r} has let go of the value that {rref!r} names", peer.info.name)
    return 0


def _claim(number: int):
    """Return what is held here under a number, and let go of it."""
    runtime = current_wiring()
    try:
        return runtime.on_their_way.pop(number)
    except KeyError:
        raise UsageError(f"{runtime.info} holds no reference under {number}: each can be taken once") from None


register(_claim)  # of strict jobs, too
