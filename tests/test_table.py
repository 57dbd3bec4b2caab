"""The reference table alone: one sentence for each of its rules."""

from __future__ import annotations

import pytest

from fastref._core import BITS, Holder, ReferenceTable, table_sizes
from fastref.channels.channel import BELL_BYTES
from fastref.errors import ProtocolError, ReferenceLost, UsageError
from tests.tables import ABROAD, CAPACITY, CLOSED, OWNER, Memory, close


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def table(memory) -> ReferenceTable:
    return memory.table()


@pytest.fixture
def alice(table, memory) -> Holder:
    return memory.holder(3)


@pytest.fixture
def bob(table, memory) -> Holder:
    return memory.holder(60)


# Opening and closing


def test_an_open_entry_is_held_by_its_owner_once(table):
    index, generation = table.open()
    assert table.word(index) == OWNER and table.phase_of(index) == "used"
    assert table.holder.count(index) == 1 and table.holder.entries_held == 1
    assert table.holder.generation(index) == generation and table.holder.state(index) == "pending"


def test_the_value_lives_until_the_last_holder_lets_go(table, alice, bob):
    index, generation = table.open()
    assert alice.acquire(index, generation) and bob.acquire(index, generation)
    assert table.word(index) == OWNER | 1 << 3 | 1 << 60
    table.holder.release(index)
    alice.release(index)
    assert not table.is_flagged() and table.sweep() == []
    bob.release(index)
    assert table.word(index) == 0 and table.is_flagged()
    assert table.sweep() == [index]
    assert table.word(index) == CLOSED and table.phase_of(index) == "closing"


ARMED, LEADER_WAKES = 64, 72  # where in a bell it says that its owner sleeps, and how often it was woken


def armed_bell() -> bytearray:
    bell = bytearray(BELL_BYTES)
    bell[ARMED] = 1
    return bell


def test_who_holds_a_value_last_wakes_its_owner_once(memory):
    bell = armed_bell()
    table, alice, bob = memory.table(bell=bell), memory.holder(3, bell), memory.holder(60, bell)
    entries = [table.open() for _ in range(2)]
    for entry in entries:
        alice.acquire(*entry)
        bob.acquire(*entry)
        table.holder.release(entry[0])
        alice.release(entry[0])
    assert (bell[ARMED], bell[LEADER_WAKES]) == (1, 0)
    bob.release(entries[0][0])
    assert (bell[ARMED], bell[LEADER_WAKES]) == (0, 1)
    bell[ARMED] = 1
    bob.release(entries[1][0])
    assert bell[LEADER_WAKES] == 1, "the owner has not looked since it was woken"
    assert close(table) == [index for index, _ in entries]
    table.holder.release(table.open()[0])
    assert bell[LEADER_WAKES] == 2, "its own values too are let go of by its serving threads"


def test_a_bell_in_too_little_memory_is_refused(memory):
    with pytest.raises(ProtocolError, match="a bell in 8 bytes"):
        memory.holder(3, bytearray(8))


def test_an_entry_is_used_again_under_the_next_generation(table):
    index, generation = table.open()
    table.holder.release(index)
    assert table.sweep() == [index]
    table.free(index)
    assert {table.open() for _ in range(CAPACITY)} == {(i, generation + (i == index)) for i in range(CAPACITY)}


def test_a_full_table_says_so_and_recovers(table):
    entries = [table.open() for _ in range(CAPACITY)]
    assert sorted(index for index, _ in entries) == list(range(CAPACITY))
    assert table.open() is None and table.open_credits(1, 5) == []
    table.holder.release(17)
    assert table.open() is None  # not before it was swept and its value dropped
    assert table.sweep() == [17]
    assert table.open() is None
    table.free(17)
    assert table.open() == (17, 1)


def test_a_closed_entry_is_freed_once(table):
    index, _ = table.open()
    with pytest.raises(UsageError, match="used, not closing"):
        table.free(index)
    table.holder.release(index)
    assert close(table) == [index]
    with pytest.raises(UsageError, match="free, not closing"):
        table.free(index)


def test_an_entry_that_was_taken_again_before_the_sweep_stays(table):
    index, generation = table.open()
    table.holder.release(index)
    assert table.is_flagged()
    table.holder.acquire(index, generation)
    assert table.sweep() == [] and table.phase_of(index) == "used"
    table.holder.release(index)
    assert table.sweep() == [index]


def test_an_entry_whose_generations_are_used_up_is_retired(memory):
    table = memory.table(usable=1, generation_limit=3)
    for generation in range(3):
        assert table.open() == (0, generation)
        table.holder.release(0)
        assert close(table) == [0]
    assert table.phase_of(0) == "retired" and table.open() is None
    assert table.snapshot()["retired"] == 1
    with pytest.raises(UsageError, match="retired"):
        table.free(0)


def test_a_table_grows_in_place(memory):
    table = memory.table(usable=2)
    assert {table.open(), table.open()} == {(0, 0), (1, 0)} and table.open() is None
    table.extend(1)  # never smaller
    assert table.open() is None
    table.extend(5)
    assert {table.open() for _ in range(3)} == {(2, 0), (3, 0), (4, 0)} and table.open() is None
    table.extend(5)
    assert table.open() is None
    assert table.snapshot()["usable"] == 5


@pytest.mark.parametrize("usable", [CAPACITY + 1, -1, 2**40])
def test_a_table_does_not_grow_out_of_its_bounds(table, usable):
    with pytest.raises(UsageError):
        table.extend(usable)
    assert table.open() is not None  # no lock was left behind


# Holders


def test_private_counts_touch_the_word_on_the_first_and_the_last_handle_only(table, alice):
    index, generation = table.open()
    assert [alice.acquire(index, generation) for _ in range(3)] == [True, False, False]
    assert alice.count(index) == 3 and alice.entries_held == 1
    assert [alice.release(index) for _ in range(3)] == [False, False, True]
    assert table.word(index) == OWNER and alice.entries_held == 0


def test_letting_go_of_what_is_not_held_changes_nothing(table, alice):
    index, _ = table.open()
    with pytest.raises(UsageError, match="not held"):
        alice.release(index)
    assert table.word(index) == OWNER and alice.count(index) == 0


def test_who_holds_one_generation_cannot_take_another(table, alice):
    index, generation = table.open()
    alice.acquire(index, generation)
    for take in (alice.acquire, alice.acquire_unpinned):
        with pytest.raises(ReferenceLost, match=f"entry {index} generation {generation + 1}"):
            take(index, generation + 1)
    assert alice.count(index) == 1


def test_taking_without_a_pin_in_time_is_a_handle_like_any_other(table, alice):
    index, generation = table.open()
    assert alice.acquire_unpinned(index, generation) and not alice.acquire_unpinned(index, generation)
    table.holder.release(index)
    assert table.sweep() == []
    alice.release(index), alice.release(index)
    assert table.sweep() == [index]


def test_taking_without_a_pin_too_late_leaves_the_word_as_it_was(table, alice):
    index, generation = table.open()
    table.holder.release(index)
    assert table.sweep() == [index]
    with pytest.raises(ReferenceLost):
        alice.acquire_unpinned(index, generation)
    assert table.word(index) == CLOSED and alice.entries_held == 0
    table.free(index)
    while table.open()[0] != index:
        pass
    with pytest.raises(ReferenceLost):
        alice.acquire_unpinned(index, generation)
    assert table.word(index) == OWNER


def test_a_late_visitor_that_leaves_zero_flags_the_entry(table, alice):
    index, generation = table.open()
    table.holder.release(index)
    assert table.sweep() == [index]
    table.free(index)
    [(credit, new)] = [c for c in table.open_credits(60, CAPACITY) if c[0] == index]
    assert table.remove_peer(60) == CAPACITY  # leaves zero
    table.sweep()
    with pytest.raises(ReferenceLost):
        alice.acquire_unpinned(index, generation)
    assert table.word(index) == CLOSED


def test_a_visitor_never_takes_a_bit_that_it_did_not_set(table, alice):
    """The owner opened the entry ahead for this very peer: that bit is the credit's."""
    credits = dict(table.open_credits(3, CAPACITY))
    with pytest.raises(ReferenceLost):
        alice.acquire_unpinned(5, credits[5] + 1)
    assert table.word(5) == 1 << 3


def test_a_late_visitor_keeps_an_entry_closed_until_it_has_left(table, memory):
    """Its OR has come, its AND not yet: the owner uses other entries meanwhile."""
    index, _ = table.open()
    table.holder.release(index)
    close(table)
    words = memoryview(memory.hold)[64 : 64 + 8 * CAPACITY].cast("Q")
    words[index] |= 1 << 9
    opened = {table.open() for _ in range(CAPACITY - 1)}
    assert None not in opened and index not in {i for i, _ in opened}
    assert table.open() is None
    words[index] &= ~(1 << 9)
    assert table.open() == (index, 1)


def test_a_process_without_a_bit_counts_but_touches_no_word(table, memory):
    far = memory.holder(None)
    index, generation = table.open()
    assert far.acquire(index, generation) and table.word(index) == OWNER
    assert far.release(index) and table.word(index) == OWNER
    with pytest.raises(ReferenceLost):
        far.acquire_unpinned(index, generation)  # only the owner can say


def test_holders_that_go_by_messages_are_one_bit(table):
    index, _ = table.open()
    table.mark_abroad(index), table.mark_abroad(index)
    table.holder.release(index)
    assert table.word(index) == ABROAD and table.sweep() == []
    table.clear_abroad(index)
    assert table.sweep() == [index]


def test_clearing_abroad_while_others_hold_flags_nothing(table):
    index, _ = table.open()
    table.mark_abroad(index)
    table.clear_abroad(index)
    assert not table.is_flagged() and table.word(index) == OWNER


# Credits


def test_a_credit_is_held_by_the_peer_it_was_opened_for(table, alice):
    credits = table.open_credits(3, 4)
    assert len(credits) == len(set(credits)) == 4
    for index, generation in credits:
        assert table.word(index) == 1 << 3
        alice.adopt(index, generation)
        assert alice.count(index) == 1 and alice.release(index)
    assert sorted(table.sweep()) == sorted(index for index, _ in credits)


def test_credits_for_a_peer_that_goes_by_messages_share_one_bit(table):
    [(index, _)] = table.open_credits(None, 1)
    assert table.word(index) == ABROAD


@pytest.mark.parametrize("peer", [-1, BITS, BITS + 3])
def test_a_peer_that_a_table_cannot_name_is_refused(table, memory, peer):
    for call in (lambda: table.open_credits(peer, 1), lambda: table.remove_peer(peer), lambda: memory.holder(peer)):
        with pytest.raises(UsageError, match="0 to 60"):
            call()


# The dead


def test_a_dead_peer_is_taken_out_of_every_word(table, alice, bob):
    entries = [table.open() for _ in range(6)]
    for index, generation in entries:
        alice.acquire(index, generation)
        if index % 2:
            bob.acquire(index, generation)
        table.holder.release(index)
    credits = table.open_credits(3, 2)
    assert table.remove_peer(3) == 8
    freed = {index for index, _ in entries if not index % 2} | {index for index, _ in credits}
    assert set(table.sweep()) == freed
    assert table.remove_peer(3) == 0 and table.sweep() == []


def test_a_peer_killed_between_its_last_bit_and_its_flag_leaks_nothing(table, memory, alice):
    index, generation = table.open()
    alice.acquire(index, generation)
    table.holder.release(index)
    memoryview(memory.hold)[64 : 64 + 8 * CAPACITY].cast("Q")[index] &= ~(1 << 3)  # and then it was killed
    assert table.sweep() == []
    assert table.remove_peer(3) == 0
    assert table.sweep() == [index]


def test_a_peer_killed_between_its_flag_and_its_hint_leaks_nothing(table, memory, alice):
    index, generation = table.open()
    alice.acquire(index, generation)
    table.holder.release(index)
    alice.release(index)
    memory.hold[0:8] = bytes(8)  # the hint it did not come to set
    assert not table.is_flagged()
    table.remove_peer(3)
    assert table.sweep() == [index]


# Bounds


@pytest.mark.parametrize("index", [-1, CAPACITY, 2**32, 2**40])
def test_an_index_outside_the_table_is_refused(table, alice, index):
    calls = [
        lambda: alice.acquire(index, 0),
        lambda: alice.acquire_unpinned(index, 0),
        lambda: alice.adopt(index, 0),
        lambda: alice.release(index),
        lambda: alice.count(index),
        lambda: alice.generation(index),
        lambda: alice.state(index),
        lambda: table.free(index),
        lambda: table.word(index),
        lambda: table.phase_of(index),
        lambda: table.mark_abroad(index),
        lambda: table.clear_abroad(index),
        lambda: table.publish_inline(index, b""),
        lambda: table.publish_block(index, 0, 1),
        lambda: table.set_state(index, "ready"),
    ]
    for call in calls:
        with pytest.raises(ProtocolError, match="outside the table of 64"):
            call()


@pytest.mark.parametrize("capacity", [0, -64, 63, 65, (1 << 24) + 64])
def test_a_table_of_an_odd_size_is_refused(capacity):
    with pytest.raises(UsageError, match="multiple of 64"):
        table_sizes(capacity)


def test_regions_that_are_too_small_are_refused(memory):
    hold, descriptors = table_sizes(128)
    for regions in ((bytearray(hold - 1), bytearray(descriptors)), (bytearray(hold), bytearray(descriptors - 1))):
        for kind in (ReferenceTable, Holder):
            with pytest.raises(ProtocolError, match="too small"):
                kind(*regions, 128)


def test_a_table_needs_memory_that_it_can_write(memory):
    with pytest.raises((TypeError, BufferError, ValueError)):
        ReferenceTable(memory.hold, bytes(len(memory.descriptors)), CAPACITY)
    with pytest.raises((TypeError, BufferError, ValueError)):
        Holder(bytes(len(memory.hold)), memory.descriptors, CAPACITY, 1)


def test_the_regions_stay_as_long_as_anybody_uses_them(memory):
    table, alice = memory.table(), memory.holder(1)
    with pytest.raises(BufferError):
        memory.hold.extend(b"more")
    del table, alice
    memory.hold.extend(b"more")


# Values


def test_a_short_value_is_published_in_the_descriptor(table, alice):
    index, _ = table.open()
    assert table.publish_inline(index, b"x" * 88)
    assert alice.state(index) == "ready"
    assert not table.publish_inline(index, b"x" * 89)


def test_a_value_can_be_ready_or_failed_and_still_asked_for(table, alice):
    for state in ("ready", "failed", "pending"):
        index, _ = table.open()
        table.set_state(index, state)
        assert alice.state(index) == state


def test_an_entry_that_is_used_again_shows_nothing_of_its_last_value(table, alice):
    index, _ = table.open()
    table.publish_inline(index, b"secret")
    table.holder.release(index)
    close(table)
    while table.open()[0] != index:
        pass
    assert alice.state(index) == "pending"


def test_a_descriptor_in_no_known_state_is_a_protocol_error(table, memory, alice):
    index, _ = table.open()
    memory.descriptors[index * 128 + 4 : index * 128 + 8] = b"\x07\0\0\0"
    with pytest.raises(ProtocolError, match="state 7"):
        alice.state(index)
