"""References under load and faults: none lost, none left, no memory either."""

from __future__ import annotations

import gc
import os
import random
import time
from typing import Any

import psutil
import pytest

import fastref.rpc as rpc
from fastref.errors import CallTimeout
from tests import puppets, test_fork, test_stress
from tests.gates.figures import full, tell
from tests.puppets import Cell, Troupe, troupe_fixture  # noqa: F401

pytestmark = [pytest.mark.gates, pytest.mark.timeout(3600)]

DRIFT = 0.01  # of the resident memory


@pytest.mark.parametrize("table_bits", [61, 2])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_and_nothing_is_left_over_many_jobs(troupe: Troupe, seed: int, table_bits: int) -> None:
    rounds = full(30)
    total = test_stress.run_rounds(troupe, seed, rounds, size=6, seconds=3.0, kills=2, table_bits=table_bits)
    tell("stress", seed=seed, table_bits=table_bits, rounds=rounds, steps=sum(total.values()))


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("this cannot be sent")


def fail_in_some_way(rng: random.Random, cell: rpc.RRef) -> None:
    """One of the faults that a program can make; each with a reference on board."""
    kind = rng.randrange(4)
    try:
        if kind == 0:
            rpc.rpc_sync("w2", take_and_raise, (cell,))
        elif kind == 1:
            rpc.rpc_sync("w2", puppets.echo, ((cell, Unpicklable()),))
        elif kind == 2:
            rpc.rpc_sync("w2", take_slowly, (cell, 0.005), timeout=0.001)
        else:
            rpc.remote("w1", take_and_raise, (cell,)).to_here()
    except (ValueError, CallTimeout):
        return
    raise AssertionError(f"fault {kind} was none")


def take_and_raise(cell: rpc.RRef) -> None:
    raise ValueError("on purpose")


def take_slowly(cell: rpc.RRef, delay_s: float) -> None:
    time.sleep(delay_s)


def take_and_give_back(cell: rpc.RRef) -> rpc.RRef:
    return cell


def run_cycles(seed: int, count: int) -> int:
    """Make, hand on, take back, drop; one in a hundred with a fault."""
    rng = random.Random(seed)
    faults = 0
    for i in range(count):
        cell = rpc.remote("w1", Cell, (i,))
        if rng.random() < 0.01:
            fail_in_some_way(rng, cell)
            faults += 1
        elif i % 2:
            cell = rpc.rpc_sync("w2", take_and_give_back, (cell,))
        else:
            rpc.rpc_async("w2", puppets.echo, (cell,)).wait()
        if i % 16 == 0:
            assert cell.rpc_sync().get() == i
    return faults


def resources() -> dict[str, int]:
    gc.collect()
    process = psutil.Process()
    return {"memory": process.memory_info().rss, "descriptors": process.num_fds(), "threads": process.num_threads()}


def test_a_hundred_thousand_references_come_and_go_without_a_trace(troupe: Troupe) -> None:
    crew = troupe.start(3)
    crew[0].do(run_cycles, 0, full(20_000), patience_s=600)
    for puppet in crew:
        puppet.do(puppets.wait_until_entries, 0)
    before = [puppet.do(resources) for puppet in crew]
    started = time.monotonic()
    faults = crew[0].do(run_cycles, 1, full(100_000), patience_s=3000)
    seconds = time.monotonic() - started
    for puppet in crew:
        puppet.do(puppets.wait_until_entries, 0)
    after = [puppet.do(resources) for puppet in crew]
    drifts = [now["memory"] / then["memory"] - 1 for then, now in zip(before, after, strict=True)]
    tell(
        "cycles",
        count=full(100_000),
        faults=faults,
        us_each=round(1e6 * seconds / full(100_000), 1),
        drift_percent=[round(100 * d, 2) for d in drifts],
    )
    assert max(drifts) < DRIFT
    for then, now in zip(before, after, strict=True):
        assert now["descriptors"] == then["descriptors"]
        assert now["threads"] <= then["threads"] + 1
    troupe.leave(crew)


def fork_many(count: int) -> None:
    for _ in range(count):
        test_fork.drop_in_child()


def test_a_thousand_children_harm_nothing(troupe: Troupe) -> None:
    """In jobs of 200 children each: a process of a test lives for three minutes at most."""
    for number in range(full(10)):
        w0, w1 = test_fork.start_pair(troupe, job=f"{troupe.job}-{number}")
        before = w0.do(test_fork.words), w1.do(test_fork.words)
        w0.do(fork_many, 100, patience_s=180)
        assert (w0.do(test_fork.words), w1.do(test_fork.words)) == before
        w0.do(test_fork.everything_still_works)
        assert w0.do(test_fork.call_while_forking, 100, patience_s=180) > 0
        w0.do(test_fork.everything_still_works)
        test_fork.let_go(w0, w1)
        for puppet in (w0, w1):
            puppet.kill()
    tell("children", count=200 * full(10))


def test_functions_run_at_most_once(troupe: Troupe) -> None:
    """Callers that are killed, interrupted and out of time; every request has a name of its own."""
    rng = random.Random(3)
    for round_number in range(full(20)):
        callee, *callers = troupe.start(6, job=f"{troupe.job}-{round_number}")
        for caller in callers:
            caller.order(ask_under_pressure, os.urandom(4).hex(), 2.0)
        for victim in callers[:2]:
            time.sleep(rng.uniform(0.1, 0.6))
            victim.kill()
        sent = sum(caller.outcome() for caller in callers[2:])
        assert not callee.do(test_stress.requests_run_twice)
        assert callee.do(requests_run) >= sent
        troupe.leave([callee, *callers[2:]])
        for puppet in (callee, *callers[2:]):
            assert puppet.end() == 0


def requests_run() -> int:
    return sum(test_stress._requests.values())


def ask_under_pressure(name: str, seconds: float) -> int:
    """Send requests of which some run out of time; return how many were answered."""
    answered = number = 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        number += 1
        try:
            rpc.rpc_sync("w0", test_stress.note_request, (f"{name}-{number}",), timeout=0.0002 if number % 3 else 10)
            answered += 1
        except CallTimeout:
            continue
    return answered
