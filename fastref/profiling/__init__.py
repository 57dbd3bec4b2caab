"""What torch's profilers see of calls: ranges on the caller, and what the callees did meanwhile."""

from fastref.profiling.calls import attach
from fastref.profiling.process import ProcessProfile

__all__ = ["ProcessProfile", "attach"]
