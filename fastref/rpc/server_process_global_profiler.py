"""A profile of what this worker does for others, under torch's name."""

from __future__ import annotations

import itertools
from typing import Any

from torch.autograd.profiler_legacy import profile
from torch.autograd.profiler_util import EventList

from fastref.errors import UsageError
from fastref.profiling import ProcessProfile
from fastref.rpc.agent import current_agent

__all__: list[str] = []


class _server_process_global_profile(profile):
    """Within the block, what functions do that this worker runs for others is recorded, on all threads. May be nested.

    Parameters
    ----------
    enabled : bool
        False: it does nothing.
    record_shapes, profile_memory : bool
        What the events show.

    Attributes
    ----------
    function_events : EventList
        All events, after the block.
    process_global_function_events : list of list of FunctionEvent
        The same, those of each function by themselves.

    Raises
    ------
    NotInitialized
        Before ``init_rpc``.

    Source
    ------
    ``torch.distributed.rpc._server_process_global_profile``.
    """

    def __enter__(self) -> Any:
        if not self.enabled:
            return self
        if self.entered:
            raise UsageError("autograd profiler traces are not reentrant")
        self._profile = ProcessProfile(current_agent()._runtime)
        self.entered = True
        self._profile.start()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> Any:
        if not self.enabled:
            return None
        self.process_global_function_events = self._profile.stop(self)
        del self._profile
        flat = list(itertools.chain.from_iterable(self.process_global_function_events))
        self.function_events = EventList(flat, use_device=None, profile_memory=self.profile_memory)
        self.function_events._build_tree()
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what it collects with: whoever gets a copy gets the results, if they are there."""
        return {name: value for name, value in self.__dict__.items() if name != "_profile"}
