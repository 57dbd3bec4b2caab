"""The proxy hands on what comes, and spoils what a script wants spoilt, to the byte."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import pieces
from tests.pieces import (
    ASKER,
    HEAD,
    LISTENER,
    Cut,
    Gather,
    Piece,
    Script,
    Step,
    Write,
    as_it_is,
    corrupted,
    cut_after,
    half_closed_after,
    one_by_one,
    stalled_after,
)
from tests.proxy import Proxy, proxy

HANDSHAKE = {ASKER: (7, 3), LISTENER: (5,)}
PATIENCE_S = 60.0
SILENCE_S = 0.2


class Side:
    """One side of a connection that speaks like a worker."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.settimeout(PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.name = sock, name

    def shake_hands(self) -> None:
        for size in HANDSHAKE[self.name]:
            self.socket.sendall(bytes(size))

    def say(self, kind: str, **body: Any) -> None:
        data = json.dumps({"kind": kind, "body": body}).encode()
        self.socket.sendall(len(data).to_bytes(4, "big") + data)

    def hear(self) -> dict[str, Any]:
        return json.loads(self.read(int.from_bytes(self.read(4), "big")))

    def send(self, number: int, record: bytes, received: int = 0) -> None:
        self.socket.sendall(frame(number, record, received))

    def receive(self) -> tuple[int, int, bytes]:
        size, number, received, *_ = HEAD.unpack(self.read(HEAD.size))
        assert size >> 56 == 0xFA
        return number, received, self.read(size & (1 << 56) - 1)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise EOFError(f"{data!r} and then the end")
            data += more
        return data

    def is_silent(self) -> bool:
        self.socket.settimeout(SILENCE_S)
        with contextlib.suppress(TimeoutError):
            self.socket.recv(1)
            return False
        self.socket.settimeout(PATIENCE_S)
        return True

    def is_at_end(self) -> bool:
        return self.socket.recv(1) == b""


class Room:
    """A listener with a proxy before it."""

    def __init__(self, server: socket.socket, before: Proxy) -> None:
        self.server, self.proxy = server, before
        self.sockets: list[socket.socket] = []

    def connect(self) -> tuple[Side, Side]:
        host, port = self.proxy.endpoint.split(":")
        self.sockets.append(socket.create_connection((host, int(port)), PATIENCE_S))
        self.sockets.append(self.server.accept()[0])
        return Side(self.sockets[-2], ASKER), Side(self.sockets[-1], LISTENER)

    def link(self, hello: str = "link-hello", welcome: str = "link-welcome") -> tuple[Side, Side]:
        """Connect and speak until frames may come."""
        asker, listener = self.connect()
        for speaker, hearer in ((asker, listener), (listener, asker)):
            speaker.shake_hands()
            assert hearer.read(sum(HANDSHAKE[speaker.name])) == bytes(sum(HANDSHAKE[speaker.name]))
        for speaker, hearer, kind in ((asker, listener, hello), (listener, asker, welcome)):
            speaker.say(kind, received=0)
            assert hearer.hear() == {"kind": kind, "body": {"received": 0}}
        return asker, listener

    def again(self) -> tuple[Side, Side]:
        return self.link("session-resume", "session-resumed")


@pytest.fixture
def room() -> Iterator[Callable[[Script], Room]]:
    with contextlib.ExitStack() as stack:

        def start(script: Script = as_it_is) -> Room:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server.settimeout(PATIENCE_S)
            before = stack.enter_context(proxy(f"127.0.0.1:{server.getsockname()[1]}", HANDSHAKE, script))
            one = Room(server, before)
            stack.callback(lambda: [sock.close() for sock in one.sockets])
            return one

        yield start


def frame(number: int, record: bytes, received: int = 0) -> bytes:
    return pieces.frame(number, record, received=received, acquired=received)


def at_frame(number: int, steps: Callable[[Piece], list[Step]], direction: str = ASKER) -> Script:
    """Do something with one frame, and nothing with anything else."""

    def script(piece: Piece) -> list[Step]:
        return steps(piece) if (piece.number, piece.direction) == (number, direction) else as_it_is(piece)

    return script


def test_a_conversation_goes_through_as_it_is_and_is_recorded(room: Callable[..., Room]) -> None:
    one = room()
    started = time.monotonic()
    asker, listener = one.link()
    asker.send(1, b"first")
    listener.send(1, b"answer", received=1)
    asker.send(0, b"", received=1)
    asker.send(2, b"x" * 3_000_000)
    assert listener.receive() == (1, 0, b"first")
    assert asker.receive() == (1, 1, b"answer")
    assert listener.receive() == (0, 1, b"")
    assert listener.receive() == (2, 0, b"x" * 3_000_000)
    assert [(p.number, p.size_bytes) for p in one.proxy.frames(ASKER)] == [(1, 5), (2, 3_000_000)]
    assert [(p.number, p.received, p.size_bytes) for p in one.proxy.frames(LISTENER)] == [(1, 1, 6)]
    assert sorted(p.piece.kind for p in one.proxy.passed) == ["frame"] * 4 + ["handshake"] * 3 + ["message"] * 2
    times = [passed.at_s for passed in one.proxy.passed]
    assert started <= min(times) and max(times) <= time.monotonic()


@pytest.mark.parametrize("ender, other", [(0, 1), (1, 0)], ids=["asker", "listener"])
def test_the_end_of_one_side_is_the_end_for_the_other_half(room: Callable[..., Room], ender: int, other: int) -> None:
    sides = room().link()
    sides[ender].send(1, b"last")
    sides[ender].socket.shutdown(socket.SHUT_WR)
    assert sides[other].receive() == (1, 0, b"last")
    assert sides[other].is_at_end()
    sides[other].send(1, b"still here")
    assert sides[ender].receive() == (1, 0, b"still here")


def test_a_refusal_leaves_it_at_messages(room: Callable[..., Room]) -> None:
    asker, listener = room().link(welcome="refused")
    asker.say("link-hello")
    assert listener.hear()["kind"] == "link-hello"


@pytest.mark.parametrize("after", range(HEAD.size + 6))
def test_a_cut_at_every_byte_of_a_frame(room: Callable[..., Room], after: int) -> None:
    one = room(at_frame(2, lambda piece: cut_after(piece, after)))
    asker, listener = one.link()
    asker.send(1, b"first")
    asker.send(2, b"second")
    assert listener.receive() == (1, 0, b"first")
    assert listener.read(after) == frame(2, b"second")[:after]
    assert listener.is_at_end() and asker.is_at_end()
    assert [piece.number for piece in one.proxy.frames(ASKER)] == [1]


@pytest.mark.parametrize("kind, position", [("handshake", 0), ("handshake", 1), ("message", 0)])
def test_a_cut_before_frames_begin(room: Callable[..., Room], kind: str, position: int) -> None:
    def script(piece: Piece) -> list[Step]:
        wanted = (piece.direction, piece.kind, piece.position) == (ASKER, kind, position)
        return cut_after(piece, 2) if wanted else as_it_is(piece)

    asker, listener = room(script).connect()
    with contextlib.suppress(ConnectionError):  # it may be over before all is said
        asker.shake_hands()
        asker.say("link-hello")
    before = {"handshake": 7 * position, "message": 10}[kind]
    assert len(listener.read(before + 2)) == before + 2
    assert listener.is_at_end()
    with contextlib.suppress(ConnectionResetError):  # who speaks after the end is told so
        assert asker.is_at_end()


def test_a_cut_by_reset_is_seen_as_one_by_both(room: Callable[..., Room]) -> None:
    asker, listener = room(at_frame(1, lambda piece: cut_after(piece, 0, reset=True))).link()
    asker.send(1, b"first")
    for side in (asker, listener):
        with pytest.raises(ConnectionResetError):
            side.socket.recv(1)


@pytest.mark.parametrize("towards", [ASKER, LISTENER])
@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_connection_half_open_is_silence_for_the_side_that_was_not_told(
    room: Callable[..., Room], towards: str, reset: bool
) -> None:
    asker, listener = room(at_frame(1, lambda piece: [Cut((towards,), reset)])).link()
    told, other = (asker, listener) if towards == ASKER else (listener, asker)
    asker.send(1, b"first")
    with contextlib.suppress(ConnectionResetError):
        assert told.is_at_end()
    other.send(2, b"anybody?")
    other.send(3, b"anybody?")
    assert other.is_silent()


def test_a_frame_stalled_midway_goes_on_when_told(room: Callable[..., Room]) -> None:
    one = room(at_frame(1, lambda piece: stalled_after(piece, HEAD.size + 6)))
    asker, listener = one.link()
    asker.send(1, b"0123456789")
    assert listener.read(HEAD.size + 6) == frame(1, b"0123456789")[: HEAD.size + 6]
    assert listener.is_silent()
    listener.send(1, b"the other way is open")
    assert asker.receive()[2] == b"the other way is open"
    one.proxy.go_on()
    assert listener.read(4) == b"6789"


def test_a_connection_stalled_as_a_whole_loses_nothing(room: Callable[..., Room]) -> None:
    one = room()
    sides = one.link()
    one.proxy.stall()
    for side in sides:
        side.send(1, b"late")
    assert all(side.is_silent() for side in sides)
    one.proxy.go_on()
    assert [side.receive() for side in sides] == [(1, 0, b"late")] * 2


def test_half_a_close_ends_one_direction(room: Callable[..., Room]) -> None:
    asker, listener = room(at_frame(1, lambda piece: half_closed_after(piece, 4))).link()
    asker.send(1, b"first")
    asker.send(2, b"dropped")
    assert listener.read(4) == frame(1, b"first")[:4] and listener.is_at_end()
    listener.send(1, b"answer")
    assert asker.receive() == (1, 0, b"answer")


@pytest.mark.parametrize("at", [0, 7, 8, HEAD.size - 1, HEAD.size, HEAD.size + 4])
def test_one_byte_of_head_or_record_is_corrupted(room: Callable[..., Room], at: int) -> None:
    one = room(at_frame(1, lambda piece: corrupted(piece, at)))
    asker, listener = one.link()
    asker.send(1, b"first")
    sent = frame(1, b"first")
    arrived = listener.read(len(sent))
    assert [index for index in range(len(sent)) if arrived[index] != sent[index]] == [at]
    assert one.proxy.frames(ASKER) == []
    asker.send(2, b"second")
    assert listener.receive() == (2, 0, b"second")


def test_frames_arrive_byte_by_byte(room: Callable[..., Room]) -> None:
    asker, listener = room(one_by_one).link()
    asker.send(1, b"first")
    assert listener.receive() == (1, 0, b"first")


def test_frames_arrive_many_in_one(room: Callable[..., Room]) -> None:
    one = room(at_frame(1, lambda piece: [Gather(5)]))
    asker, listener = one.link()
    for number in range(1, 6):
        asker.send(number, b"record")
    expected = b"".join(frame(number, b"record") for number in range(1, 6))
    assert listener.socket.recv(1 << 16) == expected
    assert [piece.number for piece in one.proxy.frames(ASKER)] == [1, 2, 3, 4, 5]


def test_gathering_ends_after_a_while_and_a_frame_on_its_way_then_is_not_lost(room: Callable[..., Room]) -> None:
    one = room(at_frame(1, lambda piece: [Gather(3, seconds=0.2)]))
    asker, listener = one.link()
    asker.send(1, b"first")
    asker.send(2, b"second")
    third = frame(3, b"third")
    asker.socket.sendall(third[:20])
    assert listener.receive()[2] == b"first" and listener.receive()[2] == b"second"
    asker.socket.sendall(third[20:])
    assert listener.receive() == (3, 0, b"third")


def test_after_a_reconnect_frames_are_repeated_and_reordered(room: Callable[..., Room]) -> None:
    one = room()
    asker, listener = one.link()
    for number in (1, 2):
        asker.send(number, b"record")
        assert listener.receive() == (number, 0, b"record")
    one.proxy.cut()
    assert asker.is_at_end() and listener.is_at_end()

    def script(piece: Piece) -> list[Step]:
        if not (piece.flow.resumes and piece.kind == "frame" and piece.position == 0):
            return as_it_is(piece)
        earlier = [Write(old.data) for old in one.proxy.frames(piece.direction) if old.flow is not piece.flow]
        return [*earlier, Gather(2, arranged=lambda pieces: pieces[::-1])]

    one.proxy.script = script
    asker, listener = one.again()
    for number in (3, 4, 5):
        asker.send(number, b"record")
    assert [listener.receive()[0] for _ in range(5)] == [1, 2, 4, 3, 5]
    first, second = one.proxy.flows
    assert (first.resumes, second.resumes) == (False, True)
    assert [piece.number for piece in one.proxy.frames(ASKER, first)] == [1, 2]


def test_a_proxy_that_is_shut_takes_nobody_until_it_is_open(room: Callable[..., Room]) -> None:
    one = room()
    sides = one.link()
    one.proxy.shut()
    assert all(side.is_at_end() for side in sides)
    host, port = one.proxy.endpoint.split(":")
    with contextlib.suppress(ConnectionResetError), socket.create_connection((host, int(port)), PATIENCE_S) as refused:
        assert refused.recv(1) == b""
    one.proxy.open()
    one.again()


def test_a_listener_that_is_not_there_is_a_reset(room: Callable[..., Room]) -> None:
    one = room()
    one.server.close()
    host, port = one.proxy.endpoint.split(":")
    with pytest.raises(ConnectionResetError), socket.create_connection((host, int(port)), PATIENCE_S) as asker:
        asker.recv(1)


@pytest.mark.parametrize("spoil", ["script", "frame"])
def test_trouble_of_the_proxy_itself_fails_the_test(spoil: str) -> None:
    def script(piece: Piece) -> list[Step]:
        if spoil == "script" and piece.kind == "frame":
            raise ValueError("a frame whose script fails")
        return as_it_is(piece)

    with pytest.raises(ValueError, match="a frame whose"), socket.create_server(("127.0.0.1", 0)) as server:
        with proxy(f"127.0.0.1:{server.getsockname()[1]}", HANDSHAKE, script) as before:
            asker, listener = (one := Room(server, before)).link()
            asker.socket.sendall(frame(1, b"first") if spoil == "script" else bytes(HEAD.size))
            assert listener.is_at_end() and asker.is_at_end()
            for sock in one.sockets:
                sock.close()
