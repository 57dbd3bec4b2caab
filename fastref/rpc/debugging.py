"""torch's debug counters."""

from __future__ import annotations

from typing import Any

from fastref import autograd
from fastref.api import get_worker_info
from fastref.rpc.agent import current_agent

__all__ = ["_get_debug_info", "_rref_context_get_debug_info", "enable_gil_profiling"]


def _rref_context_get_debug_info() -> dict[str, str]:
    """Return the counters of references.

    Returns
    -------
    dict
        ``num_owner_rrefs``: values here that others hold; ``num_forks``: their holders; ``num_pending_users``: values
        elsewhere that are held here and are not there yet, or whose owner has not answered a request for a fork;
        ``num_pending_futures``: bookkeeping frames that wait for room in a ring.
    """
    return {name: str(count) for name, count in current_agent()._runtime.reference_counts().items()}


def _get_debug_info() -> dict[str, Any]:
    """Return all counters: of references, of the agent, of distributed autograd; the last are numbers, as in torch."""
    get_worker_info()  # which says it as torch does when there is no job
    return {**_rref_context_get_debug_info(), **current_agent().get_debug_info(), **autograd._get_debug_info()}


def enable_gil_profiling(flag: bool) -> None:
    """Have the agent's counters include the average time that serving threads waited for the interpreter lock."""
    current_agent()._runtime.gil_is_profiled = bool(flag)
