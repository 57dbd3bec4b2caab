"""No call runs past its deadline by more than a second, whatever happens to the one it is for."""

from __future__ import annotations

import random
import time

import pytest

import fastref.rpc as rpc
from fastref._core import arm_failpoints
from fastref.errors import FastrefError
from tests import puppets
from tests.gates.figures import full, percentile, tell
from tests.puppets import Cell, Troupe, troupe_fixture  # noqa: F401
from tests.test_failpoints import RUNNING

pytestmark = [pytest.mark.gates, pytest.mark.timeout(3600)]

DEADLINE_S = 0.5
GRACE_S = 1.0
CALLS_PER_ROUND = 100


def call_with_deadline(name: str, count: int, seed: int) -> list[float]:
    """Call in every way; return by how many seconds each call ran past its deadline (negative: it did not)."""
    rng = random.Random(seed)
    over_s = []
    for i in range(count):
        kind = rng.randrange(5)
        started = time.monotonic()
        try:
            if kind == 0:
                rpc.rpc_sync(name, puppets.echo, (i,), timeout=DEADLINE_S)
            elif kind == 1:
                rpc.rpc_async(name, puppets.echo, (b"x" * 30_000,), timeout=DEADLINE_S).wait()
            elif kind == 2:
                rpc.remote(name, Cell, (i,), timeout=DEADLINE_S).to_here(timeout=DEADLINE_S)
                started += DEADLINE_S  # two waits, each with its own deadline
            elif kind == 3:
                rpc.rpc_sync(name, puppets.sleep, (10 * DEADLINE_S,), timeout=0.05)
                raise AssertionError("it came back before it was over")
            else:
                rpc.remote(name, Cell, (i,), timeout=DEADLINE_S).rpc_sync(timeout=DEADLINE_S).get()
                started += DEADLINE_S
        except FastrefError:
            pass
        over_s.append(time.monotonic() - started - DEADLINE_S)
    return over_s


def test_ten_thousand_calls_among_faults_end_in_time(troupe: Troupe) -> None:
    rng = random.Random(5)
    over_s: list[float] = []
    while len(over_s) < full(10_000):
        w0, victim = troupe.start(2, job=f"{troupe.job}-{len(over_s)}", num_worker_threads=64)
        fault = rng.choice(["kill", "stop", "point"])
        if fault == "point":
            action = rng.choice(["kill:5", "stop:0.3", "delay:0.02"])
            victim.do(arm_failpoints, f"{rng.choice(RUNNING)}={action}")
        w0.order(call_with_deadline, "w1", CALLS_PER_ROUND, rng.getrandbits(32))
        time.sleep(rng.uniform(0.05, 0.5))
        if fault == "stop":
            victim.stop()
            time.sleep(1.0)
            victim.go_on()
            time.sleep(0.3)
        if victim.process.is_alive():
            victim.kill()
        over_s += w0.outcome()
        troupe.leave([w0])
        assert w0.end() == 0
    tell("deadlines", calls=len(over_s), p99_over_s=round(percentile(over_s, 99), 3), max_over_s=round(max(over_s), 3))
    assert max(over_s) <= GRACE_S
