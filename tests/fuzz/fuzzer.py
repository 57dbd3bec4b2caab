"""What feeds a decoder: valid input, changed at random, the decoder's one error, and the last input kept in a file."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastref.errors import ProtocolError

__all__ = ["Fuzzer", "LastInput", "Target"]

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
    cut : callable(bytes) -> list of bytes, optional
        Cuts input into what may come again, in another order, or not at all.
    """

    read: Callable[[bytes], object]
    seeds: list[bytes]
    cut: Callable[[bytes], list[bytes]] | None = None


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
        deadline = time.monotonic() + seconds
        self.run_through(0)
        while time.monotonic() < deadline:
            for _ in range(100):
                self._read(self._changed())

    def run_through(self, count: int) -> None:
        """Try the valid input, and ``count`` others that depend on the seed alone; raises as ``run``."""
        for data in self._target.seeds:
            self._target.read(data)
        for _ in range(count):
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
        if self._target.cut is not None and choice.randrange(2):
            data = self._rearranged(self._target.cut(bytes(data)))
            if choice.randrange(2):
                return bytes(data[:LONGEST])
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

    def _rearranged(self, pieces: list[bytes]) -> bytearray:
        choice = self._choice
        for _ in range(choice.choice([1, 1, 2])):
            if not pieces:
                break
            at, to = choice.randrange(len(pieces)), choice.randrange(len(pieces))
            match choice.randrange(3):
                case 0:
                    pieces.insert(to, pieces[at])
                case 1:
                    pieces[at], pieces[to] = pieces[to], pieces[at]
                case 2:
                    del pieces[at]
        return bytearray().join(pieces)
