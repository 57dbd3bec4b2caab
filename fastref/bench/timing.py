"""How long an operation takes: repeated, timed one by one, and summed up as two quantiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

__all__ = ["FULL", "QUICK", "Effort", "Summary", "sample_each", "summarize", "time_apart", "time_each"]

# Reading the clock twice costs about 0.1 us: below this an operation is timed in batches.
BATCH_BELOW_US = 2.0
BATCH = 32
# Of operations so slow that a row's time is up first: fewer say nothing about a median.
FEWEST_SAMPLES = 5


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Parameters
    ----------
    seconds : float
        Time spent on one row, at least.
    stretch : float
        How many times ``seconds`` a slow operation may take for ``min_samples``; then fewer must do.
    min_samples : int
        Samples taken of one operation, at least.
    warmup : int
        Operations before the first sample, unless they take ``seconds``.
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
    stretch: float = 4.0
    min_samples: int = 200
    warmup: int = 100
    windows: int = 10
    window: int = 1000
    exercise_calls: int = 1000
    settle_s: float = 3.0
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
    first : float, optional
        The very first operation, before any warm-up, where operations are timed.
    """

    p50: float
    p99: float
    mean: float
    samples: int
    batch: int = 1
    operations: int = 0
    first: float | None = None


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
    """Time an operation again and again, by itself or, where reading the clock would show, in batches.

    Parameters
    ----------
    operation : callable
        Called without arguments; what it returns is dropped on the clock.
    effort : Effort
        How much to measure.

    Returns
    -------
    Summary
        In microseconds per operation.
    """
    clock = time.perf_counter_ns

    def sample(count: int = 1) -> float:
        began = clock()
        for _ in repeat(None, count):
            operation()
        return (clock() - began) / (1e3 * count)

    first = sample()
    unsampled = 1 + _warm_up(sample, effort)
    batch = 1
    if min(sample(), sample()) < 2 * BATCH_BELOW_US:  # two, since one may be interrupted
        batch = BATCH if sample(BATCH) < BATCH_BELOW_US else 1
        unsampled += BATCH
    summary = _samples(lambda: sample(batch), effort)
    operations = unsampled + 2 + summary.samples * batch
    return replace(summary, batch=batch, operations=operations, first=first)


def time_apart(
    operation: Callable[[], Any],
    effort: Effort,
    *,
    before: Callable[[], object] | None = None,
    after: Callable[[Any], object] | None = None,
) -> Summary:
    """Time an operation by itself, with what prepares it and what ends its result off the clock.

    Parameters
    ----------
    operation : callable
        Called without arguments.
    effort : Effort
        How much to measure.
    before : callable, optional
        Called ahead of each operation.
    after : callable, optional
        Called with the result of each operation, which is dropped then.

    Returns
    -------
    Summary
        In microseconds per operation.
    """
    clock = time.perf_counter_ns

    def sample() -> float:
        if before is not None:
            before()
        began = clock()
        result = operation()
        elapsed = clock() - began
        if after is not None:
            after(result)
        return elapsed / 1e3

    return sample_each(sample, effort)


def sample_each(sample: Callable[[], float], effort: Effort) -> Summary:
    """Take samples of what times itself.

    Parameters
    ----------
    sample : callable
        Does one operation and returns its figure.
    effort : Effort
        How much to measure.

    Returns
    -------
    Summary
        In the unit of the samples.
    """
    first = sample()
    unsampled = 1 + _warm_up(sample, effort)
    summary = _samples(sample, effort)
    return replace(summary, operations=unsampled + summary.samples, first=first)


def _warm_up(sample: Callable[[], float], effort: Effort) -> int:
    deadline = time.perf_counter() + effort.seconds
    for done in range(effort.warmup):
        if time.perf_counter() >= deadline:
            return done
        sample()
    return effort.warmup


def _samples(sample: Callable[[], float], effort: Effort) -> Summary:
    samples: list[float] = []
    began = time.perf_counter()
    elapsed = 0.0
    while (
        elapsed < effort.seconds
        or len(samples) < FEWEST_SAMPLES
        or (len(samples) < effort.min_samples and elapsed < effort.seconds * effort.stretch)
    ):
        samples.append(sample())
        elapsed = time.perf_counter() - began
    return summarize(samples)
