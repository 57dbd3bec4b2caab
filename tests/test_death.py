"""Workers that die at any moment: who is told, what goes, and what stays."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import OwnerDied, RemoteError, RendezvousError, WorkerDied
from tests import puppets
from tests.leaks import take_holdings
from tests.puppets import Cell, Troupe, get_through, troupe_fixture  # noqa: F401

PROGRAM_PATIENCE_S = 60.0
SOON_S = 0.3  # for a call to get where it waits

# ---- everyone who waits for the dead, each with what it waits in


def wait_in_sync_call(to: str) -> Any:
    return rpc.rpc_sync(to, puppets.sleep, (100,), timeout=0)


def wait_in_sync_call_with_deadline(to: str) -> Any:
    return rpc.rpc_sync(to, puppets.sleep, (100,), timeout=90)


def wait_in_future(to: str) -> Any:
    return rpc.rpc_async(to, puppets.sleep, (100,)).wait()


def wait_in_wait_all(to: str) -> Any:
    import torch

    return torch.futures.wait_all([rpc.rpc_async(to, puppets.sleep, (100,)) for _ in range(3)])


def wait_in_fetch_of_pending_value(to: str) -> Any:
    return rpc.remote(to, puppets.make_slowly, (100, Cell())).to_here(timeout=0)


def wait_in_method(to: str) -> Any:
    return rpc.remote(to, Cell, (1,)).rpc_sync(timeout=0).get_slowly(100)


def wait_in_async_method(to: str) -> Any:
    return rpc.remote(to, Cell, (1,)).rpc_async().get_slowly(100).wait()


def wait_in_method_of_pending_value(to: str) -> Any:
    return rpc.remote(to, puppets.make_slowly, (100, Cell())).rpc_sync(timeout=0).get()


def wait_for_ring(to: str) -> Any:
    """The peer has been stopped: nobody empties its ring."""
    while not (future := rpc.rpc_async(to, puppets.echo, (b"x" * 2000,))).done():
        pass
    return future.wait()


def wait_for_credits(to: str) -> Any:
    while True:
        rpc.remote(to, puppets.nothing, timeout=0)


def wait_in_nested_call(to: str) -> Any:
    return rpc.rpc_sync("w2", wait_in_sync_call, (to,), timeout=0)


WAITS = [
    wait_in_sync_call,
    wait_in_sync_call_with_deadline,
    wait_in_future,
    wait_in_wait_all,
    wait_in_fetch_of_pending_value,
    wait_in_method,
    wait_in_async_method,
    wait_in_method_of_pending_value,
    wait_in_nested_call,
]


@pytest.mark.parametrize("wait", WAITS)
def test_who_waits_for_a_killed_worker_is_told_its_name_rank_and_pid(troupe: Troupe, wait: Callable) -> None:
    w0, victim, w2 = troupe.start(3)
    w0.order(wait, "w1")
    time.sleep(SOON_S)
    pid = victim.pid
    victim.kill()
    with pytest.raises(WorkerDied) as caught:
        w0.outcome()
    assert (caught.value.name, caught.value.rank, caught.value.pid) == ("w1", 1, pid)
    assert f"worker 'w1' (rank 1, pid {pid}) died" in str(caught.value)
    troupe.leave([w0, w2])


@pytest.mark.parametrize("wait", [wait_for_ring, wait_for_credits, wait_in_sync_call])
def test_who_waits_for_a_stopped_worker_is_told_when_it_is_killed(troupe: Troupe, wait: Callable) -> None:
    w0, victim, w2 = troupe.start(3)
    w0.do(rpc.rpc_sync, "w1", puppets.nothing)
    victim.stop()
    w0.order(wait, "w1")
    time.sleep(2 * SOON_S)
    pid = victim.pid
    victim.kill()
    with pytest.raises(WorkerDied) as caught:
        w0.outcome()
    assert (caught.value.name, caught.value.rank, caught.value.pid) == ("w1", 1, pid)
    troupe.leave([w0, w2])


@pytest.mark.parametrize(
    "wait", [wait_in_fetch_of_pending_value, wait_in_method, wait_in_async_method, wait_in_method_of_pending_value]
)
def test_who_waits_for_a_value_is_told_that_its_owner_died(troupe: Troupe, wait: Callable) -> None:
    w0, victim, w2 = troupe.start(3)
    w0.order(wait, "w1")
    time.sleep(SOON_S)
    victim.kill()
    with pytest.raises(OwnerDied, match="worker 'w1'"):
        w0.outcome()
    troupe.leave([w0, w2])


CALLS_OF_THE_DEAD = {
    "rpc_sync": lambda: rpc.rpc_sync("w1", puppets.nothing),
    "rpc_async": lambda: rpc.rpc_async("w1", puppets.nothing).wait(),
    "remote": lambda: rpc.remote("w1", puppets.nothing).to_here(),
    "to_here": lambda: puppets.kept("cell").to_here(),
    "method": lambda: puppets.kept("cell").rpc_sync().get(),
    "async_method": lambda: puppets.kept("cell").rpc_async().get().wait(),
    "remote_method": lambda: puppets.kept("cell").remote().get().to_here(),
}


def call_the_dead(which: str) -> Any:
    return CALLS_OF_THE_DEAD[which]()


def test_calls_of_a_dead_worker_name_it(troupe: Troupe) -> None:
    w0, victim = troupe.start(2)
    w0.do(puppets.keep_result, "cell", rpc.remote, "w1", Cell)
    w0.do(puppets.call_kept, "cell", "to_here")
    pid = victim.pid
    victim.kill()
    w0.do(puppets.wait_until_dead, "w1")
    for which in CALLS_OF_THE_DEAD:
        with pytest.raises(WorkerDied) as caught:
            w0.do(call_the_dead, which)
        assert (caught.value.name, caught.value.rank, caught.value.pid) == ("w1", 1, pid), which
        if which in ("to_here", "method", "async_method", "remote_method"):
            assert isinstance(caught.value, OwnerDied), which
    w0.do(puppets.drop_all)
    troupe.leave([w0])


def test_graceful_shutdown_does_not_wait_for_the_dead(troupe: Troupe) -> None:
    w0, victim, w2 = troupe.start(3)
    for puppet in (w0, w2):
        puppet.order(rpc.shutdown)
    time.sleep(SOON_S)
    victim.kill()
    w0.outcome()
    w2.outcome()


def test_shutdown_goes_on_when_a_call_is_under_way_to_the_one_that_is_killed(troupe: Troupe) -> None:
    w0, victim, w2 = troupe.start(3)
    w0.do(puppets.keep_result, "future", rpc.rpc_async, "w1", puppets.sleep, (100,), None, 0)
    for puppet in (w0, w2):
        puppet.order(rpc.shutdown)
    time.sleep(SOON_S)
    victim.kill()
    w0.outcome()
    w2.outcome()
    with pytest.raises(WorkerDied, match="w1"):
        w0.do(puppets.call_kept, "future", "wait")


@pytest.mark.parametrize("killed", [1, 0], ids=["another", "the_coordinator"])
def test_a_worker_killed_while_joining_does_not_keep_the_others(troupe: Troupe, killed: int) -> None:
    """Its place is free again: who is started in its stead completes the job."""
    first = [troupe.hire(f"w{rank}") for rank in range(3)]
    for rank in (0, 1):
        first[rank].order(puppets.join_job, f"w{rank}", rank, 3, troupe.job, {})
    time.sleep(SOON_S)
    first[killed].kill()
    heir = troupe.hire(f"w{killed}")
    heir.order(puppets.join_job, f"w{killed}", killed, 3, troupe.job, {})
    first[2].order(puppets.join_job, "w2", 2, 3, troupe.job, {})
    survivor = first[1 - killed]
    for puppet in (survivor, heir, first[2]):
        puppet.outcome()
    assert survivor.do(rpc.rpc_sync, f"w{killed}", puppets.process_id) == heir.pid
    troupe.leave([survivor, heir, first[2]])


def test_a_worker_killed_in_the_middle_of_linking_is_named(troupe: Troupe) -> None:
    """All have joined, but one never links: it was stopped then, and is killed."""
    waiting, victim, third = [troupe.hire(f"w{rank}") for rank in range(3)]
    waiting.order(puppets.join_job, "w0", 0, 3, troupe.job, {})
    victim.order(puppets.join_job, "w1", 1, 3, troupe.job, {})
    time.sleep(SOON_S)
    victim.stop()
    third.order(puppets.join_job, "w2", 2, 3, troupe.job, {})
    time.sleep(SOON_S)
    victim.kill()
    for puppet in (waiting, third):
        with pytest.raises((WorkerDied, RendezvousError), match="w1"):
            puppet.outcome()


# ---- what the dead held


def test_the_references_of_a_killed_worker_go(troupe: Troupe) -> None:
    owner, victim, third = troupe.start(3)
    for i in range(20):
        victim.do(puppets.keep_result, f"made{i}", rpc.remote, "w0", Cell, (i,))
        victim.do(puppets.keep_result, f"got{i}", rpc.rpc_sync, "w0", puppets.make_reference, (i,))
    third.do(puppets.keep_result, "mine", rpc.remote, "w0", Cell, (7,))
    third.do(puppets.call_kept, "mine", "to_here")
    owner.do(puppets.wait_until_entries, 41)
    victim.kill()
    owner.do(puppets.wait_until_entries, 1)
    assert third.do(get_through, "mine") == 7
    third.do(puppets.drop_all)
    owner.do(puppets.wait_until_entries, 0)
    troupe.leave([owner, third])


_destroyed = 0


class Witness:
    """Counts how many of its kind have been destroyed here."""

    def __del__(self) -> None:
        global _destroyed
        _destroyed += 1


def destroyed() -> int:
    return _destroyed


def wait_until_destroyed(count: int, patience_s: float = 20.0) -> float:
    started = time.monotonic()
    while _destroyed < count:
        assert time.monotonic() - started < patience_s, f"{_destroyed} of {count} values were destroyed"
        time.sleep(0.005)
    return time.monotonic() - started


def test_values_that_only_a_killed_worker_held_are_destroyed(troupe: Troupe) -> None:
    owner, victim = troupe.start(2)
    for i in range(10):
        victim.do(puppets.keep_result, f"{i}", rpc.remote, "w0", Witness)
        victim.do(puppets.call_kept, f"{i}", "confirmed_by_owner")
    victim.do(rpc.rpc_sync, "w0", puppets.nothing)
    owner.do(puppets.wait_until_entries, 10)
    assert owner.do(destroyed) == 0
    victim.kill()
    owner.do(wait_until_destroyed, 10)
    troupe.leave([owner])


def test_what_the_dead_had_handed_on_stays_alive(troupe: Troupe) -> None:
    owner, victim, heir = troupe.start(3)
    for i in range(5):
        victim.do(puppets.keep_result, f"{i}", rpc.remote, "w0", Cell, (i,))
        victim.do(puppets.hand_on, f"{i}", "w2")
    victim.kill()
    heir.do(puppets.wait_until_dead, "w1")
    owner.do(puppets.wait_until_entries, 5)
    time.sleep(SOON_S)
    assert [heir.do(get_through, f"{i}") for i in range(5)] == list(range(5))
    heir.do(puppets.drop_all)
    owner.do(puppets.wait_until_entries, 0)
    troupe.leave([owner, heir])


def hand_on_without_waiting(label: str, to: str) -> None:
    """The message that carries the reference may still be unread when this returns."""
    rpc.rpc_async(to, puppets.hold, (label, puppets.kept(label)))


def test_what_the_dead_had_sent_but_nobody_had_read_stays_alive(troupe: Troupe) -> None:
    """The receiver is stopped while the sender dies: only the sender's bit keeps the value until then."""
    owner, victim, heir = troupe.start(3)
    for i in range(5):
        victim.do(puppets.keep_result, f"{i}", rpc.remote, "w0", Cell, (i,))
    victim.do(rpc.rpc_sync, "w0", puppets.nothing)
    victim.do(rpc.rpc_sync, "w2", puppets.nothing)
    heir.stop()
    for i in range(5):
        victim.do(hand_on_without_waiting, f"{i}", "w2")
    victim.kill()
    owner.do(puppets.wait_until_dead, "w1")
    time.sleep(2 * SOON_S)
    assert owner.do(puppets.entries_held) == 5
    heir.go_on()
    heir.do(wait_until_kept, 5)
    heir.do(puppets.wait_until_dead, "w1")
    time.sleep(SOON_S)
    assert [heir.do(get_through, f"{i}") for i in range(5)] == list(range(5))
    heir.do(puppets.drop_all)
    owner.do(puppets.wait_until_entries, 0)
    troupe.leave([owner, heir])


def wait_until_kept(count: int, patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while len(puppets._kept) < count:
        assert time.monotonic() < deadline, f"{sorted(puppets._kept)} arrived, not {count}"
        time.sleep(0.005)


def test_a_call_that_the_dead_had_sent_still_holds_its_arguments(troupe: Troupe) -> None:
    """A function that runs for a dead caller keeps the references it was given."""
    owner, victim, third = troupe.start(3)
    victim.do(puppets.keep_result, "cell", rpc.remote, "w0", Cell, (5,))
    victim.do(send_to_use_later, "cell", "w2", 1.0)
    time.sleep(SOON_S)
    victim.kill()
    owner.do(puppets.wait_until_dead, "w1")
    third.do(wait_until_kept, 1)
    assert third.do(puppets.kept, "used") == 5
    owner.do(puppets.wait_until_entries, 0)
    troupe.leave([owner, third])


def send_to_use_later(label: str, to: str, delay_s: float) -> None:
    rpc.rpc_async(to, use_after_a_while, (puppets.kept(label), delay_s))


def use_after_a_while(reference: rpc.RRef, delay_s: float) -> None:
    time.sleep(delay_s)
    puppets.keep("used", reference.rpc_sync().get())


# ---- processes that end in other ways


PROGRAM = """
import os, sys, threading, time
import fastref.rpc as rpc
from tests import puppets

rpc.init_rpc("w1", rank=1, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(init_method=sys.argv[1]))
reference = rpc.remote("w0", puppets.Cell, (1,))
reference.to_here()
future = rpc.rpc_async("w0", puppets.sleep, (0.2,), timeout=0)
rpc.rpc_sync("w0", puppets.keep, ("ready", True))
{ending}
"""

ENDINGS = {
    "end_of_main": ("", 0),
    "sys_exit": ("sys.exit(3)", 3),
    "os_exit": ("os._exit(4)", 4),
    "uncaught_exception": ("raise ValueError('a bug of the program')", 1),
    "sigterm": ("os.kill(os.getpid(), 15); time.sleep(9)", -15),
    "abort": ("os.abort()", -6),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_that_ends_without_shutdown_counts_as_dead_and_leaves_nothing(troupe: Troupe, ending: str) -> None:
    text, code = ENDINGS[ending]
    w0 = troupe.hire("w0")
    w0.order(puppets.join_job, "w0", 0, 2, troupe.job, {})
    command = [sys.executable, "-c", PROGRAM.format(ending=text), f"local://{troupe.job}"]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    w0.outcome()
    w0.order(wait_until_kept, 1)
    w0.outcome()
    _, errors = program.communicate(timeout=PROGRAM_PATIENCE_S)
    assert program.returncode == code, errors
    assert "fastref" not in errors, "the end of the program says something of fastref's own"
    w0.do(puppets.wait_until_dead, "w1")
    w0.do(puppets.wait_until_entries, 0)
    with pytest.raises(WorkerDied) as caught:
        w0.do(rpc.rpc_sync, "w1", puppets.nothing)
    assert caught.value.pid == program.pid
    troupe.leave([w0])


def test_sys_exit_in_a_called_function_ends_neither_side(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    with pytest.raises(RemoteError, match="SystemExit"):
        w0.do(rpc.rpc_sync, "w1", sys.exit, (3,))
    assert w0.do(rpc.rpc_sync, "w1", puppets.process_id) == w1.pid
    troupe.leave([w0, w1])


def test_os_exit_in_a_called_function_is_the_death_of_the_callee(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    with pytest.raises(WorkerDied, match=f"'w1' .rank 1, pid {w1.pid}."):
        w0.do(rpc.rpc_sync, "w1", os._exit, (3,))
    troupe.leave([w0])


# ---- restarts


def test_the_next_start_removes_what_the_killed_left(troupe: Troupe) -> None:
    before = take_holdings()
    first = troupe.start(3)
    for puppet in first:
        os.kill(puppet.pid, signal.SIGKILL)
    for puppet in first:
        puppet.process.join()
    second = troupe.start(3)
    assert second[0].do(rpc.rpc_sync, "w2", puppets.process_id) == second[2].pid
    troupe.leave(second)
    for puppet in second:
        assert puppet.end() == 0
    left = [what for what in take_holdings() - before if what.startswith("file")]
    assert not left


def test_survivors_start_again_with_a_new_worker_in_the_place_of_the_dead(troupe: Troupe) -> None:
    w0, victim, w2 = troupe.start(3)
    for round_number in range(3):
        w2.do(puppets.keep_result, "old", rpc.remote, "w1", Cell, (1,))
        victim.kill()
        for puppet in (w0, w2):
            puppet.do(puppets.wait_until_dead, "w1")
        troupe.leave([w0, w2])
        victim = troupe.hire("w1")
        troupe.join([w0, victim, w2], job=f"{troupe.job}-{round_number}")
        for puppet in (w0, w2):
            assert puppet.do(rpc.rpc_sync, "w1", puppets.process_id) == victim.pid
        w2.do(puppets.drop_all)
    troupe.leave([w0, victim, w2])


# ---- the death of an owner


def test_the_death_of_its_owner_ends_a_reference_everywhere_and_harms_nobody(troupe: Troupe) -> None:
    owner, w1, w2 = troupe.start(3)
    for label, value in (("cell", Cell(1)), ("number", 42)):
        w1.do(puppets.keep_result, label, rpc.remote, "w0", puppets.echo, (value,))
        w1.do(puppets.call_kept, label, "to_here")
        w1.do(puppets.hand_on, label, "w2")
    owner.kill()
    for puppet in (w1, w2):
        puppet.do(puppets.wait_until_dead, "w0")
        with pytest.raises(OwnerDied, match="w0"):
            puppet.do(puppets.call_kept, "cell", "to_here")
        assert puppet.do(puppets.call_kept, "cell", "owner_name") == "w0"
        # Its memory is still mapped, but a value without an owner would be one that lives by chance.
        with pytest.raises(OwnerDied, match="w0"):
            puppet.do(puppets.call_kept, "number", "to_here")
    w1.do(puppets.hand_on, "cell", "w2", "after")
    with pytest.raises(OwnerDied, match="w0"):
        w2.do(puppets.call_kept, "after", "to_here")
    for puppet in (w1, w2):
        puppet.do(puppets.drop_all)
    troupe.leave([w1, w2])


def wait_for_failure(to: str, witness: rpc.RRef) -> None:
    """Keep a reference in the frame that waits for a call that fails."""
    future = rpc.rpc_async(to, int, ("no number",))
    future.wait()


def test_a_failed_future_keeps_nothing_alive(troupe: Troupe) -> None:
    """The exception knows the frame it went through, and the frame knows the future that has the exception."""
    w0, w1 = troupe.start(2)
    with pytest.raises(ValueError, match="no number"):
        w0.do(make_reference_and, wait_for_failure)
    w1.do(puppets.wait_until_entries, 0)
    troupe.leave([w0, w1])


def test_a_callback_may_look_at_the_failed_future_it_is_called_with(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    with pytest.raises((ValueError, RuntimeError), match="no number"):
        w0.do(make_reference_and, wait_for_failed_callback)
    w1.do(puppets.wait_until_entries, 0)
    troupe.leave([w0, w1])


def make_reference_and(wait: Callable) -> None:
    wait("w1", rpc.remote("w1", Cell))


def wait_for_failed_callback(to: str, witness: rpc.RRef) -> None:
    future = rpc.rpc_async(to, int, ("no number",))
    future.then(lambda done: done.wait()).wait()


@pytest.mark.parametrize("seed", range(2))
def test_workers_killed_at_random_moments_are_always_named(troupe: Troupe, seed: int) -> None:
    """Ten kills in the middle of a mix of calls; the gate does a thousand and looks at the time."""
    rng = random.Random(seed)
    w0, *victims = troupe.start(11)
    for victim in victims:
        w0.order(work_until_dead, victim.name)
        time.sleep(rng.uniform(0.0, 0.1))
        pid = victim.pid
        victim.kill()
        with pytest.raises(WorkerDied) as caught:
            w0.outcome()
        assert (caught.value.name, caught.value.pid) == (victim.name, pid)
    w0.do(puppets.wait_until_entries, 0)
    troupe.leave([w0])


def work_until_dead(to: str) -> None:
    """Call, fetch, hand own references over and take the peer's, until something raises."""
    while True:
        assert rpc.rpc_sync(to, puppets.echo, (1,)) == 1
        cell = rpc.remote(to, Cell, (2,))
        mine = rpc.RRef(Cell(3))
        future = rpc.rpc_async(to, use_both, (cell, mine))
        assert cell.to_here().value == 2
        assert future.wait() == 5


def use_both(one: rpc.RRef, other: rpc.RRef) -> int:
    return one.to_here().value + other.rpc_sync().get()
