"""Drive the shipped reference table in lock step with the model, several holders of one process standing for processes.

What one call of the shipped code does at once is one step here: a release
with its flag, a late visit with its look and its undo, a sweep, a removal.
Everything between such calls may interleave as in the model. Or the users
take one instruction at a time, written into the shared words directly, so
that the shipped table meets what lies between. Rings and processes are the
model's; words, counts, pins, generations and phases are the shipped code's,
and compared with the model's after every step.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable

from fastref._core import Holder, PinQueue, ReferenceTable, table_sizes
from fastref.errors import ReferenceLost
from tests.model.rules import ReferenceModel
from tests.model.scenarios import Scenario
from tests.model.world import ABROAD, CLOSED, DEAD, LIVE, OWNER, PROCESSES, SWEEPER, THREADS, World

__all__ = ["Replay"]

Action = tuple
CAPACITY = 64
HOLD_OFFSET = 64
"""The hint, the words and the dirty bits follow each other; the hint has a cache line to itself."""
PHASES = ("free", "used", "closing", "retired")

WITHIN_ONE_CALL = frozenset(("flag", "check", "undo", "close", "bump"))
"""Steps of the model that the shipped code takes before it returns."""


class _Pin:
    """One pin of a process: reserved with a frame, or queued behind a place in a ring."""

    def __init__(self, entry: int) -> None:
        self.entry = entry
        self.position = 0  # 0: not published

    def queue_behind(self, queue: PinQueue, position: int, holder: Holder, generation: int) -> None:
        queue.pin(position, holder, self.entry, generation)
        holder.release(self.entry)  # what was reserved is now the queue's
        self.queue, self.position = queue, position

    def drop(self, holder: Holder) -> None:
        if self.position:
            assert self.queue.release(self.position) == 1
        else:
            holder.release(self.entry)


class Replay:
    """The model of a scenario and the shipped objects, always in the same state.

    Parameters
    ----------
    scenario : who takes part
    by_instruction : users take one instruction at a time and are no shipped code
    """

    def __init__(self, scenario: Scenario, *, by_instruction: bool = False) -> None:
        self._by_instruction = by_instruction
        self.model = ReferenceModel(scenario)
        self.state = self.model.initial()
        hold, descriptors = (bytearray(size) for size in table_sizes(CAPACITY))
        self._hold, self._descriptors = hold, descriptors
        self.table = ReferenceTable(
            hold, descriptors, CAPACITY, usable=scenario.entries, generation_limit=min(scenario.wrap, 1 << 31)
        )
        self._holders = {p: self._new_holder(p) for p in self.model.everybody}
        self._queues: dict[tuple[int, int, int], PinQueue] = {}
        self._published: dict[tuple[int, int, int], int] = {}
        self._pins: dict[int, list[_Pin]] = {p: [] for p in range(PROCESSES)}
        for p, e in sorted(scenario.holders, key=lambda held: (held[1], held[0])):
            self._hold_at_start(p, e)
        self._compare(("start",))

    def _new_holder(self, p: int) -> Holder:
        if p == OWNER:
            return self.table.holder
        peer = None if p in self.model.scenario.abroad else p - 1
        return Holder(self._hold, self._descriptors, CAPACITY, peer)

    def _hold_at_start(self, p: int, e: int) -> None:
        if self.table.phase_of(e) == "used":
            self._holders[p].acquire(e, 0)
        elif p == OWNER:
            assert self.table.open() == (e, 0)
        else:
            assert self.table.open_credits(p - 1, 1) == [(e, 0)]
            self._holders[p].adopt(e, 0)

    def enabled(self) -> list[Action]:
        """Return what may happen next."""
        return list(self.model.enabled(self.state))

    def finish(self, choice: random.Random) -> None:
        """Go on, without deaths, until nothing more happens."""
        while actions := [action for action in self.enabled() if not self.model.outside(action)]:
            self.step(choice.choice(actions))
        assert self.model.unfinished(self.state) is None
        assert self.table.snapshot()["used"] == 0

    def follow(self, schedule: Iterable[Action]) -> int:
        """Take the steps of a schedule that the rules allow; return how many they refused."""
        refused = 0
        for action in schedule:
            if self._is_within_a_call(action[0], action[2]):
                continue
            if action in self.enabled():
                self.step(action)
            else:
                refused += 1
        return refused

    def _is_within_a_call(self, p: int, verb: str) -> bool:
        return verb in WITHIN_ONE_CALL and not (self._by_instruction and p != OWNER)

    def step(self, action: Action) -> None:
        """Let one thing happen in the model and with the shipped objects, and compare."""
        p, _, verb, *rest = action
        if verb in ("grant", "fill"):
            action = self._open(action)
        before = World(self.state)
        self._advance(action)
        if self._by_instruction and p != OWNER:
            self._write(before, World(self.state))
        elif verb == "take flag":
            self._sweep(before)
        elif verb == "strip":
            self._remove(rest[0])
        else:
            perform = getattr(self, f"_do_{verb.replace(' ', '_')}", None)
            if perform is not None:
                perform(before, World(self.state), p, *rest)
        if verb != "grant":
            self._follow_forks(before, World(self.state))
        self._compare(action)

    def _advance(self, action: Action) -> None:
        """Apply an action to the model, and what the shipped code does in the same call."""
        p, t = action[:2]
        self.state = self.model.apply(self.state, action)
        while (step := World(self.state).step[p * THREADS + t]) and self._is_within_a_call(p, step[0]):
            self.state = self.model.apply(self.state, (p, t, *step))

    def _compare(self, action: Action) -> None:
        w = World(self.state)
        assert self.model.violation(self.state) is None
        for e in range(self.model.entries):
            assert PHASES[w.phase[e]] == self.table.phase_of(e), action
            assert w.generation[e] == self.table.holder.generation(e), action
            assert _shipped_word(w.word[e]) == self.table.word(e), action
            for p in self.model.everybody:
                if w.life[p] == LIVE and (p == OWNER or not self._by_instruction):
                    assert w.count(p, e) == self._holders[p].count(e), action

    def _write(self, before: World, after: World) -> None:
        """Do to the shared words what one instruction of a user does."""
        for e in range(self.model.entries):
            place = HOLD_OFFSET + 8 * e
            (word,) = struct.unpack_from("=Q", self._hold, place)
            old, new = _shipped_word(before.word[e]), _shipped_word(after.word[e])
            struct.pack_into("=Q", self._hold, place, word & ~(old & ~new) | new & ~old)
            if after.dirty[e] and not before.dirty[e]:
                place = HOLD_OFFSET + 8 * CAPACITY + 8 * (e // 64)
                (bits,) = struct.unpack_from("=Q", self._hold, place)
                struct.pack_into("=Q", self._hold, place, bits | 1 << e % 64)
                struct.pack_into("=Q", self._hold, 0, 1)  # the hint

    # The owner.

    def _open(self, action: Action) -> Action:
        """Let the table open an entry, and return the model's action for the one it chose."""
        p, t, verb, _, *peer = action
        if verb == "fill":
            opened = self.table.open()
        else:
            place = None if peer[0] in self.model.scenario.abroad else peer[0] - 1
            (opened,) = self.table.open_credits(place, 1) or (None,)
        candidates = [each for each in self.enabled() if each[:3] == (p, t, verb) and list(each[4:]) == peer]
        (chosen,) = [each for each in candidates if opened and each[3] == opened[0]]
        return chosen

    def _sweep(self, before: World) -> None:
        """The shipped sweep takes every flag; so does the model now, freeing at once when there are several."""
        flagged = [e for e in range(self.model.entries) if before.dirty[e]]
        closed = set(self.table.sweep())
        if len(flagged) > 1:
            self._free_in_model()
            for e in flagged:
                if World(self.state).dirty[e]:
                    self._advance((OWNER, SWEEPER, "take flag", e))
                    self._free_in_model()
        now = World(self.state)
        assert closed == {e for e in flagged if now.phase[e] != before.phase[e]}
        for e in closed:
            if PHASES[now.phase[e]] != "closing":
                self.table.free(e)

    def _free_in_model(self) -> None:
        step = World(self.state).step[OWNER * THREADS + SWEEPER]
        if step:
            self._advance((OWNER, SWEEPER, *step))

    def _do_free(self, before: World, after: World, p: int, e: int) -> None:
        self.table.free(e)

    def _remove(self, dead: int) -> None:
        while isinstance(stage := World(self.state).removal[dead], int):
            self.state = self.model.apply(self.state, (OWNER, SWEEPER, "strip", dead, stage))
        if dead not in self.model.scenario.abroad:
            self.table.remove_peer(dead - 1)

    def _follow_forks(self, before: World, after: World) -> None:
        """The set of forks is the runtime's; its bit is the table's."""
        for e in range(self.model.entries):
            if after.forks[e] and not before.forks[e]:
                self.table.mark_abroad(e)
            elif before.forks[e] and not after.forks[e]:
                self.table.clear_abroad(e)

    # Everybody.

    def _do_drop(self, before: World, after: World, p: int, e: int) -> None:
        self._holders[p].release(e)

    _do_let_go = _do_drop

    def _do_reserve(self, before: World, after: World, p: int, e: int, target: int = OWNER) -> None:
        if len(after.pins[p]) > len(before.pins[p]):
            self._holders[p].acquire(e, after.pins[p][-1][3])
            self._pins[p].append(_Pin(e))

    _do_create = _do_reserve

    def _do_publish(self, before: World, after: World, p: int, target: int, instance: int, message: tuple) -> None:
        _, entry, generation, _, pinned = message
        route = (p, target, instance)
        reserved = [
            pin
            for pin, known in zip(self._pins[p], after.pins[p], strict=True)
            if known[:3] == (target, instance, entry) and not pin.position
        ]
        arrived = after.waiting(p, target) != before.waiting(p, target)
        if pinned and reserved and arrived and target not in self.model.scenario.abroad:
            self._published[route] = self._published.get(route, 0) + 1
            queue = self._queues.setdefault(route, PinQueue())
            reserved[-1].queue_behind(queue, self._published[route], self._holders[p], generation)

    def _drop_missing_pin(self, before: World, after: World, p: int) -> None:
        """Drop the one pin that the model has dropped."""
        left = list(after.pins[p])
        index = next((i for i, pin in enumerate(left) if pin != before.pins[p][i]), len(left))
        self._pins[p].pop(index).drop(self._holders[p])

    def _do_unpin(self, before: World, after: World, p: int, index: int) -> None:
        self._pins[p].pop(index).drop(self._holders[p])

    def _do_fail(self, before: World, after: World, p: int, *message: object) -> None:
        if len(after.pins[p]) < len(before.pins[p]):
            self._drop_missing_pin(before, after, p)

    def _do_drain(self, before: World, after: World, p: int, source: int) -> None:
        kind, e, g, _, _ = before.waiting(source, p)[0]
        if kind == "child accept":
            self._do_fail(before, after, p)
        elif after.count(p, e) > before.count(p, e):
            if kind == "grant" and p not in self.model.scenario.abroad:
                self._holders[p].adopt(e, g)
            else:
                self._holders[p].acquire(e, g)

    def _do_visit(self, before: World, after: World, p: int, e: int, g: int) -> None:
        try:
            self._holders[p].acquire_unpinned(e, g)
        except ReferenceLost:
            assert after.count(p, e) == before.count(p, e)
        else:
            assert after.count(p, e) == before.count(p, e) + 1

    def _do_kill(self, before: World, after: World, p: int) -> None:
        assert after.life[p] == DEAD
        self._pins[p] = []
        self._holders[p] = None
        for route in [route for route in self._queues if route[0] == p]:
            del self._queues[route]

    def _do_start(self, before: World, after: World, p: int) -> None:
        self._holders[p] = self._new_holder(p)


def _shipped_word(word: int) -> int:
    """Return the model's word as the table writes it: the owner's bit and the two special ones are the highest."""
    peers = (word & ((1 << PROCESSES) - 1)) >> 1
    special = bool(word & 1 << OWNER) << 61 | bool(word & ABROAD) << 62 | bool(word & CLOSED) << 63
    return peers | special
