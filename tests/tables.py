"""A reference table and the memory it lies in, as its owner and its peers map it."""

from __future__ import annotations

from fastref._core import Holder, ReferenceTable, table_sizes

__all__ = ["ABROAD", "CAPACITY", "CLOSED", "OWNER", "Memory", "close"]

# The bits of an entry's word that do not name a peer.
OWNER, ABROAD, CLOSED = 1 << 61, 1 << 62, 1 << 63
CAPACITY = 64


class Memory:
    """The two regions of one owner's table, as owner and peers map them."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        hold, descriptors = table_sizes(capacity)
        self.capacity = capacity
        self.hold, self.descriptors = bytearray(hold), bytearray(descriptors)

    def table(self, **options) -> ReferenceTable:
        return ReferenceTable(self.hold, self.descriptors, self.capacity, **options)

    def holder(self, peer: int | None, bell: bytearray | None = None) -> Holder:
        return Holder(self.hold, memoryview(self.descriptors).toreadonly(), self.capacity, peer, bell)


def close(table: ReferenceTable) -> list[int]:
    """Sweep, and make what was closed available again."""
    closed = table.sweep()
    for index in closed:
        table.free(index)
    return closed
