"""The reference rules as a model: what may happen, what must hold, and which rule can be left out.

An owner's table (generation, phase, holder word, dirty flag) is used by
processes of the same host, each with private counts, pins and a private
lock. Messages travel through rings whose `acquired` cursor the sender can
see. A process without a bit of its own (there are more processes than
bits) goes by messages, and the owner keeps its forks in a private set
behind one bit. A step is one instruction on shared memory, and a process
may be killed between any two.

Not modelled: weak memory order, wake-ups (see `bell`), response slots,
which carry no references (see `slot`), ring capacity, the owner's death
(its table dies with it), other hosts, and peers that lie.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from tests.model import holding, messages, table
from tests.model.scenarios import QUICK, SCENARIOS, SHOWN_BY, Scenario
from tests.model.world import (
    APPLICATION,
    CLOSED,
    DEAD,
    FREE,
    LIVE,
    NAMES,
    OWNER,
    PROCESSES,
    PROGRESS,
    RETIRED,
    SWEEPER,
    THREADS,
    World,
)

__all__ = ["QUICK", "RULES", "SCENARIOS", "SHOWN_BY", "ReferenceModel", "build", "describe"]

Action = tuple

RULES = {
    "private_lock": "a process changes its count and its bit together, under one private lock",
    "dirty_after_and": "whoever left zero flags the entry after the AND, not before",
    "clear_dirty_first": "the owner takes the dirty flag before it looks at the word",
    "close_by_cas": "an entry is closed by one compare-and-swap of its word from zero to CLOSED",
    "bump_before_free": "a closed entry gets its next generation before anybody may open it",
    "reopen_by_cas": "an entry is opened by compare-and-swap from exactly CLOSED: no late visitor is inside",
    "retire_wrapped": "an entry whose generation would wrap is not used again",
    "owner_bit": "the owner's own handles and pins are a bit of the same word",
    "look_after_or": "who takes an entry with no pin behind him looks afterwards whether it is the one he came for",
    "undo_own_only": "a late visitor takes back only a bit that his own OR has set",
    "undo_flags": "a late visitor who leaves zero flags the entry",
    "sender_pin": "the sender keeps a pin until the receiver's cursor has passed the message",
    "acquire_before_cursor": "the receiver sets its bit before it moves its cursor",
    "pins_follow_receiver": "pins are listed per receiver instance, and dropped when that instance is dead",
    "create_pins": "the request of remote() carries its entry like any message, with a pin",
    "roll_back": "what was reserved for a frame is undone when the frame cannot be sent",
    "peers_drain_first": "a dead process's bits go only when its peers have acquired what it published",
    "owner_drains_too": "the owner is such a peer: it empties its own ring from the dead first",
    "ask_everybody": "every live process is waited for, also one that holds nothing",
    "sweep_all_zeros": "after a death every zero word in use is swept, whether a bit was cleared in it or not",
    "slot_after_removal": "a peer's index is given away only when its last user has been removed",
    "grant_excludes_removal": "nothing is opened or registered for a peer whose removal has begun",
    "fork_before_send": "the owner registers the fork of a process without a bit before it sends the reference",
    "child_accept": "a pin for a process without a bit stays until that process has the owner's word and confirms",
    "fork_by_fork": "the private set names forks, not processes: a delete takes out only the forks it names",
    "forks_follow_holder": "the forks of a dead process leave the set when its removal clears the entry",
    "ack_after_accept": "a process without a bit has acquired a message only when the owner has accepted its fork",
}
"""Each rule that can be left out, and what it says."""

VERBS = {**holding.VERBS, **messages.VERBS, **table.VERBS}

# What counts handles or pins waits while another thread is inside the private lock.
LOCKING = frozenset(
    ("drop", "create", "reserve", "fail", "unpin", "visit", "drain", "late", "fill", "let go", "advance")
)  # fmt: skip


class ReferenceModel:
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

    def has_bit(self, p: int) -> bool:
        """Return whether a process is named by a bit of the holder word."""
        return p not in self.scenario.abroad and (p != OWNER or self.on("owner_bit"))

    def same(self, one: int, other: int) -> bool:
        """Return whether two generations look alike in the table."""
        return (one - other) % self.scenario.wrap == 0

    def may(self, w: World, what: Hashable) -> bool:
        """Return whether something limited may happen once more."""
        index = self._limit.get(what)
        return index is not None and w.budget[index] > 0

    def spend(self, w: World, what: Hashable) -> None:
        """Count one use of something limited."""
        w.budget[self._limit[what]] -= 1

    def mint(self, w: World, p: int) -> int:
        """Return a fork id that no other fork has or will have."""
        w.minted[p] += 1
        return p * 64 + w.minted[p]

    # What the search asks of the model.

    def initial(self) -> Hashable:
        """Return the state everything starts from."""
        s, cells = self.scenario, PROCESSES * self.entries
        empty = World(tuple([()] * len(World.FIELDS)))
        empty.generation = [0] * self.entries
        empty.phase, empty.word = [FREE] * self.entries, [CLOSED] * self.entries
        empty.dirty, empty.credit = [False] * self.entries, [0] * self.entries
        empty.forks, empty.published = [()] * self.entries, [()]
        empty.ring = [()] * (PROCESSES * PROCESSES)
        empty.handles, empty.held, empty.mine = [0] * cells, [0] * cells, [()] * cells
        empty.pins, empty.asking = [()] * PROCESSES, [()] * PROCESSES
        empty.minted, empty.lock = [0] * PROCESSES, [0] * PROCESSES
        empty.step = [()] * (PROCESSES * THREADS)
        empty.life = [LIVE if p in self.everybody else 0 for p in range(PROCESSES)]
        empty.instance, empty.removal, empty.acked = [0] * PROCESSES, [""] * PROCESSES, [0] * PROCESSES
        empty.budget = list(s.limits.values())
        for p, e in s.holders:
            empty.phase[e] = 1
            empty.handles[p * self.entries + e] = 1
            empty.word[e] &= ~CLOSED
            if self.has_bit(p):
                empty.word[e] |= 1 << p
        return empty.freeze()

    def enabled(self, state: tuple) -> Iterator[Action]:
        """Yield (process, thread, verb, ...) for everything that may happen next."""
        w = World(state)
        for p in self.everybody:
            if w.life[p] != LIVE:
                continue
            for action in self._own(w, p):
                if not w.lock[p] or w.lock[p] == action[1] + 1 or action[2] not in LOCKING:
                    yield action
        yield from table.removal(self, w)
        yield from table.fate(self, w)

    def _own(self, w: World, p: int) -> Iterator[Action]:
        application, progress, sweeper = w.step[p * THREADS : (p + 1) * THREADS]
        if application:
            yield p, APPLICATION, *application
            if application[0] == "publish" and application[3][0] == "ref" and self.may(w, "fail"):
                yield p, APPLICATION, "fail", *application[1:]
        else:
            yield from messages.application(self, w, p)
            if p == OWNER:
                yield from table.application(self, w)
        if progress:
            yield p, PROGRESS, *progress
        else:
            yield from messages.progress(self, w, p)
        if sweeper:
            yield p, SWEEPER, *sweeper
        elif p == OWNER:
            yield from table.sweeper(self, w)

    def apply(self, state: tuple, action: Action) -> Hashable:
        """Return the state after an enabled action."""
        w = World(state)
        p, t, verb, *rest = action
        if w.step[p * THREADS + t] == action[2:]:
            w.go(p, t, ())
        VERBS[verb](self, w, p, t, *rest)
        return w.freeze()

    def outside(self, action: Action) -> bool:
        """Return whether an action is fate's: nobody may wait for a death or a new process."""
        return action[2] in ("kill", "start")

    def violation(self, state: tuple) -> str | None:
        """Return the safety promise that this state breaks, or None."""
        w = World(state)
        for p in self.everybody:
            if w.life[p] != LIVE:
                continue
            for e in range(self.entries):
                if not w.alive(e, w.held[p * self.entries + e]) and w.count(p, e):
                    return f"entry {e} was destroyed or reused while {NAMES[p]} holds it"
            for _, e, g, _ in w.asking[p]:
                if not w.alive(e, g):
                    return f"entry {e} was destroyed or reused while {NAMES[p]} asks for it"
            for source in self.everybody:
                for kind, e, g, *_ in w.waiting(source, p):
                    if kind in ("ref", "create", "grant") and not w.alive(e, g):
                        return f"entry {e} was destroyed or reused while a message to {NAMES[p]} carries it"
        return None

    def unfinished(self, state: tuple) -> str | None:
        """Return what is left over when nothing more can happen, or None."""
        w = World(state)
        for e in range(self.entries):
            if w.phase[e] not in (FREE, RETIRED) or w.word[e] != CLOSED or w.forks[e]:
                return f"nothing more can happen, and entry {e} is not free (holders {w.word[e] & ~CLOSED:#b})"
        for p in self.everybody:
            if w.life[p] == DEAD and w.removal[p] != "done":
                return f"{NAMES[p]} is never removed"
            if w.life[p] == LIVE and (w.pins[p] or w.asking[p] or any(w.ring[p::PROCESSES])):
                return f"{NAMES[p]} keeps a pin, a question or a message for ever"
        return None


_PHRASES = {
    "drop": "drops a handle on entry {0}",
    "create": "remote() takes credit {0}",
    "reserve": "reserves a message with entry {0} to {1:name}",
    "publish": "publishes its tail to {0:name}: {2}",
    "fail": "cannot send its message to {0:name}",
    "unpin": "drops its pin number {0}",
    "ack": "has acquired all that {0:name} published",
    "read": "reads the descriptor",
    "visit": "takes entry {0} of generation {1} without a message",
    "drain": "takes the next message of {0:name}",
    "advance": "moves its cursor past {0:name}'s message",
    "late": "takes entry {0} after its cursor has moved",
    "answer": "accepts {0:name}'s fork of entry {1}",
    "and": "AND its bit out of entry {0}",
    "flag": "flags entry {0} dirty",
    "check": "looks whether entry {0} is of generation {1}",
    "undo": "takes its bit out of entry {0} again, if it set it",
    "grant": "opens entry {0} as a credit of {1:name}",
    "fill": "fills block {0}",
    "store": "publishes block {0}",
    "let go": "lets go of block {0}",
    "withdraw": "withdraws what it published",
    "take flag": "takes the dirty flag of entry {0}",
    "recount": "looks at its own count of entry {0}",
    "close": "compare-and-swap of entry {0} from zero to CLOSED",
    "look": "looks at the word of entry {0}",
    "shut": "stores CLOSED in entry {0}",
    "examine": "looks at entry {0} before it takes the dirty flag",
    "unflag": "takes the dirty flag of entry {0}",
    "bump": "gives entry {0} its next generation",
    "free": "frees entry {0}",
    "notice": "sees that {0:name} is dead and asks everybody",
    "answered": "has every answer about {0:name}",
    "strip": "clears what {0:name} held of entry {1}",
    "kill": "is killed **",
    "start": "has a successor **",
}


class _Word:
    """An argument of an action, printable as itself or as a process's name."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __format__(self, spec: str) -> str:
        return NAMES[self._value] if spec == "name" else str(self._value)


def describe(action: Action, state: tuple) -> str:
    """Return a line that says what was done and what the table looks like after it."""
    p, _, verb, *rest = action
    w = World(state)
    table = "  ".join(
        f"[{e}] gen {w.generation[e]} {'free used closing retired'.split()[w.phase[e]]:<7}"
        f" {w.word[e] & ~CLOSED:09b}{' dirty' if w.dirty[e] else ''}"
        for e in range(len(w.word))
    )
    return f"{NAMES[p]} {_PHRASES[verb].format(*map(_Word, rest)):<60} {table}"


def build(name: str, without: tuple[str, ...] = ()) -> ReferenceModel:
    """Return the model of a named scenario."""
    return ReferenceModel(SCENARIOS[name], without)
