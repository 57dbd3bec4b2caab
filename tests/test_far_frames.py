"""Frames of a worker with which no memory is shared: what only memory could mean is refused, and the link is cut."""

from __future__ import annotations

import struct

import pytest

from fastref.codec.stream import encode
from fastref.testing import Network
from fastref.wire import Kind

HEAD = struct.Struct(
    "=HHHHQqIIII"
)  # kind, flags, references, slot, call, deadline, callable, payload, forks, forks behind
BLOCK = struct.Struct("=QQII")  # offset, size, entry, generation
NO_SLOT, NO_ENTRY = 0xFFFF, 0xFFFFFFFF
PICKLED, IN_BLOCK, METHOD, FORKS_IN_BLOCK, FORWARDED = 1, 2, 8, 64, 256


def frame(kind: Kind, flags: int, payload: bytes, references: int = 0, slot: int = NO_SLOT, behind: int = 0) -> bytes:
    return HEAD.pack(kind, flags, references, slot, 7, 0, 0, len(payload), 0, behind) + payload


def block(size: int, offset: int = 0) -> bytes:
    return BLOCK.pack(offset, size, NO_ENTRY, 0)


WRONG = {
    "a block of nothing": frame(Kind.PYTHON_CALL, IN_BLOCK, block(0)),
    "a block somewhere": frame(Kind.PYTHON_CALL, IN_BLOCK, block(4096, 4096)),
    "a block of all there is": frame(Kind.PYTHON_CALL, IN_BLOCK, block(2**64 - 1)),
    "references in a block": frame(Kind.PYTHON_CALL, IN_BLOCK | FORKS_IN_BLOCK, block(64), references=1, behind=64),
    "what is handed on": frame(Kind.PYTHON_CALL, FORWARDED, b"N"),
    "a note in a block": frame(Kind.GREETING, IN_BLOCK, block(16)),
    "an answer in a block": frame(Kind.PYTHON_RET, IN_BLOCK, block(16), slot=3),
    "a value of nobody": frame(Kind.RREF_FETCH_CALL, 0, b""),
    "a method of nobody": frame(Kind.PYTHON_CALL, METHOD, b"t\0\0\0\0"),
    "a value to be kept nowhere": frame(Kind.PYTHON_REMOTE_CALL, 0, b"t\0\0\0\0"),
    "no frame": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_frame_that_only_shared_memory_could_explain_cuts_the_link(what: str) -> None:
    network = Network(3, hosts="abb")
    assert network.channel(0, 1).send(WRONG[what])
    network.settle()
    assert network[1].peers[0].is_dead
    assert not network[1].peers[2].is_dead
    assert network[2].rpc_async(1, len, ([1, 2],)) is not None  # the others go on
    network.settle()


def test_only_a_worker_that_shares_no_memory_says_that_a_value_is_there() -> None:
    network = Network(2)
    payload = encode([0, 0, False])
    assert payload is not None
    assert network.channel(0, 1).send(frame(Kind.SETTLED, 0, payload))
    network.settle()
    assert network[1].peers[0].is_dead


@pytest.mark.parametrize("value", [[0], [2**40, 0, False], [-1, 0, False], ["0", 0, False], None])
def test_a_note_about_a_value_that_cannot_be_cuts_the_link(value: object) -> None:
    network = Network(2, hosts="ab")
    payload = encode(value)
    assert payload is not None
    assert network.channel(0, 1).send(frame(Kind.SETTLED, 0, payload))
    network.settle()
    assert network[1].peers[0].is_dead
