"""Frames: what is not one is refused, and the two lists of kinds are one list."""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastref._core import ForkData, GloballyUniqueId
from fastref.errors import ProtocolError
from fastref.wire.frame import describe
from fastref.wire.kinds import Kind

# kind, flags, references, slot, call, deadline_ns, callable, payload, forks_size, unused
HEADER = struct.Struct("=HHHHQqIIII")
FLAG_BLOCK, FLAG_LOCAL = 2, 32
DECLARATIONS = (Path(__file__).parent.parent / "fastref" / "wire" / "frame.pxd").read_text()


def frame(kind=1, flags=0, forks=(), payload=b"", slot=0xFFFF, call=0, deadline_ns=0, number=0, claims=None) -> bytes:
    """Return a frame; ``claims`` replaces sizes that it says."""
    packed = b"".join(fork.pack() for fork in forks)
    sizes = {"references": len(forks), "payload": len(payload), "forks_size": len(packed)} | (claims or {})
    head = HEADER.pack(
        kind, flags, sizes["references"], slot, call, deadline_ns, number, sizes["payload"], sizes["forks_size"], 0
    )
    return head + packed + payload


FORKS = st.builds(
    ForkData,
    st.integers(0, 65535),
    st.builds(GloballyUniqueId, st.integers(0, 65535), st.integers(0, 2**48 - 1)),
    st.builds(GloballyUniqueId, st.integers(0, 65535), st.integers(0, 2**48 - 1)),
    st.integers(0, 65535),
    st.sampled_from(["PyObject", "Tensor", "__torch__.Net"]),
    st.none() | st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
FRAMES = st.builds(
    frame,
    kind=st.sampled_from(list(Kind)),
    flags=st.sampled_from([0, 1, 4, 8, 16, 29]),
    forks=st.lists(FORKS, max_size=4),
    payload=st.binary(max_size=64),
    slot=st.integers(0, 65535),
    call=st.integers(0, 2**64 - 1),
    deadline_ns=st.integers(-(2**63), 2**63 - 1),
    number=st.integers(0, 2**32 - 1),
)


def test_kinds_are_the_same_in_python_and_in_c():
    declared = dict(re.findall(r"^    ([A-Z_]+) = (\d+)$", DECLARATIONS, re.M))
    in_c = {name: int(number) for name, number in declared.items() if not name.startswith(("FLAG_", "NO_"))}
    assert in_c == {kind.name: kind.value for kind in Kind}


def test_kinds_leave_no_gap():
    assert [kind.value for kind in Kind] == list(range(1, len(Kind) + 1))


def test_flags_are_bits_of_their_own():
    flags = [int(n) for n in re.findall(r"^    FLAG_[A-Z]+ = (\d+)", DECLARATIONS, re.M)]
    assert len(flags) == len(set(flags)) > 0 and all(n & (n - 1) == 0 for n in flags)


@given(FRAMES)
def test_a_frame_says_what_was_put_in(data):
    kind, flags, references, slot, call, deadline_ns, number, payload, forks_size, _ = HEADER.unpack_from(data)
    assert describe(data) == {
        "kind": Kind(kind),
        "flags": flags,
        "references": references,
        "slot": slot,
        "call": call,
        "deadline_ns": deadline_ns,
        "callable": number,
        "payload": data[HEADER.size + forks_size :],
    }


@given(FRAMES)
def test_a_frame_that_is_cut_or_too_long_is_refused(data):
    for wrong in (data[:-1], data + b"\0", data[: HEADER.size - 1], data[1:], b""):
        with pytest.raises(ProtocolError):
            describe(wrong)


@pytest.mark.parametrize("kind", [0, len(Kind) + 1, 255, 65535])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ProtocolError):
        describe(frame(kind))


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_block_is_named_by_24_bytes(size):
    assert describe(frame(flags=FLAG_BLOCK, payload=bytes(24)))["payload"] == bytes(24)
    with pytest.raises(ProtocolError):
        describe(frame(flags=FLAG_BLOCK, payload=bytes(size)))


def test_what_never_travels_is_refused():
    with pytest.raises(ProtocolError):
        describe(frame(flags=FLAG_LOCAL))


FORK = ForkData(1, GloballyUniqueId(2, 3), GloballyUniqueId(4, 5), 6, "Tensor", (7, 8))


@pytest.mark.parametrize(
    "claims",
    [
        {"references": 0},
        {"references": 1},
        {"references": 3},
        {"references": 65535},
        {"forks_size": 45},
        {"forks_size": 2**32 - 1},
        {"payload": 2**32 - 1},
        {"forks_size": 0, "payload": 92 + 3},
    ],
)
def test_sizes_that_do_not_agree_are_refused(claims):
    describe(frame(forks=[FORK, FORK], payload=b"abc"))
    with pytest.raises(ProtocolError):
        describe(frame(forks=[FORK, FORK], payload=b"abc", claims=claims))


@pytest.mark.parametrize("offset, value", [(6, 1), (14, 1), (34, 2), (32, 255)])
def test_a_damaged_reference_makes_the_frame_none(offset, value):
    """Ids beyond 48 bits, an entry flag that is none, a type that runs over the end."""
    data = bytearray(frame(forks=[FORK]))
    data[HEADER.size + offset] = value
    with pytest.raises(ProtocolError):
        describe(bytes(data))


@given(st.binary(max_size=200))
@example(bytes(40))
@example(HEADER.pack(1, 0, 0, 0, 0, 0, 0, 0, 0, 0))
def test_random_bytes_are_a_frame_or_a_protocol_error(data):
    try:
        assert describe(data)["kind"] in Kind
    except ProtocolError:
        pass


@given(FRAMES, st.randoms(use_true_random=False))
def test_a_damaged_frame_is_a_frame_or_a_protocol_error(data, choice: random.Random):
    damaged = bytearray(data)
    for _ in range(choice.randint(1, 6)):
        damaged[choice.randrange(len(damaged))] = choice.choice([0, 1, 255, choice.randrange(256)])
    try:
        described = describe(bytes(damaged))
    except ProtocolError:
        return
    assert len(described["payload"]) <= len(damaged)
