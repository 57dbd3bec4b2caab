"""What is compared: torch's RPC and fastref's, other libraries with objects in other processes, and floors."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from fastref.bench.caller import worker_name
from fastref.bench.contract import Backend
from fastref.bench.floors import LineBackend, MemoryBackend, PipeBackend
from fastref.bench.objects import ObjectCaller, RpcPeer
from fastref.bench.peers import PEERS
from fastref.bench.tensors import TensorCaller
from fastref.bench.wires import WIRES
from fastref.errors import FastrefError

__all__ = ["BACKENDS", "RpcBackend"]


class RpcCaller(TensorCaller, ObjectCaller):
    """All rows that are calls."""

    def __init__(self, rpc: ModuleType) -> None:
        TensorCaller.__init__(self, rpc)
        ObjectCaller.__init__(self, RpcPeer(rpc))


_OFFERED_BY_CALLER = frozenset(name for name in dir(RpcCaller) if not name.startswith("_"))


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
    optional = False

    def __init__(self, name: str, module: str, options: str, *, import_counts: bool) -> None:
        self.name = name
        self.import_counts = import_counts
        self._module_name, self._options = module, options
        self._rpc: ModuleType | None = None

    def missing(self) -> str | None:
        return None

    @contextmanager
    def address(self) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield f"tcp://127.0.0.1:{port}"

    def load(self) -> None:
        self._rpc = importlib.import_module(self._module_name)

    def join(self, rank: int, world_size: int, address: str) -> RpcCaller:
        rpc = self._loaded()
        options = getattr(rpc, self._options)(init_method=address)
        rpc.init_rpc(worker_name(rank), rank=rank, world_size=world_size, rpc_backend_options=options)
        return RpcCaller(rpc)

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


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        RpcBackend("torch", "torch.distributed.rpc", "TensorPipeRpcBackendOptions", import_counts=False),
        LocalRpcBackend("fastref", "fastref.rpc", "RpcBackendOptions", import_counts=True),
        *PEERS,
        PipeBackend(),
        LineBackend(),
        MemoryBackend(),
        *WIRES,
    )
}
