"""What may happen to references that go by messages: programs, the network, deaths.

Each step calls the shipped rules (`OwnerForks`, `UserForks`, `Removal`, `SeenNumbers`) for what they decide, and does
around them what the runtime does: handles, pins, marks, messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastref.protocol import forks, removal
from fastref.protocol.seen import SeenNumbers
from tests.model.forks_world import CUT, DEAD, LIVE, NAMES, OWNER, ForksWorld, Message
from tests.model.shipped import freeze, perform

if TYPE_CHECKING:
    from tests.model.forks import ForksModel

__all__ = ["VERBS", "deaths", "network", "programs"]

Action = tuple
PROGRAM, PROGRESS = range(2)
"""Threads of the owner: one hands references on, the other acts on messages."""


# ---- what may happen


def programs(m: ForksModel, w: ForksWorld, p: int) -> Iterator[Action]:
    """Yield what a process may do by itself."""
    busy = p == OWNER and w.marks[PROGRAM]
    for e in range(m.entries):
        if w.handles[w.cell(p, e)] and not busy:
            yield "drop", p, e
            for target in m.everybody:
                if m.may(w, ("send", p, target)) and _may_send(m, w, p, target):
                    yield "send", p, target, e
    for e, s in w.gone[p]:
        yield "tell", p, e, s
    if p == OWNER:
        for thread in (PROGRAM, PROGRESS):
            if w.marks[thread]:
                yield "mark", thread
        for e in range(m.entries):
            if w.used[e] and not w.marked[e] and not w.count(OWNER, e):
                yield "destroy", e
            if not w.used[e] and m.may(w, "open"):
                yield "open", e


def network(m: ForksModel, w: ForksWorld) -> Iterator[Action]:
    """Yield what may happen to messages."""
    for message in w.network[0]:
        if message.lost:
            if w.life[message.source] != DEAD:
                yield "resend", message
            continue
        if m.may(w, "lose") and w.life[message.source] != DEAD:
            yield "lose", message
        if message.target == OWNER and w.marks[PROGRESS]:
            continue
        if w.reads(message.target, message.source) or not m.on("closed_links"):
            yield "deliver", message
            if m.may(w, "repeat"):
                yield "repeat", message
            if not m.on("act_before_ack") and _ack_pin(w, message):
                yield "ack", message


def deaths(m: ForksModel, w: ForksWorld, p: int) -> Iterator[Action]:
    """Yield what a process may do about deaths, and whether it may die."""
    for other in m.everybody:
        if other == p:
            continue
        if not w.takes_for_dead(p, other):
            if w.life[other] != LIVE or w.life[p] == CUT:
                yield "notice", p, other
        elif not w.drained[p] >> other & 1 and not (
            m.on("answer_when_accepted") and perform(w.user_forks[p], "waits_for_child_of", other)[1]
        ):
            yield "drained", p, other
    if w.life[p] == LIVE:
        if m.may(w, "kill") and p in m.scenario.mortal:
            yield "kill", p
        if m.may(w, "cut"):
            yield "cut", p


def _may_send(m: ForksModel, w: ForksWorld, p: int, target: int) -> bool:
    return not w.takes_for_dead(p, target) or (p == OWNER and not m.on("nothing_for_the_dead"))


# ---- programs


def _drop(m: ForksModel, w: ForksWorld, p: int, e: int) -> None:
    w.handles[w.cell(p, e)] -= 1
    _lower(w, p, e)


def _lower(w: ForksWorld, p: int, e: int) -> None:
    if p != OWNER and not w.count(p, e):
        w.gone[p] |= {(e, w.held[w.cell(p, e)])}


def _send(m: ForksModel, w: ForksWorld, p: int, target: int, e: int) -> None:
    m.spend(w, ("send", p, target))
    s = w.held[w.cell(p, e)]
    w.minted[p] += 1
    fork = p * 100 + w.minted[p]
    numbers = dict(w.sent[p])
    numbers[target] = number = numbers.get(target, 0) + 1
    w.sent[p] = tuple(sorted(numbers.items()))
    if p == OWNER:
        if m.on("register_before_send"):
            _owner_decides(m, w, PROGRAM, "made", m.entry(e, s), fork, target)
        if w.marks[PROGRAM]:
            w.marks[PROGRAM] += (Message(p, target, "ref", (e, s, fork, number)),)
            return  # it leaves when the mark is set
    elif target == OWNER:
        if m.on("pin_until_acknowledged"):
            w.pins[p] |= {("ack", target, e, s, fork)}
    elif m.on("pin_until_confirmed"):
        w.pins[p] |= {("child", target, e, s, fork)}
    w.post(p, target, "ref", e, s, fork, number)


def _tell(m: ForksModel, w: ForksWorld, p: int, e: int, s: int) -> None:
    w.gone[p] -= {(e, s)}
    if w.count(p, e) and m.on("delete_what_is_not_counted"):
        return  # it came back meanwhile
    _user_decides(m, w, p, "let_go", OWNER, m.entry(e, s))


def _mark(m: ForksModel, w: ForksWorld, thread: int) -> None:
    for decided in w.marks[thread]:
        if isinstance(decided, Message):
            w.post(decided.source, decided.target, decided.kind, *decided.body)
        else:
            _perform_marks(w, (decided,))
    w.marks[thread] = ()


def _destroy(m: ForksModel, w: ForksWorld, e: int) -> None:
    w.used[e] = False


def _open(m: ForksModel, w: ForksWorld, e: int) -> None:
    m.spend(w, "open")
    w.used[e] = True
    w.serial[e] += 1
    w.handles[w.cell(OWNER, e)] += 1
    w.held[w.cell(OWNER, e)] = w.serial[e]


# ---- what the shipped rules decide


def _owner_decides(m: ForksModel, w: ForksWorld, thread: int, method: str, *args: object) -> None:
    w.owner_forks[0], commands = perform(w.owner_forks[0], method, *args)
    marks = tuple(command for command in commands if not isinstance(command, forks.Accept))
    if m.on("mark_as_decided"):
        _perform_marks(w, marks)
    else:
        w.marks[thread] += marks
    for command in commands:
        if isinstance(command, forks.Accept):
            w.post(OWNER, command.holder, "accept", command.fork, command.ok)


def _perform_marks(w: ForksWorld, marks: tuple) -> None:
    for command in marks:
        w.marked[command.index] = isinstance(command, forks.Mark)


def _user_decides(m: ForksModel, w: ForksWorld, p: int, method: str, *args: object) -> None:
    w.user_forks[p], commands = perform(w.user_forks[p], method, *args)
    for command in commands:
        if isinstance(command, forks.Request):
            w.post(p, OWNER, "request", m.truth(w, p, command.entry), command.fork, command.number)
        elif isinstance(command, forks.ChildAccept):
            w.post(p, command.parent, "child accept", command.fork)
        elif isinstance(command, forks.Delete):
            w.post(p, OWNER, "delete", command.entry, command.forks)
        elif w.life[p] == LIVE:
            w.broken[0] = f"{NAMES[p]} has lost a reference that it took"


def _removal_decides(m: ForksModel, w: ForksWorld, p: int, event: removal.Event) -> None:
    w.removal[p], commands = perform(w.removal[p], "handle", event)
    for command in commands:
        if isinstance(command, removal.SendAsk):
            # It comes at once: the answer may be as late as an answer to a late question.
            if w.reads(command.to, p):
                _removal_decides(m, w, command.to, removal.Ask(command.dead, p))
        elif isinstance(command, removal.SendDone):
            w.post(p, command.to, "done", command.dead)
        elif isinstance(command, removal.Clear) and m.on("everybody_drains_first"):
            _clear(m, w, p, command.dead)


def _clear(m: ForksModel, w: ForksWorld, p: int, dead: int) -> None:
    if p == OWNER and m.on("forks_go_with_holders"):
        _owner_decides(m, w, PROGRESS, "holder_lost", dead)
    if m.on("children_until_removed"):
        _let_go_of_pins(w, p, dead, "child")


def _let_go_of_pins(w: ForksWorld, p: int, target: int, kind: str) -> None:
    for pin in sorted(w.pins[p]):
        if pin[:2] == (kind, target):
            w.pins[p] -= {pin}
            _lower(w, p, pin[2])


# ---- messages


def _deliver(m: ForksModel, w: ForksWorld, message: Message) -> None:
    """It arrives, is acted on and acknowledged, and the acknowledgement comes."""
    w.settle(message)
    _act(m, w, message)
    _acknowledge(w, message)


def _repeat(m: ForksModel, w: ForksWorld, message: Message) -> None:
    """It is acted on, and another copy is still under way, or will be: the acknowledgement was lost."""
    m.spend(w, "repeat")
    _act(m, w, message)


def _ack(m: ForksModel, w: ForksWorld, message: Message) -> None:
    """It is acknowledged before it is acted on."""
    _acknowledge(w, message)


def _lose(m: ForksModel, w: ForksWorld, message: Message) -> None:
    m.spend(w, "lose")
    w.settle(message)
    if m.on("send_again"):
        w.network[0] |= {message._replace(lost=True)}


def _resend(m: ForksModel, w: ForksWorld, message: Message) -> None:
    w.settle(message)
    w.network[0] |= {message._replace(lost=False)}


def _ack_pin(w: ForksWorld, message: Message) -> tuple | None:
    if message.kind != "ref" or message.target != OWNER:
        return None
    e, s, fork, _ = message.body
    pin = ("ack", OWNER, e, s, fork)
    return pin if pin in w.pins[message.source] else None


def _acknowledge(w: ForksWorld, message: Message) -> None:
    pin = _ack_pin(w, message)
    if pin:
        w.pins[message.source] -= {pin}
        _lower(w, message.source, pin[2])


def _act(m: ForksModel, w: ForksWorld, message: Message) -> None:
    _ACT[message.kind](m, w, message.source, message.target, *message.body)


def _take(m: ForksModel, w: ForksWorld, source: int, p: int, e: int, s: int, fork: int, number: int) -> None:
    if not _comes_first(w, p, source, number) and m.on("take_once"):
        return
    if p == OWNER and not m.is_open(w, e, s):
        w.broken[0] = f"a reference of {NAMES[source]} came to the owner, and its object was gone"
        return
    cell = w.cell(p, e)
    if w.count(p, e) and w.held[cell] != s:
        w.broken[0] = f"{NAMES[p]} holds entry {e}, and another object of it came"
        return
    w.handles[cell] += 1
    w.held[cell] = s
    if p != OWNER:
        _user_decides(m, w, p, "received", OWNER, m.entry(e, s), fork, source)


def _comes_first(w: ForksWorld, p: int, source: int, number: int) -> bool:
    seen = dict(w.seen[p])
    seen[source], first = perform(seen.get(source) or freeze(SeenNumbers()), "first", number)
    w.seen[p] = tuple(sorted(seen.items()))
    return first


def _requested(m: ForksModel, w: ForksWorld, source: int, p: int, name: tuple, fork: int, number: int) -> None:
    e, s = name
    alive = m.is_open(w, e, s)
    before = perform(w.owner_forks[0], "total")[1]
    _owner_decides(m, w, PROGRESS, "requested", m.entry(e, s), fork, source, number, alive)
    if perform(w.owner_forks[0], "total")[1] > before and not w.there(e, s):
        w.broken[0] = f"a reference of {NAMES[source]} has become another object"


def _accepted(m: ForksModel, w: ForksWorld, source: int, p: int, fork: int, ok: bool) -> None:
    _user_decides(m, w, p, "accepted", fork, ok)


def _child_accepted(m: ForksModel, w: ForksWorld, source: int, p: int, fork: int) -> None:
    for pin in w.pins[p]:
        if pin[0] == "child" and pin[4] == fork:
            w.pins[p] -= {pin}
            _lower(w, p, pin[2])
            return


def _deleted(m: ForksModel, w: ForksWorld, source: int, p: int, entry: tuple, gone: tuple) -> None:
    _owner_decides(m, w, PROGRESS, "deleted", entry, gone, source)


def _done(m: ForksModel, w: ForksWorld, source: int, p: int, dead: int) -> None:
    _removal_decides(m, w, p, removal.Done(dead, source))


_ACT = {
    "ref": _take,
    "request": _requested,
    "accept": _accepted,
    "child accept": _child_accepted,
    "delete": _deleted,
    "done": _done,
}


# ---- deaths


def _kill(m: ForksModel, w: ForksWorld, p: int) -> None:
    """It leaves what is under way: each message may arrive, or not before its receiver listens no more."""
    m.spend(w, "kill")
    w.life[p] = DEAD
    w.forget(lambda message: message.target != p and not (message.source == p and message.lost))
    # What it had goes with it, so that states that differ in nothing else are one.
    for e in range(m.entries):
        w.handles[w.cell(p, e)] = w.held[w.cell(p, e)] = 0
    w.pins[p] = w.gone[p] = frozenset()
    w.seen[p] = w.sent[p] = ()
    w.user_forks[p] = w.removal[p] = None
    w.minted[p] = w.noticed[p] = w.drained[p] = 0
    if p == OWNER:
        w.owner_forks[0] = None
        w.marks = [(), ()]
        w.used = [False] * m.entries
        w.marked = [False] * m.entries


def _cut(m: ForksModel, w: ForksWorld, p: int) -> None:
    m.spend(w, "cut")
    w.life[p] = CUT


def _notice(m: ForksModel, w: ForksWorld, p: int, dead: int) -> None:
    w.noticed[p] |= 1 << dead
    w.forget(lambda message: not (message.source == p and message.target == dead and message.lost))
    _let_go_of_pins(w, p, dead, "ack")
    if not m.on("children_until_removed"):
        _let_go_of_pins(w, p, dead, "child")
    if dead == OWNER and m.on("owners_death_frees"):
        _user_decides(m, w, p, "owner_lost", OWNER)
    _removal_decides(m, w, p, removal.Died(dead))
    if not m.on("everybody_drains_first"):
        _clear(m, w, p, dead)


def _drained(m: ForksModel, w: ForksWorld, p: int, dead: int) -> None:
    """Nothing more is taken from a dead process: what has not arrived never will."""
    w.drained[p] |= 1 << dead
    if m.on("closed_links"):
        w.forget(lambda message: not (message.source == dead and message.target == p))
    _removal_decides(m, w, p, removal.Drained(dead))


VERBS = {
    "drop": _drop,
    "send": _send,
    "tell": _tell,
    "mark": _mark,
    "destroy": _destroy,
    "open": _open,
    "deliver": _deliver,
    "repeat": _repeat,
    "ack": _ack,
    "lose": _lose,
    "resend": _resend,
    "kill": _kill,
    "cut": _cut,
    "notice": _notice,
    "drained": _drained,
}
