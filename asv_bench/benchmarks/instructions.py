"""Instructions of the single-threaded parts, counted by callgrind: a slow-down shows however busy the machine is."""

from fastref.bench.instructions import count_instructions
from fastref.bench.parts import EMPTY, PARTS


class Instructions:
    """Instructions for one turn of each part, the interpreter's share included."""

    params = ([name for name in PARTS if name != EMPTY],)
    param_names = ("part",)
    unit = "instructions"
    timeout = 900

    def setup_cache(self):
        return count_instructions()

    setup_cache.timeout = 900

    def teardown(self, counted, part):
        assert counted[part] > 0, f"nothing was counted for {part}"

    def track_turn(self, counted, part):
        return counted[part]
