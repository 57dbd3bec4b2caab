"""Workers find each other and link, or everybody learns in time, in one sentence, why not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from typing import Any

import pytest

from fastref.errors import RendezvousError, UsageError, WorkerDied
from fastref.rendezvous import Connection, WorkerRecord, job_name, join, link_all
from fastref.rendezvous.connection import connect
from fastref.rendezvous.hellos import CLOSED, join_hello, refuse
from fastref.rendezvous.meeting import LocalMeeting
from fastref.segments import host_identity, run_root, sweep
from tests.stopping import stop
from tests.workers import PATIENCE_S, Cast, Worker, worker

# A mistake is to be known everywhere within this, from the moment a worker joins.
TOLD_S = 5.0


_jobs = iter(range(10**6))


@pytest.fixture
def init_method() -> str:
    return f"local://test-{next(_jobs)}"


@pytest.fixture
def cast(no_leaks: None, mp_context: Any, spawn_workers: Callable[..., Any], init_method: str) -> Iterator[Cast]:
    cast = Cast(mp_context, spawn_workers, init_method)
    yield cast
    cast.end()
    sweep(run_root())


@pytest.fixture
def alice(no_leaks: None, init_method: str) -> Iterator[Worker]:
    with worker("alice", init_method) as one:
        yield one


def assert_all_linked(outcomes: list[Any], names: list[str]) -> None:
    for rank, (members, segments, *_) in enumerate(outcomes):
        assert members == names
        assert segments == [f"{peer} for {names[rank]}" for peer in names if peer != names[rank]]


# Worlds that fill


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_workers_know_each_other_and_hold_each_others_segments(cast, world_size):
    names = ["alice", "bob", "carol"][:world_size]
    for rank in reversed(range(world_size)):
        cast.start(names[rank], rank, world_size)
    assert_all_linked(cast.outcomes()[::-1], names)


def test_a_world_larger_than_one_message_of_members_fills(init_method):
    # Threads of one process: what counts is the list of members, not the processes.
    world_size = 80
    names = [f"worker{rank}" for rank in range(world_size)]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(name, init_method)) for name in names]
        threads = [
            threading.Thread(target=one.join, args=(rank, world_size, PATIENCE_S)) for rank, one in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        members = workers[0].membership.members
        assert [member.name for member in members] == names
        assert all(one.membership.members == members for one in workers)


def test_rank_and_world_size_come_from_the_environment(cast):
    for rank, name in enumerate(["alice", "bob"]):
        cast.start(name, -1, None, environment={"RANK": str(rank), "WORLD_SIZE": "2"})
    assert_all_linked(cast.outcomes(), ["alice", "bob"])


def play_again(pipe: Pipe, name: str, init_method: str, rank: int, world_size: int, rounds: int) -> None:
    """Join under one name again and again, each time under a name that tells the round."""
    for turn in range(rounds):
        with worker(f"{name}-{turn}", init_method) as one:
            one.join(rank, world_size, PATIENCE_S)
            one.link(PATIENCE_S)
            # Nobody leaves before all have their links.
            for link in one.links.values():
                link.send_message("done", {"turn": turn})
            for link in one.links.values():
                message = link.wait_message(time.monotonic() + PATIENCE_S)
                assert message.body == {"turn": turn}
            assert [member.name for member in one.membership.members] == [f"{n}-{turn}" for n in "abc"[:world_size]]
            one.read_segments()
    pipe.send("done")


@pytest.mark.parametrize("world_size", [2, 3])
def test_fifty_joins_under_one_name_never_mix(world_size, mp_context, spawn_workers, init_method):
    pipes = [mp_context.Pipe() for _ in range(world_size)]
    workers = spawn_workers(
        play_again, [(pipes[rank][1], "abc"[rank], init_method, rank, world_size, 50) for rank in range(world_size)]
    )
    workers.join()
    for mine, theirs in pipes:
        assert mine.recv() == "done"
        mine.close()
        theirs.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_file_store_leads_the_workers_to_each_other(cast, world_size, tmp_path):
    names = ["alice", "bob", "carol"][:world_size]
    for rank in reversed(range(world_size)):
        cast.start(names[rank], rank, world_size, f"file://{tmp_path}/store")
    assert_all_linked(cast.outcomes()[::-1], names)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_tcp_store_leads_the_workers_to_each_other(cast):
    init_method = f"tcp://127.0.0.1:{free_port()}"
    cast.start("bob", 1, 2, init_method)
    cast.start("alice", 0, 2, init_method)
    assert_all_linked(cast.outcomes()[::-1], ["alice", "bob"])


def test_the_environment_of_torchrun_leads_the_workers_to_each_other(cast):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    cast.start("alice", -1, None, "env://", environment={**address, "RANK": "0"})
    cast.start("bob", 1, 2, "env://", environment=address)
    assert_all_linked(cast.outcomes(), ["alice", "bob"])


def test_a_store_of_ones_own_is_used(init_method):
    from torch.distributed import HashStore

    store = HashStore()
    with worker("alice", init_method) as alice, worker("bob", init_method) as bob:
        for count in range(2):
            thread = threading.Thread(target=bob.join, args=(1, 2, PATIENCE_S), kwargs={"store": store, "count": count})
            thread.start()
            alice.join(0, 2, PATIENCE_S, store=store, count=count)
            thread.join()
            assert bob.membership.members == alice.membership.members


def test_a_store_that_outlived_its_job_does_not_lead_to_the_dead(cast, tmp_path):
    init_method = f"file://{tmp_path}/store"
    killed = cast.start("old", 0, 2, init_method)
    while not (tmp_path / "store").exists() or b"old" not in (tmp_path / "store").read_bytes():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    cast.start("bob", 1, 2, init_method)
    cast.start("alice", 0, 2, init_method)
    assert_all_linked([cast.outcome(2), cast.outcome(1)], ["alice", "bob"])


# Mistakes

ALICE, BOB = r"'alice' \(rank 0, pid \d+\)", r"'bob' \(rank 1, pid \d+\)"
MISTAKES: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "duplicate rank": (
        [("alice", 0, 3), ("bob", 1, 3), ("carol", 1, 3)],
        rf"two workers of job 'JOB' claim rank 1, .* unique: ({BOB} and 'carol' \(rank 1, .*\)|'carol' .* and {BOB})",
    ),
    "duplicate name": (
        [("alice", 0, 3), ("bob", 1, 3), ("bob", 2, 3)],
        rf"two workers of job 'JOB' claim the name 'bob', which is not unique: {BOB} and 'bob' \(rank 2, pid \d+\)",
    ),
    "the name of the coordinator": (
        [("alice", 0, 2), ("alice", 1, 2)],
        rf"two workers of job 'JOB' claim the name 'alice', .* unique: {ALICE} and 'alice' \(rank 1, pid \d+\)",
    ),
    "different world sizes": (
        [("alice", 0, 2), ("bob", 1, 3)],
        rf"workers of job 'JOB' differ in world_size: {BOB} says 3, {ALICE} says 2",
    ),
    "different versions": (
        [("alice", 0, 2), ("bob", 1, 2, {"version": "0.9"})],
        rf"worker {BOB} has fastref 0.9 \(memory layout 1\), worker {ALICE} has fastref 1.0 \(memory layout 1\)",
    ),
    "different layouts": (
        [("alice", 0, 2, {"layout": 2}), ("bob", 1, 2)],
        rf"worker {BOB} has fastref 1.0 \(memory layout 1\), worker {ALICE} has fastref 1.0 \(memory layout 2\)",
    ),
    "one is strict": (
        [("alice", 0, 3), ("bob", 1, 3, {"strict": True}), ("carol", 2, 3)],
        rf"worker {BOB} is strict and worker {ALICE} is not; all workers of a job are, or none: .*FASTREF_STRICT=1",
    ),
    "another pid namespace": (
        [("alice", 0, 2), ("bob", 1, 2, {"host": "elsewhere:00000000:1"})],
        rf"worker {BOB} runs on elsewhere:00000000:1 and worker {ALICE} on .*: only workers of one host",
    ),
    "two coordinators": (
        [("alice", 0, 3), ("alice", 0, 3), ("bob", 1, 3)],
        rf"two workers of job 'JOB' claim rank 0, which is not unique: {ALICE} and {ALICE}",
    ),
}


def make_mistake(cast: Cast, mistake: str, order: int) -> list[Any]:
    """Return the outcomes after checking that all are the one sentence expected."""
    workers, sentence = MISTAKES[mistake]
    for name, rank, world_size, *changes in workers[::order]:
        cast.start(name, rank, world_size, changes=changes[0] if changes else {})
    outcomes = cast.outcomes()
    assert [outcome[0] for outcome in outcomes] == [RendezvousError] * len(workers)
    (told,) = {outcome[1] for outcome in outcomes}
    assert re.match(sentence.replace("JOB", job_name(cast.init_method)), told), told
    assert sum(str(process.pid) in told for process in cast.processes) >= 2
    return outcomes


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_to_everybody_in_one_sentence(cast, mistake):
    make_mistake(cast, mistake, order=-1)


@pytest.mark.gates
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_known_everywhere_within_five_seconds(cast, mistake, order):
    assert max(outcome[2] for outcome in make_mistake(cast, mistake, order)) < TOLD_S


def test_a_store_that_two_coordinators_meet_at_tells_both(cast, tmp_path):
    init_method = f"file://{tmp_path}/store"
    for name in ("alice", "eve"):
        cast.start(name, 0, 2, init_method)
    outcomes = cast.outcomes()
    assert outcomes[0][:2] == outcomes[1][:2]
    assert outcomes[0][0] is RendezvousError
    assert "claim rank 0" in outcomes[0][1] and "'alice'" in outcomes[0][1] and "'eve'" in outcomes[0][1]


def test_a_store_tells_workers_of_two_hosts_that_they_cannot_share_memory(cast, tmp_path):
    init_method = f"file://{tmp_path}/store"
    cast.start("alice", 0, 2, init_method)
    cast.start("bob", 1, 2, init_method, changes={"host": "elsewhere"})
    outcomes = cast.outcomes()
    assert outcomes[0][:2] == outcomes[1][:2]
    assert outcomes[0][0] is RendezvousError
    assert "runs on elsewhere" in outcomes[0][1] and host_identity() in outcomes[0][1]


def test_a_rank_out_of_range_is_told_to_everybody(cast):
    cast.start("alice", 0, 2)
    cast.start("bob", 1, 2)
    cast.start("carol", 2, 2)
    # Without the third the world is full at once.
    assert_all_linked([cast.outcome(0), cast.outcome(1)], ["alice", "bob"])
    assert cast.outcome(2)[:1] == (UsageError,)


def test_a_rank_out_of_range_that_leaves_a_seat_empty_is_told_to_everybody(cast):
    cast.start("alice", 0, 3)
    cast.start("bob", 1, 3)
    cast.start("carol", 7, 3)
    alice, bob, carol = cast.outcomes()
    assert alice[:2] == bob[:2]
    assert alice[0] is RendezvousError
    assert "'carol' (rank 7" in alice[1] and "ranks go from 0 to 2" in alice[1]
    assert carol[0] is UsageError
    assert "rank 7 of worker 'carol'" in carol[1]


def test_a_world_that_never_fills_names_who_came_and_which_ranks_are_missing(cast):
    cast.start("alice", 0, 4, timeout_s=1.0)
    cast.start("carol", 2, 4, timeout_s=5.0)
    outcomes = cast.outcomes()
    pids = [process.pid for process in cast.processes]
    sentence = (
        f"only 2 of 4 workers of job {job_name(cast.init_method)!r} came within 1 s: "
        f"'alice' (rank 0, pid {pids[0]}), 'carol' (rank 2, pid {pids[1]}); missing ranks: 1, 3"
    )
    assert [outcome[:2] for outcome in outcomes] == [(RendezvousError, sentence)] * 2
    assert outcomes[0][2] >= 1.0


def test_a_worker_that_gives_up_first_learns_who_is_missing_and_frees_its_seat(cast):
    cast.start("alice", 0, 3)
    cast.start("bob", 1, 3, timeout_s=0.3)
    kind, sentence, _ = cast.outcome(1)
    assert kind is RendezvousError
    assert "only 2 of 3 workers" in sentence and "missing ranks: 2" in sentence
    cast.start("bob", 1, 3)
    cast.start("carol", 2, 3)
    assert_all_linked([cast.outcome(0), cast.outcome(2), cast.outcome(3)], ["alice", "bob", "carol"])


def test_without_a_coordinator_a_worker_says_that_rank_0_is_missing(cast):
    cast.start("bob", 1, 2, timeout_s=0.2)
    kind, sentence, waited_s = cast.outcome(0)
    assert kind is RendezvousError
    assert "waited 0.2 s for the 2 workers" in sentence and "rank 0, which coordinates, is missing" in sentence
    assert waited_s >= 0.2


def test_what_torch_says_about_its_own_methods_passes_through(alice, monkeypatch, tmp_path):
    for variable in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(variable, raising=False)
    for method, text in [
        (f"file://{tmp_path}/store", "rank parameter missing"),
        ("tcp://127.0.0.1", "port number missing"),
        ("env://", "environment variable RANK expected"),
    ]:
        with pytest.raises(ValueError, match=text):
            join(alice.record, alice.listener, method, -1, 2, 1.0)


def test_a_store_that_cannot_be_had_is_a_rendezvous_error_with_its_cause(alice):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        method = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RendezvousError, match="rank 0 found no c10d store by tcp://") as caught:
            join(alice.record, alice.listener, method, 0, 2, 5.0)
    assert "EADDRINUSE" in str(caught.value.__cause__)
    with pytest.raises(RendezvousError, match="rank 1 found no c10d store") as caught:
        join(alice.record, alice.listener, f"tcp://127.0.0.1:{free_port()}", 1, 2, 0.5)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_file_in_a_directory_that_is_not_there_is_an_error_after_the_timeout(alice, tmp_path):
    with pytest.raises(RendezvousError, match=f"there is no directory {tmp_path}/absent"):
        join(alice.record, alice.listener, f"file://{tmp_path}/absent/store", 0, 1, 0.2)


def test_the_directory_of_a_file_may_come_later(cast, tmp_path):
    cast.start("alice", 0, 1, f"file://{tmp_path}/late/store")
    time.sleep(0.2)
    (tmp_path / "late").mkdir()
    assert_all_linked([cast.outcome(0)], ["alice"])


# Deaths


def test_the_seat_of_a_worker_that_was_killed_while_it_waited_is_free_again(cast):
    cast.start("alice", 0, 3)
    killed = cast.start("bob", 1, 3)
    time.sleep(0.2)
    killed.kill()
    killed.join()
    cast.start("carol", 2, 3)
    cast.start("bob", 1, 3)
    assert_all_linked([cast.outcome(0), cast.outcome(3), cast.outcome(2)], ["alice", "bob", "carol"])


def test_workers_wait_on_for_another_coordinator_when_theirs_was_killed(cast):
    killed = cast.start("old", 0, 3)
    cast.start("bob", 1, 3)
    cast.start("carol", 2, 3, delay_s=0.5)
    time.sleep(0.2)
    killed.kill()
    killed.join()
    cast.start("alice", 0, 3)
    assert_all_linked([cast.outcome(3), cast.outcome(1), cast.outcome(2)], ["alice", "bob", "carol"])


def test_a_coordinator_that_was_killed_for_good_is_named_at_the_end(cast):
    killed = cast.start("old", 0, 3)
    cast.start("bob", 1, 3, timeout_s=0.5)
    time.sleep(0.2)
    killed.kill()
    kind, sentence, _ = cast.outcome(1)
    assert kind is RendezvousError
    assert f"coordinator 'old' (rank 0, pid {killed.pid})" in sentence


def test_a_coordinator_of_a_running_job_is_not_joined_and_a_second_one_is_told(cast):
    cast.start("alice", 0, 1)
    assert_all_linked([cast.outcome(0)], ["alice"])
    cast.start("bob", 1, 2, timeout_s=0.5)
    kind, sentence, _ = cast.outcome(1)
    assert kind is RendezvousError
    assert f"coordinator 'alice' (rank 0, pid {cast.processes[0].pid}) has all its workers already" in sentence
    cast.start("eve", 0, 2)
    cast.start("bob", 1, 2)
    kind, sentence, _ = cast.outcome(2)
    assert cast.outcome(3)[:2] == (kind, sentence)
    assert kind is RendezvousError
    pids = [process.pid for process in cast.processes]
    assert f"runs already with coordinator 'alice' (rank 0, pid {pids[0]}); 'eve' (rank 0, pid {pids[2]})" in sentence


def test_a_member_that_dies_before_it_is_linked_is_named(cast):
    with worker("alice", cast.init_method) as alice:
        process = cast.start("bob", 1, 2)
        alice.join(0, 2, PATIENCE_S)
        process.kill()
        process.join()
        with pytest.raises(WorkerDied, match=rf"worker 'bob' \(rank 1, pid {process.pid}\) died"):
            alice.link(PATIENCE_S)
        assert alice.links == {}


def test_a_member_that_never_links_is_named_at_the_deadline(cast):
    with worker("alice", cast.init_method) as alice:
        process = cast.start("bob", 1, 2)
        alice.join(0, 2, PATIENCE_S)
        stop(process.pid)
        stopped = dataclasses.replace(alice.membership.members[1], instance="0" * 16)
        members = (alice.record, stopped)
        with pytest.raises(RendezvousError, match=r"'alice' .* got no link in time to: 'bob' \(rank 1"):
            link_all(alice.record, members, alice.listener, lambda peer: {}, time.monotonic() + 0.3)
        os.kill(process.pid, signal.SIGKILL)


def play_and_be_killed(init_method: str, rank: int, delay_s: float) -> None:
    """Join and link; die ``delay_s`` after the start if that is not infinite."""
    signal.setitimer(signal.ITIMER_REAL, delay_s)  # SIGALRM ends the process, wherever it is
    with worker(f"worker{rank}", init_method) as one, contextlib.suppress(RendezvousError, WorkerDied):
        one.join(rank, 3, 0.5)
        one.link(0.5)
        time.sleep(0.05)


def kill_at_random(spawn_workers: Callable[..., Any], init_method: str, times: int) -> None:
    generator = random.Random(1)
    for turn in range(times):
        victim, delay_s = turn % 3, generator.uniform(0.0005, 0.012)
        workers = spawn_workers(
            play_and_be_killed, [(init_method, rank, delay_s if rank == victim else 0.0) for rank in range(3)]
        )
        for process in workers:
            process.join(PATIENCE_S)
        codes = [process.exitcode for process in workers]
        # Who lives ends well; the victim was killed, or had ended before.
        assert all(code == 0 or (rank == victim and code == -signal.SIGALRM) for rank, code in enumerate(codes)), codes
        sweep(run_root())
        assert list(run_root().iterdir()) == []


def test_a_kill_at_any_moment_leaves_typed_errors_and_nothing_else(spawn_workers, init_method):
    kill_at_random(spawn_workers, init_method, times=12)


@pytest.mark.gates
@pytest.mark.timeout(600)
def test_a_thousand_kills_leave_typed_errors_and_nothing_else(spawn_workers, init_method):
    kill_at_random(spawn_workers, init_method, times=1000)


def test_a_coordinator_that_has_all_when_the_time_ends_is_named(cast, alice):
    coordinator = dataclasses.replace(alice.record, rank=0, world_size=2)
    LocalMeeting(alice.listener.directory).announce(coordinator)
    cast.start("bob", 1, 2, timeout_s=1.0)
    select.select([alice.listener.fileno()], [], [])
    visitor = alice.listener.accept()
    heard = [visitor.wait_message(time.monotonic() + PATIENCE_S).kind for _ in range(2)]
    refuse(visitor, CLOSED)  # as of another start, or as it has closed meanwhile: said when bob no longer waits
    kind, told, _ = cast.outcome(0)
    assert heard == ["join-hello", "join-leave"] and kind is RendezvousError
    assert told.endswith(f"{coordinator} has all its workers already") and "waited 1 s" in told


# Strangers

STRANGERS: dict[str, Callable[[Connection, WorkerRecord], None]] = {
    "that says nothing and goes": lambda visitor, record: visitor.close(),
    "that says nothing and stays": lambda visitor, record: None,
    "that talks HTTP": lambda visitor, record: visitor.socket.sendall(b"GET / HTTP/1.1\r\n\r\n"),
    "that says something else": lambda visitor, record: visitor.send_message("hello", {}),
    "of another program": lambda visitor, record: visitor.send_message("join-hello", {"magic": "other"}),
    "without a record": lambda visitor, record: visitor.send_message(
        "join-hello", {**join_hello(record, "x"), "record": {}}
    ),
    "of another job": lambda visitor, record: visitor.send_message("join-hello", join_hello(record, "x")),
    "that lies about its pid": lambda visitor, record: visitor.send_message(
        "join-hello", join_hello(dataclasses.replace(record, pid=1), "JOB")
    ),
    "that wants a link before the time": lambda visitor, record: visitor.send_message(
        "link-hello", {**join_hello(record, "x"), "to_instance": "0" * 16}
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_world_fills_in_spite_of_a_stranger(cast, alice, stranger):
    visitor = connect(alice.record.address)
    record = dataclasses.replace(alice.record, name="eve", rank=1, world_size=2)
    STRANGERS[stranger](visitor, record)
    cast.start("bob", 1, 2)
    alice.join(0, 2, PATIENCE_S)
    visitor_again = connect(alice.record.address)
    STRANGERS[stranger](visitor_again, record)
    alice.link(PATIENCE_S)
    assert alice.read_segments() == ["bob for alice"]
    visitor.close()
    visitor_again.close()
