"""The favourite, a ring from which many records in a row have come: it keeps its ready bit, and nothing is lost."""

from __future__ import annotations

import random
import struct
from collections import Counter

import pytest

from fastref.channels.channel import MAX_PEERS
from fastref.channels.shm import ShmChannel
from fastref.errors import ProtocolError
from tests.inboxes import Ends, damage

RUN = 12  # records in a row that make a ring the favourite


@pytest.fixture(params=["inproc", "shm"])
def ends(request) -> Ends:
    return Ends(request.param)


@pytest.fixture
def shm() -> Ends:
    return Ends("shm")


def make_favourite(ends: Ends, channel: ShmChannel, source: int) -> None:
    for _ in range(RUN):
        assert channel.send(b"much") and ends.inbox.receive() == (source, b"much")
    assert ends.inbox.receive() is None
    assert kept(ends.bell) == [source] and not ends.inbox.has_any()


def kept(bell: bytearray) -> list[int]:
    """Return the sources whose ready bits are set."""
    ready = int.from_bytes(bell[:32], "little")
    return [source for source in range(MAX_PEERS) if ready >> source & 1]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_while_the_favourite_changes(ends, seed):
    """Sources talk in runs, with pauses and with others in between; another thread drains now and then."""
    choice, favourites = random.Random(seed), set()
    channels = {source: ends.channel(source) for source in (0, 1, 63, 64, 200)}
    sent, received = Counter(), Counter()

    def receive() -> bool:
        record = ends.inbox.receive()
        if record is None:
            return False
        source, data = record
        assert data == struct.pack("=Q", received[source])
        received[source] += 1
        return True

    for _ in range(60):
        source = choice.choice(list(channels))
        for _ in range(choice.randrange(1, 3 * RUN)):
            talker = source if choice.random() < 0.95 else choice.choice(list(channels))
            if channels[talker].send(struct.pack("=Q", sent[talker])):
                sent[talker] += 1
            for _ in range(choice.randrange(3)):
                something_left = sent != received
                assert receive() == something_left
                if choice.random() < 0.2:
                    ends.inbox.give_back()
                    assert ends.inbox.has_any() or sent == received
        if choice.random() < 0.5:
            while receive():
                pass
            assert sent == received and not ends.inbox.has_any()
            favourites.update(kept(ends.bell))
    while receive():
        pass
    assert sent == received and not ends.inbox.has_any()
    assert len(favourites) > 2 if ends.kind == "shm" else not favourites


def test_the_favourite_may_be_removed_and_another_ring_come_in_its_place(shm):
    channel, other = shm.channel(5), shm.channel(6)
    make_favourite(shm, channel, 5)
    channel.send(b"not read any more")
    del channel
    shm.inbox.remove(5)
    del shm.rings[5]
    assert other.send(b"x") and shm.inbox.has_any()
    assert shm.receive_all() == [(6, b"x")] and not shm.inbox.has_any()
    make_favourite(shm, other, 6)
    again = shm.channel(5)
    assert again.send(b"new") and shm.receive_all() == [(5, b"new")]


@pytest.mark.parametrize("how", ["tail beyond the ring", "tail between records", "tail behind"])
def test_a_favourite_that_breaks_is_given_up(shm, how):
    bad, good = shm.channel(1), shm.channel(2)
    make_favourite(shm, bad, 1)
    damage(shm.rings[1], how)
    assert shm.inbox.has_any()
    good.send(b"fine")
    with pytest.raises(ProtocolError, match="source 1"):
        shm.receive_all()
    assert shm.receive_all() in ([], [(2, b"fine")]) and shm.inbox.snapshot()[2]["received"] == 1
    assert not shm.inbox.has_any()
    del bad
    shm.inbox.remove(1)
    make_favourite(shm, good, 2)


def test_a_favourite_may_get_another_ring(shm):
    make_favourite(shm, shm.channel(1), 1)
    channel = shm.channel(1)
    assert shm.inbox.has_any()  # it may hold something
    assert channel.send(b"new") and shm.receive_all() == [(1, b"new")]
    assert not shm.inbox.has_any()
    make_favourite(shm, channel, 1)


def test_what_a_favourite_published_before_it_was_killed_is_read(shm):
    channel = shm.channel(4)
    make_favourite(shm, channel, 4)
    channel.send(b"killed after this")
    shm.inbox.ring_for_dead(4)
    assert shm.inbox.has_any() and shm.inbox.receive() == (4, b"killed after this")
    assert not shm.inbox.has_any()
