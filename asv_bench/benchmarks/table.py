"""The reference table: handles taken and dropped, entries opened and closed, all within one process."""

import mmap

from benchmarks.side_by_side import BACKENDS, assert_done, run_side_by_side
from fastref._core import Holder, ReferenceTable, table_sizes

CAPACITY = 1024
TURNS = 1000


class Table:
    """Seconds for 1,000 turns of each step of a reference's life."""

    def setup(self):
        hold, descriptors = (mmap.mmap(-1, size_bytes) for size_bytes in table_sizes(CAPACITY))
        self.table = ReferenceTable(hold, descriptors, CAPACITY)  # writes every word: no page is touched first below
        self.holder = Holder(hold, descriptors, CAPACITY, peer=1)
        self.index, self.generation = self.table.open()
        self.opened = self.table.snapshot()["opened"]
        self.turns = {"handle": 0, "entry": 0}

    def teardown(self):
        figures = self.table.snapshot()
        assert figures["opened"] - self.opened == self.turns["entry"] == figures["closed"]
        assert figures["used"] == 1 and self.holder.entries_held in (0, 1)
        assert any(self.turns.values()), "nothing was measured"

    def time_first_handle(self):
        """Take and drop the only handle of a process: two atomic steps on the shared word."""
        holder, index, generation = self.holder, self.index, self.generation
        for _ in range(TURNS):
            holder.acquire(index, generation)
            holder.release(index)
        self.turns["handle"] += TURNS

    def time_further_handle(self):
        """Take and drop a handle beside another one: a private count."""
        holder, index, generation = self.holder, self.index, self.generation
        if not holder.entries_held:
            holder.acquire(index, generation)
        for _ in range(TURNS):
            holder.acquire(index, generation)
            holder.release(index)
        self.turns["handle"] += TURNS

    def time_entry(self):
        """Open an entry, let it go, find it, close it and make it available again."""
        table, own = self.table, self.table.holder
        for _ in range(TURNS):
            index, _ = table.open()
            own.release(index)
            (closed,) = table.sweep()
            table.free(closed)
        self.turns["entry"] += TURNS


class OwnReference:
    """Microseconds for ``RRef(value)`` to be made and dropped by its owner; ratio: times faster than torch's."""

    params = (BACKENDS,)
    param_names = ("backend",)
    unit = "us"

    def setup_cache(self):
        return run_side_by_side(["own"])

    def teardown(self, comparison, *backend):
        assert_done(comparison, "own")

    def track_p50(self, comparison, backend):
        return comparison.medians("own")[backend]

    def track_ratio(self, comparison):
        return comparison.ratio("own")

    track_ratio.params = ()
    track_ratio.unit = "times"
