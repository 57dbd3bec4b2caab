"""The response slot as a model: an answer reaches the call it belongs to or nobody, and the slot comes back.

One caller with one slot calls two callees in turn, times out when it likes
and sleeps when it likes; a callee answers late or dies. The caller's store
of `sleeping` goes through a store buffer, as on x86, so that a fence left
out shows. A callee's store of `done` may arrive long after DONE, or never
when it dies; its fence before it looks at `sleeping` waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["RULES", "SCENARIOS", "SHOWN_BY", "SlotModel", "build", "describe"]

Action = tuple

FREE, PENDING, WRITING, DONE, ABANDONED = "free", "pending", "writing", "done", "abandoned"
NAMES = ("ben", "cay")

RULES = {
    "done_number": "`done` says whose answer is complete, not only that one is",
    "look_at_state": "who goes to sleep looks at the state as well: a late store of `done` may have hidden his own",
    "number": "the state word carries the call's number beside the state",
    "answer_by_cas": "a callee changes the word by compare-and-swap only",
    "claim": "a callee claims the slot (WRITING) before it writes into it",
    "answer_before_done": "the answer is written before the word says DONE",
    "abandon": "a caller that gives up while the callee writes leaves the slot ABANDONED",
    "callee_frees": "a callee that finds its call abandoned frees the slot",
    "dead_free": "what a dead callee was to write, the caller frees",
    "look_again": "a caller that goes to sleep looks for the answer after it has said so",
    "fence_before_look": "there is a fence between saying so and looking",
    "wake": "a callee that stored DONE wakes a caller that sleeps",
    "wake_at_death": "after a death every sleeper is woken: the dead may have taken back its word and not woken it",
}
"""Each rule that can be left out, and what it says."""


SCENARIOS = {"two calls": {"calls": 2}, "three calls": {"calls": 3}, "two deaths": {"calls": 3, "kills": 2}}
"""Arguments of `SlotModel`, by name."""

SHOWN_BY = dict.fromkeys(RULES, "two calls")
"""For each rule a scenario that ends badly without it."""


class State(NamedTuple):
    """One state.

    Parameters
    ----------
    word : (call number, state) in shared memory
    done : call whose answer is complete, as far as the word beside the state says
    answer : call whose answer lies in the slot, 0 for none
    sleeping : what memory says; the caller's own store may still be on its way
    buffered : whether the caller's store of 1 is on its way
    caller : what the caller is at
    call : number of the call it is at
    callee : whom it called
    jobs : per callee, ((number, step), ...)
    late : per callee, the calls whose `done` is on its way
    live : per callee
    noticed : per callee, whether the caller's process knows of the death
    calls, kills : how many may still happen
    """

    word: tuple[int, str] = (0, FREE)
    done: int = 0
    answer: int = 0
    sleeping: int = 0
    buffered: bool = False
    caller: str = "idle"
    call: int = 0
    callee: int = 0
    jobs: tuple[tuple[tuple[int, str], ...], ...] = ((), ())
    late: tuple[tuple[int, ...], ...] = ((), ())
    live: tuple[bool, bool] = (True, True)
    noticed: tuple[bool, bool] = (False, False)
    calls: int = 3
    kills: int = 1


class SlotModel:
    """The slot under the rules, or under all but some.

    Parameters
    ----------
    without : names of the rules to leave out
    calls : calls the caller makes
    kills : callees that may die
    """

    def __init__(self, without: tuple[str, ...] = (), calls: int = 3, kills: int = 1) -> None:
        unknown = set(without) - set(RULES)
        if unknown:
            raise ValueError(f"no such rule: {', '.join(sorted(unknown))}")
        self._without = frozenset(without)
        self._first = State(calls=calls, kills=kills)

    def initial(self) -> State:
        """Return the state everything starts from."""
        return self._first

    def outside(self, action: Action) -> bool:
        """Return whether an action is fate's: a death, or a deadline that a sleeper must not need."""
        return action[1] in ("kill", "give up")

    def enabled(self, s: State) -> Iterator[Action]:
        """Yield (who, verb, ...) for everything that may happen next."""
        if s.caller == "idle":
            if s.calls and s.word[1] == FREE:
                for callee in (0, 1):
                    if s.live[callee]:
                        yield "caller", "call", callee
        else:
            yield from self._caller(s)
        if s.buffered:
            yield "caller", "store arrives"
        for callee, jobs in enumerate(s.jobs):
            if s.live[callee]:
                for number, step in jobs:
                    if step == "tell" and number in s.late[callee]:
                        continue
                    yield NAMES[callee], step, number
                if s.kills:
                    yield NAMES[callee], "kill"
            if not s.noticed[callee]:
                for number in s.late[callee]:
                    yield NAMES[callee], "done arrives", number
            if not s.live[callee] and not s.noticed[callee]:
                yield "caller", "notice", callee
        # A slot that was abandoned to a callee who then died.
        if s.caller == "idle" and s.word[1] == ABANDONED and s.noticed[s.callee] and self._on("dead_free"):
            yield "caller", "reclaim"

    def _caller(self, s: State) -> Iterator[Action]:
        if s.caller == "read":
            yield "caller", "read"
            return
        dead = s.noticed[s.callee]
        if s.caller in ("wait", "asleep"):
            yield "caller", "give up"
        if s.caller == "wait":
            if dead:
                yield "caller", "fail"
            if self._has_answer(s):
                yield "caller", "see done"
            elif not s.sleeping and not s.buffered and not dead:
                yield "caller", "say sleeping"
        elif s.caller == "said" and not (s.buffered and self._on("fence_before_look")):
            yield "caller", "look" if self._on("look_again") else "sleep"
        elif s.caller == "looked":
            yield "caller", "sleep"

    def _has_answer(self, s: State) -> bool:
        """Return whether the caller sees that its answer is there."""
        if s.done == s.call or s.done and not self._on("done_number"):
            return True
        return self._on("look_at_state") and s.word == (self._key(s.call), DONE)

    def _on(self, rule: str) -> bool:
        return rule not in self._without

    def _key(self, number: int) -> int:
        return number if self._on("number") else 0

    def apply(self, s: State, action: Action) -> State:
        """Return the state after an enabled action."""
        who, verb, *rest = action
        if who == "caller":
            return _CALLER[verb](self, s, *rest)
        callee = NAMES.index(who)
        if verb == "kill":
            return s._replace(live=_put(s.live, callee, False), jobs=_put(s.jobs, callee, ()), kills=s.kills - 1)
        (number,) = rest
        return _CALLEE[verb](self, s, callee, number)

    def violation(self, s: State) -> str | None:
        """Return the safety promise that this state breaks, or None."""
        if s.caller == "read" and s.answer != s.call:
            return f"call {s.call} gets the answer of call {s.answer}" if s.answer else f"call {s.call} gets no answer"
        for jobs in s.jobs:
            for number, step in jobs:
                if step == "write" and s.word[1] != FREE and s.call != number:
                    return f"the slot is used for call {s.call} while the callee of call {number} may write to it"
        return None

    def unfinished(self, s: State) -> str | None:
        """Return what is left over when nothing more happens by itself, or None."""
        if s.caller != "idle":
            return f"call {s.call} waits for ever"
        return None if s.word[1] == FREE else f"the slot stays {s.word[1]} for ever"

    # The caller's steps.

    def _call(self, s: State, callee: int) -> State:
        number = s.call + 1
        done = s.done if self._on("done_number") else 0
        return s._replace(
            word=(self._key(number), PENDING), done=done, answer=0, sleeping=0,
            caller="wait", call=number, callee=callee,
            jobs=_put(s.jobs, callee, (*s.jobs[callee], (number, "claim" if self._on("claim") else "write"))),
            calls=s.calls - 1,
        )  # fmt: skip

    def _see_done(self, s: State) -> State:
        return s._replace(caller="read")

    def _read(self, s: State) -> State:
        return s._replace(caller="idle", word=(s.word[0], FREE), sleeping=0, buffered=False)

    def _say_sleeping(self, s: State) -> State:
        return s._replace(caller="said", buffered=True)

    def _store_arrives(self, s: State) -> State:
        return s._replace(sleeping=1, buffered=False)

    def _look(self, s: State) -> State:
        settled = self._has_answer(s) or s.noticed[s.callee]
        return s._replace(caller="wait" if settled else "looked")

    def _sleep(self, s: State) -> State:
        # The kernel compares: it sees the caller's own store, buffered or not.
        return s._replace(caller="asleep" if s.sleeping or s.buffered else "wait")

    def _give_up(self, s: State) -> State:
        number, state = s.word
        awake = s._replace(caller="idle", sleeping=0, buffered=False)
        if state == WRITING and self._on("abandon"):
            return awake._replace(word=(number, ABANDONED))
        if state in (PENDING, WRITING):
            return awake._replace(word=(number, FREE))
        return s._replace(caller="read", sleeping=0, buffered=False)  # done after all

    def _fail(self, s: State) -> State:
        if s.word[1] == DONE:
            return s._replace(caller="read", sleeping=0, buffered=False)
        state = FREE if s.word[1] == PENDING or self._on("dead_free") else s.word[1]
        return s._replace(caller="idle", word=(s.word[0], state), sleeping=0, buffered=False)

    def _reclaim(self, s: State) -> State:
        return s._replace(word=(s.word[0], FREE))

    def _notice(self, s: State, callee: int) -> State:
        known = s._replace(noticed=_put(s.noticed, callee, True), late=_put(s.late, callee, ()))
        if s.sleeping or self._on("wake_at_death"):
            known = known._replace(sleeping=0, caller=_awake(s.caller))
        return known

    # The callee's steps.

    def _go(self, s: State, callee: int, number: int, step: str | None) -> State:
        jobs = tuple([(n, step if n == number else at) for n, at in s.jobs[callee] if n != number or step])
        return s._replace(jobs=_put(s.jobs, callee, jobs))

    def _claim(self, s: State, callee: int, number: int) -> State:
        if s.word == (self._key(number), PENDING) or not self._on("answer_by_cas"):
            first = "write" if self._on("answer_before_done") else "finish"
            return self._go(s, callee, number, first)._replace(word=(s.word[0], WRITING))
        return self._go(s, callee, number, None)  # the caller has given up

    def _write(self, s: State, callee: int, number: int) -> State:
        after = "finish" if self._on("answer_before_done") else "tell"
        return self._go(s, callee, number, after)._replace(answer=number)

    def _finish(self, s: State, callee: int, number: int) -> State:
        claimed = WRITING if self._on("claim") else PENDING
        if s.word == (self._key(number), claimed) or not self._on("answer_by_cas"):
            after = "tell" if self._on("answer_before_done") else "write"
            late = _put(s.late, callee, (*s.late[callee], number))
            return self._go(s, callee, number, after)._replace(word=(s.word[0], DONE), late=late)
        return self._go(s, callee, number, "give back" if self._on("callee_frees") else None)

    def _done_arrives(self, s: State, callee: int, number: int) -> State:
        return s._replace(done=number, late=_put(s.late, callee, tuple([n for n in s.late[callee] if n != number])))

    def _give_back(self, s: State, callee: int, number: int) -> State:
        state = FREE if s.word == (self._key(number), ABANDONED) else s.word[1]
        return self._go(s, callee, number, None)._replace(word=(s.word[0], state))

    def _tell(self, s: State, callee: int, number: int) -> State:
        return self._go(s, callee, number, "hush" if s.sleeping and self._on("wake") else None)

    def _hush(self, s: State, callee: int, number: int) -> State:
        return self._go(s, callee, number, "wake")._replace(sleeping=0)

    def _wake(self, s: State, callee: int, number: int) -> State:
        return self._go(s, callee, number, None)._replace(caller=_awake(s.caller))


_CALLER = {
    "call": SlotModel._call,
    "see done": SlotModel._see_done,
    "read": SlotModel._read,
    "say sleeping": SlotModel._say_sleeping,
    "store arrives": SlotModel._store_arrives,
    "look": SlotModel._look,
    "sleep": SlotModel._sleep,
    "give up": SlotModel._give_up,
    "fail": SlotModel._fail,
    "reclaim": SlotModel._reclaim,
    "notice": SlotModel._notice,
}
_CALLEE = {
    "claim": SlotModel._claim,
    "write": SlotModel._write,
    "finish": SlotModel._finish,
    "done arrives": SlotModel._done_arrives,
    "give back": SlotModel._give_back,
    "tell": SlotModel._tell,
    "hush": SlotModel._hush,
    "wake": SlotModel._wake,
}


def _awake(caller: str) -> str:
    """Return what a caller is at after somebody has woken the futex."""
    return "wait" if caller == "asleep" else caller


def _put(row: tuple, index: int, value: object) -> tuple:
    return (*row[:index], value, *row[index + 1 :])


def describe(action: Action, state: State) -> str:
    """Return a line that says what was done and what the slot looks like after it."""
    who, verb, *rest = action
    about = "" if not rest else f" {NAMES[rest[0]]}" if verb in ("call", "notice") else f" (call {rest[0]})"
    number, word = state.word
    slot = f"slot {number} {word:<9} done {state.done} answer {state.answer} sleeping {state.sleeping}"
    return f"{who} {verb + about:<28} {slot}"


def build(name: str, without: tuple[str, ...] = ()) -> SlotModel:
    """Return the model of a named scenario."""
    return SlotModel(without, **SCENARIOS[name])
