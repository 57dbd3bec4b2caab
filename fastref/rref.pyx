"""The handle: who owns a value, under which name, and the calls a program makes on it.

A handle decides nothing. It knows its runtime only as ``Wiring``, the few calls that a runtime answers, so that
references stay below channels, codec and threads.
"""

cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from fastref._core cimport FR_KEPT, Holder, fr_fork

import copy
from types import GenericAlias

from fastref._core import GloballyUniqueId
from fastref.errors import ForkedProcessError, NotInitialized, UsageError
from fastref.options import WorkerInfo

__all__ = ["HOW_ASYNC", "HOW_REMOTE", "HOW_SYNC", "OwnedValue", "RRef", "RRefProxy", "Wiring", "current_wiring",
           "set_current_wiring"]

cdef extern from *:
    """
    #include <pthread.h>
    #include <limits.h>
    #include "fr_atomic.h"
    static unsigned fr_forks;
    static void fr_count_fork(void) { fr_forks++; }
    static void fr_watch_forks(void) { pthread_atfork(NULL, NULL, fr_count_fork); }
    """
    unsigned fr_forks
    void fr_watch_forks()
    void fr_store32_release(uint32_t*, uint32_t) nogil
    void fr_futex_wake(uint32_t*, int) nogil
    int INT_MAX

fr_watch_forks()

# The one slot that says which runtime is current.
_current = None


cdef unsigned forks_so_far() noexcept nogil:
    """How many forks lie between the first process and this one; a child differs from its parent."""
    return fr_forks


def current_wiring():
    """Return the runtime that calls go through, or None before ``init_rpc``."""
    return _current


def set_current_wiring(wiring) -> None:
    """Say which runtime calls go through from now on; None for none."""
    global _current
    _current = wiring


cdef class OwnedValue:
    """A value on its owner: pending, then ready with a value or failed with an exception."""

    def __cinit__(self):
        self.block = -1

    @property
    def rref_id(self) -> GloballyUniqueId:
        """Name of the reference that it was made for."""
        return GloballyUniqueId(self.name >> 48, self.name & (<uint64_t>1 << 48) - 1)

    cdef void settle(self, uint32_t state):
        """Tell threads and parked requests that the value is there. The value or error has been stored."""
        fr_store32_release(&self.settled, state)
        fr_futex_wake(&self.settled, INT_MAX)


cdef class Wiring:
    """What a handle may ask of the runtime that made it."""

    cdef int check(self) except -1:
        """Raise when this process may not use the runtime."""
        if self.fork_count != fr_forks:
            raise ForkedProcessError(
                "this process was made by os.fork() after init_rpc; only the parent may use its references. "
                "Start workers with the spawn or forkserver method and call init_rpc in each of them.")
        return 0

    cdef void release_pins(self) noexcept:
        """Let go of what was held for messages that have been read since."""

    cdef object fetch(self, RRef rref, double timeout_s):
        raise NotImplementedError

    cdef object local(self, RRef rref, double timeout_s):
        raise NotImplementedError

    cdef object invoke(self, RRef rref, str method, tuple args, dict kwargs, double timeout_s, int how):
        raise NotImplementedError

    cdef int freeze(self, RRef rref, bint publish) except -1:
        raise NotImplementedError

    cdef object worker(self, uint16_t rank):
        raise NotImplementedError

    cdef bint confirmed(self, RRef rref) except -1:
        raise NotImplementedError

    cdef int check_creation(self, RRef rref) except -1:
        """Raise when it is known here that the value never was made, or not in the time that it was given."""
        raise NotImplementedError

    cdef object confirmation(self, RRef rref):
        """A future that is done when the value is there, or never will be."""
        raise NotImplementedError

    cdef object type_of(self, RRef rref, double timeout_s):
        """A future of the value's type."""
        raise NotImplementedError

    def new_local(self, rref, value, type_hint):
        """Fill a fresh handle with a value that lives here."""
        raise NotImplementedError


cdef RRef make_rref(Wiring wiring, Holder holder, fr_fork* fork, OwnedValue owned, str type_str):
    """A handle on an entry of which the caller has taken one count for it."""
    cdef RRef rref = RRef.__new__(RRef)
    rref.wiring, rref.holder, rref.fork, rref.owned, rref.type_str = wiring, holder, fork[0], owned, type_str
    return rref


@cython.no_gc_clear
cdef class RRef:
    """A remote reference: a handle to a value that lives on its owner.

    Parameters
    ----------
    value : object
        Wrapped as it is; this worker becomes its owner. Nothing is sent.
    type_hint : type, optional
        The interface of a ScriptModule; nothing else may have one.

    Raises
    ------
    NotInitialized
        Before ``init_rpc``.

    Source
    ------
    ``torch.distributed.rpc.RRef``. Different on purpose: every method that waits takes a timeout, on the owner too.
    """

    def __init__(self, value, type_hint=None):
        if _current is None:
            raise NotInitialized(
                "Current RPC agent is not set! Did you initialize the RPC framework (e.g. by calling `rpc.init_rpc`)?")
        (<Wiring>_current).check()
        _current.new_local(self, value, type_hint)

    def __class_getitem__(cls, item):
        if isinstance(item, tuple) and len(item) != 1:
            raise TypeError(f"RRef has one type argument, the type of its value; got {len(item)}")
        return GenericAlias(cls, item)

    def __dealloc__(self):
        # No message, no lock but the private one: drop a count, perhaps a bit, perhaps leave a note for the runtime.
        if self.holder is not None and self.wiring is not None and self.wiring.fork_count == fr_forks:
            if self.holder.drop(self.fork.index) == FR_KEPT:
                self.wiring.release_pins()

    cdef int _usable(self, what) except -1:
        self.wiring.check()
        if (self.wiring.closed or self.wiring.users_deleted) and self.owned is None:
            raise UsageError(f"{self._describe()} has been deleted. Cannot call {what} on it after deletion.")
        return 0

    cdef object creation_error(self):
        """Why the value never will be made, fresh: the one that is kept must not remember who uses this handle."""
        return copy.copy(self.creation)

    def is_owner(self) -> bool:
        """True when the value lives on this worker."""
        return self.owned is not None

    def owner(self):
        """Return the ``WorkerInfo`` of the worker where the value lives, or lived."""
        self.wiring.check()
        if self.holder is not None and self.holder.epitaph is not None:  # its rank is another's by now
            return WorkerInfo(self.holder.epitaph[0], self.fork.owner)
        return self.wiring.worker(self.fork.owner)

    def owner_name(self) -> str:
        """Return the name of the worker where the value lives, or lived."""
        return self.owner().name

    def confirmed_by_owner(self) -> bool:
        """True once the owner has the value, or knows that it never will."""
        self.wiring.check()
        return self.owned is not None or self.wiring.confirmed(self)

    def to_here(self, timeout: float = -1.0):
        """Return a copy of the value; on the owner the value itself.

        Parameters
        ----------
        timeout : float
            Seconds; -1 for the default, 0 for ever.

        Raises
        ------
        RemoteError
            What the function that should have made the value raised.
        CallTimeout, OwnerDied
            When it does not come in time, or never will.
        """
        self._usable("to_here()")
        if self.owned is not None:
            return self.wiring.local(self, timeout)
        return self.wiring.fetch(self, timeout)

    def local_value(self, timeout: float = 0.0):
        """Return the value itself, waiting until it is there. Only on the owner.

        Parameters
        ----------
        timeout : float
            Seconds; 0 for ever.

        Raises
        ------
        UsageError
            On a worker that does not own the value.
        RemoteError, CallTimeout
            As ``to_here``.
        """
        self._usable("local_value()")
        if self.owned is None:
            raise UsageError(f"For {self._describe()}, can't call localValue() on user "
                             f"{self.wiring.worker(self.wiring.rank)}. Call it on owner {self.owner()}")
        return self.wiring.local(self, timeout)

    def publish(self) -> None:
        """Freeze the present version of the value: from now on users fetch that one, without this worker.

        Later changes do not show until ``publish`` is called again; then users get the new version. Each gets one
        version, whole. It is for owners whose values change, parameters for example. Results that nobody on the owner
        can change are published without it. Make no changes on other threads while it copies.

        Raises
        ------
        UsageError
            On a worker that does not own the value; for a value with references in it.
        ResourceError
            There is no memory for the copy; what was published before stays.
        RemoteError, CallTimeout
            As ``local_value``.
        """
        self._freeze(True)

    def unpublish(self) -> None:
        """Have users ask this worker for the value again, and get it as it is then.

        Raises
        ------
        UsageError
            On a worker that does not own the value.
        """
        self._freeze(False)

    cdef int _freeze(self, bint publish) except -1:
        self._usable("publish()")
        if self.owned is None:
            raise UsageError(f"{self._describe()} cannot be published by user {self.wiring.worker(self.wiring.rank)}, only "
                             f"by its owner {self.owner()}")
        return self.wiring.freeze(self, publish)

    def rpc_sync(self, timeout: float = -1.0):
        """Return a proxy: its methods run where the value lives, and return the result."""
        return _proxy(self, timeout, HOW_SYNC)

    def rpc_async(self, timeout: float = -1.0):
        """Return a proxy: its methods run where the value lives, and return a Future."""
        return _proxy(self, timeout, HOW_ASYNC)

    def remote(self, timeout: float = -1.0):
        """Return a proxy: its methods run where the value lives, and return an RRef to the result."""
        return _proxy(self, timeout, HOW_REMOTE)

    def backward(self, dist_autograd_ctx_id: int = -1, retain_graph: bool = False) -> None:
        """Run the backward pass from the value, a tensor of one element, where it lives.

        Parameters
        ----------
        dist_autograd_ctx_id : int
            The autograd context in which gradients accumulate; without one, on the owner only, they accumulate in the
            ``.grad`` of its tensors.
        retain_graph : bool
            Keep what the pass needs, for another pass.

        Raises
        ------
        UsageError
            The value is no tensor; a user names no context.
        RemoteError
            What ``fastref.autograd.backward`` raised on the owner.

        Source
        ------
        ``torch.distributed.rpc.RRef.backward``.
        """
        self._usable("backward()")
        self.wiring.autograd.backward_of(self, dist_autograd_ctx_id, retain_graph)

    def rref_id(self) -> GloballyUniqueId:
        """Name of the reference in the whole job."""
        return GloballyUniqueId(self.fork.rref_created_on, self.fork.rref_local)

    def _get_type(self, timeout: float = -1.0, blocking: bool = True):
        """Return the type of the value, or, not blocking, a future of it; asked for once, unless that fails."""
        self._usable("_get_type()")
        if self.type_future is not None and self.type_future.done():
            try:
                self.type_future.value()
            except Exception:
                self.type_future = None  # what failed once, by a short timeout for example, may be asked again
        if self.type_future is None:
            self.type_future = self.wiring.type_of(self, timeout)
        return self.type_future.wait() if blocking else self.type_future

    def _get_future(self):
        """Return a future that is done when the value is there; it raises what kept the value from being made."""
        self._usable("_get_future()")
        return self.wiring.confirmation(self)

    def _get_profiling_future(self):
        return self.profiling_future

    def _set_profiling_future(self, future) -> None:
        self.profiling_future = future

    def _serialize(self) -> tuple:
        """Fork the reference for somebody whom the program will hand torch's fork data itself; ``_deserialize`` takes it.

        Until then this worker holds the value for them. References in arguments and results need none of this.

        Raises
        ------
        UsageError
            After ``shutdown``.
        PeerError
            When the request to make the value could not be sent, or the value did not come in the time it was given.
        """
        self.wiring.check()
        self.wiring.check_creation(self)
        if self.wiring.closed or self.wiring.users_deleted:
            raise UsageError(f"{self._describe()} has been deleted. Cannot call fork an UserRRef after deletion.")
        number, type_name = self.wiring.hand_over(self)
        return (self.fork.owner, self.fork.rref_created_on, self.fork.rref_local, self.wiring.rank, number, self.wiring.rank,
                type_name)

    @staticmethod
    def _deserialize(fork_data: tuple):
        """Return the reference that ``_serialize`` forked, from any worker; once.

        Raises
        ------
        UsageError
            It has been taken, or its worker has let go of everything, or this is no fork data.
        """
        if _current is None:
            raise NotInitialized(
                "Current RPC agent is not set! Did you initialize the RPC framework (e.g. by calling `rpc.init_rpc`)?")
        if len(fork_data) != 7:
            raise UsageError(f"Pickled RRefForkData must contain 7 numbers. It has {len(fork_data)}")
        return _current.take_over(fork_data[5], fork_data[4])

    cdef str _describe(self):
        return (f"UserRRef(rref_id=GloballyUniqueId(created_on={self.fork.rref_created_on}, local_id={self.fork.rref_local}), "
                f"fork_id=GloballyUniqueId(created_on={self.fork.fork_created_on}, local_id={self.fork.fork_local}))")

    def __repr__(self) -> str:
        rref_id = GloballyUniqueId(self.fork.rref_created_on, self.fork.rref_local)
        if self.owned is not None:
            return f"OwnerRRef({rref_id})"
        fork_id = GloballyUniqueId(self.fork.fork_created_on, self.fork.fork_local)
        return f"UserRRef(RRefId = {rref_id}, ForkId = {fork_id})"

    def __reduce__(self):
        raise UsageError("Can not pickle rref in python pickler, rref can only be pickled when using RPC")

    def __copy__(self):
        return self.__reduce__()

    def __deepcopy__(self, memo):
        return self.__reduce__()


cdef class _Method:
    cdef RRef rref
    cdef str name
    cdef double timeout_s
    cdef int how

    def __call__(self, *args, **kwargs):
        return self.rref.wiring.invoke(self.rref, self.name, args, kwargs, self.timeout_s, self.how)


cdef class RRefProxy:
    """Calls the methods of a value where it lives: ``rref.rpc_sync().method(*args, **kwargs)``.

    Made by ``RRef.rpc_sync()``, ``rpc_async()`` and ``remote()``, whose timeout each call has. Special methods are
    called by their names, ``rref.rpc_sync().__len__()``.
    """

    cdef RRef rref
    cdef double timeout_s
    cdef int how

    def __getattr__(self, name):
        cdef _Method method
        method = _Method.__new__(_Method)
        method.rref, method.name, method.timeout_s, method.how = self.rref, name, self.timeout_s, self.how
        return method


cdef RRefProxy _proxy(RRef rref, double timeout_s, int how):
    cdef RRefProxy proxy
    rref._usable("a method")
    proxy = RRefProxy.__new__(RRefProxy)
    proxy.rref, proxy.timeout_s, proxy.how = rref, timeout_s, how
    return proxy
