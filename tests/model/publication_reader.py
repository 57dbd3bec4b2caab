"""What a reader of a published value does: the descriptor word by word, its bit, the generation, the block.

Threads of one process share its private counts and its bit, under one private lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.model.publication_world import ASK, CLOSED, INLINE, NONE, READERS, World

if TYPE_CHECKING:
    from tests.model.publication import PublicationModel

__all__ = ["VERBS", "threads"]

# Steps that change counts or the bit wait while another thread of the process is inside the private lock.
LOCKING = frozenset(("take", "guess", "release"))


def threads(m: PublicationModel, w: World) -> Iterator[tuple]:
    """Yield what readers may do next."""
    for r in range(READERS, len(w.step)):
        p, step = m.process(r), w.step[r]
        if w.life[p] != "live":
            continue
        if not step:
            if w.left[r]:
                yield r, "begin"
        elif step[0] == "wait":
            if w.mail[r] not in ("asked", "served") or w.life[0] != "live":
                yield r, *step
        elif step[0] == "read version" and w.version & 1 and m.on("not_while_odd") and not m.on("ask_at_last"):
            continue
        elif step[0] not in LOCKING or w.lock[p - 1] in (NONE, r):
            yield r, *step


def _begin(m: PublicationModel, w: World, r: int) -> None:
    w.left[r] -= 1
    w.go(r, ("read version", w.complete))


def _read_version(m: PublicationModel, w: World, r: int, least: int) -> None:
    if w.version & 1 and m.on("not_while_odd"):
        _ask(w, r, least)
    else:
        w.go(r, ("read form", least, w.version))


def _read_form(m: PublicationModel, w: World, r: int, least: int, version: int) -> None:
    if w.form == ASK:
        _ask(w, r, least)
    else:
        w.go(r, ("read first word", least, version, w.form))


def _read_first_word(m: PublicationModel, w: World, r: int, least: int, version: int, form: str) -> None:
    w.go(r, ("read second word", least, version, form, w.words[0]))


def _read_second_word(m: PublicationModel, w: World, r: int, least: int, version: int, form: str, x: object) -> None:
    w.go(r, ("version again", least, version, form, x, w.words[1]))


def _version_again(
    m: PublicationModel, w: World, r: int, least: int, version: int, form: str, x: int, y: tuple[int, int] | int
) -> None:
    if w.version != version and m.on("version_again"):
        w.go(r, ("read version", least))
    elif form == INLINE:
        w.go(r, ("have", least, x, y))
    elif not isinstance(y, tuple):
        w.go(r, ("have", least, "no block", y))
    elif m.on("hold_while_reading"):
        w.go(r, ("take" if m.on("generation_after_taking") else "guess", least, x, *y))
    else:
        w.go(r, ("read a", least, x, NONE))


def _ask(w: World, r: int, least: int) -> None:
    w.mail[r] = "asked"
    w.go(r, ("wait", least))


def _wait(m: PublicationModel, w: World, r: int, least: int) -> None:
    answer, w.mail[r] = w.mail[r], ""
    if answer == "published":
        w.go(r, ("read version", least))
    elif isinstance(answer, int):
        w.go(r, ("have", least, answer, answer))
    else:
        w.go(r, ())  # the owner is dead


# ---- the block


def _take(m: PublicationModel, w: World, r: int, least: int, b: int, e: int, g: int) -> None:
    p = m.process(r) - 1
    cell = w.cell(p, e)
    if w.count[cell]:
        _known(m, w, r, least, b, e, g)
        return
    before = w.hold[e]
    w.hold[e] |= 1 << p
    w.lock[p] = r
    w.go(r, ("check", least, b, e, g, before))


def _known(m: PublicationModel, w: World, r: int, least: int, b: int, e: int, g: int) -> None:
    """The process holds the entry already."""
    cell = w.cell(m.process(r) - 1, e)
    if w.held[cell] == g:
        w.count[cell] += 1
        w.go(r, ("read a", least, b, e))
    else:
        w.go(r, ("read version", least))


def _guess(m: PublicationModel, w: World, r: int, least: int, b: int, e: int, g: int) -> None:
    """Look first, take afterwards."""
    if w.count[w.cell(m.process(r) - 1, e)]:
        _known(m, w, r, least, b, e, g)
    elif w.generation[e] == g and not w.hold[e] & CLOSED:
        w.lock[m.process(r) - 1] = r
        w.go(r, ("or", least, b, e, g))
    else:
        w.go(r, ("read version", least))


def _or(m: PublicationModel, w: World, r: int, least: int, b: int, e: int, g: int) -> None:
    w.hold[e] |= 1 << (m.process(r) - 1)
    _have_taken(m, w, r, least, b, e, g)


def _have_taken(m: PublicationModel, w: World, r: int, least: int, b: int, e: int, g: int) -> None:
    p = m.process(r) - 1
    w.count[w.cell(p, e)], w.held[w.cell(p, e)], w.lock[p] = 1, g, NONE
    w.go(r, ("read a", least, b, e))


def _check(m: PublicationModel, w: World, r: int, least: int, b: int, e: int, g: int, before: int) -> None:
    if w.generation[e] == g and not (before & CLOSED and m.on("closed_is_late")):
        _have_taken(m, w, r, least, b, e, g)
    elif m.on("late_leave") and not before & 1 << (m.process(r) - 1):
        w.go(r, ("undo", least, e))
    else:
        w.lock[m.process(r) - 1] = NONE
        w.go(r, ("read version", least))


def _undo(m: PublicationModel, w: World, r: int, least: int, e: int) -> None:
    p = m.process(r) - 1
    w.hold[e] &= ~(1 << p)
    w.lock[p] = NONE
    w.go(r, ("read version", least))


def _read_a(m: PublicationModel, w: World, r: int, least: int, b: int, e: int) -> None:
    w.go(r, ("read b", least, b, e, w.content[b][0]))


def _read_b(m: PublicationModel, w: World, r: int, least: int, b: int, e: int, first: int) -> None:
    second = w.content[b][1]
    w.go(r, ("have", least, first, second) if e == NONE else ("release", least, first, second, e))


def _release(m: PublicationModel, w: World, r: int, least: int, first: int, second: int, e: int) -> None:
    p = m.process(r) - 1
    cell = w.cell(p, e)
    w.count[cell] -= 1
    if not w.count[cell]:
        w.held[cell] = 0
    if not w.count[cell] or not m.on("last_thread_releases"):
        w.hold[e] &= ~(1 << p)
    w.go(r, ())


def _have(m: PublicationModel, w: World, r: int, least: int, first: object, second: object) -> None:
    w.go(r, ())


VERBS = {
    "begin": _begin,
    "read version": _read_version,
    "read form": _read_form,
    "read first word": _read_first_word,
    "read second word": _read_second_word,
    "version again": _version_again,
    "wait": _wait,
    "take": _take,
    "guess": _guess,
    "or": _or,
    "check": _check,
    "undo": _undo,
    "read a": _read_a,
    "read b": _read_b,
    "release": _release,
    "have": _have,
}
