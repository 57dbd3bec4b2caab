"""Ids and fork data: unique, bounded, and nothing that a peer sends as fork data does harm.

The reference table has pages of its own: ``test_table*.py``.
"""

from __future__ import annotations

import pickle
import random
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastref._core import ForkData, GloballyUniqueId, IdGenerator
from fastref.errors import IdsExhausted, ProtocolError, UsageError
from tests.threads import in_threads

COUNTS = 1 << 48
RANKS = st.integers(0, 65535)
LOCAL_IDS = st.integers(0, COUNTS - 1)
IDS = st.builds(GloballyUniqueId, RANKS, LOCAL_IDS)
ENTRIES = st.none() | st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
TYPES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
FORKS = st.builds(ForkData, RANKS, IDS, IDS, RANKS, TYPES, ENTRIES)

FIXED_BYTES = 40


# Ids


def test_the_first_id_of_a_worker_is_its_rank_and_zero():
    ids = IdGenerator(5)
    assert ids.next() == 5 << 48
    assert ids.next() == (5 << 48) + 1
    assert ids.minted == 2


def test_the_last_worker_and_the_last_count_fit():
    ids = IdGenerator(65535, COUNTS - 1)
    # All 64 bits set: also the value that the compiled method uses to say that it raised.
    assert ids.next() == 2**64 - 1


def test_ids_run_out_after_2_to_the_48th_and_stay_so():
    ids = IdGenerator(3, COUNTS - 2)
    assert [ids.next(), ids.next()] == [(3 << 48) + COUNTS - 2, (3 << 48) + COUNTS - 1]
    for _ in range(3):
        with pytest.raises(IdsExhausted, match=r"worker 3 minted 2\*\*48 ids"):
            ids.next()
    assert ids.minted == COUNTS


def test_a_generator_that_starts_exhausted_mints_nothing():
    with pytest.raises(IdsExhausted):
        IdGenerator(0, COUNTS).next()


@pytest.mark.parametrize("worker", [-1, 65536, 2**70])
def test_a_worker_beyond_16_bits_is_refused(worker):
    with pytest.raises(UsageError, match="65536"):
        IdGenerator(worker)


@pytest.mark.parametrize("start", [-1, COUNTS + 1])
def test_a_start_beyond_48_bits_is_refused(start):
    with pytest.raises(UsageError, match="start"):
        IdGenerator(0, start)


@pytest.mark.parametrize("worker", [None, "1", b"1", [1]])
def test_a_worker_that_is_no_number_is_refused(worker):
    with pytest.raises(TypeError):
        IdGenerator(worker)


def test_threads_never_get_the_same_id():
    ids = IdGenerator(1)
    found = [[] for _ in range(8)]
    in_threads(8, lambda number: found[number].extend(ids.next() for _ in range(5000)))
    assert all(part == sorted(part) for part in found)
    assert sorted(x for part in found for x in part) == [(1 << 48) + i for i in range(40000)]


def test_threads_that_exhaust_a_generator_share_what_is_left():
    ids = IdGenerator(1, COUNTS - 100)
    found, refused = [], []

    def mint(number):
        for _ in range(50):
            try:
                found.append(ids.next())
            except IdsExhausted:
                refused.append(number)

    in_threads(8, mint)
    assert len(set(found)) == len(found) == 100
    assert len(refused) == 300


@pytest.mark.parametrize("arguments", [(-1, 0), (65536, 0), (0, -1), (0, COUNTS)])
def test_a_name_beyond_its_bits_is_refused(arguments):
    with pytest.raises(UsageError):
        GloballyUniqueId(*arguments)


def test_a_name_shows_as_torch_shows_it():
    assert repr(GloballyUniqueId(1, 2)) == "GloballyUniqueId(created_on=1, local_id=2)"


@given(RANKS, LOCAL_IDS)
def test_equal_names_are_one_key(rank, local):
    one, two = GloballyUniqueId(rank, local), GloballyUniqueId(rank, local)
    assert one == two and hash(one) == hash(two) and len({one, two}) == 1
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != GloballyUniqueId(rank ^ 1, local) and one != GloballyUniqueId(rank, local ^ 1)
    assert one != (rank, local)


def test_a_name_cannot_be_changed():
    name = GloballyUniqueId(1, 2)
    with pytest.raises(AttributeError):
        name.local_id = 3


# Fork data


def test_fork_data_has_the_seven_fields_of_torch():
    fork = ForkData(1, GloballyUniqueId(2, 3), GloballyUniqueId(4, 5), 6, "__torch__.M", (7, 8))
    assert fork.as_tuple() == (1, 2, 3, 4, 5, 6, "__torch__.M")
    assert (fork.owner, fork.parent, fork.type_str, fork.entry) == (1, 6, "__torch__.M", (7, 8))
    assert (fork.rref_id, fork.fork_id) == (GloballyUniqueId(2, 3), GloballyUniqueId(4, 5))


def test_fork_data_shows_all_it_says():
    fork = ForkData(1, GloballyUniqueId(2, 3), GloballyUniqueId(4, 5), 6, entry=(7, 8))
    assert repr(fork) == (
        "ForkData(owner=1, rref_id=GloballyUniqueId(created_on=2, local_id=3), "
        "fork_id=GloballyUniqueId(created_on=4, local_id=5), parent=6, type_str='PyObject', entry=(7, 8))"
    )


@given(FORKS)
@example(ForkData(0, GloballyUniqueId(0, 0), GloballyUniqueId(0, 0), 0))
@example(ForkData(65535, GloballyUniqueId(65535, COUNTS - 1), GloballyUniqueId(65535, COUNTS - 1), 65535, "x" * 65535))
def test_what_is_packed_is_unpacked(fork):
    packed = fork.pack()
    back = ForkData.unpack(packed)
    assert back == fork and hash(back) == hash(fork)
    assert back.as_tuple() == fork.as_tuple() and back.entry == fork.entry
    assert back.pack() == packed


@given(FORKS, FORKS)
def test_fork_data_is_equal_when_all_its_fields_are(one, two):
    assert (one == two) == ((one.as_tuple(), one.entry) == (two.as_tuple(), two.entry))
    assert one != one.as_tuple()


def test_a_plain_type_takes_no_room():
    fork = ForkData(1, GloballyUniqueId(2, 3), GloballyUniqueId(4, 5), 6)
    assert fork.type_str == "PyObject"
    assert len(fork.pack()) == FIXED_BYTES


@pytest.mark.parametrize("owner, parent", [(-1, 0), (65536, 0), (0, -1), (0, 65536)])
def test_ranks_beyond_16_bits_are_refused(owner, parent):
    with pytest.raises(UsageError):
        ForkData(owner, GloballyUniqueId(0, 0), GloballyUniqueId(0, 0), parent)


def test_a_type_longer_than_its_field_is_refused():
    with pytest.raises(UsageError, match="65535"):
        ForkData(0, GloballyUniqueId(0, 0), GloballyUniqueId(0, 0), 0, "x" * 65536)


@pytest.mark.parametrize("type_str", ["", "\ud800"])
def test_a_type_that_cannot_travel_is_refused(type_str):
    with pytest.raises(UsageError):
        ForkData(0, GloballyUniqueId(0, 0), GloballyUniqueId(0, 0), 0, type_str)


@pytest.mark.parametrize("entry", [(-1, 0), (0, -1), (2**32, 0), (0, 2**32), (1,), (1, 2, 3), ()])
def test_an_entry_that_is_none_is_refused(entry):
    with pytest.raises(UsageError):
        ForkData(0, GloballyUniqueId(0, 0), GloballyUniqueId(0, 0), 0, "PyObject", entry)


@given(st.binary(max_size=120))
def test_random_bytes_are_fork_data_or_a_protocol_error(data):
    try:
        fork = ForkData.unpack(data)
    except ProtocolError:
        return
    assert len(data) >= FIXED_BYTES
    assert fork.rref_id.local_id < COUNTS and fork.fork_id.local_id < COUNTS
    assert ForkData.unpack(fork.pack()) == fork


@given(FORKS, st.randoms(use_true_random=False))
def test_damaged_fork_data_is_fork_data_or_a_protocol_error(fork, choice: random.Random):
    data = bytearray(fork.pack())
    for _ in range(choice.randint(1, 4)):
        data[choice.randrange(len(data))] = choice.randrange(256)
    if choice.random() < 0.3:
        del data[choice.randrange(len(data)) :]
    try:
        ForkData.unpack(bytes(data))
    except ProtocolError:
        pass


@given(FORKS)
def test_cut_or_lengthened_fork_data_is_refused(fork):
    packed = fork.pack()
    for wrong in (packed[:-1], packed + b"\0", packed[: FIXED_BYTES - 1], b""):
        with pytest.raises(ProtocolError):
            ForkData.unpack(wrong)


def test_ids_beyond_48_bits_in_fork_data_are_refused():
    packed = ForkData(0, GloballyUniqueId(0, 0), GloballyUniqueId(0, 0), 0).pack()
    for offset in (0, 8):
        wrong = packed[:offset] + struct.pack("=Q", COUNTS) + packed[offset + 8 :]
        with pytest.raises(ProtocolError, match="48 bits"):
            ForkData.unpack(wrong)


def test_a_type_that_is_not_text_is_refused():
    packed = ForkData(0, GloballyUniqueId(0, 0), GloballyUniqueId(0, 0), 0, "ab").pack()
    with pytest.raises(ProtocolError, match="text"):
        ForkData.unpack(packed[:-2] + b"\xff\xfe")


@pytest.mark.parametrize("data", [None, "text", 3, [1]])
def test_fork_data_comes_from_bytes(data):
    with pytest.raises(TypeError):
        ForkData.unpack(data)
