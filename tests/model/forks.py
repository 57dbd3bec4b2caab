"""References that go by messages as a model: the shipped rules over a network that loses, repeats and reorders.

Every process runs the shipped `UserForks`, the owner the shipped `OwnerForks`, and all of them the shipped `Removal`
and `SeenNumbers`. What surrounds those in a runtime is modelled, and each rule of it can be left out: pins, marks, what
is acknowledged when, who is listened to. Two rules are the shipped classes' own; without one of them a class takes
their place that does not keep it.

A message may arrive at any time after it was sent, in any order, again, or get lost; its sender keeps it until it is
acknowledged and sends it again. A process may die between any two steps: each message it has under way arrives, or does
not before its receiver has stopped to listen. Others notice a death one by one, at any time. A process may also be cut
off: all take it for dead, and it takes all others for dead, but it lives.

Not modelled: holders with a bit (see `rules`), entries opened ahead, a successor under the same rank (its channels tell
the two apart), messages that lie.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

from fastref.protocol.forks import Delete, OwnerForks, UserForks
from fastref.protocol.removal import Removal
from fastref.protocol.seen import SeenNumbers
from tests.model import forks_steps
from tests.model.forks_world import ANN, BEN, CAY, DEAD, LIVE, NAMES, OWNER, ForksWorld, Message
from tests.model.shipped import freeze, perform

__all__ = ["QUICK", "RULES", "SCENARIOS", "SHOWN_BY", "ForksModel", "Scenario", "build", "describe"]

Action = tuple

RULES = {
    "send_again": "a sender keeps a message until it is acknowledged, and sends it again",
    "act_before_ack": "a message is acknowledged when it was acted on, not before",
    "take_once": "a message that brings a reference is taken once: its number tells the copies",
    "number_requests": "a holder numbers its requests, and the owner deals with a number once",
    "delete_after_answer": "a holder deletes a fork only when the owner has answered for it",
    "delete_what_is_not_counted": "whether nothing is held is looked at when the delete is decided, not before",
    "pin_until_confirmed": "who hands a reference on keeps it until the receiver says that the owner knows",
    "pin_until_acknowledged": "who sends the owner its own keeps it until the owner has acknowledged the message",
    "register_before_send": "the owner registers a fork that it makes before the message leaves",
    "mark_as_decided": "the marks of an entry are set and cleared in the order in which that was decided",
    "generation": "an entry is named with its generation, which no later object of it has",
    "look_before_reading": "who reads a value without asking the owner looks at the generation",
    "nothing_for_the_dead": "the owner makes no fork for one whose death it has noticed",
    "everybody_drains_first": "a dead process's forks and children go when all that live have taken what it sent",
    "children_until_removed": "what was handed to a process that has died stays pinned until its removal",
    "answer_when_accepted": "who waits for the owner's word on a fork of the dead has not yet taken all that it sent",
    "closed_links": "from who was said to be drained nothing more is taken",
    "forks_go_with_holders": "the forks of a dead process go with its removal",
    "owners_death_frees": "the death of an owner ends what waits for its word",
}
"""Each rule that can be left out, and what it says."""


class Scenario(NamedTuple):
    """Bounds of one search.

    Parameters
    ----------
    limits : what may happen -> how often
    holders : processes that hold entry 0 at the start
    users : processes beside the owner
    entries : number of entries of the owner's table
    mortal : processes that may be killed
    """

    limits: dict[Hashable, int]
    holders: tuple[int, ...] = (OWNER,)
    users: tuple[int, ...] = (ANN, BEN)
    entries: int = 1
    mortal: tuple[int, ...] = (OWNER, ANN, BEN, CAY)


def _send(*routes: tuple[int, ...]) -> dict[Hashable, int]:
    """Each route is source, target and how often, once if that is left out."""
    return {("send", source, target): times[0] if times else 1 for source, target, *times in routes}


_THREE = (ANN, BEN, CAY)

SCENARIOS = {
    "one to another, lost and repeated": Scenario(
        {**_send((OWNER, ANN), (ANN, BEN)), "lose": 1, "repeat": 2}),
    "there and back by a bad network": Scenario(
        {**_send((ANN, BEN), (BEN, ANN)), "lose": 1, "repeat": 1}, holders=(ANN,)),
    "two by the same way": Scenario(
        {**_send((ANN, BEN, 2)), "repeat": 2}, holders=(ANN,)),
    "back to the owner": Scenario(
        {**_send((OWNER, ANN), (ANN, OWNER)), "lose": 1, "repeat": 1, "kill": 1}, users=(ANN,)),
    "handed on, and a death": Scenario(
        {**_send((ANN, BEN)), "repeat": 1, "kill": 1, "open": 1}, holders=(ANN,)),
    "the owner gives to one who dies": Scenario(
        {**_send((OWNER, ANN, 2)), "repeat": 1, "kill": 1}, users=(ANN,)),
    "an entry that is used again": Scenario(
        {**_send((OWNER, ANN), (ANN, OWNER)), "open": 1, "repeat": 2}, users=(ANN,)),
    "one who is cut off": Scenario(
        {**_send((OWNER, ANN)), "open": 1, "repeat": 1, "cut": 1}, users=(ANN,)),
    "handed on, and one is cut off": Scenario(
        {**_send((ANN, BEN)), "open": 1, "cut": 1}, holders=(ANN,)),
    "a chain, lost and repeated": Scenario(
        {**_send((OWNER, ANN), (ANN, BEN), (BEN, CAY)), "lose": 1, "repeat": 1}, users=_THREE),
    "a chain, and one dies": Scenario(
        {**_send((ANN, BEN), (BEN, CAY)), "kill": 1}, holders=(ANN,), users=_THREE),
    "a chain whose middle dies": Scenario(
        {**_send((ANN, BEN), (BEN, CAY)), "lose": 1, "kill": 1}, holders=(ANN,), users=_THREE, mortal=(BEN,)),
    "a chain of two deaths": Scenario(
        {**_send((ANN, BEN), (BEN, CAY)), "kill": 2}, holders=(ANN,), users=_THREE, mortal=(ANN, BEN)),
    "a chain from the owner, two deaths": Scenario(
        {**_send((OWNER, ANN), (ANN, BEN), (BEN, CAY)), "kill": 2}, users=_THREE, mortal=(ANN, BEN)),
    "two to one, and a death": Scenario(
        {**_send((ANN, CAY), (BEN, CAY)), "kill": 1}, holders=(ANN, BEN), users=_THREE, mortal=(ANN,)),
    "two objects": Scenario(
        {**_send((OWNER, ANN, 2), (ANN, BEN, 1)), "open": 2, "repeat": 1}, entries=2),
}  # fmt: skip
"""Every scenario of the whole search, by name."""

_LARGE = (
    "handed on, and one is cut off", "a chain whose middle dies", "a chain, lost and repeated",
    "a chain, and one dies", "a chain of two deaths", "a chain from the owner, two deaths", "two to one, and a death",
    "two objects",
)  # fmt: skip

QUICK = tuple(name for name in SCENARIOS if name not in _LARGE)
"""Scenarios small enough for every run of the tests."""

SHOWN_BY = {
    "send_again": "one to another, lost and repeated",
    "act_before_ack": "an entry that is used again",
    "take_once": "an entry that is used again",
    "number_requests": "handed on, and a death",
    "delete_after_answer": "handed on, and a death",
    "delete_what_is_not_counted": "the owner gives to one who dies",
    "pin_until_confirmed": "two by the same way",
    "pin_until_acknowledged": "an entry that is used again",
    "register_before_send": "an entry that is used again",
    "mark_as_decided": "the owner gives to one who dies",
    "generation": "one who is cut off",
    "look_before_reading": "one who is cut off",
    "nothing_for_the_dead": "the owner gives to one who dies",
    "everybody_drains_first": "handed on, and a death",
    "children_until_removed": "a chain whose middle dies",
    "answer_when_accepted": "handed on, and a death",
    "closed_links": "back to the owner",
    "forks_go_with_holders": "the owner gives to one who dies",
    "owners_death_frees": "handed on, and a death",
}
"""For each rule a scenario that ends badly without it."""


class ForgetfulOwnerForks(OwnerForks):
    """Does not know a request that comes again once its fork is gone."""

    def requested(self, entry: tuple[int, int], fork: int, holder: int, number: int, alive: bool) -> list:
        self._met.pop(holder, None)
        return super().requested(entry, fork, holder, number, alive)


class HastyUserForks(UserForks):
    """Deletes what it has asked for without waiting for the answer."""

    def let_go(self, owner: int, entry: tuple[int, int]) -> list:
        asked = tuple(fork for fork, its in self._requested.items() if (its.owner, its.entry) == (owner, entry))
        commands: list = [Delete(owner, entry, asked)] if asked else []
        for fork in asked:
            commands += super().accepted(fork, True)
        return commands + super().let_go(owner, entry)


class ForksModel:
    """One scenario under the rules, or under all but some.

    Parameters
    ----------
    scenario : who takes part and how often each thing may happen
    without : names of the rules to leave out
    """

    def __init__(self, scenario: Scenario, without: frozenset[str] | tuple[str, ...] = ()) -> None:
        unknown = set(without) - set(RULES)
        if unknown:
            raise ValueError(f"no such rule: {', '.join(sorted(unknown))}")
        self.scenario = scenario
        self.entries = scenario.entries
        self.everybody = (OWNER, *scenario.users)
        self._rules = frozenset(RULES) - frozenset(without)
        self._limit = {what: index for index, what in enumerate(scenario.limits)}

    # What the steps ask of the model.

    def on(self, rule: str) -> bool:
        """Return whether a rule is in force."""
        return rule in self._rules

    def entry(self, e: int, s: int) -> tuple[int, int]:
        """Return what the rules call an object: index and generation."""
        return e, s if self.on("generation") else 0

    def truth(self, w: ForksWorld, p: int, entry: tuple[int, int]) -> tuple[int, int]:
        """Return which object a process means by a name."""
        return entry[0], w.held[w.cell(p, entry[0])]

    def is_open(self, w: ForksWorld, e: int, s: int) -> bool:
        """Return whether the owner finds an object under its name."""
        return w.used[e] and self.entry(e, w.serial[e]) == self.entry(e, s)

    def may(self, w: ForksWorld, what: Hashable) -> bool:
        """Return whether something may happen once more."""
        index = self._limit.get(what)
        return index is not None and w.budget[index] > 0

    def spend(self, w: ForksWorld, what: Hashable) -> None:
        """Count one more time that something has happened."""
        w.budget[self._limit[what]] -= 1

    # What a search asks of the model.

    def initial(self) -> Hashable:
        """Return the state everything starts from."""
        people = len(NAMES)
        owner = freeze((OwnerForks if self.on("number_requests") else ForgetfulOwnerForks)())
        users = [freeze((UserForks if self.on("delete_after_answer") else HastyUserForks)())] * people
        handles, held, marked = [0] * (people * self.entries), [0] * (people * self.entries), [False] * self.entries
        for p in self.scenario.holders:
            handles[p * self.entries] = held[p * self.entries] = 1
            if p != OWNER:
                owner, _ = perform(owner, "made", self.entry(0, 1), p, p)
                users[p], _ = perform(users[p], "granted", OWNER, self.entry(0, 1), p)
                marked[0] = True
        state = {
            "serial": [1] + [0] * (self.entries - 1), "used": [True] + [False] * (self.entries - 1), "marked": marked,
            "owner_forks": [owner], "marks": [(), ()], "handles": handles, "held": held,
            "pins": [frozenset()] * people, "gone": [frozenset()] * people, "user_forks": users,
            "removal": [freeze(Removal(p, set(self.everybody))) for p in range(people)],
            "seen": [()] * people, "sent": [()] * people, "minted": [10] * people, "network": [frozenset()],
            "life": [LIVE] * people, "noticed": [0] * people, "drained": [0] * people,
            "budget": list(self.scenario.limits.values()), "broken": [""],
        }  # fmt: skip
        return tuple(tuple(state[name]) for name in ForksWorld.FIELDS)

    def enabled(self, state: tuple) -> Iterator[Action]:
        """Yield what may happen next."""
        w = ForksWorld(state)
        yield from forks_steps.network(self, w)
        for p in self.everybody:
            if w.life[p] != DEAD:
                yield from forks_steps.programs(self, w, p)
                yield from forks_steps.deaths(self, w, p)

    def apply(self, state: tuple, action: Action) -> Hashable:
        """Return the state after an enabled action."""
        w = ForksWorld(state)
        forks_steps.VERBS[action[0]](self, w, *action[1:])
        return w.freeze()

    def outside(self, action: Action) -> bool:
        """Return whether an action is fate's, so that nobody may wait for it."""
        return action[0] in ("kill", "cut", "lose", "repeat")

    def violation(self, state: tuple) -> str | None:
        """Return the safety promise that this state breaks, or None."""
        w = ForksWorld(state)
        if w.broken[0]:
            return w.broken[0]
        if w.life[OWNER] != LIVE:
            return None
        for p in self.scenario.users:
            for e in range(self.entries):
                if w.life[p] == LIVE and w.count(p, e) and not w.there(e, w.held[w.cell(p, e)]):
                    return f"the object of entry {e} was destroyed while {NAMES[p]} holds it"
                if self._reads_another(w, p, e):
                    return f"{NAMES[p]} reads another object in entry {e}"
        for message in w.network[0]:
            if message.kind == "ref" and self._carries(w, message) and not w.there(*message.body[:2]):
                return f"the object of entry {message.body[0]} was destroyed while a message carries it"
        return None

    def unfinished(self, state: tuple) -> str | None:
        """Return what is left over when nothing more can happen, or None."""
        w = ForksWorld(state)
        if w.life[OWNER] != DEAD:
            if any(w.used) or any(w.marked) or perform(w.owner_forks[0], "total")[1]:
                return "nothing more can happen, and the owner keeps what nobody has"
            if perform(w.owner_forks[0], "unmet")[1]:
                return "nothing more can happen, and the owner waits for requests that were never sent"
        for p in self.everybody:
            if w.life[p] == DEAD:
                continue
            if w.pins[p] or perform(w.user_forks[p], "waiting")[1]:
                return f"{NAMES[p]} keeps a pin or waits for an answer for ever"
            if perform(w.removal[p], "open_cases")[1]:
                return f"{NAMES[p]} never removes who has died"
        return None

    def _reads_another(self, w: ForksWorld, p: int, e: int) -> bool:
        cell = w.cell(p, e)
        if w.life[p] == DEAD or not w.handles[cell] or w.takes_for_dead(p, OWNER) or not w.used[e]:
            return False
        found, meant = self.entry(e, w.serial[e]), self.entry(e, w.held[cell])
        return w.serial[e] != w.held[cell] and (found == meant or not self.on("look_before_reading"))

    def _carries(self, w: ForksWorld, message: Message) -> bool:
        """Whether a message has yet to be taken by somebody who lives, and will be if it comes."""
        if w.life[message.target] != LIVE or not w.reads(message.target, message.source):
            return False
        seen = dict(w.seen[message.target]).get(message.source) or freeze(SeenNumbers())
        return bool(perform(seen, "first", message.body[3])[1])


_PHRASES = {
    "drop": "{0:name} drops a handle on entry {1}",
    "send": "{0:name} sends a reference to entry {2} to {1:name}",
    "tell": "{0:name} tells that it has nothing of entry {1} left",
    "mark": "the owner performs what it has decided about marks",
    "destroy": "the owner destroys the object of entry {0}",
    "open": "the owner makes another object in entry {0}",
    "notice": "{0:name} notices that {1:name} is dead",
    "drained": "{0:name} has taken all that {1:name} sent",
    "kill": "{0:name} is killed **",
    "cut": "{0:name} is cut off **",
    "deliver": "arrives: {0}",
    "repeat": "arrives, and will again: {0} **",
    "ack": "is acknowledged: {0}",
    "lose": "is lost: {0} **",
    "resend": "is sent again: {0}",
}


class _Word:
    """An argument of an action, printable as a process's name, a message or itself."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __format__(self, spec: str) -> str:
        if isinstance(self._value, Message):
            source, target, kind, body, _ = self._value
            return f"{NAMES[source]}'s {kind} to {NAMES[target]} {body}"
        return NAMES[self._value] if spec == "name" else str(self._value)


def describe(action: Action, state: tuple) -> str:
    """Return a line that says what was done and how the owner's entries are after it."""
    verb, *rest = action
    w = ForksWorld(state)
    table = "  ".join(
        f"[{e}] object {w.serial[e]} {'there' if w.used[e] else 'gone'}{', marked' if w.marked[e] else ''}"
        for e in range(len(w.serial))
    )
    return f"{_PHRASES[verb].format(*map(_Word, rest)):<72} {table}"


def build(name: str, without: tuple[str, ...] = ()) -> ForksModel:
    """Return the model of a named scenario."""
    return ForksModel(SCENARIOS[name], without)
