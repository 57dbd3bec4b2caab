"""The ring: records through shared memory and the doorbell, within one process, so without any waiting.

torch has no part that can be measured alone; ``call.Call`` compares what is built on it.
"""

import mmap

from fastref.channels.channel import BELL_BYTES, Inbox
from fastref.channels.shm import RING_SIZE, ShmChannel, ring_bytes

RECORDS = 1000
SOURCE = 1


class Ring:
    """Seconds for 1,000 records to be sent and received, by size of a record."""

    params = (16, 1024, 16384)
    param_names = ("size_bytes",)

    def setup(self, size_bytes):
        ring, bell = mmap.mmap(-1, ring_bytes()), mmap.mmap(-1, BELL_BYTES)
        ring.write(bytes(len(ring)))  # every page is there before the first record
        self.inbox = Inbox(bell)
        self.inbox.add_ring(SOURCE, ring, RING_SIZE)
        self.channel = ShmChannel(ring, RING_SIZE, bell, SOURCE)
        self.record = b"x" * size_bytes
        self.sent = 0

    def teardown(self, size_bytes):
        figures = self.inbox.snapshot()[SOURCE]
        assert figures["received"] == self.sent > 0 and figures["empty"], figures

    def time_one_by_one(self, size_bytes):
        """Each record is received before the next is sent: the bell is rung every time."""
        send, receive, record = self.channel.send, self.inbox.receive, self.record
        for _ in range(RECORDS):
            send(record)
            receive()
        self.sent += RECORDS

    def time_filled(self, size_bytes):
        """The ring is filled until it refuses, then emptied."""
        send, receive, record = self.channel.send, self.inbox.receive, self.record
        left = RECORDS
        while left:
            while left and send(record) is not None:
                left -= 1
            while receive() is not None:
                pass
        self.sent += RECORDS
