"""The work that every library with remote objects is given, here over fastref and torch."""

from benchmarks.side_by_side import BACKENDS, assert_done, run_side_by_side
from fastref.bench.rows import ROW_GROUPS, ROWS

OBJECTS = ROW_GROUPS["peers"]
RATES = [row for row in OBJECTS if ROWS[row].higher_is_better]
TIMES = [row for row in OBJECTS if row not in RATES]


class Objects:
    """Microseconds for each row, calls per second for those named a rate; ratio: how many times better than torch's."""

    params = (TIMES, BACKENDS)
    param_names = ("row", "backend")
    unit = "us"

    def setup_cache(self):
        return run_side_by_side(OBJECTS)

    setup_cache.timeout = 900

    def teardown(self, comparison, row, *backend):
        assert_done(comparison, row)

    def track_p50(self, comparison, row, backend):
        return comparison.medians(row)[backend]

    def track_p99(self, comparison, row, backend):
        return comparison.medians(row, "p99")[backend]

    def track_first(self, comparison, row, backend):
        return comparison.medians(row, "first")[backend]

    def track_rate(self, comparison, row, backend):
        return comparison.medians(row)[backend]

    track_rate.params = (RATES, BACKENDS)
    track_rate.unit = "calls/s"

    def track_ratio(self, comparison, row):
        return comparison.ratio(row)

    track_ratio.params = (OBJECTS,)
    track_ratio.param_names = ("row",)
    track_ratio.unit = "times"
