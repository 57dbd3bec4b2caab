"""What is compared: torch's RPC, fastref's, and two floors: one byte through a pipe, one word in shared memory."""

from __future__ import annotations

import importlib
import mmap
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Protocol

from fastref.bench.caller import Caller, worker_name
from fastref.bench.line import LINE_BYTES, Line
from fastref.bench.timing import Effort, Summary, time_each
from fastref.errors import FastrefError

__all__ = ["BACKENDS", "Backend", "Measurements"]


class Measurements(Protocol):
    """What a joined worker offers: ``exercise``, and methods from an ``Effort`` to a ``Summary``."""

    def exercise(self, effort: Effort) -> None: ...


class Backend(Protocol):
    """One side of the comparison.

    ``load``, ``join`` and ``leave`` run in a worker, ``address`` in the process that starts the workers.
    """

    name: str
    world_size: int
    offers: frozenset[str]  # names of methods of what join returns
    observed: bool  # whether start, memory and idleness are asked of it
    import_counts: bool  # whether importing the backend is memory that it costs

    def address(self) -> AbstractContextManager[str]:
        """Say where the workers of one group meet, and clean up behind them."""

    def load(self) -> None:
        """Import what the worker needs."""

    def join(self, rank: int, address: str) -> Measurements:
        """Enter the group; return when all have."""

    def leave(self) -> None:
        """Leave the group in order."""


_OFFERED_BY_CALLER = frozenset(name for name in vars(Caller) if not name.startswith("_"))


class RpcBackend:
    """A module with the names of ``torch.distributed.rpc``, with default options but for the meeting place.

    Parameters
    ----------
    name : str
        How the backend is called in tables.
    module, options : str
        The module, and the options class in it.
    import_counts : bool
        Whether importing the module counts as memory that the backend costs.
    """

    world_size = 3
    offers = _OFFERED_BY_CALLER
    observed = True

    def __init__(self, name: str, module: str, options: str, *, import_counts: bool) -> None:
        self.name = name
        self.import_counts = import_counts
        self._module_name, self._options = module, options
        self._rpc: ModuleType | None = None

    @contextmanager
    def address(self) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield f"tcp://127.0.0.1:{port}"

    def load(self) -> None:
        self._rpc = importlib.import_module(self._module_name)

    def join(self, rank: int, address: str) -> Caller:
        rpc = self._loaded()
        options = getattr(rpc, self._options)(init_method=address)
        rpc.init_rpc(worker_name(rank), rank=rank, world_size=self.world_size, rpc_backend_options=options)
        return Caller(rpc)

    def leave(self) -> None:
        self._loaded().shutdown()

    def _loaded(self) -> ModuleType:
        if self._rpc is None:
            raise FastrefError(f"backend {self.name!r} was used before load()")
        return self._rpc


class LocalRpcBackend(RpcBackend):
    """The same, meeting without a port, as programs on one host do."""

    @contextmanager
    def address(self) -> Iterator[str]:
        yield f"local://bench-{os.getpid()}-{os.urandom(4).hex()}"


class FloorCaller:
    """The one measurement a floor offers.

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

    def exercise(self, effort: Effort) -> None:
        """Go to and fro."""
        for _ in range(effort.exercise_calls):
            self._round_trip()


class PipeBackend:
    """Two processes and one byte that goes back and forth through two pipes."""

    name = "pipe"
    world_size = 2
    offers = frozenset({"call", "exercise"})
    observed = False
    import_counts = False

    @contextmanager
    def address(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="fastref-bench-") as directory:
            for rank in range(self.world_size):
                os.mkfifo(Path(directory, str(rank)))
            yield directory

    def load(self) -> None:
        """Nothing to import."""

    def join(self, rank: int, address: str) -> FloorCaller:
        # A fifo opens when both ends do: each process must take them in the same order.
        flags = (os.O_RDONLY, os.O_WRONLY) if rank == 0 else (os.O_WRONLY, os.O_RDONLY)
        first, second = (os.open(Path(address, str(number)), flag) for number, flag in enumerate(flags))
        if rank == 1:
            threading.Thread(target=_echo_bytes, args=(second, first), name="echo", daemon=True).start()
            return FloorCaller(PipeEnd(read_from=-1, write_to=-1).round_trip)
        return FloorCaller(PipeEnd(read_from=first, write_to=second).round_trip)

    def leave(self) -> None:
        """The pipes close with the process."""


class PipeEnd:
    """One process's ends of the two pipes."""

    def __init__(self, read_from: int, write_to: int) -> None:
        self._read_from, self._write_to = read_from, write_to

    def round_trip(self) -> None:
        """Send one byte and wait until it has come back."""
        os.write(self._write_to, b"x")
        if os.read(self._read_from, 1) != b"x":
            raise FastrefError("the process at the other end of the pipe is gone")


class LineBackend:
    """Two processes and one word in shared memory that both poll: no system call, no Python at the other end."""

    name = "line"
    world_size = 2
    offers = frozenset({"call", "exercise"})
    observed = False
    import_counts = False

    @contextmanager
    def address(self) -> Iterator[str]:
        with tempfile.NamedTemporaryFile(prefix="fastref-bench-") as file:
            file.write(bytes(LINE_BYTES))
            file.flush()
            yield file.name

    def load(self) -> None:
        """Nothing to import."""

    def join(self, rank: int, address: str) -> FloorCaller:
        with open(address, "r+b") as file:
            line = Line(mmap.mmap(file.fileno(), LINE_BYTES))
        if rank == 1:
            threading.Thread(target=line.echo, name="echo", daemon=True).start()
        return FloorCaller(line.round_trip)

    def leave(self) -> None:
        """The thread that polls ends with its process."""


def _echo_bytes(read_from: int, write_to: int) -> None:
    while byte := os.read(read_from, 1):
        os.write(write_to, byte)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        RpcBackend("torch", "torch.distributed.rpc", "TensorPipeRpcBackendOptions", import_counts=False),
        LocalRpcBackend("fastref", "fastref.rpc", "RpcBackendOptions", import_counts=True),
        PipeBackend(),
        LineBackend(),
    )
}
