"""Functions that answer later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["async_execution"]

P = ParamSpec("P")
R = TypeVar("R")


def async_execution(fn: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that returns a future, whose result is the answer to a call of it.

    The caller gets the result as if the function had returned it; at the callee no thread waits for it. With
    ``staticmethod`` and ``classmethod`` this decorator is the inner one, over ``torch.jit.script`` the outer one.

    Source
    ------
    ``torch.distributed.rpc.functions.async_execution``.
    """

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        return fn(*args, **kwargs)

    wrapper._wrapped_async_rpc_function = fn  # type: ignore[attr-defined]  # what the runtime looks for, as torch's does
    return wrapper
