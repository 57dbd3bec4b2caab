"""What the owner of a published value does: copy, show, withdraw, change, answer, and use blocks again.

Threads of the owner exclude each other by the interpreter lock: a step that takes it needs it free, and one that keeps
it leaves its thread in `gil` until the descriptor is whole again. Copying goes on without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.model.publication_world import (
    ASK,
    BLOCK,
    CLOSED,
    INLINE,
    NONE,
    OTHER,
    OWNER,
    READERS,
    SERVER,
    World,
)

if TYPE_CHECKING:
    from tests.model.publication import PublicationModel

__all__ = ["LOCKING", "VERBS", "memory", "threads"]

# Steps that need the interpreter lock, which another thread may have kept.
LOCKING = frozenset(("expose", "withdraw", "turn", "look", "show", "answer", "change at once"))


def threads(m: PublicationModel, w: World) -> Iterator[tuple]:
    """Yield what the owner's threads may do next."""
    for t in range(READERS):
        step = w.step[t]
        if step:
            if step[0] in LOCKING and w.gil not in (NONE, t):
                continue
            if step[0] == "open" and w.hold[step[1]] != CLOSED:
                continue  # a late visitor is inside, and will take its bit back
            yield t, *step
        elif t == SERVER:
            if w.gil == NONE:
                yield from ((t, "serve", r) for r in range(READERS, len(w.step)) if w.mail[r] == "asked")
        elif w.left[t] and (w.gil == NONE or m.by_hand and not m.at_once):
            yield t, "change" if m.at_once else ("change a" if m.by_hand else "expose")


def memory(m: PublicationModel, w: World) -> Iterator[tuple]:
    """Yield what may become of blocks and entries, whichever thread of the owner does it."""
    for b, phase in enumerate(w.phase):
        if phase == "used" and w.hold[b] == 0:
            yield SERVER, "close", b
        elif phase in ("closing", "closed"):
            yield SERVER, "bump" if phase == "closing" else "free", b
        elif phase == "free" and w.others and w.hold[b] == CLOSED:
            yield SERVER, "lend", b
        elif phase == "lent":
            yield SERVER, "fill", b
    for p, life in enumerate(w.life[1:]):
        if life == "dead" and m.on("dead_readers_removed"):
            yield SERVER, "remove", p
    busy = any(w.step) or any(w.left[t] and w.life[m.process(t)] == "live" for t in range(len(w.left)))
    if not w.gone and not busy:
        yield SERVER, "drop value"


# ---- a copy is made, and shown


def _free_block(w: World) -> int:
    return next((b for b, phase in enumerate(w.phase) if phase == "free"), NONE)


def copy(m: PublicationModel, w: World, t: int, turn: int, then: tuple, refused: tuple) -> None:
    """Begin to copy the value; `then` follows, or `refused` when there is no memory."""
    b = _free_block(w)
    if w.begun in m.inline:
        b = NONE
    elif b == NONE:
        w.go(t, refused)
        return
    else:
        w.phase[b] = "taken"
    w.go(t, ("copy a", b, turn, then))


def _copy_a(m: PublicationModel, w: World, t: int, b: int, turn: int, then: tuple) -> None:
    if m.at_once:  # the encoder has the bytes
        first, second = w.value
        if b != NONE:
            w.content[b] = (first, second)
        w.go(t, ("look", b, (first, second), turn, then) if b == NONE else ("open", b, turn, then))
        return
    if b != NONE:
        w.put(b, 0, w.value[0])
    w.go(t, ("copy b", b, w.value[0] if b == NONE else NONE, turn, then))


def _copy_b(m: PublicationModel, w: World, t: int, b: int, first: int, turn: int, then: tuple) -> None:
    if b == NONE:
        w.go(t, ("look", b, (first, w.value[1]), turn, then))
        return
    w.put(b, 1, w.value[1])
    w.go(t, ("open", b, turn, then))


def _open(m: PublicationModel, w: World, t: int, b: int, turn: int, then: tuple) -> None:
    w.hold[b], w.phase[b] = OWNER, "used"
    w.go(t, ("look", b, (b, (b, w.generation[b])), turn, then))


def _look(m: PublicationModel, w: World, t: int, b: int, words: tuple, turn: int, then: tuple) -> None:
    """Is it still to be shown? And, under the same hold of the interpreter lock, begin to show it."""
    late = w.exposed and m.on("look_after_copy") if not m.by_hand else turn < w.shown_turn and m.on("latest_stays")
    if late:
        given_back = b != NONE and m.on("unshown_given_back")
        w.go(t, ("give back", b, then) if given_back else then)
    elif m.on("one_hold_to_show"):
        _show(m, w, t, b, words, turn, then)
    else:
        w.go(t, ("show", b, words, turn, then))


def _show(m: PublicationModel, w: World, t: int, b: int, words: tuple, turn: int, then: tuple) -> None:
    before, w.shown, w.shown_turn, w.published = w.shown, b, turn, True
    shown = then if before == NONE or not m.on("give_back_after_showing") else ("give back", before, then)
    writing = ("odd", INLINE if b == NONE else BLOCK, *words, shown)
    if before != NONE and not m.on("give_back_after_showing"):
        w.go(t, ("give back", before, writing))
    else:
        w.gil = t
        w.go(t, writing)


# ---- the descriptor, word by word


def _odd(m: PublicationModel, w: World, t: int, form: str, x: object, y: object, then: tuple) -> None:
    w.gil = t
    if m.on("odd_before_words"):
        w.version += 1 if m.on("even_after_words") else 2
    w.go(t, ("form", form, x, y, then))


def _form(m: PublicationModel, w: World, t: int, form: str, x: object, y: object, then: tuple) -> None:
    w.form = form
    w.go(t, ("first word", x, y, then))


def _first_word(m: PublicationModel, w: World, t: int, x: object, y: object, then: tuple) -> None:
    w.words[0] = x
    w.go(t, ("second word", y, then))


def _second_word(m: PublicationModel, w: World, t: int, y: object, then: tuple) -> None:
    w.words[1] = y
    if m.on("even_after_words"):
        w.go(t, ("even", then))
    else:
        w.gil = NONE
        w.go(t, then)


def _even(m: PublicationModel, w: World, t: int, then: tuple) -> None:
    w.version += 1 if m.on("odd_before_words") else 2
    w.gil = NONE
    w.go(t, then)


# ---- the program


def _expose(m: PublicationModel, w: World, t: int) -> None:
    """Code of the owner is about to reach the value."""
    w.left[t] -= 1
    change = ("change at once",) if m.at_once else ("change a",)
    if w.exposed:
        w.go(t, change)
        return
    if w.published or m.on("expose_unpublished"):
        w.exposed = True
    if not w.published:
        w.go(t, change)
    elif not m.on("withdraw_first"):
        w.go(t, ("change a", ("withdraw", ())))
    elif m.on("one_hold_to_withdraw"):
        _withdraw(m, w, t, change)
    else:
        w.go(t, ("withdraw", change))


def _withdraw(m: PublicationModel, w: World, t: int, then: tuple) -> None:
    before, w.shown, w.published = w.shown, NONE, False
    w.gil = t
    w.go(t, ("odd", ASK, 0, 0, then if before == NONE else ("give back", before, then)))


def _change_a(m: PublicationModel, w: World, t: int, then: tuple = ()) -> None:
    if m.by_hand:
        w.left[t] -= 1
    w.begun += 1
    w.value[0] = w.begun
    w.go(t, ("change b", then))


def _change_b(m: PublicationModel, w: World, t: int, then: tuple) -> None:
    w.value[1] = w.begun
    if m.by_hand:
        w.go(t, ("turn", w.begun))
    else:
        w.complete = w.begun
        w.go(t, then)


def _change(m: PublicationModel, w: World, t: int) -> None:
    """A change under the interpreter lock, so that two threads may make one: by hand, or of an exposed value."""
    if m.by_hand:
        w.left[t] -= 1
        _change_at_once(m, w, t)
    else:
        _expose(m, w, t)


def _change_at_once(m: PublicationModel, w: World, t: int) -> None:
    w.begun += 1
    w.value = [w.begun, w.begun]
    if m.by_hand:
        w.go(t, ("turn", w.begun))
    else:
        w.complete = w.begun
        w.go(t, ())


def _turn(m: PublicationModel, w: World, t: int, number: int) -> None:
    w.turns += 1
    copy(m, w, t, w.turns, ("returned", number), ())


def _returned(m: PublicationModel, w: World, t: int, number: int) -> None:
    """`publish` returns: whoever begins to read from now on sees that version or a later one."""
    w.complete = max(w.complete, number)
    w.go(t, ())


# ---- questions of readers


def _serve(m: PublicationModel, w: World, t: int, r: int) -> None:
    w.mail[r] = "served"
    if w.published:
        _answered(w, r, "published")
    elif m.by_hand or w.exposed:
        w.go(t, ("answer", r))
    else:
        copy(m, w, t, 0, ("answer", r), ("answer", r))


def _answer(m: PublicationModel, w: World, t: int, r: int) -> None:
    """Say that it is published, or send what the value is now."""
    _answered(w, r, "published" if w.published else min(w.value))
    w.go(t, ())


def _answered(w: World, r: int, answer: object) -> None:
    if w.mail[r] == "served":  # else it is dead
        w.mail[r] = answer


# ---- memory


def _give_back(m: PublicationModel, w: World, t: int, b: int, then: tuple) -> None:
    w.hold[b] &= ~OWNER
    w.go(t, then)


def _close(m: PublicationModel, w: World, t: int, b: int) -> None:
    w.hold[b], w.phase[b] = CLOSED, "closing"


def _bump(m: PublicationModel, w: World, t: int, b: int) -> None:
    if m.on("next_generation"):
        w.generation[b] += 1
    w.phase[b] = "closed"


def _free(m: PublicationModel, w: World, t: int, b: int) -> None:
    w.phase[b] = "free"


def _lend(m: PublicationModel, w: World, t: int, b: int) -> None:
    """A block carries something else: for those who get it, not for readers of the value."""
    w.others -= 1
    w.phase[b], w.hold[b] = "lent", OWNER
    w.put(b, 0, OTHER)


def _fill(m: PublicationModel, w: World, t: int, b: int) -> None:
    w.phase[b] = "used"
    w.hold[b] &= ~OWNER
    w.put(b, 1, OTHER)


def _remove(m: PublicationModel, w: World, t: int, p: int) -> None:
    w.life[p + 1] = "removed"
    w.hold = [word & ~(1 << p) for word in w.hold]


def _drop_value(m: PublicationModel, w: World, t: int) -> None:
    """Nobody holds the value any more."""
    w.gone = True
    if w.shown != NONE and m.on("copy_goes_with_value"):
        w.hold[w.shown] &= ~OWNER
    w.shown, w.published = NONE, False


VERBS = {
    "copy a": _copy_a,
    "copy b": _copy_b,
    "open": _open,
    "look": _look,
    "show": _show,
    "odd": _odd,
    "form": _form,
    "first word": _first_word,
    "second word": _second_word,
    "even": _even,
    "expose": _expose,
    "withdraw": _withdraw,
    "change a": _change_a,
    "change b": _change_b,
    "change": _change,
    "change at once": _change_at_once,
    "turn": _turn,
    "returned": _returned,
    "serve": _serve,
    "answer": _answer,
    "give back": _give_back,
    "close": _close,
    "bump": _bump,
    "free": _free,
    "lend": _lend,
    "fill": _fill,
    "remove": _remove,
    "drop value": _drop_value,
}
