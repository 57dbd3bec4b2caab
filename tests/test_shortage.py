"""A table without a free entry, while others have let go of what they held in it and have not said so yet.

The clock that sends such deletes at the latest is stopped on all workers: nothing here may wait for it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import ResourceError
from fastref.rref import current_wiring
from fastref.runtime.memory import OwnMemory
from fastref.segments import InstanceLock, run_root
from tests import work
from tests.jobs import Job
from tests.stopping import stopped

# Holders that go by messages: of other hosts, and of this one without a bit.
WAYS = [{"transport": "tcp"}, {"table_bits": 0}]
CAPACITY = 128

Start = Callable[..., Job]

kept: list[rpc.RRef] = []


@pytest.fixture
def start_job(mp_context: ForkServerContext, no_leaks: None) -> Iterator[Start]:
    """Return what starts a job with small tables and no clock."""
    started: list[Job] = []

    def start(world_size: int, **more: Any) -> Job:
        started.append(Job(mp_context, world_size, table_capacity=CAPACITY, **more))
        for rank in range(world_size):
            started[-1].run(set_clock, None, on=rank)
        return started[-1]

    yield start
    try:
        for job in started:
            for rank in range(job.world_size):
                job.run(set_clock, 0.1, on=rank)
            job.check()
            job.close()
    finally:
        for job in started:
            job.kill()


def set_clock(period_s: float | None) -> None:
    current_wiring()._monitor.set_period(period_s)


def keep(references: list[rpc.RRef]) -> None:
    kept.extend(references)


def let_go() -> None:
    kept.clear()
    gc.collect()


def hand_on(to: str, references: list[rpc.RRef]) -> None:
    rpc.rpc_sync(to, keep, args=(references,))


@pytest.mark.parametrize("way", WAYS)
def test_an_owner_without_entries_asks_for_what_others_have_let_go_of(start_job: Start, way: dict[str, Any]) -> None:
    start_job(3, **way).run(hand_out_and_hand_out)


def hand_out_and_hand_out() -> None:
    for _ in range(5):
        # By way of w1, so that w2, who lets go of them, has nothing to say to their owner besides.
        rpc.rpc_sync("w1", hand_on, args=("w2", [rpc.RRef(number) for number in range(40)]))
        rpc.rpc_sync("w1", call_of_another, args=("w2",))


def call_of_another(name: str) -> None:
    rpc.rpc_sync(name, let_go)


@pytest.mark.parametrize("way", WAYS)
def test_an_owner_without_entries_for_remote_asks_for_what_others_have_let_go_of(
    start_job: Start, way: dict[str, Any]
) -> None:
    start_job(3, **way).run(make_and_hand_out)


def make_and_hand_out() -> None:
    for _ in range(5):
        rpc.rpc_sync("w2", keep, args=([rpc.remote("w1", work.echo, args=(number,)) for number in range(40)],))
        rpc.rpc_sync("w2", let_go)
    for number in range(1000):
        assert rpc.remote("w1", work.echo, args=(number,)).to_here() == number


def test_what_a_function_let_go_of_ends_with_the_calls_that_follow(start_job: Start) -> None:
    start_job(2, transport="tcp").run(hand_out_one_by_one)


def hand_out_one_by_one() -> None:
    alive = []
    for _ in range(300):
        assert rpc.rpc_sync("w1", owner_name, args=(rpc.RRef(work.Traced()),)) == "w0"
        alive.append(work.traced_alive())
    # The present one, and those whose deletes are on their way: they come before the answer to the next call.
    assert max(alive) < 32


def owner_name(rref: rpc.RRef) -> str:
    return rref.owner_name()


def test_one_that_is_stopped_delays_the_refusal_for_a_moment(start_job: Start) -> None:
    start_job(3, transport="tcp").run(run_short_beside_a_stopped_worker)


def run_short_beside_a_stopped_worker() -> None:
    pid = rpc.rpc_sync("w2", os.getpid)
    rpc.rpc_sync("w2", keep, args=([rpc.RRef(0)],))
    mine = []
    with stopped(pid), pytest.raises(ResourceError, match=f"all {CAPACITY} entries of the reference table are in use"):
        while len(mine) <= CAPACITY:
            mine.append(rpc.RRef(len(mine)))
            rpc.rpc_sync("w1", keep, args=(mine[-1:],))
    rpc.rpc_sync("w1", let_go)
    rpc.rpc_sync("w2", let_go)


def test_credits_leave_room_for_values(start_job: Start) -> None:
    start_job(2).run(use_up_credits_and_share)


def use_up_credits_and_share() -> None:
    for _ in range(6):
        made = [rpc.remote("w1", work.echo, args=(number,)) for number in range(CAPACITY)]
        made.clear()
        assert rpc.rpc_sync("w1", open_ahead) <= CAPACITY // 2


def open_ahead() -> int:
    return len(current_wiring().credit_of)


@pytest.mark.parametrize("capacity", [4096 * 2, 4096 * 3])
def test_a_table_that_two_threads_make_room_in_at_once_grows(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    lock = InstanceLock(run_root())
    memory = OwnMemory(lock, rpc.RpcBackendOptions(table_capacity=capacity))
    allocate = os.posix_fallocate

    def while_another_does_so_too(*arguments: int) -> None:
        monkeypatch.undo()
        assert memory.extend_table() == 4096 * 2
        allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", while_another_does_so_too)
    assert memory.extend_table() == 4096 * 2
    assert memory.extend_table() == capacity
    assert memory.extend_table() == capacity
    memory.close()
    lock.release()
