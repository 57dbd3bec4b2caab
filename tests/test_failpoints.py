"""Kill, stop or delay a worker at every named place: calls are done or end in a typed error, and nothing stays behind.

The places are found by reading the sources, so that a new one is tested from the day it exists. Each is tried in every
role that passes it, and a test checks that those roles do pass it. Of the stops and delays a third runs every time, the
rest under the ``gates`` marker.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import fastref
import fastref.rpc as rpc
from fastref._core import arm_failpoints, failpoint_passages
from fastref.errors import FastrefError, RemoteError, ResourceError, UsageError
from tests import puppets
from tests.puppets import Cell, Ended, Puppet, Troupe, troupe_fixture  # noqa: F401

PACKAGE = Path(fastref.__file__).parent
POINT = re.compile(r"""(?:FR_FAILPOINT\(|\bfailpoint\()["']([a-z_.]+)["']\)""")
ROLES = {"owner": 0, "user": 1, "receiver": 2}
ACTIONS = ("kill", "stop:0.3", "delay:0.005")


def points() -> list[str]:
    """Return the names of all failpoints in the sources."""
    found = set()
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".pyx", ".h", ".py", ".pxd"):
            found.update(POINT.findall(path.read_text()))
    return sorted(found)


POINTS = points()
# Passed before a worker has joined: they are armed before init_rpc.
AT_START = [point for point in POINTS if point.startswith(("segment.", "rendezvous."))]
AT_END = [point for point in POINTS if point.startswith("shutdown.")]
# Passed only in groups that workers join and leave: test_dynamic_groups.py.
IN_GROUPS = [point for point in POINTS if point.startswith("group.")]
# Passed when the arena grows, and when what is idle goes: test_arena_files.py.
FILES = [point for point in POINTS if point.startswith("file.")]
# Passed when somebody else has died.
IN_REMOVAL = [point for point in POINTS if point.startswith("removal.") or point == "table.peer_half_removed"]
# Passed only where somebody has no bit in a table, and so holds by messages.
ABROAD = [
    "fork.requested",
    "fork.registered",
    "fork.accepted",
    "fork.parent_unpinned",
    "delete.queued",
    "delete.applied",
]
# Passed only over TCP.
FAR = [point for point in POINTS if point.startswith("tcp.")]
ELSEWHERE = {*AT_START, *AT_END, *IN_GROUPS, *FILES, *IN_REMOVAL, *ABROAD, *FAR}
RUNNING = [point for point in POINTS if point not in ELSEWHERE]
# Passed only where memory is shared.
SHARED = (
    "arena.borrowed",
    "lease.",
    "publish.seen",
    "publish.withdrawn",
    "ring.",
    "segment.mapped",
    "slot.",
    "table.peer_half_removed",
)
# With one bit in each table, w0 has one everywhere: it asks nobody, and tells nobody what it has let go.
NEVER_PASSED = {("fork.requested", "owner"), ("fork.accepted", "owner"), ("delete.queued", "owner")}


def number(*words: str) -> int:
    """Map words to a number that is the same in every process and on every day."""
    return zlib.crc32("-".join(words).encode())


def combinations(of: list[str]) -> list[Any]:
    """Return every point with every role and action; two thirds of what does not kill are gates."""
    found = []
    for point, role, action in itertools.product(of, ROLES, ACTIONS):
        if (point, role) not in NEVER_PASSED:
            rare = action != "kill" and number(point, role, action) % 3
            marks = [pytest.mark.gates] if rare else []
            found.append(pytest.param(point, role, action, marks=[*marks, *where(point)]))
    return found


def where(point: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a place that is not passed over TCP."""
    return [pytest.mark.shared_memory("the place is passed nowhere else")] if point.startswith(SHARED) else []


STARTS = [pytest.param(point, marks=where(point)) for point in AT_START]


def test_the_sources_have_failpoints() -> None:
    assert {"ring.reserved", "table.during_reap", "call.running", "slot.writing"} <= set(POINTS)
    assert set(ABROAD) <= set(POINTS)
    for group in (AT_START, AT_END, FILES, IN_REMOVAL, RUNNING):
        assert group


def test_a_text_that_cannot_be_understood_is_refused() -> None:
    for text in ("nonsense", "a=b", "a=explode:1", "a:kill=1", "=", "x" * 5000):
        with pytest.raises(UsageError, match="FASTREF_FAILPOINTS"):
            arm_failpoints(text)
    assert arm_failpoints("a.b=kill:3;c.d=delay:0.5;e.f=fail:1") == 3
    assert failpoint_passages() == {"a.b": 0, "c.d": 0, "e.f": 0}
    assert arm_failpoints(None) == 0


# ---- what they do while one of them is hit

ROUNDS = 6


def use_everything(rounds: int) -> dict[str, int]:
    """On the user: make values, call, fetch, hand on, drop, and have the others do so. Count what was done and failed.

    Only errors that fastref types count as failures; wrong answers and others come out.
    """
    outcomes = {"done": 0, "failed": 0}
    for i in range(rounds):
        for step in (
            make_and_use,
            hand_over,
            call_with_payload,
            take_from_owner,
            have_others_make,
            have_others_publish,
        ):
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
    for value in (i, bytes([i % 256]) * 6000):  # published in the table, and in a block
        assert rpc.remote("w0", puppets.echo, (value,)).to_here(timeout=20) == value


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
    for to in ("w0", "w2"):  # it is read where it lies
        tensor = torch.full((20_000,), i)
        assert torch.equal(rpc.rpc_sync(to, puppets.echo, (tensor,), timeout=20), tensor)


def take_from_owner(i: int) -> None:
    cell = rpc.rpc_sync("w0", puppets.make_reference, (i,), timeout=20)
    assert rpc.rpc_sync("w2", fetch, (cell,), timeout=20) == i


def fetch(cell: rpc.RRef) -> int:
    return cell.to_here(timeout=20).value


def have_others_make(i: int) -> None:
    for maker, owner, receiver in (("w0", "w2", "w1"), ("w0", "w1", "w2"), ("w2", "w1", "w0"), ("w2", "w0", "w1")):
        assert rpc.rpc_sync(maker, make_for, (owner, receiver, i), timeout=20) == 2 * i


def make_for(owner: str, receiver: str, i: int) -> int:
    """Make a value on ``owner`` and one here, and have ``receiver`` fetch both."""
    there, here = rpc.remote(owner, Cell, (i,)), rpc.RRef(Cell(i))
    return sum(rpc.rpc_sync(receiver, fetch, (cell,), timeout=20) for cell in (there, here))


def have_others_publish(i: int) -> None:
    for reader, owner in (("w0", "w1"), ("w1", "w2"), ("w2", "w0")):
        seen = rpc.rpc_sync(reader, read_versions, (owner, float(i)), timeout=20)
        assert seen == [i, i, i + 1, i, i, i + 1], seen


def read_versions(owner: str, number: float) -> list[float]:
    """Read a value that is published by itself, until a method changes it, and one whose owner publishes it twice."""
    tensor = rpc.remote(owner, torch.full, ((3000,), number))
    seen = [tensor.to_here(timeout=20)[-1].item() for _ in range(2)]
    tensor.rpc_sync(timeout=20).add_(1)
    seen.append(tensor.to_here(timeout=20)[-1].item())
    versions = rpc.rpc_sync(owner, make_version, (number,), timeout=20)
    seen.extend(versions.to_here(timeout=20)[-1].item() for _ in range(2))
    rpc.rpc_sync(owner, make_next_version, (versions,), timeout=20)
    seen.append(versions.to_here(timeout=20)[-1].item())
    return seen


def make_version(number: float) -> rpc.RRef:
    versions = rpc.RRef(torch.full((3000,), number))
    versions.publish()
    return versions


def make_next_version(versions: rpc.RRef) -> None:
    versions.local_value().add_(1)
    versions.publish()


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


def run_with_point(troupe: Troupe, point: str, role: str, action: str, **options: Any) -> None:
    """Use everything while one worker is hit; "kill" is done at one of the first passages.

    For what is passed when somebody dies there is a fourth worker: it holds something of everybody, and is killed.
    """
    crew = troupe.start(4 if point in IN_REMOVAL else 3, **options)
    three, victims = crew[:3], crew[3:]
    hit, user = crew[ROLES[role]], crew[1]
    user.do(use_everything, 1)
    for victim in victims:
        for puppet in three:
            victim.do(puppets.keep_result, puppet.name, rpc.remote, puppet.name, Cell, (0,))
    kills = action == "kill"
    if kills:
        action = f"kill:{1 if victims else 1 + number(point, role) % 3}"
    try:
        hit.do(arm_failpoints, f"{point}={action}")
    except Ended:
        assert kills  # before it could say that it was armed: the end of an earlier call passes the place too
    with contextlib.suppress(Ended):  # its outcome says so
        user.order(use_everything, ROUNDS)
    for victim in victims:
        victim.kill()
    outcomes = None
    try:
        outcomes = user.outcome()
    except Ended:
        assert user is hit and kills, f"{user.name} ended, but was not to"
    # Some places are passed a moment later: references go, and the dead are taken out.
    for puppet in three:
        if puppet is not hit or not kills:
            puppet.do(puppets.wait_until_entries, 0)
            puppet.do(puppets.wait_until_removed)
    if kills:
        hit.process.join(puppets.PATIENCE_S)
        assert hit.process.exitcode == -signal.SIGKILL
    else:
        assert hit.do(failpoint_passages)[point] > 0
        hit.do(arm_failpoints, None)
        assert outcomes is not None
        assert outcomes["failed"] == 0, outcomes
    dead = [*victims, *([hit] if kills else [])]
    survivors = [puppet for puppet in crew if puppet not in dead]
    settle(survivors, dead)
    troupe.leave(survivors)


@pytest.mark.parametrize(("point", "role", "action"), combinations(RUNNING + IN_REMOVAL))
def test_a_worker_hit_at_any_point_harms_only_its_own_calls(troupe: Troupe, point: str, role: str, action: str) -> None:
    run_with_point(troupe, point, role, action)


@pytest.mark.parametrize(
    ("point", "role", "action"),
    combinations(
        [*ABROAD, *(p for p in RUNNING if p.startswith(("fork.", "table."))), "removal.asked", "removal.cleared"]
    ),
)
def test_without_bits_in_the_table_it_is_the_same(troupe: Troupe, point: str, role: str, action: str) -> None:
    """One bit: only w0 has one anywhere, and all references of the others go by messages."""
    run_with_point(troupe, point, role, action, table_bits=1)


@pytest.mark.parametrize(
    ("point", "role", "action"), combinations([*FAR, "call.running", "delete.applied", "removal.asked"])
)
def test_over_tcp_it_is_the_same(troupe: Troupe, point: str, role: str, action: str) -> None:
    run_with_point(troupe, point, role, action, transport="tcp")


# ---- what can fail


def refused(function: Any, *arguments: Any) -> str:
    """Call it on w0, and return what the ResourceError says that it must raise."""
    with pytest.raises(ResourceError) as caught:
        rpc.rpc_sync("w0", function, arguments)
    return ("there: " if isinstance(caught.value, RemoteError) else "here: ") + str(caught.value)


def published_block() -> tuple[bytes, int, int]:
    """Fetch a value too large for the table; return it, and how it was fetched: directly, by message."""
    before = puppets.snapshot()["calls"]
    reference = rpc.remote("w0", puppets.echo, (b"x" * 6000,))
    while not reference.confirmed_by_owner():  # a value that is not there yet is asked for by message
        time.sleep(0.001)
    value = reference.to_here()
    after = puppets.snapshot()["calls"]
    return value, *(after[how] - before[how] for how in ("fetched_directly", "fetched_by_message"))


@pytest.mark.shared_memory("what goes over a connection needs no blocks")
def test_without_memory_for_blocks_what_fits_goes_through_the_ring_and_the_rest_is_refused(troupe: Troupe) -> None:
    crew = owner, user = troupe.start(2)
    for puppet in crew:
        puppet.do(arm_failpoints, "arena.lending=fail:1")
    data = b"x" * 20_000
    assert user.do(rpc.rpc_sync, "w0", puppets.echo, (data,)) == data
    assert user.do(published_block) == (b"x" * 6000, 0, 1)
    assert user.do(refused, puppets.echo, b"x" * (1 << 20)).startswith("here: ")
    assert user.do(refused, bytes, 1 << 20).startswith("there: ")
    for puppet in crew:
        assert puppet.do(failpoint_passages)["arena.lending"] > 0
        puppet.do(arm_failpoints, None)
        assert puppet.do(puppets.snapshot)["arena"]["blocks"] == 0
    assert user.do(published_block) == (b"x" * 6000, 1, 0)
    assert user.do(rpc.rpc_sync, "w0", bytes, (1 << 20,)) == bytes(1 << 20)
    settle(crew, [])
    troupe.leave(crew)


# ---- while they start and leave


def join_with_point(name: str, rank: int, job: str, point: str) -> int:
    """Join with a place armed; return how often it was passed."""
    arm_failpoints(point)
    try:
        puppets.join_job(name, rank, 2, job, {"rpc_timeout": 20})
        return sum(failpoint_passages().values())
    finally:
        arm_failpoints(None)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", STARTS)
def test_a_worker_killed_while_it_starts_leaves_the_place_to_another(troupe: Troupe, point: str, rank: int) -> None:
    crew = [troupe.hire("w0"), troupe.hire("w1")]
    hit, other = crew[rank], crew[1 - rank]
    join_other = (puppets.join_job, other.name, 1 - rank, 2, troupe.job, {"rpc_timeout": 20})
    hit.order(join_with_point, hit.name, rank, troupe.job, f"{point}=kill:1")
    other.order(*join_other)
    with pytest.raises(Ended):
        hit.outcome()
    hit.process.join()
    assert hit.process.exitcode == -signal.SIGKILL
    heir = troupe.hire(hit.name)
    heir.order(puppets.join_job, hit.name, rank, 2, troupe.job, {"rpc_timeout": 20})
    try:
        other.outcome()
    except FastrefError as error:  # it had met the dead
        assert hit.name in str(error)
        other.do(*join_other)
    else:
        if other.do(puppets.snapshot)["peers"][hit.name]["pid"] == hit.pid:  # and all were told that they may begin
            other.do(puppets.wait_until_dead, hit.name)
            other.do(rpc.shutdown)
            other.do(*join_other)
    heir.outcome()
    assert other.do(rpc.rpc_sync, hit.name, puppets.process_id) == heir.pid
    troupe.leave([heir, other])


@pytest.mark.parametrize("action", ACTIONS[1:])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", STARTS)
def test_a_worker_slow_to_start_is_waited_for(troupe: Troupe, point: str, rank: int, action: str) -> None:
    crew = [troupe.hire("w0"), troupe.hire("w1")]
    for which, puppet in enumerate(crew):
        puppet.order(join_with_point, puppet.name, which, troupe.job, f"{point}={action}" if which == rank else "")
    passed = [puppet.outcome() for puppet in crew]
    assert passed[rank] > 0
    still_right(crew[0], crew)
    troupe.leave(crew)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("action", ["kill:1", *ACTIONS[1:]])
@pytest.mark.parametrize("point", AT_END)
def test_a_worker_hit_while_it_leaves_keeps_nobody(troupe: Troupe, point: str, action: str, rank: int) -> None:
    crew = troupe.start(3)
    crew[1].do(use_everything, 1)
    hit = crew[rank]
    hit.do(arm_failpoints, f"{point}={action}")
    for puppet in crew:
        puppet.order(rpc.shutdown)
    for puppet in crew:
        if puppet is not hit:
            puppet.outcome()
    if action == "kill:1":
        with pytest.raises(Ended):
            hit.outcome()
    else:
        hit.outcome()
        assert hit.do(failpoint_passages)[point] > 0


def test_the_environment_arms_failpoints() -> None:
    """Programs that are not told by a test in any other way."""
    environment = {**os.environ, "FASTREF_FAILPOINTS": "ring.reserved=kill:1;call.running=delay:0.1"}
    code = "from fastref._core import arm_failpoints; import fastref"
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
    environment["FASTREF_FAILPOINTS"] = "nonsense"
    result = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, capture_output=True, text=True)
    assert result.returncode != 0
    assert "nonsense" in result.stderr
