"""Who belongs to a group that workers join and leave while others work, as one member sees it.

A newcomer asks every member before it links to any. Newcomers come one at a time, so what one member has said holds
until that newcomer has linked or given up. The rank of a member that has gone is free when this member has taken out
all that the old one held and read all that it sent: until then the newcomer waits.

    event                        state of the rank        commands
    Asks(visitor, name, rank)    a member has it          Refuse
                                 one that has gone        -; Admit with Removed
                                 free, or never used      Admit; Refuse, if a member has the name
    Met(name, rank, incarnation)                          -
    Gone(rank)                   a member has it          -
    Removed(rank)                one that has gone        Admit of those who wait for the rank

Each holder of a rank has an incarnation, one more than any that this member, or anybody it has met, has heard of. So
nothing that was said by or about one worker is ever taken for another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastref.errors import ProtocolError

__all__ = [
    "GENERATIONS",
    "INCARNATIONS",
    "Admit",
    "Asks",
    "Gone",
    "GroupMembers",
    "Met",
    "Refuse",
    "Removed",
    "generations_of",
]

# A generation of a table's entry has 32 bits: the upper ones say whose table it is.
GENERATIONS = 1 << 20
INCARNATIONS = 1 << 12


def generations_of(incarnation: int) -> range:
    """Return the generations of the entries of one incarnation's table."""
    return range(incarnation * GENERATIONS, min((incarnation + 1) * GENERATIONS, 0xFFFFFFFF))


@dataclass(frozen=True)
class Asks:
    visitor: int
    name: str
    rank: int


@dataclass(frozen=True)
class Met:
    name: str
    rank: int
    incarnation: int


@dataclass(frozen=True)
class Gone:
    rank: int


@dataclass(frozen=True)
class Removed:
    rank: int


@dataclass(frozen=True)
class Admit:
    """Tell a visitor that it may link, and how many incarnations each rank has had."""

    visitor: int
    used: dict[int, int]


@dataclass(frozen=True)
class Refuse:
    visitor: int
    sentence: str


Event = Asks | Met | Gone | Removed
Command = Admit | Refuse


@dataclass
class _Rank:
    name: str
    gone: bool = False
    removed: bool = False


class GroupMembers:
    """One member's list of all.

    Parameters
    ----------
    used : mapping
        Rank -> how many workers are known to have had it, before this member came.
    present : iterable of Met
        Who was there when it came, itself included.
    """

    def __init__(self, used: Mapping[int, int], present: Iterable[Met]) -> None:
        self._used = dict(used)
        self._ranks: dict[int, _Rank] = {}
        for met in present:
            self._ranks[met.rank] = _Rank(met.name)
            self._used[met.rank] = max(self._used.get(met.rank, 0), met.incarnation + 1)
        self._waiting: dict[int, Asks] = {}

    def handle(self, event: Event) -> list[Command]:
        """Return what has to be done about an event, in order."""
        if isinstance(event, Asks):
            return self._asks(event)
        if isinstance(event, Met):
            return self._met(event)
        holder = self._ranks.get(event.rank)
        if holder is None:
            raise ProtocolError(f"nobody has had rank {event.rank}")
        if isinstance(event, Gone):
            holder.gone = True
            return []
        if not holder.gone:
            raise ProtocolError(f"rank {event.rank} is removed, but has not gone")
        holder.removed = True
        ready = [asked for asked in self._waiting.values() if asked.rank == event.rank]
        return [command for asked in ready for command in self._asks(asked)]

    def withdraw(self, visitor: int) -> None:
        """A visitor does not wait any more; idempotent."""
        self._waiting.pop(visitor, None)

    def is_free(self, rank: int) -> bool:
        """True when nobody has a rank, and nothing is left of who had it."""
        holder = self._ranks.get(rank)
        return holder is None or holder.removed

    def _asks(self, asks: Asks) -> list[Command]:
        self._waiting.pop(asks.visitor, None)
        for rank, holder in self._ranks.items():
            if not holder.gone and (rank == asks.rank or holder.name == asks.name):
                what = f"rank {rank}" if rank == asks.rank else f"the name {asks.name!r}"
                return [Refuse(asks.visitor, f"{what} is not unique: {holder.name!r} (rank {rank}) has it")]
        if self._used.get(asks.rank, 0) >= INCARNATIONS:
            sentence = f"{INCARNATIONS} workers of this group have had rank {asks.rank}; take another"
            return [Refuse(asks.visitor, sentence)]
        if not self.is_free(asks.rank):
            self._waiting[asks.visitor] = asks
            return []
        return [Admit(asks.visitor, dict(self._used))]

    def _met(self, met: Met) -> list[Command]:
        if not self.is_free(met.rank):
            raise ProtocolError(f"rank {met.rank} is {self._ranks[met.rank].name!r}, not {met.name!r}")
        if met.incarnation < self._used.get(met.rank, 0):
            raise ProtocolError(f"incarnation {met.incarnation} of rank {met.rank} has been")
        self._used[met.rank] = met.incarnation + 1
        self._ranks[met.rank] = _Rank(met.name)
        return []
