"""The arena: which blocks it lends, of which files; no two overlap, and little is lost between them."""

from __future__ import annotations

import mmap
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fastref.carriers.arena import Arena
from fastref.errors import ResourceError, UsageError
from fastref.segments.mapping import Reservation
from tests.threads import in_threads

LIMIT = 1 << 20
MIB = 1 << 20
PAGE = 4096


class Files:
    """What an arena asks of the system, in place of it: which files there are, and what of them is committed."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.committed: list[tuple[int, int]] = []
        self.refuses = False

    def has(self, offset: int) -> bool:
        return offset in self.sizes

    def add(self, offset: int, size_bytes: int) -> None:
        if self.refuses:
            raise ResourceError("the system has none")
        assert all(offset + size_bytes <= start or start + size <= offset for start, size in self.sizes.items())
        self.sizes[offset] = size_bytes

    def commit(self, offset: int, size_bytes: int) -> None:
        if self.refuses:
            raise ResourceError("the system has none")
        self.committed.append((offset, offset + size_bytes))

    def make_room(self) -> bool:
        return False

    def remove(self, offset: int) -> None:
        end = offset + self.sizes.pop(offset)
        self.committed = [part for part in self.committed if not offset <= part[0] < end]

    def covers(self, start: int, end: int) -> bool:
        """Whether a range lies in one file and is committed."""
        if not any(at <= start and end <= at + size for at, size in self.sizes.items()):
            return False
        for at, until in sorted(self.committed):
            if at <= start < until:
                start = until
        return start >= end


def arena(limit: int = LIMIT) -> tuple[Arena, bytearray]:
    """Return an arena of one file, and its memory."""
    memory = bytearray(limit)
    return Arena(memory), memory


def growing_arena(limit: int = 1 << 30, first: int = 4 * MIB) -> tuple[Arena, Files]:
    """Return an arena of many files, which does nothing ahead. There is no memory behind its addresses."""
    files = Files()
    files.sizes[0] = first
    mine = Arena(Reservation(2 * limit, True), files, None, limit, first)
    mine.end()
    return mine, files


def committed(mine: Arena) -> int:
    return mine.snapshot()["committed"]


# Blocks


def test_a_block_that_came_back_is_lent_again_while_warm():
    for size in (100, 5000, 100_000):
        mine, _ = arena()
        kept, offset = mine.lend(size), mine.lend(size)
        mine.give_back(offset)
        assert mine.lend(size) == offset != kept


def test_of_small_blocks_the_last_that_came_back_is_lent_first():
    mine, _ = arena()
    offsets = [mine.lend(1000) for _ in range(10)]
    for offset in offsets:
        mine.give_back(offset)
    assert [mine.lend(1000) for _ in range(10)] == offsets[::-1]


@pytest.mark.parametrize("size", [1, 64, 500, 4096, 5000, 32_768, 32_769, 65_537, 200_000, 999_999])
def test_at_most_an_eighth_of_a_block_is_unused(size):
    mine, _ = arena()
    mine.lend(size)
    assert size <= mine.bytes_lent <= max(64, size * 9 // 8, min(size + PAGE, size * 9 // 8))


def test_small_blocks_share_pages():
    mine, _ = growing_arena()
    offsets = [mine.lend(200) for _ in range(10_000)]
    assert len(set(offsets)) == 10_000
    assert all(offset % 64 == 0 for offset in offsets)
    assert committed(mine) < 10_000 * 330


@pytest.mark.parametrize("size", [32_769, 65_536, 100_000, 1 << 20])
def test_a_block_that_may_be_leased_has_its_pages_for_itself(size):
    mine, _ = growing_arena()
    for _ in range(3):
        mine.lend(300)
        assert mine.lend(size) % PAGE == 0


def test_memory_is_made_sure_of_before_it_is_lent():
    mine, files = growing_arena()
    for size in (1, 5000, 1 << 20, 1 << 20, 3, 10 << 20, 100 << 20):
        offset = mine.lend(size)
        assert files.covers(offset, offset + size)
    assert committed(mine) == sum(end - start for start, end in files.committed)


def test_a_block_for_which_the_system_has_no_memory_is_not_lent():
    mine, files = growing_arena()
    files.refuses = True
    for size in (1, 50 << 20):
        with pytest.raises(ResourceError, match="the system has none"):
            mine.lend(size)
    assert mine.bytes_lent == committed(mine) == 0
    files.refuses = False
    assert files.covers(mine.lend(1), 1)


@pytest.mark.parametrize("size", [LIMIT + 1, 2**63, 2**64 - 1])
def test_an_absurd_block_is_refused(size):
    for mine in (arena()[0], growing_arena(LIMIT, LIMIT)[0]):
        with pytest.raises(ResourceError):
            mine.lend(size)
        assert mine.bytes_lent == 0


@pytest.mark.parametrize("limit", [5000, 12_289, 1])
def test_no_block_reaches_beyond_an_arena_of_an_odd_size(limit):
    mine, _ = arena(limit)
    with pytest.raises(ResourceError):
        for _ in range(10):
            offset = mine.lend(4000)
            assert offset + 4000 <= limit


def test_bytes_that_do_not_fit_are_not_copied():
    mine, memory = arena()
    offset = mine.lend(10)
    with pytest.raises(UsageError):
        mine.fill(offset, bytes(65))
    with pytest.raises(UsageError):
        mine.fill(offset + 1, b"x")
    mine.fill(offset, b"ok")
    assert memory[offset : offset + 2] == b"ok"


@pytest.mark.parametrize("size", [100, 5000, 100_000])
def test_what_is_not_lent_cannot_be_given_back(size):
    mine, _ = arena()
    offset = mine.lend(size)
    for wrong in (offset + 1, offset + 64, offset + PAGE, offset + (size + PAGE - 1) // PAGE * PAGE - PAGE, 1 << 40):
        if wrong != offset:
            with pytest.raises(UsageError, match="no block"):
                mine.give_back(wrong)
    mine.give_back(offset)
    with pytest.raises(UsageError, match="no block"):
        mine.give_back(offset)
    assert mine.bytes_lent == 0


def test_free_neighbours_merge():
    mine, _ = arena()
    offsets = [mine.lend(100_000) for _ in range(9)]
    with pytest.raises(ResourceError):
        mine.lend(300_000)
    for i in (3, 5, 4):
        mine.give_back(offsets[i])
    assert mine.lend(300_000) == offsets[3]


def test_all_that_came_back_is_one_piece_again():
    mine, _ = arena()
    shuffle = random.Random(5)
    for _ in range(5):
        offsets = []
        with pytest.raises(ResourceError):
            while True:
                offsets.append(mine.lend(int(10 ** shuffle.uniform(1, 5.3))))
        shuffle.shuffle(offsets)
        for offset in offsets:
            mine.give_back(offset)
        mine.retire(1, 1)  # slabs without a block go when one looks for what is idle
        whole = mine.lend(LIMIT)
        mine.give_back(whole)


def test_fragmentation_is_bounded():
    """Blocks of any size come and go at random: what is committed stays near what is lent at most."""
    choose = random.Random(7)
    mine, _ = growing_arena()
    lent: list[tuple[int, int]] = []
    most = now = 0
    for _ in range(30_000):
        if lent and (now > 64 * MIB or choose.random() < 0.5):
            offset, size = lent.pop(choose.randrange(len(lent)))
            mine.give_back(offset)
            now -= size
        else:
            size = int(10 ** choose.uniform(2, 7))
            lent.append((mine.lend(size), size))
            now += size
            most = max(most, now)
    assert committed(mine) < 2 * most


def test_threads_may_lend_and_give_back():
    mine, _ = growing_arena()

    def work(number):
        choose = random.Random(number)
        for _ in range(2000):
            size = int(10 ** choose.uniform(1, 6.5))
            offset = mine.lend(size)
            mine.give_back(offset)

    in_threads(4, work)
    assert mine.snapshot()["blocks"] == mine.bytes_lent == 0


# Files


def test_a_small_arena_is_one_small_file():
    mine, files = growing_arena()
    for _ in range(50):
        mine.lend(10_000)
    assert list(files.sizes.items()) == [(0, 4 * MIB)]
    assert committed(mine) <= MIB


def test_a_block_larger_than_any_file_gets_one_of_its_own():
    mine, files = growing_arena(8 << 30)
    offset = mine.lend(3 << 30)
    assert files.covers(offset, offset + (3 << 30))
    assert len(files.sizes) == 2


def test_there_are_never_many_files():
    mine, files = growing_arena(64 << 30)
    for _ in range(6000):
        mine.lend(10 * MIB)
    assert len(files.sizes) < 80


def test_no_more_than_the_limit_is_committed_and_it_can_be_used_up():
    mine, files = growing_arena(100 * MIB)
    with pytest.raises(ResourceError, match=f"an arena of {100 * MIB} bytes has no room for a block of {3 * MIB}"):
        while True:
            mine.lend(3 * MIB)
    assert committed(mine) <= 100 * MIB
    assert mine.bytes_lent > 90 * MIB


def give_back_what_is_idle(mine: Arena, files: Files, now: int, patience: int = 10) -> list[int]:
    gone = []
    while (found := mine.retire(now, patience)) is not None:
        assert files.sizes[found[0]] == found[1]
        files.remove(found[0])
        mine.forget(found[0])
        gone.append(found[0])
    return gone


def test_a_file_that_is_idle_for_long_is_given_back_and_the_first_stays():
    mine, files = growing_arena()
    small, large = mine.lend(100), mine.lend(10 * MIB)
    (second,) = set(files.sizes) - {0}
    assert mine.retire(100, 10) is None  # it is in use
    mine.give_back(large)
    mine.give_back(small)
    assert mine.retire(101, 10) is None  # from now on it is idle
    assert mine.retire(110, 10) is None
    assert give_back_what_is_idle(mine, files, 111) == [second]
    figures = mine.snapshot()
    assert (figures["files"], figures["retiring"], figures["given_back"] >= 10 * MIB) == (1, 0, True)
    assert committed(mine) <= 2 * MIB
    offset = mine.lend(10 * MIB)
    assert files.covers(offset, offset + 10 * MIB)


def test_a_file_that_was_used_again_meanwhile_is_not_idle():
    mine, _ = growing_arena()
    mine.give_back(mine.lend(10 * MIB))
    assert mine.retire(100, 10) is None
    mine.give_back(mine.lend(10 * MIB))
    assert mine.retire(111, 10) is None
    assert mine.retire(122, 10) is not None


def test_nothing_is_lent_of_a_file_that_is_being_given_back():
    mine, files = growing_arena()
    mine.give_back(mine.lend(10 * MIB))
    mine.retire(1, 0)
    assert mine.snapshot()["retiring"] == committed(mine)
    first = sorted(files.sizes)[1]
    offset = mine.lend(10 * MIB)
    assert not first <= offset < first + files.sizes[first]
    mine.forget(first)


def test_at_the_limit_what_is_idle_goes_and_does_not_count_from_then_on():
    mine, files = growing_arena(104 * MIB)
    for offset in (mine.lend(40 * MIB), mine.lend(60 * MIB)):  # each has its own file
        mine.give_back(offset)
    _, second, third = sorted(files.sizes)
    with pytest.raises(ResourceError):
        mine.lend(70 * MIB)
    files.make_room = lambda: mine.retire(1, 0) is not None
    assert mine.lend(70 * MIB) == third
    assert mine.snapshot()["retiring"] >= 40 * MIB
    assert committed(mine) - mine.snapshot()["retiring"] <= 104 * MIB
    mine.forget(second)
    assert mine.snapshot()["retiring"] == 0
    assert 70 * MIB <= committed(mine) <= 104 * MIB


def test_blocks_gather_in_the_oldest_files_so_that_the_others_can_go():
    choose = random.Random(3)
    mine, files = growing_arena()
    lent = [mine.lend(MIB) for _ in range(300)]
    many = len(files.sizes)
    choose.shuffle(lent)
    while len(lent) > 10:
        mine.give_back(lent.pop())
    for _ in range(3000):
        mine.give_back(lent.pop(choose.randrange(len(lent))))
        lent.append(mine.lend(MIB))
    give_back_what_is_idle(mine, files, 1)
    give_back_what_is_idle(mine, files, 100)
    assert len(files.sizes) <= 2 < many


class Lending(RuleBasedStateMachine):
    """Blocks lie in files that are there, and never overlap, whatever is lent, held, given back and idle."""

    @initialize(
        limit=st.sampled_from([40 * PAGE, 3 * MIB, 30 * MIB]), first=st.sampled_from([PAGE, 33 * PAGE, 2 * MIB])
    )
    def begin(self, limit, first):
        first = min(first, limit)
        self.files = Files()
        self.files.sizes[0] = first
        self.memory = mmap.mmap(-1, 2 * limit)
        self.arena = Arena(self.memory, self.files, None, limit, first)
        self.arena.end()
        self.lent: dict[int, bytes] = {}
        self.held: dict[int, int] = {}
        self.entries = 0
        self.now = 0

    @rule(
        size=st.integers(0, 1000) | st.integers(4000, 40_000) | st.integers(0, 2 * MIB) | st.integers(0, 12 * MIB),
        fill=st.integers(0, 255),
    )
    def lend(self, size, fill):
        try:
            offset = self.arena.lend(size)
        except ResourceError:
            return
        assert self.files.covers(offset, offset + max(size, 1))
        assert offset % (64 if size <= 32768 else PAGE) == 0
        assert offset not in self.lent
        self.lent[offset] = bytes([fill]) * min(size, 5000)
        self.arena.fill(offset, self.lent[offset])
        self.memory[offset + max(size - 1, 0)] = fill  # the last byte; it may be among those above

    @rule(pick=st.integers(0, 99))
    def hold(self, pick):
        free = sorted(set(self.lent) - set(self.held.values()))
        if free:
            self.entries += 1
            self.held[self.entries] = free[pick % len(free)]
            self.arena.keep_for(self.held[self.entries], self.entries)

    @rule(pick=st.integers(0, 99))
    def give_back(self, pick):
        if self.lent:
            offset = sorted(self.lent)[pick % len(self.lent)]
            entry = next((entry for entry, at in self.held.items() if at == offset), None)
            if entry is None:
                self.arena.give_back(offset)
            else:
                with pytest.raises(UsageError):
                    self.arena.give_back(offset)
                self.arena.closed(entry)
                self.arena.closed(entry)  # of no block any more
                del self.held[entry]
            del self.lent[offset]

    @rule(later=st.integers(1, 10), patience=st.integers(0, 15))
    def look_for_idle(self, later, patience):
        self.now += later
        found = self.arena.retire(self.now, patience)
        if found is not None:
            offset, size = found
            assert offset
            assert self.arena.snapshot()["retiring"] <= self.arena.snapshot()["committed"]
            assert not any(offset <= at < offset + size for at in self.lent)
            self.files.remove(offset)
            self.arena.forget(offset)

    @invariant()
    def blocks_hold_what_was_put_in(self):
        for offset, data in getattr(self, "lent", {}).items():
            assert self.memory[offset : offset + len(data)] == data

    @invariant()
    def figures_are_right(self):
        if hasattr(self, "lent"):
            figures = self.arena.snapshot()
            assert figures["blocks"] == len(self.lent)
            assert figures["files"] == len(self.files.sizes)
            assert figures["committed"] == sum(end - start for start, end in self.files.committed)
            assert figures["committed"] - figures["retiring"] <= figures["limit"]

    def teardown(self):
        if hasattr(self, "lent"):
            for offset in sorted(set(self.lent) - set(self.held.values())):
                self.arena.give_back(offset)
            for entry in self.held:
                self.arena.closed(entry)
            assert self.arena.bytes_lent == 0
            for now in (self.now + 1, self.now + 2):
                give_back_what_is_idle(self.arena, self.files, now, 1)
            assert list(self.files.sizes) == [0]


TestLending = Lending.TestCase
TestLending.settings = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
