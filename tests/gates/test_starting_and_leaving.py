"""Joining wrongly is told at once to everybody; leaving works in any order, at any time."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

import fastref.rpc as rpc
from fastref.api import Session
from fastref.errors import CallTimeout
from tests import puppets
from tests.gates.figures import full, percentile, tell
from tests.jobs import wait_until_clean
from tests.misconfigured import CASES, check, free_port, play, prepared
from tests.proxied import hand_references_round
from tests.puppets import Ended, Troupe, troupe_fixture  # noqa: F401

pytestmark = [pytest.mark.gates, pytest.mark.timeout(3600)]

TOLD_S = 5.0
SHUTDOWN_S = 5.0
GRACE_S = 1.0


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, case in CASES.items() for method in case.methods]
)
def test_a_misconfigured_job_fails_everywhere_within_five_seconds(
    troupe: Troupe, tmp_path: Path, name: str, method: str
) -> None:
    case = prepared(CASES[name], tmp_path)
    _, outcomes = play(troupe, case.parts, method, (troupe.job, free_port(), tmp_path))
    seconds = check(case, outcomes)
    tell(f"misconfigured {name} {method}", seconds=round(seconds, 2))
    assert seconds <= TOLD_S


def leave_in_some_way(seed: int) -> tuple[float, str]:
    """Leave as programs do; how long it took and what came of it."""
    rng = random.Random(seed)
    started = time.monotonic()
    how = rng.choice(["graceful", "graceful", "graceful", "abrupt", "twice", "threads", "after_error"])
    time.sleep(rng.choice([0, 0, rng.uniform(0, 0.2)]))
    try:
        if how == "abrupt":
            rpc.shutdown(graceful=False)
        elif how == "threads":
            threads = [threading.Thread(target=shut_down_quietly) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        elif how == "after_error":
            with Session():
                raise KeyError(how)
        else:
            rpc.shutdown(timeout=SHUTDOWN_S)
            if how == "twice":
                rpc.shutdown(timeout=SHUTDOWN_S)
    except (CallTimeout, KeyError) as error:
        return time.monotonic() - started, type(error).__name__
    return time.monotonic() - started, how


def start_call(to: str) -> None:
    """Leave a call under way."""
    rpc.rpc_async(to, puppets.sleep, (0.05,))


def shut_down_quietly() -> None:
    try:
        rpc.shutdown(timeout=SHUTDOWN_S)
    except CallTimeout:
        return


def test_a_thousand_jobs_end_in_a_thousand_ways(troupe: Troupe) -> None:
    rng = random.Random(11)
    slowest_s: list[float] = []
    crew: list[puppets.Puppet] = []
    for number in range(full(1000)):
        crew = [puppet for puppet in crew if puppet.process.is_alive()]
        crew += [troupe.hire("") for _ in range(4 - len(crew))]
        for rank, puppet in enumerate(crew):
            puppet.name = f"w{rank}"
        troupe.join(crew, job=f"{troupe.job}-{number}")
        crew[rng.randrange(4)].do(start_call, f"w{rng.randrange(4)}")
        for puppet in crew:
            puppet.order(leave_in_some_way, rng.getrandbits(32))
        fate = rng.choice(["nothing", "nothing", "nothing", "kill", "stop"])
        if fate == "kill":
            crew[rng.randrange(4)].kill()
        elif fate == "stop":
            stopped = crew[rng.randrange(4)]
            stopped.stop()
            time.sleep(0.2)
            stopped.go_on()
        for puppet in crew:
            try:
                seconds, _ = puppet.outcome()
            except Ended:
                assert fate == "kill"
                continue
            slowest_s.append(seconds)
    tell("shutdown", jobs=full(1000), p99_s=round(percentile(slowest_s, 99), 3), max_s=round(max(slowest_s), 3))
    assert max(slowest_s) <= SHUTDOWN_S + GRACE_S


@pytest.mark.parametrize(
    ("transport", "size"),
    [*(("", size) for size in (2, 8, 18, 19, 32, 64)), *(("tcp", size) for size in (19, 64))],
)
def test_many_workers_start_talk_all_to_all_and_leave(troupe: Troupe, transport: str, size: int) -> None:
    started = time.monotonic()
    crew = troupe.start(size, transport=transport)
    seconds = time.monotonic() - started
    for puppet in crew:
        puppet.order(talk_to_all, size)
    for puppet in crew:
        assert puppet.outcome() == sorted(other.pid for other in crew)
    if size > 2:  # with 64 workers the last ranks have no bit in each other's tables
        crew[-1].do(hand_references_round, f"w{size - 2}", f"w{size - 3}", 20)
        for puppet in crew[-3:]:
            puppet.do(wait_until_clean)
    leaving = time.monotonic()
    troupe.leave(crew)
    tell(
        "workers",
        transport=transport,
        size=size,
        start_s=round(seconds, 2),
        leave_s=round(time.monotonic() - leaving, 2),
    )


def talk_to_all(size: int) -> list[int]:
    return sorted(rpc.rpc_sync(rank, puppets.process_id) for rank in range(size))


def test_an_exit_without_shutdown_takes_no_time(troupe: Troupe) -> None:
    for number in range(full(50)):
        w0, w1 = troupe.start(2, job=f"{troupe.job}-{number}")
        started = time.monotonic()
        assert w1.end() == 0
        assert time.monotonic() - started < SHUTDOWN_S
        w0.do(puppets.wait_until_dead, "w1")
        troupe.leave([w0])
        assert w0.end() == 0
