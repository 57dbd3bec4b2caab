"""Workers of several hosts do what those of one host do; who dies there is missed, and nothing else."""

from __future__ import annotations

import operator
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import OwnerDied, RendezvousError, UsageError, WorkerDied
from fastref.rref import current_wiring
from tests import puppets
from tests.hosts import Host, hosts
from tests.puppets import Cell
from tests.test_death import WAITS
from tests.world import PORT, SECRET, World, far_peers, host_name, wait_until

SILENCE_S = 2.0
REFUSED_S = 5.0


@pytest.fixture
def room(mp_context: ForkServerContext) -> Iterator[list[Host]]:
    with hosts(3, mp_context) as three:
        yield three


@pytest.fixture(scope="module")
def lasting(mp_context: ForkServerContext) -> Iterator[World]:
    """Return a world for all tests that harm nobody."""
    with hosts(3, mp_context) as three:
        world = World(three).join()
        yield world
        world.leave()


@pytest.fixture
def world(lasting: World) -> Iterator[World]:
    """Return the lasting world, of which nobody holds anything after the test."""
    yield lasting
    lasting.check()


# ---- meeting


def listening_beside_the_store(host: Host) -> list[str]:
    return [endpoint for endpoint in host.listening() if not endpoint.endswith(f":{PORT}")]


@pytest.mark.shared_memory("those of one host do")
@pytest.mark.parametrize("scheme", ["tcp", "env"])
def test_workers_share_memory_within_a_host_and_talk_over_tcp_between_hosts(room: list[Host], scheme: str) -> None:
    world = World(room).join(scheme)
    for rank, puppet in enumerate(world.all):
        others = {name: other // 2 != rank // 2 for other, name in enumerate(world.names) if other != rank}
        assert puppet.do(far_peers) == others
        for name in world.names:
            assert puppet.do(rpc.rpc_sync, name, host_name) == f"host{int(name[1:]) // 2}"
    world.leave()


def test_each_worker_has_a_port_at_the_address_of_its_host_until_it_leaves(room: list[Host]) -> None:
    world = World(room)
    for rank in range(5):
        world.order_join(rank)
    for host, count in zip(room, (2, 2, 1), strict=True):
        wait_until(lambda host=host, count=count: len(listening_beside_the_store(host)) == count)
        for endpoint in listening_beside_the_store(host):
            assert re.fullmatch(rf"{re.escape(host.address)}:\d+", endpoint)
    world.order_join(5)
    for puppet in world.all:
        puppet.outcome()
    assert [len(listening_beside_the_store(host)) for host in room] == [2, 2, 2]  # for those whose connection breaks
    world.leave()
    assert [host.listening() for host in room] == [[], [], []]


@pytest.mark.shared_memory("who shares none listens on loopback")
def test_a_job_of_one_host_listens_on_no_port(room: list[Host]) -> None:
    pair = [room[0].hire(f"w{rank}") for rank in range(2)]
    pair[0].order(puppets.join_job, "w0", 0, 2, "quiet", {})
    for _ in range(20):
        assert room[0].listening() == []
        time.sleep(0.01)
    pair[1].order(puppets.join_job, "w1", 1, 2, "quiet", {})
    for puppet in pair:
        puppet.outcome()
    assert room[0].listening() == []
    for puppet in pair:
        puppet.order(rpc.shutdown)
    for puppet in pair:
        puppet.outcome()


def refusals(world: World) -> list[str]:
    """What all are told, after how many seconds at most, when no job comes about."""
    started = time.monotonic()
    for rank in range(world.size):
        world.order_join(rank)
    told = []
    for puppet in world.all:
        with pytest.raises((RendezvousError, UsageError)) as caught:
            puppet.outcome()
        told.append(str(caught.value))
    print(f"all were told after {time.monotonic() - started:.2f} s")
    return told


@pytest.mark.shared_memory("who has to use TCP is refused before he meets anybody")
def test_without_a_token_nobody_of_another_host_is_let_in(room: list[Host]) -> None:
    for sentence in refusals(World(room, ["", "", ""])):
        assert re.search(
            r"worker 'w\d' .* runs on host\d.* and worker 'w\d' .* on host\d.*: .* set FASTREF_TOKEN", sentence
        )


def test_another_token_is_another_job(room: list[Host]) -> None:
    for sentence in refusals(World(room[:2], [SECRET, "the token of a stranger"])):
        assert re.search(r"did not prove themselves to each other.*need the same FASTREF_TOKEN", sentence)
        assert "stranger" not in sentence


# ---- calls and values


def call_everybody(names: list[str]) -> None:
    for name in names:
        assert rpc.rpc_sync(name, puppets.echo, (("a", 1, None, {"b": b"c"}),)) == ("a", 1, None, {"b": b"c"})
    futures = [rpc.rpc_async(name, puppets.echo, (number,)) for number in range(50) for name in names]
    assert [future.wait() for future in futures] == [number for number in range(50) for _ in names]


def test_everybody_calls_everybody_at_once(world: World) -> None:
    for puppet in world.all:
        puppet.order(call_everybody, world.names)
    for puppet in world.all:
        puppet.outcome()


def send_tensors(names: list[str]) -> None:
    base = torch.arange(1 << 20, dtype=torch.float32).reshape(1024, 1024)
    strided = [base.t(), base[::2, 1::3], base[5], base[:, 7], base.expand(1, 1024, 1024), torch.zeros(()), base[:0]]
    sizes = [0, 1, 63, 64, 4096, 65_535, 65_537, 1 << 20, 64 << 20]
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes] + strided
    for name in names:
        for tensor in tensors:
            there_and_back = rpc.rpc_sync(name, puppets.echo, (tensor,))
            assert there_and_back.dtype == tensor.dtype and torch.equal(there_and_back, tensor)
        many = rpc.rpc_sync(name, puppets.echo, (tensors,))
        assert all(torch.equal(here, there) for here, there in zip(tensors, many, strict=True))
        rref = rpc.remote(name, puppets.echo, (tensors[-3:],))
        assert all(torch.equal(here, there) for here, there in zip(tensors[-3:], rref.to_here(), strict=True))


def test_tensors_of_any_size_and_stride_arrive_as_they_were(world: World) -> None:
    world.run(0, send_tensors, ["w1", "w2"])


def raise_by_type(names: list[str]) -> None:
    for name in names:
        with pytest.raises(ValueError, match="no number"):
            rpc.rpc_sync(name, int, ("no number",))
        with pytest.raises(ZeroDivisionError):
            rpc.rpc_async(name, divmod, (1, 0)).wait()
        with pytest.raises(KeyError, match="missing"):
            rpc.remote(name, operator.getitem, ({}, "missing")).to_here()


def test_an_exception_has_its_type_on_every_host(world: World) -> None:
    world.run(0, raise_by_type, ["w0", "w1", "w2", "w5"])


@rpc.functions.async_execution
def add_over(through: str, left: Any, right: Any) -> torch.futures.Future:
    return rpc.rpc_async(through, torch.add, (left, right)).then(lambda future: future.wait() + 1)


def call_async(names: list[str]) -> None:
    two = torch.full((3,), 2.0)
    for name in names:
        for through in names:
            assert rpc.rpc_sync(name, add_over, (through, two, two)).tolist() == [5.0] * 3
            assert rpc.remote(name, add_over, (through, two, two)).to_here().tolist() == [5.0] * 3


def test_an_async_function_answers_when_its_future_does_on_whatever_host(world: World) -> None:
    world.run(0, call_async, ["w1", "w2", "w4"])


# ---- references


def make_pass_use_and_drop(owner: str, others: list[str]) -> None:
    """Make a value with an owner, have others use and keep it, and let all of them go of it."""
    cell, tensor = rpc.remote(owner, Cell, (1,)), rpc.remote(owner, torch.ones, (1000,))
    for label, rref in (("cell", cell), ("tensor", tensor)):
        for name in others:
            rpc.rpc_sync(name, puppets.hold, (label, rref))
    assert [rpc.rpc_sync(name, puppets.get_through, ("cell",)) for name in others] == [1] * len(others)
    cell.rpc_sync().put(2)
    assert cell.to_here().value == 2
    del cell, tensor, rref
    for name in others:
        assert rpc.rpc_sync(name, puppets.get_through, ("cell",)) == 2
        assert rpc.rpc_sync(name, puppets.call_kept, ("tensor", "to_here")).sum() == 1000
        assert rpc.rpc_sync(owner, puppets.entries_held) >= 2
        rpc.rpc_sync(name, puppets.drop_all)
    seconds = rpc.rpc_sync(owner, puppets.wait_until_entries, (0,))
    print(f"{owner} let go {seconds:.3f} s after the last holder")


@pytest.mark.parametrize(
    ("maker", "owner", "others"),
    [
        (0, "w2", ["w3"]),
        (0, "w2", ["w1"]),
        (0, "w2", ["w4"]),
        (0, "w1", ["w2"]),
        (0, "w0", ["w2", "w1", "w5"]),
        (0, "w2", ["w1", "w3", "w4", "w5", "w2"]),
    ],
    ids=["to_its_owners_host", "to_ones_own_host", "to_a_third", "off_the_host", "of_ones_own", "to_all"],
)
def test_a_value_lives_until_the_last_holder_on_any_host_lets_go(
    world: World, maker: int, owner: str, others: list[str]
) -> None:
    world.run(maker, make_pass_use_and_drop, owner, others)


def hand_round(rref: rpc.RRef, way: list[str]) -> rpc.RRef:
    """Hand a reference on and on, nobody keeping it, and return it the same way."""
    return rpc.rpc_sync(way[0], hand_round, (rref, way[1:])) if way else rref


def hand_own_and_others_round(names: list[str]) -> None:
    mine = rpc.RRef(Cell("mine"))
    there = [rpc.remote(name, Cell, (name,)) for name in names]
    for rref in (mine, *there):
        back = hand_round(rref, names + names[::-1])
        assert back.rref_id() == rref.rref_id()
        assert back.is_owner() == rref.is_owner()
        assert back.rpc_sync().get() == rref.rpc_sync().get()


def test_a_reference_that_went_through_all_hosts_is_the_same(world: World) -> None:
    world.run(0, hand_own_and_others_round, ["w2", "w1", "w4", "w3", "w5"])


def churn(names: list[str], rounds: int) -> None:
    """Make, pass and drop without ever waiting for the bookkeeping of it."""
    for number in range(rounds):
        owner, user, third = (names[(number + step) % len(names)] for step in (0, 1, 3))
        rref = rpc.remote(owner, Cell, (number,))
        futures = [rpc.rpc_async(name, get_of, (rref,)) for name in (user, third, owner)]
        del rref
        assert [future.wait() for future in futures] == [number] * 3


def get_of(rref: rpc.RRef) -> Any:
    return rref.rpc_sync().get()


def test_references_made_passed_and_dropped_in_haste_leave_nothing(world: World) -> None:
    for puppet in world.all:
        puppet.order(churn, world.names, 60)
    for puppet in world.all:
        puppet.outcome()


class ParameterServer:
    """Weights that all trainers fetch and change."""

    def __init__(self, size: int) -> None:
        self.lock, self.weights, self.pushed = threading.Lock(), torch.zeros(size), 0

    def fetch(self) -> torch.Tensor:
        with self.lock:
            return self.weights.clone()

    def push(self, gradient: torch.Tensor) -> int:
        with self.lock:
            self.weights -= 0.5 * gradient
            self.pushed += 1
            return self.pushed


def train(server: rpc.RRef, target: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        server.rpc_sync().push(server.rpc_sync().fetch() - target)


def serve_parameters(trainers: list[str], steps: int) -> None:
    server, target = rpc.RRef(ParameterServer(100_000)), torch.linspace(-1, 1, 100_000)
    torch.futures.wait_all([rpc.rpc_async(name, train, (server, target, steps)) for name in trainers])
    assert server.local_value().pushed == steps * len(trainers)
    # Late gradients make it swing, but a step of each trainer alone halves what is missing.
    train(server, target, 30)
    torch.testing.assert_close(server.rpc_sync().fetch(), target)


def test_a_parameter_server_trains_with_trainers_of_all_hosts(world: World) -> None:
    world.run(0, serve_parameters, world.names[1:], 20)


# ---- deaths


def begin_to_wait(to: str, ways: Sequence[Callable[[str], Any]] = WAITS) -> None:
    """Wait for a worker in every way there is, each in a thread of its own."""
    ended: dict[str, tuple[BaseException, float]] = {}

    def wait(how: Callable[[str], Any]) -> None:
        try:
            how(to)
        except BaseException as error:
            ended[how.__name__] = (error, time.monotonic())

    threads = [threading.Thread(target=wait, args=(how,), daemon=True) for how in ways]
    for thread in threads:
        thread.start()
    puppets.keep("waiting", (threads, ended))


def how_it_ended() -> dict[str, tuple[Any, ...]]:
    """Return of each way of waiting what came of it and when: name, rank and pid of the dead, the reason."""
    threads, ended = puppets.kept("waiting")
    puppets.drop("waiting")
    for thread in threads:
        thread.join(puppets.PATIENCE_S)
        assert not thread.is_alive(), f"{len(ended)} of {len(threads)} ended: {sorted(ended)}"
    assert len(ended) == len(threads), f"only these ended with an error: {sorted(ended)}"
    told = {}
    for how, (error, when) in ended.items():
        assert isinstance(error, WorkerDied), f"{how} ended with {error!r}"
        told[how] = (error.name, error.rank, error.pid, str(error), when)
    ended.clear()
    return told


def check_told(puppet: puppets.Puppet, name: str, pid: int, since: float, what: str) -> list[str]:
    """Fail unless all that waited were told who died; return the sentences."""
    told = puppet.do(how_it_ended)
    assert {one[:3] for one in told.values()} == {(name, int(name[1:]), pid)}
    print(f"{what}: {puppet.name} was told after {max(one[4] for one in told.values()) - since:.3f} s at most")
    return [one[3] for one in told.values()]


def wait_until_waiting() -> None:
    time.sleep(0.5)  # whoever comes later is told just as well


def test_a_worker_killed_on_another_host_is_named_and_what_it_alone_held_goes(room: list[Host]) -> None:
    world = World(room).join()
    victim, beside, far, third = world[5], world[4], world[0], world[2]
    pid = victim.do(puppets.process_id)
    for owner in ("w4", "w0", "w2"):
        for number in range(5):
            victim.do(puppets.keep_result, f"{owner}-{number}", rpc.remote, owner, Cell, (number,))
            victim.do(puppets.call_kept, f"{owner}-{number}", "to_here")
        victim.do(puppets.hand_on, f"{owner}-0", "w3")
    third.do(puppets.keep_result, "lost", rpc.remote, "w5", Cell, (1,))
    third.do(puppets.call_kept, "lost", "to_here")
    for puppet in (beside, far):
        puppet.do(begin_to_wait, "w5")
    wait_until_waiting()
    started = time.monotonic()
    victim.kill()
    for puppet, what in ((beside, "killed beside"), (far, "killed on another host")):
        check_told(puppet, "w5", pid, started, what)
    for owner in (beside, far, third):
        owner.do(puppets.wait_until_dead, "w5")
        owner.do(puppets.wait_until_entries, 1)
        print(f"{owner.name} has dropped what the dead held after {time.monotonic() - started:.3f} s")
    for owner in ("w4", "w0", "w2"):
        assert world[3].do(puppets.get_through, f"{owner}-0") == 0
    with pytest.raises(OwnerDied, match="worker 'w5'"):
        third.do(puppets.call_kept, "lost", "to_here")
    for puppet in world.all[:5]:
        puppet.do(puppets.drop_all)
    world.check(range(5))
    world.leave(range(5))


def test_a_killed_host_takes_exactly_its_holders_with_it(room: list[Host]) -> None:
    world = World(room).join()
    owner = world[0]
    pids = [world[rank].do(puppets.process_id) for rank in (4, 5)]
    for name in world.names[1:]:
        owner.do(puppets.keep_result, "own", puppets.make_reference, name)
        owner.do(puppets.hand_on, "own", name)
        owner.do(puppets.drop, "own")
    world[4].do(puppets.hand_on, "own", "w3", "heirloom")
    world[5].do(puppets.keep_result, "theirs", rpc.remote, "w4", Cell, (1,))
    owner.do(puppets.wait_until_entries, 5)
    for puppet, to in ((owner, "w4"), (world[3], "w5")):
        puppet.do(begin_to_wait, to)
    wait_until_waiting()
    started = time.monotonic()
    room[2].kill()
    check_told(owner, "w4", pids[0], started, "a host killed")
    check_told(world[3], "w5", pids[1], started, "a host killed")
    for puppet in world.all[:4]:
        for name in ("w4", "w5"):
            puppet.do(puppets.wait_until_dead, name)
        puppet.do(puppets.wait_until_removed)
    owner.do(puppets.wait_until_entries, 4)
    print(f"the owner has dropped what the dead held after {time.monotonic() - started:.3f} s")
    assert [world[rank].do(puppets.get_through, "own") for rank in (1, 2, 3)] == ["w1", "w2", "w3"]
    assert world[3].do(puppets.get_through, "heirloom") == "w4"
    owner.do(call_everybody, world.names[:4])
    for puppet in world.all[:4]:
        puppet.do(puppets.drop_all)
    world.check(range(4))
    world.leave(range(4))


_released = threading.Event()


def be_held_up(value: Any = None) -> Any:
    """Return when ``release`` was called here."""
    _released.wait(puppets.PATIENCE_S)
    return value


def release() -> None:
    _released.set()


def held_up_in_call(to: str) -> Any:
    return rpc.rpc_sync(to, be_held_up, timeout=0)


def held_up_in_future(to: str) -> Any:
    return rpc.rpc_async(to, be_held_up).wait()


def held_up_in_fetch(to: str) -> Any:
    return rpc.remote(to, be_held_up, (1,)).to_here(timeout=0)


def held_up_in_method(to: str) -> Any:
    return rpc.remote(to, be_held_up, (Cell(),)).rpc_sync(timeout=0).get()


def held_up_in_flood(to: str) -> Any:
    return torch.futures.wait_all([rpc.rpc_async(to, puppets.echo, (torch.ones(1 << 20),)) for _ in range(100)])


HELD_UP = [held_up_in_call, held_up_in_future, held_up_in_fetch, held_up_in_method]


def test_a_pulled_cable_is_the_death_of_those_beyond_it_on_both_sides(room: list[Host]) -> None:
    world = World(room).join(peer_timeout=SILENCE_S)
    here, there = range(4), range(4, 6)
    pids = [puppet.do(puppets.process_id) for puppet in world.all]
    holders = ((0, "w4"), (4, "w0"), (2, "w5"), (5, "w2"))
    for rank, owner in holders:
        world[rank].do(puppets.keep_result, "held", rpc.remote, owner, Cell, (rank,))
        world[rank].do(puppets.call_kept, "held", "to_here")
    waiters = ((0, 4), (3, 5), (4, 1), (5, 3))
    for rank, to in waiters:
        world[rank].do(begin_to_wait, f"w{to}", HELD_UP)
    wait_until_waiting()
    started = time.monotonic()
    room[2].unplug()
    world[1].do(begin_to_wait, "w4", [held_up_in_flood])  # more than fits anywhere: who sends waits too
    for rank, to in (*waiters, (1, 4)):
        for sentence in check_told(world[rank], f"w{to}", pids[to], started, "a cable pulled"):
            assert f"it has been away for {SILENCE_S:g} s" in sentence
    for side, beyond in ((here, there), (there, here)):
        for rank in side:
            for lost in beyond:
                world[rank].do(puppets.wait_until_dead, f"w{lost}")
            world[rank].do(puppets.wait_until_removed)
            world[rank].do(release)
            world[rank].do(puppets.wait_until_entries, 0)
        world[side[0]].do(call_everybody, [f"w{rank}" for rank in side])
    for rank, _ in holders:
        with pytest.raises(OwnerDied):
            world[rank].do(puppets.call_kept, "held", "to_here")
        world[rank].do(puppets.drop_all)
    room[2].plug()  # too late
    for side in (here, there):
        world.check(side)
        world.leave(side)


_bumped = 0


def bump() -> int:
    global _bumped
    _bumped += 1
    return _bumped


def bumped() -> int:
    return _bumped


def bump_until_refused(to: str) -> tuple[str, str]:
    """Call without end; return whom the error names, and what it says."""
    while True:
        try:
            rpc.rpc_sync(to, bump)
        except WorkerDied as error:
            return error.name, str(error)


def test_a_host_stopped_for_too_long_is_dead_for_good(room: list[Host]) -> None:
    world = World(room).join(peer_timeout=SILENCE_S)
    for rank, owner in ((5, "w0"), (4, "w2"), (0, "w5"), (3, "w4")):
        world[rank].do(puppets.keep_result, "held", rpc.remote, owner, Cell, (rank,))
        world[rank].do(puppets.call_kept, "held", "to_here")
        world[rank].do(puppets.hand_on, "held", "w1", f"from w{rank}")
    world[5].order(bump_until_refused, "w0")
    wait_until(lambda: world[0].do(bumped))
    started = time.monotonic()
    room[2].stop()
    for rank in range(4):
        for name in ("w4", "w5"):
            world[rank].do(puppets.wait_until_dead, name)
        world[rank].do(puppets.wait_until_removed)
    print(f"a host stopped: all knew after {time.monotonic() - started:.3f} s")
    with pytest.raises(WorkerDied, match=f"it has been away for {SILENCE_S:g} s"):
        world[0].do(rpc.rpc_sync, "w5", puppets.nothing)
    bumps = world[0].do(bumped)
    assert [world[rank].do(puppets.entries_held) for rank in (0, 2)] == [1, 1]  # those that w1 holds
    started = time.monotonic()
    room[2].cont()
    name, sentence = world[5].outcome()
    print(f"it saw so {time.monotonic() - started:.3f} s after it went on: {sentence}")
    assert name == "w0"
    for rank in (4, 5):
        for other in range(4):
            world[rank].do(puppets.wait_until_dead, f"w{other}")
        world[rank].do(puppets.wait_until_removed)
        for use in ("to_here", "rpc_sync"):
            with pytest.raises(OwnerDied):
                world[rank].do(use_kept, "held", use)
        world[rank].do(puppets.drop_all)  # nobody is told: the owners have dropped it long ago
        world[rank].do(puppets.wait_until_entries, 0)
    assert world[0].do(bumped) == bumps
    assert [world[rank].do(puppets.entries_held) for rank in (0, 2)] == [1, 1]
    for rank in range(4):
        world[rank].do(puppets.drop_all)
    for side in ((0, 1, 2, 3), (4, 5)):
        world.check(side)
        world.leave(side)


def use_kept(label: str, how: str) -> None:
    rref = puppets.kept(label)
    rref.to_here() if how == "to_here" else rref.rpc_sync().get()


def test_a_worker_stopped_for_too_long_is_dead_to_those_beside_it_too(room: list[Host]) -> None:
    """Those of its host share memory with it, and would wait; but a worker lives for all, or for nobody."""
    world = World(room).join(peer_timeout=SILENCE_S)
    for rank, owner in ((5, "w0"), (4, "w5"), (5, "w4")):
        world[rank].do(puppets.keep_result, f"of {owner}", rpc.remote, owner, Cell, (rank,))
        world[rank].do(puppets.call_kept, f"of {owner}", "to_here")
    started = time.monotonic()
    world[5].stop()
    for puppet in world.all[:5]:
        puppet.do(puppets.wait_until_dead, "w5")
        puppet.do(puppets.wait_until_removed)
        puppet.do(puppets.wait_until_entries, 0)
    print(f"a worker stopped: it was removed everywhere after {time.monotonic() - started:.3f} s")
    with pytest.raises(OwnerDied, match="w5"):
        world[4].do(use_kept, "of w5", "to_here")
    world[5].go_on()
    for puppet in world.all[:5]:
        world[5].do(puppets.wait_until_dead, puppet.name)
    for owner in ("w0", "w4"):
        with pytest.raises(OwnerDied):
            world[5].do(use_kept, f"of {owner}", "rpc_sync")
    for puppet in world.all:
        puppet.do(puppets.drop_all)
    for side in (range(5), (5,)):
        world.check(side)
        world.leave(side)


def cut(rank: int) -> None:
    current_wiring().cut(rank, "the test says so")


@pytest.mark.parametrize(("first", "second"), [(0, 5), (5, 0)], ids=["lower", "higher"])
def test_of_two_that_have_lost_each_other_one_goes_for_all(room: list[Host], first: int, second: int) -> None:
    world = World(room).join(peer_timeout=SILENCE_S)
    world[4].do(puppets.keep_result, "of w5", rpc.remote, "w5", Cell, (1,))
    world[first].do(cut, second)
    for puppet in world.all[:5]:
        puppet.do(puppets.wait_until_dead, "w5")
        puppet.do(puppets.wait_until_removed)
    for puppet in world.all[:5]:
        world[5].do(puppets.wait_until_dead, puppet.name)
        puppet.do(call_everybody, world.names[:5])
    with pytest.raises(WorkerDied, match="worker 'w5' .* died: worker 'w0' takes it for dead: "):
        world[4].do(rpc.rpc_sync, "w5", puppets.nothing)
    world[4].do(puppets.drop_all)
    for side in (range(5), (5,)):
        world.check(side)
        world.leave(side)
