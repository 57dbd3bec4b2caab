"""The network of nodes in one process: frames arrive, nodes die and deaths are noticed when the test says so."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest

from fastref.errors import CallTimeout, OwnerDied, UsageError, WorkerDied
from fastref.testing import Network
from fastref.wire import Kind


class Box:
    """A value that its owner alone can give."""

    def __init__(self, content: Any = None) -> None:
        self.content = content

    def read(self) -> Any:
        return self.content


def echo(value: Any) -> Any:
    return value


def note(text: str) -> None:
    notes.append(text)


notes: list[str] = []


@pytest.fixture(autouse=True)
def forget_notes() -> None:
    notes.clear()


def test_nothing_arrives_until_it_is_delivered() -> None:
    network = Network(2)
    future = network[0].rpc_async("worker1", echo, (7,))
    for _ in range(3):
        network.tick(0)
        network.tick(1)
    assert network.pairs_under_way() == [(0, 1)]
    assert network.under_way(0, 1) == 2
    assert not future.done()


def test_frames_arrive_one_by_one_in_the_order_they_were_sent() -> None:
    network = Network(2)
    future = network[0].rpc_async("worker1", echo, (7,))
    kinds = []
    while kind := network.oldest(0, 1):
        kinds.append(kind)
        assert network.deliver(0, 1) == 1
    assert kinds == [Kind.INTERN, Kind.PYTHON_CALL]
    assert network.oldest(1, 0) == Kind.PYTHON_RET
    assert not future.done()
    assert network.deliver(1, 0, 5) == 1
    assert future.value() == 7


def test_frames_of_different_senders_arrive_in_any_order() -> None:
    network = Network(3)
    network[0].rpc_async(2, note, ("from 0",))
    network[1].rpc_async(2, note, ("from 1",))
    network.deliver(1, 2, 2)
    network.deliver(0, 2, 2)
    assert notes == ["from 1", "from 0"]


def test_a_call_to_oneself_is_served_on_the_next_tick() -> None:
    network = Network(1)
    future = network[0].rpc_async(0, echo, ("me",))
    assert not future.done()
    assert network.tick(0)
    assert future.value() == "me"
    assert not network.tick(0)


def test_settling_delivers_what_follows_from_what_was_delivered() -> None:
    network = Network(2)
    future = network[0].rpc_async("worker1", echo, (network[0].new(Box()),))
    network.settle()
    assert network.pairs_under_way() == []
    assert future.value().is_owner()


def test_what_waits_is_run_while_everything_is_delivered() -> None:
    network = Network(2)
    rref = network.run(lambda: network[0].remote("worker1", Box, ("content",)))
    assert network.run(rref.to_here).content == "content"
    assert network.run(lambda: rref.rpc_sync().read()) == "content"


def test_what_is_run_raises_what_it_raised_and_leaves_no_thread() -> None:
    network = Network(1)
    with pytest.raises(ZeroDivisionError):
        network.run(lambda: 1 // 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "network-run"]


def test_entries_in_use_are_shown_with_who_holds_them_and_credits_are_not() -> None:
    network = Network(2)
    rref = network.run(lambda: network[1].remote(0, Box))
    network.settle()
    assert network[1].credits(0) > 0
    assert list(network.used(0).values()) == [1 << 1]
    del rref
    network.settle()
    assert network.used(0) == {}


def test_a_node_that_has_let_go_of_everything_holds_nothing() -> None:
    network = Network(2)
    box = network[0].new(Box())
    future = network[1].rpc_async(0, echo, (1,))
    network[0].rpc_async(1, echo, (box,))
    assert network[0].holdings() == {"entries in use": 1, "entries held": 1, "pins": 1, "calls pending": 1}
    assert network[1].holdings() == {"calls pending": 1}
    del box, future
    network.settle()
    assert network[0].holdings() == network[1].holdings() == {}


def test_what_the_dead_had_published_is_read_by_who_lives() -> None:
    network = Network(2)
    network[0].rpc_async(1, note, ("last words",))
    network.kill(0)
    network.settle()
    assert notes == ["last words"]


def test_what_the_dead_had_not_published_is_lost() -> None:
    network = Network(2)
    network[0].rpc_async(1, note, ("first",))
    network.deliver(0, 1, 2)
    network[0].rpc_async(1, note, ("last words",))
    network.kill(0, lose=True)
    network.settle()
    assert notes == ["first"]


def test_what_is_sent_to_the_dead_runs_nowhere() -> None:
    network = Network(2)
    future = network[0].rpc_async(1, note, ("too late",))
    network.kill(1)
    network.settle()
    assert notes == []
    with pytest.raises(WorkerDied, match="worker1"):
        future.value()


def test_a_death_is_noticed_by_whom_the_test_says_and_by_all_when_it_settles() -> None:
    network = Network(3)
    network.kill(2, seen_by=[0])
    assert network.unseen() == [(1, 2)]
    assert network[0].peers[2].is_dead
    assert not network[1].peers[2].is_dead
    network.notice(1, 2)
    assert network[1].peers[2].is_dead
    with pytest.raises(UsageError, match="worker1 has no death of worker2 to notice"):
        network.notice(1, 2)

    network = Network(3)
    network.kill(2, seen_by=[])
    network.settle()
    assert network.unseen() == []
    assert network[0].holdings() == network[1].holdings() == {}


def test_who_dies_notices_nothing_any_more() -> None:
    network = Network(3)
    network.kill(2, seen_by=[0])
    network.kill(1, seen_by=[])
    assert network.unseen() == [(0, 1)]
    network.settle()
    assert network[0].holdings() == {}


def test_a_node_dies_once_and_does_nothing_afterwards() -> None:
    network = Network(2)
    network.kill(1)
    with pytest.raises(UsageError, match="worker1 is dead already"):
        network.kill(1)
    assert not network.tick(1)


def test_handles_of_the_dead_stay_in_the_tables_until_the_living_take_them_out() -> None:
    network = Network(2)
    rref = network.run(lambda: network[1].remote(0, Box))
    network.settle()
    network.kill(1, seen_by=[])
    del rref  # an object of a process that is gone: nothing happens
    network.tick(0)
    assert list(network.used(0).values()) == [1 << 1]
    network.settle()
    assert network.used(0) == {}


def test_a_reference_to_the_dead_says_so() -> None:
    network = Network(2)
    rref = network.run(lambda: network[0].remote(1, Box))
    network.settle()
    network.kill(1)
    with pytest.raises(OwnerDied, match="worker1"):
        rref.to_here()


def test_a_sender_that_finds_no_room_times_out_and_goes_on_when_there_is_some() -> None:
    network = Network(2, room=2)
    network[0].rpc_async(1, note, ("first",))
    before = time.monotonic()
    with pytest.raises(CallTimeout):
        network[0].rpc_async(1, note, ("second",), timeout=0.05).value()
    assert time.monotonic() - before >= 0.05
    assert network.deliver(0, 1, 5) == 2
    network[0].rpc_async(1, note, ("third",))
    network.settle()
    assert notes == ["first", "third"]


def test_more_remote_calls_than_entries_opened_ahead_wait_for_more() -> None:
    network = Network(2, window=2)
    rrefs = network.run(lambda: [network[0].remote(1, echo, (number,)) for number in range(20)])
    assert [network.run(rref.to_here) for rref in rrefs] == list(range(20))


def end_in_the_collector() -> None:
    """Leave a network with handles alive to the garbage collector, all in one cycle."""
    for bits in (61, 0):
        network = Network(2, bits=bits)
        rref = network.run(lambda network=network: network[1].remote(0, Box))
        network.settle()
        cycle = [network, rref]
        cycle.append(cycle)
        del network, rref, cycle
        gc.collect()


def test_handles_that_end_in_the_garbage_collector_find_their_table(spawn_workers: Any) -> None:
    spawn_workers(end_in_the_collector, [()]).join()
