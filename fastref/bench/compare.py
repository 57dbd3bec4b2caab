"""Run the backends one after the other, several rounds, and take the medians of the rounds.

Never two backends at a time: an idle worker of torch takes CPU, and would take it from the one measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from fastref.bench.backends import BACKENDS
from fastref.bench.group import CHILD_LIMIT_S, Group, burner
from fastref.bench.rows import IDLE_ROWS, ROWS, better_by, reached
from fastref.bench.timing import FULL, Effort, Summary
from fastref.errors import UsageError

__all__ = ["Comparison", "compare", "run_once"]

Progress = Callable[[str], None]


@dataclass
class Comparison:
    """What every round came to, and the medians over rounds.

    Parameters
    ----------
    effort : Effort
        How much was measured.
    rounds : list of dict
        For each round, summaries by backend and row.
    """

    effort: Effort
    rounds: list[dict[str, dict[str, Summary]]] = field(default_factory=list)

    @property
    def backends(self) -> list[str]:
        """The backends that were run, in order."""
        return list(self.rounds[0]) if self.rounds else []

    def medians(self, row: str, quantile: str = "p50") -> dict[str, float]:
        """Return, by backend, the median over rounds of one quantile (``p50``, ``p99``, ``mean``) of a row."""
        return {
            backend: statistics.median(getattr(results[backend][row], quantile) for results in self.rounds)
            for backend in self.backends
            if row in self.rounds[0][backend]
        }

    def ratio(self, row: str, backend: str = "fastref", than: str = "torch") -> float | None:
        """Return how many times better the median of ``backend`` is, or None when one was not measured."""
        medians = self.medians(row)
        if backend not in medians or than not in medians:
            return None
        return better_by(ROWS[row], medians[backend], medians[than])

    def reached(self, row: str) -> bool | None:
        """Say whether fastref reaches what the row aims at; None when that cannot be said."""
        return reached(ROWS[row], self.medians(row))

    def rows(self) -> list[str]:
        """Return the rows that at least one backend filled, in the order of the table."""
        return [row for row in ROWS if self.medians(row)]


def compare(
    backends: Sequence[str] = tuple(BACKENDS),
    rows: Collection[str] = tuple(ROWS),
    rounds: int = 3,
    effort: Effort = FULL,
    progress: Progress = lambda text: None,
) -> Comparison:
    """Measure rows over backends.

    Parameters
    ----------
    backends, rows : sequence of str
        Keys of ``BACKENDS`` and ``ROWS``.
    rounds : int
        How often each backend is run, each time with fresh processes.
    effort : Effort
        How much to measure in each round.
    progress : callable
        Told what is measured next.

    Returns
    -------
    Comparison

    Raises
    ------
    UsageError
        For an unknown backend or row, or without rounds.
    WorkerDied, CallTimeout, FastrefError
        When a measured worker fails.
    """
    if unknown := sorted({*backends} - {*BACKENDS}):
        raise UsageError(f"no such backend: {', '.join(unknown)} (there are {', '.join(BACKENDS)})")
    if unknown := sorted({*rows} - {*ROWS}):
        raise UsageError(f"no such row: {', '.join(unknown)} (there are {', '.join(ROWS)})")
    if rounds < 1 or not backends or not rows:
        raise UsageError(f"nothing to measure: {rounds} rounds, {len(backends)} backends, {len(rows)} rows")
    comparison = Comparison(effort)
    for number in range(1, rounds + 1):
        results = {}
        for backend in backends:
            where = f"round {number}/{rounds} {backend}"
            results[backend] = run_once(backend, rows, effort, partial(_tell, progress, where))
        comparison.rounds.append(results)
    return comparison


def run_once(
    backend: str, rows: Collection[str], effort: Effort, progress: Progress = lambda text: None
) -> dict[str, Summary]:
    """Measure rows over one backend with fresh processes, and leave out those that it does not offer.

    Memory is weighed after ``effort.exercise_calls`` calls and before anything else; idleness comes last, when
    all that the calls left behind is there.
    """
    results: dict[str, Summary] = {}
    progress("start")
    limit_s = CHILD_LIMIT_S + math.ceil(len(ROWS) * effort.seconds + effort.idle_s)
    with Group(backend, limit_s) as group:
        start = group.join()
        group.measure("exercise", effort)
        memory = group.memory()
        if BACKENDS[backend].observed:
            results |= {"start": start, "memory": memory}
        for name, row in ROWS.items():
            if name in rows and row.measure in BACKENDS[backend].offers:
                progress(row.title)
                with burner(limit_s) if row.burner else nullcontext():
                    results[name] = group.measure(row.measure, effort)
        if BACKENDS[backend].observed and IDLE_ROWS & {*rows}:
            progress("idle")
            results |= group.idle(effort)
        progress("stop")
        group.leave()
    return {name: results[name] for name in ROWS if name in results and name in rows}


def _tell(progress: Progress, where: str, what: str) -> None:
    progress(f"{where}: {what}")
