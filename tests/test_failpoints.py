"""Kill, stop or delay a worker at every named place: calls are done or end in a typed error, and nothing stays behind.

The places are found by reading the sources, so that a new one is tested from the day it exists.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import fastref
import fastref.rpc as rpc
from fastref._core import arm_failpoints
from fastref.errors import FastrefError, UsageError
from tests import puppets
from tests.puppets import Cell, Ended, Puppet, Troupe, troupe_fixture  # noqa: F401

PACKAGE = Path(fastref.__file__).parent
POINT = re.compile(r"""(?:FR_FAILPOINT\(|\bfailpoint\(b?)["']([a-z_.]+)["']\)""")
# Those that a worker passes before it has joined: they are armed before init_rpc.
STARTING = ("segment.", "rendezvous.")
LEAVING = ("shutdown.",)
ROLES = {"owner": 0, "user": 1, "receiver": 2}
DELAY_OF_WHAT_IS_PASSED_OFTEN = 0.01


def points() -> list[str]:
    """Return the names of all failpoints in the sources."""
    found = set()
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".pyx", ".h", ".py", ".pxd"):
            found.update(POINT.findall(path.read_text()))
    return sorted(found)


POINTS = points()
RUNNING = [point for point in POINTS if not point.startswith(STARTING + LEAVING)]
AT_START = [point for point in POINTS if point.startswith(STARTING)]
AT_END = [point for point in POINTS if point.startswith(LEAVING)]


def test_the_sources_have_failpoints() -> None:
    assert {"ring.reserved", "table.during_reap", "call.running", "slot.writing"} <= set(POINTS)


def test_a_text_that_cannot_be_understood_is_refused() -> None:
    for text in ("nonsense", "a=b", "a=explode:1", "a:kill=1", "=", "x" * 2000):
        with pytest.raises(UsageError, match="FASTREF_FAILPOINTS"):
            arm_failpoints(text)
    assert arm_failpoints("a.b=kill:3;c.d=delay:0.5") == 2
    assert arm_failpoints(None) == 0


# ---- what they do while one of them is hit

ROUNDS = 12


def use_everything(rounds: int) -> dict[str, int]:
    """On the user: make values on the owner, call, fetch, hand on, drop. Count what was done and what failed.

    Only errors that fastref types count as failures; wrong answers and others come out.
    """
    outcomes = {"done": 0, "failed": 0}
    for i in range(rounds):
        for step in (make_and_use, hand_over, call_with_payload, take_from_owner):
            try:
                step(i)
                outcomes["done"] += 1
            except FastrefError:
                outcomes["failed"] += 1
    return outcomes


def make_and_use(i: int) -> None:
    cell = rpc.remote("w0", Cell, (i,))
    assert cell.rpc_sync(timeout=20).get() == i
    assert cell.to_here(timeout=20).value == i
    number = rpc.remote("w0", puppets.echo, (i,))
    assert number.to_here(timeout=20) == i


def hand_over(i: int) -> None:
    cell = rpc.remote("w0", Cell, (i,))
    mine = rpc.RRef(Cell(i))
    future = rpc.rpc_async("w2", add_both, (cell, mine), timeout=20)
    del cell, mine
    assert future.wait() == 2 * i


def add_both(one: rpc.RRef, other: rpc.RRef) -> int:
    return one.rpc_sync(timeout=20).get() + other.to_here(timeout=20).value


def call_with_payload(i: int) -> None:
    data = bytes([i % 256]) * 20_000
    assert rpc.rpc_sync("w0", puppets.echo, (data,), timeout=20) == data
    assert rpc.rpc_async("w2", puppets.echo, (data,), timeout=20).wait() == data


def take_from_owner(i: int) -> None:
    cell = rpc.rpc_sync("w0", puppets.make_reference, (i,), timeout=20)
    assert rpc.rpc_sync("w2", fetch, (cell,), timeout=20) == i


def fetch(cell: rpc.RRef) -> int:
    return cell.to_here(timeout=20).value


def still_right(puppet: Puppet, others: list[Puppet]) -> None:
    """A survivor serves and is served by every other one."""
    for other in others:
        assert puppet.do(rpc.rpc_sync, other.name, puppets.process_id) == other.pid


def settle(survivors: list[Puppet], dead: list[Puppet]) -> None:
    """Nobody is stuck, nothing is held, all leave, and nothing is left of anybody."""
    for puppet in survivors:
        for gone in dead:
            puppet.do(puppets.wait_until_dead, gone.name)
    for puppet in survivors:
        still_right(puppet, survivors)
    for puppet in survivors:
        puppet.do(puppets.drop_all)
    for puppet in survivors:
        puppet.do(puppets.wait_until_entries, 0)
    for puppet in survivors:
        puppet.do(puppets.wait_until_removed)
        figures = puppet.do(puppets.snapshot)
        assert figures["calls"]["pending"] == 0
        assert sum(peer["pins"] for peer in figures["peers"].values()) == 0


def is_alive(puppet: Puppet) -> bool:
    """Look at the process itself: that it has ended reaches its parent's parent later."""
    try:
        return psutil.Process(puppet.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_with_point(troupe: Troupe, point: str, role: str, action: str, **options: Any) -> None:
    crew = troupe.start(3, **options)
    hit, user = crew[ROLES[role]], crew[1]
    user.do(use_everything, 1)
    hit.do(arm_failpoints, f"{point}={action}")
    user.order(use_everything, ROUNDS)
    outcomes = None
    try:
        outcomes = user.outcome()
    except Ended:
        assert user is hit and action.startswith("kill"), f"{user.name} ended, but was not to"
    for puppet in crew:
        if is_alive(puppet):
            try:
                puppet.do(arm_failpoints, None)
            except Ended:
                assert puppet is hit
    for puppet in crew:
        if puppet is not hit or not action.startswith("kill"):
            assert is_alive(puppet), f"{puppet.name} is dead"
        elif not is_alive(puppet):
            puppet.process.join()
            assert puppet.process.exitcode == -signal.SIGKILL
    dead = [puppet for puppet in crew if not is_alive(puppet)]
    survivors = [puppet for puppet in crew if is_alive(puppet)]
    if outcomes is not None and not dead:
        assert outcomes["failed"] == 0, outcomes
    settle(survivors, dead)
    troupe.leave(survivors)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("point", RUNNING)
def test_a_worker_killed_at_any_point_harms_only_its_own_calls(troupe: Troupe, point: str, role: str) -> None:
    run_with_point(troupe, point, role, "kill:3")


@pytest.mark.parametrize("point", RUNNING)
def test_a_worker_stopped_at_any_point_goes_on(troupe: Troupe, point: str) -> None:
    run_with_point(troupe, point, "owner", "stop:0.3")


@pytest.mark.parametrize("point", RUNNING)
def test_a_worker_slowed_down_at_any_point_changes_nothing(troupe: Troupe, point: str) -> None:
    run_with_point(troupe, point, "owner", f"delay:{DELAY_OF_WHAT_IS_PASSED_OFTEN}")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("point", [point for point in RUNNING if point.startswith(("fork.", "delete.", "removal."))])
def test_without_bits_in_the_table_it_is_the_same(troupe: Troupe, point: str, role: str) -> None:
    """One bit: only w0 has one anywhere, and all references of the others go by messages."""
    run_with_point(troupe, point, role, "kill:3", table_bits=1)


# ---- while they start and leave


def join_with_point(name: str, rank: int, job: str, point: str) -> None:
    arm_failpoints(point)
    try:
        puppets.join_job(name, rank, 2, job, {"rpc_timeout": 20})
    finally:
        arm_failpoints(None)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", AT_START)
def test_a_worker_killed_while_it_starts_leaves_the_place_to_another(troupe: Troupe, point: str, rank: int) -> None:
    crew = [troupe.hire("w0"), troupe.hire("w1")]
    hit, other = crew[rank], crew[1 - rank]
    hit.order(join_with_point, hit.name, rank, troupe.job, f"{point}=kill:1")
    other.order(puppets.join_job, other.name, 1 - rank, 2, troupe.job, {"rpc_timeout": 20})
    with pytest.raises(Ended):
        hit.outcome()
    hit.process.join()
    heir = troupe.hire(hit.name)
    heir.order(puppets.join_job, hit.name, rank, 2, troupe.job, {"rpc_timeout": 20})
    try:
        other.outcome()
    except FastrefError as error:  # it had met the dead already
        assert hit.name in str(error)
        other.order(puppets.join_job, other.name, 1 - rank, 2, troupe.job, {"rpc_timeout": 20})
        other.outcome()
    heir.outcome()
    assert other.do(rpc.rpc_sync, hit.name, puppets.process_id) == heir.pid
    troupe.leave([heir, other])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", AT_START)
def test_a_worker_stopped_while_it_starts_is_waited_for(troupe: Troupe, point: str, rank: int) -> None:
    crew = [troupe.hire("w0"), troupe.hire("w1")]
    for which, puppet in enumerate(crew):
        puppet.order(join_with_point, puppet.name, which, troupe.job, f"{point}=stop:0.3" if which == rank else "")
    for puppet in crew:
        puppet.outcome()
    still_right(crew[0], crew)
    troupe.leave(crew)


@pytest.mark.parametrize("action", ["kill:1", "stop:0.3"])
@pytest.mark.parametrize("point", AT_END)
def test_a_worker_hit_while_it_leaves_keeps_nobody(troupe: Troupe, point: str, action: str) -> None:
    crew = troupe.start(3)
    crew[1].do(use_everything, 1)
    crew[2].do(arm_failpoints, f"{point}={action}")
    for puppet in crew:
        puppet.order(rpc.shutdown)
    for puppet in crew[:2]:
        puppet.outcome()
    if action.startswith("kill"):
        with pytest.raises(Ended):
            crew[2].outcome()
    else:
        crew[2].outcome()


def test_the_environment_arms_failpoints() -> None:
    """Programs that are not told by a test in any other way."""
    environment = {**os.environ, "FASTREF_FAILPOINTS": "ring.reserved=kill:1;call.running=delay:0.1"}
    code = "from fastref._core import arm_failpoints; import fastref"
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
    environment["FASTREF_FAILPOINTS"] = "nonsense"
    result = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, capture_output=True, text=True)
    assert result.returncode != 0
    assert "nonsense" in result.stderr
