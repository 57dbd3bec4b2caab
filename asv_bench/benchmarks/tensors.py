"""Tensors: sent, fetched, read, published, fetched from an owner that computes, and gradients on their way back."""

from benchmarks.side_by_side import BACKENDS, assert_done, run_side_by_side
from fastref.bench.rows import ROW_GROUPS

TENSORS = [*ROW_GROUPS["tensors"], *ROW_GROUPS["training"]]


class Tensors:
    """Microseconds for each row with tensors; ratio: how many times faster than torch's."""

    params = (TENSORS, BACKENDS)
    param_names = ("row", "backend")
    unit = "us"

    def setup_cache(self):
        return run_side_by_side(TENSORS)

    setup_cache.timeout = 900

    def teardown(self, comparison, row, *backend):
        assert_done(comparison, row)

    def track_p50(self, comparison, row, backend):
        return comparison.medians(row)[backend]

    def track_p99(self, comparison, row, backend):
        return comparison.medians(row, "p99")[backend]

    def track_ratio(self, comparison, row):
        return comparison.ratio(row)

    track_ratio.params = (TENSORS,)
    track_ratio.param_names = ("row",)
    track_ratio.unit = "times"
