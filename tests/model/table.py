"""What only the owner does: open and close entries, publish a block, remove the dead; and who lives or dies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.model.holding import gain, lower
from tests.model.world import (
    ABROAD,
    ABSENT,
    APPLICATION,
    CLOSED,
    CLOSING,
    DEAD,
    FREE,
    LIVE,
    OWNER,
    PROCESSES,
    RETIRED,
    SWEEPER,
    THREADS,
    USED,
    World,
)

if TYPE_CHECKING:
    from tests.model.rules import ReferenceModel

__all__ = ["VERBS", "application", "fate", "removal", "sweeper"]

Action = tuple


def application(m: ReferenceModel, w: World) -> Iterator[Action]:
    """Yield what the owner's program may do beside what every program may."""
    for e in range(m.entries):
        if not _may_open(m, w, e):
            continue
        for p in m.scenario.users:
            begun = w.removal[p] != "" and m.on("grant_excludes_removal")
            if w.life[p] != ABSENT and not begun and m.may(w, ("grant", p)):
                yield OWNER, APPLICATION, "grant", e, p
        if m.may(w, "publish"):
            yield OWNER, APPLICATION, "fill", e
    if w.published[0]:
        yield OWNER, APPLICATION, "withdraw"


def sweeper(m: ReferenceModel, w: World) -> Iterator[Action]:
    """Yield the dirty entries that may be looked at."""
    for e in range(m.entries):
        if w.dirty[e]:
            yield OWNER, SWEEPER, "take flag" if m.on("clear_dirty_first") else "examine", e


def removal(m: ReferenceModel, w: World) -> Iterator[Action]:
    """Yield the next step of every removal that is under way or due."""
    for dead in m.scenario.users:
        stage = w.removal[dead]
        if stage == "" and w.life[dead] == DEAD:
            yield OWNER, SWEEPER, "notice", dead
        elif stage == "asked":
            asked = _asked(m, w, dead)
            if asked & ~w.acked[dead] == 0 or not m.on("peers_drain_first"):
                yield OWNER, SWEEPER, "answered", dead
        elif stage not in ("", "done") and not w.lock[OWNER]:
            yield OWNER, SWEEPER, "strip", dead, stage


def fate(m: ReferenceModel, w: World) -> Iterator[Action]:
    """Yield who may be killed and whose slot may be given away."""
    for p in m.scenario.users:
        if w.life[p] == LIVE and m.may(w, "kill"):
            yield p, APPLICATION, "kill"
        if w.life[p] == DEAD and m.may(w, "start") and (w.removal[p] == "done" or not m.on("slot_after_removal")):
            yield p, APPLICATION, "start"


def _may_open(m: ReferenceModel, w: World, e: int) -> bool:
    """Whether the compare-and-swap from exactly CLOSED would succeed."""
    return w.phase[e] == FREE and (w.word[e] == CLOSED or not m.on("reopen_by_cas"))


def _asked(m: ReferenceModel, w: World, dead: int) -> int:
    """Return, as bits, whose answer the removal of `dead` waits for."""
    asked = sum(1 << p for p in m.everybody if w.life[p] == LIVE and p != dead)
    if not m.on("owner_drains_too"):
        asked &= ~(1 << OWNER)
    if not m.on("ask_everybody"):  # who holds nothing seems to have nothing to say
        holders = 1 << OWNER
        for word in w.word:
            holders |= word
        asked &= holders
    return asked


def _grant(m: ReferenceModel, w: World, p: int, t: int, e: int, peer: int) -> None:
    m.spend(w, ("grant", peer))
    w.phase[e], w.credit[e], fork = USED, 1, 0
    if peer in m.scenario.abroad:
        fork = m.mint(w, OWNER)
        w.word[e] = ABROAD
        w.forks[e] = ((fork, peer),)
    else:
        w.word[e] = 1 << peer
    message = ("grant", e, w.generation[e], fork, False)
    w.go(p, t, ("publish", peer, w.instance[peer], message) if w.life[peer] == LIVE else ())


def _fill(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    m.spend(w, "publish")
    w.phase[e], w.credit[e] = USED, 0
    w.word[e] = 1 << OWNER if m.has_bit(OWNER) else 0
    gain(m, w, p, t, e, w.generation[e], ("store", e, w.generation[e]))


def _store(m: ReferenceModel, w: World, p: int, t: int, e: int, g: int) -> None:
    (before,) = w.published
    w.published[0] = (e, g)
    w.go(p, t, ("let go", before[0]) if before else ())


def _let_go(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    w.handles[p * m.entries + e] -= 1
    lower(m, w, p, t, e, ())


def _withdraw(m: ReferenceModel, w: World, p: int, t: int) -> None:
    w.published[0] = ()


def _take_flag(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    w.dirty[e] = False
    if not m.on("owner_bit"):
        w.go(p, t, ("recount", e))
    else:
        w.go(p, t, ("close", e) if m.on("close_by_cas") else ("look", e))


def _recount(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    w.go(p, t, () if w.count(OWNER, e) else ("close", e))


def _close(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    if w.word[e] == 0:
        _shut(m, w, p, t, e)


def _look(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    if w.word[e] == 0:
        w.go(p, t, ("shut", e))


def _shut(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    w.word[e], w.phase[e] = CLOSED, CLOSING
    w.go(p, t, ("bump", e) if m.on("bump_before_free") else ("free", e))


def _examine(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    _close(m, w, p, t, e)
    w.go(p, t, ("unflag", e, w.step[p * THREADS + t]))


def _unflag(m: ReferenceModel, w: World, p: int, t: int, e: int, then: tuple) -> None:
    w.dirty[e] = False
    w.go(p, t, then)


def _bump(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    w.generation[e] += 1
    w.go(p, t, ("free", e) if m.on("bump_before_free") else ())


def _free(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    wrapped = w.generation[e] % m.scenario.wrap == 0 and w.generation[e] > 0
    w.phase[e] = RETIRED if wrapped and m.on("retire_wrapped") else FREE
    w.go(p, t, () if m.on("bump_before_free") else ("bump", e))


def _notice(m: ReferenceModel, w: World, p: int, t: int, dead: int) -> None:
    w.removal[dead] = "asked"


def _answered(m: ReferenceModel, w: World, p: int, t: int, dead: int) -> None:
    w.removal[dead] = 0


def _strip(m: ReferenceModel, w: World, p: int, t: int, dead: int, e: int) -> None:
    before, bits = w.word[e], 1 << dead
    may_have_cleared = m.on("sweep_all_zeros")  # and died before it flagged the entry
    if dead in m.scenario.abroad:
        may_have_cleared = False
        kept = tuple([fork for fork in w.forks[e] if fork[1] != dead or not m.on("forks_follow_holder")])
        bits = ABROAD if w.forks[e] and not kept else 0
        w.forks[e] = kept
    w.word[e] &= ~bits
    if w.word[e] == 0 and w.phase[e] == USED and (before or may_have_cleared):
        w.dirty[e] = True
    w.removal[dead] = e + 1 if e + 1 < m.entries else "done"


def _kill(m: ReferenceModel, w: World, p: int, t: int) -> None:
    m.spend(w, "kill")
    w.life[p] = DEAD
    for cell in range(p * m.entries, (p + 1) * m.entries):
        w.handles[cell] = w.held[cell] = 0
        w.mine[cell] = ()
    w.pins[p] = w.asking[p] = ()
    w.lock[p] = 0
    for thread in range(THREADS):
        w.go(p, thread, ())
    for source in range(PROCESSES):
        w.ring[source * PROCESSES + p] = ()


def _start(m: ReferenceModel, w: World, p: int, t: int) -> None:
    m.spend(w, "start")
    w.life[p] = LIVE
    w.instance[p] += 1
    if w.removal[p] == "done":
        w.removal[p], w.acked[p] = "", 0


VERBS = {
    "grant": _grant,
    "fill": _fill,
    "store": _store,
    "let go": _let_go,
    "withdraw": _withdraw,
    "take flag": _take_flag,
    "recount": _recount,
    "close": _close,
    "look": _look,
    "shut": _shut,
    "examine": _examine,
    "unflag": _unflag,
    "bump": _bump,
    "free": _free,
    "notice": _notice,
    "answered": _answered,
    "strip": _strip,
    "kill": _kill,
    "start": _start,
}
