"""Profiles of all that a worker serves, whoever calls."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

from torch.autograd.profiler_util import FunctionEvent

from fastref.profiling.recording import Event, Served, begin, flatten, record
from fastref.profiling.traces import function_event, install

__all__ = ["ProcessProfile"]

_changing = threading.Lock()
_active: list[ProcessProfile] = []


class ProcessProfile:
    """Collects what functions that a runtime runs for others do, each by itself.

    Parameters
    ----------
    runtime : Runtime
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime: Any = weakref.proxy(runtime)  # which refers to this: its memory goes with its last user
        self._start_ns = 0
        self._served: list[Served] = []

    def start(self) -> None:
        """Collect what starts from here on."""
        install()
        self._start_ns = time.time_ns()
        with _changing:
            _active.append(self)
            self._runtime.around = self._around

    def stop(self, shown: Any) -> list[list[FunctionEvent]]:
        """Return the events of each function that ran, in torch's form; ``shown`` says what belongs into them."""
        with _changing:
            _active.remove(self)
            self._runtime.around = _active[-1]._around if _active else None
        return [self._events(served, shown) for served in self._served]

    def _around(self, func: Any, args: Any, kwargs: dict) -> Any:
        watching = list(_active)
        served = begin(getattr(func, "__qualname__", type(func).__qualname__), self._runtime.info)
        try:
            return record(served, lambda: self._runtime.call_function(func, args, kwargs))
        finally:
            for profile in watching:
                profile._served.append(served)

    def _events(self, served: Served, shown: Any) -> list[FunctionEvent]:
        def made(name: str, rank: int, event: Event, is_remote: bool) -> FunctionEvent:
            return function_event(name, rank, event, self._start_ns, shown, is_remote)

        events = [made(event.name, served.rank, event, False) for event in served.events]
        for call in served.calls:
            events += [made(name, rank, event, True) for name, rank, event in flatten(call)]
        return sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
