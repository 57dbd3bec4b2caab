"""The comparison as a picture: a panel for each row, a bar for each backend, scales logarithmic."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from fastref.bench.compare import Comparison
from fastref.bench.report import format_figure, machine
from fastref.bench.rows import ROWS, Row
from fastref.errors import UsageError

__all__ = ["plot"]

COLUMNS = 3
BAR_INCHES, PANEL_INCHES, HEADING_INCHES, WIDTH_INCHES = 0.24, 0.75, 0.9, 13.0
OURS, TORCHS, OTHERS, INK = "#0b7a75", "#d1603d", "#b9bec6", "#30343b"
COLORS = {"fastref": OURS, "torch": TORCHS}


def plot(comparison: Comparison, path: Path) -> None:
    """Draw the medians of every row that at least two backends filled.

    Parameters
    ----------
    comparison : Comparison
        What was measured.
    path : Path
        The file; its ending says which format.

    Raises
    ------
    UsageError
        Without matplotlib, or when no row has two backends.
    """
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise UsageError("--plot needs matplotlib (pip install matplotlib)") from None
    panels = {name: medians for name in comparison.rows() if len(medians := _positive(comparison.medians(name))) > 1}
    if not panels:
        raise UsageError("nothing to plot: no row was filled by two backends")
    lines = [list(panels.items())[began : began + COLUMNS] for began in range(0, len(panels), COLUMNS)]
    heights = [PANEL_INCHES + BAR_INCHES * max(len(medians) for _, medians in line) for line in lines]
    height = sum(heights) + HEADING_INCHES
    figure = figure_module.Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    about = machine()
    figure.suptitle(
        f"Medians on {about['cpu']}, {about['cores']} cores, {about['date']}", color=INK, fontsize=11, x=0.01, ha="left"
    )
    axes = figure.subplots(len(lines), COLUMNS, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, line_axes in zip(lines, axes, strict=True):
        bars = max(len(medians) for _, medians in line)
        for (name, medians), one in zip(line, line_axes, strict=False):
            _draw(one, ROWS[name], medians, bars)
        for one in line_axes[len(line) :]:
            one.set_visible(False)
    figure.savefig(path)


def _positive(medians: dict[str, float]) -> dict[str, float]:
    """Leave out what a logarithmic scale has no place for."""
    return {backend: median for backend, median in medians.items() if median > 0}


def _draw(axes: Any, row: Row, medians: dict[str, float], bars: int) -> None:
    best_last = sorted(medians, key=lambda backend: medians[backend], reverse=not row.higher_is_better)
    values = [medians[backend] for backend in best_last]
    # A bar on a logarithmic scale has no zero to begin at: all begin a decade below the smallest.
    low = 10 ** (math.floor(math.log10(min(values))) - 1)
    axes.barh(best_last, values, left=low, color=[COLORS.get(backend, OTHERS) for backend in best_last], height=0.7)
    axes.set_xscale("log")
    axes.set_xlim(low, max(values) * 12)
    axes.set_ylim(len(values) - bars - 0.5, len(values) - 0.5)  # bars of one line are equally thick
    for place, value in enumerate(values):
        axes.text(value * 1.2 + low, place, format_figure(value), va="center", fontsize=8, color=INK)
    unit = f", {row.unit}" if row.unit else ""
    better = " (more is better)" if row.higher_is_better else ""
    axes.set_title(f"{row.title.replace('`', '')}{unit}{better}", fontsize=9, color=INK, loc="left")
    axes.tick_params(axis="y", length=0, labelsize=8, labelcolor=INK)
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
