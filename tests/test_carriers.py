"""The contract of a carrier, one suite over every kind."""

from __future__ import annotations

import os
import random
import struct

import pytest

from fastref._core import Holder, ReferenceTable, table_sizes
from fastref.carriers.arena import Arena
from fastref.carriers.borrow import PeerArena
from fastref.carriers.contract import Carrier
from fastref.carriers.inline import InlineCarrier
from fastref.carriers.shared import SharedCarrier
from fastref.errors import ProtocolError, ResourceError, UsageError
from fastref.segments import create_memfd, map_fd, map_private
from tests.threads import in_threads

LIMIT = 1 << 20
NO_ENTRY = 2**32 - 1


def shared_carrier(entries: int = 64) -> SharedCarrier:
    """Return a carrier whose two ends stand for two processes."""
    hold_bytes, descriptor_bytes = table_sizes(64)
    hold, descriptors = bytearray(hold_bytes), bytearray(descriptor_bytes)
    table = ReferenceTable(hold, descriptors, 64, entries)
    fd = create_memfd("arena", LIMIT)
    try:
        memory, private = map_fd(fd, LIMIT, writable=True), map_private(fd, LIMIT)
        seen = map_fd(fd, LIMIT, writable=False)
    finally:
        os.close(fd)
    mine = Arena(memory, holder=table.holder)
    return SharedCarrier(table, mine, PeerArena(seen, private, Holder(hold, descriptors, 64, 0)))


@pytest.fixture(params=["inline", "shared", "shared, no entry left"])
def carrier(request) -> Carrier:
    if request.param == "inline":
        return InlineCarrier()
    return shared_carrier(64 if request.param == "shared" else 0)


# The contract


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_000])
def test_a_buffer_arrives_as_it_was_lent(carrier, size):
    data = random.Random(size).randbytes(size)
    for lent in (data, bytearray(data), memoryview(data)):
        descriptor = carrier.lend(lent)
        assert isinstance(descriptor, bytes)
        assert bytes(carrier.borrow(descriptor)) == data
        carrier.give_back(descriptor)
    assert carrier.bytes_lent == 0


def test_what_is_lent_is_a_copy(carrier):
    data = bytearray(b"before")
    descriptor = carrier.lend(data)
    data[:] = b"after!"
    assert bytes(carrier.borrow(descriptor)) == b"before"
    carrier.give_back(descriptor)


def test_what_is_borrowed_is_the_borrowers_own_to_write(carrier):
    descriptor = carrier.lend(bytes(range(200)) * 100)
    one = carrier.borrow(descriptor)
    one[0] = one[10_000] = 255
    again = carrier.lend(bytes(20_000))
    other = carrier.borrow(again)
    assert bytes(other) == bytes(20_000)
    assert (one[0], one[1], one[10_000]) == (255, 1, 255)
    carrier.give_back(descriptor)
    carrier.give_back(again)
    del one, other
    assert carrier.bytes_lent == 0


def test_what_is_borrowed_lasts_as_long_as_a_view_of_it(carrier):
    kept = []
    for i in range(10):
        descriptor = carrier.lend(bytes([i]) * 10_000)
        kept.append(carrier.borrow(descriptor)[5000:5001])
        carrier.give_back(descriptor)
    carrier.lend(bytes([99]) * 10_000)
    assert [view[0] for view in kept] == list(range(10))


def test_a_place_that_was_written_shows_the_next_buffer(carrier):
    for i in range(200):
        descriptor = carrier.lend(bytes([i]) * 50_000)
        view = carrier.borrow(descriptor)
        carrier.give_back(descriptor)
        assert bytes(view) == bytes([i]) * 50_000
        for at in range(i % 4096, 50_000, 4096):
            view[at] ^= 255
        del view
    assert carrier.bytes_lent == 0


def test_buffers_stay_apart_and_may_be_borrowed_again(carrier):
    lent = {carrier.lend(bytes([i]) * (i * 300 + 1)): i for i in range(20)}
    for _ in range(2):
        for descriptor, i in lent.items():
            assert bytes(carrier.borrow(descriptor)) == bytes([i]) * (i * 300 + 1)
    for descriptor in lent:
        carrier.give_back(descriptor)
    assert carrier.bytes_lent == 0


def test_threads_may_lend_and_give_back(carrier):
    def work(number):
        for i in range(300):
            data = bytes([number]) * (i + 1)
            descriptor = carrier.lend(data)
            assert bytes(carrier.borrow(descriptor)) == data
            carrier.give_back(descriptor)

    in_threads(4, work)
    assert carrier.bytes_lent == 0


# The shared carrier


@pytest.fixture
def shared() -> SharedCarrier:
    return shared_carrier()


def test_a_block_is_given_back_once(shared):
    descriptor = shared.lend(b"x")
    assert shared.bytes_lent > 0
    shared.give_back(descriptor)
    with pytest.raises(UsageError, match="no block"):
        shared.give_back(descriptor)


@pytest.mark.parametrize("descriptor", [b"", b"x", bytes(23), bytes(25)])
def test_a_descriptor_of_a_wrong_length_is_refused(shared, descriptor):
    with pytest.raises(ProtocolError):
        shared.borrow(descriptor)
    with pytest.raises(UsageError):
        shared.give_back(descriptor)


@pytest.mark.parametrize("offset, size", [(0, LIMIT + 1), (LIMIT, 1), (LIMIT + 1, 0), (2**64 - 1, 2), (1, 2**64 - 1)])
def test_a_block_outside_the_arena_is_refused(shared, offset, size):
    with pytest.raises(ProtocolError, match="outside"):
        shared.borrow(struct.pack("=QQII", offset, size, NO_ENTRY, 0))
    assert len(shared.borrow(struct.pack("=QQII", LIMIT, 0, NO_ENTRY, 0))) == 0
    assert len(shared.borrow(struct.pack("=QQII", 0, LIMIT, NO_ENTRY, 0))) == LIMIT


@pytest.mark.parametrize("index, generation", [(0, 1), (1, 0), (63, 0), (64, 0), (2**32 - 2, 0)])
def test_a_block_with_an_entry_that_is_not_its_own_is_refused(shared, index, generation):
    offset, size, own, now = struct.unpack("=QQII", shared.lend(b"x" * 5000))
    assert own == 0
    kept = shared.borrow(struct.pack("=QQII", offset, size, own, now))
    with pytest.raises(ProtocolError, match="entry"):
        shared.borrow(struct.pack("=QQII", offset, size, index, now + generation))
    assert bytes(kept) == b"x" * 5000


@pytest.mark.parametrize("offset, size", [(-1, 1), (0, -1)])
def test_a_block_before_the_arena_is_refused(offset, size):
    with pytest.raises(ProtocolError):
        PeerArena(bytearray(4096)).view(offset, size)


def test_a_full_arena_lends_nothing_and_recovers(shared):
    held = shared.lend(bytes(LIMIT // 2))
    with pytest.raises(ResourceError, match=f"an arena of {LIMIT} bytes has no room for a block of {LIMIT}"):
        shared.lend(bytes(LIMIT))
    assert shared.bytes_lent == LIMIT // 2
    shared.give_back(held)
    shared.give_back(shared.lend(bytes(LIMIT // 2)))
