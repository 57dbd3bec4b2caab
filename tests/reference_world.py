"""A network of nodes that do with references whatever programs do, and an account of who can still use what.

The account knows nothing of how references work: it lists the handles in the hands of nodes that live, and those in
messages on their way to nodes that live. What is on that list must exist; what is not, must not, once all has settled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastref.errors import OwnerDied, ReferenceLost, WorkerDied
from fastref.futures import Future
from fastref.rref import RRef
from fastref.testing import Network, Node
from tests.bad_mail import BadMailNetwork

__all__ = ["World"]

Handle = tuple[int, RRef]  # number of a value, and a reference to it

_world: World | None = None  # whose functions run now


class Thing:
    """A value with a number, and perhaps references to others. Its destruction is noted; that of a copy is not."""

    def __init__(self, number: int, references: list[RRef]) -> None:
        assert _world is not None
        self.number, self.references, self.destroyed = number, references, _world.destroyed

    def identify(self) -> int:
        return self.number

    def child(self, number: int) -> Any:
        return _create(number, [])

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Copy, (self.number,)

    def __del__(self) -> None:
        self.destroyed.add(self.number)


@dataclass
class Copy:
    """What a fetch of a ``Thing`` gives."""

    number: int


@dataclass
class Parcel:
    """References inside an object that goes by pickle."""

    contents: list[RRef]


@dataclass
class Letter:
    """References on their way from one node to another."""

    source: int
    target: int
    numbers: list[int]
    is_published: bool = False  # in the ring of its target; its source has died


@dataclass
class Question:
    """A call whose answer has not come."""

    asker: int
    asked: int
    future: Future
    names: list[int]  # values that the call names, besides those in its letter
    letter: int | None = None
    answer: Any = None
    failure: type[Exception] | None = None
    brings: bool = False  # the answer is the letter


# ---- what runs on nodes


def stow(letter: int, rank: int, package: Any) -> None:
    """Keep what a letter brings on the shelf of this node."""
    world = _on(rank)
    world.shelves[rank] += zip(world.letters.pop(letter).numbers, _unpack(package), strict=True)


def embed(letter: int, rank: int, number: int, package: Any) -> Any:
    """Make a value that holds what a letter brings."""
    world = _on(rank)
    inside = world.letters.pop(letter).numbers
    if is_thing(number):
        world.inside[number] = inside
    return _create(number, _unpack(package))


def refuse(letter: int, rank: int, package: Any) -> None:
    """Fail when the references of a letter are here."""
    _on(rank).letters.pop(letter)
    raise ValueError("refused")


def hand_out(letter: int, rank: int, asker: int, choice: int, form: int) -> Any:
    """Return references from the shelf of this node."""
    world = _on(rank)
    handles = world.shelves[rank][choice : choice + 3]
    world.letters[letter] = Letter(rank, asker, [number for number, _ in handles])
    return _pack(handles, form)


def make(number: int) -> Any:
    return _create(number, [])


def _on(rank: int) -> World:
    assert _world is not None and _world.network[rank].alive, f"a function ran on worker{rank}, which is dead"
    return _world


def _create(number: int, references: list[RRef]) -> Any:
    """The value of a number: one in the descriptor, one in a block, or one that its owner alone can give."""
    assert _world is not None and number not in _world.made, "a function ran twice"
    _world.made.add(number)
    return Thing(number, references) if is_thing(number) else _plain(number)


def _plain(number: int) -> Any:
    return number if number % 4 == 0 else (number,) * 40


def is_thing(number: int) -> bool:
    return number % 4 >= 2


def _pack(handles: Sequence[Handle], form: int) -> Any:
    """Put references into a list, deeper into containers, or into an object that goes by pickle."""
    references = [rref for _, rref in handles]
    return (references, {"nested": [tuple(references)]}, Parcel(references))[form]


def _unpack(package: Any) -> list[RRef]:
    if isinstance(package, Parcel):
        return package.contents
    return package if isinstance(package, list) else list(package["nested"][0])


class World:
    """Nodes, what they hold in variables and on shelves, and the account.

    Parameters
    ----------
    count, bits, capacity
        As of ``Network``.
    hosts : str
        A letter for each node, repeated as often as need be: nodes with different ones share no memory.
    bad_mail : bool
        What holders without a bit tell each other is late, comes in any order, and comes again.
    """

    def __init__(self, count: int, bits: int, capacity: int, bad_mail: bool = False, hosts: str = "a") -> None:
        global _world
        _world = self
        places = [hosts[rank % len(hosts)] for rank in range(count)]
        kind = BadMailNetwork if bad_mail else Network
        self.network = kind(count, bits=bits, capacity=capacity, window=4, hosts=places)
        for node in self.network:
            node.default_timeout_s = 20.0  # what takes longer hangs
        self.owners: list[int] = []  # by number
        self.makers: list[int] = []  # by number: who asked for the value
        self.made: set[int] = set()
        self.inside: dict[int, list[int]] = {}  # numbers of what a value holds references to
        self.destroyed: set[int] = set()
        self.void: set[int] = set()  # never made, or not for sure: who asked died before it could publish that
        self.variables: list[list[Handle]] = [[] for _ in range(count)]
        self.shelves: list[list[Handle]] = [[] for _ in range(count)]
        self.letters: dict[int, Letter] = {}
        self.letters_written = 0
        self.questions: list[Question] = []

    def living(self) -> list[int]:
        return [node.rank for node in self.network if node.alive]

    def within_reach(self, rank: int) -> list[Handle]:
        """All that a node can use: what it was given, and what its functions kept."""
        return self.variables[rank] + self.shelves[rank]

    # ---- what nodes do

    def new(self, rank: int) -> None:
        number = self._number(rank, rank)
        self.variables[rank].append((number, self.network[rank].new(make(number))))

    def remote(self, rank: int, target: int, handles: list[Handle], form: int) -> None:
        """Have a value made elsewhere that may hold references."""
        number = self._number(rank, target)
        letter = self._write(rank, target, handles)
        args = (letter, target, number, _pack(handles, form))
        self._make_remotely(number, letter, target, lambda node: node.remote(target, embed, args))

    def child(self, rank: int, handle: Handle) -> None:
        """Have a value made by a method of another."""
        parent, rref = handle
        if is_thing(parent):
            number = self._number(rank, self.owners[parent])
            if parent in self.void:
                self.void.add(number)
            self._make_remotely(number, None, self.owners[parent], lambda node: rref.remote().child(number))

    def hand_on(self, rank: int, target: int, handles: list[Handle], form: int, refused: bool) -> None:
        """Give references as arguments to a function that keeps them, or to one that fails."""
        letter = self._write(rank, target, handles)
        function, failure = (refuse, ValueError) if refused else (stow, None)
        args = (letter, target, _pack(handles, form))
        self._ask(rank, target, [], lambda node: node.rpc_async(target, function, args), letter, failure=failure)

    def ask_for(self, rank: int, target: int, choice: int, form: int) -> None:
        """Get references as a result."""
        self.letters_written += 1
        letter = self.letters_written
        args = (letter, target, rank, choice, form)
        self._ask(rank, target, [], lambda node: node.rpc_async(target, hand_out, args), letter, brings=True)

    def call_method(self, rank: int, handle: Handle) -> None:
        number, rref = handle
        if is_thing(number):
            call, answer = (lambda node: rref.rpc_async().identify()), number
        elif number % 4 == 0:
            call, answer = (lambda node: rref.rpc_async().conjugate()), number
        else:
            call, answer = (lambda node: rref.rpc_async().count(number)), 40
        self._ask(rank, self.owners[number], [number], call, answer=answer)

    def fetch(self, rank: int, handle: Handle) -> None:
        """Get a copy, while all that is under way arrives."""
        number, rref = handle
        try:
            value = self.network.run(rref.to_here)
        except OwnerDied:
            assert not self.network[self.owners[number]].alive
            return
        except (WorkerDied, ReferenceLost):  # or its maker did, before it had asked for it
            assert number in self.void
            return
        if is_thing(number) and self.owners[number] == rank:
            assert type(value) is Thing and value.number == number
        else:
            assert value == (Copy(number) if is_thing(number) else _plain(number))

    def drop(self, rank: int, index: int) -> None:
        del self.variables[rank][index]

    def clear_shelf(self, rank: int) -> None:
        self.shelves[rank].clear()

    # ---- what happens to them

    def deliver_mail(self, choice: int, again: bool) -> None:
        if isinstance(self.network, BadMailNetwork):
            self.network.deliver_mail(choice, again)

    def kill(self, rank: int, lose: bool, seen_by: list[int]) -> None:
        for number, letter in list(self.letters.items()):
            if letter.source == rank and lose:
                del self.letters[number]
            elif letter.source == rank:
                letter.is_published = True
        if lose:
            self.void |= {number for number, maker in enumerate(self.makers) if maker == rank} - self.made
        self.questions = [question for question in self.questions if question.asker != rank]
        self.network.kill(rank, lose=lose, seen_by=seen_by)

    # ---- the account

    def live(self) -> set[int]:
        """Numbers of the values that somebody can still use."""
        alive = [node.alive for node in self.network]
        waiting = [number for rank in self.living() for number, _ in self.within_reach(rank)]
        for letter in self.letters.values():
            if alive[letter.target] and (alive[letter.source] or letter.is_published):
                # One reference that is lost fails the whole call, and its references go.
                waiting += () if self.void & set(letter.numbers) else letter.numbers
        found: set[int] = set()
        while waiting:
            number = waiting.pop()
            if number not in found and alive[self.owners[number]]:
                found.add(number)
                waiting += self.inside.get(number, ())
        return found

    def check(self) -> None:
        """What somebody can use exists."""
        self._read_answers()
        lost = self.live() & self.destroyed
        assert not lost, f"values {sorted(lost)} are destroyed, and can still be used"

    def check_settled(self) -> None:
        """And what nobody can use does not."""
        self.network.settle()
        self.check()
        self.network.settle()  # what came with the answers was perhaps not kept
        assert not self.questions, "calls without an answer"
        left = {number for number in self.made if is_thing(number) and self.network[self.owners[number]].alive}
        left -= self.live() | self.destroyed
        assert not left, f"values {sorted(left)} exist, and nobody can use them"

    def close(self) -> None:
        """Let go of everything: nothing may be left anywhere."""
        self.check_settled()  # what is under way fills shelves
        for rank in self.living():
            self.variables[rank].clear()
            self.shelves[rank].clear()
        self.check_settled()
        left = {rank: self.network[rank].holdings() for rank in self.living()}
        assert not any(left.values()), left
        for node in self.network:  # calls that the dead wait for keep them: no garbage collector sees a pending call
            if not node.alive:
                node.close()

    def _number(self, maker: int, owner: int) -> int:
        self.owners.append(owner)
        self.makers.append(maker)
        return len(self.owners) - 1

    def _write(self, source: int, target: int, handles: Sequence[Handle]) -> int:
        self.letters_written += 1
        self.letters[self.letters_written] = Letter(source, target, [number for number, _ in handles])
        return self.letters_written

    def _make_remotely(self, number: int, letter: int | None, target: int, call: Callable[[Node], RRef]) -> None:
        node = self.network[self.makers[number]]
        must_wait = target != node.rank and not node.credits(target)
        try:
            rref = self.network.run(lambda: call(node)) if must_wait else call(node)
        except WorkerDied:
            assert not self.network[target].alive
            self.letters.pop(letter, None)
        else:
            self.variables[node.rank].append((number, rref))

    def _ask(
        self, asker: int, asked: int, names: list[int], call: Callable[[Node], Future], letter: int | None = None,
        *, answer: Any = None, failure: type[Exception] | None = None, brings: bool = False,
    ) -> None:  # fmt: skip
        future = call(self.network[asker])
        self.questions.append(Question(asker, asked, future, names, letter, answer, failure, brings))

    def _read_answers(self) -> None:
        still = []
        for question in self.questions:
            if question.future.done():
                self._read_answer(question)
            else:
                still.append(question)
        self.questions = still

    def _read_answer(self, question: Question) -> None:
        letter = None
        if question.letter is not None and (question.brings or question.letter in self.letters):
            letter = self.letters.pop(question.letter, None)
        try:
            answer = question.future.value()
        except (WorkerDied, ReferenceLost) as error:
            nobody_answered = isinstance(error, WorkerDied) and not self.network[question.asked].alive
            assert nobody_answered or self.void & {*question.names, *(letter.numbers if letter else ())}
        except ValueError as error:
            assert question.failure is ValueError, error
        else:
            assert question.failure is None
            if question.brings:
                assert letter is not None
                self.variables[question.asker] += zip(letter.numbers, _unpack(answer), strict=True)
            else:
                assert answer == question.answer
