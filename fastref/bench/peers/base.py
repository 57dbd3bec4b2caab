"""What all adapters share: found when installed, joined in processes of the harness, left in order."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from fastref.bench.contract import Measurements
from fastref.bench.objects import OBJECT_ROWS, ObjectCaller, Peer
from fastref.bench.timing import Effort
from fastref.errors import CallTimeout, FastrefError

__all__ = ["PeerBackend", "from_bytes", "to_bytes", "wait_for_servers"]

SERVERS_TIMEOUT_S = 30.0


class PeerBackend:
    """A library with objects in other processes, or a floor that does part of the same work.

    Subclasses say what it is called, and fill in ``connect``, ``disconnect`` and, where the harness starts the
    other processes too, ``serve``.
    """

    name: str
    package: str  # what is imported
    installed_as: str  # what pip calls it
    world_size = 1  # most libraries start their processes themselves
    lacks: frozenset[str] = frozenset()  # rows that have no meaning for it
    observed = False
    import_counts = False
    apart = False
    optional = True

    def __init__(self) -> None:
        self.offers = OBJECT_ROWS - self.lacks
        self._module: ModuleType | None = None

    @property
    def module(self) -> ModuleType:
        """The package, once ``load`` has imported it."""
        if self._module is None:
            raise FastrefError(f"backend {self.name!r} was used before load()")
        return self._module

    def missing(self) -> str | None:
        for package, installed_as in (
            (self.package, self.installed_as),
            ("numpy", "numpy"),
        ):  # tensors travel as arrays
            if importlib.util.find_spec(package.partition(".")[0]) is None:
                return f"not installed (pip install {installed_as})"
        return None

    @contextmanager
    def address(self) -> Iterator[str]:
        # Short, and not below TMPDIR: most libraries make unix sockets there.
        with tempfile.TemporaryDirectory(prefix="fr-bench-", dir="/tmp") as directory:
            yield directory

    def load(self) -> None:
        self._module = importlib.import_module(self.package)

    def join(self, rank: int, world_size: int, address: str) -> Measurements:
        if rank == 0:
            wait_for_servers(address, world_size - 1)
            return ObjectCaller(self.connect(address))
        self.serve(rank, address)
        Path(address, f"ready-{rank}").touch()
        return _Server()

    def leave(self) -> None:
        self.disconnect()

    def connect(self, address: str) -> Peer:
        """Return the library as worker 0 uses it."""
        raise NotImplementedError

    def serve(self, rank: int, address: str) -> None:
        """Serve what worker 0 and others ask for, on a thread; return when the address can be reached."""
        raise NotImplementedError

    def disconnect(self) -> None:
        """End what ``connect`` began; what ``serve`` began ends with its process."""


class _Server:
    """A worker that only serves."""

    def exercise(self, effort: Effort) -> None:
        """Nothing: worker 0 does it."""


def wait_for_servers(address: str, count: int) -> None:
    """Wait until workers 1 to ``count`` serve.

    Raises
    ------
    CallTimeout
        One does not after half a minute.
    """
    deadline = time.monotonic() + SERVERS_TIMEOUT_S
    for rank in range(1, count + 1):
        while not Path(address, f"ready-{rank}").exists():
            if time.monotonic() > deadline:
                raise CallTimeout(f"worker {rank} does not serve after {SERVERS_TIMEOUT_S:g} s", f"worker{rank}")
            time.sleep(0.005)


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return what is sent of a tensor by a library that knows bytes only."""
    return tensor.numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor that may be written, as every receiver of a tensor has."""
    return torch.frombuffer(bytearray(data), dtype=dtype)
