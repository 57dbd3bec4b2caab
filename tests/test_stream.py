"""TCP connections carry whole messages and no descriptors, and their door lets nobody in who has not proved himself."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from fastref.errors import IdentityError, ProtocolError, ResourceError, UsageError
from fastref.identity import mint, self_made_certificates
from fastref.rendezvous import Credentials, Door, StreamConnection, TcpListener, visit
from fastref.rendezvous.addresses import LOOPBACK
from fastref.rendezvous.connection import MAX_MESSAGE_BYTES
from fastref.rendezvous.door import MAX_UNPROVED
from fastref.rendezvous.proving import Proving, Tls
from fastref.rendezvous.stream import SILENCE_S, endpoint_text, parse_endpoint, tune

PATIENCE_S = 60.0


@pytest.fixture
def pair(no_leaks: None) -> Iterator[tuple[StreamConnection, StreamConnection]]:
    listener = TcpListener("127.0.0.1")
    sock = socket.create_connection(parse_endpoint(listener.endpoint))
    tune(sock)
    here, there = StreamConnection(sock, pid=1), StreamConnection(listener.accept(), pid=2)
    listener.close()
    yield here, there
    here.close()
    there.close()


def wait(connection: StreamConnection) -> object:
    return connection.wait_message(time.monotonic() + PATIENCE_S)


# Messages


def test_messages_arrive_whole_and_in_order(pair):
    here, there = pair
    for number in range(3):
        here.send_message("numbered", {"number": number, "text": "x" * 20_000})
    for number in range(3):
        message = wait(there)
        assert (message.kind, message.body["number"], message.descriptors) == ("numbered", number, {})
    with pytest.raises(BlockingIOError):
        there.receive_message()


def test_a_message_that_comes_byte_by_byte_is_one_message(pair):
    here, there = pair
    data = b'{"kind":"slow","body":{},"descriptors":[]}'
    for byte in struct.pack(">I", len(data)) + data:
        with pytest.raises(BlockingIOError):
            there.receive_message()
        here.socket.sendall(bytes([byte]))
    assert wait(there).kind == "slow"


def test_what_follows_a_message_is_left_for_whoever_takes_the_socket(pair):
    here, there = pair
    here.send_message("last", {})
    here.socket.sendall(b"frames")
    assert wait(there).kind == "last"
    taken = there.take_socket()
    there.close()
    assert not taken.getblocking()
    taken.setblocking(True)
    assert taken.recv(100) == b"frames"
    here.socket.sendall(b"more")
    assert taken.recv(100) == b"more"
    taken.close()


def test_a_socket_is_not_handed_over_in_the_middle_of_a_message(pair):
    here, there = pair
    here.socket.sendall(b"\0\0")
    with contextlib.suppress(BlockingIOError):
        while not there._received:
            there.receive_message()
    time.sleep(0.01)
    with contextlib.suppress(BlockingIOError):
        there.receive_message()
    with pytest.raises(ProtocolError, match="half a message"):
        there.take_socket()


def test_what_was_sent_before_the_end_is_received_before_the_end(pair):
    here, there = pair
    there.send_message("unread", {})
    here.send_message("last", {})
    here.close()
    assert wait(there).kind == "last"
    assert wait(there) is None
    assert there.is_gone()
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            there.send_message("late", {})
            time.sleep(0.001)


def test_the_end_in_the_middle_of_a_message_is_the_end(pair):
    here, there = pair
    here.socket.sendall(b"\0\0\0\x50{")
    here.close()
    assert wait(there) is None


def test_a_connection_that_is_reset_has_ended(pair):
    here, there = pair
    here.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    here.socket.close()
    assert wait(there) is None
    assert there.is_gone()


def test_a_peer_that_does_not_read_is_a_timeout_and_hears_no_half_messages(pair):
    here, there = pair
    with pytest.raises(TimeoutError, match=r"process 1 has not read its messages for [05] s"):
        for number in range(100_000):
            here.send_message("flood", {"number": number, "text": "x" * 100})
    received = 0
    # A message that was begun and cannot be finished ends the connection.
    with contextlib.suppress(BlockingIOError):
        while (message := there.receive_message()) is not None:
            assert message.body["number"] == received
            received += 1
    assert received > 100


def test_descriptors_are_refused_before_anything_is_sent(pair):
    here, there = pair
    with pytest.raises(UsageError, match="descriptors cannot be sent to process 1: it is reached over TCP"):
        here.send_message("link", {}, {"ring": (0, 1)})
    with pytest.raises(UsageError, match="is too large"):
        here.send_message("large", {"text": "x" * MAX_MESSAGE_BYTES})
    with pytest.raises(BlockingIOError):
        there.receive_message()


@pytest.mark.parametrize("size", [0, MAX_MESSAGE_BYTES + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_length_is_checked_before_anything_is_allocated(pair, size):
    here, there = pair
    here.socket.sendall(struct.pack(">I", size) + b"x" * 100)
    time.sleep(0.01)
    tracemalloc.start()
    try:
        for _ in range(2):  # nothing else is ever read
            with pytest.raises(ProtocolError, match=f"a message of {size} bytes, 1 to {MAX_MESSAGE_BYTES} are allowed"):
                there.receive_message()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", [b"x", b"[]", b"{}", b"[" * 60_000, b'{"kind":"x","body":{},"descriptors":[["a",1]]}'])
def test_nonsense_in_a_message_is_a_protocol_error_and_the_next_one_arrives(pair, data):
    here, there = pair
    here.socket.sendall(struct.pack(">I", len(data)) + data)
    with pytest.raises(ProtocolError):
        wait(there)
    here.send_message("next", {})
    assert wait(there).kind == "next"


def test_every_connection_is_set_up_the_same(pair):
    for end in pair:
        option = end.socket.getsockopt
        assert option(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == SILENCE_S * 1000
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


@pytest.mark.parametrize(("silence_s", "set_s"), [(2.0, SILENCE_S), (60.0, 60.0), (1e9, 2_147_483.647)])
def test_the_system_does_not_end_a_connection_before_its_worker_would(pair, silence_s, set_s):
    pair[0].tolerate(silence_s)
    assert pair[0].socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == round(set_s * 1000)


# Endpoints


@pytest.mark.parametrize(("address", "port"), [("10.0.0.1", 1), ("::1", 65535), ("fe80::1%eth0", 80)])
def test_endpoints_are_written_and_read(address, port):
    assert parse_endpoint(endpoint_text(address, port)) == (address, port)


@pytest.mark.parametrize("text", ["", "host:1", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:+1"])
def test_what_is_no_endpoint_is_refused(text):
    with pytest.raises(ProtocolError, match="an endpoint is an IP address and a port"):
        parse_endpoint(text)


def test_a_port_that_is_taken_or_an_address_of_another_host_is_a_resource_error():
    listener = TcpListener("127.0.0.1")
    with pytest.raises(ResourceError, match=f"cannot listen at {listener.endpoint}: Address already in use"):
        TcpListener(*parse_endpoint(listener.endpoint))
    listener.close()
    for address in ("192.0.2.1", "no address"):
        with pytest.raises(ResourceError, match="cannot listen at"):
            TcpListener(address)


# The door


@pytest.fixture
def door(no_leaks: None) -> Iterator[Door]:
    door = Door(TcpListener("127.0.0.1"), Credentials(mint(), "job", 0), LOOPBACK)
    yield door
    door.close()


def next_visitor(door: Door, patience_s: float = PATIENCE_S) -> StreamConnection | None:
    deadline = time.monotonic() + patience_s
    while (visitor := door.accept()) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return visitor


def come(door: Door, credentials: Credentials) -> tuple[list[object], threading.Thread]:
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(visit(door.endpoint, credentials, time.monotonic() + PATIENCE_S))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return outcome, thread


def knock(door: Door) -> socket.socket:
    return socket.create_connection(parse_endpoint(door.endpoint))


def test_one_with_the_same_credentials_is_let_in(door):
    outcome, thread = come(door, door.credentials)
    visitor = next_visitor(door)
    thread.join()
    outcome[0].send_message("hello", {})
    assert wait(visitor).kind == "hello"
    outcome[0].close()
    visitor.close()


@pytest.mark.parametrize("what", ["token", "job", "epoch"])
def test_one_with_other_credentials_is_not(door, what):
    mine = door.credentials
    other = {"token": mint(), "job": "another", "epoch": 1}[what]
    fields = {"token": mine.token, "job": mine.job, "epoch": mine.epoch, what: other}
    outcome, thread = come(door, Credentials(**fields))
    while thread.is_alive():
        assert door.accept() is None
    assert isinstance(outcome[0], IdentityError)
    assert "its token, job name or restart count differs" in str(outcome[0])


def test_more_strangers_than_may_wait_push_the_oldest_out_and_no_one_else(door):
    strangers = [knock(door) for _ in range(MAX_UNPROVED + 10)]
    outcome, thread = come(door, door.credentials)
    visitor = next_visitor(door)
    thread.join()
    gone = [is_closed(stranger) for stranger in strangers]
    assert gone == [True] * sum(gone) + [False] * (len(gone) - sum(gone)) and sum(gone) >= 10
    for part in (*strangers, visitor, outcome[0]):
        part.close()


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_one_who_says_nothing_is_gone_after_five_seconds(door, monkeypatch):
    stranger = knock(door)
    assert next_visitor(door, 0.05) is None
    assert not is_closed(stranger)
    now = time.monotonic
    monkeypatch.setattr("fastref.rendezvous.proving.time.monotonic", lambda: now() + 5.0)
    door.accept()
    assert is_closed(stranger)
    stranger.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes.fromhex("1603010200010001fc0303"),
        os.urandom(1 << 16),
        b"\xf5frh" + b"\xff" * 99,
    ],
)
def test_a_stranger_gets_no_word_and_costs_no_memory(door, data):
    stranger = knock(door)
    stranger.sendall(data)
    tracemalloc.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not is_closed(stranger) and time.monotonic() < deadline:
            assert door.accept() is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()
        stranger.close()


@contextlib.contextmanager
def no_descriptors() -> Iterator[list[int]]:
    """Use up all descriptors; gives those that were free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    held: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.dup(0))
        yield held
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


def test_one_whose_whole_proof_comes_while_the_door_looks_is_let_in(door, monkeypatch):
    """He says nothing more, so nothing wakes the door a second time."""
    look = Proving.advance

    def look_until_done(proving: Proving) -> bool:
        while not look(proving):
            time.sleep(0.001)
        return True

    monkeypatch.setattr(Proving, "advance", look_until_done)
    let_one_in(door)


def let_one_in(door: Door) -> None:
    outcome, thread = come(door, door.credentials)
    visitor = next_visitor(door)
    thread.join()
    for part in (visitor, outcome[0]):
        part.close()


def test_running_out_of_descriptors_turns_away_only_the_new_visitor(door):
    first = knock(door)
    with no_descriptors():
        assert door.accept() is None
    assert is_closed(first)
    first.close()
    let_one_in(door)


def test_a_door_whose_own_spare_descriptor_was_taken_waits_and_closes_none_of_others(door, monkeypatch):
    first, pauses = knock(door), []
    monkeypatch.setattr("fastref.rendezvous.listening.time.sleep", pauses.append)
    assert door._listener._queue.spare.give_up()
    with no_descriptors() as held:
        for _ in range(3):
            assert door.accept() is None
        assert [os.fstat(fd) for fd in held]
    monkeypatch.undo()
    assert len(pauses) == 3 and not is_closed(first)
    let_one_in(door)
    first.close()


def test_a_worker_that_has_no_descriptors_for_tls_drops_the_connection_and_who_dialed_is_told(tmp_path, monkeypatch):
    credentials = Credentials(mint(), "job", 0, Tls(self_made_certificates(tmp_path / "tls")))
    with contextlib.ExitStack() as stack:
        one, other = (Door(TcpListener("127.0.0.1"), credentials, LOOPBACK) for _ in range(2))
        stack.callback(one.close)
        stack.callback(other.close)
        proved, failed = [], []
        deadline = time.monotonic() + PATIENCE_S

        def refuse(connection: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr("fastref.rendezvous.proving.relay", refuse)
        one.dial(other.endpoint, proved.append, failed.append)
        while not failed and time.monotonic() < deadline:
            assert one.accept() is other.accept() is None
        assert failed[0].errno == errno.EMFILE and not proved
        monkeypatch.undo()
        one.dial(other.endpoint, proved.append, failed.append)
        visitor = None
        while not (proved and visitor) and time.monotonic() < deadline:
            one.accept()
            visitor = visitor or other.accept()
        for connection in (*proved, visitor):
            connection.close()
        assert len(failed) == 1


def test_a_forked_child_that_closes_the_door_harms_nothing(door):
    stranger = knock(door)
    door.accept()
    child = os.fork()
    if child == 0:
        door.close()
        os._exit(0)
    os.waitpid(child, 0)
    outcome, thread = come(door, door.credentials)
    visitor = next_visitor(door)
    thread.join()
    assert not is_closed(stranger)
    for part in (visitor, outcome[0], stranger):
        part.close()
