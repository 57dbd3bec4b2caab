"""What one side of the comparison has to offer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from fastref.bench.timing import Effort

__all__ = ["Backend", "Measurements"]


class Measurements(Protocol):
    """What a joined worker offers: ``exercise``, and methods from an ``Effort`` to a ``Summary``."""

    def exercise(self, effort: Effort) -> None: ...


class Backend(Protocol):
    """One side of the comparison.

    ``load``, ``join`` and ``leave`` run in a worker, the others in the process that starts the workers.
    """

    name: str
    world_size: int  # unless a row says otherwise
    offers: frozenset[str]  # names of methods of what join returns
    observed: bool  # whether start, memory and idleness are asked of it
    import_counts: bool  # whether importing the backend is memory that it costs
    apart: bool  # whether worker 0 is on another host than the others
    optional: bool  # whether the comparison goes on without it when it cannot be had or fails

    def missing(self) -> str | None:
        """Say in a sentence why the backend cannot be run here, None when it can."""

    def address(self) -> AbstractContextManager[str]:
        """Say where the workers of one group meet, and clean up behind them."""

    def load(self) -> None:
        """Import what the worker needs."""

    def join(self, rank: int, world_size: int, address: str) -> Measurements:
        """Enter the group; return when all have."""

    def leave(self) -> None:
        """Leave the group in order."""
