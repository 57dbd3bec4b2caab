"""Workers of several hosts find each other and link over TCP, or everybody learns in time why not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastref.errors import RendezvousError, UsageError, WorkerDied
from fastref.identity import Token, forget_loopback_token, mint, self_made_certificates
from fastref.options import TlsFiles
from fastref.rendezvous import Credentials, StreamConnection, job_name, link_all, tell_coordinator, tell_members, visit
from fastref.rendezvous.hellos import join_hello
from fastref.rendezvous.stream import parse_endpoint
from fastref.segments import run_root, sweep
from tests.stopping import stop
from tests.workers import PATIENCE_S, Cast, Worker, worker

TOLD_S = 5.0
SECRET = "the token of all jobs in these tests"
TOKEN = {"FASTREF_TOKEN": SECRET}
_jobs = iter(range(10**6))


@pytest.fixture
def store(tmp_path: Any) -> str:
    return f"file://{tmp_path}/store"


@pytest.fixture
def cast(no_leaks: None, mp_context: Any, spawn_workers: Callable[..., Any], store: str) -> Iterator[Cast]:
    cast = Cast(mp_context, spawn_workers, store)
    yield cast
    cast.end()
    sweep(run_root(), clear=forget_loopback_token)


@pytest.fixture
def alice(no_leaks: None, store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """Return the rank 0 of a job of two hosts, in this process."""
    monkeypatch.setenv("FASTREF_TOKEN", SECRET)
    with worker("alice", store, host="red") as one:
        yield one


def start(cast: Cast, name: str, rank: int, world_size: int, host: str, **more: Any) -> Any:
    changes, environment = more.pop("changes", {}), more.pop("environment", {})
    return cast.start(
        name, rank, world_size, environment={**TOKEN, **environment}, changes={"host": host, **changes}, **more
    )


def one_sentence(cast: Cast) -> str:
    """Return what all were told."""
    outcomes = cast.outcomes()
    assert [outcome[0] for outcome in outcomes] == [RendezvousError] * len(outcomes), outcomes
    (told,) = {outcome[1] for outcome in outcomes}
    assert SECRET not in told
    return told


# Worlds that fill


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_of_one_host_are_linked_over_tcp_when_told_so(cast, world_size):
    job = f"local://tcp-{next(_jobs)}"
    for rank in reversed(range(world_size)):
        cast.start(f"w{rank}", rank, world_size, job, environment={"FASTREF_TRANSPORT": "tcp"})
    for names, segments, _, ways in cast.outcomes():
        assert names == [f"w{rank}" for rank in range(world_size)]
        assert ways == ["tcp: FASTREF_TRANSPORT"] * (world_size - 1)
        assert segments == []


def test_workers_of_two_hosts_share_memory_within_and_talk_over_tcp_between_them(cast):
    for rank in (3, 0, 2, 1):
        start(cast, f"w{rank}", rank, 4, "red" if rank < 2 else "blue")
    for number, rank in enumerate((3, 0, 2, 1)):
        names, segments, _, ways = cast.outcome(number)
        assert names == ["w0", "w1", "w2", "w3"]
        beside = rank ^ 1
        assert segments == [f"w{beside} for w{rank}"]
        assert ways == ["shm" if other == beside else "tcp: another host" for other in range(4) if other != rank]


def test_a_job_of_one_host_listens_on_no_port_without_being_told_to(cast):
    job = f"local://tcp-{next(_jobs)}"
    for rank in range(2):
        cast.start(f"w{rank}", rank, 2, job, environment=TOKEN)
    assert [outcome[3] for outcome in cast.outcomes()] == [["shm"], ["shm"]]


def test_whoever_cannot_reach_the_unix_sockets_of_its_own_host_takes_tcp(cast):
    hidden = {"address": "/nowhere/0.sock"}
    start(cast, "w0", 0, 2, "red", changes=hidden)
    start(cast, "w1", 1, 2, "red")
    assert cast.outcome(1)[3] == ["tcp: its unix socket cannot be reached"]


def test_more_workers_than_may_knock_at_once_all_get_in(store, monkeypatch):
    # Threads of one process, each a host of its own: what counts is that they come together.
    monkeypatch.setenv("FASTREF_TOKEN", SECRET)
    world_size = 80
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(f"w{rank}", store, host=f"host{rank}")) for rank in range(world_size)]
        threads = [
            threading.Thread(target=one.join, args=(rank, world_size, PATIENCE_S))
            for rank, one in reversed(list(enumerate(workers)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(one.membership is not None for one in workers)
        assert len({one.membership.members for one in workers}) == 1


def test_a_dozen_hosts_are_linked_each_with_each(store, monkeypatch):
    monkeypatch.setenv("FASTREF_TOKEN", SECRET)
    world_size = 12
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(f"w{rank}", store, host=f"host{rank}")) for rank in range(world_size)]

        def meet(rank: int) -> None:
            workers[rank].join(rank, world_size, PATIENCE_S)
            workers[rank].link(PATIENCE_S)

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rank, one in enumerate(workers):
            assert sorted(one.links) == [other for other in range(world_size) if other != rank]


def test_workers_meet_over_ipv6(cast):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    for rank in range(2):
        start(cast, f"w{rank}", rank, 2, f"host{rank}", environment={"FASTREF_ADDRESS": "::1"})
    assert [outcome[0] for outcome in cast.outcomes()] == [["w0", "w1"]] * 2


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    pytest.importorskip("cryptography")
    return self_made_certificates(tmp_path_factory.mktemp("tls") / "files")


def test_workers_of_two_hosts_meet_and_link_over_tls(cast, certificates):
    for rank in range(4):
        start(cast, f"w{rank}", rank, 4, "red" if rank < 2 else "blue", changes={"tls": certificates})
    assert [outcome[3].count("tcp: another host") for outcome in cast.outcomes()] == [2] * 4


def test_a_job_of_which_a_part_wants_tls_is_told_to_everybody(cast, certificates):
    start(cast, "alice", 0, 2, "red", changes={"tls": certificates})
    start(cast, "bob", 1, 2, "blue")
    assert re.search("'bob' .* and worker 'alice' .* did not prove themselves", one_sentence(cast))


def test_both_ends_of_a_link_can_take_the_socket_and_talk_over_it(cast, alice):
    start(cast, "bob", 1, 2, "blue")
    alice.join(0, 2, PATIENCE_S)
    alice.link(PATIENCE_S)
    link = alice.links[1]
    assert (link.record.name, link.pid, link.pidfd) == ("bob", cast.processes[0].pid, -1)
    link.send_message("more", {})  # nobody reads it; it is lost with the connection
    taken = link.take_socket()
    link.close()
    assert taken.getpeername()[0] == "127.0.0.1" or taken.getpeername()[0]
    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
    taken.close()


# Mistakes

ALICE, BOB = r"'alice' \(rank 0, pid \d+\)", r"'bob' \(rank 1, pid \d+\)"
RED, BLUE = {"host": "red", "network": "that of red"}, {"host": "blue", "network": "that of blue"}
# Without any network here both are on loopback, and either may be named first.
HIDDEN = (
    rf"worker ({ALICE} runs on red|{BOB} runs on blue) and listens at 127.0.0.1:\d+, where worker '(bob|alice)' "
    ".* cannot reach it; FASTREF_ADDRESS or FASTREF_INTERFACE chooses another"
)
MISTAKES: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "duplicate rank": (
        [("alice", 0, 3), ("bob", 1, 3), ("carol", 1, 3)],
        "two workers of job 'JOB' claim rank 1, which is not unique: '.*' .* and '.*' ",
    ),
    "duplicate name": (
        [("alice", 0, 3), ("bob", 1, 3), ("bob", 2, 3)],
        rf"two workers of job 'JOB' claim the name 'bob', .*: {BOB} and 'bob' \(rank 2, pid \d+\)",
    ),
    "different world sizes": (
        [("alice", 0, 2), ("bob", 1, 3)],
        f"workers of job 'JOB' differ in world_size: {BOB} says 3, {ALICE} says 2",
    ),
    "different versions": (
        [("alice", 0, 2), ("bob", 1, 2, {"version": "0.9"})],
        rf"worker {BOB} has fastref 0.9 \(memory layout 1\), worker {ALICE} has fastref 1.0 \(memory layout 1\)",
    ),
    "one is strict": (
        [("alice", 0, 2, {"strict": True}), ("bob", 1, 2)],
        rf"worker {ALICE} is strict and worker {BOB} is not; all workers of a job are, or none: .*FASTREF_STRICT=1",
    ),
    "two coordinators": (
        [("alice", 0, 3), ("eve", 0, 3), ("bob", 1, 3)],
        r"two workers of job 'JOB' claim rank 0, .*: '(alice|eve)' \(.*\) and '(alice|eve)' \(",
    ),
    "another token": (
        [("alice", 0, 2), ("bob", 1, 2, {}, {"FASTREF_TOKEN": "a token of another job"})],
        rf"worker {BOB} of job 'JOB' and worker {ALICE} at .* did not prove themselves to each other: .*its token, job "
        "name or restart count differs.*; all workers of a job need the same FASTREF_TOKEN",
    ),
    "no token": (
        [("alice", 0, 2), ("bob", 1, 2, {}, {"FASTREF_TOKEN": ""})],
        rf"worker {BOB} runs on host1 and worker {ALICE} on host0: .* set FASTREF_TOKEN, or FASTREF_TOKEN_FILE",
    ),
    "no token at the coordinator": (
        [("alice", 0, 2, {}, {"FASTREF_TOKEN": ""}), ("bob", 1, 2)],
        rf"worker {BOB} runs on host1 and worker {ALICE} on host0: .* set FASTREF_TOKEN, or FASTREF_TOKEN_FILE",
    ),
    "a coordinator on loopback": (
        [("alice", 0, 2, RED, {"FASTREF_ADDRESS": "127.0.0.1"}), ("bob", 1, 2, BLUE)],
        HIDDEN,
    ),
    "another worker on loopback": (
        [("alice", 0, 2, RED), ("bob", 1, 2, BLUE, {"FASTREF_ADDRESS": "127.0.0.1"})],
        HIDDEN,
    ),
    "shared memory alone": (
        [("alice", 0, 2), ("bob", 1, 2, {}, {"FASTREF_TRANSPORT": "shm"})],
        rf"worker {BOB} runs on host1 and worker {ALICE} on host0, and FASTREF_TRANSPORT=shm is set",
    ),
    "a worker of a third host that nobody can ask": (
        [("alice", 0, 3), ("bob", 1, 3, {"host": "host0"}, {"FASTREF_TOKEN": ""}), ("carol", 2, 3, {"host": "host1"})],
        rf"worker ({BOB}|'carol' .*) runs on .* set FASTREF_TOKEN, or FASTREF_TOKEN_FILE",
    ),
}


def make_mistake(cast: Cast, mistake: str, order: int) -> list[Any]:
    workers, sentence = MISTAKES[mistake]
    for number, (name, rank, world_size, *more) in list(enumerate(workers))[::order]:
        changes, environment = [*more, {}, {}][:2]
        start(cast, name, rank, world_size, f"host{number}", changes=changes, environment=environment)
    told = one_sentence(cast)
    assert re.match(sentence.replace("JOB", re.escape(job_name(cast.init_method))), told), told
    return cast


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_to_both_hosts_in_one_sentence(cast, mistake):
    make_mistake(cast, mistake, order=-1)


def test_a_variable_that_says_something_else_than_shm_or_tcp_is_refused(monkeypatch, store):
    monkeypatch.setenv("FASTREF_TRANSPORT", "quic")
    with pytest.raises(UsageError, match="FASTREF_TRANSPORT is shm or tcp, .* it is 'quic'"):
        with worker("alice", store):
            pass


def test_a_worker_of_the_life_before_a_restart_does_not_get_in(cast):
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    start(cast, "alice", 0, 2, "red", environment=restarted)
    start(cast, "old", 1, 2, "blue", timeout_s=1.0)
    start(cast, "bob", 1, 2, "blue", environment=restarted)
    assert [cast.outcome(number)[0] for number in (0, 2)] == [["alice", "bob"]] * 2
    kind, told, _ = cast.outcome(1)
    assert kind is RendezvousError
    assert "rank 0, which coordinates, is missing" in told


@pytest.mark.parametrize(
    ("life", "told"),
    [
        ("0", r"was restarted: worker 'other' .* of start 0, "),
        ("2", "waited 1 s .* is of start 1 of the job, this worker of start 2"),
    ],
)
def test_lives_are_told_apart_on_one_host_too(cast, life, told):
    job = f"local://tcp-{next(_jobs)}"
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    cast.start("alice", 0, 2, job, environment=restarted)
    cast.start("other", 1, 2, job, environment={"TORCHELASTIC_RESTART_COUNT": life}, timeout_s=1.0)
    kind, said, _ = cast.outcome(1)
    cast.start("bob", 1, 2, job, environment=restarted)
    assert kind is RendezvousError
    assert re.search(told, said)
    assert cast.outcome(0)[0] == cast.outcome(2)[0] == ["alice", "bob"]


def test_a_worker_that_cannot_start_is_heard_on_another_host(cast, alice):
    with worker("bob", alice.init_method, host="blue") as bob:
        # Their sockets lie in one directory here; on two hosts they would not.
        bob.listener.directory = bob.listener.directory / "elsewhere"
        start(cast, "carol", 0, 3, "red")
        tell_coordinator(bob.record, bob.listener, bob.init_method, 1, 3, "it has no memory", door=bob.door)
        kind, told, _ = cast.outcome(0)
        bob.listener.directory = bob.listener.directory.parent
    assert kind is RendezvousError
    assert re.search(r"worker 'bob' \(rank 1, .*, coordinator 'carol' .*, could not start: it has no memory", told)


def test_a_member_that_gives_up_tells_those_on_other_hosts(cast, alice):
    start(cast, "bob", 1, 2, "blue")
    alice.join(0, 2, PATIENCE_S)
    tell_members(alice.record, alice.membership.members, "there is no memory for it", door=alice.door)
    assert cast.outcome(0)[:2] == (RendezvousError, "there is no memory for it")


def test_a_coordinator_that_cannot_be_reached_is_named_with_what_to_do(cast, alice, monkeypatch):
    start(cast, "bob", 1, 2, "blue")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        held = [socket.socket() for _ in range(4)]  # fill its queue, so that nothing is answered any more
        for sock in held:
            sock.setblocking(False)
            sock.connect_ex(deaf.getsockname())
        monkeypatch.setattr(type(alice.door), "endpoint", f"127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(RendezvousError, match="FASTREF_ADDRESS or FASTREF_INTERFACE chooses") as caught:
            alice.join(0, 2, PATIENCE_S)
        assert "worker 'bob'" in str(caught.value) and "cannot reach worker 'alice'" in str(caught.value)
        for sock in held:
            sock.close()
    monkeypatch.undo()
    assert cast.outcome(0)[:2] == (RendezvousError, str(caught.value))


# Deaths


def test_the_seat_of_a_worker_that_was_killed_on_another_host_is_free_again(cast):
    start(cast, "alice", 0, 3, "red")
    killed = start(cast, "bob", 1, 3, "blue")
    time.sleep(0.3)
    killed.kill()
    killed.join()
    start(cast, "carol", 2, 3, "blue")
    start(cast, "bob", 1, 3, "blue")
    assert [cast.outcome(number)[0] for number in (0, 3, 2)] == [["alice", "bob", "carol"]] * 3


def test_workers_wait_on_for_another_coordinator_when_theirs_was_killed_on_another_host(cast):
    killed = start(cast, "old", 0, 3, "red")
    start(cast, "bob", 1, 3, "blue")
    time.sleep(0.3)
    killed.kill()
    killed.join()
    start(cast, "alice", 0, 3, "red")
    start(cast, "carol", 2, 3, "blue")
    assert [cast.outcome(number)[0] for number in (2, 1, 3)] == [["alice", "bob", "carol"]] * 3


def test_a_member_of_another_host_that_dies_before_it_is_linked_is_named(cast, alice):
    process = start(cast, "bob", 1, 2, "blue")
    stop(process.pid)
    os.kill(process.pid, signal.SIGCONT)
    alice.join(0, 2, PATIENCE_S)
    process.kill()
    process.join()
    with pytest.raises(WorkerDied, match=rf"worker 'bob' \(rank 1, pid {process.pid}\) died"):
        alice.link(PATIENCE_S)
    assert alice.links == {}


# Strangers


def knock(alice: Worker) -> socket.socket:
    return socket.create_connection(parse_endpoint(alice.door.endpoint))


def say(data: bytes) -> Callable[[Worker], Any]:
    def visit_and_say(alice: Worker) -> socket.socket:
        sock = knock(alice)
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        return sock

    return visit_and_say


def come_with_another_token(alice: Worker) -> Any:
    sock = knock(alice)
    handshake = Credentials(mint(), job_name(alice.init_method), 0).handshake(asks=True)
    sock.sendall(handshake.to_send())
    return sock


def come_by_the_hundred(alice: Worker) -> Any:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(knock(alice))
        return stack.pop_all()


STRANGERS: dict[str, Callable[[Worker], Any]] = {
    "that says nothing and goes": lambda alice: knock(alice).close(),
    "that says nothing and stays": knock,
    "that talks HTTP": say(b"GET / HTTP/1.1\r\n\r\n"),
    "that talks TLS": say(bytes.fromhex("16030100c8010000c40303") + bytes(200)),
    "that says anything": say(bytes(range(256)) * 256),
    "that says a little": say(b"\xf5f"),
    "with another token": come_with_another_token,
    "of whom there are many": come_by_the_hundred,
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_world_of_two_hosts_fills_in_spite_of_a_stranger(cast, alice, stranger):
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            visitor = STRANGERS[stranger](alice)
            if visitor is not None:
                stack.callback(visitor.close)
            if alice.membership is None:
                start(cast, "bob", 1, 2, "blue")
                alice.join(0, 2, PATIENCE_S)
        alice.link(PATIENCE_S)
    assert cast.outcome(0)[0] == ["alice", "bob"]
    assert str(alice.links[1].way) == "tcp: another host"


def proved_visitor(alice: Worker) -> StreamConnection:
    """Return a connection to a worker that is not looking yet, so proved by turns."""
    connection: list[StreamConnection] = []
    thread = threading.Thread(
        target=lambda: connection.append(visit(alice.door.endpoint, alice.door.credentials, time.monotonic() + 5.0))
    )
    thread.start()
    while (accepted := alice.door.accept()) is None:
        time.sleep(0.001)
    thread.join()
    alice.door._proved.append(accepted)  # as if nobody had asked for it yet
    return connection[0]


@pytest.mark.parametrize(
    "words",
    [
        lambda visitor, record: visitor.send_message("hello", {}),
        lambda visitor, record: visitor.send_message("join-hello", {"magic": "other"}),
        lambda visitor, record: visitor.send_message("join-hello", join_hello(record, "another job")),
        lambda visitor, record: visitor.socket.sendall(b"\xff\xff\xff\xff"),
        lambda visitor, record: visitor.socket.sendall(b"\0\0\0\5hello"),
        lambda visitor, record: visitor.socket.sendall(b"\0\0"),
    ],
)
def test_one_who_has_proved_himself_and_talks_nonsense_keeps_nobody_from_starting(cast, alice, words):
    visitor = proved_visitor(alice)
    words(visitor, dataclasses.replace(alice.record, name="eve", rank=1, world_size=2))
    start(cast, "bob", 1, 2, "blue")
    alice.join(0, 2, PATIENCE_S)
    alice.link(PATIENCE_S)
    assert cast.outcome(0)[0] == ["alice", "bob"]
    visitor.close()


def test_a_link_that_nobody_may_have_is_refused_over_tcp_too(alice):
    alice.join(0, 1, PATIENCE_S)
    visitor = proved_visitor(alice)
    eve = dataclasses.replace(alice.record, name="eve", rank=1)
    body = {**join_hello(eve, "x"), "to_instance": alice.lock.instance}
    visitor.send_message("link-hello", body)
    absent = dataclasses.replace(alice.record, name="bob", rank=1, host="blue", pid=1)
    # The time is over already, as for one that was held up: what has come is dealt with all the same.
    with pytest.raises(RendezvousError, match="got no link in time to: 'bob'"):
        link_all(alice.record, (alice.record, absent), alice.listener, lambda peer: {}, time.monotonic(), alice.door)
    answer = visitor.wait_message(time.monotonic() + PATIENCE_S)
    assert answer.kind == "refused" and "is no member of the job" in answer.body["sentence"]
    visitor.close()


@pytest.mark.gates
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_known_on_both_hosts_within_five_seconds(mp_context, spawn_workers, store, mistake, order):
    class Timed(Cast):
        def outcomes(self) -> list[Any]:
            self.heard = super().outcomes()
            return self.heard

    cast = Timed(mp_context, spawn_workers, store)
    try:
        make_mistake(cast, mistake, order)
        assert max(outcome[2] for outcome in cast.heard) < TOLD_S
    finally:
        cast.end()


def test_a_token_shows_up_in_no_announcement_and_no_record(alice):
    alice.join(0, 1, PATIENCE_S)
    assert SECRET not in repr(alice.door.credentials) + repr(alice.record) + repr(vars(alice.membership))
    assert isinstance(alice.door.credentials.token, Token)
    assert SECRET.encode() not in open(alice.init_method.removeprefix("file://"), "rb").read()
