"""Workers that are stopped for a while: they go on as if nothing had been, and meanwhile delay nobody else."""

from __future__ import annotations

import time

import pytest

import fastref.rpc as rpc
from fastref.errors import CallTimeout, WorkerDied
from tests import puppets
from tests.puppets import Cell, Troupe, get_through, troupe_fixture  # noqa: F401

SOON_S = 0.3  # for a call to get where it waits


def test_a_stopped_worker_goes_on_as_if_nothing_had_been(troupe: Troupe) -> None:
    w0, w1, w2 = troupe.start(3)
    w0.do(puppets.keep_result, "cell", rpc.remote, "w1", Cell, (5,))
    w1.do(puppets.keep_result, "cell", rpc.remote, "w0", Cell, (6,))
    w0.do(get_through, "cell")
    w1.do(get_through, "cell")
    w0.order(rpc.rpc_sync, "w1", puppets.make_slowly, (0.2, 1))
    w2.order(flood, "w1", 200)
    w1.stop()
    time.sleep(1.0)
    w1.go_on()
    assert w0.outcome() == 1
    assert w2.outcome() == 200
    assert w0.do(get_through, "cell") == 5
    assert w1.do(get_through, "cell") == 6
    for puppet in (w0, w1):
        puppet.do(puppets.drop_all)
    for puppet in (w0, w1):
        puppet.do(puppets.wait_until_entries, 0)
    troupe.leave([w0, w1, w2])


def flood(to: str, count: int) -> int:
    """Send many calls at once; return how many were answered as they should be."""
    futures = [rpc.rpc_async(to, puppets.echo, (i,)) for i in range(count)]
    return sum(future.wait() == i for i, future in enumerate(futures))


def flood_without_waiting(to: str, count: int, size_bytes: int) -> None:
    puppets.keep("flood", [rpc.rpc_async(to, puppets.echo, (b"x" * size_bytes,), timeout=0) for _ in range(count)])


@pytest.mark.shared_memory("published values are read there")
def test_a_stopped_owner_stops_nobody_else(troupe: Troupe) -> None:
    """Its references can still be taken, handed on and dropped, its published values read."""
    owner, w1, w2 = troupe.start(3)
    w1.do(puppets.keep_result, "number", rpc.remote, "w0", puppets.echo, (42,))
    assert w1.do(puppets.call_kept, "number", "to_here") == 42
    w1.do(puppets.hand_on, "number", "w2")
    owner.stop()
    assert w1.do(rpc.rpc_sync, "w2", puppets.echo, (1,)) == 1
    w1.do(puppets.hand_on, "number", "w2", "again")
    assert w2.do(puppets.call_kept, "again", "to_here") == 42
    w2.do(puppets.drop, "again")
    assert w2.do(flood, "w1", 500) == 500
    owner.go_on()
    for puppet in (w1, w2):
        puppet.do(puppets.drop_all)
    owner.do(puppets.wait_until_entries, 0)
    troupe.leave([owner, w1, w2])


def test_a_stopped_caller_whose_answers_fill_its_ring_holds_up_nobody_else(troupe: Troupe) -> None:
    owner, stopped, third = troupe.start(3)
    stopped.do(rpc.rpc_sync, "w0", puppets.nothing)
    stopped.do(flood_without_waiting, "w0", 60, 2000)
    stopped.do(keep_many_calls_coming, "w0", 200)
    stopped.stop()
    time.sleep(SOON_S)
    assert third.do(flood, "w0", 500) == 500
    assert third.do(rpc.rpc_sync, "w0", puppets.process_id) == owner.pid
    stopped.go_on()
    assert stopped.do(flood, "w0", 100) == 100
    troupe.leave([owner, stopped, third])


def keep_many_calls_coming(to: str, count: int) -> None:
    """Calls whose answers, twenty times larger, cannot all lie in one ring."""
    puppets.keep("many", [rpc.rpc_async(to, make_bytes, (3000, 0.1), timeout=0) for _ in range(count)])


def make_bytes(size_bytes: int, delay_s: float) -> bytes:
    time.sleep(delay_s)
    return b"x" * size_bytes


def fill_ring_of(to: str) -> None:
    """Send to a stopped worker until there is no room any more: until a call has no time left before it is sent."""
    while not (future := rpc.rpc_async(to, puppets.echo, (b"x" * 2000,), timeout=0.2)).done():
        pass
    with pytest.raises(CallTimeout):
        future.wait()


def test_a_death_is_noticed_while_a_stopped_worker_cannot_be_told_of_it(troupe: Troupe) -> None:
    w0, stopped, first, second = troupe.start(4)
    w0.do(rpc.rpc_sync, "w1", puppets.nothing)
    stopped.stop()
    w0.do(fill_ring_of, "w1")
    for victim, name in ((first, "w2"), (second, "w3")):
        w0.order(rpc.rpc_sync, name, puppets.sleep, (100,), None, 0)
        time.sleep(SOON_S)
        victim.kill()
        with pytest.raises(WorkerDied, match=name):
            w0.outcome()
    stopped.go_on()
    assert w0.do(rpc.rpc_sync, "w1", puppets.echo, (1,)) == 1
    for puppet in (w0, stopped):
        puppet.do(puppets.wait_until_dead, "w3")
    w0.do(puppets.wait_until_removed)
    troupe.leave([w0, stopped])


def test_a_remote_that_reaches_nobody_in_its_time_says_so_where_it_is_used(troupe: Troupe) -> None:
    w0, owner = troupe.start(2)
    owner.stop()  # before it has opened an entry for w0
    w0.do(use_what_was_never_made, "w1")
    owner.go_on()
    assert w0.do(rpc.rpc_sync, "w1", puppets.echo, (1,)) == 1
    troupe.leave([w0, owner])


def use_what_was_never_made(to: str) -> None:
    rref = rpc.remote(to, puppets.echo, (1,), timeout=0.05)
    for use in (
        rref.to_here,
        rref.rpc_sync().bit_length,
        rref._get_future().wait,
        rref._get_type,
        lambda: rpc.rpc_sync(rpc.get_worker_info().name, puppets.echo, (rref,)),
    ):
        with pytest.raises(
            CallTimeout, match=r"more than set timeout \(50 ms\).*RRef creation via rpc.remote\(\) timed out"
        ):
            use()
    assert not rref.confirmed_by_owner()
    assert rref.owner_name() == to
    assert repr(rref).startswith("UserRRef(")


def test_who_was_stopped_reads_what_came_meanwhile_before_it_calls_others_silent(troupe: Troupe) -> None:
    """One is patient, the other is not and hears of the first often enough all the same."""
    w0, w1 = (troupe.hire(f"w{rank}") for rank in range(2))
    for rank, (puppet, patience_s) in enumerate(((w0, 1000.0), (w1, 1.0))):
        options = {"transport": "tcp", "peer_timeout": patience_s}
        puppet.order(puppets.join_job, puppet.name, rank, 2, troupe.job, options)
    for puppet in (w0, w1):
        puppet.outcome()
    time.sleep(1.5)
    w1.stop()
    time.sleep(1.5)
    w1.go_on()
    time.sleep(SOON_S)
    assert w1.do(rpc.rpc_sync, "w0", puppets.process_id) == w0.pid
    assert w0.do(rpc.rpc_sync, "w1", puppets.process_id) == w1.pid
    troupe.leave([w0, w1])
