"""Fetches: ``to_here`` of a small immutable value, again and again through one reference."""

from benchmarks.side_by_side import BACKENDS, assert_done, run_side_by_side


class FetchInt:
    """Microseconds for ``to_here`` of an int by a user of the reference; ratio: how many times faster than torch's."""

    params = (BACKENDS,)
    param_names = ("backend",)
    unit = "us"

    def setup_cache(self):
        return run_side_by_side(["fetch"])

    def teardown(self, comparison, *backend):
        assert_done(comparison, "fetch")

    def track_p50(self, comparison, backend):
        return comparison.medians("fetch")[backend]

    def track_p99(self, comparison, backend):
        return comparison.medians("fetch", "p99")[backend]

    def track_ratio(self, comparison):
        return comparison.ratio("fetch")

    track_ratio.params = ()
    track_ratio.unit = "times"
