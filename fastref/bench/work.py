"""What the measured workers run: the same functions over every backend.

Every function counts itself, so that a measurement can prove that its calls arrived. ``next`` on an
``itertools.count`` is one atomic step of about 20 ns, the same for every backend.
"""

from __future__ import annotations

from itertools import count
from typing import Any

__all__ = ["ANSWER", "Counter", "answer", "calls_served", "echo", "make_counter", "nothing", "take"]

ANSWER = 42

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
