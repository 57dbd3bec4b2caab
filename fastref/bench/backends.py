"""What is compared: torch's RPC and fastref's, other libraries with objects in other processes, and floors."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from fastref.bench.caller import worker_name
from fastref.bench.contract import Backend
from fastref.bench.floors import LineBackend, MemoryBackend, PipeBackend
from fastref.bench.hosts import ADDRESSES, why_not_two_hosts
from fastref.bench.objects import ObjectCaller, RpcPeer
from fastref.bench.peers import PEERS
from fastref.bench.tensors import TensorCaller
from fastref.bench.training import TrainingCaller
from fastref.bench.wires import LOOPBACK, WIRE_ROWS, WIRES, WireCaller, free_port
from fastref.errors import FastrefError

__all__ = ["BACKENDS", "RpcBackend"]


class RpcCaller(TensorCaller, TrainingCaller, ObjectCaller):
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
    apart = False
    optional = False
    settings: dict[str, Any] = {}  # further options

    def __init__(self, name: str, module: str, options: str, *, import_counts: bool) -> None:
        self.name = name
        self.import_counts = import_counts
        self._module_name, self._options = module, options
        self._rpc: ModuleType | None = None

    def missing(self) -> str | None:
        return None

    @contextmanager
    def address(self) -> Iterator[str]:
        yield f"tcp://{ADDRESSES[0] if self.apart else LOOPBACK}:{free_port()}"

    def load(self) -> None:
        self._rpc = importlib.import_module(self._module_name)

    def join(self, rank: int, world_size: int, address: str) -> RpcCaller | WireCaller:
        rpc = self._loaded()
        options = getattr(rpc, self._options)(init_method=address, **self.settings)
        rpc.init_rpc(worker_name(rank), rank=rank, world_size=world_size, rpc_backend_options=options)
        return self.caller(rpc)

    def leave(self) -> None:
        self._loaded().shutdown()

    def _loaded(self) -> ModuleType:
        if self._rpc is None:
            raise FastrefError(f"backend {self.name!r} was used before load()")
        return self._rpc

    def caller(self, rpc: ModuleType) -> RpcCaller | WireCaller:
        """Return what measures, over the module that has joined."""
        return RpcCaller(rpc)


class LocalRpcBackend(RpcBackend):
    """The same, meeting without a port, as programs on one host do."""

    @contextmanager
    def address(self) -> Iterator[str]:
        yield f"local://bench-{os.getpid()}-{os.urandom(4).hex()}"


class RpcOverTcp(RpcBackend):
    """The same, its workers kept from sharing memory.

    Parameters
    ----------
    name, module
        As for ``RpcBackend``.
    apart : bool
        Worker 0 is on another host than the others.
    settings : dict
        Of its ``TensorPipeRpcBackendOptions``.
    environment : dict
        Of its workers.
    """

    offers = WIRE_ROWS
    observed = False

    def __init__(
        self, name: str, module: str, apart: bool, settings: dict[str, Any], environment: dict[str, str]
    ) -> None:
        super().__init__(name, module, "TensorPipeRpcBackendOptions", import_counts=False)
        self.apart = self.optional = apart  # not every system lets anybody make hosts
        self.settings, self._environment = settings, environment

    def missing(self) -> str | None:
        return why_not_two_hosts() if self.apart else None

    def join(self, rank: int, world_size: int, address: str) -> RpcCaller | WireCaller:
        os.environ.update(self._environment)
        return super().join(rank, world_size, address)

    def caller(self, rpc: ModuleType) -> WireCaller:
        return WireCaller(RpcPeer(rpc))


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        RpcBackend("torch", "torch.distributed.rpc", "TensorPipeRpcBackendOptions", import_counts=False),
        LocalRpcBackend("fastref", "fastref.rpc", "RpcBackendOptions", import_counts=True),
        *PEERS,
        PipeBackend(),
        LineBackend(),
        MemoryBackend(),
        *(
            RpcOverTcp(f"{name}_{suffix}", module, apart, settings, environment)
            for suffix, apart in (("tcp", False), ("veth", True))
            for name, module, settings, environment in (
                ("torch", "torch.distributed.rpc", {"_transports": ["uv"], "_channels": ["basic"]}, {}),
                ("fastref", "fastref.rpc", {}, {"FASTREF_TRANSPORT": "tcp"}),
            )
        ),
        *WIRES,
    )
}
