"""References whose holder has no bit in the owner's table: they go by messages, torch's way.

The owner keeps the exact set of forks for each entry. A fork that the owner itself makes is registered when it is made;
one that a user makes is asked for by its receiver, whose parent stays pinned until the owner has said yes. The receiver
uses it meanwhile.

Requests, answers, confirmations and deletes may be late, come again and overtake each other. A holder numbers its
requests for each owner, and the owner deals with a number once: it knows a request that comes again however late that
is, and need not remember the forks that are gone. A holder deletes what it asked for after the answer only, so no
delete overtakes the first request. What brings a fork (`received`, `granted`) must come once: with it comes a call.

Owner's half
    event                                state of the fork          commands
    Made                                 unknown                    Mark, if first
    Requested(fork, number)              number is new              Mark, if first; Accept
    Requested                            number met, registered     Accept
    Requested                            number met, deleted        Accept, with a no that nobody waits for
    Deleted(forks, holder)               registered                 Clear, if last
    Deleted                              unknown                    -
    HolderLost(holder)                   any of that holder's       Clear for each entry it was the last of

User's half
    Received(fork, parent is the owner)  -                          -
    Received(fork, another parent)       -                          Request; ChildAccept, if the owner has died
    Accepted(fork, ok)                   requested                  ChildAccept; Delete, if it was let go meanwhile
    Accepted                             answered already           -
    LetGo(entry)                         registered                 Delete
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastref.errors import ProtocolError
from fastref.protocol.seen import SeenNumbers

__all__ = ["OwnerForks", "UserForks", "Mark", "Clear", "Accept", "Request", "ChildAccept", "Delete", "Lose"]

Entry = tuple[int, int]  # index and generation in the owner's table


@dataclass(frozen=True)
class Mark:
    """The entry has holders that go by messages."""

    index: int


@dataclass(frozen=True)
class Clear:
    """The entry has no such holder any more."""

    index: int


@dataclass(frozen=True)
class Accept:
    """Tell a holder whether its fork is registered."""

    holder: int
    entry: Entry
    fork: int
    ok: bool


@dataclass(frozen=True)
class Request:
    """Ask the owner to register a fork."""

    owner: int
    entry: Entry
    fork: int
    number: int


@dataclass(frozen=True)
class ChildAccept:
    """Tell the parent of a fork that it may let go."""

    parent: int
    fork: int


@dataclass(frozen=True)
class Delete:
    """Tell the owner that forks are gone."""

    owner: int
    entry: Entry
    forks: tuple[int, ...]


@dataclass(frozen=True)
class Lose:
    """The owner does not know the entry any more: handles on it are void."""

    owner: int
    entry: Entry


class OwnerForks:
    """The owner's half: who holds which entry by messages."""

    def __init__(self) -> None:
        self._forks: dict[Entry, dict[int, int]] = {}  # entry -> fork -> holder
        self._met: dict[int, SeenNumbers] = {}  # by holder: its requests that were dealt with

    def made(self, entry: Entry, fork: int, holder: int) -> list[Mark]:
        """The owner hands a fork to a holder. The entry is open."""
        return self._register(entry, fork, holder)

    def requested(self, entry: Entry, fork: int, holder: int, number: int, alive: bool) -> list[Mark | Accept]:
        """A holder asks for a fork. ``alive``: the entry is open in that generation."""
        commands: list[Mark | Accept] = []
        if self._met.setdefault(holder, SeenNumbers()).first(number) and alive:
            commands += self._register(entry, fork, holder)
        return [*commands, Accept(holder, entry, fork, fork in self._forks.get(entry, {}))]

    def deleted(self, entry: Entry, forks: tuple[int, ...], holder: int) -> list[Clear]:
        """A holder has let forks go."""
        held = self._forks.get(entry, {})
        for fork in forks:
            if held.get(fork) == holder:
                del held[fork]
        return self._clear_if_empty(entry)

    def holder_lost(self, holder: int) -> list[Clear]:
        """A holder has died: all its forks go."""
        self._met.pop(holder, None)
        commands: list[Clear] = []
        for entry, held in list(self._forks.items()):
            mine = [fork for fork, who in held.items() if who == holder]
            for fork in mine:
                del held[fork]
            if mine:
                commands += self._clear_if_empty(entry)
        return commands

    def count(self, entry: Entry) -> int:
        """Forks of an entry."""
        return len(self._forks.get(entry, {}))

    def total(self) -> int:
        """Forks of all entries."""
        return sum(map(len, self._forks.values()))

    def ranks(self) -> set[int]:
        """Who has a fork of anything."""
        return {holder for held in self._forks.values() for holder in held.values()}

    def holders(self) -> dict[int, int]:
        """How many forks each entry has: index -> forks."""
        return {entry[0]: len(held) for entry, held in self._forks.items() if held}

    def unmet(self) -> int:
        """Stretches of requests that have not come although later ones of the same holder have."""
        return sum(met.gaps() for met in self._met.values())

    def _register(self, entry: Entry, fork: int, holder: int) -> list[Mark]:
        held = self._forks.setdefault(entry, {})
        first = not held
        held[fork] = holder
        return [Mark(entry[0])] if first else []

    def _clear_if_empty(self, entry: Entry) -> list[Clear]:
        if entry in self._forks and not self._forks[entry]:
            del self._forks[entry]
            return [Clear(entry[0])]
        return []


class _Asked(NamedTuple):
    """A request that the owner has not answered."""

    owner: int
    entry: Entry
    parent: int
    number: int


class UserForks:
    """A user's half, for the owners in whose tables it has no bit."""

    def __init__(self) -> None:
        self._registered: dict[tuple[int, Entry], set[int]] = {}
        self._requested: dict[int, _Asked] = {}  # by fork
        self._numbered: dict[int, int] = {}  # owner -> requests made so far
        self._let_go: set[int] = set()  # requested forks that nobody holds any more
        self._lost: set[int] = set()  # owners that have died

    def received(self, owner: int, entry: Entry, fork: int, parent: int) -> list[Request | ChildAccept]:
        """A fork has arrived."""
        if owner in self._lost:  # nobody is left to ask; the parent need not wait
            return [] if parent == owner else [ChildAccept(parent, fork)]
        if parent == owner:
            self._registered.setdefault((owner, entry), set()).add(fork)
            return []
        number = self._numbered[owner] = self._numbered.get(owner, 0) + 1
        self._requested[fork] = _Asked(owner, entry, parent, number)
        return [Request(owner, entry, fork, number)]

    def granted(self, owner: int, entry: Entry, fork: int) -> None:
        """The owner opened an entry ahead, under this fork."""
        if owner not in self._lost:
            self._registered.setdefault((owner, entry), set()).add(fork)

    def accepted(self, fork: int, ok: bool) -> list[ChildAccept | Delete | Lose]:
        """The owner has answered a request."""
        asked = self._requested.pop(fork, None)
        if asked is None:
            return []  # an answer that came twice
        commands: list[ChildAccept | Delete | Lose] = [ChildAccept(asked.parent, fork)]
        gone = fork in self._let_go
        self._let_go.discard(fork)
        if not ok:
            return [*commands, Lose(asked.owner, asked.entry)]
        if gone:
            return [*commands, Delete(asked.owner, asked.entry, (fork,))]
        self._registered.setdefault((asked.owner, asked.entry), set()).add(fork)
        return commands

    def let_go(self, owner: int, entry: Entry) -> list[Delete]:
        """This process holds nothing of an entry any more."""
        for fork, asked in self._requested.items():
            if (asked.owner, asked.entry) == (owner, entry):
                self._let_go.add(fork)
        forks = self._registered.pop((owner, entry), set())
        return [Delete(owner, entry, tuple(sorted(forks)))] if forks else []

    def owner_lost(self, owner: int) -> list[ChildAccept]:
        """An owner has died: its entries are void, and nobody need stay pinned for them."""
        self._lost.add(owner)
        self._numbered.pop(owner, None)
        for key in [key for key in self._registered if key[0] == owner]:
            del self._registered[key]
        commands = []
        for fork, asked in list(self._requested.items()):
            if asked.owner == owner:
                del self._requested[fork]
                self._let_go.discard(fork)
                commands.append(ChildAccept(asked.parent, fork))
        return commands

    def owner_replaced(self, owner: int) -> None:
        """Another worker has the rank of an owner that has died."""
        self._lost.discard(owner)

    def waiting(self) -> int:
        """Forks that the owner has not answered for."""
        return len(self._requested)

    def waits_for_child_of(self, parent: int) -> bool:
        """True while the owner has not answered for a fork that ``parent`` made.

        Until then this process has not acquired all that ``parent`` published.
        """
        return any(asked.parent == parent for asked in self._requested.values())

    def check(self) -> None:
        """Raise when the books do not agree with themselves."""
        if not self._let_go <= set(self._requested):
            raise ProtocolError("forks are let go that were never requested")
