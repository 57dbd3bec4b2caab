"""Calls of a thread that is profiled: each is a range there, and brings back what its callee did."""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
import time
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function

from fastref.futures import Future, future_from
from fastref.profiling import traces
from fastref.profiling.recording import Call, Served, begin, record, serving
from fastref.rref import HOW_ASYNC, HOW_REMOTE, HOW_SYNC, current_wiring
from fastref.runtime.references import use_profiler_flag

__all__ = ["CallProfiler", "attach"]

UNCLAIMED = 1024
"""Records of ``remote()`` that their callers have not fetched: one that died never will."""

_MODES = {HOW_SYNC: "sync", HOW_ASYNC: "async", HOW_REMOTE: "remote"}


class CallProfiler:
    """Makes the calls of threads in which a torch profiler is on."""

    def __init__(self, runtime: Any) -> None:
        self._runtime: Any = weakref.proxy(runtime)  # which refers to this: its memory goes with its last user
        self._numbers = itertools.count()

    def rpc(self, how: int, to: Any, func: Any, args: tuple, kwargs: dict | None, timeout: float) -> Any:
        """As the runtime's ``rpc``."""
        name = _name_of(func)
        return self._call(how, to, name, (name, False, func, args, kwargs), timeout)

    def invoke(self, how: int, rref: Any, method: str, args: tuple, kwargs: dict | None, timeout: float) -> Any:
        """As the runtime's ``invoke``: a method of a value."""
        return self._call(how, rref.owner(), method, (method, True, rref, args, kwargs), timeout)

    def to_here(self, rref: Any, timeout: float) -> Any:
        """As the runtime's ``fetch``."""
        span = _begin(f"to_here#({self._runtime.info.name})->({rref.owner().name})", False)
        try:
            return self._runtime.fetch_unprofiled(rref, timeout)
        finally:
            span.end()

    def asked_for_type(self, rref: Any, future: Future) -> Future:
        """Show a question for the type of a value, which is under way, as the call that it is in torch."""
        span = _begin(self._key(HOW_ASYNC, "_rref_typeof_on_owner", rref.owner()), True)
        return future_from(future, lambda value: value, span.end)

    def _key(self, how: int, name: str, to: Any) -> str:
        return f"rpc_{_MODES[how]}#{name}({self._runtime.info.name} -> {to.name})"

    def _call(self, how: int, to: Any, name: str, work: tuple, timeout: float) -> Any:
        span = _begin(self._key(how, name, to), how != HOW_SYNC)
        call = self._runtime.rpc_unprofiled
        try:
            if how == HOW_SYNC:
                result, span.call.served = call(HOW_SYNC, to, _serve, work, None, timeout)
                span.end()
                return result
            if how == HOW_ASYNC:
                future = call(HOW_ASYNC, to, _serve, work, None, timeout)
                return self._collected(future_from(future, functools.partial(_unpack, span.call), span.end))
            number = (self._runtime.rank, next(self._numbers))
            rref = call(HOW_REMOTE, to, _serve_remote, (number, *work), None, timeout)
            future = call(HOW_ASYNC, to, _claim, (number,), None, 0.0)
            rref._set_profiling_future(future_from(future, functools.partial(_keep, span.call), span.end))
            return rref
        except BaseException:
            span.end()
            raise

    def _collected(self, future: Future) -> Future:
        if self._runtime.collector is not None:
            self._runtime.collector(future)
        return future


def attach(runtime: Any) -> None:
    """Have torch's profilers see the calls of a runtime, unless it is strict: they go as arguments of another call."""
    use_profiler_flag(_profiler_flag())
    torch._C._distributed_rpc._set_profiler_node_id(runtime.rank)
    runtime.profiler = None if runtime.strict else CallProfiler(runtime)


def _profiler_flag() -> int:
    """Return the address of torch's ``bool profilerEnabled()``, 0 if this torch has none.

    Asked by its Python name it takes 40 ns, which a call of under 2 us would feel.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library))._ZN5torch8profiler4impl15profilerEnabledEv
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


# ---- ranges here


class _Span:
    """A call's range: in the program's profile, or in what this thread records for its own caller."""

    def __init__(self, key: str, is_async: bool) -> None:
        self.call = Call(key, time.time_ns(), is_async)
        self._over: torch.futures.Future | None = None
        served = serving()
        if served is not None:
            served.calls.append(self.call)
            return
        traces.note(self.call)
        span = record_function(key)
        span.__enter__()
        # A future carries the state of this thread's profiler to whichever thread ends the range.
        self._over = torch.futures.Future()
        span._call_end_callbacks_on_future(self._over)

    def end(self) -> None:
        """It is over; from any thread. Only the first end counts."""
        if self.call.end_ns:
            return
        self.call.end_ns = time.time_ns()
        if self._over is not None:
            self._over.set_result(None)


_begin = _Span


def _unpack(call: Call, answer: tuple[Any, Served]) -> Any:
    result, call.served = answer
    return result


def _keep(call: Call, served: Served | None) -> None:
    call.served = served


def _name_of(func: Any) -> str:
    builtin = torch.jit._builtins._find_builtin(func)
    if builtin is not None:
        return str(builtin)
    if isinstance(func, torch.jit.ScriptFunction):
        return str(torch._jit_internal._qualified_name(func))
    return getattr(func, "__qualname__", None) or type(func).__qualname__


# ---- at the callee


def _serve(*work: Any) -> Future:
    """Run a function for a caller who profiles; the answer is (result, record)."""
    served, outcome = _recorded(*work)
    return future_from(outcome, lambda result: (result, served))


_unclaimed: OrderedDict[tuple[int, int], Future] = OrderedDict()
_claiming = threading.Lock()


def _serve_remote(number: tuple[int, int], *work: Any) -> Future:
    """Run the function of a ``remote()``; the answer is the result, and the record waits for ``_claim``."""
    served = None
    try:
        served, outcome = _recorded(*work)
    except BaseException:
        _record_of(number).set_result(served)
        raise
    outcome.add_done_callback(lambda _: _record_of(number).set_result(served))
    return outcome


def _claim(number: tuple[int, int]) -> Future:
    """Return a future of the record of a ``remote()``, once."""
    future = _record_of(number)

    def forget(_: Any) -> None:
        with _claiming:
            _unclaimed.pop(number, None)

    future.add_done_callback(forget)
    return future


def _record_of(number: tuple[int, int]) -> Future:
    with _claiming:
        future = _unclaimed.setdefault(number, Future())
        if len(_unclaimed) > UNCLAIMED:
            _unclaimed.popitem(last=False)
    return future


# As ``async_execution`` does: they return futures of their answers.
_MARKED: tuple[Any, ...] = (_serve, _serve_remote, _claim)
for _function in _MARKED:
    _function._wrapped_async_rpc_function = _function


def _recorded(name: str, is_method: bool, what: Any, args: tuple, kwargs: dict | None) -> tuple[Served, Future]:
    """Run a function, or a method of a value, and return the record of it and a future of its result."""
    runtime = current_wiring()
    served = begin(name, runtime.info)

    def run() -> Future:
        func = getattr(what.local_value(), name) if is_method else what
        future: Future = runtime.future_of(func, args, kwargs)
        return future

    traces.install()
    return served, record(served, run)
