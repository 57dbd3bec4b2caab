"""The monitor: every death once, every message before it, no work while nothing happens."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastref.errors import ForkedProcessError
from fastref.rendezvous import Connection, Link, Listener, WorkerRecord
from fastref.rendezvous.connection import connect, peer_of
from fastref.rendezvous.hellos import join_hello, refusal_of
from fastref.runtime.monitor import Monitor
from fastref.segments import InstanceLock, create_memfd, host_identity, job_directory, run_root

PATIENCE_S = 30.0
# Long enough to see what must not happen, when nothing can be waited for.
QUIET_S = 0.2


def record(rank: int, lock: InstanceLock, listener: Listener) -> WorkerRecord:
    return WorkerRecord(
        name=f"worker{rank}",
        rank=rank,
        pid=os.getpid(),
        instance=lock.instance,
        address=str(listener.path),
        world_size=8,
        version="1.0",
        layout=1,
        bits=61,
        host=host_identity(),
    )


class Watched:
    """A monitor whose callbacks fill queues."""

    def __init__(self) -> None:
        self.lock = InstanceLock(run_root())
        self.listener = Listener(job_directory(run_root(), "monitor"), self.lock.instance)
        self.record = record(0, self.lock, self.listener)
        self.events: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.ticks: queue.Queue[float] = queue.Queue()
        self.monitor = self.make_monitor(None)
        self._closing: list[Any] = []

    def make_monitor(self, period_s: float | None, **callbacks: Any) -> Monitor:
        defaults = {
            "on_death": lambda rank, reason: self.events.put(("death", rank, reason)),
            "on_tick": self.ticks.put,
            "on_message": self.take_message,
            "on_link": lambda link: self.events.put(("link", link)),
        }
        return Monitor(self.listener, **(defaults | callbacks), period_s=period_s)

    def take_message(self, rank: int, kind: str, body: dict[str, Any], descriptors: dict[str, Any]) -> None:
        for fd, _ in descriptors.values():
            os.close(fd)
        self.events.put(("message", rank, kind, body, sorted(descriptors)))

    def event(self) -> tuple[Any, ...]:
        return self.events.get(timeout=PATIENCE_S)

    def peer(self, rank: int) -> tuple[Link, Connection]:
        """Return a link as the monitor has it, and its other end, in this process."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link = Link(peer_of(here), record(rank, self.lock, self.listener))
        return self.later_close(link), self.later_close(peer_of(there))

    def child(self, rank: int, code: str) -> tuple[Link, subprocess.Popen[bytes]]:
        """Return a link to a process that runs ``code``, in which ``sock`` is its end."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            head = f"import os, signal, socket, time; signal.alarm(60); sock = socket.socket(fileno={there.fileno()})\n"
            process = subprocess.Popen([sys.executable, "-c", head + code], pass_fds=[there.fileno()])
        here.setblocking(False)
        connection = Connection(here, process.pid, os.pidfd_open(process.pid))
        link = Link(connection, record(rank, self.lock, self.listener))
        return self.later_close(link), process

    def later_close(self, one: Any) -> Any:
        self._closing.append(one)
        return one

    def close(self) -> None:
        self.monitor.stop()
        for one in self._closing:
            one.close()
        self.listener.close()
        self.lock.release()


@pytest.fixture
def watched(no_leaks: None) -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.close()


@pytest.fixture
def running(watched: Watched) -> Watched:
    watched.monitor.start()
    return watched


def assert_quiet(watched: Watched) -> None:
    with pytest.raises(queue.Empty):
        event = watched.events.get(timeout=QUIET_S)
        pytest.fail(f"unexpected: {event}")


# Deaths


def test_a_killed_process_is_reported_once(running):
    link, process = running.child(3, "time.sleep(60)")
    running.monitor.watch(3, link)
    process.kill()
    process.wait()
    kind, rank, reason = running.event()
    assert (kind, rank) == ("death", 3)
    assert reason in ("its process has ended", "it closed its link")
    assert_quiet(running)


def test_a_closed_link_of_a_living_process_is_a_death(running):
    link, process = running.child(1, "sock.close(); time.sleep(60)")
    running.monitor.watch(1, link)
    assert running.event() == ("death", 1, "it closed its link")
    assert process.poll() is None
    process.kill()
    process.wait()
    assert_quiet(running)


def test_a_death_is_seen_although_a_child_of_the_dead_holds_its_socket(running):
    code = """
reader, writer = os.pipe()
if os.fork() == 0:
    signal.alarm(60)
    sock.send(b'{"kind":"child","body":{"pid":%d},"descriptors":[]}' % os.getpid())
    time.sleep(60)
time.sleep(60)
"""
    link, process = running.child(1, code)
    running.monitor.watch(1, link)
    kind, _, _, body, _ = running.event()
    assert kind == "message"
    process.kill()
    assert running.event() == ("death", 1, "its process has ended")
    process.wait()
    os.kill(body["pid"], signal.SIGKILL)
    assert_quiet(running)


def test_all_messages_of_the_dead_come_before_its_death(watched):
    link, process = watched.child(
        2, '[sock.send(b\'{"kind":"x","body":{"n":%d},"descriptors":[]}\' % n) for n in range(20)]'
    )
    process.wait()
    watched.monitor.watch(2, link)
    watched.monitor.start()
    assert [watched.event() for _ in range(20)] == [("message", 2, "x", {"n": n}, []) for n in range(20)]
    assert watched.event()[:2] == ("death", 2)
    assert_quiet(watched)


def test_a_peer_that_talks_nonsense_is_given_up(running):
    link, there = running.peer(4)
    running.monitor.watch(4, link)
    there.socket.send(b"nonsense")
    there.socket.send(b"more")
    kind, rank, reason = running.event()
    assert (kind, rank) == ("death", 4)
    assert "its link failed" in reason and "no message" in reason
    assert_quiet(running)


def test_a_forgotten_peer_is_not_reported(running):
    link, there = running.peer(1)
    running.monitor.watch(1, link)
    running.monitor.forget(1)
    running.monitor.forget(1)
    there.send_message("late", {})
    there.close()
    assert_quiet(running)


def test_a_rank_can_be_watched_again_after_its_death(running):
    for _ in range(3):
        link, there = running.peer(1)
        running.monitor.watch(1, link)
        there.close()
        assert running.event() == ("death", 1, "it closed its link")
        link.close()


def test_a_rank_is_watched_once(running):
    link, _ = running.peer(1)
    running.monitor.watch(1, link)
    with pytest.raises(ValueError, match="rank 1 is watched already"):
        running.monitor.watch(1, link)


def test_many_deaths_at_once_are_each_reported_once(running):
    children = [running.child(rank, "time.sleep(60)") for rank in range(8)]
    for rank, (link, _) in enumerate(children):
        running.monitor.watch(rank, link)
    for _, process in children:
        process.kill()
    assert sorted(running.event()[1] for _ in children) == list(range(8))
    assert_quiet(running)
    for _, process in children:
        process.wait()


# Messages and visitors


def test_messages_arrive_in_order_with_their_descriptors(running):
    link, there = running.peer(5)
    running.monitor.watch(5, link)
    fd = create_memfd("test", 1)
    for number in range(3):
        there.send_message("ring", {"number": number}, {"ring": (fd, 1)})
    os.close(fd)
    assert [running.event() for _ in range(3)] == [("message", 5, "ring", {"number": n}, ["ring"]) for n in range(3)]


def test_a_talkative_peer_does_not_delay_the_others(watched):
    talkative, mouth = watched.peer(1)
    other, there = watched.peer(2)
    for number in range(50):
        mouth.send_message("talk", {"number": number})
    there.send_message("word", {})
    watched.monitor.watch(1, talkative)
    watched.monitor.watch(2, other)
    watched.monitor.start()
    first_two = [watched.event()[1] for _ in range(2)]
    assert sorted(first_two) == [1, 2]


def visit(watched: Watched) -> Connection:
    return watched.later_close(connect(str(watched.listener.path)))


def answer(visitor: Connection) -> Any:
    return visitor.wait_message(time.monotonic() + PATIENCE_S)


def test_a_visitor_that_asks_for_a_link_is_handed_on(running):
    mine = record(6, running.lock, running.listener)
    link = running.later_close(Link(connect(running.record.address), running.record))
    fd = create_memfd("test", 1)
    link.send_hello(mine, {"control": (fd, 1)})
    os.close(fd)
    kind, received = running.event()
    running.later_close(received)
    assert (kind, received.record) == ("link", mine)
    assert list(received.descriptors) == ["control"]
    received.send_welcome(running.record, {})
    link.read_welcome(answer(link), mine)


def test_a_worker_that_wants_to_join_is_told_that_the_job_is_full(running):
    visitor = visit(running)
    visitor.send_message("join-hello", join_hello(running.record, "monitor"))
    assert refusal_of(answer(visitor)) == "closed"
    assert answer(visitor) is None


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b'{"kind":"link-hello","body":{},"descriptors":[]}'])
def test_a_stranger_is_refused_and_changes_nothing(running, data):
    visitor = visit(running)
    visitor.socket.send(data)
    assert answer(visitor).kind == "refused"
    test_a_worker_that_wants_to_join_is_told_that_the_job_is_full(running)


def test_a_silent_visitor_is_sent_away(watched, monkeypatch):
    monkeypatch.setattr("fastref.runtime.monitor._VISITOR_PATIENCE_S", 0.05)
    watched.monitor.start()
    visitor = visit(watched)
    assert refusal_of(answer(visitor)) == "it said nothing"


# Time


def test_it_ticks_while_it_has_a_period(watched):
    watched.monitor = ticking = watched.make_monitor(0.01)
    watched.monitor.start()
    times = [watched.ticks.get(timeout=PATIENCE_S) for _ in range(5)]
    assert all(later - earlier >= 0.01 for earlier, later in zip(times, times[1:], strict=False))
    ticking.set_period(None)
    time.sleep(0.05)
    while not watched.ticks.empty():
        watched.ticks.get()
    with pytest.raises(queue.Empty):
        watched.ticks.get(timeout=QUIET_S)
    ticking.set_period(0.01)
    for _ in range(3):
        watched.ticks.get(timeout=PATIENCE_S)


def test_without_a_period_only_a_wake_makes_a_tick(running):
    with pytest.raises(queue.Empty):
        running.ticks.get(timeout=QUIET_S)
    before = time.monotonic()
    running.monitor.wake()
    assert before <= running.ticks.get(timeout=PATIENCE_S) <= time.monotonic()
    with pytest.raises(queue.Empty):
        running.ticks.get(timeout=QUIET_S)


def test_a_monitor_that_waits_does_not_run(running):
    link, _ = running.peer(1)
    running.monitor.watch(1, link)
    visitor = visit(running)
    visitor.send_message("join-hello", join_hello(running.record, "monitor"))
    answer(visitor)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "fastref-monitor"]

    def context_switches() -> int:
        with open(f"/proc/self/task/{thread.native_id}/status") as status:
            return sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)

    time.sleep(0.05)
    before = context_switches()
    time.sleep(0.5)
    assert context_switches() - before <= 1


# Failure and end


@pytest.mark.parametrize("callback", ["on_death", "on_tick", "on_message", "on_link"])
def test_a_callback_that_raises_is_logged_and_the_monitor_goes_on(watched, caplog, callback):
    def fail(*arguments: object) -> None:
        for argument in arguments:
            if isinstance(argument, Link):
                argument.close()
        watched.events.put(("failed",))
        raise KeyError("the callback's own mistake")

    watched.monitor.stop()
    watched.monitor = watched.make_monitor(None, **{callback: fail})
    watched.monitor.start()
    link, there = watched.peer(1)
    watched.monitor.watch(1, link)
    with caplog.at_level(logging.ERROR, logger="fastref"):
        if callback == "on_death":
            there.close()
        elif callback == "on_tick":
            watched.monitor.wake()
        elif callback == "on_message":
            there.send_message("x", {})
        else:
            asking = Link(connect(watched.record.address), watched.record)
            watched.later_close(asking).send_hello(watched.record, {})
        assert watched.event() == ("failed",)
        test_a_worker_that_wants_to_join_is_told_that_the_job_is_full(watched)
    (logged,) = caplog.records
    assert "failed in the monitor" in logged.message
    assert "the callback's own mistake" in logged.exc_text


def test_stop_is_idempotent_and_closes_only_its_own(running):
    link, there = running.peer(1)
    running.monitor.watch(1, link)
    running.monitor.stop()
    running.monitor.stop()
    running.monitor.wake()
    running.monitor.forget(1)
    there.send_message("still open", {})
    assert link.receive_message().kind == "still open"
    assert running.listener.fileno() >= 0


def test_a_monitor_that_never_started_can_be_stopped(watched):
    watched.monitor.stop()
    watched.monitor.stop(join=False)


def test_a_callback_may_stop_the_monitor(watched):
    watched.monitor.stop()
    watched.monitor = monitor = watched.make_monitor(None, on_tick=lambda now_s: (monitor.stop(), watched.ticks.put(0)))
    monitor.start()
    monitor.wake()
    watched.ticks.get(timeout=PATIENCE_S)
    monitor.stop()


def test_a_callback_may_forget_the_peer_it_is_told_about(watched):
    watched.monitor.stop()

    def take_and_forget(rank: int, *message: object) -> None:
        watched.monitor.forget(rank)
        watched.events.put(("forgotten", rank))

    watched.monitor = watched.make_monitor(None, on_message=take_and_forget)
    watched.monitor.start()
    link, there = watched.peer(1)
    watched.monitor.watch(1, link)
    there.send_message("one", {})
    assert watched.event() == ("forgotten", 1)
    there.send_message("two", {})
    there.close()
    assert_quiet(watched)


def test_a_forked_child_harms_nothing_and_is_told(running):
    link, there = running.peer(1)
    running.monitor.watch(1, link)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            running.monitor.forget(1)
            running.monitor.wake()
            running.monitor.stop()
            for call in (lambda: running.monitor.watch(2, link), lambda: running.monitor.set_period(1.0)):
                try:
                    call()
                except ForkedProcessError:
                    continue
                os._exit(1)
            running.listener.close()
            link.close()
            there.close()
            os._exit(0)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert running.ticks.empty()
    there.send_message("still here", {})
    assert running.event() == ("message", 1, "still here", {}, [])
    test_a_worker_that_wants_to_join_is_told_that_the_job_is_full(running)
