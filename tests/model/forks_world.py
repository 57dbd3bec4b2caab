"""The state of the model of references that go by messages: processes, the owner's entries, a bad network."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

__all__ = ["ANN", "BEN", "CAY", "CUT", "DEAD", "LIVE", "NAMES", "OWNER", "ForksWorld", "Message"]

OWNER, ANN, BEN, CAY = range(4)
NAMES = ("owner", "ann", "ben", "cay")

LIVE, DEAD, CUT = range(3)
"""A process that is CUT lives on while all others take it for dead, and it takes them for dead."""


class Message(NamedTuple):
    """One message of the network.

    Parameters
    ----------
    kind : "ref" | "request" | "accept" | "child accept" | "delete" | "done"
    body : what it says
    lost : it is under way no more; its sender has it still, and sends it again
    """

    source: int
    target: int
    kind: str
    body: tuple
    lost: bool = False


class ForksWorld:
    """One state, thawed: lists that a step may change.

    ``serial`` numbers the objects that were ever in an entry. It is the truth; what the rules see of it is the
    generation. Whatever names an entry in this model names the serial too, as (entry, serial).

    Parameters
    ----------
    frozen : what `freeze` returned
    """

    FIELDS = (
        # The owner.
        "serial",  # per entry: objects opened there so far; the last one is meant
        "used",  # per entry: it is there
        "marked",  # per entry: somebody holds it by messages, as the table has it
        "owner_forks",  # one element: the shipped OwnerForks, frozen
        "marks",  # per thread of the owner: Mark and Clear that were decided and not performed
        # Every process.
        "handles",  # process * entries + entry: how many
        "held",  # process * entries + entry: the serial of handles and pins
        "pins",  # per process: {("child" or "ack", target, entry, serial, fork), ...}
        "gone",  # per process: {(entry, serial), ...} that nothing was left of, to be told to the owner
        "user_forks",  # per process: the shipped UserForks, frozen
        "removal",  # per process: the shipped Removal, frozen
        "seen",  # per process: ((source, shipped SeenNumbers), ...) of messages that bring references, frozen
        "sent",  # per process: messages with references sent so far, by target
        "minted",  # per process: forks made so far
        # The network, life and death.
        "network",  # one element: {Message, ...}
        "life",  # per process
        "noticed",  # per process: bits of those it takes for dead
        "drained",  # per process: bits of those nothing more is taken from
        "budget",  # how often each thing may still happen
        "broken",  # one element: what a step did that no state shows, or ""
    )
    __slots__ = FIELDS

    def __init__(self, frozen: tuple) -> None:
        for name, value in zip(self.FIELDS, frozen, strict=True):
            setattr(self, name, list(value))

    serial: list[int]
    used: list[bool]
    marked: list[bool]
    owner_forks: list[Any]
    marks: list[tuple]
    handles: list[int]
    held: list[int]
    pins: list[frozenset]
    gone: list[frozenset]
    user_forks: list[Any]
    removal: list[Any]
    seen: list[tuple]
    sent: list[tuple]
    minted: list[int]
    network: list[frozenset[Message]]
    life: list[int]
    noticed: list[int]
    drained: list[int]
    budget: list[int]
    broken: list[str]

    def freeze(self) -> Hashable:
        """Return the state as a hashable value."""
        return tuple([tuple(getattr(self, name)) for name in self.FIELDS])

    def cell(self, process: int, entry: int) -> int:
        """Return where ``handles`` and ``held`` have a process's share of an entry."""
        return process * len(self.serial) + entry

    def count(self, process: int, entry: int) -> int:
        """Return how many handles and pins a process has on an entry."""
        return self.handles[self.cell(process, entry)] + sum(pin[2] == entry for pin in self.pins[process])

    def there(self, entry: int, serial: int) -> bool:
        """Return whether that very object exists."""
        return self.used[entry] and self.serial[entry] == serial

    def takes_for_dead(self, process: int, other: int) -> bool:
        """Return whether a process has noticed that another has died."""
        return bool(self.noticed[process] >> other & 1)

    def reads(self, process: int, source: int) -> bool:
        """Return whether what comes from a process is still taken."""
        return self.life[process] != DEAD and not self.drained[process] >> source & 1

    def post(self, source: int, target: int, kind: str, *body: object) -> None:
        """Send a message; nobody sends to one whose death he has noticed."""
        if not self.takes_for_dead(source, target) and self.reads(target, source):
            self.network[0] |= {Message(source, target, kind, body)}

    def settle(self, message: Message) -> None:
        """Take a message out of the network."""
        self.network[0] -= {message}

    def forget(self, keep: Any) -> None:
        """Keep only the messages that satisfy a condition."""
        self.network[0] = frozenset(filter(keep, self.network[0]))
