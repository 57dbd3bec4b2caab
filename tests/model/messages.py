"""How references travel: reserve, commit or roll back, drain, and the pins that guard what is on its way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.model.holding import acquire, gain, lower, register, unregister
from tests.model.world import APPLICATION, LIVE, OWNER, PROGRESS, THREADS, World

if TYPE_CHECKING:
    from tests.model.rules import ReferenceModel

__all__ = ["VERBS", "application", "progress"]

Action = tuple
NEVER = -1
"""Stands in a pin for a place in the ring that no cursor will pass."""
# A message is (kind, entry, generation, fork, pinned); "delete" carries a tuple of forks.


def application(m: ReferenceModel, w: World, p: int) -> Iterator[Action]:
    """Yield what a program may do with the handles it has."""
    for e in range(m.entries):
        if not w.handles[p * m.entries + e] or (p == OWNER and w.published[0][:1] == (e,)):
            continue
        yield p, APPLICATION, "drop", e
        if w.credit[e] and p != OWNER:  # nothing is known of the object yet but that it will be made
            yield p, APPLICATION, "create", e
            continue
        for target in m.everybody:
            if w.life[target] == LIVE and m.may(w, ("send", p, target)):
                if p != OWNER or target not in m.scenario.abroad or _may_register(m, w, target):
                    yield p, APPLICATION, "reserve", e, target
    if w.published[0] and m.may(w, ("read", p)):
        yield p, APPLICATION, "read"


def progress(m: ReferenceModel, w: World, p: int) -> Iterator[Action]:
    """Yield what the thread that never runs user code may do."""
    for source in m.everybody:
        if source != p and w.waiting(source, p):
            yield p, PROGRESS, "drain", source
    firsts = set()
    for index, (target, instance, *_) in enumerate(w.pins[p]):
        if (target, instance) not in firsts:
            firsts.add((target, instance))
            if _passed(m, w, p, target, instance):
                yield p, PROGRESS, "unpin", index
    for dead in m.everybody:
        if w.removal[dead] == "asked" and not w.acked[dead] >> p & 1 and _has_acquired_all(m, w, p, dead):
            yield p, PROGRESS, "ack", dead


def _may_register(m: ReferenceModel, w: World, holder: int) -> bool:
    return w.removal[holder] == "" or not m.on("grant_excludes_removal")


def _confirms(m: ReferenceModel, p: int, target: int) -> bool:
    """Whether a pin waits for the receiver's own confirmation and not for its cursor."""
    return target in m.scenario.abroad and p != OWNER and m.on("child_accept")


def _passed(m: ReferenceModel, w: World, p: int, target: int, instance: int) -> bool:
    """Whether the oldest pin for this receiver is needed no longer."""
    if w.life[target] != LIVE or w.instance[target] != instance:
        return m.on("pins_follow_receiver")
    if _confirms(m, p, target):
        return False
    ahead = sum(message[4] for message in w.waiting(p, target))
    step = w.step[p * THREADS + APPLICATION]
    if step[:3] == ("publish", target, instance):
        ahead += step[3][4]
    return sum(pin[:2] == (target, instance) and pin[4] != NEVER for pin in w.pins[p]) > ahead


def _has_acquired_all(m: ReferenceModel, w: World, p: int, dead: int) -> bool:
    asking = m.on("ack_after_accept") and any(source == dead for source, *_ in w.asking[p])
    return not w.waiting(dead, p) and not asking


def _drop(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    w.handles[p * m.entries + e] -= 1
    lower(m, w, p, t, e, ())


def _create(m: ReferenceModel, w: World, p: int, t: int, e: int) -> None:
    w.credit[e] = 0
    pinned = m.on("create_pins")
    g = w.held[p * m.entries + e]
    if pinned:
        w.add_pin(p, (OWNER, 0, e, g, 0))
    w.go(p, t, ("publish", OWNER, 0, ("create", e, g, 0, pinned)))


def _reserve(m: ReferenceModel, w: World, p: int, t: int, e: int, target: int) -> None:
    m.spend(w, ("send", p, target))
    g, instance, fork = w.held[p * m.entries + e], w.instance[target], 0
    if target in m.scenario.abroad:
        fork = m.mint(w, p)
    early = p == OWNER and target in m.scenario.abroad
    pinned = m.on("sender_pin") and not early
    if pinned:
        w.add_pin(p, (target, instance, e, g, fork))
    publish = ("publish", target, instance, ("ref", e, g, fork, pinned))
    if early and m.on("fork_before_send"):
        register(m, w, t, e, fork, target, publish)
    else:
        w.go(p, t, publish)


def _publish(m: ReferenceModel, w: World, p: int, t: int, target: int, instance: int, message: tuple) -> None:
    w.go(p, t, ())
    if w.instance[target] == instance:  # a ring belongs to an instance: the next one has its own
        w.post(p, target, message)


def _fail(m: ReferenceModel, w: World, p: int, t: int, target: int, instance: int, message: tuple) -> None:
    """The frame cannot be made or sent: what was reserved for it is undone."""
    m.spend(w, "fail")
    w.go(p, t, ())
    _, e, g, fork, pinned = message
    if pinned:
        reserved = [i for i, pin in enumerate(w.pins[p]) if pin[:3] == (target, instance, e)]
        if reserved:  # none when the receiver has died since, and the pin with it
            w.remove_pin(p, reserved[-1])
            if m.on("roll_back"):
                lower(m, w, p, t, e, ())
            else:
                w.add_pin(p, (target, instance, e, g, NEVER))
    elif fork and m.on("roll_back"):
        unregister(m, w, t, e, (fork,), target, ())


def _unpin(m: ReferenceModel, w: World, p: int, t: int, index: int) -> None:
    entry = w.pins[p][index][2]
    w.remove_pin(p, index)
    lower(m, w, p, t, entry, ())


def _ack(m: ReferenceModel, w: World, p: int, t: int, dead: int) -> None:
    w.acked[dead] |= 1 << p


def _read(m: ReferenceModel, w: World, p: int, t: int) -> None:
    m.spend(w, ("read", p))
    w.go(p, t, ("visit", *w.published[0]))


def _visit(m: ReferenceModel, w: World, p: int, t: int, e: int, g: int) -> None:
    acquire(m, w, p, t, e, g, (), guess=True)


def _drain(m: ReferenceModel, w: World, p: int, t: int, source: int) -> None:
    kind, e, g, fork, _ = w.waiting(source, p)[0]
    if kind in ("ref", "create") and p not in m.scenario.abroad:
        if m.on("acquire_before_cursor"):
            acquire(m, w, p, t, e, g, ("advance", source))
        else:
            w.pop(source, p)
            w.go(p, t, ("late", e, g))
    elif kind == "request":
        register(m, w, t, e, fork, source, ("answer", source, e, g, fork))
    else:
        w.pop(source, p)
        _RECEIVE[kind](m, w, p, t, source, e, g, fork)


def _receive_ref(m: ReferenceModel, w: World, p: int, t: int, source: int, e: int, g: int, fork: int) -> None:
    if source == OWNER and m.on("fork_before_send"):
        _gain_fork(m, w, p, t, e, g, fork)
    else:
        w.asking[p] += ((source, e, g, fork),)
        w.post(p, OWNER, ("request", e, g, fork, False))


def _receive_grant(m: ReferenceModel, w: World, p: int, t: int, source: int, e: int, g: int, fork: int) -> None:
    _gain_fork(m, w, p, t, e, g, fork)


def _receive_accepted(m: ReferenceModel, w: World, p: int, t: int, source: int, e: int, g: int, fork: int) -> None:
    (parent,) = [sender for sender, _, _, asked in w.asking[p] if asked == fork]
    w.asking[p] = tuple([question for question in w.asking[p] if question[3] != fork])
    _gain_fork(m, w, p, t, e, g, fork)
    w.post(p, parent, ("child accept", e, g, fork, False))


def _receive_child_accept(m: ReferenceModel, w: World, p: int, t: int, source: int, e: int, g: int, fork: int) -> None:
    for index, pin in enumerate(w.pins[p]):
        if pin[4] == fork:  # none when the receiver died since, and the pin with it
            _unpin(m, w, p, t, index)
            return


def _receive_delete(m: ReferenceModel, w: World, p: int, t: int, source: int, e: int, g: int, gone: tuple) -> None:
    unregister(m, w, t, e, gone, source, ())


_RECEIVE = {
    "ref": _receive_ref,
    "grant": _receive_grant,
    "accepted": _receive_accepted,
    "child accept": _receive_child_accept,
    "delete": _receive_delete,
}


def _gain_fork(m: ReferenceModel, w: World, p: int, t: int, e: int, g: int, fork: int) -> None:
    gain(m, w, p, t, e, g, ())
    if fork:
        w.mine[p * m.entries + e] = tuple(sorted((*w.mine[p * m.entries + e], fork)))


def _advance(m: ReferenceModel, w: World, p: int, t: int, source: int) -> None:
    w.pop(source, p)


def _late(m: ReferenceModel, w: World, p: int, t: int, e: int, g: int) -> None:
    acquire(m, w, p, t, e, g, ())


def _answer(m: ReferenceModel, w: World, p: int, t: int, source: int, e: int, g: int, fork: int) -> None:
    w.pop(source, p)
    w.post(p, source, ("accepted", e, g, fork, False))


VERBS = {
    "drop": _drop,
    "create": _create,
    "reserve": _reserve,
    "publish": _publish,
    "fail": _fail,
    "unpin": _unpin,
    "ack": _ack,
    "read": _read,
    "visit": _visit,
    "drain": _drain,
    "advance": _advance,
    "late": _late,
    "answer": _answer,
}
