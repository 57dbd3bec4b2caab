"""Look inside a worker: tables, rings, calls and segments as plain values."""

from __future__ import annotations

from typing import Any

from fastref.errors import NotInitialized
from fastref.rref import current_wiring

__all__ = ["snapshot"]


def snapshot() -> dict[str, Any]:
    """Return figures of this worker as plain dicts, lists, numbers and strings.

    Returns
    -------
    dict
        ``worker`` (name, rank, pid), ``calls`` (pending, sent, served, threads, fetches), ``slots``, ``table`` (entries
        in use with generation, holder word, state and this worker's own count), ``abroad`` (holders that go by
        messages), ``arena`` (files; bytes committed, lent, and, so far, given back and populated ahead), ``rings``,
        ``peers`` (how each is reached and why so; pins, loans, credits) and ``dead`` (workers being removed, and who
        has not answered about them); with the agent for tests ``faults``, too (sends that have failed and messages that
        came late, by name).

    Raises
    ------
    NotInitialized
        Before ``init_rpc``.
    """
    runtime = current_wiring()
    if runtime is None:
        raise NotInitialized("there is nothing to look at before init_rpc")
    runtime.check_process()
    figures: dict[str, Any] = runtime.snapshot()
    return figures
