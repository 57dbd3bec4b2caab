"""A module that nobody imports before a call names it."""

from __future__ import annotations

import fastref.rpc as rpc


def where() -> str:
    """Return the name of the worker that this runs on."""
    return rpc.get_worker_info().name
