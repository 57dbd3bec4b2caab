"""How the holders of a dead worker are taken out of this process's table, exactly and without guessing.

What the dead worker published may carry references whose receivers have not set their bits yet. So its own bits stay
until every live worker has acquired all that it published: this process asks them, and itself. Of several dead workers
one may have handed on what it had of another, and have died before its own request for that arrived. So all who are
dead are removed at once, when every question about any of them is answered.

    event               from                                commands
    Died(dead)          the monitor                         Send(DrainAsk) to all that live; or Clear if nobody does
    Drained(dead)       this inbox: nothing of it is left   Send(DrainDone) to those who asked; Clear if all answered
    Ask(dead, asker)    a live worker                       Send(DrainDone) at once, or when we have drained it; at once
                                                            too about one that was never met, or was forgotten
    Done(dead, worker)  a live worker                       Clear of all dead workers, if it was the last answer
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastref.errors import ProtocolError

__all__ = ["Removal", "Died", "Drained", "Ask", "Done", "SendAsk", "SendDone", "Clear", "LookAtInbox"]


@dataclass(frozen=True)
class Died:
    dead: int


@dataclass(frozen=True)
class Drained:
    dead: int


@dataclass(frozen=True)
class Ask:
    dead: int
    asker: int


@dataclass(frozen=True)
class Done:
    dead: int
    worker: int


@dataclass(frozen=True)
class SendAsk:
    to: int
    dead: int


@dataclass(frozen=True)
class SendDone:
    to: int
    dead: int


@dataclass(frozen=True)
class Clear:
    """Take the dead worker's bits and forks out, then sweep every zero word."""

    dead: int


@dataclass(frozen=True)
class LookAtInbox:
    """Say ``Drained`` as soon as nothing of the dead worker is left to read."""

    dead: int


Event = Died | Drained | Ask | Done
Command = SendAsk | SendDone | Clear | LookAtInbox


@dataclass
class _Case:
    known: bool = False  # our own monitor has seen it
    drained: bool = False
    cleared: bool = False
    awaited: set[int] = field(default_factory=set)
    askers: set[int] = field(default_factory=set)


class Removal:
    """One worker's part in the removal of dead ones.

    Parameters
    ----------
    me : int
        This worker's rank.
    live : iterable of int
        Ranks of the workers that live now, this one included or not. In a group whose ranks are used again, any
        numbers that are not.
    """

    def __init__(self, me: int, live: set[int]) -> None:
        self.me = me
        self.live = set(live) - {me}
        self._cases: dict[int, _Case] = {}

    def handle(self, event: Event) -> list[Command]:
        """Return what has to be done about an event, in order."""
        if isinstance(event, Died):
            return self._died(event.dead)
        if isinstance(event, Ask):
            return self._ask(event.dead, event.asker)
        case = self._cases.get(event.dead)
        if case is None or not case.known:
            raise ProtocolError(f"rank {event.dead} is not known to be dead")
        if isinstance(event, Drained):
            return self._drained(event.dead, case)
        case.awaited.discard(event.worker)
        return self._clear_if_all_answered()

    def forget(self, dead: int) -> None:
        """Another has taken the place of a worker that was removed."""
        if not self.is_cleared(dead):
            raise ProtocolError(f"rank {dead} is not removed yet")
        del self._cases[dead]

    def is_cleared(self, dead: int) -> bool:
        """True once nothing of a dead worker is left here."""
        return dead in self._cases and self._cases[dead].cleared

    def open_cases(self) -> dict[int, set[int]]:
        """Dead workers that are not removed yet, and who has not answered about them."""
        return {dead: set(case.awaited) for dead, case in self._cases.items() if case.known and not case.cleared}

    def _died(self, dead: int) -> list[Command]:
        if dead == self.me:
            raise ProtocolError("a worker cannot see its own death")
        case = self._cases.setdefault(dead, _Case())
        if case.known:
            return []
        case.known = True
        self.live.discard(dead)
        case.awaited = set(self.live)
        for other in self._cases.values():
            other.awaited.discard(dead)  # no answer comes from it; its own case holds the others up instead
        commands: list[Command] = [LookAtInbox(dead)]
        commands += [SendAsk(to, dead) for to in sorted(self.live)]
        return commands

    def _ask(self, dead: int, asker: int) -> list[Command]:
        if dead == self.me or asker == self.me:
            raise ProtocolError(f"rank {asker} asks rank {self.me} about rank {dead}")
        if dead not in self.live and dead not in self._cases:
            return [SendDone(asker, dead)]  # it sent nothing here
        case = self._cases.setdefault(dead, _Case())
        if case.drained:
            return [SendDone(asker, dead)]
        case.askers.add(asker)
        return []

    def _drained(self, dead: int, case: _Case) -> list[Command]:
        if case.drained:
            return []
        case.drained = True
        askers, case.askers = sorted(case.askers & self.live), set()
        return [*(SendDone(asker, dead) for asker in askers), *self._clear_if_all_answered()]

    def _clear_if_all_answered(self) -> list[Command]:
        open_cases = {dead: case for dead, case in sorted(self._cases.items()) if case.known and not case.cleared}
        if any(case.awaited or not case.drained for case in open_cases.values()):
            return []
        for case in open_cases.values():
            case.cleared = True
        return [Clear(dead) for dead in open_cases]
