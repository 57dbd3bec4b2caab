"""How many times a gate does what it does, and how its figures are told."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

SCALE_VARIABLE = "FASTREF_GATES_SCALE"


def full(count: int) -> int:
    """Return how often to do what has to be done ``count`` times: all of it unless the variable says a fraction."""
    return max(1, round(count * float(os.environ.get(SCALE_VARIABLE, "1"))))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest of ``values`` that at least ``percent`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def tell(what: str, **figures: object) -> None:
    """Print measured figures; ``pytest -rP`` or ``-s`` shows them."""
    print(f"GATE {what}: " + ", ".join(f"{name}={value}" for name, value in figures.items()))
