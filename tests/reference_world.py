"""A network of nodes that do with references whatever programs do, beside an account of who must still be able to use what.

The account knows nothing of how references work: it lists the handles in the hands of nodes that live, and those in
messages between nodes that live. What is on that list must exist; what is not, must not, once everything has settled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastref.errors import OwnerDied, ReferenceLost, WorkerDied
from fastref.futures import Future
from fastref.rref import RRef
from fastref.testing import Network, Node

__all__ = ["World"]

Handle = tuple[int, RRef]  # number of the value, and a reference to it

_world: World | None = None  # the one whose functions run now


class Thing:
    """A value with a number, and perhaps references to others. Its destruction is noted; that of a copy is not."""

    def __init__(self, number: int, references: Sequence[Handle] = ()) -> None:
        assert _world is not None
        self.number, self.references, self.destroyed = number, list(references), _world.destroyed
        _world.made[number] = self.references

    def identify(self) -> int:
        return self.number

    def child(self, number: int) -> Any:
        return make(number)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Copy, (self.number,)

    def __del__(self) -> None:
        self.destroyed.add(self.number)


@dataclass
class Copy:
    number: int


@dataclass
class Parcel:
    """References inside an object that goes by pickle."""

    contents: list[RRef]


@dataclass
class Letter:
    """References between two nodes."""

    source: int
    target: int
    numbers: list[int]
    in_ring: bool = False  # its sender died after it had published it


def make(number: int, references: Sequence[Handle] = ()) -> Any:
    """The value of a number: one that is fetched from its owner, one in the descriptor, or one in a block."""
    if number % 4 == 0:
        return number
    if number % 4 == 1:
        return (number,) * 40
    return Thing(number, references)


def stow(letter: int, rank: int, package: Any) -> None:
    """Keep what a letter brings on the shelf of the node where this runs."""
    world = _here(rank)
    numbers = world.letters.pop(letter).numbers
    world.shelves[rank] += zip(numbers, unpack(package), strict=True)


def embed(letter: int, rank: int, number: int, package: Any) -> Any:
    """Make a value that holds what a letter brings."""
    numbers = _here(rank).letters.pop(letter).numbers
    return make(number, list(zip(numbers, unpack(package), strict=True)))


def hand_out(letter: int, rank: int, target: int, choice: int, form: int) -> Any:
    """Return references from the shelf of the node where this runs."""
    world = _here(rank)
    shelf = world.shelves[rank]
    handles = shelf[choice % len(shelf) :][:3] if shelf else []
    world.letters[letter] = Letter(rank, target, [number for number, _ in handles])
    return pack([rref for _, rref in handles], form)


def refuse(letter: int, rank: int, package: Any) -> None:
    """Fail after the references of a letter have arrived."""
    _here(rank).letters.pop(letter)
    raise ValueError("refused")


def pack(references: list[RRef], form: int) -> Any:
    """Put references into a container: encoded directly, nested, or in an object that goes by pickle."""
    return (references, {"nested": [tuple(references)]}, Parcel(references))[form]


def unpack(package: Any) -> list[RRef]:
    if isinstance(package, Parcel):
        return package.contents
    return package if isinstance(package, list) else list(package["nested"][0])


def _here(rank: int) -> World:
    assert _world is not None and _world.network[rank].alive, f"a function ran on worker{rank}, which is dead"
    return _world


class World:
    """Nodes, their variables and shelves, and the account.

    Parameters
    ----------
    count, bits, capacity
        As of ``Network``.
    """

    def __init__(self, count: int, bits: int, capacity: int) -> None:
        global _world
        _world = self
        self.network = Network(count, bits=bits, capacity=capacity, window=4)
        for node in self.network:
            node.default_timeout_s = 20.0  # beyond it something hangs
        self.made: dict[int, list[Handle]] = {}
        self.destroyed: set[int] = set()
        self.owners: list[int] = []  # by number
        self.makers: dict[int, int] = {}  # number -> who asked for it, until it is known to exist
        self.variables: list[list[Handle]] = [[] for _ in range(count)]
        self.shelves: list[list[Handle]] = [[] for _ in range(count)]
        self.letters: dict[int, Letter] = {}
        self.letters_written = 0
        self.answers: list[tuple[int, Future, Any]] = []  # (who asked, future, what it must say: see _take_answer)

    def close(self) -> None:
        global _world
        _world = None

    # ---- what nodes do

    def living(self) -> list[int]:
        return [node.rank for node in self.network if node.alive]

    def within_reach(self, rank: int) -> list[Handle]:
        return self.variables[rank] + self.shelves[rank]

    def new(self, rank: int) -> None:
        number = self._number(rank)
        value = make(number)
        self.made.setdefault(number, [])
        self.variables[rank].append((number, self.network[rank].new(value)))

    def remote(self, rank: int, target: int, handles: list[Handle], form: int) -> None:
        """Have a value made elsewhere, perhaps one that holds references."""
        number = self._number(target)
        if handles:
            letter = self._write(rank, target, handles)
            call = (embed, (letter, target, number, pack([rref for _, rref in handles], form)))
        else:
            letter, call = None, (make, (number,))
        self._create(rank, target, number, letter, lambda node: node.remote(target, *call))

    def child(self, rank: int, handle: Handle) -> None:
        """Have a value made by a method of another."""
        parent, rref = handle
        if parent % 4 < 2:
            return
        target = self.owners[parent]
        number = self._number(target)
        self._create(rank, target, number, None, lambda node: rref.remote().child(number))

    def pass_on(self, rank: int, target: int, handles: list[Handle], form: int, refused: bool) -> None:
        """Hand references on as arguments, to be kept there, or to a function that fails."""
        letter = self._write(rank, target, handles)
        args = (letter, target, pack([rref for _, rref in handles], form))
        with self._posting(rank, target, letter) as node:
            future = node.rpc_async(target, refuse if refused else stow, args)
            self.answers.append((rank, future, ValueError if refused else None))

    def ask_for(self, rank: int, target: int, choice: int, form: int) -> None:
        """Have references handed out as a result."""
        self.letters_written += 1
        letter = self.letters_written
        with self._posting(rank, target, None) as node:
            future = node.rpc_async(target, hand_out, (letter, target, rank, choice, form))
            self.answers.append((rank, future, ("letter", letter)))

    def call_method(self, rank: int, handle: Handle) -> None:
        number, rref = handle
        with self._posting(rank, self.owners[number], None):
            kind = number % 4
            if kind == 0:
                future, expected = rref.rpc_async().conjugate(), number
            elif kind == 1:
                future, expected = rref.rpc_async().count(number), 40
            else:
                future, expected = rref.rpc_async().identify(), number
            self.answers.append((rank, future, ("number", number, expected)))

    def fetch(self, rank: int, handle: Handle) -> None:
        number, rref = handle
        try:
            value = self.network.run(rref.to_here)
        except OwnerDied:
            assert not self.network[self.owners[number]].alive
        except ReferenceLost:
            assert self.is_void(number)
        else:
            expected: Any = make(number) if number % 4 < 2 else Copy(number)
            if number % 4 >= 2 and self.owners[number] == rank:
                assert type(value) is Thing and value.number == number
            else:
                assert value == expected
        self.take_answers()

    def drop(self, rank: int, index: int) -> None:
        del self.variables[rank][index]

    def clear_shelf(self, rank: int) -> None:
        self.shelves[rank].clear()

    # ---- what happens to nodes

    def kill(self, rank: int, lose: bool, seen_by: list[int]) -> None:
        for number, letter in list(self.letters.items()):
            if letter.source == rank and lose:
                del self.letters[number]
            elif letter.source == rank:
                letter.in_ring = True
        for number, maker in self.makers.items():
            if maker == rank and not lose:
                self.makers[number] = -1  # published: it will be made
        self.network.kill(rank, lose=lose, seen_by=seen_by)

    # ---- the account

    def live(self) -> set[int]:
        """Numbers of the values that somebody can still use."""
        alive = [node.alive for node in self.network]
        found: set[int] = set()
        for rank in self.living():
            found.update(number for number, _ in self.within_reach(rank))
        for letter in self.letters.values():
            if alive[letter.target] and (alive[letter.source] or letter.in_ring):
                found.update(letter.numbers)
        found.update(number for number in self.makers if self.is_expected(number))
        waiting = list(found)
        while waiting:  # and of those that they hold
            number = waiting.pop()
            if not alive[self.owners[number]]:
                continue
            inside = {kept for kept, _ in self.made.get(number, [])} - found
            found |= inside
            waiting += inside
        return {number for number in found if alive[self.owners[number]]}

    def is_void(self, number: int) -> bool:
        """True for a value that was never made, because who asked for it died before it could."""
        return number not in self.made and not self.is_expected(number)

    def is_expected(self, number: int) -> bool:
        raise NotImplementedError

    def check(self) -> None:
        """What somebody can use exists."""
        self.take_answers()
        lost = self.live() & self.destroyed
        assert not lost, f"values {sorted(lost)} are destroyed, and can still be used"

    def check_settled(self) -> None:
        """And what nobody can use does not."""
        self.network.settle()
        self.take_answers()
        self.network.settle()
        self.check()
        things = {number for number in self.made if number % 4 >= 2 and self.network[self.owners[number]].alive}
        left = things - self.live() - self.destroyed
        assert not left, f"values {sorted(left)} exist, and nobody can use them"
        assert not self.answers, "calls without an answer"

    def check_empty(self) -> None:
        """Everything is let go: nothing is left anywhere."""
        for rank in self.living():
            self.variables[rank].clear()
            self.shelves[rank].clear()
        self.check_settled()
        left = {rank: self.network[rank].holdings() for rank in self.living()}
        assert not any(left.values()), left
