"""Workers that die at any moment: who is told, what goes, and what stays."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import OwnerDied, RendezvousError, WorkerDied
from fastref.rref import current_wiring
from tests import puppets
from tests.leaks import take_holdings
from tests.puppets import Cell, Ended, Troupe, troupe  # noqa: F401

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


def get_through(label: str) -> Any:
    return puppets.kept(label).rpc_sync().get()


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
