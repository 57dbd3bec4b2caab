"""The comparison as text, markdown and JSON, with the machine it was taken on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fastref.bench.compare import Comparison
from fastref.bench.rows import ROWS
from fastref.errors import UsageError

__all__ = ["format_figure", "machine", "text_table", "to_json", "write_markdown"]

FLOORS = ("pipe", "line", "memory")
HEADINGS = (
    "row",
    "unit",
    "torch p50",
    "p99",
    "fastref p50",
    "p99",
    *(f"{floor} p50" for floor in FLOORS),
    "ratio",
    "reach",
    "reached",
)
# The tables of all libraries, by title: which figure each shows.
BY_BACKEND = ("peers", "wires")  # groups whose tables have a column for each backend
PEER_TABLES = {"The same work, warm: p50": "p50", "The same work, warm: p99": "p99", "The very first time": "first"}
ABSENT = "-"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def machine() -> dict[str, str]:
    """Describe where and with what the figures were taken."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": _version("torch"),
        "fastref": _version("fastref"),
    }


def text_table(comparison: Comparison) -> str:
    """Return the tables in columns, for a terminal, and what is missing."""
    parts = []
    for table in _tables(comparison):
        widths = [max(map(len, column)) for column in zip(*table.lines(), strict=True)]
        lines = ["  ".join(table.aligned(cells, widths)).rstrip() for cells in table.lines()]
        parts.append("\n".join([*([table.title] if table.title else []), *lines]))
    if notes := _notes(comparison):
        parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def markdown(comparison: Comparison) -> str:
    """Return the machine and the table in markdown."""
    about = "; ".join(f"{key} {value}" for key, value in machine().items())
    effort = comparison.effort
    lines = [
        f"Taken on: {about}.",
        "",
        f"Rounds: {len(comparison.rounds)}. Time for each row in each round: {effort.seconds:g} s.",
    ]
    for table in _tables(comparison):
        rules = ["---" if column in table.left else "--:" for column in range(len(table.headings))]
        lines += ["", *([f"**{table.title}**", ""] if table.title else [])]
        lines += [_markdown_line(table.headings), _markdown_line(rules)]
        lines += [_markdown_line(cells) for cells in table.cells]
    if notes := _notes(comparison):
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def write_markdown(comparison: Comparison, path: Path) -> None:
    """Write the markdown to a file: between its figure marks when it has them, else as the whole file.

    Raises
    ------
    UsageError
        When the file exists and has no such marks: it is somebody's text.
    """
    figures = f"{BEGIN}\n\n{markdown(comparison)}\n{END}"
    if not path.exists():
        path.write_text(figures + "\n")
        return
    text, replaced = re.subn(f"{BEGIN}.*?{END}", lambda match: figures, path.read_text(), flags=re.DOTALL)
    if replaced != 1:
        raise UsageError(f"{path} exists and has not one place between {BEGIN!r} and {END!r} for the figures")
    path.write_text(text)


def to_json(comparison: Comparison) -> str:
    """Return everything that was measured, every round of it."""
    rows: dict[str, Any] = {
        name: {
            "title": ROWS[name].title,
            "unit": ROWS[name].unit,
            "p50": comparison.medians(name),
            "p99": comparison.medians(name, "p99"),
            "mean": comparison.medians(name, "mean"),
            "first": comparison.medians(name, "first"),
            "ratio": comparison.ratio(name),
            "reach": str(ROWS[name].reach) if ROWS[name].reach else None,
            "reached": comparison.reached(name),
        }
        for name in comparison.rows()
    }
    rounds = [
        {
            backend: {name: dataclasses.asdict(summary) for name, summary in results.items()}
            for backend, results in by_backend.items()
        }
        for by_backend in comparison.rounds
    ]
    effort = dataclasses.asdict(comparison.effort)
    whole = {"machine": machine(), "effort": effort, "rows": rows, "notes": comparison.notes, "rounds": rounds}
    return json.dumps(whole, indent=1) + "\n"


def format_figure(value: float | None) -> str:
    """Return a figure with three significant digits and no exponent, ``-`` for none.

    >>> format_figure(1234567.0), format_figure(12.345), format_figure(0.0321)
    ('1,234,567', '12.3', '0.0321')
    """
    if value is None:
        return ABSENT
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    digits = 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4
    return f"{value:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class _Table:
    """Cells with a line of headings; columns of figures are aligned right."""

    title: str
    headings: Sequence[str]
    left: frozenset[int]
    cells: list[list[str]]

    def lines(self) -> list[Sequence[str]]:
        return [self.headings, *self.cells]

    def aligned(self, cells: Sequence[str], widths: list[int]) -> list[str]:
        return [
            cell.ljust(width) if column in self.left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]


def _tables(comparison: Comparison) -> list[_Table]:
    tables = []
    if rows := [name for name in comparison.rows() if ROWS[name].group not in BY_BACKEND]:
        left = frozenset({0, 1, len(HEADINGS) - 1})
        tables.append(_Table("", HEADINGS, left, [_line(comparison, name) for name in rows]))
    for group in BY_BACKEND:
        if rows := [name for name in comparison.rows() if ROWS[name].group == group]:
            for title, quantile in PEER_TABLES.items():
                tables.append(_peer_table(comparison, rows, title, quantile))
    return tables


def _peer_table(comparison: Comparison, rows: Sequence[str], title: str, quantile: str) -> _Table:
    figures = {name: comparison.medians(name, quantile) for name in rows}
    backends = [name for name in comparison.backends if any(name in by_backend for by_backend in figures.values())]
    cells = [
        [ROWS[name].title, ROWS[name].unit, *(format_figure(figures[name].get(backend)) for backend in backends)]
        for name in rows
    ]
    return _Table(title, ("row", "unit", *backends), frozenset({0, 1}), cells)


def _notes(comparison: Comparison) -> list[str]:
    return [f"{backend}: {sentence}" for backend, sentences in comparison.notes.items() for sentence in sentences]


def _line(comparison: Comparison, name: str) -> list[str]:
    row, p50, p99 = ROWS[name], comparison.medians(name), comparison.medians(name, "p99")
    ratio, reached = comparison.ratio(name), comparison.reached(name)
    return [
        row.title,
        row.unit,
        *(format_figure(figures.get(backend)) for backend in ("torch", "fastref") for figures in (p50, p99)),
        *(format_figure(p50.get(floor)) for floor in FLOORS),
        ABSENT if ratio is None else f"{format_figure(ratio)}x",
        str(row.reach) if row.reach else ABSENT,
        ABSENT if reached is None else "yes" if reached else "no",
    ]


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":  # absent on some architectures
            return value.strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # used from its source tree
        return "not installed"
