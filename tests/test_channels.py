"""The contract of a channel, one suite over every kind: records arrive whole, in order, each once, or not at all.

What only the shared-memory channel can meet (other processes, damaged memory) comes after it.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections import Counter, deque
from collections.abc import Iterator
from multiprocessing import reduction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastref.channels.channel import BELL_BYTES, MAX_PEERS, Inbox
from fastref.channels.inproc import InprocChannel
from fastref.channels.shm import RING_SIZE, ShmChannel, ring_bytes
from fastref.errors import ProtocolError, UsageError
from fastref.segments import create_memfd, map_fd
from tests.inboxes import DATA, HEADER, RING, Ends, damage
from tests.threads import in_threads


@pytest.fixture(params=["inproc", "shm", "tcp"])
def ends(request) -> Iterator[Ends]:
    ends = Ends(request.param)
    yield ends
    ends.close()


@pytest.fixture
def shm() -> Ends:
    return Ends("shm")


# The contract


def test_records_arrive_whole_in_order_each_once(ends):
    channel = ends.channel(7)
    sent = [bytes([i]) * i for i in range(30)]
    assert all(channel.send(data) for data in sent)
    assert ends.receive_all() == [(7, data) for data in sent]
    assert ends.inbox.receive() is None


def test_an_empty_record_is_a_record(ends):
    channel = ends.channel()
    assert channel.send(b"") and channel.send(b"x")
    assert ends.receive_all() == [(0, b""), (0, b"x")]


def test_the_largest_record_fits_whatever_came_before(ends):
    channel, choice = ends.channel(), random.Random(1)
    for _ in range(200):
        before = choice.randbytes(choice.randrange(100))
        largest = choice.randbytes(channel.largest)
        assert channel.send(before) and ends.inbox.receive() == (0, before)
        assert channel.send(largest) and ends.inbox.receive() == (0, largest)


def test_a_record_that_is_too_large_is_refused_and_leaves_nothing(ends):
    channel = ends.channel()
    with pytest.raises(UsageError, match=f"{channel.largest + 1} bytes.*at most {channel.largest}"):
        channel.send(bytes(channel.largest + 1))
    assert ends.inbox.receive() is None
    assert channel.send(b"next") and ends.inbox.receive() == (0, b"next")


def test_a_full_channel_says_so_and_recovers(ends):
    channel, sent, received = ends.channel(), 0, 0
    for _ in range(5):
        while channel.send(struct.pack("=Q", sent)):
            sent += 1
        assert channel.send(b"") is None
        for _ in range(3):
            assert ends.inbox.receive() == (0, struct.pack("=Q", received))
            received += 1
        assert channel.send(struct.pack("=Q", sent))
        sent += 1
    assert [data for _, data in ends.receive_all()] == [struct.pack("=Q", i) for i in range(received, sent)]


def test_a_closed_channel_refuses_and_keeps_what_was_sent(ends):
    channel = ends.channel()
    assert channel.send(b"before")
    assert not channel.closed
    channel.shut()
    channel.shut()
    assert channel.closed
    with pytest.raises(UsageError, match="closed"):
        channel.send(b"after")
    assert ends.receive_all() == [(0, b"before")]


def test_positions_grow_and_the_cursors_follow(ends):
    channel = ends.channel()
    assert channel.acquired_position() == channel.consumed_position() == 0
    positions = [channel.send(bytes(i)) for i in range(10)]
    assert positions == sorted(set(positions)) and positions[0] > 0
    assert channel.acquired_position() == channel.consumed_position() == 0
    for position in positions:
        ends.inbox.receive()
        assert channel.acquired_position() == channel.consumed_position() == position


def test_a_flood_from_one_source_does_not_starve_another(ends):
    loud, quiet = ends.channel(1), ends.channel(200)
    while loud.send(b"loud"):
        pass
    quiet.send(b"quiet")
    order = []
    while 200 not in order:
        order.append(ends.inbox.receive()[0])
        loud.send(b"loud")
    assert len(order) <= 65


def test_every_source_has_its_turn(ends):
    channels = {source: ends.channel(source) for source in (0, 1, 63, 64, 100, 255)}
    sent: Counter = Counter()
    for _ in range(30):
        for source, channel in channels.items():
            sent[source] += bool(channel.send(bytes([source])))
    assert Counter(source for source, data in ends.receive_all() if data == bytes([source])) == sent


def test_what_was_given_back_is_found_again(ends):
    one, two = ends.channel(1), ends.channel(2)
    for channel in (one, two):
        assert channel.send(b"a") and channel.send(b"b")
    assert ends.inbox.receive() is not None
    ends.inbox.give_back()  # as before another thread drains
    assert len(ends.receive_all()) == 3


def test_threads_may_send_on_one_channel(ends):
    channel = ends.channel()
    received: list = []

    def work(number):
        if number == 0:
            while len(received) < 3 * 2000:
                record = ends.inbox.receive()
                if record:
                    received.append(record[1])
                else:
                    time.sleep(0)
        else:
            for i in range(2000):
                while not channel.send(struct.pack("=QQ", number, i) + bytes(i % 50)):
                    time.sleep(0)

    in_threads(4, work)
    seen = [struct.unpack_from("=QQ", data) for data in received]
    for number in (1, 2, 3):
        assert [i for who, i in seen if who == number] == list(range(2000))
    assert all(len(data) == 16 + i % 50 for data, (_, i) in zip(received, seen, strict=True))


@pytest.mark.parametrize("kind", ["inproc", "shm", "tcp"])
@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, RING // 2 - HEADER), st.integers(0, 4)), max_size=60), st.integers(0, 2))
def test_any_mix_of_sizes_arrives(kind, steps, skew):
    """Every step sends a record, if there is room, and receives some: records wrap and pad at every place."""
    ends = Ends(kind)
    channel, under_way = ends.channel(3), deque()
    for number, (size, receive) in enumerate(steps):
        data = bytes((number + i) % 251 for i in range(size))
        position = channel.send(data)
        if position:
            under_way.append((data, position))
        else:
            assert under_way, "an empty channel is never full"
        for _ in range(max(receive - skew, 0)):
            record = ends.inbox.receive()
            assert (record is None) == (not under_way)
            if record:
                data, position = under_way.popleft()
                assert record == (3, data) and channel.consumed_position() == position
    assert ends.receive_all() == [(3, data) for data, _ in under_way]
    ends.close()


@pytest.mark.parametrize("source", [-1, MAX_PEERS, 2**40])
def test_a_source_that_an_inbox_cannot_name_is_refused(ends, source):
    for call in (ends.inbox.add_queue, ends.inbox.remove, ends.inbox.ring_for_dead):
        with pytest.raises(UsageError, match="0 to 255"):
            call(source)
    with pytest.raises(UsageError):
        ends.inbox.add_ring(source, bytearray(ring_bytes(RING)), RING)


def test_a_source_that_was_removed_is_not_read(ends):
    channel = ends.channel(5)
    channel.send(b"late")
    ends.inbox.remove(5)
    assert ends.inbox.receive() is None


def test_figures_tell_what_arrived(ends):
    channel = ends.channel(9)
    channel.send(b"x"), channel.send(b"y")
    ends.inbox.receive()
    kind = {"inproc": "queue", "shm": "ring", "tcp": "queue"}[ends.kind]
    assert ends.inbox.snapshot() == {9: {"kind": kind, "received": 1, "empty": False, "broken": 0}}


# The in-process channel: delivery under the test's hand


def test_held_records_arrive_when_they_are_delivered():
    inbox = Inbox(bytearray(BELL_BYTES))
    channel = InprocChannel(inbox, 0, hold=True)
    for data in (b"1", b"2", b"3"):
        assert channel.send(data)
    assert channel.under_way == 3 and channel.peek() == b"1" and inbox.receive() is None
    assert channel.deliver(2) == 2 and channel.under_way == 1
    assert [inbox.receive(), inbox.receive(), inbox.receive()] == [(0, b"1"), (0, b"2"), None]
    assert channel.drop_all() == 1 and channel.deliver() == 0 and channel.peek() is None
    assert inbox.receive() is None


# The shared-memory channel: bounds


@pytest.mark.parametrize("size", [0, 512, 1000, 3 << 10, 1 << 31, -1024])
def test_a_ring_of_an_odd_size_is_refused(shm, size):
    with pytest.raises(UsageError):
        ring_bytes(size)
    with pytest.raises(UsageError):
        shm.inbox.add_ring(0, bytearray(4096), size)
    with pytest.raises(UsageError):
        ShmChannel(bytearray(4096), size, shm.bell, 0)


def test_memory_that_is_too_small_is_refused(shm):
    small = bytearray(ring_bytes(RING) - 1)
    with pytest.raises(ProtocolError):
        ShmChannel(small, RING, shm.bell, 0)
    with pytest.raises(UsageError):
        shm.inbox.add_ring(0, small, RING)
    with pytest.raises(UsageError):
        Inbox(bytearray(BELL_BYTES - 1))


def test_memory_stays_as_long_as_a_channel_or_an_inbox_uses_it(shm):
    channel = shm.channel(0)
    for memory in (shm.bell, shm.rings[0]):
        with pytest.raises(BufferError):
            memory.extend(b"more")
    del channel
    shm.inbox.remove(0)
    with pytest.raises(BufferError):  # some thread may be looking whether there is anything to read
        shm.rings[0].extend(b"more")
    del shm.inbox
    shm.rings[0].extend(b"more")


def test_a_ring_that_holds_something_when_it_is_added_is_read():
    bell, ring = bytearray(BELL_BYTES), bytearray(ring_bytes(RING))
    channel = ShmChannel(ring, RING, bell, 4)
    assert channel.send(b"early")
    bell[:32] = bytes(32)  # whoever took its bit did not know the ring yet
    inbox = Inbox(bell)
    inbox.add_ring(4, ring, RING)
    assert inbox.receive() == (4, b"early")


def test_what_a_producer_published_before_it_could_ring_is_read(shm):
    channel = shm.channel(4)
    channel.send(b"killed after this")
    shm.bell[:32] = bytes(32)
    assert shm.inbox.receive() is None
    shm.inbox.ring_for_dead(4)
    assert shm.inbox.receive() == (4, b"killed after this")


DAMAGES = ["check", "size", "padding", "tail beyond the ring", "tail between records", "tail behind"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_ring_is_given_up_and_the_others_go_on(shm, how):
    bad, good = shm.channel(1), shm.channel(2)
    bad.send(b"x" * 40), good.send(b"fine")
    damage(shm.rings[1], how)
    with pytest.raises(ProtocolError, match="source 1"):
        shm.receive_all()
    bad.send(b"never read")
    good.send(b"still fine")
    records = shm.receive_all()
    assert (2, b"still fine") in records and all(source == 2 for source, _ in records)
    assert shm.inbox.snapshot()[2]["received"] == 2
    with pytest.raises(ProtocolError):  # the channel to a source that lives again is a new one
        shm.channel(1).send(b"y"), damage(shm.rings[1], "check"), shm.receive_all()


@settings(deadline=None, max_examples=200)
@given(st.binary(min_size=1, max_size=64), st.integers(0, DATA + 200), st.integers(1, 20))
def test_garbage_in_a_ring_is_records_or_a_protocol_error(garbage, offset, count):
    ends = Ends("shm")
    channel = ends.channel(1)
    for i in range(count):
        channel.send(bytes(i))
    ends.rings[1][offset : offset + len(garbage)] = garbage
    received = 0
    try:
        for source, data in ends.receive_all():
            assert source == 1 and len(data) < RING
            received += 1
    except ProtocolError:
        pass
    assert received <= RING // 16


@pytest.mark.parametrize("head", [2**64 - 16, RING, 1 << 40])
def test_a_receiver_that_lies_about_its_cursors_gains_nothing(shm, head):
    channel = shm.channel(1)
    position = channel.send(b"x" * 100)
    shm.rings[1][64:80] = struct.pack("=QQ", head, head)
    assert channel.acquired_position() in (0, position) and channel.consumed_position() in (0, position)
    while channel.send(b"y" * 100):
        pass  # full in the end; at most it overwrites what it says it has read
    assert channel.sent <= 2 * RING // 128


# Across processes


def produce(pipe, peer: int, count: int) -> None:
    bell_fd, ring_fd = reduction.recv_handle(pipe), reduction.recv_handle(pipe)
    bell = map_fd(bell_fd, BELL_BYTES, writable=True)
    channel = ShmChannel(map_fd(ring_fd, ring_bytes(RING_SIZE), writable=True), RING_SIZE, bell, peer)
    os.close(bell_fd)
    os.close(ring_fd)
    pipe.send("ready")
    number = 0
    while number != count:
        if channel.send(struct.pack("=Q", number) + bytes(number * 7 % 300)):
            number += 1
        else:
            time.sleep(0)
    pipe.send(channel.sent)
    pipe.recv()


@pytest.fixture
def producers(spawn_workers, mp_context):
    """Return ``start({peer: count}) -> (inbox, pipes, processes)``."""
    fds, pipes = [], []

    def start(counts):
        bell = create_memfd("bell", BELL_BYTES)
        fds.append(bell)
        inbox = Inbox(map_fd(bell, BELL_BYTES, writable=True))
        workers = {}
        for peer, count in counts.items():
            ring = create_memfd("ring", ring_bytes(RING_SIZE))
            fds.append(ring)
            inbox.add_ring(peer, map_fd(ring, ring_bytes(RING_SIZE), writable=True), RING_SIZE)
            mine, theirs = mp_context.Pipe()
            pipes.append(mine)
            [workers[peer]] = spawn_workers(produce, [(theirs, peer, count)])
            theirs.close()
            reduction.send_handle(mine, bell, workers[peer].pid)
            reduction.send_handle(mine, ring, workers[peer].pid)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        return inbox, pipes, workers

    yield start
    for fd in fds:
        os.close(fd)
    for pipe in pipes:
        pipe.close()


def test_records_of_other_processes_arrive_whole_and_in_order(producers):
    inbox, pipes, workers = producers({0: 20000, 70: 20000})
    expected = dict.fromkeys(workers, 0)
    while any(count < 20000 for count in expected.values()):
        record = inbox.receive()
        if record is None:
            time.sleep(0)
            continue
        peer, data = record
        assert data == struct.pack("=Q", expected[peer]) + bytes(expected[peer] * 7 % 300)
        expected[peer] += 1
    for pipe in pipes:
        assert pipe.recv() == 20000
        pipe.send("end")
    for worker in workers.values():
        worker.join()
        assert worker.exitcode == 0
    assert inbox.receive() is None


@pytest.mark.parametrize("seed", range(3))
def test_what_a_killed_process_published_is_read_whole(producers, seed):
    inbox, _, workers = producers({3: -1})
    received = 0
    until = random.Random(seed).randrange(100, 3000)
    while received < until:
        record = inbox.receive()
        if record:
            assert record[1][:8] == struct.pack("=Q", received)
            received += 1
    workers[3].kill()
    workers[3].join()
    inbox.ring_for_dead(3)
    for _, data in iter(inbox.receive, None):
        assert data[:8] == struct.pack("=Q", received)
        received += 1
    assert inbox.snapshot()[3] == {"kind": "ring", "received": received, "empty": True, "broken": 0}
