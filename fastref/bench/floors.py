"""Floors: one byte through a pipe, one word in shared memory, and memory that is copied and read on the spot."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from fastref.bench.caller import PAUSE_S
from fastref.bench.line import LINE_BYTES, Line
from fastref.bench.tensors import ELEMENT_BYTES, LARGE_BYTES, PUBLISHED_BYTES
from fastref.bench.timing import Effort, Summary, time_apart, time_each
from fastref.errors import FastrefError

__all__ = ["LineBackend", "MemoryBackend", "PipeBackend"]


class FloorCaller:
    """The measurements of a floor that goes to another process and back.

    Parameters
    ----------
    round_trip : callable
        Has the smallest thing go to the other process and back.
    """

    def __init__(self, round_trip: Callable[[], None]) -> None:
        self._round_trip = round_trip

    def call(self, effort: Effort) -> Summary:
        """Microseconds for one round trip."""
        return time_each(self._round_trip, effort)

    def call_asleep(self, effort: Effort) -> Summary:
        """Microseconds for one round trip after a pause."""
        return time_apart(self._round_trip, effort, before=partial(time.sleep, PAUSE_S))

    def exercise(self, effort: Effort) -> None:
        """Go to and fro."""
        for _ in range(effort.exercise_calls):
            self._round_trip()


class _Floor:
    """What floors have in common: there always is one, nothing is imported for it, only its operations are measured."""

    observed = False
    import_counts = False
    apart = False
    optional = False

    def missing(self) -> str | None:
        return None

    def load(self) -> None:
        """Nothing to import."""

    def leave(self) -> None:
        """Pipes close and threads end with the process."""


class PipeBackend(_Floor):
    """Two processes and one byte that goes back and forth through two pipes."""

    name = "pipe"
    world_size = 2
    offers = frozenset({"call", "call_asleep"})

    @contextmanager
    def address(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="fastref-bench-") as directory:
            for rank in range(self.world_size):
                os.mkfifo(Path(directory, str(rank)))
            yield directory

    def join(self, rank: int, world_size: int, address: str) -> FloorCaller:
        # A fifo opens when both ends do: each process must take them in the same order.
        flags = (os.O_RDONLY, os.O_WRONLY) if rank == 0 else (os.O_WRONLY, os.O_RDONLY)
        first, second = (os.open(Path(address, str(number)), flag) for number, flag in enumerate(flags))
        if rank == 1:
            threading.Thread(target=_echo_bytes, args=(second, first), name="echo", daemon=True).start()
            return FloorCaller(PipeEnd(read_from=-1, write_to=-1).round_trip)
        return FloorCaller(PipeEnd(read_from=first, write_to=second).round_trip)


class PipeEnd:
    """One process's ends of the two pipes."""

    def __init__(self, read_from: int, write_to: int) -> None:
        self._read_from, self._write_to = read_from, write_to

    def round_trip(self) -> None:
        """Send one byte and wait until it has come back."""
        os.write(self._write_to, b"x")
        if os.read(self._read_from, 1) != b"x":
            raise FastrefError("the process at the other end of the pipe is gone")


class LineBackend(_Floor):
    """Two processes and one word in shared memory that both poll: no system call, no Python at the other end."""

    name = "line"
    world_size = 2
    offers = frozenset({"call"})

    @contextmanager
    def address(self) -> Iterator[str]:
        with tempfile.NamedTemporaryFile(prefix="fastref-bench-") as file:
            file.write(bytes(LINE_BYTES))
            file.flush()
            yield file.name

    def join(self, rank: int, world_size: int, address: str) -> FloorCaller:
        with open(address, "r+b") as file:
            line = Line(mmap.mmap(file.fileno(), LINE_BYTES))
        if rank == 1:
            threading.Thread(target=line.echo, name="echo", daemon=True).start()
        return FloorCaller(line.round_trip)


def _echo_bytes(read_from: int, write_to: int) -> None:
    while byte := os.read(read_from, 1):
        os.write(write_to, byte)


class MemoryCaller:
    """What a tensor costs when nothing but copying and reading is left.

    Parameters
    ----------
    shared : mmap
        What the readers see too.
    doorbells : list of int
        One pipe to each reader.
    answers : int
        The pipe that all readers answer through.
    """

    def __init__(self, shared: mmap.mmap, doorbells: list[int], answers: int) -> None:
        self._shared = torch.frombuffer(shared, dtype=torch.float32)
        self._doorbells, self._answers = doorbells, answers

    def exercise(self, effort: Effort) -> None:
        """Nothing to warm up: each measurement does that for itself."""

    def read_1m(self, effort: Effort) -> Summary:
        """Microseconds to sum 1 MiB that are there already."""
        return time_each(torch.ones((1 << 20) // ELEMENT_BYTES).sum, effort)

    def read_128m(self, effort: Effort) -> Summary:
        """Microseconds to sum 128 MiB that are there already."""
        return time_each(torch.ones(LARGE_BYTES // ELEMENT_BYTES).sum, effort)

    def send_128m(self, effort: Effort) -> Summary:
        """Microseconds to copy 128 MiB into memory that is warm, and sum them."""
        source = torch.ones(LARGE_BYTES // ELEMENT_BYTES)
        target = torch.ones_like(source)
        return time_each(lambda: target.copy_(source).sum(), effort)

    def publish(self, effort: Effort) -> Summary:
        """Microseconds to copy 4 MiB into shared memory, wake every reader, and hear that each has looked."""
        source = torch.zeros(PUBLISHED_BYTES // ELEMENT_BYTES)
        version = 0

        def write() -> None:
            nonlocal version
            version = version % 255 + 1  # what fits in the byte that readers are woken with
            source.fill_(version)

        def give_out() -> None:
            self._shared.copy_(source)
            for doorbell in self._doorbells:
                os.write(doorbell, bytes([version]))
            seen = b""
            while len(seen) < len(self._doorbells):
                answer = os.read(self._answers, len(self._doorbells))
                if not answer:
                    raise FastrefError("the readers of the shared memory are gone")
                seen += answer
            if seen != bytes([version]) * len(seen):
                raise FastrefError(f"readers of version {version} saw {sorted(set(seen))}")

        return time_apart(give_out, effort, before=write)


class MemoryBackend(_Floor):
    """One process that copies and reads; for a published version, others that it wakes through pipes."""

    name = "memory"
    world_size = 1
    offers = frozenset({"read_1m", "read_128m", "send_128m", "publish"})

    @contextmanager
    def address(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="fastref-bench-") as directory:
            descriptor = os.memfd_create("fastref-bench")
            try:
                os.ftruncate(descriptor, PUBLISHED_BYTES)
                Path(directory, "shared").symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
                yield directory
            finally:
                os.close(descriptor)

    def join(self, rank: int, world_size: int, address: str) -> MemoryCaller:
        with open(Path(address, "shared"), "r+b") as file:
            shared = mmap.mmap(file.fileno(), PUBLISHED_BYTES)
        answers = _fifo(Path(address, "answers"))
        doorbells = [_fifo(Path(address, str(reader))) for reader in range(1, world_size)]
        if rank > 0:
            threading.Thread(
                target=_look, args=(doorbells[rank - 1], shared, answers), name="reader", daemon=True
            ).start()
        return MemoryCaller(shared, doorbells, answers)


def _fifo(path: Path) -> int:
    try:
        os.mkfifo(path)
    except FileExistsError:
        pass  # another worker came first
    return os.open(path, os.O_RDWR)  # on Linux that waits for nobody


def _look(doorbell: int, shared: mmap.mmap, answers: int) -> None:
    tensor = torch.frombuffer(shared, dtype=torch.float32)
    while version := os.read(doorbell, 1):
        whole = bool(tensor[0] == version[0]) and bool(tensor[-1] == version[0])
        os.write(answers, version if whole else bytes(1))
