"""A state of the model of publication that a step may change: the owner's memory, the table, and who is at what."""

from __future__ import annotations

from typing import Any

__all__ = ["ASK", "BLOCK", "CLOSED", "INLINE", "NAMES", "NONE", "OTHER", "OWNER", "PROGRAM", "READERS", "SECOND",
           "SERVER", "World"]  # fmt: skip

SERVER, PROGRAM, SECOND, READERS = range(4)
"""Threads: three of the owner, then one for each reader."""

NAMES = ("the server", "the program", "its second thread", "ann", "ben", "cay")
ASK, INLINE, BLOCK = "ask", "inline", "block"
OTHER = -1  # what a block holds that was lent for something else
NONE = -1  # no block
OWNER, CLOSED = 1 << 6, 1 << 7  # bits of an entry's word; a reading process p has 1 << p


class World:
    """A state that a step may change.

    Parameters
    ----------
    state : a frozen one
    """

    FIELDS = (
        "version", "form", "words",  # the descriptor; two words stand for all of them
        "value", "complete", "begun",  # the value's own words; the last change that readers must see; the last begun
        "exposed", "published", "shown", "turns", "shown_turn",  # what the owner keeps beside it
        "phase", "generation", "hold", "content",  # per block: of its entry, and its two words
        "gil",  # the owner's thread that has the interpreter lock across steps, or NONE
        "step",  # per thread: (verb, ...) or ()
        "left",  # per thread: changes or reads that it still begins
        "mail",  # per thread: a reader's question or its answer
        "life",  # the owner's, and that of each reading process: "live", "dead" or "removed"
        "count", "held", "lock",  # per process and block: private counts, their generation; who is inside the lock
        "kills", "others",  # how often somebody may still die, a block be lent for something else
        "gone",  # the owner has let go of the value
    )  # fmt: skip
    _LISTS = ("words", "value", "phase", "generation", "hold", "content", "step", "left", "mail", "life", "count",
              "held", "lock")  # fmt: skip
    __slots__ = FIELDS

    version: int
    form: str
    complete: int
    begun: int
    exposed: bool
    published: bool
    shown: int
    turns: int
    shown_turn: int
    gil: int
    kills: int
    others: int
    gone: bool
    words: list[Any]
    value: list[int]
    phase: list[str]
    generation: list[int]
    hold: list[int]
    content: list[tuple[int, int]]
    step: list[tuple]
    left: list[int]
    mail: list[Any]
    life: list[str]
    count: list[int]
    held: list[int]
    lock: list[int]

    def __init__(self, state: tuple) -> None:
        for name, part in zip(self.FIELDS, state, strict=True):
            setattr(self, name, list(part) if name in self._LISTS else part)

    def freeze(self) -> tuple:
        return tuple([tuple(part) if type(part) is list else part for part in map(self.__getattribute__, self.FIELDS)])

    def go(self, thread: int, step: tuple) -> None:
        """Say what a thread does next; () ends what it is at."""
        self.step[thread] = step

    def cell(self, process: int, block: int) -> int:
        """Return where a process's private count of a block's entry lies."""
        return process * len(self.hold) + block

    def put(self, block: int, word: int, number: int) -> None:
        """Write one word of a block."""
        first, second = self.content[block]
        self.content[block] = (number, second) if word == 0 else (first, number)
