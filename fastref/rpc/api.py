"""What programs for torch reach for in its ``api`` module: calls, collectives over them, and the way out."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fastref import api
from fastref.api import get_worker_info, remote, rpc_async, rpc_sync
from fastref.codec.registry import register
from fastref.errors import CallTimeout, PeerError, StrictModeError, UsageError
from fastref.options import UNSET_RPC_TIMEOUT
from fastref.rpc.agent import current_agent
from fastref.rpc.collective import Gathering as AllGatherStates
from fastref.rpc.collective import gatherings
from fastref.rpc.constants import DEFAULT_SHUTDOWN_TIMEOUT
from fastref.rpc.internal import _internal_rpc_pickler
from fastref.rpc.pickler_calls import PicklerCalls
from fastref.rref import RRef, current_wiring

__all__ = [
    "AllGatherStates",
    "RRef",
    "get_worker_info",
    "method_factory",
    "new_method",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
]

logger = logging.getLogger("fastref")

_ignore_rref_leak = True  # False: leaving complains of values that others still hold
_default_pickler: Any = _internal_rpc_pickler
_thread_local_var = threading.local()


def _is_current_rpc_agent_set() -> bool:
    """Return whether this process has joined a job."""
    return current_wiring() is not None


_get_current_rpc_agent = current_agent


def _set_and_start_rpc_agent(agent: Any) -> None:
    """Take the agent of a backend that is not fastref's. It serves its own calls, not those of this module."""
    logger.warning("the agent %r is not fastref's: calls do not go through it", agent)


def get_rpc_timeout() -> float:
    """Return the default timeout of calls, in seconds."""
    timeout: float = current_agent()._runtime.default_timeout_s
    return timeout


def _set_rpc_timeout(rpc_timeout_s: float) -> None:
    """Set the default timeout of calls that start from here on, in seconds; 0: for ever."""
    current_agent()._runtime.default_timeout_s = rpc_timeout_s


@contextlib.contextmanager
def _use_rpc_pickler(rpc_pickler: Any) -> Iterator[None]:
    """Have calls of this process, and its answers to such calls, go through a pickler of the program for a while.

    Parameters
    ----------
    rpc_pickler : object
        ``serialize(obj) -> (bytes, tensors)`` and ``deserialize(bytes, tensors) -> obj``. Callees must use one that
        reads what it writes.

    Raises
    ------
    StrictModeError
        In a strict job, where nothing is unpickled.
    """
    global _default_pickler
    before = _default_pickler
    _set_pickler(rpc_pickler)
    try:
        yield
    finally:
        _set_pickler(before)


def _set_pickler(rpc_pickler: Any) -> None:
    global _default_pickler
    if current_wiring() is not None:
        check_pickler(rpc_pickler, current_wiring().strict)
    _default_pickler = rpc_pickler
    use_own_pickler()


def check_pickler(rpc_pickler: Any, strict: bool) -> None:
    """Raise ``StrictModeError`` when a job with such options cannot use a pickler."""
    if strict and rpc_pickler is not _internal_rpc_pickler:
        raise StrictModeError(f"a strict job pickles nothing, and cannot use {rpc_pickler!r}")


def use_own_pickler() -> None:
    """Have the current runtime, if there is one, use the pickler that is set."""
    runtime = current_wiring()
    if runtime is not None:
        own = _default_pickler is not _internal_rpc_pickler
        runtime.detour = PicklerCalls(runtime, lambda: _default_pickler) if own else None


def method_factory(method_name: str, docstring: str) -> Callable[..., Any]:
    """Return a function that calls the method of that name of the reference it is given.

    Source
    ------
    ``torch.distributed.rpc.api.method_factory``, which torch's ``RRef`` is made with.
    """

    def method(self: RRef, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, method_name)(*args, **kwargs)

    method.__doc__ = docstring
    return method


new_method = method_factory("to_here", RRef.to_here.__doc__ or "")  # torch's is the last one that it made


# ---- collecting futures

_collecting = threading.Lock()
_collectors = 0


def _collect(future: torch.futures.Future) -> None:
    futures = getattr(_thread_local_var, "future_list", None)
    if futures is not None:
        futures.append(future)


@contextlib.contextmanager
def _wait_all() -> Iterator[None]:
    """Wait at the end for all futures that ``rpc_async`` returned meanwhile in this thread. May be nested."""
    global _collectors
    outer = getattr(_thread_local_var, "future_list", None)
    futures: list[torch.futures.Future] = []
    _thread_local_var.future_list = futures
    with _collecting:
        _collectors += 1
        if current_wiring() is not None:
            current_wiring().collector = _collect
    try:
        yield
    finally:
        with _collecting:
            _collectors -= 1
            if not _collectors and current_wiring() is not None:
                current_wiring().collector = None
        if outer is None:
            del _thread_local_var.future_list
        else:
            _thread_local_var.future_list = outer
        torch.futures.wait_all(futures)


# ---- collectives


@register
def _gather_to_leader(sequence_id: str, worker_name: str, obj: Any, worker_names: set[str]) -> None:
    """On the leader: note what one worker gives."""
    gatherings().round(sequence_id).add(worker_name, obj, worker_names)


@register
def _broadcast_to_followers(sequence_id: str, objects_map: dict[str, Any]) -> None:
    """On a follower: note what all have given."""
    gatherings().settle(sequence_id, objects_map)


@register
def _fail_followers(sequence_id: str, failure: str) -> None:
    """On a follower: note that the leader has given up."""
    gatherings().settle(sequence_id, {}, failure)


def _all_gather(
    obj: Any, worker_names: Iterable[str] | None = None, timeout: float = UNSET_RPC_TIMEOUT
) -> dict[str, Any]:
    """Give an object and return everybody's, by name.

    Parameters
    ----------
    obj : object
    worker_names : iterable of str, optional
        The group, equal on all workers of it; by default the whole job.
    timeout : float
        Seconds for each step; -1: the default for calls, and no limit for the others to come; 0: no limit.

    Raises
    ------
    RuntimeError
        The others did not come, or could not be told, in time.
    WorkerDied
        One of them has died.

    Source
    ------
    ``torch.distributed.rpc.api._all_gather``. Different on purpose: it does not wait for the dead.
    """
    own = get_worker_info().name
    names = set(worker_names or (info.name for info in current_agent().get_worker_infos()))
    leader = min(names)
    call_timeout = get_rpc_timeout() if timeout == UNSET_RPC_TIMEOUT else timeout
    patience = timeout if timeout > 0 else None
    rounds = gatherings()
    sequence_id = rounds.begin(names)
    states = rounds.round(sequence_id)
    try:
        if own == leader:
            _gather_to_leader(sequence_id, own, obj, names)
            try:
                states.wait(patience, lambda: names - set(states.gathered_objects))
            except BaseException as error:
                failure = f"{own} has given up: {error}"
                for name in sorted(states.give_up(failure) - {leader}):
                    with contextlib.suppress(PeerError):  # it has died too
                        rpc_async(name, _fail_followers, (sequence_id, failure))
                raise
            told = {
                name: rpc_async(
                    name, _broadcast_to_followers, (sequence_id, states.gathered_objects), None, call_timeout
                )
                for name in sorted(names - {leader})
            }
            errors: dict[str, RuntimeError] = {}
            for name, future in told.items():
                try:
                    future.wait()
                except RuntimeError as error:
                    errors[name] = error
            if errors:
                raise RuntimeError(
                    f"Followers {list(errors)} timed out in _all_gather after {call_timeout:.2f} seconds."
                    f" The first exception is {next(iter(errors.values()))}"
                )
        else:
            rpc_sync(leader, _gather_to_leader, (sequence_id, own, obj, names), None, call_timeout)
            states.wait(patience, lambda: {leader})
        return states.gathered_objects
    finally:
        rounds.end(sequence_id)


def _barrier(worker_names: Iterable[str]) -> None:
    """Wait until all workers of a group have called it. What goes wrong is logged."""
    get_worker_info()  # which raises without a job
    try:
        _all_gather(None, set(worker_names))
    except RuntimeError:
        logger.exception("Failed to complete barrier")


def _wait_all_workers(timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
    """Wait until all workers have called it; 0: as long as it takes."""
    _all_gather(None, timeout=timeout)


# ---- the way out


def _delete_all_user_and_unforked_owner_rrefs(timeout: float = 100.0) -> None:
    """Let go of all values elsewhere, and wait until the others have let go of the values here.

    Parameters
    ----------
    timeout : float
        Seconds after which it is only logged that they have not.
    """
    runtime = current_agent()._runtime
    runtime.delete_user_references()
    if not runtime.wait_for_others_to_let_go(timeout):
        logger.warning("Timed out waiting for pending OwnerRRefs to be deleted.")


def _destroy_rref_context(ignore_rref_leak: bool) -> None:
    """Complain of values here that others still hold.

    Raises
    ------
    UsageError
        There are some, and they are not to be ignored.
    """
    runtime = current_agent()._runtime
    leaks = runtime.references_of_others()
    if not leaks:
        return
    shown = []
    for index, ranks in leaks.items():
        names = [runtime.peers[rank].name if rank >= 0 else "a worker without a bit" for rank in ranks]
        shown.append(f"Leaking RRef {runtime.owned[index].rref_id}, held by {', '.join(names)}")
    logger.warning("Detected RRef Leaks during shutdown: %s", "; ".join(shown))
    if not ignore_rref_leak:
        raise UsageError("; ".join(shown))


def shutdown(graceful: bool = True, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
    """As ``fastref.shutdown``, with a look at what others still hold if ``_ignore_rref_leak`` is False.

    Raises
    ------
    CallTimeout
        The others did not call it in time. This worker has left all the same.
    UsageError
        Others still hold values that live here, and that is not to be ignored.

    Source
    ------
    ``torch.distributed.rpc.shutdown``.
    """
    runtime = current_wiring()
    if _ignore_rref_leak or runtime is None or not runtime.is_static:  # one who leaves a group asks nobody to let go
        api.leave(graceful, timeout)
    else:
        deadline = time.monotonic() + timeout if timeout else math.inf
        api.leave(graceful, timeout, lambda everybody: _check_for_leaks(deadline, everybody))


def _left(deadline: float) -> float:
    """Return the seconds until ``deadline``, 0 for as long as it takes."""
    if deadline == math.inf:
        return 0
    left = deadline - time.monotonic()
    if left <= 0:
        raise CallTimeout("shutdown has taken longer than it may")
    return left


def _check_for_leaks(deadline: float, everybody: bool) -> None:
    """With all quiet: let go of everything, wait for the others to do so, and complain of what is left."""
    if everybody:  # torch's steps, which programs put others in the place of
        _wait_all_workers(_left(deadline))
    _delete_all_user_and_unforked_owner_rrefs()
    _destroy_rref_context(_ignore_rref_leak)
