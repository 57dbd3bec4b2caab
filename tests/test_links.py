"""Links carry whole messages and descriptors, refuse nonsense, and let only the right visitors in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait

import pytest

from fastref.errors import CallTimeout, ProtocolError, RendezvousError, UsageError, WorkerDied
from fastref.rendezvous import (
    Connection,
    Link,
    Listener,
    WorkerRecord,
    link_all,
)
from fastref.rendezvous.connection import MAX_MESSAGE_BYTES, connect
from fastref.rendezvous.meeting import LocalMeeting
from fastref.segments import create_memfd
from tests.workers import PATIENCE_S, Worker, worker

_jobs = iter(range(10**6))


@pytest.fixture
def alice(no_leaks: None) -> Iterator[Worker]:
    with worker("alice", f"local://links-{next(_jobs)}") as one:
        yield one


# Links between two workers of this process


@pytest.fixture
def pair(alice: Worker) -> Iterator[tuple[Link, Link]]:
    """Return both ends of one link: (alice's to bob, bob's to alice)."""
    with worker("bob", alice.init_method) as bob:
        thread = threading.Thread(target=lambda: (bob.join(1, 2, PATIENCE_S), bob.link(PATIENCE_S)))
        thread.start()
        alice.join(0, 2, PATIENCE_S)
        alice.link(PATIENCE_S)
        thread.join()
        yield alice.links[1], bob.links[0]


def test_messages_and_descriptors_arrive_whole_and_in_order(pair):
    here, there = pair
    fd = create_memfd("test", 5)
    os.pwrite(fd, b"hello", 0)
    for number in range(3):
        here.send_message("numbered", {"number": number}, {"ring": (fd, 5), "arena": (fd, 4)})
    os.close(fd)
    for number in range(3):
        message = there.receive_message()
        assert (message.kind, message.body) == ("numbered", {"number": number})
        assert {label: size for label, (_, size) in message.descriptors.items()} == {"ring": 5, "arena": 4}
        for received, _ in message.descriptors.values():
            assert not os.get_inheritable(received)
            assert os.pread(received, 5, 0) == b"hello"
        message.close()
    with pytest.raises(BlockingIOError):
        there.receive_message()


def test_messages_with_a_handler_are_acted_upon_by_whoever_reads_and_the_others_kept_in_order(pair):
    here, there = pair
    handled = []
    there.handlers["file"] = lambda message: handled.append(message.body["n"])
    for n in range(6):
        here.send_message("file" if n % 2 else "other", {"n": n})
    there.read_ahead(lambda: len(handled) == 3)
    assert handled == [1, 3, 5]
    here.send_message("other", {"n": 6})
    assert [there.receive_message().body["n"] for _ in range(4)] == [0, 2, 4, 6]
    here.send_message("file", {"n": 7})
    with pytest.raises(BlockingIOError):
        there.receive_message()
    assert handled == [1, 3, 5, 7]


def test_reading_ahead_ends_when_nothing_comes_and_when_nothing_can_come(pair):
    here, there = pair
    there.read_ahead(lambda: False)
    handled = []
    there.handlers["file"] = lambda message: handled.append(message.body["n"])
    here.send_message("file", {"n": 1})
    here.close()
    there.read_ahead(lambda: False)
    assert handled == [1]
    assert there.receive_message() is None
    there.close()
    there.read_ahead(lambda: False)


def test_another_thread_may_read_what_is_awaited(pair):
    here, there = pair
    handled = []
    there.handlers["file"] = lambda message: handled.append(message.body["n"])
    thread = threading.Thread(target=there.read_ahead, args=(lambda: bool(handled),))
    thread.start()
    here.send_message("file", {"n": 1})
    while not handled:
        with pytest.raises(BlockingIOError):
            there.receive_message()
    thread.join()
    assert handled == [1]


def test_what_is_posted_to_one_who_does_not_read_waits_and_arrives_in_order(pair):
    here, there = pair
    count = 0
    while here.post_message("numbered", {"n": count, "filler": "x" * 10_000}):
        count += 1
    for later in range(1, 4):
        assert not here.post_message("numbered", {"n": count + later})
    assert here.is_behind
    received = []
    while len(received) < count + 4:
        with contextlib.suppress(BlockingIOError):
            while True:
                received.append(there.receive_message().body["n"])
        here.flush_posts()
    assert received == list(range(count + 4))
    assert not here.is_behind
    there.close()
    with pytest.raises(WorkerDied):
        here.post_message("numbered", {})


def test_what_was_sent_before_the_end_is_received_before_the_end(pair):
    here, there = pair
    there.send_message("unread", {})
    here.send_message("last", {})
    here.close()
    assert there.receive_message().kind == "last"
    assert there.receive_message() is None
    assert there.is_gone()
    with pytest.raises(WorkerDied, match="'alice'"):
        there.send_message("late", {})


def test_a_peer_that_does_not_read_is_a_call_timeout_that_names_it(pair):
    here, _ = pair
    with pytest.raises(CallTimeout, match=r"worker 'bob' \(rank 1, .* has not read its messages for 0.05 s"):
        for _ in range(10_000):
            here.send_message("flood", {"text": "x" * 10_000}, timeout_s=0.05)


def test_a_message_that_is_too_large_is_refused_before_it_is_sent(pair):
    here, there = pair
    with pytest.raises(UsageError, match="is too large"):
        here.send_message("large", {"text": "x" * MAX_MESSAGE_BYTES})
    with pytest.raises(UsageError, match="17 descriptors is too large"):
        here.send_message("many", {}, {str(number): (0, 0) for number in range(17)})
    with pytest.raises(BlockingIOError):
        there.receive_message()


def test_a_segment_that_was_not_handed_over_is_a_protocol_error(pair):
    with pytest.raises(ProtocolError, match=r"'bob' .* handed over no segment 'ring'"):
        pair[0].take("ring")


NONSENSE = [
    b"x",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"[" * 60_000,
    b'{"kind":' + b"9" * 6000 + b"}",
    b"{}",
    b'{"kind":"","body":{},"descriptors":[]}',
    b'{"kind":1,"body":{},"descriptors":[]}',
    b'{"kind":"x","body":[],"descriptors":[]}',
    b'{"kind":"x","body":{},"descriptors":{}}',
    b'{"kind":"x","body":{},"descriptors":[["ring",1]]}',
    b'{"kind":"x","body":{"a":NaN},"descriptors":[]}',
    b"x" * (MAX_MESSAGE_BYTES + 1),
    b"\x80\x04cos\nsystem\n(S'true'\ntR.",
]


@pytest.mark.parametrize("data", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_on_a_link_is_a_protocol_error(pair, data):
    here, there = pair
    here.socket.sendall(data)
    with pytest.raises(ProtocolError):
        there.receive_message()
    here.send_message("next", {})
    assert there.receive_message().kind == "next"


@pytest.mark.parametrize(
    "announced", [[], [["a", 1]], [["a", 1], ["a", 2]], [["a", -1], ["b", 1]], [1, 2], [["a"]] * 2]
)
def test_descriptors_of_a_message_that_is_refused_are_closed(pair, announced):
    here, there = pair
    fd = create_memfd("test", 1)
    before = len(os.listdir("/proc/self/fd"))
    envelope = {"kind": "x", "body": {}, "descriptors": announced}
    socket.send_fds(here.socket, [json.dumps(envelope).encode()], [fd, fd])
    with pytest.raises(ProtocolError, match="field"):
        there.receive_message()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


# Visitors


def next_visitor(listener: Listener) -> Connection | None:
    wait([listener], PATIENCE_S)
    return listener.accept()


def test_a_visitor_of_another_user_is_turned_away_before_a_byte_is_read(alice, monkeypatch):
    visitor = connect(alice.record.address)
    monkeypatch.setattr("fastref.rendezvous.connection.os.geteuid", lambda: 12345)
    assert next_visitor(alice.listener) is None
    monkeypatch.undo()
    assert visitor.wait_message(time.monotonic() + PATIENCE_S) is None
    visitor.close()


def test_running_out_of_descriptors_turns_away_only_the_new_visitor(alice):
    first, second = connect(alice.record.address), connect(alice.record.address)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    held = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.dup(0))
        assert alice.listener.accept() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert first.is_gone()
    accepted = alice.listener.accept()
    assert not second.is_gone()
    for connection in (first, second, accepted):
        connection.close()


def test_a_long_path_of_a_socket_works(tmp_path):
    directory = tmp_path / ("x" * 100)
    listener = Listener(directory, "0" * 16)
    visitor = connect(str(listener.path))
    accepted = next_visitor(listener)
    assert accepted.pid == visitor.pid == os.getpid()
    for part in (visitor, accepted, listener):
        part.close()
    assert not directory.exists()


def test_a_listener_survives_that_its_empty_directory_is_swept(monkeypatch, tmp_path):
    directory = tmp_path / "job"
    made = []

    def make_and_lose(path):
        path.mkdir(mode=0o700)
        made.append(path)
        if len(made) < 3:
            path.rmdir()

    monkeypatch.setattr("fastref.rendezvous.listening.make_private_directory", make_and_lose)
    listener = Listener(directory, "0" * 16)
    assert listener.path.exists() and len(made) == 3
    listener.close()


def test_a_forked_child_that_closes_everything_harms_nothing(alice):
    alice.join(0, 1, PATIENCE_S)
    child = os.fork()
    if child == 0:
        alice.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert alice.listener.path.exists()
    assert len(LocalMeeting(alice.listener.directory).look()) == 1
    visitor = connect(alice.record.address)
    next_visitor(alice.listener).close()
    visitor.close()


def hello(asking: WorkerRecord, alice: Worker, changes: dict[str, object]) -> dict[str, object]:
    body = {"magic": "fastref", "version": asking.version, "layout": asking.layout, "record": asking.to_fields()}
    return {**body, "to_instance": alice.lock.instance, **changes}


@pytest.mark.parametrize(
    ("who", "changes", "sentence"),
    [
        ({}, {"layout": 2}, r"'bob' \(rank 1, .* layout 2\), worker 'alice' \(rank 0, .* layout 1\); all workers"),
        ({}, {"version": "0.9"}, r"worker 'bob' .* has fastref 0.9 .* worker 'alice' .* has fastref 1.0"),
        ({}, {"magic": "other"}, "field 'magic' is wrong"),
        ({}, {"to_instance": "f" * 16}, "worker 'bob' .* wants instance ffffffffffffffff, this is instance"),
        ({}, {"record": {}}, "field 'name' is missing"),
        ({"pid": 1}, {}, "field 'pid' says 1, the process at the other end is"),
        ({"name": "eve"}, {}, "worker 'eve' .* is no member of the job of worker 'alice'"),
        ({"rank": 9}, {}, "worker 'bob' .rank 9.* is no member of the job"),
    ],
)
def test_who_may_not_have_a_link_is_told_why_and_the_member_still_gets_it(alice, who, changes, sentence):
    alice.join(0, 1, PATIENCE_S)
    bob = dataclasses.replace(alice.record, name="bob", rank=1)
    wrong, right = (Link(connect(alice.record.address), alice.record) for _ in range(2))
    fd = create_memfd("test", 1)
    wrong.send_message("link-hello", hello(dataclasses.replace(bob, **who), alice, changes), {"control": (fd, 1)})
    right.send_hello(bob, {"control": (fd, 1)})
    os.close(fd)
    before = len(os.listdir("/proc/self/fd"))
    links = link_all(alice.record, (alice.record, bob), alice.listener, lambda peer: {}, time.monotonic() + PATIENCE_S)
    answer = wrong.wait_message(time.monotonic() + PATIENCE_S)
    with pytest.raises(RendezvousError, match="worker 'alice' .* refused a link: .*" + sentence):
        wrong.read_welcome(answer, bob)
    right.read_welcome(right.wait_message(time.monotonic() + PATIENCE_S), bob)
    # The link, its process and its one segment: the descriptors of the other are closed.
    assert len(os.listdir("/proc/self/fd")) == before + 3
    for link in (wrong, right, *links.values()):
        link.close()


def test_an_answer_of_another_build_or_worker_is_not_taken(alice):
    bob = dataclasses.replace(alice.record, name="bob", rank=1)
    link = Link(connect(alice.record.address), bob)
    visitor = Link(next_visitor(alice.listener), alice.record)
    for record, error, text in [
        (
            dataclasses.replace(bob, version="0.9"),
            RendezvousError,
            "'bob' .* has fastref 0.9 .* 'alice' .* fastref 1.0",
        ),
        (dataclasses.replace(bob, name="eve"), ProtocolError, "'eve' .* answered in place of worker 'bob'"),
    ]:
        visitor.send_welcome(record, {})
        with pytest.raises(error, match=text):
            link.read_welcome(link.wait_message(time.monotonic() + PATIENCE_S), alice.record)
    visitor.send_message("other", {})
    with pytest.raises(ProtocolError, match="answered a link-hello with 'other'"):
        link.read_welcome(link.wait_message(time.monotonic() + PATIENCE_S), alice.record)
    link.close()
    visitor.close()


# Records


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a b"),
        ("name", 3),
        ("rank", -1),
        ("rank", True),
        ("rank", 1.5),
        ("pid", 0),
        ("instance", "XYZ"),
        ("instance", "../../../../etc"),
        ("address", "relative"),
        ("address", "/\0"),
        ("world_size", -1),
        ("incarnation", 4096),
        ("world_size", 2**17),
        ("version", ""),
        ("layout", None),
        ("bits", 65),
        ("host", []),
    ],
)
def test_a_damaged_record_is_an_error_that_names_the_field(alice, field, value):
    assert WorkerRecord.from_json(alice.record.to_json()) == alice.record
    fields = alice.record.to_fields()
    with pytest.raises(ProtocolError, match=f"field {field!r}"):
        WorkerRecord.from_json(json.dumps({**fields, field: value}).encode())
    del fields[field]
    with pytest.raises(ProtocolError, match=f"field {field!r} is missing"):
        WorkerRecord.from_fields(fields)
