"""What being there costs: the start of three workers, their memory, and what they do when there is nothing to do."""

from benchmarks.side_by_side import BACKENDS, assert_done, run_side_by_side

COSTS = ["start", "memory", "idle_cpu", "idle_threads", "idle_descriptors"]


class Startup:
    """Seconds until three processes that have imported torch are a group, and what each costs from then on."""

    params = (BACKENDS,)
    param_names = ("backend",)

    def setup_cache(self):
        return run_side_by_side(COSTS, rounds=3)

    def teardown(self, comparison, *backend):
        for row in COSTS:
            assert_done(comparison, row)

    def track_seconds(self, comparison, backend):
        return comparison.medians("start")[backend]

    track_seconds.unit = "s"

    def track_ratio(self, comparison):
        return comparison.ratio("start")

    track_ratio.params = ()
    track_ratio.unit = "times"

    def track_memory(self, comparison, backend):
        return comparison.medians("memory")[backend]

    track_memory.unit = "MiB"

    def track_idle_cpu(self, comparison, backend):
        return comparison.medians("idle_cpu")[backend]

    track_idle_cpu.unit = "% of one core"

    def track_threads(self, comparison, backend):
        return comparison.medians("idle_threads")[backend]

    track_threads.unit = "threads"

    def track_descriptors(self, comparison, backend):
        return comparison.medians("idle_descriptors")[backend]

    track_descriptors.unit = "descriptors"
