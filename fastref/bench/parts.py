"""The parts of a call that one thread does alone: each many times over, for callgrind to count their instructions.

``python -m fastref.bench.parts`` does that when valgrind runs it; ``fastref.bench.instructions`` reads the sums.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

from fastref._core import Holder, IdGenerator, ReferenceTable, table_sizes
from fastref.bench import counting
from fastref.bench.bare import RECORDS, BareRing
from fastref.channels.channel import BELL_BYTES, Inbox
from fastref.channels.shm import RING_SIZE, ShmChannel, ring_bytes
from fastref.codec.stream import decode, encode
from fastref.errors import FastrefError, UsageError

__all__ = ["EMPTY", "PARTS", "TURNS", "Part"]

TURNS = 1000
EMPTY = "nothing"
CAPACITY = 1024
SMALL_VALUE = (1, "name", 2.5, None, b"bytes", [True, 12345678901])


@dataclass(frozen=True)
class Part:
    """What is counted.

    Parameters
    ----------
    prepare : callable
        Returns what is called for one turn.
    operations : int
        How many of them a turn has; the figure is for one.
    """

    prepare: Callable[[], Callable[[], object]]
    operations: int = 1


def bare_ring() -> Callable[[], object]:
    """Have records pass a ring, driven from C."""
    return BareRing(mmap.mmap(-1, ring_bytes()), RING_SIZE).turn


def channel(size_bytes: int) -> Callable[[], object]:
    """Send a record through a channel in shared memory, and receive it, as the interpreter sees that."""
    memory, bell = mmap.mmap(-1, ring_bytes()), mmap.mmap(-1, BELL_BYTES)
    inbox = Inbox(bell)
    inbox.add_ring(1, memory, RING_SIZE)
    send, receive, record = ShmChannel(memory, RING_SIZE, bell, 1).send, inbox.receive, b"x" * size_bytes

    def turn() -> None:
        send(record)
        if receive() is None:
            raise FastrefError("a record that was sent did not come")

    return turn


def handle() -> Callable[[], object]:
    """Take the only handle of a process on a table entry, and drop it."""
    table, holder = _table()
    index, generation = _opened(table)

    def turn() -> None:
        holder.acquire(index, generation)
        holder.release(index)

    return turn


def entry() -> Callable[[], object]:
    """Open a table entry, let it go, find it and make it available again."""
    table, _ = _table()
    own = table.holder

    def turn() -> None:
        index, _ = _opened(table)
        own.release(index)
        (closed,) = table.sweep()
        table.free(closed)

    return turn


def encoding() -> Callable[[], object]:
    """Encode a small value."""
    return lambda: encode(SMALL_VALUE)


def decoding() -> Callable[[], object]:
    """Decode a small value."""
    data = encode(SMALL_VALUE)
    if data is None or decode(data) != SMALL_VALUE:
        raise FastrefError("a small value did not come back as it was encoded")
    return lambda: decode(data)


def ids() -> Callable[[], object]:
    """Mint an id."""
    return IdGenerator(1).next


def nothing() -> Callable[[], object]:
    """Do nothing: what the loop itself takes."""
    return bool


PARTS: dict[str, Part] = {
    EMPTY: Part(nothing),
    "ring": Part(bare_ring, RECORDS),
    "channel_16": Part(lambda: channel(16)),
    "channel_1k": Part(lambda: channel(1024)),
    "handle": Part(handle),
    "entry": Part(entry),
    "encode": Part(encoding),
    "decode": Part(decoding),
    "id": Part(ids),
}


def main() -> None:
    """Have every part counted."""
    if not counting.is_counted():
        raise UsageError(f"{__spec__.name} runs under callgrind, started by fastref.bench.instructions")
    for name, part in PARTS.items():
        turn = part.prepare()

        def turns(turn: Callable[[], object] = turn) -> None:
            for _ in range(TURNS):
                turn()

        turns()  # pages are touched, and the interpreter has made up its mind about every instruction
        counting.count(name, turns)


def _opened(table: ReferenceTable) -> tuple[int, int]:
    opened = table.open()
    if opened is None:
        raise FastrefError("a table from which entries are freed is full")
    return opened


def _table() -> tuple[ReferenceTable, Holder]:
    hold, descriptors = (mmap.mmap(-1, size_bytes) for size_bytes in table_sizes(CAPACITY))
    return ReferenceTable(hold, descriptors, CAPACITY), Holder(hold, descriptors, CAPACITY, peer=1)


if __name__ == "__main__":
    main()
