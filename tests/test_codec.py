"""The fast encoding: exact round trips, a clear no to all the rest, and no input that does harm."""

from __future__ import annotations

import random
import struct
import sys
import tracemalloc
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastref.codec.stream import decode, encode
from fastref.errors import ProtocolError
from tests.test_codec_tensors import same, tensor_bytes

LARGEST, SMALLEST = 2**63 - 1, -(2**63)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.none() | st.booleans() | st.integers(SMALLEST, LARGEST) | st.floats() | TEXT | st.binary(max_size=12)
KEYS = (
    st.none()
    | st.booleans()
    | st.integers(SMALLEST, LARGEST)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=6)
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def nested(depth: int, kind=list):
    value = kind()
    for _ in range(depth):
        value = kind([value])
    return value


# Plain values


@given(VALUES)
def test_a_plain_value_comes_back_as_it_was(value):
    data = encode(value)
    assert data is None or same(decode(data), value)


@given(PLAIN)
def test_a_single_plain_value_never_takes_pickle(value):
    assert encode(value) is not None


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        LARGEST,
        SMALLEST,
        0.0,
        -0.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        5e-324,
        "",
        "\0",
        "é",
        "\U0001f600",
        b"",
        b"\0\xff",
        (),
        [],
        {},
        ((),),
        [[]],
        {(): {}},
        {1: True},
        [True, 1, 1.0],
    ],
    ids=repr,
)
def test_an_edge_comes_back_as_it_was(value):
    assert same(decode(encode(value)), value)


def test_every_bit_of_a_nan_survives():
    [value] = struct.unpack("=d", bytes.fromhex("010000000000f8ff"))
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize("depth", [10, 63])
@pytest.mark.parametrize("kind", [list, tuple])
def test_nesting_that_is_not_deep_is_encoded(depth, kind):
    if kind is list:
        depth = min(depth, 31)  # as many mutable objects are remembered
    assert same(decode(encode(nested(depth, kind))), nested(depth, kind))


class Number(int):
    pass


class Text(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        -(2**63) - 1,
        10**1000,
        "\ud800",
        "a\udfff",
        1j,
        Number(3),
        Text("a"),
        {1},
        frozenset(),
        range(3),
        OrderedDict(),
        object(),
        int,
        len,
        lambda: 0,
        Ellipsis,
        slice(1),
        [2**63],
        {"a": ("\ud800",)},
        nested(100),
        nested(100, tuple),
        nested(100_000, tuple),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_encoding_has_no_form_for_takes_pickle(value):
    assert encode(value) is None


def test_a_mutable_object_that_is_met_twice_takes_pickle():
    inner: list = []
    looped: list = []
    looped.append(looped)
    tensor = torch.ones(2)
    for value in ([inner, inner], (inner, {1: inner}), looped, {"a": (d := {}), "b": d}, [tensor, tensor]):
        assert encode(value) is None
    assert same(decode(encode([[], []])), [[], []])


def test_immutable_objects_that_are_shared_do_not_explode():
    """Written once for each meeting this would be 2**60 numbers."""
    value: tuple = (1,)
    for _ in range(60):
        value = (value, value)
    data = encode(value)
    assert data is None or len(data) < 1 << 20


def test_a_reference_that_the_frame_does_not_carry_is_refused():
    data = b"R" + struct.pack("=I", 1)
    with pytest.raises(ProtocolError, match="reference 1 of 1"):
        decode(data, ["only"])
    assert decode(b"R" + struct.pack("=I", 0), ["only"]) == "only"


def test_long_bytes_are_bytes():
    for size in (65_535, 65_536, 65_537, 1 << 20):
        data = bytes(range(256)) * (size // 256 + 1)
        assert decode(encode(data[:size])) == data[:size]
        assert decode(encode([1, data[:size], "a", (data[:size], 2)])) == [1, data[:size], "a", (data[:size], 2)]
    long = bytes(100_000)
    assert encode([long, long]) is None  # pickle keeps that they are one object


# Bad input


def claim(tag: bytes, size: int) -> bytes:
    return tag + struct.pack("=I", size)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Z",
        b"\0",
        b"i",
        b"i1234567",
        b"f",
        b"NN",
        b"s",
        claim(b"s", 1),
        claim(b"b", 2**32 - 1),
        claim(b"s", 1) + b"\xff",
        claim(b"s", 3) + b"\xed\xa0\x80",
        claim(b"d", 1) + claim(b"l", 0) + b"N",
        claim(b"d", 1) + claim(b"d", 0) + b"N",
        claim(b"d", 1) + b"N",
        claim(b"t", 2) + b"N",
        claim(b"l", 2**32 - 1),
        claim(b"t", 2**32 - 1),
        claim(b"d", 2**31),
        claim(b"R", 0),
        claim(b"t", 1) * 200 + b"N",
        claim(b"l", 1) * 100_000 + b"N",
        claim(b"t", 3) + b"Ni" + b"x" * 9,
        b"B" + bytes(8),
        b"B" + struct.pack("=Q", 100_000) + bytes(1000),
        *(b"B" + struct.pack("=Q", size) + bytes(200) for size in (2**63 - 1, 2**63, 2**64 - 1)),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_bytes_that_are_no_value_are_refused(data):
    with pytest.raises(ProtocolError):
        decode(data)


@pytest.mark.parametrize("tag", [b"t", b"l"])
def test_claims_cost_no_more_memory_than_there_are_bytes(tag):
    """Each level claims as many elements as there are bytes left: 60 times 8 MiB, if it were believed."""
    room = 1 << 20
    data = b"".join(claim(tag, room - 5 * (i + 1)) for i in range(60)) + b"N" * (room - 300 - 9)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 40 * room
    finally:
        tracemalloc.stop()


def decodes_or_refuses(data: bytes) -> None:
    try:
        decode(data)
    except ProtocolError:
        pass


@given(st.binary(max_size=100))
def test_random_bytes_are_a_value_or_a_protocol_error(data):
    decodes_or_refuses(data)


@given(
    st.lists(
        st.sampled_from([b"N", b"T", b"t\2\0\0\0", b"l\1\0\0\0", b"d\1\0\0\0", b"s\1\0\0\0x", b"b\0\0\0\0", b"X"]),
        max_size=30,
    )
)
def test_well_formed_pieces_are_a_value_or_a_protocol_error(pieces):
    decodes_or_refuses(b"".join(pieces))


@given(VALUES, st.randoms(use_true_random=False))
def test_a_damaged_encoding_is_a_value_or_a_protocol_error(value, choice: random.Random):
    data = bytearray(encode([value, torch.arange(choice.randint(0, 5))]) or b"l\1\0\0\0N")
    for _ in range(choice.randint(1, 4)):
        data[choice.randrange(len(data))] = choice.choice([0, 1, 127, 128, 255, choice.randrange(256)])
    if choice.random() < 0.3:
        del data[choice.randrange(len(data)) :]
    decodes_or_refuses(bytes(data))


@given(VALUES)
def test_every_cut_of_an_encoding_is_refused(value):
    data = encode(value) or b""
    for length in range(len(data)):
        with pytest.raises(ProtocolError):
            decode(data[:length])


def test_a_refused_payload_leaks_nothing():
    """Tuples that were begun, tensors that were read before the damage."""
    bad = claim(b"t", 3) + tensor_bytes() + claim(b"l", 1) + b"N" + b"Z"
    marker = object()
    before = sys.getrefcount(marker)
    for _ in range(1000):
        with pytest.raises(ProtocolError):
            decode(claim(b"t", 3) + claim(b"R", 0) + claim(b"R", 0) + b"Z", [marker])
        with pytest.raises(ProtocolError):
            decode(bad)
    assert sys.getrefcount(marker) == before
