"""How a process takes and drops an entry: private counts in front of the holder word.

Every function here runs one instruction on shared memory together with the
private bookkeeping beside it, which nobody else can see half done as long
as the private lock is held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.model.world import ABROAD, CLOSED, OWNER, USED, World

if TYPE_CHECKING:
    from tests.model.rules import ReferenceModel

__all__ = ["VERBS", "acquire", "clear", "gain", "lower", "register", "unregister"]


def acquire(m: ReferenceModel, w: World, p: int, t: int, e: int, g: int, then: tuple, *, guess: bool = False) -> None:
    """Add a handle, and set the process's bit if it is the first.

    Parameters
    ----------
    guess : nobody is known to hold the entry meanwhile, so look afterwards
    then : what the thread goes on with
    """
    if w.count(p, e):
        known = w.held[p * m.entries + e]
        if m.same(known, g):
            gain(m, w, p, t, e, known, then)
        else:  # the entry is in use again, so the generation asked for is gone
            w.go(p, t, then)
    elif not m.has_bit(p):
        gain(m, w, p, t, e, g, then)
    else:
        before = w.word[e]
        w.word[e] = before | 1 << p
        if guess and m.on("look_after_or"):
            w.lock[p] = t + 1
            w.go(p, t, ("check", e, g, before, then))
        else:
            gain(m, w, p, t, e, g, then)


def gain(m: ReferenceModel, w: World, p: int, t: int, e: int, g: int, then: tuple) -> None:
    """Count one handle more."""
    cell = p * m.entries + e
    w.handles[cell] += 1
    w.held[cell] = g
    w.go(p, t, then)


def lower(m: ReferenceModel, w: World, p: int, t: int, e: int, then: tuple) -> None:
    """Give the entry up if the handle or pin just taken off was the last."""
    if w.count(p, e):
        w.go(p, t, then)
    elif p in m.scenario.abroad:
        cell = p * m.entries + e
        w.post(p, OWNER, ("delete", e, w.held[cell], w.mine[cell], False))
        w.mine[cell] = ()
        w.go(p, t, then)
    elif not m.has_bit(p):
        w.go(p, t, ("flag", e, then))
    elif not m.on("dirty_after_and"):
        w.dirty[e] = True
        w.lock[p] = t + 1
        w.go(p, t, ("and", e, 1 << p, then))
    elif not m.on("private_lock"):
        w.go(p, t, ("and", e, 1 << p, then))
    else:
        clear(m, w, p, t, e, 1 << p, then)


def clear(m: ReferenceModel, w: World, p: int, t: int, e: int, bit: int, then: tuple, *, flags: bool = True) -> None:
    """AND a bit out of the word; whoever leaves zero flags the entry next."""
    w.word[e] &= ~bit
    w.lock[p] = 0
    if w.word[e] == 0 and flags and m.on("dirty_after_and"):
        then = ("flag", e, then)
    w.go(p, t, then)


def register(m: ReferenceModel, w: World, t: int, e: int, fork: int, holder: int, then: tuple) -> None:
    """Put a fork into the owner's private set, and set ABROAD if it is the first.

    The owner does not look whether the entry is the right one. A sender's
    pin keeps it open, or the removal of the sender does, which waits for
    whoever still asks. When the asker is dead too it may be another one by
    now; then the asker's own removal takes the fork out again.
    """
    if not w.forks[e]:
        w.word[e] |= ABROAD
    w.forks[e] = tuple(sorted((*w.forks[e], (fork, holder))))
    w.go(OWNER, t, then)


def unregister(m: ReferenceModel, w: World, t: int, e: int, gone: tuple, holder: int, then: tuple) -> None:
    """Take forks out of the owner's private set, and ABROAD with the last; unknown forks are passed over."""
    before = w.forks[e]
    if m.on("fork_by_fork"):
        w.forks[e] = tuple([fork for fork in before if fork[0] not in gone])
    else:
        w.forks[e] = tuple([fork for fork in before if fork[1] != holder])
    if before and not w.forks[e]:
        clear(m, w, OWNER, t, e, ABROAD, then)
    else:
        w.go(OWNER, t, then)


def _and(m: ReferenceModel, w: World, p: int, t: int, e: int, bit: int, then: tuple) -> None:
    clear(m, w, p, t, e, bit, then)


def _flag(m: ReferenceModel, w: World, p: int, t: int, e: int, then: tuple) -> None:
    w.dirty[e] = True
    w.go(p, t, then)


def _check(m: ReferenceModel, w: World, p: int, t: int, e: int, g: int, before: int, then: tuple) -> None:
    if before & CLOSED or w.phase[e] != USED or not m.same(w.generation[e], g):
        w.go(p, t, ("undo", e, 1 << p, before, then))
    else:
        w.lock[p] = 0
        gain(m, w, p, t, e, g, then)


def _undo(m: ReferenceModel, w: World, p: int, t: int, e: int, bit: int, before: int, then: tuple) -> None:
    if before & bit and m.on("undo_own_only"):
        w.lock[p] = 0
        w.go(p, t, then)
    else:
        clear(m, w, p, t, e, bit, then, flags=m.on("undo_flags"))


VERBS = {"and": _and, "flag": _flag, "check": _check, "undo": _undo}
