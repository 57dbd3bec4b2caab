"""Calls whose functions, arguments and results go through a pickler of the program."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from fastref.futures import Future, future_from
from fastref.rpc.functions import async_execution
from fastref.rpc.internal import PythonUDF, _internal_rpc_pickler
from fastref.rref import HOW_REMOTE, HOW_SYNC, RRef, current_wiring

__all__ = ["PicklerCalls"]

Pickled = tuple[bytes, list]


class PicklerCalls:
    """Makes all calls of a runtime.

    Parameters
    ----------
    runtime : Runtime
    pickler : callable
        Returns the pickler that is set when a call is made.
    """

    def __init__(self, runtime: Any, pickler: Callable[[], Any]) -> None:
        self._runtime: Any = weakref.proxy(runtime)  # which refers to this: its memory goes with its last user
        self._pickler = pickler

    def rpc(self, how: int, to: Any, func: Any, args: tuple, kwargs: dict | None, timeout: float) -> Any:
        """As the runtime's ``rpc``."""
        pickler = self._pickler()
        pickled = pickler.serialize(PythonUDF(func, args, kwargs or {}))
        if how == HOW_REMOTE:
            return self._runtime.rpc_unprofiled(HOW_REMOTE, to, _make, pickled, None, timeout)
        answer = self._runtime.rpc_unprofiled(how, to, _run, pickled, None, timeout)
        return (
            pickler.deserialize(*answer)
            if how == HOW_SYNC
            else future_from(answer, lambda it: pickler.deserialize(*it))
        )

    def invoke(self, how: int, rref: RRef, method: str, args: tuple, kwargs: dict | None, timeout: float) -> Any:
        """As the runtime's ``invoke``: a method of a value."""
        return self.rpc(how, rref.owner(), _call_method, (rref, method, args, kwargs or {}), None, timeout)

    def to_here(self, rref: RRef, timeout: float) -> Any:
        """As the runtime's ``fetch``."""
        pickled: Pickled = self._runtime.rpc_unprofiled(HOW_SYNC, rref.owner(), _fetch, (rref,), None, timeout)
        return self._pickler().deserialize(*pickled)

    def serialize(self, value: Any) -> Pickled:
        """Pickle a result for somebody who calls so."""
        pickled: Pickled = self._pickler().serialize(value)
        return pickled

    def deserialize(self, data: bytes, tensors: list) -> Any:
        """Unpickle what somebody calls so."""
        return self._pickler().deserialize(data, tensors)


# ---- at the callee


def _here() -> PicklerCalls:
    runtime = current_wiring()
    return runtime.detour or PicklerCalls(runtime, lambda: _internal_rpc_pickler)


def _outcome(data: bytes, tensors: list) -> Future:
    """Run what was pickled; return a future of what it returns."""
    func, args, kwargs = _here().deserialize(data, tensors)
    if func is _call_method:
        rref, method, args, kwargs = args
        func = getattr(rref.local_value(), method)
    future: Future = current_wiring().future_of(func, args, kwargs)
    return future


@async_execution
def _run(data: bytes, tensors: list) -> Future:
    return future_from(_outcome(data, tensors), _here().serialize)


@async_execution
def _make(data: bytes, tensors: list) -> Future:
    return _outcome(data, tensors)


def _fetch(rref: RRef) -> Pickled:
    pickled: Pickled = _here().serialize(rref.local_value())
    return pickled


def _call_method(rref: RRef, method: str, args: tuple, kwargs: dict) -> Any:
    """Stand in a pickle for a method of a value, which the callee looks up."""
    raise NotImplementedError
