"""Groups that workers join and leave while others work: nobody is lost, taken for another, or waited for in vain."""

from __future__ import annotations

import gc
import os
import threading
import time
from random import Random
from typing import Any

import pytest
import torch

import fastref.rpc as rpc
from fastref._core import arm_failpoints
from fastref.errors import CallTimeout, FastrefError, OwnerDied, ReferenceLost, RendezvousError, UsageError, WorkerDied
from fastref.rref import current_wiring
from tests import puppets
from tests.puppets import PATIENCE_S, Ended, Puppet, Troupe, troupe_fixture  # noqa: F401

pytestmark = pytest.mark.shared_memory("workers of a group of open size use nothing else so far")

ROUNDS = 20
# Half of them leave a worker few bits, or none: then holders go by messages.
BITS = [61, 1]


def join(troupe: Troupe, puppet: Puppet, rank: int, name: str | None = None, **options: Any) -> None:
    puppet.order(puppets.join_job, name or puppet.name, rank, None, troupe.job, options)


def enter(troupe: Troupe, name: str, rank: int, **options: Any) -> Puppet:
    """Hire a worker that joins the group of the test."""
    puppet = troupe.hire(name)
    join(troupe, puppet, rank, **options)
    puppet.outcome()
    return puppet


def members() -> dict[str, int]:
    """Return names and ranks as this worker sees them."""
    return {info.name: info.id for info in rpc.api._get_current_rpc_agent().get_worker_infos()}


def call_everybody() -> dict[str, int]:
    """Call every member by name and by rank; who runs where."""
    pids = {name: rpc.rpc_sync(name, puppets.process_id) for name in members()}
    assert pids == {name: rpc.rpc_sync(rank, puppets.process_id) for name, rank in members().items()}
    return pids


def check_group(*workers: Puppet) -> None:
    """All of them, and nobody else, are members, and each can call each."""
    for worker in workers:
        assert worker.do(call_everybody) == {other.name: other.pid for other in workers}


def leave(puppet: Puppet, graceful: bool = True) -> None:
    puppet.do(rpc.shutdown, graceful, PATIENCE_S)


def wait_until_members(names: set[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while set(members()) != names:
        assert time.monotonic() < deadline, f"members are {members()}, not {names}"
        time.sleep(0.002)


# ---- joining


def test_the_first_worker_is_a_group_of_one(troupe: Troupe) -> None:
    one = enter(troupe, "alone", 3)
    check_group(one)
    assert one.do(members) == {"alone": 3}
    leave(one)


def is_static() -> bool:
    static: bool = rpc.api._get_current_rpc_agent().is_static_group
    return static


def test_a_newcomer_calls_everybody_and_is_called_by_everybody(troupe: Troupe) -> None:
    crew: list[Puppet] = []
    for name, rank in (("w0", 0), ("w1", 1), ("seven", 7), ("four", 4)):
        crew.append(enter(troupe, name, rank))
        check_group(*crew)
    assert not crew[0].do(is_static)
    for worker in crew:
        leave(worker)


def test_six_that_join_at_once_all_get_in(troupe: Troupe) -> None:
    crew = [troupe.hire(f"w{rank}") for rank in range(6)]
    for rank, worker in enumerate(crew):
        join(troupe, worker, rank)
    for worker in crew:
        worker.outcome()
    check_group(*crew)
    for worker in crew:
        worker.order(rpc.shutdown, True, PATIENCE_S)
    for worker in crew:
        worker.outcome()


def hammer(name: str, seconds: float) -> int:
    """Call a worker in every way for a while; every answer is checked, every error comes out."""
    done = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert rpc.rpc_sync(name, puppets.echo, (done,)) == done
        assert rpc.rpc_async(name, puppets.echo, ("x" * 9000,)).wait() == "x" * 9000
        cell = rpc.remote(name, puppets.Cell, (done,))
        assert cell.rpc_sync().get() == done
        tensor = torch.full((20_000,), done)
        assert torch.equal(rpc.rpc_sync(name, puppets.echo, (tensor,)), tensor)
        done += 1
    return done


@pytest.mark.parametrize("bits", BITS)
def test_workers_join_and_leave_while_others_call_each_other(troupe: Troupe, bits: int) -> None:
    zero, one = enter(troupe, "w0", 0, table_bits=bits), enter(troupe, "w1", 1, table_bits=bits)
    zero.order(hammer, "w1", 4.0)
    one.order(hammer, "w0", 4.0)
    guest = troupe.hire("guest")
    for rank in (2, 3, 2, 2, 5):
        join(troupe, guest, rank, table_bits=bits)
        guest.outcome()
        assert guest.do(hammer, "w0", 0.1) and guest.do(hammer, "w1", 0.1)
        leave(guest)
    assert zero.outcome() and one.outcome()
    for worker in (zero, one):
        worker.do(puppets.wait_until_removed)
        worker.do(puppets.wait_until_entries, 0)
    check_group(zero, one)
    leave(one)
    leave(zero)


# ---- leaving

_served = 0
_lock = threading.Lock()


def count_me() -> int:
    global _served
    with _lock:
        _served += 1
    return _served


def served() -> int:
    return _served


def call_until_it_leaves(name: str) -> tuple[int, str]:
    """Call a worker until it cannot be called any more; how many calls were answered, and the error."""
    answered = 0
    while True:
        try:
            rpc.rpc_sync(name, count_me, timeout=PATIENCE_S)
            answered += 1
        except WorkerDied as error:
            return answered, str(error)


def test_no_call_to_a_worker_that_leaves_is_lost(troupe: Troupe) -> None:
    crew = [enter(troupe, f"w{rank}", rank) for rank in range(4)]
    for worker in crew[1:]:
        worker.order(call_until_it_leaves, "w0")
    time.sleep(0.5)
    leave(crew[0])
    outcomes = [worker.outcome() for worker in crew[1:]]
    assert sum(answered for answered, _ in outcomes) == crew[0].do(served) > 0
    assert all("'w0' (rank 0" in error and "has left" in error for _, error in outcomes)
    check_group(*crew[1:])
    for worker in crew[1:]:
        leave(worker)


def call_and_leave(name: str) -> Any:
    future = rpc.rpc_async(name, puppets.make_slowly, (0.5, "there"))
    rpc.shutdown(timeout=PATIENCE_S)
    return future.value()


def test_the_calls_of_a_worker_that_leaves_are_answered(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    assert one.do(call_and_leave, "w0") == "there"
    leave(zero)


def use_kept(label: str) -> str:
    """Use what is kept here in every way; the type of the error that all ways give, and its text."""
    reference = puppets.kept(label)
    errors = []
    for use in (reference.to_here, reference.rpc_sync().get, reference.rpc_async().get().wait):
        with pytest.raises(OwnerDied) as caught:
            use()
        errors.append(str(caught.value))
    return errors[0]


def owner_of_kept(label: str) -> tuple[str, int]:
    owner = puppets.kept(label).owner()
    return owner.name, owner.id


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("graceful", [True, False])
def test_who_leaves_lets_go_and_its_own_values_go_with_it(troupe: Troupe, graceful: bool, bits: int) -> None:
    zero, one, two = (enter(troupe, f"w{rank}", rank, table_bits=bits) for rank in range(3))
    for worker in (one, two):
        worker.do(puppets.keep_result, "held", rpc.remote, "w0", puppets.Cell, (1,))
    zero.do(puppets.keep_result, "lost", rpc.remote, "w1", puppets.Cell, (2,))
    zero.do(puppets.wait_until_entries, 2)
    leave(one, graceful)
    zero.do(puppets.wait_until_entries, 1)
    assert "'w1' (rank 1" in (error := zero.do(use_kept, "lost")) and "has left" in error
    assert two.do(puppets.call_kept, "held", "to_here").value == 1
    assert zero.do(members) == {"w0": 0, "w2": 2}
    check_group(zero, two)
    leave(zero)
    assert "has left" in two.do(use_kept, "held")
    leave(two)


def test_rank_0_may_leave_and_come_again(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    leave(zero)
    two = enter(troupe, "w2", 2)
    check_group(one, two)
    join(troupe, zero, 0)
    zero.outcome()
    check_group(one, two, zero)
    for worker in (one, two, zero):
        leave(worker)


def test_everybody_may_leave_at_once(troupe: Troupe) -> None:
    crew = [enter(troupe, f"w{rank}", rank) for rank in range(5)]
    for worker in crew:
        worker.order(rpc.shutdown, True, PATIENCE_S)
    for worker in crew:
        worker.outcome()


# ---- one rank, many workers


def use_reference(reference: rpc.RRef) -> Any:
    return reference.rpc_sync().get()


def hand_to(name: str, label: str) -> None:
    """A reference to a value of somebody who has gone is not taken for one of its successor's."""
    with pytest.raises(OwnerDied):
        rpc.rpc_sync(name, use_reference, (puppets.kept(label),))


def figures_of_system() -> tuple[int, int]:
    """Descriptors and mappings of shared memory of this process."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = sum("memfd:fastref" in line or "/dev/shm/fastref" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mappings


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_a_rank_and_a_name_are_used_twenty_times(troupe: Troupe, end: str, bits: int) -> None:
    zero, one = enter(troupe, "w0", 0, table_bits=bits), enter(troupe, "w1", 1, table_bits=bits)
    figures = []
    guest = enter(troupe, "guest", 2, table_bits=bits)
    for turn in range(ROUNDS):
        check_group(zero, one, guest)
        zero.do(puppets.keep_result, f"of {turn}", rpc.remote, "guest", puppets.Cell, (turn,))
        zero.do(puppets.hand_on, f"of {turn}", "w1")
        guest.do(puppets.keep_result, "mine", rpc.remote, "w0", puppets.Cell, (turn,))
        guest.do(puppets.hand_on, "mine", "w1", f"by {turn}")
        assert one.do(puppets.get_through, f"of {turn}") == turn
        if turn:
            for worker in (zero, one):
                error = worker.do(use_kept, f"of {turn - 1}")
                assert "'guest' (rank 2" in error and ("has left" if end == "leaves" else "died") in error
            assert zero.do(owner_of_kept, f"of {turn - 1}") == ("guest", 2)
            one.do(hand_to, "guest", f"of {turn - 1}")
            one.do(hand_to, "w0", f"of {turn - 1}")
            one.do(puppets.drop, f"of {turn - 1}")
            zero.do(puppets.drop, f"of {turn - 1}")
        if end == "leaves":
            leave(guest)
        else:
            guest.kill()
            guest = troupe.hire("guest")
        join(troupe, guest, 2, table_bits=bits)
        guest.outcome()
        assert one.do(puppets.get_through, f"by {turn}") == turn  # what it had handed on stays
        zero.do(puppets.wait_until_entries, turn + 1)
        if turn in (3, ROUNDS - 1):
            figures.append((zero.do(figures_of_system), one.do(figures_of_system)))
    assert figures[0] == figures[1]
    for turn in range(ROUNDS):
        one.do(puppets.drop, f"by {turn}")
    zero.do(puppets.wait_until_entries, 0)
    for worker in (guest, one, zero):
        leave(worker)


def test_rank_and_name_are_used_again_each_by_another(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    leave(one)
    other, same = enter(troupe, "other", 1), enter(troupe, "w1", 2)
    check_group(zero, other, same)
    for worker in (zero, other, same):
        leave(worker)


def look_for(name: str, rank: int) -> list[str]:
    errors = []
    for to in (name, rank):
        for use in (rpc.get_worker_info, lambda to: rpc.rpc_sync(to, puppets.nothing)):
            with pytest.raises(WorkerDied) as caught:
                use(to)
            errors.append(str(caught.value))
    return errors


@pytest.mark.parametrize(("end", "said"), [("leaves", "has left"), ("is killed", "died")])
def test_who_has_gone_is_named_to_who_looks_for_it(troupe: Troupe, end: str, said: str) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    if end == "leaves":
        leave(one)
    else:
        one.kill()
    zero.do(wait_until_members, {"w0"})
    assert all("'w1' (rank 1" in error and said in error for error in zero.do(look_for, "w1", 1))
    leave(zero)


# ---- what is refused


def test_a_strict_worker_joins_a_strict_group_only(troupe: Troupe) -> None:
    one = enter(troupe, "one", 0, strict=True)
    other = troupe.hire("other")
    join(troupe, other, 1)
    with pytest.raises(RendezvousError, match=r"worker 'one' \(.*\) is strict and worker 'other' \(.*\) is not"):
        other.outcome()
    assert one.do(members) == {"one": 0}
    join(troupe, other, 1, strict=True)
    other.outcome()
    assert one.do(members) == {"one": 0, "other": 1}
    for puppet in (other, one):
        leave(puppet)


def test_names_and_ranks_are_unique_among_the_living(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    late = troupe.hire("late")
    for name, rank, what in (("w1", 2, "the name 'w1'"), ("w2", 1, "rank 1"), ("w0", 0, "rank 0")):
        join(troupe, late, rank, name)
        with pytest.raises(RendezvousError, match=f"{what} is not unique"):
            late.outcome()
        check_group(zero, one)
    join(troupe, late, 2)
    late.outcome()
    check_group(zero, one, late)
    for worker in (zero, one, late):
        leave(worker)


MIXED = "RPC group mixes statically and dynamically initialized members which is not supported. "


def test_a_job_of_fixed_size_lets_nobody_in(troupe: Troupe) -> None:
    crew = troupe.start(2)
    late = troupe.hire("late")
    join(troupe, late, 2)
    with pytest.raises(RendezvousError, match=MIXED):
        late.outcome()
    assert crew[0].do(is_static)
    troupe.leave(crew)


def test_a_worker_with_a_world_size_gets_into_no_group(troupe: Troupe) -> None:
    zero = enter(troupe, "w0", 0)
    late = troupe.hire("late")
    late.order(puppets.join_job, "late", 1, 2, troupe.job, {})
    with pytest.raises(RendezvousError, match=MIXED):
        late.outcome()
    check_group(zero)
    leave(zero)


def init_over(init_method: str, rank: int = -1) -> None:
    rpc.init_rpc("w0", rank=rank, rpc_backend_options=rpc.RpcBackendOptions(init_method=init_method))


@pytest.mark.parametrize(
    ("init_method", "error", "text"),
    [
        ("local://nowhere", UsageError, "needs a rank"),
        ("file:///tmp/nowhere", ValueError, "rank parameter missing"),
        ("tcp://127.0.0.1:1", ValueError, "rank parameter missing"),
        ("env://", ValueError, "environment variable RANK expected"),
    ],
)
def test_a_member_needs_a_rank(troupe: Troupe, init_method: str, error: type[Exception], text: str) -> None:
    one = troupe.hire("w0")
    one.order(init_over, init_method)
    with pytest.raises(error, match=text):
        one.outcome()


@pytest.mark.parametrize(
    ("init_method", "error", "text"),
    [
        ("env://", ValueError, "environment variable"),
        ("tcp://192.0.2.1:2345", UsageError, "'192.0.2.1' .* is not this host"),
        ("tcp://nowhere.invalid:2345", UsageError, "is not this host"),
    ],
)
def test_a_group_is_on_one_host(troupe: Troupe, init_method: str, error: type[Exception], text: str) -> None:
    one = troupe.hire("w0")
    one.order(init_over, init_method, 0)
    with pytest.raises(error, match=text):
        one.outcome()


def test_a_group_over_torchs_methods_needs_no_store(troupe: Troupe, tmp_path: Any) -> None:
    for init_method in ("tcp://127.0.0.1:9", "tcp://localhost:9", f"file://{tmp_path}/rendezvous"):
        zero, one = troupe.hire("zero"), troupe.hire("w0")
        zero.do(init_over, init_method, 7)  # its name is w0 as well
        one.order(init_over, init_method, 1)
        with pytest.raises(RendezvousError, match="not unique"):
            one.outcome()
        leave(zero)
        one.do(init_over, init_method, 1)
        assert one.do(members) == {"w0": 1}
        leave(one)


def test_ranks_end_where_rings_do(troupe: Troupe) -> None:
    one = troupe.hire("w0")
    join(troupe, one, 256)
    with pytest.raises(UsageError, match="from 0 to 255"):
        one.outcome()
    join(troupe, one, 255)
    one.outcome()
    check_group(one)
    leave(one)


# ---- over a store


def join_over(path: str, name: str, rank: int, init_method: str = "local://not-asked") -> None:
    """Join as programs do that bring a store of their own."""
    store = torch.distributed.FileStore(path, -1)
    options = rpc.TensorPipeRpcBackendOptions(init_method=init_method)
    rpc._init_rpc_backend(rpc.backend_registry.BackendType.TENSORPIPE, store, name, rank, None, options)


def test_workers_find_each_other_over_a_store_of_their_own(troupe: Troupe, tmp_path: Any) -> None:
    crew = [troupe.hire(name) for name in ("w0", "w1", "w2")]
    for rank, worker in enumerate(crew):
        worker.do(join_over, str(tmp_path / "store"), worker.name, rank)
    check_group(*crew)
    stranger = troupe.hire("stranger")
    stranger.do(join_over, str(tmp_path / "another"), "w0", 0)
    assert stranger.do(members) == {"w0": 0}
    for worker in (*crew, stranger):
        leave(worker)


@pytest.mark.parametrize("init_method", ["env://", "tcp://no.such.host.invalid:1"])
def test_those_who_bring_a_store_are_not_asked_for_what_the_init_method_lacks(
    troupe: Troupe, tmp_path: Any, init_method: str
) -> None:
    crew = [troupe.hire(name) for name in ("w0", "w1")]
    for rank, worker in enumerate(crew):
        worker.do(join_over, str(tmp_path / "store"), worker.name, rank, init_method)
    check_group(*crew)
    for worker in crew:
        leave(worker)


# ---- deaths

WAY_IN = [
    "rendezvous.listening",
    "group.turn_taken",
    "group.asked",
    "segment.mapped",
    "group.half_linked",
    "rendezvous.linked",
    "rendezvous.greeting",
    "group.registered",
]


@pytest.mark.parametrize("point", WAY_IN)
def test_a_worker_killed_on_its_way_in_is_in_nobodys_way(troupe: Troupe, point: str) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    for passage in (1, 2):
        while True:
            victim = troupe.hire("guest")
            victim.do(arm_failpoints, f"{point}=kill:{passage}")
            join(troupe, victim, 2)
            guest = troupe.hire("guest")
            join(troupe, guest, 2)  # waits for its turn
            try:
                victim.outcome()
                survived = True
            except Ended:
                survived = False
            except RendezvousError as error:  # the guest has overtaken it: once more
                assert "not unique" in str(error)
                guest.outcome()
                leave(guest)
                victim.kill()
                continue
            break
        assert not survived or passage == 2
        if survived:  # it does not come that way twice
            with pytest.raises(RendezvousError, match="not unique"):
                guest.outcome()
            victim.kill()
            join(troupe, guest, 2)
        guest.outcome()
        check_group(zero, one, guest)
        leave(guest)
    for worker in (zero, one):
        worker.do(puppets.wait_until_removed)
        leave(worker)


@pytest.mark.parametrize("point", ["group.admitting", "group.admitted", "segment.mapped"])
def test_a_member_killed_while_it_lets_one_in_is_left_out(troupe: Troupe, point: str) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    zero.do(arm_failpoints, f"{point}=kill:1")
    guest = enter(troupe, "guest", 2)
    for worker in (one, guest):
        worker.do(wait_until_members, {"w1", "guest"})
    check_group(one, guest)
    again = enter(troupe, "w0", 0)
    check_group(one, guest, again)
    for worker in (one, guest, again):
        leave(worker)


@pytest.mark.parametrize("point", ["group.unregistered", "group.half_told", "shutdown.leaving"])
def test_a_worker_killed_on_its_way_out_has_gone(troupe: Troupe, point: str) -> None:
    zero, one, two = (enter(troupe, f"w{rank}", rank) for rank in range(3))
    one.do(puppets.keep_result, "held", rpc.remote, "w0", puppets.Cell, (1,))
    one.do(arm_failpoints, f"{point}=kill:1")
    with pytest.raises(Ended):
        leave(one)
    zero.do(puppets.wait_until_entries, 0)
    again = enter(troupe, "w1", 1)
    check_group(zero, again, two)
    for worker in (zero, again, two):
        leave(worker)


def test_nobody_waits_for_a_member_that_dies_while_another_leaves(troupe: Troupe) -> None:
    zero, one, two = (enter(troupe, f"w{rank}", rank) for rank in range(3))
    one.stop()
    zero.order(rpc.shutdown, True, PATIENCE_S)
    time.sleep(0.3)
    one.kill()
    zero.outcome()
    two.do(wait_until_members, {"w2"})
    leave(two)


def test_who_leaves_waits_for_a_stopped_member_as_long_as_it_wants(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    one.stop()
    zero.order(rpc.shutdown, True, 0.5)
    with pytest.raises(CallTimeout, match=r"\['w1'\] have not taken note"):
        zero.outcome()
    one.go_on()
    one.do(wait_until_members, {"w1"})
    again = enter(troupe, "w0", 0)
    check_group(one, again)
    for worker in (one, again):
        leave(worker)


def churn(job: str, name: str, rank: int, turns: int, bits: int) -> int:
    """Join, use everybody who is there, and leave, again and again."""
    done = 0
    for turn in range(turns):
        puppets.join_job(name, rank, None, job, {"table_bits": bits})
        for other in list(members()):
            try:
                cell = rpc.remote(other, puppets.Cell, (turn,))
                assert cell.rpc_sync(timeout=PATIENCE_S).get() == turn
                for third in list(members()):
                    assert rpc.rpc_sync(third, use_reference, (cell,), timeout=PATIENCE_S) == turn
                done += 1
            except FastrefError as error:
                # All of them may leave at any moment.
                assert isinstance(error, (WorkerDied, ReferenceLost, UsageError)) or "has left" in str(error), error
        rpc.shutdown(graceful=(turn + rank) % 4 != 0, timeout=PATIENCE_S)
    return done


@pytest.mark.parametrize("bits", BITS)
def test_a_group_in_which_everybody_comes_and_goes(troupe: Troupe, bits: int) -> None:
    zero = enter(troupe, "w0", 0, table_bits=bits)
    crew = [troupe.hire(f"w{rank}") for rank in range(1, 5)]
    for rank, worker in enumerate(crew, 1):
        worker.order(churn, troupe.job, worker.name, rank, 12, bits)
    assert sum(worker.outcome() for worker in crew) > 0
    zero.do(wait_until_members, {"w0"})
    zero.do(puppets.wait_until_removed)
    zero.do(puppets.wait_until_entries, 0)
    leave(zero)


def test_who_joins_waits_for_a_stopped_member_and_then_gets_in(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    one.stop()
    late = [troupe.hire(f"late{i}") for i in range(2)]
    for rank, worker in enumerate(late, 2):
        join(troupe, worker, rank)
    time.sleep(0.3)
    assert zero.do(members) == {"w0": 0, "w1": 1}
    one.go_on()
    for worker in late:
        worker.outcome()
    check_group(zero, one, *late)
    for worker in (zero, one, *late):
        leave(worker)


def test_who_joins_says_which_member_does_not_answer(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    one.stop()
    late = troupe.hire("late")
    join(troupe, late, 2, rpc_timeout=2.0)
    with pytest.raises(RendezvousError, match="'w1'.* does not answer"):
        late.outcome()
    one.go_on()
    check_group(zero, one)
    join(troupe, late, 2)
    late.outcome()
    check_group(zero, one, late)
    for worker in (zero, one, late):
        leave(worker)


def serving_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastref")]


def test_who_gives_up_before_all_have_greeted_it_leaves_nothing_behind(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    one.do(arm_failpoints, "group.admitted=stop:5")
    late = troupe.hire("late")
    join(troupe, late, 2, rpc_timeout=2.0)
    with pytest.raises(RendezvousError, match=r"\['w1'\] have linked .* but do not serve"):
        late.outcome()
    deadline = time.monotonic() + PATIENCE_S
    while threads := late.do(serving_threads):
        assert time.monotonic() < deadline, threads
        time.sleep(0.01)
    join(troupe, late, 2)
    late.outcome()
    check_group(zero, one, late)
    for worker in (zero, one, late):
        leave(worker)


@pytest.mark.parametrize("point", WAY_IN)
def test_a_worker_stopped_on_its_way_in_delays_the_next_and_no_more(troupe: Troupe, point: str) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    slow, next_one = troupe.hire("slow"), troupe.hire("next")
    slow.do(arm_failpoints, f"{point}=stop:0.3")
    join(troupe, slow, 2)
    join(troupe, next_one, 3)
    assert zero.do(hammer, "w1", 0.5)
    slow.outcome()
    next_one.outcome()
    check_group(zero, one, slow, next_one)
    for worker in (zero, one, slow, next_one):
        leave(worker)


@pytest.mark.parametrize("bits", BITS)
def test_a_group_in_which_many_are_killed_and_others_take_their_ranks(troupe: Troupe, bits: int) -> None:
    zero = enter(troupe, "w0", 0, table_bits=bits)
    crew: dict[int, Puppet] = {}

    def send_in(rank: int) -> None:
        crew[rank] = troupe.hire(f"w{rank}")
        crew[rank].order(churn, troupe.job, f"w{rank}", rank, 1000, bits)

    for rank in range(1, 4):
        send_in(rank)
    random = Random(bits)
    for _ in range(12):
        time.sleep(random.random() * 0.3)
        rank = random.randrange(1, 4)
        assert not crew[rank].pipe.poll(), crew[rank].outcome()  # it goes on, and has met no error that it must not
        crew[rank].kill()
        send_in(rank)
    for worker in crew.values():
        worker.kill()
    zero.do(wait_until_members, {"w0"})
    zero.do(puppets.wait_until_removed)
    zero.do(puppets.wait_until_entries, 0)
    leave(zero)


def stay_in_turns(job: str, rank: int, sizes: list[int | None], count: int) -> None:
    """Be in jobs of fixed size and in groups, all of one name."""
    for size in sizes:
        puppets.join_job(f"w{rank}", rank, size, job, {})
        if size is None:
            wait_until_members({f"w{other}" for other in range(count)})
            rpc.api._barrier(members())
        rpc.shutdown(timeout=PATIENCE_S)


def test_a_group_may_follow_a_job_and_a_job_a_group(troupe: Troupe) -> None:
    crew = [troupe.hire(f"w{rank}") for rank in range(2)]
    for rank, worker in enumerate(crew):
        worker.order(stay_in_turns, troupe.job, rank, [2, None, 2, None], 2)
    for worker in crew:
        worker.outcome()


def keep_and_leave() -> None:
    """Keep a reference, leave in the way that lets nothing go by itself, and keep it still."""
    puppets.keep("old", rpc.remote("w0", puppets.Cell, (1,)))
    puppets.kept("old").rpc_sync().get()
    rpc.shutdown(graceful=False)


def test_what_a_process_kept_of_an_earlier_stay_touches_nothing_of_the_next(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    one.do(keep_and_leave)
    zero.do(puppets.wait_until_entries, 0)
    join(troupe, one, 1)
    one.outcome()
    one.do(puppets.keep_result, "new", rpc.remote, "w0", puppets.Cell, (2,))
    zero.do(puppets.wait_until_entries, 1)
    one.do(puppets.drop, "old")
    assert one.do(puppets.get_through, "new") == 2
    zero.do(puppets.wait_until_entries, 1)
    one.do(puppets.drop, "new")
    zero.do(puppets.wait_until_entries, 0)
    leave(one)
    leave(zero)


def test_a_worker_leaves_though_another_keeps_it_busy_with_calls_without_end(troupe: Troupe) -> None:
    zero, one = enter(troupe, "w0", 0), enter(troupe, "w1", 1)
    one.order(call_until_it_leaves, "w0")
    time.sleep(0.2)
    assert current_wiring() is None
    leave(zero)
    answered, error = one.outcome()
    assert answered and "has left" in error
    leave(one)
