"""A random walk: after every step the shared words are the sets of holders that they should be."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastref._core import PinQueue
from fastref.errors import ReferenceLost, UsageError
from tests.tables import ABROAD, CAPACITY, CLOSED, OWNER, Memory


class TableWalk(RuleBasedStateMachine):
    """The table against what it should be: for each entry in use, how many handles each holder has."""

    peers = st.integers(0, 3)
    picks = st.integers(0, 1000)

    @initialize(usable=st.integers(1, 8), limit=st.integers(2, 6))
    def begin(self, usable, limit):
        memory = Memory()
        self.limit = limit
        self.table = memory.table(usable=usable, generation_limit=limit)
        self.holders = {peer: memory.holder(peer) for peer in range(3)} | {3: self.table.holder}
        self.memory = memory
        self.usable = usable
        self.generations = [0] * CAPACITY
        self.held: dict[int, Counter] = {}  # entry in use -> holder -> handles
        self.credits: dict[int, set[int]] = {peer: set() for peer in range(3)}  # opened, not adopted
        self.abroad: set[int] = set()
        self.closing: set[int] = set()
        self.pins = [(PinQueue(), []) for _ in range(4)]
        self.position = 0

    def is_held(self, index):
        credits = any(index in credits for credits in self.credits.values())
        return bool(+self.held[index]) or credits or index in self.abroad

    def available(self):
        """Entries that are neither in use nor closing nor retired."""
        used = self.held.keys() | self.closing
        return sum(i not in used and self.generations[i] < self.limit for i in range(self.usable))

    def mine(self, peer):
        return sorted(index for index, holders in self.held.items() if holders[peer] > 0)

    @rule()
    def open(self):
        entry = self.table.open()
        assert (entry is None) == (self.available() == 0)
        if entry:
            index, generation = entry
            assert index not in self.held and index not in self.closing and generation == self.generations[index]
            self.held[index] = Counter({3: 1})

    @rule(peer=st.integers(0, 2), count=st.integers(0, 3))
    def open_credits(self, peer, count):
        expected = min(count, self.available())
        credits = self.table.open_credits(peer, count)
        assert len(credits) == expected
        for index, generation in credits:
            assert index not in self.held and generation == self.generations[index]
            self.held[index] = Counter()
            self.credits[peer].add(index)

    @rule(peer=st.integers(0, 2), pick=picks)
    def adopt(self, peer, pick):
        if self.credits[peer]:
            index = sorted(self.credits[peer])[pick % len(self.credits[peer])]
            self.holders[peer].adopt(index, self.generations[index])
            self.credits[peer].discard(index)
            self.held[index][peer] += 1

    @rule(giver=peers, taker=peers, pick=picks)
    def hand_on(self, giver, taker, pick):
        mine = self.mine(giver)
        if mine:
            index = mine[pick % len(mine)]
            if taker < 3 and index in self.credits[taker]:
                return  # a credit is adopted before anything else is done with it
            first = self.holders[taker].acquire(index, self.generations[index])
            assert first == (self.held[index][taker] == 0)
            self.held[index][taker] += 1

    @rule(peer=peers, index=st.integers(0, 7), back=st.integers(0, 2))
    def take_without_a_pin(self, peer, index, back):
        generation = self.generations[index] - back
        if index >= self.usable or generation < 0 or (peer < 3 and index in self.credits[peer] and back == 0):
            return
        alive = index in self.held and back == 0
        try:
            first = self.holders[peer].acquire_unpinned(index, generation)
        except ReferenceLost:
            assert not alive
        else:
            # Zero, but not swept yet: it lives again.
            assert alive and first == (self.held[index][peer] == 0)
            self.held[index][peer] += 1

    @rule(peer=peers, pick=picks)
    def let_go(self, peer, pick):
        pinned = Counter(index for _, index in self.pins[peer][1])
        mine = [index for index in self.mine(peer) if self.held[index][peer] > pinned[index]]
        if mine:
            index = mine[pick % len(mine)]
            assert self.holders[peer].release(index) == (self.held[index][peer] == 1)
            self.held[index][peer] -= 1

    @rule(peer=peers, index=st.integers(0, 7))
    def let_go_of_nothing(self, peer, index):
        if self.held.get(index, Counter())[peer] == 0:
            with pytest.raises(UsageError):
                self.holders[peer].release(index)

    @rule(peer=peers, pick=picks)
    def pin(self, peer, pick):
        mine = self.mine(peer)
        if mine:
            index = mine[pick % len(mine)]
            self.position += 16
            queue, waiting = self.pins[peer]
            queue.pin(self.position, self.holders[peer], index, self.generations[index])
            waiting.append((self.position, index))
            self.held[index][peer] += 1

    @rule(peer=peers, back=st.integers(0, 100))
    def receiver_acquires(self, peer, back):
        queue, waiting = self.pins[peer]
        until = self.position - back
        gone = [pin for pin in waiting if pin[0] <= until]
        assert queue.release(max(until, 0)) == len(gone)
        for pin in gone:
            waiting.remove(pin)
            self.held[pin[1]][peer] -= 1

    @rule(pick=picks)
    def mark_abroad(self, pick):
        mine = self.mine(3)
        if mine:
            index = mine[pick % len(mine)]
            self.table.mark_abroad(index)
            self.abroad.add(index)

    @precondition(lambda self: self.abroad)
    @rule(pick=picks)
    def clear_abroad(self, pick):
        index = sorted(self.abroad)[pick % len(self.abroad)]
        self.table.clear_abroad(index)
        self.abroad.discard(index)

    @rule(peer=st.integers(0, 2))
    def die(self, peer):
        """Its private memory goes; its bits are taken out by the owner; another takes its place."""
        queue, waiting = self.pins[peer]
        waiting.clear()
        expected = sum(holders[peer] > 0 or index in self.credits[peer] for index, holders in self.held.items())
        assert self.table.remove_peer(peer) == expected
        for holders in self.held.values():
            del holders[peer]
        self.credits[peer].clear()
        self.holders[peer] = self.memory.holder(peer)
        self.pins[peer] = (PinQueue(), [])

    @rule()
    def sweep(self):
        expected = {index for index in self.held if not self.is_held(index)}
        assert set(self.table.sweep()) == expected
        for index in expected:
            del self.held[index]
            self.generations[index] += 1
        self.closing |= expected

    @precondition(lambda self: self.closing)
    @rule(pick=picks)
    def free(self, pick):
        index = sorted(self.closing)[pick % len(self.closing)]
        self.table.free(index)
        self.closing.discard(index)

    @rule(more=st.integers(0, 2))
    def extend(self, more):
        self.usable = min(self.usable + more, 8)
        self.table.extend(self.usable)

    @invariant()
    def words_are_the_sets_of_holders(self):
        bits = [1, 2, 4, OWNER]
        for index in range(self.usable):
            word = self.table.word(index)
            if index not in self.held:
                assert word == CLOSED
                continue
            holders = {peer for peer in range(4) if self.held[index][peer] > 0}
            holders |= {peer for peer in range(3) if index in self.credits[peer]}
            assert word == sum(bits[peer] for peer in holders) | (ABROAD if index in self.abroad else 0)
            assert self.table.holder.generation(index) == self.generations[index]
            for peer in range(4):
                assert self.holders[peer].count(index) == self.held[index][peer]


TestTableWalk = TableWalk.TestCase
TestTableWalk.settings = settings(
    max_examples=300, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)
)
