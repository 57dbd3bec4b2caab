"""What programs call: join a job, call its workers, leave it.

Compiled, so that between ``rpc_sync`` and the ring there is no Python frame.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

cimport cython

from fastref.rref cimport HOW_ASYNC, HOW_REMOTE, HOW_SYNC
from fastref.runtime.references cimport ReferenceCaller

from fastref import autograd, profiling
from fastref.errors import NotInitialized, UsageError
from fastref.futures import Future
from fastref.options import RpcBackendOptions, WorkerInfo
from fastref.rendezvous import plain_number
from fastref.rref import RRef, current_wiring, set_current_wiring
from fastref.runtime.runtime import Runtime

__all__ = [
    "Session",
    "get_worker_info",
    "init_rpc",
    "is_available",
    "join",
    "leave",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
]

_joining = threading.Lock()
_joined = 0  # jobs that this process has joined; equal on all workers of a job that joins again


class Session:
    """What ``init_rpc`` returns: ``with`` leaves the job at the end, gracefully unless the body raised."""

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind, error, trace) -> None:
        shutdown(graceful=kind is None)


def is_available() -> bool:
    """Return True: fastref is here."""
    return True


@cython.annotation_typing(False)  # else world_size=1.5 is taken for 1
def init_rpc(name: str, backend: Any = None, rank: int = -1, world_size: int | None = None,
             rpc_backend_options: RpcBackendOptions | None = None) -> Session:
    """Join a job and start serving. Returns when all workers have joined and serve.

    Without a world size it is a group that workers join and leave while others work: the first may be alone, and each
    call returns when all who are there know the newcomer.

    Parameters
    ----------
    name : str
        This worker's name, unique in the job.
    backend : None
        There is one backend.
    rank : int
        0 <= rank < world_size; -1: as the init method says (``RANK``). In a group without a world size any number below
        256 that no living member has.
    world_size : int, optional
        How many workers the job has; None: as the init method says (``WORLD_SIZE``), else a group without a size.
    rpc_backend_options : RpcBackendOptions, optional
        Timeouts, the init method and sizes.

    Returns
    -------
    Session
        For ``with init_rpc(...):``; it may be ignored.

    Raises
    ------
    UsageError
        RPC is already initialized, or an argument is none that could work.
    RendezvousError
        The workers could not agree, or not all came in time; in a group without a size, a member has the name or the
        rank, or does not answer.

    Source
    ------
    ``torch.distributed.rpc.init_rpc``. Different on purpose: it returns a context manager.
    """
    options = RpcBackendOptions() if rpc_backend_options is None else rpc_backend_options
    if not isinstance(options, RpcBackendOptions):
        raise TypeError("Argument rpc_backend_options must be an instance of RpcBackendOptions")
    if backend is not None:
        raise TypeError("Argument backend must be a member of BackendType")
    join(name, rank, world_size, options)
    return Session()


@cython.annotation_typing(False)
def join(name: str, rank: int, world_size: int | None, options: RpcBackendOptions, store: Any = None) -> None:
    """Join a job, over a store that is there or over the one that the init method leads to."""
    global _joined
    with _joining:
        if current_wiring() is not None:
            current_wiring().check_process()
            raise UsageError("RPC is already initialized")
        try:
            kind = options.runtime_type or Runtime
            rank, world_size = plain_number(rank), plain_number(world_size)
            kind(name, rank, world_size, options, store, count=_joined, before_serving=_begin)
        except BaseException:
            set_current_wiring(None)
            raise
        _joined += 1


def _begin(runtime: Runtime) -> None:
    profiling.attach(runtime)
    autograd.attach(runtime)
    set_current_wiring(runtime)


def shutdown(graceful: bool = True, timeout: float = 0.0) -> None:
    """Leave the job; without one, do nothing.

    Parameters
    ----------
    graceful : bool
        Wait until all workers have called it and no call is under way. In a group without a world size nobody else need
        call it: wait until the calls of this worker are answered, and those of others to it, which then make no more.
    timeout : float
        Seconds for all of it; 0: as long as it takes.

    Raises
    ------
    CallTimeout
        The others did not call it in time. This worker has left all the same.

    Source
    ------
    ``torch.distributed.rpc.shutdown``. Different on purpose: ``timeout`` covers all of it, dead workers are not waited
    for, and a second call does nothing; in a group without a world size any rank may leave, 0 too.
    """
    leave(graceful, timeout)


def leave(graceful: bool, timeout: float, check: Callable[[bool], None] | None = None) -> None:
    """As ``shutdown``; ``check`` as for ``Runtime.shutdown``."""
    runtime = current_wiring()
    if runtime is None:
        return
    runtime.check_process()
    try:
        runtime.shutdown(graceful, timeout, check)
    finally:
        if current_wiring() is runtime:
            set_current_wiring(None)


def get_worker_info(worker_name: str | int | None = None) -> WorkerInfo:
    """Return name and rank of a worker; of this one when none is named.

    Raises
    ------
    NotInitialized
        Before ``init_rpc``.
    UsageError
        When there is no such worker.
    """
    runtime = current_wiring()
    if runtime is None:
        raise NotInitialized("RPC has not been initialized. Call torch.distributed.rpc.init_rpc first.")
    runtime.check_process()
    return runtime.info if worker_name is None else runtime.find(worker_name)


cdef ReferenceCaller _caller():
    """The current runtime."""
    cdef object wiring = current_wiring()
    if wiring is None:
        raise NotInitialized("RPC has not been initialized. Call torch.distributed.rpc.init_rpc first.")
    return <ReferenceCaller>wiring


def rpc_sync(to: str | int | WorkerInfo, func: Callable[..., Any], args: Sequence[Any] | None = None,
             kwargs: Mapping[str, Any] | None = None, timeout: float = -1.0) -> Any:
    """Run ``func(*args, **kwargs)`` on the worker ``to`` and return its result.

    Parameters
    ----------
    to : str, int or WorkerInfo
        A worker's name, its rank, or what ``get_worker_info`` says; this worker too.
    func : callable
        Sent by name; functions that have none the other side knows are sent by value.
    args, kwargs
        Copied. References among them, at any depth, are handed on.
    timeout : float
        Seconds; -1: the default of the options, 0: for ever.

    Raises
    ------
    RemoteError
        What ``func`` raised: a subclass of it and of the original type.
    CallTimeout
        It took longer than ``timeout``. The function may still run.
    WorkerDied
        The worker ended before it answered.

    Source
    ------
    ``torch.distributed.rpc.rpc_sync``.
    """
    return _caller().rpc(HOW_SYNC, to, func, args, kwargs, timeout)


def rpc_async(to: str | int | WorkerInfo, func: Callable[..., Any], args: Sequence[Any] | None = None,
              kwargs: Mapping[str, Any] | None = None, timeout: float = -1.0) -> Future:
    """As ``rpc_sync``, but return a ``Future`` of the result at once; it raises what ``rpc_sync`` would.

    Source
    ------
    ``torch.distributed.rpc.rpc_async``.
    """
    return _caller().rpc(HOW_ASYNC, to, func, args, kwargs, timeout)


def remote(to: str | int | WorkerInfo, func: Callable[..., Any], args: Sequence[Any] | None = None,
           kwargs: Mapping[str, Any] | None = None, timeout: float = -1.0) -> RRef:
    """Run ``func(*args, **kwargs)`` on the worker ``to``, keep the result there and return a reference to it at once.

    What ``func`` raises is raised by ``to_here`` and by methods called through the reference. A timeout given here
    covers the value; the default one covers only the way to the worker, so a slow constructor may take its time.

    Source
    ------
    ``torch.distributed.rpc.remote``. Different on purpose: there the default timeout covers the value too.
    """
    return _caller().rpc(HOW_REMOTE, to, func, args, kwargs, timeout)
