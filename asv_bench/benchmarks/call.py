"""Calls: to a function, to a method of a reference, with a reference or a tensor, one at a time and many."""

from benchmarks.side_by_side import BACKENDS, assert_done, run_side_by_side

CALLS = [
    "call",
    "call_asleep",
    "call_burn",
    "method",
    "remote",
    "pass",
    "echo_1k",
    "echo_64k",
    "echo_1m",
    "echo_1m_asleep",
]
RATES = ["async", "remote_rate"]


class Call:
    """Microseconds for one call, by kind of call; ratio: how many times faster than torch's."""

    params = (CALLS, BACKENDS)
    param_names = ("row", "backend")
    unit = "us"

    def setup_cache(self):
        return run_side_by_side(CALLS)

    def teardown(self, comparison, row, *backend):
        assert_done(comparison, row)

    def track_p50(self, comparison, row, backend):
        return comparison.medians(row)[backend]

    def track_p99(self, comparison, row, backend):
        return comparison.medians(row, "p99")[backend]

    def track_ratio(self, comparison, row):
        return comparison.ratio(row)

    track_ratio.params = (CALLS,)
    track_ratio.param_names = ("row",)
    track_ratio.unit = "times"


class Rates:
    """Empty calls, and references made and fetched, per second, many in flight; ratio: how many times torch's rate."""

    params = (RATES, BACKENDS)
    param_names = ("row", "backend")
    unit = "1/s"

    def setup_cache(self):
        return run_side_by_side(RATES)

    def teardown(self, comparison, row, *backend):
        assert_done(comparison, row)

    def track_rate(self, comparison, row, backend):
        return comparison.medians(row)[backend]

    def track_ratio(self, comparison, row):
        return comparison.ratio(row)

    track_ratio.params = (RATES,)
    track_ratio.param_names = ("row",)
    track_ratio.unit = "times"
