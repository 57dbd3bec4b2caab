"""The state of the reference model: shared memory, private memory, and what may still happen."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = [
    "ABROAD", "ABSENT", "ANN", "APPLICATION", "BEN", "CAY", "CLOSED", "CLOSING", "DEAD", "FREE", "LIVE", "NAMES",
    "OWNER", "PROCESSES", "PROGRESS", "RETIRED", "SWEEPER", "THREADS", "USED", "World",
]  # fmt: skip

OWNER, ANN, BEN, CAY = range(4)
NAMES = ("owner", "ann", "ben", "cay")
PROCESSES = len(NAMES)

# A process runs two threads, the owner a third. They are free to interleave.
APPLICATION, PROGRESS, SWEEPER = range(3)
THREADS = 3

FREE, USED, CLOSING, RETIRED = range(4)
ABSENT, LIVE, DEAD = range(3)

ABROAD = 1 << 8
"""Bit of a holder word: somebody without a bit of his own holds the entry."""
CLOSED = 1 << 9
"""Bit of a holder word: the entry is free, and who meets this bit came too late."""


class World:
    """One state, thawed: lists that a step may change.

    A frozen state is the tuple of these lists as tuples, and hashable.
    Fields "per cell" are indexed ``process * entries + entry``, fields
    "per ring" ``source * PROCESSES + target``.

    Parameters
    ----------
    frozen : what `freeze` returned
    """

    FIELDS = (
        # Shared memory and the owner's table.
        "generation",  # per entry, never wrapping: the truth, of which the rules see a remainder
        "phase",  # per entry
        "word",  # per entry: the holder word
        "dirty",  # per entry
        "forks",  # per entry: ((fork, holder), ...), the owner's private set behind ABROAD
        "credit",  # per entry: opened for remote() and not used yet
        "published",  # one element: the (entry, generation) that readers find, or ()
        "ring",  # per ring: messages that the `acquired` cursor has not passed
        # What a process knows.
        "handles",  # per cell: how many handles
        "held",  # per cell: the generation they and the pins are of
        "mine",  # per cell: the forks that a process without a bit holds
        "pins",  # per process: ((target, instance, entry, generation, fork), ...), oldest first
        "asking",  # per process: ((source, entry, generation, fork), ...) the owner has not answered yet
        "minted",  # per process: forks it has made
        "lock",  # per process: thread inside the private lock plus one, or 0
        "step",  # process * THREADS + thread: (verb, ...) it does next, or () when idle
        # Life and death.
        "life",  # per process
        "instance",  # per process: how often its slot was given to somebody new
        "removal",  # per process: "" | "asked" | "clear <entry>" as a number | "done"
        "acked",  # per process: bits of those who have acquired all it published
        "budget",  # how often each thing may still happen
    )
    __slots__ = FIELDS

    def __init__(self, frozen: tuple) -> None:
        (
            self.generation, self.phase, self.word, self.dirty, self.forks, self.credit, self.published, self.ring,
            self.handles, self.held, self.mine, self.pins, self.asking, self.minted, self.lock, self.step,
            self.life, self.instance, self.removal, self.acked, self.budget,
        ) = map(list, frozen)  # fmt: skip

    def freeze(self) -> Hashable:
        """Return the state as a hashable value."""
        return tuple([tuple(getattr(self, name)) for name in self.FIELDS])

    def count(self, process: int, entry: int) -> int:
        """Return how many handles and pins a process has on an entry."""
        total = self.handles[process * len(self.word) + entry]
        for pin in self.pins[process]:
            if pin[2] == entry:
                total += 1
        return total

    def alive(self, entry: int, generation: int) -> bool:
        """Return whether the entry is in use in that very generation."""
        return self.phase[entry] == USED and self.generation[entry] == generation

    def go(self, process: int, thread: int, step: tuple) -> None:
        """Set what a thread does next."""
        self.step[process * THREADS + thread] = step

    def waiting(self, source: int, target: int) -> tuple:
        """Return the messages that a ring holds, oldest first."""
        return self.ring[source * PROCESSES + target]

    def post(self, source: int, target: int, message: tuple) -> None:
        """Publish a message; a ring dies with its reader."""
        if self.life[target] == LIVE:
            self.ring[source * PROCESSES + target] += (message,)

    def pop(self, source: int, target: int) -> None:
        """Move the reader's `acquired` cursor past one message."""
        self.ring[source * PROCESSES + target] = self.ring[source * PROCESSES + target][1:]

    def add_pin(self, process: int, pin: tuple) -> None:
        """Append to a process's queue of pins."""
        self.pins[process] += (pin,)

    def remove_pin(self, process: int, index: int) -> None:
        """Take one pin out of a process's queue."""
        self.pins[process] = self.pins[process][:index] + self.pins[process][index + 1 :]
