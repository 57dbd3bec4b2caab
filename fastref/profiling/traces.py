"""What callees did, in the results of the profile whose thread called them: events and Chrome traces."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import profiler, profiler_legacy
from torch.autograd.profiler_util import FunctionEvent

from fastref.profiling.recording import Call, Event, flatten, give_way

__all__ = ["function_event", "install", "note"]

KEPT = 10_000
"""Calls that are remembered for profiles whose results have not been asked for yet; beyond it, the oldest go."""

_thread = threading.local()
_calls: deque[Call] = deque(maxlen=KEPT)
_installing = threading.Lock()
_installed = False


def note(call: Call) -> None:
    """Remember a call for the profile that is on in this thread."""
    kinds = torch._C._profiler.ActiveProfilerType
    kind = torch._C._autograd._profiler_type()
    if kind == kinds.LEGACY:
        _of_thread().append(call)
    elif kind == kinds.KINETO:
        _calls.append(call)
    else:
        return  # others write elsewhere, where nothing can be added
    install()


def _of_thread() -> list[Call]:
    if not hasattr(_thread, "calls"):
        _thread.calls = []
    calls: list[Call] = _thread.calls
    return calls


def install() -> None:
    """Put ourselves between torch's profiles and their results. Torch lets only C++ code add to them. Idempotent."""
    global _installed
    with _installing:
        if _installed:
            return
        _installed = True
        profiler_legacy._parse_legacy_records = _LegacyResults(profiler_legacy._parse_legacy_records)
        kind: Any = profiler.profile
        legacy: Any = profiler_legacy.profile
        kind._parse_kineto_results = _with_remote_events(kind._parse_kineto_results)
        kind.export_chrome_trace = _with_remote_ranges(kind.export_chrome_trace)
        for owner, name in (
            (kind, "_prepare_trace"),
            (kind, "_start_trace"),
            (legacy, "_start_trace"),
        ):
            setattr(owner, name, _after_giving_way(getattr(owner, name)))


def _after_giving_way(start: Callable) -> Callable:
    def begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        give_way()
        return start(self, *args, **kwargs)

    return begin


class _LegacyResults:
    """In the place of the function that makes events of what the legacy profiler recorded."""

    def __init__(self, parse: Callable[[Any], list[Any]]) -> None:
        self._parse = parse

    def __call__(self, records: Any) -> list[Any]:
        events = self._parse(records)
        calls = _of_thread()
        _thread.calls = []
        profile = sys._getframe(1).f_locals.get("self")  # it is not handed over
        starts_us = {event.name: event.time_range.start for event in reversed(events)}
        for call in calls:
            if call.key in starts_us:  # the first of that name, as calls are in order: it ties the clocks together
                zero_ns = call.start_ns - starts_us[call.key] * 1000
                return _sorted(events + _function_events(calls, zero_ns, profile))
        return events


def _with_remote_events(parse: Callable) -> Callable:
    def parse_kineto_results(self: Any, result: Any, *args: Any, **kwargs: Any) -> list[Any]:
        events: list[Any] = parse(self, result, *args, **kwargs)
        calls = _within(result)
        return _sorted(events + _function_events(calls, result.trace_start_ns(), self)) if calls else events

    return parse_kineto_results


def _with_remote_ranges(export: Callable) -> Callable:
    def export_chrome_trace(self: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = export(self, path, *args, **kwargs)
        calls = _within(self.kineto_results) if self.kineto_results is not None else []
        if calls:
            with open(path, encoding="utf-8") as file:
                trace = json.load(file)
            trace["traceEvents"] += chrome_events(calls, trace)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(trace, file)
        return outcome

    return export_chrome_trace


def _within(result: Any) -> list[Call]:
    """Return the calls that a profile has seen."""
    start_ns = result.trace_start_ns()
    keys = {event.name(): event.end_ns() for event in result.events()}
    end_ns = max(keys.values(), default=start_ns)
    return [call for call in _calls if call.key in keys and start_ns <= call.start_ns <= end_ns]


def _sorted(events: list[Any]) -> list[Any]:
    return sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))


def _function_events(calls: Iterable[Call], zero_ns: float, profile: Any) -> list[Any]:
    return [
        function_event(name, rank, event, zero_ns, profile, is_remote=True)
        for call in list(calls)
        for name, rank, event in flatten(call)
    ]


def function_event(name: str, rank: int, event: Event, zero_ns: float, profile: Any, is_remote: bool) -> FunctionEvent:
    """Return torch's form of an event, with what ``profile`` shows; times count from ``zero_ns``."""
    return FunctionEvent(
        id=-1,
        node_id=rank,
        name=name,
        trace_name=name,
        thread=event.thread,
        start_us=(event.start_ns - zero_ns) / 1000,
        end_us=(event.end_ns - zero_ns) / 1000,
        input_shapes=event.shapes if getattr(profile, "record_shapes", False) else [],
        stack=[],
        scope=event.scope,
        use_device=None,
        cpu_memory_usage=event.memory_bytes if getattr(profile, "profile_memory", False) else 0,
        device_memory_usage=0,
        is_async=event.is_async,
        is_remote=is_remote,
        sequence_nr=event.sequence_nr,
        device_type=torch._C._autograd.DeviceType.CPU,
        is_legacy=True,
        flops=event.flops,
    )


# ---- Chrome traces


def chrome_events(calls: Iterable[Call], trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what callees did as events of a Chrome trace, with arrows from the calls to the functions.

    Parameters
    ----------
    calls : iterable of Call
    trace : dict
        What torch has written, with the ranges of the calls in it.
    """
    base_ns = trace.get("baseTimeNanoseconds", 0)
    ranges: dict[str, list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and "#" in event["name"]:
            ranges.setdefault(event["name"], []).append(event)
    numbers = itertools.count()
    found: list[dict[str, Any]] = []
    for call in calls:
        start_us = (call.start_ns - base_ns) / 1000
        own = min(ranges.get(call.key, []), key=lambda event: abs(event["ts"] - start_us), default=None)
        if own is not None:
            found += _served(call, own, base_ns, numbers)
    return found


def _served(call: Call, own: dict[str, Any], base_ns: int, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
    """Yield the events of one call and of those that it led to; ``own`` is the range of the call itself."""
    served = call.served
    if served is None:
        return
    place = {"pid": served.pid, "tid": served.thread}

    def span(name: str, category: str, start_ns: int, end_ns: int) -> dict[str, Any]:
        ts, dur = (start_ns - base_ns) / 1000, (end_ns - start_ns) / 1000
        return {"ph": "X", "cat": category, "name": name, **place, "ts": ts, "dur": dur, "args": {}}

    if served.pid != own["pid"]:
        yield {"ph": "M", "name": "process_name", **place, "ts": own["ts"], "args": {"name": served.worker}}
        yield {"ph": "M", "name": "process_sort_index", **place, "ts": own["ts"], "args": {"sort_index": served.pid}}
    function = span(served.name, "rpc", served.start_ns, served.end_ns)
    yield function
    arrow = {"cat": "rpc", "name": "rpc", "id": next(numbers)}
    yield {"ph": "s", **arrow, "pid": own["pid"], "tid": own["tid"], "ts": own["ts"]}
    yield {"ph": "f", "bp": "e", **arrow, **place, "ts": function["ts"]}
    for event in served.events:
        yield span(event.name, "cpu_op", event.start_ns, event.end_ns)
    for nested in served.calls:
        caller = span(nested.key, "user_annotation", nested.start_ns, nested.end_ns)
        yield caller
        yield from _served(nested, caller, base_ns, numbers)
