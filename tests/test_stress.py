"""Workers that make, call, hand on, drop and die at random, watched by an oracle.

Each worker knows what every reference in its pool must say and in which process the value lives, so that it can judge
every outcome on the spot: a wrong value or an untyped error is reported at once, an error that names a worker is right
only if the test killed that very process.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import FastrefError, ReferenceLost, WorkerDied
from fastref.rref import current_wiring
from tests import puppets
from tests.puppets import Puppet, Troupe, troupe_fixture  # noqa: F401

POOL_LIMIT = 40


@dataclass
class Held:
    """A reference, and what is known of its value."""

    reference: rpc.RRef
    secret: int
    owner_pid: int


@dataclass
class Findings:
    """What one worker saw."""

    done: Counter = field(default_factory=Counter)
    named_dead: set[int] = field(default_factory=set)
    lost: int = 0
    wrong: list[str] = field(default_factory=list)


class Secret:
    """A value that says what it is, and that must not be asked twice by one request."""

    def __init__(self, secret: int) -> None:
        self.secret = secret

    def tell(self, request: str) -> tuple[int, int]:
        note_request(request)
        return self.secret, os.getpid()


_pool: list[Held] = []
_pool_lock = threading.Lock()
_requests: Counter = Counter()


def note_request(request: str) -> None:
    _requests[request] += 1


def take(held: Held) -> int:
    """Called by others: keep one more reference."""
    with _pool_lock:
        _pool.append(held)
        return len(_pool)


def make_here(secret: int) -> Held:
    """Called by others: make a value that lives here and give it away."""
    return Held(rpc.RRef(Secret(secret)), secret, os.getpid())


def look(held: Held, request: str) -> tuple[int, int]:
    """Called by others: use a reference that comes with the call and goes with it."""
    return held.reference.rpc_sync().tell(request)


def work_at_random(seed: int, seconds: float, names: list[str]) -> Findings:
    """Do random things for a while; the oracle speaks through the findings."""
    rng = random.Random(seed)
    me = rpc.get_worker_info().name
    pids = pids_of(names)
    findings = Findings()
    number = 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        number += 1
        request = f"{seed}-{me}-{number}"
        step = rng.choice(STEPS)
        try:
            step(rng, names, pids, request, findings)
            findings.done[step.__name__] += 1
        except WorkerDied as error:
            findings.named_dead.add(error.pid)
        except ReferenceLost:
            findings.lost += 1
        except FastrefError as error:
            findings.wrong.append(f"{step.__name__} {request}: {type(error).__name__}: {error}")
        except AssertionError as error:
            findings.wrong.append(f"{step.__name__} {request}: {error}")
    return findings


def pids_of(names: list[str]) -> dict[str, int]:
    return {name: current_wiring().peers[rpc.get_worker_info(name).id].pid for name in names}


def pick(rng: random.Random) -> Held | None:
    with _pool_lock:
        return rng.choice(_pool) if _pool else None


def make(rng: random.Random, names: list[str], pids: dict[str, int], request: str, findings: Findings) -> None:
    owner, secret = rng.choice(names), rng.getrandbits(40)
    if rng.random() < 0.5:
        held = Held(rpc.remote(owner, Secret, (secret,)), secret, pids[owner])
    else:
        held = rpc.rpc_sync(owner, make_here, (secret,))
    take(held)
    with _pool_lock:
        while len(_pool) > POOL_LIMIT:
            _pool.pop(rng.randrange(len(_pool)))


def fetch(rng: random.Random, names: list[str], pids: dict[str, int], request: str, findings: Findings) -> None:
    if (held := pick(rng)) is not None:
        try:
            secret = held.reference.to_here().secret
        except WorkerDied as error:
            assert error.pid == held.owner_pid, f"names pid {error.pid}, the owner is {held.owner_pid}"
            forget(held)
            raise
        assert secret == held.secret, f"value {secret}, expected {held.secret}"


def ask(rng: random.Random, names: list[str], pids: dict[str, int], request: str, findings: Findings) -> None:
    if (held := pick(rng)) is not None:
        answer = held.reference.rpc_sync().tell(request)
        assert answer == (held.secret, held.owner_pid), f"{answer}, expected {held.secret, held.owner_pid}"


def hand_on(rng: random.Random, names: list[str], pids: dict[str, int], request: str, findings: Findings) -> None:
    if (held := pick(rng)) is not None:
        to = rng.choice(names)
        if rng.random() < 0.5:
            assert rpc.rpc_sync(to, take, (held,)) > 0
        else:
            future = rpc.rpc_async(to, take, (held,))
            forget(held)  # at once: only the message holds it now
            assert future.wait() > 0


def have_others_look(
    rng: random.Random, names: list[str], pids: dict[str, int], request: str, findings: Findings
) -> None:
    if (held := pick(rng)) is not None:
        answer = rpc.rpc_sync(rng.choice(names), look, (held, request))
        assert answer == (held.secret, held.owner_pid), f"{answer}, expected {held.secret, held.owner_pid}"


def drop(rng: random.Random, names: list[str], pids: dict[str, int], request: str, findings: Findings) -> None:
    with _pool_lock:
        if _pool:
            _pool.pop(rng.randrange(len(_pool)))


def echo(rng: random.Random, names: list[str], pids: dict[str, int], request: str, findings: Findings) -> None:
    data = rng.randbytes(rng.choice([0, 10, 300, 5000, 100_000]))
    assert rpc.rpc_sync(rng.choice(names), puppets.echo, (data,)) == data, "another answer"


def forget(held: Held) -> None:
    with _pool_lock:
        if held in _pool:
            _pool.remove(held)


STEPS = [make, make, fetch, ask, hand_on, hand_on, have_others_look, drop, drop, echo]


def check_pool(dead: set[int]) -> list[str]:
    """Look at every reference once more: those of the living must answer, whoever passed them and died."""
    wrong = []
    with _pool_lock:
        pool = list(_pool)
    for held in pool:
        try:
            secret = held.reference.to_here().secret
            if secret != held.secret:
                wrong.append(f"{held.reference}: {secret}, not {held.secret}")
        except WorkerDied as error:
            if held.owner_pid not in dead or error.pid != held.owner_pid:
                wrong.append(f"{held.reference} of pid {held.owner_pid}: {error}")
        except FastrefError as error:
            wrong.append(f"{held.reference} of pid {held.owner_pid}: {type(error).__name__}: {error}")
    return wrong


def drop_pool() -> None:
    with _pool_lock:
        _pool.clear()


def requests_run_twice() -> list[str]:
    return [request for request, count in _requests.items() if count > 1]


def run_round(
    troupe: Troupe, crew: list[Puppet], rng: random.Random, seconds: float, kills: int, job: str, **options: Any
) -> Counter:
    """One job: everybody works, some are killed, the rest ends with empty tables. Returns what was done, by kind."""
    troupe.join(crew, job, **options)
    names = [puppet.name for puppet in crew]
    for puppet in crew:
        puppet.order(work_at_random, rng.getrandbits(32), seconds, names)
    victims = rng.sample(crew, kills)
    moments = sorted(rng.uniform(0.1, 0.9) * seconds for _ in victims)
    started = time.monotonic()
    for moment, victim in zip(moments, victims, strict=True):
        time.sleep(max(0.0, started + moment - time.monotonic()))
        victim.kill()
    dead = {victim.pid for victim in victims}
    survivors = [puppet for puppet in crew if puppet not in victims]
    total: Counter = Counter()
    for puppet in survivors:
        findings = puppet.outcome()
        assert not findings.wrong, f"{puppet.name}: {findings.wrong[:5]}"
        assert findings.named_dead <= dead, f"{puppet.name} calls {findings.named_dead - dead} dead, who live"
        assert not findings.lost or dead
        total += findings.done
    for puppet in survivors:
        assert not (wrong := puppet.do(check_pool, dead)), f"{puppet.name}: {wrong[:5]}"
        assert not puppet.do(requests_run_twice)
    for puppet in survivors:
        puppet.do(drop_pool)
    for puppet in survivors:
        puppet.do(puppets.wait_until_entries, 0)
    troupe.leave(survivors)
    return total


def run_rounds(
    troupe: Troupe, seed: int, rounds: int, size: int, seconds: float, kills: int, **options: Any
) -> Counter:
    """Several jobs after each other: survivors join again, those killed are replaced."""
    rng = random.Random(seed)
    crew: list[Puppet] = []
    total: Counter = Counter()
    for which in range(rounds):
        crew = [puppet for puppet in crew if puppet.process.is_alive()]
        crew += [troupe.hire("") for _ in range(size - len(crew))]
        rng.shuffle(crew)
        for rank, puppet in enumerate(crew):
            puppet.name = f"w{rank}"
        total += run_round(troupe, crew, rng, seconds, kills, f"{troupe.job}-{which}", **options)
    return total


@pytest.mark.parametrize("kills", [0, 2])
@pytest.mark.parametrize("table_bits", [61, 2])
def test_no_reference_is_lost_and_none_is_left_whatever_happens(troupe: Troupe, kills: int, table_bits: int) -> None:
    total = run_rounds(troupe, seed=7, rounds=2, size=4, seconds=1.5, kills=kills, table_bits=table_bits)
    assert set(total) == {step.__name__ for step in STEPS}
