"""Run rows of ``fastref.bench`` over both backends, one after the other, for benchmarks to look figures up in."""

from fastref.bench import Comparison, Effort, compare

BACKENDS = ["fastref", "torch"]
EFFORT = Effort(seconds=0.5, min_samples=100, windows=5, idle_s=3.0)


def run_side_by_side(rows, rounds=1):
    """Measure rows over both backends with fresh processes, which end before this returns."""
    return compare(BACKENDS, rows, rounds, EFFORT)


def assert_done(comparison: Comparison, row: str) -> None:
    """Check that every backend did what its figure stands for."""
    for results in comparison.rounds:
        for backend in BACKENDS:
            assert results[backend][row].operations > 0, f"{backend} did nothing for {row}"
