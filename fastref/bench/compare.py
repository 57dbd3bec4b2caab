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
from fastref.bench.contract import Backend
from fastref.bench.group import CHILD_LIMIT_S, Group, burner
from fastref.bench.rows import IDLE_ROWS, ROWS, Row, better_by, reached
from fastref.bench.timing import FULL, Effort, Summary
from fastref.errors import CallTimeout, FastrefError, UsageError, WorkerDied

__all__ = ["Comparison", "compare", "run_once"]

Progress = Callable[[str], None]


def _ignore(text: str) -> None:
    """Nobody wants to know."""


@dataclass
class Comparison:
    """What every round came to, and the medians over rounds.

    Parameters
    ----------
    effort : Effort
        How much was measured.
    rounds : list of dict
        For each round, summaries by backend and row.
    notes : dict
        Sentences about what is missing, by backend, each once.
    """

    effort: Effort
    rounds: list[dict[str, dict[str, Summary]]] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def backends(self) -> list[str]:
        """The backends that were run, in order."""
        return list(self.rounds[0]) if self.rounds else []

    def note(self, backend: str, sentence: str) -> None:
        """Remember what is missing of a backend."""
        sentences = self.notes.setdefault(backend, [])
        if sentence not in sentences:
            sentences.append(sentence)

    def medians(self, row: str, quantile: str = "p50") -> dict[str, float]:
        """Return, by backend, the median over rounds of one figure (``p50``, ``p99``, ``mean``, ``first``) of a row.

        A backend is left out that lacks the row or the figure in any round.
        """
        medians = {}
        for backend in self.backends:
            figures = [getattr(results[backend].get(row), quantile, None) for results in self.rounds]
            known = [figure for figure in figures if figure is not None]
            if len(known) == len(figures):
                medians[backend] = statistics.median(known)
        return medians

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
    progress: Progress = _ignore,
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
        When a measured worker of a backend fails that is not optional.
    """
    if unknown := sorted({*backends} - {*BACKENDS}):
        raise UsageError(f"no such backend: {', '.join(unknown)} (there are {', '.join(BACKENDS)})")
    if unknown := sorted({*rows} - {*ROWS}):
        raise UsageError(f"no such row: {', '.join(unknown)} (there are {', '.join(ROWS)})")
    if rounds < 1 or not backends or not rows:
        raise UsageError(f"nothing to measure: {rounds} rounds, {len(backends)} backends, {len(rows)} rows")
    comparison = Comparison(effort)
    present = []
    for backend in backends:
        if (reason := BACKENDS[backend].missing()) is None:
            present.append(backend)
        else:
            comparison.note(backend, reason)
    for number in range(1, rounds + 1):
        results = {}
        for backend in present:
            where = f"round {number}/{rounds} {backend}"
            note = partial(comparison.note, backend)
            results[backend] = run_once(backend, rows, effort, partial(_tell, progress, where), note)
        comparison.rounds.append(results)
    return comparison


def run_once(
    backend: str,
    rows: Collection[str],
    effort: Effort,
    progress: Progress = _ignore,
    note: Progress = _ignore,
) -> dict[str, Summary]:
    """Measure rows over one backend with fresh processes, and leave out those that it does not offer.

    Parameters
    ----------
    backend : str
        A key of ``BACKENDS``.
    rows : collection of str
        Keys of ``ROWS``.
    effort : Effort
        How much to measure.
    progress : callable
        Told what is measured next.
    note : callable
        Told what could not be measured of an optional backend.

    Returns
    -------
    dict
        Summaries by row.

    Raises
    ------
    WorkerDied, CallTimeout, FastrefError
        When a measured worker of a backend fails that is not optional.
    """
    results: dict[str, Summary] = {}
    offered = {name: row for name, row in ROWS.items() if name in rows and _offers(BACKENDS[backend], row)}
    for workers in dict.fromkeys(row.workers for row in offered.values()):
        together = {name: row for name, row in offered.items() if row.workers == workers}
        try:
            _run_group(backend, workers, together, effort, progress, note, results)
        except FastrefError as error:
            if not BACKENDS[backend].optional:
                raise
            note(_last_line(error))
    return {name: results[name] for name in ROWS if name in results and name in rows}


def _offers(backend: Backend, row: Row) -> bool:
    return row.measure in backend.offers if row.measure else backend.observed


def _run_group(
    backend: str,
    workers: int | None,
    rows: dict[str, Row],
    effort: Effort,
    progress: Progress,
    note: Progress,
    results: dict[str, Summary],
) -> None:
    """Fill in the rows of one group of processes.

    Memory is weighed after ``effort.exercise_calls`` calls and before anything else; idleness comes last, when
    all that the calls left behind is there.
    """
    progress("start")
    limit_s = CHILD_LIMIT_S + math.ceil(len(rows) * effort.seconds * (effort.stretch + 1) + effort.idle_s)
    with Group(backend, limit_s, workers) as group:
        start = group.join()
        if BACKENDS[backend].observed and workers is None:
            group.measure("exercise", effort)
            results |= {"start": start, "memory": group.memory()}
        for name, row in rows.items():
            if row.measure:
                progress(row.title)
                with burner(limit_s) if row.burner else nullcontext():
                    try:
                        results[name] = group.measure(row.measure, effort)
                    except (WorkerDied, CallTimeout):
                        raise
                    except FastrefError as error:
                        if not BACKENDS[backend].optional:
                            raise
                        note(f"{row.title}: {_last_line(error)}")
        if IDLE_ROWS & {*rows}:
            progress("idle")
            results |= group.idle(effort)
        progress("stop")
        group.leave()


def _last_line(error: FastrefError) -> str:
    return str(error).rstrip().rpartition("\n")[2]


def _tell(progress: Progress, where: str, what: str) -> None:
    progress(f"{where}: {what}")
