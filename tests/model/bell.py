"""The doorbell and the drain token as a model: no message stays in a ring while somebody could take it out.

Producers publish and ring; one process serves with two threads, of which
the one that holds the drain token (the leader) takes messages out and runs
user code for each, and the other (the follower) sleeps until it is woken.
User code may never return, and a producer may be killed between any two
steps. The holder of the token may make another ring the favourite, whose
bit stays set, or none; others may see half of the change. With `tso` every
plain store goes through its thread's store buffer, as on x86, so that a
fence left out shows; atomic read-modify-writes are fences there, so the
fences next to them are not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.model.bell_state import FOLLOWER, LEADER, NOBODY, SERVERS, Draft

__all__ = ["RULES", "SCENARIOS", "SHOWN_BY", "BellModel", "build", "describe"]

Action = tuple

RULES = {
    "tail_before_ready": "a producer publishes its tail before it sets its bit in `ready`",
    "fence_after_tail": "there is a fence between the tail and the look at `ready`",
    "armed_after_ready": "a producer looks at `armed` after its bit is set",
    "bump": "who wakes a sleeper changes its futex word first",
    "take_by_exchange": "the consumer takes `ready` by one exchange",
    "not_emptied": "the bit of a ring that was not emptied is set again",
    "put_back": "bits taken but not looked at are set again before user code runs",
    "pass_token": "the token is passed on before user code runs",
    "fence_after_pass": "there is a fence between passing the token and the look at `watcher`",
    "arm_follower": "who passes the token arms the bell for a follower if none watches",
    "arm_by_cas": "he arms it only if nobody is armed: the next leader may be asleep already",
    "look_after_arming": "he looks at `ready` again afterwards, and wakes the follower himself",
    "word_before_arming": "a leader reads its futex word before it arms the bell",
    "fence_before_sleep": "there is a fence between arming the bell for the leader and its last look at `ready`",
    "look_before_sleep": "a leader looks at `ready` again between arming the bell and going to sleep",
    "fence_after_watch": "there is a fence between the end of a watch and the look at the token",
    "look_after_watch": "who ends his watch looks at the token once more",
    "arm_in_place": "if it is free he arms the bell in the leader's place, who saw him watch and did not",
    "look_after_arming_in_place": "he looks at `ready` again afterwards",
    "favourite_tail": "who looks for work looks at the favourite's tail too",
    "favourite_bit": "who looks for work leaves the favourite's bit out, which stays set",
    "favourite_by_holder": "only the holder of the token makes another ring the favourite",
    "ready_at_death": "after a producer's death its ring is looked at whether its bit is set or not",
    "wake_sleepers_at_death": "after a producer's death all sleepers are woken: it may have disarmed the bell only",
}
"""Each rule that can be left out, and what it says."""

SCENARIOS = {
    "one producer": {"messages": (3,)},
    "two producers": {"messages": (1, 1)},
    "a producer dies": {"messages": (1, 1), "kills": 1},
    "a favourite": {"messages": (2,), "changes": 1},
    "a favourite of two": {"messages": (1, 1), "changes": 1},
    "delayed stores": {"messages": (3,), "tso": True},
    "delayed stores, two producers": {"messages": (1, 1), "tso": True},
    "delayed stores, a favourite": {"messages": (2,), "changes": 1, "tso": True},
}
"""Arguments of `BellModel`, by name."""

SHOWN_BY = {
    **{rule: "delayed stores" if rule.startswith("fence") else "one producer" for rule in RULES},
    "take_by_exchange": "two producers",
    **dict.fromkeys(("favourite_tail", "favourite_bit", "favourite_by_holder"), "a favourite"),
    **dict.fromkeys(("ready_at_death", "wake_sleepers_at_death"), "a producer dies"),
}
"""For each rule a scenario that ends badly without it."""

NAMES = ("one", "two", "ann", "ben", "cay")


class BellModel:
    """The bell under the rules, or under all but some.

    Parameters
    ----------
    without : names of the rules to leave out
    messages : how many each producer sends
    kills : producers that may die
    changes : how often another ring may become the favourite, or none; it is the first one's at the start, unless 0
    tso : whether plain stores are delayed
    """

    def __init__(
        self,
        without: tuple[str, ...] = (),
        messages: tuple[int, ...] = (1, 1),
        kills: int = 0,
        changes: int = 0,
        tso: bool = False,
    ) -> None:
        unknown = set(without) - set(RULES)
        if unknown:
            raise ValueError(f"no such rule: {', '.join(sorted(unknown))}")
        self._without, self._tso, self._messages, self._kills = frozenset(without), tso, messages, kills
        self._changes = changes

    def initial(self) -> tuple:
        """Return the state everything starts from: one thread leads, the other follows."""
        memory = {"ready": 0, "armed": NOBODY, "token": 1, "watcher": 0}
        memory.update(dict.fromkeys(("kept", "watched"), int(self._changes > 0)))
        memory.update({f"tail {ring}": 0 for ring in range(len(self._messages))})
        threads = [("take", 0, 0, ()), ("follow", 0, 0, ()), *[("publish", 0, 0, ())] * len(self._messages)]
        taken = (0,) * len(self._messages)
        return tuple(memory.items()), tuple(threads), taken, tuple(self._messages), self._kills, self._changes

    def outside(self, action: Action) -> bool:
        """Return whether an action is fate's: a death, user code that returns, another favourite."""
        return action[1] in ("kill", "user code") or action[1] in _PREFER

    def enabled(self, state: tuple) -> Iterator[Action]:
        """Yield (thread, step) for everything that may happen next."""
        _, threads, _, left, kills, changes = state
        for who, (step, _, _, buffer) in enumerate(threads):
            if buffer:
                yield who, "store arrives"
            if step == "publish" and not left[who - SERVERS] or step in _ASLEEP:
                continue
            if not (buffer and step in self._flushing()):
                yield who, step
            if who >= SERVERS and kills and step != "notice":
                yield who, "kill"
            if changes and self._may_prefer(step):
                yield from ((who, verb) for verb in _PREFER[: len(self._messages) + 1])

    def apply(self, state: tuple, action: Action) -> tuple:
        """Return the state after an enabled action."""
        who, verb = action
        d = Draft(state, who, self._tso)
        _STEPS[verb](self, d, who)
        return d.freeze()

    def violation(self, state: tuple) -> str | None:
        """Return the safety promise that this state breaks, or None."""
        leaders = sum(step in _LEADING for step, *_ in state[1][:SERVERS])
        return "two threads read the rings" if leaders > 1 else None

    def unfinished(self, state: tuple) -> str | None:
        """Return what is left over when nothing more happens by itself, or None."""
        memory, threads, taken, *_ = state
        if all(step == "user code" for step, *_ in threads[:SERVERS]):
            return None  # who could take a message out is the program's to say
        for ring, count in enumerate(taken):
            if dict(memory)[f"tail {ring}"] > count:
                return f"a message of {NAMES[SERVERS + ring]} stays in its ring, and a thread sleeps"
        return None

    def _on(self, rule: str) -> bool:
        return rule not in self._without

    def _flushing(self) -> frozenset[str]:
        """Return the steps that wait for the store buffer: atomics, and loads behind a fence."""
        behind = {
            "fence_after_tail": "look at ready",
            "fence_after_pass": "look at watcher",
            "fence_before_sleep": "look before sleep",
            "fence_after_watch": "look after watch",
        }
        return _ATOMIC | {step for rule, step in behind.items() if self._on(rule)}

    def _may_prefer(self, step: str) -> bool:
        return step in _BETWEEN or step == "user code" and not self._on("favourite_by_holder")

    def _prefer(self, d: Draft, who: int, ring: int) -> None:
        """Make a ring (0: none, 1: the first) the favourite: its bit is left alone, its tail looked at."""
        d.changes -= 1
        d.store("kept", 1 << ring >> 1)
        d.store("watched", ring)

    def _other_bits(self, d: Draft) -> int:
        """Return the bits of all rings but the favourite."""
        return d.load("ready") & ~(d.load("kept") if self._on("favourite_bit") else 0)

    def _favourite(self, d: Draft) -> int:
        """Return the bit of the favourite if there is something in it."""
        ring = d.load("watched") - 1
        return 1 << ring if ring >= 0 and d.load(f"tail {ring}") != d.taken[ring] else 0

    def _look_for_work(self, d: Draft, found: str, nothing: str) -> None:
        """Look at `ready`, and in a step of its own at the favourite, which may have become another one meanwhile."""
        first = not d.step.endswith(_FAVOURITE)
        if self._other_bits(d) if first else self._favourite(d):
            d.step = found
        elif first and self._changes and self._on("favourite_tail"):
            d.step += _FAVOURITE
        else:
            d.step = nothing

    # A producer.

    def _publish(self, d: Draft, who: int) -> None:
        ring = who - SERVERS
        d.left[ring] -= 1
        if self._on("tail_before_ready"):
            d.store(f"tail {ring}", self._messages[ring] - d.left[ring])
            d.step = "look at ready" if self._on("armed_after_ready") else "look at armed"
        else:
            d.step = "look at ready"

    def _look_at_ready(self, d: Draft, who: int) -> None:
        d.step = self._after_ready(d) if d.load("ready") >> (who - SERVERS) & 1 else "set ready"

    def _after_ready(self, d: Draft) -> str:
        if not self._on("tail_before_ready"):
            return "late tail"
        return "look at armed" if self._on("armed_after_ready") else "publish"

    def _set_ready(self, d: Draft, who: int) -> None:
        d.set_bits(1 << who - SERVERS)
        d.step = self._after_ready(d)

    def _late_tail(self, d: Draft, who: int) -> None:
        d.store(f"tail {who - SERVERS}", self._messages[who - SERVERS] - d.left[who - SERVERS])
        d.step = "look at armed"

    def _look_at_armed(self, d: Draft, who: int) -> None:
        d.step = "ring" if d.load("armed") else self._rung(who)

    def _rung(self, who: int) -> str:
        if who < SERVERS:
            return "user code"
        return "publish" if self._on("armed_after_ready") else "look at ready"

    def _ring(self, d: Draft, who: int) -> None:
        role = d.exchange("armed", NOBODY)
        d.step = self._rung(who) if role == NOBODY else f"bump {role}"

    def _bump(self, d: Draft, who: int, role: int) -> None:
        if self._on("bump"):
            d.bump(role)
        d.step = f"wake {role}"

    def _wake(self, d: Draft, who: int, role: int) -> None:
        d.wake(role)
        d.step = self._rung(who)

    def _kill(self, d: Draft, who: int) -> None:
        d.kills -= 1
        d.left[who - SERVERS] = 0
        while d.buffer:  # what was stored is stored: the buffer is the processor's
            d.drain_store()
        d.step = "notice"

    def _notice(self, d: Draft, who: int) -> None:
        """The serving process learns of the death: it rings for the dead, and wakes whoever might be asleep."""
        if self._on("ready_at_death"):
            d.set_bits(1 << who - SERVERS)
        armed = d.exchange("armed", NOBODY)
        for role in (LEADER, FOLLOWER):
            if armed == role or self._on("wake_sleepers_at_death"):
                d.bump(role)
                d.wake(role)
        d.step = "publish"

    # The leader.

    def _take(self, d: Draft, who: int) -> None:
        if not self._other_bits(d):
            self._after_taking(d)
        elif self._on("take_by_exchange"):
            d.step = "exchange"
        else:
            d.bits, d.step = self._other_bits(d), "store zero"

    def _exchange(self, d: Draft, who: int) -> None:
        d.bits = d.leave_bits(d.load("kept"))
        self._after_taking(d)

    def _store_zero(self, d: Draft, who: int) -> None:
        d.leave_bits(d.load("kept"))
        self._after_taking(d)

    def _after_taking(self, d: Draft) -> None:
        if self._changes:
            d.step = "look at favourite"
        else:
            self._drain_or_sleep(d)

    def _look_at_favourite(self, d: Draft, who: int) -> None:
        d.bits |= self._favourite(d)
        self._drain_or_sleep(d)

    def _drain_or_sleep(self, d: Draft) -> None:
        if d.bits:
            d.step = "drain"
        else:
            d.step = "read word" if self._on("word_before_arming") else "arm leader"

    def _drain(self, d: Draft, who: int) -> None:
        ring = (d.bits & -d.bits).bit_length() - 1
        waiting = d.load(f"tail {ring}") - d.taken[ring]
        if waiting:
            d.taken[ring] += 1
        if waiting <= 1 or not self._on("not_emptied"):
            d.bits &= ~(1 << ring)
        if waiting:
            d.step = "put back" if d.bits else self._before_user_code()
        elif not d.bits:
            d.step = "take"

    def _before_user_code(self) -> str:
        return "pass token" if self._on("pass_token") else "user code"

    def _put_back(self, d: Draft, who: int) -> None:
        if self._on("put_back"):
            d.set_bits(d.bits)
        d.bits, d.step = 0, self._before_user_code()

    def _pass_token(self, d: Draft, who: int) -> None:
        d.store("token", 0)
        d.step = "look at watcher" if self._on("arm_follower") else "user code"

    def _look_at_watcher(self, d: Draft, who: int) -> None:
        d.step = "user code" if d.load("watcher") else "arm follower"

    def _arm_follower(self, d: Draft, who: int) -> None:
        if self._on("arm_by_cas"):
            d.swap("armed", NOBODY, FOLLOWER)
        else:
            d.exchange("armed", FOLLOWER)
        d.step = "look after arming" if self._on("look_after_arming") else "user code"

    def _look_after_arming(self, d: Draft, who: int) -> None:
        self._look_for_work(d, "look at armed", "user code")

    def _user_code(self, d: Draft, who: int) -> None:
        if not self._on("pass_token"):
            d.step = "take"
        else:
            d.step = "disarm follower" if d.swap("token", 0, 1) else "follow"

    def _disarm_follower(self, d: Draft, who: int) -> None:
        d.swap("armed", FOLLOWER, NOBODY)
        d.step = "take"

    def _read_word(self, d: Draft, who: int) -> None:
        d.step = "arm leader" if self._on("word_before_arming") else "leader sleeps"

    def _arm_leader(self, d: Draft, who: int) -> None:
        d.store("armed", LEADER)
        d.step = "look before sleep" if self._on("look_before_sleep") else "leader sleeps"

    def _look_before_sleep(self, d: Draft, who: int) -> None:
        self._look_for_work(d, "disarm", "leader sleeps" if self._on("word_before_arming") else "read word")
        if d.step == "disarm":
            d.stale = 0

    def _leader_sleeps(self, d: Draft, who: int) -> None:
        d.step, d.stale = "disarm" if d.stale else "leader asleep", 0

    def _disarm(self, d: Draft, who: int) -> None:
        d.swap("armed", LEADER, NOBODY)
        d.step = "take"

    # The follower.

    def _follow(self, d: Draft, who: int) -> None:
        d.step = "is there a leader"

    def _is_there_a_leader(self, d: Draft, who: int) -> None:
        d.step = "follower sleeps" if d.load("token") else "is a follower armed"

    def _is_a_follower_armed(self, d: Draft, who: int) -> None:
        if d.load("armed") == FOLLOWER:
            d.step = "follower sleeps"
        else:
            d.step, d.stale = "watch", 0

    def _follower_sleeps(self, d: Draft, who: int) -> None:
        d.step, d.stale = "watch" if d.stale else "follower asleep", 0

    def _watch(self, d: Draft, who: int) -> None:
        d.step = "is there work" if d.swap("watcher", 0, 1) else "follow"

    def _is_there_work(self, d: Draft, who: int) -> None:
        self._look_for_work(d, "is the token free", "end watch")

    def _is_the_token_free(self, d: Draft, who: int) -> None:
        d.step = "end watch" if d.load("token") else "take over"

    def _take_over(self, d: Draft, who: int) -> None:
        d.step = "lead on" if d.swap("token", 0, 1) else "end watch"

    def _lead_on(self, d: Draft, who: int) -> None:
        d.store("watcher", 0)
        d.step = "take"

    def _end_watch(self, d: Draft, who: int) -> None:
        d.store("watcher", 0)
        d.step = "look after watch" if self._on("look_after_watch") else "follower must sleep"

    def _look_after_watch(self, d: Draft, who: int) -> None:
        if d.load("token"):
            d.step = "follow"
        else:
            d.step = "arm in place" if self._on("arm_in_place") else "look in place"

    def _arm_in_place(self, d: Draft, who: int) -> None:
        d.swap("armed", NOBODY, FOLLOWER)
        d.step = "look in place" if self._on("look_after_arming_in_place") else "follow"

    def _look_in_place(self, d: Draft, who: int) -> None:
        self._look_for_work(d, "take over in place", "follow" if self._on("arm_in_place") else "follower must sleep")

    def _follower_must_sleep(self, d: Draft, who: int) -> None:
        d.step = "follower sleeps"

    def _take_over_in_place(self, d: Draft, who: int) -> None:
        d.step = "disarm follower" if d.swap("token", 0, 1) else "follow"

    def _store_arrives(self, d: Draft, who: int) -> None:
        d.drain_store()


_ASLEEP = frozenset(("leader asleep", "follower asleep"))
_LEADING = frozenset(("exchange", "store zero", "look at favourite", "drain", "put back", "pass token"))
_BETWEEN = frozenset(("take", "pass token"))  # before the other steps of a holder it would make no difference
_FAVOURITE = ", favourite"
_PREFER = ("prefer none", *(f"prefer {name}" for name in NAMES[SERVERS:]))
_ATOMIC = frozenset(
    (
        "set ready", "ring", "bump 1", "bump 2", "wake 1", "wake 2", "exchange", "store zero", "put back",
        "arm follower", "user code", "disarm follower", "leader sleeps", "disarm", "follower sleeps", "watch",
        "take over", "arm in place", "take over in place",
    )
)  # fmt: skip
_STEPS = {
    "publish": BellModel._publish,
    "look at ready": BellModel._look_at_ready,
    "set ready": BellModel._set_ready,
    "late tail": BellModel._late_tail,
    "look at armed": BellModel._look_at_armed,
    "ring": BellModel._ring,
    "kill": BellModel._kill,
    "notice": BellModel._notice,
    "take": BellModel._take,
    "exchange": BellModel._exchange,
    "store zero": BellModel._store_zero,
    "look at favourite": BellModel._look_at_favourite,
    "drain": BellModel._drain,
    "put back": BellModel._put_back,
    "pass token": BellModel._pass_token,
    "look at watcher": BellModel._look_at_watcher,
    "arm follower": BellModel._arm_follower,
    "look after arming": BellModel._look_after_arming,
    "user code": BellModel._user_code,
    "disarm follower": BellModel._disarm_follower,
    "read word": BellModel._read_word,
    "arm leader": BellModel._arm_leader,
    "look before sleep": BellModel._look_before_sleep,
    "leader sleeps": BellModel._leader_sleeps,
    "disarm": BellModel._disarm,
    "follow": BellModel._follow,
    "is there a leader": BellModel._is_there_a_leader,
    "is a follower armed": BellModel._is_a_follower_armed,
    "follower sleeps": BellModel._follower_sleeps,
    "watch": BellModel._watch,
    "is there work": BellModel._is_there_work,
    "is the token free": BellModel._is_the_token_free,
    "take over": BellModel._take_over,
    "lead on": BellModel._lead_on,
    "end watch": BellModel._end_watch,
    "look after watch": BellModel._look_after_watch,
    "arm in place": BellModel._arm_in_place,
    "look in place": BellModel._look_in_place,
    "follower must sleep": BellModel._follower_must_sleep,
    "take over in place": BellModel._take_over_in_place,
    "store arrives": BellModel._store_arrives,
    "look after arming, favourite": BellModel._look_after_arming,
    "look before sleep, favourite": BellModel._look_before_sleep,
    "is there work, favourite": BellModel._is_there_work,
    "look in place, favourite": BellModel._look_in_place,
    **{verb: partial(BellModel._prefer, ring=ring) for ring, verb in enumerate(_PREFER)},
    **{f"bump {role}": partial(BellModel._bump, role=role) for role in (LEADER, FOLLOWER)},
    **{f"wake {role}": partial(BellModel._wake, role=role) for role in (LEADER, FOLLOWER)},
}


def describe(action: Action, state: tuple) -> str:
    """Return a line that says what was done and what the bell looks like after it."""
    who, verb = action
    memory = "  ".join(f"{name} {value}" for name, value in state[0])
    return f"{NAMES[who]} {verb:<26} {memory}  taken {state[2]}"


def build(name: str, without: tuple[str, ...] = ()) -> BellModel:
    """Return the model of a named scenario."""
    return BellModel(without, **SCENARIOS[name])
