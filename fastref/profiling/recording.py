"""What one thread does while it runs a function for a caller who profiles: operators, and calls to others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import profiler_legacy

__all__ = ["REMOTE_OP", "Call", "Event", "Served", "begin", "flatten", "give_way", "record", "serving"]

T = TypeVar("T")

REMOTE_OP = "#remote_op: "  # between a call and what it did, in names that profiles show

_autograd: Any = torch.autograd  # whose stubs say nothing of what it takes from C++
_parse_records = profiler_legacy._parse_legacy_records  # torch's own: `traces` puts another in its place
_thread = threading.local()


class Event(NamedTuple):
    """A range that a profiler recorded. Times are of ``time.time_ns``, which the workers of one host share."""

    name: str
    thread: int
    start_ns: int
    end_ns: int
    shapes: Any
    scope: int
    sequence_nr: int
    memory_bytes: int
    flops: int | None
    is_async: bool


@dataclass(slots=True)
class Served:
    """One function that a worker ran for a caller who profiles.

    Parameters
    ----------
    worker, rank, pid, thread
        Who ran it; ``thread`` is the system's number of it.
    name : str
        The function.
    events : list of Event
        What its thread did.
    calls : list of Call
        Its own calls.
    """

    worker: str
    rank: int
    pid: int
    thread: int
    name: str
    start_ns: int
    end_ns: int = 0
    events: list[Event] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


@dataclass(slots=True)
class Call:
    """One call of a thread that is profiled.

    Parameters
    ----------
    key : str
        Its name in profiles.
    served : Served or None
        What came of it, once it is over; None if it failed, or was a fetch.
    """

    key: str
    start_ns: int
    is_async: bool
    end_ns: int = 0
    served: Served | None = None


def serving() -> Served | None:
    """Return what the calling thread records for a caller, if it does."""
    return getattr(_thread, "served", None)


def record(served: Served, run: Callable[[], T]) -> T:
    """Run a function and note what its thread does, unless a profiler of the program watches it already."""
    outer = serving()
    if outer is not None:
        _stop(outer)
    elif _autograd._profiler_enabled():
        try:
            return run()
        finally:
            served.end_ns = time.time_ns()
    _start(served)
    try:
        return run()
    finally:
        give_way()
        served.end_ns = time.time_ns()
        if outer is not None:
            outer.events += served.events
            outer.calls += served.calls
            _start(outer)


def give_way() -> None:
    """Stop recording in this thread: the function is over, or starts a profiler of its own. Torch allows but one."""
    served = serving()
    if served is not None:
        _stop(served)


def _start(served: Served) -> None:
    _autograd._enable_profiler_legacy(_EVERYTHING)
    _thread.served, _thread.start_ns = served, time.time_ns()


def _stop(served: Served) -> None:
    start_ns, _thread.served = _thread.start_ns, None
    served.events += _events(_parse_records(_autograd._disable_profiler_legacy()), start_ns)


def begin(name: str, info: Any) -> Served:
    """Return the beginnings of a record of the calling thread."""
    return Served(info.name, info.id, os.getpid(), threading.get_native_id(), name, time.time_ns())


def flatten(call: Call, prefix: str = "") -> Iterator[tuple[str, int, Event]]:
    """Yield (name, rank, event) of all that a call did elsewhere, with names as torch has them: who caused it first."""
    served = call.served
    if served is None:
        return
    prefix += call.key + REMOTE_OP
    for event in served.events:
        yield prefix + event.name, served.rank, event
    for nested in served.calls:
        own = Event(nested.key, served.thread, nested.start_ns, nested.end_ns, [], 0, -1, 0, None, nested.is_async)
        yield prefix + nested.key, served.rank, own
        yield from flatten(nested, prefix)


def _events(functions: list[Any], start_ns: int) -> list[Event]:
    return [
        Event(
            function.name,
            function.thread,
            start_ns + int(function.time_range.start * 1000),
            start_ns + int(function.time_range.end * 1000),
            function.input_shapes,
            function.scope,
            function.sequence_nr,
            function.cpu_memory_usage,
            function.flops,
            function.is_async,
        )
        for function in functions
        if function.trace_name is not None  # memory that no operator asked for
    ]


# What the caller's profile does not show is left out there: how it was set up is not to be had from torch.
_EVERYTHING = _autograd.ProfilerConfig(
    _autograd.ProfilerState.CPU,
    True,  # shapes
    True,  # memory
    False,  # stacks
    False,  # floating point operations
    False,  # modules
    torch._C._profiler._ExperimentalConfig(),
)
