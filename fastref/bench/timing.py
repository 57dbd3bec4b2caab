"""How long an operation takes: repeated, timed one by one, and summed up as two quantiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

__all__ = ["FULL", "QUICK", "Effort", "Summary", "summarize", "time_each"]

# Reading the clock twice costs about 0.1 us: below this an operation is timed in batches.
BATCH_BELOW_US = 2.0
BATCH = 32


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Parameters
    ----------
    seconds : float
        Time spent on one row, at least.
    min_samples : int
        Samples taken of one operation, at least.
    warmup : int
        Operations before the first sample.
    windows : int
        Samples of a rate, at least; one sample is one window.
    window : int
        Calls in flight in one window.
    exercise_calls : int
        Calls a group makes before its memory is weighed.
    settle_s, idle_s : float
        Rest before idle workers are watched, and how long they are.
    """

    seconds: float = 1.0
    min_samples: int = 200
    warmup: int = 100
    windows: int = 10
    window: int = 1000
    exercise_calls: int = 1000
    settle_s: float = 1.0
    idle_s: float = 4.0


FULL = Effort()
QUICK = Effort(seconds=0.2, min_samples=50, warmup=20, windows=2, idle_s=1.0, settle_s=0.5)


@dataclass(frozen=True)
class Summary:
    """What one row came to, in the row's unit.

    Parameters
    ----------
    p50, p99 : float
        The median, and the value that 99 of 100 samples were at least as good as.
    mean : float
        The arithmetic mean.
    samples : int
        How many samples were taken.
    batch : int
        Operations in one sample; above 1 the quantiles are those of batch means.
    operations : int
        Operations done in all, the warm-up included.
    """

    p50: float
    p99: float
    mean: float
    samples: int
    batch: int = 1
    operations: int = 0


def summarize(values: Sequence[float], *, higher_is_better: bool = False) -> Summary:
    """Sum up samples.

    Parameters
    ----------
    values : sequence of float
        At least one sample, in the row's unit.
    higher_is_better : bool
        Whether the bad tail, which ``p99`` reports, is the low one.

    Returns
    -------
    Summary
        With nearest-rank quantiles: every figure is a sample that was seen.

    Raises
    ------
    ValueError
        Without samples.
    """
    if not values:
        raise ValueError("nothing was sampled")
    ordered = sorted(values, reverse=higher_is_better)
    tail = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return Summary(statistics.median(ordered), tail, statistics.fmean(ordered), len(ordered), operations=len(ordered))


def time_each(operation: Callable[[], object], effort: Effort) -> Summary:
    """Time an operation again and again.

    Parameters
    ----------
    operation : callable
        Called without arguments.
    effort : Effort
        Runs until both ``seconds`` and ``min_samples`` are met.

    Returns
    -------
    Summary
        In microseconds per operation.
    """
    clock = time.perf_counter_ns
    for _ in repeat(None, effort.warmup):
        operation()
    began = clock()
    for _ in repeat(None, BATCH):
        operation()
    batch = BATCH if (clock() - began) / BATCH < BATCH_BELOW_US * 1e3 else 1

    samples_us: list[float] = []
    deadline = clock() + round(effort.seconds * 1e9)
    while len(samples_us) < effort.min_samples or clock() < deadline:
        began = clock()
        for _ in repeat(None, batch):
            operation()
        samples_us.append((clock() - began) / (1e3 * batch))
    operations = effort.warmup + BATCH + len(samples_us) * batch
    return replace(summarize(samples_us), batch=batch, operations=operations)
