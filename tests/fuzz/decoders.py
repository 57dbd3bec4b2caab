"""The decoders of what a peer can write, with valid input to begin from and the one error that they may raise.

The ring is fed in C: ``tests/c/ring_garbage.c``. Pickles are not here: a peer that may send one may run code anyway.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastref._core import ForkData, GloballyUniqueId
from fastref.codec.stream import decode, encode
from fastref.errors import ProtocolError
from fastref.wire.frame import describe
from fastref.wire.kinds import Kind

__all__ = ["TARGETS", "Fuzzer", "LastInput", "Target"]

LONGEST = 4096
EDGES = [0, 1, *(2**n + d for n in (1, 3, 4, 5, 6, 7, 8, 15, 16, 31, 32, 48, 62, 63, 64) for d in (-1, 0))]


@dataclass(frozen=True)
class Target:
    """One decoder.

    Parameters
    ----------
    read : callable(bytes)
        Raises ``ProtocolError`` for what it does not take; anything else it raises is a failure.
    seeds : list of bytes
        Input that it takes.
    """

    read: Callable[[bytes], object]
    seeds: list[bytes]


def _fork(type_str: str = "PyObject", entry: tuple | None = (1, 2)) -> bytes:
    return ForkData(1, GloballyUniqueId(2, 3), GloballyUniqueId(4, 5), 6, type_str, entry).pack()


def _frame(kind: int, flags: int, forks: list[bytes], payload: bytes) -> bytes:
    packed = b"".join(forks)
    return (
        struct.pack("=HHHHQqIIII", kind, flags, len(forks), 0, 7, 0, 0, len(payload), len(packed), 0) + packed + payload
    )


def _read_stream(data: bytes) -> None:
    value = decode(data, ["one", "two"])
    again = encode(value)
    if again is not None:
        decode(again)


def _read_fork(data: bytes) -> None:
    fork = ForkData.unpack(data)
    if ForkData.unpack(fork.pack()) != fork:
        raise AssertionError("fork data that changes when it is packed again")


def _read_frame(data: bytes) -> None:
    if len(describe(data)["payload"]) > len(data):
        raise AssertionError("a payload longer than its frame")


_VALUES = [
    None,
    True,
    [1, 2.5, "text", b"bytes", (None, {"k": -1})],
    {"a": {"b": [(), [], {}]}},
    torch.arange(3),
    torch.zeros(0, 4),
    [torch.ones(2, 2), "between", torch.zeros(600, dtype=torch.float64)],
    torch.tensor([1 + 2j, 3]),
    torch.tensor(True),
    tuple(range(40)),
]

TARGETS = {
    "frame": Target(
        _read_frame,
        [_frame(kind, 0, [], b"payload") for kind in Kind]
        + [_frame(1, 2, [_fork(), _fork("Tensor", None)], bytes(24)), _frame(2, 5, [_fork("x" * 50)] * 5, b"")],
    ),
    "fork": Target(_read_fork, [_fork(), _fork("Tensor"), _fork("é" * 20, None)]),
    "stream": Target(
        _read_stream, [data for data in map(encode, _VALUES) if data] + [b"t\2\0\0\0R\0\0\0\0R\1\0\0\0", b"R\1\0\0\0"]
    ),
}


class LastInput:
    """A file that holds the input being read, also when reading it ends the process at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> LastInput:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return self

    def keep(self, data: bytes) -> None:
        os.ftruncate(self._fd, len(data))
        os.pwrite(self._fd, data, 0)

    def __exit__(self, *failure: object) -> None:
        os.close(self._fd)


class Fuzzer:
    """Change valid input at random, and read it."""

    def __init__(self, target: Target, seed: int, last: LastInput) -> None:
        self._target, self._choice, self._last = target, random.Random(seed), last
        self._pool = list(target.seeds)
        self.inputs = self.taken = 0

    def run(self, seconds: float) -> None:
        """Go on for so long; raises what a decoder raised that is no ``ProtocolError``."""
        for data in self._target.seeds:
            self._target.read(data)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for _ in range(100):
                self._read(self._changed())

    def _read(self, data: bytes) -> None:
        self._last.keep(data)
        self.inputs += 1
        try:
            self._target.read(data)
        except ProtocolError:
            return
        self.taken += 1
        if len(self._pool) < 2000:  # what got in is worth changing further
            self._pool.append(data)
        else:
            self._pool[self._choice.randrange(len(self._target.seeds), len(self._pool))] = data

    def _changed(self) -> bytes:
        choice = self._choice
        data = bytearray(choice.choice(self._pool))
        for _ in range(choice.choice([1, 1, 1, 2, 4])):
            at = choice.randrange(len(data) + 1)
            match choice.randrange(7):
                case 0:
                    data[at : at + 1] = bytes([choice.choice([0, 1, 127, 128, 255, choice.randrange(256)])])
                case 1 | 2:
                    size = choice.choice([1, 2, 4, 8])
                    data[at : at + size] = (choice.choice(EDGES) % 256**size).to_bytes(size, "little")
                case 3:
                    del data[at : at + choice.randrange(1, 16)]
                case 4:
                    data[at:at] = choice.randbytes(choice.randrange(1, 9))
                case 5:
                    other = choice.choice(self._pool)
                    start = choice.randrange(len(other) + 1)
                    data[at:at] = other[start : start + choice.randrange(64)]
                case 6:
                    del data[at:]
        return bytes(data[:LONGEST])
