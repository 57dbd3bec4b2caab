"""What the measured workers run: the same functions over every backend.

Every function counts itself, so that a measurement can prove that its calls arrived. ``next`` on an
``itertools.count`` is one atomic step of about 20 ns, the same for every backend.
"""

from __future__ import annotations

import importlib
import threading
from itertools import count
from typing import Any

import torch

from fastref.bench import ledger

__all__ = [
    "ANSWER",
    "FETCHED_BYTES",
    "Counter",
    "Thing",
    "answer",
    "calls_served",
    "echo",
    "keep",
    "make_counter",
    "nothing",
    "ones",
    "read_version",
    "start_computing",
    "stop_computing",
    "take",
    "total",
    "touch_through",
]

ANSWER = 42
FETCHED_BYTES = 1 << 20

_served = count(1)


def nothing() -> None:
    """Do nothing, and be counted."""
    next(_served)


def echo(value: Any) -> Any:
    """Return the argument."""
    next(_served)
    return value


def answer() -> int:
    """Return a small immutable value."""
    next(_served)
    return ANSWER


def take(reference: Any) -> None:
    """Receive a reference and let go of it."""
    next(_served)


def calls_served() -> int:
    """Return how many calls this process has served, this one included."""
    return next(_served)


def ones(count: int) -> torch.Tensor:
    """Return a tensor of as many float32 ones."""
    next(_served)
    return torch.ones(count)


def total(tensor: torch.Tensor) -> float:
    """Read every element."""
    next(_served)
    return float(tensor.sum())


def total_at(backend: str, to: str, tensor: torch.Tensor) -> float:
    """Hand a tensor on to another worker, through the module named ``backend``, and return the sum from there."""
    rpc = importlib.import_module(backend)
    return rpc.rpc_sync(to, total, (tensor,))  # type: ignore[no-any-return]


_computing = threading.Event()


def start_computing() -> None:
    """Have a thread of this process compute in Python, without a pause, until told to stop."""
    _computing.set()
    threading.Thread(target=_compute, name="computing", daemon=True).start()


def stop_computing() -> None:
    """End what ``start_computing`` began."""
    _computing.clear()


def _compute() -> None:
    number = 0
    while _computing.is_set():
        number = (number * 31 + 7) % 1_000_003


_kept: list[Any] = []


def keep(reference: Any) -> None:
    """Hold a reference for ``read_version``, in place of the one before."""
    _kept[:] = [reference]


def read_version(version: int) -> bool:
    """Fetch the tensor behind the kept reference; tell whether it is this version from end to end."""
    tensor = _kept[0].to_here()
    return bool(tensor[0] == version) and bool(tensor[-1] == version)


class Counter:
    """An object to be called through a reference."""

    def __init__(self) -> None:
        self._touched = count(1)

    def touch(self) -> None:
        """Do nothing, and be counted."""
        next(self._touched)

    def touches(self) -> int:
        """Return how often a method of this object was called, this call included."""
        return next(self._touched)


def make_counter() -> Counter:
    """Return a fresh ``Counter``."""
    next(_served)
    return Counter()


class Thing(Counter):
    """An object to be made in another process, by any library.

    Parameters
    ----------
    path : str
        The ledger that its destructor writes into.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._tensor: torch.Tensor | None = None

    def echo(self, value: Any) -> Any:
        """Return the argument."""
        return value

    def tensor(self) -> torch.Tensor:
        """Return the tensor that it holds, the same one each time."""
        if self._tensor is None:
            self._tensor = torch.ones(FETCHED_BYTES // 4)
        return self._tensor

    def __del__(self) -> None:
        ledger.record(self._path)


def touch_through(reference: Any) -> None:
    """Call the empty method of the ``Thing`` behind a reference of torch's kind."""
    reference.rpc_sync().touch()
