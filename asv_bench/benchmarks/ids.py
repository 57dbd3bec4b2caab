"""Ids. torch mints its own inside other calls only: ``table.OwnReference`` compares those."""

from fastref._core import IdGenerator

IDS = 1000


class Ids:
    """Seconds for 1,000 ids, minted one by one."""

    def setup(self):
        self.generator = IdGenerator(1)
        self.first = self.generator.next()
        self.rounds = 0

    def teardown(self):
        assert self.generator.next() == self.first + 1 + self.rounds * IDS, "an id was skipped or minted twice"

    def time_next(self):
        for _ in range(IDS):
            self.generator.next()
        self.rounds += 1
