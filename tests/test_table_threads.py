"""Pins, and the reference table under many threads of one process."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fastref._core import Holder, PinQueue, ReferenceTable
from fastref.errors import ReferenceLost
from tests.tables import CAPACITY, OWNER, Memory, close
from tests.threads import in_threads


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def table(memory) -> ReferenceTable:
    return memory.table()


@pytest.fixture
def alice(table, memory) -> Holder:
    return memory.holder(3)


# Pins


def test_a_pin_lasts_until_the_receiver_has_acquired_its_message(table, alice):
    index, generation = table.open()
    alice.acquire(index, generation)
    pins = PinQueue()
    for position in (16, 48, 48, 80):
        pins.pin(position, alice, index, generation)
    alice.release(index)
    assert alice.count(index) == len(pins) == 4
    assert [pins.release(position) for position in (15, 16, 47, 48, 48)] == [0, 1, 0, 2, 0]
    assert alice.count(index) == 1 and table.word(index) & 1 << 3
    assert pins.release_all() == 1 and pins.release_all() == 0
    assert table.word(index) == OWNER


def test_many_pins_keep_their_order_while_the_queue_grows_and_wraps(table, alice):
    entries = [table.open() for _ in range(CAPACITY)]
    pins, choice, waiting = PinQueue(), random.Random(1), []
    for index, generation in entries:
        alice.acquire(index, generation)
    for position in range(1, 3000):
        index, generation = choice.choice(entries)
        pins.pin(position, alice, index, generation)
        waiting.append((position, index))
        if choice.random() < 0.3:
            until = choice.randint(waiting[0][0], position)
            assert pins.release(until) == sum(p <= until for p, _ in waiting)
            waiting = [(p, i) for p, i in waiting if p > until]
            counts = Counter(i for _, i in waiting)
            assert all(alice.count(i) == 1 + counts[i] for i, _ in entries)
        if choice.random() < 0.01:
            pins.release_all()
            waiting = []
    pins.release_all()
    assert len(pins) == 0 and all(alice.count(i) == 1 for i, _ in entries)


def test_a_pin_on_what_is_lost_pins_nothing(table, alice):
    index, generation = table.open()
    alice.acquire(index, generation)
    pins = PinQueue()
    with pytest.raises(ReferenceLost):
        pins.pin(16, alice, index, generation + 1)
    assert len(pins) == 0 and alice.count(index) == 1


# Threads


def test_threads_take_and_drop_without_losing_a_count(table, memory):
    entries = [table.open() for _ in range(8)]
    holders = [memory.holder(peer) for peer in range(3)]

    def use(number):
        choice, mine, holder = random.Random(number), [], holders[number % 3]
        for _ in range(3000):
            if choice.random() < 0.5:
                entry = choice.choice(entries)
                holder.acquire(*entry)
                mine.append(entry)
            elif mine:
                holder.release(mine.pop(choice.randrange(len(mine)))[0])
        for index, _ in mine:
            holder.release(index)

    in_threads(6, use)
    assert all(table.word(index) == OWNER for index, _ in entries)
    assert all(holder.entries_held == 0 for holder in holders)
    for index, _ in entries:
        table.holder.release(index)
    assert sorted(table.sweep()) == sorted(index for index, _ in entries)


def test_threads_open_and_close_every_entry_exactly_once():
    memory = Memory(256)
    table = memory.table()
    opened = [Counter() for _ in range(4)]

    def open_and_close(number):
        for _ in range(2000):
            entry = table.open()
            if entry is None:
                continue
            opened[number][entry] += 1
            table.holder.release(entry[0])
            close(table)

    in_threads(4, open_and_close)
    close(table)
    total = sum(opened, Counter())
    assert set(total.values()) == {1}  # no entry was ever given to two under one generation
    figures = table.snapshot()
    assert figures["opened"] == figures["closed"] == len(total) and figures["free"] == 256 and figures["used"] == 0


def test_threads_push_and_release_pins(table, alice):
    index, generation = table.open()
    alice.acquire(index, generation)
    pins = PinQueue()

    def work(number):
        for _ in range(2000):
            if number:
                pins.release_all()
            else:
                pins.pin(1, alice, index, generation)

    in_threads(3, work)
    pins.release_all()
    assert alice.count(index) == 1 and len(pins) == 0
