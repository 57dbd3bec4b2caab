"""Joining and leaving: every init method, again and again, in any order, with references and calls under way."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

import fastref.rpc as rpc
from fastref.errors import CallTimeout, NotInitialized, PeerError, RendezvousError, UsageError
from fastref.rref import current_wiring
from tests import work
from tests.jobs import Job, names

Start = Callable[[Callable[..., object], list[tuple[object, ...]]], Any]


def options(init_method: str, **more: Any) -> rpc.RpcBackendOptions:
    return rpc.RpcBackendOptions(init_method=init_method, **more)


def join(rank: int, world_size: int, init_method: str, **more: Any) -> Any:
    return rpc.init_rpc(f"w{rank}", rank=rank, world_size=world_size, rpc_backend_options=options(init_method, **more))


@pytest.fixture
def name() -> str:
    """Return a local init method that no other test uses."""
    return f"local://sessions-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def start_job(mp_context: ForkServerContext, no_leaks: None) -> Iterator[Callable[..., Job]]:
    """Return what starts a job whose workers follow orders."""
    started: list[Job] = []

    def start(world_size: int, **more: Any) -> Job:
        started.append(Job(mp_context, world_size, **more))
        return started[-1]

    yield start
    try:
        for job in started:
            job.check()
            job.close()
    finally:
        for job in started:
            job.kill()


# ---- every way to meet


def meet_and_call(rank: int, world_size: int, init_method: str) -> None:
    with join(rank, world_size, init_method):
        for other in names(world_size):
            assert rpc.rpc_sync(other, work.who_am_i) == other
            assert rpc.remote(other, work.echo, args=(rank,)).to_here() == rank


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_meet_by_a_local_name(spawn_workers: Start, name: str, world_size: int) -> None:
    spawn_workers(meet_and_call, [(rank, world_size, name) for rank in range(world_size)]).join()


def test_workers_meet_by_a_file(spawn_workers: Start, tmp_path: Path) -> None:
    spawn_workers(meet_and_call, [(rank, 3, f"file://{tmp_path}/store") for rank in range(3)]).join()


@pytest.fixture
def port() -> int:
    """Return a port that nobody listens on."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return int(store.port)


def test_workers_meet_by_a_port(spawn_workers: Start, port: int) -> None:
    spawn_workers(meet_and_call, [(rank, 3, f"tcp://127.0.0.1:{port}") for rank in range(3)]).join()


def meet_by_environment(rank: int, world_size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    with rpc.init_rpc(f"w{rank}"):
        assert rpc.get_worker_info() == rpc.WorkerInfo(f"w{rank}", rank)
        for other in names(world_size):
            assert rpc.rpc_sync(other, work.who_am_i) == other


def test_workers_meet_as_the_environment_says(spawn_workers: Start, port: int) -> None:
    spawn_workers(meet_by_environment, [(rank, 3, port) for rank in range(3)]).join()


def test_a_worker_alone_calls_itself_and_leaves_nothing(name: str) -> None:
    for _ in range(3):
        with join(0, 1, name):
            assert rpc.rpc_sync("w0", work.who_am_i) == "w0"
            assert rpc.rpc_async("w0", work.depth, args=(10, ["w0"])).wait() == 10
            assert rpc.remote("w0", work.Counter, args=(5,)).rpc_sync().get() == 5


# ---- again and again


def join_thirty_times(rank: int, world_size: int, init_method: str) -> None:
    held: list[tuple[rpc.RRef, rpc.RRef]] = []
    for number in range(30):
        join((rank + number) % world_size, world_size, init_method)
        me, other = rpc.get_worker_info(), f"w{(rank + number + 1) % world_size}"
        mine = rpc.RRef([number])
        assert mine.rref_id().created_on == me.id
        theirs = rpc.remote(other, work.Counter, args=(number,))
        assert theirs.rpc_sync().get() == number
        assert rpc.rpc_sync(other, work.look, args=(mine,)) == (False, me.name, [number])
        for old_theirs, old_mine in held[-1:]:
            for use in (old_theirs.to_here, old_theirs.rpc_sync):
                with pytest.raises(UsageError, match="has been deleted. Cannot call .* on it after deletion"):
                    use()
            assert old_mine.local_value() == [number - 1]
            with pytest.raises(UsageError, match="another runtime"):
                rpc.rpc_sync(other, work.echo, args=(old_mine,))
        held.append((theirs, mine))
        if number % 3 == 0:
            del held[: len(held) // 2]
        rpc.shutdown()


def test_the_ids_of_every_session_start_at_zero(name: str) -> None:
    for _ in range(2):
        with join(0, 1, name):
            assert repr(rpc.RRef(1)) == "OwnerRRef(GloballyUniqueId(created_on=0, local_id=0))"
            assert rpc.remote("w0", work.nothing).rref_id().local_id == 1
            assert repr(rpc.RRef(1)) == "OwnerRRef(GloballyUniqueId(created_on=0, local_id=3))"


def test_workers_join_and_leave_thirty_times_with_references_alive(spawn_workers: Start, name: str) -> None:
    spawn_workers(join_thirty_times, [(rank, 2, name) for rank in range(2)]).join()


def join_several_times(rank: int, world_size: int, init_method: str) -> None:
    for _ in range(4):
        meet_and_call(rank, world_size, init_method)


def test_workers_meet_again_in_one_file(spawn_workers: Start, tmp_path: Path) -> None:
    spawn_workers(join_several_times, [(rank, 2, f"file://{tmp_path}/store") for rank in range(2)]).join()


def test_workers_meet_again_at_one_port(spawn_workers: Start, port: int) -> None:
    spawn_workers(join_several_times, [(rank, 2, f"tcp://127.0.0.1:{port}") for rank in range(2)]).join()


def test_who_finds_the_store_of_the_job_before_looks_again(spawn_workers: Start, port: int) -> None:
    before = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    late = spawn_workers(meet_and_call, [(1, 2, f"tcp://127.0.0.1:{port}")])
    time.sleep(0.5)
    del before
    first = spawn_workers(meet_and_call, [(0, 2, f"tcp://127.0.0.1:{port}")])
    late.join()
    first.join()


def test_two_jobs_of_one_host_do_not_meet(spawn_workers: Start, name: str) -> None:
    jobs = [(rank, 2, f"{name}-{which}") for which in range(2) for rank in range(2)]
    spawn_workers(join_several_times, jobs).join()


# ---- what a session is


def test_joining_twice_is_an_error_and_changes_nothing(name: str) -> None:
    with join(0, 1, name):
        with pytest.raises(UsageError, match="^RPC is already initialized$"):
            join(0, 1, name + "-other")
        assert rpc.rpc_sync("w0", work.add, args=(1, 2)) == 3
    join(0, 1, name + "-other")
    rpc.shutdown()


def test_a_session_that_raises_leaves_without_waiting_for_others(spawn_workers: Start, name: str) -> None:
    spawn_workers(raise_in_session, [(0, name), (1, name)]).join()


def raise_in_session(rank: int, init_method: str) -> None:
    try:
        with join(rank, 2, init_method):
            if rank == 0:
                raise ZeroDivisionError
            while True:  # until w0 is seen to have left
                rpc.rpc_sync("w0", work.nothing)
    except ZeroDivisionError:
        assert rank == 0
    except PeerError as error:
        assert rank == 1
        assert error.worker == "w0"


def test_nothing_works_after_shutdown(name: str) -> None:
    join(0, 1, name)
    user, mine = rpc.remote("w0", work.Counter), rpc.RRef([1])
    assert user.rpc_sync().get() == 0
    rpc.shutdown()
    for use in (
        lambda: rpc.rpc_sync("w0", work.nothing),
        lambda: rpc.rpc_async("w0", work.nothing),
        lambda: rpc.remote("w0", work.nothing),
        lambda: rpc.RRef(1),
        rpc.get_worker_info,
    ):
        with pytest.raises(NotInitialized):
            use()
    with pytest.raises(UsageError):
        mine.rpc_sync().index(1)
    assert mine.local_value() == mine.to_here() == [1]
    assert "OwnerRRef" in repr(mine)
    assert mine.owner() == rpc.WorkerInfo("w0", 0)


def test_leaving_without_having_joined_or_twice_is_no_error(name: str) -> None:
    rpc.shutdown()
    join(0, 1, name)
    rpc.shutdown()
    rpc.shutdown()
    rpc.shutdown(graceful=False)


# ---- leaving


def leave_with_work_under_way(rank: int, init_method: str) -> None:
    join(rank, 3, init_method)
    futures = []
    if rank == 0:
        futures = [rpc.rpc_async(f"w{1 + i % 2}", work.sleep, args=(0.05,)) for i in range(20)]
        slow = rpc.remote("w1", work.SlowToMake, args=(0.2, 5))
    rpc.shutdown()
    assert [future.value() for future in futures] == [0.05] * len(futures)
    if rank == 0:
        with pytest.raises(UsageError, match="has been deleted"):
            slow.to_here()


def test_leaving_waits_for_work_under_way_everywhere(spawn_workers: Start, name: str) -> None:
    spawn_workers(leave_with_work_under_way, [(rank, name) for rank in range(3)]).join()


def leave_late(rank: int, init_method: str) -> None:
    """Be called, and pass calls on, while the others have called ``shutdown`` already."""
    join(rank, 3, init_method)
    if rank == 2:
        for step in range(20):
            time.sleep(0.01)
            assert rpc.rpc_sync(f"w{step % 2}", work.depth, args=(3, names(2))) == 3
    rpc.shutdown()


def test_a_worker_that_waits_to_leave_still_serves(spawn_workers: Start, name: str) -> None:
    spawn_workers(leave_late, [(rank, name) for rank in range(3)]).join()


def leave_in_time(rank: int, init_method: str) -> None:
    join(rank, 3, init_method)
    if rank == 2:
        waiting = ["w0", "w1"]
        while waiting:  # this worker stays until both have given it up: a worker that is left alone leaves in peace
            try:
                rpc.rpc_sync(waiting[0], work.nothing)
            except PeerError:
                del waiting[0]
            time.sleep(0.01)
        rpc.shutdown(graceful=False)
        return
    with pytest.raises(CallTimeout, match=r"\['w2'\] have not called it"):
        rpc.shutdown(timeout=0.5)
    with pytest.raises(NotInitialized):
        rpc.rpc_sync("w2", work.nothing)
    rpc.shutdown()


def test_leaving_names_who_does_not_come_in_time_and_leaves_all_the_same(spawn_workers: Start, name: str) -> None:
    spawn_workers(leave_in_time, [(rank, name) for rank in range(3)]).join()


def leave_with_a_stuck_call(rank: int, init_method: str) -> None:
    join(rank, 2, init_method)
    if rank == 0:
        future = rpc.rpc_async("w1", work.sleep, args=(1.0,))
        with pytest.raises(CallTimeout, match="shutdown: "):
            rpc.shutdown(timeout=0.2)
        with pytest.raises((NotInitialized, PeerError)):
            future.wait()
    else:
        rpc.shutdown(timeout=5)


def test_leaving_ends_the_wait_for_answers_that_did_not_come(spawn_workers: Start, name: str) -> None:
    spawn_workers(leave_with_a_stuck_call, [(rank, name) for rank in range(2)]).join()


@rpc.functions.async_execution
def answer_never() -> torch.futures.Future:
    return torch.futures.Future()


def leave_with_an_answer_that_never_comes(rank: int, init_method: str) -> None:
    join(rank, 2, init_method)
    if rank == 0:
        with pytest.raises(CallTimeout):
            rpc.rpc_sync("w1", answer_never, timeout=0.1)
    rpc.shutdown()
    join(rank, 2, init_method)
    if rank == 0:
        rpc.rpc_async("w1", answer_never, timeout=0)
        rpc.shutdown(graceful=False)
    else:
        time.sleep(0.5)
        with pytest.raises(CallTimeout, match="and 1 wait here for the future that their function returned"):
            rpc.shutdown(timeout=0.5)


def test_leaving_waits_for_no_future_that_its_caller_has_given_up(spawn_workers: Start, name: str) -> None:
    spawn_workers(leave_with_an_answer_that_never_comes, [(rank, name) for rank in range(2)]).join()


def leave_from_many_threads(rank: int, init_method: str) -> None:
    for _ in range(5):
        join(rank, 2, init_method)
        failures: list[BaseException] = []

        def leave(graceful: bool, failures: list[BaseException] = failures) -> None:
            try:
                rpc.shutdown(graceful)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=leave, args=(True,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        while True:  # the thread that left may still be giving things back
            try:
                rpc.get_worker_info()
            except NotInitialized:
                break


def test_leaving_from_many_threads_at_once_is_leaving_once(spawn_workers: Start, name: str) -> None:
    spawn_workers(leave_from_many_threads, [(rank, name) for rank in range(2)]).join()


def leave_while_others_call(rank: int, init_method: str, seed: int) -> None:
    """Leave at a random moment in a random way, with threads that call and hold references."""
    rng = random.Random(100 * seed + rank)
    wrong: list[Any] = []
    join(rank, 3, init_method)

    def call() -> None:
        held: list[Any] = []
        while True:
            try:
                to = f"w{rng.randrange(3)}"
                mine = rng.random()
                if rpc.rpc_sync(to, work.echo, args=(mine,)) != mine:
                    wrong.append("another's answer")
                held.append(rpc.remote(to, work.Traced))
                held = rpc.rpc_sync(f"w{rng.randrange(3)}", work.echo, args=(held[-3:],))
            except (NotInitialized, PeerError, UsageError):
                return
            except BaseException as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(rng.random() * 0.1)
    try:
        for _ in range(rng.choice([1, 1, 2])):
            rpc.shutdown(graceful=rng.random() < 0.5, timeout=rng.choice([0.05, 0.3]))
    except CallTimeout:
        rpc.shutdown()
    for thread in threads:
        thread.join()
    assert not wrong
    with pytest.raises(NotInitialized):
        rpc.get_worker_info()


@pytest.mark.parametrize("seed", range(6))
def test_leaving_at_any_moment_in_any_order_hangs_nobody(spawn_workers: Start, name: str, seed: int) -> None:
    spawn_workers(leave_while_others_call, [(rank, name, seed) for rank in range(3)]).join()


# ---- joining goes wrong

MISTAKES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one name twice": ([{"name": "w0", "rank": 0}, {"name": "w0", "rank": 1}], "two workers .* claim the name 'w0'"),
    "one rank twice": ([{"name": "w0", "rank": 0}, {"name": "w1", "rank": 0}], "claim rank 0, .*w0.*and.*w1"),
    "worlds of two sizes": ([{"name": "w0", "rank": 0}, {"name": "w1", "rank": 1, "world_size": 3}], "differ in world"),
    "a rank too high": ([{"name": "w0", "rank": 0}, {"name": "w5", "rank": 5}], "out of range"),
    "nobody else": ([{"name": "w0", "rank": 0}], "only 1 of 2 workers"),
}


def make_a_mistake(init_method: str, name: str, rank: int, world_size: int, said: str, timeout_s: float) -> None:
    with pytest.raises((RendezvousError, UsageError), match=said):
        rpc.init_rpc(
            name, rank=rank, world_size=world_size, rpc_backend_options=options(init_method, rpc_timeout=timeout_s)
        )
    # Nothing is left of it: the process can join something else.
    with join(0, 1, f"{init_method}-{os.getpid()}"):
        assert rpc.rpc_sync("w0", work.add, args=(1, 2)) == 3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_to_all_in_one_sentence_and_leaves_nothing(
    spawn_workers: Start, name: str, mistake: str
) -> None:
    workers, said = MISTAKES[mistake]
    timeout_s = 0.5 if len(workers) == 1 else 30.0
    spawn_workers(
        make_a_mistake,
        [(name, worker["name"], worker["rank"], worker.get("world_size", 2), said, timeout_s) for worker in workers],
    ).join()


# ---- settings


def test_the_default_timeout_is_the_options(start_job: Callable[..., Job]) -> None:
    start_job(2, rpc_timeout=0.2).run(call_with_a_short_default)


def call_with_a_short_default() -> None:
    text = r"more than set timeout \(200 ms\)"
    with pytest.raises(CallTimeout, match=text):
        rpc.rpc_sync("w1", work.sleep, args=(0.5,))
    with pytest.raises(CallTimeout, match=text):
        rpc.rpc_async("w1", work.sleep, args=(0.5,)).wait()
    assert rpc.rpc_sync("w1", work.sleep, args=(0.5,), timeout=0) == 0.5
    assert rpc.rpc_sync("w1", work.sleep, args=(0.5,), timeout=5) == 0.5
    # It does not end the making of a value, only this wait for it.
    rref = rpc.remote("w1", work.SlowToMake, args=(0.8, 7))
    with pytest.raises(CallTimeout, match=text):
        rref.to_here()
    with pytest.raises(CallTimeout, match=text):
        rref.rpc_sync().get()
    assert rref.to_here(timeout=0).get() == 7
    assert rref.rpc_sync().get() == 7


def test_workers_beyond_the_bits_of_a_table_hold_references_too(start_job: Callable[..., Job]) -> None:
    start_job(6, table_bits=4).run(hold_and_hand_on_everywhere)


def hold_and_hand_on_everywhere() -> None:
    everybody = names(6)
    for owner in everybody:
        rref = rpc.remote(owner, work.Traced)
        for holder in everybody:
            rpc.rpc_sync(holder, work.keep, args=(rref,))
        assert rpc.rpc_sync("w5", work.pass_on, args=(rpc.remote(owner, work.echo, args=(1,)), everybody * 2)) == 1
        del rref
        for holder in random.sample(everybody, 6):
            assert rpc.rpc_sync(holder, work.use_kept, args=("count",)) == 0
            assert rpc.rpc_sync(owner, work.traced_alive) == 1
            assert rpc.rpc_sync(holder, work.drop) == 1
        assert rpc.rpc_sync(owner, work.wait_until_traced, args=(0,)) == 0


def test_a_small_table_serves_many_references_one_after_another(start_job: Callable[..., Job]) -> None:
    start_job(2, table_capacity=128).run(use_more_references_than_entries)


def use_more_references_than_entries() -> None:
    for number in range(1000):
        assert rpc.remote("w1", work.echo, args=(number,)).to_here() == number
        assert rpc.rpc_sync("w1", work.look, args=(rpc.RRef(number),)) == (False, "w0", number)


def test_a_full_table_is_named_by_who_waits_for_an_entry(start_job: Callable[..., Job]) -> None:
    start_job(2, table_capacity=128).run(fill_the_table)


def fill_the_table() -> None:
    held = []
    text = r"no free table entry \(all 128 entries of the reference table are in use\) on worker 'w1'"
    with pytest.raises(CallTimeout, match=text):
        while len(held) <= 128:
            rref = rpc.remote("w1", work.Counter, timeout=0.5)
            assert rref.rpc_sync().get() == 0
            held.append(rref)
    assert len(held) > 64
    assert [rref.rpc_sync().get() for rref in held] == [0] * len(held)
    held.clear()
    assert rpc.remote("w1", work.Counter).rpc_sync().get() == 0


@pytest.mark.parametrize(
    ("world_size", "transport"),
    [
        (2, ""),
        (2, "tcp"),
        pytest.param(None, "", marks=pytest.mark.shared_memory("a group of open size uses nothing else so far")),
    ],
)
def test_the_memory_of_a_job_goes_when_it_is_left(
    world_size: int | None, transport: str, spawn_workers: Callable[..., Any], tmp_path: Path
) -> None:
    meeting = f"file://{tmp_path}/meeting"
    spawn_workers(leave_and_look, [(rank, world_size, transport, meeting) for rank in range(2)]).join()


def leave_and_look(rank: int, world_size: int | None, transport: str, meeting: str) -> None:
    if transport:
        os.environ["FASTREF_TRANSPORT"] = transport
    gc.disable()  # a cycle would keep segments of the own job and of others until the next collection
    for number in range(2):
        options = rpc.RpcBackendOptions(init_method=f"{meeting}-{number}")
        rpc.init_rpc(f"w{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)
        left = weakref.ref(current_wiring())
        rref = rpc.remote(f"w{rank}", work.Counter)
        assert rref.rpc_sync().get() == 0
        del rref
        rpc.shutdown()
        deadline = time.monotonic() + 30
        while left() is not None:  # a thread of it may have a last step to go
            assert time.monotonic() < deadline, gc.get_referrers(left())
            time.sleep(0.001)
