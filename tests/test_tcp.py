"""A TCP channel carries records whole, in order and each once, however often its connection breaks."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastref.channels.channel import BELL_BYTES, Inbox
from fastref.channels.tcp import LARGEST_RECORD, TcpChannel, TcpLoop
from fastref.errors import ProtocolError, UsageError
from fastref.runtime.post import use_warm_memory
from tests import pieces
from tests.pieces import FRAME_MAGIC, HEAD

PATIENCE_S = 60.0
MAGIC = FRAME_MAGIC << 56
LEAVING = 1

Record = tuple[bytes, bytes | None]


class End:
    """One end: a loop that is stepped by hand, and its channels."""

    def __init__(self, silence_s: float = 15.0) -> None:
        self.inbox = Inbox(bytearray(BELL_BYTES))
        self.breaks: list[tuple[int, str]] = []
        self.loop = TcpLoop(self.inbox, lambda source, reason: self.breaks.append((source, reason)), silence_s)
        self.got: list[Record] = []
        self.channels: dict[int, TcpChannel] = {}

    def channel(self, source: int = 0, **options: int) -> TcpChannel:
        self.channels[source] = TcpChannel(self.loop, source, **options)
        return self.channels[source]

    def step(self) -> None:
        self.loop.step()
        while (record := self.inbox.receive_whole()) is not None:
            self.got.append(record[1:])


class Pair:
    """Two ends of one session."""

    def __init__(self, **options: int) -> None:
        self.ends = End(), End()
        self.channels = self.ends[0].channel(**options), self.ends[1].channel(**options)

    def attach(self, one: socket.socket, other: socket.socket, sums: bool = False) -> None:
        """Go on over two connected sockets."""
        received = [channel.received for channel in self.channels]
        for channel, sock, there in zip(self.channels, (one, other), reversed(received), strict=True):
            sock.setblocking(False)
            channel.attach(sock.detach(), there, sums)

    def connect(self, sums: bool = False) -> None:
        self.attach(*socket.socketpair(), sums)

    def connect_by_way(self) -> tuple[socket.socket, socket.socket]:
        """Connect, but not with each other; returns the other ends of both sockets."""
        (one, from_one), (other, from_other) = socket.socketpair(), socket.socketpair()
        self.attach(one, other)
        return from_one, from_other

    def step(self) -> None:
        for end in self.ends:
            end.step()

    def step_until(self, condition: Callable[[], object]) -> None:
        step_until(self.step, condition)

    def is_quiet(self) -> bool:
        return all(channel.is_quiet for channel in self.channels)

    def say(self, which: int, record: Record) -> None:
        data, bulk = record
        sent = self.channels[which].send(data) if bulk is None else self.channels[which].send_with(data, bulk)
        assert sent is not None

    def close(self) -> None:
        for end in self.ends:
            end.loop.close()


def step_until(step: Callable[[], None], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        step()


@contextlib.contextmanager
def made(**options: int) -> Iterator[Pair]:
    pair = Pair(**options)
    try:
        yield pair
    finally:
        pair.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with made() as one:
        yield one


class Raw:
    """One end of a session whose other end says whatever a test wants."""

    def __init__(self, silence_s: float = 15.0, **options: int) -> None:
        self.end = End(silence_s)
        self.channel = self.end.channel(**options)
        self.socket = socket.socket()
        self.connect()

    def connect(self) -> None:
        self.socket.close()
        here, self.socket = socket.socketpair()
        here.setblocking(False)
        self.channel.attach(here.detach())

    def say(self, *heads: tuple[int, ...], data: bytes = b"") -> None:
        with contextlib.suppress(BrokenPipeError):
            self.socket.sendall(b"".join(pieces.head(*head, data[: head[4]]) for head in heads) + data)

    def step_until_got(self, count: int) -> None:
        step_until(self.end.step, lambda: len(self.end.got) == count)

    def step_until_broken(self, times: int = 1) -> str:
        step_until(self.end.step, lambda: len(self.end.breaks) == times)
        assert self.channel.is_broken
        return self.end.breaks[0][1]

    def close(self) -> None:
        self.end.loop.close()
        self.socket.close()


@contextlib.contextmanager
def raw_end(**options: float) -> Iterator[Raw]:
    raw = Raw(**options)  # type: ignore[arg-type]
    try:
        yield raw
    finally:
        raw.close()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


# ---- records arrive


@pytest.mark.parametrize("size", [1, 39, 4096, 262_143, 262_144, 1 << 20, 64 << 20])
def test_a_record_with_bytes_behind_it_arrives_whole(pair: Pair, size: int) -> None:
    pair.connect()
    bulk = os.urandom(min(size, 1 << 20)) * max(size >> 20, 1)
    pair.say(0, (b"record", bulk))
    pair.step_until(lambda: pair.ends[1].got and pair.is_quiet())
    assert [data for data, _ in pair.ends[1].got] == [b"record"]
    assert pair.ends[1].got[0][1] == bulk


@pytest.mark.parametrize("size", [1, 64, 4096, LARGEST_RECORD])
def test_a_record_alone_arrives_whole(pair: Pair, size: int) -> None:
    pair.connect()
    data = os.urandom(size)
    pair.say(1, (data, None))
    pair.step_until(lambda: pair.ends[0].got and pair.is_quiet())
    assert pair.ends[0].got == [(data, None)]


def test_a_record_that_is_too_large_is_refused(pair: Pair) -> None:
    with pytest.raises(UsageError, match="65537 bytes; the channel carries at most 65536"):
        pair.channels[0].send(bytes(LARGEST_RECORD + 1))


def test_records_of_all_sizes_arrive_in_order_both_ways(pair: Pair) -> None:
    pair.connect()
    said: list[list[Record]] = [[], []]
    for number in range(300):
        for which in (0, 1):
            size = (number * 7919 + which * 13) % 5000 + 1
            record = (bytes([number % 256]) * size, bytes([which]) * size * 9 if number % 3 == 0 else None)
            said[which].append(record)
            pair.say(which, record)
            if number % 7 == 0:
                pair.step()
    pair.step_until(lambda: pair.is_quiet() and all(len(end.got) == 300 for end in pair.ends))
    assert [pair.ends[1].got, pair.ends[0].got] == said


def test_what_was_sent_before_the_connection_is_there_follows_it(pair: Pair) -> None:
    pair.say(0, (b"first", None))
    pair.say(0, (b"second", b"bulk"))
    pair.connect()
    pair.step_until(lambda: len(pair.ends[1].got) == 2)
    assert pair.ends[1].got == [(b"first", None), (b"second", b"bulk")]


def test_what_was_taken_is_confirmed_so_that_pins_may_go(pair: Pair) -> None:
    pair.connect()
    for number in range(3):
        pair.say(0, (b"record %d" % number, None))
    pair.step_until(lambda: pair.channels[0].acquired_position() == 3)
    assert pair.channels[0].is_quiet


# ---- breaks

CONVERSATION: list[tuple[int, Record]] = [
    (0, (b"a", None)),
    (1, (b"answer", b"with bytes behind it")),
    (0, (b"question", b"x" * 45)),
    (1, (b"b" * 30, None)),
    (0, (b"the last", None)),
]


def said_by(which: int, conversation: list[tuple[int, Record]] = CONVERSATION) -> list[Record]:
    return [record for side, record in conversation if side == which]


def pass_on(source: socket.socket, sink: socket.socket, left: int) -> int:
    """Hand on up to ``left`` bytes; how many may still go after that."""
    with contextlib.suppress(BlockingIOError):
        while left and (data := source.recv(min(left, 1 << 16), socket.MSG_DONTWAIT)):
            sink.sendall(data)
            left -= len(data)
    return left


def cut_after(pair: Pair, limits: tuple[int, int]) -> bool:
    """Connect, and cut when so many bytes of one side have gone on; False when it has no more to say."""
    ways = pair.connect_by_way()
    left, idle = list(limits), 0
    while all(left) and idle < 3:
        before = list(left)
        left[0], left[1] = pass_on(ways[0], ways[1], left[0]), pass_on(ways[1], ways[0], left[1])
        idle = idle + 1 if before == left else 0
        pair.step()
    for sock in ways:
        sock.close()
    pair.step_until(lambda: all(channel.is_broken for channel in pair.channels))
    return not all(left)


@pytest.mark.parametrize("side", [0, 1])
def test_each_record_arrives_once_when_the_connection_is_cut_at_any_byte(side: int) -> None:
    count = 0
    while True:
        with made() as pair:
            for which, record in CONVERSATION:
                pair.say(which, record)
            goes_on = cut_after(pair, (count, 1 << 20) if side == 0 else (1 << 20, count))
            pair.connect()
            pair.step_until(lambda pair=pair: pair.is_quiet() and all(c.resumed == 1 for c in pair.channels))
            assert pair.ends[1].got == said_by(0) and pair.ends[0].got == said_by(1), count
        if not goes_on:
            break
        count += 1
    assert count > len(said_by(side)) * HEAD.size


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.tuples(st.binary(min_size=1, max_size=40), st.none() | st.binary(min_size=1))),
        max_size=12,
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=8),
)
def test_each_record_arrives_once_however_often_it_breaks(
    conversation: list[tuple[int, Record]], cuts: list[tuple[int, int]]
) -> None:
    with made() as pair:
        for number, limits in enumerate(cuts):
            for which, record in conversation[number::8]:
                pair.say(which, record)
            cut_after(pair, limits)
        for number in range(len(cuts), 8):
            for which, record in conversation[number::8]:
                pair.say(which, record)
        said = [item for number in range(8) for item in conversation[number::8]]
        pair.connect()
        pair.step_until(lambda: pair.is_quiet() and all(c.acquired_position() == c.sent for c in pair.channels))
        assert pair.ends[1].got == said_by(0, said) and pair.ends[0].got == said_by(1, said)


def test_what_comes_again_is_dropped_with_its_bytes() -> None:
    with raw_end() as raw:
        for _ in range(2):
            raw.say((MAGIC | 6, 1, 0, 0, 6, 0), data=b"record")
            raw.say((MAGIC | 9, 2, 0, 0, 5, 0), data=b"otherbulk")
        raw.say((MAGIC | 1, 3, 0, 0, 1, 0), data=b"x")
        step_until(raw.end.step, lambda: len(raw.end.got) == 3)
        assert raw.end.got == [(b"record", None), (b"other", b"bulk"), (b"x", None)]
        assert not raw.end.breaks and raw.channel.received == 3


@pytest.mark.parametrize("received", [3, 2**63, 2**64 - 1])
def test_a_session_does_not_go_on_with_one_who_has_what_was_never_sent(pair: Pair, received: int) -> None:
    for number in range(2):
        pair.say(0, (b"%d" % number, None))
    one, other = socket.socketpair()
    with one, other, pytest.raises(ProtocolError, match=f"the peer has {received} of 2 records"):
        pair.channels[0].attach(one.fileno(), received)


def test_a_session_does_not_go_on_with_one_who_has_lost_what_it_confirmed(pair: Pair) -> None:
    pair.connect()
    for number in range(2):
        pair.say(0, (b"%d" % number, None))
    pair.step_until(pair.is_quiet)
    pair.channels[0].hang_up()
    pair.step_until(lambda: pair.channels[0].is_broken)
    one, other = socket.socketpair()
    with one, other, pytest.raises(ProtocolError, match="the peer has 1 of 2 records"):
        pair.channels[0].attach(one.fileno(), 1)


def test_a_connected_channel_takes_no_other_socket(pair: Pair) -> None:
    pair.connect()
    one, other = socket.socketpair()
    with one, other, pytest.raises(UsageError, match="connected, or closed"):
        pair.channels[0].attach(one.fileno(), 0)


def test_the_end_is_seen_though_it_comes_together_with_the_last_record() -> None:
    with raw_end() as raw:
        raw.say((MAGIC | 4, 1, 0, 0, 4, 0), data=b"last")
        raw.socket.close()
        assert raw.step_until_broken() == "the connection was closed"
        raw.end.step()
        assert raw.end.got == [(b"last", None)] and not raw.channel.spoilt


# ---- damage


WHOLE = [
    pieces.frame(1, b"record"),
    pieces.frame(2, b"with bytes", b"behind it" * 3, signal=pieces.SUMMED),
    pieces.frame(0),
    pieces.frame(3, b"the last"),
]
SAID: list[Record] = [(b"record", None), (b"with bytes", b"behind it" * 3), (b"the last", None)]


def test_any_bit_that_flips_is_seen_and_what_follows_comes_again() -> None:
    stream = b"".join(WHOLE)
    for bit in range(8 * len(stream)):
        data = bytearray(stream)
        data[bit // 8] ^= 1 << bit % 8
        with raw_end() as raw:
            raw.socket.sendall(data)
            assert "was damaged on its way" in raw.step_until_broken()
            assert raw.end.got == SAID[: len(raw.end.got)] and len(raw.end.got) < 3 and not raw.channel.spoilt
            raw.connect()
            raw.socket.sendall(stream)
            raw.step_until_got(3)
            assert raw.end.got == SAID and raw.channel.damaged == 1


def test_two_flips_up_to_a_short_burst_are_seen_too() -> None:
    stream = b"".join(WHOLE[:2])
    for start in range(0, 8 * len(stream) - 32, 7):
        for length in (2, 11, 32):
            flipped = int.from_bytes(stream, "little") ^ (1 | 1 << length - 1) << start
            with raw_end() as raw:
                raw.socket.sendall(flipped.to_bytes(len(stream), "little"))
                assert "was damaged on its way" in raw.step_until_broken()
                assert raw.end.got == SAID[: len(raw.end.got)] and len(raw.end.got) < 2


def test_what_comes_damaged_again_and_again_is_given_up() -> None:
    with raw_end() as raw:
        for times in range(8):
            assert not raw.channel.spoilt
            raw.socket.sendall(WHOLE[0] + WHOLE[1][:-1] + b"?")
            raw.step_until_broken(times + 1)
            assert raw.end.got == SAID[:1]
            if times < 7:
                raw.connect()
        assert raw.channel.spoilt and raw.end.breaks[-1][1] == "what it sends comes damaged, again and again"


def test_what_comes_whole_in_between_is_no_reason_to_give_up() -> None:
    with raw_end() as raw:
        for number in range(1, 21):
            raw.socket.sendall(pieces.frame(number, b"%d" % number) + pieces.frame(number + 1, b"damaged")[:-1] + b"?")
            raw.step_until_broken(number)
            raw.connect()
        assert raw.end.got == [(b"%d" % number, None) for number in range(1, 21)] and not raw.channel.spoilt


@pytest.mark.parametrize("size", [1, 262_144, 524_288, 1_048_575, 1_048_576, 1_048_577, 3_000_000])
def test_bytes_behind_a_record_arrive_with_a_checksum_in_whatever_portions(size: int) -> None:
    with made() as pair:
        pair.connect(sums=True)
        bulk = os.urandom(1024) * (size // 1024) + b"x" * (size % 1024)
        for which in (0, 1):
            pair.say(which, (b"record", bulk))
            pair.say(which, (b"small", None))
        pair.step_until(pair.is_quiet)
        assert all(end.got == [(b"record", bulk), (b"small", None)] and not end.breaks for end in pair.ends)
        assert all(channel.bytes_sent >= size + 4 + 2 * HEAD.size + 11 for channel in pair.channels)


# ---- nonsense


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ((0, 1, 0, 0, 0, 0), "no frame"),
        (((MAGIC ^ 1 << 56) | 6, 1, 0, 0, 6, 0), "no frame"),
        ((2**63, 1, 0, 0, 6, 0), "no frame"),
        ((2**64 - 1, 1, 0, 0, 6, 0), "no frame"),
        ((MAGIC | (2**56 - 1), 1, 0, 0, 6, 0), "more at once than there is memory for"),
        ((MAGIC | LARGEST_RECORD + 1, 1, 0, 0, LARGEST_RECORD + 1, 0), "no frame"),
        ((MAGIC | 5, 1, 0, 0, 6, 0), "no frame"),
        ((MAGIC | 6, 1, 0, 0, 6, 2), "no frame"),
        ((MAGIC | 10, 1, 0, 0, 6, 2), "no frame"),
        ((MAGIC | 6, 1, 0, 0, 6, 4), "no frame"),
        ((MAGIC | 6, 0, 0, 0, 6, 0), "a record without a number"),
        ((MAGIC | 6, 2, 0, 0, 6, 0), "left out records"),
        ((MAGIC | 6, 2**64 - 1, 0, 0, 6, 0), "left out records"),
        ((MAGIC | 6, 1, 1, 0, 6, 0), "confirmed what was never sent"),
        ((MAGIC | 6, 1, 2**64 - 1, 0, 6, 0), "confirmed what was never sent"),
        ((MAGIC | 6, 1, 0, 1, 6, 0), "confirmed what was never sent"),
        ((MAGIC, 0, 5, 0, 0, 0), "confirmed what was never sent"),
    ],
)
@pytest.mark.parametrize("memory", ["plain", "warm"])
def test_nonsense_breaks_the_connection_and_nothing_of_it_arrives(
    head: tuple[int, ...], reason: str, memory: str
) -> None:
    with raw_end() as raw:
        if memory == "warm":
            use_warm_memory(raw.end.loop)
        gc.collect()
        before = resident_bytes()
        raw.say(head, data=b"record and what follows")
        assert reason in raw.step_until_broken()
        assert resident_bytes() - before < 1 << 20
        assert raw.channel.spoilt and raw.channel.reason == raw.end.breaks[0][1]
        raw.end.step()
        assert not raw.end.got and len(raw.end.breaks) == 1


def test_what_was_not_sent_yet_cannot_be_confirmed() -> None:
    with raw_end(room_bytes=1 << 30) as raw:
        raw.channel.send_with(b"record", bytes(8 << 20))
        raw.channel.send(b"behind it")
        raw.say((MAGIC, 0, 1, 0, 0, 0))
        assert "confirmed what was never sent" in raw.step_until_broken()


def test_a_claim_costs_no_memory_until_its_bytes_come() -> None:
    with raw_end() as raw:
        before = resident_bytes()
        raw.say((MAGIC | 1 << 28, 1, 0, 0, 6, 0), data=b"record" + b"x" * 1000)
        for _ in range(3):
            raw.end.step()
        assert resident_bytes() - before < 1 << 20
        assert not raw.end.got and not raw.end.breaks


@given(st.binary(max_size=400))
def test_arbitrary_bytes_deliver_nothing_and_crash_nothing(data: bytes) -> None:
    with raw_end() as raw:
        raw.say(data=data)
        raw.socket.close()
        raw.step_until_broken()
        raw.end.step()
        assert not raw.end.got


_heads = st.tuples(
    st.integers(0, 200).map(lambda size: MAGIC | size) | st.integers(0, 2**64 - 1),
    st.integers(0, 4) | st.integers(0, 2**64 - 1),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 100) | st.integers(0, 2**32 - 1),
    st.integers(0, 2),
)


@given(st.lists(st.tuples(_heads, st.binary(max_size=200)), max_size=8))
def test_heads_of_all_kinds_deliver_only_what_is_in_order(frames: list[tuple[tuple[int, ...], bytes]]) -> None:
    with raw_end() as raw:
        for _ in range(2):
            raw.channel.send(b"something that may be confirmed")
        for head, data in frames:
            raw.say(head, data=data)
        raw.socket.shutdown(socket.SHUT_WR)
        raw.step_until_broken()
        raw.end.step()
        assert len(raw.end.got) == raw.channel.received


# ---- a peer that does not read, is silent, or leaves


def test_a_peer_that_does_not_read_costs_so_much_memory_and_holds_up_nobody_else() -> None:
    one, other = End(), End()
    stuck, fine = one.channel(0, room_bytes=1 << 20), one.channel(1, room_bytes=1 << 20)
    receiver = other.channel(1)
    (stuck_socket, unread), (here, there) = socket.socketpair(), socket.socketpair()
    try:
        for channel, sock in ((stuck, stuck_socket), (fine, here), (receiver, there)):
            sock.setblocking(False)
            channel.attach(sock.detach())
        sent = 0
        while stuck.send(bytes(50_000)) is not None:
            sent += 1
            assert sent < 1000
        assert sent * 50_000 <= (1 << 20) + 50_000
        for number in range(200):
            assert fine.send(b"%d" % number * 1000) is not None
            for end in (one, other):
                end.step()
        step_until(lambda: (one.step(), other.step()), lambda: len(other.got) == 200)  # type: ignore[func-returns-value]
        assert stuck.send(b"no room yet") is None and not one.breaks
        # When it reads, there is room again: what it has confirmed need not be kept.
        read, expected = 0, sent * (50_000 + HEAD.size)
        while read < expected:
            read += len(unread.recv(1 << 20))
            one.step()
        unread.sendall(pieces.frame(0, received=sent, acquired=sent))
        step_until(one.step, lambda: stuck.is_quiet)
        assert stuck.send(b"there is room") is not None
    finally:
        one.loop.close()
        other.loop.close()
        unread.close()


def test_a_silent_peer_counts_as_broken() -> None:
    with raw_end(silence_s=0.05) as raw:
        assert raw.step_until_broken() == "nothing has come from it for 0.05 s"
        assert raw.channel.silent and not raw.channel.spoilt


def test_a_peer_that_only_gives_signs_of_life_is_not_silent() -> None:
    here, there = End(silence_s=1.0), End(silence_s=1.0)
    one, other = socket.socketpair()
    try:
        for end, sock in ((here, one), (there, other)):
            sock.setblocking(False)
            end.channel().attach(sock.detach())
        threads = [threading.Thread(target=end.loop.run) for end in (here, there)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE_S
        while here.channels[0].bytes_received < 4 * HEAD.size and not here.breaks:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        breaks = list(here.breaks)
        for end, thread in zip((here, there), threads, strict=True):
            end.loop.stop()
            thread.join()
        assert not breaks and not here.got
    finally:
        here.loop.close()
        there.loop.close()


def test_a_peer_that_leaves_says_so_behind_all_that_it_sent(pair: Pair) -> None:
    pair.connect()
    pair.say(0, (b"last", bytes(3 << 20)))
    pair.channels[0].leave()
    pair.step_until(lambda: pair.ends[1].breaks)
    pair.step()
    assert pair.channels[1].peer_left and len(pair.ends[1].got) == 1
    with pytest.raises(UsageError, match="closed"):
        pair.channels[1].send(b"anybody there?")
    pair.step_until(lambda: pair.channels[0].is_broken)
    assert pair.channels[0].is_quiet  # it has been told that all has come
    with pytest.raises(UsageError, match="closed"):
        pair.channels[0].send(b"one thing more")


def test_a_farewell_that_was_lost_is_said_again(pair: Pair) -> None:
    ways = pair.connect_by_way()
    pair.say(0, (b"last", None))
    pair.channels[0].leave()
    for sock in ways:
        sock.close()
    pair.step_until(lambda: all(channel.is_broken for channel in pair.channels))
    assert not pair.channels[1].peer_left
    pair.connect()
    pair.step_until(lambda: pair.ends[1].got and pair.channels[1].peer_left)
    assert pair.ends[1].got == [(b"last", None)]


def test_a_farewell_waits_for_room() -> None:
    with raw_end() as raw:
        # All but the last record fit; then there is room for none, nor for the farewell behind it.
        while raw.channel.send(bytes(4096)) is not None and raw.channel.bytes_sent == raw.channel.sent * (
            4096 + HEAD.size
        ):
            pass
        raw.channel.leave()
        raw.socket.setblocking(False)
        data, deadline = b"", time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            raw.end.step()
            with contextlib.suppress(BlockingIOError):
                if not (more := raw.socket.recv(1 << 20)):
                    break
                data += more
        assert HEAD.unpack(data[-HEAD.size :])[5] == LEAVING
