"""Publication as a model: who reads a value without its owner reads one whole version of it, and none that is too old.

An owner has a value of two words, which its program changes one by one. It publishes a copy when somebody asks for the
value (and withdraws it before its own code reaches the value), or when the program says so. Copies lie in blocks, each
with an entry of its own, or in the descriptor. Readers read the descriptor, take the block's entry, and read the block:
each step is one instruction on shared memory, and a reader or the owner may be killed between any two.

What a descriptor says besides form, place and entry (size, flags) is written and read between the same two versions as
these, and left out. A block and its entry have the same number. Not modelled: weak memory order (`tests/c/publish.c`
runs the shipped code on real processors), dirty flags and credits (see `references`), readers whom all others take for
dead, and the value's own entry, which both who reads and who publishes hold meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import publication_owner as owner
from tests.model import publication_reader as reader
from tests.model.publication_world import ASK, CLOSED, NAMES, NONE, OTHER, PROGRAM, READERS, SERVER, World

__all__ = ["QUICK", "RULES", "SCENARIOS", "SHOWN_BY", "PublicationModel", "build", "describe"]

Action = tuple

RULES = {
    "withdraw_first": "a copy is withdrawn before code of the owner reaches the value",
    "one_hold_to_withdraw": "a value counts as exposed, for whoever goes on to it then, only with its copy withdrawn",
    "expose_unpublished": "a value is exposed also while no copy is shown: one may be being made",
    "look_after_copy": "a copy is shown only if the value was not exposed while it was made",
    "one_hold_to_show": "looking whether it was, and showing, are one hold of the interpreter lock",
    "latest_stays": "what `publish` copied is not shown any more when a later `publish` has shown its copy",
    "odd_before_words": "the version is odd before the first word of a descriptor changes",
    "even_after_words": "the version is even again only after the last word",
    "not_while_odd": "who finds the version odd does not read the words",
    "version_again": "who has read the words looks at the version again",
    "ask_at_last": "who finds the version odd for long asks the owner: it may be dead, or stopped",
    "hold_while_reading": "who reads a block holds its entry",
    "generation_after_taking": "he looks at its generation after he has set his bit",
    "closed_is_late": "who finds the entry closed when he sets his bit is too late",
    "next_generation": "a closed entry gets its next generation before its block is used again",
    "late_leave": "who is too late takes his bit back",
    "last_thread_releases": "the threads of a process share one count: the bit goes with the last",
    "give_back_after_showing": "a block is given back only when the next one is shown",
    "unshown_given_back": "a copy that is not shown is given back",
    "copy_goes_with_value": "the copy is given back when the value goes",
    "dead_readers_removed": "the bits of dead readers are cleared",
}
"""Each rule that can be left out, and what it says."""

SCENARIOS = {
    "published when asked for": {"changes": (2,), "reads": (2,), "others": 1},
    "published when asked for, two read": {"changes": (1,), "reads": (2, 1), "blocks": 1},
    "asked for, a death": {"changes": (1,), "reads": (1, 1), "blocks": 1, "kills": 1},
    "asked for, small": {"changes": (1,), "reads": (2, 1), "inline": (0,), "kills": 1},
    "two threads of the owner": {"changes": (1, 1), "reads": (2,), "at_once": True},
    "published by hand": {"changes": (3,), "reads": (2,), "by_hand": True},
    "by hand, and blocks used again": {"changes": (2,), "reads": (2,), "by_hand": True, "others": 2},
    "by hand, small and large": {"changes": (3,), "reads": (2,), "by_hand": True, "inline": (1, 3), "kills": 1},
    "by hand, all small": {"changes": (3,), "reads": (2,), "by_hand": True, "inline": (1, 2, 3)},
    "by hand, two readers": {"changes": (2,), "reads": (1, 1), "by_hand": True},
    "by hand, two threads read": {"changes": (1,), "reads": (1, 1), "by_hand": True, "together": True, "others": 1},
    "by hand, two threads read two versions": {"changes": (2,), "reads": (1, 1), "by_hand": True, "together": True},
    "by hand, a death": {"changes": (2,), "reads": (1, 1), "by_hand": True, "kills": 1},
    "by hand, two deaths": {"changes": (2,), "reads": (1, 1), "by_hand": True, "kills": 2, "blocks": 3},
    "by hand, two publish": {"changes": (1, 1), "reads": (2,), "by_hand": True, "at_once": True, "blocks": 3},
    "asked for, threads and another process": {
        "changes": (1,), "reads": (1, 1, 1), "together": True, "blocks": 1,
    },
}  # fmt: skip
"""Arguments of `PublicationModel`, by name."""

_LARGE = (
    "published when asked for", "by hand, and blocks used again", "by hand, two threads read",
    "by hand, two readers", "by hand, two threads read two versions", "by hand, a death", "by hand, two deaths",
    "asked for, threads and another process",
)  # fmt: skip

QUICK = tuple(name for name in SCENARIOS if name not in _LARGE)
"""Scenarios small enough for every run of the tests."""

SHOWN_BY = {
    **dict.fromkeys(RULES, "published by hand"),
    **dict.fromkeys(
        ("withdraw_first", "expose_unpublished", "look_after_copy", "one_hold_to_show", "unshown_given_back"),
        "published when asked for",
    ),
    "one_hold_to_withdraw": "two threads of the owner",
    "latest_stays": "by hand, two publish",
    "ask_at_last": "by hand, small and large",
    "dead_readers_removed": "asked for, a death",
    "last_thread_releases": "by hand, two threads read",
    "closed_is_late": "by hand, and blocks used again",
    "hold_while_reading": "by hand, and blocks used again",
    "generation_after_taking": "by hand, and blocks used again",
    "next_generation": "by hand, and blocks used again",
}
"""For each rule a scenario that ends badly without it."""


class PublicationModel:
    """One scenario under the rules, or under all but some.

    Parameters
    ----------
    without : names of the rules to leave out
    changes : how many each thread of the program makes
    reads : how many each reader makes
    by_hand : each change is published by the program; else copies are made when somebody asks
    at_once : a change, and the encoding of the value, is one step, so that two threads may change it
    inline : versions small enough for the descriptor
    together : the first two readers are threads of one process
    blocks : in the owner's arena
    others : how often a block may be used for something else
    kills : processes that may die
    """

    def __init__(
        self,
        without: tuple[str, ...] = (),
        changes: tuple[int, ...] = (1,),
        reads: tuple[int, ...] = (1,),
        by_hand: bool = False,
        at_once: bool = False,
        inline: tuple[int, ...] = (),
        together: bool = False,
        blocks: int = 2,
        others: int = 0,
        kills: int = 0,
    ) -> None:
        unknown = set(without) - set(RULES)
        if unknown:
            raise ValueError(f"no such rule: {', '.join(sorted(unknown))}")
        self._without = frozenset(without)
        self.by_hand, self.at_once, self.inline = by_hand, at_once, inline
        self._changes, self._reads, self._together = changes, reads, together
        self._blocks, self._others, self._kills = blocks, others, kills

    def on(self, rule: str) -> bool:
        """Return whether a rule is in force."""
        return rule not in self._without

    def process(self, thread: int) -> int:
        """Return the process of a thread: 0 is the owner, readers follow."""
        if thread < READERS:
            return 0
        return thread - READERS + 1 - (self._together and thread > READERS)

    def initial(self) -> tuple:
        """Return the state everything starts from: nothing is published."""
        threads = READERS + len(self._reads)
        processes = self.process(threads - 1)
        start = {
            "form": ASK, "words": (0, 0), "value": (0, 0), "exposed": False, "published": False, "shown": NONE,
            "phase": ("free",) * self._blocks, "generation": (0,) * self._blocks, "hold": (CLOSED,) * self._blocks,
            "content": ((OTHER, OTHER),) * self._blocks, "gil": NONE, "step": ((),) * threads,
            "left": (0, *self._changes, *(0,) * (READERS - PROGRAM - len(self._changes)), *self._reads),
            "mail": ("",) * threads, "life": ("live",) * (processes + 1), "count": (0,) * (processes * self._blocks),
            "held": (0,) * (processes * self._blocks), "lock": (NONE,) * processes,
            "kills": self._kills, "others": self._others, "gone": False,
        }  # fmt: skip
        return tuple([start.get(name, 0) for name in World.FIELDS])

    def enabled(self, state: tuple) -> Iterator[Action]:
        """Yield (thread, verb, ...) for everything that may happen next."""
        w = World(state)
        if w.life[0] == "live":
            yield from owner.threads(self, w)
            yield from owner.memory(self, w)
        yield from reader.threads(self, w)
        if w.kills:
            for p, life in enumerate(w.life):
                if life == "live" and any(w.step[t] or w.left[t] for t in self._threads(w, p)):
                    yield SERVER, "kill", p

    def apply(self, state: tuple, action: Action) -> tuple:
        """Return the state after an enabled action."""
        w = World(state)
        t, verb, *rest = action
        if verb == "kill":
            self._kill(w, *rest)
        else:
            if w.step[t] == action[1:]:
                w.go(t, ())
            _VERBS[verb](self, w, t, *rest)
        return w.freeze()

    def outside(self, action: Action) -> bool:
        """Return whether an action is fate's: a death, or a block that is used for something else."""
        return action[1] in ("kill", "lend")

    def violation(self, state: tuple) -> str | None:
        """Return the safety promise that this state breaks, or None."""
        step = state[_STEP]
        for r in range(READERS, len(step)):
            if step[r] and step[r][0] in ("have", "release"):
                least, first, second = step[r][1:4]
                if first == OTHER or second == OTHER or first == "no block":
                    return f"{NAMES[r]} reads what is no part of the value"
                if first != second:
                    return f"{NAMES[r]} reads a torn value: {first} and {second}"
                if first < least:
                    return f"{NAMES[r]} reads version {first}, and began when {least} was there"
            elif step[r] and step[r][0] in ("read a", "read b") and step[r][3] != NONE:
                w = World(state)
                block, entry = step[r][2:4]
                if w.phase[entry] != "used" or not w.hold[entry] & 1 << (self.process(r) - 1) or block != entry:
                    return f"block {block} is not held for {NAMES[r]}, who reads it"
        return None

    def unfinished(self, state: tuple) -> str | None:
        """Return what is left over when nothing more can happen, or None."""
        w = World(state)
        for r in range(READERS, len(w.step)):
            if w.step[r] and w.life[self.process(r)] == "live":
                return f"{NAMES[r]} reads for ever"
        if w.life[0] != "live":
            return None
        if any(w.step):
            return "a thread of the owner never ends"
        for b, phase in enumerate(w.phase):
            if phase != "free" or w.hold[b] != CLOSED:
                return f"block {b} is never free again"
        return None

    def _threads(self, w: World, p: int) -> list[int]:
        return [t for t in range(len(w.step)) if self.process(t) == p]

    def _kill(self, w: World, p: int) -> None:
        w.kills -= 1
        w.life[p] = "dead"
        for t in self._threads(w, p):
            w.go(t, ())
            w.left[t], w.mail[t] = 0, ""
        if p:
            cells = slice(w.cell(p - 1, 0), w.cell(p, 0))
            w.count[cells] = w.held[cells] = [0] * len(w.hold)
            w.lock[p - 1] = NONE


_STEP = World.FIELDS.index("step")
_VERBS = {**owner.VERBS, **reader.VERBS}


def describe(action: Action, state: tuple) -> str:
    """Return a line that says what was done and what memory looks like after it."""
    t, verb, *rest = action
    w = World(state)
    who = NAMES[t]
    if verb == "kill":
        who, verb, rest = ("the owner" if not rest[0] else f"reader {rest[0]}"), "is killed **", []
    shown = ", ".join([str(part) for part in rest if not isinstance(part, tuple)])
    blocks = "  ".join(
        f"[{b}] gen {w.generation[b]} {w.phase[b]:<7} {w.hold[b]:08b} {w.content[b]}" for b in range(len(w.hold))
    )
    what = f"{who} {verb} {shown}"
    return f"{what:<52} value {tuple(w.value)} v{w.version} {w.form} {tuple(w.words)}  {blocks}"


def build(name: str, without: tuple[str, ...] = ()) -> PublicationModel:
    """Return the model of a named scenario."""
    return PublicationModel(without, **SCENARIOS[name])
