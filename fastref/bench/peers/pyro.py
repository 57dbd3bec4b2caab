"""Pyro5: objects of daemons, called through proxies made of their URIs; bytes by marshal, unix sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastref.bench import work
from fastref.bench.peers.base import PeerBackend, from_bytes, to_bytes

__all__ = ["PyroBackend"]

SERVANT = "servant"
BATCH = 50


class Servant:
    """What a daemon offers: it makes objects, lets go of them, and calls objects of others."""

    def __init__(self, pyro: ModuleType, daemon: Any) -> None:
        self._pyro, self._daemon = pyro, daemon

    def create(self, ledger: str) -> str:
        """Make an object; return its URI."""
        return str(self._daemon.register(self._pyro.expose(PyroThing)(ledger)))

    def destroy(self, uri: str) -> None:
        """Let go of an object."""
        self._daemon.unregister(self._pyro.URI(uri).object)

    def pass_on(self, uri: str) -> None:
        """Call the empty method of an object by its URI."""
        with self._pyro.Proxy(uri) as thing:
            thing.touch()


class PyroThing(work.Thing):
    """A ``work.Thing`` whose tensors come and go as bytes."""

    def touch(self) -> None:
        """Do nothing, and be counted."""
        super().touch()

    def touches(self) -> int:
        """Return how often a method of this object was called, this call included."""
        return super().touches()

    def echo(self, value: bytes) -> bytes:
        """Return the argument, which was a tensor here."""
        return to_bytes(from_bytes(value, torch.int32))

    def fetch(self) -> bytes:
        """Return the tensor that it holds."""
        return to_bytes(self.tensor())


class PyroPeer:
    """Connections to the daemons of workers 1 and 2. An object is let go of when its user says so."""

    def __init__(self, pyro: ModuleType, address: str) -> None:
        self._pyro = pyro
        self._owner, self._third = (pyro.Proxy(f"PYRO:{SERVANT}@./u:{_socket(address, rank)}") for rank in (1, 2))

    def create(self, ledger: str) -> Any:
        return self._pyro.Proxy(self._owner.create(ledger))

    def touch(self, thing: Any) -> None:
        thing.touch()

    def touches(self, thing: Any) -> int:
        return int(thing.touches())

    def touch_many(self, thing: Any, count: int) -> None:
        with self._pyro.Proxy(thing._pyroUri) as proxy:
            proxy._pyroSerializer = "serpent"  # marshal fails with batches
            for began in range(0, count, BATCH):
                batch = self._pyro.BatchProxy(proxy)
                for _ in range(min(BATCH, count - began)):
                    batch.touch()
                for _ in batch():
                    pass  # raises what a call raised

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        return from_bytes(thing.echo(to_bytes(tensor)), tensor.dtype)

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        return lambda: from_bytes(thing.fetch(), torch.float32)

    def pass_on(self, thing: Any) -> None:
        self._third.pass_on(str(thing._pyroUri))

    def release(self, thing: Any) -> None:
        self._owner.destroy(str(thing._pyroUri))
        thing._pyroRelease()


class PyroBackend(PeerBackend):
    """Worker 1 and 2 run a daemon each."""

    name = "pyro5"
    package = "Pyro5.api"
    installed_as = "Pyro5"
    world_size = 3

    def load(self) -> None:
        super().load()
        self.module.config.SERIALIZER = "marshal"

    def connect(self, address: str) -> PyroPeer:
        return PyroPeer(self.module, address)

    def serve(self, rank: int, address: str) -> None:
        daemon = self.module.Daemon(unixsocket=_socket(address, rank))
        daemon.register(self.module.expose(Servant)(self.module, daemon), SERVANT)
        threading.Thread(target=daemon.requestLoop, name="daemon", daemon=True).start()


def _socket(address: str, rank: int) -> str:
    return str(Path(address, f"socket-{rank}"))
