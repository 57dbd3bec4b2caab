"""What goes between hosts, here over loopback and between two hosts on one machine: fastref, torch, and bytes alone."""

from benchmarks.side_by_side import EFFORT
from fastref.bench import compare
from fastref.bench.backends import BACKENDS
from fastref.bench.rows import ROW_GROUPS, ROWS

WIRES = ROW_GROUPS["wires"]
RATES = [row for row in WIRES if ROWS[row].higher_is_better]
TIMES = [row for row in WIRES if row not in RATES]
WAYS = [name for name in BACKENDS if name.endswith(("_tcp", "_veth")) or name == "sockets"]
PAIRED = ("fastref_tcp", "torch_tcp")


class Wires:
    """Microseconds for each row, calls per second for the rate; ratio, over loopback: fastref's to torch's."""

    params = (TIMES, WAYS)
    param_names = ("row", "backend")
    unit = "us"

    def setup_cache(self):
        return compare(WAYS, WIRES, 1, EFFORT)

    setup_cache.timeout = 900

    def setup(self, comparison, row, *backends):
        # Not every library is installed everywhere, nor may everybody make hosts.
        if missing := [name for name in backends or PAIRED if name not in comparison.medians(row)]:
            raise NotImplementedError(f"{', '.join(missing)}: {comparison.notes}")

    def teardown(self, comparison, row, *backends):
        (results,) = comparison.rounds
        for backend in {*(backends or PAIRED)} & {*comparison.medians(row)}:
            assert results[backend][row].operations > 0, f"{backend} did nothing for {row}"

    def track_p50(self, comparison, row, backend):
        return comparison.medians(row)[backend]

    def track_p99(self, comparison, row, backend):
        return comparison.medians(row, "p99")[backend]

    def track_rate(self, comparison, row, backend):
        return comparison.medians(row)[backend]

    track_rate.params = (RATES, WAYS)
    track_rate.unit = "calls/s"

    def track_ratio(self, comparison, row):
        return comparison.ratio(row, *PAIRED)

    track_ratio.params = (WIRES,)
    track_ratio.param_names = ("row",)
    track_ratio.unit = "times"
