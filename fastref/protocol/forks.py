"""References whose holder has no bit in the owner's table: they go by messages, torch's way.

The owner keeps the exact set of forks for each entry. A fork that the owner itself makes is registered when it is made;
one that a user makes is asked for by its receiver, whose parent stays pinned until the owner has said yes. Every
message may be repeated: all of them are idempotent.

Owner's half
    event                                state of the fork          commands
    Made / Requested(fork, holder)       unknown                    Mark, if first; Accept, if requested
    Requested                            registered                 Accept
    Requested                            deleted already            Accept; it stays deleted
    Deleted(forks, holder)               registered                 Clear, if last
    Deleted                              unknown                    - (remembered, as every deleted fork is)
    HolderLost(holder)                   any of that holder's       Clear for each entry it was the last of

User's half
    Received(fork, parent is the owner)  -                          -
    Received(fork, another parent)       -                          Request; ChildAccept, if the owner has died
    Accepted(fork, ok)                   requested                  ChildAccept; Delete, if it was let go meanwhile
    LetGo(entry)                         registered                 Delete
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from fastref.errors import ProtocolError

__all__ = ["OwnerForks", "UserForks", "Mark", "Clear", "Accept", "Request", "ChildAccept", "Delete", "Lose"]

Entry = tuple[int, int]  # index and generation in the owner's table
TOMBSTONES = 65536  # forks that were deleted; the oldest is forgotten beyond this


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
        self._deleted: OrderedDict[int, None] = OrderedDict()

    def made(self, entry: Entry, fork: int, holder: int) -> list[Mark]:
        """The owner hands a fork to a holder. The entry is open."""
        return self._register(entry, fork, holder)

    def requested(self, entry: Entry, fork: int, holder: int, alive: bool) -> list[Mark | Accept]:
        """A holder asks for a fork. ``alive``: the entry is open in that generation."""
        if fork in self._deleted:
            return [Accept(holder, entry, fork, True)]
        if not alive:
            return [Accept(holder, entry, fork, False)]
        return [*self._register(entry, fork, holder), Accept(holder, entry, fork, True)]

    def deleted(self, entry: Entry, forks: tuple[int, ...]) -> list[Clear]:
        """A holder has let forks go."""
        held = self._forks.get(entry, {})
        for fork in forks:
            held.pop(fork, None)
            self._deleted[fork] = None  # a request for it may still come, for the first time or again
            if len(self._deleted) > TOMBSTONES:
                self._deleted.popitem(last=False)
        return self._clear_if_empty(entry)

    def holder_lost(self, holder: int) -> list[Clear]:
        """A holder has died: all its forks go."""
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

    def holders(self) -> dict[int, int]:
        """How many forks each entry has: index -> forks."""
        return {entry[0]: len(held) for entry, held in self._forks.items() if held}

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


class UserForks:
    """A user's half, for the owners in whose tables it has no bit."""

    def __init__(self) -> None:
        self._registered: dict[tuple[int, Entry], set[int]] = {}
        self._requested: dict[int, tuple[int, Entry, int]] = {}  # fork -> owner, entry, parent
        self._let_go: set[int] = set()  # requested forks that nobody holds any more
        self._lost: set[int] = set()  # owners that have died

    def received(self, owner: int, entry: Entry, fork: int, parent: int) -> list[Request | ChildAccept]:
        """A fork has arrived."""
        if owner in self._lost:  # nobody is left to ask; the parent need not wait
            return [] if parent == owner else [ChildAccept(parent, fork)]
        if parent == owner:
            self._registered.setdefault((owner, entry), set()).add(fork)
            return []
        self._requested[fork] = (owner, entry, parent)
        return [Request(owner, entry, fork)]

    def granted(self, owner: int, entry: Entry, fork: int) -> None:
        """The owner opened an entry ahead, under this fork."""
        if owner not in self._lost:
            self._registered.setdefault((owner, entry), set()).add(fork)

    def accepted(self, fork: int, ok: bool) -> list[ChildAccept | Delete | Lose]:
        """The owner has answered a request."""
        try:
            owner, entry, parent = self._requested.pop(fork)
        except KeyError:
            return []  # an answer that came twice
        commands: list[ChildAccept | Delete | Lose] = [ChildAccept(parent, fork)]
        gone = fork in self._let_go
        self._let_go.discard(fork)
        if not ok:
            return [*commands, Lose(owner, entry)]
        if gone:
            return [*commands, Delete(owner, entry, (fork,))]
        self._registered.setdefault((owner, entry), set()).add(fork)
        return commands

    def let_go(self, owner: int, entry: Entry) -> list[Delete]:
        """This process holds nothing of an entry any more."""
        for fork, (whose, which, _) in self._requested.items():
            if (whose, which) == (owner, entry):
                self._let_go.add(fork)
        forks = self._registered.pop((owner, entry), set())
        return [Delete(owner, entry, tuple(sorted(forks)))] if forks else []

    def owner_lost(self, owner: int) -> list[ChildAccept]:
        """An owner has died: its entries are void, and nobody need stay pinned for them."""
        self._lost.add(owner)
        for key in [key for key in self._registered if key[0] == owner]:
            del self._registered[key]
        commands = []
        for fork, (whose, _, parent) in list(self._requested.items()):
            if whose == owner:
                del self._requested[fork]
                self._let_go.discard(fork)
                commands.append(ChildAccept(parent, fork))
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
        return any(whose == parent for _, _, whose in self._requested.values())

    def check(self) -> None:
        """Raise when the books do not agree with themselves."""
        if not self._let_go <= set(self._requested):
            raise ProtocolError("forks are let go that were never requested")
